//! What is done to a request's headers before anything reads them: Envoy's
//! `ConnectionManagerUtility::mutateRequestHeaders`, in its order.

use std::borrow::Cow;
use std::net::IpAddr;

use sampan_core::address::{host, literal};
use sampan_core::header::{HeaderId, HeaderMap, HeaderSet, authority_is_valid};
use sampan_core::stream_info::{ConnectionInfo, Protocol, StreamInfo};
use sampan_core::{Address, HeaderName};

use super::config::{Manager, RequestOptions, StripPort};
use super::origin::Detector;
use super::path::{self, Normalized};
use crate::filter::LocalReply;

/// Checks and normalises what routes are found by; gives the port that was stripped from the host. An error is the
/// reply to the request.
pub fn normalize(
    manager: &Manager,
    headers: &mut HeaderMap,
    info: &StreamInfo,
    grpc: bool,
) -> Result<Option<u16>, LocalReply> {
    join_repeated(headers);
    check(manager, headers)?;
    normalize_path(manager, headers, grpc)?;
    Ok(normalize_host(&manager.request, headers, info.connection.local.port()))
}

/// Extends the headers of a request, and takes out what no client may send. An error is the reply to a request whose
/// client could not be found.
pub fn extend(
    manager: &Manager,
    headers: &mut HeaderMap,
    info: &mut StreamInfo,
    internal_only: &[HeaderName],
    random: impl Fn() -> u64,
) -> Result<(), LocalReply> {
    let options = &manager.request;
    for mutations in &manager.early_mutations {
        mutations.apply_to_request(headers, info);
    }
    let upgrade = is_upgrade(headers);
    sanitize(headers, upgrade);
    let (remote, edge) = remote_address(options, headers, info, internal_only)?;
    if let Some(cluster) = &options.user_agent {
        headers.set(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER, cluster);
        if headers.get(HeaderId::USER_AGENT).is_none_or(<[u8]>::is_empty) {
            headers.set(HeaderId::USER_AGENT, cluster);
        }
        if !options.node.is_empty() {
            headers.set(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_NODE, &options.node);
        }
    }
    if !manager.via.is_empty() {
        headers.append_to_value(HeaderId::VIA, ", ", manager.via.as_bytes());
    }
    if edge && let Some(remote) = remote.socket_addr() {
        headers.set(HeaderId::X_ENVOY_EXTERNAL_ADDRESS, host(&remote).to_string());
    }
    if options.generate_request_id {
        request_id(options, headers, edge, random);
    }
    options.client_cert.apply(headers, &info.connection);
    info.remote = remote;
    Ok(())
}

fn check(manager: &Manager, headers: &HeaderMap) -> Result<(), LocalReply> {
    let Some(host) = headers.get(HeaderId::AUTHORITY) else {
        return Err(LocalReply::new(400, "missing_host_header"));
    };
    if !authority_is_valid(host) {
        return Err(LocalReply::new(400, "http.invalid_authority"));
    }
    if headers.get(HeaderId::SCHEME).is_some_and(|s| s.contains(&b',')) {
        return Err(LocalReply::new(400, "http.invalid_scheme"));
    }
    let connect = headers.get(HeaderId::METHOD) == Some(b"CONNECT");
    match headers.get(HeaderId::PATH) {
        None if connect => Ok(()),
        None | Some(b"") => Err(LocalReply::new(404, "missing_path_rejected")),
        Some([b'/', ..]) => Ok(()),
        Some(_) => {
            manager.stats.downstream_rq_non_relative_path.inc();
            Err(LocalReply::new(404, "absolute_path_rejected"))
        }
    }
}

