//! Forwarding to a cluster: everything that a `RouteAction` says.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::runtime::Runtime;
use sampan_core::stream_info::{Metadata, StreamInfo};

use super::action::Inherited;
use super::connect::ConnectConfig;
use super::hash::HashPolicies;
use super::internal_redirect::InternalRedirects;
use super::matching::RouteMatch;
use super::mirror::Mirror;
use super::rate_limit::RateLimits;
use super::retry::RetryPolicy;
use super::rewrite::{HostRewrite, PathRewrite};
use super::weighted::{ClusterChoice, WeightedCluster};
use super::{Route, RouteContext, metadata, refuse};
use crate::filters::cors::Policy as CorsPolicy;
use crate::manager::duration;

/// `max_stream_duration`: how long a whole stream may take, and what `grpc-timeout` means for it.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamDuration {
    /// `max_stream_duration`; zero switches the listener's off.
    pub max: Option<Duration>,
    /// `grpc_timeout_header_max`: the header counts, up to this; zero is no bound.
    pub header_max: Option<Duration>,
    /// `grpc_timeout_header_offset`
    pub header_offset: Option<Duration>,
}

/// The deprecated `max_grpc_timeout` and `grpc_timeout_offset`.
#[derive(Debug, Clone, Copy, Default)]
pub struct GrpcTimeout {
    /// The header counts, up to this; zero is no bound.
    pub max: Option<Duration>,
    /// What is taken off it.
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
    /// `flush_timeout`; likewise.
    pub flush_timeout: Option<Option<Duration>>,
    /// `max_stream_duration`; where it is set, `timeout` counts for nothing.
    pub stream_duration: Option<StreamDuration>,
    /// Deprecated `max_grpc_timeout` and `grpc_timeout_offset`.
    pub old_grpc_timeout: GrpcTimeout,
    /// When the request is tried again.
    pub retry: RetryPolicy,
    /// Redirects that are followed here.
    pub redirects: Option<Box<InternalRedirects>>,
    /// Who gets copies.
    pub mirrors: Vec<Mirror>,
    /// `priority`
    pub priority: RoutingPriority,
    /// `metadata_match`
    pub metadata_match: Option<Arc<Metadata>>,
    upgrades: Vec<(Box<str>, bool)>,
    connect: Option<ConnectConfig>,
    /// `hash_policy`
    pub hash: HashPolicies,
    /// `rate_limits`
    pub rate_limits: RateLimits,
    /// `include_vh_rate_limits`
    pub include_host_rate_limits: bool,
    /// `hedge_policy.hedge_on_per_try_timeout`; its other fields do nothing in Envoy either.
    pub hedge_on_per_try_timeout: bool,
    /// The deprecated `cors`.
    pub(crate) cors: Option<Arc<CorsPolicy>>,
}

impl ClusterAction {
    #[allow(deprecated)] // `include_vh_rate_limits` and `cors` are deprecated and still taken.
    pub(super) fn from_proto(
        message: &pb::RouteAction,
        matching: &RouteMatch,
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
        let (upgrades, connect) = upgrades(message)?;
        Ok(Self {
            choice: ClusterChoice::from_proto(message, context)?,
            not_found: match message.cluster_not_found_response_code() {
                pb::route_action::ClusterNotFoundResponseCode::ServiceUnavailable => 503,
                pb::route_action::ClusterNotFoundResponseCode::NotFound => 404,
                pb::route_action::ClusterNotFoundResponseCode::InternalServerError => 500,
            },
            path: PathRewrite::from_proto(message, matching)?,
            host: HostRewrite::from_proto(message)?,
            append_forwarded_host: message.append_x_forwarded_host,
            timeout: Some(message.timeout.as_ref().map_or(Duration::from_secs(15), duration))
                .filter(|d| !d.is_zero()),
            idle_timeout: or_off(message.idle_timeout.as_ref().map(duration)),
            flush_timeout: or_off(message.flush_timeout.as_ref().map(duration)),
            stream_duration: message.max_stream_duration.as_ref().map(|m| StreamDuration {
                max: m.max_stream_duration.as_ref().map(duration),
                header_max: m.grpc_timeout_header_max.as_ref().map(duration),
                header_offset: m.grpc_timeout_header_offset.as_ref().map(duration),
            }),
            old_grpc_timeout: old_grpc_timeout(message),
            retry,
            redirects: InternalRedirects::from_proto(message)?.map(Box::new),
            mirrors,
            priority: message.priority(),
            metadata_match: metadata(message.metadata_match.as_ref()),
            upgrades,
            connect,
            hash: HashPolicies::from_proto(&message.hash_policy)?,
            rate_limits: RateLimits::of_route(&message.rate_limits)?,
            include_host_rate_limits: message.include_vh_rate_limits.is_some_and(|i| i.value),
            hedge_on_per_try_timeout: match &message.hedge_policy {
                Some(policy) => policy.hedge_on_per_try_timeout,
                None => inherited.hedge,
            },
            cors: message.cors.as_ref().map(CorsPolicy::of_route).transpose().at("cors")?,
        })
    }

