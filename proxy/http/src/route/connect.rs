//! `connect_config`: CONNECT (and POST, where allowed) ends here, and its payload goes to the host as raw TCP.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::core::v3::proxy_protocol_config::Version;
use envoy_types::pb::envoy::config::route::v3::route_action::UpgradeConfig;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::proxy_protocol;

use super::refuse;

/// How a request's payload becomes a TCP stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectConfig {
    /// `allow_post`
    allow_post: bool,
    /// `proxy_protocol_config`
    proxy_header: Option<Version>,
}

impl ConnectConfig {
    /// The configuration in one of a route's `upgrade_configs`, if it has one.
    pub(super) fn from_proto(upgrade: &UpgradeConfig) -> ConfigResult<Option<Self>> {
        let Some(message) = &upgrade.connect_config else { return Ok(None) };
        let kind = &upgrade.upgrade_type;
        if kind.eq_ignore_ascii_case("connect-udp") {
            return Err(ConfigError::unsupported("CONNECT-UDP").at("connect_config"));
        }
        if !kind.eq_ignore_ascii_case("connect") {
            let reason = format!("Non-CONNECT upgrade type {kind} has ConnectConfig");
            return Err(ConfigError::new(reason).at("connect_config"));
        }
        let proxy_header = message.proxy_protocol_config.as_ref().map(|header| {
            // Envoy takes these here and sends none of them.
            refuse(header.pass_through_tlvs.is_some(), "pass_through_tlvs")?;
            refuse(!header.added_tlvs.is_empty(), "added_tlvs")?;
            Ok(header.version())
        });
        let proxy_header = proxy_header.transpose().at("proxy_protocol_config").at("connect_config")?;
        Ok(Some(Self { allow_post: message.allow_post, proxy_header }))
    }

    /// Whether a request with this method goes to its host as raw TCP.
    pub fn takes(&self, method: &[u8]) -> bool {
        method == b"CONNECT" || (self.allow_post && method == b"POST")
    }

    /// What goes before the payload: the PROXY header of a client at `source` who was accepted at `destination`.
    /// Where either has no IP the header says that there is nobody to speak of.
    pub fn prefix(&self, source: Option<SocketAddr>, destination: Option<SocketAddr>) -> Vec<u8> {
        let ends = source.zip(destination).filter(|(s, d)| s.is_ipv4() == d.is_ipv4());
        match (self.proxy_header, ends) {
            (None, _) => Vec::new(),
            (Some(Version::V1), ends) => proxy_protocol::v1(ends).into_bytes(),
            (Some(Version::V2), ends) => proxy_protocol::v2(ends, &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(version: Version, source: &str, destination: &str) -> Vec<u8> {
        let config = ConnectConfig { allow_post: false, proxy_header: Some(version) };
        config.prefix(source.parse().ok(), destination.parse().ok())
    }

    #[test]
    fn proxy_headers() {
        let v1 = prefix(Version::V1, "10.0.0.1:5000", "10.0.0.2:443");
        assert_eq!(v1, b"PROXY TCP4 10.0.0.1 10.0.0.2 5000 443\r\n");
        assert_eq!(prefix(Version::V1, "[::1]:1", "[::2]:2"), b"PROXY TCP6 ::1 ::2 1 2\r\n");
        assert_eq!(prefix(Version::V1, "", "[::2]:2"), b"PROXY UNKNOWN\r\n");
        let v2 = prefix(Version::V2, "10.0.0.1:258", "10.0.0.2:3");
        assert_eq!(v2, b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\0\0\x01\x0a\0\0\x02\x01\x02\0\x03");
        assert_eq!(prefix(Version::V2, "[::1]:1", "[::2]:2").len(), 16 + 36);
        assert_eq!(prefix(Version::V2, "", ""), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }
}
