//! The model of a cluster: `envoy.config.cluster.v3.Cluster`, parsed and checked.
//!
//! What Envoy does and Sampan cannot do yet is refused by its field's name. Rarely used parts are boxed or shared:
//! a plain cluster's model is a few hundred bytes.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster as Message, cluster as pb};
use envoy_types::pb::google::protobuf as wkt;
use sampan_core::config_source::ConfigSource;
use sampan_core::error::AtField;
use sampan_core::stream_info::Metadata;
use sampan_core::{ConfigError, ConfigResult};

mod circuit;
mod dns;
mod dns_cache;
mod endpoints;
mod exchange;
mod http;
mod http2;
mod lb;
mod original_dst;
mod outlier;
mod socket;
#[cfg(test)]
mod tests;

pub use circuit::{CircuitBreakers, RetryBudget, Thresholds};
pub use dns::{DnsConfig, LookupFamily, check_resolver};
pub use dns_cache::{DnsCacheConfig, ForwardConfig};
pub use endpoints::{EndpointConfig, EndpointTarget, LoadAssignment, LocalityConfig};
pub use exchange::ExchangeConfig;
pub use http::{HttpConfig, HttpProtocol};
pub use http2::http2_options;
pub use lb::{LbConfig, LbPolicy, SlowStart};
pub use original_dst::OriginalDstConfig;
pub use outlier::OutlierConfig;
pub use socket::{BindConfig, KeepaliveConfig, TransportSocketConfig, TransportSocketMatch};

/// Where a cluster's hosts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// From the configuration.
    Static,
    /// Every address that the names resolve to.
    StrictDns(Arc<DnsConfig>),
    /// One host, connected at the first address of its name.
    LogicalDns(Arc<DnsConfig>),
    /// From EDS.
    Eds(Box<EdsConfig>),
    /// Made as they are asked for.
    OriginalDst(Box<OriginalDstConfig>),
    /// dynamic_forward_proxy: one for each name that a DNS cache has resolved.
    Forward(Box<ForwardConfig>),
}

impl Discovery {
    /// The kind of cluster picks its hosts itself.
    fn provides_balancer(&self) -> bool {
        matches!(self, Self::OriginalDst(_) | Self::Forward(_))
    }
}

/// `eds_cluster_config`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdsConfig {
    /// `service_name`, if it is not the cluster's name.
    pub service_name: Option<Arc<str>>,
    /// `eds_config`
    pub source: ConfigSource,
}

impl EdsConfig {
    fn from_cluster(message: &Message, cluster: &Arc<str>) -> ConfigResult<Self> {
        let missing = || ConfigError::new("cannot create an EDS cluster without an EDS config");
        let config = message.eds_cluster_config.as_ref().ok_or_else(missing)?;
        let source = config.eds_config.as_ref().ok_or_else(missing)?;
        let source = ConfigSource::from_proto(source).at("eds_config").at("eds_cluster_config")?;
        let service_name = match config.service_name.as_str() {
            "" => None,
            // As istiod has it.
            name if *name == **cluster => Some(cluster.clone()),
            name => Some(name.into()),
        };
        Ok(Self { service_name, source })
    }
}

/// A checked cluster.
pub struct ClusterConfig {
    /// `name`
    pub name: Arc<str>,
    /// `alt_stat_name`, or the name.
    pub stat_name: Arc<str>,
    /// How hosts are found.
    pub discovery: Discovery,
    /// Hosts.
    pub load_assignment: LoadAssignment,
    /// How one is picked.
    pub lb: LbConfig,
    /// `connect_timeout`, 5 s where absent.
    pub connect_timeout: Duration,
    /// `per_connection_buffer_limit_bytes`, 1 MiB where absent.
    pub buffer_limit: u32,
    /// `circuit_breakers`
    pub circuit_breakers: Option<Box<CircuitBreakers>>,
    /// `outlier_detection`
    pub outlier: Option<Box<OutlierConfig>>,
    /// `HttpProtocolOptions`, or Envoy's defaults.
    pub http: Arc<HttpConfig>,
    /// `upstream_bind_config`
    pub bind: Option<Box<BindConfig>>,
    /// `upstream_connection_options.tcp_keepalive`
    pub keepalive: Option<Box<KeepaliveConfig>>,
    /// `transport_socket`
    pub transport_socket: TransportSocketConfig,
    /// `transport_socket_matches`
    pub transport_socket_matches: Box<[TransportSocketMatch]>,
    /// `metadata`
    pub metadata: Option<Arc<Metadata>>,
    /// Istio's `envoy.tcp.metadataexchange.config.MetadataExchange` among the `filters`.
    pub exchange: Option<Box<ExchangeConfig>>,
    /// `track_timeout_budgets`, `track_cluster_stats.timeout_budgets`
    pub track_timeout_budgets: bool,
    /// Whether the cluster manager's API added it.
    pub added_via_api: bool,
}

