//! Pools against real sockets.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::google::protobuf::UInt32Value;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use super::*;
use crate::config::ClusterConfig;
use crate::lb::LbContext;
use crate::manager::ClusterManager;
use crate::worker::WorkerClusters;

fn message(port: u16) -> cluster_pb::Cluster {
    let address = core_pb::Address {
        address: Some(core_pb::address::Address::SocketAddress(core_pb::SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(core_pb::socket_address::PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    };
    let endpoint = pb::Endpoint { address: Some(address), ..Default::default() };
    let endpoint = pb::LbEndpoint {
        host_identifier: Some(pb::lb_endpoint::HostIdentifier::Endpoint(endpoint)),
        ..Default::default()
    };
    cluster_pb::Cluster {
        name: "c".into(),
        load_assignment: Some(pb::ClusterLoadAssignment {
            endpoints: vec![pb::LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

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

struct World {
    manager: ClusterManager,
    worker: WorkerClusters,
}

fn world(message: &cluster_pb::Cluster) -> World {
    let manager = ClusterManager::new(&Store::new().root(), Default::default());
    manager.add(ClusterConfig::from_proto(message, false).unwrap()).unwrap();
    let worker = WorkerClusters::new(manager.clusters());
    World { manager, worker }
}

impl World {
    fn host(&self) -> Rc<WorkerHost> {
        self.worker.get("c").unwrap().pick(&LbContext::default()).unwrap()
    }

    async fn h1(&self) -> H1Lease {
        match self.host().http(Priority::Default, false, None).await.unwrap() {
            HttpLease::H1(lease) => lease,
            _ => panic!("HTTP/2"),
        }
    }

    fn stats(&self) -> Arc<crate::ClusterStats> {
        self.worker.get("c").unwrap().stats().clone()
    }
}

/// An upstream that answers every request; closes after `per_connection` answers.
async fn upstream(per_connection: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::task::spawn_local(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::task::spawn_local(async move {
                let mut buffer = [0; 1024];
                for _ in 0..per_connection {
                    if !matches!(socket.read(&mut buffer).await, Ok(1..)) {
                        return;
                    }
                    socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
                }
            });
        }
    });
    port
}

async fn exchange(lease: &mut H1Lease) {
    let mut head = HeaderMap::with_capacity(128, 4);
    head.append(HeaderId::METHOD, "GET");
    head.append(HeaderId::PATH, "/");
    head.append(HeaderId::AUTHORITY, "a");
    let codec = lease.codec();
    codec.send_head(&head, true);
    std::future::poll_fn(|cx| codec.poll_flush(cx)).await.unwrap();
    let response = std::future::poll_fn(|cx| codec.poll_head(cx)).await.unwrap();
    assert_eq!(response.status, 200);
    while let Some(frame) = std::future::poll_fn(|cx| codec.poll_frame(cx)).await {
        frame.unwrap();
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        sampan_core::time::timeout(Duration::from_secs(5), test).await.expect("the test hangs");
    });
}

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
        #[allow(deprecated)]
        {
            message.common_http_protocol_options = Some(core_pb::HttpProtocolOptions {
                idle_timeout: Some(envoy_types::pb::google::protobuf::Duration {
                    seconds: 0,
                    nanos: 100_000_000,
                }),
                ..Default::default()
            });
        }
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
fn http2_streams_share_a_connection() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::task::spawn_local(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(async move {
                    let mut connection = ::h2::server::handshake(socket).await.unwrap();
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        respond.send_response(http::Response::new(()), true).unwrap();
                    }
                });
            }
        });
        let mut message = message(port);
        #[allow(deprecated)]
        {
            message.http2_protocol_options = Some(Default::default());
        }
        let world = world(&message);
        let host = world.host();
        let (a, b) = tokio::join!(
            host.http(Priority::Default, false, None),
            host.http(Priority::Default, false, None)
        );
        for lease in [a, b] {
            let HttpLease::H2(mut lease) = lease.unwrap() else { panic!("HTTP/1") };
            let mut head = HeaderMap::with_capacity(128, 4);
            head.append(HeaderId::METHOD, "GET");
            head.append(HeaderId::SCHEME, "http");
            head.append(HeaderId::PATH, "/");
            head.append(HeaderId::AUTHORITY, "a");
            let mut stream = lease.start(&head, true).unwrap();
            let response = std::future::poll_fn(|cx| stream.poll_head(cx)).await.unwrap();
            assert_eq!(response.status, 200);
        }
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_http2_total.value(), 1);
        assert_eq!(stats.upstream_rq_total.value(), 2);
        assert_eq!(stats.upstream_rq_active.value(), 0);
    });
}

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

