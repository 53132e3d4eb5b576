//! What is done with a request that a route matched.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::{ClusterSpecifier, HostRewriteSpecifier};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::{FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::RegexRewrite;
use sampan_core::runtime::Runtime;
use sampan_core::stream_info::{Metadata, StreamInfo};

use super::hash::HashPolicies;
use super::headers::HeaderMutations;
use super::matching::{RouteMatch, without_query};
use super::mirror::Mirror;
use super::retry::RetryPolicy;
use super::rewrite::TemplateRewrite;
use super::{FilterConfigs, Mutations, Route, RouteContext, metadata, refuse};
use crate::manager::duration;

/// A compiled action.
pub enum Action {
    /// To a cluster.
    Cluster(Box<ClusterAction>),
    /// 3xx with a location.
    Redirect(Box<Redirect>),
    /// A reply from the configuration.
    Direct(Box<DirectResponse>),
    /// `non_forwarding_action`: Envoy answers 404 as for no route.
    None,
}

/// What a route inherits from its virtual host.
pub(super) struct Inherited<'a> {
    pub(super) retry: Option<&'a RetryPolicy>,
    pub(super) mirrors: &'a [Mirror],
    /// `max_direct_response_body_size_bytes`
    pub(super) max_body: usize,
}

/// How the cluster is found.
pub enum ClusterChoice {
    /// By name.
    Name(Arc<str>),
    /// By a request header's value.
    Header(HeaderName),
    /// By weight.
    Weighted {
        /// The clusters.
        clusters: Vec<WeightedCluster>,
        /// The sum of the configured weights.
        total: u64,
        /// `runtime_key_prefix`: weights may be overridden at run time.
        runtime_keys: bool,
        /// `header_name`: the request's own random number.
        random_header: Option<HeaderName>,
        /// `use_hash_policy`: the route's hash takes the place of a random number.
        use_hash: bool,
    },
}

/// One of several clusters.
pub struct WeightedCluster {
    /// The name, or the header that holds it.
    pub cluster: Result<Arc<str>, HeaderName>,
    /// Its weight.
    pub weight: u32,
    runtime_key: Option<Box<str>>,
    pub(super) mutations: Mutations,
    pub(super) filter_configs: FilterConfigs,
    /// `metadata_match`
    pub metadata_match: Option<Arc<Metadata>>,
    host_rewrite: Option<Box<str>>,
}

enum PathRewrite {
    Prefix(Box<[u8]>),
    Regex(RegexRewrite),
    Template(TemplateRewrite),
}

enum HostRewrite {
    Literal(Box<str>),
    Header(HeaderName),
    PathRegex(RegexRewrite),
    /// `auto_host_rewrite`: the name of the host that was picked.
    Auto,
}

/// `max_stream_duration`'s gRPC part.
#[derive(Debug, Clone, Copy, Default)]
pub struct GrpcTimeout {
    /// `grpc_timeout_header_max`; zero is no bound.
    pub max: Option<Duration>,
    /// `grpc_timeout_header_offset`
    pub offset: Option<Duration>,
}

/// Forwarding to a cluster.
pub struct ClusterAction {
    /// Which.
    pub choice: ClusterChoice,
    /// `cluster_not_found_response_code`
    pub not_found: u16,
    path: Option<PathRewrite>,
    host: Option<HostRewrite>,
    append_forwarded_host: bool,
    /// `timeout`; none is no timeout.
    pub timeout: Option<Duration>,
    /// `idle_timeout`; `Some(None)` switches the listener's off.
    pub idle_timeout: Option<Option<Duration>>,
    /// `max_stream_duration.max_stream_duration`; `Some(None)` switches the listener's off.
    pub max_stream_duration: Option<Option<Duration>>,
    /// `max_stream_duration.grpc_timeout_header_*`
    pub grpc_timeout: GrpcTimeout,
    /// Deprecated `max_grpc_timeout` and `grpc_timeout_offset`.
    pub old_grpc_timeout: GrpcTimeout,
    /// When the request is tried again.
    pub retry: RetryPolicy,
    /// Who gets copies.
    pub mirrors: Vec<Mirror>,
    /// `priority`
    pub priority: RoutingPriority,
    /// `metadata_match`
    pub metadata_match: Option<Arc<Metadata>>,
    upgrades: Vec<(Box<str>, bool)>,
    /// `hash_policy`
    pub hash: HashPolicies,
}

