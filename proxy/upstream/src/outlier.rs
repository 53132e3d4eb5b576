//! Outlier detection: hosts that fail are ejected for a while.
//!
//! ```text
//!   monitor   one host: consecutive failures, success rates, ejections
//!   events    the event log
//!   stats     cluster.NAME.outlier_detection.*
//! ```
//!
//! Workers report how each request ended ([`WorkerHost::report`](crate::WorkerHost::report)); a host that failed so
//! often in a row is ejected by the worker that saw the last failure (Envoy asks its main thread to). A task of the
//! control thread looks every `interval` at the success rates and lets hosts back in.
//!
//! `consecutive_5xx` counts every failure, of whichever origin, unless `split_external_local_origin_errors` is set.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::config::OutlierConfig;
use crate::host::{HealthFlag, Host};

mod events;
mod monitor;
mod stats;

use events::Ejected;
pub use events::EventLog;

pub(crate) use monitor::Monitor;
use monitor::{Rate, State};
pub(crate) use stats::OutlierStats;

/// How a request, or a part of it, ended; Envoy's `Outlier::Result`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A connection was had; the answer is still to come.
    Connected,
    /// A connection was had, and that is all that will be known.
    ConnectedFinally,
    /// Nothing came in time.
    Timeout,
    /// No connection, or it broke.
    ConnectFailed,
    /// The host answered with an error.
    Failed,
    /// The host answered well.
    Success,
}

/// Why a host is ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Ejection {
    Consecutive5xx,
    ConsecutiveGatewayFailure,
    ConsecutiveLocalOriginFailure,
    SuccessRate,
    LocalOriginSuccessRate,
    FailurePercentage,
    LocalOriginFailurePercentage,
}

/// Average success rate, and the rate below which a host is ejected; -1 where there was too little to tell.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SuccessRates {
    /// The average.
    pub average: f64,
    /// The threshold.
    pub threshold: f64,
}

const UNKNOWN: SuccessRates = SuccessRates { average: -1.0, threshold: -1.0 };

/// The detector of a cluster.
pub(crate) struct Detector {
    config: OutlierConfig,
    events: Option<Arc<EventLog>>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// How many hosts are ejected.
    active: u64,
    /// External and local origin.
    rates: [SuccessRates; 2],
}

impl Detector {
    pub(crate) fn new(config: &OutlierConfig, events: Option<Arc<EventLog>>) -> Self {
        Self { config: config.clone(), events, inner: Mutex::new(Inner { active: 0, rates: [UNKNOWN; 2] }) }
    }

