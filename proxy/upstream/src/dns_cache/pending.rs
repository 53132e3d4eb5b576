//! `dns_cache_circuit_breaker`: how many may wait for names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sampan_core::stats::{Gauge, Scope};

pub(super) struct Pending {
    max: u64,
    current: AtomicU64,
    open: Gauge,
    remaining: Gauge,
}

/// A place among those who wait, given back by its drop.
pub struct Waiting(Arc<Pending>);

impl Pending {
    /// Gauges in `scope`. That of a breaker that never lets anybody wait is not shown as open, as in Envoy.
    pub(super) fn new(max: u64, scope: &Scope) -> Self {
        let remaining = scope.gauge("rq_pending_remaining");
        remaining.add(max);
        Self { max, current: AtomicU64::new(0), open: scope.gauge("rq_pending_open"), remaining }
    }

    pub(super) fn has_room(&self) -> bool {
        self.current.load(Ordering::Relaxed) < self.max
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.remaining.sub(self.max);
    }
}

impl Waiting {
    pub(super) fn new(pending: &Arc<Pending>) -> Option<Self> {
        let before = pending.current.fetch_add(1, Ordering::Relaxed);
        if before >= pending.max {
            pending.current.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        pending.remaining.dec();
        if before + 1 == pending.max {
            pending.open.inc();
        }
        Some(Self(pending.clone()))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let before = self.0.current.fetch_sub(1, Ordering::Relaxed);
        self.0.remaining.inc();
        if before == self.0.max {
            self.0.open.dec();
        }
    }
}
