//! From a session to a host: the cluster, its limits, a host, a connection to it, and again where that fails.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use sampan_core::state_values::{TextKind, TextState};
use sampan_core::stream_info::{ResponseFlag, StreamInfo, UpstreamAttempt};
use sampan_core::time::sleep;
use sampan_core::xxhash::xxh64;
use sampan_tls::Transport;
use sampan_upstream::circuit::Priority;
use sampan_upstream::pool::PoolError;
use sampan_upstream::{
    ConnectFailureKind, ConnectInfo, ConnectOptions, Discovered, LbContext, Outcome, WorkerCluster,
    WorkerHost,
};

use super::Session;
use super::tunnel::{TunnelFailure, Tunnelled};
use crate::context::Worker;

/// `%DOWNSTREAM_LOCAL_CLOSE_REASON%`, with Envoy's number of the reason behind it.
const FAILED: [&str; 4] = [
    "tcp_initializion_failure:0",
    "tcp_initializion_failure:1",
    "tcp_initializion_failure:2",
    "tcp_initializion_failure:3",
];

impl Session {
    /// A connection to a host; none: the session is over, and `info` says why.
    pub(super) async fn connect(&self, worker: &Rc<Worker>) -> Option<Transport> {
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

    /// The session ends while a host is asked for a tunnel: a failed connection.
    pub(super) fn withdraw(&self) {
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
}

fn host_name(host: &WorkerHost) -> Option<Arc<str>> {
    (!host.host.hostname.is_empty()).then(|| host.host.hostname.clone())
}
