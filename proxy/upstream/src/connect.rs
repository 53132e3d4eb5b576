//! A new connection to a host: TCP or unix socket, then a PROXY header and TLS where the cluster says so, within
//! `connect_timeout`.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sampan_core::Address;
use sampan_core::peer::PeerCell;
use sampan_core::state_values::{
    APPLICATION_PROTOCOLS, ListState, TextKind, TextState, UPSTREAM_SERVER_NAME, UPSTREAM_SUBJECT_ALT_NAMES,
};
use sampan_core::stream_info::{Protocol, StreamInfo, TlsInfo};
use sampan_core::time::timeout;
use sampan_tls::{ClientOptions, Transport};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, UnixStream};

use crate::cluster::{Cluster, TlsSocket};
use crate::config::ClusterConfig;
use crate::host::Host;
use crate::proxy_header::{ProxyHeaderConfig, Told};

/// What a request asks of the connections it may use; connections with different options are not mixed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ConnectOptions {
    /// Server name (`auto_sni`).
    pub sni: Option<Box<str>>,
    /// Names one of which the certificate must carry (`auto_san_validation`).
    pub verify_sans: Vec<String>,
    /// ALPN protocols in place of the context's (Istio's `alpn` filter).
    pub alpn: Arc<[Vec<u8>]>,
    /// What a PROXY header tells of the downstream connection.
    pub told: Option<Arc<Told>>,
    /// What the peer sends may wait for some milliseconds, once it sends very often ([`sampan_tls::Paced`]).
    pub paced: bool,
}

impl ConnectOptions {
    /// What filters have left for the upstream connections of a stream; `None` are the default ones.
    pub fn of(info: &StreamInfo) -> Option<Self> {
        if !info.may_have_state() {
            return None;
        }
        let sni = info.state(UPSTREAM_SERVER_NAME);
        let sni = sni.as_deref().and_then(|o| TextState::read(o, TextKind::UpstreamServerName));
        let list = |key, kind| info.state(key).and_then(|o| ListState::read(&*o, kind).cloned());
        let alpn = list(APPLICATION_PROTOCOLS, TextKind::ApplicationProtocols);
        let sans = list(UPSTREAM_SUBJECT_ALT_NAMES, TextKind::UpstreamSubjectAltNames);
        if sni.is_none() && alpn.is_none() && sans.is_none() {
            return None;
        }
        let text = |name: &Vec<u8>| String::from_utf8_lossy(name).into_owned();
        Some(Self {
            sni: sni.map(Into::into),
            verify_sans: sans.map(|sans| sans.iter().map(text).collect()).unwrap_or_default(),
            alpn: alpn.unwrap_or_default(),
            told: None,
            paced: false,
        })
    }
}

/// What is known of a connection.
#[derive(Debug)]
pub struct ConnectInfo {
    /// Process-wide number.
    pub id: u64,
    /// Our address.
    pub local: Option<Address>,
    /// The host's address.
    pub remote: Arc<Address>,
    /// TLS.
    pub tls: Option<Rc<TlsInfo>>,
    /// The protocol spoken; none for plain TCP.
    pub protocol: Option<Protocol>,
    /// When it was asked for.
    pub start: Instant,
    /// When it was connected.
    pub connected: Instant,
    /// When TLS was complete.
    pub handshake: Option<Instant>,
    /// TCP metadata exchange on it, where the cluster has it.
    pub exchange: Option<Rc<PeerCell>>,
    /// Bytes that went out before it was ready: the PROXY header.
    pub sent_before: u64,
}

/// A connected byte stream.
pub struct Connected {
    /// The stream.
    pub transport: Transport,
    /// What is known of it.
    pub info: ConnectInfo,
}

