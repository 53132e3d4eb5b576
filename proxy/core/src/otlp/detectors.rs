//! `resource_detectors`: what else a collector is told of who sends. Source: `envoy.extensions.tracers.opentelemetry.
//! resource_detectors`. Dynatrace's reads files of a product's own and is refused by name.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::tracers::opentelemetry::resource_detectors::v3 as pb;
use prost::{Message, Name};

use super::{Resource, text};
use crate::error::{ConfigError, ConfigResult};

/// Adds what they find; what comes later replaces what was there.
pub fn detect(detectors: &[TypedExtensionConfig], resource: &mut Resource) -> ConfigResult<()> {
    for (i, detector) in detectors.iter().enumerate() {
        let any = detector.typed_config.as_ref();
        let name = any.map_or("", |any| any.type_url.rsplit('/').next().unwrap_or_default());
        let bytes = any.map_or(&[][..], |any| any.value.as_slice());
        if name == pb::StaticConfigResourceDetectorConfig::full_name() {
            let config = pb::StaticConfigResourceDetectorConfig::decode(bytes);
            let config = config
                .map_err(|error| ConfigError::new(error.to_string()).index(i).at("resource_detectors"))?;
            config.attributes.iter().for_each(|(key, value)| set(resource, key, value));
        } else if name == pb::EnvironmentResourceDetectorConfig::full_name() {
            let told = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
            pairs(&told).for_each(|(key, value)| set(resource, key, value));
        } else {
            let what = format_args!("resource detector '{}' ({name})", detector.name);
            return Err(ConfigError::unsupported(what).index(i).at("resource_detectors"));
        }
    }
    Ok(())
}

/// `KEY=VALUE,…`; what is no pair is passed over.
fn pairs(told: &str) -> impl Iterator<Item = (&str, &str)> {
    told.split(',').filter_map(|pair| {
        let mut parts = pair.split('=').filter(|part| !part.is_empty());
        let pair = (parts.next()?, parts.next()?);
        parts.next().is_none().then_some(pair)
    })
}

/// An attribute without a value is none.
fn set(resource: &mut Resource, key: &str, value: &str) {
    if !value.is_empty() {
        resource.attributes.retain(|known| known.key != key);
        resource.attributes.push(text(key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_holds_pairs() {
        let found: Vec<_> = pairs("a=b,, c = d ,e=f=g,h,=i=j,k=").collect();
        assert_eq!(found, [("a", "b"), (" c ", " d "), ("i", "j")]);
    }
}
