//! `istio.stats` as a network filter: a connection's metrics.
//!
//! A connection is opened, to Istio, when its peer is known: by TCP metadata exchange, or because there is none. It then
//! reports its bytes every `tcp_reporting_duration`, and at its end whatever is known. The labels are those of the first
//! report.

use std::cell::{Cell, OnceCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::ConfigResult;
use sampan_core::format::FormatContext;
use sampan_core::peer::{Outcome, PeerCell};
use sampan_core::stream_info::StreamInfo;

use super::{IstioStats, Reporter, Set};
use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, Observer, Verdict};
use crate::proto::decode;

/// The exchange on the client's connection, as [`Slots`](sampan_core::stream_info::Slots) keep it.
pub struct DownstreamExchange(pub Rc<PeerCell>);

/// What has come of metadata exchange on the connection of that direction; none where nobody exchanges anything.
pub(super) fn exchanged(info: &StreamInfo, downstream: bool) -> Option<Outcome> {
    if downstream {
        return info.connection.slots.get::<DownstreamExchange>().map(|exchange| exchange.0.outcome());
    }
    info.upstream.as_ref()?.exchange.as_ref().map(|exchange| exchange.outcome())
}

struct NetworkStats(Arc<IstioStats>);

pub(in crate::istio) fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    filter(&decode(any)?, context)
}

/// The filter of a message that came in another shape.
pub(in crate::istio) fn filter(
    message: &sampan_config::istio::PluginConfig,
    context: &FactoryContext,
) -> ConfigResult<NetworkFilter> {
    let stats = Arc::new(IstioStats::new(message, context)?);
    Ok(NetworkFilter::Connection(Arc::new(NetworkStats(stats))))
}

impl ConnectionFilter for NetworkStats {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        downstream.held.observe(Box::new(Connection {
            stats: self.0.clone(),
            set: OnceCell::new(),
            sent: Cell::new(0),
            received: Cell::new(0),
        }));
        Box::pin(std::future::ready(Verdict::Continue))
    }
}

/// One connection's accounting.
struct Connection {
    stats: Arc<IstioStats>,
    /// There once it has reported.
    set: OnceCell<Rc<Set>>,
    sent: Cell<u64>,
    received: Cell<u64>,
}

impl Connection {
    fn peer_is_known(&self, info: &StreamInfo) -> bool {
        let downstream = self.stats.reporter != Reporter::Client;
        matches!(exchanged(info, downstream), Some(Outcome::Found(_) | Outcome::NotFound))
    }
}

impl Observer for Connection {
    fn period(&self) -> Option<Duration> {
        self.stats.report_every
    }

    fn report(&self, info: &StreamInfo, end: bool) {
        if self.set.get().is_none() && !end && !self.peer_is_known(info) {
            return;
        }
        let set = self.set.get_or_init(|| {
            let set = self.stats.tcp(info);
            set.count(0, 1);
            set
        });
        let (sent, received) = (info.bytes.wire_sent, info.bytes.wire_received);
        set.count(2, sent.saturating_sub(self.sent.replace(sent)));
        set.count(3, received.saturating_sub(self.received.replace(received)));
        if end {
            set.count(1, 1);
            self.stats.overrides.count(&set.custom, &FormatContext::new(info));
        }
    }
}
