//! Requests of the proxy's own to its clusters: sent whole, answered whole, counted as a client's would be. For filters
//! that ask somebody before they go on, for control planes that are polled, for mirrored requests.
//!
//! Dropping the future ends the request: its place in the queue is given up, its stream is reset, its HTTP/1 connection
//! is closed. There are no further attempts.
//! Source: Envoy's asynchronous client, which is a router without a listener, was watched.

use std::future::poll_fn;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sampan_codec::{BodyError, Frame};
use sampan_core::export::Posted;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::StreamInfo;
use sampan_core::{clock, local_info};
use sampan_upstream::{Choice, LbContext, Outcome, Priority, WorkerCluster, WorkerClusters, WorkerHost};

use super::codes::{self, Kind};
use super::exchange::Exchange;
use super::failure::{Failure, reset};
use super::outlier;
use crate::manager::append_ip;
use crate::route::HeaderMutations;
use crate::stream::Stream;
use crate::tracing::Context;

/// The greatest answer that is read, as in Envoy.
pub const USUAL_LIMIT: usize = 32 << 20;

/// What is asked, and whom.
pub struct Request<'a> {
    /// The cluster's name.
    pub cluster: &'a str,
    /// The head; a scheme is put in once the host is known, and what the fields below say.
    pub headers: HeaderMap,
    /// All of the body, in pieces.
    pub body: Vec<Bytes>,
    /// What follows it.
    pub trailers: Option<HeaderMap>,
    /// How long it may take altogether; the host is told.
    pub timeout: Option<Duration>,
    /// The greatest body that is taken for an answer; none: it is read and forgotten.
    pub limit: Option<usize>,
    /// `x-envoy-internal` is sent. The counters take every such request for an internal one.
    pub internal: bool,
    /// `x-forwarded-for` with our own address is sent.
    pub forwarded: bool,
}

impl<'a> Request<'a> {
    /// A request with what Envoy adds to its own, without a deadline.
    pub fn new(cluster: &'a str, headers: HeaderMap, body: Bytes) -> Self {
        Self {
            cluster,
            headers,
            body: if body.is_empty() { Vec::new() } else { vec![body] },
            trailers: None,
            timeout: None,
            limit: Some(USUAL_LIMIT),
            internal: true,
            forwarded: true,
        }
    }
}

/// The request for whose sake something is asked.
#[derive(Clone, Copy)]
pub struct Asker<'a> {
    /// Its head; empty where it is a connection.
    pub request: &'a HeaderMap,
    /// What is known of it.
    pub info: &'a StreamInfo,
    /// Its trace.
    pub trace: Option<&'a Context>,
}

impl Asker<'_> {
    /// Adds headers that may print what is known of the asker, and its trace.
    pub fn add(&self, mutations: &HeaderMutations, headers: &mut HeaderMap) {
        mutations.apply_values(headers, &mutations.values(self.request, self.info));
        if let Some(trace) = self.trace {
            trace.inject(headers);
        }
    }
}

/// The answer.
#[derive(Debug)]
pub struct Answer {
    /// `:status`
    pub status: u16,
    /// The head.
    pub headers: HeaderMap,
    /// All of the body.
    pub body: Bytes,
    /// The trailers, where there are any.
    pub trailers: Option<HeaderMap>,
}

/// Sends a request and waits for all of the response, `limit` bytes at most. A deadline is the caller's.
///
/// # Errors
/// Why there is no answer, in words for the log.
pub async fn call(
    clusters: &WorkerClusters,
    cluster: &str,
    headers: &HeaderMap,
    body: Bytes,
    limit: usize,
) -> Result<Answer, String> {
    ask(clusters, Request { limit: Some(limit), ..Request::new(cluster, headers.clone(), body) }).await
}

/// Sends a request and waits for all of the response.
///
/// # Errors
/// Why there is no answer, in words for the log.
pub async fn ask(clusters: &WorkerClusters, request: Request<'_>) -> Result<Answer, String> {
    let Some(cluster) = clusters.get(request.cluster) else {
        return Err(format!("cluster '{}' does not exist", request.cluster));
    };
    let (result, _) = run(cluster, request).await;
    result.map_err(|failed| match failed {
        Failed::At(failure) => format!("{failure:?}"),
        Failed::TooLarge => "the response is too large".to_owned(),
    })
}

