//! `tcp_proxy`: one connection of the client, one to a host of a cluster, bytes between them.
//!
//! The order of a session is Envoy's: cluster (`NC`), connection limit (`UO`), host (`UH`), connection, up to
//! `max_connect_attempts` times (`UF`, at the end `URX`), then bytes until both sides have ended, one of them broke
//! (a reset of the host is `UR`; a reset is passed on as a reset), nothing moved for `idle_timeout`, or
//! `max_downstream_connection_duration` passed (`DT`). What is known of a session is logged by the drop of its
//! [`Session`], however it ends.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::access_log::AccessLogger;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::state_values::{TCP_PROXY_CLUSTER, TextKind, TextState};
use sampan_core::stream_info::{
    DetectedClose, Metadata, ResponseFlag, StateObject, StreamInfo, UpstreamAttempt,
};
use sampan_core::time::{sleep, sleep_until};
use sampan_core::xxhash::xxh64;
use sampan_tls::Transport;
use sampan_upstream::circuit::Priority;
use sampan_upstream::pool::{PoolError, TcpLease};
use sampan_upstream::{
    ConnectFailureKind, ConnectInfo, ConnectOptions, Discovered, LbContext, Outcome, WorkerCluster,
    WorkerHost,
};
use tokio::io::Interest;

use crate::context::{FactoryContext, Worker};
use crate::network::{Downstream, Findings, Held, NetworkFilter, NetworkFilterRegistry, TerminalFilter};
use crate::rbac::Refusal;
use crate::stats::stats;

mod config;
mod relay;
mod tunnel;

use config::TcpProxyConfig;
use relay::{Broken, Progress, Side, relay};
pub use tunnel::{TunnelFactory, TunnelFailure, TunnelTold, Tunnelled, Tunnels, UpstreamBytes};

const CONFIG: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
/// `%DOWNSTREAM_LOCAL_CLOSE_REASON%`, with Envoy's number of the reason behind it.
const FAILED: [&str; 4] = [
    "tcp_initializion_failure:0",
    "tcp_initializion_failure:1",
    "tcp_initializion_failure:2",
    "tcp_initializion_failure:3",
];

stats! {
    /// `tcp.PREFIX.*`
    Counters {
        counters:
            downstream_cx_drain_close downstream_cx_no_route downstream_cx_overload_close
            downstream_cx_rx_bytes_total downstream_cx_total downstream_cx_tx_bytes_total
            downstream_flow_control_paused_reading_total downstream_flow_control_resumed_reading_total
            early_data_received_count_total idle_timeout max_downstream_connection_duration route_delayed_total
            upstream_flush_total;
        gauges: downstream_cx_rx_bytes_buffered downstream_cx_tx_bytes_buffered upstream_flush_active;
    }
}

stats! {
    /// The same, with `on_demand`.
    OnDemandCounters {
        counters:
            on_demand_cluster_attempt on_demand_cluster_missing on_demand_cluster_success on_demand_cluster_timeout;
        gauges: ;
    }
}

/// Registers the filter, without tunnels.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    let none: TunnelFactory = |_| Err(ConfigError::unsupported("tunneling_config"));
    register_with_tunnels(registry, none);
}

/// Registers the filter with what opens tunnels.
pub fn register_with_tunnels(registry: &mut NetworkFilterRegistry, tunnels: TunnelFactory) {
    registry.register(CONFIG, move |config, context| make(config, context, tunnels));
}

fn make(config: &Any, context: &FactoryContext, tunnels: TunnelFactory) -> ConfigResult<NetworkFilter> {
    let message: pb::TcpProxy = crate::proto::decode(config)?;
    let config = TcpProxyConfig::from_proto(&message)?;
    let tunnels = message.tunneling_config.as_ref().map(tunnels).transpose().at("tunneling_config")?;
    let access_log = context.access_loggers(&message.access_log, "access_log")?;
    let scope = context.root_scope().scope("tcp").scope(&config.stat_prefix);
    let counters = Counters::new(&scope);
    let on_demand = config.on_demand.is_some().then(|| Box::new(OnDemandCounters::new(&scope)));
    Ok(NetworkFilter::Terminal(Arc::new(TcpProxy {
        config,
        counters,
        on_demand,
        tunnels,
        access_log,
        listener_metadata: context.listener_metadata.clone(),
    })))
}

