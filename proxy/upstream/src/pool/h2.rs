//! HTTP/2: many streams on few connections.
//!
//! A request goes to the first connection with room. Room is what the peer's settings and the cluster's
//! `max_concurrent_streams` leave. While a connection is on its way as many requests wait for it as it will carry;
//! only then another is begun. A connection that was told to go away (GOAWAY, age, number of requests) takes no
//! more streams and closes with its last.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use sampan_codec::ResetReason;
use sampan_codec::h2::{ClientConnection, ClientStream, Driver, DriverEnd};
use sampan_core::HeaderMap;
use sampan_core::stream_info::Protocol;
use tokio::sync::oneshot;

use super::{Age, ConnectionGuard, PoolError, PoolSet, Queue, RequestGuard};
use crate::circuit::Priority;
use crate::connect::{self, ConnectFailure, ConnectFailureKind, ConnectInfo};
use crate::worker::WorkerHost;

/// A connection with its streams.
struct Connection {
    /// Taken when the connection takes no more streams: the crate ends it with the last one.
    handle: RefCell<Option<ClientConnection>>,
    info: Rc<ConnectInfo>,
    guard: ConnectionGuard,
    active: Cell<usize>,
    max: usize,
    idle_since: Cell<Option<u64>>,
    pool: Weak<PoolSet>,
    priority: Priority,
}

#[derive(Default)]
pub(super) struct Pool {
    connections: RefCell<Vec<Rc<Connection>>>,
    waiting: Queue<H2Slot>,
    connecting: Cell<usize>,
}

/// A place on a connection.
struct H2Slot(Rc<Connection>);

/// A stream's place on a connection; its drop frees the place.
pub struct H2Lease {
    slot: H2Slot,
    /// Where this is the connection's last stream: its handle.
    last: Option<ClientConnection>,
    streams_before: u64,
    request: RequestGuard,
}

impl H2Slot {
    fn new(connection: &Rc<Connection>) -> Self {
        connection.active.set(connection.active.get() + 1);
        connection.idle_since.set(None);
        Self(connection.clone())
    }
}

impl Drop for H2Slot {
    fn drop(&mut self) {
        let connection = &self.0;
        connection.active.set(connection.active.get() - 1);
        if connection.active.get() == 0 {
            connection.guard.idle();
        }
        let Some(pools) = connection.pool.upgrade() else { return };
        let pool = &pools.h2[connection.priority as usize];
        if !pool.waiting.is_empty() && connection.has_room() {
            // Who does not wait any more gives the slot back by dropping it, outside of any borrow.
            let _ = pool.waiting.give(Self::new(connection));
        } else if connection.active.get() == 0
            && let Some(host) = pools.host.upgrade()
        {
            if host.removed.get() {
                connection.retire();
            }
            host.core.sweeper.watch(&pools, &host);
        }
    }
}

impl Connection {
    /// Whether another stream can be opened now.
    fn has_room(&self) -> bool {
        let mut handle = self.handle.borrow_mut();
        let Some(open) = handle.as_mut() else { return false };
        if self.active.get() >= self.max.min(open.max_streams()) {
            return false;
        }
        match open.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
            Poll::Ready(Err(_)) => {
                *handle = None;
                false
            }
        }
    }

    /// No more streams.
    fn retire(&self) {
        *self.handle.borrow_mut() = None;
    }
}

/// A place on a connection.
pub(super) async fn acquire(
    host: &Rc<WorkerHost>,
    pools: &Rc<PoolSet>,
    priority: Priority,
) -> Result<H2Lease, PoolError> {
    let pool = &pools.h2[priority as usize];
    let free = pool.connections.borrow().iter().find(|c| c.has_room()).cloned();
    if let Some(connection) = free {
        return lease(host, priority, H2Slot::new(&connection));
    }
    let place = host.place(priority)?;
    let receiver = pool.waiting.push();
    pools.connect_h2_if_needed(host, priority);
    let slot = wait(host, receiver).await?;
    drop(place);
    lease(host, priority, slot)
}

