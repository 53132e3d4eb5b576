//! A listener's stats, `listener.ADDRESS.*`, and what a worker counts of them.

use sampan_core::stats::{Histogram, Scope, Unit};

macro_rules! stats {
    ($(#[$doc:meta])* $name:ident { counters: $($counter:ident)*; gauges: $($gauge:ident)*; }) => {
        $(#[$doc])*
        #[allow(dead_code, missing_docs, reason = "Envoy shows them all, and documents their names")]
        pub(crate) struct $name { $(pub(crate) $counter: sampan_core::stats::Counter,)* $(pub(crate) $gauge: sampan_core::stats::Gauge,)* }

        impl $name {
            /// Makes all of them in `scope`.
            pub(crate) fn new(scope: &sampan_core::stats::Scope) -> Self {
                Self {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                }
            }
        }
    };
}
pub(crate) use stats;

stats! {
    /// Counters and gauges of a listener.
    ListenerCounters {
        counters:
            downstream_cx_destroy downstream_cx_overflow downstream_cx_overload_reject downstream_cx_total
            downstream_cx_transport_socket_connect_timeout downstream_global_cx_overflow
            downstream_listener_filter_error downstream_listener_filter_remote_close downstream_pre_cx_timeout
            extension_config_missing network_extension_config_missing no_filter_chain_match;
        gauges: downstream_cx_active downstream_pre_cx_active;
    }
}

stats! {
    /// `listener.ADDRESS.worker_N.*`
    WorkerCounters {
        counters: downstream_cx_total;
        gauges: downstream_cx_active;
    }
}

/// All stats of a listener.
pub(crate) struct ListenerStats {
    /// Counters and gauges.
    pub(crate) counters: ListenerCounters,
    /// `downstream_cx_length_ms`
    pub(crate) length_ms: Histogram,
    /// `connections_accepted_per_socket_event`
    pub(crate) accepted_per_event: Histogram,
}

impl ListenerStats {
    /// Makes them in the listener's scope.
    pub(crate) fn new(scope: &Scope) -> Self {
        Self {
            counters: ListenerCounters::new(scope),
            length_ms: scope.histogram("downstream_cx_length_ms", Unit::Milliseconds),
            accepted_per_event: scope.histogram("connections_accepted_per_socket_event", Unit::Unspecified),
        }
    }
}

/// The name below which a listener's stats stand: its `stat_prefix`, or its address with `:` made `_`.
pub(crate) fn scope_name(stat_prefix: &str, address: &str) -> String {
    let name = if stat_prefix.is_empty() { address } else { stat_prefix };
    format!("listener.{}", name.replace(':', "_"))
}
