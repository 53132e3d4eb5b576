//! `envoy.filters.http.local_ratelimit`: a token bucket of this process (or of each connection) lets requests pass.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::TokenBucket as TokenBucketMessage;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_core::runtime::Fraction;
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;

use super::refuse;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Response, RouteConfig, State, Step, decode,
};
use crate::manager::duration;
use crate::route::HeaderMutations;
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";

/// A token bucket without a lock: tokens are implied by the time since the bucket was last empty.
///
/// The bucket holds the moment at which it was, or would have been, empty; taking a token moves it on by the time
/// that one token takes to come. Seconds are floating: the largest bucket and the longest interval fit.
struct TokenBucket {
    origin: Instant,
    /// Seconds since `origin` at which the bucket counts as empty (the bits of an `f64`); negative at first.
    empty_at: AtomicU64,
    max: u32,
    /// Tokens in a second.
    rate: f64,
}

/// The answer of a bucket.
#[derive(Debug, PartialEq)]
struct Taken {
    ok: bool,
    /// Whole tokens left.
    left: u64,
    /// Whole seconds until the next token comes; 0 where there is one.
    reset: u64,
}

impl TokenBucket {
    fn from_proto(message: &TokenBucketMessage) -> ConfigResult<Self> {
        let interval = message.fill_interval.as_ref().map(duration).unwrap_or_default();
        if interval < Duration::from_millis(50) {
            return Err(ConfigError::new("local rate limit token bucket fill timer must be >= 50ms")
                .at("fill_interval"));
        }
        let per_fill = message.tokens_per_fill.map_or(1, |n| n.value.max(1));
        Ok(Self::full(message.max_tokens, f64::from(per_fill) / interval.as_secs_f64()))
    }

    fn full(max: u32, rate: f64) -> Self {
        let empty_at = -f64::from(max) / rate;
        Self { origin: Instant::now(), empty_at: AtomicU64::new(empty_at.to_bits()), max, rate }
    }

    fn fresh(&self) -> Self {
        Self::full(self.max, self.rate)
    }

    fn take(&self) -> Taken {
        self.take_at(self.origin.elapsed().as_secs_f64())
    }

    fn take_at(&self, now: f64) -> Taken {
        let mut old = self.empty_at.load(Ordering::Relaxed);
        loop {
            let tokens = ((now - f64::from_bits(old)) * self.rate).min(self.max.into());
            if tokens < 1.0 {
                return self.taken(false, tokens);
            }
            let new = now - (tokens - 1.0) / self.rate;
            match self.empty_at.compare_exchange_weak(
                old,
                new.to_bits(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return self.taken(true, tokens - 1.0),
                Err(other) => old = other,
            }
        }
    }

    fn taken(&self, ok: bool, tokens: f64) -> Taken {
        let reset = if tokens >= 1.0 { 0.0 } else { ((1.0 - tokens) / self.rate).ceil() };
        Taken { ok, left: tokens as u64, reset: reset as u64 }
    }
}

struct Stats {
    enabled: Counter,
    enforced: Counter,
    ok: Counter,
    rate_limited: Counter,
}

struct Settings {
    prefix: String,
    status: u16,
    bucket: Option<TokenBucket>,
    per_connection: bool,
    buckets: Mutex<HashMap<u64, Arc<TokenBucket>>>,
    enabled: Option<Fraction>,
    enforced: Option<Fraction>,
    response_headers: HeaderMutations,
    not_enforced_headers: HeaderMutations,
    x_ratelimit: bool,
    resource_exhausted: bool,
    stats: std::sync::OnceLock<Stats>,
}

struct LocalRateLimit {
    name: Box<str>,
    settings: Settings,
    root: Scope,
}

/// What the response's headers tell: limit, remaining, reset.
struct Told(u64, u64, u64);

impl Settings {
    fn from_proto(message: &pb::LocalRateLimit) -> ConfigResult<Self> {
        refuse(!message.descriptors.is_empty(), "descriptors")?;
        refuse(!message.rate_limits.is_empty(), "rate_limits")?;
        refuse(message.local_cluster_rate_limit.is_some(), "local_cluster_rate_limit")?;
        refuse(message.max_dynamic_descriptors.is_some(), "max_dynamic_descriptors")?;
        refuse(message.enable_retry_after_header, "enable_retry_after_header")?;
        let status = message.status.map_or(429, |s| s.code);
        Ok(Self {
            prefix: message.stat_prefix.clone(),
            status: if status < 400 { 429 } else { status as u16 },
            bucket: message
                .token_bucket
                .as_ref()
                .map(TokenBucket::from_proto)
                .transpose()
                .at("token_bucket")?,
            per_connection: message.local_rate_limit_per_downstream_connection,
            buckets: Mutex::default(),
            enabled: message.filter_enabled.as_ref().map(Fraction::from_proto),
            enforced: message.filter_enforced.as_ref().map(Fraction::from_proto),
            response_headers: HeaderMutations::new(&message.response_headers_to_add, &[], "response")?,
            not_enforced_headers: HeaderMutations::new(
                &message.request_headers_to_add_when_not_enforced,
                &[],
                "request",
            )?,
            x_ratelimit: message.enable_x_ratelimit_headers != 0,
            resource_exhausted: message.rate_limited_as_resource_exhausted,
            stats: std::sync::OnceLock::new(),
        })
    }

