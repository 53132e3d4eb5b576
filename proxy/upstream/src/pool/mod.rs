//! Connections to a host, per worker.
//!
//! ```text
//!   h1      one request at a time: a stack of idle connections, waiting requests, connections on their way
//!   h2      many streams on few connections
//!   tcp     a fresh connection each
//!   guard   what is counted when a connection or a request begins and ends
//!   sweep   idle connections: closed by the peer, too long idle, too old
//! ```
//!
//! A [`PoolSet`] holds the pools that requests with the same [`ConnectOptions`] share, one per priority. A request
//! that finds no connection takes a place in the queue (`max_pending_requests`) and asks for a new connection, as
//! Envoy does; whichever connection is free first is its. A failed connection fails all requests that wait.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use foldhash::fast::RandomState;
use sampan_core::stream_info::ConnectionInfo;
use thiserror::Error;
use tokio::sync::oneshot;

use crate::circuit::{Permit, Priority};
use crate::config::{HttpConfig, HttpProtocol};
use crate::connect::{ConnectFailure, ConnectInfo, ConnectOptions};
use crate::proxy_header::Told;
use crate::worker::WorkerHost;

mod guard;
mod h1;
mod h2;
mod sweep;
mod tcp;
#[cfg(test)]
mod tests;

pub(crate) use guard::{ConnectionGuard, RequestGuard};
pub use h1::H1Lease;
pub use h2::H2Lease;
pub(crate) use sweep::Sweeper;
pub use tcp::TcpLease;

/// Why a request got no connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PoolError {
    /// A circuit breaker is open (`UO`).
    #[error("overflow")]
    Overflow,
    /// The host speaks the other protocol (`auto_config`): the request goes to that pool.
    #[error("protocol")]
    OtherProtocol,
    /// The connection failed (`UF`).
    #[error("{}", .0.reset_reason())]
    Connect(ConnectFailure),
}

/// A connection (or a place on one) for an HTTP request.
pub enum HttpLease {
    /// A connection of its own.
    H1(H1Lease),
    /// A stream's place. Boxed, as what is large: a lease is handed on by value, and nearly all are of HTTP/1.
    H2(Box<H2Lease>),
    /// Bytes: what CONNECT asks for, where the proxy ends it.
    Tcp(Box<TcpLease>),
}

/// The pools for one set of connect options.
pub(crate) struct PoolSet {
    host: Weak<WorkerHost>,
    options: ConnectOptions,
    h1: [h1::Pool; 2],
    h2: [h2::Pool; 2],
    /// With `auto_config`: what the host chose last. Until it did, HTTP/2 is hoped for.
    speaks_h2: Cell<bool>,
    listed: Cell<bool>,
}

/// The pools of a host: of the usual options, and of others. With PROXY headers each downstream connection has its own.
#[derive(Default)]
pub(crate) struct Pools {
    usual: Option<Rc<PoolSet>>,
    others: HashMap<ConnectOptions, Rc<PoolSet>, RandomState>,
    /// How many others there must be before the unused are looked for.
    clean_at: usize,
}

/// Fewer pools than these are not looked through for unused ones.
const MANY: usize = 16;

/// How an idle connection stands to its limits.
enum Age {
    /// Idle for too long.
    Idle,
    /// Alive for too long.
    Old,
    /// Neither before this time of the sweeper's clock.
    Young(u64),
}

fn age(http: &HttpConfig, now: u64, idle_since: u64, guard: &ConnectionGuard) -> Age {
    let mut deadline = u64::MAX;
    if let Some(limit) = http.idle_timeout {
        deadline = idle_since.saturating_add(limit.as_millis() as u64);
        if now >= deadline {
            return Age::Idle;
        }
    }
    if let Some(limit) = http.max_connection_duration {
        let left = limit.saturating_sub(guard.start().elapsed());
        if left.is_zero() {
            return Age::Old;
        }
        deadline = deadline.min(now + (left.as_millis() as u64).max(1));
    }
    Age::Young(deadline)
}

/// Requests that wait for a connection.
struct Queue<T>(RefCell<VecDeque<oneshot::Sender<Result<T, PoolError>>>>);

