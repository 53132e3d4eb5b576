//! An HTTP/2 connection under the manager: a task that drives it, and one for each of its streams.
//!
//! ```text
//!   accept   streams, each of which becomes a task
//!   settle   finished exchanges whose last frame has left are accounted for: the log knows their bytes then
//!   drain    GOAWAY without a limit, `drain_timeout`, GOAWAY with the last stream, the end with the last stream
//!   end      closed, or the client broke a rule: its streams are told which
//! ```

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use sampan_codec::h2::{self, Accepted, End, Flood};
use sampan_codec::{Body, ResetReason};
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::{Protocol, ResponseFlag};
use sampan_tls::Transport;

use super::connection::{Connection, exchange, stream};
use super::exchange::Exchange;
use super::responder::Responder;
use crate::timer::Timer;

/// Where the process itself drains, its connections' last GOAWAY does not keep it for longer.
const PROCESS_DRAIN: Duration = Duration::from_secs(1);

/// `overload.premature_reset_total_stream_count`
const PREMATURE_COUNT: (&str, u64) = ("overload.premature_reset_total_stream_count", 500);
/// `overload.premature_reset_min_stream_lifetime_seconds`
const PREMATURE_LIFETIME: (&str, u64) = ("overload.premature_reset_min_stream_lifetime_seconds", 1);

/// Why a connection ended, as its streams' logs tell it.
#[derive(Clone, Copy)]
pub struct Ended {
    /// The response flag.
    pub flag: Option<ResponseFlag>,
    /// The response code details.
    pub details: &'static str,
}

/// What Envoy says of most heads that its codec turns away.
const MALFORMED: Ended =
    Ended { flag: Some(ResponseFlag::DownstreamProtocolError), details: "http2.invalid.header.field" };

/// The client has left.
const LEFT: Ended = Ended {
    flag: Some(ResponseFlag::DownstreamConnectionTermination),
    details: "downstream_remote_disconnect",
};

/// What a connection shares with the tasks of its streams.
pub struct Shared {
    connection: Connection,
    active: Cell<u32>,
    finished: RefCell<Vec<Unsent>>,
    /// The connection's own task is at work.
    settling: Cell<bool>,
    /// The connection has ended: nobody settles any more.
    over: Cell<bool>,
    ended: Cell<Option<Ended>>,
    /// Streams that are over, and those of them that were reset before they came to anything (CVE-2023-44487).
    closed: Cell<u64>,
    premature: Cell<u64>,
    too_many_resets: Cell<bool>,
    /// The client is asked to go, or was.
    leaving: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// An exchange that has handed all to the codec, which may still wait for the client's window.
struct Unsent {
    exchange: Box<Exchange>,
    responder: Responder,
    since: Instant,
    _active: ActiveStream,
}

/// Counts a stream for as long as it lives.
struct ActiveStream(Rc<Shared>);

impl ActiveStream {
    fn new(shared: &Rc<Shared>) -> Self {
        shared.active.set(shared.active.get() + 1);
        Self(shared.clone())
    }
}

impl Drop for ActiveStream {
    fn drop(&mut self) {
        let shared = &*self.0;
        shared.active.set(shared.active.get() - 1);
        shared.closed.set(shared.closed.get() + 1);
        shared.judge_resets();
        // The last stream's end may be the connection's; its own task looks by itself.
        if shared.active.get() == 0 && !shared.settling.get() {
            shared.wake();
        }
    }
}

impl Shared {
    /// A stream ended without a response. Envoy compares whole seconds.
    pub fn note_reset(&self, start: Instant) {
        let least = self.connection.worker.runtime.integer(PREMATURE_LIFETIME.0, PREMATURE_LIFETIME.1);
        if start.elapsed().as_secs() <= least {
            self.premature.set(self.premature.get() + 1);
        }
    }

    /// Ends the connection when half of its streams were reset early: of those so far once they are many, before
    /// that of the many that it could still become.
    fn judge_resets(&self) {
        let premature = self.premature.get();
        if premature == 0 || self.too_many_resets.get() {
            return;
        }
        let many = self.connection.worker.runtime.integer(PREMATURE_COUNT.0, PREMATURE_COUNT.1);
        if premature * 2 >= self.closed.get().max(many) {
            self.too_many_resets.set(true);
            self.wake();
        }
    }

