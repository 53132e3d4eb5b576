//! `envoy.filters.http.rbac`: lets a request pass or answers 403, as its rules say; shadow rules are only counted.
//!
//! A route's configuration takes the place of the filter's rules; one without rules switches them off. Its requests
//! are counted where the filter's are, but its prefixes name what is left in the dynamic metadata.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::rbac::{Decision, Facts, PathTest, Results, Rules, denied_details};
use sampan_core::stats::{Counter, Scope};

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, RouteConfig, State, Step, decode,
};
use crate::route::Template;
use crate::stream::Stream;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.rbac.v3.RBAC";
pub(super) const ROUTE_TYPE: &str = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute";

/// The namespace of the dynamic metadata, whatever the filter is called.
const NAMESPACE: &str = "envoy.filters.http.rbac";

/// The rules of the filter or of a route.
#[derive(Default)]
struct Config {
    rules: Option<Rules>,
    shadow: Option<Rules>,
    rules_prefix: String,
    shadow_prefix: String,
    /// `track_per_rule_stats`
    per_rule: bool,
}

struct Rbac {
    name: Box<str>,
    config: Config,
    enforced: Counted,
    shadow: Counted,
}

/// Counters of one kind of rules.
struct Counted {
    allowed: Counter,
    denied: Counter,
    /// Where counters of single policies stand, and what their last parts are.
    scope: Scope,
    names: [&'static str; 2],
}

impl Config {
    fn from_proto(message: &pb::Rbac) -> ConfigResult<Self> {
        let template = Some(template as _);
        Ok(Self {
            rules: Rules::from_fields(
                message.rules.as_ref(),
                message.matcher.as_ref(),
                ["rules", "matcher"],
                template,
            )?,
            shadow: Rules::from_fields(
                message.shadow_rules.as_ref(),
                message.shadow_matcher.as_ref(),
                ["shadow_rules", "shadow_matcher"],
                template,
            )?,
            rules_prefix: message.rules_stat_prefix.clone(),
            shadow_prefix: message.shadow_rules_stat_prefix.clone(),
            per_rule: message.track_per_rule_stats,
        })
    }
}

fn template(
    config: &envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig,
) -> ConfigResult<PathTest> {
    let template = Template::matching(config)?;
    // As everywhere, a template is about the path before its query.
    Ok(Arc::new(move |path| {
        let end = path.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(path.len());
        template.matches(&path[..end])
    }))
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let config = Config::from_proto(&decode(any)?)?;
    let scope = context.factory.root_scope().scope(context.stat_prefix).scope("rbac");
    Ok(HttpFilterKind::Filter(Arc::new(Rbac {
        name: context.filter_name.into(),
        enforced: Counted::new(&scope, &config.rules_prefix, ["allowed", "denied"]),
        shadow: Counted::new(&scope, &config.shadow_prefix, ["shadow_allowed", "shadow_denied"]),
        config,
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    let message: pb::RbacPerRoute = decode(any)?;
    let config = message.rbac.as_ref().map(Config::from_proto).transpose().at("rbac")?;
    Ok(Arc::new(config.unwrap_or_default()))
}

impl Counted {
    fn new(scope: &Scope, prefix: &str, names: [&'static str; 2]) -> Self {
        // A prefix brings its own dot or gets one.
        let prefix = prefix.strip_suffix('.').unwrap_or(prefix);
        let scope = if prefix.is_empty() { scope.clone() } else { scope.scope(prefix) };
        Self { allowed: scope.counter(names[0]), denied: scope.counter(names[1]), scope, names }
    }

    fn count(&self, decision: Decision<'_>, per_rule: bool) {
        if decision.allowed {
            self.allowed.inc()
        } else {
            self.denied.inc()
        }
        if let (true, Some(policy)) = (per_rule, decision.policy) {
            let [allowed, denied] = self.names;
            let what = if decision.allowed { allowed } else { denied };
            self.scope.counter(&format!("policy.{policy}.{what}")).inc();
        }
    }
}

impl HttpFilter for Rbac {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, _state: &'a mut State) -> Step<'a> {
        let of_route = stream.route_config::<Config>(&self.name);
        let config = of_route.as_deref().unwrap_or(&self.config);
        fn prefix<'c>(of_route: Option<&'c str>, own: &'c str) -> &'c str {
            of_route.filter(|p| !p.is_empty()).unwrap_or(own)
        }
        let results = Results {
            namespace: NAMESPACE,
            shadow_prefix: prefix(
                of_route.as_deref().map(|c| c.shadow_prefix.as_str()),
                &self.config.shadow_prefix,
            ),
            rules_prefix: Some(prefix(
                of_route.as_deref().map(|c| c.rules_prefix.as_str()),
                &self.config.rules_prefix,
            )),
        };
        let route = stream.route.is_some();
        // Both see the stream as it came: what is noted of the one is not there yet for the other.
        let bare_path = stream.route.as_ref().and_then(|route| route.bare_path(&stream.request));
        let facts =
            Facts { headers: &stream.request, info: &stream.info, route, bare_path: bare_path.as_deref() };
        let shadow = config.shadow.as_ref().map(|rules| rules.decide(facts));
        if let Some(decision) = shadow {
            self.shadow.count(decision, config.per_rule);
        }
        let enforced = config.rules.as_ref().map(|rules| rules.decide(facts));
        if let Some(decision) = shadow {
            results.note_shadow(&mut stream.info, decision);
        }
        let Some(decision) = enforced else { return Step::Continue };
        self.enforced.count(decision, config.per_rule);
        results.note_enforced(&mut stream.info, decision);
        if decision.allowed {
            return Step::Continue;
        }
        Step::reply(LocalReply::new(403, denied_details(decision.policy)).body("RBAC: access denied"))
    }
}
