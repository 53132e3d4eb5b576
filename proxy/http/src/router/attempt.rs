//! One attempt: host, connection, head and body up, head down.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use sampan_codec::BodyError;
use sampan_codec::h1::ResponseHead;
use sampan_core::clock;
use sampan_core::header::{HeaderId, HeaderName};
use sampan_core::stream_info::Protocol;
use sampan_upstream::{
    Choice, Host, HttpLease, LbContext, Outcome, PreviousPriorities, Resolving, WorkerHost,
};

use super::exchange::Exchange;
use super::failure::{Failure, reset};
use super::upload::Upload;
use super::{Forward, codes};
use crate::filter::LocalReply;
use crate::stream::Stream;

impl Forward<'_> {
    /// One attempt, to the response's head.
    pub(super) async fn attempt(&mut self, upload: &mut Upload) -> Result<(ResponseHead, Exchange), Failure> {
        let host = self.pick().await?;
        self.note_host(&host);
        if self.stream.manager.request.scheme_of_upstream && self.stream.info.attempts == 1 {
            let scheme = if host.is_tls() { "https" } else { "http" };
            self.stream.request.set(HeaderId::SCHEME, scheme);
        }
        self.host = Some(host.clone());
        self.connected = false;
        let lease = self.connection(&host, upload).await?;
        self.connected = true;
        host.report(Outcome::Connected, None);
        self.note_connection(&lease);
        self.counters.begin();
        if self.action.auto_host_rewrite() && !host.host.hostname.is_empty() {
            let name = host.host.hostname.clone();
            self.action.set_host(&mut self.stream.request, name.as_bytes(), true);
        }
        // A tunnel over HTTP/1 has no end but the connection's.
        let end = upload.is_empty() && (self.stream.upgrade.is_none() || matches!(lease, HttpLease::H2(_)));
        let Stream { trace, request, worker, .. } = &mut *self.stream;
        if let Some(trace) = trace {
            if self.config.starts_span {
                trace.start_child(|| worker.random());
            }
            trace.inject(request);
        }
        let first = self.proxy_header(&lease);
        let exchange = Exchange::start(lease, &self.stream.request, end, &first);
        let mut exchange = exchange.map_err(|reason| reset(reason, false))?;
        let now = clock::recent();
        self.stream.info.upstream_mut().first_tx = Some(now);
        if upload.is_received() {
            self.timeouts.request_received(now);
            self.timeouts.attempt_sent(now);
        }
        let mut sent = end;
        let mut last_tx = end.then_some(now);
        let tunnel = self.stream.upgrade.is_some();
        let waits = self.waits_for_tunnel();
        if self.stream.upgrade.as_deref() == Some("websocket") {
            // The host's answer is waited for now, not when the client is done.
            self.timeouts.request_received(now);
            self.timeouts.attempt_sent(now);
        }
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let informed = &mut self.informed;
        let (cluster, manager, internal) = (&self.cluster, &self.stream.manager, self.internal);
        let head = poll_fn(|cx| {
            if !sent && !waits {
                match poll_upload(upload, &mut exchange, tunnel, &timer, cx) {
                    Poll::Ready(Ok(())) => {
                        sent = true;
                        let now = clock::recent();
                        last_tx = Some(now);
                        timeouts.request_received(now);
                        timeouts.attempt_sent(now);
                        timer.request_done();
                    }
                    Poll::Ready(Err(failure)) => return Poll::Ready(Err(failure)),
                    Poll::Pending => {}
                }
            }
            // A failed write may have an answer behind it: the read tells.
            let _ = exchange.poll_flush(cx);
            loop {
                match exchange.poll_head(cx) {
                    // Others are passed over, as by Envoy's codecs.
                    Poll::Ready(Ok(head)) if (100..200).contains(&head.status) && head.status != 101 => {
                        clock::tick();
                        timer.touch();
                        // Only the first is counted and passed on, as in Envoy.
                        if !matches!(head.status, 100 | 102..=104) || std::mem::replace(informed, true) {
                            continue;
                        }
                        codes::charge(
                            cluster.cluster(),
                            head.status,
                            codes::Kind { internal, canary: false },
                        );
                        if manager.proxy_100_continue {
                            manager.stats.charge(head.status);
                            manager.listener_stats.charge(head.status);
                            timer.push_informational(head.status, head.headers);
                        }
                    }
                    Poll::Ready(Ok(head)) => return Poll::Ready(Ok(head)),
                    Poll::Ready(Err(BodyError::Protocol(_) | BodyError::Request(_))) => {
                        return Poll::Ready(Err(Failure::Protocol));
                    }
                    Poll::Ready(Err(BodyError::Reset(reason))) => {
                        return Poll::Ready(Err(reset(reason, true)));
                    }
                    Poll::Ready(Err(BodyError::Timeout)) => return Poll::Ready(Err(Failure::Timeout)),
                    // A client that goes ends this wait, and what was sent counts.
                    Poll::Pending => break exchange.note_wire(&timer),
                }
            }
            match timeouts.poll(&timer, cx) {
                // What has not sent its request yet cannot go on beside another.
                Poll::Ready(Failure::PerTryTimeout | Failure::PerTryIdleTimeout)
                    if timeouts.hedging && !sent =>
                {
                    Poll::Pending
                }
                expired => expired.map(Err),
            }
        })
        .await;
        if head.is_err() {
            exchange.note_wire(&timer);
        }
        self.stream.info.bytes.received = upload.received;
        if upload.is_received() {
            self.received(upload);
        }
        self.stream.info.upstream_mut().last_tx = last_tx;
        let mut head = match head {
            Err(failure @ (Failure::PerTryTimeout | Failure::PerTryIdleTimeout)) if self.timeouts.hedging => {
                self.slow = Some(Box::new(exchange));
                return Err(failure);
            }
            head => head?,
        };
        // A POST whose payload is a TCP stream is a POST to its client.
        head.tunnel &= tunnel;
        let now = clock::tick();
        timer.touch();
        let upstream = self.stream.info.upstream_mut();
        upstream.first_rx = Some(now);
        upstream.last_rx = Some(now).filter(|_| head.end);
        Ok((head, exchange))
    }

    /// Whether nothing but the head may be sent before the host has agreed: a websocket's or CONNECT's bytes would
    /// else reach a host that takes them for a request.
    pub(super) fn waits_for_tunnel(&self) -> bool {
        matches!(self.stream.upgrade.as_deref(), Some("websocket" | "connect"))
    }

    /// A websocket upgrade that an HTTP/1 host neither accepted nor refused with an error: its headers are passed on,
    /// its body is not.
    pub(super) fn unsuccessful_handshake(
        &self,
        head: &ResponseHead,
        exchange: &Exchange,
    ) -> Option<LocalReply> {
        let websocket = self.stream.upgrade.as_deref() == Some("websocket");
        if !websocket || !exchange.is_h1() || head.status == 101 || head.status >= 400 {
            return None;
        }
        let mut reply = LocalReply::new(head.status, "websocket_handshake_unsuccessful");
        for (id, name, value) in head.headers.iter() {
            if !id.is_pseudo() && !matches!(id, HeaderId::CONTENT_LENGTH | HeaderId::CONTENT_TYPE) {
                reply = reply.header(HeaderName::new(name), value);
            }
        }
        Some(reply)
    }

    /// What goes before the payload of a raw TCP stream.
    fn proxy_header(&self, lease: &HttpLease) -> Vec<u8> {
        let HttpLease::Tcp(_) = lease else { return Vec::new() };
        let client = &self.stream.info.connection;
        let (remote, local) = (client.remote.socket_addr(), client.local.socket_addr());
        self.action.connect(&self.stream.request).map_or_else(Vec::new, |c| c.prefix(remote, local))
    }

    fn received(&mut self, upload: &Upload) {
        self.stream.info.bytes.received = upload.received;
        if self.stream.info.last_downstream_rx.is_none() {
            self.stream.info.last_downstream_rx = Some(clock::recent());
            self.stream.timer.request_done();
        }
    }

    /// The attempt's host.
    async fn pick(&mut self) -> Result<Rc<WorkerHost>, Failure> {
        let host = match self.choose() {
            Choice::Host(host) => host,
            Choice::None(details) => return Err(Failure::NoHost(details)),
            // Boxed: few wait.
            Choice::Later(resolving) => Box::pin(self.resolved(resolving)).await?,
        };
        let policy = &self.action.retry;
        if !policy.host_predicates.is_empty() {
            self.tried.push(host.host.clone());
        }
        if let Some(frequency) = policy.previous_priorities {
            let previous = || Box::new(PreviousPriorities::new(frequency));
            self.previous_priorities.get_or_insert_with(previous).attempted(&host.host);
        }
        Ok(host)
    }

    /// The policy's predicates and priorities are for attempts behind the first.
    fn choose(&self) -> Choice {
        let policy = &self.action.retry;
        let again = self.stream.info.attempts > 1;
        let tried = &self.tried;
        let avoid = |host: &Host| policy.host_predicates.iter().any(|p| p.avoids(host, tried));
        let avoids = again && !policy.host_predicates.is_empty();
        let context = LbContext {
            priority: self.priority,
            previous_priorities: self.previous_priorities.as_deref().filter(|_| again),
            exclude: avoids.then_some(&avoid as &dyn Fn(&Host) -> bool),
            // The first pick is none of the attempts at another, in Envoy's count.
            max_attempts: policy.host_attempts + 1,
            hash: self.hash,
            destination: self.cluster.destination(Some(&self.stream.request), &self.stream.info),
            override_host: self.stream.override_host.as_ref().map(|(host, strict)| (&**host, *strict)),
        };
        self.cluster.choose(&context)
    }

    /// The host of a name once it is resolved, while the request's deadlines hold.
    async fn resolved(&mut self, resolving: Resolving) -> Result<Rc<WorkerHost>, Failure> {
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let mut done = std::pin::pin!(resolving.done());
        let entry = poll_fn(|cx| match done.as_mut().poll(cx) {
            Poll::Ready(entry) => Poll::Ready(Ok(entry)),
            Poll::Pending => timeouts.poll(&timer, cx).map(Err),
        });
        let entry = entry.await?;
        clock::tick();
        self.cluster.named(&entry.key).ok_or_else(|| Failure::NoHost(Some(entry.details())))
    }

    /// A connection, while the request's deadlines hold.
    async fn connection(&mut self, host: &Rc<WorkerHost>, upload: &Upload) -> Result<HttpLease, Failure> {
        if upload.is_received() {
            self.timeouts.request_received(self.stream.info.start);
        }
        let h2 = self.stream.info.protocol == Some(Protocol::Http2);
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let priority = self.priority;
        let options = host.options(self.connect_options.as_ref(), &self.stream.info.connection);
        let options = options.as_deref();
        let raw = self.action.connect(&self.stream.request);
        let mut acquire = std::pin::pin!(async {
            match raw {
                None => host.http(priority, h2, options).await,
                Some(_) => {
                    // Boxed: its state is larger than all else here, and few requests are CONNECT.
                    let options = options.cloned().unwrap_or_default();
                    let lease = Box::pin(host.tcp(priority, &options)).await;
                    lease.map(|lease| HttpLease::Tcp(Box::new(lease)))
                }
            }
        });
        let mut waiting_since = None;
        let lease = poll_fn(|cx| match acquire.as_mut().poll(cx) {
            Poll::Ready(Ok(lease)) => Poll::Ready(Ok(lease)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(Failure::of_pool(error))),
            Poll::Pending => {
                waiting_since.get_or_insert_with(Instant::now);
                timeouts.poll(&timer, cx).map(Err)
            }
        })
        .await;
        let waited = waiting_since.map_or(Duration::ZERO, |since| clock::tick().duration_since(since));
        self.stream.info.upstream_mut().pool_wait = Some(waited);
        lease
    }

    fn note_host(&mut self, host: &WorkerHost) {
        let upstream = self.stream.info.upstream_mut();
        upstream.host_metadata = host.metadata();
        let host = &host.host;
        upstream.host = Some((*host.address()).clone());
        upstream.host_name = Some(host.hostname.clone()).filter(|n| !n.is_empty());
        upstream.locality_zone = Some(host.locality.zone.clone()).filter(|z| !z.is_empty());
        upstream.local = None;
        upstream.connection_id = None;
        upstream.transport_failure = None;
        upstream.first_rx = None;
        upstream.last_rx = None;
    }

    fn note_connection(&mut self, lease: &HttpLease) {
        let (info, streams_before) = Exchange::info(lease);
        let upstream = self.stream.info.upstream_mut();
        upstream.local.clone_from(&info.local);
        upstream.connection_id = Some(info.id);
        upstream.tls.clone_from(&info.tls);
        upstream.protocol = Exchange::protocol(lease);
        upstream.streams_before = streams_before;
        if streams_before == 0 {
            upstream.connect_start = Some(info.start);
            upstream.connect_complete = Some(info.connected);
            upstream.handshake_complete = info.handshake;
        }
    }
}

/// Moves the request's body up until it is sent, or the client has no more for now.
pub(super) fn poll_upload(
    upload: &mut Upload,
    exchange: &mut Exchange,
    tunnel: bool,
    timer: &crate::timer::Timer,
    cx: &mut Context<'_>,
) -> Poll<Result<(), Failure>> {
    loop {
        match exchange.poll_ready(cx) {
            Poll::Ready(Ok(())) => {}
            // An answer may lie behind the failed write: the reader decides.
            Poll::Ready(Err(_)) | Poll::Pending => return Poll::Pending,
        }
        let before = (upload.received, upload.is_received());
        match upload.poll_piece(cx) {
            Poll::Ready(Ok(piece)) => {
                clock::tick();
                // What is sent again is no sign of life of the client.
                if before != (upload.received, upload.is_received()) {
                    timer.touch();
                }
                let end = piece.end && !tunnel;
                if piece.frame.is_some() || end {
                    let _ = exchange.send_frame(piece.frame, end);
                }
                if piece.end {
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Downstream(error))),
            Poll::Pending => {
                let _ = exchange.poll_flush(cx);
                return Poll::Pending;
            }
        }
    }
}
