//! `/clusters` and `/listeners`, as text and as JSON.

use std::fmt::Write;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, circuit_breakers};
use envoy_types::pb::envoy::config::core::v3::{HealthStatus, RoutingPriority};
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::UInt32Value;
use regex::Regex;
use sampan_core::stats::{general, shortest};

use crate::json::json_of;
use crate::source::{ClusterRow, HealthFlags, HostRow};
use crate::{Admin, Query, Reply};

pub(crate) fn clusters(admin: &Admin, query: &Query) -> Reply {
    let mut rows = admin.source.clusters();
    if let Some(filter) = query.get("filter") {
        let Ok(filter) = Regex::new(filter) else { return Reply::error(400, "Invalid re2 regex") };
        rows.retain(|row| filter.is_match(&row.name));
    }
    if query.get("format") == Some("json") {
        let cluster_statuses = rows.iter().map(cluster_status).collect();
        return json_of(&pb::Clusters { cluster_statuses }, false);
    }
    let mut out = String::new();
    rows.iter().for_each(|row| cluster_text(&mut out, row));
    Reply::text(out)
}

// Writing to a string cannot fail.
fn cluster_text(out: &mut String, row: &ClusterRow) {
    let name = &row.name;
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "{name}::{key}::{value}");
    };
    line("observability_name", &row.observability_name);
    if let Some(outlier) = &row.outlier {
        line("outlier::success_rate_average", &general(outlier.average, 6));
        line("outlier::success_rate_ejection_threshold", &general(outlier.threshold, 6));
        line("outlier::local_origin_success_rate_average", &general(outlier.local_average, 6));
        line("outlier::local_origin_success_rate_ejection_threshold", &general(outlier.local_threshold, 6));
    }
    for (priority, limits) in ["default", "high"].iter().zip(&row.thresholds) {
        line(&format!("{priority}_priority::max_connections"), &limits.max_connections);
        line(&format!("{priority}_priority::max_pending_requests"), &limits.max_pending_requests);
        line(&format!("{priority}_priority::max_requests"), &limits.max_requests);
        line(&format!("{priority}_priority::max_retries"), &limits.max_retries);
    }
    line("added_via_api", &row.added_via_api);
    if !row.eds_service_name.is_empty() {
        line("eds_service_name", &row.eds_service_name);
    }
    for host in &row.hosts {
        host_text(out, name, host);
    }
}

fn host_text(out: &mut String, cluster: &str, host: &HostRow) {
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "{cluster}::{}::{key}::{value}", host.address_text);
    };
    let mut stats: Vec<_> = host.counters.iter().chain(&host.gauges).collect();
    stats.sort();
    for (name, value) in stats {
        line(name, value);
    }
    line("hostname", &host.hostname);
    line("health_flags", &health_text(&host.health));
    line("weight", &host.weight);
    line("region", &host.locality.region);
    line("zone", &host.locality.zone);
    line("sub_zone", &host.locality.sub_zone);
    line("canary", &host.canary);
    line("priority", &host.priority);
    line("success_rate", &shortest(host.success_rate.unwrap_or(-1.0)));
    line("local_origin_success_rate", &shortest(host.local_success_rate.unwrap_or(-1.0)));
}

fn health_text(flags: &HealthFlags) -> String {
    let all = [
        (flags.failed_active_hc, "/failed_active_hc"),
        (flags.failed_outlier_check, "/failed_outlier_check"),
        (flags.failed_eds_health, "/failed_eds_health"),
        (flags.degraded_active_hc, "/degraded_active_hc"),
        (flags.degraded_eds_health, "/degraded_eds_health"),
        (flags.pending_dynamic_removal, "/pending_dynamic_removal"),
        (flags.pending_active_hc, "/pending_active_hc"),
        (flags.excluded_via_immediate_hc_fail, "/excluded_via_immediate_hc_fail"),
        (flags.active_hc_timeout, "/active_hc_timeout"),
        (flags.eds_status_draining, "/eds_status_draining"),
    ];
    let set: String = all.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    if set.is_empty() { "healthy".into() } else { set }
}

