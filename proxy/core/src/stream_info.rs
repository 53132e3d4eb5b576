//! What becomes known about a connection and a stream on their way; read by matchers, formatter and access log.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::google::protobuf::Struct;

use crate::Address;
use crate::peer::PeerCell;

mod filter_state;
mod flags;
mod slots;
mod url_pem;

pub use filter_state::{FilterState, FilterStateObject, StateObject};
pub use flags::{ResponseFlag, ResponseFlags};
pub use slots::Slots;
pub use url_pem::UrlPem;

/// The protocol of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    Http11,
    /// HTTP/2
    Http2,
    /// HTTP/3
    Http3,
}

impl Protocol {
    /// As `%PROTOCOL%` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "HTTP/1.0",
            Self::Http11 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
            Self::Http3 => "HTTP/3",
        }
    }
}

/// What TLS told about a connection; certificates as the formatter and XFCC print them.
#[derive(Debug, Clone, Default)]
pub struct TlsInfo {
    /// `TLSv1.2`, `TLSv1.3`
    pub version: &'static str,
    /// OpenSSL-style cipher name, `TLS_AES_128_GCM_SHA256`, `ECDHE-RSA-AES128-GCM-SHA256`
    pub cipher: &'static str,
    /// The key exchange group, `X25519MLKEM768`, `P-256`; empty where unknown.
    pub group: &'static str,
    /// The negotiated ALPN protocol.
    pub alpn: Option<Arc<str>>,
    /// The server name the client asked for.
    pub sni: Option<Arc<str>>,
    /// Hex session id; empty where there is none.
    pub session_id: String,
    /// The peer's leaf certificate.
    pub peer: Option<Arc<CertInfo>>,
    /// The certificates above the peer's leaf, in the order in which they were sent.
    pub peer_issuers: Vec<Arc<CertInfo>>,
    /// The peer's certificate passed verification (a trusted CA and the configured matchers).
    pub peer_validated: bool,
    /// The peer's whole chain, URL-encoded PEM (XFCC `Chain`).
    pub peer_chain_pem: Option<Arc<UrlPem>>,
    /// Our own certificate.
    pub local: Option<Arc<CertInfo>>,
}

impl TlsInfo {
    /// The suite's number in IANA's registry; 65535 for what rustls does not speak.
    pub fn cipher_id(&self) -> u16 {
        match self.cipher {
            "TLS_AES_128_GCM_SHA256" => 0x1301,
            "TLS_AES_256_GCM_SHA384" => 0x1302,
            "TLS_CHACHA20_POLY1305_SHA256" => 0x1303,
            "ECDHE-ECDSA-AES128-GCM-SHA256" => 0xc02b,
            "ECDHE-ECDSA-AES256-GCM-SHA384" => 0xc02c,
            "ECDHE-RSA-AES128-GCM-SHA256" => 0xc02f,
            "ECDHE-RSA-AES256-GCM-SHA384" => 0xc030,
            "ECDHE-RSA-CHACHA20-POLY1305" => 0xcca8,
            "ECDHE-ECDSA-CHACHA20-POLY1305" => 0xcca9,
            _ => 0xffff,
        }
    }
}

/// One certificate.
#[derive(Debug, Clone, Default)]
pub struct CertInfo {
    /// RFC 2253 subject.
    pub subject: String,
    /// RFC 2253 issuer.
    pub issuer: String,
    /// Lower-case hex serial number.
    pub serial: String,
    /// URI subject alternative names.
    pub uri_sans: Vec<String>,
    /// DNS subject alternative names.
    pub dns_sans: Vec<String>,
    /// IP subject alternative names.
    pub ip_sans: Vec<String>,
    /// Email subject alternative names.
    pub email_sans: Vec<String>,
    /// Other-name subject alternative names.
    pub othername_sans: Vec<String>,
    /// Hex SHA-256 of the DER.
    pub sha256: String,
    /// Hex SHA-1 of the DER.
    pub sha1: String,
    /// URL-encoded PEM (XFCC `Cert`).
    pub pem: UrlPem,
    /// Not before, seconds since the epoch.
    pub not_before: i64,
    /// Not after, seconds since the epoch.
    pub not_after: i64,
}

