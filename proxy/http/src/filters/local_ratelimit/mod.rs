//! `envoy.filters.http.local_ratelimit`: token buckets of this process (or of each connection) let requests pass.
//!
//! What a request is counted under is said by the filter's own `rate_limits`, or else by those of its route and
//! virtual host; which of the filter's `descriptors` has a bucket for that is the business of [`limiter`]. Buckets of
//! a connection lie in its slots, shared by all configurations of this filter that a request of it may meet: the
//! first one that asks makes them, as in Envoy.

mod bucket;
mod limiter;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use envoy_types::pb::envoy::config::route::v3::rate_limit::XRateLimitOption;
use envoy_types::pb::envoy::extensions::common::ratelimit::v3::VhRateLimitsOptions;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::runtime::Fraction;
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;

use self::bucket::TokenBucket;
use self::limiter::{Limiter, Limits, Verdict};
use super::refuse;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Response, RouteConfig, State, Step, decode,
};
use crate::route::{Descriptors, HeaderMutations, RateLimits};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit";
const RESOURCE_EXHAUSTED: u32 = 8;

struct Stats {
    enabled: Counter,
    enforced: Counter,
    ok: Counter,
    rate_limited: Counter,
    shadow_mode: Counter,
}

struct Settings {
    prefix: String,
    status: u16,
    limiter: Limiter,
    per_connection: bool,
    rate_limits: RateLimits,
    stage: u32,
    host_limits: VhRateLimitsOptions,
    enabled: Option<Fraction>,
    enforced: Option<Fraction>,
    response_headers: HeaderMutations,
    not_enforced_headers: HeaderMutations,
    x_ratelimit: bool,
    retry_after: bool,
    resource_exhausted: bool,
    stats: OnceLock<Stats>,
}

struct LocalRateLimit {
    name: Box<str>,
    settings: Settings,
    root: Scope,
}

/// The buckets of a connection.
struct PerConnection(Limiter);

/// The bucket that the response's headers tell of.
struct Told(Arc<TokenBucket>);

/// What the filter does with a request.
enum Action {
    Pass,
    /// Forward it, marked as one that was over the limit.
    Mark,
    Reply(LocalReply),
}

