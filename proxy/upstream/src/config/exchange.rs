//! The `filters` of a cluster: network filters of its connections. The only one is Istio's TCP metadata exchange.

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Message;
use prost::Message as _;
use sampan_config::istio::{METADATA_EXCHANGE, MetadataExchange};
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::type_name;

/// What both ends must agree on, and which labels are told besides the usual ones. Clusters with equal ones share
/// what they send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExchangeConfig {
    /// The ALPN protocol.
    pub protocol: String,
    /// Labels.
    pub additional_labels: Vec<String>,
}

/// Metadata exchange, if it is among the filters; any other filter is refused by name.
pub(super) fn filters(message: &Message) -> ConfigResult<Option<Box<ExchangeConfig>>> {
    let mut found = None;
    for (index, filter) in message.filters.iter().enumerate() {
        let exchange = match (&filter.typed_config, &filter.config_discovery) {
            (Some(any), None) => one(any).at("typed_config"),
            (_, Some(_)) => Err(ConfigError::unsupported("config_discovery").at("config_discovery")),
            (None, None) => Err(ConfigError::missing("typed_config")),
        };
        found = Some(exchange.at_index("filters", index)?);
    }
    Ok(found)
}

fn one(any: &envoy_types::pb::google::protobuf::Any) -> ConfigResult<Box<ExchangeConfig>> {
    let any = sampan_config::any::resolved(any).map_err(|e| ConfigError::new(e.to_string()))?;
    if type_name(&any) != METADATA_EXCHANGE {
        return Err(ConfigError::unsupported(format!("cluster filter type {:?}", any.type_url)));
    }
    let message = MetadataExchange::decode(any.value.as_slice())
        .map_err(|e| ConfigError::new(format!("malformed message: {e}")))?;
    if message.protocol.is_empty() {
        return Err(ConfigError::missing("protocol"));
    }
    let MetadataExchange { protocol, additional_labels, .. } = message;
    Ok(Box::new(ExchangeConfig { protocol, additional_labels }))
}
