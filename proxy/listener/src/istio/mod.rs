//! Istio's own filters, as far as they concern connections; the HTTP connection manager's filters share [`stats`].

pub mod metadata_exchange;
pub mod stats;
pub mod wasm;

use crate::network::NetworkFilterRegistry;

/// Registers the network filters.
pub(crate) fn register(registry: &mut NetworkFilterRegistry) {
    registry.register(sampan_config::istio::METADATA_EXCHANGE, metadata_exchange::make);
    registry.register(sampan_config::istio::PLUGIN_CONFIG, stats::network::make);
    registry.register(wasm::NETWORK_TYPE, wasm::make);
}
