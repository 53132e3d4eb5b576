//! `envoy.filters.http.ext_authz`: a server outside is asked about each request, before the next filter sees it.
//!
//! ```text
//!   config    the model
//!   check     what the server is told
//!   service   how it is asked: gRPC, HTTP
//!   response  what it has said
//!   apply     what that does to the request, or the reply that it means
//!   network   the same for connections: envoy.filters.network.ext_authz
//! ```
//!
//! A request without a route is not asked about, as in Envoy. When the client goes, the question is dropped.
//! Headers that would break the message in which they are sent are left out even where `validate_mutations` is off.

mod apply;
mod check;
mod config;
pub(crate) mod network;
mod response;
mod service;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction as Action;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::clock;
use sampan_core::error::ConfigResult;
use sampan_core::header::HeaderName;
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::Cluster;

use self::check::SeenBody;
use self::config::{BodySettings, Config, PerRoute};
use self::response::ResponseHeaders;
use super::buffer::read_ahead;
use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Outcome, Response, RouteConfig, State, Step,
    decode,
};
use crate::router::callout::Asker;
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute";

struct ExtAuthz {
    name: Box<str>,
    config: Config,
    stats: Stats,
}

/// `http.PREFIX.ext_authz.*`, and the names of some of them below the cluster that the request goes to.
struct Stats {
    ok: Counter,
    denied: Counter,
    error: Counter,
    disabled: Counter,
    failure_mode_allowed: Counter,
    invalid: Counter,
    ignored_dynamic_metadata: Counter,
    names: Names,
}

struct Names {
    ok: String,
    denied: String,
    error: String,
    invalid: String,
    failure_mode_allowed: String,
}

impl Stats {
    fn new(scope: &Scope, prefix: &str) -> Self {
        let scope = scope.scope("ext_authz");
        let prefix = prefix.strip_suffix('.').unwrap_or(prefix);
        let scope = if prefix.is_empty() { scope } else { scope.scope(prefix) };
        // Nobody puts anything into the filter state that would be in the way; what the others count is refused or has
        // no limit.
        for name in [
            "filter_state_name_collision",
            "omitted_response_headers",
            "request_header_limits_reached",
            "response_header_limits_reached",
            "shadow_denied",
            "shadow_error",
        ] {
            scope.counter(name);
        }
        let dot = if prefix.is_empty() { "" } else { "." };
        let name = |what: &str| format!("ext_authz{dot}{prefix}.{what}");
        Self {
            ok: scope.counter("ok"),
            denied: scope.counter("denied"),
            error: scope.counter("error"),
            disabled: scope.counter("disabled"),
            failure_mode_allowed: scope.counter("failure_mode_allowed"),
            invalid: scope.counter("invalid"),
            ignored_dynamic_metadata: scope.counter("ignored_dynamic_metadata"),
            names: Names {
                ok: name("ok"),
                denied: name("denied"),
                error: name("error"),
                invalid: name("invalid"),
                failure_mode_allowed: name("failure_mode_allowed"),
            },
        }
    }
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ExtAuthz = decode(any)?;
    let scope = context.factory.root_scope().scope(context.stat_prefix);
    Ok(HttpFilterKind::Filter(Arc::new(ExtAuthz {
        name: context.filter_name.into(),
        config: Config::from_proto(&message, &context.factory.server)?,
        stats: Stats::new(&scope, &message.stat_prefix),
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(PerRoute::from_proto(&decode(any)?)?))
}

/// The reply that says that nothing is known.
fn refusal(status: u16, details: &'static str) -> LocalReply {
    LocalReply::new(status, details).flag(ResponseFlag::UnauthorizedExternalService)
}

impl HttpFilter for ExtAuthz {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        if stream.route.is_none() {
            return Step::Continue;
        }
        let route = stream.route_config::<PerRoute>(&self.name);
        if route.as_ref().is_some_and(|route| route.disabled) {
            return Step::Continue;
        }
        if !self.is_enabled(stream) {
            self.stats.disabled.inc();
            let deny = self.config.deny_at_disable.as_ref();
            if deny.is_some_and(|(key, default)| stream.worker.runtime.boolean(key, *default)) {
                return Step::reply(refusal(self.config.status_on_error, "ext_authz_error"));
            }
            return Step::Continue;
        }
        Step::Wait(Box::pin(self.ask(stream, state, route)))
    }

    fn on_response<'a>(
        &'a self,
        _stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        let later = state.as_ref().and_then(|state| state.downcast_ref::<ResponseHeaders>());
        for (action, headers) in later.into_iter().flat_map(ResponseHeaders::all) {
            for (name, value) in headers {
                let exists = response.headers.get_name(&HeaderName::new(name)).is_some();
                match action {
                    Action::AppendIfExistsOrAdd => apply::add(&mut response.headers, name, value),
                    Action::OverwriteIfExistsOrAdd => apply::set(&mut response.headers, name, value),
                    Action::AddIfAbsent if !exists => apply::add(&mut response.headers, name, value),
                    Action::OverwriteIfExists if exists => apply::set(&mut response.headers, name, value),
                    Action::AddIfAbsent | Action::OverwriteIfExists => {}
                }
            }
        }
        Step::Continue
    }
}

impl ExtAuthz {
    fn is_enabled(&self, stream: &Stream) -> bool {
        let hit = |fraction: &sampan_core::runtime::Fraction| {
            fraction.hit(&stream.worker.runtime, stream.worker.random())
        };
        let metadata = stream.info.dynamic_metadata.as_deref();
        self.config.enabled.as_ref().is_none_or(hit)
            && self.config.enabled_metadata.as_ref().is_none_or(|matcher| matcher.matches(metadata))
    }