/// A downstream connection.
#[derive(Debug, Clone)]
pub struct ConnectionInfo {
    /// Process-wide number.
    pub id: u64,
    /// The local address; after original-destination restoring the restored one.
    pub local: Address,
    /// The peer of the socket (`DOWNSTREAM_DIRECT_REMOTE_ADDRESS`).
    pub direct_remote: Address,
    /// The peer that counts: PROXY protocol may have replaced it; per stream, `x-forwarded-for` may again.
    pub remote: Address,
    /// Whether the local address was restored from the original destination or PROXY protocol.
    pub local_restored: bool,
    /// The listener's name.
    pub listener: Arc<str>,
    /// The filter chain's name.
    pub filter_chain: Arc<str>,
    /// Server name from a listener filter or from TLS.
    pub requested_server_name: Option<Arc<str>>,
    /// `raw_buffer` or `tls`, as the listener filters detected it.
    pub transport_protocol: &'static str,
    /// Application protocols a listener filter detected (ALPN of the ClientHello, `http/1.1`, `h2c`).
    pub application_protocols: Vec<Arc<str>>,
    /// TLS, where this proxy terminates it.
    pub tls: Option<Rc<TlsInfo>>,
    /// PROXY protocol TLVs kept by the listener filter's rules: type and value.
    pub proxy_tlvs: Vec<(u8, Arc<[u8]>)>,
    /// When the connection was accepted.
    pub start: Instant,
    /// The same by the wall clock.
    pub start_system: SystemTime,
    /// When the TLS handshake was complete.
    pub handshake_done: Option<Instant>,
    /// Why TLS failed, Envoy's `DOWNSTREAM_TRANSPORT_FAILURE_REASON`.
    pub transport_failure: Option<Arc<str>>,
    /// What filters keep for the connection.
    pub slots: Slots,
}

impl ConnectionInfo {
    /// A unix socket, a loopback peer, or a peer with our own address.
    pub fn is_local(&self) -> bool {
        match (self.remote.ip(), self.local.ip()) {
            (None, _) => true,
            (Some(remote), local) => remote.is_loopback() || Some(remote) == local,
        }
    }

    /// A connection accepted now, of which nothing but its ends is known.
    pub fn accepted(id: u64, listener: Arc<str>, local: Address, peer: Address) -> Self {
        Self {
            id,
            local,
            direct_remote: peer.clone(),
            remote: peer,
            local_restored: false,
            listener,
            filter_chain: "".into(),
            requested_server_name: None,
            transport_protocol: "raw_buffer",
            application_protocols: Vec::new(),
            tls: None,
            proxy_tlvs: Vec::new(),
            start: Instant::now(),
            start_system: SystemTime::now(),
            handshake_done: None,
            transport_failure: None,
            slots: Slots::default(),
        }
    }
}

/// The upstream of a stream, known once a host was picked.
#[derive(Debug, Clone, Default)]
pub struct UpstreamInfo {
    /// The host's address.
    pub host: Option<Address>,
    /// The host's name (`hostname` of the endpoint).
    pub host_name: Option<Arc<str>>,
    /// Our end of the connection.
    pub local: Option<Address>,
    /// The connection's number.
    pub connection_id: Option<u64>,
    /// TLS to the upstream.
    pub tls: Option<Rc<TlsInfo>>,
    /// The upstream's protocol.
    pub protocol: Option<Protocol>,
    /// `UPSTREAM_TRANSPORT_FAILURE_REASON`
    pub transport_failure: Option<Arc<str>>,
    /// How many streams the connection had carried before.
    pub streams_before: u64,
    /// When the connection was asked for.
    pub connect_start: Option<Instant>,
    /// When it was connected (TCP).
    pub connect_complete: Option<Instant>,
    /// When TLS was complete.
    pub handshake_complete: Option<Instant>,
    /// First and last byte to the upstream.
    pub first_tx: Option<Instant>,
    /// See `first_tx`.
    pub last_tx: Option<Instant>,
    /// First and last byte from the upstream.
    pub first_rx: Option<Instant>,
    /// See `first_rx`.
    pub last_rx: Option<Instant>,
    /// First body byte from the upstream (`US_RX_BODY_BEG`).
    pub first_body_rx: Option<Instant>,
    /// Metadata of the endpoint.
    pub host_metadata: Option<Arc<Metadata>>,
    /// Locality zone of the endpoint.
    pub locality_zone: Option<Arc<str>>,
    /// How long the stream waited for a connection of the pool.
    pub pool_wait: Option<Duration>,
    /// Every host that a session of `tcp_proxy` tried, in order. A request's is the one of its last attempt, `host`.
    pub attempts: Vec<UpstreamAttempt>,
    /// How the upstream connection ended.
    pub close: DetectedClose,
    /// Why this proxy closed the upstream connection, where it did.
    pub local_close_reason: Option<Cow<'static, str>>,
    /// TCP metadata exchange with the host, where the cluster has it.
    pub exchange: Option<Rc<PeerCell>>,
}