impl ClusterConfig {
    #[allow(deprecated, reason = "Envoy 1.40 still takes track_timeout_budgets")]
    /// Checks the message. `added_via_api`: it came by CDS, not from the bootstrap.
    pub fn from_proto(message: &Message, added_via_api: bool) -> ConfigResult<Self> {
        if message.name.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("name"));
        }
        refuse_unsupported(message)?;
        let name: Arc<str> = message.name.as_str().into();
        let discovery = discovery(message, &name)?;
        let names_resolve = matches!(discovery, Discovery::StrictDns(_) | Discovery::LogicalDns(_));
        let load_assignment = match &message.load_assignment {
            // Envoy takes and ignores that of an EDS cluster.
            Some(assignment) if !matches!(discovery, Discovery::Eds(_)) => {
                LoadAssignment::from_proto(assignment, names_resolve).at("load_assignment")?
            }
            _ => LoadAssignment::default(),
        };
        if message.eds_cluster_config.is_some() && !matches!(discovery, Discovery::Eds(_)) {
            return Err(
                ConfigError::new("eds_cluster_config set in a non-EDS cluster").at("eds_cluster_config")
            );
        }
        if matches!(discovery, Discovery::LogicalDns(_)) && !load_assignment.is_single() {
            return Err(ConfigError::new(
                "LOGICAL_DNS clusters must have a single locality_lb_endpoint and a single lb_endpoint",
            )
            .at("load_assignment"));
        }
        let options = message.upstream_connection_options.as_ref();
        let forwards = matches!(discovery, Discovery::Forward(_));
        let config = Self {
            stat_name: match message.alt_stat_name.as_str() {
                "" => name.clone(),
                other => other.into(),
            },
            name,
            lb: LbConfig::from_proto(message, discovery.provides_balancer())?,
            connect_timeout: connect_timeout(message)?,
            buffer_limit: message.per_connection_buffer_limit_bytes.map_or(1024 * 1024, |v| v.value),
            circuit_breakers: message
                .circuit_breakers
                .as_ref()
                .map(|m| CircuitBreakers::from_proto(m).at("circuit_breakers").map(Box::new))
                .transpose()?,
            outlier: message
                .outlier_detection
                .as_ref()
                .map(|m| OutlierConfig::from_proto(m).at("outlier_detection").map(Box::new))
                .transpose()?,
            http: HttpConfig::from_proto(message, forwards && ForwardConfig::names_by_default(message))?,
            bind: message
                .upstream_bind_config
                .as_ref()
                .map(|m| BindConfig::from_proto(m).at("upstream_bind_config").map(Box::new))
                .transpose()?,
            keepalive: options.and_then(|o| o.tcp_keepalive.as_ref()).map(|m| Box::new(m.into())),
            transport_socket: TransportSocketConfig::from_proto(message.transport_socket.as_ref())
                .at("transport_socket")?,
            transport_socket_matches: message
                .transport_socket_matches
                .iter()
                .enumerate()
                .map(|(i, m)| TransportSocketMatch::from_proto(m).at_index("transport_socket_matches", i))
                .collect::<ConfigResult<_>>()?,
            metadata: message.metadata.as_ref().and_then(metadata),
            exchange: exchange::filters(message)?,
            track_timeout_budgets: message.track_timeout_budgets
                || message.track_cluster_stats.as_ref().is_some_and(|t| t.timeout_budgets),
            added_via_api,
            discovery,
            load_assignment,
        };
        config.check_alpn()?;
        if config.lb.hashes() {
            config.load_assignment.check_weights().at("load_assignment")?;
        }
        if let Discovery::Forward(forward) = &config.discovery {
            forward.check_names(config.http.auto_sni, config.http.auto_san_validation)?;
        }
        Ok(config)
    }

    /// With `auto_config` every transport socket must be one that negotiates.
    fn check_alpn(&self) -> ConfigResult<()> {
        let mut sockets =
            self.transport_socket_matches.iter().map(|m| &m.socket).chain([&self.transport_socket]);
        if self.http.protocol == HttpProtocol::Auto && sockets.any(|s| s.tls.is_none()) {
            return Err(ConfigError::new(format!(
                "ALPN configured for cluster {} which has a non-ALPN transport socket",
                self.name
            ))
            .at("auto_config")
            .at("typed_extension_protocol_options"));
        }
        Ok(())
    }
}

