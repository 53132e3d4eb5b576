//! The operators: what each reads and how it writes it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envoy_types::pb::google::protobuf::{Value, value::Kind};

use super::FormatContext;
use super::json::{escape_tail, write_json_struct, write_json_value};
use super::time::TimeFormat;
use crate::address::Address;
use crate::header::{HeaderId, HeaderMap, HeaderName};
use crate::matcher::{metadata_value, query_of, query_parameter};
use crate::stream_info::{
    CertInfo, DetectedClose, FilterStateObject, Metadata, StreamInfo, TlsInfo, UpstreamInfo,
};

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
    DownstreamRxBegin,
    DownstreamRxEnd,
    UpstreamConnectBegin,
    UpstreamConnectEnd,
    UpstreamHandshakeEnd,
    UpstreamTxBegin,
    UpstreamTxEnd,
    UpstreamRxBegin,
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
            Self::DownstreamRxBegin => Some(info.start),
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
        None if to == TimePoint::DownstreamHandshakeEnd => {
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
            Self::Whole => write!(out, "{socket}").is_ok(),
            Self::Host => write!(out, "{}", socket.ip()).is_ok(),
            Self::Port => number(socket.port().into(), out),
            Self::Network(bits) => {
                let longest = if matches!(socket.ip(), IpAddr::V4(_)) { 32 } else { 128 };
                let net = ipnet::IpNet::new(socket.ip(), bits.min(longest));
                net.is_ok_and(|net| write!(out, "{}", net.trunc()).is_ok())
            }
        }
    }
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

fn metadata_json(metadata: Option<&Metadata>, filter: &str, path: &[String], out: &mut Vec<u8>) -> bool {
    if path.is_empty() {
        let Some(all) = metadata.and_then(|m| m.get(filter)) else { return false };
        write_json_struct(all, out);
        return true;
    }
    match metadata_value(metadata, filter, path) {
        None | Some(Value { kind: None | Some(Kind::NullValue(_)) }) => false,
        Some(value) => {
            write_json_value(value, out);
            true
        }
    }
}

fn metadata_text(metadata: Option<&Metadata>, filter: &str, path: &[String], out: &mut Vec<u8>) -> bool {
    match metadata_value(metadata, filter, path) {
        Some(Value { kind: Some(Kind::StringValue(text)) }) => put(text, out),
        _ => metadata_json(metadata, filter, path, out),
    }
}

fn filter_state<'a>(info: &'a StreamInfo, upstream: bool, key: &str) -> Option<&'a dyn FilterStateObject> {
    let state = if upstream { &info.upstream_filter_state } else { &info.filter_state };
    state.as_ref()?.get(key).map(|object| &**object)
}

fn state_text(info: &StreamInfo, upstream: bool, key: &str, form: &StateForm, out: &mut Vec<u8>) -> bool {
    let Some(object) = filter_state(info, upstream, key) else { return false };
    match form {
        StateForm::Plain => object.plain().is_some_and(|text| put(text.as_bytes(), out)),
        StateForm::Field(name) => object.field(name).is_some_and(|text| put(text.as_bytes(), out)),
        StateForm::Typed => object.typed().is_some_and(|v| serde_json::to_writer(out, &v).is_ok()),
    }
}

const GRPC_NAMES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

/// The gRPC status of a stream: from the trailers, the headers or the HTTP status. -1 is a status that is no
/// number.
pub(crate) fn grpc_status_of(context: &FormatContext<'_>) -> Option<i64> {
    for headers in [context.trailers, context.response].into_iter().flatten() {
        match headers.get(HeaderId::GRPC_STATUS) {
            None | Some(b"") => {}
            Some(value) => {
                let number = std::str::from_utf8(value.trim_ascii()).ok().and_then(|v| v.parse::<u32>().ok());
                return Some(number.map_or(-1, i64::from));
            }
        }
    }
    Some(match context.info.response_code {
        0 => return None,
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    })
}

/// Whether the request is gRPC by its content type.
fn is_grpc_request(context: &FormatContext<'_>) -> bool {
    let Some(request) = context.request else { return false };
    let rest = request.get(HeaderId::CONTENT_TYPE).and_then(|t| t.strip_prefix(b"application/grpc"));
    request.contains(HeaderId::PATH) && matches!(rest, Some([] | [b'+', ..]))
}

fn grpc_status(context: &FormatContext<'_>, form: GrpcForm, out: &mut Vec<u8>) -> bool {
    use std::io::Write;
    if !is_grpc_request(context) {
        return false;
    }
    let Some(status) = grpc_status_of(context) else { return false };
    let names = usize::try_from(status).ok().and_then(|s| GRPC_NAMES.get(s));
    match (form, names) {
        (GrpcForm::Camel, Some((camel, _))) => put(camel, out),
        (GrpcForm::Snake, Some((_, snake))) => put(snake, out),
        _ => write!(out, "{status}").is_ok(),
    }
}

