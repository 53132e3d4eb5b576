//! `connection_keepalive`: pings that ask whether the peer is still there.
//!
//! A ping goes out when the interval (and up to `interval_jitter` percent more) has passed since the last answer.
//! Without an answer within the timeout the connection is dead; any frame gives it another timeout, since an answer
//! may stand in line behind them, as in Envoy.

use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use h2::{Ping, PingPong};
use sampan_core::time::{Sleep, sleep_until};

/// `KeepaliveSettings`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KeepaliveOptions {
    /// `interval`; without it pings are sent only for `idle_interval`.
    pub interval: Option<Duration>,
    /// `timeout`
    pub timeout: Duration,
    /// `interval_jitter`, in percent.
    pub jitter: f64,
    /// `connection_idle_interval`: a new stream on a connection that has been quiet for longer sends a ping ahead.
    pub idle_interval: Option<Duration>,
}

/// The pings of one connection.
pub(super) struct Keepalive {
    options: KeepaliveOptions,
    ping: PingPong,
    timer: Sleep,
    waiting: bool,
    frames: u64,
    /// When the last frames were seen, where somebody wants to know.
    last: Instant,
    /// Between 0 and 1: the connection's place within the jitter.
    place: f64,
}

impl Keepalive {
    pub(super) fn new(options: KeepaliveOptions, ping: PingPong, random: u64) -> Self {
        let place = (random >> 11) as f64 / (1u64 << 53) as f64;
        let now = Instant::now();
        let timer = sleep_until(now + Duration::from_secs(86_400));
        let mut new = Self { options, ping, timer, waiting: false, frames: 0, last: now, place };
        new.rest();
        new
    }

    /// The next interval begins.
    fn rest(&mut self) {
        self.waiting = false;
        if let Some(interval) = self.options.interval {
            let jitter = interval.mul_f64((self.options.jitter / 100.0 * self.place).max(0.0));
            self.timer.reset(Instant::now() + interval + jitter);
        }
    }

    /// A stream is opened: whether a ping must go out, which the next [`Keepalive::poll`] sends.
    fn stream_opened(&mut self) {
        if let Some(idle) = self.options.idle_interval
            && !self.waiting
            && self.last.elapsed() > idle
        {
            self.send();
        }
    }

    fn send(&mut self) {
        // Refused only while another is on its way.
        if self.ping.send_ping(Ping::opaque()).is_ok() {
            self.waiting = true;
            self.timer.reset(Instant::now() + self.options.timeout);
        }
    }

    /// Ready once the peer has not answered in time. `frames` is how many have come, `streams` whether one was opened
    /// since the last call.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, frames: u64, opened: bool) -> Poll<()> {
        if opened {
            self.stream_opened();
        }
        if frames != self.frames {
            self.frames = frames;
            if self.waiting || self.options.idle_interval.is_some() {
                self.last = Instant::now();
            }
            if self.waiting {
                self.timer.reset(Instant::now() + self.options.timeout);
            }
        }
        if let Poll::Ready(Ok(_)) = self.ping.poll_pong(cx) {
            self.last = Instant::now();
            self.rest();
        }
        if !self.waiting && self.options.interval.is_none() {
            return Poll::Pending;
        }
        while self.timer.poll_passed(cx).is_ready() {
            if self.waiting {
                return Poll::Ready(());
            }
            self.send();
            if !self.waiting {
                self.rest();
            }
        }
        Poll::Pending
    }
}
