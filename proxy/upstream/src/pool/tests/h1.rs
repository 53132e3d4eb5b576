//! Connections of HTTP/1: used again, closed, refused, limited.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::google::protobuf::UInt32Value;
use tokio::net::TcpListener;

use super::super::*;
use super::with_breakers;
use crate::testing::{address_of, closes_idle, exchange, message, run, upstream, world};

#[test]
fn a_released_connection_is_used_again() {
    run(async {
        let world = world(&message(upstream(100).await));
        for _ in 0..3 {
            let mut lease = world.h1().await;
            exchange(&mut lease).await;
            lease.release();
        }
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_total.value(), 1);
        assert_eq!(stats.upstream_cx_http1_total.value(), 1);
        assert_eq!(stats.upstream_rq_total.value(), 3);
        assert_eq!(stats.upstream_rq_active.value(), 0);
        // As Envoy counts it: only the first request had to wait.
        assert_eq!(stats.upstream_rq_pending_total.value(), 1);
        assert_eq!(stats.upstream_rq_pending_active.value(), 0);
        let host = world.host().host.clone();
        assert_eq!((host.stats.cx_active.value(), host.stats.rq_total.value()), (1, 3));
    });
}

#[test]
fn a_connection_closed_by_the_peer_is_not_handed_out() {
    run(async {
        let world = world(&message(upstream(1).await));
        for _ in 0..2 {
            let mut lease = world.h1().await;
            exchange(&mut lease).await;
            lease.release();
            sampan_core::time::sleep(Duration::from_millis(20)).await;
        }
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_total.value(), 2);
        sampan_core::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(stats.upstream_cx_destroy_remote.value(), 2, "the sweeper sees the second one");
        assert_eq!(stats.upstream_cx_destroy_with_active_rq.value(), 0);
        assert_eq!(stats.upstream_cx_active.value(), 0);
    });
}

#[test]
fn the_idle_timeout_closes() {
    run(async {
        let mut message = message(upstream(100).await);
        closes_idle(&mut message);
        let world = world(&message);
        let mut lease = world.h1().await;
        exchange(&mut lease).await;
        lease.release();
        sampan_core::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(world.stats().upstream_cx_active.value(), 1);
        sampan_core::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(world.stats().upstream_cx_idle_timeout.value(), 1);
        assert_eq!(world.stats().upstream_cx_destroy_local.value(), 1);
    });
}

#[test]
fn a_dropped_lease_closes_with_an_active_request() {
    run(async {
        let world = world(&message(upstream(100).await));
        drop(world.h1().await);
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_destroy_local_with_active_rq.value(), 1);
        assert_eq!(stats.upstream_cx_active.value(), 0);
        assert_eq!(stats.upstream_rq_active.value(), 0);
    });
}

#[test]
fn a_refused_connection_fails_who_waits() {
    run(async {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let world = world(&message(port));
        let host = world.host();
        let (a, b) = tokio::join!(
            host.http(Priority::Default, false, None),
            host.http(Priority::Default, false, None)
        );
        for result in [a, b] {
            let Err(PoolError::Connect(failure)) = result else { panic!("no connect failure") };
            assert_eq!(failure.reset_reason(), "remote_connection_failure");
            assert_eq!(&*failure.reason, "delayed connect error: Connection refused");
        }
        let stats = world.stats();
        assert_eq!(stats.upstream_rq_pending_failure_eject.value(), 2);
        assert_eq!(stats.upstream_cx_connect_fail.value(), stats.upstream_cx_total.value());
        assert_eq!(stats.upstream_rq_total.value(), 0);
        assert_eq!(stats.upstream_cx_active.value(), 0);
    });
}