fn query_value(context: &FormatContext<'_>, name: &[u8], out: &mut Vec<u8>) -> bool {
    let Some(path) = context.request.and_then(|r| r.get(HeaderId::PATH)) else { return false };
    let decoded = |text| percent_encoding::percent_decode(text);
    // Envoy decodes names too; only a name that was encoded needs the second look.
    let value = query_parameter(path, name).or_else(|| {
        crate::matcher::query_parameters(path)
            .find(|(n, _)| memchr::memchr(b'%', n).is_some() && decoded(n).eq(name.iter().copied()))
            .map(|(_, v)| v)
    });
    value.is_some_and(|value| {
        out.extend(decoded(value));
        true
    })
}

/// `%QUERY_PARAMS%`
pub(super) fn query_parameters_text(context: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
    put_some(context.request.and_then(|r| r.get(HeaderId::PATH)).map(query_of), out)
}

fn path_of<'a>(context: &FormatContext<'a>, original: bool, current: bool) -> Option<&'a [u8]> {
    let request = context.request?;
    let get = |wanted: bool, id| if wanted { request.get(id).filter(|v| !v.is_empty()) } else { None };
    get(original, HeaderId::X_ENVOY_ORIGINAL_PATH).or_else(|| get(current, HeaderId::PATH))
}

fn server_name(
    context: &FormatContext<'_>,
    order: NameOrder,
    original: bool,
    current: bool,
    out: &mut Vec<u8>,
) -> bool {
    let host = || {
        let request = context.request?;
        let get = |wanted: bool, name: &HeaderName| {
            if wanted { request.get_name(name).filter(|v| !v.is_empty()) } else { None }
        };
        let original_host = HeaderName::new("x-envoy-original-host");
        get(original, &original_host).or_else(|| get(current, &HeaderName::Known(HeaderId::AUTHORITY)))
    };
    let sni = context.info.connection.requested_server_name.as_deref().filter(|n| !n.is_empty());
    if order == NameOrder::HostFirst
        && let Some(host) = host()
    {
        return put(host, out);
    }
    if let Some(sni) = sni {
        return clean_server_name(sni, out);
    }
    order == NameOrder::SniFirst && host().is_some_and(|host| put(host, out))
}

/// A server name comes from the wire unchecked: anything a name cannot hold becomes `_`, and the name is marked
/// (CVE-2024-45808).
fn clean_server_name(name: &str, out: &mut Vec<u8>) -> bool {
    let fit = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if name.bytes().all(fit) {
        return put(name, out);
    }
    out.extend_from_slice(b"invalid:");
    out.extend(name.bytes().map(|b| if fit(b) { b } else { b'_' }));
    true
}

/// `%UPSTREAM_HOST_NAME%`: the name or, where there is none, the address.
pub(super) fn host_name(
    name: Option<&Arc<str>>,
    address: &Address,
    without_port: bool,
    out: &mut Vec<u8>,
) -> bool {
    use std::io::Write;
    let start = out.len();
    match name {
        Some(name) if !name.is_empty() => out.extend_from_slice(name.as_bytes()),
        _ => {
            let _ = write!(out, "{address}");
        }
    }
    if without_port && let Some(colon) = out[start..].iter().rposition(|b| *b == b':') {
        // The colons inside the brackets of an IPv6 address begin no port.
        if !out[start + colon..].contains(&b']') {
            out.truncate(start + colon);
        }
    }
    true
}

/// What was done at the hosts a stream tried, joined by `,`.
pub(super) fn attempts(
    context: &FormatContext<'_>,
    out: &mut Vec<u8>,
    write: impl Fn(&crate::stream_info::UpstreamAttempt, &mut Vec<u8>),
) -> bool {
    let Some(upstream) = &context.info.upstream else { return false };
    for (i, attempt) in upstream.attempts.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write(attempt, out);
    }
    !upstream.attempts.is_empty()
}

/// `%…_DETECTED_CLOSE_TYPE%`
pub(super) fn close_name(close: DetectedClose) -> &'static str {
    match close {
        DetectedClose::Normal => "Normal",
        DetectedClose::LocalReset => "LocalReset",
        DetectedClose::RemoteReset => "RemoteReset",
    }
}

/// The upstream's address once a connection was had.
pub(super) fn upstream_remote(info: &StreamInfo) -> Option<&Address> {
    let upstream: &UpstreamInfo = info.upstream.as_ref()?;
    upstream.local.as_ref().and(upstream.host.as_ref())
}
