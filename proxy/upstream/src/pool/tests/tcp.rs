//! Connections of tunnels and of `tcp_proxy`.

use envoy_types::pb::google::protobuf::UInt32Value;

use super::super::*;
use super::with_breakers;
use crate::testing::{message, run, upstream, world};

#[test]
fn tcp_connections_are_fresh_and_limited() {
    run(async {
        let one = Some(UInt32Value { value: 1 });
        let message = with_breakers(message(upstream(1).await), |t| t.max_connections = one);
        let world = world(&message);
        let host = world.host();
        let options = ConnectOptions::default();
        let first = host.tcp(Priority::Default, &options).await.unwrap();
        assert!(first.transport.as_ref().unwrap().plain_tcp().is_some());
        assert_eq!(*first.info.remote, *host.host.address());
        let second = host.tcp(Priority::Default, &options).await;
        assert_eq!(second.err(), Some(PoolError::Overflow));
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_overflow.value(), 1);
        assert_eq!((stats.upstream_rq_total.value(), stats.upstream_rq_active.value()), (1, 1));
        first.count_bytes(10, 20);
        first.closed_by_peer();
        drop(first);
        assert_eq!(stats.upstream_cx_rx_bytes_total.value(), 10);
        assert_eq!(stats.upstream_cx_destroy_remote_with_active_rq.value(), 1);
        assert_eq!(stats.upstream_rq_active.value(), 0);
        drop(host.tcp(Priority::Default, &options).await.unwrap());
        assert_eq!(stats.upstream_cx_total.value(), 2);
    });
}