/// The filter, shared by all its connections.
struct TcpProxy {
    config: TcpProxyConfig,
    counters: Counters,
    on_demand: Option<Box<OnDemandCounters>>,
    tunnels: Option<Arc<dyn Tunnels>>,
    access_log: Vec<AccessLogger>,
    listener_metadata: Option<Arc<Metadata>>,
}

impl TerminalFilter for TcpProxy {
    fn serve(self: Arc<Self>, downstream: Downstream, worker: Rc<Worker>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let Downstream { mut transport, info, metadata, held, refusal, over, .. } = downstream;
            let cluster = info.state(TCP_PROXY_CLUSTER);
            self.counters.downstream_cx_total.inc();
            let mut info = StreamInfo::new(worker.random(), info, None);
            info.dynamic_metadata = metadata;
            info.listener_metadata = self.listener_metadata.clone();
            (info.start, info.start_system) = (info.connection.start, info.connection.start_system);
            let tunnelled = self.tunnels.is_some().then(Rc::default);
            let session = Session {
                proxy: self,
                tunnelled,
                refusal,
                cluster,
                info: RefCell::new(info),
                lease: RefCell::new(None),
                asked: RefCell::new(None),
                began: Cell::new(None),
                moved: Default::default(),
                last: Cell::new(Instant::now()),
                held,
            };
            if session.proxy.config.log_on_start {
                session.log(AccessLogType::TcpConnectionStart);
            }
            if !over {
                session.run(&mut transport, &worker).await;
            }
            // The client's connection ends before the log tells of it.
            drop(transport);
        })
    }

    fn serves_refused(&self) -> bool {
        true
    }
}

/// One connection's accounting; its drop is the end of the session.
struct Session {
    proxy: Arc<TcpProxy>,
    info: RefCell<StreamInfo>,
    /// A filter before this one refuses the connection.
    refusal: Option<Box<Refusal>>,
    /// The cluster that a filter before this one has picked.
    cluster: Option<StateObject>,
    lease: RefCell<Option<TcpLease>>,
    tunnelled: Option<Rc<TunnelTold>>,
    /// The host that was asked for a tunnel last.
    asked: RefCell<Option<Rc<WorkerHost>>>,
    /// When a cluster was first found.
    began: Cell<Option<Instant>>,
    /// Bytes to the host, bytes to the client.
    moved: [Cell<u64>; 2],
    last: Cell<Instant>,
    held: Held,
}

impl Progress for Session {
    fn moved(&self, to: Side, bytes: usize) {
        let bytes = bytes as u64;
        let (cell, counter) = match to {
            Side::Up => (&self.moved[0], &self.proxy.counters.downstream_cx_rx_bytes_total),
            Side::Down => (&self.moved[1], &self.proxy.counters.downstream_cx_tx_bytes_total),
        };
        counter.add(bytes);
        cell.set(cell.get() + bytes);
        if let Some(lease) = &*self.lease.borrow() {
            lease.count_bytes(self.moved[1].get(), self.moved[0].get());
        }
        self.last.set(Instant::now());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.lease.get_mut().take();
        self.info.get_mut().end = Some(Instant::now());
        self.log(AccessLogType::TcpConnectionEnd);
        self.held.log(self.info.get_mut());
    }
}

impl Session {
    /// Brings the bytes up to date.
    fn count_bytes(&self) {
        let mut info = self.info.borrow_mut();
        let [up, down] = [self.moved[0].get(), self.moved[1].get()];
        info.bytes.received = up;
        info.bytes.wire_received = up;
        info.bytes.upstream_wire_sent = up;
        info.bytes.sent = down;
        info.bytes.wire_sent = down;
        info.bytes.upstream_wire_received = down;
        if let Some(tunnelled) = &self.tunnelled {
            // The payload counts twice, as in Envoy: in the request and again as the session's.
            let UpstreamBytes { sent, received, header_sent, header_received } = tunnelled.bytes.get();
            info.bytes.upstream_wire_sent += sent;
            info.bytes.upstream_wire_received += received;
            info.bytes.upstream_header_sent = header_sent;
            info.bytes.upstream_header_received = header_received;
        }
        if let Some(findings) = info.connection.slots.get::<Findings>() {
            findings.tell(&mut info);
        }
    }

    /// Writes to the filter's access log what is known so far.
    fn log(&self, log_type: AccessLogType) {
        self.count_bytes();
        let info = self.info.borrow();
        let context = FormatContext { log_type, ..FormatContext::new(&info) };
        self.proxy.access_log.iter().for_each(|l| l.log(&context));
    }

