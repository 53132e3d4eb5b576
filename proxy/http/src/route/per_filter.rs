//! `typed_per_filter_config`: what a level of the table says to single filters.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};

use super::RouteContext;
use crate::filter::RouteConfig;

/// `typed_per_filter_config` of one level.
#[derive(Default)]
pub struct FilterConfigs(Vec<FilterConfig>);

pub(super) struct FilterConfig {
    name: Box<str>,
    pub(super) disabled: bool,
    pub(super) config: Option<RouteConfig>,
}

impl FilterConfigs {
    pub(super) fn from_proto(
        configs: &HashMap<String, Any>,
        context: &RouteContext<'_>,
    ) -> ConfigResult<Self> {
        const FILTER_CONFIG: &str = "envoy.config.route.v3.FilterConfig";
        let mut all = Vec::new();
        for (name, any) in configs {
            let at = |e: ConfigError| e.key(name).at("typed_per_filter_config");
            let mut one = FilterConfig { name: name.as_str().into(), disabled: false, config: None };
            if crate::filter::message_name(any) == FILTER_CONFIG {
                let wrapper: pb::FilterConfig = crate::filter::decode(any).map_err(at)?;
                one.disabled = wrapper.disabled;
                match &wrapper.config {
                    // What is switched off needs no configuration, and none is looked at.
                    _ if wrapper.disabled => {}
                    None => {
                        return Err(at(ConfigError::new(format!(
                            "Empty route/virtual host per filter configuration for {name} filter"
                        ))));
                    }
                    // An empty message switches the filter on.
                    Some(inner) if inner.type_url.is_empty() => {}
                    Some(inner) if wrapper.is_optional && !context.registry.knows_route_config(inner) => {
                        continue;
                    }
                    Some(inner) => {
                        let config = context.registry.route_config(inner).at("config").map_err(at)?;
                        one.config = Some(config);
                    }
                }
            } else {
                one.config = Some(context.registry.route_config(any).map_err(at)?);
            }
            all.push(one);
        }
        Ok(Self(all))
    }

    pub(super) fn get(&self, name: &str) -> Option<&FilterConfig> {
        self.0.iter().find(|c| &*c.name == name)
    }
}
