//! What the tests of this crate share: messages, a process of one worker, clients.
#![allow(dead_code, reason = "not every test file uses all of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot be set up has failed")]

use std::collections::BTreeMap;
use std::io::Read;
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::direct_response::v3::Config as DirectResponse;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;
use sampan_core::drain::Drain;
use sampan_core::runtime::Runtime;
use sampan_core::stats::Store;
use sampan_core::{Address, ConfigResult};
use sampan_listener::{Bound, ListenerConfig, Listeners, NetworkFilterRegistry, NodeInfo, Server, Worker};
use sampan_upstream::{ClusterConfig, ClusterManager, WorkerClusters};

pub(crate) const TCP: &str = "envoy.extensions.filters.listener";

pub(crate) fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

pub(crate) fn listener_filter(name: &str, message: &impl Message) -> pb::ListenerFilter {
    pb::ListenerFilter {
        name: name.to_owned(),
        config_type: Some(pb::listener_filter::ConfigType::TypedConfig(any(
            &format!("{TCP}.{name}"),
            message,
        ))),
        ..Default::default()
    }
}

/// A chain that says its name.
pub(crate) fn chain(name: &str, criteria: pb::FilterChainMatch) -> pb::FilterChain {
    let response = DirectResponse {
        response: Some(core_pb::DataSource {
            specifier: Some(core_pb::data_source::Specifier::InlineString(name.to_owned())),
            ..Default::default()
        }),
    };
    let config = any("envoy.extensions.filters.network.direct_response.v3.Config", &response);
    pb::FilterChain {
        name: name.to_owned(),
        filter_chain_match: Some(criteria),
        filters: vec![pb::Filter {
            name: "f".into(),
            config_type: Some(pb::filter::ConfigType::TypedConfig(config)),
        }],
        ..Default::default()
    }
}

pub(crate) fn address(ip: &str) -> core_pb::Address {
    core_pb::Address {
        address: Some(core_pb::address::Address::SocketAddress(core_pb::SocketAddress {
            address: ip.to_owned(),
            port_specifier: Some(core_pb::socket_address::PortSpecifier::PortValue(0)),
            ..Default::default()
        })),
    }
}

pub(crate) fn listener(ip: &str, chains: Vec<pb::FilterChain>) -> pb::Listener {
    pb::Listener {
        name: "l".into(),
        stat_prefix: "l".into(),
        address: Some(address(ip)),
        filter_chains: chains,
        ..Default::default()
    }
}

pub(crate) fn server(runtime: &[(&str, &str)]) -> Arc<Server> {
    let values: BTreeMap<_, _> = runtime.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let none = Arc::new(|_: &str| false);
    Arc::new(Server::new(Store::new(), Runtime::new(values), Default::default(), NodeInfo::default(), none))
}

pub(crate) fn parse(message: &pb::Listener, server: &Arc<Server>) -> ConfigResult<Arc<ListenerConfig>> {
    ListenerConfig::from_proto(message, server, &NetworkFilterRegistry::with_own_filters()).map(Arc::new)
}

/// Serves the listener on one worker while `client` runs on a thread of its own. Stats live as long as the model.
pub(crate) fn serve(
    message: &pb::Listener,
    server: &Arc<Server>,
    client: impl FnOnce(&[Address]) + Send + 'static,
) -> Kept {
    serve_clusters(message, server, &[], client)
}

/// Keeps the stats alive.
pub(crate) type Kept = (Arc<ListenerConfig>, ClusterManager);

pub(crate) fn serve_clusters(
    message: &pb::Listener,
    server: &Arc<Server>,
    clusters: &[Cluster],
    client: impl FnOnce(&[Address]) + Send + 'static,
) -> Kept {
    let config = parse(message, server).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let server = server.clone();
    let manager = ClusterManager::new(&server.stats.root(), Default::default());
    for cluster in clusters {
        manager.add(ClusterConfig::from_proto(cluster, false).unwrap()).unwrap();
    }
    let slots = manager.clusters();
    let kept = (config.clone(), manager);
    local.block_on(&runtime, async move {
        let drain = Drain::new();
        let worker = Worker::new(0, server, Rc::new(WorkerClusters::new(slots)), drain.signal());
        let listeners = Listeners::new(Rc::new(worker));
        let bound = Bound::bind(config.clone(), 1).unwrap();
        let addresses = bound.addresses.clone();
        let sockets = bound.listen().unwrap().pop().unwrap();
        listeners.add(config, sockets).unwrap();
        tokio::task::spawn_blocking(move || client(&addresses)).await.unwrap();
        listeners.stop();
        // Connections that the client has closed end with their next poll.
        sampan_core::time::timeout(Duration::from_secs(5), drain.idle()).await.unwrap();
    });
    kept
}

pub(crate) fn connect(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.socket_addr().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    stream
}

pub(crate) fn read(mut stream: impl Read) -> String {
    let mut text = String::new();
    match stream.read_to_string(&mut text) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("no end after {text:?}"),
        // A reset after the bytes is as good an end as a FIN here.
        _ => text,
    }
}

pub(crate) fn counter(server: &Server, name: &str) -> u64 {
    server.stats.value(name).expect(name)
}
