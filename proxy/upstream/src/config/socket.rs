//! Sockets to the hosts: source address, keepalive, transport sockets.

use std::net::SocketAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::cluster::TransportSocketMatch as MatchMessage;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::UpstreamTlsContext;
use envoy_types::pb::google::protobuf::Struct;
use sampan_core::address::literal_of;
use sampan_core::error::AtField;
use sampan_core::stream_info::Metadata;
use sampan_core::{ConfigError, ConfigResult};

use super::{type_name, unpack};
use crate::proxy_header::ProxyHeaderConfig;

/// `upstream_bind_config`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindConfig {
    /// The source address; the additional ones serve the other IP version.
    pub addresses: Vec<SocketAddr>,
    /// `freebind`
    pub freebind: bool,
}

/// `tcp_keepalive`; 0 leaves the system's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepaliveConfig {
    /// `keepalive_probes`
    pub probes: u32,
    /// `keepalive_time`, seconds.
    pub time: u32,
    /// `keepalive_interval`, seconds.
    pub interval: u32,
}

/// What lies between a connection and the codec; nothing for `raw_buffer`.
#[derive(Debug, Clone, Default)]
pub struct TransportSocketConfig {
    /// `upstream_proxy_protocol` around it: the header that goes out first.
    pub header: Option<Arc<ProxyHeaderConfig>>,
    /// `tls`
    pub tls: Option<Arc<UpstreamTlsContext>>,
}

/// One of `transport_socket_matches`.
#[derive(Debug, Clone)]
pub struct TransportSocketMatch {
    /// `name`
    pub name: String,
    /// `match`: what the endpoint's `envoy.transport_socket_match` metadata must hold.
    pub criteria: Option<Struct>,
    /// `transport_socket`
    pub socket: TransportSocketConfig,
}

impl BindConfig {
    /// Checks the message.
    #[allow(deprecated, reason = "Envoy 1.40 still takes the list")]
    pub fn from_proto(m: &core::BindConfig) -> ConfigResult<Self> {
        for (present, field) in [
            (!m.socket_options.is_empty(), "socket_options"),
            (m.local_address_selector.is_some(), "local_address_selector"),
            (
                m.extra_source_addresses.iter().any(|e| e.socket_options.is_some()),
                "extra_source_addresses.socket_options",
            ),
        ] {
            if present {
                return Err(ConfigError::unsupported(field).at(field));
            }
        }
        let mut addresses = Vec::new();
        if let Some(address) = &m.source_address {
            addresses.push(socket_address(address).at("source_address")?);
        }
        for (i, extra) in m.extra_source_addresses.iter().enumerate() {
            let address = extra
                .address
                .as_ref()
                .ok_or_else(|| ConfigError::missing("address"))
                .and_then(socket_address);
            addresses.push(address.at_index("extra_source_addresses", i)?);
        }
        for (i, address) in m.additional_source_addresses.iter().enumerate() {
            addresses.push(socket_address(address).at_index("additional_source_addresses", i)?);
        }
        Ok(Self { addresses, freebind: m.freebind.is_some_and(|v| v.value) })
    }

    /// The source address for a destination: the first of its IP version.
    pub fn source_for(&self, destination: SocketAddr) -> Option<SocketAddr> {
        self.addresses.iter().find(|a| a.is_ipv4() == destination.is_ipv4()).copied()
    }
}

fn socket_address(m: &core::SocketAddress) -> ConfigResult<SocketAddr> {
    literal_of(m)
}

impl From<&core::TcpKeepalive> for KeepaliveConfig {
    fn from(m: &core::TcpKeepalive) -> Self {
        Self {
            probes: m.keepalive_probes.map_or(0, |v| v.value),
            time: m.keepalive_time.map_or(0, |v| v.value),
            interval: m.keepalive_interval.map_or(0, |v| v.value),
        }
    }
}

impl TransportSocketConfig {
    /// Checks the message; absent is `raw_buffer`.
    pub fn from_proto(m: Option<&core::TransportSocket>) -> ConfigResult<Self> {
        use core::transport_socket::ConfigType;
        let Some(m) = m else { return Ok(Self::default()) };
        let Some(ConfigType::TypedConfig(any)) = &m.config_type else {
            return Err(ConfigError::new(format!(
                "Didn't find a registered implementation for '{}' with type URL: ''",
                m.name
            )));
        };
        match type_name(any) {
            "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(Self::default()),
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
                unpack(Some(any)).map(|m| Self { header: None, tls: Some(Arc::new(m)) })
            }
            "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
                unpack(Some(any)).and_then(|m| Self::behind_header(&m))
            }
            name => Err(ConfigError::unsupported(format!("transport socket {name}"))),
        }
        .at("typed_config")
    }

    fn behind_header(m: &ProxyProtocolUpstreamTransport) -> ConfigResult<Self> {
        let inner = m.transport_socket.as_ref().ok_or_else(|| ConfigError::missing("transport_socket"))?;
        let inner = Self::from_proto(Some(inner)).at("transport_socket")?;
        if inner.header.is_some() {
            return Err(ConfigError::unsupported("a PROXY header behind another").at("transport_socket"));
        }
        let header = ProxyHeaderConfig::from_proto(m.config.as_ref()).at("config")?;
        Ok(Self { header: Some(Arc::new(header)), tls: inner.tls })
    }
}

impl TransportSocketMatch {
    pub(super) fn from_proto(m: &MatchMessage) -> ConfigResult<Self> {
        Ok(Self {
            name: m.name.clone(),
            criteria: m.r#match.clone(),
            socket: TransportSocketConfig::from_proto(m.transport_socket.as_ref()).at("transport_socket")?,
        })
    }

    /// Whether an endpoint's metadata satisfies the criteria; empty criteria are satisfied by all.
    pub(crate) fn matches(&self, metadata: Option<&Metadata>) -> bool {
        let Some(criteria) = self.criteria.as_ref().filter(|c| !c.fields.is_empty()) else { return true };
        let Some(given) = metadata.and_then(|m| m.get("envoy.transport_socket_match")) else { return false };
        criteria.fields.iter().all(|(key, value)| given.fields.get(key) == Some(value))
    }
}
