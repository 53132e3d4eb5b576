//! `upstream_proxy_protocol`: a connection that begins with a PROXY header.
//!
//! The header goes out as soon as TCP is connected, before TLS. It tells of the downstream connection
//! ([`Told`]), so that connections of different ends are not mixed; without a downstream connection version 1 tells of
//! the connection itself and version 2 says LOCAL.
//!
//! TLVs of version 2, in this order: the endpoint's (`typed_filter_metadata`), the transport socket's of types that
//! the endpoint has none of, the downstream's that `pass_through_tlvs` lets through and neither has. One that does not
//! fit into the header's length is left out.
//!
//! Ends that are no IP addresses (a unix socket): no header in version 2, as in Envoy; `UNKNOWN` in version 1, where
//! Envoy 1.40 crashes. `allow_unspecified_address` and `tlv_as_pool_key` have no effect in Envoy 1.40.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as pb;
use pb::proxy_protocol_config::Version;
use prost::Message as _;
use sampan_core::error::AtField;
use sampan_core::log::{Component, Level};
use sampan_core::proxy_protocol::{self, PassThrough};
use sampan_core::stream_info::ConnectionInfo;
use sampan_core::{Address, ConfigError, ConfigResult, log};

/// Types and values.
pub(crate) type Tlvs = Vec<(u8, Arc<[u8]>)>;

const METADATA: &str = "envoy.transport_sockets.proxy_protocol";
const TLV_HEAD: usize = 3;

/// `config`: what a header says.
#[derive(Debug)]
pub struct ProxyHeaderConfig {
    v1: bool,
    pass: PassThrough,
    added: Tlvs,
}

/// What a header tells of a downstream connection.
#[derive(Debug, Clone)]
pub struct Told {
    remote: Address,
    local: Address,
    tlvs: Tlvs,
}

/// A header; not complete where a TLV did not fit.
pub(crate) struct Made {
    pub(crate) bytes: Vec<u8>,
    pub(crate) complete: bool,
}

impl Told {
    /// What there is to tell of a connection.
    pub fn of(connection: &ConnectionInfo) -> Self {
        Self {
            remote: connection.remote.clone(),
            local: connection.local.clone(),
            tlvs: connection.proxy_tlvs.clone(),
        }
    }
}

/// The ends alone decide which connections may be shared, as in Envoy.
impl PartialEq for Told {
    fn eq(&self, other: &Self) -> bool {
        self.remote == other.remote && self.local == other.local
    }
}

impl Eq for Told {}

impl Hash for Told {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.remote.hash(state);
        self.local.hash(state);
    }
}

/// The TLVs of an endpoint. What cannot be read is none, as in Envoy, which warns when it connects.
pub(crate) fn of_endpoint(metadata: &pb::Metadata) -> Option<Arc<Tlvs>> {
    let any = metadata.typed_filter_metadata.get(METADATA)?;
    let read = if any.type_url.ends_with("/envoy.config.core.v3.PerHostConfig") {
        pb::PerHostConfig::decode(any.value.as_slice()).map_err(|e| e.to_string())
    } else {
        Err(format!("it is a {}", any.type_url))
    };
    match read {
        Ok(config) => Some(Arc::new(config.added_tlvs.iter().map(tlv).collect())),
        Err(e) => {
            log!(
                Component::Upstream,
                Level::Warn,
                "no TLVs from the metadata {METADATA} of an endpoint: {e}"
            );
            None
        }
    }
}

