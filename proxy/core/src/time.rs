//! Sleeping, for whatever may run on a worker.
//!
//! tokio's timer reads the clock twice at every turn of the loop, whether or not anything is due. A worker's deadlines
//! are nearly all moved or dropped before they pass. So they stand in an ordered list here, and a timerfd that is set to
//! the first of them is one more descriptor that the loop waits for: a turn without a deadline costs nothing.
//!
//! A thread that has called [`install`] sleeps like that; its runtime needs no timer of tokio's. On every other thread
//! the same types are tokio's sleep.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use sampan_os::alarm::Alarm;

use crate::clock;

/// What stands for a time without end.
const FAR: Duration = Duration::from_secs(30 * 365 * 86_400);

/// A deadline's place in the list: no two are alike in the process, so that one dropped elsewhere hits nothing.
type Key = (Instant, u64);

struct Queue {
    waiting: BTreeMap<Key, Waker>,
    next: u64,
    /// When the alarm goes off, if that is still to come.
    armed: Option<Instant>,
    alarm: Rc<Alarm>,
}

thread_local! {
    static QUEUE: RefCell<Option<Queue>> = const { RefCell::new(None) };
}

/// Makes sleeps of this thread its own; the future is to run on it for as long as anything sleeps.
pub fn install() -> io::Result<impl Future<Output = ()> + 'static> {
    static THREADS: AtomicU64 = AtomicU64::new(1);
    let alarm = Rc::new(Alarm::new()?);
    let next = THREADS.fetch_add(1, Ordering::Relaxed) << 40;
    let queue = Queue { waiting: BTreeMap::new(), next, armed: None, alarm: alarm.clone() };
    QUEUE.set(Some(queue));
    Ok(async move {
        while alarm.gone_off().await.is_ok() {
            wake_due();
        }
    })
}

fn wake_due() {
    let now = clock::tick();
    let due = QUEUE.with_borrow_mut(|queue| {
        let queue = queue.as_mut()?;
        queue.armed = None;
        let later = queue.waiting.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut queue.waiting, later);
        queue.arm(now);
        Some(due)
    });
    due.into_iter().flatten().for_each(|(_, waker)| waker.wake());
}

impl Queue {
    fn insert(&mut self, deadline: Instant, waker: Waker) -> u64 {
        self.next += 1;
        self.waiting.insert((deadline, self.next), waker);
        if self.armed.is_none_or(|armed| deadline < armed) {
            self.arm(Instant::now());
        }
        self.next
    }

    /// Sets the alarm to the first deadline. Where that is taken back later it goes off for nothing, once.
    fn arm(&mut self, now: Instant) {
        let Some(((first, _), _)) = self.waiting.first_key_value() else { return };
        let set = self.alarm.set(first.saturating_duration_since(now));
        debug_assert!(set.is_ok(), "a time within years");
        self.armed = Some(*first);
    }
}

/// Ready once its deadline has passed.
pub struct Sleep {
    deadline: Instant,
    state: State,
}

enum State {
    /// Nobody has asked yet.
    New,
    Waiting {
        id: u64,
        waker: Waker,
    },
    /// Of a thread without a list of its own.
    Tokio(Pin<Box<tokio::time::Sleep>>),
}

/// Sleeps until then.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, state: State::New }
}

/// Sleeps for so long.
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(Instant::now() + duration.min(FAR))
}

impl Sleep {
    /// Until when.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Another deadline, also for who waits already.
    pub fn reset(&mut self, deadline: Instant) {
        match &mut self.state {
            State::New => {}
            State::Tokio(sleep) => sleep.as_mut().reset(deadline.into()),
            State::Waiting { id, waker } => QUEUE.with_borrow_mut(|queue| {
                if let Some(queue) = queue {
                    // Another reference stays here: nothing is dropped with this one.
                    queue.waiting.remove(&(self.deadline, *id));
                    *id = queue.insert(deadline, waker.clone());
                }
            }),
        }
        self.deadline = deadline;
    }

