//! `http.admin.*` and `listener.admin.*`: what is counted of the admin interface itself, and the names that Envoy
//! shows besides (they stay 0: no TLS, no HTTP/2, no limits and no timeouts here).

use std::rc::Rc;
use std::time::{Duration, Instant};

use sampan_core::stats::{Counter, Gauge, Histogram, Scope, Unit};

/// Counters of `http.admin` that never count.
const HTTP_COUNTERS: &[&str] = &[
    "downstream_cx_delayed_close_timeout",
    "downstream_cx_destroy_active_rq",
    "downstream_cx_destroy_local",
    "downstream_cx_destroy_local_active_rq",
    "downstream_cx_destroy_remote",
    "downstream_cx_destroy_remote_active_rq",
    "downstream_cx_drain_close",
    "downstream_cx_http2_total",
    "downstream_cx_http3_total",
    "downstream_cx_idle_timeout",
    "downstream_cx_max_duration_reached",
    "downstream_cx_max_requests_reached",
    "downstream_cx_overload_disable_keepalive",
    "downstream_cx_protocol_error",
    "downstream_cx_rx_bytes_total",
    "downstream_cx_ssl_total",
    "downstream_cx_tx_bytes_total",
    "downstream_cx_upgrades_total",
    "downstream_flow_control_paused_reading_total",
    "downstream_flow_control_resumed_reading_total",
    "downstream_rq_failed_path_normalization",
    "downstream_rq_header_timeout",
    "downstream_rq_http2_total",
    "downstream_rq_http3_total",
    "downstream_rq_idle_timeout",
    "downstream_rq_max_duration_reached",
    "downstream_rq_non_relative_path",
    "downstream_rq_overload_close",
    "downstream_rq_redirected_with_normalized_path",
    "downstream_rq_rejected_via_ip_detection",
    "downstream_rq_response_before_rq_complete",
    "downstream_rq_rx_reset",
    "downstream_rq_timeout",
    "downstream_rq_too_large",
    "downstream_rq_too_many_premature_resets",
    "downstream_rq_tx_reset",
    "downstream_rq_ws_on_non_ws_route",
    "rs_too_large",
];

/// Gauges of `http.admin` that stay 0.
const HTTP_GAUGES: &[&str] = &[
    "downstream_cx_http1_soft_drain",
    "downstream_cx_http2_active",
    "downstream_cx_http3_active",
    "downstream_cx_rx_bytes_buffered",
    "downstream_cx_ssl_active",
    "downstream_cx_tx_bytes_buffered",
    "downstream_cx_upgrades_active",
];

/// Counters of `listener.admin` that never count.
const LISTENER_COUNTERS: &[&str] = &[
    "downstream_cx_overflow",
    "downstream_cx_overload_reject",
    "downstream_cx_transport_socket_connect_timeout",
    "downstream_global_cx_overflow",
    "downstream_listener_filter_error",
    "downstream_listener_filter_remote_close",
    "downstream_pre_cx_timeout",
    "no_filter_chain_match",
];

/// The stats of the admin interface.
pub(crate) struct Stats {
    cx_total: [Counter; 4],
    cx_active: [Gauge; 4],
    cx_destroy: [Counter; 2],
    cx_length: [Histogram; 2],
    rq_total: [Counter; 2],
    rq_active: Gauge,
    rq_completed: [Counter; 2],
    rq_xx: [[Counter; 2]; 5],
    rq_time: Histogram,
}

impl Stats {
    /// Makes them all.
    pub(crate) fn new(root: &Scope) -> Rc<Self> {
        let http = root.scope("http").scope("admin");
        let listener = root.scope("listener").scope("admin");
        let thread = listener.scope("main_thread");
        let per_listener = listener.scope("http").scope("admin");
        HTTP_COUNTERS.iter().for_each(|name| drop(http.counter(name)));
        HTTP_GAUGES.iter().for_each(|name| drop(http.gauge(name)));
        LISTENER_COUNTERS.iter().for_each(|name| drop(listener.counter(name)));
        listener.gauge("downstream_pre_cx_active").touch();
        listener.histogram("connections_accepted_per_socket_event", Unit::Unspecified);
        let (total, active) = ("downstream_cx_total", "downstream_cx_active");
        Rc::new(Self {
            cx_total: [
                http.counter(total),
                http.counter("downstream_cx_http1_total"),
                listener.counter(total),
                thread.counter(total),
            ],
            cx_active: [
                http.gauge(active),
                http.gauge("downstream_cx_http1_active"),
                listener.gauge(active),
                thread.gauge(active),
            ],
            cx_destroy: [http.counter("downstream_cx_destroy"), listener.counter("downstream_cx_destroy")],
            cx_length: [&http, &listener].map(|s| s.histogram("downstream_cx_length_ms", Unit::Milliseconds)),
            rq_total: [http.counter("downstream_rq_total"), http.counter("downstream_rq_http1_total")],
            rq_active: http.gauge("downstream_rq_active"),
            rq_completed: [&http, &per_listener].map(|s| s.counter("downstream_rq_completed")),
            rq_xx: [1, 2, 3, 4, 5]
                .map(|class| [&http, &per_listener].map(|s| s.counter(&format!("downstream_rq_{class}xx")))),
            rq_time: http.histogram("downstream_rq_time", Unit::Milliseconds),
        })
    }

    /// A request has come.
    pub(crate) fn request(&self) {
        self.rq_total.iter().for_each(Counter::inc);
        self.rq_active.inc();
    }

    /// It is answered.
    pub(crate) fn response(&self, status: u16, took: Duration) {
        self.rq_active.dec();
        self.rq_completed.iter().for_each(Counter::inc);
        if let Some(class) = self.rq_xx.get(usize::from(status / 100).wrapping_sub(1)) {
            class.iter().for_each(Counter::inc);
        }
        self.rq_time.record(took.as_millis() as u64);
    }
}

/// One connection, counted until it is gone.
pub(crate) struct Connection {
    stats: Rc<Stats>,
    since: Instant,
}

impl Connection {
    /// A connection was accepted.
    pub(crate) fn new(stats: &Rc<Stats>) -> Self {
        stats.cx_total.iter().for_each(Counter::inc);
        stats.cx_active.iter().for_each(Gauge::inc);
        Self { stats: stats.clone(), since: Instant::now() }
    }

    /// Where it counts.
    pub(crate) fn stats(&self) -> Rc<Stats> {
        self.stats.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.stats.cx_active.iter().for_each(Gauge::dec);
        self.stats.cx_destroy.iter().for_each(Counter::inc);
        let length = self.since.elapsed().as_millis() as u64;
        self.stats.cx_length.iter().for_each(|histogram| histogram.record(length));
    }
}
