//! TCP: a fresh connection for each downstream connection.

use std::rc::Rc;

use sampan_tls::Transport;

use super::{ConnectionGuard, PoolError};
use crate::circuit::Priority;
use crate::connect::{self, ConnectInfo, ConnectOptions};
use crate::worker::WorkerHost;

/// An upstream connection of `tcp_proxy`; its drop is counted as its end.
pub struct TcpLease {
    /// The stream; may be taken out for splicing.
    pub transport: Option<Transport>,
    /// What is known of the connection.
    pub info: ConnectInfo,
    guard: ConnectionGuard,
    active: ActiveRequest,
}

/// What Envoy counts as a request of a TCP connection; `max_requests` does not hold for it.
struct ActiveRequest(Rc<WorkerHost>);

impl ActiveRequest {
    fn new(host: &Rc<WorkerHost>) -> Self {
        host.core.stats.upstream_rq_total.inc();
        host.core.stats.upstream_rq_active.inc();
        host.host.stats.rq_total.inc();
        host.host.stats.rq_active.inc();
        Self(host.clone())
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.core.stats.upstream_rq_active.dec();
        self.0.host.stats.rq_active.dec();
    }
}

pub(super) async fn acquire(
    host: &Rc<WorkerHost>,
    priority: Priority,
    options: &ConnectOptions,
) -> Result<TcpLease, PoolError> {
    let place = host.place(priority)?;
    // Every connection is a pool of its own: only the cluster's limit holds, and it is a hard one.
    let Some(permit) = host.connection_permit(priority, false) else {
        return Err(PoolError::Overflow);
    };
    let guard = ConnectionGuard::new(host, permit);
    let result = connect::connect(host.cluster(), &host.host, options, &[]).await;
    drop(place);
    match result {
        Ok(connected) => {
            guard.connected(&connected.info);
            guard.begin_request();
            Ok(TcpLease {
                transport: Some(connected.transport),
                info: connected.info,
                guard,
                active: ActiveRequest::new(host),
            })
        }
        Err(failure) => {
            host.count_connect_failure(&failure);
            if failure.kind == connect::ConnectFailureKind::Remote {
                guard.closed_by_peer();
            }
            host.core.stats.upstream_rq_pending_failure_eject.inc();
            Err(PoolError::Connect(failure))
        }
    }
}

impl TcpLease {
    /// The host.
    pub fn host(&self) -> &Rc<WorkerHost> {
        &self.active.0
    }

    /// Bytes read from and written to the host so far, for `upstream_cx_rx_bytes_total` and `tx`.
    pub fn count_bytes(&self, received: u64, sent: u64) {
        self.guard.bytes((received, sent));
    }

    /// The peer ended the connection first.
    pub fn closed_by_peer(&self) {
        self.guard.closed_by_peer();
    }
}
