//! What the admin interface needs of the rest of the proxy.
//!
//! The shapes are those of Envoy's `envoy.admin.v3` messages where one holds all that is shown; clusters have
//! rows of their own because their text form shows more than the message.

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::core::v3::{Address, Locality};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::google::protobuf::Any;

/// The program, seen by its admin interface. All calls come from the control thread and must not wait.
pub trait AdminSource {
    /// Starting, live or draining.
    fn state(&self) -> pb::server_info::State;
    /// `/server_info`; the state is filled in from [`AdminSource::state`].
    fn server_info(&self) -> pb::ServerInfo;
    /// `/hot_restart_version`.
    fn hot_restart_version(&self) -> String {
        "disabled".into()
    }
    /// `/clusters`, sorted as it is to be shown.
    fn clusters(&self) -> Vec<ClusterRow>;
    /// `/listeners`.
    fn listeners(&self) -> Vec<ListenerRow>;
    /// `/certs`.
    fn certs(&self) -> pb::Certificates;
    /// `/memory`.
    fn memory(&self) -> pb::Memory;
    /// `/init_dump`.
    fn init_dump(&self) -> pb::UnreadyTargetsDumps {
        pb::UnreadyTargetsDumps::default()
    }
    /// One part of `/config_dump`, see [`Section`]; `None` where there is nothing of the kind.
    fn config(&self, section: Section) -> Option<Any>;
    /// The endpoints of each cluster and whether the cluster came through CDS, for `/config_dump?include_eds`.
    fn endpoints(&self) -> Vec<(bool, ClusterLoadAssignment)> {
        Vec::new()
    }
    /// `/healthcheck/fail` and `/healthcheck/ok`.
    fn fail_health_check(&self, fail: bool);
    /// `/drain_listeners`.
    fn drain_listeners(&self, request: DrainRequest);
    /// `/reopen_logs`.
    fn reopen_logs(&self);
    /// `/quitquitquit`; the answer is on its way when the process ends if the program waits a moment.
    fn quit(&self);
    /// Brings the stats that are computed when read (`server.uptime`, memory) up to date.
    fn refresh_stats(&self) {}
    /// Makes the stats that are else made at their first use; called before all stats are shown, not only used
    /// ones.
    fn materialise_stats(&self) {}
}

/// How to drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DrainRequest {
    /// Go on serving for the drain time, telling clients to go elsewhere; then stop.
    pub graceful: bool,
    /// Only listeners whose traffic direction is inbound.
    pub inbound_only: bool,
    /// Drain the connections but never stop the listeners.
    pub skip_exit: bool,
}

/// The parts of `/config_dump` in their order. Each is packed into an `Any` of the message named here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// `BootstrapConfigDump`.
    Bootstrap,
    /// `ClustersConfigDump`.
    Clusters,
    /// `EcdsConfigDump` of HTTP filters.
    HttpExtensions,
    /// `EcdsConfigDump` of network filters.
    NetworkExtensions,
    /// `EcdsConfigDump` of listener filters.
    ListenerExtensions,
    /// `ListenersConfigDump`.
    Listeners,
    /// `ScopedRoutesConfigDump`.
    ScopedRoutes,
    /// `RoutesConfigDump`.
    Routes,
    /// `SecretsConfigDump`.
    Secrets,
}

/// A cluster.
#[derive(Debug, Clone, Default)]
pub struct ClusterRow {
    /// The name.
    pub name: String,
    /// `alt_stat_name`, or the name.
    pub observability_name: String,
    /// The name at EDS, where it differs.
    pub eds_service_name: String,
    /// Whether it came through CDS.
    pub added_via_api: bool,
    /// Outlier detection, if it is on.
    pub outlier: Option<Outlier>,
    /// Circuit breakers of default and high priority.
    pub thresholds: [Thresholds; 2],
    /// Hosts by priority.
    pub hosts: Vec<HostRow>,
}

/// What outlier detection knows of a cluster; -1 where there is not enough to tell.
#[derive(Debug, Clone, Copy)]
pub struct Outlier {
    /// Average success rate.
    pub average: f64,
    /// Below it a host is ejected.
    pub threshold: f64,
    /// The same for errors of local origin.
    pub local_average: f64,
    /// The same for errors of local origin.
    pub local_threshold: f64,
}

/// Limits of one priority.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    /// Connections.
    pub max_connections: u32,
    /// Requests that wait for one.
    pub max_pending_requests: u32,
    /// Requests.
    pub max_requests: u32,
    /// Retries.
    pub max_retries: u32,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { max_connections: 1024, max_pending_requests: 1024, max_requests: 1024, max_retries: 3 }
    }
}

/// A host of a cluster.
#[derive(Debug, Clone, Default)]
pub struct HostRow {
    /// The address as a message.
    pub address: Address,
    /// The address as a text.
    pub address_text: String,
    /// The name it was resolved from.
    pub hostname: String,
    /// Counters by name, sorted: `cx_connect_fail`, `cx_total`, `rq_error`, `rq_success`, `rq_timeout`,
    /// `rq_total`.
    pub counters: Vec<(&'static str, u64)>,
    /// Gauges by name, sorted: `cx_active`, `rq_active`, `rq_pending_active`.
    pub gauges: Vec<(&'static str, u64)>,
    /// What is wrong with it.
    pub health: HealthFlags,
    /// The weight.
    pub weight: u32,
    /// The priority.
    pub priority: u32,
    /// Where it is.
    pub locality: Locality,
    /// `envoy.lb` `canary` in its metadata.
    pub canary: bool,
    /// Success rate, if there is enough to tell.
    pub success_rate: Option<f64>,
    /// The same for errors of local origin.
    pub local_success_rate: Option<f64>,
}

/// What is wrong with a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HealthFlags {
    pub failed_active_hc: bool,
    pub failed_outlier_check: bool,
    pub failed_eds_health: bool,
    pub degraded_active_hc: bool,
    pub degraded_eds_health: bool,
    pub pending_dynamic_removal: bool,
    pub pending_active_hc: bool,
    pub excluded_via_immediate_hc_fail: bool,
    pub active_hc_timeout: bool,
    pub eds_status_draining: bool,
}

/// A listener.
#[derive(Debug, Clone, Default)]
pub struct ListenerRow {
    /// The name.
    pub name: String,
    /// The addresses it listens on, as messages and as texts; the first is the main one.
    pub addresses: Vec<(Address, String)>,
}
