//! For tests: a cluster with one endpoint, an upstream behind it, a worker.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::endpoint::v3 as pb;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use crate::circuit::Priority;
use crate::config::ClusterConfig;
use crate::lb::LbContext;
use crate::manager::ClusterManager;
use crate::pool::{H1Lease, HttpLease};
use crate::worker::{WorkerClusters, WorkerHost};

/// A cluster `c` with one endpoint.
pub(crate) fn message(port: u16) -> cluster_pb::Cluster {
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

/// The address of its endpoint.
pub(crate) fn address_of(message: &mut cluster_pb::Cluster) -> &mut core_pb::address::Address {
    let endpoints = &mut message.load_assignment.as_mut().unwrap().endpoints;
    let pb::lb_endpoint::HostIdentifier::Endpoint(endpoint) =
        endpoints[0].lb_endpoints[0].host_identifier.as_mut().unwrap()
    else {
        panic!("no endpoint")
    };
    endpoint.address.as_mut().unwrap().address.as_mut().unwrap()
}

/// Connections of the cluster close after a tenth of a second without a request.
pub(crate) fn closes_idle(message: &mut cluster_pb::Cluster) {
    #[allow(deprecated)]
    {
        message.common_http_protocol_options = Some(core_pb::HttpProtocolOptions {
            idle_timeout: Some(ProtoDuration { seconds: 0, nanos: 100_000_000 }),
            ..Default::default()
        });
    }
}

/// A manager with one cluster, and a worker of it.
pub(crate) struct World {
    pub(crate) manager: ClusterManager,
    pub(crate) worker: WorkerClusters,
}

pub(crate) fn world(message: &cluster_pb::Cluster) -> World {
    let manager = ClusterManager::new(&Store::new().root(), Default::default());
    manager.add(ClusterConfig::from_proto(message, false).unwrap()).unwrap();
    let worker = WorkerClusters::new(manager.clusters());
    World { manager, worker }
}

impl World {
    pub(crate) fn host(&self) -> Rc<WorkerHost> {
        self.worker.get("c").unwrap().pick(&LbContext::default()).unwrap()
    }

    pub(crate) async fn h1(&self) -> H1Lease {
        match self.host().http(Priority::Default, false, None).await.unwrap() {
            HttpLease::H1(lease) => lease,
            _ => panic!("HTTP/2"),
        }
    }

    pub(crate) fn stats(&self) -> Arc<crate::ClusterStats> {
        self.worker.get("c").unwrap().stats().clone()
    }
}

/// An upstream that answers every request; closes after `per_connection` answers.
pub(crate) async fn upstream(per_connection: usize) -> u16 {
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

/// A request and its answer.
pub(crate) async fn exchange(lease: &mut H1Lease) {
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

/// Runs a test as a worker would, for five seconds at most.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        sampan_core::time::timeout(Duration::from_secs(5), test).await.expect("the test hangs");
    });
}
