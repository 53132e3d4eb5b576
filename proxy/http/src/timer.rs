//! What an exchange's task waits for besides its bytes: deadlines, and informational heads on their way down.
//!
//! A request has half a dozen deadlines, nearly none of which is ever met. Arming and cancelling a timer for each
//! would cost more than the rest of the timeout logic. Here a connection has one timer: a deadline behind the armed
//! instant costs a comparison; the timer fires early at most once per connection and interval and is then set to
//! what counts.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sampan_core::clock;
use sampan_core::header::HeaderMap;
use sampan_core::time::{Sleep, sleep_until};

/// Shared by everything that runs on one task. Clones share it.
#[derive(Clone)]
pub struct Timer(Rc<Inner>);

struct Inner {
    /// Never later than any deadline that is waited for.
    sleep: RefCell<Option<Sleep>>,
    last_activity: Cell<Instant>,
    idle_timeout: Cell<Option<Duration>>,
    max_duration_at: Cell<Option<Instant>>,
    request_at: Cell<Option<Instant>>,
    informational: RefCell<Vec<(u16, HeaderMap)>>,
    upstream_wire: Cell<(u64, u64)>,
    received: Cell<u64>,
    upstream_headers: Cell<Option<(u64, u64)>>,
    /// Both of the attempts before.
    upstream_before: Cell<[u64; 4]>,
    upstream_end: Cell<Option<Instant>>,
}

/// Which of an exchange's own deadlines has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// `stream_idle_timeout`
    Idle,
    /// `max_stream_duration`
    MaxDuration,
    /// `request_timeout`
    Request,
}

impl Default for Timer {
    fn default() -> Self {
        Self(Rc::new(Inner {
            sleep: RefCell::new(None),
            last_activity: Cell::new(clock::recent()),
            idle_timeout: Cell::new(None),
            max_duration_at: Cell::new(None),
            request_at: Cell::new(None),
            informational: RefCell::new(Vec::new()),
            upstream_wire: Cell::new((0, 0)),
            received: Cell::new(0),
            upstream_headers: Cell::new(None),
            upstream_before: Cell::default(),
            upstream_end: Cell::new(None),
        }))
    }
}

impl Timer {
    /// Ready once `deadline` has passed; else the task is woken at or before it. `None` never passes.
    #[inline]
    pub fn poll(&self, cx: &mut Context<'_>, deadline: Option<Instant>) -> Poll<()> {
        match deadline {
            Some(deadline) => self.poll_at(cx, deadline),
            None => Poll::Pending,
        }
    }

    fn poll_at(&self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let mut slot = self.0.sleep.borrow_mut();
        let sleep = slot.get_or_insert_with(|| sleep_until(deadline));
        if deadline < sleep.deadline() {
            sleep.reset(deadline);
        }
        while sleep.poll_passed(cx).is_ready() {
            if clock::tick() >= deadline {
                return Poll::Ready(());
            }
            sleep.reset(deadline);
        }
        Poll::Pending
    }

    /// An exchange begins.
    pub fn begin(
        &self,
        now: Instant,
        idle: Option<Duration>,
        max_duration: Option<Duration>,
        request: Option<Duration>,
    ) {
        self.0.last_activity.set(now);
        self.0.upstream_wire.set((0, 0));
        self.0.received.set(0);
        self.0.upstream_headers.set(None);
        self.0.upstream_before.set([0; 4]);
        self.0.upstream_end.set(None);
        self.0.idle_timeout.set(idle);
        self.0.max_duration_at.set(max_duration.map(|d| now + d));
        self.0.request_at.set(request.map(|d| now + d));
    }

    /// Bytes sent to and received from the upstream, as of now; the body that counts them outlives the router, and
    /// the log wants them after it is gone.
    pub fn set_upstream_wire(&self, bytes: (u64, u64)) {
        self.0.upstream_wire.set(bytes);
    }

    /// Bytes of the request's body that came while the response was already under way.
    pub fn set_received(&self, bytes: u64) {
        self.0.received.set(bytes);
    }

    /// What [`Timer::set_received`] was told last.
    pub fn received(&self) -> u64 {
        self.0.received.get()
    }

    /// What [`Timer::set_upstream_wire`] was told last, of all attempts.
    pub fn upstream_wire(&self) -> (u64, u64) {
        let ([sent, received, ..], last) = (self.0.upstream_before.get(), self.0.upstream_wire.get());
        (sent + last.0, received + last.1)
    }

