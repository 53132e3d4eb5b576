//! `istio.metadata_exchange` of a connection (`envoy.tcp.metadataexchange.config.MetadataExchange`): the proxies at both
//! ends tell each other who they are before the application's first byte. The work is done by
//! [`sampan_core::peer::PeerExchange`], a layer over the connection; the cluster's filter of that name is in
//! `sampan_upstream`.
//!
//! `enable_discovery` asks the workload discovery service about peers that do not tell; without it nobody is found.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_config::istio::MetadataExchange as Message;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::peer::{Exchange, ExchangeStats};

use super::stats::network::DownstreamExchange;
use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, Verdict};
use crate::proto::decode;

struct MetadataExchange(Arc<Exchange>);

pub(super) fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: Message = decode(any)?;
    if message.protocol.is_empty() {
        return Err(ConfigError::missing("protocol"));
    }
    let node = &context.server.node;
    let own = node.own.peer(&message.additional_labels);
    let stats = ExchangeStats::new(&context.root_scope());
    let exchange = Exchange::new(&message.protocol, &own, &node.id, message.additional_labels, stats);
    Ok(NetworkFilter::Connection(Arc::new(MetadataExchange(Arc::new(exchange)))))
}

impl ConnectionFilter for MetadataExchange {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        let alpn = downstream.info.tls.as_ref().and_then(|tls| tls.alpn.clone());
        let cell = downstream.transport.exchange(&self.0, alpn.as_deref());
        downstream.info.slots.get_or_insert_with(|| DownstreamExchange(cell));
        Box::pin(std::future::ready(Verdict::Continue))
    }
}