fn normalize_path(manager: &Manager, headers: &mut HeaderMap, grpc: bool) -> Result<(), LocalReply> {
    const DETAILS: &str = "path_normalization_failed";
    let Some(now) = headers.get(HeaderId::PATH) else { return Ok(()) };
    match path::normalize(now, manager.request.path) {
        Normalized::Same => Ok(()),
        Normalized::Changed(path) => {
            headers.set(HeaderId::PATH, path);
            Ok(())
        }
        Normalized::Redirect(path) if !grpc => {
            manager.stats.downstream_rq_redirected_with_normalized_path.inc();
            headers.set(HeaderId::PATH, &path);
            Err(LocalReply::new(307, DETAILS).header(HeaderId::LOCATION, path))
        }
        Normalized::Redirect(path) | Normalized::Reject(Some(path)) => {
            headers.set(HeaderId::PATH, path);
            manager.stats.downstream_rq_failed_path_normalization.inc();
            Err(LocalReply::new(400, DETAILS))
        }
        Normalized::Reject(None) => {
            manager.stats.downstream_rq_failed_path_normalization.inc();
            Err(LocalReply::new(400, DETAILS))
        }
    }
}

/// Strips a trailing dot and the port; gives the port that was stripped.
fn normalize_host(
    options: &RequestOptions,
    headers: &mut HeaderMap,
    listener_port: Option<u16>,
) -> Option<u16> {
    if options.strip_trailing_host_dot
        && let Some(host) = headers.get(HeaderId::AUTHORITY)
    {
        let (name, port) = split_port(host);
        if let Some(stripped) = name.strip_suffix(b".") {
            let mut stripped = stripped.to_vec();
            if let Some(port) = port {
                stripped.push(b':');
                stripped.extend_from_slice(port);
            }
            headers.set(HeaderId::AUTHORITY, stripped);
        }
    }
    if options.strip_port == StripPort::Keep {
        return None;
    }
    let (name, port) = split_port(headers.get(HeaderId::AUTHORITY)?);
    let port: u16 = std::str::from_utf8(port?).ok()?.parse().ok()?;
    if options.strip_port == StripPort::Matching && Some(port) != listener_port {
        return None;
    }
    let name = name.to_vec();
    headers.set(HeaderId::AUTHORITY, name);
    Some(port)
}

/// A host's name and port; a bracketed address keeps its colons.
pub fn split_port(host: &[u8]) -> (&[u8], Option<&[u8]>) {
    match host.iter().rposition(|c| *c == b':') {
        Some(at)
            if !host[at..].contains(&b']') && (host[..at].ends_with(b"]") || !host[..at].contains(&b':')) =>
        {
            (&host[..at], Some(&host[at + 1..]))
        }
        _ => (host, None),
    }
}

/// Whether `connection` names `upgrade` and there is one.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    headers.contains(HeaderId::UPGRADE) && headers.lists(HeaderId::CONNECTION, "upgrade")
}

/// Repeated headers of which there can only be one become one, joined by a comma.
fn join_repeated(headers: &mut HeaderMap) {
    if !headers.may_repeat() {
        return;
    }
    let mut seen = [0u64; HeaderId::COUNT.div_ceil(64)];
    let mut repeated: smallvec::SmallVec<[HeaderId; 4]> = smallvec::SmallVec::new();
    for (id, ..) in headers.iter() {
        let (word, bit) = (id.index() / 64, 1 << (id.index() % 64));
        if id != HeaderId::CUSTOM && seen[word] & bit != 0 && !repeated.contains(&id) {
            repeated.push(id);
        }
        seen[word] |= bit;
    }
    for id in repeated {
        if crate::route::is_inline(id) {
            let all = headers.get_all(id).collect::<Vec<_>>().join(&b","[..]);
            headers.set(id, all);
        }
    }
}