    /// What was told of bytes stays, and another attempt begins.
    pub fn next_attempt(&self) {
        let (sent, received) = self.upstream_wire();
        let (sent_in_heads, received_in_heads) = self.upstream_headers().unwrap_or_default();
        self.0.upstream_before.set([sent, received, sent_in_heads, received_in_heads]);
        self.0.upstream_wire.set((0, 0));
        self.0.upstream_headers.set(None);
    }

    /// The last byte of the response's body came, just now.
    pub fn set_upstream_end(&self) {
        self.0.upstream_end.set(Some(clock::recent()));
    }

    /// When [`Timer::set_upstream_end`] was told so.
    pub fn upstream_end(&self) -> Option<Instant> {
        self.0.upstream_end.get()
    }

    /// Of these, the heads', where the codec tells (HTTP/2).
    pub fn set_upstream_headers(&self, bytes: (u64, u64)) {
        self.0.upstream_headers.set(Some(bytes));
    }

    /// What [`Timer::set_upstream_headers`] was told last, of all attempts.
    pub fn upstream_headers(&self) -> Option<(u64, u64)> {
        let [.., sent, received] = self.0.upstream_before.get();
        match self.0.upstream_headers.get() {
            None if sent == 0 => None,
            last => last.or(Some((0, 0))).map(|last| (sent + last.0, received + last.1)),
        }
    }

    /// Something moved, just now: whoever brought it has read the clock.
    pub fn touch(&self) {
        if self.0.idle_timeout.get().is_some() {
            self.0.last_activity.set(clock::recent());
        }
    }

    /// `stream_idle_timeout` as the route has it.
    pub fn set_idle_timeout(&self, idle: Option<Duration>) {
        self.0.idle_timeout.set(idle);
    }

    /// `max_stream_duration` as the route has it.
    pub fn set_max_duration(&self, at: Option<Instant>) {
        self.0.max_duration_at.set(at);
    }

    /// The request was wholly received, or its timeout no longer counts.
    pub fn request_done(&self) {
        self.0.request_at.set(None);
    }

    /// Ready once one of the exchange's deadlines has passed.
    pub fn poll_expired(&self, cx: &mut Context<'_>) -> Poll<Expired> {
        let idle_at = self.0.idle_timeout.get().map(|idle| self.0.last_activity.get() + idle);
        let mut first = idle_at.map(|at| (at, Expired::Idle));
        // Of two at once the later one here counts.
        for (at, what) in [
            (self.0.max_duration_at.get(), Expired::MaxDuration),
            (self.0.request_at.get(), Expired::Request),
        ] {
            if let Some(at) = at
                && first.is_none_or(|(earlier, _)| at <= earlier)
            {
                first = Some((at, what));
            }
        }
        match first {
            Some((at, what)) => self.poll(cx, Some(at)).map(|()| what),
            None => Poll::Pending,
        }
    }

    /// An informational head from upstream.
    pub fn push_informational(&self, status: u16, headers: HeaderMap) {
        self.0.informational.borrow_mut().push((status, headers));
    }

    /// Takes the informational heads that wait to be sent.
    pub fn take_informational(&self, mut take: impl FnMut(u16, &HeaderMap)) {
        if self.0.informational.borrow().is_empty() {
            return;
        }
        for (status, headers) in self.0.informational.borrow_mut().drain(..) {
            take(status, &headers);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn the_earliest_deadline_wakes_and_later_ones_still_hold() {
        let timer = Timer::default();
        let start = Instant::now();
        let (near, far) = (start + Duration::from_millis(20), start + Duration::from_millis(60));
        poll_fn(|cx| {
            assert!(timer.poll(cx, Some(far)).is_pending());
            timer.poll(cx, Some(near))
        })
        .await;
        assert!(start.elapsed() >= Duration::from_millis(20));
        poll_fn(|cx| timer.poll(cx, Some(far))).await;
        assert!(start.elapsed() >= Duration::from_millis(60));
    }

    #[tokio::test]
    async fn a_task_that_has_used_up_its_turn_is_woken_too() {
        let timer = Timer::default();
        let start = Instant::now();
        let mut busy = true;
        let waiting = poll_fn(|cx| {
            while std::mem::take(&mut busy) {
                while let Poll::Ready(progress) = tokio::task::coop::poll_proceed(cx) {
                    progress.made_progress();
                }
            }
            timer.poll(cx, Some(start + Duration::from_millis(20)))
        });
        sampan_core::time::timeout(Duration::from_secs(5), waiting).await.unwrap();
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}