async fn wait(
    host: &Rc<WorkerHost>,
    receiver: oneshot::Receiver<Result<H2Slot, PoolError>>,
) -> Result<H2Slot, PoolError> {
    struct Cancelled<'a>(Option<&'a WorkerHost>);
    impl Drop for Cancelled<'_> {
        fn drop(&mut self) {
            if let Some(host) = self.0 {
                host.core.stats.upstream_rq_cancelled.inc();
            }
        }
    }
    let mut cancelled = Cancelled(Some(host));
    let result = receiver.await;
    cancelled.0 = None;
    // A sender that is gone without a word belongs to a pool that was torn down.
    result.unwrap_or(Err(PoolError::Overflow))
}

fn lease(host: &Rc<WorkerHost>, priority: Priority, slot: H2Slot) -> Result<H2Lease, PoolError> {
    let request = RequestGuard::new(host, priority).ok_or(PoolError::Overflow)?;
    let streams_before = slot.0.guard.begin_request();
    let http = &host.cluster().config().http;
    let max = http.max_requests_per_connection;
    let old = http.max_connection_duration.is_some_and(|d| slot.0.guard.start().elapsed() >= d);
    let worn = max > 0 && slot.0.guard.requests() >= u64::from(max);
    let mut last = None;
    if worn || old {
        let stats = &host.core.stats;
        if worn {
            stats.upstream_cx_max_requests.inc()
        } else {
            stats.upstream_cx_max_duration_reached.inc()
        }
        last = slot.0.handle.borrow_mut().take();
    }
    Ok(H2Lease { slot, last, streams_before, request })
}

impl PoolSet {
    fn connect_h2_if_needed(self: &Rc<Self>, host: &Rc<WorkerHost>, priority: Priority) {
        let pool = &self.h2[priority as usize];
        let streams = host.cluster().config().http.h2.max_concurrent_streams as usize;
        while pool.connecting.get().saturating_mul(streams) < pool.waiting.len() {
            let first = pool.connections.borrow().is_empty() && pool.connecting.get() == 0;
            let Some(permit) = host.connection_permit(priority, first) else { return };
            pool.connecting.set(pool.connecting.get() + 1);
            let guard = ConnectionGuard::new(host, permit);
            if !host.speaks_either() {
                host.core.stats.upstream_cx_http2_total.inc();
            }
            let (host, pools) = (host.clone(), self.clone());
            tokio::task::spawn_local(async move { pools.establish_h2(host, priority, guard).await });
        }
    }

    async fn establish_h2(self: Rc<Self>, host: Rc<WorkerHost>, priority: Priority, guard: ConnectionGuard) {
        let http = &host.cluster().config().http;
        let pool = &self.h2[priority as usize];
        let offer = host.offer(&[b"h2"]);
        let failure = match connect::connect(host.cluster(), &host.host, &self.options, offer).await {
            Ok(connected) if self.is_other(&host, &connected.info, true) => {
                pool.connecting.set(pool.connecting.get() - 1);
                self.adopt_h1(&host, priority, guard, connected);
                pool.waiting.fail(&PoolError::OtherProtocol);
                return;
            }
            Ok(connected) => {
                if host.speaks_either() {
                    host.core.stats.upstream_cx_http2_total.inc();
                }
                let mut info = connected.info;
                info.protocol = Some(Protocol::Http2);
                let stats = host.cluster().h2_stats();
                let random = rand::random();
                match sampan_codec::h2::connect(connected.transport, &http.h2, stats, random).await {
                    Ok((handle, driver)) => {
                        guard.connected(&info);
                        let connection = Rc::new(Connection {
                            handle: RefCell::new(Some(handle)),
                            info: Rc::new(info),
                            guard,
                            active: Cell::new(0),
                            max: http.h2.max_concurrent_streams as usize,
                            idle_since: Cell::new(None),
                            pool: Rc::downgrade(&self),
                            priority,
                        });
                        pool.connecting.set(pool.connecting.get() - 1);
                        pool.connections.borrow_mut().push(connection.clone());
                        self.serve(&host, &connection);
                        drop((self, host));
                        drive(connection, driver).await;
                        return;
                    }
                    Err(e) => {
                        ConnectFailure { kind: ConnectFailureKind::Remote, reason: e.to_string().into() }
                    }
                }
            }
            Err(failure) => failure,
        };
        pool.connecting.set(pool.connecting.get() - 1);
        host.count_connect_failure(&failure);
        if failure.kind == ConnectFailureKind::Remote {
            guard.closed_by_peer();
        }
        drop(guard);
        let failed = pool.waiting.fail(&PoolError::Connect(failure));
        host.core.stats.upstream_rq_pending_failure_eject.add(failed);
    }

