//! `retry_host_predicate` and `retry_priority`: where a retry goes. The first attempt asks neither.

use envoy_types::pb::envoy::config::route::v3::retry_policy as pb;
use envoy_types::pb::envoy::extensions::retry::host::omit_host_metadata::v3::OmitHostMetadataConfig;
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;
use envoy_types::pb::google::protobuf::{Value, value::Kind};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stream_info::Metadata;
use sampan_upstream::Host;

use crate::filter::{decode, message_name};

/// Where hosts' own metadata for load balancing lies.
const LB: &str = "envoy.lb";

/// A kind of host that a retry avoids.
#[derive(Clone)]
pub enum HostPredicate {
    /// One that was tried before.
    Previous,
    /// A canary.
    Canary,
    /// One whose metadata has all of these values; a list has each of its own.
    Metadata(Vec<(Box<str>, Value)>),
}

impl HostPredicate {
    pub(super) fn list(messages: &[pb::RetryHostPredicate]) -> ConfigResult<Vec<Self>> {
        let one = |(i, message)| Self::from_proto(message).at_index("retry_host_predicate", i);
        messages.iter().enumerate().map(one).collect()
    }

    fn from_proto(message: &pb::RetryHostPredicate) -> ConfigResult<Self> {
        let Some(pb::retry_host_predicate::ConfigType::TypedConfig(any)) = &message.config_type else {
            return Err(ConfigError::missing("typed_config"));
        };
        match message_name(any) {
            "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate" => Ok(Self::Previous),
            "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate" => Ok(Self::Canary),
            "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig" => {
                let config: OmitHostMetadataConfig = decode(any).at("typed_config")?;
                let mut all = config.metadata_match.unwrap_or_default().filter_metadata;
                let fields = all.remove(LB).unwrap_or_default().fields;
                Ok(Self::Metadata(fields.into_iter().map(|(key, value)| (key.into(), value)).collect()))
            }
            name => {
                Err(ConfigError::unsupported(format!("retry host predicate {:?} ({name})", message.name)))
            }
        }
    }

    /// Whether it means the host; `tried` are those of the attempts before.
    pub fn avoids(&self, host: &Host, tried: &[std::sync::Arc<Host>]) -> bool {
        match self {
            Self::Previous => tried.iter().any(|other| std::ptr::eq(&**other, host)),
            Self::Canary => host.canary(),
            Self::Metadata(wanted) => has_all(host.metadata().as_deref(), wanted),
        }
    }
}

fn has_all(metadata: Option<&Metadata>, wanted: &[(Box<str>, Value)]) -> bool {
    let Some(lb) = metadata.and_then(|all| all.get(LB)) else { return false };
    let has = |(key, wanted): &(Box<str>, Value)| {
        lb.fields.get(&**key).is_some_and(|value| match &value.kind {
            Some(Kind::ListValue(list)) => list.values.contains(wanted),
            _ => value == wanted,
        })
    };
    !wanted.is_empty() && wanted.iter().all(has)
}

/// `retry_priority`: after how many attempts at a time the priorities tried are left out.
pub(super) fn previous_priorities(message: &pb::RetryPriority) -> ConfigResult<u32> {
    let Some(pb::retry_priority::ConfigType::TypedConfig(any)) = &message.config_type else {
        return Err(ConfigError::missing("typed_config"));
    };
    match message_name(any) {
        "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig" => {
            let config: PreviousPrioritiesConfig = decode(any).at("typed_config")?;
            match u32::try_from(config.update_frequency) {
                Ok(frequency) if frequency > 0 => Ok(frequency),
                _ => Err(ConfigError::new("value must be greater than 0").at("update_frequency")),
            }
        }
        name => Err(ConfigError::unsupported(format!("retry priority {:?} ({name})", message.name))),
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{ListValue, Struct};

    use super::*;

    fn text(value: &str) -> Value {
        Value { kind: Some(Kind::StringValue(value.to_owned())) }
    }

    #[test]
    fn metadata_is_had_when_all_of_it_is() {
        let list = Value { kind: Some(Kind::ListValue(ListValue { values: vec![text("x"), text("y")] })) };
        let fields = [("a".to_owned(), text("1")), ("b".to_owned(), list)].into_iter().collect();
        let metadata: Metadata = [(LB.to_owned(), Struct { fields })].into_iter().collect();
        let has = |wanted: &[(&str, &str)]| {
            let wanted: Vec<_> = wanted.iter().map(|(key, value)| (Box::from(*key), text(value))).collect();
            has_all(Some(&metadata), &wanted)
        };
        assert!(has(&[("a", "1")]) && has(&[("a", "1"), ("b", "y")]));
        assert!(!has(&[("a", "1"), ("b", "z")]) && !has(&[("c", "1")]) && !has(&[]));
        assert!(!has_all(None, &[("a".into(), text("1"))]));
    }
}