/// Hop-by-hop headers go; an upgrade keeps its own.
fn sanitize(headers: &mut HeaderMap, upgrade: bool) {
    const TOUCHED: HeaderSet = HeaderSet::of(&[
        HeaderId::CONNECTION,
        HeaderId::UPGRADE,
        HeaderId::KEEP_ALIVE,
        HeaderId::PROXY_CONNECTION,
        HeaderId::TRANSFER_ENCODING,
        HeaderId::X_ENVOY_INTERNAL,
        HeaderId::TE,
        HeaderId::REFERER,
    ]);
    if !headers.may_have(&TOUCHED) {
        return;
    }
    let mut te_trailers = None;
    let mut referers = 0;
    let mut any = false;
    for (id, _, value) in headers.iter() {
        match id {
            HeaderId::CONNECTION
            | HeaderId::UPGRADE
            | HeaderId::KEEP_ALIVE
            | HeaderId::PROXY_CONNECTION
            | HeaderId::TRANSFER_ENCODING
            | HeaderId::X_ENVOY_INTERNAL => any = true,
            HeaderId::TE => {
                let trailers = value.split(|c| *c == b',').any(|t| t.trim_ascii() == b"trailers");
                te_trailers = Some(te_trailers.unwrap_or(false) || trailers);
            }
            HeaderId::REFERER => referers += if super::referer::is_valid(value) { 1 } else { 2 },
            _ => {}
        }
    }
    if any {
        headers.remove_if(|id, _, _| match id {
            HeaderId::CONNECTION | HeaderId::UPGRADE => !upgrade,
            HeaderId::KEEP_ALIVE
            | HeaderId::PROXY_CONNECTION
            | HeaderId::TRANSFER_ENCODING
            | HeaderId::X_ENVOY_INTERNAL => true,
            _ => false,
        });
    }
    match te_trailers {
        Some(true) if !upgrade => headers.set(HeaderId::TE, "trailers"),
        Some(false) if !upgrade => {
            headers.remove(HeaderId::TE);
        }
        _ => {}
    }
    if referers > 1 {
        headers.remove(HeaderId::REFERER);
    }
}

/// Who the client is, and whether this is the edge of the trusted network. `x-forwarded-*` and `:scheme` are set on
/// the way.
fn remote_address(
    options: &RequestOptions,
    headers: &mut HeaderMap,
    info: &StreamInfo,
    internal_only: &[HeaderName],
) -> Result<(Address, bool), LocalReply> {
    let connection = &*info.connection;
    let tls = connection.tls.is_some();
    let scheme = match &options.forward_proto {
        Some(ports) => ports.scheme(connection, tls),
        None if tls => "https",
        None => "http",
    };
    let mut trusted = false;
    let mut remote = None;
    if options.use_remote_address {
        trusted = !headers.contains(HeaderId::X_FORWARDED_FOR);
        if options.xff_num_trusted_hops > 0 {
            remote = last_from_xff(headers, options.xff_num_trusted_hops - 1).map(|(address, _)| address);
        }
        let remote = remote.get_or_insert_with(|| connection.remote.clone());
        let _ = remote;
        if !options.skip_xff_append {
            append_xff(headers, connection);
        }
        if options.xff_num_trusted_hops == 0 || !headers.contains(HeaderId::X_FORWARDED_PROTO) {
            headers.trusted(|h| h.set(HeaderId::X_FORWARDED_PROTO, scheme));
        }
        if options.append_x_forwarded_port
            && (options.xff_num_trusted_hops == 0 || !headers.contains(HeaderId::X_FORWARDED_PORT))
            && let Some(port) = connection.local.port()
        {
            headers.set(HeaderId::X_FORWARDED_PORT, port.to_string());
        }
    } else if let Some((address, may_be_internal)) = Detector::detect(&options.origin, headers, connection)? {
        remote = Some(address);
        trusted = may_be_internal;
    }
    if !headers.contains(HeaderId::X_FORWARDED_PROTO) {
        headers.trusted(|h| h.append(HeaderId::X_FORWARDED_PROTO, scheme));
    }
    if options.append_x_forwarded_port
        && !headers.contains(HeaderId::X_FORWARDED_PORT)
        && let Some(port) = connection.local.port()
    {
        headers.append(HeaderId::X_FORWARDED_PORT, port.to_string());
    }
    set_scheme(options, headers, tls);
    let internal = trusted && remote.as_ref().is_some_and(|a| is_internal(options, a));
    let edge = !internal && options.use_remote_address;
    if internal {
        headers.trusted(|h| h.append(HeaderId::X_ENVOY_INTERNAL, "true"));
    } else {
        clean_internal(headers, edge, internal_only);
    }
    Ok((remote.unwrap_or_else(|| connection.remote.clone()), edge))
}