    /// Tells those who follow the connection.
    async fn report_periodically(&self) {
        let periods = self.held.observers().iter().filter_map(|observer| observer.period());
        let Some(period) = periods.min() else { return std::future::pending().await };
        loop {
            sleep(period).await;
            self.count_bytes();
            let info = self.info.borrow();
            self.held.observers().iter().for_each(|observer| observer.report(&info, false));
        }
    }

    async fn log_periodically(&self) {
        let Some(interval) = self.proxy.config.log_interval else { return std::future::pending().await };
        loop {
            sleep(interval).await;
            self.log(AccessLogType::TcpPeriodic);
        }
    }

    /// The session under its two clocks.
    async fn run(&self, down: &mut Transport, worker: &Rc<Worker>) {
        let config = &self.proxy.config;
        let longest = config.max_duration(worker.random());
        let outcome = tokio::select! {
            biased;
            () = self.proxy(down, worker) => return,
            () = self.idle(config.idle_timeout) => Expired::Idle,
            () = after(longest) => Expired::TooLong,
            () = self.log_periodically() => return,
            () = self.report_periodically() => return,
        };
        self.withdraw();
        let counters = &self.proxy.counters;
        let mut info = self.info.borrow_mut();
        match outcome {
            Expired::Idle => {
                counters.idle_timeout.inc();
                info.downstream_local_close_reason = Some("tcp_session_idle_timeout".into());
            }
            Expired::TooLong => {
                counters.max_downstream_connection_duration.inc();
                info.flags.set(ResponseFlag::DurationTimeout);
                info.downstream_local_close_reason = Some("max_connection_duration_reached".into());
            }
        }
    }

    async fn proxy(&self, down: &mut Transport, worker: &Rc<Worker>) {
        let up = tokio::select! {
            biased;
            // In a box of its own: connecting, TLS above all, needs more room than the session that follows.
            up = Box::pin(self.connect(worker)) => up,
            () = was_reset(down) => {
                self.withdraw();
                self.info.borrow_mut().downstream_close = DetectedClose::RemoteReset;
                return;
            }
        };
        let Some(mut up) = up else { return };
        if self.proxy.config.log_on_connected {
            self.log(AccessLogType::TcpUpstreamConnected);
        }
        if let Some(refusal) = &self.refusal {
            // The client's end is a byte to this filter, which serves half-closed connections.
            if let Some(read) = refusal.in_force(down, true).await {
                self.moved[0].set(read as u64);
                let mut info = self.info.borrow_mut();
                info.termination_details = Some(refusal.details.clone().into());
                info.downstream_local_close_reason = Some(crate::rbac::CLOSE_REASON.into());
            }
            return;
        }
        match relay(down, &mut up, self).await {
            // Who ends a connection is who ends it last.
            Ok(Side::Down) => self.closed_by_upstream(),
            Ok(Side::Up) => {}
            Err(Broken { side: Side::Up, reset }) => {
                self.closed_by_upstream();
                if reset {
                    let mut info = self.info.borrow_mut();
                    info.flags.set(ResponseFlag::UpstreamRemoteReset);
                    info.upstream_mut().close = DetectedClose::RemoteReset;
                    info.downstream_close = DetectedClose::LocalReset;
                    close_by_reset(down);
                }
            }
            Err(Broken { side: Side::Down, reset }) => {
                if reset {
                    self.info.borrow_mut().downstream_close = DetectedClose::RemoteReset;
                    close_by_reset(&up);
                }
            }
        }
    }

    fn closed_by_upstream(&self) {
        if let Some(lease) = &*self.lease.borrow() {
            lease.closed_by_peer();
        }
    }