    fn stats(&self, root: &Scope) -> &Stats {
        self.stats.get_or_init(|| {
            let scope = root.scope(&self.prefix).scope("http_local_rate_limit");
            Stats {
                enabled: scope.counter("enabled"),
                enforced: scope.counter("enforced"),
                ok: scope.counter("ok"),
                rate_limited: scope.counter("rate_limited"),
            }
        })
    }

    /// Takes a token of the bucket that counts for this stream; with it comes the bucket's size.
    fn take(&self, stream: &Stream) -> Option<(Taken, u64)> {
        let shared = self.bucket.as_ref()?;
        let max = shared.max.into();
        if !self.per_connection {
            return Some((shared.take(), max));
        }
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        // Connections that ended leave their bucket behind until there are many.
        if buckets.len() > 10_000 {
            buckets.clear();
        }
        let bucket =
            buckets.entry(stream.info.connection.id).or_insert_with(|| Arc::new(shared.fresh())).clone();
        drop(buckets);
        Some((bucket.take(), max))
    }
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::LocalRateLimit = decode(any)?;
    Ok(HttpFilterKind::Filter(Arc::new(LocalRateLimit {
        name: context.filter_name.into(),
        settings: Settings::from_proto(&message)?,
        root: context.factory.root_scope(),
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::LocalRateLimit = decode(any)?;
    if message.token_bucket.is_none() {
        return Err(ConfigError::new("local rate limit token bucket must be set for per filter configs"));
    }
    Ok(Arc::new(Settings::from_proto(&message)?))
}

impl HttpFilter for LocalRateLimit {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        let route = stream.route_config::<Settings>(&self.name);
        let settings = route.as_deref().unwrap_or(&self.settings);
        let (runtime, random) = (stream.worker.runtime.clone(), stream.worker.random());
        if !settings.enabled.as_ref().is_some_and(|f| f.hit(&runtime, random)) {
            return Step::Continue;
        }
        let stats = settings.stats(&self.root);
        stats.enabled.inc();
        let Some((taken, max)) = settings.take(stream) else {
            stats.ok.inc();
            return Step::Continue;
        };
        if settings.x_ratelimit {
            *state = Some(Box::new(Told(max, taken.left, taken.reset)));
        }
        if taken.ok {
            stats.ok.inc();
            return Step::Continue;
        }
        stats.rate_limited.inc();
        if !settings.enforced.as_ref().is_some_and(|f| f.hit(&runtime, stream.worker.random())) {
            let Stream { request, info, .. } = stream;
            settings.not_enforced_headers.apply_to_request(request, info);
            return Step::Continue;
        }
        stats.enforced.inc();
        let mut reply = LocalReply::new(settings.status, "local_rate_limited")
            .body("local_rate_limited")
            .flag(ResponseFlag::RateLimited);
        let mut headers = sampan_core::HeaderMap::new();
        settings.response_headers.apply_to_response(&mut headers, &stream.request, &stream.info);
        for (_, name, value) in headers.iter() {
            reply = reply.header(sampan_core::HeaderName::new(name), value);
        }
        if settings.resource_exhausted {
            reply.grpc_status = Some(8);
        }
        Step::reply(reply)
    }

    fn on_response<'a>(
        &'a self,
        _stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        if let Some(Told(limit, remaining, reset)) = state.as_ref().and_then(|s| s.downcast_ref::<Told>()) {
            response.headers.set(HeaderId::X_RATELIMIT_LIMIT, limit.to_string());
            response.headers.set(HeaderId::X_RATELIMIT_REMAINING, remaining.to_string());
            response.headers.set(HeaderId::X_RATELIMIT_RESET, reset.to_string());
        }
        Step::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(ok: bool, left: u64, reset: u64) -> Taken {
        Taken { ok, left, reset }
    }

    #[test]
    fn a_bucket_gives_what_it_holds_and_fills_again() {
        let bucket = TokenBucket::full(2, 0.5);
        assert_eq!(bucket.take_at(0.0), taken(true, 1, 0));
        assert_eq!(bucket.take_at(0.0), taken(true, 0, 2));
        assert_eq!(bucket.take_at(1.0), taken(false, 0, 1));
        assert_eq!(bucket.take_at(2.0), taken(true, 0, 2));
        assert_eq!(bucket.take_at(1000.0), taken(true, 1, 0), "never more than it holds");
    }

    #[test]
    fn the_largest_bucket_and_the_longest_interval() {
        let message = TokenBucketMessage {
            max_tokens: u32::MAX,
            fill_interval: Some(envoy_types::pb::google::protobuf::Duration {
                seconds: 315_576_000_000,
                nanos: 0,
            }),
            ..Default::default()
        };
        let bucket = TokenBucket::from_proto(&message).unwrap();
        assert_eq!(bucket.take_at(0.0), taken(true, u64::from(u32::MAX) - 1, 0));
    }
}
