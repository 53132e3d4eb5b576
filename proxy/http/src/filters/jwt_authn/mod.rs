//! `envoy.filters.http.jwt_authn`: lets requests pass whose tokens meet what the first matching rule, the route or an object
//! of the filter state requires, and answers the others 401, or 403 where a token is for another audience.
//!
//! ```text
//!   config      providers, requirements, rules                (config.rs)
//!   locations   where tokens stand in a request               (locations.rs)
//!   verify      requirement + request -> verdict, effects     (verify.rs; tokens and signatures: crate::jwt)
//!   keys        local keys, fetched keys                      (keys.rs)
//!   cache       tokens that were verified before              (cache.rs)
//! ```
//!
//! A request waits only where keys must be fetched for it. Headers that the filter sets for the upstream are taken off every
//! request first, also off one that no rule concerns: what stands there is the filter's word.

mod cache;
mod config;
mod keys;
mod locations;
mod verify;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use envoy_types::pb::google::protobuf::Any;
use futures_util::future::join_all;
use sampan_core::error::ConfigResult;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::Counter;
use sampan_core::stream_info::ResponseFlag;

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Outcome, RouteConfig, State, Step, decode,
};
use crate::jwt::Status;
use crate::route::{RequestView, without_query};
use crate::stream::Stream;
use cache::Owner;
use config::{Model, PerRoute, Requirement, wrong_name};
use keys::{Answer, FetchCounters};
use verify::{Done, Run, may_want, remote};

pub use keys::WantedKeys;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig";

/// The namespace of the dynamic metadata, whatever the filter is called.
const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

/// So much of a path is told in `www-authenticate`.
const MAX_PATH: usize = 256;

