//! Clusters, endpoints, load balancing, circuit breakers, connection pools.
