//! Clusters, endpoints, load balancing, circuit breakers, connection pools.

/// A worker's handle to all clusters.
#[derive(Default)]
pub struct WorkerClusters {}
