//! `CheckRequest`: what an authorization server is told of a request or a connection.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request, TlsSession};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use envoy_types::pb::google::protobuf::Timestamp;
use sampan_core::Address;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::matcher::StringMatcher;
use sampan_core::stream_info::{CertInfo, ConnectionInfo, Metadata, Protocol, StreamInfo};
use sampan_listener::ConnectionMetadata;

/// Tells the server whether the body that it sees is all of it.
pub(super) const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// In what order Envoy makes the pseudo headers of an HTTP/1 request.
const HTTP1_ORDER: [HeaderId; 4] = [HeaderId::AUTHORITY, HeaderId::PATH, HeaderId::METHOD, HeaderId::SCHEME];

/// What is told, by configuration; the same for requests and connections.
#[derive(Default)]
pub(super) struct Told {
    /// `include_peer_certificate`
    pub(super) certificate: bool,
    /// `include_tls_session`
    pub(super) tls_session: bool,
    /// Of `bootstrap_metadata_labels_key`.
    pub(super) labels: HashMap<String, String>,
    /// `metadata_context_namespaces`
    pub(super) metadata: Vec<String>,
}

/// What is told of a request besides.
#[derive(Default)]
pub(super) struct ToldOfRequest {
    /// `allowed_headers`; none: all.
    pub(super) allowed: Option<Vec<StringMatcher>>,
    /// `disallowed_headers`
    pub(super) disallowed: Vec<StringMatcher>,
    /// `encode_raw_headers`
    pub(super) raw_headers: bool,
    /// `pack_as_bytes`
    pub(super) raw_body: bool,
    /// `route_metadata_context_namespaces`
    pub(super) route_metadata: Vec<String>,
}

/// A request's body as far as it is told.
pub(super) struct SeenBody {
    pub(super) data: Vec<u8>,
    pub(super) partial: bool,
    /// How much has been received.
    pub(super) received: usize,
}

/// Any of the matchers.
pub(super) fn any(matchers: &[StringMatcher], name: &[u8]) -> bool {
    matchers.iter().any(|matcher| matcher.matches(name))
}

impl Told {
    /// Of a connection, without its request.
    pub(super) fn of_connection(&self, info: &StreamInfo) -> CheckRequest {
        let mut attributes = self.attributes(&info.connection);
        let name = info.connection.requested_server_name.as_deref();
        if let (Some(name), Some(destination)) = (name, &mut attributes.destination) {
            destination.service = sanitized(name.as_bytes());
        }
        attributes.metadata_context = Some(picked(&self.metadata, &[info.dynamic_metadata.as_deref()]));
        CheckRequest { attributes: Some(attributes) }
    }

    fn attributes(&self, connection: &ConnectionInfo) -> AttributeContext {
        let tls = connection.tls.as_deref();
        let mut source = peer(&connection.remote, tls.and_then(|tls| tls.peer.as_deref()));
        if let (true, Some(certificate)) = (self.certificate, tls.and_then(|tls| tls.peer.as_ref())) {
            source.certificate = certificate.pem.to_string();
        }
        let mut destination = peer(&connection.local, tls.and_then(|tls| tls.local.as_deref()));
        destination.labels.clone_from(&self.labels);
        let session = || {
            let sni = tls.and_then(|tls| tls.sni.as_ref()).or(connection.requested_server_name.as_ref());
            TlsSession { sni: sni.map(ToString::to_string).unwrap_or_default() }
        };
        AttributeContext {
            source: Some(source),
            destination: Some(destination),
            tls_session: self.tls_session.then(session),
            ..AttributeContext::default()
        }
    }
}

impl ToldOfRequest {
    /// Of a request on its connection.
    pub(super) fn of_request(
        &self,
        told: &Told,
        headers: &HeaderMap,
        info: &StreamInfo,
        extensions: HashMap<String, String>,
        body: Option<SeenBody>,
    ) -> CheckRequest {
        let mut attributes = told.attributes(&info.connection);
        if let (Some(service), Some(source)) =
            (headers.get(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER), &mut attributes.source)
        {
            source.service = sanitized(service);
        }
        let since = info.start_system.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        attributes.request = Some(Request {
            time: Some(Timestamp {
                seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                // Envoy's clock knows microseconds.
                nanos: i32::try_from(since.subsec_micros() * 1000).unwrap_or(0),
            }),
            http: Some(self.http(headers, info, body)),
        });
        attributes.context_extensions = extensions;
        let connection = info.connection.slots.get::<ConnectionMetadata>();
        let connection = connection.as_deref().map(|metadata| &*metadata.0);
        attributes.metadata_context =
            Some(picked(&told.metadata, &[info.dynamic_metadata.as_deref(), connection]));
        attributes.route_metadata_context =
            Some(picked(&self.route_metadata, &[info.route_metadata.as_deref()]));
        CheckRequest { attributes: Some(attributes) }
    }

