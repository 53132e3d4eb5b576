//! Filters that control planes up to Istio 1.18 send as WebAssembly in the null runtime: code that is part of the
//! proxy, under a name. Those that Istio has become its native filters here, logs and Stackdriver do nothing, and
//! everything else, real WebAssembly above all, is refused by name.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::async_data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier as Local;
use envoy_types::pb::envoy::extensions::filters::network::wasm::v3::Wasm;
use envoy_types::pb::envoy::extensions::wasm::v3::PluginConfig as Plugin;
use envoy_types::pb::envoy::extensions::wasm::v3::plugin_config::Vm;
use envoy_types::pb::google::protobuf::{Any, StringValue, Struct, Value, value::Kind};
use futures_util::future::LocalBoxFuture;
use prost::Message;
use sampan_config::istio::{PLUGIN_CONFIG, PluginConfig};
use sampan_config::{Format, UnknownFields};
use sampan_core::error::{AtField, ConfigError, ConfigResult};

use crate::context::{FactoryContext, Worker};
use crate::network::{ConnectionFilter, Downstream, NetworkFilter, Verdict};
use crate::proto::decode;

pub(super) const NETWORK_TYPE: &str = "envoy.extensions.filters.network.wasm.v3.Wasm";

/// What a plugin of the null runtime is here.
pub enum Native {
    /// `envoy.wasm.metadata_exchange`
    MetadataExchange,
    /// `envoy.wasm.stats`
    Stats(Box<PluginConfig>),
    /// It would only log or call services that are no more.
    Nothing,
}

/// Finds what a plugin is.
pub fn native(plugin: Option<&Plugin>) -> ConfigResult<Native> {
    let plugin = plugin.ok_or_else(|| ConfigError::missing("config"))?;
    let Some(Vm::VmConfig(vm)) = &plugin.vm else {
        return Err(ConfigError::missing("vm_config").at("config"));
    };
    if vm.runtime != "envoy.wasm.runtime.null" {
        return Err(ConfigError::unsupported(format_args!("WebAssembly runtime {:?}", vm.runtime))
            .at("runtime")
            .at("vm_config")
            .at("config"));
    }
    let code = vm.code.as_ref().and_then(|code| code.specifier.as_ref());
    let name = match code {
        Some(Specifier::Local(source)) => match &source.specifier {
            Some(Local::InlineString(name)) => name.as_str(),
            Some(Local::InlineBytes(name)) => std::str::from_utf8(name).unwrap_or_default(),
            _ => "",
        },
        _ => "",
    };
    match name {
        "envoy.wasm.metadata_exchange" => Ok(Native::MetadataExchange),
        "envoy.wasm.stats" => {
            stats(plugin).map(|s| Native::Stats(Box::new(s))).at("configuration").at("config")
        }
        "envoy.wasm.access_log_policy" | "envoy.wasm.null.stackdriver" => Ok(Native::Nothing),
        other => Err(ConfigError::unsupported(format_args!("null runtime's code {other:?}"))
            .at("code")
            .at("vm_config")
            .at("config")),
    }
}

/// The configuration is JSON in a string, or a structure.
fn stats(plugin: &Plugin) -> ConfigResult<PluginConfig> {
    let broken = |e: &dyn std::fmt::Display| ConfigError::new(e.to_string());
    let Some(any) = &plugin.configuration else { return Ok(PluginConfig::default()) };
    let json = match any.type_url.rsplit('/').next().unwrap_or_default() {
        "google.protobuf.StringValue" => {
            StringValue::decode(any.value.as_slice()).map_err(|e| broken(&e))?.value
        }
        "google.protobuf.Struct" => {
            let value = Struct::decode(any.value.as_slice()).map_err(|e| broken(&e))?;
            let value = Value { kind: Some(Kind::StructValue(value)) };
            let mut json = Vec::new();
            sampan_core::format::write_json_value(&value, &mut json);
            String::from_utf8(json).map_err(|e| broken(&e))?
        }
        other => return Err(ConfigError::unsupported(format_args!("a configuration of type {other:?}"))),
    };
    if json.trim().is_empty() {
        return Ok(PluginConfig::default());
    }
    let shape = sampan_config::schema::Message::find(PLUGIN_CONFIG)
        .ok_or_else(|| ConfigError::unsupported(PLUGIN_CONFIG))?;
    // `debug`, `stat_prefix` and their kind are gone.
    let (bytes, _) = sampan_config::encode(shape, Format::Json, json.as_bytes(), UnknownFields::Ignore)
        .map_err(|e| broken(&e))?;
    PluginConfig::decode(bytes.as_slice()).map_err(|e| broken(&e))
}

/// The network filter of such a plugin.
pub(super) fn make(any: &Any, context: &FactoryContext) -> ConfigResult<NetworkFilter> {
    let message: Wasm = decode(any)?;
    match native(message.config.as_ref())? {
        Native::Stats(config) => super::stats::network::filter(&config, context),
        Native::Nothing => Ok(NetworkFilter::Connection(Arc::new(Nothing))),
        Native::MetadataExchange => {
            Err(ConfigError::unsupported("envoy.wasm.metadata_exchange as a network filter").at("config"))
        }
    }
}

struct Nothing;

impl ConnectionFilter for Nothing {
    fn on_new_connection<'a>(
        &'a self,
        _downstream: &'a mut Downstream,
        _worker: &'a Rc<Worker>,
    ) -> LocalBoxFuture<'a, Verdict> {
        Box::pin(std::future::ready(Verdict::Continue))
    }
}