    /// A connection to a host; none: the session is over, and `info` says why.
    async fn connect(&self, worker: &Rc<Worker>) -> Option<Transport> {
        loop {
            let chosen = self.cluster.as_deref().and_then(|o| TextState::read(o, TextKind::TcpProxyCluster));
            let name = chosen.unwrap_or_else(|| self.proxy.config.pick(worker));
            let Some(cluster) = self.cluster(worker, name).await else {
                self.proxy.counters.downstream_cx_no_route.inc();
                return self.fail(ResponseFlag::NoClusterFound, FAILED[3]);
            };
            {
                let mut info = self.info.borrow_mut();
                info.cluster = Some(cluster.cluster().name().clone());
                info.cluster_observability = Some(cluster.cluster().observability_name().clone());
                info.cluster_metadata.clone_from(&cluster.cluster().config().metadata);
            }
            if self.began.get().is_none() {
                self.began.set(Some(Instant::now()));
            }
            if !cluster.breakers(Priority::Default).connections().has_room() {
                cluster.stats().upstream_cx_overflow.inc();
                return self.fail(ResponseFlag::UpstreamOverflow, FAILED[2]);
            }
            let destination = cluster.destination(None, &self.info.borrow());
            let Some(host) =
                cluster.pick(&LbContext { destination, hash: self.hash(), ..LbContext::default() })
            else {
                return self.fail(ResponseFlag::NoHealthyUpstream, FAILED[1]);
            };
            if let Some(transport) = self.attempt(&host).await {
                return Some(transport);
            }
            let attempts = self.info.borrow().attempts;
            if attempts >= self.proxy.config.max_connect_attempts {
                return self.exhausted(&cluster);
            }
            match self.proxy.config.back_off(attempts, || worker.random()) {
                Some(wait) => sleep(wait).await,
                // The other connections of this worker get their turn before the next attempt.
                None => tokio::task::yield_now().await,
            }
        }
    }

    /// The cluster of a name, which may have to be asked for.
    async fn cluster(&self, worker: &Rc<Worker>, name: &str) -> Option<Rc<WorkerCluster>> {
        let here = worker.clusters.get(name);
        let (None, Some(on_demand), Some(counters)) =
            (&here, &self.proxy.config.on_demand, &self.proxy.on_demand)
        else {
            return here;
        };
        counters.on_demand_cluster_attempt.inc();
        match worker.clusters.demand(on_demand, &name.into()).await {
            Discovered::Available => counters.on_demand_cluster_success.inc(),
            Discovered::Missing => counters.on_demand_cluster_missing.inc(),
            Discovered::TimedOut => counters.on_demand_cluster_timeout.inc(),
        }
        worker.clusters.get(name)
    }

    fn hash(&self) -> Option<u64> {
        let ip = self.proxy.config.hash_source_ip.then(|| self.info.borrow().remote.ip()).flatten()?;
        Some(xxh64(ip.to_string().as_bytes(), 0))
    }

    fn fail(&self, flag: ResponseFlag, reason: &'static str) -> Option<Transport> {
        let mut info = self.info.borrow_mut();
        info.flags.set(flag);
        info.downstream_local_close_reason = Some(reason.into());
        if let Some(began) = self.began.get() {
            info.upstream_mut().pool_wait.get_or_insert_with(|| began.elapsed());
        }
        None
    }

    fn exhausted(&self, cluster: &WorkerCluster) -> Option<Transport> {
        cluster.stats().upstream_cx_connect_attempts_exceeded.inc();
        self.fail(ResponseFlag::UpstreamRetryLimitExceeded, FAILED[0])
    }

    /// One attempt at one host.
    async fn attempt(&self, host: &Rc<WorkerHost>) -> Option<Transport> {
        {
            let mut info = self.info.borrow_mut();
            info.attempts += 1;
            let upstream = info.upstream_mut();
            upstream.attempts.push(UpstreamAttempt {
                host: (*host.host.address()).clone(),
                host_name: host_name(host),
                connection_id: None,
            });
            upstream.connect_start.get_or_insert_with(Instant::now);
        }
        let options = {
            let info = self.info.borrow();
            let left = ConnectOptions::of(&info);
            host.options(left.as_ref(), &info.connection).map(Cow::into_owned).unwrap_or_default()
        };
        match (&self.proxy.tunnels, &self.tunnelled) {
            (Some(tunnels), Some(told)) => {
                self.asked.replace(Some(host.clone()));
                let Tunnelled { transport, info } = tunnels
                    .open(host, &options, &self.info, told)
                    .await
                    .map_err(|failure| self.failed(host, failure))
                    .ok()?;
                self.connected(host, &info);
                Some(transport)
            }
            _ => {
                let made = host.tcp(Priority::Default, &options).await;
                let mut lease = made.map_err(|error| self.failed(host, TunnelFailure::Pool(error))).ok()?;
                self.connected(host, &lease.info);
                let transport = lease.transport.take();
                self.lease.replace(Some(lease));
                transport
            }
        }
    }

