//! Streams to control planes through our own clusters: their balancing, pools, TLS and counters serve here too.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use envoy_types::pb::envoy::config::core::v3::Node;
use prost::Message;
use prost::bytes::Bytes;
use sampan_codec::ResetReason;
use sampan_codec::body::{BodyError, Frame};
use sampan_codec::h2::ClientStream;
use sampan_core::HeaderMap;
use sampan_core::config_source::{Api, ApiSource, GrpcService};
use sampan_core::header::HeaderName;
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Scope, TextReadout};
use sampan_upstream::{
    ClusterManager, ConnectOptions, H2Lease, HttpLease, LbContext, PoolError, Priority, WorkerClusters,
};
use xds_client::{Call, Client, Config, End, LocalFuture, Observer, RateLimit, Transport, Variant};

/// What the control thread needs to talk to control planes.
pub struct ControlPlanes {
    manager: Arc<ClusterManager>,
    clusters: WorkerClusters,
    node: Node,
}

/// The variant that a source speaks.
pub fn variant(delta: bool) -> Variant {
    if delta { Variant::Delta } else { Variant::StateOfTheWorld }
}

impl ControlPlanes {
    /// Nobody is connected to yet.
    pub fn new(manager: &Arc<ClusterManager>, node: &Node) -> Self {
        Self {
            manager: manager.clone(),
            clusters: WorkerClusters::new(manager.clusters()),
            node: node.clone(),
        }
    }

    /// A client for one call; none where the source is no gRPC service. It is to be started.
    pub fn client(&self, source: &ApiSource, path: &str, scope: &Scope) -> Option<Client> {
        let Api::Grpc { delta, service } = &source.api else { return None };
        let config = Config {
            path: path.to_owned(),
            variant: variant(*delta),
            node: self.node.encode_to_vec().into(),
            node_on_first_message_only: source.node_on_first_message_only,
            backoff: service.backoff,
            rate_limit: source.rate_limit.map(|(max_tokens, fill_rate)| RateLimit { max_tokens, fill_rate }),
        };
        let observer = Rc::new(ControlPlaneStats::new(scope, path, service));
        Some(Client::new(config, self.transport(service), observer))
    }

    /// Calls to a service.
    pub fn transport(&self, service: &GrpcService) -> Rc<dyn Transport> {
        let (manager, clusters) = (self.manager.clone(), self.clusters.clone());
        Rc::new(Grpc { manager, clusters, service: service.clone() })
    }

    /// Who we are.
    pub fn node(&self) -> Node {
        self.node.clone()
    }

    /// The clusters as the control thread uses them.
    pub fn clusters(&self) -> &WorkerClusters {
        &self.clusters
    }

    /// A random number; not for secrets.
    pub fn random(&self) -> u64 {
        self.clusters.random()
    }

    /// Closes the connections of clusters that lost their slot.
    pub fn prune(&self) {
        self.clusters.prune();
    }
}

/// `control_plane.*`, and the log.
struct ControlPlaneStats {
    connected_state: Gauge,
    identifier: TextReadout,
    pending_requests: Gauge,
    rate_limit_enforced: Counter,
    /// For the log.
    call: String,
}

impl ControlPlaneStats {
    fn new(scope: &Scope, path: &str, service: &GrpcService) -> Self {
        let scope = scope.scope("control_plane");
        let method = path.rsplit('/').next().unwrap_or(path);
        Self {
            connected_state: scope.gauge("connected_state"),
            identifier: scope.text_readout("identifier"),
            pending_requests: scope.gauge("pending_requests"),
            rate_limit_enforced: scope.counter("rate_limit_enforced"),
            call: format!("{method} gRPC config stream to {}", service.cluster),
        }
    }
}

impl Observer for ControlPlaneStats {
    fn connected(&self, connected: bool) {
        self.connected_state.set(u64::from(connected));
    }

    fn closed(&self, end: &End) {
        let level = if end.code == 0 { Level::Debug } else { Level::Warn };
        sampan_core::log!(Component::Config, level, "{} closed: {end}", self.call);
    }

