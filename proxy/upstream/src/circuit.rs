//! Circuit breakers: limits that hold over all workers, hence atomics.
//!
//! A resource is taken by a guard and given back by its drop. Envoy lets a race between two threads exceed a limit
//! (it checks, then adds); here a limit is never exceeded, except where Envoy grants the resource regardless
//! (the first connection of a pool, [`Resource::force`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sampan_core::stats::{Gauge, Scope};

use crate::config::{RetryBudget, Thresholds};

/// The class of a request (`core.v3.RoutingPriority`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Priority {
    /// `DEFAULT`
    #[default]
    Default = 0,
    /// `HIGH`
    High = 1,
}

/// One limited resource.
pub struct Resource {
    max: u64,
    current: AtomicU64,
    open: Gauge,
    remaining: Option<Gauge>,
}

/// One unit of a resource; given back by its drop.
pub struct Permit {
    breakers: Arc<Breakers>,
    which: fn(&Breakers) -> &Resource,
}

/// The breakers of one priority (`circuit_breakers.default.*`, `.high.*`).
pub struct Breakers {
    connections: Resource,
    pending: Resource,
    requests: Resource,
    retries: Resource,
    budget: Option<RetryBudget>,
    /// Printed by Envoy too; connection pools are not limited here.
    pools: (Gauge, Option<RemainingPools>),
}

/// `remaining_cx_pools`, which stands at its limit.
struct RemainingPools(Gauge);

impl Drop for RemainingPools {
    fn drop(&mut self) {
        self.0.sub(u64::MAX);
    }
}

impl Resource {
    fn new(max: u32, open: Gauge, remaining: Option<Gauge>) -> Self {
        let max = u64::from(max);
        if let Some(remaining) = &remaining {
            remaining.add(max);
        }
        if max == 0 {
            open.inc();
        }
        Self { max, current: AtomicU64::new(0), open, remaining }
    }

    /// The limit.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// Units taken.
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::Relaxed)
    }

    /// Whether a unit could be had.
    pub fn has_room(&self) -> bool {
        self.current() < self.max
    }

    pub(crate) fn take(&self) -> bool {
        let before = self.current.fetch_add(1, Ordering::Relaxed);
        if before < self.max {
            self.taken(before);
            return true;
        }
        self.current.fetch_sub(1, Ordering::Relaxed);
        false
    }

    fn force(&self) {
        let before = self.current.fetch_add(1, Ordering::Relaxed);
        self.taken(before);
    }

    fn taken(&self, before: u64) {
        if before + 1 == self.max {
            self.open.inc();
        }
        if let Some(remaining) = &self.remaining
            && before < self.max
        {
            remaining.dec();
        }
    }

    pub(crate) fn give_back(&self) {
        let before = self.current.fetch_sub(1, Ordering::Relaxed);
        if before == self.max {
            self.open.dec();
        }
        if let Some(remaining) = &self.remaining
            && before <= self.max
        {
            remaining.inc();
        }
    }
}

impl Drop for Resource {
    fn drop(&mut self) {
        if let Some(remaining) = &self.remaining {
            remaining.sub(self.max.saturating_sub(*self.current.get_mut()));
        }
        if *self.current.get_mut() >= self.max {
            self.open.dec();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        (self.which)(&self.breakers).give_back();
    }
}

impl Breakers {
    /// Breakers whose gauges are in `scope` (`cluster.NAME.circuit_breakers.default.`).
    pub(crate) fn new(thresholds: &Thresholds, scope: &Scope) -> Self {
        let resource = |max: u32, open: &str, remaining: &str| {
            Resource::new(max, scope.gauge(open), thresholds.track_remaining.then(|| scope.gauge(remaining)))
        };
        let remaining_pools = thresholds.track_remaining.then(|| {
            let gauge = scope.gauge("remaining_cx_pools");
            gauge.add(u64::MAX);
            RemainingPools(gauge)
        });
        Self {
            connections: resource(thresholds.max_connections, "cx_open", "remaining_cx"),
            pending: resource(thresholds.max_pending_requests, "rq_pending_open", "remaining_pending"),
            requests: resource(thresholds.max_requests, "rq_open", "remaining_rq"),
            retries: resource(
                if thresholds.retry_budget.is_some() { u32::MAX } else { thresholds.max_retries },
                "rq_retry_open",
                "remaining_retries",
            ),
            budget: thresholds.retry_budget.clone(),
            pools: (scope.gauge("cx_pool_open"), remaining_pools),
        }
    }

    /// Envoy sets the gauges of a priority with traffic, if to 0.
    pub(crate) fn touch(&self) {
        for resource in [&self.connections, &self.pending, &self.requests] {
            resource.open.touch();
        }
        self.pools.0.touch();
    }

    /// Connections.
    pub fn connections(&self) -> &Resource {
        &self.connections
    }

    /// Requests that wait for a connection.
    pub fn pending(&self) -> &Resource {
        &self.pending
    }

    /// Requests on connections.
    pub fn requests(&self) -> &Resource {
        &self.requests
    }

    /// Retries under way.
    pub fn retries(&self) -> &Resource {
        &self.retries
    }

    /// A connection; with `first` (the pool has none) one is granted beyond the limit, as Envoy does.
    pub fn connection(self: &Arc<Self>, first: bool) -> Option<Permit> {
        if first {
            self.connections.force();
            return Some(Permit { breakers: self.clone(), which: Self::connections });
        }
        self.permit(Self::connections)
    }

    /// A place in the queue.
    pub fn pending_request(self: &Arc<Self>) -> Option<Permit> {
        self.permit(Self::pending)
    }

    /// A request.
    pub fn request(self: &Arc<Self>) -> Option<Permit> {
        self.permit(Self::requests)
    }

    /// A retry, held until the retried request is over. `None`: count `upstream_rq_retry_overflow`.
    pub fn retry(self: &Arc<Self>) -> Option<Permit> {
        if let Some(budget) = &self.budget {
            let active = self.requests.current() + self.pending.current();
            let allowed = (budget.percent / 100.0 * active as f64) as u64;
            if self.retries.current() >= allowed.max(u64::from(budget.min_concurrency)) {
                return None;
            }
        }
        self.permit(Self::retries)
    }

    fn permit(self: &Arc<Self>, which: fn(&Self) -> &Resource) -> Option<Permit> {
        which(self).take().then(|| Permit { breakers: self.clone(), which })
    }
}

#[cfg(test)]
mod tests {
    use sampan_core::stats::Store;

    use super::*;

    #[test]
    fn a_retry_budget_grows_with_the_active_requests() {
        let budget = RetryBudget { percent: 50.0, min_concurrency: 1 };
        let thresholds = Thresholds { retry_budget: Some(budget), ..Default::default() };
        let breakers = Arc::new(Breakers::new(&thresholds, &Store::new().root()));
        let first = breakers.retry();
        assert!(first.is_some());
        assert!(breakers.retry().is_none(), "nothing is active: one at most");
        let active: Vec<_> = (0..4).map(|_| breakers.request().unwrap()).collect();
        let second = breakers.retry();
        assert!(second.is_some());
        assert!(breakers.retry().is_none(), "half of four are two");
        drop((first, second, active));
        assert_eq!(breakers.retries().current(), 0);
    }
}
