//! Permissions and principals: one tree, since they share most of their leaves.

use std::ops::Range;

use envoy_types::pb::envoy::config::core::v3::CidrRange as ProtoRange;
use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use pb::permission::Rule as Permission;
use pb::principal::Identifier as Principal;

use super::{Facts, ParseTemplate, PathTest};
use crate::Address;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::matcher::{
    CidrRange, FilterStateMatcher, HeaderMatcher, MetadataMatcher, PathMatcher, StringMatcher,
};

/// A condition.
pub(super) enum Rule {
    Any,
    All(Vec<Rule>),
    OneOf(Vec<Rule>),
    Not(Box<Rule>),
    Header(HeaderMatcher),
    Path(PathMatcher),
    Template(PathTest),
    Ip(Side, CidrRange),
    /// Of the local address.
    Ports(Range<u32>),
    DynamicMetadata(MetadataMatcher),
    RouteMetadata(MetadataMatcher),
    ServerName(StringMatcher),
    /// Over TLS, and where there is a matcher, under a name that it takes.
    Authenticated(Option<StringMatcher>),
    State(FilterStateMatcher),
}

/// Which address of a connection.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Local,
    /// The connection's, whatever a request's `x-forwarded-for` says.
    Connection,
    /// The socket's, whatever the PROXY protocol says.
    Direct,
    /// The stream's.
    Remote,
}

fn list<M>(messages: &[M], field: &str, parse: impl Fn(&M) -> ConfigResult<Rule>) -> ConfigResult<Vec<Rule>> {
    if messages.is_empty() {
        return Err(ConfigError::new("value must contain at least 1 item(s)").at(field));
    }
    messages.iter().enumerate().map(|(i, m)| parse(m).at_index(field, i)).collect()
}

fn any(is: bool) -> ConfigResult<Rule> {
    if is { Ok(Rule::Any) } else { Err(ConfigError::new("value must equal true").at("any")) }
}

fn address(side: Side, range: &ProtoRange, field: &str) -> ConfigResult<Rule> {
    Ok(Rule::Ip(side, CidrRange::from_proto(range).at(field)?))
}

fn port_range(range: Int32Range) -> ConfigResult<Rule> {
    let bound = |value: i32, what: &str| {
        let value = u32::try_from(value).ok().filter(|v| *v <= 65536);
        value.ok_or_else(|| ConfigError::new(format!("range {what} is out of bounds")))
    };
    let (start, end) = (bound(range.start, "start")?, bound(range.end, "end")?);
    if start >= end {
        let why = format!("range start {start} cannot be greater or equal than range end {end}");
        return Err(ConfigError::new(why));
    }
    Ok(Rule::Ports(start..end))
}

fn sourced(message: &pb::SourcedMetadata) -> ConfigResult<Rule> {
    let matcher =
        message.metadata_matcher.as_ref().ok_or_else(|| ConfigError::missing("metadata_matcher"))?;
    let matcher = MetadataMatcher::from_proto(matcher).at("metadata_matcher")?;
    match pb::MetadataSource::try_from(message.metadata_source) {
        Ok(pb::MetadataSource::Dynamic) => Ok(Rule::DynamicMetadata(matcher)),
        Ok(pb::MetadataSource::Route) => Ok(Rule::RouteMetadata(matcher)),
        Err(_) => Err(ConfigError::new("value must be one of the defined enum values").at("metadata_source")),
    }
}

impl Rule {
    #[allow(deprecated)] // Fields that Envoy 1.40 still takes.
    pub(super) fn permission(
        message: &pb::Permission,
        template: Option<ParseTemplate>,
    ) -> ConfigResult<Self> {
        let rule = message.rule.as_ref().ok_or_else(|| ConfigError::missing("rule"))?;
        let all = |set: &pb::permission::Set| list(&set.rules, "rules", |m| Self::permission(m, template));
        Ok(match rule {
            Permission::AndRules(set) => Self::All(all(set).at("and_rules")?),
            Permission::OrRules(set) => Self::OneOf(all(set).at("or_rules")?),
            Permission::NotRule(not) => Self::Not(Box::new(Self::permission(not, template).at("not_rule")?)),
            Permission::Any(is) => any(*is)?,
            Permission::Header(m) => Self::Header(HeaderMatcher::from_proto(m).at("header")?),
            Permission::UrlPath(m) => Self::Path(PathMatcher::from_proto(m).at("url_path")?),
            Permission::DestinationIp(range) => address(Side::Local, range, "destination_ip")?,
            Permission::DestinationPort(port) => Self::Ports(*port..port.saturating_add(1)),
            Permission::DestinationPortRange(range) => port_range(*range).at("destination_port_range")?,
            Permission::Metadata(m) => Self::DynamicMetadata(MetadataMatcher::from_proto(m).at("metadata")?),
            Permission::SourcedMetadata(m) => sourced(m).at("sourced_metadata")?,
            Permission::RequestedServerName(m) => {
                Self::ServerName(StringMatcher::from_proto(m).at("requested_server_name")?)
            }
            Permission::UriTemplate(config) => match template {
                Some(parse) => Self::Template(parse(config).at("uri_template")?),
                None => return Err(ConfigError::unsupported("a path template here").at("uri_template")),
            },
            Permission::Matcher(config) => {
                let what = format!("RBAC matcher '{}'", config.name);
                return Err(ConfigError::unsupported(what).at("matcher"));
            }
        })
    }

