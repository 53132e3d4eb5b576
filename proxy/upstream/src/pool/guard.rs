//! What is counted when a connection or a request begins and ends.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use crate::circuit::{Permit, Priority};
use crate::connect::ConnectInfo;
use crate::worker::{ClusterCore, WorkerHost};

/// A connection's accounting, from the first SYN to its end.
pub(crate) struct ConnectionGuard {
    host: Rc<WorkerHost>,
    _permit: Permit,
    start: Instant,
    connected: Cell<bool>,
    by_peer: Cell<bool>,
    active: Cell<bool>,
    /// The connection is over; what it carried then is what counts.
    over: Cell<bool>,
    requests: Cell<u64>,
    counted_bytes: Cell<(u64, u64)>,
}

impl ConnectionGuard {
    pub(crate) fn new(host: &Rc<WorkerHost>, permit: Permit) -> Self {
        let stats = &host.core.stats;
        stats.upstream_cx_total.inc();
        stats.upstream_cx_active.inc();
        host.host.stats.cx_total.inc();
        host.host.stats.cx_active.inc();
        Self {
            host: host.clone(),
            _permit: permit,
            start: Instant::now(),
            connected: Cell::new(false),
            by_peer: Cell::new(false),
            active: Cell::new(false),
            over: Cell::new(false),
            requests: Cell::new(0),
            counted_bytes: Cell::new((0, 0)),
        }
    }

    pub(crate) fn core(&self) -> &ClusterCore {
        &self.host.core
    }

    /// The connection is ready for requests.
    pub(crate) fn connected(&self, info: &ConnectInfo) {
        self.connected.set(true);
        self.core().stats.upstream_cx_tx_bytes_total.add(info.sent_before);
        self.core().stats.upstream_cx_connect_ms.record(self.start.elapsed().as_millis() as u64);
    }

    pub(crate) fn start(&self) -> Instant {
        self.start
    }

    /// Another request; returns how many came before.
    pub(crate) fn begin_request(&self) -> u64 {
        self.active.set(true);
        let before = self.requests.get();
        self.requests.set(before + 1);
        before
    }

    /// No request is under way.
    pub(crate) fn idle(&self) {
        if !self.over.get() {
            self.active.set(false);
        }
    }

    /// The connection is over, whoever still holds it.
    pub(crate) fn over(&self) {
        self.over.set(true);
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// The peer closes it, not we.
    pub(crate) fn closed_by_peer(&self) {
        self.by_peer.set(true);
    }

    /// Bytes read and written since the connection began.
    pub(crate) fn bytes(&self, (received, sent): (u64, u64)) {
        let (seen_received, seen_sent) = self.counted_bytes.replace((received, sent));
        let stats = &self.core().stats;
        stats.upstream_cx_rx_bytes_total.add(received.saturating_sub(seen_received));
        stats.upstream_cx_tx_bytes_total.add(sent.saturating_sub(seen_sent));
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let stats = &self.host.core.stats;
        stats.upstream_cx_active.dec();
        self.host.host.stats.cx_active.dec();
        stats.upstream_cx_destroy.inc();
        let (by, by_active) = if self.by_peer.get() {
            (&stats.upstream_cx_destroy_remote, &stats.upstream_cx_destroy_remote_with_active_rq)
        } else {
            (&stats.upstream_cx_destroy_local, &stats.upstream_cx_destroy_local_with_active_rq)
        };
        by.inc();
        if self.active.get() {
            stats.upstream_cx_destroy_with_active_rq.inc();
            by_active.inc();
        }
        stats.upstream_cx_length_ms.record(self.start.elapsed().as_millis() as u64);
        if self.connected.get() {
            stats.upstream_rq_per_cx.record(self.requests.get());
        }
    }
}

/// A request's accounting while it is on a connection.
pub(crate) struct RequestGuard {
    host: Rc<WorkerHost>,
    priority: Priority,
}

impl RequestGuard {
    /// Counts a request in; `None` where `max_requests` is reached.
    pub(crate) fn new(host: &Rc<WorkerHost>, priority: Priority) -> Option<Self> {
        let core = &host.core;
        if !core.breakers[priority as usize].requests().take() {
            return None;
        }
        core.stats.upstream_rq_total.inc();
        core.stats.upstream_rq_active.inc();
        host.host.stats.rq_total.inc();
        host.host.stats.rq_active.inc();
        Some(Self { host: host.clone(), priority })
    }

    pub(crate) fn host(&self) -> &Rc<WorkerHost> {
        &self.host
    }

    pub(crate) fn priority(&self) -> Priority {
        self.priority
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let core = &self.host.core;
        core.breakers[self.priority as usize].requests().give_back();
        core.stats.upstream_rq_active.dec();
        self.host.host.stats.rq_active.dec();
    }
}
