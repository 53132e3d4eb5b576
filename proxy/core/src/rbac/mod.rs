//! Role-based access control: who may do what, as the HTTP and the network filter ask it.
//!
//! A set of rules is an action and policies; the first policy by name that matches decides. `ALLOW` lets pass what a
//! policy matches, `DENY` what none matches, `LOG` everything. A set without policies matches nothing, so that an
//! empty `ALLOW` refuses all.
//!
//! A matcher tree takes the place of rules; each of its actions says what becomes of whom it leads to, and whom it leads
//! nowhere is refused.
//!
//! Nothing fails open: what cannot be parsed (extensions that are not there, what a CEL condition may not say) is refused
//! with its name when the configuration is read, and what is missing from a request is as absent to a rule as Envoy has
//! it. Rules read the request after normalisation, as routes do.
//!
//! `audit_logging_options` is for other readers of the message: Envoy has no audit loggers either.

mod rule;
mod tree;

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::google::protobuf::{Value, value::Kind};
use envoy_types::pb::xds::r#type::matcher::v3::Matcher;

use self::rule::Rule;
use self::tree::Tree;
use crate::cel::Expression;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::format::FormatContext;
use crate::header::{HeaderId, HeaderMap};
use crate::stream_info::StreamInfo;

/// A test of a path; how `uri_template` is asked.
pub type PathTest = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// Makes the test of a `uri_template`, where templates are known.
pub type ParseTemplate = fn(&TypedExtensionConfig) -> ConfigResult<PathTest>;

/// What rules are asked about.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The request's headers; empty on a TCP connection.
    pub headers: &'a HeaderMap,
    /// All else.
    pub info: &'a StreamInfo,
    /// Whether there is a route; its metadata is in `info`.
    pub route: bool,
    /// The path without parameters, where the route was found without them (CVE-2026-73553).
    pub bare_path: Option<&'a [u8]>,
}

impl<'a> Facts<'a> {
    /// What a condition is asked about: the path as it came, as in Envoy.
    fn as_context(&self) -> FormatContext<'a> {
        FormatContext { request: Some(self.headers), ..FormatContext::new(self.info) }
    }

    /// The path as rules compare it.
    fn path(&self) -> Option<&'a [u8]> {
        self.bare_path.or_else(|| self.headers.get(HeaderId::PATH))
    }
}

/// What a set of rules says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision<'a> {
    /// Let pass.
    pub allowed: bool,
    /// The policy that matched.
    pub policy: Option<&'a str>,
    /// Of a set that logs: the hint for access logs.
    pub log: Option<bool>,
}

/// What decides.
pub enum Rules {
    /// An action and policies.
    Policies(Policies),
    /// A matcher tree.
    Tree(Box<Tree>),
}

/// A set of rules.
pub struct Policies {
    action: pb::rbac::Action,
    /// By name, as they are asked.
    policies: Vec<(Box<str>, Policy)>,
}

struct Policy {
    permissions: Vec<Rule>,
    principals: Vec<Rule>,
    /// What must be true besides.
    condition: Option<Expression>,
}

impl Rules {
    /// From two fields of a filter: rules, and the matcher tree that takes their place. `template` is there for HTTP.
    pub fn from_fields(
        rules: Option<&pb::Rbac>,
        matcher: Option<&Matcher>,
        [field, matcher_field]: [&str; 2],
        template: Option<ParseTemplate>,
    ) -> ConfigResult<Option<Self>> {
        if let Some(matcher) = matcher {
            let tree = Tree::from_proto(matcher, template.is_some()).at(matcher_field)?;
            return Ok(Some(Self::Tree(Box::new(tree))));
        }
        rules.map(|rules| Self::from_proto(rules, template).at(field)).transpose()
    }

    /// From the message.
    pub fn from_proto(message: &pb::Rbac, template: Option<ParseTemplate>) -> ConfigResult<Self> {
        let action = pb::rbac::Action::try_from(message.action)
            .map_err(|_| ConfigError::new("value must be one of the defined enum values").at("action"))?;
        let mut policies = Vec::with_capacity(message.policies.len());
        for (name, policy) in &message.policies {
            let policy = Policy::from_proto(policy, template).map_err(|e| e.key(name).at("policies"))?;
            policies.push((name.as_str().into(), policy));
        }
        policies.sort_by(|(a, _): &(Box<str>, _), (b, _)| a.cmp(b));
        Ok(Self::Policies(Policies { action, policies }))
    }

