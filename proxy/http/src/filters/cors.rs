//! `envoy.filters.http.cors`: preflights are answered here, other responses get their `access-control-*` headers.
//! The policy stands on the route; each of its fields is taken from the most specific level that has it. The deprecated
//! `cors` of routes and virtual hosts counts where no level has a typed one.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;
use sampan_core::header::HeaderId;
use sampan_core::matcher::StringMatcher;
use sampan_core::runtime::Fraction;
use sampan_core::stats::Counter;

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Response, RouteConfig, State, Step, decode,
};
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.cors.v3.Cors";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.cors.v3.CorsPolicy";

struct Cors {
    name: Box<str>,
    origin_valid: Counter,
    origin_invalid: Counter,
}

/// What a level of the route table allows.
pub(crate) struct Policy {
    origins: Vec<StringMatcher>,
    methods: String,
    headers: String,
    expose: String,
    max_age: String,
    credentials: Option<bool>,
    private_network: Option<bool>,
    forward_not_matching: Option<bool>,
    enabled: Fraction,
    shadow: Option<Fraction>,
}

/// The policies of a stream's route, most specific first, and what its origin is allowed.
struct Allowed {
    policies: Vec<Arc<Policy>>,
    origin: Option<Vec<u8>>,
}

pub(super) fn make(_: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let scope = context.factory.root_scope().scope(context.stat_prefix).scope("cors");
    Ok(HttpFilterKind::Filter(Arc::new(Cors {
        name: context.filter_name.into(),
        origin_valid: scope.counter("origin_valid"),
        origin_invalid: scope.counter("origin_invalid"),
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(Policy::from_proto(decode(any)?)?))
}

impl Policy {
    fn from_proto(message: pb::CorsPolicy) -> ConfigResult<Self> {
        Ok(Self {
            origins: StringMatcher::list_from_proto(
                &message.allow_origin_string_match,
                "allow_origin_string_match",
            )?,
            methods: message.allow_methods,
            headers: message.allow_headers,
            expose: message.expose_headers,
            max_age: message.max_age,
            credentials: message.allow_credentials.map(|b| b.value),
            private_network: message.allow_private_network_access.map(|b| b.value),
            forward_not_matching: message.forward_not_matching_preflights.map(|b| b.value),
            enabled: message.filter_enabled.as_ref().map_or(Fraction::ALWAYS, Fraction::from_proto),
            shadow: message.shadow_enabled.as_ref().map(Fraction::from_proto),
        })
    }

    /// From the deprecated field of a route or virtual host, which says the same.
    pub(crate) fn of_route(message: &route::CorsPolicy) -> ConfigResult<Arc<Self>> {
        let old = message.clone();
        let enabled = old.enabled_specifier.map(|route::cors_policy::EnabledSpecifier::FilterEnabled(f)| f);
        Ok(Arc::new(Self::from_proto(pb::CorsPolicy {
            allow_origin_string_match: old.allow_origin_string_match,
            allow_methods: old.allow_methods,
            allow_headers: old.allow_headers,
            expose_headers: old.expose_headers,
            max_age: old.max_age,
            allow_credentials: old.allow_credentials,
            filter_enabled: enabled,
            shadow_enabled: old.shadow_enabled,
            allow_private_network_access: old.allow_private_network_access,
            forward_not_matching_preflights: old.forward_not_matching_preflights,
        })?))
    }
}

impl Allowed {
    fn text(&self, field: impl Fn(&Policy) -> &str) -> &str {
        self.policies.iter().map(|p| field(p)).find(|t| !t.is_empty()).unwrap_or_default()
    }

    fn flag(&self, field: impl Fn(&Policy) -> Option<bool>) -> Option<bool> {
        self.policies.iter().find_map(|p| field(p))
    }

    fn allows(&self, origin: &[u8]) -> bool {
        let origins = self.policies.iter().map(|p| &p.origins).find(|o| !o.is_empty());
        origins.is_some_and(|all| all.iter().any(|m| m.matches("*") || m.matches(origin)))
    }

    fn preflight(&self, stream: &Stream) -> LocalReply {
        let mut reply = LocalReply::new(200, "cors_response");
        let asked = |id| stream.request.get(id).unwrap_or_default().to_vec();
        if let Some(origin) = &self.origin {
            reply = reply.header(HeaderId::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
        if self.flag(|p| p.credentials) == Some(true) {
            reply = reply.header(HeaderId::ACCESS_CONTROL_ALLOW_CREDENTIALS, "true");
        }
        for (text, ask, answer) in [
            (
                self.text(|p| &p.methods),
                HeaderId::ACCESS_CONTROL_REQUEST_METHOD,
                HeaderId::ACCESS_CONTROL_ALLOW_METHODS,
            ),
            (
                self.text(|p| &p.headers),
                HeaderId::ACCESS_CONTROL_REQUEST_HEADERS,
                HeaderId::ACCESS_CONTROL_ALLOW_HEADERS,
            ),
        ] {
            if text == "*" {
                reply = reply.header(answer, asked(ask));
            } else if !text.is_empty() {
                reply = reply.header(answer, text);
            }
        }
        let max_age = self.text(|p| &p.max_age);
        if !max_age.is_empty() {
            reply = reply.header(HeaderId::ACCESS_CONTROL_MAX_AGE, max_age);
        }
        if self.flag(|p| p.private_network) == Some(true)
            && stream.request.get(HeaderId::ACCESS_CONTROL_REQUEST_PRIVATE_NETWORK) == Some(b"true")
        {
            reply = reply.header(HeaderId::ACCESS_CONTROL_ALLOW_PRIVATE_NETWORK, "true");
        }
        reply
    }
}

impl HttpFilter for Cors {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        let Some(route) = stream.route.as_ref().filter(|r| r.cluster_action().is_some()) else {
            return Step::Continue;
        };
        let mut policies: Vec<_> = route
            .filter_config_levels(&self.name)
            .filter_map(|c| c.clone().downcast::<Policy>().ok())
            .collect();
        if policies.is_empty() {
            policies.extend(route.old_cors().cloned());
        }
        let Some(first) = policies.first() else { return Step::Continue };
        let (runtime, random) = (&stream.worker.runtime, stream.worker.random());
        let enabled = first.enabled.hit(runtime, random);
        let shadow = first.shadow.as_ref().is_some_and(|s| s.hit(runtime, random));
        let origin = stream.request.get(HeaderId::ORIGIN).unwrap_or_default();
        if origin.is_empty() || !(enabled || shadow) {
            return Step::Continue;
        }
        let mut allowed = Allowed { policies, origin: None };
        if allowed.allows(origin) {
            self.origin_valid.inc();
            allowed.origin = Some(origin.to_vec());
        } else {
            self.origin_invalid.inc();
        }
        if !enabled {
            return Step::Continue;
        }
        let asked = stream.request.get(HeaderId::ACCESS_CONTROL_REQUEST_METHOD).unwrap_or_default();
        let preflight = stream.request.get(HeaderId::METHOD) == Some(b"OPTIONS") && !asked.is_empty();
        let forward = allowed.origin.is_none() && allowed.flag(|p| p.forward_not_matching).unwrap_or(true);
        let reply = (preflight && !forward).then(|| allowed.preflight(stream));
        // The answer to a preflight passes this filter once more, as any response does.
        *state = Some(Box::new(allowed));
        reply.map_or(Step::Continue, Step::reply)
    }

    fn on_response<'a>(
        &'a self,
        _stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        let allowed = state.as_ref().and_then(|s| s.downcast_ref::<Allowed>());
        let Some((allowed, origin)) = allowed.and_then(|a| Some((a, a.origin.as_ref()?))) else {
            return Step::Continue;
        };
        response.headers.set(HeaderId::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        if allowed.flag(|p| p.credentials) == Some(true) {
            response.headers.set(HeaderId::ACCESS_CONTROL_ALLOW_CREDENTIALS, "true");
        }
        let expose = allowed.text(|p| &p.expose);
        if !expose.is_empty() {
            response.headers.set(HeaderId::ACCESS_CONTROL_EXPOSE_HEADERS, expose);
        }
        Step::Continue
    }
}
