//! A connection under the manager: which codec, what is counted of it, and how a head begins an exchange.
//!
//! [`h1`] and [`h2`] take its exchanges off it.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use sampan_codec::Body;
use sampan_codec::h1::RequestHead;
use sampan_core::drain::Signal;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::{ConnectionInfo, Protocol, StreamInfo};
use sampan_listener::{ConnectionMetadata, Downstream, Held, Refusal, Worker};
use sampan_tls::Transport;

use super::config::{Codec, Manager};
use super::exchange::Exchange;
use super::responder::Responder;
use super::{h1, h2};
use crate::boxed::boxed;
use crate::stream::Stream;
use crate::timer::Timer;

const PREFACE: &[u8] = b"PRI * HTTP/2";

/// What all exchanges of a connection share.
pub(super) struct Connection {
    pub(super) manager: Arc<Manager>,
    info: Rc<ConnectionInfo>,
    pub(super) worker: Rc<Worker>,
    pub(super) drain: Signal,
    /// When `max_connection_duration` has passed.
    pub(super) ends_at: Option<Instant>,
    /// HTTP/2 streams outlive their connection by a moment, and a drain waits for their accounting too.
    _held: Held,
}

/// Serves a connection to its end.
pub async fn serve(manager: Arc<Manager>, downstream: Downstream, worker: Rc<Worker>) {
    let Downstream { transport, info, drain, held, refusal, over, metadata, .. } = downstream;
    if let Some(metadata) = metadata {
        info.slots.get_or_insert_with(|| ConnectionMetadata(metadata));
    }
    let mut counted = Counted::new(&manager, info.tls.is_some());
    let ends_at = manager.limits.connection_duration(|| worker.random()).map(|time| counted.start + time);
    if over {
        return;
    }
    if let Some(refusal) = refusal {
        Box::pin(refused(&refusal, transport, &manager)).await;
        return;
    }
    let h2 = match manager.codec {
        Codec::Http1 => false,
        Codec::Http2 => true,
        Codec::Auto => match detect_h2(&transport, &info, &manager, &drain, ends_at).await {
            Some(h2) => h2,
            None => return,
        },
    };
    counted.codec(h2);
    let connection = Connection { manager: manager.clone(), info, worker, drain, ends_at, _held: held };
    if h2 {
        // Its state is the larger by far, and HTTP/1's connections must not pay for it.
        Box::pin(h2::serve(connection, transport)).await;
    } else {
        h1::serve(connection, transport, &mut counted.remote).await;
    }
}

/// Waits for the first byte of a client that a network filter refuses, as long as it would wait for any.
async fn refused(refusal: &Refusal, mut transport: Transport, manager: &Manager) {
    let end = refusal.in_force(&mut transport, false);
    let limit = manager.limits.idle_timeout.unwrap_or(Duration::MAX);
    if sampan_core::time::timeout(limit, end).await.is_err() {
        manager.stats.downstream_cx_idle_timeout.inc();
    }
}

/// Whether the client speaks HTTP/2: by ALPN, by a listener filter's finding, by its first bytes. `None`: it left.
async fn detect_h2(
    transport: &Transport,
    info: &ConnectionInfo,
    manager: &Manager,
    drain: &Signal,
    ends_at: Option<Instant>,
) -> Option<bool> {
    if let Some(alpn) = info.tls.as_ref().and_then(|tls| tls.alpn.as_deref()) {
        return Some(alpn == "h2");
    }
    let Transport::Tcp(tcp) = transport else { return Some(false) };
    let timer = Timer::default();
    let deadline = manager.limits.idle_timeout.map(|d| Instant::now() + d);
    let mut first = [0u8; PREFACE.len()];
    let n = {
        let mut peek = pin!(tcp.peek(&mut first));
        poll_fn(|cx| {
            if let Poll::Ready(n) = peek.as_mut().poll(cx) {
                return Poll::Ready(n.ok());
            }
            if timer.poll(cx, deadline).is_ready() {
                manager.stats.downstream_cx_idle_timeout.inc();
                return Poll::Ready(None);
            }
            if timer.poll(cx, ends_at).is_ready() {
                manager.stats.downstream_cx_max_duration_reached.inc();
                return Poll::Ready(None);
            }
            if drain.ends_idle() { Poll::Ready(None) } else { Poll::Pending }
        })
        .await?
    };
    Some(n == PREFACE.len() && first == PREFACE)
}

