//! A gRPC stream of the proxy's own to one of its clusters, open in both directions: to control planes, to who takes
//! load reports. It is counted as any request to its cluster, as Envoy's asynchronous client does it: the response's
//! code with the head, success or failure of the host with the status at the end. There is no `upstream_rq_time`,
//! which wants the request to have ended.
//!
//! Dropping it resets it.

use std::fmt;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use sampan_codec::h1::ResponseHead;
use sampan_codec::{BodyError, Frame, ResetReason};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_upstream::{ConnectOptions, HttpLease, LbContext, Outcome, Priority, WorkerCluster, WorkerHost};

use super::codes::{self, Kind};
use super::exchange::Exchange;
use super::failure::{Failure, reset};
use super::outlier;

/// An open stream.
pub struct OwnStream {
    exchange: Exchange,
    counts: Counts,
    /// The host takes no more.
    refuses: bool,
}

/// What it counts.
struct Counts {
    cluster: Rc<WorkerCluster>,
    host: Rc<WorkerHost>,
    internal: bool,
    /// The response has begun.
    answered: bool,
    /// How it ended was counted.
    settled: bool,
}

/// Why there is no stream, or why it broke before its response began, in Envoy's words.
#[derive(Debug, PartialEq, Eq)]
pub struct Unanswered(pub String);

impl Unanswered {
    /// `more` is what the transport said.
    fn new(reason: &str, more: &str) -> Self {
        let (told, bar) = (reason.replace('_', " "), if more.is_empty() { "" } else { "|" });
        let more = more.replace(' ', "_");
        Self(format!(
            "upstream connect error or disconnect/reset before headers. reset reason: \
             {told}{{upstream_reset_before_response_started{{{reason}{bar}{more}}}}}"
        ))
    }

    fn of(failure: &Failure) -> Self {
        match failure {
            Failure::Connect(connect) => Self::new(failure.reason(), &connect.reason),
            failure => Self::new(failure.reason(), ""),
        }
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unanswered {}

impl OwnStream {
    /// Opens it with the head that `head` makes, which is told whether the connection has TLS. A peer that
    /// sends very often is read every now and then. `internal`: how it counts.
    ///
    /// # Errors
    /// There is no host or no connection.
    pub async fn open(
        cluster: Rc<WorkerCluster>,
        head: impl FnOnce(bool) -> HeaderMap,
        internal: bool,
    ) -> Result<Self, Unanswered> {
        let Some(host) = cluster.pick(&LbContext::default()) else {
            codes::charge(cluster.cluster(), 503, Kind { internal, canary: false });
            return Err(Unanswered("no healthy upstream{no_healthy_upstream}".to_owned()));
        };
        let counts = Counts { cluster, host, internal, answered: false, settled: false };
        let options = ConnectOptions { paced: true, ..ConnectOptions::default() };
        let lease = match counts.host.http(Priority::Default, true, Some(&options)).await {
            Ok(lease @ HttpLease::H2(_)) => lease,
            Ok(_) => return Err(Unanswered("the cluster does not speak HTTP/2".to_owned())),
            Err(error) => return Err(counts.unanswered(&Failure::of_pool(error))),
        };
        counts.host.report(Outcome::Connected, None);
        let head = head(Exchange::info(&lease).0.tls.is_some());
        match Exchange::start(lease, &head, false, b"") {
            Ok(exchange) => Ok(Self { exchange, counts, refuses: false }),
            Err(reason) => Err(counts.unanswered(&reset(reason, false))),
        }
    }

    /// Queues bytes of the request; to be called when [`Self::poll_ready`] was ready.
    pub fn send(&mut self, bytes: Bytes) {
        self.refuses |= self.exchange.send_frame(Some(Frame::Data(bytes)), false).is_err();
    }

    /// Whether there is room for more. A peer that takes no more has said why, or will: that is for who reads.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.refuses {
            self.refuses = ready!(self.exchange.poll_ready(cx)).is_err();
        }
        Poll::Ready(())
    }

    /// The response's head.
    ///
    /// # Errors
    /// There is none.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, Unanswered>> {
        loop {
            let head = match ready!(self.exchange.poll_head(cx)) {
                Ok(head) if head.status < 200 => continue,
                Ok(head) => head,
                Err(error) => return Poll::Ready(Err(self.counts.unanswered(&failure(&error)))),
            };
            self.counts.answered(&head);
            if head.end {
                self.counts.ended(outlier::grpc_succeeds(&head.headers));
            }
            return Poll::Ready(Ok(head));
        }
    }

    /// What follows the head.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let frame = ready!(self.exchange.poll_frame(cx));
        match &frame {
            Some(Ok(Frame::Data(_))) => {}
            Some(Ok(Frame::Trailers(trailers))) => self.counts.ended(outlier::grpc_succeeds(trailers)),
            Some(Err(_)) | None => self.counts.ended(false),
        }
        Poll::Ready(frame)
    }
}

fn failure(error: &BodyError) -> Failure {
    match error {
        BodyError::Reset(reason) => reset(*reason, true),
        BodyError::Protocol(_) | BodyError::Request(_) | BodyError::Timeout => {
            reset(ResetReason::ProtocolError, true)
        }
    }
}

impl Counts {
    fn unanswered(&self, failure: &Failure) -> Unanswered {
        outlier::report(&self.host, true, Err(failure));
        self.host.host.stats.rq_error.inc();
        self.charge(failure.status(), false);
        Unanswered::of(failure)
    }

    fn answered(&mut self, head: &ResponseHead) {
        if std::mem::replace(&mut self.answered, true) {
            return;
        }
        outlier::report(&self.host, true, Ok(head));
        let canary = head.headers.get(HeaderId::X_ENVOY_UPSTREAM_CANARY) == Some(b"true");
        self.charge(head.status, canary || self.host.canary());
        if head.status >= 500 {
            self.ended(false);
        }
    }

    fn ended(&mut self, well: bool) {
        if !std::mem::replace(&mut self.settled, true) {
            let stats = &self.host.host.stats;
            if well { &stats.rq_success } else { &stats.rq_error }.inc();
        }
    }

    fn charge(&self, status: u16, canary: bool) {
        codes::charge(self.cluster.cluster(), status, Kind { internal: self.internal, canary });
    }
}