fn tlv(entry: &pb::TlvEntry) -> (u8, Arc<[u8]>) {
    (entry.r#type as u8, entry.value.as_slice().into())
}

impl ProxyHeaderConfig {
    pub(crate) fn from_proto(message: Option<&pb::ProxyProtocolConfig>) -> ConfigResult<Self> {
        let message = message.cloned().unwrap_or_default();
        if let Some(i) = message.added_tlvs.iter().position(|entry| entry.format_string.is_some()) {
            return Err(ConfigError::unsupported("format_string").at("format_string"))
                .at_index("added_tlvs", i);
        }
        Ok(Self {
            v1: message.version() == Version::V1,
            pass: PassThrough::from_proto(message.pass_through_tlvs.as_ref()),
            added: message.added_tlvs.iter().map(tlv).collect(),
        })
    }

    /// The header of a connection; `own`: its own ends.
    pub(crate) fn make(
        &self,
        told: Option<&Told>,
        own: Option<(&Address, &Address)>,
        of_host: Option<&Tlvs>,
    ) -> Made {
        let whole = |bytes| Made { bytes, complete: true };
        if self.v1 {
            let ends = told.map(|told| (&told.remote, &told.local)).or(own);
            return whole(proxy_protocol::v1(ends.and_then(|(from, to)| sockets(from, to))).into_bytes());
        }
        let Some(told) = told else { return whole(proxy_protocol::v2(None, &[])) };
        let (tlvs, complete) = self.tlvs(told, of_host);
        let bytes = match sockets(&told.remote, &told.local) {
            ends @ Some(_) => proxy_protocol::v2(ends, &tlvs),
            None => Vec::new(),
        };
        Made { bytes, complete }
    }

    /// The TLVs as they go out, and whether all had room.
    fn tlvs(&self, told: &Told, of_host: Option<&Tlvs>) -> (Vec<u8>, bool) {
        let of_host = of_host.map(Vec::as_slice).unwrap_or_default();
        let among = |list: &[(u8, Arc<[u8]>)], kind: u8| list.iter().any(|(k, _)| *k == kind);
        let added = self.added.iter().filter(|(kind, _)| !among(of_host, *kind));
        let passed = told.tlvs.iter().filter(|(kind, _)| {
            self.pass.lets(*kind) && !among(of_host, *kind) && !among(&self.added, *kind)
        });
        let (mut out, mut complete) = (Vec::new(), true);
        for (kind, value) in of_host.iter().chain(added).chain(passed) {
            if out.len() + TLV_HEAD + value.len() > usize::from(u16::MAX) {
                complete = false;
                continue;
            }
            out.push(*kind);
            out.extend((value.len() as u16).to_be_bytes());
            out.extend_from_slice(value);
        }
        (out, complete)
    }
}

/// The ends, if both are IP addresses; of one family.
fn sockets(from: &Address, to: &Address) -> Option<(SocketAddr, SocketAddr)> {
    let (from, to) = (from.socket_addr()?, to.socket_addr()?);
    if from.is_ipv4() == to.is_ipv4() {
        return Some((from, to));
    }
    let v6 = |end: SocketAddr| match end.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), end.port()),
        IpAddr::V6(_) => end,
    };
    Some((v6(from), v6(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(remote: Address, tlvs: Tlvs) -> Told {
        Told { remote, local: Address::Ip("[::1]:80".parse().unwrap()), tlvs }
    }

    fn config(v1: bool) -> ProxyHeaderConfig {
        ProxyHeaderConfig { v1, pass: PassThrough::All, added: Vec::new() }
    }

    #[test]
    fn without_a_downstream_connection() {
        let (from, to) =
            (Address::Ip("10.0.0.1:5".parse().unwrap()), Address::Ip("10.0.0.2:6".parse().unwrap()));
        let own = Some((&from, &to));
        assert_eq!(config(true).make(None, own, None).bytes, b"PROXY TCP4 10.0.0.1 10.0.0.2 5 6\r\n");
        assert_eq!(config(false).make(None, own, None).bytes, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }

    #[test]
    fn ends_of_other_kinds() {
        let unix = told(Address::Pipe("".into()), Vec::new());
        assert_eq!(config(true).make(Some(&unix), None, None).bytes, b"PROXY UNKNOWN\r\n");
        assert!(config(false).make(Some(&unix), None, None).bytes.is_empty());
        let v4 = told(Address::Ip("1.2.3.4:5".parse().unwrap()), Vec::new());
        assert_eq!(config(true).make(Some(&v4), None, None).bytes, b"PROXY TCP6 ::ffff:1.2.3.4 ::1 5 80\r\n");
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let tlvs: Tlvs = vec![(1, vec![0; 65_000].into()), (2, vec![0; 600].into()), (3, vec![7].into())];
        let made =
            config(false).make(Some(&told("1.2.3.4:5".parse().map(Address::Ip).unwrap(), tlvs)), None, None);
        assert!(!made.complete);
        assert!(made.bytes.ends_with(&[3, 0, 1, 7]));
        assert_eq!(made.bytes.len(), 16 + 36 + 3 + 65_000 + 4);
    }
}
