//! Clusters, endpoints, load balancing, circuit breakers, connection pools.
//!
//! ```text
//!   config      Cluster message -> ClusterConfig
//!   manager     control thread: name -> Cluster, DNS tasks          (Send + Sync, shared)
//!   cluster     hosts in a slot, stats on first use, breakers
//!   worker      per worker: name -> WorkerCluster, WorkerHost       (Rc)
//!   lb          which host
//!   pool        which connection to it: HTTP/1, HTTP/2, TCP; connect makes one
//! ```
//!
//! The control thread swaps a cluster's hosts as a whole; each worker sees the changed generation at its next pick
//! and rebuilds its balancer, keeping the [`WorkerHost`]s (and so the pools) of the hosts that stayed.

pub mod circuit;
pub mod cluster;
pub mod config;
pub mod connect;
pub mod demand;
pub mod dns_cache;
pub mod host;
pub mod lb;
pub mod manager;
pub mod outlier;
pub mod pool;
pub mod stats;
pub mod worker;

mod dns;
mod proxy_header;
#[cfg(test)]
mod testing;

pub use circuit::Priority;
pub use cluster::{Cluster, Origin, Rebuild};
pub use config::{ClusterConfig, Discovery, EdsConfig, LoadAssignment};
pub use connect::{ConnectFailure, ConnectFailureKind, ConnectInfo, ConnectOptions, Connected};
pub use demand::{Demand, Discovered, OnDemand};
pub use dns_cache::{DnsCache, DnsCacheUser, DnsCaches};
pub use host::{Health, HealthFlag, Host, HostSet, Locality};
pub use lb::{LbContext, PreviousPriorities};
pub use manager::{ClusterManager, Clusters};
pub use outlier::{EventLog, Outcome, SuccessRates};
pub use pool::{H1Lease, H2Lease, HttpLease, PoolError, TcpLease};
pub use proxy_header::Told;
pub use stats::{ClusterStats, HostCounter, HostGauge, HostStats, TimeoutBudgetStats};
pub use worker::{Choice, Destination, Resolving, WorkerCluster, WorkerClusters, WorkerHost};