    /// Wakes the connection's task.
    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Whether the client is asked to go, or was.
    pub fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Asks the client to go.
    pub fn leave(&self) {
        self.leaving.set(true);
        self.wake();
    }

    /// Whether the connection has ended.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Why the connection ended, where it was not the client who left.
    pub fn ended(&self) -> Option<Ended> {
        self.ended.get()
    }

    /// Accounts for streams that came and were handed to nobody.
    fn note_unseen(&self, count: usize, sent: u64, why: Ended) {
        for _ in 0..count {
            let timer = Timer::default();
            let stream = stream(&self.connection, HeaderMap::default(), Body::Empty, Protocol::Http2, &timer);
            self.note_reset(stream.info.start);
            Exchange::unseen(stream, sent, why);
        }
    }

    /// Accounts for the exchanges whose last frame was written, resets those that have waited for too long, and
    /// has the task woken when the next one will have.
    fn settle(&self, cx: &mut Context<'_>, timer: &Timer) {
        if self.finished.borrow().is_empty() {
            return;
        }
        self.settling.set(true);
        let mut next = None;
        self.finished.borrow_mut().retain_mut(|unsent| {
            let Responder::H2(h2) = &mut unsent.responder else { return false };
            // What could be sent of it was sent by now.
            if let Some(reason) = h2.cut.take() {
                h2.stream.reset(reason);
            }
            let meter = h2.stream.meter();
            if let Some(reason) = meter.reset_by_peer {
                unsent.exchange.note_gone(reason, &h2.shared);
            }
            if meter.ended || meter.reset_by_peer.is_some() {
                unsent.exchange.note_meter(&meter);
                return false;
            }
            if let Some(at) = unsent.exchange.flush_timeout().map(|limit| unsent.since + limit) {
                if at <= Instant::now() {
                    h2.stream.stats().tx_flush_timeout.inc();
                    h2.stream.reset(h2::Reason::INTERNAL_ERROR);
                    return false;
                }
                next = Some(next.map_or(at, |next: Instant| next.min(at)));
            }
            true
        });
        self.settling.set(false);
        // A flush that is overdue is found at the next look.
        let _ = timer.poll(cx, next);
    }
}

/// How far the connection is in going away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drain {
    No,
    /// Announced; no more streams from then on.
    Noticed(Instant),
    /// The last GOAWAY is out.
    Final,
}

/// What the connection's task does next.
enum Event {
    Stream(Box<Accepted>),
    End(End),
    StartDrain(Duration),
    DrainTimeout,
    /// Nothing is left to do.
    Drained,
    TooManyResets,
    /// The drain's deadline has passed.
    Closing,
}

pub(super) async fn serve(connection: Connection, transport: Transport) {
    let manager = connection.manager.clone();
    let random = connection.worker.random();
    let opened = h2::ServerConnection::handshake(transport, &manager.h2, manager.h2_stats(), random).await;
    let Ok(mut codec) = opened else {
        manager.stats.downstream_cx_protocol_error.inc();
        return;
    };
    let shared = Rc::new(Shared {
        connection,
        active: Cell::new(0),
        finished: RefCell::default(),
        settling: Cell::new(false),
        over: Cell::new(false),
        ended: Cell::new(None),
        closed: Cell::new(0),
        premature: Cell::new(0),
        too_many_resets: Cell::new(false),
        leaving: Cell::new(false),
        waker: RefCell::new(None),
    });
    let end = run(&shared, &mut codec).await;
    finish(&shared, &mut codec, end).await;
    let (read, written) = codec.wire_bytes();
    manager.stats.downstream_cx_rx_bytes_total.add(read);
    manager.stats.downstream_cx_tx_bytes_total.add(written);
    // What was not sent will not be.
    drop(codec);
    for mut unsent in shared.finished.take() {
        if let Responder::H2(h2) = &unsent.responder {
            unsent.exchange.note_meter(&h2.stream.meter());
        }
        unsent.exchange.note_gone(ResetReason::ConnectionTermination, &shared);
    }
}

