//! The chain of HTTP filters, and those of upgrades.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_listener::FactoryContext;

use super::super::discovered::Discovered;
use super::flag;
use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, HttpFilterRegistry};
use crate::router::RouterConfig;

/// An upgrade that the listener knows.
pub struct Upgrade {
    /// Whether routes that say nothing allow it.
    pub enabled: bool,
    /// Its own filters, if it has some.
    pub chain: Option<Chain>,
}

/// HTTP filters in order, and the router that ends them.
pub struct Chain {
    /// All but the last.
    pub filters: Vec<NamedFilter>,
    /// The last; none where there is no filter at all.
    pub router: Option<Arc<RouterConfig>>,
}

/// A filter with its name in the chain, by which routes configure it.
pub struct NamedFilter {
    /// `http_filters[].name`
    pub name: Arc<str>,
    /// The filter.
    pub filter: Arc<dyn HttpFilter>,
    /// `disabled`: off unless a route switches it on.
    pub disabled: bool,
}

/// `http_filters`, or those of an upgrade.
pub(super) fn chain(
    filters: &[pb::HttpFilter],
    context: &FactoryContext,
    registry: &HttpFilterRegistry,
    stat_prefix: &str,
    field: &str,
) -> ConfigResult<Chain> {
    use pb::http_filter::ConfigType;
    let mut made = Vec::new();
    let mut router = None;
    for (i, message) in filters.iter().enumerate() {
        let config = match &message.config_type {
            Some(ConfigType::TypedConfig(any)) => any,
            Some(ConfigType::ConfigDiscovery(discovery)) => {
                if i + 1 == filters.len() {
                    let error = ConfigError::unsupported("discovery of the last filter");
                    return Err(error.at("config_discovery").index(i).at(field));
                }
                let filter = Discovered::from_proto(discovery, &message.name, context, registry, stat_prefix)
                    .at("config_discovery")
                    .at_index(field, i)?;
                let name = message.name.as_str().into();
                made.push(NamedFilter { name, filter: Arc::new(filter), disabled: message.disabled });
                continue;
            }
            None if message.is_optional => continue,
            None => return Err(ConfigError::missing("typed_config").index(i).at(field)),
        };
        if router.is_some() {
            return Err(ConfigError::new("a terminal filter must be the last filter in a http filter chain")
                .index(i - 1)
                .at(field));
        }
        let filter_context = HttpFilterContext { factory: context, stat_prefix, filter_name: &message.name };
        match registry.make(config, &filter_context) {
            Ok(HttpFilterKind::Router(config)) => router = Some(config),
            Ok(HttpFilterKind::Filter(filter)) => made.push(NamedFilter {
                name: message.name.as_str().into(),
                filter,
                disabled: message.disabled,
            }),
            Err(e) => return Err(e.at("typed_config").index(i).at(field)),
        }
    }
    if router.is_none()
        && let Some(last) = filters.last()
    {
        let reason = format!("non-terminal filter {:?} is the last filter in a http filter chain", last.name);
        return Err(ConfigError::new(reason).at(field));
    }
    Ok(Chain { filters: made, router })
}

/// `upgrade_configs`, by lower-case type.
pub(super) fn upgrades(
    message: &pb::HttpConnectionManager,
    context: &FactoryContext,
    registry: &HttpFilterRegistry,
    prefix: &str,
) -> ConfigResult<HashMap<Box<str>, Upgrade>> {
    let mut upgrades = HashMap::new();
    for (i, upgrade) in message.upgrade_configs.iter().enumerate() {
        let chain = if upgrade.filters.is_empty() {
            None
        } else {
            Some(
                chain(&upgrade.filters, context, registry, prefix, "filters")
                    .at_index("upgrade_configs", i)?,
            )
        };
        let name = upgrade.upgrade_type.to_ascii_lowercase().into_boxed_str();
        if upgrades.insert(name, Upgrade { enabled: flag(upgrade.enabled, true), chain }).is_some() {
            return Err(ConfigError::new(format!(
                "multiple upgrade configs with the name {:?}",
                upgrade.upgrade_type
            ))
            .index(i)
            .at("upgrade_configs"));
        }
    }
    Ok(upgrades)
}