    /// The session ends while a host is asked for a tunnel: a failed connection.
    fn withdraw(&self) {
        let waits = self.tunnelled.as_ref().is_some_and(|told| told.asked.get().is_some());
        if let (true, Some(host)) = (waits, self.asked.take()) {
            self.failed(&host, TunnelFailure::Reset);
        }
    }

    /// What is told of a host once it has answered or failed; until then the log tells of the one before.
    fn note_host(info: &mut StreamInfo, host: &WorkerHost) {
        let upstream = info.upstream_mut();
        upstream.host = Some((*host.host.address()).clone());
        upstream.host_name = host_name(host);
        upstream.host_metadata = host.metadata();
        upstream.locality_zone =
            (!host.host.locality.zone.is_empty()).then(|| host.host.locality.zone.clone());
    }

    /// A connection was had.
    fn note_connection(info: &mut StreamInfo, id: u64) {
        let upstream = info.upstream_mut();
        upstream.connection_id = Some(id);
        if let Some(attempt) = upstream.attempts.last_mut() {
            attempt.connection_id = Some(id);
        }
    }

    /// Notes why an attempt failed.
    fn failed(&self, host: &WorkerHost, failure: TunnelFailure) {
        let mut info = self.info.borrow_mut();
        Self::note_host(&mut info, host);
        if let Some(id) = self.tunnelled.as_ref().and_then(|told| told.asked.take()) {
            Self::note_connection(&mut info, id);
        }
        let (kind, reason) = match failure {
            TunnelFailure::Pool(PoolError::Overflow | PoolError::OtherProtocol) => {
                return info.flags.set(ResponseFlag::UpstreamOverflow);
            }
            TunnelFailure::Pool(PoolError::Connect(failure)) => (failure.kind, failure.reason),
            TunnelFailure::Response(status) => {
                (ConnectFailureKind::Remote, format!("tunnel_response:{status}").into())
            }
            TunnelFailure::Reset => (ConnectFailureKind::Remote, "".into()),
        };
        match kind {
            ConnectFailureKind::Remote => host.report(Outcome::ConnectFailed, None),
            ConnectFailureKind::Timeout => host.report(Outcome::Timeout, None),
            ConnectFailureKind::Local => {}
        }
        if kind != ConnectFailureKind::Local {
            info.flags.set(ResponseFlag::UpstreamConnectionFailure);
        }
        info.upstream_mut().transport_failure = (!reason.is_empty()).then_some(reason);
    }

    /// Notes what is known of the connection to a host.
    fn connected(&self, host: &WorkerHost, made: &ConnectInfo) {
        host.report(Outcome::ConnectedFinally, None);
        let mut info = self.info.borrow_mut();
        Self::note_host(&mut info, host);
        Self::note_connection(&mut info, made.id);
        let upstream = info.upstream_mut();
        upstream.local = made.local.clone();
        upstream.tls = made.tls.clone();
        upstream.exchange = made.exchange.clone();
        upstream.connect_complete = Some(made.connected);
        upstream.handshake_complete = made.handshake;
        let now = Instant::now();
        upstream.pool_wait = self.began.get().map(|began| now - began);
        self.last.set(now);
    }

    /// Returns when no byte was moved for so long.
    async fn idle(&self, limit: Option<Duration>) {
        let Some(limit) = limit else { return std::future::pending().await };
        loop {
            let due = self.last.get() + limit;
            if Instant::now() >= due {
                return;
            }
            sleep_until(due).await;
        }
    }
}

fn host_name(host: &WorkerHost) -> Option<Arc<str>> {
    (!host.host.hostname.is_empty()).then(|| host.host.hostname.clone())
}

enum Expired {
    Idle,
    TooLong,
}

async fn after(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Returns when the client has reset the connection; its FIN is no reason to stop connecting, since half-closed
/// connections are served.
async fn was_reset(down: &Transport) {
    let gone = match down.tcp() {
        Some(tcp) => tcp.ready(Interest::ERROR).await,
        None => std::future::pending().await,
    };
    if gone.is_err() {
        // Without a readiness the read that follows will tell.
        std::future::pending::<()>().await;
    }
}

/// The drop that follows sends a reset instead of a FIN.
fn close_by_reset(transport: &Transport) {
    if let Some(tcp) = transport.tcp() {
        // The peer sees a FIN in the worst case.
        let _ = tcp.set_zero_linger();
    }
}