/// Counts the connection for as long as it lives.
struct Counted<'m> {
    manager: &'m Manager,
    tls: bool,
    /// Which codec, once it is known.
    h2: Option<bool>,
    /// The client closed it; HTTP/2 counts its ends itself.
    remote: bool,
    start: Instant,
}

impl<'m> Counted<'m> {
    fn new(manager: &'m Manager, tls: bool) -> Self {
        let stats = &manager.stats;
        stats.downstream_cx_total.inc();
        stats.downstream_cx_active.inc();
        if tls {
            stats.downstream_cx_ssl_total.inc();
            stats.downstream_cx_ssl_active.inc();
        }
        Self { manager, tls, h2: None, remote: false, start: Instant::now() }
    }

    fn codec(&mut self, h2: bool) {
        let stats = &self.manager.stats;
        self.h2 = Some(h2);
        if h2 {
            stats.downstream_cx_http2_total.inc();
            stats.downstream_cx_http2_active.inc();
        } else {
            stats.downstream_cx_http1_total.inc();
            stats.downstream_cx_http1_active.inc();
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let stats = &self.manager.stats;
        stats.downstream_cx_active.dec();
        stats.downstream_cx_destroy.inc();
        if self.tls {
            stats.downstream_cx_ssl_active.dec();
        }
        if self.h2 == Some(true) {
            stats.downstream_cx_http2_active.dec();
        } else {
            if self.h2.is_some() {
                stats.downstream_cx_http1_active.dec();
            }
            if self.remote {
                stats.downstream_cx_destroy_remote.inc();
            } else {
                stats.downstream_cx_destroy_local.inc();
            }
        }
        stats.downstream_cx_length_ms.record(self.start.elapsed().as_millis() as u64);
    }
}

/// The stream of a request, whatever the codec.
pub(super) fn stream(
    connection: &Connection,
    request: HeaderMap,
    body: Body,
    protocol: Protocol,
    timer: &Timer,
) -> Box<Stream> {
    let manager = &connection.manager;
    let id = connection.worker.random();
    let stream = boxed(|| Stream {
        grpc: Stream::is_grpc(&request),
        head_request: request.get(HeaderId::METHOD) == Some(b"HEAD"),
        upgrade: None,
        connect_port: None,
        resumed: None,
        trace: None,
        operation_set: false,
        override_host: None,
        redirected: None,
        routes: manager.routes.table(&request),
        route: None,
        worker: connection.worker.clone(),
        manager: manager.clone(),
        timer: timer.clone(),
        request,
        body,
        info: StreamInfo::new(id, connection.info.clone(), Some(protocol)),
    });
    let (limits, start) = (&manager.limits, stream.info.start);
    timer.begin(start, limits.stream_idle_timeout, limits.max_stream_duration, limits.request_timeout);
    stream
}

/// The exchange that a head begins.
pub(super) fn exchange(
    connection: &Connection,
    head: RequestHead,
    body: Body,
    timer: &Timer,
    responder: &Responder,
) -> Box<Exchange> {
    let RequestHead { headers, protocol, end, upgrade, bytes, header_bytes, .. } = head;
    let mut stream = stream(connection, headers, body, protocol, timer);
    stream.info.bytes.header_received = header_bytes as u64;
    if end {
        stream.info.last_downstream_rx = Some(stream.info.start);
        timer.request_done();
    }
    if upgrade {
        stream.upgrade = Some(upgrade_type(&stream.request));
    }
    Exchange::new(stream, responder, bytes as u64)
}

/// What the client wants to upgrade to, lower case.
fn upgrade_type(headers: &HeaderMap) -> Box<str> {
    let wanted = headers.get(HeaderId::UPGRADE).unwrap_or(b"connect");
    String::from_utf8_lossy(wanted).to_ascii_lowercase().into_boxed_str()
}
