//! `DnsCacheConfig`: the cache of names that clusters of type dynamic_forward_proxy and the filters before them share by
//! its name; and what such a cluster's own configuration says.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{DnsLookupFamily, RefreshRate};
use envoy_types::pb::envoy::extensions::clusters::dynamic_forward_proxy::v3 as ext;
use envoy_types::pb::envoy::extensions::common::dynamic_forward_proxy::v3 as pb;
use sampan_core::address::port_of;
use sampan_core::error::AtField;
use sampan_core::matcher::CidrSet;
use sampan_core::{ConfigError, ConfigResult};

use super::dns::check_resolver;
use super::{LookupFamily, duration};

/// The type URL's name of [`ForwardConfig`].
pub(super) const TYPE: &str = "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig";

/// By this `cluster_type.name` the HTTP filter knows the cluster, as in Envoy; with another one the cluster resolves by
/// itself.
const NAME: &str = "envoy.clusters.dynamic_forward_proxy";

/// A cache of names.
#[derive(Debug, Clone)]
pub struct DnsCacheConfig {
    /// `name`
    pub name: Arc<str>,
    /// `dns_lookup_family`
    pub family: LookupFamily,
    /// `dns_refresh_rate`, 60 s where absent.
    pub refresh_rate: Duration,
    /// `dns_min_refresh_rate`, 5 s where absent: what a TTL is at least taken for.
    pub min_refresh_rate: Duration,
    /// `dns_failure_refresh_rate`: base and maximum of the back-off; the refresh rate where absent.
    pub failure_rate: Option<(Duration, Duration)>,
    /// `disable_dns_refresh_on_failure`
    pub asks_failed_anew: bool,
    /// `dns_query_timeout`, 5 s where absent; none: as long as the resolver takes.
    pub query_timeout: Option<Duration>,
    /// `host_ttl`, 5 min where absent.
    pub host_ttl: Duration,
    /// `max_hosts`, 1024 where absent.
    pub max_hosts: usize,
    /// `dns_cache_circuit_breaker.max_pending_requests`, 1024 where absent.
    pub max_pending: u64,
    /// `preresolve_hostnames`
    pub preresolved: Vec<(Box<str>, u16)>,
    /// `resolved_address_filter`: what is taken out of answers.
    pub denied: Option<CidrSet>,
    /// All caches of a name must be configured alike.
    message: Box<pb::DnsCacheConfig>,
}

impl PartialEq for DnsCacheConfig {
    fn eq(&self, other: &Self) -> bool {
        self.message == other.message
    }
}

impl Eq for DnsCacheConfig {}

impl DnsCacheConfig {
    #[allow(deprecated, reason = "refused by name")]
    /// Checks the message.
    pub fn from_proto(m: &pb::DnsCacheConfig) -> ConfigResult<Arc<Self>> {
        for (present, field) in [
            (m.use_tcp_for_dns_lookups, "use_tcp_for_dns_lookups"),
            (m.dns_resolution_config.is_some(), "dns_resolution_config"),
            (m.key_value_config.is_some(), "key_value_config"),
        ] {
            if present {
                return Err(ConfigError::unsupported(field).at(field));
            }
        }
        check_resolver(m.typed_dns_resolver_config.as_ref()).at("typed_dns_resolver_config")?;
        let time = |message: Option<&_>, field: &'static str, default: u64| {
            duration(message).at(field).map(|d| d.unwrap_or(Duration::from_secs(default)))
        };
        let failure = m.dns_failure_refresh_rate.as_ref();
        let query_timeout = time(m.dns_query_timeout.as_ref(), "dns_query_timeout", 5)?;
        let max_hosts = m.max_hosts.map_or(1024, |v| v.value);
        if m.preresolve_hostnames.len() > max_hosts as usize {
            return Err(ConfigError::new(format!(
                "DNS Cache [{}] configured with preresolve_hostnames={} larger than max_hosts={max_hosts}",
                m.name,
                m.preresolve_hostnames.len()
            ))
            .at("preresolve_hostnames"));
        }
        let breaker = m.dns_cache_circuit_breaker.as_ref();
        let denied = m.resolved_address_filter.as_ref();
        let preresolved = m.preresolve_hostnames.iter().enumerate().map(|(i, host)| {
            let port = port_of(host).at_index("preresolve_hostnames", i)?;
            Ok((host.address.as_str().into(), port))
        });
        Ok(Arc::new(Self {
            name: m.name.as_str().into(),
            family: family(m.dns_lookup_family()),
            refresh_rate: time(m.dns_refresh_rate.as_ref(), "dns_refresh_rate", 60)?,
            min_refresh_rate: time(m.dns_min_refresh_rate.as_ref(), "dns_min_refresh_rate", 5)?,
            failure_rate: failure.map(back_off).transpose().at("dns_failure_refresh_rate")?,
            asks_failed_anew: m.disable_dns_refresh_on_failure,
            query_timeout: (!query_timeout.is_zero()).then_some(query_timeout),
            host_ttl: time(m.host_ttl.as_ref(), "host_ttl", 300)?,
            max_hosts: max_hosts as usize,
            max_pending: breaker.and_then(|b| b.max_pending_requests).map_or(1024, |v| v.value.into()),
            preresolved: preresolved.collect::<ConfigResult<_>>()?,
            denied: denied
                .map(|m| CidrSet::from_xds(&m.ranges, m.invert_match))
                .transpose()
                .at("resolved_address_filter")?,
            message: Box::new(m.clone()),
        }))
    }
}

