//! The gauges of how many hosts there are, which all clusters that ever had the name share: each adds what changed of
//! itself and takes back all of it when another has its slot.

use std::sync::PoisonError;

use super::Cluster;
use crate::config::Discovery;
use crate::host::Health;
use crate::stats::ClusterStats;

/// What the membership gauges show.
#[derive(Clone, Copy, Default)]
pub(super) struct Membership {
    total: u64,
    healthy: u64,
    degraded: u64,
    max_weight: u64,
    /// Changes that came before the counters were made.
    pub(super) changes: u64,
}

impl Cluster {
    /// Moves the membership gauges from what was last shown to what is.
    pub(super) fn report(&self, stats: &ClusterStats) {
        if !self.is_current() {
            return;
        }
        let hosts = self.hosts.load();
        let mut now = Membership::default();
        // Envoy sets it when it compares hosts of now and before, which these kinds of cluster never do.
        let listed = matches!(
            self.config.discovery,
            Discovery::Static | Discovery::OriginalDst(_) | Discovery::Forward(_)
        );
        let weighs = !listed && self.generation() > 0;
        now.max_weight = u64::from(weighs);
        for host in hosts.hosts() {
            now.total += 1;
            now.healthy += u64::from(host.health() == Health::Healthy);
            now.degraded += u64::from(host.health() == Health::Degraded);
            if weighs {
                now.max_weight = now.max_weight.max(u64::from(host.weight()));
            }
        }
        let mut old = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        for (gauge, before, after) in [
            (&stats.membership_total, old.total, now.total),
            (&stats.membership_healthy, old.healthy, now.healthy),
            (&stats.membership_degraded, old.degraded, now.degraded),
            (&stats.max_host_weight, old.max_weight, now.max_weight),
        ] {
            if after > before {
                gauge.add(after - before);
            } else if before > after {
                gauge.sub(before - after);
            }
        }
        stats.membership_change.add(old.changes);
        *old = now;
    }

    /// Takes what the gauges show of this cluster back: another has its slot, or none.
    pub(super) fn withdraw(&self) {
        let mut old = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(used) = self.used.get() else { return };
        if let Some(outlier) = &self.outlier {
            outlier.withdraw(self);
        }
        used.stats.membership_total.sub(old.total);
        used.stats.membership_healthy.sub(old.healthy);
        used.stats.membership_degraded.sub(old.degraded);
        used.stats.max_host_weight.sub(old.max_weight);
        *old = Membership::default();
    }
}
