//! Listening sockets: bound on the control thread, so that a taken port is an error of the configuration, and given
//! to the workers.
//!
//! With `reuse_port` each worker has a socket of its own per address (SO_REUSEPORT: the kernel spreads connections);
//! otherwise, and for unix sockets, all workers accept from one.

use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::socket_option::SocketState;
use sampan_core::Address;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use thiserror::Error;

use crate::config::{ListenAddress, ListenerConfig};

/// Why a listener cannot listen, in Envoy's words.
#[derive(Debug, Error)]
pub enum BindError {
    /// `bind(2)`
    #[error("cannot bind '{0}': {1}")]
    Bind(Address, Cause),
    /// `listen(2)`
    #[error("cannot listen() on '{0}': {1}")]
    Listen(Address, Cause),
    /// An option of the configuration.
    #[error("{0}: Setting socket options failed: {1}")]
    Options(Arc<str>, Cause),
}

impl BindError {
    /// A socket of the listener's that cannot be served.
    pub fn of(config: &ListenerConfig, error: io::Error) -> Self {
        Self::Options(config.name.clone(), Cause(error))
    }
}

/// An I/O error printed as `strerror` does, without the number.
#[derive(Debug)]
pub struct Cause(pub io::Error);

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.raw_os_error() {
            Some(code) => f.write_str(nix::errno::Errno::from_raw(code).desc()),
            None => self.0.fmt(f),
        }
    }
}

/// A listener whose addresses are taken; not listening yet.
pub struct Bound {
    /// The listener.
    pub config: Arc<ListenerConfig>,
    /// Its addresses, with the ports that the kernel chose.
    pub addresses: Vec<Address>,
    /// Per worker, per address.
    sockets: Vec<Vec<Socket>>,
}

/// One worker's sockets of a listener.
pub struct ListenSockets {
    /// Each with the address it is bound to.
    pub(crate) sockets: Vec<(Address, Socket)>,
}

impl Bound {
    /// Opens and binds the sockets for so many workers.
    pub fn bind(config: Arc<ListenerConfig>, workers: usize) -> Result<Self, BindError> {
        let mut sockets: Vec<Vec<Socket>> = (0..workers).map(|_| Vec::new()).collect();
        let mut addresses = Vec::new();
        for address in &config.addresses {
            if !config.bind_to_port {
                addresses.push(address.address.clone());
                continue;
            }
            let first = open(&config, address, &address.address)?;
            let actual = match &address.address {
                Address::Ip(_) => {
                    let bound =
                        first.local_addr().map_err(|e| BindError::Bind(address.address.clone(), Cause(e)))?;
                    bound.as_socket().map_or_else(|| address.address.clone(), Address::Ip)
                }
                other => other.clone(),
            };
            for worker in sockets.iter_mut().skip(1) {
                worker.push(if config.reuse_port {
                    open(&config, address, &actual)?
                } else {
                    first.try_clone().map_err(|e| BindError::Bind(actual.clone(), Cause(e)))?
                });
            }
            if let Some(worker) = sockets.first_mut() {
                worker.push(first);
            }
            addresses.push(actual);
        }
        Ok(Self { config, addresses, sockets })
    }

    /// Begins to listen: from now on clients connect, and wait until the workers accept.
    pub fn listen(self) -> Result<Vec<ListenSockets>, BindError> {
        let Self { config, addresses, sockets } = self;
        let mut out = Vec::with_capacity(sockets.len());
        for of_worker in sockets {
            let mut list = Vec::with_capacity(of_worker.len());
            for ((socket, address), model) in of_worker.into_iter().zip(&addresses).zip(&config.addresses) {
                socket.listen(config.backlog).map_err(|e| BindError::Listen(address.clone(), Cause(e)))?;
                apply(&config, model, &socket, SocketState::StateListening)?;
                list.push((address.clone(), socket));
            }
            out.push(ListenSockets { sockets: list });
        }
        Ok(out)
    }
}

fn open(config: &ListenerConfig, model: &ListenAddress, address: &Address) -> Result<Socket, BindError> {
    let failed = |e: io::Error| BindError::Bind(address.clone(), Cause(e));
    let socket = match address {
        Address::Ip(ip) => open_tcp(config, model, *ip).map_err(failed)?,
        Address::Pipe(_) => Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(failed)?,
        Address::Internal(..) => return Err(failed(io::ErrorKind::Unsupported.into())),
    };
    options(config, model, &socket, address)
        .map_err(|e| BindError::Options(config.name.clone(), Cause(e)))?;
    apply(config, model, &socket, SocketState::StatePrebind)?;
    bind(&socket, model, address).map_err(failed)?;
    apply(config, model, &socket, SocketState::StateBound)?;
    Ok(socket)
}

fn open_tcp(config: &ListenerConfig, model: &ListenAddress, ip: SocketAddr) -> io::Result<Socket> {
    let protocol = if config.mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(ip), Type::STREAM.nonblocking(), Some(protocol))?;
    if ip.is_ipv6() {
        socket.set_only_v6(!model.ipv4_compat)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(config.reuse_port)?;
    // Accepted sockets inherit it, which spares a call per connection.
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// `transparent`, `freebind` and `tcp_keepalive`.
fn options(
    config: &ListenerConfig,
    model: &ListenAddress,
    socket: &Socket,
    address: &Address,
) -> io::Result<()> {
    let Some(ip) = address.ip() else { return Ok(()) };
    if let Some(on) = config.transparent {
        if ip.is_ipv4() { socket.set_ip_transparent_v4(on)? } else { socket.set_ip_transparent_v6(on)? }
    }
    if let Some(on) = config.freebind {
        if ip.is_ipv4() { socket.set_freebind_v4(on)? } else { socket.set_freebind_v6(on)? }
    }
    model.keepalive.as_ref().map_or(Ok(()), |k| k.apply(socket))
}

fn apply(
    config: &ListenerConfig,
    model: &ListenAddress,
    socket: &Socket,
    state: SocketState,
) -> Result<(), BindError> {
    let is_v6 = model.address.ip().is_some_and(|ip| ip.is_ipv6());
    for option in model.options.iter().filter(|o| o.state == state) {
        option.apply(socket, is_v6).map_err(|e| BindError::Options(config.name.clone(), Cause(e)))?;
    }
    Ok(())
}

fn bind(socket: &Socket, model: &ListenAddress, address: &Address) -> io::Result<()> {
    match address {
        Address::Ip(ip) => socket.bind(&(*ip).into()),
        Address::Pipe(path) => match path.strip_prefix('@') {
            Some(name) => socket.bind(&SockAddr::unix(format!("\0{name}"))?),
            None => {
                // A socket file that a former process left; whatever else is wrong, bind will tell.
                let _ = std::fs::remove_file(&**path);
                socket.bind(&SockAddr::unix(&**path)?)?;
                if model.mode != 0 {
                    std::fs::set_permissions(&**path, Permissions::from_mode(model.mode))?;
                }
                Ok(())
            }
        },
        Address::Internal(..) => Err(io::ErrorKind::Unsupported.into()),
    }
}
