//! The way of log entries and spans to their collectors: gRPC calls and POSTs to this worker's clusters. See [`sampan_core::export`].
//!
//! A stream stays open until its collector ends it. What it is given waits for the connection and for the collector's window;
//! past [`FULL`] bytes it asks for no more.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use sampan_codec::body::Frame;
use sampan_core::config_source::GrpcService;
use sampan_core::export::{Answer, Outflow, PostAnswer, Uplink};
use sampan_core::http_service::HttpService;
use sampan_upstream::{HttpLease, LbContext, Priority, WorkerClusters, WorkerHost};
use tokio::sync::mpsc;

use super::codes::{self, Kind};
use super::exchange::Exchange;
use super::{callout, grpc};

/// How many bytes may wait in a stream: the usual buffer limit of a connection.
const FULL: usize = 1 << 20;

/// gRPC's status where the collector could not be asked.
const UNAVAILABLE: u16 = 14;

/// What answers of collectors may hold.
const LONGEST_ANSWER: usize = 1 << 16;

/// Lets what this thread logs go out through these clusters.
pub fn install(clusters: &WorkerClusters) {
    sampan_core::export::install(Rc::new(Collectors(clusters.clone())));
}

struct Collectors(WorkerClusters);

impl Uplink for Collectors {
    fn stream(&self, service: &Arc<GrpcService>, path: &'static str) -> Option<Box<dyn Outflow>> {
        let host = pick(&self.0, service)?;
        let (sender, queue) = mpsc::unbounded_channel();
        let state = Rc::new(State { open: Cell::new(true), waiting: Cell::new(0) });
        let (service, seen) = (service.clone(), state.clone());
        tokio::task::spawn_local(async move {
            // Why it ended shows in the cluster's counters.
            if let Some(exchange) = open(&host, &service, path).await {
                forward(exchange, queue, &seen).await;
            }
            seen.open.set(false);
        });
        Some(Box::new(Stream { sender, state }))
    }

    fn unary(&self, service: &Arc<GrpcService>, path: &'static str, message: Bytes) -> Answer {
        let (clusters, service) = (self.0.clone(), service.clone());
        Box::pin(async move {
            let ours = !service.skip_envoy_headers;
            let request = callout::Request {
                limit: Some(LONGEST_ANSWER),
                internal: ours,
                forwarded: ours,
                ..callout::Request::new(&service.cluster, service.head(path), message)
            };
            let answer = callout::ask(&clusters, request).await.map_err(|_| UNAVAILABLE)?;
            grpc::last_message(answer, 0).map_err(|end| end.code)
        })
    }

    fn post(&self, service: &Arc<HttpService>, body: Bytes, timeout: Duration) -> PostAnswer {
        let (clusters, service) = (self.0.clone(), service.clone());
        Box::pin(async move {
            let request = callout::Request {
                timeout: Some(timeout).filter(|timeout| !timeout.is_zero()),
                limit: None,
                ..callout::Request::new(&service.cluster, service.head(), body)
            };
            callout::status(&clusters, request).await
        })
    }
}

fn pick(clusters: &WorkerClusters, service: &GrpcService) -> Option<Rc<WorkerHost>> {
    clusters.get(&service.cluster)?.pick(&LbContext::default())
}

/// Begins a call; none where there is no connection, or one that does not speak HTTP/2.
async fn open(host: &Rc<WorkerHost>, service: &GrpcService, path: &str) -> Option<Exchange> {
    let lease = host.http(Priority::Default, true, None).await.ok()?;
    if !matches!(lease, HttpLease::H2(_)) {
        return None;
    }
    let headers = service.stream_head(path, Exchange::info(&lease).0.tls.is_some());
    Exchange::start(lease, &headers, false, b"").ok()
}

struct State {
    open: Cell<bool>,
    waiting: Cell<usize>,
}

struct Stream {
    sender: mpsc::UnboundedSender<Bytes>,
    state: Rc<State>,
}

impl Outflow for Stream {
    fn is_open(&self) -> bool {
        self.state.open.get()
    }

    fn is_full(&self) -> bool {
        self.state.waiting.get() >= FULL
    }

    fn send(&self, frame: Bytes) {
        self.state.waiting.set(self.state.waiting.get() + frame.len());
        // A stream that has ended meanwhile loses it.
        let _ = self.sender.send(frame);
    }
}

/// Writes what comes until either side ends; what the collector says is read and forgotten.
async fn forward(mut exchange: Exchange, mut queue: mpsc::UnboundedReceiver<Bytes>, state: &State) {
    let mut answered = false;
    poll_fn(|cx| {
        loop {
            if !answered {
                match exchange.poll_head(cx) {
                    Poll::Ready(Ok(head)) if head.status < 200 => continue,
                    Poll::Ready(Ok(head)) => {
                        let kind = Kind { internal: true, canary: false };
                        codes::charge(exchange.host().cluster(), head.status, kind);
                        answered = true;
                        if head.end {
                            exchange.finish(false);
                            return Poll::Ready(());
                        }
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            match exchange.poll_frame(cx) {
                Poll::Ready(Some(Ok(Frame::Data(_)))) => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        loop {
            match exchange.poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                // Why is for the reader to see.
                Poll::Ready(Err(_)) | Poll::Pending => return Poll::Pending,
            }
            match queue.poll_recv(cx) {
                Poll::Ready(Some(frame)) => {
                    state.waiting.set(state.waiting.get().saturating_sub(frame.len()));
                    if exchange.send_frame(Some(Frame::Data(frame)), false).is_err() {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}