/// One try of a session at a host.
#[derive(Debug, Clone)]
pub struct UpstreamAttempt {
    /// The host's address.
    pub host: Address,
    /// Its name.
    pub host_name: Option<Arc<str>>,
    /// The number of the connection that was had.
    pub connection_id: Option<u64>,
}

/// How a connection was seen to end, `%DOWNSTREAM_DETECTED_CLOSE_TYPE%`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DetectedClose {
    /// By FIN, or not at all yet.
    #[default]
    Normal,
    /// By a reset of this proxy.
    LocalReset,
    /// By a reset of the peer.
    RemoteReset,
}

/// `core.v3.Metadata.filter_metadata`: a struct per filter name.
pub type Metadata = BTreeMap<String, Struct>;

/// Bytes of a stream as Envoy counts them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bytes {
    /// Body bytes received from downstream (`BYTES_RECEIVED`).
    pub received: u64,
    /// Body bytes sent downstream (`BYTES_SENT`).
    pub sent: u64,
    /// Header bytes downstream, received and sent.
    pub header_received: u64,
    /// See `header_received`.
    pub header_sent: u64,
    /// All bytes on the downstream wire, framing included.
    pub wire_received: u64,
    /// See `wire_received`.
    pub wire_sent: u64,
    /// Upstream counterparts.
    pub upstream_wire_received: u64,
    /// See `upstream_wire_received`.
    pub upstream_wire_sent: u64,
    /// See `upstream_wire_received`.
    pub upstream_header_received: u64,
    /// See `upstream_wire_received`.
    pub upstream_header_sent: u64,
}

