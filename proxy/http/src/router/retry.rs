//! Whether a request is tried again; Envoy's `RetryStateImpl`.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sampan_codec::h1::ResponseHead;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName, HeaderSet};
use sampan_core::matcher::all_headers_match;
use sampan_core::stats::Counter;
use sampan_listener::Worker;
use sampan_upstream::circuit::{Breakers, Permit};
use sampan_upstream::{ClusterStats, Priority, WorkerCluster};

use super::Failure;
use super::codes::RequestCounters;
use crate::route::{BackOff, RetryOn, RetryPolicy};

/// What is left of a request's retries.
pub(super) struct RetryState<'p> {
    policy: &'p RetryPolicy,
    on: RetryOn,
    remaining: u32,
    status_codes: Vec<u16>,
    header_names: Vec<HeaderName>,
    attempts: u32,
    stats: Arc<ClusterStats>,
    worker: Rc<Worker>,
    pub(super) counters: RequestCounters,
    breakers: Arc<Breakers>,
    /// Held while a retry is under way.
    permit: Option<Permit>,
}

/// The answer.
pub(super) enum Retry {
    /// Again, after this long.
    After(Duration),
    /// Not.
    No,
    /// It would, but the number of retries is used up.
    LimitExceeded,
    /// It would, but the circuit breaker is open.
    Overflow,
}

impl<'p> RetryState<'p> {
    /// From the route's policy and the request's own headers, which are taken out.
    pub(super) fn new(
        policy: &'p RetryPolicy,
        headers: &mut HeaderMap,
        cluster: &WorkerCluster,
        priority: Priority,
        worker: &Rc<Worker>,
    ) -> Option<Self> {
        let mut on = policy.on;
        let mut remaining = policy.retries;
        let mut status_codes = Vec::new();
        let mut header_names = Vec::new();
        if headers.may_have(&RETRY_HEADERS) {
            let text = |id| headers.get_str(id);
            if let Some(list) = text(HeaderId::X_ENVOY_RETRY_ON) {
                on = on.union(RetryOn::parse(list).0.http_only());
            }
            if let Some(list) = text(HeaderId::X_ENVOY_RETRY_GRPC_ON) {
                on = on.union(RetryOn::parse(list).0.grpc_only());
            }
            if let Some(n) = text(HeaderId::X_ENVOY_MAX_RETRIES).and_then(|n| n.trim().parse().ok()) {
                remaining = n;
            }
            let list = text(HeaderId::X_ENVOY_RETRIABLE_STATUS_CODES).unwrap_or_default();
            status_codes.extend(list.split(',').filter_map(|c| c.trim().parse::<u16>().ok()));
            let list = text(HeaderId::X_ENVOY_RETRIABLE_HEADER_NAMES).unwrap_or_default();
            header_names
                .extend(list.split(',').map(str::trim).filter(|n| !n.is_empty()).map(HeaderName::new));
            headers.remove_if(|id, _, _| RETRY_HEADERS.contains(id));
        }
        let wanted = policy.request_headers.is_empty()
            || policy.request_headers.iter().any(|m| all_headers_match(std::slice::from_ref(m), headers));
        if on.is_empty() || !wanted {
            return None;
        }
        Some(Self {
            policy,
            on,
            remaining,
            status_codes,
            header_names,
            attempts: 0,
            stats: cluster.stats().clone(),
            worker: worker.clone(),
            counters: RequestCounters::default(),
            breakers: cluster.breakers(priority).clone(),
            permit: None,
        })
    }

    /// After a response's head.
    pub(super) fn on_response(&mut self, head: &ResponseHead, random: u64) -> Retry {
        if !self.wants_response(head) {
            return self.settle();
        }
        let asked = self.policy.rate_limited.as_ref().and_then(|r| r.interval(&head.headers));
        self.again(random, asked)
    }

    /// After a failure without a response.
    pub(super) fn on_failure(&mut self, failure: &Failure, random: u64) -> Retry {
        if !self.wants_failure(failure) {
            return self.settle();
        }
        self.again(random, None)
    }

    /// After a per-try timeout that ends nothing: whatever the policy retries on.
    pub(super) fn hedge(&mut self, random: u64) -> Retry {
        self.again(random, None)
    }

    /// No retry is wanted: one that was under way has succeeded.
    fn settle(&mut self) -> Retry {
        if self.permit.take().is_some() {
            self.stats.upstream_rq_retry_success.inc();
            self.counters.inc(|counters| &counters.retry_success);
        }
        Retry::No
    }

