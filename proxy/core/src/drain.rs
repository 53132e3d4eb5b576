//! Drain: everyone who serves holds a guard; who stops the proxy raises the signal and waits for the guards.
//!
//! `Drain` belongs to the program, a [`Signal`] goes to each worker, a [`Guard`] to each connection. A connection
//! asks [`Signal::asks_to_go`] where it decides about keep-alive and is polled at each change ([`Signal::until_closing`]).

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::clock;

/// How far the drain has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Serving.
    Serving,
    /// What they belong to is being replaced: responses ask clients to go, all of them or ever more
    /// ([`Drain::leave`]); idle connections stay, so that no request meets a closing connection.
    Leaving,
    /// Connections are told to go away at the next occasion.
    Draining,
    /// The deadline has passed: connections are closed where they stand.
    Closing,
}

/// The end of the drain that decides: the program's, or as a child of that a filter chain's. Clones share.
#[derive(Clone)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    active: Arc<Active>,
    children: Arc<Mutex<Vec<Weak<Active>>>>,
}

#[derive(Default)]
struct Active {
    count: AtomicUsize,
    /// The phase once more, for those who ask per request: a plain load instead of the channel's lock.
    phase: AtomicU8,
    idle: Notify,
    /// Of [`Phase::Leaving`], where not every response asks.
    ramp: OnceLock<Ramp>,
    /// See [`Drain::removed_alone`].
    removed_alone: AtomicBool,
    /// Of a child: what is told of changes, and who counts its guards too.
    family: Option<(watch::Sender<Phase>, Arc<Active>)>,
}

/// Ever more responses ask: none in the first second, all of them from the middle of the time on. So it was measured of
/// Envoy 1.40, which leaves the other half to connections that are idle.
struct Ramp {
    from: Instant,
    /// Half the time, in whole seconds that are begun.
    seconds: u64,
}

impl Ramp {
    fn hits(&self, now: Instant, random: impl FnOnce() -> u64) -> bool {
        let elapsed = now.saturating_duration_since(self.from).as_secs();
        elapsed >= self.seconds || elapsed > random() % self.seconds
    }
}

/// A worker's end of the drain.
#[derive(Clone)]
pub struct Signal {
    phase: watch::Receiver<Phase>,
    active: Arc<Active>,
}

/// Held by a connection while it lives.
pub struct Guard(Arc<Active>);