/// A redirect.
pub struct Redirect {
    status: u16,
    https: bool,
    scheme: Box<str>,
    host: Box<str>,
    port: u32,
    path: Option<RedirectPath>,
    strip_query: bool,
}

enum RedirectPath {
    Path(Box<str>),
    Prefix(Box<[u8]>),
    Regex(RegexRewrite),
}

/// A direct response.
pub struct DirectResponse {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: Arc<str>,
    /// `body_format`
    pub format: Option<Formatter>,
}

impl Action {
    pub(super) fn from_proto(
        message: &pb::route::Action,
        context: &RouteContext<'_>,
        inherited: &Inherited<'_>,
    ) -> ConfigResult<Self> {
        Ok(match message {
            pb::route::Action::Route(m) => {
                Self::Cluster(Box::new(ClusterAction::from_proto(m, context, inherited).at("route")?))
            }
            pb::route::Action::Redirect(m) => {
                Self::Redirect(Box::new(Redirect::from_proto(m).at("redirect")?))
            }
            pb::route::Action::DirectResponse(m) => Self::Direct(Box::new(
                DirectResponse::from_proto(m, inherited.max_body).at("direct_response")?,
            )),
            pb::route::Action::FilterAction(_) => return Err(ConfigError::unsupported("filter_action")),
            pb::route::Action::NonForwardingAction(_) => Self::None,
        })
    }

    /// The forwarding, if it is one.
    pub fn cluster(&self) -> Option<&ClusterAction> {
        match self {
            Self::Cluster(action) => Some(action),
            _ => None,
        }
    }
}

impl DirectResponse {
    fn from_proto(message: &pb::DirectResponseAction, max_body: usize) -> ConfigResult<Self> {
        let body = match &message.body {
            Some(source) => sampan_core::format::read_source(source).at("body")?,
            None => String::new(),
        };
        if body.len() > max_body {
            let reason = format!("response body size is {} bytes; maximum is {max_body}", body.len());
            return Err(ConfigError::new(reason).at("body"));
        }
        Ok(Self {
            status: message.status as u16,
            body: body.into(),
            format: message.body_format.as_ref().map(Formatter::from_proto).transpose().at("body_format")?,
        })
    }
}

impl WeightedCluster {
    fn from_proto(
        message: &pb::weighted_cluster::ClusterWeight,
        prefix: &str,
        context: &RouteContext<'_>,
    ) -> ConfigResult<Self> {
        let cluster = if message.name.is_empty() {
            if message.cluster_header.is_empty() {
                return Err(ConfigError::new("At least one of name or cluster_header need to be specified"));
            }
            Err(HeaderName::new(&message.cluster_header))
        } else {
            if !message.cluster_header.is_empty() {
                return Err(ConfigError::new("Only one of name or cluster_header can be specified"));
            }
            context.check_cluster(&message.name).at("name")?;
            Ok(message.name.as_str().into())
        };
        Ok(Self {
            cluster,
            weight: message.weight.ok_or_else(|| ConfigError::missing("weight"))?.value,
            runtime_key: (!prefix.is_empty()).then(|| format!("{prefix}.{}", message.name).into()),
            mutations: Mutations {
                request: HeaderMutations::new(
                    &message.request_headers_to_add,
                    &message.request_headers_to_remove,
                    "request",
                )?,
                response: HeaderMutations::new(
                    &message.response_headers_to_add,
                    &message.response_headers_to_remove,
                    "response",
                )?,
            },
            filter_configs: FilterConfigs::from_proto(&message.typed_per_filter_config, context)?,
            metadata_match: metadata(message.metadata_match.as_ref()),
            host_rewrite: message.host_rewrite_specifier.as_ref().map(|h| {
                let pb::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host) = h;
                host.as_str().into()
            }),
        })
    }
}

