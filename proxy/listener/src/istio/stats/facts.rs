//! What the labels of a stream follow from.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use sampan_core::format::FormatContext;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::peer::{self, Outcome, SharedPeer};
use sampan_core::stream_info::{Metadata, ResponseFlags, StreamInfo, TlsInfo};

use super::service::{self, Service};
use super::{IstioStats, Reporter};

/// Which metrics are meant, and so which labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Shape {
    Http,
    Grpc,
    Messages,
    Tcp,
}

impl Shape {
    /// The counters, without `istio_`.
    pub(super) fn counters(self) -> &'static [&'static str] {
        match self {
            Self::Http | Self::Grpc => &["requests_total"],
            Self::Messages => &["request_messages_total", "response_messages_total"],
            Self::Tcp => &[
                "tcp_connections_opened_total",
                "tcp_connections_closed_total",
                "tcp_sent_bytes_total",
                "tcp_received_bytes_total",
            ],
        }
    }
}

/// The other end, as far as somebody told.
#[derive(Clone)]
pub(super) enum Far {
    Unknown,
    /// By metadata exchange.
    Peer(Rc<SharedPeer>),
    /// By the endpoint's metadata, which is read when counters are made.
    Endpoint(Arc<Metadata>),
}

/// What a service is called where the cluster is none of a service.
type Special = Option<&'static str>;

const SPECIAL: [&str; 5] = [
    "BlackHoleCluster",
    "PassthroughCluster",
    "InboundPassthroughCluster",
    "InboundPassthroughClusterIpv4",
    "InboundPassthroughClusterIpv6",
];

pub(super) struct Facts<'a> {
    pub(super) stats: &'a IstioStats,
    pub(super) shape: Shape,
    pub(super) far: Far,
    /// The server behind a gateway.
    pub(super) behind: Option<Rc<SharedPeer>>,
    /// SPIFFE names of both ends; empty where there is none.
    pub(super) peer_san: Cow<'a, str>,
    pub(super) local_san: Cow<'a, str>,
    /// None where it is not for us to say.
    pub(super) mutual_tls: Option<bool>,
    pub(super) service: Option<Rc<Service>>,
    pub(super) special: Special,
    /// The `host` header, where it may name the service and nothing else does.
    pub(super) host: &'a str,
    pub(super) code: u16,
    pub(super) grpc_status: Option<i64>,
    pub(super) flags: ResponseFlags,
    /// What the expressions of the overrides evaluate to.
    pub(super) values: Vec<String>,
}

/// The same to be kept.
pub(super) struct OwnedFacts {
    stats: u64,
    shape: Shape,
    far: Far,
    behind: Option<Rc<SharedPeer>>,
    peer_san: Box<str>,
    local_san: Box<str>,
    mutual_tls: Option<bool>,
    service: u64,
    special: Special,
    host: Box<str>,
    code: u16,
    grpc_status: Option<i64>,
    flags: ResponseFlags,
    values: Vec<String>,
}

fn first_san(tls: Option<&TlsInfo>, peer: bool) -> &str {
    let certificate = tls.and_then(|tls| if peer { tls.peer.as_ref() } else { tls.local.as_ref() });
    certificate.and_then(|c| c.uri_sans.first()).map_or("", |san| san)
}

/// The peer of a direction: of the stream's headers, or of the exchange on its connection.
fn peer_of(info: &StreamInfo, downstream: bool) -> Option<Rc<SharedPeer>> {
    let key = if downstream { peer::DOWNSTREAM } else { peer::UPSTREAM };
    if let Some(found) = info.filter_state.as_deref().and_then(|state| peer::get(state, key)) {
        return Some(found.clone());
    }
    match super::network::exchanged(info, downstream) {
        Some(Outcome::Found(peer)) => Some(peer),
        _ => None,
    }
}

fn endpoint(info: &StreamInfo) -> Option<&Arc<Metadata>> {
    let metadata = info.upstream.as_ref()?.host_metadata.as_ref()?;
    metadata.get("istio")?.fields.contains_key("workload").then_some(metadata)
}

impl<'a> Facts<'a> {
    pub(super) fn new(
        stats: &'a IstioStats,
        shape: Shape,
        context: &FormatContext<'a>,
        grpc_status: Option<i64>,
    ) -> Self {
        let (request, info) = (context.request, context.info);
        let mut facts = Self {
            stats,
            shape,
            far: Far::Unknown,
            behind: None,
            peer_san: Cow::Borrowed(""),
            local_san: Cow::Borrowed(""),
            mutual_tls: None,
            service: None,
            special: None,
            host: "",
            code: info.response_code,
            grpc_status,
            flags: info.flags,
            values: stats.overrides.values(context),
        };
        facts.find_service(request, info);
        match stats.reporter {
            Reporter::Client => facts.find_server(info),
            Reporter::Server | Reporter::ServerGateway => facts.find_client(info),
        }
        if shape == Shape::Messages {
            (facts.code, facts.flags) = (0, ResponseFlags::default());
        }
        facts
    }

