//! `/clusters`: clusters, their hosts and what became of them.

use envoy_types::pb::envoy::config::core::v3 as core;
use sampan_admin::{ClusterRow, HealthFlags, HostRow, Outlier, Thresholds};
use sampan_upstream::{Cluster, HealthFlag, Host, Priority};

use super::proto_address;

pub(super) fn row(cluster: &Cluster) -> ClusterRow {
    let thresholds = |priority| {
        let t = cluster.thresholds(priority);
        Thresholds {
            max_connections: t.max_connections,
            max_pending_requests: t.max_pending_requests,
            max_requests: t.max_requests,
            max_retries: t.max_retries,
        }
    };
    let hosts = cluster.hosts();
    ClusterRow {
        name: cluster.name().to_string(),
        observability_name: cluster.observability_name().to_string(),
        eds_service_name: cluster.eds_service_name().unwrap_or_default().to_owned(),
        added_via_api: cluster.origin().is_some(),
        outlier: cluster.success_rates().map(|[external, local]| Outlier {
            average: external.average,
            threshold: external.threshold,
            local_average: local.average,
            local_threshold: local.threshold,
        }),
        thresholds: [thresholds(Priority::Default), thresholds(Priority::High)],
        hosts: hosts.hosts().map(|host| host_row(host)).collect(),
    }
}

fn host_row(host: &Host) -> HostRow {
    let address = host.address();
    let all = host.stats.all();
    let rates = host.success_rates();
    let rate = |origin: usize| rates.map(|rates| rates[origin]).filter(|rate| *rate >= 0.0);
    let pick = |gauge| {
        all.iter().filter(move |(.., g)| *g == gauge).map(|(name, value, _)| (*name, *value)).collect()
    };
    HostRow {
        address: proto_address(&address),
        address_text: address.to_string(),
        hostname: host.hostname.to_string(),
        counters: pick(false),
        gauges: pick(true),
        health: health_flags(host),
        weight: host.weight(),
        priority: host.priority(),
        locality: core::Locality {
            region: host.locality.region.to_string(),
            zone: host.locality.zone.to_string(),
            sub_zone: host.locality.sub_zone.to_string(),
        },
        canary: host.canary(),
        success_rate: rate(0),
        local_success_rate: rate(1),
    }
}

fn health_flags(host: &Host) -> HealthFlags {
    HealthFlags {
        failed_active_hc: host.has_flag(HealthFlag::FailedActiveHc),
        failed_outlier_check: host.has_flag(HealthFlag::FailedOutlierCheck),
        failed_eds_health: host.has_flag(HealthFlag::FailedEdsHealth),
        degraded_active_hc: host.has_flag(HealthFlag::DegradedActiveHc),
        degraded_eds_health: host.has_flag(HealthFlag::DegradedEdsHealth),
        pending_dynamic_removal: host.has_flag(HealthFlag::PendingDynamicRemoval),
        pending_active_hc: host.has_flag(HealthFlag::PendingActiveHc),
        excluded_via_immediate_hc_fail: host.has_flag(HealthFlag::ExcludedViaImmediateHcFail),
        active_hc_timeout: host.has_flag(HealthFlag::ActiveHcTimeout),
        eds_status_draining: host.has_flag(HealthFlag::EdsStatusDraining),
    }
}
