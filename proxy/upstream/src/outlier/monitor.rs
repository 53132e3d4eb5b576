//! What is known of one host.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts by all workers, read by the detector.
#[derive(Default)]
pub(crate) struct Monitor {
    pub(super) consecutive_5xx: AtomicU32,
    pub(super) consecutive_gateway: AtomicU32,
    pub(super) consecutive_local: AtomicU32,
    pub(super) external: Rate,
    pub(super) local: Rate,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) ejected: Option<Instant>,
    pub(super) returned: Option<Instant>,
    /// How often it was ejected.
    pub(super) ejections: u32,
    /// How many base times the next ejection takes.
    pub(super) back_off: u32,
    pub(super) jitter: Duration,
}

/// A success rate: what is counted now, and what the last interval brought.
pub(crate) struct Rate {
    good: AtomicU64,
    all: AtomicU64,
    last: [AtomicU64; 2],
    /// What `/clusters` shows, as bits; -1 for nothing.
    shown: AtomicU64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            good: AtomicU64::default(),
            all: AtomicU64::default(),
            last: Default::default(),
            shown: AtomicU64::new((-1.0f64).to_bits()),
        }
    }
}

impl Monitor {
    /// One more failure in a row; how many that are.
    pub(super) fn failed(count: &AtomicU32) -> u32 {
        count.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// A write only where there is something to forget: the usual case touches nothing shared.
    pub(super) fn reset(count: &AtomicU32) {
        if count.load(Ordering::Relaxed) != 0 {
            count.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An interval is over.
    pub(super) fn turn(&self) {
        self.external.turn();
        self.local.turn();
    }

    /// The success rates of the last interval, external and local origin; -1 for too little to tell.
    pub(crate) fn success_rates(&self) -> [f64; 2] {
        [&self.external, &self.local].map(|rate| f64::from_bits(rate.shown.load(Ordering::Relaxed)))
    }
}

impl Rate {
    pub(super) fn count(&self, good: bool) {
        self.all.fetch_add(1, Ordering::Relaxed);
        if good {
            self.good.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn turn(&self) {
        self.last[0].store(self.good.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.last[1].store(self.all.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.set_shown(-1.0);
    }

    /// Success rate in per cent and number of requests of the last interval; none where there was no request.
    pub(super) fn last(&self) -> Option<(f64, u64)> {
        let [good, all] = [0, 1].map(|i| self.last[i].load(Ordering::Relaxed));
        (all > 0).then(|| (good as f64 * 100.0 / all as f64, all))
    }

    pub(super) fn set_shown(&self, percent: f64) {
        self.shown.store(percent.to_bits(), Ordering::Relaxed);
    }
}