#[test]
fn the_breakers_hold() {
    run(async {
        let one = Some(UInt32Value { value: 1 });
        let message = with_breakers(message(upstream(100).await), |t| {
            t.max_connections = one;
            t.max_pending_requests = one;
            t.track_remaining = true;
        });
        let world = world(&message);
        let mut first = world.h1().await;
        let host = world.host();
        let second = host.http(Priority::Default, false, None);
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        let third = host.http(Priority::Default, false, None).await;
        assert_eq!(third.err(), Some(PoolError::Overflow));
        let stats = world.stats();
        assert_eq!(stats.upstream_rq_pending_overflow.value(), 1);
        assert!(stats.upstream_cx_overflow.value() >= 1);
        let scope = world.worker.get("c").unwrap().cluster().scope().scope("circuit_breakers.default");
        assert_eq!(scope.gauge("cx_open").value(), 1);
        assert_eq!(scope.gauge("rq_pending_open").value(), 1);
        assert_eq!(scope.gauge("remaining_cx").value(), 0);
        exchange(&mut first).await;
        first.release();
        let HttpLease::H1(second) = second.await.unwrap() else { panic!("HTTP/2") };
        assert_eq!(second.streams_before(), 1);
        assert_eq!(stats.upstream_cx_total.value(), 1);
        drop(second);
        assert_eq!(scope.gauge("cx_open").value(), 0);
        assert_eq!(scope.gauge("remaining_cx").value(), 1);
        assert_eq!(scope.gauge("rq_pending_open").value(), 0);
    });
}

#[test]
fn a_request_that_stops_waiting_is_counted_and_its_connection_kept() {
    run(async {
        let world = world(&message(upstream(100).await));
        let host = world.host();
        {
            let waiting = host.http(Priority::Default, false, None);
            tokio::pin!(waiting);
            assert!(futures_util::poll!(&mut waiting).is_pending());
        }
        assert_eq!(world.stats().upstream_rq_cancelled.value(), 1);
        assert_eq!(world.stats().upstream_rq_pending_active.value(), 0);
        sampan_core::time::sleep(Duration::from_millis(20)).await;
        let mut lease = world.h1().await;
        exchange(&mut lease).await;
        assert_eq!(world.stats().upstream_cx_total.value(), 1);
    });
}

#[test]
fn a_removed_cluster_closes_its_connections() {
    run(async {
        let world = world(&message(upstream(100).await));
        let stats = world.stats();
        let mut lease = world.h1().await;
        exchange(&mut lease).await;
        lease.release();
        assert!(world.manager.remove("c"));
        assert!(world.worker.get("c").is_none());
        assert_eq!(stats.upstream_cx_active.value(), 0);
    });
}

#[test]
fn a_missing_unix_socket_is_envoys_immediate_error() {
    run(async {
        let mut message = message(1);
        *address_of(&mut message) = core_pb::address::Address::Pipe(core_pb::Pipe {
            path: "/nonexistent/nosuch.sock".into(),
            ..Default::default()
        });
        let world = world(&message);
        let Err(PoolError::Connect(failure)) = world.host().http(Priority::Default, false, None).await else {
            panic!("no connect failure")
        };
        assert_eq!(
            &*failure.reason,
            "immediate connect error: No such file or directory|remote address:/nonexistent/nosuch.sock"
        );
        assert_eq!(failure.reset_reason(), "remote_connection_failure");
        assert_eq!(world.stats().upstream_cx_destroy_remote.value(), 1);
    });
}

#[test]
fn max_requests_counts_when_the_last_begins() {
    run(async {
        let mut message = message(upstream(100).await);
        #[allow(deprecated)]
        {
            message.max_requests_per_connection = Some(UInt32Value { value: 2 });
        }
        let world = world(&message);
        for total in [1, 1, 2, 2] {
            let mut lease = world.h1().await;
            exchange(&mut lease).await;
            lease.release();
            assert_eq!(world.stats().upstream_cx_total.value(), total);
        }
        assert_eq!(world.stats().upstream_cx_max_requests.value(), 2);
        assert_eq!(world.stats().upstream_cx_destroy_local.value(), 2);
        assert_eq!(world.stats().upstream_cx_active.value(), 0);
    });
}

/// For callgrind: run with `HOT_PATH=1000` and `HOT_PATH=2000`, the difference is the cost of 1000 rounds of
/// "get the cluster, pick, check out, release".
#[test]
#[ignore = "a measurement"]
fn hot_path() {
    let rounds = std::env::var("HOT_PATH").ok().and_then(|v| v.parse().ok()).unwrap_or(1000);
    run(async move {
        let world = world(&message(upstream(100).await));
        let mut lease = world.h1().await;
        exchange(&mut lease).await;
        lease.release();
        for _ in 0..rounds {
            world.h1().await.release();
        }
        assert_eq!(world.stats().upstream_cx_total.value(), 1);
    });
}
