//! `istio.metadata_exchange` (`io.istio.http.peer_metadata.Config`): who is at the other end, told in headers.
//!
//! A request's `x-envoy-peer-metadata` is taken off and left as `downstream_peer` in the filter state, a response's as
//! `upstream_peer`; our own is put in its place on the way out: always towards the server (unless its cluster is
//! external or says `disable_mx`), towards the client only if it told of itself. What a peer says under an id
//! (`x-envoy-peer-metadata-id`) is decoded once and remembered under that id, as in Istio.
//!
//! Without the workload discovery service, `workload_discovery` finds nothing. `shared_with_upstream` concerns internal
//! connections, of which there are none. `baggage` upstream and `upstream_filter_state` downstream are passed over, as
//! in Istio.
//!
//! Source: `source/extensions/filters/http/peer_metadata` of istio/proxy.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use envoy_types::pb::google::protobuf::{Any, Struct, value::Kind};
use prost::Message;
use sampan_config::istio::{Discovery, IstioHeaders, PeerMetadata as PeerMetadataMessage, Propagation};
use sampan_core::error::ConfigResult;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::peer::{self, Peer, SharedPeer};
use sampan_core::stream_info::{Metadata, StreamInfo};

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, Response, State, Step, decode};
use crate::stream::Stream;

pub(super) const TYPE: &str = sampan_config::istio::PEER_METADATA;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// How many ids a worker remembers, for each set of additional labels.
const REMEMBERED: usize = 500;

enum Find {
    Headers,
    Baggage,
    UpstreamState(String),
}

enum Tell {
    Headers { value: String, skip_external: bool },
    Baggage(String),
}

struct PeerMetadata {
    id: String,
    labels: Arc<[String]>,
    find_downstream: Vec<Find>,
    find_upstream: Vec<Find>,
    tell_downstream: Vec<Tell>,
    tell_upstream: Vec<Tell>,
    baggage: HeaderName,
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    filter(decode(any)?, context)
}

/// What the filter does where a control plane sends it as WebAssembly: headers both ways.
pub(super) fn make_plain(context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    use sampan_config::istio::{DiscoveryMethod, PropagationMethod};
    let find = DiscoveryMethod { method_specifier: Some(Discovery::IstioHeaders(IstioHeaders::default())) };
    let tell =
        PropagationMethod { method_specifier: Some(Propagation::IstioHeaders(IstioHeaders::default())) };
    let message = PeerMetadataMessage {
        downstream_discovery: vec![find.clone()],
        upstream_discovery: vec![find],
        downstream_propagation: vec![tell.clone()],
        upstream_propagation: vec![tell],
        ..PeerMetadataMessage::default()
    };
    filter(message, context)
}

fn filter(message: PeerMetadataMessage, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let node = &context.factory.server.node;
    let mut labels = message.additional_labels;
    labels.sort_unstable();
    labels.dedup();
    let find = |methods: Vec<sampan_config::istio::DiscoveryMethod>, downstream: bool| {
        let methods = methods.into_iter().filter_map(|m| m.method_specifier);
        methods
            .filter_map(|method| match method {
                Discovery::IstioHeaders(_) => Some(Find::Headers),
                Discovery::Baggage(_) => downstream.then_some(Find::Baggage),
                Discovery::UpstreamFilterState(m) => {
                    (!downstream).then_some(Find::UpstreamState(m.peer_metadata_key))
                }
                Discovery::WorkloadDiscovery(_) => None,
            })
            .collect()
    };
    let tell = |methods: Vec<sampan_config::istio::PropagationMethod>| {
        let methods = methods.into_iter().filter_map(|m| m.method_specifier);
        methods
            .map(|method| match method {
                Propagation::IstioHeaders(IstioHeaders { skip_external_clusters }) => Tell::Headers {
                    value: base64::engine::general_purpose::STANDARD.encode(node.own.peer(&labels).encode()),
                    skip_external: skip_external_clusters,
                },
                Propagation::Baggage(_) => Tell::Baggage(node.own.peer(&[]).baggage()),
            })
            .collect()
    };
    Ok(HttpFilterKind::Filter(Arc::new(PeerMetadata {
        id: node.id.clone(),
        find_downstream: find(message.downstream_discovery, true),
        find_upstream: find(message.upstream_discovery, false),
        tell_downstream: tell(message.downstream_propagation),
        tell_upstream: tell(message.upstream_propagation),
        baggage: HeaderName::new("baggage"),
        labels: labels.into(),
    })))
}

/// Whether the client told of itself, and its id: types without size, so that they cost the stream nothing.
struct ToldBoth;
struct ToldPeer;
struct ToldId;

thread_local! {
    static KNOWN: RefCell<Vec<(Arc<[String]>, Known)>> = const { RefCell::new(Vec::new()) };
}

type Known = HashMap<Box<[u8]>, Rc<SharedPeer>, foldhash::fast::RandomState>;

impl PeerMetadata {
    fn find(&self, methods: &[Find], headers: &HeaderMap, info: &StreamInfo) -> Option<Rc<SharedPeer>> {
        methods.iter().find_map(|method| match method {
            Find::Headers => {
                let value = headers.get(HeaderId::X_ENVOY_PEER_METADATA).filter(|v| !v.is_empty())?;
                let id = headers.get(HeaderId::X_ENVOY_PEER_METADATA_ID).unwrap_or_default();
                self.look_up(id, value)
            }
            Find::Baggage => {
                let value = std::str::from_utf8(headers.get_name(&self.baggage)?).ok()?;
                Some(SharedPeer::new(Peer::from_baggage(value)))
            }
            Find::UpstreamState(key) => peer::get(info.upstream_filter_state.as_deref()?, key).cloned(),
        })
    }