fn connect_timeout(message: &Message) -> ConfigResult<Duration> {
    let Some(timeout) = duration(message.connect_timeout.as_ref()).at("connect_timeout")? else {
        return Ok(Duration::from_secs(5));
    };
    if timeout.is_zero() {
        return Err(ConfigError::new("value must be greater than 0s").at("connect_timeout"));
    }
    Ok(timeout)
}

/// The deprecated `type`, or the extension in `cluster_type`.
fn discovery(message: &Message, name: &Arc<str>) -> ConfigResult<Discovery> {
    use pb::ClusterDiscoveryType as T;
    match &message.cluster_discovery_type {
        None => Ok(Discovery::Static),
        Some(T::Type(number)) => match pb::DiscoveryType::try_from(*number) {
            Ok(pb::DiscoveryType::Static) => Ok(Discovery::Static),
            Ok(pb::DiscoveryType::StrictDns) => {
                Ok(Discovery::StrictDns(DnsConfig::from_cluster(message)?.into()))
            }
            Ok(pb::DiscoveryType::LogicalDns) => {
                Ok(Discovery::LogicalDns(DnsConfig::from_cluster(message)?.into()))
            }
            Ok(pb::DiscoveryType::Eds) => Ok(Discovery::Eds(EdsConfig::from_cluster(message, name)?.into())),
            Ok(pb::DiscoveryType::OriginalDst) => {
                Ok(Discovery::OriginalDst(OriginalDstConfig::from_cluster(message)?.into()))
            }
            Err(_) => Err(ConfigError::new("unknown discovery type").at("type")),
        },
        Some(T::ClusterType(custom)) => custom_discovery(message, name, custom).at("cluster_type"),
    }
}

fn custom_discovery(
    message: &Message,
    name: &Arc<str>,
    custom: &pb::CustomClusterType,
) -> ConfigResult<Discovery> {
    use envoy_types::pb::envoy::extensions::clusters::dns::v3::DnsCluster;
    use envoy_types::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3::ClusterConfig as ForwardMessage;
    let any = custom.typed_config.as_ref();
    match (custom.name.as_str(), any.map(type_name)) {
        (_, Some("envoy.extensions.clusters.dns.v3.DnsCluster")) => {
            let dns: DnsCluster = unpack(any).at("typed_config")?;
            let config = DnsConfig::from_extension(&dns).at("typed_config")?;
            Ok(if dns.all_addresses_in_single_endpoint {
                Discovery::LogicalDns(config.into())
            } else {
                Discovery::StrictDns(config.into())
            })
        }
        (name, Some(dns_cache::TYPE)) => {
            let message: ForwardMessage = unpack(any).at("typed_config")?;
            let config = ForwardConfig::from_proto(name, &message).at("typed_config")?;
            Ok(Discovery::Forward(config.into()))
        }
        ("envoy.cluster.eds", None) => Ok(Discovery::Eds(EdsConfig::from_cluster(message, name)?.into())),
        ("envoy.cluster.static", _) => Ok(Discovery::Static),
        ("envoy.cluster.strict_dns", None) => {
            Ok(Discovery::StrictDns(DnsConfig::from_cluster(message)?.into()))
        }
        ("envoy.cluster.logical_dns", None) => {
            Ok(Discovery::LogicalDns(DnsConfig::from_cluster(message)?.into()))
        }
        ("envoy.cluster.original_dst", None) => {
            Ok(Discovery::OriginalDst(OriginalDstConfig::from_cluster(message)?.into()))
        }
        (name, Some(url)) => Err(ConfigError::unsupported(format!("cluster type {name} ({url})"))),
        (name, None) => Err(ConfigError::unsupported(format!("cluster type {name}"))),
    }
}

