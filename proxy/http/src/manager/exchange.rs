//! One exchange, from a request's head to the last byte of its response: a straight function of named phases.
//!
//! ```text
//!   prepare   checks, normalisation, x-forwarded-*, route           (request.rs)
//!   process   filters in order, router; filters in reverse          — watched: deadlines, client gone
//!             both again for an internal redirect, which is a stream of its own to filters, log and counters
//!   send      head, then frames as the client takes them            — watched too
//!   account   counters, histogram, access log                       (Drop: no exit escapes it)
//! ```

mod ending;

use std::borrow::Cow;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use sampan_codec::{Body, BodyError, Frame, ResetReason};
use sampan_core::clock;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::{Protocol, ResponseFlag};
use smallvec::SmallVec;

use super::config::{Chain, ServerHeader};
use super::request;
use super::responder::Responder;
use crate::filter::{LocalReply, Outcome, Response, State, Step};
use crate::router;
use crate::stream::Stream;
use crate::timer::Expired;

const GRPC_DEADLINE_EXCEEDED: u32 = 4;

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
    /// Begins the accounting.
    pub fn new(stream: Box<Stream>, responder: &Responder) -> Self {
        count_begin(&stream);
        let (read, written) = responder.wire_bytes().unwrap_or_default();
        Self {
            states: SmallVec::new(),
            response: None,
            trailers: None,
            close: false,
            at_once: false,
            drained: false,
            // The head has been read already and belongs to this exchange.
            wire_before: (read.saturating_sub(stream.info.bytes.header_received), written),
            stream,
        }
    }

    /// Serves the exchange to its end.
    pub async fn serve(mut self, responder: &mut Responder, drain: &sampan_core::drain::Signal) -> Fate {
        let protocol = self.stream.info.protocol.unwrap_or(Protocol::Http11);
        self.close = request::wants_close(protocol, &self.stream.request);
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
        mut self,
        reply: LocalReply,
        responder: &mut Responder,
        drain: &sampan_core::drain::Signal,
    ) -> Fate {
        self.close = true;
        match self.finish_response(Err(Failure::Reply(Box::new(reply))), responder, false).await {
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

    /// The chain that serves this request: the listener's, or an upgrade's own.
    fn chain<'m>(stream: &Stream, manager: &'m super::Manager) -> Result<&'m Chain, LocalReply> {
        let Some(upgrade) = &stream.upgrade else { return Ok(&manager.chain) };
        let configured = manager.upgrades.get(upgrade);
        let by_route = stream.route.as_ref().and_then(|route| route.upgrade_enabled(upgrade));
        let enabled = by_route.unwrap_or_else(|| configured.is_some_and(|c| c.enabled));
        if !enabled || (configured.is_none() && by_route.is_none()) {
            if stream.route.is_none() {
                return Ok(&manager.chain);
            }
            manager.stats.downstream_rq_ws_on_non_ws_route.inc();
            return Err(LocalReply::new(403, "upgrade_failed"));
        }
        manager.stats.downstream_cx_upgrades_total.inc();
        Ok(configured.and_then(|c| c.chain.as_ref()).unwrap_or(&manager.chain))
    }

    /// Filters in order, then the router.
    async fn process(&mut self, responder: &mut Responder) -> Result<Response, Failure> {
        let manager = self.stream.manager.clone();
        let chain = match Self::chain(&self.stream, &manager) {
            Ok(chain) => chain,
            Err(reply) => {
                self.close = true;
                return Err(Failure::Reply(Box::new(reply)));
            }
        };
        self.states.resize_with(chain.filters.len(), || None);
        let Self { stream, states, .. } = self;
        let timer = stream.timer.clone();
        let run = pin!(async {
            for (named, state) in chain.filters.iter().zip(states.iter_mut()) {
                if stream.filter_disabled(named) {
                    continue;
                }
                let step = named.filter.on_request(stream, state);
                let waits = matches!(step, Step::Wait(_));
                let outcome = step.outcome().await;
                if waits {
                    stream.resumed = Some(clock::tick());
                }
                match outcome {
                    Outcome::Continue => {}
                    Outcome::Reply(reply) => return Err(Failure::Reply(reply)),
                    Outcome::Reset => return Err(Failure::Reset),
                }
            }
            router::forward(stream, &chain.router).await.map_err(|end| match end {
                router::End::Reply(reply) => Failure::Reply(reply),
                router::End::Reset => Failure::Reset,
                router::End::Follow(followed) => Failure::Follow(followed),
            })
        });
        watched(run, responder, &timer).await
    }

    /// Turns a failure into the reply that it means, then lets the response pass the filters in reverse.
    async fn finish_response(
        &mut self,
        processed: Result<Response, Failure>,
        responder: &mut Responder,
        through_filters: bool,
    ) -> Result<Response, ResetReason> {
        let mut response = match processed {
            Ok(response) => response,
            Err(failure) => {
                let reply = match failure {
                    Failure::Gone(reason) => return Err(reason),
                    Failure::Reset | Failure::Follow(_) => return Err(ResetReason::LocalReset),
                    Failure::Reply(reply) => *reply,
                    Failure::Expired(what) => self.expired(what),
                };
                self.local_response(reply)
            }
        };
        if !through_filters {
            return Ok(response);
        }
        match self.filter_response(&mut response, responder).await {
            Ok(()) => {}
            Err(Failure::Gone(reason)) => return Err(reason),
            Err(Failure::Reset | Failure::Follow(_)) => return Err(ResetReason::LocalReset),
            Err(Failure::Reply(reply)) => response = self.local_response(*reply),
            Err(Failure::Expired(what)) => {
                let reply = self.expired(what);
                response = self.local_response(reply);
            }
        }
        Ok(response)
    }

    /// Lets a response's trailers pass the filters in reverse.
    fn pass_trailers(stream: &Stream, response: Option<&HeaderMap>, trailers: &mut HeaderMap) {
        let Some(response) = response else { return };
        for named in Self::chain_of(stream, &stream.manager).filters.iter().rev() {
            if !stream.filter_disabled(named) {
                named.filter.on_response_trailers(stream, response, trailers);
            }
        }
    }

    /// The filters in reverse.
    async fn filter_response(
        &mut self,
        response: &mut Response,
        responder: &mut Responder,
    ) -> Result<(), Failure> {
        let manager = self.stream.manager.clone();
        let chain = Self::chain_of(&self.stream, &manager);
        if chain.filters.is_empty() {
            return Ok(());
        }
        self.states.resize_with(chain.filters.len(), || None);
        let Self { stream, states, .. } = self;
        let timer = stream.timer.clone();
        let run = pin!(async {
            for (named, state) in chain.filters.iter().zip(states.iter_mut()).rev() {
                if stream.filter_disabled(named) {
                    continue;
                }
                match named.filter.on_response(stream, response, state).outcome().await {
                    Outcome::Continue => {}
                    Outcome::Reply(reply) => return Err(Failure::Reply(reply)),
                    Outcome::Reset => return Err(Failure::Reset),
                }
            }
            if response.headers.contains(HeaderId::STATUS) {
                return Ok(());
            }
            let details = "filter_removed_required_response_headers{missing_required_header:_:status}";
            let reply = LocalReply::new(502, details).body("missing required header: :status");
            Err(Failure::Reply(Box::new(reply)))
        });
        watched(run, responder, &timer).await
    }

    /// [`Exchange::chain`] once it was decided.
    fn chain_of<'m>(stream: &Stream, manager: &'m super::Manager) -> &'m Chain {
        let own =
            stream.upgrade.as_ref().and_then(|u| manager.upgrades.get(u)).and_then(|u| u.chain.as_ref());
        own.unwrap_or(&manager.chain)
    }

    /// The reply that a deadline means, with its counters.
    fn expired(&mut self, what: Expired) -> LocalReply {
        let stats = &self.stream.manager.stats;
        match what {
            Expired::Idle => {
                stats.downstream_rq_idle_timeout.inc();
                let reply = LocalReply::new(408, "stream_idle_timeout").body("stream timeout");
                // A request that was wholly received waits for the upstream: that is the gateway's timeout.
                let status = if self.stream.info.last_downstream_rx.is_some() { 504 } else { 408 };
                LocalReply { status, ..reply }.flag(ResponseFlag::StreamIdleTimeout)
            }
            Expired::MaxDuration => {
                stats.downstream_rq_max_duration_reached.inc();
                let done = self.stream.info.last_downstream_rx.is_some();
                let status = if done { 504 } else { 408 };
                let mut reply =
                    LocalReply::new(status, "max_duration_timeout").body("downstream duration timeout");
                reply.grpc_status = Some(GRPC_DEADLINE_EXCEEDED);
                reply
            }
            Expired::Request => {
                stats.downstream_rq_timeout.inc();
                self.close = true;
                LocalReply::new(408, "request_overall_timeout").body("request timeout")
            }
        }
    }

    /// A local reply as a response, and its traces in the stream info.
    fn local_response(&mut self, reply: LocalReply) -> Response {
        let stream = &mut self.stream;
        if let Some(flag) = reply.flag {
            stream.info.flags.set(flag);
        }
        // A bad request may be out of step with its connection (HTTP/1).
        let bad = reply.status == 400
            && stream.info.protocol.is_some_and(|p| p < Protocol::Http2)
            && !stream.manager.stream_errors;
        self.close |= reply.close || bad;
        self.at_once = stream.resumed.is_none() && stream.info.attempts == 0;
        stream.info.details = Some(reply.details.clone());
        let manager = stream.manager.clone();
        manager.local_reply.respond(reply, stream)
    }

    /// Writes head and body as the client takes them.
    async fn send(
        mut self,
        mut response: Response,
        responder: &mut Responder,
        drain: &sampan_core::drain::Signal,
    ) -> Fate {
        let mut end = response.body.is_end();
        self.decorate(&mut response, responder, drain);
        let status = response.status;
        self.stream.manager.stats.charge(status);
        self.stream.manager.listener_stats.charge(status);
        self.stream.info.response_code = status;
        self.stream.info.first_downstream_tx = Some(clock::tick());
        if self.stream.head_request && !end {
            // The codec sends no body; the upstream has none either. A local reply's is only measured.
            response.body = Body::Empty;
            end = true;
        }
        if let Err(reason) = responder.send_head(status, &response.headers, end, response.tunnel) {
            return self.gone(reason, responder);
        }
        self.stream.info.bytes.header_sent = response.headers.byte_size() as u64;
        self.response = Some(response.headers);
        if response.tunnel {
            self.stream.manager.stats.downstream_cx_upgrades_active.inc();
        }
        let mut body = response.body;
        let sent = if end { Ok(()) } else { self.pump(&mut body, responder).await };
        if response.tunnel {
            self.stream.manager.stats.downstream_cx_upgrades_active.dec();
            self.close = true;
        }
        drop(body);
        match sent {
            Ok(()) => self.complete(responder).await,
            Err(PumpEnd::Client(reason)) => self.gone(reason, responder),
            Err(PumpEnd::Body(error)) => self.broken(error, responder),
            Err(PumpEnd::Expired(what)) => {
                // Counted and flagged as before the head; the stream can only be cut now.
                let reply = self.expired(what);
                if let Some(flag) = reply.flag {
                    self.stream.info.flags.set(flag);
                }
                self.stream.info.details = Some(reply.details);
                self.reset(responder);
                if let Responder::H2(h2) = responder {
                    h2.finished = Some(self);
                }
                Fate::Abort
            }
        }
    }

    /// Moves the body until its end.
    async fn pump(&mut self, body: &mut Body, responder: &mut Responder) -> Result<(), PumpEnd> {
        let timer = self.stream.timer.clone();
        let Self { stream, trailers, response, .. } = self;
        poll_fn(|cx| {
            loop {
                match responder.poll_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(reason)) => return Poll::Ready(Err(PumpEnd::Client(reason))),
                    Poll::Pending => return poll_watch(cx, responder, &timer).map(Err),
                }
                match body.poll_frame(cx) {
                    Poll::Ready(Some(Ok(mut frame))) => {
                        timer.touch();
                        let mut end = body.is_end();
                        match &mut frame {
                            Frame::Data(data) => stream.info.bytes.sent += data.len() as u64,
                            Frame::Trailers(t) => {
                                Self::pass_trailers(stream, response.as_ref(), t);
                                *trailers = Some(t.clone());
                                end = true;
                            }
                        }
                        if let Err(reason) = responder.send_frame(Some(frame), end) {
                            return Poll::Ready(Err(PumpEnd::Client(reason)));
                        }
                        if end {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Poll::Ready(None) => {
                        let sent = responder.send_frame(None, true).map_err(PumpEnd::Client);
                        return Poll::Ready(sent);
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(PumpEnd::Body(error))),
                    Poll::Pending => {
                        if let Poll::Ready(Err(reason)) = responder.poll_flush(cx) {
                            return Poll::Ready(Err(PumpEnd::Client(reason)));
                        }
                        return poll_watch(cx, responder, &timer).map(Err);
                    }
                }
            }
        })
        .await
    }

    /// Everything is queued: it is flushed, and the connection's fate told.
    async fn complete(mut self, responder: &mut Responder) -> Fate {
        let timer = self.stream.timer.clone();
        let flushed = poll_fn(|cx| match responder.poll_flush(cx) {
            Poll::Ready(result) => Poll::Ready(result.is_ok()),
            // Of what the deadline of a drain cuts off here nobody knows, as in Envoy.
            Poll::Pending if responder.is_closing() => Poll::Ready(true),
            Poll::Pending => timer.poll_expired(cx).map(|_| false),
        })
        .await;
        self.stream.info.last_downstream_tx = Some(clock::tick());
        self.count_wire(responder);
        if !flushed {
            self.stream.info.flags.set(ResponseFlag::DownstreamConnectionTermination);
            return Fate::Abort;
        }
        let incomplete = match responder {
            Responder::H1(connection, _) => !connection.request_done(),
            Responder::H2(h2) => {
                // The connection's task accounts for it when its last frame has left.
                h2.finished = Some(self);
                return Fate::Keep;
            }
        };
        // Where more may be on its way, and where a client is asked to go, the client closes first, as in Envoy.
        let broken = self.stream.info.flags.has(ResponseFlag::DownstreamProtocolError);
        let linger = incomplete || self.drained || (self.close && (self.at_once || broken));
        match (linger, self.close) {
            (true, _) => Fate::Linger,
            (false, true) => Fate::Close,
            (false, false) => Fate::Keep,
        }
    }

    /// The base headers of every response, and `connection`.
    fn decorate(
        &mut self,
        response: &mut Response,
        responder: &Responder,
        drain: &sampan_core::drain::Signal,
    ) {
        let stream = &self.stream;
        let manager = &stream.manager;
        let headers = &mut response.headers;
        if !headers.contains(HeaderId::DATE) {
            super::date::with(|date| headers.append(HeaderId::DATE, date));
        }
        match manager.server_header {
            ServerHeader::Overwrite => headers.set(HeaderId::SERVER, &manager.server_name),
            ServerHeader::AppendIfAbsent if !headers.contains(HeaderId::SERVER) => {
                headers.append(HeaderId::SERVER, &manager.server_name);
            }
            ServerHeader::AppendIfAbsent | ServerHeader::PassThrough => {}
        }
        // The answer to an upgrade keeps its headers; CONNECT has none.
        let upgrade =
            stream.upgrade.is_some() && request::is_upgrade(&stream.request) && request::is_upgrade(headers);
        let tunnel = upgrade || response.tunnel;
        if !upgrade {
            headers.remove(HeaderId::CONNECTION);
            headers.remove(HeaderId::UPGRADE);
        }
        for id in [HeaderId::TRANSFER_ENCODING, HeaderId::KEEP_ALIVE, HeaderId::PROXY_CONNECTION] {
            headers.remove(id);
        }
        if upgrade && response.status >= 200 && !headers.contains(HeaderId::CONTENT_LENGTH) {
            headers.set(HeaderId::CONTENT_LENGTH, "0");
        }
        let forced = manager.request_id_in_response || stream.request.contains(HeaderId::X_ENVOY_FORCE_TRACE);
        if forced && let Some(id) = stream.request.get(HeaderId::X_REQUEST_ID) {
            headers.set(HeaderId::X_REQUEST_ID, id);
        }
        if let Some(tracing) = &manager.tracing {
            tracing.respond(stream, headers);
        }
        if !manager.via.is_empty() {
            headers.append_to_value(HeaderId::VIA, ", ", manager.via.as_bytes());
        }
        let Responder::H1(connection, _) = responder else { return };
        // Connections go elsewhere while a health check is told to fail, as in Envoy.
        let failed = stream.worker.server.health_check_failed.load(std::sync::atomic::Ordering::Relaxed);
        if (failed || drain.is_draining()) && !self.close {
            manager.stats.downstream_cx_drain_close.inc();
            self.close = true;
            self.drained = true;
        }
        if !self.close && manager.overload_ends_keepalive(&stream.worker) {
            self.close = true;
            self.drained = true;
        }
        if stream.info.protocol == Some(Protocol::Http10) {
            self.close |= !headers.contains(HeaderId::CONTENT_LENGTH);
            if !self.close {
                headers.set(HeaderId::CONNECTION, "keep-alive");
            }
        }
        if !connection.request_done() {
            manager.stats.downstream_rq_response_before_rq_complete.inc();
            self.close = true;
        }
        if self.close && !tunnel {
            headers.set(HeaderId::CONNECTION, "close");
        }
    }
}

