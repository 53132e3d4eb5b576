//! `load_assignment`: the hosts of a cluster, by priority and locality.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use sampan_core::address::port_of;
use sampan_core::error::AtField;
use sampan_core::stream_info::Metadata;
use sampan_core::{Address, ConfigError, ConfigResult};

use super::metadata;
use crate::host::{HealthFlag, Locality};
use crate::proxy_header::{self, Tlvs};

/// The `hostname` of nearly all endpoints.
static NO_NAME: LazyLock<Arc<str>> = LazyLock::new(|| "".into());

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointTarget {
    /// At an address.
    Address(Address),
    /// At the addresses of a name.
    Name(Arc<str>, u16),
}

/// One `lb_endpoint`.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Where it is.
    pub target: EndpointTarget,
    /// `hostname`
    pub hostname: Arc<str>,
    /// `load_balancing_weight`, 1 where absent.
    pub weight: u32,
    /// Health flags from `health_status`.
    pub flags: u32,
    /// `metadata`
    pub metadata: Option<Arc<Metadata>>,
    /// Its own TLVs of the PROXY header.
    pub tlvs: Option<Arc<Tlvs>>,
}

/// One entry of `endpoints`.
#[derive(Debug, Clone)]
pub struct LocalityConfig {
    /// `locality`
    pub locality: Arc<Locality>,
    /// `priority`
    pub priority: u32,
    /// `load_balancing_weight`; 0 where absent.
    pub weight: u32,
    /// `lb_endpoints`
    pub endpoints: Vec<EndpointConfig>,
}

/// All endpoints and how priorities share the load.
#[derive(Debug, Clone)]
pub struct LoadAssignment {
    /// `endpoints`
    pub localities: Vec<LocalityConfig>,
    /// `policy.overprovisioning_factor`, in per cent.
    pub overprovisioning_factor: u32,
    /// `policy.weighted_priority_health`
    pub weighted_priority_health: bool,
    /// `policy.drop_overloads`: the share of requests to answer without asking a host.
    pub drop_share: f32,
    /// What these are called in load reports.
    pub drop_category: Box<str>,
}

impl Default for LoadAssignment {
    fn default() -> Self {
        Self {
            localities: Vec::new(),
            overprovisioning_factor: 140,
            weighted_priority_health: false,
            drop_share: 0.0,
            drop_category: Box::default(),
        }
    }
}

impl LoadAssignment {
    /// Checks the message; `names`: hosts may be names.
    pub fn from_proto(message: &pb::ClusterLoadAssignment, names: bool) -> ConfigResult<Self> {
        let policy = message.policy.as_ref();
        let drop_share =
            policy.map_or(Ok(0.0), |p| drop_share(&p.drop_overloads)).at("policy.drop_overloads")?;
        if !message.named_endpoints.is_empty() {
            return Err(ConfigError::unsupported("named_endpoints").at("named_endpoints"));
        }
        let localities = message
            .endpoints
            .iter()
            .enumerate()
            .map(|(i, m)| LocalityConfig::from_proto(m, names).at_index("endpoints", i))
            .collect::<ConfigResult<Vec<_>>>()?;
        Ok(Self {
            localities,
            overprovisioning_factor: policy.and_then(|p| p.overprovisioning_factor).map_or(140, |v| v.value),
            weighted_priority_health: policy.is_some_and(|p| p.weighted_priority_health),
            drop_share,
            drop_category: policy
                .and_then(|p| p.drop_overloads.first())
                .map_or_else(Box::default, |one| one.category.as_str().into()),
        })
    }

    /// What balancers that hash refuse, as in Envoy; others take any weights.
    pub fn check_weights(&self) -> ConfigResult<()> {
        for (i, locality) in self.localities.iter().enumerate() {
            let sum: u64 = locality.endpoints.iter().map(|e| u64::from(e.weight)).sum();
            if sum > u64::from(u32::MAX) {
                let reason = "The sum of weights of all upstream hosts in a locality exceeds 4294967295";
                return Err(ConfigError::new(reason)).at_index("endpoints", i);
            }
        }
        Ok(())
    }

    /// Of hosts with the same address the first counts, as in Envoy's EDS.
    #[must_use]
    pub fn with_each_host_once(mut self) -> Self {
        let mut seen = HashSet::new();
        for locality in &mut self.localities {
            locality.endpoints.retain(|endpoint| match &endpoint.target {
                EndpointTarget::Address(address) => seen.insert(address.clone()),
                EndpointTarget::Name(..) => true,
            });
        }
        self
    }

    pub(super) fn is_single(&self) -> bool {
        matches!(self.localities.as_slice(), [one] if one.endpoints.len() == 1)
    }
}

