//! The sweeper: one task per worker that looks after idle connections.
//!
//! It runs while there are idle connections. Each sweep polls every idle connection with the sweeper's own waker, so
//! that a peer's close wakes it at once. A connection that was released since the last sweep is seen at the next one,
//! at most [`SHORT`] later; if there was none the sweeper sleeps until the next one's time is up.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use sampan_core::time::sleep;

use super::PoolSet;
use crate::worker::WorkerHost;

const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(3600);

/// The pools with idle connections.
#[derive(Default)]
pub(crate) struct Sweeper {
    pools: RefCell<Vec<Weak<PoolSet>>>,
    running: Cell<bool>,
    /// A connection became idle since the last sweep.
    fresh: Cell<bool>,
    /// Set while the sweeper sleeps long.
    sleeper: RefCell<Option<Waker>>,
}

impl Sweeper {
    /// A connection of the pool became idle.
    pub(super) fn watch(self: &Rc<Self>, pools: &Rc<PoolSet>, host: &WorkerHost) {
        debug_assert!(Rc::ptr_eq(self, &host.core.sweeper));
        if !pools.listed.replace(true) {
            self.pools.borrow_mut().push(Rc::downgrade(pools));
        }
        if self.fresh.replace(true) {
            return;
        }
        if !self.running.replace(true) {
            tokio::task::spawn_local(self.clone().run());
        } else if let Some(waker) = self.sleeper.borrow_mut().take() {
            waker.wake();
        }
    }

    async fn run(self: Rc<Self>) {
        let start = Instant::now();
        let mut timer = sleep(SHORT);
        poll_fn(|cx| {
            // Woken by a release while sleeping long: from now on short.
            if self.fresh.get() && timer.deadline() > Instant::now() + SHORT {
                timer.reset(Instant::now() + SHORT);
            }
            let mut next = None;
            loop {
                let due = timer.poll_passed(cx).is_ready();
                if due {
                    self.fresh.set(false);
                }
                if due || next.is_none() {
                    let now = start.elapsed().as_millis() as u64;
                    next = self.sweep(cx, now).map(|deadline| deadline.saturating_sub(now).max(1));
                }
                let Some(wait) = next else {
                    self.running.set(false);
                    self.fresh.set(false);
                    return Poll::Ready(());
                };
                if !due {
                    *self.sleeper.borrow_mut() = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                timer.reset(Instant::now() + Duration::from_millis(wait).min(LONG));
            }
        })
        .await;
    }

    /// Returns when the next connection will have been idle or alive for too long; `None` where none is idle.
    fn sweep(&self, cx: &mut Context<'_>, now: u64) -> Option<u64> {
        let listed = std::mem::take(&mut *self.pools.borrow_mut());
        let mut left = Vec::with_capacity(listed.len());
        let mut next: Option<u64> = None;
        for weak in listed {
            let Some(pools) = weak.upgrade() else { continue };
            let Some(host) = pools.host.upgrade() else { continue };
            let h1 = pools.h1.iter().filter_map(|pool| pool.sweep(cx, now, &host)).min();
            let h2 = pools.h2.iter().filter_map(|pool| pool.sweep(now, &host)).min();
            let deadline = h1.into_iter().chain(h2).min();
            pools.listed.set(deadline.is_some());
            if let Some(deadline) = deadline {
                next = Some(next.unwrap_or(u64::MAX).min(deadline));
                left.push(weak);
            }
        }
        self.pools.borrow_mut().append(&mut left);
        next
    }
}
