//! Network addresses as Envoy writes them: `10.0.0.1:80`, `[::1]:80`, a unix socket's path, an internal name.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
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
            Some(A::SocketAddress(s)) => literal_of(s).map(Self::Ip).at("socket_address"),
            Some(A::Pipe(p)) => Ok(Self::Pipe(p.path.as_str().into())),
            Some(A::EnvoyInternalAddress(_)) => {
                Err(ConfigError::unsupported("envoy_internal_address").at("envoy_internal_address"))
            }
            None => Err(ConfigError::missing("address")),
        }
    }
}

/// An IP literal. Behind one of IPv6 may stand its scope (`fe80::1%eth0`), as `getaddrinfo` reads it: a link-local
/// address takes an interface's name, every address a number.
pub fn literal(text: &str, port: u16) -> Option<SocketAddr> {
    let Some((ip, scope)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, port));
    };
    let ip: Ipv6Addr = ip.parse().ok()?;
    let local = ip.is_unicast_link_local() || ip.segments()[0] & 0xff0f == 0xff02;
    let named = || nix::net::if_::if_nametoindex(scope).ok();
    let number = || scope.starts_with(|c: char| c.is_ascii_digit()).then(|| scope.parse().ok()).flatten();
    let scope = local.then(named).flatten().or_else(number)?;
    Some(SocketAddrV6::new(ip, port, 0, scope).into())
}

/// An IP literal and its port (`10.0.0.1:80`, `[fe80::1%eth0]:80`).
pub fn literal_and_port(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| {
        let (ip, port) = text.strip_prefix('[')?.rsplit_once("]:")?;
        literal(ip, port.parse().ok()?)
    })
}

/// A static socket address, whose host must be an IP literal.
pub fn literal_of(address: &pb::SocketAddress) -> ConfigResult<SocketAddr> {
    let malformed = || ConfigError::new(format!("malformed IP address: {}", address.address)).at("address");
    let ip = literal(&address.address, 0).ok_or_else(malformed)?;
    Ok(with_port(ip, port_of(address)?))
}

/// The address without its port, with the scope that IPv6 may have.
pub fn host(address: &SocketAddr) -> impl fmt::Display {
    struct Host(SocketAddr);
    impl fmt::Display for Host {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.0 {
                SocketAddr::V6(v6) if v6.scope_id() != 0 => write!(f, "{}%{}", v6.ip(), v6.scope_id()),
                other => other.ip().fmt(f),
            }
        }
    }
    Host(*address)
}

/// The same address with another port; the scope of IPv6 stays.
pub fn with_port(mut address: SocketAddr, port: u16) -> SocketAddr {
    address.set_port(port);
    address
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
        match (a, a.ip().to_canonical()) {
            (SocketAddr::V6(v6), IpAddr::V6(ip)) => {
                Self::Ip(SocketAddrV6::new(ip, v6.port(), 0, v6.scope_id()).into())
            }
            (_, ip) => Self::Ip(SocketAddr::new(ip, a.port())),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals() {
        let text = |text: &str| literal(text, 80).map(|address| Address::from(address).to_string());
        let lo = nix::net::if_::if_nametoindex("lo").unwrap();
        for (given, expected) in [
            ("10.0.0.1", Some("10.0.0.1:80".to_owned())),
            ("fe80::1", Some("[fe80::1]:80".to_owned())),
            ("fe80::1%lo", Some(format!("[fe80::1%{lo}]:80"))),
            ("ff02::1%lo", Some(format!("[ff02::1%{lo}]:80"))),
            ("fe80::1%7", Some("[fe80::1%7]:80".to_owned())),
            ("2001:db8::1%7", Some("[2001:db8::1%7]:80".to_owned())),
            ("2001:db8::1%lo", None),
            ("fe80::1%no-such-interface", None),
            ("fe80::1%", None),
            ("fe80::1%+7", None),
            ("10.0.0.1%1", None),
            ("::ffff:10.0.0.1", Some("10.0.0.1:80".to_owned())),
        ] {
            assert_eq!(text(given), expected, "{given}");
        }
        assert_eq!(literal_and_port("[fe80::1%lo]:81"), literal("fe80::1%lo", 81));
        assert_eq!(literal_and_port("10.0.0.1:81"), literal("10.0.0.1", 81));
        assert_eq!(literal_and_port("fe80::1%lo:81"), None);
    }
}
