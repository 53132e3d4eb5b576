//! Expectations from istio/proxy: `metadata_object_test.cc`, `metadata_exchange_test.cc`.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::stats::Store;

fn string(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

fn object(fields: &[(&str, Value)]) -> Struct {
    Struct { fields: fields.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect() }
}

fn node() -> Struct {
    let labels = object(&[
        ("app", string("productpage")),
        ("version", string("v1")),
        ("role", string("front")),
        (CANONICAL_NAME, string("productpage-v1")),
        (CANONICAL_REVISION, string("version-1")),
    ]);
    object(&[
        ("NAME", string("productpage-v1-84975bc778-pxz2w")),
        ("NAMESPACE", string("default")),
        ("CLUSTER_ID", string("client-cluster")),
        ("WORKLOAD_NAME", string("productpage-v1")),
        ("OWNER", string("kubernetes://apis/apps/v1/namespaces/default/deployments/productpage-v1")),
        ("LABELS", Value { kind: Some(Kind::StructValue(labels)) }),
        ("PLATFORM_METADATA", string("ignored")),
    ])
}

#[test]
fn a_node_is_read_and_told_again() {
    let peer = Peer::from_struct(&node(), &["role".to_owned()], Some(("eu", "eu-1")));
    assert_eq!(peer.kind, WorkloadKind::Deployment);
    assert_eq!((peer.service.as_str(), peer.revision.as_str()), ("productpage-v1", "version-1"));
    assert_eq!((peer.app.as_str(), peer.version.as_str()), ("productpage", "v1"));
    assert_eq!((peer.region.as_str(), peer.zone.as_str()), ("eu", "eu-1"));
    assert_eq!(peer.labels, [("role".to_owned(), "front".to_owned())]);
    let bytes = peer.encode();
    assert_eq!(bytes, peer.clone().encode());
    let told: Struct = prost::Message::decode(bytes.as_slice()).unwrap();
    assert_eq!(Peer::from_struct(&told, &["role".to_owned()], None), peer);
    let keys: BTreeMap<_, _> = told.fields.iter().collect();
    let expected = [
        "AVAILABILITY_ZONE",
        "CLUSTER_ID",
        "LABELS",
        "NAME",
        "NAMESPACE",
        "OWNER",
        "REGION",
        "WORKLOAD_NAME",
    ];
    assert_eq!(keys.into_keys().collect::<Vec<_>>(), expected);
}

#[test]
fn the_qualified_label_wins() {
    let labels = object(&[("app", string("a")), ("app.kubernetes.io/name", string("b"))]);
    let metadata = object(&[("LABELS", Value { kind: Some(Kind::StructValue(labels)) })]);
    assert_eq!(Peer::from_struct(&metadata, &[], None).app, "b");
}

#[test]
fn endpoints_and_baggage() {
    let peer = Peer::from_endpoint("foo-workload;default;foo-service;v1;my-cluster").unwrap();
    assert_eq!((peer.workload.as_str(), peer.cluster.as_str()), ("foo-workload", "my-cluster"));
    assert_eq!(Peer::from_endpoint("foo-workload;default;foo-service"), None);

    let text = "k8s.deployment.name=foo,service.name=foo-service,app.name=foo-app,service.version=v1alpha3,\
                app.version=v1,k8s.namespace.name=default,k8s.cluster.name=my-cluster";
    let peer = Peer::from_baggage(text);
    assert_eq!(peer.kind, WorkloadKind::Deployment);
    assert_eq!(peer.baggage(), text);
    let same = Peer::from_baggage("k8s.pod.name=foo,service.name=foo,service.version=v1");
    assert_eq!((same.app.as_str(), same.version.as_str()), ("foo", "v1"));
    assert_eq!(same.baggage(), "k8s.pod.name=foo,service.name=foo,service.version=v1");
}

#[test]
fn the_filter_state_shows_it() {
    let mut state = FilterState::default();
    let peer = SharedPeer::new(Peer::from_struct(&node(), &[], None));
    set(&mut state, DOWNSTREAM, &peer);
    let other = SharedPeer::new(Peer::default());
    set(&mut state, DOWNSTREAM, &other);
    assert_eq!(get(&state, DOWNSTREAM).unwrap().hash, peer.hash);
    let object = state.get("downstream_peer_obj").unwrap();
    assert_eq!(object.field("workload").as_deref(), Some("productpage-v1"));
    assert_eq!(object.field("type").as_deref(), Some("deployment"));
    assert_eq!(object.field("nothing"), None);
    assert_eq!(
        object.plain().as_deref(),
        Some(
            "type=deployment,workload=productpage-v1,name=productpage-v1-84975bc778-pxz2w,\
             cluster=client-cluster,namespace=default,service=productpage-v1,revision=version-1,\
             app=productpage,version=v1"
        )
    );
    let typed = state.get(DOWNSTREAM).unwrap().typed().unwrap();
    assert_eq!(typed["@type"], "type.googleapis.com/google.protobuf.Struct");
    assert_eq!(typed["value"]["namespace"], "default");
}

fn exchange(name: &str, store: &Store) -> Arc<Exchange> {
    let own = Peer { workload: name.to_owned(), ..Peer::default() };
    let stats = ExchangeStats::new(&store.root());
    Arc::new(Exchange::new("istio-peer-exchange", &own, "node", Vec::new(), stats))
}

fn workload(cell: &PeerCell) -> String {
    match cell.outcome() {
        Outcome::Found(peer) => peer.peer.workload.clone(),
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn two_proxies_tell_each_other_whoever_speaks_first() {
    for client_first in [true, false] {
        let store = Store::new();
        let (a, b) = tokio::io::duplex(64);
        let (client, client_cell) = exchange("client", &store).begin(a, Some("istio-peer-exchange"));
        let (server, server_cell) = exchange("server", &store).begin(b, Some("istio-peer-exchange"));
        let (Ok(client), Ok(server)) = (client, server) else { panic!("no exchange") };
        let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
        let mut text = [0; 5];
        let ask = async {
            first.write_all(b"hello").await.unwrap();
            let mut text = [0; 5];
            first.read_exact(&mut text).await.unwrap();
            text
        };
        let answer = async {
            second.read_exact(&mut text).await.unwrap();
            second.write_all(b"world").await.unwrap();
        };
        let (world, ()) = tokio::join!(ask, answer);
        assert_eq!((&world, &text), (b"world", b"hello"));
        assert_eq!((workload(&client_cell), workload(&server_cell)), ("server".into(), "client".into()));
        assert_eq!(store.value("metadata_exchange.metadata_added"), Some(2));
    }
}

#[tokio::test]
async fn a_peer_without_the_exchange_is_passed_on() {
    let store = Store::new();
    let (mut peer, b) = tokio::io::duplex(4096);
    let (stream, cell) = exchange("server", &store).begin(b, Some("istio-peer-exchange"));
    let Ok(mut stream) = stream else { panic!("no exchange") };
    peer.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut text = [0; 16];
    stream.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"GET / HTTP/1.1\r\n");
    assert!(matches!(cell.outcome(), Outcome::NotFound));
    assert_eq!(store.value("metadata_exchange.initial_header_not_found"), Some(1));

    let (_, b) = tokio::io::duplex(64);
    let (stream, cell) = exchange("server", &store).begin(b, Some("h2"));
    assert!(stream.is_err());
    assert!(matches!(cell.outcome(), Outcome::NotFound));
    assert_eq!(store.value("metadata_exchange.alpn_protocol_not_found"), Some(1));
}

#[tokio::test]
async fn an_early_end_passes_on_what_there_was_and_an_endless_header_breaks() {
    let store = Store::new();
    let (mut peer, b) = tokio::io::duplex(4096);
    let Ok(mut stream) = exchange("s", &store).begin(b, Some("istio-peer-exchange")).0 else { panic!() };
    peer.write_all(b"abc").await.unwrap();
    peer.shutdown().await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b"abc");

    let (mut peer, b) = tokio::io::duplex(4096);
    let Ok(mut stream) = exchange("s", &store).begin(b, Some("istio-peer-exchange")).0 else { panic!() };
    peer.write_all(&[0x3d, 0x23, 0x04, 0x67, 0xff, 0xff, 0xff, 0xff]).await.unwrap();
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}