    /// Whether the deadline has passed, by the clock as this thread last read it; else the task will be woken.
    pub fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.deadline <= clock::recent() {
            return Poll::Ready(());
        }
        match &mut self.state {
            State::Tokio(sleep) => return pin!(tokio::task::coop::unconstrained(sleep)).poll(cx),
            State::Waiting { waker, .. } if waker.will_wake(cx.waker()) => return Poll::Pending,
            State::New | State::Waiting { .. } => {}
        }
        self.forget();
        let waker = cx.waker().clone();
        let deadline = self.deadline;
        let id = QUEUE.with_borrow_mut(|queue| queue.as_mut().map(|q| q.insert(deadline, waker.clone())));
        match id {
            Some(id) => self.state = State::Waiting { id, waker },
            None => {
                #[allow(clippy::disallowed_methods, reason = "this is what stands in its place")]
                let sleep = tokio::time::sleep_until(deadline.into());
                self.state = State::Tokio(Box::pin(sleep));
                return self.poll_passed(cx);
            }
        }
        Poll::Pending
    }

    fn forget(&mut self) {
        if let State::Waiting { id, .. } = self.state {
            // A thread that ends may have dropped its list already. The waker is dropped when the list is free again: with
            // it may go a task, and that task's own sleeps.
            drop(QUEUE.try_with(|queue| queue.borrow_mut().as_mut()?.waiting.remove(&(self.deadline, id))));
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().poll_passed(cx)
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

/// A [`timeout`] has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed;

/// Runs `work` for so long at most.
pub async fn timeout<F: Future>(limit: Duration, work: F) -> Result<F::Output, Elapsed> {
    timeout_at(Instant::now() + limit.min(FAR), work).await
}

/// Runs `work` until then at most.
pub async fn timeout_at<F: Future>(deadline: Instant, work: F) -> Result<F::Output, Elapsed> {
    let mut work = pin!(work);
    let mut limit = sleep_until(deadline);
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => limit.poll_passed(cx).map(|()| Err(Elapsed)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use tokio::runtime::{Builder, LocalOptions};

    use super::*;

    const STEP: Duration = Duration::from_millis(20);

    /// On a thread of its own whose runtime has no timer of tokio's.
    fn installed<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
        let thread = std::thread::spawn(|| {
            let runtime = Builder::new_current_thread().enable_io().build_local(LocalOptions::default());
            runtime.unwrap().block_on(async {
                tokio::task::spawn_local(install().unwrap());
                test().await;
            });
        });
        thread.join().unwrap();
    }

    #[test]
    fn sleeps_end_in_the_order_of_their_deadlines() {
        installed(|| async {
            let start = Instant::now();
            let order = Rc::new(RefCell::new(Vec::new()));
            let tasks: Vec<_> = [3u32, 1, 2, 1]
                .map(|steps| {
                    let order = order.clone();
                    tokio::task::spawn_local(async move {
                        sleep_until(start + STEP * steps).await;
                        assert!(start.elapsed() >= STEP * steps);
                        order.borrow_mut().push(steps);
                    })
                })
                .into();
            for task in tasks {
                task.await.unwrap();
            }
            assert_eq!(*order.borrow(), [1, 1, 2, 3]);
            assert!(QUEUE.with_borrow(|q| q.as_ref().unwrap().waiting.is_empty()));
        });
    }

    #[test]
    fn a_deadline_moves_both_ways_and_a_dropped_one_is_forgotten() {
        installed(|| async {
            let start = Instant::now();
            let mut sleep = sleep(FAR);
            poll_fn(|cx| {
                assert!(sleep.poll_passed(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            sleep.reset(start + STEP);
            poll_fn(|cx| sleep.poll_passed(cx)).await;
            assert!(start.elapsed() >= STEP);
            sleep.reset(start + 3 * STEP);
            poll_fn(|cx| sleep.poll_passed(cx)).await;
            assert!(start.elapsed() >= 3 * STEP);
            assert_eq!(timeout(STEP, std::future::pending::<()>()).await, Err(Elapsed));
            assert_eq!(timeout(FAR, async { 7 }).await, Ok(7));
            drop(sleep);
            assert!(QUEUE.with_borrow(|q| q.as_ref().unwrap().waiting.is_empty()));
        });
    }

    #[test]
    fn a_past_deadline_and_one_polled_by_another_task() {
        installed(|| async {
            sleep_until(Instant::now() - STEP).await;
            let mut moved = sleep(STEP);
            poll_fn(|cx| {
                assert!(moved.poll_passed(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            // The task that asked last is woken.
            tokio::task::spawn_local(moved).await.unwrap();
        });
    }

    #[tokio::test]
    async fn without_a_list_it_is_tokio_who_wakes() {
        let start = Instant::now();
        let mut sleep = sleep(FAR);
        assert_eq!(timeout(STEP, poll_fn(|cx| sleep.poll_passed(cx))).await, Err(Elapsed));
        sleep.reset(start + 2 * STEP);
        sleep.await;
        assert!(start.elapsed() >= 2 * STEP);
    }
}
