//! `tunneling_config`: a session's bytes go through a request to an HTTP host. Who knows HTTP opens the tunnel; this is
//! what it is asked and what it answers.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::TunnelingConfig;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::ConfigResult;
use sampan_core::stream_info::StreamInfo;
use sampan_tls::Transport;
use sampan_upstream::{ConnectInfo, ConnectOptions, PoolError, WorkerHost};

/// Makes a `tcp_proxy`'s tunnels of their configuration.
pub type TunnelFactory = fn(&TunnelingConfig) -> ConfigResult<Arc<dyn Tunnels>>;

/// Opens the tunnels of a `tcp_proxy`.
pub trait Tunnels: Send + Sync {
    /// A tunnel through this host, which has agreed.
    fn open<'a>(
        &'a self,
        host: &'a Rc<WorkerHost>,
        options: &'a ConnectOptions,
        info: &'a RefCell<StreamInfo>,
        told: &'a Rc<TunnelTold>,
    ) -> LocalBoxFuture<'a, Result<Tunnelled, TunnelFailure>>;
}

/// What a session is told of its tunnels while they are opened.
#[derive(Debug, Default)]
pub struct TunnelTold {
    /// Of all attempts.
    pub bytes: Cell<UpstreamBytes>,
    /// The connection on which a host was asked and has not agreed.
    pub asked: Cell<Option<u64>>,
}

/// A tunnel that is open.
pub struct Tunnelled {
    /// The bytes in it; a drop ends the request.
    pub transport: Transport,
    /// What is known of the connection below.
    pub info: Rc<ConnectInfo>,
}

/// Why there is no tunnel.
pub enum TunnelFailure {
    /// There is no connection.
    Pool(PoolError),
    /// The host answered with this status, or ended its answer at once.
    Response(u16),
    /// There was no answer.
    Reset,
}

/// Bytes on the wire to the hosts.
#[derive(Debug, Clone, Copy, Default)]
pub struct UpstreamBytes {
    /// All that was sent.
    pub sent: u64,
    /// All that was received.
    pub received: u64,
    /// Header lines sent.
    pub header_sent: u64,
    /// Header lines received.
    pub header_received: u64,
}