    /// The peer of that id; only who is new, or has no id, is decoded.
    fn look_up(&self, id: &[u8], value: &[u8]) -> Option<Rc<SharedPeer>> {
        if id.is_empty() {
            return self.decode(value);
        }
        KNOWN.with_borrow_mut(|all| {
            let index = all.iter().position(|(labels, _)| *labels == self.labels).unwrap_or_else(|| {
                all.push((self.labels.clone(), Known::default()));
                all.len() - 1
            });
            let known = &mut all[index].1;
            if let Some(peer) = known.get(id) {
                return Some(peer.clone());
            }
            if known.len() > REMEMBERED {
                let mut kept = 0;
                known.retain(|_, _| {
                    kept += 1;
                    kept > REMEMBERED / 4
                });
            }
            let peer = self.decode(value)?;
            known.insert(id.into(), peer.clone());
            Some(peer)
        })
    }

    /// What is no Base64 is a workload of which nothing is known, as in Istio; what is no `Struct` is nobody.
    fn decode(&self, value: &[u8]) -> Option<Rc<SharedPeer>> {
        let bytes = BASE64.decode(value).unwrap_or_default();
        let metadata = Struct::decode(bytes.as_slice()).ok()?;
        Some(SharedPeer::new(Peer::from_struct(&metadata, &self.labels, None)))
    }

    fn tell(
        &self,
        method: &Tell,
        headers: &mut HeaderMap,
        told: (bool, bool),
        skip: impl FnOnce(bool) -> bool,
    ) {
        match method {
            Tell::Headers { value, skip_external } => {
                if skip(*skip_external) {
                    return;
                }
                if told.1 {
                    headers.set(HeaderId::X_ENVOY_PEER_METADATA_ID, &self.id);
                }
                if told.0 {
                    headers.set(HeaderId::X_ENVOY_PEER_METADATA, value);
                }
            }
            Tell::Baggage(value) => headers.set_name(&self.baggage, value),
        }
    }
}

fn takes_headers(methods: &[Find]) -> bool {
    methods.iter().any(|method| matches!(method, Find::Headers))
}

fn take_off(headers: &mut HeaderMap) {
    headers.remove(HeaderId::X_ENVOY_PEER_METADATA_ID);
    headers.remove(HeaderId::X_ENVOY_PEER_METADATA);
}

/// Whether the stream's cluster is not to be told.
fn skips(name: Option<&str>, metadata: Option<&Metadata>, skip_external: bool) -> bool {
    if skip_external && name == Some("PassthroughCluster") {
        return true;
    }
    let Some(istio) = metadata.and_then(|m| m.get("istio")) else { return false };
    let is = |key: &str| {
        matches!(istio.fields.get(key).and_then(|v| v.kind.as_ref()), Some(Kind::BoolValue(true)))
    };
    (skip_external && is("external")) || is("disable_mx")
}

impl HttpFilter for PeerMetadata {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        if let Some(found) = self.find(&self.find_downstream, &stream.request, &stream.info) {
            peer::set(stream.info.filter_state.get_or_insert_default(), peer::DOWNSTREAM, &found);
        }
        if takes_headers(&self.find_downstream) {
            let peer = stream.request.contains(HeaderId::X_ENVOY_PEER_METADATA);
            let id = stream.request.contains(HeaderId::X_ENVOY_PEER_METADATA_ID);
            *state = match (peer, id) {
                (true, true) => Some(Box::new(ToldBoth)),
                (true, false) => Some(Box::new(ToldPeer)),
                (false, true) => Some(Box::new(ToldId)),
                (false, false) => None,
            };
            take_off(&mut stream.request);
        }
        if self.tell_upstream.is_empty() {
            return Step::Continue;
        }
        let cluster = stream.info.cluster.as_deref().and_then(|name| stream.worker.clusters.get(name));
        let metadata = cluster.as_ref().and_then(|c| c.cluster().config().metadata.as_deref());
        let name = cluster.as_ref().map(|c| &**c.cluster().name());
        for method in &self.tell_upstream {
            self.tell(method, &mut stream.request, (true, true), |external| skips(name, metadata, external));
        }
        Step::Continue
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        if let Some(found) = self.find(&self.find_upstream, &response.headers, &stream.info) {
            peer::set(stream.info.filter_state.get_or_insert_default(), peer::UPSTREAM, &found);
        }
        if takes_headers(&self.find_upstream) {
            take_off(&mut response.headers);
        }
        let told = state.as_deref().map_or((false, false), |told| {
            let both = told.is::<ToldBoth>();
            (both || told.is::<ToldPeer>(), both || told.is::<ToldId>())
        });
        let info = &stream.info;
        for method in &self.tell_downstream {
            self.tell(method, &mut response.headers, told, |external| {
                skips(info.cluster.as_deref(), info.cluster_metadata.as_deref(), external)
            });
        }
        Step::Continue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_clusters_are_told_nothing() {
        let metadata = |key: &str| -> Metadata {
            let value = envoy_types::pb::google::protobuf::Value { kind: Some(Kind::BoolValue(true)) };
            let fields = Struct { fields: std::iter::once((key.to_owned(), value)).collect() };
            std::iter::once(("istio".to_owned(), fields)).collect()
        };
        assert!(!skips(Some("a"), None, true));
        assert!(skips(Some("PassthroughCluster"), None, true));
        assert!(!skips(Some("PassthroughCluster"), None, false));
        assert!(skips(Some("a"), Some(&metadata("external")), true));
        assert!(!skips(Some("a"), Some(&metadata("external")), false));
        assert!(skips(Some("a"), Some(&metadata("disable_mx")), false));
    }
}