impl ClusterAction {
    fn from_proto(
        message: &pb::RouteAction,
        context: &RouteContext<'_>,
        inherited: &Inherited<'_>,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let retry = match &message.retry_policy {
            Some(policy) => RetryPolicy::from_proto(policy).at("retry_policy")?,
            None => inherited.retry.cloned().unwrap_or_default(),
        };
        let mirrors = if message.request_mirror_policies.is_empty() {
            inherited.mirrors.to_vec()
        } else {
            Mirror::list(&message.request_mirror_policies)?
        };
        for (i, mirror) in mirrors.iter().enumerate() {
            mirror.check_cluster(context).at_index("request_mirror_policies", i)?;
        }
        let or_off = |d: Option<Duration>| d.map(|d| Some(d).filter(|d| !d.is_zero()));
        let max = message.max_stream_duration.as_ref();
        Self {
            choice: choice(message, context)?,
            not_found: match message.cluster_not_found_response_code() {
                pb::route_action::ClusterNotFoundResponseCode::ServiceUnavailable => 503,
                pb::route_action::ClusterNotFoundResponseCode::NotFound => 404,
                pb::route_action::ClusterNotFoundResponseCode::InternalServerError => 500,
            },
            path: None,
            host: host_rewrite(message)?,
            append_forwarded_host: message.append_x_forwarded_host,
            timeout: Some(message.timeout.as_ref().map_or(Duration::from_secs(15), duration))
                .filter(|d| !d.is_zero()),
            idle_timeout: or_off(message.idle_timeout.as_ref().map(duration)),
            max_stream_duration: or_off(max.and_then(|m| m.max_stream_duration.as_ref()).map(duration)),
            grpc_timeout: GrpcTimeout {
                max: max.and_then(|m| m.grpc_timeout_header_max.as_ref()).map(duration),
                offset: max.and_then(|m| m.grpc_timeout_header_offset.as_ref()).map(duration),
            },
            old_grpc_timeout: old_grpc_timeout(message),
            retry,
            mirrors,
            priority: message.priority(),
            metadata_match: metadata(message.metadata_match.as_ref()),
            upgrades: upgrades(message)?,
            hash: HashPolicies::from_proto(&message.hash_policy)?,
        }
        .with_path_rewrite(message)
    }

    fn with_path_rewrite(mut self, message: &pb::RouteAction) -> ConfigResult<Self> {
        if !message.prefix_rewrite.is_empty() {
            self.path = Some(PathRewrite::Prefix(message.prefix_rewrite.as_bytes().into()));
        }
        if let Some(regex) = &message.regex_rewrite {
            if self.path.is_some() {
                return Err(ConfigError::new(
                    "Specify only one of prefix_rewrite, regex_rewrite or path_rewrite_policy",
                ));
            }
            self.path = Some(PathRewrite::Regex(RegexRewrite::from_proto(regex).at("regex_rewrite")?));
        }
        Ok(self)
    }

    /// The template rewrite, which needs the route's match.
    pub(super) fn bind(&mut self, message: &pb::RouteAction, matching: &RouteMatch) -> ConfigResult<()> {
        if let Some(policy) = &message.path_rewrite_policy {
            if self.path.is_some() {
                return Err(ConfigError::new(
                    "Specify only one of prefix_rewrite, regex_rewrite or path_rewrite_policy",
                ));
            }
            let rewrite =
                TemplateRewrite::rewriting(policy, matching.template()).at("path_rewrite_policy")?;
            self.path = Some(PathRewrite::Template(rewrite));
        }
        Ok(())
    }

    /// Whether the route says that an upgrade is allowed; none where it says nothing.
    pub fn upgrade_enabled(&self, upgrade: &str) -> Option<bool> {
        self.upgrades.iter().find(|(name, _)| &**name == upgrade).map(|(_, enabled)| *enabled)
    }

    /// Picks a weighted cluster; its index, none where there is nothing to pick from.
    pub fn pick(
        &self,
        random: impl FnOnce() -> u64,
        headers: &HeaderMap,
        info: &StreamInfo,
        runtime: &Runtime,
    ) -> Option<u32> {
        let ClusterChoice::Weighted { clusters, total, runtime_keys, random_header, use_hash } = &self.choice
        else {
            return None;
        };
        let given = random_header.as_ref().and_then(|name| headers.get_name(name));
        let given = given.and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
        let hash = || if *use_hash { self.hash.hash(headers, info, None) } else { None };
        let random = given.or_else(hash).unwrap_or_else(random);
        let weight = |c: &WeightedCluster| match &c.runtime_key {
            Some(key) => runtime.integer(key, c.weight.into()),
            None => c.weight.into(),
        };
        let total = if *runtime_keys { clusters.iter().map(weight).sum() } else { *total };
        if total == 0 {
            return None;
        }
        let mut at = random % total;
        for (i, cluster) in clusters.iter().enumerate() {
            let weight = weight(cluster);
            if at < weight {
                return Some(i as u32);
            }
            at -= weight;
        }
        None
    }

    /// The weighted cluster of an index.
    pub fn weighted(&self, index: u32) -> Option<&WeightedCluster> {
        match &self.choice {
            ClusterChoice::Weighted { clusters, .. } => clusters.get(index as usize),
            _ => None,
        }
    }

    /// The name of the cluster for this request.
    pub fn cluster_name(&self, weighted: Option<u32>, headers: &HeaderMap) -> Option<Arc<str>> {
        let by_header = |name: &HeaderName| {
            headers.get_name(name).and_then(|v| std::str::from_utf8(v).ok()).map(Arc::from)
        };
        match &self.choice {
            ClusterChoice::Name(name) => Some(name.clone()),
            ClusterChoice::Header(name) => by_header(name),
            ClusterChoice::Weighted { .. } => match &self.weighted(weighted?)?.cluster {
                Ok(name) => Some(name.clone()),
                Err(header) => by_header(header),
            },
        }
    }

    /// Whether the host becomes the name of the upstream host that was picked.
    pub fn auto_host_rewrite(&self) -> bool {
        matches!(self.host, Some(HostRewrite::Auto))
    }

    /// Sets the host, keeping the old one where the configuration says so.
    pub fn set_host(&self, headers: &mut HeaderMap, host: &[u8], keep_original: bool) {
        let old = headers.get(HeaderId::AUTHORITY).filter(|old| !old.is_empty());
        if let Some(old) = old.filter(|_| keep_original || self.append_forwarded_host).map(<[u8]>::to_vec) {
            if keep_original {
                headers.set(HeaderId::X_ENVOY_ORIGINAL_HOST, &old);
            }
            let named = headers.get(HeaderId::X_FORWARDED_HOST).and_then(|v| v.rsplit(|c| *c == b',').next());
            if self.append_forwarded_host && named.map(<[u8]>::trim_ascii) != Some(&*old) {
                headers.append_to_value(HeaderId::X_FORWARDED_HOST, ",", &old);
            }
        }
        headers.set(HeaderId::AUTHORITY, host);
    }

    /// Rewrites path and host.
    pub fn rewrite(
        &self,
        route: &Route,
        weighted: Option<u32>,
        headers: &mut HeaderMap,
        keep_original: bool,
    ) {
        if let Some(host) = self.new_host(weighted, headers) {
            self.set_host(headers, &host, keep_original);
        }
        let Some(rewrite) = &self.path else { return };
        let Some(path) = headers.get(HeaderId::PATH) else { return };
        let just_path = without_query(path);
        let query = &path[just_path.len()..];
        let new = match rewrite {
            PathRewrite::Prefix(prefix) => {
                Some([prefix, &just_path[route.matched(just_path).len()..]].concat())
            }
            PathRewrite::Regex(regex) => regex.replace(just_path),
            PathRewrite::Template(rewrite) => {
                route.matching.template().and_then(|template| rewrite.rewrite(template, just_path))
            }
        };
        let Some(mut new) = new else { return };
        new.extend_from_slice(query);
        if keep_original {
            let old = path.to_vec();
            headers.set(HeaderId::X_ENVOY_ORIGINAL_PATH, old);
        }
        headers.set(HeaderId::PATH, new);
    }

    fn new_host<'h>(&'h self, weighted: Option<u32>, headers: &'h HeaderMap) -> Option<Vec<u8>> {
        if let Some(host) = weighted.and_then(|i| self.weighted(i)).and_then(|w| w.host_rewrite.as_deref()) {
            return Some(host.as_bytes().to_vec());
        }
        match self.host.as_ref()? {
            HostRewrite::Literal(host) => Some(host.as_bytes().to_vec()),
            HostRewrite::Header(name) => headers.get_name(name).filter(|v| !v.is_empty()).map(<[u8]>::to_vec),
            HostRewrite::PathRegex(regex) => {
                let path = without_query(headers.get(HeaderId::PATH)?);
                regex.replace(path).or_else(|| Some(path.to_vec()))
            }
            HostRewrite::Auto => None,
        }
    }
}