/// Whose fault a failed connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailureKind {
    /// `connect_timeout` passed.
    Timeout,
    /// The peer refused, or broke the handshake.
    Remote,
    /// It failed here (no route, no socket, no file).
    Local,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectFailure {
    /// Whose fault.
    pub kind: ConnectFailureKind,
    /// `UPSTREAM_TRANSPORT_FAILURE_REASON`; empty for a timeout.
    pub reason: Arc<str>,
}

impl ConnectFailure {
    /// As it stands in `upstream_reset_before_response_started{…}`, before the transport's reason.
    pub fn reset_reason(&self) -> &'static str {
        match self.kind {
            ConnectFailureKind::Timeout => "connection_timeout",
            ConnectFailureKind::Remote => "remote_connection_failure",
            ConnectFailureKind::Local => "local_connection_failure",
        }
    }

    fn timeout() -> Self {
        Self { kind: ConnectFailureKind::Timeout, reason: "".into() }
    }

    /// The kernel's answer came later.
    fn delayed(error: &io::Error) -> Self {
        let reason = format!("delayed connect error: {}", text(error)).into();
        Self { kind: ConnectFailureKind::Remote, reason }
    }

    /// The kernel's answer came at once.
    fn immediate(error: &io::Error, address: &Address) -> Self {
        let reason = format!("immediate connect error: {}|remote address:{address}", text(error)).into();
        Self { kind: ConnectFailureKind::Remote, reason }
    }

    /// Nothing left this machine.
    fn local(error: &io::Error) -> Self {
        Self { kind: ConnectFailureKind::Local, reason: text(error).into() }
    }
}

/// The text of the error number alone.
fn text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Connects. `fallback_alpn` is offered where the TLS context and the options name no protocol.
pub async fn connect(
    cluster: &Cluster,
    host: &Host,
    options: &ConnectOptions,
    fallback_alpn: &[&[u8]],
) -> Result<Connected, ConnectFailure> {
    let work = connect_inner(cluster, host, options, fallback_alpn);
    match timeout(cluster.config().connect_timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(ConnectFailure::timeout()),
    }
}

async fn connect_inner(
    cluster: &Cluster,
    host: &Host,
    options: &ConnectOptions,
    fallback_alpn: &[&[u8]],
) -> Result<Connected, ConnectFailure> {
    let start = Instant::now();
    let remote = host.address();
    let (mut transport, local) = match &*remote {
        Address::Ip(address) => tcp(cluster, *address).await?,
        Address::Pipe(path) => (unix(path).await.map_err(|e| ConnectFailure::immediate(&e, &remote))?, None),
        Address::Internal(..) => {
            let error = io::Error::from(io::ErrorKind::Unsupported);
            return Err(ConnectFailure::immediate(&error, &remote));
        }
    };
    if options.paced {
        transport.pace();
    }
    let connected = Instant::now();
    let socket = cluster.socket(host);
    let header =
        socket.header.as_ref().map(|header| header_of(header, cluster, host, options, &local, &remote));
    let header = header.unwrap_or_default();
    if !header.is_empty() {
        transport.write_all(&header).await.map_err(|e| ConnectFailure::delayed(&e))?;
    }
    let tls = match &socket.tls {
        None => None,
        Some(tls) => {
            let (over, info) = handshake(tls, transport, host, options, fallback_alpn).await?;
            transport = over;
            Some(Rc::new(info))
        }
    };
    let handshake = tls.is_some().then(Instant::now);
    let exchange = cluster.exchange.as_ref().map(|exchange| {
        let alpn = tls.as_ref().and_then(|tls: &Rc<TlsInfo>| tls.alpn.as_deref());
        transport.exchange(exchange, alpn)
    });
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let sent_before = header.len() as u64;
    let protocol = None;
    let info =
        ConnectInfo { id, local, remote, tls, protocol, start, connected, handshake, exchange, sent_before };
    Ok(Connected { transport, info })
}