    #[allow(deprecated)] // Fields that Envoy 1.40 still takes.
    pub(super) fn principal(message: &pb::Principal) -> ConfigResult<Self> {
        let identifier = message.identifier.as_ref().ok_or_else(|| ConfigError::missing("identifier"))?;
        let all = |set: &pb::principal::Set| list(&set.ids, "ids", Self::principal);
        Ok(match identifier {
            Principal::AndIds(set) => Self::All(all(set).at("and_ids")?),
            Principal::OrIds(set) => Self::OneOf(all(set).at("or_ids")?),
            Principal::NotId(not) => Self::Not(Box::new(Self::principal(not).at("not_id")?)),
            Principal::Any(is) => any(*is)?,
            Principal::Authenticated(m) => {
                let name = m.principal_name.as_ref().map(StringMatcher::from_proto).transpose();
                Self::Authenticated(name.at("principal_name").at("authenticated")?)
            }
            Principal::SourceIp(range) => address(Side::Connection, range, "source_ip")?,
            Principal::DirectRemoteIp(range) => address(Side::Direct, range, "direct_remote_ip")?,
            Principal::RemoteIp(range) => address(Side::Remote, range, "remote_ip")?,
            Principal::Header(m) => Self::Header(HeaderMatcher::from_proto(m).at("header")?),
            Principal::UrlPath(m) => Self::Path(PathMatcher::from_proto(m).at("url_path")?),
            Principal::Metadata(m) => Self::DynamicMetadata(MetadataMatcher::from_proto(m).at("metadata")?),
            Principal::SourcedMetadata(m) => sourced(m).at("sourced_metadata")?,
            Principal::FilterState(m) => Self::State(FilterStateMatcher::from_proto(m).at("filter_state")?),
            Principal::Custom(config) => {
                let what = format!("RBAC principal '{}'", config.name);
                return Err(ConfigError::unsupported(what).at("custom"));
            }
        })
    }

    pub(super) fn matches(&self, facts: Facts<'_>) -> bool {
        let Facts { headers, info, route, .. } = facts;
        match self {
            Self::Any => true,
            Self::All(rules) => rules.iter().all(|rule| rule.matches(facts)),
            Self::OneOf(rules) => rules.iter().any(|rule| rule.matches(facts)),
            Self::Not(rule) => !rule.matches(facts),
            Self::Header(matcher) => matcher.matches(headers),
            Self::Path(matcher) => facts.path().is_some_and(|path| matcher.matches(path)),
            Self::Template(test) => test(facts.path().unwrap_or_default()),
            Self::Ip(side, range) => side.of(facts).ip().is_some_and(|ip| range.contains(ip)),
            Self::Ports(range) => {
                info.connection.local.port().is_some_and(|port| range.contains(&u32::from(port)))
            }
            Self::DynamicMetadata(matcher) => matcher.matches(info.dynamic_metadata.as_deref()),
            // Without a route nothing is known of its metadata, and nothing said about it holds.
            Self::RouteMetadata(matcher) => route && matcher.matches(info.route_metadata.as_deref()),
            Self::ServerName(matcher) => {
                matcher.matches(info.connection.requested_server_name.as_deref().unwrap_or_default())
            }
            Self::Authenticated(name) => match (&info.connection.tls, name) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(tls), Some(name)) => match &tls.peer {
                    // A peer without a certificate has an empty subject.
                    None => name.matches(""),
                    Some(peer) => {
                        let sans = peer.uri_sans.iter().chain(&peer.dns_sans);
                        sans.chain([&peer.subject]).any(|san| name.matches(san))
                    }
                },
            },
            Self::State(matcher) => matcher.matches(info.state(matcher.key()).as_deref()),
        }
    }
}

impl Side {
    fn of(self, facts: Facts<'_>) -> &Address {
        let info = facts.info;
        match self {
            Self::Local => &info.connection.local,
            Self::Connection => &info.connection.remote,
            Self::Direct => &info.connection.direct_remote,
            Self::Remote => &info.remote,
        }
    }
}
