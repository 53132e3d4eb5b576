//! The counters of a cluster and of a host, under Envoy's names.
//!
//! A cluster's stats are made when it is first used ([`Cluster::stats`](crate::Cluster::stats)), as Envoy does with
//! `deferred_stat_options`: 2,000 clusters of which ten carry traffic cost the stats of ten. Who prints `/stats`
//! without `usedonly` first calls [`ClusterManager::materialise_stats`](crate::ClusterManager::materialise_stats).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::config::LbPolicy;
use crate::lb::Size;
use sampan_core::stats::{Counter, Gauge, Histogram, Scope, Unit};

macro_rules! cluster_stats {
    (counters { $($counter:ident)* } gauges { $($gauge:ident)* } histograms { $($histogram:ident $unit:ident)* }) => {
        /// The stats of one cluster (`cluster.NAME.*`); the field is the name.
        #[allow(missing_docs, reason = "each field is Envoy's stat of that name")]
        pub struct ClusterStats {
            $(pub $counter: Counter,)*
            $(pub $gauge: Gauge,)*
            $(pub $histogram: Histogram,)*
        }

        impl ClusterStats {
            /// The stats in the cluster's scope.
            pub(crate) fn new(scope: &Scope) -> Self {
                Self {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                    $($histogram: scope.histogram(stringify!($histogram), Unit::$unit),)*
                }
            }
        }
    };
}

cluster_stats! {
    counters {
        assignment_stale assignment_timeout_received assignment_use_cached
        bind_errors
        lb_healthy_panic lb_local_cluster_not_ok lb_recalculate_zone_structures
        lb_subsets_created lb_subsets_fallback lb_subsets_fallback_panic lb_subsets_removed lb_subsets_selected
        lb_zone_cluster_too_small lb_zone_no_capacity_left lb_zone_routing_all_directly
        lb_zone_routing_cross_zone lb_zone_routing_sampled
        membership_change
        original_dst_host_invalid retry_or_shadow_abandoned
        update_attempt update_empty update_failure update_no_rebuild update_success
        upstream_cx_close_notify upstream_cx_connect_attempts_exceeded upstream_cx_connect_fail
        upstream_cx_connect_timeout upstream_cx_connect_with_0_rtt upstream_cx_destroy upstream_cx_destroy_local
        upstream_cx_destroy_local_with_active_rq upstream_cx_destroy_remote
        upstream_cx_destroy_remote_with_active_rq upstream_cx_destroy_with_active_rq
        upstream_cx_http1_total upstream_cx_http2_total upstream_cx_http3_total
        upstream_cx_idle_timeout upstream_cx_max_duration_reached upstream_cx_max_requests
        upstream_cx_none_healthy upstream_cx_overflow upstream_cx_pool_overflow upstream_cx_preconnect_skipped
        upstream_cx_protocol_error upstream_queue_overloaded upstream_rq_active_overflow upstream_rq_rx_reset_no_error
        upstream_cx_rx_bytes_total upstream_cx_total upstream_cx_tx_bytes_total
        upstream_flow_control_backed_up_total upstream_flow_control_drained_total
        upstream_flow_control_paused_reading_total upstream_flow_control_resumed_reading_total
        upstream_internal_redirect_failed_total upstream_internal_redirect_succeeded_total
        upstream_rq_0rtt upstream_rq_cancelled upstream_rq_completed upstream_rq_maintenance_mode
        upstream_rq_max_duration_reached upstream_rq_pending_failure_eject upstream_rq_pending_overflow
        upstream_rq_pending_total upstream_rq_per_try_idle_timeout upstream_rq_per_try_timeout
        upstream_rq_retry upstream_rq_retry_backoff_exponential upstream_rq_retry_backoff_ratelimited
        upstream_rq_retry_limit_exceeded upstream_rq_retry_overflow upstream_rq_retry_success
        upstream_rq_rx_reset upstream_rq_timeout upstream_rq_total upstream_rq_tx_reset
        upstream_http3_broken
    }
    gauges {
        lb_subsets_active max_host_weight membership_degraded membership_excluded membership_healthy
        membership_total upstream_cx_active upstream_cx_rx_bytes_buffered upstream_cx_tx_bytes_buffered
        upstream_rq_active upstream_rq_pending_active version warming_state
    }
    histograms {
        upstream_cx_connect_ms Milliseconds
        upstream_cx_length_ms Milliseconds
        upstream_rq_per_cx Unspecified
    }
}

