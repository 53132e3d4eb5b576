//! `socket_options`: raw (level, name, value) triples of the configuration, as typed options.
//!
//! A raw `setsockopt` needs unsafe code, which no crate of the proxy has. So the pairs that a safe crate can set
//! are supported and any other pair is refused by name when the configuration is read.

use std::io;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as pb;
use envoy_types::pb::envoy::config::core::v3::socket_option::{SocketIpVersion, SocketState, Value};
use nix::sys::socket::{setsockopt, sockopt};
use sampan_core::error::{ConfigError, ConfigResult};
use socket2::{Socket, TcpKeepalive};

/// One option, checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SocketOption {
    /// When it is set.
    pub(crate) state: SocketState,
    family: Option<SocketIpVersion>,
    level: i64,
    name: i64,
    value: OptionValue,
}

#[derive(Debug, Clone, PartialEq)]
enum OptionValue {
    Int(i64),
    Bytes(Vec<u8>),
}

const SOCKET: i64 = 1;
const IP: i64 = 0;
const TCP: i64 = 6;
const IPV6: i64 = 41;

/// Pairs that take an integer.
const INTEGERS: &[(i64, i64)] = &[
    (SOCKET, 2),
    (SOCKET, 5),
    (SOCKET, 6),
    (SOCKET, 7),
    (SOCKET, 8),
    (SOCKET, 9),
    (SOCKET, 10),
    (SOCKET, 12),
    (SOCKET, 15),
    (SOCKET, 32),
    (SOCKET, 33),
    (SOCKET, 36),
    (SOCKET, 49),
    (IP, 1),
    (IP, 2),
    (IP, 15),
    (IP, 19),
    (IP, 24),
    (TCP, 1),
    (TCP, 2),
    (TCP, 3),
    (TCP, 4),
    (TCP, 5),
    (TCP, 6),
    (TCP, 12),
    (TCP, 16),
    (TCP, 18),
    (TCP, 25),
    (IPV6, 16),
    (IPV6, 26),
    (IPV6, 67),
    (IPV6, 75),
    (IPV6, 78),
];
/// Pairs that take bytes: `SO_BINDTODEVICE`, `TCP_CONGESTION`.
const BYTES: &[(i64, i64)] = &[(SOCKET, 25), (TCP, 13)];

impl SocketOption {
    /// None where the option is not for stream sockets.
    pub(crate) fn from_proto(o: &pb::SocketOption) -> ConfigResult<Option<Self>> {
        if o.r#type.as_ref().is_some_and(|t| t.stream.is_none() && t.datagram.is_some()) {
            return Ok(None);
        }
        let pair = (o.level, o.name);
        let value = match &o.value {
            Some(Value::IntValue(v)) if INTEGERS.contains(&pair) => OptionValue::Int(*v),
            Some(Value::BufValue(v)) if BYTES.contains(&pair) => OptionValue::Bytes(v.clone()),
            // A four-byte buffer is how an integer may be written too.
            Some(Value::BufValue(v)) if INTEGERS.contains(&pair) && v.len() == 4 => {
                OptionValue::Int(i32::from_ne_bytes([v[0], v[1], v[2], v[3]]).into())
            }
            None => return Err(ConfigError::missing("value")),
            _ => {
                return Err(ConfigError::unsupported(format_args!(
                    "socket option level {} name {} with this kind of value",
                    o.level, o.name
                )));
            }
        };
        let family = match o.ip_version() {
            SocketIpVersion::Unspecified => None,
            one => Some(one),
        };
        Ok(Some(Self { state: o.state(), family, level: o.level, name: o.name, value }))
    }

    /// Sets the option; an option for the other family is skipped.
    pub(crate) fn apply(&self, socket: &Socket, is_v6: bool) -> io::Result<()> {
        match self.family {
            Some(SocketIpVersion::Ipv4) if is_v6 => return Ok(()),
            Some(SocketIpVersion::Ipv6) if !is_v6 => return Ok(()),
            _ => {}
        }
        match &self.value {
            OptionValue::Bytes(v) if self.level == SOCKET => socket.bind_device(Some(v)),
            OptionValue::Bytes(v) => socket.set_tcp_congestion(v),
            OptionValue::Int(v) => apply_integer(socket, self.level, self.name, *v),
        }
    }
}

