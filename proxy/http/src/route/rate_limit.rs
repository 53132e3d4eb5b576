//! `rate_limits`: what of a request is counted. Filters that limit rates turn it into descriptors, each a list of
//! keys and values, and look for a budget under them.
//!
//! An action that finds nothing in the request spoils its descriptor; the others of the list are made all the same.
//! Values borrow from the request and the configuration where they can.
//!
//! Source: `config.route.v3.RateLimit`; tried beside Envoy 1.40 (cases `filters/local_ratelimit_*`).

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::r#type::metadata::v3::MetadataKey;
use envoy_types::pb::envoy::r#type::metadata::v3::metadata_key::{PathSegment, path_segment::Segment};
use envoy_types::pb::envoy::r#type::v3::RateLimitUnit;
use envoy_types::pb::google::protobuf::value::Kind;
use pb::rate_limit::{Action as ActionMessage, HitsAddend, XRateLimitOption, action as act, r#override};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderName};
use sampan_core::matcher::{
    CidrSet, HeaderMatcher, QueryParameterMatcher, all_headers_match, decoded_query_parameter, metadata_value,
};
use sampan_core::stream_info::Metadata;
use smallvec::SmallVec;

use super::headers::as_stored;
use crate::stream::Stream;

/// The largest `hits_addend`.
const MAX_HITS: f64 = 1e9;

/// `rate_limits` of a route, a virtual host or a filter.
#[derive(Default)]
pub struct RateLimits(Vec<RateLimit>);

/// One of them.
pub struct RateLimit {
    /// `stage`: the filters that read it have the same.
    pub stage: u32,
    /// `disable_key`: runtime may switch it off.
    pub disable_key: Box<str>,
    /// `apply_on_stream_done`
    pub apply_on_stream_done: bool,
    actions: Vec<Action>,
    limit: Option<Limit>,
    hits: Option<Hits>,
    negative: bool,
    headers: XRateLimitOption,
}

/// What is looked for: entries in order, and how much is asked of the budget.
#[derive(Debug, Clone, PartialEq)]
pub struct Descriptor<'a> {
    /// Keys and values.
    pub entries: SmallVec<[Entry<'a>; 2]>,
    /// `hits_addend`; none where nothing was said.
    pub hits: Option<u64>,
    /// `hits_addend.is_negative_hits`: they are given back.
    pub negative: bool,
    /// `limit`: another budget than the service's own.
    pub limit: Option<(u32, RateLimitUnit)>,
    /// `x_ratelimit_option`
    pub headers: XRateLimitOption,
}

/// A key and its value.
pub type Entry<'a> = (&'a str, Cow<'a, [u8]>);

/// The descriptors of a request.
pub type Descriptors<'a> = SmallVec<[Descriptor<'a>; 2]>;

enum Limit {
    Fixed(u32, RateLimitUnit),
    Metadata(Path),
}

enum Hits {
    Fixed(u64),
    Format(Formatter),
}

/// Where a value lies in metadata.
struct Path {
    filter: Box<str>,
    keys: Vec<String>,
}

enum Action {
    SourceCluster,
    DestinationCluster,
    Header { name: HeaderName, key: Box<str>, skip: bool },
    Query { name: Box<str>, key: Box<str>, skip: bool },
    RemoteAddress,
    MaskedRemoteAddress { v4: u8, v6: u8 },
    Generic { key: Box<str>, value: Box<str> },
    HeaderMatch { key: Box<str>, value: Box<str>, expect: bool, headers: Vec<HeaderMatcher> },
    QueryMatch { key: Box<str>, value: Box<str>, expect: bool, query: Vec<QueryParameterMatcher> },
    AddressMatch { key: Box<str>, value: Formatter, default: Box<str>, addresses: CidrSet },
    Metadata { key: Box<str>, path: Path, source: act::meta_data::Source, default: Box<str>, skip: bool },
}

/// What an action makes of a request.
enum Made<'a> {
    Entry(&'a str, Cow<'a, [u8]>),
    /// Nothing, and the others count without it.
    Skip,
    /// Nothing, and so no descriptor.
    Spoiled,
}

impl RateLimits {
    /// Those of a route or a virtual host. Envoy reads `hits_addend` only where a filter holds the list.
    pub fn of_route(messages: &[pb::RateLimit]) -> ConfigResult<Self> {
        Self::list(messages, |message| {
            Ok(RateLimit { hits: None, negative: false, ..RateLimit::from_proto(message)? })
        })
    }

