//! OpenTelemetry's samplers: what is sampled of what Envoy's own decision lets through, as in Envoy 1.40. They alone decide
//! of the upstream's span.
//!
//! Dynatrace's and CEL's, which takes only expressions that were parsed elsewhere, are refused by name.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::tracers::opentelemetry::samplers::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use sampan_core::error::{AtField, ConfigError, ConfigResult};

use crate::filter::{decode, message_name};

/// A sampler.
#[derive(Debug)]
pub enum Sampler {
    /// `AlwaysOnSamplerConfig`
    AlwaysOn,
    /// `TraceIdRatioBasedSamplerConfig`
    Ratio {
        /// So many
        numerator: u32,
        /// of so many.
        denominator: u32,
    },
    /// `ParentBasedSamplerConfig`: the parent decides; the other where there is none.
    Parent(Box<Sampler>),
}

impl Sampler {
    /// From the message.
    pub(super) fn from_proto(message: &TypedExtensionConfig) -> ConfigResult<Self> {
        let any = message.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        let name = message_name(any);
        match name.strip_prefix("envoy.extensions.tracers.opentelemetry.samplers.v3.") {
            Some("AlwaysOnSamplerConfig") => Ok(Self::AlwaysOn),
            Some("TraceIdRatioBasedSamplerConfig") => {
                let config: pb::TraceIdRatioBasedSamplerConfig = decode(any)?;
                let percentage = config.sampling_percentage.unwrap_or_default();
                let denominator = match percentage.denominator() {
                    DenominatorType::Hundred => 100,
                    DenominatorType::TenThousand => 10_000,
                    DenominatorType::Million => 1_000_000,
                };
                Ok(Self::Ratio { numerator: percentage.numerator, denominator })
            }
            Some("ParentBasedSamplerConfig") => {
                let config: pb::ParentBasedSamplerConfig = decode(any)?;
                let wrapped = config.wrapped_sampler.unwrap_or_default();
                Ok(Self::Parent(Box::new(Self::from_proto(&wrapped).at("wrapped_sampler")?)))
            }
            _ => Err(ConfigError::unsupported(format_args!("sampler '{}' ({name})", message.name))),
        }
    }

    /// Whether a span is sampled: by its parent's decision, and the first half of its trace's id.
    pub(super) fn samples(&self, parent: Option<bool>, high: u64) -> bool {
        match (self, parent) {
            (Self::AlwaysOn, _) => true,
            // Envoy reads the id's bytes as its machine has numbers.
            (Self::Ratio { numerator, denominator }, _) => {
                high.swap_bytes() % u64::from(*denominator) < u64::from(*numerator)
            }
            (Self::Parent(_), Some(sampled)) => sampled,
            (Self::Parent(wrapped), None) => wrapped.samples(None, high),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_decides() {
        let half = Sampler::Ratio { numerator: 50, denominator: 100 };
        // The first byte is the lowest.
        assert!(half.samples(Some(false), 0x31 << 56) && half.samples(None, 0x64 << 56));
        assert!(!half.samples(Some(true), 0x96 << 56));
        let none = Sampler::Ratio { numerator: 0, denominator: 100 };
        assert!(!none.samples(Some(true), 0));
        let parent = Sampler::Parent(Box::new(none));
        assert!(parent.samples(Some(true), 0) && !parent.samples(None, 0));
        assert!(Sampler::AlwaysOn.samples(Some(false), 1));
    }
}
