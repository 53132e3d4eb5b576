//! What a filter's factory is given on the control thread, and what a connection finds on its worker.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use envoy_types::pb::envoy::config::trace::v3::tracing::Http as TracingProvider;
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use sampan_core::access_log::{AccessLogManager, AccessLogger, FlushPolicy};
use sampan_core::drain;
use sampan_core::error::ConfigResult;
use sampan_core::overload::OverloadState;
use sampan_core::peer;
use sampan_core::runtime::Runtime;
use sampan_core::stats::{Scope, Store};
use sampan_core::stream_info::Metadata;
use sampan_tls::StaticSecrets;
use sampan_upstream::{DnsCaches, WorkerClusters};

pub use envoy_types::pb::envoy::config::core::v3::TrafficDirection;

/// Who this proxy is; what `%ENVIRONMENT%`-free parts of configuration and logs name.
#[derive(Debug, Clone, Default)]
pub struct NodeInfo {
    /// `node.id` (`--service-node`).
    pub id: String,
    /// `node.cluster` (`--service-cluster`): the `x-envoy-downstream-service-cluster` that is sent, the server header's kin.
    pub cluster: String,
    /// `node.locality.zone` (`--service-zone`).
    pub zone: String,
    /// What peers are told of us (Istio).
    pub own: Arc<peer::Node>,
}

/// Which clusters a configuration may name. Envoy refuses a static route or `tcp_proxy` only where it is told to
/// (`validate_clusters`); everything else is decided when traffic comes.
pub trait KnownClusters: Send + Sync {
    /// Whether a cluster of that name exists now.
    fn has(&self, name: &str) -> bool;
}

impl<F: Fn(&str) -> bool + Send + Sync> KnownClusters for F {
    fn has(&self, name: &str) -> bool {
        self(name)
    }
}

/// What there is once per process and what every factory may need.
pub struct Server {
    /// All stats.
    pub stats: Store,
    /// Runtime layers.
    pub runtime: Runtime,
    /// The bootstrap's secrets.
    pub secrets: StaticSecrets,
    /// Who we are.
    pub node: NodeInfo,
    /// Which clusters exist.
    pub clusters: Arc<dyn KnownClusters>,
    /// `/healthcheck/fail` was called: the health check filter answers 503.
    pub health_check_failed: Arc<AtomicBool>,
    /// The drain of everything; each filter chain's is a part of it.
    pub drain: drain::Drain,
    /// Files that access logs write to.
    pub access_logs: AccessLogManager,
    /// The overload manager's state, where one is configured.
    pub overload: Option<Arc<OverloadState>>,
    /// The caches of names that clients choose, shared with the clusters.
    pub dns_caches: DnsCaches,
    /// The bootstrap's `tracing`: the provider of whoever traces and names none.
    pub tracing: Option<TracingProvider>,
    /// The next connection's number.
    pub next_connection_id: AtomicU64,
    /// Accepted sockets of all listeners, for `overload.global_downstream_max_connections`.
    pub(crate) open_connections: AtomicU64,
}

impl Server {
    /// A process with nothing configured yet.
    pub fn new(
        stats: Store,
        runtime: Runtime,
        secrets: StaticSecrets,
        node: NodeInfo,
        clusters: Arc<dyn KnownClusters>,
    ) -> Self {
        Self {
            health_check_failed: Arc::default(),
            drain: drain::Drain::new(),
            access_logs: AccessLogManager::new(&stats.root(), FlushPolicy::default()),
            dns_caches: DnsCaches::new(&stats.root()),
            stats,
            runtime,
            secrets,
            node,
            clusters,
            overload: None,
            tracing: None,
            next_connection_id: AtomicU64::new(0),
            open_connections: AtomicU64::new(0),
        }
    }

    /// A number for a new connection; one atomic per connection, none per request.
    pub fn connection_id(&self) -> u64 {
        self.next_connection_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// What a network filter's factory is given: the process and the listener that the filter stands in.
#[derive(Clone)]
pub struct FactoryContext {
    /// The process.
    pub server: Arc<Server>,
    /// The listener's name.
    pub listener_name: Arc<str>,
    /// `listener.ADDRESS` or `listener.STAT_PREFIX`: where the listener's own stats stand. The manager's
    /// `http.PREFIX.downstream_rq_2xx` are made below it as well as below the root.
    pub listener_scope: Scope,
    /// The listener's `metadata`, for `StreamInfo::listener_metadata`.
    pub listener_metadata: Option<Arc<Metadata>>,
    /// The listener's `traffic_direction`.
    pub traffic_direction: TrafficDirection,
    /// The listener's `drain_type` is `MODIFY_ONLY`: `/healthcheck/fail` does not drain it.
    pub drain_modify_only: bool,
    /// The filter chain's name; empty where it has none.
    pub filter_chain: Arc<str>,
    /// Whether the chain ends TLS (`DownstreamTlsContext`).
    pub tls: bool,
    /// `per_connection_buffer_limit_bytes`.
    pub buffer_limit: u32,
    /// The overload manager's state, unless there is none or the listener is exempt (`bypass_overload_manager`).
    pub overload: Option<Arc<OverloadState>>,
    /// What the listener's parts want of others before it can serve.
    pub wants: Wants,
}

/// What parts of a listener subscribe to. Who makes listeners knows the types and sees to it.
pub type Wants = Arc<Mutex<Vec<Want>>>;

/// One subscription.
pub type Want = Arc<dyn Any + Send + Sync>;

impl FactoryContext {
    /// The access loggers of a field of that name.
    pub fn access_loggers(
        &self,
        messages: &[envoy_types::pb::envoy::config::accesslog::v3::AccessLog],
        field: &str,
    ) -> ConfigResult<Vec<AccessLogger>> {
        AccessLogger::list_from_proto(messages, field, &self.server.access_logs, &self.server.runtime)
    }

    /// Notes what a part subscribes to.
    pub fn want(&self, want: impl Any + Send + Sync) {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::new(want));
    }

    /// The scope without a prefix: `http.PREFIX.`, `tcp.PREFIX.`, `cluster.NAME.` start here.
    pub fn root_scope(&self) -> Scope {
        self.server.stats.root()
    }
}

/// A worker thread, as its connections see it.
pub struct Worker {
    /// Its number from 0, as in `worker_0`.
    pub id: u32,
    /// The process.
    pub server: Arc<Server>,
    /// This worker's clusters and pools.
    pub clusters: Rc<WorkerClusters>,
    /// The process' drain.
    pub drain: drain::Signal,
    /// Runtime layers.
    pub runtime: Runtime,
    rng: RefCell<SmallRng>,
}

impl Worker {
    /// The number of the control thread, which serves the admin interface.
    pub const MAIN: u32 = u32::MAX;

    /// Its name in stats.
    pub fn name(&self) -> String {
        if self.id == Self::MAIN { "main_thread".to_owned() } else { format!("worker_{}", self.id) }
    }

    /// A worker. Call on its own thread.
    pub fn new(id: u32, server: Arc<Server>, clusters: Rc<WorkerClusters>, drain: drain::Signal) -> Self {
        let runtime = server.runtime.clone();
        Self { id, server, clusters, drain, runtime, rng: RefCell::new(SmallRng::from_os_rng()) }
    }

    /// A uniform random number; fast and not for secrets.
    pub fn random(&self) -> u64 {
        self.rng.borrow_mut().next_u64()
    }
}