    /// Those of a filter, or of its configuration on a route: without stages; `limit` where it has a use for it.
    pub fn of_filter(messages: &[pb::RateLimit], limit: bool) -> ConfigResult<Self> {
        Self::list(messages, |message| {
            if message.stage.is_some() || !message.disable_key.is_empty() {
                return Err(ConfigError::new("'stage' field and 'disable_key' field are not supported"));
            }
            if !limit && message.limit.is_some() {
                return Err(ConfigError::new("'limit' field is not supported"));
            }
            let hits = message.hits_addend.as_ref().map(Hits::from_proto).transpose().at("hits_addend")?;
            Ok(RateLimit { hits, ..RateLimit::from_proto(message)? })
        })
    }

    fn list(
        messages: &[pb::RateLimit],
        parse: impl Fn(&pb::RateLimit) -> ConfigResult<RateLimit>,
    ) -> ConfigResult<Self> {
        let parse = |(i, message)| parse(message).at_index("rate_limits", i);
        Ok(Self(messages.iter().enumerate().map(parse).collect::<ConfigResult<_>>()?))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the descriptors of those that `wanted` takes.
    pub fn describe<'a>(
        &'a self,
        stream: &'a Stream,
        wanted: impl Fn(&RateLimit) -> bool,
        out: &mut Descriptors<'a>,
    ) {
        out.extend(self.0.iter().filter(|one| wanted(one)).filter_map(|one| one.describe(stream)));
    }
}

impl RateLimit {
    fn from_proto(message: &pb::RateLimit) -> ConfigResult<Self> {
        let actions = message.actions.iter().enumerate();
        let actions = actions.map(|(i, action)| Action::from_proto(action).at_index("actions", i));
        Ok(Self {
            stage: message.stage.map_or(0, |s| s.value),
            disable_key: message.disable_key.as_str().into(),
            apply_on_stream_done: message.apply_on_stream_done,
            actions: actions.collect::<ConfigResult<_>>()?,
            limit: message.limit.as_ref().map(Limit::from_proto).transpose().at("limit")?,
            hits: None,
            negative: message.hits_addend.as_ref().is_some_and(|h| h.is_negative_hits),
            headers: message.x_ratelimit_option(),
        })
    }

    /// The request's descriptor; none where an action finds nothing, or where its hits make no number.
    fn describe<'a>(&'a self, stream: &'a Stream) -> Option<Descriptor<'a>> {
        let mut entries = SmallVec::new();
        for action in &self.actions {
            match action.make(stream) {
                Made::Entry(key, value) => entries.push((key, value)),
                Made::Skip => {}
                Made::Spoiled => return None,
            }
        }
        let hits = match &self.hits {
            None => None,
            Some(hits) => Some(hits.number(stream)?),
        };
        let limit = self.limit.as_ref().and_then(|limit| limit.get(stream));
        Some(Descriptor { entries, hits, negative: self.negative, limit, headers: self.headers })
    }
}

impl Hits {
    fn from_proto(message: &HitsAddend) -> ConfigResult<Self> {
        match (&message.number, message.format.as_str()) {
            (Some(number), "") => Ok(Self::Fixed(number.value)),
            (None, text) if !text.is_empty() => {
                let format = Formatter::parse(text, &Extensions::NONE).at("format")?;
                if !format.is_one_operator() {
                    let reason = "hits_addend format must contain exactly one substitution";
                    return Err(ConfigError::new(reason).at("format"));
                }
                Ok(Self::Format(format))
            }
            _ => Err(ConfigError::new("hits_addend must contain either a format or a number")),
        }
    }

    fn number(&self, stream: &Stream) -> Option<u64> {
        let format = match self {
            Self::Fixed(number) => return Some(*number),
            Self::Format(format) => format,
        };
        let number: f64 = std::str::from_utf8(&formatted(format, stream)).ok()?.trim().parse().ok()?;
        (0.0..=MAX_HITS).contains(&number).then_some(number as u64)
    }
}

impl Limit {
    fn from_proto(message: &pb::rate_limit::Override) -> ConfigResult<Self> {
        use r#override::OverrideSpecifier as S;
        match message.override_specifier.as_ref() {
            Some(S::DynamicMetadata(m)) => {
                Ok(Self::Metadata(Path::from_proto(m.metadata_key.as_ref()).at("dynamic_metadata")?))
            }
            Some(S::RateLimit(limit)) => Ok(Self::Fixed(limit.requests_per_unit, limit.unit())),
            None => Err(ConfigError::missing("override_specifier")),
        }
    }

    fn get(&self, stream: &Stream) -> Option<(u32, RateLimitUnit)> {
        let path = match self {
            Self::Fixed(requests, unit) => return Some((*requests, *unit)),
            Self::Metadata(path) => path,
        };
        let found = metadata_value(stream.info.dynamic_metadata.as_deref(), &path.filter, &path.keys)?;
        let Some(Kind::StructValue(limit)) = &found.kind else { return None };
        let Some(Kind::NumberValue(requests)) = limit.fields.get("requests_per_unit")?.kind else {
            return None;
        };
        let Some(Kind::StringValue(unit)) = &limit.fields.get("unit")?.kind else { return None };
        Some((requests as u32, RateLimitUnit::from_str_name(unit)?))
    }
}