/// A stream: one HTTP exchange, or one TCP connection under `tcp_proxy`.
pub struct StreamInfo {
    /// Process-wide number.
    pub stream_id: u64,
    /// The connection.
    pub connection: Rc<ConnectionInfo>,
    /// The peer that counts for this stream; starts as the connection's.
    pub remote: Address,
    /// Begin, by both clocks.
    pub start: Instant,
    /// See `start`.
    pub start_system: SystemTime,
    /// When the request's headers were received (`DS_RX_HDR_END`).
    pub headers_downstream_rx: Option<Instant>,
    /// When the request was wholly received.
    pub last_downstream_rx: Option<Instant>,
    /// First and last byte sent downstream.
    pub first_downstream_tx: Option<Instant>,
    /// See `first_downstream_tx`.
    pub last_downstream_tx: Option<Instant>,
    /// When the stream was over.
    pub end: Option<Instant>,
    /// The protocol downstream; none for TCP.
    pub protocol: Option<Protocol>,
    /// The status sent; 0 where none was.
    pub response_code: u16,
    /// `RESPONSE_CODE_DETAILS`
    pub details: Option<Cow<'static, str>>,
    /// `CONNECTION_TERMINATION_DETAILS`
    pub termination_details: Option<Cow<'static, str>>,
    /// Response flags.
    pub flags: ResponseFlags,
    /// Bytes.
    pub bytes: Bytes,
    /// The upstream.
    pub upstream: Option<Box<UpstreamInfo>>,
    /// How often the request was tried upstream.
    pub attempts: u32,
    /// The route's name.
    pub route_name: Option<Arc<str>>,
    /// The virtual host's name.
    pub virtual_host: Option<Arc<str>>,
    /// The virtual cluster's name.
    pub virtual_cluster: Option<Arc<str>>,
    /// The cluster chosen.
    pub cluster: Option<Arc<str>>,
    /// `alt_stat_name` or the name: what `UPSTREAM_CLUSTER` prints.
    pub cluster_observability: Option<Arc<str>>,
    /// Metadata of the route entry and of the cluster.
    pub route_metadata: Option<Arc<Metadata>>,
    /// See `route_metadata`.
    pub cluster_metadata: Option<Arc<Metadata>>,
    /// Metadata of the virtual host.
    pub virtual_host_metadata: Option<Arc<Metadata>>,
    /// Metadata of the listener.
    pub listener_metadata: Option<Arc<Metadata>>,
    /// Dynamic metadata set by filters.
    pub dynamic_metadata: Option<Box<Metadata>>,
    /// Filter state, by key.
    pub filter_state: Option<Box<FilterState>>,
    /// Filter state of the upstream connection.
    pub upstream_filter_state: Option<Box<FilterState>>,
    /// How the downstream connection ended.
    pub downstream_close: DetectedClose,
    /// Why this proxy closed the downstream connection, where it did.
    pub downstream_local_close_reason: Option<Cow<'static, str>>,
    /// The trace's and the span's id, where there is a span.
    pub trace_id: Option<Box<str>>,
    /// See `trace_id`.
    pub span_id: Option<Box<str>>,
    /// The request is a health check served or passed through by the health check filter.
    pub health_check: bool,
    /// The `x-request-id` in force.
    pub request_id: Option<Box<str>>,
    /// Whether this stream is traced and why; the uuid's reason digit.
    pub trace_reason: u8,
}

impl StreamInfo {
    /// The stream that takes this one's place when its request is served anew (an internal redirect): what is known of
    /// the client's side stays, all else is to be found again.
    pub fn again(&self, stream_id: u64) -> Self {
        Self {
            start: self.start,
            start_system: self.start_system,
            headers_downstream_rx: self.headers_downstream_rx,
            last_downstream_rx: self.last_downstream_rx,
            bytes: Bytes {
                received: self.bytes.received,
                header_received: self.bytes.header_received,
                ..Bytes::default()
            },
            ..Self::new(stream_id, self.connection.clone(), self.protocol)
        }
    }

    /// A stream that begins now.
    #[inline(always)]
    pub fn new(stream_id: u64, connection: Rc<ConnectionInfo>, protocol: Option<Protocol>) -> Self {
        let start = crate::clock::tick();
        Self {
            stream_id,
            remote: connection.remote.clone(),
            connection,
            start,
            start_system: crate::clock::wall(start),
            headers_downstream_rx: None,
            last_downstream_rx: None,
            first_downstream_tx: None,
            last_downstream_tx: None,
            end: None,
            protocol,
            response_code: 0,
            details: None,
            termination_details: None,
            flags: ResponseFlags::default(),
            bytes: Bytes::default(),
            upstream: None,
            attempts: 0,
            route_name: None,
            virtual_host: None,
            virtual_cluster: None,
            cluster: None,
            cluster_observability: None,
            route_metadata: None,
            cluster_metadata: None,
            virtual_host_metadata: None,
            listener_metadata: None,
            dynamic_metadata: None,
            filter_state: None,
            upstream_filter_state: None,
            downstream_close: DetectedClose::Normal,
            downstream_local_close_reason: None,
            trace_id: None,
            span_id: None,
            health_check: false,
            request_id: None,
            trace_reason: 0,
        }
    }

    /// The upstream part, made on first use.
    pub fn upstream_mut(&mut self) -> &mut UpstreamInfo {
        self.upstream.get_or_insert_default()
    }

    /// Sets a key of a filter's dynamic metadata.
    pub fn dynamic_metadata_mut(&mut self, filter: &str) -> &mut Struct {
        self.dynamic_metadata.get_or_insert_default().entry(filter.to_owned()).or_default()
    }
}
