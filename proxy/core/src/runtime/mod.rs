//! Runtime layers: values that an operator changes while the proxy serves.
//!
//! Keys are Envoy's (`upstream.healthy_panic_threshold`, `envoy.reloadable_features.…`). A later layer wins.
//! Readers take the current [`Snapshot`]; a change publishes a new one as a whole.
//!
//! On the request path most keys are not set. Each runtime keeps a 64-bit mask of the hashes of all set keys; a
//! reader whose key's bit is not there is done after one plain load.
//!
//! Supported layers: static and admin. A disk layer needs its directory watched and an RTDS layer needs xDS;
//! both are refused by name.

mod value;

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::bootstrap::v3::{LayeredRuntime, runtime_layer::LayerSpecifier};
use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};

use crate::error::{AtField, ConfigError, ConfigResult};
use crate::stats::{Counter, Gauge, Scope};
pub use value::Value;

/// The layers merged into one map.
#[derive(Default, Debug)]
pub struct Snapshot {
    values: HashMap<String, Value, foldhash::fast::FixedState>,
    layers: Vec<Layer>,
}

/// One layer, as `/runtime` shows it.
#[derive(Default, Debug, Clone)]
pub struct Layer {
    /// The name in the configuration.
    pub name: String,
    /// Its values.
    pub values: BTreeMap<String, Value>,
    admin: bool,
}

/// Handle to the current snapshot, shared by all threads.
#[derive(Clone, Default)]
pub struct Runtime(Arc<Inner>);

#[derive(Default)]
struct Inner {
    snapshot: ArcSwap<Snapshot>,
    /// A bit for each set key, see [`bit`].
    mask: AtomicU64,
    /// Changes one at a time.
    change: Mutex<()>,
    stats: OnceLock<Stats>,
}

struct Stats {
    load_success: Counter,
    override_dir_not_exists: Counter,
    num_keys: Gauge,
    num_layers: Gauge,
    admin_overrides_active: Gauge,
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        for name in ["load_error", "deprecated_feature_use", "override_dir_exists"] {
            scope.counter(name);
        }
        scope.gauge("deprecated_feature_seen_since_process_start");
        Self {
            load_success: scope.counter("load_success"),
            override_dir_not_exists: scope.counter("override_dir_not_exists"),
            num_keys: scope.gauge("num_keys"),
            num_layers: scope.gauge("num_layers"),
            admin_overrides_active: scope.gauge("admin_overrides_active"),
        }
    }

    fn update(&self, snapshot: &Snapshot) {
        self.load_success.inc();
        self.override_dir_not_exists.inc();
        self.num_keys.set(snapshot.values.len() as u64);
        self.num_layers.set(snapshot.layers.len() as u64);
        let overridden = snapshot.layers.iter().any(|l| l.admin && !l.values.is_empty());
        self.admin_overrides_active.set(u64::from(overridden));
    }
}

/// The values cannot be changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
#[error("No admin layer specified")]
pub struct NoAdminLayer;

fn bit(key: &str) -> u64 {
    1 << (foldhash::fast::FixedState::default().hash_one(key) % 64)
}

impl Runtime {
    /// A runtime with these values in one layer, read as an operator would write them.
    pub fn new(values: BTreeMap<String, String>) -> Self {
        let values = values.iter().map(|(key, text)| (key.clone(), Value::from_yaml(text))).collect();
        let runtime = Self::default();
        runtime.publish(vec![Layer { name: "static".into(), values, admin: false }]);
        runtime
    }

    /// The layers of the bootstrap; without `layered_runtime` there are none, not even an admin layer. Makes
    /// the stats `runtime.*`.
    pub fn from_bootstrap(layered: Option<&LayeredRuntime>, root: &Scope) -> ConfigResult<Self> {
        let layers = match layered {
            Some(layered) => layers(layered).at("layered_runtime")?,
            None => Vec::new(),
        };
        let runtime = Self::default();
        let stats = Stats::new(&root.scope("runtime"));
        // Envoy loads its layers once more when those that come by RTDS are there; counted even if there are none.
        stats.load_success.inc();
        stats.override_dir_not_exists.inc();
        let _ = runtime.0.stats.set(stats);
        runtime.publish(layers);
        Ok(runtime)
    }

