//! `RouteMatch`: everything that a route asks of a request.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_match::PathSpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_core::matcher::{
    CookieMatcher, FilterStateMatcher, HeaderMatcher, MetadataMatcher, QueryParameterMatcher, Regex,
    all_headers_match,
};
use sampan_core::runtime::Fraction;

use super::RequestView;
use super::index::PathKey;
use super::template::Template;
use crate::stream::Stream;

/// A path without its query.
pub(crate) fn without_query(path: &[u8]) -> &[u8] {
    path.iter().position(|c| *c == b'?').map_or(path, |at| &path[..at])
}

/// A path without the parameters of its segments: `/a;x=1/b` is `/a/b`.
pub(crate) fn without_parameters(path: &[u8]) -> Cow<'_, [u8]> {
    if !path.contains(&b';') {
        return Cow::Borrowed(path);
    }
    let bare = |segment: &[u8]| segment.split(|c| *c == b';').next().unwrap_or_default().to_vec();
    Cow::Owned(path.split(|c| *c == b'/').map(bare).collect::<Vec<_>>().join(&b'/'))
}

enum Path {
    Prefix(Box<[u8]>),
    Exact(Box<[u8]>),
    Separated(Box<[u8]>),
    Regex(Regex),
    Template(Template),
    Connect,
}

/// The conditions of a route.
pub(crate) struct RouteMatch {
    path: Path,
    ignore_case: bool,
    headers: Vec<HeaderMatcher>,
    query: Vec<QueryParameterMatcher>,
    cookies: Vec<CookieMatcher>,
    grpc: bool,
    tls: Option<(Option<bool>, Option<bool>)>,
    fraction: Option<Fraction>,
    metadata: Vec<MetadataMatcher>,
    filter_state: Vec<FilterStateMatcher>,
}

impl RouteMatch {
    pub(crate) fn from_proto(message: &pb::RouteMatch) -> ConfigResult<Self> {
        let bytes = |s: &str| s.as_bytes().into();
        let path =
            match message.path_specifier.as_ref().ok_or_else(|| ConfigError::missing("path_specifier"))? {
                PathSpecifier::Prefix(p) => Path::Prefix(bytes(p)),
                PathSpecifier::Path(p) => Path::Exact(bytes(p)),
                PathSpecifier::PathSeparatedPrefix(p) => Path::Separated(bytes(p)),
                PathSpecifier::SafeRegex(r) => Path::Regex(Regex::from_proto(r).at("safe_regex")?),
                PathSpecifier::ConnectMatcher(_) => Path::Connect,
                PathSpecifier::PathMatchPolicy(policy) => {
                    Path::Template(Template::matching(policy).at("path_match_policy")?)
                }
            };
        let indexed = |list: ConfigResult<Vec<MetadataMatcher>>| list.at("dynamic_metadata");
        Ok(Self {
            path,
            ignore_case: message.case_sensitive.is_some_and(|c| !c.value),
            headers: HeaderMatcher::list_from_proto(&message.headers, "headers")?,
            query: QueryParameterMatcher::list_from_proto(&message.query_parameters, "query_parameters")?,
            cookies: CookieMatcher::list_from_proto(&message.cookies, "cookies")?,
            grpc: message.grpc.is_some(),
            tls: message
                .tls_context
                .as_ref()
                .map(|t| (t.presented.map(|b| b.value), t.validated.map(|b| b.value))),
            fraction: message.runtime_fraction.as_ref().map(Fraction::from_proto),
            metadata: indexed(message.dynamic_metadata.iter().map(MetadataMatcher::from_proto).collect())?,
            filter_state: message
                .filter_state
                .iter()
                .map(FilterStateMatcher::from_proto)
                .collect::<ConfigResult<_>>()
                .at("filter_state")?,
        })
    }

    pub(super) fn path(&self) -> PathKey<'_> {
        match &self.path {
            _ if self.ignore_case => PathKey::Other,
            Path::Prefix(p) | Path::Separated(p) => PathKey::Prefix(p),
            Path::Exact(p) => PathKey::Exact(p),
            Path::Regex(_) | Path::Template(_) | Path::Connect => PathKey::Other,
        }
    }

    fn starts_with(&self, path: &[u8], prefix: &[u8]) -> bool {
        path.get(..prefix.len()).is_some_and(|start| {
            if self.ignore_case { start.eq_ignore_ascii_case(prefix) } else { start == prefix }
        })
    }

    fn path_matches(&self, path: &[u8], request: &RequestView<'_>) -> bool {
        let connect = request.headers.get(HeaderId::METHOD) == Some(b"CONNECT");
        match &self.path {
            Path::Connect => connect,
            // A CONNECT without a path has nothing that a path condition could read.
            _ if connect && !request.headers.contains(HeaderId::PATH) => false,
            Path::Prefix(p) => self.starts_with(path, p),
            Path::Exact(p) => path.len() == p.len() && self.starts_with(path, p),
            Path::Separated(p) => {
                self.starts_with(path, p) && (path.len() == p.len() || path[p.len()] == b'/')
            }
            Path::Regex(r) => r.matches(path),
            Path::Template(t) => t.matches(path),
        }
    }

    pub(crate) fn matches(&self, path: &[u8], request: &RequestView<'_>) -> bool {
        self.path_matches(path, request) && self.conditions(request)
    }

    fn conditions(&self, request: &RequestView<'_>) -> bool {
        if let Some(fraction) = &self.fraction
            && !fraction.hit(request.runtime, request.random)
        {
            return false;
        }
        if self.grpc && !Stream::is_grpc(request.headers) {
            return false;
        }
        if !all_headers_match(&self.headers, request.headers) {
            return false;
        }
        if !self.query.is_empty() {
            let path = request.headers.get(HeaderId::PATH).unwrap_or_default();
            if !self.query.iter().all(|q| q.matches(path)) {
                return false;
            }
        }
        if !self.cookies.iter().all(|c| c.matches(request.headers)) {
            return false;
        }
        if let Some((presented, validated)) = self.tls {
            let tls = request.info.connection.tls.as_deref();
            let has = tls.is_some_and(|t| t.peer.is_some());
            let valid = tls.is_some_and(|t| t.peer_validated);
            if presented.is_some_and(|p| p != has) || validated.is_some_and(|v| v != valid) {
                return false;
            }
        }
        self.metadata.iter().all(|m| m.matches(request.info.dynamic_metadata.as_deref()))
            && self.filter_state.iter().all(|m| m.matches(request.info.state(m.key()).as_deref()))
    }

    /// How much of the path (without query) the condition consumed; none where parameters that do not count for it
    /// stand within that.
    pub(super) fn matched(&self, path: &[u8]) -> Option<usize> {
        match &self.path {
            Path::Prefix(p) | Path::Separated(p) | Path::Exact(p) => {
                self.starts_with(path, p).then_some(p.len())
            }
            Path::Regex(_) | Path::Template(_) | Path::Connect => Some(path.len()),
        }
    }

    pub(super) fn template(&self) -> Option<&Template> {
        match &self.path {
            Path::Template(t) => Some(t),
            _ => None,
        }
    }
}