    pub(super) fn wants_response(&self, head: &ResponseHead) -> bool {
        if head.headers.contains(HeaderId::X_ENVOY_RATELIMITED) {
            return self.on.has(RetryOn::ENVOY_RATE_LIMITED);
        }
        let status = head.status;
        let codes = || self.policy.status_codes.iter().chain(&self.status_codes);
        (self.on.has(RetryOn::SERVER_ERROR) && (500..600).contains(&status))
            || (self.on.has(RetryOn::GATEWAY_ERROR) && (502..=504).contains(&status))
            || (self.on.has(RetryOn::RETRIABLE_4XX) && status == 409)
            || (self.on.has(RetryOn::RETRIABLE_STATUS_CODES) && codes().any(|c| *c == status))
            || (self.on.has(RetryOn::RETRIABLE_HEADERS) && self.has_retriable_header(&head.headers))
            || self.wants_grpc(&head.headers)
    }

    fn has_retriable_header(&self, headers: &HeaderMap) -> bool {
        self.policy.headers.iter().any(|m| m.matches(headers))
            || self.header_names.iter().any(|n| headers.get_name(n).is_some())
    }

    fn wants_grpc(&self, headers: &HeaderMap) -> bool {
        let on = match headers.get(HeaderId::GRPC_STATUS) {
            Some(b"1") => RetryOn::GRPC_CANCELLED,
            Some(b"4") => RetryOn::GRPC_DEADLINE_EXCEEDED,
            Some(b"8") => RetryOn::GRPC_RESOURCE_EXHAUSTED,
            Some(b"13") => RetryOn::GRPC_INTERNAL,
            Some(b"14") => RetryOn::GRPC_UNAVAILABLE,
            _ => return false,
        };
        self.on.has(on)
    }

    fn wants_failure(&self, failure: &Failure) -> bool {
        use Failure::{Connect, NoHost, Overflow, Refused};
        let resets = RetryOn::RESET.union(RetryOn::SERVER_ERROR).union(RetryOn::GATEWAY_ERROR);
        match failure {
            Overflow | NoHost(_) => false,
            Connect(_) if self.on.has(RetryOn::CONNECT_FAILURE) => true,
            Refused if self.on.has(RetryOn::REFUSED_STREAM) => true,
            _ if !failure.request_sent() && self.on.has(RetryOn::RESET_BEFORE_REQUEST) => true,
            _ => self.on.has(resets),
        }
    }

    fn again(&mut self, random: u64, asked: Option<Duration>) -> Retry {
        if self.remaining == 0 {
            self.stats.upstream_rq_retry_limit_exceeded.inc();
            self.counters.inc(|counters| &counters.retry_limit_exceeded);
            return Retry::LimitExceeded;
        }
        self.permit = None;
        self.remaining -= 1;
        let Some(permit) = self.breakers.retry() else {
            self.stats.upstream_rq_retry_overflow.inc();
            self.counters.inc(|counters| &counters.retry_overflow);
            return Retry::Overflow;
        };
        let runtime = &self.worker.runtime;
        if runtime.integer("upstream.use_retry", 100) <= self.worker.random() % 100 {
            return Retry::No;
        }
        self.permit = Some(permit);
        self.stats.upstream_rq_retry.inc();
        self.counters.inc(|counters| &counters.retry);
        let counted: &Counter = if asked.is_some() {
            &self.stats.upstream_rq_retry_backoff_ratelimited
        } else {
            &self.stats.upstream_rq_retry_backoff_exponential
        };
        counted.inc();
        let delay = match asked {
            // A little later than asked, so that not all come at once.
            Some(interval) => interval + jitter(interval / 2, random),
            None => {
                let usual = || Duration::from_millis(runtime.integer("upstream.base_retry_backoff_ms", 25));
                jittered(self.policy.back_off, usual, self.attempts, random)
            }
        };
        self.attempts += 1;
        Retry::After(delay)
    }
}

fn jitter(bound: Duration, random: u64) -> Duration {
    Duration::from_millis(random % (bound.as_millis() as u64).max(1))
}

/// Anywhere between now and `base * (2^(n+1) - 1)`, at most `max`.
pub(crate) fn jittered(
    back_off: BackOff,
    usual: impl FnOnce() -> Duration,
    attempt: u32,
    random: u64,
) -> Duration {
    let base = back_off.base.unwrap_or_else(usual);
    let max = back_off.max.unwrap_or(base * 10);
    let factor = 2u32.saturating_pow(attempt + 1).saturating_sub(1);
    jitter(base.saturating_mul(factor).min(max), random)
}

/// Headers by which a client asks for retries; none reaches the upstream.
const RETRY_HEADERS: HeaderSet = HeaderSet::of(&[
    HeaderId::X_ENVOY_RETRY_ON,
    HeaderId::X_ENVOY_RETRY_GRPC_ON,
    HeaderId::X_ENVOY_MAX_RETRIES,
    HeaderId::X_ENVOY_RETRIABLE_STATUS_CODES,
    HeaderId::X_ENVOY_RETRIABLE_HEADER_NAMES,
    HeaderId::X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT,
]);
