//! The deadlines of a request: of all attempts together, of each, of each one's silence.

use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sampan_core::clock;
use sampan_core::header::{HeaderId, HeaderMap, HeaderSet};

use super::{Failure, RouterConfig};
use crate::route::{ClusterAction, GrpcTimeout, StreamDuration};
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
    /// `grpc-timeout` tells the upstream what it has.
    tell_grpc: bool,
    /// `x-envoy-upstream-rq-timeout-alt-response`
    pub(super) alternative_response: bool,
    /// A per-try timeout ends no attempt: another begins beside it.
    pub(super) hedging: bool,
}

fn take_milliseconds(headers: &mut HeaderMap, id: HeaderId) -> Option<Duration> {
    let parsed = headers.get_str(id).and_then(|v| v.parse().ok()).map(Duration::from_millis);
    headers.remove(id);
    parsed
}

/// The largest number that `grpc-timeout` can hold.
const MAX_GRPC_TIMEOUT: u64 = 99_999_999;

/// `grpc-timeout`: up to eight digits and a unit. Parts of a millisecond count as a whole one.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let (unit, digits) = headers.get(HeaderId::GRPC_TIMEOUT)?.split_last()?;
    let n: u64 = std::str::from_utf8(digits).ok()?.parse().ok().filter(|n| *n <= MAX_GRPC_TIMEOUT)?;
    Some(match unit {
        b'H' => Duration::from_secs(n * 3600),
        b'M' => Duration::from_secs(n * 60),
        b'S' => Duration::from_secs(n),
        b'm' => Duration::from_millis(n),
        b'u' => Duration::from_millis(n.div_ceil(1000)),
        b'n' => Duration::from_millis(n.div_ceil(1_000_000)),
        _ => return None,
    })
}

/// Sets `grpc-timeout`, in the smallest unit whose eight digits suffice.
pub(super) fn set_grpc_timeout(headers: &mut HeaderMap, timeout: Duration) {
    let mut number = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    let mut unit = 'm';
    for (larger, factor) in [('S', 1000), ('M', 60), ('H', 60)] {
        if number <= MAX_GRPC_TIMEOUT {
            break;
        }
        (number, unit) = (number / factor, larger);
    }
    headers.set(HeaderId::GRPC_TIMEOUT, format!("{}{unit}", number.min(MAX_GRPC_TIMEOUT)));
}