    /// Whether the route says that an upgrade is allowed; none where it says nothing.
    pub fn upgrade_enabled(&self, upgrade: &str) -> Option<bool> {
        self.upgrades.iter().find(|(name, _)| &**name == upgrade).map(|(_, enabled)| *enabled)
    }

    /// Where this request's payload goes to its host as raw TCP: how.
    pub fn connect(&self, request: &HeaderMap) -> Option<&ConnectConfig> {
        self.connect.as_ref().filter(|c| c.takes(request.get(HeaderId::METHOD).unwrap_or_default()))
    }

    /// Picks a weighted cluster; its index, none where there is nothing to pick from.
    pub fn pick(
        &self,
        random: impl FnOnce() -> u64,
        headers: &HeaderMap,
        info: &StreamInfo,
        runtime: &Runtime,
    ) -> Option<u32> {
        self.choice.pick(random, || self.hash.hash(headers, info, None), headers, runtime)
    }

    /// The weighted cluster of an index.
    pub fn weighted(&self, index: u32) -> Option<&WeightedCluster> {
        self.choice.weighted(index)
    }

    /// The name of the cluster for this request.
    pub fn cluster_name(&self, weighted: Option<u32>, headers: &HeaderMap) -> Option<Arc<str>> {
        self.choice.name(weighted, headers)
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

    /// Rewrites host, then path.
    pub fn rewrite(&self, route: &Route, headers: &mut HeaderMap, info: &StreamInfo, keep_original: bool) {
        if let Some(host) = self.host.as_ref().and_then(|host| host.rewrite(headers, info)) {
            self.set_host(headers, &host, keep_original);
        }
        let Some(new) = self.path.as_ref().and_then(|p| p.rewrite(&route.matching, headers, info)) else {
            return;
        };
        if keep_original && let Some(old) = headers.get(HeaderId::PATH).map(<[u8]>::to_vec) {
            headers.set(HeaderId::X_ENVOY_ORIGINAL_PATH, old);
        }
        headers.set(HeaderId::PATH, new);
    }
}

#[allow(deprecated)] // Deprecated fields that Envoy 1.40 still knows are refused by name.
fn refuse_unsupported(message: &pb::RouteAction) -> ConfigResult<()> {
    early_data(message).at("early_data_policy")?;
    refuse(message.retry_policy_typed_config.is_some(), "retry_policy_typed_config")
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

/// The upgrades by lower-case type, and how CONNECT is ended here.
#[allow(clippy::type_complexity, reason = "two lists of one message, taken apart by the one caller")]
fn upgrades(message: &pb::RouteAction) -> ConfigResult<(Vec<(Box<str>, bool)>, Option<ConnectConfig>)> {
    let mut all: Vec<(Box<str>, bool)> = Vec::with_capacity(message.upgrade_configs.len());
    let mut connect = None;
    for (i, upgrade) in message.upgrade_configs.iter().enumerate() {
        let name = upgrade.upgrade_type.to_ascii_lowercase().into_boxed_str();
        if all.iter().any(|(other, _)| *other == name) {
            let reason = format!("Duplicate upgrade {}", upgrade.upgrade_type);
            return Err(ConfigError::new(reason).index(i).at("upgrade_configs"));
        }
        all.push((name, upgrade.enabled.is_none_or(|e| e.value)));
        let config = ConnectConfig::from_proto(upgrade).at_index("upgrade_configs", i)?;
        connect = config.or(connect);
    }
    Ok((all, connect))
}

#[allow(deprecated)] // `max_grpc_timeout` is deprecated and still taken.
fn old_grpc_timeout(message: &pb::RouteAction) -> GrpcTimeout {
    GrpcTimeout {
        max: message.max_grpc_timeout.as_ref().map(duration),
        offset: message.grpc_timeout_offset.as_ref().map(duration),
    }
}
