//! Compiling a tree from its message.

use envoy_types::pb::envoy::config::common::matcher::v3 as common;
use envoy_types::pb::envoy::extensions::matching::input_matchers::ip::v3::Ip;
use envoy_types::pb::envoy::r#type::matcher::v3 as string_pb;
use envoy_types::pb::xds::core::v3::{CidrRange as XdsRange, TypedExtensionConfig};
use envoy_types::pb::xds::r#type::matcher::v3 as pb;
use pb::matcher::matcher_list::{Predicate as PredicateMessage, predicate};
use pb::matcher::matcher_tree::{MatchMap, TreeType};
use prost::Message as _;

use super::{Map, MatchTree, OnMatch, Predicate, Range, Then, What};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::matcher::{CidrRange, CidrSet, StringMatcher};

const IP_TREE: &str = "xds.type.matcher.v3.IPMatcher";
const IP: &str = "envoy.extensions.matching.input_matchers.ip.v3.Ip";

/// `xds.type.matcher.v3.IPMatcher`, which `envoy-types` does not have.
#[derive(Clone, PartialEq, prost::Message)]
struct IpMatcher {
    #[prost(message, repeated, tag = "1")]
    range_matchers: Vec<IpRangeMatcher>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IpRangeMatcher {
    #[prost(message, repeated, tag = "1")]
    ranges: Vec<XdsRange>,
    #[prost(message, optional, tag = "2")]
    on_match: Option<pb::matcher::OnMatch>,
    #[prost(bool, tag = "3")]
    exclusive: bool,
}

/// What a tree's owner lets stand in it.
pub trait TreeContext {
    /// What conditions can be about.
    type Input;
    /// What it leads to.
    type Action;
    /// Whether `keep_matching` means something.
    const KEEP_MATCHING: bool;

    /// An input.
    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Self::Input>;

    /// An action.
    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Self::Action>;
}

/// The older message of the same meaning: the two have the same fields under the same numbers.
pub fn from_common(message: &common::Matcher) -> ConfigResult<pb::Matcher> {
    pb::Matcher::decode(&*message.encode_to_vec())
        .map_err(|e| ConfigError::new(format!("malformed matcher: {e}")))
}

impl<I, A> MatchTree<I, A> {
    /// Compiles the message.
    pub fn from_proto<C>(message: &pb::Matcher, context: &mut C) -> ConfigResult<Self>
    where
        C: TreeContext<Input = I, Action = A>,
    {
        let what = match &message.matcher_type {
            None => What::Nothing,
            Some(pb::matcher::MatcherType::MatcherList(list)) => list_of(list, context).at("matcher_list")?,
            Some(pb::matcher::MatcherType::MatcherTree(tree)) => tree_of(tree, context).at("matcher_tree")?,
        };
        let on_no_match = message.on_no_match.as_deref();
        let on_no_match = on_no_match.map(|m| OnMatch::from_proto(m, context)).transpose();
        Ok(Self { what, on_no_match: on_no_match.at("on_no_match")? })
    }
}

fn list_of<I, A, C>(message: &pb::matcher::MatcherList, context: &mut C) -> ConfigResult<What<I, A>>
where
    C: TreeContext<Input = I, Action = A>,
{
    let mut list = Vec::with_capacity(message.matchers.len());
    for (i, matcher) in message.matchers.iter().enumerate() {
        let mut one = || {
            let predicate = matcher.predicate.as_ref().ok_or_else(|| ConfigError::missing("predicate"))?;
            let on_match = matcher.on_match.as_ref().ok_or_else(|| ConfigError::missing("on_match"))?;
            Ok((
                Predicate::from_proto(predicate, context).at("predicate")?,
                OnMatch::from_proto(on_match, context).at("on_match")?,
            ))
        };
        list.push(one().at_index("matchers", i)?);
    }
    Ok(What::List(list))
}

fn tree_of<I, A, C>(message: &pb::matcher::MatcherTree, context: &mut C) -> ConfigResult<What<I, A>>
where
    C: TreeContext<Input = I, Action = A>,
{
    let input = message.input.as_ref().ok_or_else(|| ConfigError::missing("input"))?;
    let input = context.input(input).at("input")?;
    match message.tree_type.as_ref().ok_or_else(|| ConfigError::missing("tree_type"))? {
        TreeType::ExactMatchMap(map) => Ok(What::Exact(input, map_of(map, context).at("exact_match_map")?)),
        TreeType::PrefixMatchMap(map) => {
            let map = map_of(map, context).at("prefix_match_map")?;
            let mut lengths: Vec<usize> = map.keys().map(|key| key.len()).collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
            Ok(What::Prefix(input, map, lengths))
        }
        TreeType::CustomMatch(config) if message_name(config) == IP_TREE => {
            ranges_of(input, config, context).at("typed_config").at("custom_match")
        }
        TreeType::CustomMatch(config) => {
            Err(ConfigError::unsupported(format!("custom match {:?}", type_url(config))).at("custom_match"))
        }
    }
}

fn ranges_of<I, A, C>(input: I, config: &TypedExtensionConfig, context: &mut C) -> ConfigResult<What<I, A>>
where
    C: TreeContext<Input = I, Action = A>,
{
    let message: IpMatcher = decode(config)?;
    let (mut ranges, mut places) = (Vec::new(), Vec::new());
    for (to, matcher) in message.range_matchers.iter().enumerate() {
        let mut one = || {
            for (i, range) in matcher.ranges.iter().enumerate() {
                let length = range.prefix_len.map_or(0, |length| length.value);
                let range = CidrRange::new(&range.address_prefix, length).at_index("ranges", i)?;
                ranges.push(Range { range, exclusive: matcher.exclusive, to });
            }
            let on_match = matcher.on_match.as_ref().ok_or_else(|| ConfigError::missing("on_match"))?;
            OnMatch::from_proto(on_match, context).at("on_match")
        };
        places.push(one().at_index("range_matchers", to)?);
    }
    // Of two that are equally narrow the first counts: the sort is stable.
    ranges.sort_by_key(|range| std::cmp::Reverse(range.range.net().prefix_len()));
    Ok(What::Ranges(input, ranges, places))
}

fn map_of<I, A, C>(message: &MatchMap, context: &mut C) -> ConfigResult<Map<I, A>>
where
    C: TreeContext<Input = I, Action = A>,
{
    let mut map = Map::default();
    for (key, on_match) in &message.map {
        let on_match = OnMatch::from_proto(on_match, context).map_err(|e| e.key(key).at("map"))?;
        map.insert(key.as_bytes().into(), on_match);
    }
    Ok(map)
}

impl<I, A> OnMatch<I, A> {
    fn from_proto<C>(message: &pb::matcher::OnMatch, context: &mut C) -> ConfigResult<Self>
    where
        C: TreeContext<Input = I, Action = A>,
    {
        use pb::matcher::on_match::OnMatch as M;
        if message.keep_matching && !C::KEEP_MATCHING {
            return Err(ConfigError::new("keep_matching is not supported in this context"));
        }
        let then = match message.on_match.as_ref().ok_or_else(|| ConfigError::missing("on_match"))? {
            M::Matcher(matcher) => {
                Then::Tree(Box::new(MatchTree::from_proto(matcher, context).at("matcher")?))
            }
            M::Action(action) => Then::Action(context.action(action).at("action")?),
        };
        Ok(Self { then, keep_matching: message.keep_matching })
    }
}

impl<I> Predicate<I> {
    fn from_proto<C>(message: &PredicateMessage, context: &mut C) -> ConfigResult<Self>
    where
        C: TreeContext<Input = I>,
    {
        use predicate::MatchType as M;
        Ok(match message.match_type.as_ref().ok_or_else(|| ConfigError::missing("match_type"))? {
            M::SinglePredicate(single) => Self::single(single, context).at("single_predicate")?,
            M::OrMatcher(list) => Self::Or(Self::list(list, context).at("or_matcher")?),
            M::AndMatcher(list) => Self::And(Self::list(list, context).at("and_matcher")?),
            M::NotMatcher(one) => Self::Not(Box::new(Self::from_proto(one, context).at("not_matcher")?)),
        })
    }