    /// Success rates of errors of external and of local origin.
    pub(crate) fn rates(&self) -> [SuccessRates; 2] {
        self.inner().rates
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a result.
    pub(crate) fn report(
        &self,
        cluster: &Cluster,
        host: &Host,
        monitor: &Monitor,
        outcome: Outcome,
        code: Option<u16>,
    ) {
        if !self.config.split_external_local_origin_errors {
            let code = match (code, outcome) {
                (Some(code), _) => code,
                (None, Outcome::Success | Outcome::ConnectedFinally) => 200,
                (None, Outcome::Timeout) => 504,
                (None, Outcome::ConnectFailed) => 503,
                (None, Outcome::Failed) => 500,
                (None, Outcome::Connected) => return,
            };
            return self.code(cluster, host, monitor, code);
        }
        match outcome {
            Outcome::Connected | Outcome::ConnectedFinally => {
                monitor.local.count(true);
                Monitor::reset(&monitor.consecutive_local);
            }
            Outcome::Timeout | Outcome::ConnectFailed => {
                monitor.local.count(false);
                let failures = Monitor::failed(&monitor.consecutive_local);
                if failures == self.config.consecutive_local_origin_failure {
                    self.consecutive(cluster, host, monitor, Ejection::ConsecutiveLocalOriginFailure);
                }
            }
            Outcome::Failed => self.code(cluster, host, monitor, code.unwrap_or(503)),
            Outcome::Success => self.code(cluster, host, monitor, code.unwrap_or(200)),
        }
    }

    fn code(&self, cluster: &Cluster, host: &Host, monitor: &Monitor, code: u16) {
        let failed = (500..600).contains(&code);
        monitor.external.count(!failed);
        if !failed {
            Monitor::reset(&monitor.consecutive_5xx);
            Monitor::reset(&monitor.consecutive_gateway);
            return;
        }
        if (502..=504).contains(&code) {
            let failures = Monitor::failed(&monitor.consecutive_gateway);
            if failures == self.config.consecutive_gateway_failure {
                self.consecutive(cluster, host, monitor, Ejection::ConsecutiveGatewayFailure);
            }
        } else {
            Monitor::reset(&monitor.consecutive_gateway);
        }
        if Monitor::failed(&monitor.consecutive_5xx) == self.config.consecutive_5xx {
            self.consecutive(cluster, host, monitor, Ejection::Consecutive5xx);
        }
    }

    #[cold]
    fn consecutive(&self, cluster: &Cluster, host: &Host, monitor: &Monitor, why: Ejection) {
        if host.has_flag(HealthFlag::FailedOutlierCheck) {
            return;
        }
        if let Some(stats) = cluster.outlier_stats() {
            stats.detected(why);
        }
        self.eject(cluster, host, monitor, why);
        Monitor::reset(match why {
            Ejection::ConsecutiveGatewayFailure => &monitor.consecutive_gateway,
            Ejection::ConsecutiveLocalOriginFailure => &monitor.consecutive_local,
            _ => &monitor.consecutive_5xx,
        });
    }

    fn eject(&self, cluster: &Cluster, host: &Host, monitor: &Monitor, why: Ejection) {
        let Some(stats) = cluster.outlier_stats() else { return };
        let hosts = cluster.hosts().hosts().count().max(1);
        let mut inner = self.inner();
        let percent = 100.0 * (inner.active + 1) as f64 / hosts as f64;
        let first = self.config.always_eject_one_host && inner.active == 0;
        if percent > f64::from(self.config.max_ejection_percent) && !first {
            stats.ejections_overflow.inc();
            return;
        }
        if matches!(why, Ejection::Consecutive5xx | Ejection::SuccessRate) {
            stats.ejections_total.inc();
        }
        if rand::random::<u32>() % 100 >= self.config.enforcing[why as usize] {
            drop(inner);
            return self.log(cluster, host, monitor, why, false);
        }
        if host.set_flag(HealthFlag::FailedOutlierCheck, true) {
            inner.active += 1;
            stats.ejections_active.inc();
        }
        drop(inner);
        stats.enforced(why);
        let mut state = monitor.state();
        state.ejected = Some(Instant::now());
        state.jitter = self.config.max_ejection_time_jitter.mul_f64(rand::random::<f64>());
        if self.config.base_ejection_time * state.back_off
            < self.config.max_ejection_time + self.config.base_ejection_time
        {
            state.back_off += 1;
        }
        state.ejections += 1;
        drop(state);
        cluster.health_changed();
        self.log(cluster, host, monitor, why, true);
    }

    fn log(&self, cluster: &Cluster, host: &Host, monitor: &Monitor, why: Ejection, enforced: bool) {
        let Some(events) = &self.events else { return };
        let local = matches!(why, Ejection::LocalOriginSuccessRate | Ejection::LocalOriginFailurePercentage);
        let of = usize::from(local);
        let (rate, rates) = (monitor.success_rates()[of], self.rates()[of]);
        events.ejected(cluster, host, &monitor.state(), &Ejected { why, enforced, rate, rates });
    }

    /// What `interval` brings.
    fn tick(&self, cluster: &Cluster) {
        let Some(stats) = cluster.outlier_stats() else { return };
        let set = cluster.hosts();
        let hosts: Vec<(&Arc<Host>, &Monitor)> =
            set.hosts().filter_map(|host| Some((host, host.monitor()?))).collect();
        let now = Instant::now();
        let mut returned = false;
        for (host, monitor) in &hosts {
            if host.has_flag(HealthFlag::FailedOutlierCheck) && self.is_over(&monitor.state(), now) {
                self.uneject(stats, host, monitor, now);
                if let Some(events) = &self.events {
                    events.returned(cluster, host, &monitor.state());
                }
                returned = true;
            }
            monitor.turn();
        }
        if returned {
            cluster.health_changed();
        }
        self.success_rates(cluster, stats, &hosts, false);
        if self.config.split_external_local_origin_errors {
            self.success_rates(cluster, stats, &hosts, true);
        }
        for (host, monitor) in &hosts {
            let mut state = monitor.state();
            let well = state.returned.is_some_and(|at| now.duration_since(at) >= self.config.interval);
            if well && !host.has_flag(HealthFlag::FailedOutlierCheck) {
                state.back_off = state.back_off.saturating_sub(1);
            }
        }
    }

    fn is_over(&self, state: &State, now: Instant) -> bool {
        let time = (self.config.base_ejection_time * state.back_off).min(self.config.max_ejection_time);
        state.ejected.is_none_or(|at| time + state.jitter <= now.duration_since(at))
    }

    fn uneject(&self, stats: &OutlierStats, host: &Host, monitor: &Monitor, now: Instant) {
        if host.set_flag(HealthFlag::FailedOutlierCheck, false) {
            let mut inner = self.inner();
            inner.active = inner.active.saturating_sub(1);
            stats.ejections_active.dec();
        }
        for count in [&monitor.consecutive_5xx, &monitor.consecutive_gateway, &monitor.consecutive_local] {
            Monitor::reset(count);
        }
        monitor.state().returned = Some(now);
    }

    fn success_rates(
        &self,
        cluster: &Cluster,
        stats: &OutlierStats,
        hosts: &[(&Arc<Host>, &Monitor)],
        local: bool,
    ) {
        let config = &self.config;
        self.inner().rates[usize::from(local)] = UNKNOWN;
        let enough = |count: usize, minimum: u32| count >= minimum as usize;
        if !enough(hosts.len(), config.success_rate_minimum_hosts)
            && !enough(hosts.len(), config.failure_percentage_minimum_hosts)
        {
            return;
        }
        let (mut by_rate, mut by_failures) = (Vec::new(), Vec::new());
        for (host, monitor) in hosts {
            let rate: &Rate = if local { &monitor.local } else { &monitor.external };
            let Some((percent, volume)) = rate.last() else { continue };
            if host.has_flag(HealthFlag::FailedOutlierCheck) {
                continue;
            }
            let wanted = [config.success_rate_request_volume, config.failure_percentage_request_volume];
            if volume >= u64::from(wanted[0].min(wanted[1])) {
                rate.set_shown(percent);
            }
            for (volume_wanted, list) in wanted.into_iter().zip([&mut by_rate, &mut by_failures]) {
                if volume >= u64::from(volume_wanted) {
                    list.push((*host, *monitor, percent));
                }
            }
        }
        if !by_rate.is_empty() && enough(by_rate.len(), config.success_rate_minimum_hosts) {
            let rates = threshold(by_rate.iter().map(|(.., rate)| *rate), config.success_rate_stdev_factor);
            self.inner().rates[usize::from(local)] = rates;
            let why = if local { Ejection::LocalOriginSuccessRate } else { Ejection::SuccessRate };
            for (host, monitor, _) in by_rate.iter().filter(|(.., rate)| *rate < rates.threshold) {
                stats.ejections_success_rate.inc();
                stats.detected(why);
                self.eject(cluster, host, monitor, why);
            }
        }
        if !by_failures.is_empty() && enough(by_failures.len(), config.failure_percentage_minimum_hosts) {
            let why =
                if local { Ejection::LocalOriginFailurePercentage } else { Ejection::FailurePercentage };
            let limit = f64::from(config.failure_percentage_threshold);
            for (host, monitor, _) in by_failures.iter().filter(|(.., rate)| 100.0 - rate >= limit) {
                stats.detected(why);
                self.eject(cluster, host, monitor, why);
            }
        }
    }

    /// The hosts are others now: those that went count no longer as ejected.
    pub(crate) fn recount(&self, cluster: &Cluster) {
        let ejected = |host: &&Arc<Host>| host.has_flag(HealthFlag::FailedOutlierCheck);
        let now = cluster.hosts().hosts().filter(ejected).count() as u64;
        self.set_active(cluster, now);
    }

    /// The cluster is gone.
    pub(crate) fn withdraw(&self, cluster: &Cluster) {
        self.set_active(cluster, 0);
    }

    fn set_active(&self, cluster: &Cluster, now: u64) {
        let mut inner = self.inner();
        let before = std::mem::replace(&mut inner.active, now);
        if before != now
            && let Some(stats) = cluster.outlier_stats()
        {
            stats.ejections_active.add(now.wrapping_sub(before));
        }
    }
}

/// The average less so many thousandths of the standard deviation.
fn threshold(rates: impl ExactSizeIterator<Item = f64> + Clone, factor: u32) -> SuccessRates {
    let count = rates.len() as f64;
    let average = rates.clone().sum::<f64>() / count;
    let variance = rates.map(|rate| (rate - average).powi(2)).sum::<f64>() / count;
    SuccessRates { average, threshold: average - f64::from(factor) / 1000.0 * variance.sqrt() }
}

/// Looks after a cluster's hosts for as long as it lives.
pub(crate) fn start(cluster: &Arc<Cluster>, interval: Duration) {
    let weak = Arc::downgrade(cluster);
    let task = tokio::spawn(async move {
        loop {
            sampan_core::time::sleep(interval.max(Duration::from_millis(1))).await;
            let Some(cluster) = weak.upgrade() else { return };
            // Without counters there was no traffic.
            if cluster.is_used()
                && let Some(detector) = cluster.outlier()
            {
                detector.tick(&cluster);
            }
        }
    });
    cluster.own_task(task.abort_handle());
}

impl Host {
    /// Sets or clears a flag; `true` if that changed it.
    pub(crate) fn set_flag(&self, flag: HealthFlag, on: bool) -> bool {
        let flags = self.flags();
        let bit = flag as u32;
        let before = if on {
            flags.fetch_or(bit, Ordering::Relaxed)
        } else {
            flags.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != on
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_is_below_the_average() {
        // Envoy's documentation on success rates: 95 % of ten hosts, one at 50.
        let rates = [100.0, 100.0, 100.0, 100.0, 50.0];
        let found = threshold(rates.into_iter(), 1900);
        assert_eq!(found.average, 90.0);
        assert!((found.threshold - 52.0).abs() < 1e-9, "{found:?}");
    }
}
