//! What both sides of the PROXY protocol (HAProxy's `proxy-protocol.txt`) share: the listener filter that reads its
//! header, the transport socket and the end of a CONNECT that write one.

use std::net::{IpAddr, SocketAddr};

use envoy_types::pb::envoy::config::core::v3::ProxyProtocolPassThroughTlVs as Message;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType;

/// How a header of version 2 begins.
pub const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// `pass_through_tlvs`: which TLVs go on from the downstream to the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PassThrough {
    /// `INCLUDE_ALL`
    All,
    /// `INCLUDE`: these types; none where the field is absent.
    Only(Vec<u8>),
}

impl PassThrough {
    /// The rule of a message. Of a type Envoy keeps the low byte.
    pub fn from_proto(message: Option<&Message>) -> Self {
        match message {
            None => Self::Only(Vec::new()),
            Some(m) if m.match_type() == PassTlVsMatchType::IncludeAll => Self::All,
            Some(m) => Self::Only(m.tlv_type.iter().map(|t| *t as u8).collect()),
        }
    }

    /// Whether a type goes on.
    pub fn lets(&self, kind: u8) -> bool {
        match self {
            Self::All => true,
            Self::Only(kinds) => kinds.contains(&kind),
        }
    }
}

/// A header of version 1: source and destination, of one family; without them `UNKNOWN`.
pub fn v1(ends: Option<(SocketAddr, SocketAddr)>) -> String {
    let Some((from, to)) = ends else { return "PROXY UNKNOWN\r\n".to_owned() };
    let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port())
}

/// A header of version 2: source and destination, of one family, and TLVs; without them LOCAL. Where the TLVs alone
/// nearly fill it the length wraps, as in Envoy.
pub fn v2(ends: Option<(SocketAddr, SocketAddr)>, tlvs: &[u8]) -> Vec<u8> {
    let mut addresses = Vec::new();
    let mut kind = [0x20, 0];
    if let Some((from, to)) = ends {
        kind = [0x21, if from.is_ipv4() { 0x11 } else { 0x21 }];
        for end in [from, to] {
            match end.ip() {
                IpAddr::V4(ip) => addresses.extend(ip.octets()),
                IpAddr::V6(ip) => addresses.extend(ip.octets()),
            }
        }
        addresses.extend(from.port().to_be_bytes());
        addresses.extend(to.port().to_be_bytes());
    }
    let length = ((addresses.len() + tlvs.len()) as u16).to_be_bytes();
    [V2_SIGNATURE, kind.as_slice(), &length, &addresses, tlvs].concat()
}
