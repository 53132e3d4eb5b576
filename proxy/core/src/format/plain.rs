//! The operators that take nothing, and the addresses.

use super::FormatContext;
use super::op::{AddressPart, GrpcForm, Precision, Side, TimePoint, What, join, put, put_some, underscored};
use super::value::{attempts, close_name, host_name, upstream_remote};
use crate::address::Address;
use crate::header::{HeaderId, HeaderMap};
use crate::stream_info::{CertInfo, ResponseFlags, StreamInfo, TlsInfo, UpstreamInfo};

/// Whose address an operator is about: the name without its suffix.
fn address_of(prefix: &str) -> Option<fn(&StreamInfo) -> Option<&Address>> {
    Some(match prefix {
        "DOWNSTREAM_LOCAL" | "DOWNSTREAM_DIRECT_LOCAL" => |i| Some(&i.connection.local),
        "DOWNSTREAM_REMOTE" => |i| Some(&i.remote),
        "DOWNSTREAM_DIRECT_REMOTE" => |i| Some(&i.connection.direct_remote),
        "UPSTREAM_LOCAL" => |i| i.upstream.as_ref()?.local.as_ref(),
        "UPSTREAM_REMOTE" => upstream_remote,
        _ => return None,
    })
}

/// `…_ADDRESS_WITHOUT_PORT`, with a prefix length its network; what is no number is passed over, as in Envoy.
pub(super) fn address_without_port(name: &str, parameters: &str) -> Option<What> {
    let get = address_of(name.strip_suffix("_ADDRESS_WITHOUT_PORT")?)?;
    let part = match parameters.parse::<u32>() {
        Ok(bits) => AddressPart::Network(u8::try_from(bits).unwrap_or(u8::MAX)),
        Err(_) => AddressPart::Host,
    };
    Some(What::Address(get, part))
}

/// Operators that take nothing.
pub(super) fn plain(name: &str) -> Option<What> {
    if let Some(get) = name.strip_suffix("_ADDRESS").and_then(address_of) {
        return Some(What::Address(get, AddressPart::Whole));
    }
    if let Some(get) = name.strip_suffix("_PORT").and_then(address_of) {
        return Some(What::Address(get, AddressPart::Port));
    }
    plain_duration(name)
        .or_else(|| endpoint_id(name))
        .or_else(|| plain_number(name))
        .or_else(|| plain_text(name))
        .or_else(|| upstream_text(name))
        .or_else(|| tls(name))
}

fn endpoint_id(name: &str) -> Option<What> {
    fn id(address: Option<&Address>, out: &mut Vec<u8>) -> bool {
        match address {
            Some(Address::Internal(_, id)) => put(id.as_bytes(), out),
            Some(_) => true,
            None => false,
        }
    }
    Some(match name {
        "DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID" | "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_ENDPOINT_ID" => {
            What::Text(|c, out| id(Some(&c.info.connection.local), out))
        }
        "UPSTREAM_REMOTE_ADDRESS_ENDPOINT_ID" => What::Text(|c, out| id(upstream_remote(c.info), out)),
        _ => return None,
    })
}

fn plain_duration(name: &str) -> Option<What> {
    use TimePoint as T;
    let (from, to) = match name {
        "REQUEST_DURATION" => (T::DownstreamRxBegin, T::DownstreamRxEnd),
        "REQUEST_TX_DURATION" => (T::DownstreamRxBegin, T::UpstreamTxEnd),
        "RESPONSE_DURATION" => (T::DownstreamRxBegin, T::UpstreamRxBegin),
        "RESPONSE_TX_DURATION" => (T::UpstreamRxBegin, T::DownstreamTxEnd),
        "DOWNSTREAM_HANDSHAKE_DURATION" => (T::DownstreamRxBegin, T::DownstreamHandshakeEnd),
        "DURATION" => (T::DownstreamRxBegin, T::End),
        // The time of the last QUIC acknowledgement.
        "ROUNDTRIP_DURATION" => (T::DownstreamRxBegin, T::Never),
        "UPSTREAM_CONNECTION_POOL_READY_DURATION" => return Some(What::PoolWait),
        _ => return None,
    };
    Some(What::Duration(from, to, Precision::Millis))
}