/// The PROXY header of a connection. Without a downstream connection version 1 tells of the connection itself.
fn header_of(
    header: &ProxyHeaderConfig,
    cluster: &Cluster,
    host: &Host,
    options: &ConnectOptions,
    local: &Option<Address>,
    remote: &Address,
) -> Vec<u8> {
    let own = local.as_ref().map(|local| (local, remote));
    let made = header.make(options.told.as_deref(), own, host.tlvs().as_deref());
    if !made.complete {
        cluster.count_long_tlvs();
    }
    made.bytes
}

async fn handshake(
    tls: &TlsSocket,
    transport: Transport,
    host: &Host,
    options: &ConnectOptions,
    fallback_alpn: &[&[u8]],
) -> Result<(Transport, TlsInfo), ConnectFailure> {
    let fallback = !tls.alpn && options.alpn.is_empty();
    // `auto_host_sni` stands between the request's name and the context's own.
    let host_name = Some(&host.hostname).filter(|name| tls.auto_host_sni && !name.is_empty());
    let client = ClientOptions {
        sni: options.sni.as_deref().or(host_name.map(|name| &**name)).map(str::to_owned),
        verify_sans: options.verify_sans.clone(),
        alpn: if fallback {
            fallback_alpn.iter().map(|p| p.to_vec()).collect()
        } else {
            options.alpn.to_vec()
        },
    };
    let connected = tls.context.connect(transport, &client).await;
    connected.map_err(|e| ConnectFailure { kind: ConnectFailureKind::Remote, reason: e.0 })
}

async fn tcp(cluster: &Cluster, address: SocketAddr) -> Result<(Transport, Option<Address>), ConnectFailure> {
    let config = cluster.config();
    let socket = tcp_socket(config, address).map_err(|e| ConnectFailure::local(&e))?;
    if let Some(bind) = &config.bind
        && let Some(source) = bind.source_for(address)
        && let Err(e) = bind_source(&socket, source, bind.freebind)
    {
        cluster.stats().bind_errors.inc();
        return Err(ConnectFailure::local(&e));
    }
    let mut connecting = std::pin::pin!(socket.connect(address));
    let mut at_once = true;
    let connected = std::future::poll_fn(|cx| {
        let polled = connecting.as_mut().poll(cx);
        at_once &= polled.is_ready();
        polled
    });
    let stream = connected.await.map_err(|e| match at_once {
        true => ConnectFailure::immediate(&e, &address.into()),
        false => ConnectFailure::delayed(&e),
    })?;
    let local = stream.local_addr().ok().map(Address::from);
    Ok((Transport::Tcp(stream), local))
}

fn tcp_socket(config: &ClusterConfig, address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    let options = SockRef::from(&socket);
    if let Some(keepalive) = &config.keepalive {
        let mut set = TcpKeepalive::new();
        if keepalive.time > 0 {
            set = set.with_time(Duration::from_secs(keepalive.time.into()));
        }
        if keepalive.interval > 0 {
            set = set.with_interval(Duration::from_secs(keepalive.interval.into()));
        }
        if keepalive.probes > 0 {
            set = set.with_retries(keepalive.probes);
        }
        options.set_tcp_keepalive(&set)?;
    }
    Ok(socket)
}

fn bind_source(socket: &TcpSocket, source: SocketAddr, freebind: bool) -> io::Result<()> {
    let options = SockRef::from(socket);
    match source {
        SocketAddr::V4(_) if freebind => options.set_freebind_v4(true)?,
        SocketAddr::V6(_) if freebind => options.set_freebind_v6(true)?,
        _ => {}
    }
    socket.bind(source)
}

/// A leading `@` names the abstract namespace.
async fn unix(path: &str) -> io::Result<Transport> {
    let stream = match path.strip_prefix('@') {
        None => UnixStream::connect(path).await?,
        Some(name) => {
            use std::os::linux::net::SocketAddrExt;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            let stream = std::os::unix::net::UnixStream::connect_addr(&address)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)?
        }
    };
    Ok(Transport::Unix(stream))
}
