//! HTTP/1: one request at a time on a connection.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Context;

use sampan_codec::h1::{ClientConnection, ClientOptions, CodecStats};
use sampan_core::stream_info::Protocol;
use tokio::sync::oneshot;

use super::{Age, ConnectionGuard, PoolError, PoolSet, Queue, RequestGuard};
use crate::circuit::Priority;
use crate::connect::{self, ConnectInfo, Connected};
use crate::worker::WorkerHost;

/// A connection.
pub(super) struct Connection {
    codec: ClientConnection,
    info: Rc<ConnectInfo>,
    guard: ConnectionGuard,
    /// The sweeper's clock when it first saw the connection idle; `None` until then.
    idle_since: Option<u64>,
    _counted: Counted,
}

impl Connection {
    /// How it ended, for the counters.
    fn note_end(&self, host: &WorkerHost) {
        if self.codec.closed_by_peer() {
            self.guard.closed_by_peer();
        }
        if self.codec.broke_protocol() {
            host.core.stats.upstream_cx_protocol_error.inc();
        }
    }
}

#[derive(Default)]
pub(super) struct Pool {
    /// The last released is the first taken: the others can grow old and go.
    #[allow(
        clippy::vec_box,
        reason = "a connection moves between stack, queue and lease: the box moves, not it"
    )]
    idle: RefCell<Vec<Box<Connection>>>,
    waiting: Queue<Box<Connection>>,
    /// Connections on their way.
    connecting: Cell<usize>,
    /// All connections.
    total: Rc<Cell<usize>>,
    /// `cluster.NAME.http1.*` is there once the cluster has spoken HTTP/1; nothing of it can happen to an upstream.
    codec: RefCell<Option<(Rc<ClientOptions>, CodecStats)>>,
}

/// Takes one out of the pool's total when the connection is gone.
struct Counted(Rc<Cell<usize>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A connection for one request. [`H1Lease::release`] gives it back; a drop closes it.
pub struct H1Lease {
    connection: Option<Box<Connection>>,
    pools: Rc<PoolSet>,
    request: RequestGuard,
    streams_before: u64,
}

/// An idle connection, if there is one that the peer has not closed.
pub(super) fn checkout(
    host: &Rc<WorkerHost>,
    pools: &Rc<PoolSet>,
    priority: Priority,
) -> Result<Option<H1Lease>, PoolError> {
    let pool = &pools.h1[priority as usize];
    loop {
        let Some(mut connection) = pool.idle.borrow_mut().pop() else { return Ok(None) };
        if connection.codec.is_stale() {
            connection.note_end(host);
            continue;
        }
        return lease(host, pools, priority, connection).map(Some);
    }
}

fn lease(
    host: &Rc<WorkerHost>,
    pools: &Rc<PoolSet>,
    priority: Priority,
    connection: Box<Connection>,
) -> Result<H1Lease, PoolError> {
    let Some(request) = RequestGuard::new(host, priority) else {
        pools.put_back(priority, connection);
        return Err(PoolError::Overflow);
    };
    let streams_before = connection.guard.begin_request();
    let max = host.cluster().config().http.max_requests_per_connection;
    if max > 0 && streams_before + 1 >= u64::from(max) {
        host.core.stats.upstream_cx_max_requests.inc();
    }
    Ok(H1Lease { connection: Some(connection), pools: pools.clone(), request, streams_before })
}

/// Gives back what was sent to a request that does not wait any more.
struct Waiting<'a> {
    pools: &'a Rc<PoolSet>,
    priority: Priority,
    receiver: oneshot::Receiver<Result<Box<Connection>, PoolError>>,
    done: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(host) = self.pools.host.upgrade() {
            host.core.stats.upstream_rq_cancelled.inc();
        }
        self.receiver.close();
        if let Ok(Ok(connection)) = self.receiver.try_recv() {
            self.pools.put_back(self.priority, connection);
        }
    }
}

/// Waits for a connection: a new one is asked for, but the first that is free is taken.
pub(super) async fn acquire(
    host: &Rc<WorkerHost>,
    pools: &Rc<PoolSet>,
    priority: Priority,
) -> Result<H1Lease, PoolError> {
    let pool = &pools.h1[priority as usize];
    let place = host.place(priority)?;
    let receiver = pool.waiting.push();
    pools.connect_if_needed(host, priority);
    let mut waiting = Waiting { pools, priority, receiver, done: false };
    let result = (&mut waiting.receiver).await;
    waiting.done = true;
    drop(place);
    // A sender that is gone without a word belongs to a pool that was torn down.
    let connection = result.unwrap_or(Err(PoolError::Overflow))?;
    lease(host, pools, priority, connection)
}