/// Serves streams until the connection's end.
async fn run(shared: &Rc<Shared>, codec: &mut h2::ServerConnection) -> Event {
    let Connection { manager, drain: signal, ends_at, .. } = &shared.connection;
    let timer = Timer::default();
    let mut drain = Drain::No;
    let mut idle_since = Some(Instant::now());
    let mut served = 0u32;
    let limits = &manager.limits;
    let random = || shared.connection.worker.random();
    loop {
        let event = poll_fn(|cx| {
            if shared.too_many_resets.get() {
                return Poll::Ready(Event::TooManyResets);
            }
            // The last turn: the client learns which of its streams were not served.
            if signal.is_closing() {
                if drain != Drain::Final {
                    codec.goaway();
                }
                // What comes meanwhile is not served.
                let _ = codec.poll_accept(cx);
                return Poll::Ready(Event::Closing);
            }
            let accepted = codec.poll_accept(cx);
            if !matches!(accepted, Poll::Ready(Ok(_))) {
                let (count, sent) = codec.take_unseen();
                shared.note_unseen(count, sent, MALFORMED);
            }
            shared.settle(cx, &timer);
            match accepted {
                Poll::Ready(Ok(accepted)) => return Poll::Ready(Event::Stream(Box::new(accepted))),
                Poll::Ready(Err(end)) => return Poll::Ready(Event::End(end)),
                Poll::Pending => remember(&shared.waker, cx),
            }
            if shared.active.get() > 0 {
                idle_since = None;
            } else if idle_since.is_none() {
                idle_since = Some(Instant::now());
            }
            match drain {
                Drain::No => {}
                Drain::Noticed(at) => return timer.poll(cx, Some(at)).map(|()| Event::DrainTimeout),
                Drain::Final if shared.active.get() == 0 && !codec.has_streams() => {
                    return Poll::Ready(Event::Drained);
                }
                Drain::Final => return Poll::Pending,
            }
            if signal.ends_idle() {
                manager.stats.downstream_cx_drain_close.inc();
                return Poll::Ready(Event::StartDrain(limits.drain_timeout(random).min(PROCESS_DRAIN)));
            }
            if shared.is_leaving() {
                return Poll::Ready(Event::StartDrain(limits.drain_timeout(random)));
            }
            let idle_at = idle_since.zip(limits.idle_timeout).map(|(at, d)| at + d);
            if timer.poll(cx, idle_at).is_ready() {
                manager.stats.downstream_cx_idle_timeout.inc();
                return Poll::Ready(Event::StartDrain(limits.drain_timeout(random)));
            }
            if timer.poll(cx, *ends_at).is_ready() {
                manager.stats.downstream_cx_max_duration_reached.inc();
                return Poll::Ready(Event::StartDrain(limits.drain_timeout(random)));
            }
            Poll::Pending
        })
        .await;
        match event {
            Event::Stream(mut accepted) if drain == Drain::Final => {
                accepted.respond.reset(h2::Reason::REFUSED_STREAM);
            }
            Event::Stream(accepted) => {
                served += 1;
                let max = limits.max_requests_per_connection;
                if max > 0 && served >= max {
                    manager.stats.downstream_cx_max_requests_reached.inc();
                    if drain == Drain::No {
                        shared.leaving.set(true);
                        codec.shutdown_notice();
                        drain = Drain::Noticed(Instant::now() + limits.drain_timeout(random));
                    }
                }
                idle_since = None;
                let active = ActiveStream::new(shared);
                // The exchange's state is large: boxed here it is not moved about by those who spawn.
                tokio::task::spawn_local(Box::pin(serve_stream(shared.clone(), accepted, active)));
            }
            Event::StartDrain(timeout) => {
                shared.leaving.set(true);
                codec.shutdown_notice();
                drain = Drain::Noticed(Instant::now() + timeout);
            }
            Event::DrainTimeout => {
                codec.goaway();
                drain = Drain::Final;
            }
            event => return event,
        }
    }
}

fn remember(slot: &RefCell<Option<Waker>>, cx: &Context<'_>) {
    let mut slot = slot.borrow_mut();
    if !slot.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *slot = Some(cx.waker().clone());
    }
}