fn cluster_status(row: &ClusterRow) -> pb::ClusterStatus {
    let percent = |value: f64| (value > 0.0).then_some(Percent { value });
    let thresholds = [RoutingPriority::Default, RoutingPriority::High].into_iter().zip(&row.thresholds);
    let thresholds = thresholds.map(|(priority, limits)| circuit_breakers::Thresholds {
        priority: priority.into(),
        max_connections: Some(UInt32Value { value: limits.max_connections }),
        max_pending_requests: Some(UInt32Value { value: limits.max_pending_requests }),
        max_requests: Some(UInt32Value { value: limits.max_requests }),
        max_retries: Some(UInt32Value { value: limits.max_retries }),
        ..Default::default()
    });
    pb::ClusterStatus {
        name: row.name.clone(),
        added_via_api: row.added_via_api,
        success_rate_ejection_threshold: row.outlier.and_then(|o| percent(o.threshold)),
        host_statuses: row.hosts.iter().map(host_status).collect(),
        local_origin_success_rate_ejection_threshold: row.outlier.and_then(|o| percent(o.local_threshold)),
        circuit_breakers: Some(CircuitBreakers { thresholds: thresholds.collect(), ..Default::default() }),
        observability_name: row.observability_name.clone(),
        eds_service_name: row.eds_service_name.clone(),
    }
}

fn host_status(host: &HostRow) -> pb::HostStatus {
    let metric = |kind: pb::simple_metric::Type| {
        move |(name, value): &(&str, u64)| pb::SimpleMetric {
            r#type: kind.into(),
            value: *value,
            name: (*name).into(),
        }
    };
    let counters = host.counters.iter().map(metric(pb::simple_metric::Type::Counter));
    let gauges = host.gauges.iter().map(metric(pb::simple_metric::Type::Gauge));
    let flags = &host.health;
    let eds = match flags {
        f if f.eds_status_draining => HealthStatus::Draining,
        f if f.failed_eds_health => HealthStatus::Unhealthy,
        f if f.degraded_eds_health => HealthStatus::Degraded,
        _ => HealthStatus::Healthy,
    };
    pb::HostStatus {
        address: Some(host.address.clone()),
        stats: counters.chain(gauges).collect(),
        health_status: Some(pb::HostHealthStatus {
            failed_active_health_check: flags.failed_active_hc,
            failed_outlier_check: flags.failed_outlier_check,
            failed_active_degraded_check: flags.degraded_active_hc,
            pending_dynamic_removal: flags.pending_dynamic_removal,
            pending_active_hc: flags.pending_active_hc,
            excluded_via_immediate_hc_fail: flags.excluded_via_immediate_hc_fail,
            active_hc_timeout: flags.active_hc_timeout,
            eds_health_status: eds.into(),
            ..Default::default()
        }),
        success_rate: host.success_rate.map(|value| Percent { value }),
        weight: host.weight,
        hostname: host.hostname.clone(),
        priority: host.priority,
        local_origin_success_rate: host.local_success_rate.map(|value| Percent { value }),
        locality: Some(host.locality.clone()),
    }
}

pub(crate) fn listeners(admin: &Admin, query: &Query) -> Reply {
    let rows = admin.source.listeners();
    if query.get("format") == Some("json") {
        let statuses = rows.iter().map(|row| {
            let mut addresses = row.addresses.iter().map(|(address, _)| address.clone());
            pb::ListenerStatus {
                name: row.name.clone(),
                local_address: addresses.next(),
                additional_local_addresses: addresses.collect(),
            }
        });
        return json_of(&pb::Listeners { listener_statuses: statuses.collect() }, false);
    }
    let lines = rows
        .iter()
        .flat_map(|row| row.addresses.iter().map(move |(_, address)| format!("{}::{address}\n", row.name)));
    Reply::text(lines.collect::<String>())
}
