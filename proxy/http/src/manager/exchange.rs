//! One exchange, from a request's head to the last byte of its response: a straight function of named phases.
//!
//! ```text
//!   prepare   checks, normalisation, x-forwarded-*, route           (request.rs)
//!   process   filters in order, router; filters in reverse          (filters.rs; a reply of ours: reply.rs)
//!             both again for an internal redirect, which is a stream of its own to filters, log and counters
//!   send      head, then frames as the client takes them            (send.rs)
//!   account   counters, histogram, access log                       (Drop: no exit escapes it; bad ends: ending.rs)
//! ```
//!
//! Wherever it waits, the client's end and the deadlines end it too (watch.rs).

mod ending;
mod filters;
mod reply;
mod send;
mod watch;

use std::borrow::Cow;

use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use sampan_codec::ResetReason;
use sampan_core::clock;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::Protocol;
use smallvec::SmallVec;

use super::request;
use super::responder::Responder;
use crate::boxed::boxed;
use crate::filter::{LocalReply, State};
use crate::router;
use crate::stream::Stream;
use crate::timer::Expired;

/// What becomes of the connection (HTTP/1) behind an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It may carry another.
    Keep,
    /// It is closed when what is queued was written.
    Close,
    /// The same, but the client, who may still be sending, gets `delayed_close_timeout` to see the response.
    Linger,
    /// It is closed at once.
    Abort,
}

/// Why processing ended without a response from the chain.
enum Failure {
    Reply(Box<LocalReply>),
    Expired(Expired),
    Gone(ResetReason),
    Reset,
    /// The stream has become another request, which is to be served in its place.
    Follow(Box<router::Followed>),
}

/// An exchange under way; dropping it accounts for it.
pub struct Exchange {
    /// What filters see.
    pub stream: Box<Stream>,
    states: SmallVec<[State; 6]>,
    response: Option<HeaderMap>,
    trailers: Option<HeaderMap>,
    close: bool,
    /// The response was there before the client could have sent more: nothing was waited for.
    at_once: bool,
    /// It was the drain that asked to close.
    drained: bool,
    wire_before: (u64, u64),
}

impl Exchange {
    /// Begins the accounting. Boxed: it goes through several hands, each of which would keep room for it.
    ///
    /// `head`: bytes of the request that were read from an HTTP/1 connection already.
    pub fn new(stream: Box<Stream>, responder: &Responder, head: u64) -> Box<Self> {
        let (read, written) = responder.wire_bytes().unwrap_or_default();
        Self::begin(stream, (read.saturating_sub(head), written))
    }

    fn begin(stream: Box<Stream>, wire_before: (u64, u64)) -> Box<Self> {
        count_begin(&stream);
        boxed(|| Self {
            states: SmallVec::new(),
            response: None,
            trailers: None,
            close: false,
            at_once: false,
            drained: false,
            wire_before,
            stream,
        })
    }

    /// The response asks the client to go (HTTP/1). Where a drain wants it, the client closes.
    pub fn ask_to_go(&mut self, drained: bool) {
        self.close = true;
        self.drained |= drained;
    }

    /// Serves the exchange to its end.
    pub async fn serve(
        mut self: Box<Self>,
        responder: &mut Responder,
        drain: &sampan_core::drain::Signal,
    ) -> Fate {
        let protocol = self.stream.info.protocol.unwrap_or(Protocol::Http11);
        self.close |= request::wants_close(protocol, &self.stream.request);
        self.answer_expect(responder);
        let mut prepared = self.prepare();
        let result = loop {
            if let Err(reply) = prepared {
                break self.finish_response(Err(Failure::Reply(Box::new(reply))), responder, false).await;
            }
            match self.process(responder).await {
                Err(Failure::Follow(followed)) => prepared = self.follow(*followed, responder),
                processed => break self.finish_response(processed, responder, true).await,
            }
        };
        match result {
            Ok(response) => self.send(response, responder, drain).await,
            Err(reason) => self.gone(reason, responder),
        }
    }

    /// An internal redirect: what was served so far ends here, but for its response; the stream begins anew as the
    /// request that it has become. What only a client's own request needs (`x-forwarded-*`, a request id) is there.
    fn follow(&mut self, followed: router::Followed, responder: &Responder) -> Result<(), LocalReply> {
        self.response = Some(followed.headers);
        self.stream.info.response_code = followed.status;
        self.stream.info.details = Some(Cow::Borrowed("internal_redirect"));
        self.count_wire(responder);
        self.end();
        self.response = None;
        let stream = &mut self.stream;
        stream.info = stream.info.again(stream.worker.random());
        stream.routes = stream.manager.routes.table(&stream.request);
        stream.route = None;
        stream.resumed = None;
        stream.head_request = stream.request.get(HeaderId::METHOD) == Some(b"HEAD");
        let limits = &stream.manager.limits;
        stream.timer.begin(clock::tick(), limits.stream_idle_timeout, limits.max_stream_duration, None);
        count_begin(stream);
        request::normalize(&stream.manager, &mut stream.request, &stream.info, stream.grpc)?;
        stream.refresh_route();
        if let Some(tracing) = &stream.manager.clone().tracing {
            tracing.begin(stream);
        }
        if stream.manager.log_on_new_request {
            self.log(AccessLogType::DownstreamStart);
        }
        Ok(())
    }