    fn identifier(&self, identifier: &str) {
        self.identifier.set(identifier);
    }

    fn held_back(&self, requests: usize) {
        self.pending_requests.set(requests as u64);
    }

    fn rate_limited(&self) {
        self.rate_limit_enforced.inc();
    }

    fn unwanted(&self, type_url: &str) {
        sampan_core::log!(
            Component::Config,
            Level::Warn,
            "Ignoring the message for type URL {type_url} as it has no current subscribers."
        );
    }
}

struct Grpc {
    manager: Arc<ClusterManager>,
    clusters: WorkerClusters,
    service: GrpcService,
}

impl Transport for Grpc {
    fn open<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Box<dyn Call>, End>> {
        Box::pin(async move {
            let service = &self.service;
            self.manager.settled(&service.cluster).await;
            let cluster = self.clusters.get(&service.cluster).ok_or_else(|| {
                End::unavailable(format!("gRPC client cluster '{}' does not exist", service.cluster))
            })?;
            let host =
                cluster.pick(&LbContext::default()).ok_or_else(|| End::unavailable("no healthy upstream"))?;
            let paced = ConnectOptions { paced: true, ..ConnectOptions::default() };
            let mut lease = match host.http(Priority::Default, true, Some(&paced)).await {
                Ok(HttpLease::H2(lease)) => lease,
                Ok(_) => return Err(End::unavailable("the cluster does not speak HTTP/2")),
                Err(error) => return Err(End::unavailable(reason(&error))),
            };
            let headers = self.service.stream_head(path, lease.info().tls.is_some());
            let stream = lease.start(&headers, false).map_err(reset)?;
            Ok(Box::new(Exchange { stream, _lease: lease, out: None, answered: false }) as Box<dyn Call>)
        })
    }
}

fn reason(error: &PoolError) -> String {
    match error {
        PoolError::Connect(failure) => failure.reason.to_string(),
        error => error.to_string(),
    }
}

fn reset(reason: ResetReason) -> End {
    End::unavailable(format!("upstream reset: {}", reason.as_str()))
}

fn broken(error: BodyError) -> End {
    match error {
        BodyError::Reset(reason) => reset(reason),
        error => End::internal(error.to_string()),
    }
}

/// An open call.
struct Exchange {
    stream: ClientStream,
    _lease: Box<H2Lease>,
    out: Option<Bytes>,
    /// The response's head has come, and it is gRPC's.
    answered: bool,
}

impl Exchange {
    fn status(headers: &HeaderMap) -> Option<End> {
        End::of_headers(|name| headers.get_name(&HeaderName::new(name)))
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        while !self.answered {
            let head = ready!(self.stream.poll_head(cx)).map_err(broken)?;
            if head.status < 200 {
                continue;
            }
            if head.end || head.status != 200 {
                let end = Self::status(&head.headers).unwrap_or_else(|| End::of_http(head.status));
                return Poll::Ready(Err(end));
            }
            self.answered = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl Call for Exchange {
    fn send(&mut self, bytes: Bytes) {
        // The client sends only when all before is written.
        self.out = Some(bytes);
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        // A peer that takes no more has said why, or will: that is for `poll_data` to tell.
        if self.out.is_some()
            && ready!(self.stream.poll_ready(cx)).is_ok()
            && let Some(bytes) = self.out.take()
        {
            let _ = self.stream.send_frame(Some(Frame::Data(bytes)), false);
        }
        self.out = None;
        Poll::Ready(Ok(()))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, End>> {
        ready!(self.poll_head(cx))?;
        Poll::Ready(match ready!(self.stream.poll_frame(cx)) {
            Some(Ok(Frame::Data(bytes))) => Ok(bytes),
            Some(Ok(Frame::Trailers(trailers))) => {
                Err(Self::status(&trailers).unwrap_or_else(|| End::internal("missing grpc-status")))
            }
            Some(Err(error)) => Err(broken(error)),
            None => Err(End::internal("missing grpc-status")),
        })
    }
}
