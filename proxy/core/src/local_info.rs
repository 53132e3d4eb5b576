//! The machine's own address, as Envoy's `LocalInfo` knows it: what stands in `x-forwarded-for` for a client on this
//! machine and for the proxy's own requests.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::OnceLock;

/// The first IPv4 address of an interface that is not the loopback's; 127.0.0.1 where there is none. Read once.
pub fn address() -> IpAddr {
    static ADDRESS: OnceLock<Ipv4Addr> = OnceLock::new();
    let own = ADDRESS.get_or_init(|| {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let addresses = interfaces.filter_map(|i| Some(i.address?.as_sockaddr_in()?.ip()));
        addresses.into_iter().find(|ip| !ip.is_loopback()).unwrap_or(Ipv4Addr::LOCALHOST)
    });
    IpAddr::V4(*own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_an_address_that_can_be_bound() {
        assert!(std::net::UdpSocket::bind((address(), 0)).is_ok());
    }
}