#[test]
fn a_missing_unix_socket_is_envoys_immediate_error() {
    run(async {
        let mut message = message(1);
        let endpoints = &mut message.load_assignment.as_mut().unwrap().endpoints;
        let pb::lb_endpoint::HostIdentifier::Endpoint(endpoint) =
            endpoints[0].lb_endpoints[0].host_identifier.as_mut().unwrap()
        else {
            panic!("no endpoint")
        };
        endpoint.address.as_mut().unwrap().address = Some(core_pb::address::Address::Pipe(core_pb::Pipe {
            path: "/nonexistent/nosuch.sock".into(),
            ..Default::default()
        }));
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

#[test]
fn a_retry_budget_grows_with_the_active_requests() {
    use crate::circuit::Breakers;
    use crate::config::{RetryBudget, Thresholds};
    let budget = RetryBudget { percent: 50.0, min_concurrency: 1 };
    let thresholds = Thresholds { retry_budget: Some(budget), ..Default::default() };
    let breakers = Arc::new(Breakers::new(&thresholds, &Store::new().root()));
    let first = breakers.retry();
    assert!(first.is_some());
    assert!(breakers.retry().is_none(), "nothing is active: one at most");
    let active: Vec<_> = (0..4).map(|_| breakers.request().unwrap()).collect();
    let second = breakers.retry();
    assert!(second.is_some());
    assert!(breakers.retry().is_none(), "half of four are two");
    drop((first, second, active));
    assert_eq!(breakers.retries().current(), 0);
}

/// What a cluster costs that nobody uses: the model, the host, the slot.
#[test]
fn an_unused_cluster_is_small() {
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let manager = ClusterManager::new(&Store::new().root(), Default::default());
    let before = resident();
    for i in 0..2000 {
        let mut message = message(80);
        message.name = format!("cluster_{i}");
        manager.add(ClusterConfig::from_proto(&message, false).unwrap()).unwrap();
    }
    let each = resident().saturating_sub(before) / 2000;
    assert!(each < 4096, "{each} bytes each");
    assert!(manager.clusters().all().iter().all(|c| !c.is_used()));
}

/// An HTTP/2 upstream with a stream limit; sends GOAWAY after `requests` and answers `hold`ing.
async fn h2_upstream(limit: u32, requests: usize, hold: Duration) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::task::spawn_local(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::task::spawn_local(async move {
                let mut builder = ::h2::server::Builder::new();
                let mut connection =
                    builder.max_concurrent_streams(limit).handshake::<_, bytes::Bytes>(socket).await.unwrap();
                let mut seen = 0;
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    seen += 1;
                    if seen == requests {
                        connection.graceful_shutdown();
                    }
                    tokio::task::spawn_local(async move {
                        sampan_core::time::sleep(hold).await;
                        let _ = respond.send_response(http::Response::new(()), true);
                    });
                }
            });
        }
    });
    port
}

fn h2_message(port: u16) -> cluster_pb::Cluster {
    let mut message = message(port);
    #[allow(deprecated)]
    {
        message.http2_protocol_options = Some(Default::default());
    }
    message
}

async fn h2_exchange(host: &Rc<WorkerHost>) {
    let HttpLease::H2(mut lease) = host.http(Priority::Default, false, None).await.unwrap() else {
        panic!("HTTP/1")
    };
    let mut head = HeaderMap::with_capacity(128, 4);
    head.append(HeaderId::METHOD, "GET");
    head.append(HeaderId::SCHEME, "http");
    head.append(HeaderId::PATH, "/");
    head.append(HeaderId::AUTHORITY, "a");
    let mut stream = lease.start(&head, true).unwrap();
    let response = std::future::poll_fn(|cx| stream.poll_head(cx)).await.unwrap();
    assert_eq!(response.status, 200);
}