/// Sends a request of whose response only the status counts. As for Envoy's client, a host that does not respond has
/// answered with 503, or with 504 where it was too slow.
pub async fn status(clusters: &WorkerClusters, request: Request<'_>) -> Posted {
    let Some(cluster) = clusters.get(request.cluster) else { return Posted::NoCluster };
    match run(cluster, request).await {
        (Ok(answer), _) => Posted::Status(answer.status),
        (Err(_), true) => Posted::Broken,
        (Err(Failed::At(failure)), false) => Posted::Status(status_of(&failure)),
        (Err(Failed::TooLarge), false) => Posted::Status(503),
    }
}

/// What a failure counts as.
fn status_of(failure: &Failure) -> u16 {
    if matches!(failure, Failure::Timeout) { 504 } else { failure.status() }
}

/// The same for those who take any end for an answer: what a client would get of the router. An answer that breaks off
/// is one of its own.
pub async fn answer(clusters: &WorkerClusters, request: Request<'_>) -> Answer {
    const BROKEN: &str = "upstream failure";
    let Some(cluster) = clusters.get(request.cluster) else { return Answer::local(503, BROKEN, false) };
    match run(cluster, request).await {
        (Ok(answer), _) => answer,
        (Err(Failed::TooLarge), _) | (Err(_), true) => Answer::local(503, BROKEN, false),
        (Err(Failed::At(failure)), false) => {
            let body = match &failure {
                Failure::Timeout => "upstream request timeout".to_owned(),
                Failure::NoHost(_) => "no healthy upstream".to_owned(),
                failure => failure.body(false),
            };
            Answer::local(status_of(&failure), body, true)
        }
    }
}

/// The answer, and whether it has begun.
async fn run(cluster: Rc<WorkerCluster>, mut request: Request<'_>) -> (Result<Answer, Failed>, bool) {
    add_headers(&mut request);
    let timeout = request.timeout;
    let mut call =
        Call { cluster, request, host: None, connected: false, answered: None, start: clock::recent() };
    let result = match timeout {
        None => call.run().await,
        Some(timeout) => {
            let run = sampan_core::time::timeout(timeout, call.run()).await;
            run.unwrap_or(Err(Failed::At(Failure::Timeout)))
        }
    };
    clock::tick();
    call.account(&result);
    (result, call.answered.is_some())
}

impl Answer {
    /// One of our own.
    fn local(status: u16, body: impl Into<Bytes>, described: bool) -> Self {
        let body = body.into();
        let mut headers = HeaderMap::new();
        headers.append(HeaderId::STATUS, status.to_string());
        if described {
            headers.append(HeaderId::CONTENT_LENGTH, body.len().to_string());
            headers.append(HeaderId::CONTENT_TYPE, "text/plain");
        }
        Self { status, headers, body, trailers: None }
    }
}

/// What the host is told besides.
fn add_headers(request: &mut Request<'_>) {
    if request.internal {
        request.headers.set(HeaderId::X_ENVOY_INTERNAL, "true");
    }
    if request.forwarded {
        append_ip(&mut request.headers, local_info::address());
    }
    if let Some(timeout) = request.timeout.filter(|timeout| !timeout.is_zero()) {
        let milliseconds = timeout.as_millis().to_string();
        request.headers.set(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, milliseconds);
    }
}

enum Failed {
    At(Failure),
    TooLarge,
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self::At(failure)
    }
}

fn broken(error: BodyError) -> Failed {
    Failed::At(match error {
        BodyError::Protocol(_) | BodyError::Request(_) => Failure::Protocol,
        BodyError::Reset(reason) => reset(reason, true),
        BodyError::Timeout => Failure::Timeout,
    })
}

/// A request under way.
struct Call<'a> {
    cluster: Rc<WorkerCluster>,
    request: Request<'a>,
    host: Option<Rc<WorkerHost>>,
    connected: bool,
    /// The response has begun; how it counts.
    answered: Option<Kind>,
    start: Instant,
}