impl Settings {
    fn from_proto(message: &pb::LocalRateLimit) -> ConfigResult<Self> {
        refuse(message.local_cluster_rate_limit.is_some(), "local_cluster_rate_limit")?;
        let status = message.status.map_or(429, |s| s.code);
        Ok(Self {
            prefix: message.stat_prefix.clone(),
            status: if status < 400 { 429 } else { status as u16 },
            limiter: Limiter::new(Arc::new(Limits::from_proto(message)?), Instant::now()),
            per_connection: message.local_rate_limit_per_downstream_connection,
            rate_limits: RateLimits::of_filter(&message.rate_limits, false)?,
            stage: message.stage,
            host_limits: message.vh_rate_limits(),
            enabled: message.filter_enabled.as_ref().map(Fraction::from_proto),
            enforced: message.filter_enforced.as_ref().map(Fraction::from_proto),
            response_headers: HeaderMutations::new(&message.response_headers_to_add, &[], "response")?,
            not_enforced_headers: HeaderMutations::new(
                &message.request_headers_to_add_when_not_enforced,
                &[],
                "request",
            )?,
            x_ratelimit: message.enable_x_ratelimit_headers != 0,
            retry_after: message.enable_retry_after_header,
            resource_exhausted: message.rate_limited_as_resource_exhausted,
            stats: OnceLock::new(),
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
                shadow_mode: scope.counter("shadow_mode"),
            }
        })
    }

    /// The request's descriptors, where a bucket may stand under one.
    fn describe<'a>(&'a self, stream: &'a Stream) -> Descriptors<'a> {
        let mut out = Descriptors::new();
        if !self.limiter.limits().has_descriptors() {
            return out;
        }
        if !self.rate_limits.is_empty() {
            // What shall be counted when the stream is done is counted by global limits only.
            self.rate_limits.describe(stream, |limit| !limit.apply_on_stream_done, &mut out);
            return out;
        }
        let Some(selected) = &stream.route else { return out };
        let Some(action) = selected.cluster_action() else { return out };
        let mine =
            |limit: &crate::route::RateLimit| limit.stage == self.stage && limit.disable_key.is_empty();
        action.rate_limits.describe(stream, mine, &mut out);
        let host = match self.host_limits {
            _ if action.include_host_rate_limits => true,
            VhRateLimitsOptions::Include => true,
            VhRateLimitsOptions::Ignore => false,
            VhRateLimitsOptions::Override => action.rate_limits.is_empty(),
        };
        if host {
            selected.virtual_host().rate_limits.describe(stream, mine, &mut out);
        }
        out
    }

    fn take(&self, stream: &Stream) -> Verdict {
        let descriptors = self.describe(stream);
        let now = stream.now();
        if !self.per_connection {
            return self.limiter.take(&descriptors, now);
        }
        let make = || PerConnection(Limiter::new(self.limiter.limits().clone(), now));
        stream.info.connection.slots.get_or_insert_with(make).0.take(&descriptors, now)
    }

    /// What becomes of a request; the bucket to tell of is left in `state`.
    fn decide(&self, stream: &Stream, root: &Scope, state: &mut State) -> Action {
        let hit = |fraction: &Option<Fraction>| {
            fraction.as_ref().is_some_and(|f| f.hit(&stream.worker.runtime, stream.worker.random()))
        };
        if !hit(&self.enabled) {
            return Action::Pass;
        }
        let stats = self.stats(root);
        stats.enabled.inc();
        let Verdict { allowed, shadow, bucket, headers } = self.take(stream);
        let tell = match headers {
            XRateLimitOption::Unspecified => self.x_ratelimit,
            XRateLimitOption::Off => false,
            XRateLimitOption::DraftVersion03 => true,
        };
        if tell && let Some(bucket) = &bucket {
            *state = Some(Box::new(Told(bucket.clone())));
        }
        if allowed && !shadow {
            stats.ok.inc();
            return Action::Pass;
        }
        stats.rate_limited.inc();
        if shadow {
            stats.shadow_mode.inc();
            return Action::Pass;
        }
        if !hit(&self.enforced) {
            return Action::Mark;
        }
        stats.enforced.inc();
        Action::Reply(self.reply(stream, bucket.as_deref()))
    }

    fn reply(&self, stream: &Stream, bucket: Option<&TokenBucket>) -> LocalReply {
        let mut reply = LocalReply::new(self.status, "local_rate_limited")
            .body("local_rate_limited")
            .flag(ResponseFlag::RateLimited);
        let mut headers = HeaderMap::new();
        self.response_headers.apply_to_response(&mut headers, &stream.request, &stream.info);
        if self.retry_after
            && self.status == 429
            && !headers.contains(HeaderId::RETRY_AFTER)
            && let Some(bucket) = bucket
        {
            let seconds = bucket.holds(stream.now()).reset.max(1);
            headers.append(HeaderId::RETRY_AFTER, seconds.to_string());
        }
        for (_, name, value) in headers.iter() {
            reply = reply.header(HeaderName::new(name), value);
        }
        if self.resource_exhausted {
            reply.grpc_status = Some(RESOURCE_EXHAUSTED);
        }
        reply
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

impl LocalRateLimit {
    fn settings<'s>(&'s self, stream: &'s Stream) -> &'s Settings {
        stream.route_config_ref(&self.name).unwrap_or(&self.settings)
    }
}

impl HttpFilter for LocalRateLimit {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        match self.settings(stream).decide(stream, &self.root, state) {
            Action::Pass => Step::Continue,
            Action::Reply(reply) => Step::reply(reply),
            Action::Mark => {
                let route = stream.route_config::<Settings>(&self.name);
                let settings = route.as_deref().unwrap_or(&self.settings);
                let Stream { request, info, .. } = stream;
                settings.not_enforced_headers.apply_to_request(request, info);
                Step::Continue
            }
        }
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        if let Some(Told(bucket)) = state.as_ref().and_then(|s| s.downcast_ref::<Told>()) {
            let upstream = stream.info.upstream.as_ref();
            let holds = bucket.holds(upstream.and_then(|u| u.first_rx).unwrap_or_else(|| stream.now()));
            let headers = &mut response.headers;
            headers.append(HeaderId::X_RATELIMIT_LIMIT, bucket.size.max.to_string());
            headers.append(HeaderId::X_RATELIMIT_REMAINING, holds.tokens.to_string());
            headers.append(HeaderId::X_RATELIMIT_RESET, holds.reset.to_string());
        }
        Step::Continue
    }
}
