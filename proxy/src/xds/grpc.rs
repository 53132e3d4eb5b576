//! Streams to control planes through our own clusters: their balancing, pools, TLS and counters serve here too.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use prost::Message;
use prost::bytes::Bytes;
use sampan_codec::body::{BodyError, Frame};
use sampan_core::HeaderMap;
use sampan_core::config_source::{Api, ApiSource, GrpcService};
use sampan_core::header::HeaderName;
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Scope, TextReadout};
use sampan_http::router::own_stream::OwnStream;
use sampan_upstream::{ClusterManager, WorkerClusters};
use xds_client::{Call, Client, Config, End, LocalFuture, Observer, RateLimit, Transport, Variant};

use super::source::warn;

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
            max_message: service.max_message,
            rate_limit: source.rate_limit.map(|(max_tokens, fill_rate)| RateLimit { max_tokens, fill_rate }),
        };
        let observer = Rc::new(ControlPlaneStats::new(scope, path, service, *delta));
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
    delta: bool,
    ends: Ends,
}

/// How streams end, for the log.
struct Ends {
    /// Since a message came.
    last: RefCell<Option<(End, Instant)>>,
    /// The longest wait before the next stream.
    patience: Duration,
}

impl ControlPlaneStats {
    fn new(scope: &Scope, path: &str, service: &GrpcService, delta: bool) -> Self {
        let scope = scope.scope("control_plane");
        let method = path.rsplit('/').next().unwrap_or(path);
        Self {
            connected_state: scope.gauge("connected_state"),
            identifier: scope.text_readout("identifier"),
            pending_requests: scope.gauge("pending_requests"),
            rate_limit_enforced: scope.counter("rate_limit_enforced"),
            call: format!("{method} gRPC config stream to {}", service.cluster),
            delta,
            ends: Ends { last: RefCell::default(), patience: service.backoff.1 },
        }
    }
}

impl Ends {
    /// What may pass by itself is worth a warning only when it lasts or changes, as in Envoy.
    fn tell(&self, call: &str, end: &End) -> (Level, String) {
        const PASSING: [u16; 3] = [4, 8, 14];
        let plain = format!("{call} closed: {end}");
        if end.code == 0 {
            return (Level::Debug, plain);
        }
        if !PASSING.contains(&end.code) {
            return (Level::Warn, plain);
        }
        let mut last = self.last.borrow_mut();
        let Some((before, since)) = last.as_mut() else {
            *last = Some((end.clone(), Instant::now()));
            return (Level::Debug, plain);
        };
        let lasts = since.elapsed();
        if before.code != end.code {
            let told = format!("{plain} (previously {before} since {}s ago)", lasts.as_secs());
            *last = Some((end.clone(), Instant::now()));
            return (Level::Warn, told);
        }
        before.message.clone_from(&end.message);
        if lasts > self.patience {
            return (Level::Warn, format!("{call} closed since {}s ago: {end}", lasts.as_secs()));
        }
        (Level::Debug, plain)
    }
}

impl Observer for ControlPlaneStats {
    fn connected(&self, connected: bool) {
        self.connected_state.set(u64::from(connected));
    }

    fn closed(&self, end: &End) {
        let (level, told) = self.ends.tell(&self.call, end);
        sampan_core::log!(Component::Config, level, "{told}");
    }

    fn received(&self) {
        self.ends.last.take();
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

    fn unwanted(&self, type_url: &str, version: &str) {
        if self.delta {
            warn(&format!(
                "Dropping received DeltaDiscoveryResponse (with version {version}) for non-existent subscription \
                 {type_url}."
            ));
        } else {
            warn(&format!("Ignoring the message for type URL {type_url} as it has no current subscribers."));
        }
    }

    fn refused(&self, type_url: &str, reason: &str) {
        if self.delta {
            warn(&format!("delta config for {type_url} rejected: {reason}"));
        }
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
            let cluster = self
                .clusters
                .get(&service.cluster)
                .ok_or_else(|| End::unavailable("Cluster not available"))?;
            let head = |tls| service.stream_head(path, tls);
            let stream = OwnStream::open(cluster, head, !service.skip_envoy_headers).await;
            let stream = stream.map_err(|unanswered| End::unavailable(unanswered.0))?;
            Ok(Box::new(Exchange { stream, out: None, answered: false }) as Box<dyn Call>)
        })
    }
}

fn broken(error: BodyError) -> End {
    End::internal(match error {
        BodyError::Reset(reason) => format!("upstream_reset_after_response_started{{{}}}", reason.as_str()),
        error => error.to_string(),
    })
}

/// 2: the peer ended the call without saying how.
fn without_status() -> End {
    End { code: 2, message: "missing grpc-status".to_owned() }
}

/// An open call.
struct Exchange {
    stream: OwnStream,
    out: Option<Bytes>,
    /// The response's head has come, and it is gRPC's.
    answered: bool,
}

impl Exchange {
    fn status(headers: &HeaderMap) -> Option<End> {
        End::of_headers(|name| headers.get_name(&HeaderName::new(name)))
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if !self.answered {
            let head = ready!(self.stream.poll_head(cx)).map_err(|none| End::unavailable(none.0))?;
            let status = if head.end { Self::status(&head.headers) } else { None };
            if head.end && head.status == 200 {
                return Poll::Ready(Err(status.unwrap_or_else(without_status)));
            }
            if head.status != 200 {
                return Poll::Ready(Err(status.unwrap_or_else(|| End::of_http(head.status))));
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
        if self.out.is_some() {
            ready!(self.stream.poll_ready(cx));
        }
        if let Some(bytes) = self.out.take() {
            self.stream.send(bytes);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, End>> {
        ready!(self.poll_head(cx))?;
        Poll::Ready(match ready!(self.stream.poll_frame(cx)) {
            Some(Ok(Frame::Data(bytes))) => Ok(bytes),
            Some(Ok(Frame::Trailers(trailers))) => {
                Err(Self::status(&trailers).unwrap_or_else(without_status))
            }
            Some(Err(error)) => Err(broken(error)),
            None => Err(without_status()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_no_warning_until_it_lasts_or_changes() {
        let ends = Ends { last: RefCell::default(), patience: Duration::from_secs(30) };
        let end = |code, message: &str| End { code, message: message.to_owned() };
        let tell = |end| ends.tell("S", &end);
        assert_eq!(tell(end(0, "")).0, Level::Debug);
        assert_eq!(tell(end(13, "broken")), (Level::Warn, "S closed: 13, broken".to_owned()));
        assert_eq!(tell(end(14, "a")), (Level::Debug, "S closed: 14, a".to_owned()));
        assert_eq!(tell(end(14, "b")).0, Level::Debug);
        let changed = "S closed: 8, c (previously 14, b since 0s ago)".to_owned();
        assert_eq!(tell(end(8, "c")), (Level::Warn, changed));
        let impatient = Ends { patience: Duration::ZERO, ..ends };
        std::thread::sleep(Duration::from_millis(1));
        let lasts = (Level::Warn, "S closed since 0s ago: 8, d".to_owned());
        assert_eq!(impatient.tell("S", &end(8, "d")), lasts);
    }
}