    fn list<C>(message: &predicate::PredicateList, context: &mut C) -> ConfigResult<Vec<Self>>
    where
        C: TreeContext<Input = I>,
    {
        let all = message.predicate.iter().enumerate();
        all.map(|(i, one)| Self::from_proto(one, context).at_index("predicate", i)).collect()
    }

    fn single<C>(message: &predicate::SinglePredicate, context: &mut C) -> ConfigResult<Self>
    where
        C: TreeContext<Input = I>,
    {
        use predicate::single_predicate::Matcher as M;
        let input = message.input.as_ref().ok_or_else(|| ConfigError::missing("input"))?;
        let input = context.input(input).at("input")?;
        match message.matcher.as_ref().ok_or_else(|| ConfigError::missing("matcher"))? {
            M::ValueMatch(matcher) => Ok(Self::Single(input, string_matcher(matcher).at("value_match")?)),
            M::CustomMatch(config) if message_name(config) == IP => {
                let set = decode(config)
                    .and_then(|message: Ip| CidrSet::from_proto(&message.cidr_ranges).at("cidr_ranges"));
                Ok(Self::Ip(input, set.at("typed_config").at("custom_match")?))
            }
            M::CustomMatch(config) => {
                Err(ConfigError::unsupported(format!("input matcher {:?}", type_url(config)))
                    .at("custom_match"))
            }
        }
    }
}

/// `xds.type.matcher.v3.StringMatcher` says what Envoy's own says.
fn string_matcher(message: &pb::StringMatcher) -> ConfigResult<StringMatcher> {
    string_pb::StringMatcher::decode(&*message.encode_to_vec())
        .map_err(|e| ConfigError::new(format!("malformed matcher: {e}")))
        .and_then(|message| StringMatcher::from_proto(&message))
}

fn decode<M: prost::Message + Default>(config: &TypedExtensionConfig) -> ConfigResult<M> {
    let value = config.typed_config.as_ref().map_or(&[][..], |any| &any.value);
    M::decode(value).map_err(|e| ConfigError::new(format!("malformed {}: {e}", type_url(config))))
}

fn message_name(config: &TypedExtensionConfig) -> &str {
    type_url(config).rsplit('/').next().unwrap_or_default()
}

fn type_url(config: &TypedExtensionConfig) -> &str {
    config.typed_config.as_ref().map_or("", |any| &any.type_url)
}