    fn find_service(&mut self, request: Option<&'a HeaderMap>, info: &StreamInfo) {
        let cluster = info.cluster.as_deref();
        self.special = match info.route_name.as_deref() {
            Some("block_all") => Some("BlackHoleCluster"),
            Some("allow_any") => Some("PassthroughCluster"),
            _ => cluster.and_then(|name| SPECIAL.into_iter().find(|special| *special == name)),
        };
        if self.special.is_none() {
            self.service = info.cluster_metadata.as_ref().and_then(service::of);
        }
        if self.stats.host_fallback && self.service.as_ref().is_none_or(|service| service.host.is_none()) {
            self.host = request.and_then(|r| r.get_str(HeaderId::AUTHORITY)).unwrap_or_default();
        }
    }

    fn find_client(&mut self, info: &'a StreamInfo) {
        if let Some(peer) = peer_of(info, true) {
            self.far = Far::Peer(peer);
        }
        if self.stats.reporter == Reporter::ServerGateway {
            self.behind = peer_of(info, false);
        }
        // Who ended TLS before us may have said whom it saw.
        let said = |key| {
            let object = info.state(key);
            let text = object.as_ref().and_then(|object| object.plain());
            text.map_or(Cow::Borrowed(""), |text| Cow::Owned(text.into_owned()))
        };
        self.peer_san = said("io.istio.peer_principal");
        self.local_san = said("io.istio.local_principal");
        if self.peer_san.is_empty() && self.local_san.is_empty() {
            let tls = info.connection.tls.as_deref();
            (self.peer_san, self.local_san) = (first_san(tls, true).into(), first_san(tls, false).into());
        }
        self.mutual_tls = Some(!self.peer_san.is_empty() && !self.local_san.is_empty());
    }

    fn find_server(&mut self, info: &'a StreamInfo) {
        match (peer_of(info, false), endpoint(info)) {
            (Some(peer), _) => self.far = Far::Peer(peer),
            (None, Some(metadata)) => self.far = Far::Endpoint(metadata.clone()),
            (None, None) => {}
        }
        let tls = info.upstream.as_ref().and_then(|upstream| upstream.tls.as_deref());
        (self.peer_san, self.local_san) = (first_san(tls, true).into(), first_san(tls, false).into());
    }

    fn service_number(&self) -> u64 {
        self.service.as_ref().map_or(0, |service| service.number)
    }

    pub(super) fn hash(&self) -> u64 {
        let mut hasher = foldhash::fast::FixedState::default().build_hasher();
        (self.stats.number, self.shape, self.code, self.grpc_status, self.flags).hash(&mut hasher);
        self.values.hash(&mut hasher);
        (&*self.peer_san, &*self.local_san, self.host, self.special, self.service_number()).hash(&mut hasher);
        match &self.far {
            Far::Unknown => 0,
            Far::Peer(peer) => peer.hash,
            Far::Endpoint(metadata) => Arc::as_ptr(metadata) as u64,
        }
        .hash(&mut hasher);
        hasher.finish()
    }

    /// Whether these are the facts that were kept.
    pub(super) fn is(&self, kept: &OwnedFacts) -> bool {
        let far = match (&self.far, &kept.far) {
            (Far::Unknown, Far::Unknown) => true,
            (Far::Peer(a), Far::Peer(b)) => same(a, b),
            (Far::Endpoint(a), Far::Endpoint(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let behind = match (&self.behind, &kept.behind) {
            (None, None) => true,
            (Some(a), Some(b)) => same(a, b),
            _ => false,
        };
        far && behind
            && self.stats.number == kept.stats
            && (self.shape, self.code, self.grpc_status) == (kept.shape, kept.code, kept.grpc_status)
            && self.flags == kept.flags
            && self.values == kept.values
            && (self.mutual_tls, self.special) == (kept.mutual_tls, kept.special)
            && self.service_number() == kept.service
            && *self.peer_san == *kept.peer_san
            && *self.local_san == *kept.local_san
            && *self.host == *kept.host
    }

    pub(super) fn to_owned(&self) -> OwnedFacts {
        OwnedFacts {
            stats: self.stats.number,
            shape: self.shape,
            far: self.far.clone(),
            behind: self.behind.clone(),
            peer_san: (*self.peer_san).into(),
            local_san: (*self.local_san).into(),
            mutual_tls: self.mutual_tls,
            service: self.service_number(),
            special: self.special,
            host: self.host.into(),
            code: self.code,
            grpc_status: self.grpc_status,
            flags: self.flags,
            values: self.values.clone(),
        }
    }
}

fn same(a: &Rc<SharedPeer>, b: &Rc<SharedPeer>) -> bool {
    Rc::ptr_eq(a, b) || (a.hash == b.hash && a.peer == b.peer)
}