    /// What the rules say.
    pub fn decide(&self, facts: Facts<'_>) -> Decision<'_> {
        match self {
            Self::Policies(policies) => policies.decide(facts),
            Self::Tree(tree) => tree.decide(facts),
        }
    }
}

impl Policies {
    fn decide(&self, facts: Facts<'_>) -> Decision<'_> {
        let policy = self.policies.iter().find(|(_, policy)| policy.matches(facts)).map(|(name, _)| &**name);
        let matched = policy.is_some();
        let (allowed, log) = match self.action {
            pb::rbac::Action::Allow => (matched, None),
            pb::rbac::Action::Deny => (!matched, None),
            pb::rbac::Action::Log => (true, Some(matched)),
        };
        Decision { allowed, policy, log }
    }
}

impl Policy {
    fn from_proto(message: &pb::Policy, template: Option<ParseTemplate>) -> ConfigResult<Self> {
        for (set, field) in [
            (message.checked_condition.is_some(), "checked_condition"),
            (message.cel_config.is_some(), "cel_config"),
        ] {
            if set {
                return Err(ConfigError::unsupported("a CEL condition").at(field));
            }
        }
        let none = || ConfigError::new("value must contain at least 1 item(s)");
        if message.permissions.is_empty() {
            return Err(none().at("permissions"));
        }
        if message.principals.is_empty() {
            return Err(none().at("principals"));
        }
        let permission = |(i, m)| Rule::permission(m, template).at_index("permissions", i);
        let principal = |(i, m)| Rule::principal(m).at_index("principals", i);
        // Rules of the HTTP filter know templates.
        let condition = |m| Expression::from_proto(m, template.is_some());
        Ok(Self {
            permissions: message
                .permissions
                .iter()
                .enumerate()
                .map(permission)
                .collect::<ConfigResult<_>>()?,
            principals: message.principals.iter().enumerate().map(principal).collect::<ConfigResult<_>>()?,
            condition: message.condition.as_ref().map(condition).transpose().at("condition")?,
        })
    }

    fn matches(&self, facts: Facts<'_>) -> bool {
        self.permissions.iter().any(|rule| rule.matches(facts))
            && self.principals.iter().any(|rule| rule.matches(facts))
            && self.condition.as_ref().is_none_or(|condition| condition.is_true(&facts.as_context()))
    }
}

/// The namespace of the hint that `LOG` leaves for access logs, and its key.
const LOG_HINT: (&str, &str) = ("envoy.common", "access_log_hint");

/// What a filter of that name leaves in the dynamic metadata.
pub struct Results<'a> {
    /// The filter's namespace.
    pub namespace: &'a str,
    /// `shadow_rules_stat_prefix`
    pub shadow_prefix: &'a str,
    /// `rules_stat_prefix`; none where enforced results are not noted.
    pub rules_prefix: Option<&'a str>,
}

impl Results<'_> {
    /// Notes a decision of shadow rules.
    pub fn note_shadow(&self, info: &mut StreamInfo, decision: Decision<'_>) {
        self.note(info, decision, self.shadow_prefix, ["shadow_effective_policy_id", "shadow_engine_result"]);
    }

    /// Notes a decision of enforced rules.
    pub fn note_enforced(&self, info: &mut StreamInfo, decision: Decision<'_>) {
        if let Some(log) = decision.log {
            let fields = &mut info.dynamic_metadata_mut(LOG_HINT.0).fields;
            fields.insert(LOG_HINT.1.to_owned(), Value { kind: Some(Kind::BoolValue(log)) });
        }
        if let Some(prefix) = self.rules_prefix {
            self.note(info, decision, prefix, ["enforced_effective_policy_id", "enforced_engine_result"]);
        }
    }

    fn note(&self, info: &mut StreamInfo, decision: Decision<'_>, prefix: &str, [id, result]: [&str; 2]) {
        let fields = &mut info.dynamic_metadata_mut(self.namespace).fields;
        let mut put = |key: &str, text: &str| {
            fields.insert(format!("{prefix}{key}"), Value { kind: Some(Kind::StringValue(text.to_owned())) });
        };
        if let Some(policy) = decision.policy {
            put(id, policy);
        }
        put(result, if decision.allowed { "allowed" } else { "denied" });
    }
}

/// `rbac_access_denied_matched_policy[NAME]`, what a refusal leaves in the log; white space of the name would break
/// a line into more fields than it has.
pub fn denied_details(policy: Option<&str>) -> String {
    let name: String =
        policy.unwrap_or("none").chars().map(|c| if c.is_ascii_whitespace() { '_' } else { c }).collect();
    format!("rbac_access_denied_matched_policy[{name}]")
}

#[cfg(test)]
mod tests;