#[allow(deprecated)] // Deprecated fields that Envoy 1.40 still knows are refused by name.
fn refuse_unsupported(message: &pb::RouteAction) -> ConfigResult<()> {
    refuse(!message.path_rewrite.is_empty(), "path_rewrite")?;
    refuse(message.flush_timeout.is_some(), "flush_timeout")?;
    early_data(message).at("early_data_policy")?;
    refuse(message.retry_policy_typed_config.is_some(), "retry_policy_typed_config")?;
    refuse(!message.rate_limits.is_empty(), "rate_limits")?;
    refuse(message.cors.is_some(), "cors")?;
    refuse(message.internal_redirect_policy.is_some(), "internal_redirect_policy")?;
    refuse(message.internal_redirect_action != 0, "internal_redirect_action")?;
    hedging(message.hedge_policy.as_ref())?;
    refuse(
        message.upgrade_configs.iter().any(|u| u.connect_config.is_some()),
        "upgrade_configs.connect_config",
    )
}

/// Hedging is not done; a policy that asks for none is nothing.
pub(super) fn hedging(policy: Option<&pb::HedgePolicy>) -> ConfigResult<()> {
    refuse(policy.is_some_and(|p| p.hedge_on_per_try_timeout), "hedge_policy.hedge_on_per_try_timeout")
}