    fn publish(&self, layers: Vec<Layer>) {
        let mut values = HashMap::<_, _, foldhash::fast::FixedState>::default();
        for layer in &layers {
            values.extend(layer.values.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        let mask = values.keys().fold(0, |mask, key| mask | bit(key));
        let snapshot = Snapshot { values, layers };
        if let Some(stats) = self.0.stats.get() {
            stats.update(&snapshot);
        }
        // A reader may see the old mask with the new values or the other way round for a moment; both are
        // answers that it could have got a moment earlier.
        self.0.snapshot.store(Arc::new(snapshot));
        self.0.mask.store(mask, Ordering::Release);
    }

    /// Sets values in the admin layer (`/runtime_modify`); an empty value takes the key out of it.
    pub fn modify<'a>(
        &self,
        values: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), NoAdminLayer> {
        let _one = self.0.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut layers = self.0.snapshot.load().layers.clone();
        let admin = layers.iter_mut().find(|layer| layer.admin).ok_or(NoAdminLayer)?;
        for (key, text) in values {
            if text.is_empty() {
                admin.values.remove(key);
            } else {
                admin.values.insert(key.into(), Value::from_yaml(text));
            }
        }
        self.publish(layers);
        Ok(())
    }

    /// The current values.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.0.snapshot.load_full()
    }

    fn read<T>(&self, key: &str, bit: u64, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
        if self.0.mask.load(Ordering::Acquire) & bit == 0 {
            return None;
        }
        self.0.snapshot.load().values.get(key).and_then(read)
    }

    /// An integer, or the default where the key is absent or no number.
    pub fn integer(&self, key: &str, default: u64) -> u64 {
        self.read(key, bit(key), Value::integer).unwrap_or(default)
    }

    /// A boolean feature flag.
    pub fn boolean(&self, key: &str, default: bool) -> bool {
        self.read(key, bit(key), Value::boolean).unwrap_or(default)
    }

    /// A number.
    pub fn double(&self, key: &str, default: f64) -> f64 {
        self.read(key, bit(key), Value::double).unwrap_or(default)
    }
}

impl Snapshot {
    /// The value of a key as text.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(Value::text)
    }

    /// The layers, the weakest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }
}

fn layers(layered: &LayeredRuntime) -> ConfigResult<Vec<Layer>> {
    let mut layers: Vec<Layer> = Vec::new();
    for (i, message) in layered.layers.iter().enumerate() {
        let parse = || {
            if layers.iter().any(|l| l.name == message.name) {
                return Err(ConfigError::new(format!("Duplicate layer name: {}", message.name)));
            }
            let mut layer = Layer { name: message.name.clone(), ..Layer::default() };
            match &message.layer_specifier {
                Some(LayerSpecifier::StaticLayer(values)) => {
                    value::flatten(values, "", &mut layer.values).at("static_layer")?;
                }
                Some(LayerSpecifier::AdminLayer(_)) => {
                    if layers.iter().any(|l| l.admin) {
                        return Err(ConfigError::new(
                            "Too many admin layers specified in LayeredRuntime, at most one may be specified",
                        ));
                    }
                    layer.admin = true;
                }
                Some(LayerSpecifier::DiskLayer(_)) => return Err(ConfigError::unsupported("disk_layer")),
                Some(LayerSpecifier::RtdsLayer(_)) => return Err(ConfigError::unsupported("rtds_layer")),
                None => return Err(ConfigError::missing("layer_specifier")),
            }
            Ok(layer)
        };
        let layer = parse().at_index("layers", i)?;
        layers.push(layer);
    }
    Ok(layers)
}

/// A `RuntimeFractionalPercent`: a default fraction that a runtime key may override.
#[derive(Debug, Clone, PartialEq)]
pub struct Fraction {
    numerator: u32,
    denominator: u32,
    key: Option<(Arc<str>, u64)>,
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

    /// The same, with a runtime key that may override it; no key if it is empty.
    #[must_use]
    pub fn with_key(mut self, key: &str) -> Self {
        self.key = (!key.is_empty()).then(|| (key.into(), bit(key)));
        self
    }

    /// From the message; without a default value the default is 0.
    pub fn from_proto(message: &RuntimeFractionalPercent) -> Self {
        message
            .default_value
            .as_ref()
            .map_or(Self { numerator: 0, denominator: 100, key: None }, Self::fixed)
            .with_key(&message.runtime_key)
    }

    /// Whether `random` (uniform over u64) falls into the fraction. The runtime's value is a fraction of its own
    /// or a whole number of per cent; another one does not count.
    pub fn hit(&self, runtime: &Runtime, random: u64) -> bool {
        let overridden = self.key.as_ref().and_then(|(key, bit)| runtime.read(key, *bit, Value::fraction));
        let (numerator, denominator) =
            overridden.unwrap_or((u64::from(self.numerator), u64::from(self.denominator)));
        random % denominator < numerator
    }
}

#[cfg(test)]
mod tests;