/// There may be one; a share of single precision, as in Envoy.
fn drop_share(list: &[pb::cluster_load_assignment::policy::DropOverload]) -> ConfigResult<f32> {
    let [one] = list else {
        if list.is_empty() {
            return Ok(0.0);
        }
        return Err(ConfigError::new(format!(
            "Cluster drop_overloads config has {} categories. Envoy only support one.",
            list.len()
        )));
    };
    let Some(percent) = &one.drop_percentage else { return Ok(0.0) };
    let whole = match percent.denominator() {
        DenominatorType::Hundred => 100.0,
        DenominatorType::TenThousand => 10_000.0,
        DenominatorType::Million => 1_000_000.0,
    };
    let share = percent.numerator as f32 / whole;
    if share > 1.0 {
        return Err(ConfigError::new(format!(
            "Cluster drop_overloads config is invalid. drop_ratio={share}(Numerator {} / Denominator {whole}). \
             The valid range is 0~1.",
            percent.numerator
        ))
        .at("drop_percentage")
        .index(0));
    }
    Ok(share)
}

impl LocalityConfig {
    #[allow(deprecated, reason = "Envoy 1.40 still takes the list")]
    fn from_proto(message: &pb::LocalityLbEndpoints, names: bool) -> ConfigResult<Self> {
        use pb::locality_lb_endpoints::LbConfig;
        if message.priority > 128 {
            return Err(ConfigError::new("value must be less than or equal to 128").at("priority"));
        }
        let list = match &message.lb_config {
            None => &message.lb_endpoints,
            Some(LbConfig::LoadBalancerEndpoints(list)) => &list.lb_endpoints,
            Some(LbConfig::LedsClusterLocalityConfig(_)) => {
                return Err(ConfigError::unsupported("leds_cluster_locality_config")
                    .at("leds_cluster_locality_config"));
            }
        };
        let endpoints = list
            .iter()
            .enumerate()
            .map(|(i, m)| EndpointConfig::from_proto(m, names).at_index("lb_endpoints", i))
            .collect::<ConfigResult<Vec<_>>>()?;
        let locality = message.locality.as_ref();
        let part = |get: fn(&core::Locality) -> &str| locality.map(get).unwrap_or_default();
        Ok(Self {
            locality: Arc::new(Locality {
                region: part(|l| &l.region).into(),
                zone: part(|l| &l.zone).into(),
                sub_zone: part(|l| &l.sub_zone).into(),
            }),
            priority: message.priority,
            weight: message.load_balancing_weight.map_or(0, |v| v.value),
            endpoints,
        })
    }
}

impl EndpointConfig {
    fn from_proto(message: &pb::LbEndpoint, names: bool) -> ConfigResult<Self> {
        use core::HealthStatus as S;
        use pb::lb_endpoint::HostIdentifier;
        let endpoint = match &message.host_identifier {
            Some(HostIdentifier::Endpoint(endpoint)) => endpoint,
            Some(HostIdentifier::EndpointName(_)) => {
                return Err(ConfigError::unsupported("endpoint_name").at("endpoint_name"));
            }
            None => return Err(ConfigError::missing("endpoint")),
        };
        if !endpoint.additional_addresses.is_empty() {
            return Err(ConfigError::unsupported("additional_addresses").at("endpoint.additional_addresses"));
        }
        if message.load_balancing_weight.is_some_and(|w| w.value == 0) {
            return Err(
                ConfigError::new("value must be greater than or equal to 1").at("load_balancing_weight")
            );
        }
        Ok(Self {
            target: target(endpoint, names).at("endpoint.address")?,
            hostname: match endpoint.hostname.as_str() {
                "" => NO_NAME.clone(),
                name => name.into(),
            },
            weight: message.load_balancing_weight.map_or(1, |v| v.value),
            flags: match message.health_status() {
                S::Unknown | S::Healthy => 0,
                S::Unhealthy | S::Timeout => HealthFlag::FailedEdsHealth as u32,
                S::Draining => HealthFlag::EdsStatusDraining as u32,
                S::Degraded => HealthFlag::DegradedEdsHealth as u32,
            },
            metadata: message.metadata.as_ref().and_then(metadata),
            tlvs: message.metadata.as_ref().and_then(proxy_header::of_endpoint),
        })
    }
}

fn target(endpoint: &pb::Endpoint, names: bool) -> ConfigResult<EndpointTarget> {
    use core::address::Address as A;
    let address = endpoint.address.as_ref().ok_or_else(|| ConfigError::new("value is required"))?;
    if let (true, Some(A::SocketAddress(socket))) = (names, &address.address) {
        if socket.address.is_empty() {
            return Err(
                ConfigError::new("value length must be at least 1 characters").at("socket_address.address")
            );
        }
        let port = port_of(socket).at("socket_address")?;
        return Ok(EndpointTarget::Name(socket.address.as_str().into(), port));
    }
    if names {
        return Err(ConfigError::new("a DNS cluster's endpoint must be a socket_address"));
    }
    if let Some(A::SocketAddress(socket)) = &address.address
        && !socket.resolver_name.is_empty()
    {
        return Err(ConfigError::unsupported("resolver_name").at("socket_address.resolver_name"));
    }
    Address::from_proto(address).map(EndpointTarget::Address)
}
