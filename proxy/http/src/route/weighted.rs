//! Which cluster a route forwards to: one by name, one that a header names, one of several by weight.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use pb::route_action::ClusterSpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::runtime::Runtime;
use sampan_core::stream_info::Metadata;

use super::{FilterConfigs, Mutations, RouteContext, metadata};

/// How the cluster is found.
pub enum ClusterChoice {
    /// There is none: the route was not made to forward.
    None,
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
    /// `host_rewrite_literal`
    pub(super) host_rewrite: Option<Box<str>>,
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
            mutations: Mutations::of(message)?,
            filter_configs: FilterConfigs::from_proto(&message.typed_per_filter_config, context)?,
            metadata_match: metadata(message.metadata_match.as_ref()),
            host_rewrite: message.host_rewrite_specifier.as_ref().and_then(|h| {
                let pb::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host) = h;
                (!host.is_empty()).then(|| host.as_str().into())
            }),
        })
    }
}

impl ClusterChoice {
    pub(super) fn from_proto(message: &pb::RouteAction, context: &RouteContext<'_>) -> ConfigResult<Self> {
        let Some(specifier) = &message.cluster_specifier else { return Ok(Self::None) };
        match specifier {
            ClusterSpecifier::Cluster(name) => {
                context.check_cluster(name).at("cluster")?;
                Ok(Self::Name(name.as_str().into()))
            }
            ClusterSpecifier::ClusterHeader(name) => Ok(Self::Header(HeaderName::new(name))),
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

    /// Picks a weighted cluster; its index, none where there is nothing to pick from. `hash` is the request's hash
    /// by the route's policies.
    pub(super) fn pick(
        &self,
        random: impl FnOnce() -> u64,
        hash: impl FnOnce() -> Option<u64>,
        headers: &HeaderMap,
        runtime: &Runtime,
    ) -> Option<u32> {
        let Self::Weighted { clusters, total, runtime_keys, random_header, use_hash } = self else {
            return None;
        };
        let given = random_header.as_ref().and_then(|name| headers.get_name(name));
        let given = given.and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
        let random = given.or_else(|| if *use_hash { hash() } else { None }).unwrap_or_else(random);
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
    pub(super) fn weighted(&self, index: u32) -> Option<&WeightedCluster> {
        match self {
            Self::Weighted { clusters, .. } => clusters.get(index as usize),
            _ => None,
        }
    }

    /// The name of the cluster for this request.
    pub(super) fn name(&self, weighted: Option<u32>, headers: &HeaderMap) -> Option<Arc<str>> {
        let by_header = |name: &HeaderName| {
            headers.get_name(name).and_then(|v| std::str::from_utf8(v).ok()).map(Arc::from)
        };
        match self {
            Self::None => None,
            Self::Name(name) => Some(name.clone()),
            Self::Header(name) => by_header(name),
            Self::Weighted { .. } => match &self.weighted(weighted?)?.cluster {
                Ok(name) => Some(name.clone()),
                Err(header) => by_header(header),
            },
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
