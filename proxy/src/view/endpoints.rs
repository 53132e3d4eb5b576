//! `/config_dump?include_eds`: the endpoints in force, as messages.

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::google::protobuf::UInt32Value;
use pb::cluster_load_assignment::Policy;
use pb::endpoint::HealthCheckConfig;
use pb::lb_endpoint::HostIdentifier;
use sampan_upstream::host::LocalityHosts;
use sampan_upstream::{Cluster, Health, Host};

use super::proto_address;

/// Localities without hosts are not shown, as in Envoy.
pub(super) fn assignment(cluster: &Cluster) -> pb::ClusterLoadAssignment {
    let hosts = cluster.hosts();
    let name = cluster.eds_service_name().unwrap_or_else(|| cluster.name());
    let localities = hosts.priorities.iter().zip(0..).flat_map(|(all, priority)| {
        all.iter().filter(|one| !one.hosts.is_empty()).map(move |one| locality(one, priority))
    });
    pb::ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: localities.collect(),
        policy: Some(Policy {
            overprovisioning_factor: number(hosts.overprovisioning_factor),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn locality(one: &LocalityHosts, priority: u32) -> pb::LocalityLbEndpoints {
    let place = &one.locality;
    let named = !(place.region.is_empty() && place.zone.is_empty() && place.sub_zone.is_empty());
    // Envoy knows weights of named localities only.
    let weight = if named { one.weight } else { 0 };
    pb::LocalityLbEndpoints {
        locality: Some(core::Locality {
            region: place.region.to_string(),
            zone: place.zone.to_string(),
            sub_zone: place.sub_zone.to_string(),
        }),
        lb_endpoints: one.hosts.iter().map(|host| endpoint(host)).collect(),
        load_balancing_weight: number(weight),
        priority,
        ..Default::default()
    }
}

fn endpoint(host: &Host) -> pb::LbEndpoint {
    let health = match host.health() {
        Health::Healthy => core::HealthStatus::Healthy,
        Health::Degraded => core::HealthStatus::Degraded,
        Health::Unhealthy => core::HealthStatus::Unhealthy,
    };
    let metadata = host.metadata().map(|metadata| core::Metadata {
        filter_metadata: metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        ..Default::default()
    });
    pb::LbEndpoint {
        health_status: health as i32,
        metadata,
        load_balancing_weight: number(host.weight()),
        host_identifier: Some(HostIdentifier::Endpoint(pb::Endpoint {
            address: Some(proto_address(&host.address())),
            health_check_config: Some(HealthCheckConfig::default()),
            hostname: host.hostname.to_string(),
            ..Default::default()
        })),
    }
}