#[test]
fn a_full_http2_connection_gets_a_second_one() {
    run(async {
        let world = world(&h2_message(h2_upstream(1, usize::MAX, Duration::from_millis(30)).await));
        let host = world.host();
        h2_exchange(&host).await;
        // The peer's limit of one stream is known now.
        tokio::join!(h2_exchange(&host), h2_exchange(&host));
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_http2_total.value(), 2);
        assert_eq!(stats.upstream_rq_total.value(), 3);
        assert_eq!(stats.upstream_rq_active.value(), 0);
    });
}

#[test]
fn goaway_ends_a_connection_without_losing_requests() {
    run(async {
        let world = world(&h2_message(h2_upstream(100, 1, Duration::ZERO).await));
        let host = world.host();
        for _ in 0..3 {
            h2_exchange(&host).await;
            sampan_core::time::sleep(Duration::from_millis(30)).await;
        }
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_total.value(), 3);
        assert_eq!(stats.upstream_cx_active.value(), 0);
        assert_eq!(stats.upstream_cx_destroy_with_active_rq.value(), 0);
    });
}

#[test]
fn an_idle_http2_connection_closes() {
    run(async {
        let mut message = h2_message(h2_upstream(100, usize::MAX, Duration::ZERO).await);
        #[allow(deprecated)]
        {
            message.common_http_protocol_options = Some(core_pb::HttpProtocolOptions {
                idle_timeout: Some(envoy_types::pb::google::protobuf::Duration {
                    seconds: 0,
                    nanos: 100_000_000,
                }),
                ..Default::default()
            });
        }
        let world = world(&message);
        h2_exchange(&world.host()).await;
        assert_eq!(world.stats().upstream_cx_active.value(), 1);
        sampan_core::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(world.stats().upstream_cx_idle_timeout.value(), 1);
        assert_eq!(world.stats().upstream_cx_active.value(), 0);
        assert_eq!(world.stats().upstream_cx_destroy_local.value(), 1);
    });
}

#[test]
fn a_name_becomes_hosts_that_stay() {
    run(async {
        let mut message = message(upstream(100).await);
        message.cluster_discovery_type = Some(cluster_pb::cluster::ClusterDiscoveryType::Type(
            cluster_pb::cluster::DiscoveryType::StrictDns.into(),
        ));
        message.dns_lookup_family = cluster_pb::cluster::DnsLookupFamily::V4Only.into();
        #[allow(deprecated)]
        {
            message.dns_refresh_rate =
                Some(envoy_types::pb::google::protobuf::Duration { seconds: 0, nanos: 20_000_000 });
        }
        let endpoints = &mut message.load_assignment.as_mut().unwrap().endpoints;
        let pb::lb_endpoint::HostIdentifier::Endpoint(endpoint) =
            endpoints[0].lb_endpoints[0].host_identifier.as_mut().unwrap()
        else {
            panic!("no endpoint")
        };
        let Some(core_pb::address::Address::SocketAddress(socket)) =
            &mut endpoint.address.as_mut().unwrap().address
        else {
            panic!("no socket address")
        };
        socket.address = "localhost".into();
        let world = world(&message);
        world.manager.initialised().await;
        let before = world.host();
        assert_eq!(&*before.host.hostname, "localhost");
        assert_eq!(before.host.address().ip().unwrap().to_string(), "127.0.0.1");
        sampan_core::time::sleep(Duration::from_millis(100)).await;
        let stats = world.stats();
        assert!(stats.update_success.value() > 1);
        assert_eq!(stats.update_no_rebuild.value(), stats.update_success.value() - 1);
        assert_eq!((stats.membership_change.value(), stats.membership_total.value()), (1, 1));
        assert!(Rc::ptr_eq(&before, &world.host()));
        world.worker.get("c").unwrap().cluster().set_resolved(0, 0, Vec::new());
        assert!(world.worker.get("c").unwrap().pick(&LbContext::default()).is_none());
        assert_eq!(stats.membership_total.value(), 0);
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