/// A place in the queue, counted.
struct Place {
    _permit: Permit,
    host: Rc<WorkerHost>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.host.core.stats.upstream_rq_pending_active.dec();
        self.host.host.stats.rq_pending_active.dec();
    }
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

impl<T> Queue<T> {
    fn push(&self) -> oneshot::Receiver<Result<T, PoolError>> {
        let (sender, receiver) = oneshot::channel();
        self.0.borrow_mut().push_back(sender);
        receiver
    }

    fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Hands the value to the first that still waits; gives it back where nobody does.
    fn give(&self, mut value: T) -> Result<(), T> {
        loop {
            let Some(sender) = self.0.borrow_mut().pop_front() else { return Err(value) };
            match sender.send(Ok(value)) {
                Ok(()) => return Ok(()),
                Err(Ok(back)) => value = back,
                Err(Err(_)) => return Ok(()),
            }
        }
    }

    /// Fails all that wait; returns how many did.
    fn fail(&self, error: &PoolError) -> u64 {
        let waiting = std::mem::take(&mut *self.0.borrow_mut());
        waiting
            .into_iter()
            .filter(|s| !s.is_closed())
            .map(|s| s.send(Err(error.clone())))
            .filter(Result::is_ok)
            .count() as u64
    }

    /// How many still wait.
    fn len(&self) -> usize {
        let mut queue = self.0.borrow_mut();
        queue.retain(|sender| !sender.is_closed());
        queue.len()
    }
}

impl WorkerHost {
    /// A connection for a request; `downstream_h2` counts where the cluster follows the downstream's protocol.
    ///
    /// `options` of `None` are the default ones: the usual case, without a search.
    pub async fn http(
        self: &Rc<Self>,
        priority: Priority,
        downstream_h2: bool,
        options: Option<&ConnectOptions>,
    ) -> Result<HttpLease, PoolError> {
        let pools = self.pool_set(options);
        let mut switches = 0;
        loop {
            let h2 = match self.cluster().config().http.protocol {
                HttpProtocol::Http1 => false,
                HttpProtocol::Http2 => true,
                HttpProtocol::Downstream => downstream_h2,
                HttpProtocol::Auto => pools.speaks_h2.get(),
            };
            let lease = if h2 {
                h2::acquire(self, &pools, priority).await.map(|lease| HttpLease::H2(Box::new(lease)))
            } else if let Some(lease) = h1::checkout(self, &pools, priority)? {
                return Ok(HttpLease::H1(lease));
            } else {
                h1::acquire(self, &pools, priority).await.map(HttpLease::H1)
            };
            match lease {
                // A host that changes its mind with each connection is given up.
                Err(PoolError::OtherProtocol) if switches < 2 => switches += 1,
                Err(PoolError::OtherProtocol) => return Err(PoolError::Overflow),
                lease => return lease,
            }
        }
    }

    /// A fresh connection for `tcp_proxy`.
    pub async fn tcp(
        self: &Rc<Self>,
        priority: Priority,
        options: &ConnectOptions,
    ) -> Result<TcpLease, PoolError> {
        tcp::acquire(self, priority, options).await
    }

    /// `auto_config`: the host chooses the protocol.
    fn speaks_either(&self) -> bool {
        self.cluster().config().http.protocol == HttpProtocol::Auto
    }

