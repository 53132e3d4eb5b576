//! `envoy.filters.http.wasm`, as far as it means code that is part of the proxy: see [`sampan_listener::istio::wasm`].

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::wasm::v3::Wasm;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::ConfigResult;
use sampan_listener::istio::wasm::{Native, native};

use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, decode};

pub(super) const TYPE: &str = "envoy.extensions.filters.http.wasm.v3.Wasm";

struct Nothing;

impl HttpFilter for Nothing {}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let message: Wasm = decode(any)?;
    match native(message.config.as_ref())? {
        Native::MetadataExchange => super::peer_metadata::make_plain(context),
        Native::Stats(config) => super::istio_stats::filter(&config, context),
        Native::Nothing => Ok(HttpFilterKind::Filter(Arc::new(Nothing))),
    }
}
