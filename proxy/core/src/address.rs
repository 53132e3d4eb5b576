//! Network addresses as Envoy writes them: `10.0.0.1:80`, `[::1]:80`, a unix socket's path, an internal name.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as pb;

use crate::error::{AtField, ConfigError, ConfigResult};

/// An address of a listener, an endpoint or a peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP (or UDP) over IPv4 or IPv6.
    Ip(SocketAddr),
    /// A unix domain socket; a leading `@` names the abstract namespace. Empty: the unnamed peer of an accepted socket.
    Pipe(Arc<str>),
    /// `envoy_internal_address`: listener name and endpoint id.
    Internal(Arc<str>, Arc<str>),
}

impl Address {
    /// The socket address, if this is one.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Ip(a) => Some(*a),
            _ => None,
        }
    }

    /// The IP, if there is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.socket_addr().map(|a| a.ip())
    }

    /// The port, if there is one.
    pub fn port(&self) -> Option<u16> {
        self.socket_addr().map(|a| a.port())
    }

    /// A static address whose host must be an IP literal (listeners, STATIC endpoints).
    pub fn from_proto(address: &pb::Address) -> ConfigResult<Self> {
        use pb::address::Address as A;
        match &address.address {
            Some(A::SocketAddress(s)) => {
                let ip: IpAddr = s.address.parse().map_err(|_| {
                    ConfigError::new(format!("malformed IP address: {}", s.address))
                        .at("address")
                        .at("socket_address")
                })?;
                let port = port_of(s).at("socket_address")?;
                Ok(Self::Ip(SocketAddr::new(ip, port)))
            }
            Some(A::Pipe(p)) => Ok(Self::Pipe(p.path.as_str().into())),
            Some(A::EnvoyInternalAddress(_)) => {
                Err(ConfigError::unsupported("envoy_internal_address").at("envoy_internal_address"))
            }
            None => Err(ConfigError::missing("address")),
        }
    }
}

/// The numeric port of a socket address.
pub fn port_of(address: &pb::SocketAddress) -> ConfigResult<u16> {
    use pb::socket_address::PortSpecifier as P;
    match &address.port_specifier {
        Some(P::PortValue(p)) => {
            u16::try_from(*p).map_err(|_| ConfigError::new("must be <= 65535").at("port_value"))
        }
        Some(P::NamedPort(_)) => Err(ConfigError::unsupported("named_port").at("named_port")),
        None => Err(ConfigError::missing("port_specifier")),
    }
}

impl From<SocketAddr> for Address {
    /// An IPv4-mapped IPv6 address (a dual-stack socket's peer) becomes the IPv4 address it means.
    fn from(a: SocketAddr) -> Self {
        Self::Ip(SocketAddr::new(a.ip().to_canonical(), a.port()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(a) => a.fmt(f),
            Self::Pipe(p) => f.write_str(p),
            Self::Internal(name, id) if id.is_empty() => write!(f, "envoy://{name}/"),
            Self::Internal(name, id) => write!(f, "envoy://{name}/{id}"),
        }
    }
}