/// Counts the end and tells the streams that are left why it came.
async fn finish(shared: &Shared, codec: &mut h2::ServerConnection, event: Event) {
    shared.over.set(true);
    let stats = &shared.connection.manager.stats;
    let mut remote = false;
    let ended = match event {
        Event::End(End::Closed) => {
            remote = true;
            None
        }
        Event::End(End::Protocol | End::Malformed) => {
            stats.downstream_cx_protocol_error.inc();
            Some((
                Some(ResponseFlag::DownstreamProtocolError),
                "codec_error:The_user_callback_function_failed",
            ))
        }
        Event::End(End::Flood(flood)) => {
            if flood == Flood::Settings {
                stats.downstream_cx_protocol_error.inc();
            }
            Some((Some(ResponseFlag::DownstreamProtocolError), flood.details()))
        }
        Event::End(End::KeepaliveTimeout) => Some((
            Some(ResponseFlag::DownstreamConnectionTermination),
            "downstream_local_disconnect(http2_ping_timeout)",
        )),
        Event::Closing => {
            let details = shared.connection.drain.closing_details();
            Some((Some(ResponseFlag::DownstreamConnectionTermination), details))
        }
        Event::TooManyResets => {
            stats.downstream_rq_too_many_premature_resets.inc();
            Some((None, "too_many_premature_resets"))
        }
        Event::Drained | Event::Stream(_) | Event::StartDrain(_) | Event::DrainTimeout => None,
    };
    let ended = ended.map(|(flag, details)| Ended { flag, details });
    shared.ended.set(ended);
    let mut active = shared.active.get() > 0 || matches!(event, Event::End(End::Malformed));
    // What came with the frame that ended the connection is not handed out any more.
    let unserved = match event {
        Event::End(End::Protocol | End::Flood(_) | End::Closed) => codec.unserved(),
        _ => 0,
    };
    active |= unserved > 0;
    shared.note_unseen(unserved, 0, ended.unwrap_or(LEFT));
    if remote {
        stats.downstream_cx_destroy_remote.inc();
    } else {
        stats.downstream_cx_destroy_local.inc();
    }
    if active {
        stats.downstream_cx_destroy_active_rq.inc();
        if remote {
            stats.downstream_cx_destroy_remote_active_rq.inc();
        } else if !matches!(event, Event::Closing) {
            stats.downstream_cx_destroy_local_active_rq.inc();
        }
    }
    if matches!(event, Event::Drained | Event::End(End::Flood(_) | End::Malformed)) {
        let timer = Timer::default();
        let deadline = Some(Instant::now() + shared.connection.manager.limits.delayed_close_timeout);
        poll_fn(|cx| match codec.poll_shutdown(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => timer.poll(cx, deadline),
        })
        .await;
    }
}

/// Serves one stream.
async fn serve_stream(shared: Rc<Shared>, accepted: Box<Accepted>, active: ActiveStream) {
    let Accepted { head, body, respond } = *accepted;
    let connection = &shared.connection;
    let gone = respond.meter().reset_by_peer;
    let timer = Timer::default();
    let mut responder = Responder::h2(respond, shared.clone());
    match head {
        Ok(head) => {
            let exchange = exchange(connection, head, body, &timer, &responder);
            match gone {
                Some(reason) => exchange.gone(reason, &mut responder),
                None => exchange.serve(&mut responder, &connection.drain).await,
            };
        }
        Err(error) => {
            let stream = stream(connection, Default::default(), body, Protocol::Http2, &timer);
            Exchange::new(stream, &responder, 0).turn_away(error, &mut responder);
        }
    }
    if let Responder::H2(h2) = &mut responder
        && let Some(mut exchange) = h2.finished.take()
    {
        if shared.is_over() {
            let meter = h2.stream.meter();
            exchange.note_meter(&meter);
            if !meter.ended && h2.cut.is_none() {
                exchange.note_gone(ResetReason::ConnectionTermination, &shared);
            }
            return;
        }
        if h2.cut.is_some() {
            shared.wake();
        }
        let unsent = Unsent { exchange, responder, since: Instant::now(), _active: active };
        shared.finished.borrow_mut().push(unsent);
    }
}