/// Early data only goes out over HTTP/3: Envoy's own policy has no effect without it.
fn early_data(message: &pb::RouteAction) -> ConfigResult<()> {
    let Some(policy) = &message.early_data_policy else { return Ok(()) };
    let any = policy.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
    match crate::filter::message_name(any) {
        "envoy.extensions.early_data.v3.DefaultEarlyDataPolicy" => Ok(()),
        _ => Err(ConfigError::unsupported(format!("early data policy {:?}", any.type_url))),
    }
}

fn upgrades(message: &pb::RouteAction) -> ConfigResult<Vec<(Box<str>, bool)>> {
    let mut all: Vec<(Box<str>, bool)> = Vec::with_capacity(message.upgrade_configs.len());
    for (i, upgrade) in message.upgrade_configs.iter().enumerate() {
        let name = upgrade.upgrade_type.to_ascii_lowercase().into_boxed_str();
        if all.iter().any(|(other, _)| *other == name) {
            let reason = format!("Duplicate upgrade {}", upgrade.upgrade_type);
            return Err(ConfigError::new(reason).index(i).at("upgrade_configs"));
        }
        all.push((name, upgrade.enabled.is_none_or(|e| e.value)));
    }
    Ok(all)
}

#[allow(deprecated)] // `max_grpc_timeout` is deprecated and still taken.
fn old_grpc_timeout(message: &pb::RouteAction) -> GrpcTimeout {
    GrpcTimeout {
        max: message.max_grpc_timeout.as_ref().map(duration),
        offset: message.grpc_timeout_offset.as_ref().map(duration),
    }
}