    async fn ask(&self, stream: &mut Stream, state: &mut State, route: Option<Arc<PerRoute>>) -> Outcome {
        let body = match self.body(stream, route.as_deref()).await {
            Ok(body) => body,
            Err(outcome) => return outcome,
        };
        let Config { told, of_request, service, .. } = &self.config;
        let extensions = self.extensions(stream);
        let request = of_request.of_request(told, &stream.request, &stream.info, extensions, body);
        let service = route.as_ref().and_then(|route| route.service.as_ref()).unwrap_or(service);
        let start = clock::tick();
        let asker = Asker { request: &stream.request, info: &stream.info, trace: stream.trace.as_deref() };
        let answer = service.check(&stream.worker.clusters, request, asker).await;
        self.apply(stream, state, answer, start)
    }

    /// Reads what the server shall see of the body.
    async fn body(&self, stream: &mut Stream, route: Option<&PerRoute>) -> Result<Option<SeenBody>, Outcome> {
        let settings = match route {
            Some(route) if route.no_body => None,
            Some(route) => route.body.or(self.config.body),
            None => self.config.body,
        };
        let Some(BodySettings { max, partial }) = settings else { return Ok(None) };
        if stream.body.is_end() || stream.upgrade.is_some() {
            return Ok(None);
        }
        let seen = read_ahead(stream, max, partial).await?;
        let received = seen.len();
        if received == 0 {
            return Ok(None);
        }
        let data = seen[..received.min(max)].to_vec();
        Ok(Some(SeenBody { data, partial: received > max, received }))
    }

    /// `context_extensions` of all levels, the more specific ones before the others.
    fn extensions(&self, stream: &Stream) -> HashMap<String, String> {
        let levels = stream.route.iter().flat_map(|route| route.filter_config_levels(&self.name));
        let mut all = HashMap::new();
        for level in levels.filter_map(|level| level.downcast_ref::<PerRoute>()) {
            for (key, value) in &level.extensions {
                all.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        all
    }

    /// The cluster that the request goes to.
    fn cluster(stream: &Stream) -> Option<Arc<Cluster>> {
        let cluster = stream.worker.clusters.get(stream.info.cluster.as_deref()?)?;
        Some(cluster.cluster().clone())
    }

    fn milliseconds_since(start: Instant) -> f64 {
        clock::recent().duration_since(start).as_millis() as f64
    }
}