    /// Gives the new connection's places to those who wait.
    fn serve(self: &Rc<Self>, host: &Rc<WorkerHost>, connection: &Rc<Connection>) {
        let pool = &self.h2[connection.priority as usize];
        while !pool.waiting.is_empty() && connection.has_room() {
            if pool.waiting.give(H2Slot::new(connection)).is_err() {
                break;
            }
        }
        if connection.active.get() == 0 {
            host.core.sweeper.watch(self, host);
        }
    }
}

/// Drives a connection to its end, then takes it out of its pool.
async fn drive(connection: Rc<Connection>, mut driver: Driver) {
    let mut told_to_go = false;
    let end = poll_fn(|cx| {
        let polled = Pin::new(&mut driver).poll(cx);
        connection.guard.bytes(driver.wire_bytes());
        // It may carry its streams for long after that.
        if !told_to_go && driver.is_told_to_go() {
            told_to_go = true;
            connection.guard.core().stats.upstream_cx_close_notify.inc();
        }
        polled
    })
    .await;
    match end {
        // The last of its streams is over, and we close.
        DriverEnd::Done if told_to_go => {}
        // With our handle still there it was the peer who ended it.
        DriverEnd::Done if connection.handle.borrow().is_none() => {}
        DriverEnd::KeepaliveTimeout => {}
        DriverEnd::Done | DriverEnd::Peer => connection.guard.closed_by_peer(),
        // As in Envoy its streams are reset first, so that it ends with none.
        DriverEnd::Protocol => {
            connection.guard.core().stats.upstream_cx_protocol_error.inc();
            connection.guard.idle();
        }
    }
    // A peer that was done closes behind responses that somebody has yet to read.
    if end != DriverEnd::Done {
        connection.guard.over();
    }
    // The streams that are left end with the driver.
    drop(driver);
    connection.retire();
    let Some(pools) = connection.pool.upgrade() else { return };
    let pool = &pools.h2[connection.priority as usize];
    pool.connections.borrow_mut().retain(|c| !Rc::ptr_eq(c, &connection));
    if let Some(host) = pools.host.upgrade()
        && !pool.waiting.is_empty()
    {
        pools.connect_h2_if_needed(&host, connection.priority);
    }
}

impl Pool {
    pub(super) fn is_empty(&self) -> bool {
        self.connecting.get() == 0 && self.waiting.is_empty() && self.connections.borrow().is_empty()
    }

    pub(super) fn drain(&self) {
        for connection in self.connections.borrow().iter() {
            connection.retire();
        }
    }

    /// Retires connections that were without streams for too long. Returns when the next one will be.
    pub(super) fn sweep(&self, now: u64, host: &WorkerHost) -> Option<u64> {
        let http = &host.cluster().config().http;
        let stats = &host.core.stats;
        let mut next = None;
        for connection in self.connections.borrow().iter().filter(|c| c.active.get() == 0) {
            if connection.handle.borrow().is_none() {
                continue;
            }
            let since = connection.idle_since.get().unwrap_or(now);
            connection.idle_since.set(Some(since));
            match super::age(http, now, since, &connection.guard) {
                Age::Idle => stats.upstream_cx_idle_timeout.inc(),
                Age::Old => stats.upstream_cx_max_duration_reached.inc(),
                Age::Young(deadline) => {
                    next = Some(next.unwrap_or(u64::MAX).min(deadline));
                    continue;
                }
            }
            connection.retire();
        }
        next
    }
}

impl H2Lease {
    /// Opens the stream with the request's head.
    pub fn start(&mut self, headers: &HeaderMap, end: bool) -> Result<ClientStream, ResetReason> {
        let handle = self.last.take().or_else(|| self.slot.0.handle.borrow().clone());
        match handle {
            Some(mut handle) => handle.start(headers, end),
            None => Err(ResetReason::ConnectionTermination),
        }
    }

    /// What is known of the connection.
    pub fn info(&self) -> &Rc<ConnectInfo> {
        &self.slot.0.info
    }

    /// How many streams the connection had carried before.
    pub fn streams_before(&self) -> u64 {
        self.streams_before
    }

    /// The host.
    pub fn host(&self) -> &Rc<WorkerHost> {
        self.request.host()
    }
}
