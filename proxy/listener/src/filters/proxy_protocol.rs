//! `proxy_protocol`: versions 1 and 2 of the PROXY protocol (HAProxy's `proxy-protocol.txt`).
//!
//! The header is taken off the socket and its addresses replace the connection's remote and local address. `LOCAL`
//! and `UNKNOWN` keep the real ones. Anything malformed closes the connection. TLVs go to dynamic metadata by
//! `rules` and are kept for the upstream side by `pass_through_tlvs`; a TLV that reaches beyond the header closes
//! the connection before any of it is read.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_config::Version;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol as Message;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::proxy_protocol::{
    KeyValuePair, TlvLocation, key_value_pair::ValueStringEncoding,
};
use envoy_types::pb::google::protobuf::{Any, Value, value::Kind};
use sampan_core::Address;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::proxy_protocol::{PassThrough, V2_SIGNATURE};
use sampan_core::stats::{Counter, Scope};
use sampan_tls::Transport;

use super::{Accepted, ListenerFilter, Step};
use crate::context::FactoryContext;
use crate::proto::decode;
use crate::stats::stats;

const V1_SIGNATURE: &[u8] = b"PROXY";
const V2_HEADER: usize = 16;
/// The longest line of version 1, its end included, as Envoy counts.
const V1_MAX: usize = 108;
const MAX_BYTES: usize = V2_HEADER + u16::MAX as usize;
const DEFAULT_NAMESPACE: &str = "envoy.filters.listener.proxy_protocol";

stats! {
    /// `proxy_proto.versions.vN.*`
    VersionCounters {
        counters: disallowed error found;
        gauges: ;
    }
}

stats! {
    /// `proxy_proto.*`
    GeneralCounters {
        counters: not_found_allowed not_found_disallowed;
        gauges: ;
    }
}

struct ProxyProtocol {
    legacy_error: Counter,
    general: GeneralCounters,
    v1: VersionCounters,
    v2: VersionCounters,
    allow_v1: bool,
    allow_v2: bool,
    allow_without: bool,
    rules: HashMap<u8, KeyValuePair>,
    pass: PassThrough,
}

pub(super) fn make(config: &Any, context: &FactoryContext) -> ConfigResult<Box<dyn ListenerFilter>> {
    let message: Message = decode(config)?;
    Ok(Box::new(ProxyProtocol::from_proto(&message, &context.root_scope())?))
}

impl ProxyProtocol {
    fn from_proto(message: &Message, scope: &Scope) -> ConfigResult<Self> {
        let disallowed = |v: Version| message.disallowed_versions.contains(&(v as i32));
        let (allow_v1, allow_v2) = (!disallowed(Version::V1), !disallowed(Version::V2));
        if !allow_v1 && !allow_v2 {
            return Err(ConfigError::new(
                "Proxy Protocol filter is misconfigured: all proxy protocol versions are disallowed.",
            )
            .at("disallowed_versions"));
        }
        let mut rules = HashMap::new();
        for rule in &message.rules {
            // Envoy keeps the low byte and the last rule of a type.
            rules.insert(rule.tlv_type as u8, rule.on_tlv_present.clone().unwrap_or_default());
        }
        if message.tlv_location() == TlvLocation::FilterState && !rules.is_empty() {
            return Err(ConfigError::unsupported("FILTER_STATE").at("tlv_location"));
        }
        let own = match message.stat_prefix.as_str() {
            "" => scope.scope("proxy_proto"),
            prefix => scope.scope("proxy_proto").scope(prefix),
        };
        Ok(Self {
            legacy_error: scope.counter("downstream_cx_proxy_proto_error"),
            general: GeneralCounters::new(&own),
            v1: VersionCounters::new(&own.scope("versions.v1")),
            v2: VersionCounters::new(&own.scope("versions.v2")),
            allow_v1,
            allow_v2,
            allow_without: message.allow_requests_without_proxy_protocol,
            rules,
            pass: PassThrough::from_proto(message.pass_through_tlvs.as_ref()),
        })
    }
}

/// A header that was read.
#[derive(Debug, PartialEq)]
struct Header<'a> {
    /// Its length with addresses and TLVs.
    len: usize,
    /// Source and destination; none for `LOCAL` and `UNKNOWN`.
    addresses: Option<(SocketAddr, SocketAddr)>,
    tlvs: &'a [u8],
}

