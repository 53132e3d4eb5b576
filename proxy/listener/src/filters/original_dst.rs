//! `original_dst`: the address that a client meant before iptables redirected it here.

use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use envoy_types::pb::google::protobuf::Any;
use nix::sys::socket::{getsockopt, sockopt};
use sampan_core::Address;
use sampan_core::error::ConfigResult;
use sampan_tls::Transport;
use tokio::net::TcpStream;

use super::{Accepted, ListenerFilter, Step};
use crate::context::FactoryContext;

/// The filter; it has no options.
pub(crate) struct OriginalDst;

pub(super) fn make(_config: &Any, _context: &FactoryContext) -> ConfigResult<Box<dyn ListenerFilter>> {
    Ok(Box::new(OriginalDst))
}

impl ListenerFilter for OriginalDst {
    fn on_accept(&self, transport: &Transport, accepted: &mut Accepted) -> bool {
        if let Some(address) = transport.plain_tcp().and_then(original) {
            accepted.info.local = address;
            accepted.info.local_restored = true;
        }
        false
    }

    fn on_data(&self, _data: &[u8], _accepted: &mut Accepted) -> Step {
        Step::Done { consume: 0 }
    }

    fn max_bytes(&self) -> usize {
        0
    }
}

/// `SO_ORIGINAL_DST`; without NAT, a TPROXY socket's own local address is the original destination.
fn original(stream: &TcpStream) -> Option<Address> {
    let local = stream.local_addr().ok()?;
    let nat = match local {
        SocketAddr::V4(_) => getsockopt(stream, sockopt::OriginalDst).ok().map(|a| {
            SocketAddr::V4(SocketAddrV4::new(
                u32::from_be(a.sin_addr.s_addr).into(),
                u16::from_be(a.sin_port),
            ))
        }),
        SocketAddr::V6(_) => getsockopt(stream, sockopt::Ip6tOriginalDst).ok().map(|a| {
            SocketAddr::V6(SocketAddrV6::new(
                a.sin6_addr.s6_addr.into(),
                u16::from_be(a.sin6_port),
                0,
                a.sin6_scope_id,
            ))
        }),
    };
    match nat {
        Some(address) => Some(address.into()),
        None if getsockopt(stream, sockopt::IpTransparent).unwrap_or(false) => Some(local.into()),
        None => None,
    }
}