fn plain_number(name: &str) -> Option<What> {
    fn size(headers: Option<&HeaderMap>) -> u64 {
        headers.map_or(0, |h| h.byte_size() as u64)
    }
    Some(What::Number(match name {
        "BYTES_RECEIVED" => |c| c.info.bytes.received,
        "BYTES_SENT" => |c| c.info.bytes.sent,
        // QUIC's counts.
        "BYTES_RETRANSMITTED" | "PACKETS_RETRANSMITTED" | "DOWNSTREAM_CX_RTT" => |_| 0,
        "UPSTREAM_WIRE_BYTES_RECEIVED" => |c| c.info.bytes.upstream_wire_received,
        "UPSTREAM_WIRE_BYTES_SENT" => |c| c.info.bytes.upstream_wire_sent,
        "UPSTREAM_HEADER_BYTES_RECEIVED" | "UPSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => {
            |c| c.info.bytes.upstream_header_received
        }
        "UPSTREAM_HEADER_BYTES_SENT" | "UPSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => {
            |c| c.info.bytes.upstream_header_sent
        }
        "DOWNSTREAM_WIRE_BYTES_RECEIVED" => |c| c.info.bytes.wire_received,
        "DOWNSTREAM_WIRE_BYTES_SENT" => |c| c.info.bytes.wire_sent,
        "DOWNSTREAM_HEADER_BYTES_RECEIVED" | "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_RECEIVED" => {
            |c| c.info.bytes.header_received
        }
        "DOWNSTREAM_HEADER_BYTES_SENT" | "DOWNSTREAM_DECOMPRESSED_HEADER_BYTES_SENT" => {
            |c| c.info.bytes.header_sent
        }
        "RESPONSE_CODE" => |c| u64::from(c.info.response_code),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => |c| u64::from(c.info.attempts),
        "UPSTREAM_CONNECTION_ID" => |c| c.info.upstream.as_ref().and_then(|u| u.connection_id).unwrap_or(0),
        "CONNECTION_ID" => |c| c.info.connection.id,
        "REQUEST_HEADERS_BYTES" => |c| size(c.request),
        "RESPONSE_HEADERS_BYTES" => |c| size(c.response),
        "RESPONSE_TRAILERS_BYTES" => |c| size(c.trailers),
        _ => return None,
    }))
}

fn flags(flags: ResponseFlags, long: bool, out: &mut Vec<u8>) -> bool {
    if flags.is_empty() {
        return put("-", out);
    }
    if long {
        join(flags.long(), out)
    } else {
        join(flags.short(), out)
    }
    true
}

fn plain_text(name: &str) -> Option<What> {
    match name {
        "HOSTNAME" => {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
            return Some(What::Constant(name.map(|n| n.trim_end().to_owned())));
        }
        "GRPC_STATUS_NUMBER" => return Some(What::GrpcStatus(GrpcForm::Number)),
        _ => {}
    }
    Some(What::Text(match name {
        "PROTOCOL" => |c, out| c.info.protocol.is_some_and(|p| put(p.as_str(), out)),
        "CONNECTION_TERMINATION_DETAILS" => {
            |c, out| c.info.termination_details.as_ref().is_some_and(|d| put(d.as_bytes(), out))
        }
        "RESPONSE_FLAGS" => |c, out| flags(c.info.flags, false, out),
        "RESPONSE_FLAGS_LONG" => |c, out| flags(c.info.flags, true, out),
        // Flags that extensions of ours do not set.
        "CUSTOM_FLAGS" => |_, _| true,
        "ROUTE_NAME" => |c, out| put_some(c.info.route_name.as_ref().map(|n| n.as_bytes()), out),
        "VIRTUAL_CLUSTER_NAME" => {
            |c, out| put_some(c.info.virtual_cluster.as_ref().map(|n| n.as_bytes()), out)
        }
        "LISTENER_NAME" => |c, out| put_some(Some(c.info.connection.listener.as_bytes()), out),
        "FILTER_CHAIN_NAME" => |c, out| put_some(Some(c.info.connection.filter_chain.as_bytes()), out),
        "STREAM_ID" => |c, out| stream_id(c, out),
        "TRACE_ID" => |c, out| put_some(c.info.trace_id.as_ref().map(|n| n.as_bytes()), out),
        "SPAN_ID" => |c, out| put_some(c.info.span_id.as_ref().map(|n| n.as_bytes()), out),
        "UNIQUE_ID" => |_, out| unique_id(out),
        "LOCAL_REPLY_BODY" => |c, out| put(c.local_reply_body, out),
        "ACCESS_LOG_TYPE" => |c, out| put(c.log_type.as_str_name(), out),
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => |c, out| {
            let reason = c.info.connection.transport_failure.as_deref().filter(|r| !r.is_empty());
            reason.is_some_and(|r| underscored(r, out))
        },
        "DOWNSTREAM_DETECTED_CLOSE_TYPE" => |c, out| put(close_name(c.info.downstream_close), out),
        "DOWNSTREAM_LOCAL_CLOSE_REASON" => {
            |c, out| put_some(c.info.downstream_local_close_reason.as_ref().map(|r| r.as_bytes()), out)
        }
        // The TLS inspector does not take fingerprints.
        "TLS_JA3_FINGERPRINT" | "TLS_JA4_FINGERPRINT" => |_, _| false,
        _ => return None,
    }))
}

