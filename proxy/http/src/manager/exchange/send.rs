//! The response on its way to the client: its base headers, head and body as the client takes them.

use std::future::poll_fn;
use std::task::Poll;

use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use sampan_codec::{Body, Frame, ResetReason};
use sampan_core::clock;
use sampan_core::drain::Signal;
use sampan_core::header::HeaderId;
use sampan_core::stream_info::{Protocol, ResponseFlag};
use sampan_core::time::timeout_at;

use super::watch::{PumpEnd, poll_watch};
use super::{Exchange, Fate};
use crate::filter::Response;
use crate::manager::config::ServerHeader;
use crate::manager::request;
use crate::manager::responder::Responder;

impl Exchange {
    /// Writes head and body as the client takes them.
    pub(super) async fn send(
        mut self: Box<Self>,
        mut response: Response,
        responder: &mut Responder,
        drain: &Signal,
    ) -> Fate {
        let mut end = response.body.is_end();
        self.decorate(&mut response, responder, drain);
        response.headers.remove_broken();
        let status = response.status;
        self.stream.manager.stats.charge(status);
        self.stream.manager.listener_stats.charge(status);
        self.stream.info.response_code = status;
        self.stream.info.first_downstream_tx = Some(clock::recent());
        if self.stream.head_request && !end {
            // The codec sends no body; the upstream has none either. A local reply's is only measured.
            response.body = Body::Empty;
            end = true;
        }
        match responder.send_head(status, &response.headers, end, response.tunnel) {
            Ok(bytes) => self.stream.info.bytes.header_sent = bytes,
            Err(reason) => return self.gone(reason, responder),
        }
        self.response = Some(response.headers);
        if response.tunnel {
            self.stream.manager.stats.downstream_cx_upgrades_active.inc();
            if self.stream.manager.log_on_tunnel {
                self.log(AccessLogType::DownstreamTunnelSuccessfullyEstablished);
            }
        }
        let mut body = response.body;
        let sent = if end { Ok(()) } else { self.pump_and_log(&mut body, responder).await };
        if response.tunnel {
            self.stream.manager.stats.downstream_cx_upgrades_active.dec();
            self.close = true;
        }
        drop(body);
        match sent {
            Ok(()) => self.complete(responder).await,
            Err(PumpEnd::Client(reason)) => self.gone(reason, responder),
            // Within its request's body.
            Err(PumpEnd::Body(_)) if responder.is_gone() => {
                self.gone(ResetReason::ConnectionTermination, responder)
            }
            Err(PumpEnd::Body(error)) => {
                // What came before is still the client's, and counts.
                let _ = poll_fn(|cx| Poll::Ready(responder.poll_flush(cx))).await;
                self.broken(error, responder)
            }
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

    /// Moves the body until its end, and logs every so often.
    async fn pump_and_log(&mut self, body: &mut Body, responder: &mut Responder) -> Result<(), PumpEnd> {
        let Some(interval) = self.stream.manager.log_interval else {
            return self.pump(body, responder).await;
        };
        let mut due = self.stream.info.start;
        loop {
            while due <= clock::recent() {
                due += interval;
            }
            match timeout_at(due, self.pump(body, responder)).await {
                Ok(sent) => return sent,
                Err(_) => {
                    clock::tick();
                    self.count_wire(responder);
                    self.count_upstream();
                    self.log(AccessLogType::DownstreamPeriodic);
                }
            }
        }
    }

    /// Moves the body until its end. Whoever drops this may begin anew.
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
                                t.remove_broken();
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
    async fn complete(mut self: Box<Self>, responder: &mut Responder) -> Fate {
        let timer = self.stream.timer.clone();
        let mut waited = false;
        let flushed = poll_fn(|cx| match responder.poll_flush(cx) {
            Poll::Ready(result) => Poll::Ready(result.is_ok()),
            // Of what the deadline of a drain cuts off here nobody knows, as in Envoy.
            Poll::Pending if responder.is_closing() => Poll::Ready(true),
            Poll::Pending => {
                waited = true;
                timer.poll_expired(cx).map(|_| false)
            }
        })
        .await;
        let now = if waited { clock::tick() } else { clock::recent() };
        self.stream.info.last_downstream_tx = Some(now);
        self.count_wire(responder);
        if !flushed {
            // To Envoy's HTTP/1 codec a response is over when its last byte is queued: nobody tells of what became of that.
            if let Responder::H2(_) = responder {
                self.stream.info.flags.set(ResponseFlag::DownstreamConnectionTermination);
            }
            return Fate::Abort;
        }
        let incomplete = match responder {
            Responder::H1(connection, ..) => !connection.request_done(),
            Responder::H2(h2) => {
                if self.stream.info.last_downstream_rx.is_none() {
                    let stats = &self.stream.manager.stats;
                    stats.downstream_rq_response_before_rq_complete.inc();
                    // The codec tells of the reset with which it ends what it will not read.
                    let connected = self.stream.info.response_code < 300
                        && self.stream.upgrade.as_deref() == Some("connect");
                    if !connected {
                        stats.downstream_rq_rx_reset.inc();
                    }
                }
                // The connection's task accounts for it when its last frame has left.
                h2.finished = Some(self);
                return Fate::Keep;
            }
        };
        if incomplete {
            // The codec resets what it will not read to its end.
            self.stream.manager.stats.downstream_rq_rx_reset.inc();
        }
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
    fn decorate(&mut self, response: &mut Response, responder: &Responder, drain: &Signal) {
        let stream = &self.stream;
        let manager = &stream.manager;
        let headers = &mut response.headers;
        if !headers.contains(HeaderId::DATE) {
            crate::manager::date::with(|date| headers.trusted(|h| h.append(HeaderId::DATE, date)));
        }
        match manager.server_header {
            ServerHeader::Overwrite => {
                headers.trusted(|h| h.set(HeaderId::SERVER, &manager.server_name));
            }
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
        if let Some(proxy_status) = &manager.proxy_status
            && let Some(status) = proxy_status.apply(&stream.info, headers)
        {
            response.status = status;
        }
        let connection = match responder {
            Responder::H1(connection, _, ends_at) => {
                if !self.close && ends_at.is_some_and(|at| clock::recent() >= at) {
                    manager.stats.downstream_cx_max_duration_reached.inc();
                    (self.close, self.drained) = (true, true);
                }
                connection
            }
            Responder::H2(h2) => {
                if !h2.shared.is_leaving() && manager.asks_to_go(drain, &stream.worker) {
                    h2.shared.leave();
                }
                return;
            }
        };
        if !self.close && manager.asks_to_go(drain, &stream.worker) {
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