#[derive(Debug, PartialEq)]
enum Parsed<'a> {
    Header(Header<'a>),
    Malformed,
    More,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Framing {
    V1 {
        line: usize,
    },
    V2,
    /// Cannot become a header.
    Neither,
    Unclear,
}

/// Which version the bytes are.
fn kind(data: &[u8]) -> Framing {
    if data.len() >= V2_HEADER {
        if data.starts_with(V2_SIGNATURE) {
            return Framing::V2;
        }
        if !data.starts_with(V1_SIGNATURE) {
            return Framing::Neither;
        }
    }
    // The signature of version 2 begins with an empty line, which ends no header of version 1.
    let end = data.windows(2).position(|w| w == b"\r\n").filter(|at| *at > 0).map(|at| at + 2);
    match end {
        Some(end) if end <= V1_MAX => Framing::V1 { line: end },
        // A line that ends too late is a malformed one: the empty line, to whoever parses it.
        Some(_) if data.starts_with(V1_SIGNATURE) => Framing::V1 { line: 0 },
        None if data.len() <= V1_MAX => Framing::Unclear,
        _ => Framing::Neither,
    }
}

impl ListenerFilter for ProxyProtocol {
    fn on_accept(&self, _transport: &Transport, _accepted: &mut Accepted) -> bool {
        true
    }

    fn on_data(&self, data: &[u8], accepted: &mut Accepted) -> Step {
        if self.allow_without && !self.may_become_header(data) {
            self.general.not_found_allowed.inc();
            return Step::Done { consume: 0 };
        }
        let (counters, allowed, parsed) = match kind(data) {
            Framing::Unclear => return Step::More,
            Framing::Neither => {
                self.general.not_found_disallowed.inc();
                self.legacy_error.inc();
                return Step::Close;
            }
            Framing::V1 { line } => (&self.v1, self.allow_v1, parse_v1(&data[..line])),
            Framing::V2 => (&self.v2, self.allow_v2, parse_v2(data)),
        };
        if !allowed {
            counters.found.inc();
            counters.disallowed.inc();
            return Step::Close;
        }
        let header = match parsed {
            Parsed::More => return Step::More,
            Parsed::Header(header) if self.apply(&header, accepted) => header,
            _ => {
                counters.error.inc();
                self.legacy_error.inc();
                return Step::Close;
            }
        };
        counters.found.inc();
        Step::Done { consume: header.len }
    }

    fn max_bytes(&self) -> usize {
        MAX_BYTES
    }
}

impl ProxyProtocol {
    fn may_become_header(&self, data: &[u8]) -> bool {
        let prefix = |signature: &[u8]| {
            let n = data.len().min(signature.len());
            data[..n] == signature[..n]
        };
        (self.allow_v2 && prefix(V2_SIGNATURE)) || (self.allow_v1 && prefix(V1_SIGNATURE))
    }

    /// Takes over what the header says; false: it says something impossible.
    fn apply(&self, header: &Header<'_>, accepted: &mut Accepted) -> bool {
        let Some((source, destination)) = header.addresses else { return true };
        let Some(tlvs) = tlvs(header.tlvs) else { return false };
        if !is_unicast(source.ip()) || !is_unicast(destination.ip()) {
            return false;
        }
        for (kind, value) in tlvs {
            if let Some(rule) = self.rules.get(&kind) {
                let namespace = if rule.metadata_namespace.is_empty() {
                    DEFAULT_NAMESPACE
                } else {
                    &rule.metadata_namespace
                };
                let text = match rule.value_string_encoding() {
                    ValueStringEncoding::Base64 => STANDARD.encode(value),
                    _ => sanitized(value),
                };
                let fields = &mut accepted.metadata.entry(namespace.to_owned()).or_default().fields;
                fields.insert(rule.key.clone(), Value { kind: Some(Kind::StringValue(text)) });
            }
            if self.pass.lets(kind) {
                accepted.info.proxy_tlvs.push((kind, value.into()));
            }
        }
        let local = Address::Ip(destination);
        if accepted.info.local != local {
            accepted.info.local = local;
            accepted.info.local_restored = true;
        }
        accepted.info.remote = Address::Ip(source);
        true
    }
}

/// For the fuzz target: reads bytes as either version, as the filter does. Returns what tells one outcome from another.
pub fn fuzz_parse(bytes: &[u8]) -> u64 {
    let outcome = |parsed: Parsed<'_>| match parsed {
        Parsed::Header(header) => {
            assert!(header.len <= bytes.len(), "a header ends behind what came");
            2 + u64::from(header.addresses.is_some()) + header.tlvs.len().min(16) as u64 * 2
        }
        Parsed::Malformed => 0,
        _ => 1,
    };
    let old = outcome(parse_v1(bytes));
    old * 64 + if bytes.len() >= V2_HEADER { outcome(parse_v2(bytes)) } else { 0 }
}

