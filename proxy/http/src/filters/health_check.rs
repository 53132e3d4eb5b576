//! `envoy.filters.http.health_check`: answers health checks here, or lets them pass and remembers the answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::extensions::filters::http::health_check::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_core::matcher::{HeaderMatcher, all_headers_match};
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::Health;

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Response, State, Step, decode,
};
use crate::manager::duration;
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.health_check.v3.HealthCheck";

struct HealthCheck {
    pass_through: bool,
    headers: Vec<HeaderMatcher>,
    cache: Option<Cache>,
    /// Names and whole per cent.
    clusters: HashMap<Box<str>, u64>,
    failed: Arc<AtomicBool>,
    node_cluster: Box<str>,
    stats: Stats,
}

struct Stats {
    request_total: Counter,
    failed: Counter,
    ok: Counter,
    cached_response: Counter,
    failed_cluster_not_found: Counter,
    failed_cluster_empty: Counter,
    failed_cluster_unhealthy: Counter,
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        // No cached answer is degraded: no host can be.
        scope.counter("degraded");
        Self {
            request_total: scope.counter("request_total"),
            failed: scope.counter("failed"),
            ok: scope.counter("ok"),
            cached_response: scope.counter("cached_response"),
            failed_cluster_not_found: scope.counter("failed_cluster_not_found"),
            failed_cluster_empty: scope.counter("failed_cluster_empty"),
            failed_cluster_unhealthy: scope.counter("failed_cluster_unhealthy"),
        }
    }
}

/// The last answer that passed through.
struct Cache {
    time: Duration,
    origin: Instant,
    /// Milliseconds since `origin` until which the answer counts.
    until: AtomicU64,
    status: AtomicU16,
}

/// Marks a health check that passes through.
struct Passing;

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: pb::HealthCheck = decode(any)?;
    let pass_through = message.pass_through_mode.is_some_and(|b| b.value);
    let cache_time = message.cache_time.as_ref().map(duration).filter(|d| !d.is_zero());
    if !pass_through && cache_time.is_some() {
        return Err(ConfigError::new("cache_time_ms must not be set when path_through_mode is disabled"));
    }
    if let Some((name, _)) =
        message.cluster_min_healthy_percentages.iter().find(|(_, percent)| percent.value.is_nan())
    {
        return Err(ConfigError::new(format!(
            "cluster_min_healthy_percentages contains a NaN value for cluster: {name}"
        )));
    }
    let scope = context.factory.root_scope().scope(context.stat_prefix).scope("health_check");
    let server = &context.factory.server;
    Ok(HttpFilterKind::Filter(Arc::new(HealthCheck {
        pass_through,
        headers: HeaderMatcher::list_from_proto(&message.headers, "headers")?,
        cache: cache_time.map(|time| Cache {
            time,
            origin: Instant::now(),
            until: AtomicU64::new(0),
            status: AtomicU16::new(0),
        }),
        clusters: message
            .cluster_min_healthy_percentages
            .iter()
            .map(|(name, percent)| (name.as_str().into(), percent.value as u64))
            .collect(),
        failed: server.health_check_failed.clone(),
        node_cluster: server.node.cluster.as_str().into(),
        stats: Stats::new(&scope),
    })))
}

impl HealthCheck {
    fn reply(&self, status: u16, details: &'static str) -> LocalReply {
        let reply = LocalReply::new(status, details)
            .header(HeaderId::X_ENVOY_UPSTREAM_HEALTHCHECKED_CLUSTER, self.node_cluster.as_bytes());
        if (200..300).contains(&status) {
            self.stats.ok.inc();
            reply
        } else {
            self.stats.failed.inc();
            reply.flag(ResponseFlag::FailedLocalHealthCheck)
        }
    }

    /// Whether every cluster that counts has as many healthy hosts as it needs, as status and details.
    fn clusters_healthy(&self, stream: &Stream) -> (u16, &'static str) {
        for (name, &percent) in &self.clusters {
            let Some(cluster) = stream.worker.clusters.get(name) else {
                self.stats.failed_cluster_not_found.inc();
                return (503, "health_check_failed_no_cluster_found");
            };
            let hosts = cluster.cluster().hosts();
            let total = hosts.hosts().count() as u64;
            let fit = hosts.hosts().filter(|h| h.health() != Health::Unhealthy).count() as u64;
            if total == 0 && percent > 0 {
                self.stats.failed_cluster_empty.inc();
                return (503, "health_check_failed_cluster_empty");
            }
            if 100 * fit < total.saturating_mul(percent) {
                self.stats.failed_cluster_unhealthy.inc();
                return (503, "health_check_failed_cluster_unhealthy");
            }
        }
        (200, "health_check_ok_cluster_healthy")
    }

    fn answer(&self, stream: &Stream) -> Option<LocalReply> {
        if self.failed.load(Ordering::Relaxed) {
            self.stats.request_total.inc();
            let reply = self.reply(503, "health_check_failed");
            return Some(reply.header(HeaderId::X_ENVOY_IMMEDIATE_HEALTH_CHECK_FAIL, "true"));
        }
        if self.pass_through {
            let cache = self.cache.as_ref()?;
            let now = cache.origin.elapsed().as_millis() as u64;
            if now >= cache.until.load(Ordering::Acquire) {
                return None;
            }
            self.stats.request_total.inc();
            self.stats.cached_response.inc();
            return Some(self.reply(cache.status.load(Ordering::Relaxed), "health_check_cached"));
        }
        self.stats.request_total.inc();
        if self.clusters.is_empty() {
            return Some(self.reply(200, "health_check_ok"));
        }
        let (status, details) = self.clusters_healthy(stream);
        Some(self.reply(status, details))
    }
}

impl HttpFilter for HealthCheck {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        if !all_headers_match(&self.headers, &stream.request) {
            return Step::Continue;
        }
        stream.info.health_check = true;
        match self.answer(stream) {
            Some(reply) => Step::reply(reply),
            None => {
                *state = Some(Box::new(Passing));
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
        if state.is_some() {
            // Whoever made the response, also the proxy itself.
            if let Some(cache) = &self.cache {
                cache.status.store(response.status, Ordering::Relaxed);
                let until = cache.origin.elapsed() + cache.time;
                cache.until.store(until.as_millis() as u64, Ordering::Release);
            }
            response
                .headers
                .set(HeaderId::X_ENVOY_UPSTREAM_HEALTHCHECKED_CLUSTER, self.node_cluster.as_bytes());
        } else if !stream.info.health_check && self.failed.load(Ordering::Relaxed) {
            response.headers.set(HeaderId::X_ENVOY_IMMEDIATE_HEALTH_CHECK_FAIL, "true");
        }
        Step::Continue
    }
}
