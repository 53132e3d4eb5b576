//! Distribution over hosts.

use std::collections::HashMap;
use std::sync::Arc;

use sampan_core::Address;

use super::*;
use crate::config::ClusterConfig;
use crate::host::HealthFlag;
use crate::manager::ClusterManager;
use crate::worker::WorkerClusters;
use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::google::protobuf::UInt32Value;

fn endpoint(port: u32, weight: u32, health: core_pb::HealthStatus) -> pb::LbEndpoint {
    let address = core_pb::Address {
        address: Some(core_pb::address::Address::SocketAddress(core_pb::SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(core_pb::socket_address::PortSpecifier::PortValue(port)),
            ..Default::default()
        })),
    };
    let endpoint = pb::Endpoint { address: Some(address), ..Default::default() };
    pb::LbEndpoint {
        host_identifier: Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
        load_balancing_weight: Some(UInt32Value { value: weight }),
        health_status: health.into(),
        ..Default::default()
    }
}

/// Hosts as (priority, port, weight, health).
fn worker(
    policy: cluster_pb::cluster::LbPolicy,
    hosts: &[(u32, u32, u32, core_pb::HealthStatus)],
) -> WorkerClusters {
    let endpoints = hosts
        .iter()
        .map(|&(priority, port, weight, health)| pb::LocalityLbEndpoints {
            priority,
            lb_endpoints: vec![endpoint(port, weight, health)],
            ..Default::default()
        })
        .collect();
    let message = cluster_pb::Cluster {
        name: "c".into(),
        lb_policy: policy.into(),
        load_assignment: Some(pb::ClusterLoadAssignment { endpoints, ..Default::default() }),
        ..Default::default()
    };
    let manager = ClusterManager::new(&sampan_core::stats::Store::new().root(), Default::default());
    manager.add(ClusterConfig::from_proto(&message, false).unwrap()).unwrap();
    WorkerClusters::new(manager.clusters())
}

fn port(host: &WorkerHost) -> u16 {
    host.host.address().port().unwrap()
}

fn counts(worker: &WorkerClusters, picks: usize) -> HashMap<u16, usize> {
    let cluster = worker.get("c").unwrap();
    let mut counts = HashMap::new();
    for _ in 0..picks {
        if let Some(host) = cluster.pick(&LbContext::default()) {
            *counts.entry(port(&host)).or_default() += 1;
        }
    }
    counts
}

use cluster_pb::cluster::LbPolicy as P;
use core_pb::HealthStatus::{Degraded, Healthy, Unhealthy};

#[test]
fn round_robin_is_exact() {
    let worker = worker(P::RoundRobin, &[(0, 1, 1, Healthy), (0, 2, 1, Healthy), (0, 3, 1, Healthy)]);
    assert_eq!(counts(&worker, 300), HashMap::from([(1, 100), (2, 100), (3, 100)]));
}

#[test]
fn round_robin_honours_weights() {
    let worker = worker(P::RoundRobin, &[(0, 1, 1, Healthy), (0, 2, 3, Healthy)]);
    let counts = counts(&worker, 400);
    assert!((99..=101).contains(&counts[&1]), "{counts:?}");
}

#[test]
fn random_ignores_weights() {
    let worker = worker(P::Random, &[(0, 1, 1, Healthy), (0, 2, 100, Healthy)]);
    let counts = counts(&worker, 2000);
    assert!((800..1200).contains(&counts[&1]), "{counts:?}");
}

#[test]
fn least_request_avoids_the_busy() {
    let worker = worker(P::LeastRequest, &[(0, 1, 1, Healthy), (0, 2, 1, Healthy)]);
    let cluster = worker.get("c").unwrap();
    for host in cluster.cluster().hosts().hosts().filter(|h| h.address().port() == Some(1)) {
        host.stats.rq_active.inc();
    }
    // Two draws with replacement: the busy one is taken when both draws hit it, a quarter of the time.
    let counts = counts(&worker, 2000);
    assert!((400..600).contains(&counts[&1]), "{counts:?}");
}

#[test]
fn least_request_with_weights_follows_the_schedule() {
    let worker = worker(P::LeastRequest, &[(0, 1, 1, Healthy), (0, 2, 3, Healthy)]);
    let counts = counts(&worker, 400);
    assert!((99..=101).contains(&counts[&1]), "{counts:?}");
}

#[test]
fn unhealthy_hosts_wait_for_panic() {
    let worker = worker(P::RoundRobin, &[(0, 1, 1, Healthy), (0, 2, 1, Healthy), (0, 3, 1, Unhealthy)]);
    assert!(!counts(&worker, 100).contains_key(&3));
    let panic = self::worker(P::RoundRobin, &[(0, 1, 1, Unhealthy), (0, 3, 1, Unhealthy)]);
    assert_eq!(counts(&panic, 100), HashMap::from([(1, 50), (3, 50)]));
    assert_eq!(panic.get("c").unwrap().stats().lb_healthy_panic.value(), 100);
}

#[test]
fn the_next_priority_takes_over() {
    let worker = worker(P::RoundRobin, &[(0, 1, 1, Unhealthy), (1, 2, 1, Healthy)]);
    assert_eq!(counts(&worker, 100), HashMap::from([(2, 100)]));
    let degraded = self::worker(P::RoundRobin, &[(0, 1, 1, Degraded), (1, 2, 1, Healthy)]);
    assert_eq!(counts(&degraded, 100), HashMap::from([(2, 100)]));
}

#[test]
fn a_retry_goes_elsewhere() {
    let worker = worker(P::RoundRobin, &[(0, 1, 1, Healthy), (0, 2, 1, Healthy)]);
    let cluster = worker.get("c").unwrap();
    let exclude = |host: &Host| host.address().port() == Some(1);
    for _ in 0..10 {
        let context = LbContext { exclude: Some(&exclude), max_attempts: 5, ..Default::default() };
        assert_eq!(port(&cluster.pick(&context).unwrap()), 2);
    }
}

#[test]
fn no_hosts_is_none() {
    let worker = worker(P::RoundRobin, &[]);
    assert!(worker.get("c").unwrap().pick(&LbContext::default()).is_none());
    assert_eq!(worker.get("c").unwrap().stats().upstream_cx_none_healthy.value(), 1);
}

#[test]
fn flags_have_envoys_names() {
    let host = Host::new(crate::host::HostSpec {
        address: Address::Pipe("/x".into()),
        hostname: &"".into(),
        weight: 1,
        priority: 0,
        locality: &Arc::default(),
        metadata: &None,
        tlvs: &None,
        flags: HealthFlag::FailedEdsHealth as u32 | HealthFlag::FailedOutlierCheck as u32,
        transport_socket: 0,
        monitored: false,
        starts_slowly: false,
    });
    assert_eq!(host.health_flags(), "/failed_outlier_check/failed_eds_health");
}
