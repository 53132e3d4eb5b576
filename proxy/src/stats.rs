//! The stats of the process itself: `server.*`, `listener_manager.*` and the watchdogs'.
//!
//! Dashboards read names; a stat whose part of Envoy does not exist here (watchdogs, hot restart, deferred cluster
//! initialisation) is made all the same and stays 0.

use std::time::Duration;

use sampan_core::stats::{Counter, Gauge, Histogram, Store, Unit};

/// What `server.days_until_first_cert_expiring` shows where there is no certificate.
const NEVER: u64 = u32::MAX as u64;

/// `server.*`
pub struct ServerStats {
    /// `uptime`, in seconds.
    pub uptime: Gauge,
    /// `live`: 0 while health checks shall fail.
    pub live: Gauge,
    /// `state`, as in `/server_info`.
    pub state: Gauge,
    /// `concurrency`
    pub concurrency: Gauge,
    /// `total_connections`
    pub total_connections: Gauge,
    /// `memory_allocated`
    pub memory_allocated: Gauge,
    /// `memory_heap_size`
    pub memory_heap_size: Gauge,
    /// `memory_physical_size`
    pub memory_physical_size: Gauge,
    /// `version`: what `stats_server_version_override` says.
    pub version: Gauge,
    /// `static_unknown_fields`
    pub static_unknown_fields: Counter,
    days_until_first_cert_expiring: Gauge,
    initialization_time_ms: Histogram,
    /// They stay 0; stats of a scope vanish with their last handle.
    _watchdogs: Vec<Counter>,
}

impl ServerStats {
    /// Makes them all.
    pub fn new(store: &Store, workers: u64) -> Self {
        let root = store.root();
        let scope = root.scope("server");
        let threads = (0..workers).map(|id| format!("worker_{id}")).chain(["main_thread".to_owned()]);
        let watchdogs = threads
            .map(|thread| scope.scope(&thread))
            .flat_map(|scope| ["watchdog_mega_miss", "watchdog_miss"].map(|name| scope.counter(name)));
        for name in
            ["debug_assertion_failures", "dropped_stat_flushes", "envoy_bug_failures", "envoy_notifications"]
        {
            scope.counter(name);
        }
        // Envoy sets them, if to 0.
        for name in ["dynamic_unknown_fields", "wip_protos"] {
            scope.counter(name).add(0);
        }
        for name in [
            "compilation_settings.fips_mode",
            "hot_restart_epoch",
            "parent_connections",
            "stats_recent_lookups",
        ] {
            scope.gauge(name).touch();
        }
        scope.gauge("seconds_until_first_ocsp_response_expiring");
        root.counter("envoy.overload_actions.reset_high_memory_stream.count");
        root.histogram("overload.refresh_interval_delay", Unit::Milliseconds);
        for thread in ["main_thread", "workers"] {
            let scope = root.scope(thread);
            scope.counter("watchdog_mega_miss");
            scope.counter("watchdog_miss");
        }
        Self {
            uptime: scope.gauge("uptime"),
            live: scope.gauge("live"),
            state: scope.gauge("state"),
            concurrency: scope.gauge("concurrency"),
            total_connections: scope.gauge("total_connections"),
            memory_allocated: scope.gauge("memory_allocated"),
            memory_heap_size: scope.gauge("memory_heap_size"),
            memory_physical_size: scope.gauge("memory_physical_size"),
            version: scope.gauge("version"),
            static_unknown_fields: scope.counter("static_unknown_fields"),
            days_until_first_cert_expiring: scope.gauge("days_until_first_cert_expiring"),
            initialization_time_ms: scope.histogram("initialization_time_ms", Unit::Milliseconds),
            _watchdogs: watchdogs.collect(),
        }
    }

    /// All listeners accept.
    pub fn initialised(&self, after: Duration) {
        self.initialization_time_ms.record(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    }

    /// The first of all certificates expires in so many days; none: there are no certificates.
    pub fn first_certificate(&self, days: Option<u64>) {
        self.days_until_first_cert_expiring.set(days.unwrap_or(NEVER));
    }
}

/// `listener_manager.*`
pub struct ListenerManagerStats {
    /// `listener_added`
    pub added: Counter,
    /// `listener_create_success`, one for each listener and worker.
    pub create_success: Counter,
    /// `listener_create_failure`, likewise.
    pub create_failure: Counter,
    /// `listener_modified`: a later listener of the same name took the place of an earlier one.
    pub modified: Counter,
    /// `listener_in_place_updated`
    pub in_place_updated: Counter,
    /// `listener_removed`
    pub removed: Counter,
    /// `total_listeners_warming`
    pub warming: Gauge,
    /// `total_listeners_draining`
    pub draining: Gauge,
    /// `total_filter_chains_draining`
    pub filter_chains_draining: Gauge,
    /// `listener_stopped`
    pub stopped: Counter,
    /// `total_listeners_active`
    pub active: Gauge,
    /// `workers_started`
    pub workers_started: Gauge,
}

impl ListenerManagerStats {
    /// Makes them all.
    pub fn new(store: &Store) -> Self {
        let scope = store.root().scope("listener_manager");
        scope.gauge("workers_pinned");
        Self {
            added: scope.counter("listener_added"),
            create_success: scope.counter("listener_create_success"),
            create_failure: scope.counter("listener_create_failure"),
            modified: scope.counter("listener_modified"),
            in_place_updated: scope.counter("listener_in_place_updated"),
            removed: scope.counter("listener_removed"),
            warming: scope.gauge("total_listeners_warming"),
            draining: scope.gauge("total_listeners_draining"),
            filter_chains_draining: scope.gauge("total_filter_chains_draining"),
            stopped: scope.counter("listener_stopped"),
            active: scope.gauge("total_listeners_active"),
            workers_started: scope.gauge("workers_started"),
        }
    }
}
