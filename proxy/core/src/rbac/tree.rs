//! `matcher` and `shadow_matcher`: a tree whose actions decide, each under a policy's name.
//!
//! Whom the tree leads nowhere is refused, under no name. Where any of its actions logs, the hint for access logs is left
//! for everybody who is led somewhere. Source: Envoy's RBAC engine.

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3::Matcher;
use prost::Message;

use super::{Decision, Facts};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::matcher::tree::{Found, MatchTree, TreeContext};
use crate::matcher::{ConnectionInput, RequestFacts, RequestInput};

const ACTION: &str = "envoy.config.rbac.v3.Action";

/// A compiled tree.
pub struct Tree {
    tree: MatchTree<RequestInput, Action>,
    /// One of its actions logs.
    logs: bool,
}

/// `envoy.config.rbac.v3.Action`
struct Action {
    name: Box<str>,
    action: pb::rbac::Action,
}

/// Compiles a tree.
struct Builder {
    http: bool,
    logs: bool,
}

impl Tree {
    /// `http`: it may be about headers.
    pub(super) fn from_proto(message: &Matcher, http: bool) -> ConfigResult<Self> {
        let mut builder = Builder { http, logs: false };
        let tree = MatchTree::from_proto(message, &mut builder)?;
        Ok(Self { tree, logs: builder.logs })
    }

    pub(super) fn decide(&self, facts: Facts<'_>) -> Decision<'_> {
        let facts = RequestFacts { request: Some(facts.headers), response: None, info: facts.info };
        let Found::Action(Action { name, action }) = self.tree.find(&facts, &mut |_| {}) else {
            return Decision { allowed: false, policy: None, log: None };
        };
        Decision {
            allowed: *action != pb::rbac::Action::Deny,
            policy: Some(name),
            log: self.logs.then_some(*action == pb::rbac::Action::Log),
        }
    }
}

impl TreeContext for Builder {
    type Input = RequestInput;
    type Action = Action;
    const KEEP_MATCHING: bool = false;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<RequestInput> {
        let input = RequestInput::from_proto(config)?;
        let known = match &input {
            RequestInput::Header(_) => self.http,
            RequestInput::ResponseHeader(_)
            | RequestInput::Status
            | RequestInput::StatusClass
            | RequestInput::Query(_) => false,
            RequestInput::FilterState(_) => true,
            RequestInput::Connection(input) => !matches!(
                input,
                ConnectionInput::SourceType
                    | ConnectionInput::TransportProtocol
                    | ConnectionInput::ApplicationProtocol
            ),
        };
        let type_url = config.typed_config.as_ref().map_or("", |any| &any.type_url);
        let whose = if self.http { "HTTP filter cannot match on" } else { "network filter cannot match" };
        let why = || ConfigError::new(format!("RBAC {whose} '{type_url}'"));
        known.then_some(input).ok_or_else(why)
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Action> {
        let any = config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        if any.type_url.rsplit('/').next() != Some(ACTION) {
            let error = ConfigError::unsupported(format_args!("action type {:?}", any.type_url));
            return Err(error.at("typed_config"));
        }
        let message = pb::Action::decode(&*any.value)
            .map_err(|e| ConfigError::new(format!("malformed {ACTION}: {e}")))
            .at("typed_config")?;
        let action = pb::rbac::Action::try_from(message.action)
            .map_err(|_| ConfigError::new("value must be one of the defined enum values").at("action"))?;
        self.logs |= action == pb::rbac::Action::Log;
        Ok(Action { name: message.name.into(), action })
    }
}
