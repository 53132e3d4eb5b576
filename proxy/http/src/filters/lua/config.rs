//! The model of `Lua` and `LuaPerRoute`.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::extensions::filters::http::lua::v3 as pb;
use envoy_types::pb::google::protobuf::Struct;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::read_source;
use sampan_core::stats::{Counter, Gauge};

use super::vm::Setup;
use crate::filter::HttpFilterContext;

/// See the module.
pub(super) struct Config {
    pub(super) name: Arc<str>,
    default: Option<Setup>,
    named: HashMap<String, Setup>,
    pub(super) clears_route: bool,
    pub(super) errors: Counter,
    pub(super) executions: Counter,
}

/// What a level of the route says.
pub(super) struct PerRoute {
    disabled: bool,
    name: Option<String>,
    setup: Option<Setup>,
    pub(super) context: Option<Struct>,
}

fn setup(source: &DataSource, count: Option<&Gauge>) -> ConfigResult<Setup> {
    Setup::new(read_source(source)?, count.cloned()).map_err(ConfigError::new)
}

impl Config {
    pub(super) fn from_proto(message: &pb::Lua, context: &HttpFilterContext<'_>) -> ConfigResult<Self> {
        #[allow(deprecated)] // Still known, and much used.
        let inline = &message.inline_code;
        let root = context.factory.root_scope();
        let count = Some(root.scope("lua").gauge("lua_vm_count"));
        let default = match &message.default_source_code {
            Some(_) if !inline.is_empty() => {
                return Err(ConfigError::new(
                    "Only one of `inline_code` or `default_source_code` can be set for the Lua filter.",
                ));
            }
            Some(source) => Some(setup(source, count.as_ref()).at("default_source_code")?),
            None if inline.is_empty() => None,
            None => {
                Some(Setup::new(inline.clone(), count.clone()).map_err(ConfigError::new).at("inline_code")?)
            }
        };
        let mut named = HashMap::new();
        for (name, source) in &message.source_codes {
            let at = |e: ConfigError| e.key(name).at("source_codes");
            named.insert(name.clone(), setup(source, count.as_ref()).map_err(at)?);
        }
        let mut scope = root.scope(context.stat_prefix).scope("lua");
        let prefix = message.stat_prefix.trim_end_matches('.');
        if !prefix.is_empty() {
            scope = scope.scope(prefix);
        }
        Ok(Self {
            name: context.filter_name.into(),
            default,
            named,
            clears_route: message.clear_route_cache.is_none_or(|value| value.value),
            errors: scope.counter("errors"),
            executions: scope.counter("executions"),
        })
    }

    /// The script that is for a request.
    pub(super) fn setup<'s>(&'s self, route: Option<&'s PerRoute>) -> Option<&'s Setup> {
        match route {
            Some(PerRoute { disabled: true, .. }) => None,
            Some(PerRoute { name: Some(name), .. }) => self.named.get(name),
            Some(PerRoute { setup: Some(setup), .. }) => Some(setup),
            _ => self.default.as_ref(),
        }
    }
}

impl PerRoute {
    pub(super) fn from_proto(message: pb::LuaPerRoute) -> ConfigResult<Self> {
        use pb::lua_per_route::Override;
        let mut config = Self { disabled: false, name: None, setup: None, context: message.filter_context };
        match message.r#override {
            Some(Override::Disabled(disabled)) => config.disabled = disabled,
            Some(Override::Name(name)) => config.name = Some(name),
            Some(Override::SourceCode(source)) => {
                config.setup = Some(setup(&source, None).at("source_code")?)
            }
            None => {}
        }
        Ok(config)
    }
}
