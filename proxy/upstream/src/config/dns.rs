//! How names are resolved: the deprecated fields of the cluster, or the `DnsCluster` extension.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster, cluster};
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::clusters::common::dns::v3 as common;
use envoy_types::pb::envoy::extensions::clusters::dns::v3::DnsCluster;
use envoy_types::pb::envoy::extensions::network::dns_resolver::cares::v3::CaresDnsResolverConfig;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::{duration, type_name, unpack};

/// Which addresses count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupFamily {
    /// IPv6; IPv4 where there is none.
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4; IPv6 where there is none.
    V4Preferred,
    /// Both.
    All,
}

/// When and what to resolve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// `dns_refresh_rate`
    pub refresh_rate: Duration,
    /// `dns_failure_refresh_rate`: base and maximum of the back-off; the refresh rate where absent.
    pub failure_rate: Option<(Duration, Duration)>,
    /// `respect_dns_ttl`
    pub respect_ttl: bool,
    /// `dns_min_refresh_rate`: what a TTL is at least taken for.
    pub min_refresh_rate: Duration,
    /// `dns_jitter`
    pub jitter: Duration,
    /// `dns_lookup_family`
    pub family: LookupFamily,
}

impl DnsConfig {
    #[allow(deprecated, reason = "Envoy 1.40 still takes the fields")]
    pub(super) fn from_cluster(m: &Cluster) -> ConfigResult<Self> {
        use cluster::DnsLookupFamily as F;
        for (present, field) in [
            (!m.dns_resolvers.is_empty(), "dns_resolvers"),
            (m.dns_resolution_config.is_some(), "dns_resolution_config"),
            (m.use_tcp_for_dns_lookups, "use_tcp_for_dns_lookups"),
        ] {
            if present {
                return Err(ConfigError::unsupported(field).at(field));
            }
        }
        check_resolver(m.typed_dns_resolver_config.as_ref()).at("typed_dns_resolver_config")?;
        let failure = m.dns_failure_refresh_rate.as_ref();
        Ok(Self {
            refresh_rate: refresh_rate(m.dns_refresh_rate.as_ref())?,
            failure_rate: failure_rate(failure.map(|f| (f.base_interval.as_ref(), f.max_interval.as_ref())))?,
            respect_ttl: m.respect_dns_ttl,
            min_refresh_rate: Duration::from_secs(1),
            jitter: duration(m.dns_jitter.as_ref()).at("dns_jitter")?.unwrap_or_default(),
            family: match m.dns_lookup_family() {
                F::Auto => LookupFamily::Auto,
                F::V4Only => LookupFamily::V4Only,
                F::V6Only => LookupFamily::V6Only,
                F::V4Preferred => LookupFamily::V4Preferred,
                F::All => LookupFamily::All,
            },
        })
    }

    pub(super) fn from_extension(m: &DnsCluster) -> ConfigResult<Self> {
        use common::DnsLookupFamily as F;
        check_resolver(m.typed_dns_resolver_config.as_ref()).at("typed_dns_resolver_config")?;
        let failure = m.dns_failure_refresh_rate.as_ref();
        Ok(Self {
            refresh_rate: refresh_rate(m.dns_refresh_rate.as_ref())?,
            failure_rate: failure_rate(failure.map(|f| (f.base_interval.as_ref(), f.max_interval.as_ref())))?,
            respect_ttl: m.respect_dns_ttl,
            min_refresh_rate: duration(m.dns_min_refresh_rate.as_ref())
                .at("dns_min_refresh_rate")?
                .unwrap_or(Duration::from_secs(1)),
            jitter: duration(m.dns_jitter.as_ref()).at("dns_jitter")?.unwrap_or_default(),
            family: match m.dns_lookup_family() {
                F::Unspecified | F::Auto => LookupFamily::Auto,
                F::V4Only => LookupFamily::V4Only,
                F::V6Only => LookupFamily::V6Only,
                F::V4Preferred => LookupFamily::V4Preferred,
                F::All => LookupFamily::All,
            },
        })
    }
}

type Proto<'a> = Option<&'a envoy_types::pb::google::protobuf::Duration>;

fn refresh_rate(message: Proto<'_>) -> ConfigResult<Duration> {
    let rate = duration(message).at("dns_refresh_rate")?.unwrap_or(Duration::from_secs(5));
    if rate <= Duration::from_millis(1) {
        return Err(ConfigError::new("value must be greater than 0.001s").at("dns_refresh_rate"));
    }
    Ok(rate)
}

pub(super) fn failure_rate(
    rates: Option<(Proto<'_>, Proto<'_>)>,
) -> ConfigResult<Option<(Duration, Duration)>> {
    let Some((base, max)) = rates else { return Ok(None) };
    let base = duration(base)
        .and_then(|d| d.ok_or_else(|| ConfigError::missing("base_interval")))
        .at("dns_failure_refresh_rate")?;
    let max = duration(max).at("dns_failure_refresh_rate")?.unwrap_or(base * 10);
    if max < base {
        return Err(ConfigError::new(
            "dns_failure_refresh_rate must have max_interval greater than or equal to the base_interval",
        )
        .at("dns_failure_refresh_rate"));
    }
    Ok(Some((base, max)))
}

/// The system's resolvers are what there is; a configuration that asks for nothing else is taken, of a cluster or of the
/// bootstrap. How c-ares asks (`udp_max_queries`, tries, timeouts, EDNS, rotation) has no counterpart and no effect.
pub fn check_resolver(config: Option<&TypedExtensionConfig>) -> ConfigResult<()> {
    let Some(any) = config.and_then(|c| c.typed_config.as_ref()) else { return Ok(()) };
    match type_name(any) {
        "envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig" => Ok(()),
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig" => {
            let cares: CaresDnsResolverConfig = unpack(Some(any)).at("typed_config")?;
            let options = cares.dns_resolver_options.unwrap_or_default();
            for (present, field) in [
                (!cares.resolvers.is_empty(), "resolvers"),
                (cares.filter_unroutable_families, "filter_unroutable_families"),
                (options.use_tcp_for_dns_lookups, "dns_resolver_options.use_tcp_for_dns_lookups"),
                (options.no_default_search_domain, "dns_resolver_options.no_default_search_domain"),
            ] {
                if present {
                    return Err(ConfigError::unsupported(field).at(field).at("typed_config"));
                }
            }
            Ok(())
        }
        name => Err(ConfigError::unsupported(format!("DNS resolver {name}")).at("typed_config")),
    }
}
