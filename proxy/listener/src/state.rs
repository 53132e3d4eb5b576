//! Network filters that leave objects in the connection's filter state: `set_filter_state` and `sni_cluster`.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::set_filter_state::v3::Config;
use futures_util::future::LocalBoxFuture;
use sampan_core::format::FormatContext;
use sampan_core::state_values::{StateValues, TCP_PROXY_CLUSTER, TextKind, TextState};

use crate::context::Worker;
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, NetworkFilterRegistry, Verdict};
use crate::proto::decode;

/// Registers both.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register("envoy.extensions.filters.network.set_filter_state.v3.Config", |any, _| {
        let message: Config = decode(any)?;
        let values = StateValues::from_proto(&message.on_new_connection, "on_new_connection")?;
        Ok(NetworkFilter::Connection(Arc::new(SetFilterState(values))))
    });
    registry.register("envoy.extensions.filters.network.sni_cluster.v3.SniCluster", |_, _| {
        Ok(NetworkFilter::Connection(Arc::new(SniCluster)))
    });
}

struct SetFilterState(StateValues);

impl ConnectionFilter for SetFilterState {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        downstream.with_stream_info(|info| {
            for index in 0..self.0.len() {
                if let Some((key, object)) = self.0.make(index, &FormatContext::new(info)) {
                    info.connection.set_state(key, object);
                }
            }
        });
        Box::pin(std::future::ready(Verdict::Continue))
    }
}

/// The server name that the client asked for is the cluster that `tcp_proxy` sends it to.
struct SniCluster;

impl ConnectionFilter for SniCluster {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        let info = &downstream.info;
        if let Some(name) = info.requested_server_name.as_deref().filter(|name| !name.is_empty()) {
            let object = TextState::object(TextKind::TcpProxyCluster, name.to_owned());
            info.set_state(TCP_PROXY_CLUSTER, object);
        }
        Box::pin(std::future::ready(Verdict::Continue))
    }
}
