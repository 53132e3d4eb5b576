//! `tcp_proxy`: one connection of the client, one to a host of a cluster, bytes between them.
//!
//! The order of a session is Envoy's: cluster (`NC`), connection limit (`UO`), host (`UH`), connection, up to
//! `max_connect_attempts` times (`UF`, at the end `URX`), then bytes until both sides have ended, one of them broke
//! (a reset of the host is `UR`; a reset is passed on as a reset), nothing moved for `idle_timeout`, or
//! `max_downstream_connection_duration` passed (`DT`). What is known of a session is logged by the drop of its
//! [`Session`], however it ends.

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
use sampan_core::state_values::TCP_PROXY_CLUSTER;
use sampan_core::stream_info::{DetectedClose, Metadata, ResponseFlag, StateObject, StreamInfo};
use sampan_core::time::{sleep, sleep_until};
use sampan_tls::Transport;
use sampan_upstream::WorkerHost;
use sampan_upstream::pool::TcpLease;
use tokio::io::Interest;

use crate::context::{FactoryContext, Worker};
use crate::network::{Downstream, Findings, Held, NetworkFilter, NetworkFilterRegistry, TerminalFilter};
use crate::rbac::Refusal;
use crate::stats::stats;

mod config;
mod connect;
mod relay;
mod tunnel;

use config::TcpProxyConfig;
use relay::{Broken, Progress, Side, relay};
pub use tunnel::{TunnelFactory, TunnelFailure, TunnelTold, Tunnelled, Tunnels, UpstreamBytes};

const CONFIG: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

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