impl Path {
    fn from_proto(message: Option<&MetadataKey>) -> ConfigResult<Self> {
        let message = message.ok_or_else(|| ConfigError::missing("metadata_key"))?;
        let key = |(i, segment): (usize, &PathSegment)| match &segment.segment {
            Some(Segment::Key(key)) => Ok(key.clone()),
            Some(Segment::Index(_)) => {
                Err(ConfigError::unsupported("this field").at("index").index(i).at("path"))
            }
            None => Err(ConfigError::missing("segment").index(i).at("path")),
        };
        let keys = message.path.iter().enumerate().map(key).collect::<ConfigResult<_>>();
        Ok(Self { filter: message.key.as_str().into(), keys: keys.at("metadata_key")? })
    }

    /// The text at the path; empty where there is none.
    fn text<'a>(&self, metadata: Option<&'a Metadata>) -> &'a [u8] {
        match metadata_value(metadata, &self.filter, &self.keys).and_then(|v| v.kind.as_ref()) {
            Some(Kind::StringValue(text)) => text.as_bytes(),
            _ => b"",
        }
    }

    fn text_of<'a>(&self, stream: &'a Stream, source: act::meta_data::Source) -> Cow<'a, [u8]> {
        use act::meta_data::Source;
        match source {
            Source::Dynamic => self.text(stream.info.dynamic_metadata.as_deref()).into(),
            Source::RouteEntry => self.text(stream.info.route_metadata.as_deref()).into(),
            Source::ClusterEntry => {
                let name = stream.info.cluster.as_deref();
                let cluster = name.and_then(|name| stream.worker.clusters.get(name));
                let metadata = cluster.as_ref().and_then(|c| c.cluster().config().metadata.as_deref());
                self.text(metadata).to_vec().into()
            }
            // No host has been picked yet.
            Source::ClusterLocalityEntry => Cow::Borrowed(b""),
        }
    }
}

fn or(given: &str, default: &str) -> Box<str> {
    if given.is_empty() { default.into() } else { given.into() }
}

fn formatted(format: &Formatter, stream: &Stream) -> Vec<u8> {
    let mut out = Vec::new();
    let context = FormatContext { request: Some(&stream.request), ..FormatContext::new(&stream.info) };
    format.write(&context, &mut out);
    out
}

impl Action {
    #[allow(deprecated)] // `dynamic_metadata` is deprecated; the check of deprecated fields has passed it.
    fn from_proto(message: &ActionMessage) -> ConfigResult<Self> {
        use act::ActionSpecifier as S;
        let specifier =
            message.action_specifier.as_ref().ok_or_else(|| ConfigError::missing("action_specifier"))?;
        Ok(match specifier {
            S::SourceCluster(_) => Self::SourceCluster,
            S::DestinationCluster(_) => Self::DestinationCluster,
            S::RequestHeaders(m) => Self::Header {
                name: as_stored(&HeaderName::new(&m.header_name)).clone(),
                key: m.descriptor_key.as_str().into(),
                skip: m.skip_if_absent,
            },
            S::QueryParameters(m) => Self::Query {
                name: m.query_parameter_name.as_str().into(),
                key: or(&m.descriptor_key, "query_param"),
                skip: m.skip_if_absent,
            },
            S::RemoteAddress(_) => Self::RemoteAddress,
            S::MaskedRemoteAddress(m) => Self::MaskedRemoteAddress {
                v4: m.v4_prefix_mask_len.map_or(32, |l| l.value.min(32) as u8),
                v6: m.v6_prefix_mask_len.map_or(128, |l| l.value.min(128) as u8),
            },
            // Envoy formats these values, and reads their defaults, only behind a switch that is off.
            S::GenericKey(m) => Self::Generic {
                key: or(&m.descriptor_key, "generic_key"),
                value: m.descriptor_value.as_str().into(),
            },
            S::HeaderValueMatch(m) => Self::HeaderMatch {
                key: or(&m.descriptor_key, "header_match"),
                value: m.descriptor_value.as_str().into(),
                expect: m.expect_match.is_none_or(|e| e.value),
                headers: HeaderMatcher::list_from_proto(&m.headers, "headers").at("header_value_match")?,
            },
            S::QueryParameterValueMatch(m) => Self::QueryMatch {
                key: or(&m.descriptor_key, "query_match"),
                value: m.descriptor_value.as_str().into(),
                expect: m.expect_match.is_none_or(|e| e.value),
                query: QueryParameterMatcher::list_from_proto(&m.query_parameters, "query_parameters")
                    .at("query_parameter_value_match")?,
            },
            S::RemoteAddressMatch(m) => Self::address_match(m).at("remote_address_match")?,
            S::DynamicMetadata(m) => Self::Metadata {
                key: m.descriptor_key.as_str().into(),
                path: Path::from_proto(m.metadata_key.as_ref()).at("dynamic_metadata")?,
                source: act::meta_data::Source::Dynamic,
                default: m.default_value.as_str().into(),
                skip: false,
            },
            S::Metadata(m) => Self::Metadata {
                key: m.descriptor_key.as_str().into(),
                path: Path::from_proto(m.metadata_key.as_ref()).at("metadata")?,
                source: m.source(),
                default: m.default_value.as_str().into(),
                skip: m.skip_if_absent,
            },
            S::Extension(extension) => {
                let url = extension.typed_config.as_ref().map_or("", |any| any.type_url.as_str());
                let what = format!("rate limit descriptor extension '{}' ({url})", extension.name);
                return Err(ConfigError::unsupported(what).at("extension"));
            }
        })
    }

