//! `istio.stats` (`stats.PluginConfig`): Istio's standard metrics of HTTP streams, counted when a stream is over. What
//! they are and where their labels come from stands in [`sampan_listener::istio::stats`].

use std::sync::Arc;

use envoy_types::pb::google::protobuf::Any;
use sampan_config::istio::{PLUGIN_CONFIG, PluginConfig};
use sampan_core::error::ConfigResult;
use sampan_core::format::FormatContext;
use sampan_listener::istio::stats::IstioStats;

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, decode};

pub(super) const TYPE: &str = PLUGIN_CONFIG;

struct Stats(IstioStats);

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    filter(&decode(any)?, context)
}

/// The filter of a message that came in another shape.
pub(super) fn filter(
    message: &PluginConfig,
    context: &HttpFilterContext<'_>,
) -> ConfigResult<HttpFilterKind> {
    Ok(HttpFilterKind::Filter(Arc::new(Stats(IstioStats::new(message, context.factory)?))))
}

impl HttpFilter for Stats {
    fn on_log(&self, context: &FormatContext<'_>) {
        self.0.record_http(context);
    }
}
