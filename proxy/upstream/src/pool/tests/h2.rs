//! Connections of HTTP/2: shared, full, going, idle.

use std::rc::Rc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use sampan_core::header::{HeaderId, HeaderMap};
use tokio::net::TcpListener;

use super::super::*;
use crate::testing::{closes_idle, message, run, world};

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
fn http2_streams_share_a_connection() {
    run(async {
        let world = world(&h2_message(h2_upstream(100, usize::MAX, Duration::ZERO).await));
        let host = world.host();
        tokio::join!(h2_exchange(&host), h2_exchange(&host));
        let stats = world.stats();
        assert_eq!(stats.upstream_cx_http2_total.value(), 1);
        assert_eq!(stats.upstream_rq_total.value(), 2);
        assert_eq!(stats.upstream_rq_active.value(), 0);
    });
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
        closes_idle(&mut message);
        let world = world(&message);
        h2_exchange(&world.host()).await;
        assert_eq!(world.stats().upstream_cx_active.value(), 1);
        sampan_core::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(world.stats().upstream_cx_idle_timeout.value(), 1);
        assert_eq!(world.stats().upstream_cx_active.value(), 0);
        assert_eq!(world.stats().upstream_cx_destroy_local.value(), 1);
    });
}