fn set_scheme(options: &RequestOptions, headers: &mut HeaderMap, tls: bool) {
    if let Some(scheme) = options.scheme {
        headers.trusted(|h| h.set(HeaderId::SCHEME, scheme));
        headers.trusted(|h| h.set(HeaderId::X_FORWARDED_PROTO, scheme));
    }
    match headers.get(HeaderId::SCHEME) {
        None => {
            let scheme = match headers.get(HeaderId::X_FORWARDED_PROTO) {
                Some(p) if p.eq_ignore_ascii_case(b"http") => "http",
                Some(p) if p.eq_ignore_ascii_case(b"https") => "https",
                _ if tls => "https",
                _ => "http",
            };
            headers.trusted(|h| h.insert_first(HeaderId::SCHEME, scheme));
        }
        Some(scheme) if scheme.iter().any(u8::is_ascii_uppercase) => {
            let lower = scheme.to_ascii_lowercase();
            headers.set(HeaderId::SCHEME, lower);
        }
        Some(_) => {}
    }
}

pub(super) fn append_xff(headers: &mut HeaderMap, connection: &ConnectionInfo) {
    match connection.remote.socket_addr() {
        // A client on this machine is known to others by the machine's address.
        Some(remote) if remote.ip().is_loopback() => append_ip(headers, sampan_core::local_info::address()),
        Some(remote) => append(headers, host(&remote)),
        None => {}
    }
}

/// Appends an address to `x-forwarded-for`.
pub fn append_ip(headers: &mut HeaderMap, ip: IpAddr) {
    append(headers, ip);
}

fn append(headers: &mut HeaderMap, address: impl std::fmt::Display) {
    use std::io::Write as _;
    let mut text = [0u8; 64];
    let mut rest = &mut text[..];
    // The longest address has 45 bytes, its scope up to 11.
    let _ = write!(rest, "{address}");
    let len = 64 - rest.len();
    headers.trusted(|h| h.append_to_value(HeaderId::X_FORWARDED_FOR, ",", &text[..len]));
}

/// The address `skip` places before the last of `x-forwarded-for`, and whether it is the only one.
pub(super) fn last_from_xff(headers: &HeaderMap, skip: u32) -> Option<(Address, bool)> {
    if !headers.contains(HeaderId::X_FORWARDED_FOR) {
        return None;
    }
    let value = match headers.joined(&HeaderName::Known(HeaderId::X_FORWARDED_FOR))? {
        Cow::Borrowed(v) => Cow::Borrowed(std::str::from_utf8(v).ok()?),
        Cow::Owned(v) => Cow::Owned(String::from_utf8(v).ok()?),
    };
    let mut parts = value.rsplit(',');
    let part = parts.nth(skip as usize)?;
    let address = literal(part.trim(), 0)?;
    let single = !value.contains(',');
    Some((Address::Ip(address), single))
}

/// Whether an address is the mesh's own: only with an `internal_address_config`, as in Envoy 1.40.
fn is_internal(options: &RequestOptions, address: &Address) -> bool {
    match (&options.internal, address.ip()) {
        (None, _) => false,
        (Some(internal), None) => internal.unix_sockets,
        (Some(internal), Some(ip)) => internal.ranges.iter().any(|net| net.contains(&ip)),
    }
}

/// Headers that only the mesh itself may send.
fn clean_internal(headers: &mut HeaderMap, edge: bool, internal_only: &[HeaderName]) {
    const EDGE: HeaderSet = HeaderSet::of(&[
        HeaderId::X_ENVOY_DECORATOR_OPERATION,
        HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER,
        HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_NODE,
        HeaderId::X_ENVOY_ORIGINAL_PATH,
        HeaderId::X_ENVOY_ORIGINAL_HOST,
    ]);
    const INTERNAL: HeaderSet = HeaderSet::of(&[
        HeaderId::X_ENVOY_RETRIABLE_STATUS_CODES,
        HeaderId::X_ENVOY_RETRIABLE_HEADER_NAMES,
        HeaderId::X_ENVOY_RETRY_ON,
        HeaderId::X_ENVOY_RETRY_GRPC_ON,
        HeaderId::X_ENVOY_MAX_RETRIES,
        HeaderId::X_ENVOY_UPSTREAM_ALT_STAT_NAME,
        HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS,
        HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS,
        HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE,
        HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS,
        HeaderId::X_ENVOY_FORCE_TRACE,
        HeaderId::X_ENVOY_IP_TAGS,
        HeaderId::X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT,
        HeaderId::X_ENVOY_ORIGINAL_URL,
    ]);
    let edge = edge && headers.may_have(&EDGE);
    if edge || headers.may_have(&INTERNAL) {
        headers.remove_if(|id, _, _| INTERNAL.contains(id) || (edge && EDGE.contains(id)));
    }
    for name in internal_only {
        headers.remove_name(name);
    }
}