impl PoolSet {
    /// As many connections on their way as requests wait, as far as the breakers allow.
    fn connect_if_needed(self: &Rc<Self>, host: &Rc<WorkerHost>, priority: Priority) {
        let pool = &self.h1[priority as usize];
        while pool.connecting.get() < pool.waiting.len() {
            let Some(permit) = host.connection_permit(priority, pool.total.get() == 0) else { return };
            pool.connecting.set(pool.connecting.get() + 1);
            pool.total.set(pool.total.get() + 1);
            let guard = ConnectionGuard::new(host, permit);
            if !host.speaks_either() {
                host.core.stats.upstream_cx_http1_total.inc();
            }
            let (host, pools) = (host.clone(), self.clone());
            tokio::task::spawn_local(async move { pools.establish(&host, priority, guard).await });
        }
    }

    async fn establish(self: Rc<Self>, host: &Rc<WorkerHost>, priority: Priority, guard: ConnectionGuard) {
        let pool = &self.h1[priority as usize];
        let counted = Counted(pool.total.clone());
        let offer = host.offer(&[b"http/1.1"]);
        let result = connect::connect(host.cluster(), &host.host, &self.options, offer).await;
        pool.connecting.set(pool.connecting.get() - 1);
        match result {
            // The host spoke HTTP/1 before and now HTTP/2: that pool makes its own connection.
            Ok(connected) if self.is_other(host, &connected.info, false) => {
                guard.connected(&connected.info);
                drop((connected, guard, counted));
                pool.waiting.fail(&PoolError::OtherProtocol);
            }
            Ok(connected) => {
                if host.speaks_either() {
                    host.core.stats.upstream_cx_http1_total.inc();
                }
                self.admit(host, priority, guard, connected, counted);
            }
            Err(failure) => {
                host.count_connect_failure(&failure);
                if failure.kind == crate::connect::ConnectFailureKind::Remote {
                    guard.closed_by_peer();
                }
                drop((guard, counted));
                let failed = pool.waiting.fail(&PoolError::Connect(failure));
                host.core.stats.upstream_rq_pending_failure_eject.add(failed);
            }
        }
    }

    /// A connection that was on its way in the pool of HTTP/2 until the host chose HTTP/1 (`auto_config`).
    pub(super) fn adopt_h1(
        self: &Rc<Self>,
        host: &Rc<WorkerHost>,
        priority: Priority,
        guard: ConnectionGuard,
        connected: Connected,
    ) {
        let pool = &self.h1[priority as usize];
        pool.total.set(pool.total.get() + 1);
        host.core.stats.upstream_cx_http1_total.inc();
        self.admit(host, priority, guard, connected, Counted(pool.total.clone()));
    }

    fn admit(
        self: &Rc<Self>,
        host: &Rc<WorkerHost>,
        priority: Priority,
        guard: ConnectionGuard,
        connected: Connected,
        counted: Counted,
    ) {
        let pool = &self.h1[priority as usize];
        guard.connected(&connected.info);
        let mut info = connected.info;
        info.protocol = Some(Protocol::Http11);
        let options = pool.codec_options(host);
        let codec = ClientConnection::new(connected.transport, options);
        let info = Rc::new(info);
        let connection = Connection { codec, info, guard, idle_since: None, _counted: counted };
        self.put_back(priority, Box::new(connection));
    }

    /// Hands a free connection to who waits, or lays it on the stack.
    fn put_back(self: &Rc<Self>, priority: Priority, mut connection: Box<Connection>) {
        let pool = &self.h1[priority as usize];
        let Some(host) = self.host.upgrade().filter(|h| !h.removed.get() || !pool.waiting.is_empty()) else {
            return;
        };
        connection.guard.idle();
        connection.idle_since = None;
        if !pool.waiting.is_empty() {
            match pool.waiting.give(connection) {
                Ok(()) => return,
                Err(_) if host.removed.get() => return,
                Err(back) => connection = back,
            }
        }
        pool.idle.borrow_mut().push(connection);
        host.core.sweeper.watch(self, &host);
    }
}