    fn address_match(message: &act::RemoteAddressMatch) -> ConfigResult<Self> {
        let addresses =
            message.address_matcher.as_ref().ok_or_else(|| ConfigError::missing("address_matcher"))?;
        let value = Formatter::parse_header_value(&message.descriptor_value, &Extensions::NONE);
        Ok(Self::AddressMatch {
            key: or(&message.descriptor_key, "remote_address_match"),
            value: value.at("descriptor_value")?,
            default: message.default_value.as_str().into(),
            addresses: CidrSet::from_xds(&addresses.ranges, addresses.invert_match).at("address_matcher")?,
        })
    }

    fn make<'a>(&'a self, stream: &'a Stream) -> Made<'a> {
        let path = || stream.request.get(HeaderId::PATH).unwrap_or_default();
        match self {
            Self::SourceCluster => {
                Made::Entry("source_cluster", stream.worker.server.node.cluster.as_bytes().into())
            }
            Self::DestinationCluster => match &stream.info.cluster {
                Some(name) => Made::Entry("destination_cluster", name.as_bytes().into()),
                None => Made::Spoiled,
            },
            Self::Header { name, key, skip } => {
                Made::or_absent(key, stream.request.get_name(name).map(Cow::Borrowed), *skip)
            }
            Self::Query { name, key, skip } => {
                Made::or_absent(key, decoded_query_parameter(path(), name.as_bytes()), *skip)
            }
            Self::RemoteAddress => match stream.info.remote.ip() {
                Some(ip) => Made::Entry("remote_address", ip.to_string().into_bytes().into()),
                None => Made::Spoiled,
            },
            Self::MaskedRemoteAddress { v4, v6 } => {
                let network = stream
                    .info
                    .remote
                    .ip()
                    .and_then(|ip| ipnet::IpNet::new(ip, if ip.is_ipv4() { *v4 } else { *v6 }).ok());
                match network {
                    Some(net) => {
                        Made::Entry("masked_remote_address", net.trunc().to_string().into_bytes().into())
                    }
                    None => Made::Spoiled,
                }
            }
            Self::Generic { key, value } => Made::Entry(key, value.as_bytes().into()),
            Self::HeaderMatch { key, value, expect, headers } => {
                Made::fixed_if(all_headers_match(headers, &stream.request) == *expect, key, value)
            }
            Self::QueryMatch { key, value, expect, query } => {
                let path = path();
                Made::fixed_if(query.iter().all(|q| q.matches_decoded(path)) == *expect, key, value)
            }
            Self::AddressMatch { key, value, default, addresses } => {
                if !stream.info.remote.ip().is_some_and(|ip| addresses.contains(ip)) {
                    return Made::Spoiled;
                }
                let value = match value.as_literal() {
                    Some(literal) => Cow::Borrowed(literal),
                    None => Cow::Owned(formatted(value, stream)),
                };
                Made::or_default(key, value, default, false)
            }
            Self::Metadata { key, path, source, default, skip } => {
                Made::or_default(key, path.text_of(stream, *source), default, *skip)
            }
        }
    }
}

impl<'a> Made<'a> {
    fn or_absent(key: &'a str, value: Option<Cow<'a, [u8]>>, skip: bool) -> Self {
        match value {
            Some(value) => Self::Entry(key, value),
            None if skip => Self::Skip,
            None => Self::Spoiled,
        }
    }

    fn or_default(key: &'a str, value: Cow<'a, [u8]>, default: &'a str, skip: bool) -> Self {
        let value = if value.is_empty() { default.as_bytes().into() } else { value };
        Self::or_absent(key, Some(value).filter(|v| !v.is_empty()), skip)
    }

    fn fixed_if(holds: bool, key: &'a str, value: &'a str) -> Self {
        if holds { Self::Entry(key, value.as_bytes().into()) } else { Self::Spoiled }
    }
}
