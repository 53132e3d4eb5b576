//! The operators: what each reads and how it writes it.

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::FormatContext;
use super::json::escape_tail;
use super::time::TimeFormat;
use super::value::{
    filter_state, grpc_status, metadata_json, metadata_text, path_of, query_value, server_name, state_text,
};
use crate::address::{Address, host};
use crate::header::{HeaderMap, HeaderName};
use crate::stream_info::{CertInfo, Metadata, StreamInfo, TlsInfo};

/// One operator with its parameters; `max` cuts the text after so many bytes.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) what: What,
    pub(super) max: Option<usize>,
}

#[derive(Debug)]
pub(super) enum What {
    Header { from: From, name: HeaderName, alternative: Option<HeaderName>, strip_query: bool },
    Time(TimeSource, TimeFormat),
    Duration(TimePoint, TimePoint, Precision),
    PoolWait,
    Number(fn(&FormatContext<'_>) -> u64),
    Text(fn(&FormatContext<'_>, &mut Vec<u8>) -> bool),
    Address(fn(&StreamInfo) -> Option<&Address>, AddressPart),
    Tls(Side, fn(&TlsInfo, &mut Vec<u8>)),
    Metadata { from: MetadataSource, filter: String, path: Vec<String> },
    FilterState { upstream: bool, key: String, form: StateForm },
    Constant(Option<String>),
    Details { allow_whitespace: bool },
    GrpcStatus(GrpcForm),
    QueryParameter(Vec<u8>),
    Path { query: bool, original: bool, current: bool },
    ServerName { order: NameOrder, original: bool, current: bool },
    FirstOf(Vec<Op>),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    Request,
    Response,
    Trailers,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum TimeSource {
    Start,
    Emit,
    CertBegin(Side),
    CertEnd(Side),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum TimePoint {
    DownstreamConnectBegin,
    DownstreamRxBegin,
    DownstreamRxHeadersEnd,
    DownstreamRxEnd,
    UpstreamConnectBegin,
    UpstreamConnectEnd,
    UpstreamHandshakeEnd,
    UpstreamTxBegin,
    UpstreamTxEnd,
    UpstreamRxBegin,
    UpstreamRxBodyBegin,
    UpstreamRxEnd,
    DownstreamTxBegin,
    DownstreamTxEnd,
    DownstreamHandshakeEnd,
    /// The stream's end, or now.
    End,
    /// A name nobody sets.
    Never,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Precision {
    Millis,
    Micros,
    Nanos,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum AddressPart {
    Whole,
    Host,
    /// The network of so many bits, `10.0.0.0/8`.
    Network(u8),
    Port,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Downstream,
    Upstream,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum MetadataSource {
    Dynamic,
    Cluster,
    Route,
    UpstreamHost,
    Listener,
    VirtualHost,
}

#[derive(Debug)]
pub(super) enum StateForm {
    Plain,
    Typed,
    Field(String),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum GrpcForm {
    Camel,
    Snake,
    Number,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum NameOrder {
    SniOnly,
    SniFirst,
    HostFirst,
}

impl Op {
    pub(super) fn new(what: What) -> Self {
        Self { what, max: None }
    }

    /// Appends the value as text; false (and possibly some bytes to cut off) where there is none.
    pub(super) fn write(&self, context: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        if !self.what.write(context, out) {
            return false;
        }
        if let Some(max) = self.max
            && out.len() - start > max
        {
            out.truncate(start + max);
        }
        true
    }

    /// Appends the value as JSON of its own type; false where there is none.
    pub(super) fn write_json(&self, context: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
        match &self.what {
            What::Duration(..) | What::PoolWait | What::Number(_) => return self.write(context, out),
            What::GrpcStatus(GrpcForm::Number) => return self.write(context, out),
            What::Address(get, AddressPart::Port) => {
                return get(context.info).is_some_and(|a| a.port().is_some()) && self.write(context, out);
            }
            What::Metadata { from, filter, path } => {
                return metadata_json(from.of(context.info), filter, path, out);
            }
            What::FilterState { upstream, key, form: StateForm::Typed } => {
                let Some(object) = filter_state(context.info, *upstream, key) else { return false };
                let Some(value) = object.typed() else { return false };
                return serde_json::to_writer(&mut *out, &value).is_ok();
            }
            What::FirstOf(ops) => {
                let start = out.len();
                return ops.iter().any(|op| {
                    out.truncate(start);
                    op.write_json(context, out)
                });
            }
            _ => {}
        }
        out.push(b'"');
        let start = out.len();
        let there = self.write(context, out);
        escape_tail(out, start);
        out.push(b'"');
        there
    }
}

impl What {
    fn write(&self, context: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
        let info = context.info;
        match self {
            Self::Header { from, name, alternative, strip_query } => {
                let Some(headers) = from.of(context) else { return false };
                let value = headers
                    .get_name(name)
                    .or_else(|| alternative.as_ref().and_then(|name| headers.get_name(name)));
                let Some(mut value) = value else { return false };
                if *strip_query {
                    value = before(value, b'?');
                }
                put(value, out)
            }
            Self::Time(source, format) => {
                let Some(time) = source.of(info) else { return false };
                format.write(time, out);
                true
            }
            Self::Duration(from, to, precision) => duration(info, *from, *to, *precision, out),
            Self::PoolWait => match info.upstream.as_ref().and_then(|u| u.pool_wait) {
                Some(wait) => number(wait.as_millis() as u64, out),
                None => false,
            },
            Self::Number(get) => number(get(context), out),
            Self::Text(write) => write(context, out),
            Self::Address(get, part) => get(info).is_some_and(|address| part.write(address, out)),
            Self::Tls(side, write) => {
                let start = out.len();
                if let Some(tls) = side.tls(info) {
                    write(tls, out);
                }
                out.len() > start
            }
            Self::Metadata { from, filter, path } => metadata_text(from.of(info), filter, path, out),
            Self::FilterState { upstream, key, form } => state_text(info, *upstream, key, form, out),
            Self::Constant(value) => value.as_ref().is_some_and(|v| put(v, out)),
            Self::Details { allow_whitespace } => {
                let Some(details) = &info.details else { return false };
                if *allow_whitespace { put(details.as_bytes(), out) } else { underscored(details, out) }
            }
            Self::GrpcStatus(form) => grpc_status(context, *form, out),
            Self::QueryParameter(name) => query_value(context, name, out),
            Self::Path { query, original, current } => {
                let Some(path) = path_of(context, *original, *current) else { return false };
                put(if *query { path } else { before(path, b'?') }, out)
            }
            Self::ServerName { order, original, current } => {
                server_name(context, *order, *original, *current, out)
            }
            Self::FirstOf(ops) => {
                let start = out.len();
                ops.iter().any(|op| {
                    out.truncate(start);
                    op.write(context, out)
                })
            }
        }
    }
}

/// Appends bytes: the tail of an operator that has a value.
pub(super) fn put(value: impl AsRef<[u8]>, out: &mut Vec<u8>) -> bool {
    out.extend_from_slice(value.as_ref());
    true
}

/// Appends a text where there is one.
pub(super) fn put_some<T: AsRef<[u8]>>(value: Option<T>, out: &mut Vec<u8>) -> bool {
    match value {
        Some(value) if !value.as_ref().is_empty() => put(value, out),
        _ => false,
    }
}

fn number(value: u64, out: &mut Vec<u8>) -> bool {
    put(itoa::Buffer::new().format(value), out)
}

/// White space becomes `_`, so that the line can still be split at spaces.
pub(super) fn underscored(text: &str, out: &mut Vec<u8>) -> bool {
    out.extend(text.bytes().map(|b| if matches!(b, b' ' | 9..=13) { b'_' } else { b }));
    true
}

fn before(text: &[u8], end: u8) -> &[u8] {
    &text[..memchr::memchr(end, text).unwrap_or(text.len())]
}

pub(super) fn join<T: AsRef<[u8]>>(parts: impl IntoIterator<Item = T>, out: &mut Vec<u8>) {
    for (i, part) in parts.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(part.as_ref());
    }
}

impl From {
    fn of<'a>(self, context: &FormatContext<'a>) -> Option<&'a HeaderMap> {
        match self {
            Self::Request => context.request,
            Self::Response => context.response,
            Self::Trailers => context.trailers,
        }
    }
}

impl Side {
    pub(super) fn tls(self, info: &StreamInfo) -> Option<&TlsInfo> {
        match self {
            Self::Downstream => info.connection.tls.as_deref(),
            Self::Upstream => info.upstream.as_ref()?.tls.as_deref(),
        }
    }
}

impl TimeSource {
    fn of(self, info: &StreamInfo) -> Option<SystemTime> {
        let seconds = |at: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(at).unwrap_or(0));
        let peer = |side: Side| side.tls(info)?.peer.as_deref();
        match self {
            Self::Start => Some(info.start_system),
            Self::Emit => Some(SystemTime::now()),
            Self::CertBegin(side) => peer(side).map(|c: &CertInfo| seconds(c.not_before)),
            Self::CertEnd(side) => peer(side).map(|c: &CertInfo| seconds(c.not_after)),
        }
    }
}

impl TimePoint {
    fn of(self, info: &StreamInfo) -> Option<Instant> {
        let upstream = info.upstream.as_deref();
        match self {
            Self::DownstreamConnectBegin => Some(info.connection.start),
            Self::DownstreamRxBegin => Some(info.start),
            Self::DownstreamRxHeadersEnd => info.headers_downstream_rx,
            Self::DownstreamRxEnd => info.last_downstream_rx,
            Self::DownstreamTxBegin => info.first_downstream_tx,
            Self::DownstreamTxEnd => info.last_downstream_tx,
            Self::DownstreamHandshakeEnd => info.connection.handshake_done,
            Self::UpstreamConnectBegin => upstream?.connect_start,
            Self::UpstreamConnectEnd => upstream?.connect_complete,
            Self::UpstreamHandshakeEnd => upstream?.handshake_complete,
            Self::UpstreamTxBegin => upstream?.first_tx,
            Self::UpstreamTxEnd => upstream?.last_tx,
            Self::UpstreamRxBegin => upstream?.first_rx,
            Self::UpstreamRxBodyBegin => upstream?.first_body_rx,
            Self::UpstreamRxEnd => upstream?.last_rx,
            Self::End => Some(info.end.unwrap_or_else(Instant::now)),
            Self::Never => None,
        }
    }
}

fn duration(
    info: &StreamInfo,
    from: TimePoint,
    to: TimePoint,
    precision: Precision,
    out: &mut Vec<u8>,
) -> bool {
    let (Some(begin), Some(end)) = (from.of(info), to.of(info)) else { return false };
    let length = match end.checked_duration_since(begin) {
        Some(length) => length,
        // A handshake lies before the streams that follow it: Envoy prints the negative distance.
        None if to == TimePoint::DownstreamHandshakeEnd && from == TimePoint::DownstreamRxBegin => {
            let millis = begin.saturating_duration_since(end).as_millis();
            if millis > 0 {
                out.push(b'-');
            }
            return number(millis as u64, out);
        }
        None => return false,
    };
    let count = match precision {
        Precision::Millis => length.as_millis(),
        Precision::Micros => length.as_micros(),
        Precision::Nanos => length.as_nanos(),
    };
    number(u64::try_from(count).unwrap_or(u64::MAX), out)
}

impl AddressPart {
    fn write(self, address: &Address, out: &mut Vec<u8>) -> bool {
        use std::io::Write;
        let Some(socket) = address.socket_addr() else {
            // A pipe has no port; its path stands for the address in every other form.
            return matches!(self, Self::Port) || write!(out, "{address}").is_ok();
        };
        match self {
            Self::Whole => {
                let std::net::SocketAddr::V4(v4) = socket else { return write!(out, "{socket}").is_ok() };
                octets(v4.ip().octets(), out);
                out.push(b':');
                number(v4.port().into(), out)
            }
            Self::Host => match socket.ip() {
                IpAddr::V4(ip) => octets(ip.octets(), out),
                IpAddr::V6(_) => write!(out, "{}", host(&socket)).is_ok(),
            },
            Self::Port => number(socket.port().into(), out),
            Self::Network(bits) => {
                let longest = if matches!(socket.ip(), IpAddr::V4(_)) { 32 } else { 128 };
                let net = ipnet::IpNet::new(socket.ip(), bits.min(longest));
                net.is_ok_and(|net| write!(out, "{}", net.trunc()).is_ok())
            }
        }
    }
}

/// An IPv4 address, a third of what the general formatting costs: addresses are on every line.
fn octets(octets: [u8; 4], out: &mut Vec<u8>) -> bool {
    for (i, octet) in octets.into_iter().enumerate() {
        if i > 0 {
            out.push(b'.');
        }
        number(octet.into(), out);
    }
    true
}

impl MetadataSource {
    fn of(self, info: &StreamInfo) -> Option<&Metadata> {
        match self {
            Self::Dynamic => info.dynamic_metadata.as_deref(),
            Self::Cluster => info.cluster_metadata.as_deref(),
            Self::Route => info.route_metadata.as_deref(),
            Self::UpstreamHost => info.upstream.as_ref()?.host_metadata.as_deref(),
            Self::Listener => info.listener_metadata.as_deref(),
            Self::VirtualHost => info.virtual_host_metadata.as_deref(),
        }
    }
}