struct JwtAuthn {
    name: Box<str>,
    model: Model,
    owner: Owner,
    allowed: Counter,
    denied: Counter,
    bypassed: Counter,
    cache_hit: Counter,
    cache_miss: Counter,
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let model = Model::from_proto(decode(any)?)?;
    let mut scope = context.factory.root_scope().scope(context.stat_prefix).scope("jwt_authn");
    if !model.stat_prefix.is_empty() {
        scope = scope.scope(&model.stat_prefix);
    }
    let fetches = || FetchCounters {
        success: scope.counter("jwks_fetch_success"),
        failed: scope.counter("jwks_fetch_failed"),
    };
    fetches();
    for remote in model.providers.iter().filter_map(remote) {
        remote.count_with(fetches());
        if let Some(wanted) = remote.wanted() {
            context.factory.want(wanted);
        }
    }
    Ok(HttpFilterKind::Filter(Arc::new(JwtAuthn {
        name: context.filter_name.into(),
        model,
        owner: Owner::default(),
        allowed: scope.counter("allowed"),
        denied: scope.counter("denied"),
        bypassed: scope.counter("cors_preflight_bypassed"),
        cache_hit: scope.counter("jwt_cache_hit"),
        cache_miss: scope.counter("jwt_cache_miss"),
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(PerRoute::from_proto(decode(any)?)?))
}

impl HttpFilter for JwtAuthn {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        for name in &self.model.own_headers {
            stream.request.remove_name(name);
        }
        if self.model.bypass_preflight && is_preflight(&stream.request) {
            self.bypassed.inc();
            self.allowed.inc();
            return Step::Continue;
        }
        let requirement = match self.requirement(stream) {
            Ok(Some(requirement)) => requirement,
            Ok(None) => {
                self.allowed.inc();
                return Step::Continue;
            }
            Err(name) => return Step::reply(self.unknown_requirement(&name)),
        };
        let now = stream.now();
        let providers = &self.model.providers;
        let original = requirement.asks(providers, &|p| may_want(p, now)).then(|| stream.request.clone());
        let (status, done) = self.run(requirement, stream, &[]);
        match (status, original) {
            (None, Some(original)) => {
                Step::Wait(Box::pin(self.fetch_and_run(requirement, stream, original, done)))
            }
            (status, _) => match self.end(stream, status, done) {
                Some(reply) => Step::reply(reply),
                None => Step::Continue,
            },
        }
    }
}

impl JwtAuthn {
    /// What the request must have; none: nothing. The error is a name that is not in the map.
    fn requirement(&self, stream: &Stream) -> Result<Option<&Requirement>, String> {
        match stream.route_config_ref::<PerRoute>(&self.name) {
            Some(PerRoute::Disabled) => return Ok(None),
            Some(PerRoute::Named(name)) => {
                return self.model.named.get(name).map(Some).ok_or_else(|| name.clone());
            }
            None => {}
        }
        let view = RequestView {
            headers: &stream.request,
            info: &stream.info,
            random: 0,
            runtime: &stream.worker.runtime,
        };
        let path = without_query(stream.request.get(HeaderId::PATH).unwrap_or_default());
        if let Some(rule) = self.model.rules.iter().find(|rule| rule.matching.matches(path, &view)) {
            return Ok(Some(&rule.requirement));
        }
        let Some((name, by_state)) = &self.model.by_state else { return Ok(None) };
        let state = stream.info.state(name);
        let value = state.as_ref().and_then(|object| object.plain());
        Ok(value.and_then(|value| by_state.get(&*value)))
    }

    fn run(
        &self,
        requirement: &Requirement,
        stream: &mut Stream,
        fetched: &[(usize, Answer)],
    ) -> (Option<Status>, Done) {
        let now = stream.now();
        let since = now.saturating_duration_since(stream.info.start);
        let wall = (stream.info.start_system + since).duration_since(UNIX_EPOCH);
        let mut run = Run {
            model: &self.model,
            owner: &self.owner,
            request: &mut stream.request,
            now,
            wall: wall.unwrap_or(Duration::ZERO),
            fetched,
            done: Done::default(),
        };
        let status = run.meets(requirement);
        (status, run.done)
    }

    /// Each provider's keys are fetched once for a request, so that this comes to an end.
    async fn fetch_and_run(
        &self,
        requirement: &Requirement,
        stream: &mut Stream,
        original: HeaderMap,
        mut done: Done,
    ) -> Outcome {
        let mut fetched: Vec<(usize, Answer)> = Vec::new();
        loop {
            done.wanted.sort_unstable();
            done.wanted.dedup();
            let clusters = &stream.worker.clusters;
            let fetches = done.wanted.iter().map(|at| async move {
                match remote(&self.model.providers[*at]) {
                    Some(remote) => (*at, remote.fetched(clusters).await),
                    None => (*at, None),
                }
            });
            let answers = join_all(fetches).await;
            if answers.is_empty() {
                // A run awaits what it wants; there is nothing else that it could await.
                return self.end(stream, None, done).map_or(Outcome::Continue, LocalReply::outcome);
            }
            fetched.extend(answers);
            stream.request = original.clone();
            let (status, next) = self.run(requirement, stream, &fetched);
            if status.is_some() {
                return self.end(stream, status, next).map_or(Outcome::Continue, LocalReply::outcome);
            }
            done = next;
        }
    }

    /// The answer, where the request does not go on.
    fn end(&self, stream: &mut Stream, status: Option<Status>, done: Done) -> Option<LocalReply> {
        let status = status.unwrap_or(Status::JwksFetchFail);
        (0..done.cache_hits).for_each(|_| self.cache_hit.inc());
        (0..done.cache_misses).for_each(|_| self.cache_miss.inc());
        if !done.metadata.fields.is_empty() {
            stream.info.dynamic_metadata_mut(NAMESPACE).fields.extend(done.metadata.fields);
        }
        if status != Status::Ok {
            self.denied.inc();
            return Some(self.denial(stream, status, done.path.as_deref()));
        }
        self.allowed.inc();
        if let Some(name) = done.bad_header {
            return Some(invalid_header(name.as_str()));
        }
        if done.clear_route {
            stream.refresh_route();
        }
        None
    }

    fn denial(&self, stream: &Stream, status: Status, path: Option<&[u8]>) -> LocalReply {
        let code = if status == Status::JwtAudienceNotAllowed { 403 } else { 401 };
        let reply = LocalReply::new(code, details(status.text()));
        if self.model.strip {
            return reply;
        }
        let mut challenge = b"Bearer realm=\"".to_vec();
        if let Some(path) = path.or_else(|| stream.request.get(HeaderId::PATH)) {
            let original = stream.request.get(HeaderId::X_ENVOY_ORIGINAL_PATH).unwrap_or(path);
            for part in [
                stream.request.get(HeaderId::SCHEME).unwrap_or(b"http"),
                b"://",
                stream.request.get(HeaderId::AUTHORITY).unwrap_or_default(),
                &original[..original.len().min(MAX_PATH)],
            ] {
                challenge.extend_from_slice(part);
            }
        }
        challenge.push(b'"');
        if status != Status::JwtMissed {
            challenge.extend_from_slice(b", error=\"invalid_token\"");
        }
        reply.body(status.text()).header(HeaderId::WWW_AUTHENTICATE, challenge)
    }

    fn unknown_requirement(&self, name: &str) -> LocalReply {
        self.denied.inc();
        let reason = wrong_name(name, &self.model.names);
        let reply = LocalReply::new(403, details(&reason));
        if self.model.strip { reply } else { reply.body(format!("Failed JWT authentication: {reason}")) }
    }
}

/// No space may stand in a log's details.
fn details(reason: &str) -> String {
    format!("jwt_authn_access_denied{{{}}}", reason.replace(|c: char| c.is_ascii_whitespace(), "_"))
}

/// The claim that a header was to carry cannot stand in one.
fn invalid_header(name: &str) -> LocalReply {
    let details = format!("filter_removed_required_request_headers{{invalid_header_value_for:_{name}}}");
    LocalReply::new(503, details)
        .body(format!("invalid header value for: {name}"))
        .flag(ResponseFlag::DownstreamProtocolError)
}

fn is_preflight(request: &HeaderMap) -> bool {
    let has = |id| request.get(id).is_some_and(|value| !value.is_empty());
    request.get(HeaderId::METHOD) == Some(b"OPTIONS")
        && has(HeaderId::ORIGIN)
        && has(HeaderId::ACCESS_CONTROL_REQUEST_METHOD)
}