fn request_id(options: &RequestOptions, headers: &mut HeaderMap, edge: bool, random: impl Fn() -> u64) {
    let foreign = edge && !options.preserve_external_request_id;
    if foreign || !headers.contains(HeaderId::X_REQUEST_ID) {
        headers.trusted(|h| h.set(HeaderId::X_REQUEST_ID, uuid(random(), random())));
    } else if edge && options.pack_trace_reason {
        crate::tracing::forget_reason(headers);
    }
}

/// A version 4 UUID; the 15th character is where Envoy packs the trace reason.
pub(crate) fn uuid(high: u64, low: u64) -> [u8; 36] {
    let high = (high & !0xf000) | 0x4000;
    let low = (low & !(0x3 << 62)) | (0x2 << 62);
    let [first, second] = hex(high);
    let [third, fourth] = hex(low);
    let mut out = [b'-'; 36];
    out[..8].copy_from_slice(&first);
    out[9..13].copy_from_slice(&second[..4]);
    out[14..18].copy_from_slice(&second[4..]);
    out[19..23].copy_from_slice(&third[..4]);
    out[24..28].copy_from_slice(&third[4..]);
    out[28..].copy_from_slice(&fourth);
    out
}

/// The hex digits of a number, all eight of each half at once.
fn hex(number: u64) -> [[u8; 8]; 2] {
    [number >> 32, number & 0xffff_ffff].map(|half| {
        // A digit a byte.
        let mut digits = (half | (half << 16)) & 0x0000_ffff_0000_ffff;
        digits = (digits | (digits << 8)) & 0x00ff_00ff_00ff_00ff;
        digits = (digits | (digits << 4)) & 0x0f0f_0f0f_0f0f_0f0f;
        // One where it is a letter: six more makes it go beyond 15.
        let letters = ((digits + 0x0606_0606_0606_0606) >> 4) & 0x0101_0101_0101_0101;
        let text = digits + 0x3030_3030_3030_3030 + letters * u64::from(b'a' - b'9' - 1);
        text.to_be_bytes()
    })
}

/// Whether the client asked to close behind this exchange.
pub fn wants_close(protocol: Protocol, headers: &HeaderMap) -> bool {
    match protocol {
        Protocol::Http10 if !headers.lists(HeaderId::CONNECTION, "keep-alive") => true,
        Protocol::Http10 | Protocol::Http11 => {
            (protocol == Protocol::Http11 && headers.lists(HeaderId::CONNECTION, "close"))
                || headers.lists(HeaderId::PROXY_CONNECTION, "close")
        }
        Protocol::Http2 | Protocol::Http3 => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_split_off() {
        assert_eq!(split_port(b"a:80"), (&b"a"[..], Some(&b"80"[..])));
        assert_eq!(split_port(b"a"), (&b"a"[..], None));
        assert_eq!(split_port(b"[::1]:80"), (&b"[::1]"[..], Some(&b"80"[..])));
        assert_eq!(split_port(b"[::1]"), (&b"[::1]"[..], None));
    }

    #[test]
    fn uuids_have_their_form() {
        let id = uuid(u64::MAX, u64::MAX);
        assert_eq!(&id, b"ffffffff-ffff-4fff-bfff-ffffffffffff");
        let id = uuid(0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210);
        assert_eq!(&id, b"01234567-89ab-4def-bedc-ba9876543210");
    }

    #[test]
    fn xff_is_read_from_the_right() {
        let mut h = HeaderMap::new();
        h.append(HeaderId::X_FORWARDED_FOR, "1.1.1.1, 2.2.2.2");
        let ip = |skip| last_from_xff(&h, skip).map(|(a, single)| (a.ip().unwrap().to_string(), single));
        assert_eq!(ip(0), Some(("2.2.2.2".to_owned(), false)));
        assert_eq!(ip(1), Some(("1.1.1.1".to_owned(), false)));
        assert_eq!(ip(2), None);
    }
}