/// The request's id; of a TCP connection a UUID that stays the same in all its entries.
pub fn stream_id(context: &FormatContext<'_>, out: &mut Vec<u8>) -> bool {
    let info = context.info;
    if info.protocol.is_none() && context.request.is_none() {
        let low = info.stream_id.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
        return put_uuid(u128::from(info.stream_id) << 64 | u128::from(low), out);
    }
    let kept = info.request_id.as_ref().map(|n| n.as_bytes());
    put_some(kept.or_else(|| context.request?.get(HeaderId::X_REQUEST_ID)), out)
}

/// A random UUID, version 4.
fn unique_id(out: &mut Vec<u8>) -> bool {
    put_uuid(rand::random(), out)
}

/// A UUID of version 4 with these bits.
fn put_uuid(random: u128, out: &mut Vec<u8>) -> bool {
    use std::io::Write;
    let id = (random & !(0xf << 76) & !(0x3 << 62)) | (0x4 << 76) | (0x2 << 62);
    let (a, b, c) = (id >> 96, (id >> 80) & 0xffff, (id >> 64) & 0xffff);
    let (d, e) = ((id >> 48) & 0xffff, id & 0xffff_ffff_ffff);
    write!(out, "{a:08x}-{b:04x}-{c:04x}-{d:04x}-{e:012x}").is_ok()
}

fn upstream<'a>(context: &FormatContext<'a>) -> Option<&'a UpstreamInfo> {
    context.info.upstream.as_deref()
}

fn upstream_text(name: &str) -> Option<What> {
    fn named(c: &FormatContext<'_>, without_port: bool, out: &mut Vec<u8>) -> bool {
        let Some(upstream) = upstream(c) else { return false };
        upstream.host.as_ref().is_some_and(|h| host_name(upstream.host_name.as_ref(), h, without_port, out))
    }
    if name == "UPSTREAM_HOST" {
        return Some(What::Address(|i| i.upstream.as_ref()?.host.as_ref(), AddressPart::Whole));
    }
    Some(What::Text(match name {
        "UPSTREAM_PROTOCOL" => {
            |c, out| upstream(c).and_then(|u| u.protocol).is_some_and(|p| put(p.as_str(), out))
        }
        "UPSTREAM_HOST_NAME" => |c, out| named(c, false, out),
        "UPSTREAM_HOST_NAME_WITHOUT_PORT" => |c, out| named(c, true, out),
        "UPSTREAM_CLUSTER" => |c, out| {
            let name = c.info.cluster_observability.as_ref().or(c.info.cluster.as_ref());
            put_some(name.map(|n| n.as_bytes()), out)
        },
        "UPSTREAM_CLUSTER_RAW" => |c, out| put_some(c.info.cluster.as_ref().map(|n| n.as_bytes()), out),
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => |c, out| {
            let reason = upstream(c).and_then(|u| u.transport_failure.as_deref()).filter(|r| !r.is_empty());
            reason.is_some_and(|r| {
                out.extend(r.bytes().map(|b| if b == b' ' { b'_' } else { b }));
                true
            })
        },
        "UPSTREAM_HOSTS_ATTEMPTED" => {
            |c, out| attempts(c, out, |a, out| host_name(None, &a.host, false, out))
        }
        "UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT" => {
            |c, out| attempts(c, out, |a, out| host_name(None, &a.host, true, out))
        }
        "UPSTREAM_HOST_NAMES_ATTEMPTED" => {
            |c, out| attempts(c, out, |a, out| host_name(a.host_name.as_ref(), &a.host, false, out))
        }
        "UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT" => {
            |c, out| attempts(c, out, |a, out| host_name(a.host_name.as_ref(), &a.host, true, out))
        }
        "UPSTREAM_CONNECTION_IDS_ATTEMPTED" => |c, out| {
            attempts(c, out, |a, out| {
                let Some(id) = a.connection_id else { return false };
                out.extend_from_slice(itoa::Buffer::new().format(id).as_bytes());
                true
            })
        },
        "UPSTREAM_DETECTED_CLOSE_TYPE" => {
            |c, out| upstream(c).filter(|u| u.host.is_some()).is_some_and(|u| put(close_name(u.close), out))
        }
        "UPSTREAM_LOCAL_CLOSE_REASON" => |c, out| {
            put_some(upstream(c).and_then(|u| u.local_close_reason.as_ref()).map(|r| r.as_bytes()), out)
        },
        "UPSTREAM_SERVER_NAME" => |c, out| {
            let tls = upstream(c).and_then(|u| u.tls.as_deref());
            put_some(tls.and_then(|t| t.sni.as_ref()).map(|s| s.as_bytes()), out)
        },
        _ => return None,
    }))
}

fn peer(tls: &TlsInfo) -> Option<&CertInfo> {
    tls.peer.as_deref()
}

