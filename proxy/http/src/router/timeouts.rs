//! The deadlines of a request: of all attempts together, of each, of each one's silence.

use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sampan_core::header::{HeaderId, HeaderMap};

use super::{Failure, RouterConfig};
use crate::route::{ClusterAction, GrpcTimeout};
use crate::stream::Stream;
use crate::timer::Timer;

/// Timeouts, and the deadlines that they became.
#[derive(Default)]
pub(super) struct Timeouts {
    global: Option<Duration>,
    per_try: Option<Duration>,
    per_try_idle: Option<Duration>,
    /// The global timeout runs from when the request was wholly received.
    global_at: Option<Instant>,
    per_try_at: Option<Instant>,
    per_try_idle_at: Option<Instant>,
    /// `x-envoy-upstream-rq-timeout-alt-response`
    pub(super) alternative_response: bool,
}

fn take_milliseconds(headers: &mut HeaderMap, id: HeaderId) -> Option<Duration> {
    let parsed = headers.get_str(id).and_then(|v| v.parse().ok()).map(Duration::from_millis);
    headers.remove(id);
    parsed
}

/// `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get_str(HeaderId::GRPC_TIMEOUT)?;
    let unit = text.chars().last()?;
    let digits = &text[..text.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

impl GrpcTimeout {
    /// The client's timeout within the route's bounds; `None` is no timeout.
    fn apply(self, headers: &HeaderMap) -> Option<Duration> {
        let mut timeout = grpc_timeout(headers).unwrap_or_default();
        if let Some(offset) = self.offset
            && offset < timeout
        {
            timeout -= offset;
        }
        let max = self.max.unwrap_or_default();
        if !max.is_zero() && (timeout.is_zero() || timeout > max) {
            timeout = max;
        }
        Some(timeout).filter(|t| !t.is_zero())
    }
}

impl Timeouts {
    /// From the route and the request's headers, which are taken out.
    pub(super) fn new(action: &ClusterAction, stream: &mut Stream, config: &RouterConfig) -> Self {
        let mut timeouts = Self {
            global: action.timeout,
            per_try: action.retry.per_try_timeout,
            per_try_idle: action.retry.per_try_idle_timeout,
            ..Self::default()
        };
        if stream.grpc {
            if action.grpc_timeout.max.is_some() {
                let duration = action.grpc_timeout.apply(&stream.request);
                stream.timer.set_max_duration(duration.map(|d| stream.info.start + d));
                timeouts.global = None;
            } else if action.old_grpc_timeout.max.is_some() {
                timeouts.global = action.old_grpc_timeout.apply(&stream.request);
            }
        }
        if action.max_stream_duration.is_some() {
            timeouts.global = None;
        }
        let headers = &mut stream.request;
        if config.respect_expected_timeout && headers.contains(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS) {
            let expected = headers.get_str(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS);
            if let Some(ms) = expected.and_then(|v| v.parse().ok()) {
                timeouts.global = Some(Duration::from_millis(ms)).filter(|d| !d.is_zero());
            }
        } else if let Some(timeout) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS) {
            timeouts.global = Some(timeout).filter(|d| !d.is_zero());
        }
        if let Some(t) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS) {
            timeouts.per_try = Some(t).filter(|d| !d.is_zero());
        }
        if timeouts.global.is_some_and(|global| timeouts.per_try.is_some_and(|per_try| per_try >= global)) {
            timeouts.per_try = None;
        }
        if let Some(d) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_STREAM_DURATION_MS) {
            stream.timer.set_max_duration(Some(stream.info.start + d).filter(|_| !d.is_zero()));
        }
        timeouts.alternative_response = headers.remove(HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE);
        timeouts
    }

    /// What the upstream is told that it has.
    pub(super) fn expected(&self, now: Instant) -> Option<Duration> {
        let left = match (self.global, self.global_at) {
            (Some(_), Some(at)) => Some(at.saturating_duration_since(now)),
            (global, _) => global,
        };
        match (self.per_try, left) {
            (Some(per_try), Some(left)) => Some(per_try.min(left)),
            (per_try, left) => per_try.or(left),
        }
    }

    /// The request was wholly received; only the first call counts.
    pub(super) fn request_received(&mut self, at: Instant) {
        if self.global_at.is_none() {
            self.global_at = self.global.map(|d| at + d);
        }
    }

    /// An attempt was wholly sent.
    pub(super) fn attempt_sent(&mut self, at: Instant) {
        self.per_try_at = self.per_try.map(|d| at + d);
        self.per_try_idle_at = self.per_try_idle.map(|d| at + d);
    }

    /// The response has begun: only the deadline of all attempts and the silence still count.
    pub(super) fn response_begun(&mut self) {
        self.per_try_at = None;
    }

    /// Something came from upstream.
    pub(super) fn moved(&mut self, timer: &Timer) {
        let _ = timer;
        if let Some(idle) = self.per_try_idle {
            self.per_try_idle_at = Some(Instant::now() + idle);
        }
    }

    /// Ready once a deadline has passed.
    pub(super) fn poll(&mut self, timer: &Timer, cx: &mut Context<'_>) -> Poll<Failure> {
        if timer.poll(cx, self.global_at).is_ready() {
            return Poll::Ready(Failure::Timeout);
        }
        if timer.poll(cx, self.per_try_at).is_ready() {
            self.per_try_at = None;
            return Poll::Ready(Failure::PerTryTimeout);
        }
        if timer.poll(cx, self.per_try_idle_at).is_ready() {
            self.per_try_idle_at = None;
            return Poll::Ready(Failure::PerTryIdleTimeout);
        }
        Poll::Pending
    }
}