    /// The protocols to offer where the TLS context names none.
    fn offer(&self, usual: &'static [&'static [u8]]) -> &'static [&'static [u8]] {
        if self.speaks_either() { &[b"h2", b"http/1.1"] } else { usual }
    }

    /// The options of a connection to this host for a stream of a downstream connection.
    pub fn options<'o>(
        &self,
        options: Option<&'o ConnectOptions>,
        downstream: &ConnectionInfo,
    ) -> Option<Cow<'o, ConnectOptions>> {
        let cluster = self.cluster();
        if !cluster.sends_headers() || cluster.socket(&self.host).header.is_none() {
            return options.map(Cow::Borrowed);
        }
        let mut options = options.cloned().unwrap_or_default();
        options.told = Some(Arc::new(Told::of(downstream)));
        Some(Cow::Owned(options))
    }

    fn pool_set(self: &Rc<Self>, options: Option<&ConnectOptions>) -> Rc<PoolSet> {
        let mut pools = self.pools.borrow_mut();
        match options {
            Some(options) if *options != ConnectOptions::default() => match pools.others.get(options) {
                Some(found) => found.clone(),
                None => pools.add(PoolSet::new(self, options.clone())),
            },
            _ => pools.usual.get_or_insert_with(|| PoolSet::new(self, ConnectOptions::default())).clone(),
        }
    }

    /// Whether another connection may be made: the host's limit, then the cluster's; `first`: the pool has none.
    fn connection_permit(&self, priority: Priority, first: bool) -> Option<Permit> {
        let core = &self.core;
        let per_host =
            core.cluster.config().circuit_breakers.as_ref().and_then(|b| b.per_host_max_connections);
        let host_full = per_host.is_some_and(|max| self.host.stats.cx_active.value() >= u64::from(max));
        let breakers = &core.breakers[priority as usize];
        let full = host_full || !breakers.connections().has_room();
        if full {
            core.stats.upstream_cx_overflow.inc();
            if !first {
                return None;
            }
        }
        breakers.connection(first)
    }

    /// A place in the queue.
    fn place(self: &Rc<Self>, priority: Priority) -> Result<Place, PoolError> {
        let stats = &self.core.stats;
        let Some(permit) = self.core.breakers[priority as usize].pending_request() else {
            stats.upstream_rq_pending_overflow.inc();
            return Err(PoolError::Overflow);
        };
        stats.upstream_rq_pending_total.inc();
        stats.upstream_rq_pending_active.inc();
        self.host.stats.rq_pending_active.inc();
        Ok(Place { _permit: permit, host: self.clone() })
    }

    fn count_connect_failure(&self, failure: &ConnectFailure) {
        let stats = &self.core.stats;
        if failure.kind == crate::connect::ConnectFailureKind::Timeout {
            stats.upstream_cx_connect_timeout.inc();
        }
        stats.upstream_cx_connect_fail.inc();
        self.host.stats.cx_connect_fail.inc();
    }
}

impl Pools {
    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Rc<PoolSet>> {
        self.usual.iter().chain(self.others.values())
    }

    /// Adds one; those without connections go whenever their number has doubled.
    #[cold]
    fn add(&mut self, new: Rc<PoolSet>) -> Rc<PoolSet> {
        if self.others.len() >= self.clean_at.max(MANY) {
            self.others.retain(|_, pools| !pools.is_unused());
            self.clean_at = 2 * self.others.len();
        }
        self.others.insert(new.options.clone(), new.clone());
        new
    }
}

impl PoolSet {
    fn new(host: &Rc<WorkerHost>, options: ConnectOptions) -> Rc<Self> {
        Rc::new(Self {
            host: Rc::downgrade(host),
            options,
            h1: Default::default(),
            h2: Default::default(),
            speaks_h2: Cell::new(true),
            listed: Cell::new(false),
        })
    }

    /// Nobody holds it but its host, and it has no connections.
    fn is_unused(self: &Rc<Self>) -> bool {
        Rc::strong_count(self) == 1
            && self.h1.iter().all(h1::Pool::is_empty)
            && self.h2.iter().all(h2::Pool::is_empty)
    }

    /// With `auto_config`: notes what the host chose. True where that is not what the pool speaks.
    fn is_other(&self, host: &WorkerHost, info: &ConnectInfo, h2: bool) -> bool {
        if !host.speaks_either() {
            return false;
        }
        let chosen = info.tls.as_ref().is_some_and(|tls| tls.alpn.as_deref() == Some("h2"));
        self.speaks_h2.set(chosen);
        // Envoy counts such a connection when it is begun and again when its codec is made.
        host.core.stats.upstream_cx_total.inc();
        host.host.stats.cx_total.inc();
        chosen != h2
    }

    /// Closes what is idle; called when no new requests will come.
    pub(crate) fn drain(&self) {
        for pool in &self.h1 {
            pool.close_idle();
        }
        for pool in &self.h2 {
            pool.drain();
        }
    }
}
