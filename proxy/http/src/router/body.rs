//! The response's body on its way down, while the rest of the request may still be on its way up.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use sampan_codec::{BodyError, BodyStream, Frame};
use sampan_core::clock;
use sampan_core::header::HeaderMap;
use sampan_core::stats::Counter;
use sampan_upstream::Cluster;

use super::attempt::poll_upload;
use super::codes::{self, Kind, RequestCounters};
use super::exchange::Exchange;
use super::failure::Failure;
use super::outlier;
use super::timeouts::Timeouts;
use super::upload::Upload;
use crate::timer::Timer;

/// What an upstream body is made of.
pub(super) struct Parts {
    pub(super) exchange: Exchange,
    pub(super) upload: Upload,
    pub(super) timer: Timer,
    pub(super) deadline: Timeouts,
    pub(super) tunnel: bool,
    /// The host refused an upgrade or CONNECT: what the client sends now is for nobody.
    pub(super) refused: bool,
    /// The response has no body; only the request is still under way.
    pub(super) complete: bool,
    pub(super) counters: RequestCounters,
    /// A gRPC response, whose end tells whether the host has done well; with what counts one that has no end.
    pub(super) grpc: Option<Counter>,
    pub(super) charge: Option<(Arc<Cluster>, Kind, Instant)>,
}

/// The upstream's side of a stream behind the response's head.
pub(super) struct UpstreamBody {
    parts: Parts,
    sent: bool,
    finished: bool,
}

impl Parts {
    fn note_bytes(&mut self) {
        self.timer.set_received(self.upload.received);
        self.exchange.note_wire(&self.timer);
    }

    /// The end of a gRPC response, with its trailers where it had any.
    fn settle(&mut self, trailers: Option<&HeaderMap>) {
        if self.grpc.take().is_none() {
            return;
        }
        let stats = &self.exchange.host().host.stats;
        if trailers.is_some_and(outlier::grpc_succeeds) {
            stats.rq_success.inc()
        } else {
            stats.rq_error.inc()
        }
    }

    /// The response broke off.
    fn broken(&mut self) {
        if let Some(reset) = self.grpc.take() {
            reset.inc();
            self.exchange.host().host.stats.rq_error.inc();
        }
    }

    fn charge_timeout(&self, failure: &Failure) {
        let host = self.exchange.host();
        match failure {
            Failure::PerTryIdleTimeout => host.cluster_stats().upstream_rq_per_try_idle_timeout.inc(),
            _ => {
                host.cluster_stats().upstream_rq_timeout.inc();
                self.counters.inc(|counters| &counters.timeout);
            }
        }
        host.host.stats.rq_timeout.inc();
    }
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        self.parts.note_bytes();
    }
}

impl UpstreamBody {
    #[inline]
    pub(super) fn new(mut parts: Parts) -> Self {
        parts.deadline.response_begun();
        parts.upload.forget();
        if parts.tunnel {
            parts.deadline.tunnel_begun();
        }
        let sent = parts.refused || (parts.upload.is_received() && !parts.tunnel);
        Self { parts, sent, finished: false }
    }

    /// Moves the request on; an error is the client's.
    fn push(&mut self, cx: &mut Context<'_>) -> Result<(), BodyError> {
        if self.sent {
            return Ok(());
        }
        let Parts { exchange, upload, timer, tunnel, .. } = &mut self.parts;
        match poll_upload(upload, exchange, *tunnel, timer, cx) {
            Poll::Ready(Ok(())) => {
                if !*tunnel || exchange.poll_half_close(cx).is_ready() {
                    self.sent = true;
                    timer.request_done();
                }
            }
            Poll::Ready(Err(Failure::Downstream(BodyError::Protocol(error)))) => {
                return Err(BodyError::Request(error));
            }
            Poll::Ready(Err(Failure::Downstream(error))) => return Err(error),
            Poll::Ready(Err(_)) | Poll::Pending => {}
        }
        let _ = exchange.poll_flush(cx);
        Ok(())
    }

    fn finish(&mut self) {
        if self.finished {
            return;
        }
        self.finished = true;
        self.parts.note_bytes();
        self.parts.timer.set_upstream_end();
        self.parts.exchange.finish(self.parts.upload.is_received());
        if let Some((cluster, kind, since)) = self.parts.charge.take() {
            let took = clock::recent().duration_since(since).as_millis() as u64;
            codes::time(&cluster, took, kind);
            self.parts.counters.time(took);
        }
    }
}

impl BodyStream for UpstreamBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if let Err(error) = self.push(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        if self.parts.complete {
            self.finish();
            return Poll::Ready(None);
        }
        match self.parts.exchange.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                clock::tick();
                self.parts.deadline.moved(&self.parts.timer);
                let trailers = match &frame {
                    Frame::Trailers(trailers) => Some(trailers),
                    Frame::Data(_) => None,
                };
                if trailers.is_some() || self.parts.exchange.response_done() {
                    self.parts.settle(trailers);
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.parts.settle(None);
                self.finish();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                self.parts.broken();
                Poll::Ready(Some(Err(error)))
            }
            Poll::Pending => self.parts.deadline.poll(&self.parts.timer, cx).map(|failure| {
                self.parts.charge_timeout(&failure);
                self.parts.broken();
                Some(Err(BodyError::Timeout))
            }),
        }
    }

    fn is_end(&self) -> bool {
        self.finished
    }
}