/// How long the stream may take, by its route and its `grpc-timeout`, which then tells the upstream the same.
pub(super) fn refresh_duration(stream: &mut Stream, route: Option<StreamDuration>) {
    let rewrite = stream.grpc && route.is_some();
    let route = route.unwrap_or_default();
    let by_header = route.header_max.and_then(|max| {
        let timeout = grpc_timeout(&stream.request)?;
        let timeout = if max.is_zero() { timeout } else { timeout.min(max) };
        Some(timeout.saturating_sub(route.header_offset.unwrap_or_default()))
    });
    let by_config = || route.max.or(stream.manager.limits.max_stream_duration).filter(|max| !max.is_zero());
    let Some(timeout) = by_header.or_else(by_config) else {
        if rewrite && stream.manager.limits.max_stream_duration.is_some() {
            stream.request.remove(HeaderId::GRPC_TIMEOUT);
        }
        stream.timer.set_max_duration(None);
        return;
    };
    if rewrite {
        set_grpc_timeout(&mut stream.request, timeout);
    }
    stream.timer.set_max_duration(Some(stream.info.start + timeout));
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

/// What a request may say of its time.
const OVERRIDES: HeaderSet = HeaderSet::of(&[
    HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS,
    HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS,
    HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS,
    HeaderId::X_ENVOY_UPSTREAM_STREAM_DURATION_MS,
    HeaderId::X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT,
    HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE,
]);

impl Timeouts {
    /// From the route and the request's headers, which are taken out.
    pub(super) fn new(action: &ClusterAction, stream: &mut Stream, config: &RouterConfig) -> Self {
        let old_grpc = stream.grpc && action.old_grpc_timeout.max.is_some();
        let mut timeouts = Self {
            global: match action.stream_duration {
                // The whole stream's duration takes the place of the route's timeout.
                Some(_) => None,
                None if old_grpc => action.old_grpc_timeout.apply(&stream.request),
                None => action.timeout,
            },
            tell_grpc: old_grpc && action.stream_duration.is_none(),
            per_try: action.retry.per_try_timeout,
            per_try_idle: action.retry.per_try_idle_timeout,
            ..Self::default()
        };
        timeouts.hedging = action.hedge_on_per_try_timeout;
        if stream.request.may_have(&OVERRIDES) {
            timeouts.take_overrides(stream, config);
        }
        if timeouts.global.is_some_and(|global| timeouts.per_try.is_some_and(|per_try| per_try >= global)) {
            timeouts.per_try = None;
        }
        timeouts
    }

    /// What the request's headers say instead.
    fn take_overrides(&mut self, stream: &mut Stream, config: &RouterConfig) {
        let headers = &mut stream.request;
        if config.respect_expected_timeout && headers.contains(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS) {
            let expected = headers.get_str(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS);
            if let Some(ms) = expected.and_then(|v| v.parse().ok()) {
                self.global = Some(Duration::from_millis(ms)).filter(|d| !d.is_zero());
            }
        } else if let Some(timeout) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS) {
            self.global = Some(timeout).filter(|d| !d.is_zero());
        }
        if let Some(t) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS) {
            self.per_try = Some(t).filter(|d| !d.is_zero());
        }
        if let Some(d) = take_milliseconds(headers, HeaderId::X_ENVOY_UPSTREAM_STREAM_DURATION_MS) {
            stream.timer.set_max_duration(Some(stream.info.start + d).filter(|_| !d.is_zero()));
        }
        match headers.get(HeaderId::X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT) {
            Some(b"true") => self.hedging = true,
            Some(b"false") => self.hedging = false,
            _ => {}
        }
        self.alternative_response = headers.remove(HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE);
    }

    /// What the upstream is told that it has.
    fn expected(&self, now: Instant) -> Option<Duration> {
        let left = match (self.global, self.global_at) {
            (Some(_), Some(at)) => {
                // Nothing left is not nothing to keep to.
                Some(at.saturating_duration_since(now).max(Duration::from_millis(1)))
            }
            (global, _) => global,
        };
        // With hedging an attempt may take as long as all of them.
        match (self.per_try.filter(|_| !self.hedging), left) {
            (Some(per_try), Some(left)) => Some(per_try.min(left)),
            (per_try, left) => per_try.or(left),
        }
    }

    /// Tells the upstream what it has; `header` is whether `x-envoy-expected-rq-timeout-ms` may be set.
    pub(super) fn tell(&self, headers: &mut HeaderMap, header: bool) {
        if !header && !self.tell_grpc {
            return;
        }
        let Some(expected) = self.expected(clock::recent()) else { return };
        if header {
            let mut text = itoa::Buffer::new();
            let text = text.format(expected.as_millis() as u64);
            headers.trusted(|h| h.set(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, text));
        }
        if self.tell_grpc {
            set_grpc_timeout(headers, expected);
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

    /// An attempt is not waited for any more.
    pub(super) fn attempt_over(&mut self) {
        (self.per_try_at, self.per_try_idle_at) = (None, None);
    }

    /// No attempt has a deadline of its own.
    pub(super) fn no_tries(&mut self) {
        (self.per_try, self.per_try_idle) = (None, None);
    }

    /// The status of what took too long.
    pub(super) fn status(&self) -> u16 {
        if self.alternative_response { 204 } else { 504 }
    }

    /// The response has begun: only the deadline of all attempts and the silence still count.
    pub(super) fn response_begun(&mut self) {
        self.per_try_at = None;
        if self.hedging {
            (self.per_try_idle, self.per_try_idle_at) = (None, None);
        }
    }

    /// The response has made a tunnel: only its silence still counts.
    pub(super) fn tunnel_begun(&mut self) {
        (self.global, self.global_at) = (None, None);
    }

    /// Something came from upstream.
    pub(super) fn moved(&mut self, timer: &Timer) {
        let _ = timer;
        if let Some(idle) = self.per_try_idle {
            self.per_try_idle_at = Some(clock::recent() + idle);
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
