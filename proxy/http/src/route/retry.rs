//! `RetryPolicy`: when a request is tried again.

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::matcher::HeaderMatcher;

use super::refuse;
use super::retry_host::{self, HostPredicate};
use crate::manager::duration;

/// The set of `retry_on` values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn(u32);

macro_rules! conditions {
    ($($bit:literal $constant:ident $name:literal;)*) => {
        impl RetryOn {
            $(#[doc = concat!("`", $name, "`")] pub const $constant: Self = Self(1 << $bit);)*

            fn one(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$constant),)* _ => None }
            }
        }
    };
}

conditions! {
    0 SERVER_ERROR "5xx";
    1 GATEWAY_ERROR "gateway-error";
    2 CONNECT_FAILURE "connect-failure";
    3 RETRIABLE_4XX "retriable-4xx";
    4 REFUSED_STREAM "refused-stream";
    5 GRPC_CANCELLED "cancelled";
    6 GRPC_DEADLINE_EXCEEDED "deadline-exceeded";
    7 GRPC_RESOURCE_EXHAUSTED "resource-exhausted";
    8 GRPC_UNAVAILABLE "unavailable";
    9 RETRIABLE_STATUS_CODES "retriable-status-codes";
    10 RESET "reset";
    11 RETRIABLE_HEADERS "retriable-headers";
    12 ENVOY_RATE_LIMITED "envoy-ratelimited";
    13 GRPC_INTERNAL "internal";
    14 HTTP3_POST_CONNECT_FAILURE "http3-post-connect-failure";
    15 RESET_BEFORE_REQUEST "reset-before-request";
}

impl RetryOn {
    const GRPC: u32 = (0b1111 << 5) | (1 << 13);

    /// Parses a comma-separated list; unknown values count for nothing, as in Envoy. The second part tells whether
    /// all were known.
    pub fn parse(list: &str) -> (Self, bool) {
        let mut all = Self(0);
        let mut known = true;
        for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
            match Self::one(name) {
                Some(one) => all.0 |= one.0,
                None => known = false,
            }
        }
        (all, known)
    }

    /// Whether any condition of the other set is in this one.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Only the gRPC conditions.
    #[must_use]
    pub fn grpc_only(self) -> Self {
        Self(self.0 & Self::GRPC)
    }

    /// All but the gRPC conditions.
    #[must_use]
    pub fn http_only(self) -> Self {
        Self(self.0 & !Self::GRPC)
    }

    /// Whether nothing is retried.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Exponential back-off with full jitter.
#[derive(Debug, Clone, Copy, Default)]
pub struct BackOff {
    /// The first interval's bound; none: 25 ms, or what the runtime says.
    pub base: Option<Duration>,
    /// The largest bound; none: ten times the first.
    pub max: Option<Duration>,
}

/// `rate_limited_retry_back_off`
#[derive(Debug, Clone)]
pub struct RateLimited {
    /// Headers that tell when to try again, and whether as a time of day.
    pub headers: Vec<(HeaderName, bool)>,
    /// Intervals beyond this are not believed.
    pub max: Duration,
}

/// A compiled retry policy.
#[derive(Clone, Default)]
pub struct RetryPolicy {
    /// When.
    pub on: RetryOn,
    /// How often at most.
    pub retries: u32,
    /// `per_try_timeout`
    pub per_try_timeout: Option<Duration>,
    /// `per_try_idle_timeout`
    pub per_try_idle_timeout: Option<Duration>,
    /// `retriable_status_codes`
    pub status_codes: Vec<u16>,
    /// `retriable_headers`
    pub headers: Vec<HeaderMatcher>,
    /// `retriable_request_headers`
    pub request_headers: Vec<HeaderMatcher>,
    /// `retry_back_off`
    pub back_off: BackOff,
    /// `rate_limited_retry_back_off`
    pub rate_limited: Option<RateLimited>,
    /// `retry_host_predicate`
    pub host_predicates: Vec<HostPredicate>,
    /// `retry_priority`: `update_frequency` of `previous_priorities`.
    pub previous_priorities: Option<u32>,
    /// `host_selection_retry_max_attempts`
    pub host_attempts: u32,
}

impl RetryPolicy {
    pub(super) fn from_proto(message: &pb::RetryPolicy) -> ConfigResult<Self> {
        refuse(!message.retry_options_predicates.is_empty(), "retry_options_predicates")?;
        refuse(message.refresh_cluster_on_retry, "refresh_cluster_on_retry")?;
        let priority = message.retry_priority.as_ref().map(retry_host::previous_priorities).transpose();
        let on = RetryOn::parse(&message.retry_on).0;
        Ok(Self {
            on,
            retries: message.num_retries.map_or(1, |n| n.value),
            per_try_timeout: message.per_try_timeout.as_ref().map(duration).filter(|d| !d.is_zero()),
            per_try_idle_timeout: message
                .per_try_idle_timeout
                .as_ref()
                .map(duration)
                .filter(|d| !d.is_zero()),
            status_codes: message.retriable_status_codes.iter().map(|c| *c as u16).collect(),
            headers: HeaderMatcher::list_from_proto(&message.retriable_headers, "retriable_headers")?,
            request_headers: HeaderMatcher::list_from_proto(
                &message.retriable_request_headers,
                "retriable_request_headers",
            )?,
            back_off: back_off(message.retry_back_off.as_ref()).at("retry_back_off")?,
            rate_limited: rate_limited(message.rate_limited_retry_back_off.as_ref()),
            host_predicates: HostPredicate::list(&message.retry_host_predicate)?,
            previous_priorities: priority.at("retry_priority")?,
            host_attempts: message.host_selection_retry_max_attempts.clamp(1, 1000) as u32,
        })
    }
}

fn back_off(message: Option<&pb::retry_policy::RetryBackOff>) -> ConfigResult<BackOff> {
    let Some(message) = message else { return Ok(BackOff::default()) };
    let at_least = |d| duration(d).max(Duration::from_millis(1));
    let base = message.base_interval.as_ref().map(at_least);
    let max = message.max_interval.as_ref().map(at_least);
    if max.zip(base).is_some_and(|(max, base)| max < base) {
        return Err(ConfigError::new(
            "retry_policy.max_interval must greater than or equal to the base_interval",
        ));
    }
    Ok(BackOff { base, max })
}

fn rate_limited(message: Option<&pb::retry_policy::RateLimitedRetryBackOff>) -> Option<RateLimited> {
    let message = message?;
    let unix = pb::retry_policy::ResetHeaderFormat::UnixTimestamp;
    Some(RateLimited {
        headers: message
            .reset_headers
            .iter()
            .map(|h| (HeaderName::new(&h.name), h.format() == unix))
            .collect(),
        max: message.max_interval.as_ref().map_or(Duration::from_secs(300), duration),
    })
}

impl RateLimited {
    /// How long the response asks to wait.
    pub fn interval(&self, response: &HeaderMap) -> Option<Duration> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.headers.iter().find_map(|(name, timestamp)| {
            let value = std::str::from_utf8(response.get_name(name)?).ok()?.trim().parse().ok()?;
            let value = Duration::from_secs(value);
            let interval = if *timestamp { value.checked_sub(now)? } else { value };
            (interval <= self.max && !interval.is_zero()).then_some(interval)
        })
    }
}