impl Pool {
    fn codec_options(&self, host: &WorkerHost) -> Rc<ClientOptions> {
        let mut codec = self.codec.borrow_mut();
        let made = codec.get_or_insert_with(|| {
            let cluster = host.cluster();
            (Rc::new(cluster.config().http.h1.clone()), CodecStats::new(cluster.scope()))
        });
        made.0.clone()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.total.get() == 0 && self.waiting.is_empty()
    }

    pub(super) fn close_idle(&self) {
        drop(std::mem::take(&mut *self.idle.borrow_mut()));
    }

    /// Closes idle connections that ended, waited or lived too long. Returns when the next one will have, by the
    /// sweeper's clock; `None` where none is left.
    pub(super) fn sweep(&self, cx: &mut Context<'_>, now: u64, host: &WorkerHost) -> Option<u64> {
        let http = &host.cluster().config().http;
        let stats = &host.core.stats;
        let mut closed = Vec::new();
        let mut next = None;
        let mut idle = self.idle.borrow_mut();
        let mut i = 0;
        while i < idle.len() {
            let connection = &mut idle[i];
            let since = *connection.idle_since.get_or_insert(now);
            if connection.codec.poll_stale(cx).is_ready() {
                connection.note_end(host);
            } else {
                match super::age(http, now, since, &connection.guard) {
                    Age::Idle => stats.upstream_cx_idle_timeout.inc(),
                    Age::Old => stats.upstream_cx_max_duration_reached.inc(),
                    Age::Young(deadline) => {
                        next = Some(next.unwrap_or(u64::MAX).min(deadline));
                        i += 1;
                        continue;
                    }
                }
            }
            closed.push(idle.remove(i));
        }
        drop(idle);
        drop(closed);
        next
    }
}

impl H1Lease {
    /// The codec's connection.
    pub fn codec(&mut self) -> &mut ClientConnection {
        &mut self.connection_mut().codec
    }

    /// What is known of the connection.
    pub fn info(&self) -> &Rc<ConnectInfo> {
        match &self.connection {
            Some(connection) => &connection.info,
            None => unreachable_lease(),
        }
    }

    /// How many requests the connection had carried before.
    pub fn streams_before(&self) -> u64 {
        self.streams_before
    }

    /// The host.
    pub fn host(&self) -> &Rc<WorkerHost> {
        self.request.host()
    }

    /// The request is over. The connection goes back where it can carry another, else it is closed.
    pub fn release(mut self) {
        let Some(connection) = self.connection.take() else { return };
        connection.guard.bytes(connection.codec.wire_bytes());
        if connection.codec.request_sent() {
            connection.guard.idle();
        }
        let http = &self.request.host().cluster().config().http;
        let max = http.max_requests_per_connection;
        let worn = max > 0 && connection.guard.requests() >= u64::from(max);
        let old = http.max_connection_duration.is_some_and(|d| connection.guard.start().elapsed() >= d);
        if old {
            self.request.host().core.stats.upstream_cx_max_duration_reached.inc();
        }
        let usable = !worn && !old && connection.codec.is_reusable();
        let priority = self.request.priority();
        if usable {
            self.pools.put_back(priority, connection);
        } else {
            self.pools.close(&self.request, connection);
        }
    }

    fn connection_mut(&mut self) -> &mut Connection {
        match &mut self.connection {
            Some(connection) => connection,
            None => unreachable_lease(),
        }
    }
}

/// The connection is only taken by `release` and `drop`, after which nobody holds the lease.
fn unreachable_lease() -> ! {
    unreachable!("a lease holds its connection until it is released")
}

impl PoolSet {
    /// Closes a connection; who waits for its place gets a new one.
    fn close(self: &Rc<Self>, request: &RequestGuard, connection: Box<Connection>) {
        connection.note_end(request.host());
        drop(connection);
        let (host, priority) = (request.host(), request.priority());
        if !self.h1[priority as usize].waiting.is_empty() {
            self.connect_if_needed(host, priority);
        }
    }
}

impl Drop for H1Lease {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.guard.bytes(connection.codec.wire_bytes());
            self.pools.close(&self.request, connection);
        }
    }
}