fn refuse_unsupported(m: &Message) -> ConfigResult<()> {
    let tracked = m.track_cluster_stats.as_ref();
    let common = m.common_lb_config.as_ref();
    let options = m.upstream_connection_options.as_ref();
    let present = [
        (m.transport_socket_matcher.is_some(), "transport_socket_matcher"),
        (!m.health_checks.is_empty(), "health_checks"),
        // Without a selector there are no subsets.
        (m.lb_subset_config.as_ref().is_some_and(|c| !c.subset_selectors.is_empty()), "lb_subset_config"),
        (m.upstream_config.is_some(), "upstream_config"),
        (m.preconnect_policy.is_some(), "preconnect_policy"),
        (!m.lrs_report_endpoint_metrics.is_empty(), "lrs_report_endpoint_metrics"),
        (m.wait_for_warm_on_init.is_some_and(|b| !b.value), "wait_for_warm_on_init"),
        (common.is_some_and(|c| c.override_host_status.is_some()), "common_lb_config.override_host_status"),
        (m.queuing_policies.is_some(), "queuing_policies"),
        (m.connection_pool_per_downstream_connection, "connection_pool_per_downstream_connection"),
        (
            m.per_connection_buffer_high_watermark_timeout.is_some(),
            "per_connection_buffer_high_watermark_timeout",
        ),
        (m.stats_matcher.is_some(), "stats_matcher"),
        (tracked.is_some_and(|t| t.request_response_sizes), "track_cluster_stats.request_response_sizes"),
        (tracked.is_some_and(|t| t.per_endpoint_stats), "track_cluster_stats.per_endpoint_stats"),
        (
            common.is_some_and(|c| c.close_connections_on_host_set_change),
            "common_lb_config.close_connections_on_host_set_change",
        ),
        (
            options.is_some_and(|o| o.set_local_interface_name_on_upstream_connections),
            "upstream_connection_options.set_local_interface_name_on_upstream_connections",
        ),
    ];
    match present.into_iter().find(|(is, _)| *is) {
        Some((_, field)) => Err(ConfigError::unsupported(field).at(field)),
        None => Ok(()),
    }
}

/// A non-negative duration.
pub(crate) fn duration(message: Option<&wkt::Duration>) -> ConfigResult<Option<Duration>> {
    message
        .map(|d| {
            let (Ok(seconds), Ok(nanos)) = (u64::try_from(d.seconds), u32::try_from(d.nanos)) else {
                return Err(ConfigError::new("value must be greater than or equal to 0s"));
            };
            Ok(Duration::new(seconds, nanos))
        })
        .transpose()
}

/// The part of a type URL behind the slash.
pub(crate) fn type_name(any: &wkt::Any) -> &str {
    any.type_url.rsplit_once('/').map_or(&any.type_url, |(_, name)| name)
}

/// The message in an `Any` whose type was checked.
pub(crate) fn unpack<M: prost::Message + Default>(any: Option<&wkt::Any>) -> ConfigResult<M> {
    let any = any.ok_or_else(|| ConfigError::new("value is required"))?;
    M::decode(any.value.as_slice())
        .map_err(|e| ConfigError::new(format!("unable to unpack {}: {e}", type_name(any))))
}

/// `filter_metadata`; `None` where it is empty.
pub(crate) fn metadata(
    message: &envoy_types::pb::envoy::config::core::v3::Metadata,
) -> Option<Arc<Metadata>> {
    let map: Metadata = message.filter_metadata.clone().into_iter().collect();
    (!map.is_empty()).then(|| Arc::new(map))
}
