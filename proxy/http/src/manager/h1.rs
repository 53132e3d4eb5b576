//! A connection of HTTP/1: one exchange after the other, until one of them, a limit, a drain or the client ends it.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use sampan_codec::h1::{HeadError, RequestHead, ServerConnection, UNDERSCORE};
use sampan_codec::{Body, CodecError};
use sampan_core::clock;
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::{Protocol, ResponseFlag};
use sampan_tls::Transport;

use super::config::Manager;
use super::connection::{Connection, exchange, stream};
use super::exchange::{Exchange, Fate};
use super::responder::Responder;
use crate::boxed::boxed;
use crate::filter::LocalReply;
use crate::timer::Timer;

/// Serves an HTTP/1 connection; `remote` is set where the client closes it.
pub(super) async fn serve(connection: Connection, transport: Transport, remote: &mut bool) {
    let manager = connection.manager.clone();
    let codec = ServerConnection::new(transport, Rc::new(manager.h1.clone()));
    let stats = manager.h1_stats();
    clock::tick();
    let timer = Timer::default();
    let mut served = 0u32;
    let mut going = Going::new(&connection);
    // What an exchange under way is told by its age.
    let ends_at = going.ends_at.filter(|_| !manager.limits.http1_safe_max_connection_duration);
    let mut responder = Responder::H1(codec.clone(), connection.drain.clone(), ends_at);
    loop {
        let limits = &manager.limits;
        // The clock was read when the exchange before was complete.
        let waiting_since = clock::recent();
        let mut idle_at = limits.idle_timeout.map(|d| waiting_since + d);
        let mut begun_at = codec.has_input().then_some(waiting_since);
        let next = poll_fn(|cx| {
            match codec.poll_head(cx) {
                Poll::Ready(Ok(head)) => return Poll::Ready(Next::Request(head)),
                Poll::Ready(Err(HeadError::Protocol(e))) => return Poll::Ready(Next::Refuse(e)),
                Poll::Ready(Err(HeadError::Closed(_) | HeadError::Io(_))) => {
                    *remote = true;
                    return Poll::Ready(Next::End);
                }
                Poll::Pending => {}
            }
            if begun_at.is_none() && codec.has_input() {
                begun_at = Some(clock::tick());
            }
            let headers_at = begun_at.zip(limits.request_headers_timeout).map(|(at, d)| at + d);
            if timer.poll(cx, headers_at).is_ready() {
                return Poll::Ready(Next::HeaderTimeout);
            }
            if connection.drain.is_closing() {
                return Poll::Ready(Next::End);
            }
            if begun_at.is_some() {
                return Poll::Pending;
            }
            if timer.poll(cx, idle_at).is_ready() {
                manager.stats.downstream_cx_idle_timeout.inc();
                idle_at = None;
                going.start(clock::recent());
            }
            if timer.poll(cx, going.ends_at).is_ready() {
                going.too_old();
            }
            // A client that has sent nothing yet is not waited for.
            let gone = going.at.map(|at| if served == 0 { waiting_since } else { at });
            if timer.poll(cx, gone).is_ready() {
                return Poll::Ready(Next::End);
            }
            if connection.drain.ends_idle() { Poll::Ready(Next::End) } else { Poll::Pending }
        })
        .await;
        served += 1;
        let fate = match next {
            Next::End => break,
            Next::Request(head) => {
                if head.dropped_underscores > 0 {
                    stats.dropped_headers_with_underscores.add(head.dropped_underscores.into());
                }
                let body = if head.end { Body::Empty } else { Body::stream(codec.body()) };
                // The exchange's state is large and an idle connection must not pay for it: it lives on the heap
                // for as long as the exchange does.
                let mut exchange = exchange(&connection, head, body, &timer, &responder);
                going.tell(&mut exchange);
                if count_last(&manager, served) {
                    exchange.ask_to_go(false);
                }
                let exchange = boxed(|| exchange.serve(&mut responder, &connection.drain));
                Box::into_pin(exchange).await
            }
            Next::Refuse(error) => {
                manager.stats.downstream_cx_protocol_error.inc();
                if error.details == UNDERSCORE.details {
                    stats.requests_rejected_with_underscores_in_headers.inc();
                }
                count_last(&manager, served);
                let read = codec.discard_input();
                Box::pin(refuse(&connection, error, read, &timer, &mut responder)).await;
                Fate::Linger
            }
            Next::HeaderTimeout => {
                manager.stats.downstream_rq_header_timeout.inc();
                count_last(&manager, served);
                let read = codec.discard_input();
                Box::pin(header_timeout(&connection, read, &timer, &mut responder)).await;
                Fate::Linger
            }
        };
        if fate != Fate::Keep && codec.is_malformed() {
            manager.stats.downstream_cx_protocol_error.inc();
        }
        match fate {
            Fate::Keep => {}
            Fate::Close | Fate::Linger => {
                *remote = close(&codec, &manager, &timer, fate == Fate::Linger).await;
                break;
            }
            Fate::Abort => {
                *remote = !connection.drain.is_closing();
                break;
            }
        }
    }
    let (read, written) = codec.wire_bytes();
    manager.stats.downstream_cx_rx_bytes_total.add(read);
    manager.stats.downstream_cx_tx_bytes_total.add(written);
}