fn apply_integer(socket: &Socket, level: i64, name: i64, value: i64) -> io::Result<()> {
    let on = value != 0;
    let n = u32::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    match (level, name) {
        (SOCKET, 2) => socket.set_reuse_address(on),
        (SOCKET, 5) => Ok(setsockopt(socket, sockopt::DontRoute, &on)?),
        (SOCKET, 6) => socket.set_broadcast(on),
        (SOCKET, 7) => socket.set_send_buffer_size(n as usize),
        (SOCKET, 8) => socket.set_recv_buffer_size(n as usize),
        (SOCKET, 9) => socket.set_keepalive(on),
        (SOCKET, 10) => socket.set_out_of_band_inline(on),
        (SOCKET, 12) => socket.set_priority(n),
        (SOCKET, 15) => socket.set_reuse_port(on),
        (SOCKET, 32) => Ok(setsockopt(socket, sockopt::SndBufForce, &(n as usize))?),
        (SOCKET, 33) => Ok(setsockopt(socket, sockopt::RcvBufForce, &(n as usize))?),
        (SOCKET, 36) => socket.set_mark(n),
        (SOCKET, 49) => socket.set_cpu_affinity(n as usize),
        (IP, 1) => socket.set_tos_v4(n),
        (IP, 2) => socket.set_ttl_v4(n),
        (IP, 15) => socket.set_freebind_v4(on),
        (IP, 19) => socket.set_ip_transparent_v4(on),
        (IP, 24) => Ok(setsockopt(socket, sockopt::IpBindAddressNoPort, &on)?),
        (TCP, 1) => socket.set_tcp_nodelay(on),
        (TCP, 2) => socket.set_tcp_mss(n),
        (TCP, 3) => socket.set_tcp_cork(on),
        (TCP, 4) => Ok(setsockopt(socket, sockopt::TcpKeepIdle, &n)?),
        (TCP, 5) => Ok(setsockopt(socket, sockopt::TcpKeepInterval, &n)?),
        (TCP, 6) => Ok(setsockopt(socket, sockopt::TcpKeepCount, &n)?),
        (TCP, 12) => socket.set_tcp_quickack(on),
        (TCP, 16) => socket.set_tcp_thin_linear_timeouts(on),
        (TCP, 18) => socket.set_tcp_user_timeout(Some(Duration::from_millis(n.into()))),
        (TCP, 25) => socket.set_tcp_notsent_lowat(n),
        (IPV6, 16) => socket.set_unicast_hops_v6(n),
        (IPV6, 26) => socket.set_only_v6(on),
        (IPV6, 67) => socket.set_tclass_v6(n),
        (IPV6, 75) => socket.set_ip_transparent_v6(on),
        (IPV6, 78) => socket.set_freebind_v6(on),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// `tcp_keepalive`: unset fields keep the kernel's values; a field of 0 turns it off altogether.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Keepalive {
    /// `keepalive_probes`
    pub(crate) probes: Option<u32>,
    /// `keepalive_time`, seconds
    pub(crate) time: Option<u32>,
    /// `keepalive_interval`, seconds
    pub(crate) interval: Option<u32>,
}

impl Keepalive {
    /// From the message.
    pub(crate) fn from_proto(k: &pb::TcpKeepalive) -> Self {
        let value = crate::proto::u32_of;
        Self {
            probes: value(k.keepalive_probes),
            time: value(k.keepalive_time),
            interval: value(k.keepalive_interval),
        }
    }

    /// Sets it.
    pub(crate) fn apply(&self, socket: &Socket) -> io::Result<()> {
        if [self.probes, self.time, self.interval].contains(&Some(0)) {
            return Ok(());
        }
        let mut params = TcpKeepalive::new();
        if let Some(n) = self.probes {
            params = params.with_retries(n);
        }
        if let Some(s) = self.time {
            params = params.with_time(Duration::from_secs(s.into()));
        }
        if let Some(s) = self.interval {
            params = params.with_interval(Duration::from_secs(s.into()));
        }
        socket.set_keepalive(true)?;
        socket.set_tcp_keepalive(&params)
    }
}