    /// The request itself.
    pub(super) fn http(&self, headers: &HeaderMap, info: &StreamInfo, body: Option<SeenBody>) -> HttpRequest {
        let text = |id| headers.get(id).map(sanitized).unwrap_or_default();
        let mut request = HttpRequest {
            id: info.stream_id.to_string(),
            method: text(HeaderId::METHOD),
            path: text(HeaderId::PATH),
            host: text(HeaderId::AUTHORITY),
            scheme: text(HeaderId::SCHEME),
            size: body.as_ref().map_or(0, |body| i64::try_from(body.received).unwrap_or(i64::MAX)),
            protocol: info.protocol.map(|p| p.as_str().to_owned()).unwrap_or_default(),
            header_map: self.raw_headers.then(core::HeaderMap::default),
            ..HttpRequest::default()
        };
        let first = if info.protocol < Some(Protocol::Http2) { &HTTP1_ORDER[..] } else { &[] };
        let pseudo = first.iter().flat_map(|id| headers.get_all(*id).map(|value| (*id, value)));
        let all = headers.iter().filter(|(id, ..)| !first.contains(id));
        let pseudo = pseudo.map(|(id, value)| (id.name().as_bytes(), value));
        for (name, value) in pseudo.chain(all.map(|(_, name, value)| (name, value))) {
            if self.allows(name) {
                self.add(&mut request, name, value);
            }
        }
        if let Some(body) = body {
            let partial = if body.partial { "true" } else { "false" };
            self.add(&mut request, PARTIAL_BODY.as_bytes(), partial.as_bytes());
            if self.raw_body {
                request.raw_body = body.data;
            } else {
                request.body = sanitized(&body.data);
            }
        }
        request
    }

    /// Whether the server may see a header.
    fn allows(&self, name: &[u8]) -> bool {
        name != PARTIAL_BODY.as_bytes()
            && !any(&self.disallowed, name)
            && self.allowed.as_ref().is_none_or(|allowed| any(allowed, name))
    }

    fn add(&self, request: &mut HttpRequest, name: &[u8], value: &[u8]) {
        let key = String::from_utf8_lossy(name).into_owned();
        if let Some(list) = &mut request.header_map {
            let raw_value = value.to_vec();
            list.headers.push(core::HeaderValue { key, raw_value, ..core::HeaderValue::default() });
            return;
        }
        let value = sanitized(value);
        match request.headers.entry(key) {
            std::collections::hash_map::Entry::Occupied(mut there) => {
                let joined = there.get_mut();
                joined.push(',');
                joined.push_str(&value);
            }
            std::collections::hash_map::Entry::Vacant(place) => drop(place.insert(value)),
        }
    }
}

fn peer(address: &Address, certificate: Option<&CertInfo>) -> Peer {
    let principal = certificate.map(|certificate| {
        let san = certificate.uri_sans.first().or(certificate.dns_sans.first());
        sanitized(san.unwrap_or(&certificate.subject).as_bytes())
    });
    Peer { address: Some(proto(address)), principal: principal.unwrap_or_default(), ..Peer::default() }
}

fn proto(address: &Address) -> core::Address {
    use core::address::Address as A;
    use core::envoy_internal_address::AddressNameSpecifier as Name;
    let address = match address {
        Address::Ip(ip) => A::SocketAddress(core::SocketAddress {
            address: ip.ip().to_string(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(ip.port().into())),
            ..core::SocketAddress::default()
        }),
        Address::Pipe(path) => A::Pipe(core::Pipe { path: path.to_string(), ..core::Pipe::default() }),
        Address::Internal(name, id) => A::EnvoyInternalAddress(core::EnvoyInternalAddress {
            endpoint_id: id.to_string(),
            address_name_specifier: Some(Name::ServerListenerName(name.to_string())),
        }),
    };
    core::Address { address: Some(address) }
}

/// The namespaces of these that are there, each from the first source that has it.
fn picked(namespaces: &[String], sources: &[Option<&Metadata>]) -> core::Metadata {
    let mut found = core::Metadata::default();
    for name in namespaces {
        if let Some(fields) = sources.iter().flatten().find_map(|source| source.get(name)) {
            found.filter_metadata.insert(name.clone(), fields.clone());
        }
    }
    found
}

/// As UTF-8; each byte that is none becomes `!`.
pub(super) fn sanitized(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(std::iter::repeat_n('!', chunk.invalid().len()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_utf8_is_marked() {
        assert_eq!(sanitized("aé".as_bytes()), "aé");
        assert_eq!(sanitized(b"a\xe9b\xff\xfe"), "a!b!!");
    }
}