/// The base interval and the longest, ten times that where absent.
fn back_off(m: &RefreshRate) -> ConfigResult<(Duration, Duration)> {
    let base = duration(m.base_interval.as_ref())?.ok_or_else(|| ConfigError::missing("base_interval"))?;
    Ok((base, duration(m.max_interval.as_ref())?.unwrap_or(base.saturating_mul(10))))
}

fn family(family: DnsLookupFamily) -> LookupFamily {
    match family {
        DnsLookupFamily::Auto => LookupFamily::Auto,
        DnsLookupFamily::V4Only => LookupFamily::V4Only,
        DnsLookupFamily::V6Only => LookupFamily::V6Only,
        DnsLookupFamily::V4Preferred => LookupFamily::V4Preferred,
        DnsLookupFamily::All => LookupFamily::All,
    }
}

/// A cluster of type dynamic_forward_proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardConfig {
    /// `dns_cache_config`
    pub cache: Arc<DnsCacheConfig>,
    /// `allow_insecure_cluster_options`: names need be neither sent nor verified.
    pub(super) insecure: bool,
    /// The HTTP filter resolves for it.
    pub with_filter: bool,
}

impl ForwardConfig {
    pub(super) fn from_proto(name: &str, m: &ext::ClusterConfig) -> ConfigResult<Self> {
        use ext::cluster_config::ClusterImplementationSpecifier as C;
        if m.allow_coalesced_connections {
            let field = "allow_coalesced_connections";
            return Err(ConfigError::unsupported(field).at(field));
        }
        let cache = match &m.cluster_implementation_specifier {
            Some(C::DnsCacheConfig(cache)) => DnsCacheConfig::from_proto(cache).at("dns_cache_config")?,
            Some(C::SubClustersConfig(_)) => {
                return Err(ConfigError::unsupported("sub_clusters_config").at("sub_clusters_config"));
            }
            // The one without a name, as in Envoy.
            None => DnsCacheConfig::from_proto(&pb::DnsCacheConfig::default())?,
        };
        Ok(Self { cache, insecure: m.allow_insecure_cluster_options, with_filter: name == NAME })
    }

    /// Whether the cluster sends and verifies names where it says nothing of that.
    pub(super) fn names_by_default(m: &Cluster) -> bool {
        #[allow(deprecated, reason = "Envoy 1.40 still takes the field")]
        m.upstream_http_protocol_options.is_none()
    }

    pub(super) fn check_names(&self, sni: bool, san_validation: bool) -> ConfigResult<()> {
        if self.insecure || sni && san_validation {
            return Ok(());
        }
        Err(ConfigError::new(
            "dynamic_forward_proxy cluster must have auto_sni and auto_san_validation true unless \
             allow_insecure_cluster_options is set.",
        )
        .at("cluster_type"))
    }
}
