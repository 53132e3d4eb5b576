//! Values that take more than a look: metadata, filter state, gRPC status, query, server name, hosts tried.

use std::sync::Arc;

use envoy_types::pb::google::protobuf::{Value, value::Kind};

use super::FormatContext;
use super::json::{write_json_struct, write_json_value};
use super::op::{GrpcForm, NameOrder, StateForm, put, put_some};
use crate::address::Address;
use crate::header::HeaderId;
use crate::matcher::{metadata_value, query_of, query_parameter, query_parameters};
use crate::stream_info::{DetectedClose, Metadata, StateObject, StreamInfo, UpstreamAttempt, UpstreamInfo};

pub(super) fn metadata_json(
    metadata: Option<&Metadata>,
    filter: &str,
    path: &[String],
    out: &mut Vec<u8>,
) -> bool {
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

pub(super) fn metadata_text(
    metadata: Option<&Metadata>,
    filter: &str,
    path: &[String],
    out: &mut Vec<u8>,
) -> bool {
    match metadata_value(metadata, filter, path) {
        Some(Value { kind: Some(Kind::StringValue(text)) }) => put(text, out),
        _ => metadata_json(metadata, filter, path, out),
    }
}

pub(super) fn filter_state(info: &StreamInfo, upstream: bool, key: &str) -> Option<StateObject> {
    if upstream { info.upstream_filter_state.as_ref()?.get(key).cloned() } else { info.state(key) }
}

pub(super) fn state_text(
    info: &StreamInfo,
    upstream: bool,
    key: &str,
    form: &StateForm,
    out: &mut Vec<u8>,
) -> bool {
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
pub fn grpc_status_of(context: &FormatContext<'_>) -> Option<i64> {
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
pub fn is_grpc_request(context: &FormatContext<'_>) -> bool {
    let Some(request) = context.request else { return false };
    let rest = request.get(HeaderId::CONTENT_TYPE).and_then(|t| t.strip_prefix(b"application/grpc"));
    request.contains(HeaderId::PATH) && matches!(rest, Some([] | [b'+', ..]))
}

pub(super) fn grpc_status(context: &FormatContext<'_>, form: GrpcForm, out: &mut Vec<u8>) -> bool {
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

pub(super) fn query_value(context: &FormatContext<'_>, name: &[u8], out: &mut Vec<u8>) -> bool {
    let Some(path) = context.request.and_then(|r| r.get(HeaderId::PATH)) else { return false };
    let decoded = |text| percent_encoding::percent_decode(text);
    // Envoy decodes names too; only a name that was encoded needs the second look.
    let value = query_parameter(path, name).or_else(|| {
        query_parameters(path)
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

pub(super) fn path_of<'a>(context: &FormatContext<'a>, original: bool, current: bool) -> Option<&'a [u8]> {
    let request = context.request?;
    let get = |wanted: bool, id| if wanted { request.get(id).filter(|v| !v.is_empty()) } else { None };
    get(original, HeaderId::X_ENVOY_ORIGINAL_PATH).or_else(|| get(current, HeaderId::PATH))
}

pub(super) fn server_name(
    context: &FormatContext<'_>,
    order: NameOrder,
    original: bool,
    current: bool,
    out: &mut Vec<u8>,
) -> bool {
    let host = || {
        let request = context.request?;
        let get = |wanted: bool, id| if wanted { request.get(id) } else { None };
        let before = get(original, HeaderId::X_ENVOY_ORIGINAL_HOST).filter(|host| !host.is_empty());
        before.or_else(|| get(current, HeaderId::AUTHORITY))
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

/// What is told of the hosts that were tried, joined by `,`: of all where it was a session, of the last where it was a
/// request and a connection was had. An attempt that tells nothing is passed over.
pub(super) fn attempts(
    context: &FormatContext<'_>,
    out: &mut Vec<u8>,
    write: impl Fn(&UpstreamAttempt, &mut Vec<u8>) -> bool,
) -> bool {
    let Some(upstream) = &context.info.upstream else { return false };
    let mut any = false;
    let mut one = |attempt: &UpstreamAttempt| {
        let before = out.len();
        if any {
            out.push(b',');
        }
        if write(attempt, out) { any = true } else { out.truncate(before) }
    };
    if let (true, Some(host), connection_id @ Some(_)) =
        (upstream.attempts.is_empty(), &upstream.host, upstream.connection_id)
    {
        one(&UpstreamAttempt { host: host.clone(), host_name: upstream.host_name.clone(), connection_id });
    }
    upstream.attempts.iter().for_each(one);
    any
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