/// `PROXY TCP4 source destination source-port destination-port\r\n`
fn parse_v1(line: &[u8]) -> Parsed<'_> {
    let header = |addresses| Parsed::Header(Header { len: line.len(), addresses, tlvs: &[] });
    let Ok(text) = std::str::from_utf8(line) else { return Parsed::Malformed };
    let parts: Vec<&str> = text.trim_end().split(' ').collect();
    match parts[..] {
        ["PROXY", "UNKNOWN", ..] => header(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), source, destination, source_port, destination_port] => {
            let source = address(family, source, source_port);
            match source.zip(address(family, destination, destination_port)) {
                Some(addresses) => header(Some(addresses)),
                None => Parsed::Malformed,
            }
        }
        _ => Parsed::Malformed,
    }
}

fn address(family: &str, ip: &str, port: &str) -> Option<SocketAddr> {
    let ip = match family {
        "TCP4" => IpAddr::V4(ip.parse().ok()?),
        _ => IpAddr::V6(ip.parse().ok()?),
    };
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| port.parse().ok()).flatten().map(|port| SocketAddr::new(ip, port))
}

/// Signature, version and command, family and transport, length, addresses, TLVs. `data` holds the first 16 bytes.
fn parse_v2(data: &[u8]) -> Parsed<'_> {
    let (version, command) = (data[12] >> 4, data[12] & 0xf);
    let (family, transport) = (data[13] >> 4, data[13] & 0xf);
    let rest = usize::from(u16::from_be_bytes([data[14], data[15]]));
    let addresses = match (version, command, family, transport) {
        (2, 0, ..) => 0,
        (2, 1, 1, 1 | 2) => 12,
        (2, 1, 2, 1 | 2) => 36,
        _ => return Parsed::Malformed,
    };
    if rest < addresses {
        return Parsed::Malformed;
    }
    let len = V2_HEADER + rest;
    let Some(body) = data.get(V2_HEADER..len) else { return Parsed::More };
    let (body, tlvs) = body.split_at(addresses);
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let addresses = match body.len() {
        12 => {
            let ip =
                |at: usize| IpAddr::V4(Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]));
            Some((SocketAddr::new(ip(0), port(8)), SocketAddr::new(ip(4), port(10))))
        }
        36 => {
            let ip = |at: usize| {
                let mut octets = [0; 16];
                octets.copy_from_slice(&body[at..at + 16]);
                IpAddr::V6(Ipv6Addr::from(octets))
            };
            Some((SocketAddr::new(ip(0), port(32)), SocketAddr::new(ip(16), port(34))))
        }
        _ => None,
    };
    Parsed::Header(Header { len, addresses, tlvs })
}

/// All TLVs, or none at all if one of them does not fit.
fn tlvs(mut data: &[u8]) -> Option<Vec<(u8, &[u8])>> {
    let mut out = Vec::new();
    while let Some((head, rest)) = data.split_at_checked(3) {
        let (value, rest) = rest.split_at_checked(u16::from_be_bytes([head[1], head[2]]).into())?;
        out.push((head[0], value));
        data = rest;
    }
    data.is_empty().then_some(out)
}

fn is_unicast(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_broadcast() && !ip.is_multicast(),
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
    }
}

/// Every byte that is not part of valid UTF-8 becomes `!`.
fn sanitized(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| '!'));
    }
    out
}

#[cfg(test)]
mod tests;