/// The histograms of `track_timeout_budgets`.
pub struct TimeoutBudgetStats {
    /// `upstream_rq_timeout_budget_percent_used`
    pub percent_used: Histogram,
    /// `upstream_rq_timeout_budget_per_try_percent_used`
    pub per_try_percent_used: Histogram,
}

impl TimeoutBudgetStats {
    pub(crate) fn new(scope: &Scope) -> Self {
        let histogram = |name| scope.histogram(name, Unit::Unspecified);
        Self {
            percent_used: histogram("upstream_rq_timeout_budget_percent_used"),
            per_try_percent_used: histogram("upstream_rq_timeout_budget_per_try_percent_used"),
        }
    }
}

/// The gauges of `ring_hash_lb` and `maglev_lb`.
pub(crate) struct TableStats {
    all: Option<Gauge>,
    min: Gauge,
    max: Gauge,
}

impl TableStats {
    /// Those of a policy, if it has any.
    pub(crate) fn new(policy: &LbPolicy, scope: &Scope) -> Option<Self> {
        let (scope, all, what) = match policy {
            LbPolicy::RingHash { .. } => (scope.scope("ring_hash_lb"), true, "hashes"),
            LbPolicy::Maglev { .. } => (scope.scope("maglev_lb"), false, "entries"),
            _ => return None,
        };
        Some(Self {
            all: all.then(|| scope.gauge("size")),
            min: scope.gauge(&format!("min_{what}_per_host")),
            max: scope.gauge(&format!("max_{what}_per_host")),
        })
    }

    pub(crate) fn show(&self, size: Size) {
        if let Some(all) = &self.all {
            all.set(size.all);
        }
        self.min.set(size.min);
        self.max.set(size.max);
    }
}

/// A number of one host that only grows, written by every worker; `/clusters` prints it.
#[derive(Default)]
pub struct HostCounter(AtomicU64);

impl HostCounter {
    /// Adds one.
    pub fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The number.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The same for what there is at a time. Half as large: a mesh has more hosts than a host has connections.
#[derive(Default)]
pub struct HostGauge(AtomicU32);

impl HostGauge {
    /// Adds one.
    pub fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The number.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed).into()
    }
}

/// What `/clusters` shows of a host; the field is the name.
#[derive(Default)]
#[allow(missing_docs, reason = "each field is Envoy's host stat of that name")]
pub struct HostStats {
    pub cx_active: HostGauge,
    pub cx_connect_fail: HostCounter,
    pub cx_total: HostCounter,
    pub rq_active: HostGauge,
    pub rq_error: HostCounter,
    pub rq_pending_active: HostGauge,
    pub rq_success: HostCounter,
    pub rq_timeout: HostCounter,
    pub rq_total: HostCounter,
}

impl HostStats {
    /// Names and values in the order of Envoy's text output; `true` marks a gauge.
    pub fn all(&self) -> [(&'static str, u64, bool); 9] {
        [
            ("cx_active", self.cx_active.value(), true),
            ("cx_connect_fail", self.cx_connect_fail.value(), false),
            ("cx_total", self.cx_total.value(), false),
            ("rq_active", self.rq_active.value(), true),
            ("rq_error", self.rq_error.value(), false),
            ("rq_pending_active", self.rq_pending_active.value(), true),
            ("rq_success", self.rq_success.value(), false),
            ("rq_timeout", self.rq_timeout.value(), false),
            ("rq_total", self.rq_total.value(), false),
        ]
    }
}