/// How the wait for a request ended.
enum Next {
    Request(RequestHead),
    Refuse(CodecError),
    HeaderTimeout,
    End,
}

/// How an HTTP/1 connection goes whose time is up: its next response asks the client to, and without one it is closed
/// `drain_timeout` later. Where that must be safe (`http1_safe_max_connection_duration`) only responses ask.
struct Going<'c> {
    connection: &'c Connection,
    /// `max_connection_duration`, until it has passed.
    ends_at: Option<Instant>,
    /// When the connection is closed.
    at: Option<Instant>,
    soft: bool,
}

impl<'c> Going<'c> {
    fn new(connection: &'c Connection) -> Self {
        Self { connection, ends_at: connection.ends_at, at: None, soft: false }
    }

    /// From now on, unless it goes already.
    fn start(&mut self, now: Instant) {
        let Connection { manager, worker, .. } = self.connection;
        self.at.get_or_insert_with(|| now + manager.limits.drain_timeout(|| worker.random()));
    }

    /// The connection has reached its age.
    fn too_old(&mut self) {
        let Some(now) = self.ends_at.take() else { return };
        let manager = &self.connection.manager;
        manager.stats.downstream_cx_max_duration_reached.inc();
        if self.at.is_none() && manager.limits.http1_safe_max_connection_duration {
            self.soft = true;
            manager.stats.downstream_cx_http1_soft_drain.inc();
        } else {
            self.start(now);
        }
    }

    /// What its age, or that it goes, means for an exchange that begins.
    fn tell(&mut self, exchange: &mut Exchange) {
        if self.ends_at.is_some_and(|at| clock::recent() >= at) {
            self.too_old();
        }
        if self.soft || self.at.is_some() {
            exchange.ask_to_go(self.at.is_some());
        }
    }
}

impl Drop for Going<'_> {
    fn drop(&mut self) {
        if self.soft {
            self.connection.manager.stats.downstream_cx_http1_soft_drain.dec();
        }
    }
}

/// Writes what is queued and closes. A client that may still be sending is read from for a while first: a close with
/// bytes unread would be a reset, and the response lost. Tells whether the client was first.
async fn close(codec: &ServerConnection, manager: &Manager, timer: &Timer, linger: bool) -> bool {
    let delay = manager.limits.delayed_close_timeout;
    let deadline = Some(Instant::now() + delay.max(Duration::from_secs(1)));
    let flushed = poll_fn(|cx| match codec.poll_flush(cx) {
        Poll::Ready(result) => Poll::Ready(result.is_ok()),
        Poll::Pending => timer.poll(cx, deadline).map(|()| false),
    })
    .await;
    if !flushed {
        return true;
    }
    let mut remote = false;
    if linger && !delay.is_zero() {
        let deadline = Some(Instant::now() + delay);
        let timed_out = poll_fn(|cx| {
            if codec.poll_discard(cx).is_ready() {
                return Poll::Ready(false);
            }
            timer.poll(cx, deadline).map(|()| true)
        })
        .await;
        if timed_out {
            manager.stats.downstream_cx_delayed_close_timeout.inc();
        }
        remote = !timed_out;
    }
    let deadline = Some(Instant::now() + Duration::from_secs(1));
    poll_fn(|cx| match codec.poll_shutdown(cx) {
        Poll::Ready(_) => Poll::Ready(()),
        Poll::Pending => timer.poll(cx, deadline),
    })
    .await;
    remote
}

/// Counts the request that is the last of its connection's; tells whether it is.
fn count_last(manager: &Manager, served: u32) -> bool {
    let most = manager.limits.max_requests_per_connection;
    let last = most > 0 && served >= most;
    if last {
        manager.stats.downstream_cx_max_requests_reached.inc();
    }
    last
}

/// The text of a status as the body of a codec's refusal.
fn status_text(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "",
    }
}

async fn refuse(
    connection: &Connection,
    error: CodecError,
    read: (u64, u64),
    timer: &Timer,
    responder: &mut Responder,
) -> Fate {
    let reply = LocalReply::new(error.status, error.details)
        .body(status_text(error.status))
        .flag(ResponseFlag::DownstreamProtocolError);
    unread(connection, reply, read, timer, responder).await
}

async fn header_timeout(
    connection: &Connection,
    read: (u64, u64),
    timer: &Timer,
    responder: &mut Responder,
) -> Fate {
    let reply = LocalReply::new(408, "request_header_timeout").body("request header timeout");
    unread(connection, reply, read, timer, responder).await
}

/// Replies to a request that could not be read; `read`: its bytes, and those of its header lines.
async fn unread(
    connection: &Connection,
    reply: LocalReply,
    read: (u64, u64),
    timer: &Timer,
    responder: &mut Responder,
) -> Fate {
    let mut stream = stream(connection, HeaderMap::new(), Body::Empty, Protocol::Http11, timer);
    stream.info.bytes.header_received = read.1;
    Exchange::new(stream, responder, read.0).refuse(reply, responder, &connection.drain).await
}