fn local(tls: &TlsInfo) -> Option<&CertInfo> {
    tls.local.as_deref()
}

fn one<'a>(cert: Option<&'a CertInfo>, get: fn(&'a CertInfo) -> &'a str, out: &mut Vec<u8>) {
    if let Some(cert) = cert {
        out.extend_from_slice(get(cert).as_bytes());
    }
}

fn many(cert: Option<&CertInfo>, get: fn(&CertInfo) -> &Vec<String>, out: &mut Vec<u8>) {
    if let Some(cert) = cert {
        join(get(cert), out);
    }
}

fn chain<'a>(tls: &'a TlsInfo, get: fn(&'a CertInfo) -> &'a str, out: &mut Vec<u8>) {
    join(peer(tls).into_iter().chain(tls.peer_issuers.iter().map(|c| &**c)).map(get), out);
}

fn issuer(tls: &TlsInfo) -> Option<&CertInfo> {
    tls.peer_issuers.first().map(|c| &**c)
}

fn tls(name: &str) -> Option<What> {
    let (side, field) = match name.split_once('_')? {
        ("DOWNSTREAM", field) => (Side::Downstream, field),
        ("UPSTREAM", field) => (Side::Upstream, field),
        _ => return None,
    };
    // Of the upstream's certificate Envoy shows less.
    let upstream_has = matches!(
        field,
        "TLS_CIPHER"
            | "TLS_VERSION"
            | "TLS_GROUP"
            | "TLS_SESSION_ID"
            | "PEER_ISSUER"
            | "PEER_CERT"
            | "PEER_SUBJECT"
            | "PEER_URI_SAN"
            | "PEER_DNS_SAN"
            | "PEER_IP_SAN"
            | "LOCAL_URI_SAN"
            | "LOCAL_DNS_SAN"
            | "LOCAL_IP_SAN"
    );
    if matches!(side, Side::Upstream) && !upstream_has {
        return None;
    }
    let write: fn(&TlsInfo, &mut Vec<u8>) = match field {
        "TLS_CIPHER" => |t, out| out.extend_from_slice(t.cipher.as_bytes()),
        "TLS_VERSION" => |t, out| out.extend_from_slice(t.version.as_bytes()),
        "TLS_GROUP" => |t, out| out.extend_from_slice(t.group.as_bytes()),
        "TLS_SESSION_ID" => |t, out| out.extend_from_slice(t.session_id.as_bytes()),
        "PEER_ISSUER" => |t, out| one(peer(t), |c| &c.issuer, out),
        "PEER_CERT" => |t, out| one(peer(t), |c| &c.pem, out),
        "PEER_SUBJECT" => |t, out| one(peer(t), |c| &c.subject, out),
        "PEER_SERIAL" => |t, out| one(peer(t), |c| &c.serial, out),
        "PEER_FINGERPRINT_256" => |t, out| one(peer(t), |c| &c.sha256, out),
        "PEER_FINGERPRINT_1" => |t, out| one(peer(t), |c| &c.sha1, out),
        "PEER_ISSUER_SERIAL" => |t, out| one(issuer(t), |c| &c.serial, out),
        "PEER_ISSUER_FINGERPRINT_256" => |t, out| one(issuer(t), |c| &c.sha256, out),
        "PEER_CHAIN_FINGERPRINTS_256" => |t, out| chain(t, |c| &c.sha256, out),
        "PEER_CHAIN_FINGERPRINTS_1" => |t, out| chain(t, |c| &c.sha1, out),
        "PEER_CHAIN_SERIALS" => |t, out| chain(t, |c| &c.serial, out),
        "PEER_URI_SAN" => |t, out| many(peer(t), |c| &c.uri_sans, out),
        "PEER_DNS_SAN" => |t, out| many(peer(t), |c| &c.dns_sans, out),
        "PEER_IP_SAN" => |t, out| many(peer(t), |c| &c.ip_sans, out),
        "PEER_EMAIL_SAN" => |t, out| many(peer(t), |c| &c.email_sans, out),
        "PEER_OTHERNAME_SAN" => |t, out| many(peer(t), |c| &c.othername_sans, out),
        "LOCAL_SUBJECT" => |t, out| one(local(t), |c| &c.subject, out),
        "LOCAL_URI_SAN" => |t, out| many(local(t), |c| &c.uri_sans, out),
        "LOCAL_DNS_SAN" => |t, out| many(local(t), |c| &c.dns_sans, out),
        "LOCAL_IP_SAN" => |t, out| many(local(t), |c| &c.ip_sans, out),
        "LOCAL_EMAIL_SAN" => |t, out| many(local(t), |c| &c.email_sans, out),
        "LOCAL_OTHERNAME_SAN" => |t, out| many(local(t), |c| &c.othername_sans, out),
        _ => return None,
    };
    Some(What::Tls(side, write))
}
