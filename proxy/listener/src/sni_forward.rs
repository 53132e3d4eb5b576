//! `sni_dynamic_forward_proxy`: the server name that a client's TLS asks for is resolved before `tcp_proxy` looks for it
//! among the hosts of a dynamic_forward_proxy cluster.
//!
//! A name that does not resolve goes on: `tcp_proxy` finds no host then (`UH`). A connection for which there is no room
//! is closed.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::sni_dynamic_forward_proxy::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use futures_util::future::LocalBoxFuture;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::state_values::{
    AddressState, DYNAMIC_PORT, NumberState, UPSTREAM_ADDRESS, dynamic_host, dynamic_port,
};
use sampan_upstream::DnsCacheUser;
use sampan_upstream::config::DnsCacheConfig;
use sampan_upstream::dns_cache::{Entry, Load};

use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, NetworkFilterRegistry, Verdict};
use crate::proto::decode;

/// Registers the filter.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register("envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig", make);
}

struct SniForward {
    cache: DnsCacheUser,
    port: u16,
    /// `save_upstream_address`
    saves_address: bool,
}

fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: pb::FilterConfig = decode(any)?;
    let cache = message.dns_cache_config.as_ref().ok_or_else(|| ConfigError::missing("dns_cache_config"))?;
    let caches = &context.server.dns_caches;
    let cache = DnsCacheConfig::from_proto(cache).and_then(|c| caches.get(&c)).at("dns_cache_config")?;
    let port = message.port_specifier.map_or(0, |pb::filter_config::PortSpecifier::PortValue(port)| port);
    let port = u16::try_from(port)
        .map_err(|_| ConfigError::new("value must be inside range (0, 65535]").at("port_value"))?;
    let saves_address = message.save_upstream_address;
    Ok(NetworkFilter::Connection(Arc::new(SniForward { cache, port, saves_address })))
}

impl ConnectionFilter for SniForward {
    fn on_new_connection<'a>(
        &'a self,
        downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        Box::pin(self.resolve(downstream))
    }
}

impl SniForward {
    async fn resolve(&self, downstream: &mut Downstream) -> Verdict {
        let (host, port) = downstream.with_stream_info(|info| (dynamic_host(info), dynamic_port(info)));
        let asked = || downstream.info.requested_server_name.as_deref().unwrap_or_default().to_owned();
        let host = host.unwrap_or_else(asked);
        if host.is_empty() {
            return Verdict::Continue;
        }
        let Some(waiting) = self.cache.wait() else { return Verdict::Over };
        let port = port.unwrap_or_else(|| {
            downstream.info.set_state(DYNAMIC_PORT, NumberState::object(self.port.into()));
            self.port
        });
        match self.cache.load(&host, port) {
            Load::Known(entry) => self.save(downstream, &entry),
            Load::Wait(entry) => {
                entry.resolved().await;
                drop(waiting);
                self.save(downstream, &entry);
            }
            Load::Overflow => return Verdict::Over,
        }
        Verdict::Continue
    }

    fn save(&self, downstream: &Downstream, entry: &Entry) {
        if let Some(address) = entry.address().filter(|_| self.saves_address) {
            downstream.info.set_state(UPSTREAM_ADDRESS, AddressState::object(address.ip()));
        }
    }
}