fn host_rewrite(message: &pb::RouteAction) -> ConfigResult<Option<HostRewrite>> {
    Ok(match &message.host_rewrite_specifier {
        None => None,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            Some(HostRewrite::Literal(host.as_str().into()))
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(on)) => on.value.then_some(HostRewrite::Auto),
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
            Some(HostRewrite::Header(HeaderName::new(name)))
        }
        Some(HostRewriteSpecifier::HostRewritePathRegex(regex)) => {
            Some(HostRewrite::PathRegex(RegexRewrite::from_proto(regex).at("host_rewrite_path_regex")?))
        }
        Some(HostRewriteSpecifier::HostRewrite(_)) => {
            return Err(ConfigError::unsupported("host_rewrite").at("host_rewrite"));
        }
    })
}

fn choice(message: &pb::RouteAction, context: &RouteContext<'_>) -> ConfigResult<ClusterChoice> {
    match message.cluster_specifier.as_ref().ok_or_else(|| ConfigError::missing("cluster_specifier"))? {
        ClusterSpecifier::Cluster(name) => {
            context.check_cluster(name).at("cluster")?;
            Ok(ClusterChoice::Name(name.as_str().into()))
        }
        ClusterSpecifier::ClusterHeader(name) => Ok(ClusterChoice::Header(HeaderName::new(name))),
        ClusterSpecifier::WeightedClusters(message) => weighted(message, context).at("weighted_clusters"),
        ClusterSpecifier::ClusterSpecifierPlugin(_) => {
            Err(ConfigError::unsupported("cluster_specifier_plugin").at("cluster_specifier_plugin"))
        }
        ClusterSpecifier::InlineClusterSpecifierPlugin(_) => {
            Err(ConfigError::unsupported("inline_cluster_specifier_plugin")
                .at("inline_cluster_specifier_plugin"))
        }
    }
}

#[allow(deprecated)] // `total_weight` is deprecated and still checked.
fn weighted(message: &pb::WeightedCluster, context: &RouteContext<'_>) -> ConfigResult<ClusterChoice> {
    use pb::weighted_cluster::RandomValueSpecifier;
    let random_header = match &message.random_value_specifier {
        None => None,
        Some(RandomValueSpecifier::HeaderName(name)) => Some(HeaderName::new(name)),
        Some(RandomValueSpecifier::UseHashPolicy(_)) => None,
    };
    let mut clusters = Vec::with_capacity(message.clusters.len());
    for (i, cluster) in message.clusters.iter().enumerate() {
        let cluster = WeightedCluster::from_proto(cluster, &message.runtime_key_prefix, context);
        clusters.push(cluster.at_index("clusters", i)?);
    }
    let total: u64 = clusters.iter().map(|c| u64::from(c.weight)).sum();
    if total > u64::from(u32::MAX) {
        return Err(ConfigError::new(format!(
            "The sum of weights of all weighted clusters exceeds {}",
            u32::MAX
        )));
    }
    if total == 0 {
        return Err(ConfigError::new("Sum of weights in the weighted_cluster must be greater than 0."));
    }
    let runtime_keys = !message.runtime_key_prefix.is_empty();
    let use_hash = matches!(
        &message.random_value_specifier,
        Some(RandomValueSpecifier::UseHashPolicy(hash)) if hash.value
    );
    Ok(ClusterChoice::Weighted { clusters, total, runtime_keys, random_header, use_hash })
}

impl Redirect {
    /// The redirect that `require_tls` means.
    pub fn to_https() -> Self {
        Self {
            status: 301,
            https: true,
            scheme: "".into(),
            host: "".into(),
            port: 0,
            path: None,
            strip_query: false,
        }
    }

    /// No redirect at all: where the request already is.
    pub fn to_here() -> Self {
        Self { https: false, ..Self::to_https() }
    }

