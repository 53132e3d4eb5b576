//! Runtime layers: values that an operator changes while the proxy serves.
//!
//! Keys are Envoy's (`upstream.healthy_panic_threshold`, `envoy.reloadable_features.…`). A later layer wins.
//! Readers take the current [`Snapshot`]; a change publishes a new one as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};

/// The layers merged into one map.
#[derive(Default, Debug)]
pub struct Snapshot {
    values: BTreeMap<String, String>,
}

/// Handle to the current snapshot, shared by all threads.
#[derive(Clone, Default)]
pub struct Runtime(Arc<ArcSwap<Snapshot>>);

impl Runtime {
    /// A runtime with these values.
    pub fn new(values: BTreeMap<String, String>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(Snapshot { values })))
    }

    /// The current values.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.load_full()
    }

    /// An integer, or the default where the key is absent or no number.
    pub fn integer(&self, key: &str, default: u64) -> u64 {
        self.0.load().get(key).and_then(|v| v.parse().ok()).unwrap_or(default)
    }

    /// A boolean feature flag.
    pub fn boolean(&self, key: &str, default: bool) -> bool {
        match self.0.load().get(key) {
            Some("true" | "1") => true,
            Some("false" | "0") => false,
            _ => default,
        }
    }
}

impl Snapshot {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }
}

/// A `RuntimeFractionalPercent`: a default fraction that a runtime key may override.
#[derive(Debug, Clone, PartialEq)]
pub struct Fraction {
    numerator: u32,
    denominator: u32,
    key: Option<Arc<str>>,
}

impl Fraction {
    /// Always.
    pub const ALWAYS: Self = Self { numerator: 100, denominator: 100, key: None };

    /// A fixed fraction.
    pub fn fixed(percent: &FractionalPercent) -> Self {
        let denominator = match percent.denominator() {
            DenominatorType::Hundred => 100,
            DenominatorType::TenThousand => 10_000,
            DenominatorType::Million => 1_000_000,
        };
        Self { numerator: percent.numerator, denominator, key: None }
    }

    /// From the message; without a default value the default is 0.
    pub fn from_proto(message: &RuntimeFractionalPercent) -> Self {
        let mut fraction = message
            .default_value
            .as_ref()
            .map_or(Self { numerator: 0, denominator: 100, key: None }, Self::fixed);
        fraction.key = (!message.runtime_key.is_empty()).then(|| message.runtime_key.as_str().into());
        fraction
    }

    /// Whether `random` (uniform over u64) falls into the fraction. A runtime value is a numerator over 100.
    pub fn hit(&self, runtime: &Runtime, random: u64) -> bool {
        if let Some(key) = &self.key
            && let Some(value) = runtime.0.load().get(key).and_then(|v| v.parse::<u64>().ok())
        {
            return random % 100 < value;
        }
        random % u64::from(self.denominator) < u64::from(self.numerator)
    }
}