fn move_on(sender: &watch::Sender<Phase>, active: &Active, phase: Phase) {
    sender.send_if_modified(|now| {
        let on = phase > *now;
        if on {
            *now = phase;
            active.phase.store(phase as u8, Ordering::Release);
        }
        on
    });
}

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// A drain that has not begun.
    pub fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Serving), active: Arc::default(), children: Arc::default() }
    }

    /// A part that can drain alone, and drains with the whole.
    pub fn child(&self) -> Self {
        let phase = watch::Sender::new(Phase::Serving);
        let family = Some((phase.clone(), self.active.clone()));
        let active = Arc::new(Active { family, ..Active::default() });
        move_on(&phase, &active, self.phase());
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(&active));
        Self { phase, active, children: Arc::default() }
    }

    /// A signal for one worker.
    pub fn signal(&self) -> Signal {
        Signal { phase: self.phase.subscribe(), active: self.active.clone() }
    }

    /// Moves on; a drain never goes back.
    pub fn advance(&self, phase: Phase) {
        move_on(&self.phase, &self.active, phase);
        for child in self.children.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Some(child) = child.upgrade()
                && let Some((sender, _)) = &child.family
            {
                move_on(sender, &child, phase);
            }
        }
    }

    /// Asks clients to go: with every response from now on, or with ever more of them over this time.
    pub fn leave(&self, over: Option<Duration>) {
        if let Some(over) = over.filter(|_| self.phase() == Phase::Serving) {
            // What was begun goes on.
            let seconds = over.as_secs().div_ceil(2);
            let _ = self.active.ramp.set(Ramp { from: Instant::now(), seconds });
        }
        self.advance(Phase::Leaving);
    }

    /// What drains is a filter chain that its listener does without from now on; access logs tell so.
    pub fn removed_alone(&self) {
        self.active.removed_alone.store(true, Ordering::Relaxed);
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
    /// Whether this response should ask its client to go.
    pub fn asks_to_go(&self, random: impl FnOnce() -> u64) -> bool {
        match self.active.phase.load(Ordering::Acquire) {
            phase if phase < Phase::Leaving as u8 => false,
            phase if phase > Phase::Leaving as u8 => true,
            _ => self.active.ramp.get().is_none_or(|ramp| ramp.hits(clock::recent(), random)),
        }
    }

    /// Whether idle connections should end.
    pub fn ends_idle(&self) -> bool {
        self.active.phase.load(Ordering::Relaxed) >= Phase::Draining as u8
    }

    /// Whether connections should end now. What is served by [`Signal::until_closing`] is polled once more then.
    pub fn is_closing(&self) -> bool {
        self.active.phase.load(Ordering::Relaxed) >= Phase::Closing as u8
    }

    /// The response code details of what [`Phase::Closing`] cuts off, Envoy's.
    pub fn closing_details(&self) -> &'static str {
        if self.active.removed_alone.load(Ordering::Relaxed) {
            "downstream_local_disconnect(filter_chain_is_being_removed)"
        } else {
            "downstream_local_disconnect(purging_socket_that_have_not_progressed_to_connections)"
        }
    }

    /// Runs `serve` to its end, or to [`Phase::Closing`]. What `serve` awaits may rely on being polled at each change
    /// of the phase.
    pub async fn until_closing(mut self, serve: impl Future<Output = ()>) {
        let mut serve = pin!(serve);
        let active = self.active.clone();
        let mut closing = pin!(self.reached(Phase::Closing));
        let (mut registered, mut over) = (false, false);
        std::future::poll_fn(|cx| {
            // Before `serve` is polled, so that no change falls between the two. While all serve, registering once is
            // enough: the task and so its waker stay the same. After a change, which may be seen before its notice
            // comes, each poll registers.
            if !registered || active.phase.load(Ordering::Relaxed) > Phase::Serving as u8 {
                registered = true;
                over |= closing.as_mut().poll(cx).is_ready();
            }
            if serve.as_mut().poll(cx).is_ready() || over { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Returns once the phase is at least `phase`. A dropped [`Drain`] counts as [`Phase::Closing`].
    async fn reached(&mut self, phase: Phase) {
        // An error means that the program's end is gone, which is the end of all phases.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }

    /// A guard for a connection.
    pub fn guard(&self) -> Guard {
        self.active.count.fetch_add(1, Ordering::AcqRel);
        if let Some((_, parent)) = &self.active.family {
            parent.count.fetch_add(1, Ordering::AcqRel);
        }
        Guard(self.active.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let parent = self.0.family.as_ref().map(|(_, parent)| parent);
        for active in std::iter::once(&self.0).chain(parent) {
            if active.count.fetch_sub(1, Ordering::AcqRel) == 1 {
                active.idle.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_drains_alone_and_with_the_whole() {
        let whole = Drain::new();
        let (one, two) = (whole.child(), whole.child());
        let guard = one.signal().guard();
        assert_eq!((whole.active(), one.active(), two.active()), (1, 1, 0));
        one.advance(Phase::Leaving);
        let signal = one.signal();
        assert!(signal.asks_to_go(|| 0) && !signal.ends_idle() && !two.signal().asks_to_go(|| 0));
        let serving = tokio::spawn(signal.until_closing(std::future::pending()));
        whole.advance(Phase::Draining);
        assert!(two.signal().ends_idle() && whole.child().signal().ends_idle());
        tokio::task::yield_now().await;
        one.advance(Phase::Closing);
        serving.await.unwrap();
        drop(guard);
        whole.idle().await;
    }

    #[test]
    fn ever_more_are_asked_to_go() {
        let ramp = Ramp { from: Instant::now(), seconds: 3 };
        let asked = |after: u64| {
            let now = ramp.from + Duration::from_millis(after);
            (0..3).filter(|random| ramp.hits(now, || *random)).count()
        };
        assert_eq!([0, 999, 1000, 1999, 2000, 3000, 9000].map(asked), [0, 0, 1, 1, 2, 3, 3]);
        assert!(Ramp { seconds: 0, ..ramp }.hits(Instant::now(), || 0));
        let gradual = Drain::new();
        gradual.leave(Some(Duration::from_secs(4)));
        gradual.leave(None);
        assert!(!gradual.signal().asks_to_go(|| 0));
        gradual.advance(Phase::Draining);
        assert!(gradual.signal().asks_to_go(|| 0));
    }

    #[tokio::test]
    async fn what_is_served_has_a_last_turn() {
        let drain = Drain::new();
        let signal = drain.signal();
        let (asked, last) = (signal.clone(), Arc::new(AtomicUsize::new(0)));
        let turns = last.clone();
        let serving = tokio::spawn(signal.until_closing(std::future::poll_fn(move |_| {
            turns.fetch_add(usize::from(asked.is_closing()), Ordering::Relaxed);
            Poll::Pending
        })));
        drain.advance(Phase::Draining);
        tokio::task::yield_now().await;
        assert_eq!(last.load(Ordering::Relaxed), 0);
        drain.advance(Phase::Closing);
        serving.await.unwrap();
        assert_eq!(last.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn no_change_is_missed_however_close_they_come() {
        for _ in 0..100 {
            let drain = Drain::new();
            let signal = drain.signal();
            let (begun, begins) = std::sync::mpsc::channel();
            let (ended, ends) = std::sync::mpsc::channel();
            let worker = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    let serve = || {
                        let mut own = signal.clone();
                        let serving = async move {
                            own.reached(Phase::Draining).await;
                            std::future::pending().await
                        };
                        tokio::spawn(signal.clone().until_closing(serving))
                    };
                    let all: Vec<_> = std::iter::repeat_with(serve).take(100).collect();
                    tokio::task::yield_now().await;
                    begun.send(()).unwrap();
                    for one in all {
                        one.await.unwrap();
                    }
                    ended.send(()).unwrap();
                });
            });
            begins.recv().unwrap();
            drain.advance(Phase::Leaving);
            drain.advance(Phase::Draining);
            std::thread::sleep(Duration::from_micros(200));
            drain.advance(Phase::Closing);
            ends.recv_timeout(Duration::from_secs(5)).unwrap();
            worker.join().unwrap();
        }
    }

    #[tokio::test]
    async fn waits_for_the_last_guard() {
        let drain = Drain::new();
        let mut signal = drain.signal();
        let guard = signal.guard();
        drain.advance(Phase::Draining);
        drain.advance(Phase::Serving);
        assert!(signal.asks_to_go(|| 0));
        signal.reached(Phase::Draining).await;
        assert_eq!(drain.active(), 1);
        drop(guard);
        drain.idle().await;
    }
}