enum PumpEnd {
    Client(ResetReason),
    Body(BodyError),
    Expired(Expired),
}

/// The client's end and the deadlines, while something else is pending.
fn poll_watch(cx: &mut Context<'_>, responder: &mut Responder, timer: &crate::timer::Timer) -> Poll<PumpEnd> {
    if let Poll::Ready(reason) = responder.poll_gone(cx) {
        return Poll::Ready(PumpEnd::Client(reason));
    }
    timer.poll_expired(cx).map(PumpEnd::Expired)
}

/// Runs `work` while the client stays and no deadline passes; sends informational heads meanwhile.
async fn watched<T>(
    mut work: Pin<&mut impl Future<Output = Result<T, Failure>>>,
    responder: &mut Responder,
    timer: &crate::timer::Timer,
) -> Result<T, Failure> {
    poll_fn(|cx| {
        let done = work.as_mut().poll(cx);
        timer.take_informational(|status, headers| responder.send_informational(status, headers));
        if let Poll::Ready(result) = done {
            return Poll::Ready(result);
        }
        if let Poll::Ready(Err(reason)) = responder.poll_flush(cx) {
            return Poll::Ready(Err(Failure::Gone(reason)));
        }
        match poll_watch(cx, responder, timer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(PumpEnd::Expired(what)) => Poll::Ready(Err(Failure::Expired(what))),
            Poll::Ready(PumpEnd::Client(reason)) => Poll::Ready(Err(Failure::Gone(reason))),
            Poll::Ready(PumpEnd::Body(_)) => Poll::Ready(Err(Failure::Reset)),
        }
    })
    .await
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
    /// The filters' end, counters, the log.
    fn end(&mut self) {
        let stream = &mut self.stream;
        let manager = stream.manager.clone();
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
        let (sent, received) = stream.timer.upstream_wire();
        if let Some((sent, received)) = stream.timer.upstream_headers() {
            stream.info.bytes.upstream_header_sent = sent;
            stream.info.bytes.upstream_header_received = received;
        }
        stream.info.bytes.upstream_wire_sent = sent;
        stream.info.bytes.upstream_wire_received = received;
        stream.info.bytes.received = stream.info.bytes.received.max(stream.timer.received());
        if passed > 0 {
            let (stream, context) = (&self.stream, self.facts(AccessLogType::DownstreamEnd));
            for named in Self::chain_of(stream, &manager).filters.iter().take(passed) {
                if !stream.filter_disabled(named) {
                    named.filter.on_log(&context);
                }
            }
        }
        self.log(AccessLogType::DownstreamEnd);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.end();
    }
}
