//! `filter_disabled`: when a listener filter is skipped.

use std::ops::Range;

use envoy_types::pb::envoy::config::listener::v3::ListenerFilterChainMatchPredicate;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::{MatchSet, Rule};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stream_info::ConnectionInfo;

/// A `ListenerFilterChainMatchPredicate`.
pub(crate) enum Predicate {
    Any,
    Not(Box<Self>),
    And(Vec<Self>),
    Or(Vec<Self>),
    DestinationPort(Range<u32>),
}

impl Predicate {
    pub(crate) fn from_proto(message: &ListenerFilterChainMatchPredicate) -> ConfigResult<Self> {
        match &message.rule {
            None => Err(ConfigError::missing("rule")),
            // `any_match: false` is no rule that could match; Envoy treats the case as set, whatever its value.
            Some(Rule::AnyMatch(_)) => Ok(Self::Any),
            Some(Rule::NotMatch(p)) => Ok(Self::Not(Box::new(Self::from_proto(p).at("not_match")?))),
            Some(Rule::AndMatch(set)) => Ok(Self::And(rules(set).at("and_match")?)),
            Some(Rule::OrMatch(set)) => Ok(Self::Or(rules(set).at("or_match")?)),
            Some(Rule::DestinationPortRange(r)) => {
                let (Ok(start), Ok(end)) = (u32::try_from(r.start), u32::try_from(r.end)) else {
                    return Err(ConfigError::new("must not be negative").at("destination_port_range"));
                };
                Ok(Self::DestinationPort(start..end))
            }
        }
    }

    pub(crate) fn matches(&self, connection: &ConnectionInfo) -> bool {
        match self {
            Self::Any => true,
            Self::Not(p) => !p.matches(connection),
            Self::And(all) => all.iter().all(|p| p.matches(connection)),
            Self::Or(any) => any.iter().any(|p| p.matches(connection)),
            Self::DestinationPort(range) => {
                connection.local.port().is_some_and(|p| range.contains(&p.into()))
            }
        }
    }
}

fn rules(set: &MatchSet) -> ConfigResult<Vec<Predicate>> {
    set.rules.iter().enumerate().map(|(i, r)| Predicate::from_proto(r).at_index("rules", i)).collect()
}
