//! What is made when a cluster is first used: counters, circuit breakers, what the workers share of a policy.
//!
//! A mesh has thousands of clusters of which a proxy uses a few.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use sampan_codec::h2::CodecStats;
use sampan_core::stats::{Counter, Lazy};

use super::Cluster;
use super::destinations::Destinations;
use crate::circuit::{Breakers, Priority};
use crate::config::Thresholds;
use crate::lb::{Size, Tables};
use crate::outlier::OutlierStats;
use crate::stats::{ClusterStats, TableStats, TimeoutBudgetStats};

/// The parts; see the module.
pub(super) struct Used {
    pub(super) stats: Arc<ClusterStats>,
    breakers: [Arc<Breakers>; 2],
    timeout_budget: Option<Arc<TimeoutBudgetStats>>,
    outlier: Option<Box<OutlierStats>>,
    /// The gauges of a hashing policy; a set must not meet another.
    table: Option<Mutex<TableStats>>,
    /// Of a hashing policy: what the workers share.
    tables: Tables,
    /// `upstream.proxyprotocol.v2_tlvs_exceed_max_length`, where a transport socket sends PROXY headers.
    tlvs_too_long: Option<Counter>,
    /// `total_match_count` of each transport socket.
    pub(super) socket_matches: Vec<Counter>,
    /// The hosts of an ORIGINAL_DST cluster.
    pub(super) destinations: Destinations,
    /// Stats of the HTTP/2 codec, made with the first such connection.
    h2: Lazy<Arc<CodecStats>>,
}

impl Used {
    fn new(cluster: &Cluster) -> Self {
        let stats = Arc::new(ClusterStats::new(&cluster.scope));
        // Envoy sets them, if to 0.
        for gauge in [&stats.membership_degraded, &stats.membership_excluded, &stats.warming_state] {
            gauge.touch();
        }
        cluster.report(&stats);
        let breakers = |priority, name| {
            let scope = cluster.scope.scope("circuit_breakers").scope(name);
            Arc::new(Breakers::new(&cluster.thresholds(priority), &scope))
        };
        let usual = breakers(Priority::Default, "default");
        usual.touch();
        let names = cluster.config.transport_socket_matches.iter().map(|m| m.name.as_str());
        let socket_matches = std::iter::once("default")
            .chain(names)
            .zip(&cluster.socket_matches)
            .map(|(name, count)| {
                let counter = cluster.scope.scope(name).counter("total_match_count");
                counter.add(count.swap(0, Ordering::Relaxed));
                counter
            })
            .collect();
        Self {
            stats,
            h2: Lazy::new(cluster.scope.clone(), |scope| Arc::new(CodecStats::new(scope))),
            table: TableStats::new(&cluster.config.lb.policy, &cluster.scope).map(Mutex::new),
            tables: Tables::default(),
            destinations: Destinations::default(),
            outlier: cluster.outlier.as_ref().map(|_| Box::new(OutlierStats::new(&cluster.scope))),
            tlvs_too_long: cluster
                .sends_headers
                .then(|| cluster.scope.scope("upstream.proxyprotocol").counter("v2_tlvs_exceed_max_length")),
            socket_matches,
            breakers: [usual, breakers(Priority::High, "high")],
            timeout_budget: cluster
                .config
                .track_timeout_budgets
                .then(|| Arc::new(TimeoutBudgetStats::new(&cluster.scope))),
        }
    }
}

impl Cluster {
    /// The counters; made now if nobody asked before.
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.used().stats
    }

    /// Whether the counters were made.
    pub fn is_used(&self) -> bool {
        self.used.get().is_some()
    }

    /// The circuit breakers of a priority.
    pub fn breakers(&self, priority: Priority) -> &Arc<Breakers> {
        &self.used().breakers[priority as usize]
    }

    /// The stats of the HTTP/2 codec.
    pub(crate) fn h2_stats(&self) -> &Arc<CodecStats> {
        self.used().h2.get()
    }

    /// The histograms of `track_timeout_budgets`, where it is set.
    pub fn timeout_budget(&self) -> Option<&Arc<TimeoutBudgetStats>> {
        self.used().timeout_budget.as_ref()
    }

    pub(crate) fn outlier_stats(&self) -> Option<&OutlierStats> {
        self.used().outlier.as_deref()
    }

    /// Shows the size of a hashing policy's table.
    pub(crate) fn show_table(&self, size: Size) {
        if let Some(table) = &self.used().table {
            table.lock().unwrap_or_else(PoisonError::into_inner).show(size);
        }
    }

    /// The tables of a hashing policy.
    pub(crate) fn tables(&self) -> &Tables {
        &self.used().tables
    }

    /// The limits of a priority.
    pub fn thresholds(&self, priority: Priority) -> Thresholds {
        let breakers = self.config.circuit_breakers.as_ref();
        breakers.map(|b| b.thresholds[priority as usize].clone()).unwrap_or_default()
    }

    pub(crate) fn count_long_tlvs(&self) {
        if let Some(counter) = &self.used().tlvs_too_long {
            counter.inc();
        }
    }

    pub(super) fn used(&self) -> &Used {
        self.used.get_or_init(|| Box::new(Used::new(self)))
    }
}