impl Call<'_> {
    async fn run(&mut self) -> Result<Answer, Failed> {
        let host = self.pick().await?;
        self.host = Some(host.clone());
        let lease = host.http(Priority::Default, false, None).await.map_err(Failure::of_pool)?;
        self.connected = true;
        host.report(Outcome::Connected, None);
        let request = &mut self.request;
        let scheme = if Exchange::info(&lease).0.tls.is_some() { "https" } else { "http" };
        request.headers.set(HeaderId::SCHEME, scheme);
        let mut frames = request.body.len() + usize::from(request.trailers.is_some());
        let exchange = Exchange::start(lease, &request.headers, frames == 0, b"");
        let mut exchange = exchange.map_err(|reason| reset(reason, false))?;
        let body = std::mem::take(&mut request.body).into_iter().map(Frame::Data);
        for frame in body.chain(request.trailers.take().map(Frame::Trailers)) {
            frames -= 1;
            // An answer may lie behind a failed write: the reader decides.
            if poll_fn(|cx| exchange.poll_ready(cx)).await.is_err()
                || exchange.send_frame(Some(frame), frames == 0).is_err()
            {
                break;
            }
        }
        self.answer(exchange).await
    }

    async fn pick(&self) -> Result<Rc<WorkerHost>, Failure> {
        let destination = self.cluster.destination_of_call(&self.request.headers);
        match self.cluster.choose(&LbContext { destination, ..LbContext::default() }) {
            Choice::Host(host) => Ok(host),
            Choice::None(details) => Err(Failure::NoHost(details)),
            Choice::Later(resolving) => {
                let entry = resolving.done().await;
                self.cluster.named(&entry.key).ok_or_else(|| Failure::NoHost(Some(entry.details())))
            }
        }
    }

    async fn answer(&mut self, mut exchange: Exchange) -> Result<Answer, Failed> {
        let head = loop {
            let head = poll_fn(|cx| {
                let _ = exchange.poll_flush(cx);
                exchange.poll_head(cx)
            });
            let mut head = head.await.map_err(broken)?;
            if head.status >= 200 {
                let took = clock::tick().duration_since(self.start).as_millis().to_string();
                head.headers.set(HeaderId::X_ENVOY_UPSTREAM_SERVICE_TIME, took);
                break head;
            }
        };
        let host = exchange.host();
        outlier::report(host, Stream::is_grpc(&self.request.headers), Ok(&head));
        let counted =
            if head.status >= 500 { &host.host.stats.rq_error } else { &host.host.stats.rq_success };
        counted.inc();
        let canary = head.headers.get(HeaderId::X_ENVOY_UPSTREAM_CANARY) == Some(b"true") || host.canary();
        let kind = Kind { internal: true, canary };
        codes::charge(self.cluster.cluster(), head.status, kind);
        self.answered = Some(kind);
        let (mut body, mut trailers) = (Vec::new(), None);
        while !head.end
            && let Some(frame) = poll_fn(|cx| {
                let _ = exchange.poll_flush(cx);
                exchange.poll_frame(cx)
            })
            .await
        {
            match frame.map_err(broken)? {
                Frame::Data(data) => match self.request.limit {
                    Some(limit) if body.len() + data.len() > limit => return Err(Failed::TooLarge),
                    Some(_) => body.extend_from_slice(&data),
                    None => {}
                },
                Frame::Trailers(last) => {
                    trailers = Some(last);
                    break;
                }
            }
        }
        exchange.finish(true);
        Ok(Answer { status: head.status, headers: head.headers, body: body.into(), trailers })
    }

    /// What is counted when it is over.
    fn account(&self, result: &Result<Answer, Failed>) {
        let stats = self.cluster.stats();
        if let (Ok(_), Some(kind)) = (result, self.answered) {
            let took = clock::recent().duration_since(self.start).as_millis();
            codes::time(self.cluster.cluster(), u64::try_from(took).unwrap_or(u64::MAX), kind);
        }
        let Err(Failed::At(failure)) = result else { return };
        let status = status_of(failure);
        if matches!(failure, Failure::Timeout) {
            stats.upstream_rq_timeout.inc();
        }
        if let Some(host) = &self.host {
            if matches!(failure, Failure::Timeout) {
                host.host.stats.rq_timeout.inc();
                if self.connected {
                    host.report(Outcome::Timeout, Some(status));
                }
            } else if self.answered.is_none() {
                outlier::report(host, true, Err(failure));
            }
            host.host.stats.rq_error.inc();
        }
        if self.answered.is_none() {
            let kind = Kind { internal: true, canary: false };
            codes::charge(self.cluster.cluster(), status, kind);
        }
    }
}