    fn from_proto(message: &pb::RedirectAction) -> ConfigResult<Self> {
        use pb::redirect_action::{
            PathRewriteSpecifier, RedirectResponseCode as Code, SchemeRewriteSpecifier,
        };
        let (https, scheme) = match &message.scheme_rewrite_specifier {
            Some(SchemeRewriteSpecifier::HttpsRedirect(https)) => (*https, ""),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => (false, scheme.as_str()),
            None => (false, ""),
        };
        Ok(Self {
            status: match message.response_code() {
                Code::MovedPermanently => 301,
                Code::Found => 302,
                Code::SeeOther => 303,
                Code::TemporaryRedirect => 307,
                Code::PermanentRedirect => 308,
            },
            https,
            scheme: scheme.into(),
            host: message.host_redirect.as_str().into(),
            port: message.port_redirect,
            path: match &message.path_rewrite_specifier {
                None => None,
                Some(PathRewriteSpecifier::PathRedirect(p)) => Some(RedirectPath::Path(p.as_str().into())),
                Some(PathRewriteSpecifier::PrefixRewrite(p)) => {
                    Some(RedirectPath::Prefix(p.as_bytes().into()))
                }
                Some(PathRewriteSpecifier::PathRewrite(_)) => {
                    return Err(ConfigError::unsupported("path_rewrite").at("path_rewrite"));
                }
                Some(PathRewriteSpecifier::RegexRewrite(r)) => {
                    Some(RedirectPath::Regex(RegexRewrite::from_proto(r).at("regex_rewrite")?))
                }
            },
            strip_query: message.strip_query,
        })
    }

    /// The status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Where to.
    pub fn location(&self, route: Option<&Route>, headers: &HeaderMap) -> Vec<u8> {
        let scheme_now = headers.get(HeaderId::SCHEME).unwrap_or(b"http");
        let scheme: &[u8] = if self.https {
            b"https"
        } else if self.scheme.is_empty() {
            scheme_now
        } else {
            self.scheme.as_bytes()
        };
        let host = self.authority(scheme_now, scheme, headers.get(HeaderId::AUTHORITY).unwrap_or_default());
        let path = headers.get(HeaderId::PATH).unwrap_or_default();
        let just_path = without_query(path);
        let query = if self.strip_query { b"" } else { &path[just_path.len()..] };
        let path = match &self.path {
            None => Cow::Owned([just_path, query].concat()),
            // A query of the configuration stays; the request's goes behind a path that has none.
            Some(RedirectPath::Path(p)) if p.contains('?') => Cow::Borrowed(p.as_bytes()),
            Some(RedirectPath::Path(p)) => Cow::Owned([p.as_bytes(), query].concat()),
            Some(RedirectPath::Prefix(p)) => {
                let matched = route.map_or(0, |r| r.matched(just_path).len());
                Cow::Owned([p, &just_path[matched..], query].concat())
            }
            Some(RedirectPath::Regex(r)) => {
                let new = r.replace(just_path).unwrap_or_else(|| just_path.to_vec());
                Cow::Owned([&new, query].concat())
            }
        };
        [scheme, b"://", &host, &path].concat()
    }

    fn authority(&self, scheme_now: &[u8], scheme: &[u8], host: &[u8]) -> Vec<u8> {
        let mut host = if self.host.is_empty() { host.to_vec() } else { self.host.as_bytes().to_vec() };
        if self.port > 0 {
            let name = crate::manager::split_port(&host).0.to_vec();
            host = [name, format!(":{}", self.port).into_bytes()].concat();
        } else if scheme_now != scheme {
            // The old scheme's default port is not the new one's.
            let (name, port) = crate::manager::split_port(&host);
            let default: &[u8] = if scheme_now == b"https" { b"443" } else { b"80" };
            if port == Some(default) {
                host = name.to_vec();
            }
        }
        host
    }
}

impl DirectResponse {
    /// The body for a request.
    pub fn body(&self, context: &FormatContext<'_>) -> Cow<'static, str> {
        match &self.format {
            None => Cow::Owned((*self.body).to_owned()),
            Some(format) => {
                let mut out = Vec::new();
                format.write(&FormatContext { local_reply_body: self.body.as_bytes(), ..*context }, &mut out);
                Cow::Owned(String::from_utf8_lossy(&out).into_owned())
            }
        }
    }
}
