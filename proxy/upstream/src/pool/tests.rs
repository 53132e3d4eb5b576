//! Pools against real sockets.

mod h1;
mod h2;
mod tcp;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;

fn with_breakers(
    mut message: cluster_pb::Cluster,
    set: impl FnOnce(&mut cluster_pb::circuit_breakers::Thresholds),
) -> cluster_pb::Cluster {
    let mut thresholds = cluster_pb::circuit_breakers::Thresholds::default();
    set(&mut thresholds);
    message.circuit_breakers =
        Some(cluster_pb::CircuitBreakers { thresholds: vec![thresholds], ..Default::default() });
    message
}
