//! Drain: everyone who serves holds a guard; who stops the proxy raises the signal and waits for the guards.
//!
//! `Drain` belongs to the program, a [`Signal`] goes to each worker, a [`Guard`] to each connection. A connection
//! asks [`Signal::is_draining`] where it decides about keep-alive and awaits [`Signal::reached`] where it idles.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use tokio::sync::{Notify, watch};

/// How far the drain has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Serving.
    Serving,
    /// Connections are told to go away at the next occasion.
    Draining,
    /// The deadline has passed: connections are closed where they stand.
    Closing,
}

/// The program's end of the drain.
pub struct Drain {
    phase: watch::Sender<Phase>,
    active: Arc<Active>,
}

#[derive(Default)]
struct Active {
    count: AtomicUsize,
    /// The phase once more, for those who ask per request: a plain load instead of the channel's lock.
    phase: AtomicU8,
    idle: Notify,
}

/// A worker's end of the drain.
#[derive(Clone)]
pub struct Signal {
    phase: watch::Receiver<Phase>,
    active: Arc<Active>,
}

/// Held by a connection while it lives.
pub struct Guard(Arc<Active>);

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// A drain that has not begun.
    pub fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Serving), active: Arc::default() }
    }

    /// A signal for one worker.
    pub fn signal(&self) -> Signal {
        Signal { phase: self.phase.subscribe(), active: self.active.clone() }
    }

    /// Moves on; a drain never goes back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let on = phase > *now;
            if on {
                *now = phase;
                self.active.phase.store(phase as u8, Ordering::Release);
            }
            on
        });
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// How many guards are held.
    pub fn active(&self) -> usize {
        self.active.count.load(Ordering::Acquire)
    }

    /// Returns when no guard is held.
    pub async fn idle(&self) {
        loop {
            let notified = self.active.idle.notified();
            if self.active() == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Signal {
    /// Whether connections should end at the next occasion.
    pub fn is_draining(&self) -> bool {
        self.active.phase.load(Ordering::Relaxed) >= Phase::Draining as u8
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Returns once the phase is at least `phase`. A dropped [`Drain`] counts as [`Phase::Closing`].
    pub async fn reached(&mut self, phase: Phase) {
        // An error means that the program's end is gone, which is the end of all phases.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }

    /// A guard for a connection.
    pub fn guard(&self) -> Guard {
        self.active.count.fetch_add(1, Ordering::AcqRel);
        Guard(self.active.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_the_last_guard() {
        let drain = Drain::new();
        let mut signal = drain.signal();
        let guard = signal.guard();
        drain.advance(Phase::Draining);
        drain.advance(Phase::Serving);
        assert!(signal.is_draining());
        signal.reached(Phase::Draining).await;
        assert_eq!(drain.active(), 1);
        drop(guard);
        drain.idle().await;
    }
}