    /// A reply to what the codec refused: no filter has seen it.
    pub async fn refuse(
        mut self: Box<Self>,
        mut reply: LocalReply,
        responder: &mut Responder,
        drain: &sampan_core::drain::Signal,
    ) -> Fate {
        self.close = true;
        // The request was never complete.
        let stats = &self.stream.manager.stats;
        stats.downstream_rq_response_before_rq_complete.inc();
        stats.downstream_rq_rx_reset.inc();
        // The reply's own body is formatted without it.
        let flag = reply.flag.take();
        let response = self.finish_response(Err(Failure::Reply(Box::new(reply))), responder, false).await;
        if let Some(flag) = flag {
            self.stream.info.flags.set(flag);
        }
        match response {
            Ok(response) => self.send(response, responder, drain).await,
            Err(reason) => self.gone(reason, responder),
        }
    }

    /// `expect: 100-continue` is answered here unless the upstream shall do it.
    fn answer_expect(&mut self, responder: &mut Responder) {
        let stream = &mut self.stream;
        let expects =
            stream.request.get(HeaderId::EXPECT).is_some_and(|v| v.eq_ignore_ascii_case(b"100-continue"));
        if expects && !stream.manager.proxy_100_continue {
            stream.manager.stats.charge(100);
            stream.manager.listener_stats.charge(100);
            responder.send_informational(100, &HeaderMap::new());
            stream.request.remove(HeaderId::EXPECT);
        }
    }

    fn prepare(&mut self) -> Result<(), LocalReply> {
        let stream = &mut self.stream;
        let manager = stream.manager.clone();
        let worker = stream.worker.clone();
        if let Some(overload) = &manager.overload
            && overload.stop_accepting_requests.hits(|| worker.random())
        {
            manager.stats.downstream_rq_overload_close.inc();
            let mut reply = LocalReply::new(503, "overload").body("envoy overloaded");
            if manager.append_local_overload {
                reply.headers.push((HeaderName::new("x-envoy-local-overloaded"), b"true".to_vec()));
            }
            return Err(reply);
        }
        let table = stream.routes.clone();
        stream.connect_port = request::normalize(&manager, &mut stream.request, &stream.info, stream.grpc)?;
        request::extend(
            &manager,
            &mut stream.request,
            &mut stream.info,
            table.internal_only_headers(),
            || worker.random(),
        )
        .inspect_err(|_| manager.stats.downstream_rq_rejected_via_ip_detection.inc())?;
        stream.refresh_route();
        if let Some(tracing) = &manager.tracing {
            tracing.begin(stream);
        }
        if manager.log_on_new_request {
            self.log(AccessLogType::DownstreamStart);
        }
        Ok(())
    }
}

fn count_begin(stream: &Stream) {
    let stats = &stream.manager.stats;
    stats.downstream_rq_total.inc();
    stats.downstream_rq_active.inc();
    match stream.info.protocol {
        Some(Protocol::Http2) => stats.downstream_rq_http2_total.inc(),
        Some(Protocol::Http3) => stats.downstream_rq_http3_total.inc(),
        _ => stats.downstream_rq_http1_total.inc(),
    }
}

impl Exchange {
    /// Brings the bytes that the task's timer knows of up to date.
    fn count_upstream(&mut self) {
        let (timer, bytes) = (&self.stream.timer, &mut self.stream.info.bytes);
        if let Some((sent, received)) = timer.upstream_headers() {
            bytes.upstream_header_sent = sent;
            bytes.upstream_header_received = received;
        }
        (bytes.upstream_wire_sent, bytes.upstream_wire_received) = timer.upstream_wire();
        bytes.received = bytes.received.max(timer.received());
    }

    /// The filters' end, counters, the log.
    fn end(&mut self) {
        let stream = &mut self.stream;
        let manager = stream.manager.clone();
        if let Some(upstream) = &mut stream.info.upstream {
            upstream.last_rx = stream.timer.upstream_end().or(upstream.last_rx);
        }
        let chain = Self::chain_of(stream, &manager);
        for (named, state) in chain.filters.iter().zip(self.states.iter_mut()) {
            if state.is_some() {
                named.filter.on_end(stream, state);
            }
        }
        // None where no filter has seen the request.
        let passed = self.states.len();
        self.states.clear();
        let now = stream.info.last_downstream_tx.unwrap_or_else(clock::tick);
        stream.info.end = Some(now);
        manager.stats.downstream_rq_active.dec();
        manager.stats.downstream_rq_time.record((now - stream.info.start).as_millis() as u64);
        router::charge_end(stream, self.response.as_ref());
        self.count_upstream();
        if passed > 0 {
            let (stream, context) = (&self.stream, self.facts(AccessLogType::DownstreamEnd));
            for named in Self::chain_of(stream, &manager).filters.iter().take(passed) {
                if !stream.filter_disabled(named) {
                    named.filter.on_log(&context);
                }
            }
        }
        if let Some(tracing) = &manager.tracing {
            tracing.finish(&self.stream, &self.facts(AccessLogType::DownstreamEnd));
        }
        self.log(AccessLogType::DownstreamEnd);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.end();
        std::mem::take(&mut self.stream.request).recycle();
        if let Some(response) = self.response.take() {
            response.recycle();
        }
    }
}
