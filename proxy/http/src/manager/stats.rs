//! The connection manager's stats, `http.PREFIX.*` and the listener's `http.PREFIX.downstream_rq_*`.

use sampan_core::stats::{Counter, Gauge, Histogram, Scope, Unit};

macro_rules! stats {
    ($(#[$doc:meta])* $name:ident { counters: $($counter:ident)*; gauges: $($gauge:ident)*; histograms: $($histogram:ident $unit:ident)*; }) => {
        $(#[$doc])*
        #[allow(missing_docs, reason = "the names are Envoy's and documented there")]
        pub struct $name { $(pub $counter: Counter,)* $(pub $gauge: Gauge,)* $(pub $histogram: Histogram,)* }

        impl $name {
            /// Makes them in a scope.
            pub fn new(scope: &Scope) -> Self {
                Self {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                    $($histogram: scope.histogram(stringify!($histogram), Unit::$unit),)*
                }
            }
        }
    };
}

stats! {
    /// `http.PREFIX.*`
    ManagerStats {
        counters: downstream_cx_delayed_close_timeout downstream_cx_destroy downstream_cx_destroy_active_rq
            downstream_cx_destroy_local downstream_cx_destroy_local_active_rq downstream_cx_destroy_remote
            downstream_cx_destroy_remote_active_rq downstream_cx_drain_close downstream_cx_http1_total
            downstream_cx_http2_total downstream_cx_http3_total downstream_cx_idle_timeout
            downstream_cx_max_duration_reached downstream_cx_max_requests_reached
            downstream_cx_overload_disable_keepalive downstream_cx_protocol_error downstream_cx_rx_bytes_total
            downstream_cx_ssl_total downstream_cx_total downstream_cx_tx_bytes_total downstream_cx_upgrades_total
            downstream_flow_control_paused_reading_total downstream_flow_control_resumed_reading_total
            downstream_rq_1xx downstream_rq_2xx downstream_rq_3xx downstream_rq_4xx downstream_rq_5xx
            downstream_rq_completed downstream_rq_failed_path_normalization downstream_rq_http1_total
            downstream_rq_http2_total downstream_rq_http3_total downstream_rq_idle_timeout
            downstream_rq_non_relative_path downstream_rq_overload_close
            downstream_rq_redirected_with_normalized_path downstream_rq_rejected_via_ip_detection
            downstream_rq_response_before_rq_complete downstream_rq_rx_reset
            downstream_rq_too_many_premature_resets downstream_rq_timeout downstream_rq_header_timeout
            downstream_rq_too_large downstream_rq_total downstream_rq_tx_reset downstream_rq_max_duration_reached
            downstream_rq_ws_on_non_ws_route rs_too_large;
        gauges: downstream_cx_active downstream_cx_http1_active downstream_cx_http2_active
            downstream_cx_http3_active downstream_cx_rx_bytes_buffered downstream_cx_ssl_active
            downstream_cx_tx_bytes_buffered downstream_cx_upgrades_active downstream_cx_http1_soft_drain
            downstream_rq_active;
        histograms: downstream_cx_length_ms Milliseconds downstream_rq_time Milliseconds;
    }
}

stats! {
    /// `listener.ADDRESS.http.PREFIX.*`
    ListenerStats {
        counters: downstream_rq_1xx downstream_rq_2xx downstream_rq_3xx downstream_rq_4xx downstream_rq_5xx
            downstream_rq_completed;
        gauges: ;
        histograms: ;
    }
}

/// Counts a response by its class.
macro_rules! charge {
    ($stats:expr, $status:expr) => {{
        $stats.downstream_rq_completed.inc();
        match $status {
            100..=199 => $stats.downstream_rq_1xx.inc(),
            200..=299 => $stats.downstream_rq_2xx.inc(),
            300..=399 => $stats.downstream_rq_3xx.inc(),
            400..=499 => $stats.downstream_rq_4xx.inc(),
            500..=599 => $stats.downstream_rq_5xx.inc(),
            _ => {}
        }
    }};
}

impl ManagerStats {
    /// Counts a response.
    pub fn charge(&self, status: u16) {
        charge!(self, status);
    }
}

impl ListenerStats {
    /// Counts a response.
    pub fn charge(&self, status: u16) {
        charge!(self, status);
    }
}
