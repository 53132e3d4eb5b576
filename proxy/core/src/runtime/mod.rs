//! Runtime layers: values that an operator changes while the proxy serves.
//!
//! Keys are Envoy's (`upstream.healthy_panic_threshold`, `envoy.reloadable_features.…`). A later layer wins.
//! Readers take the current [`Snapshot`]; a change publishes a new one as a whole.
//!
//! On the request path most keys are not set. Each runtime keeps a 64-bit mask of the hashes of all set keys; a
//! reader whose key's bit is not there is done after one plain load.
//!
//! A layer of RTDS is empty until who subscribes for it ([`Runtime::wanted`]) sets it; a disk layer is read anew when
//! who watches its root says so ([`Runtime::reload`]).

mod disk;
mod value;

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::config::bootstrap::v3::{LayeredRuntime, runtime_layer::LayerSpecifier};
use envoy_types::pb::envoy::config::core::v3::RuntimeFractionalPercent;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};
use envoy_types::pb::google::protobuf::Struct;

use crate::config_source::ConfigSource;
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
    kind: Kind,
}

/// Where a layer's values come from.
#[derive(Default, Debug, Clone)]
enum Kind {
    #[default]
    Static,
    Admin,
    /// The resource and where it is.
    Rtds(String, ConfigSource),
    Disk(disk::Folder),
}

/// A layer that comes by RTDS.
pub struct WantedLayer {
    /// Its place, for [`Runtime::set_layer`].
    pub index: usize,
    /// `rtds_layer.name`
    pub name: String,
    /// `rtds_layer.rtds_config`
    pub source: ConfigSource,
}

/// Handle to the current snapshot, shared by all threads.
#[derive(Clone, Default)]
pub struct Runtime(Arc<Inner>);

#[derive(Default)]
struct Inner {
    snapshot: ArcSwap<Snapshot>,
    /// A bit for each set key, see [`bit`].
    mask: AtomicU64,
    /// All layers, also folders that are not there; changes one at a time.
    layers: Mutex<Vec<Layer>>,
    stats: OnceLock<Stats>,
}

struct Stats {
    load_success: Counter,
    load_error: Counter,
    override_dir_exists: Counter,
    override_dir_not_exists: Counter,
    num_keys: Gauge,
    num_layers: Gauge,
    admin_overrides_active: Gauge,
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        scope.counter("deprecated_feature_use");
        scope.gauge("deprecated_feature_seen_since_process_start");
        Self {
            load_success: scope.counter("load_success"),
            load_error: scope.counter("load_error"),
            override_dir_exists: scope.counter("override_dir_exists"),
            override_dir_not_exists: scope.counter("override_dir_not_exists"),
            num_keys: scope.gauge("num_keys"),
            num_layers: scope.gauge("num_layers"),
            admin_overrides_active: scope.gauge("admin_overrides_active"),
        }
    }

    fn update(&self, snapshot: &Snapshot, broken: bool) {
        if broken {
            self.load_error.inc()
        } else {
            self.load_success.inc()
        }
        let folders = snapshot.layers.iter().filter(|l| matches!(l.kind, Kind::Disk(_))).count();
        if folders > 1 {
            self.override_dir_exists.inc()
        } else {
            self.override_dir_not_exists.inc()
        }
        self.num_keys.set(snapshot.values.len() as u64);
        self.num_layers.set(snapshot.layers.len() as u64);
        let overridden = snapshot.layers.iter().any(|l| l.is_admin() && !l.values.is_empty());
        self.admin_overrides_active.set(u64::from(overridden));
    }
}

impl Layer {
    fn is_admin(&self) -> bool {
        matches!(self.kind, Kind::Admin)
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
        runtime.publish(&[Layer { name: "static".into(), values, kind: Kind::Static }]);
        runtime
    }

    /// The layers of the bootstrap; without `layered_runtime` there are none, not even an admin layer. Makes
    /// the stats `runtime.*`. `service_cluster` is a folder's name for disk layers that ask for it.
    pub fn from_bootstrap(
        layered: Option<&LayeredRuntime>,
        root: &Scope,
        service_cluster: &str,
    ) -> ConfigResult<Self> {
        let layers = match layered {
            Some(layered) => layers(layered, service_cluster).at("layered_runtime")?,
            None => Vec::new(),
        };
        let runtime = Self::default();
        let stats = Stats::new(&root.scope("runtime"));
        // Envoy loads its layers once more when those that come by RTDS are there; counted even if there are none.
        stats.load_success.inc();
        let folders = layers.iter().filter(|l| matches!(&l.kind, Kind::Disk(f) if f.exists())).count();
        if folders > 1 {
            stats.override_dir_exists.inc()
        } else {
            stats.override_dir_not_exists.inc()
        }
        let _ = runtime.0.stats.set(stats);
        runtime.publish(&layers);
        *runtime.0.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers;
        Ok(runtime)
    }

    /// The layers that come by RTDS.
    pub fn wanted(&self) -> Vec<WantedLayer> {
        let layers = self.0.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = layers.iter().enumerate().filter_map(|(index, layer)| match &layer.kind {
            Kind::Rtds(name, source) => {
                Some(WantedLayer { index, name: name.clone(), source: source.clone() })
            }
            _ => None,
        });
        wanted.collect()
    }

    /// The roots of disk layers: a move to one of these paths changes what there is.
    pub fn roots(&self) -> Vec<PathBuf> {
        let layers = self.0.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let roots = layers.iter().filter_map(|layer| match &layer.kind {
            Kind::Disk(folder) => Some(folder.root.clone()),
            _ => None,
        });
        roots.collect()
    }

    /// Sets a layer as a whole, or says why not.
    pub fn set_layer(&self, index: usize, values: Option<&Struct>) -> ConfigResult<()> {
        let mut new = BTreeMap::new();
        if let Some(values) = values {
            value::flatten(values, "", &mut new)?;
        }
        let mut layers = self.0.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = layers.get_mut(index) {
            layer.values = new;
            self.publish(&layers);
        }
        Ok(())
    }

    /// Reads disk layers anew.
    pub fn reload(&self) {
        let layers = self.0.layers.lock().unwrap_or_else(PoisonError::into_inner);
        self.publish(&layers);
    }

    fn publish(&self, all: &[Layer]) {
        let mut broken = false;
        let mut layers = Vec::with_capacity(all.len());
        for layer in all {
            let Kind::Disk(folder) = &layer.kind else {
                layers.push(layer.clone());
                continue;
            };
            if !folder.exists() {
                continue;
            }
            match folder.read() {
                Ok(values) => layers.push(Layer { values, ..layer.clone() }),
                // The others serve without it, as in Envoy.
                Err(_) => broken = true,
            }
        }
        let mut values = HashMap::<_, _, foldhash::fast::FixedState>::default();
        for layer in &layers {
            values.extend(layer.values.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        let mask = values.keys().fold(0, |mask, key| mask | bit(key));
        let snapshot = Snapshot { values, layers };
        if let Some(stats) = self.0.stats.get() {
            stats.update(&snapshot, broken);
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
        let mut layers = self.0.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let admin = layers.iter_mut().find(|layer| layer.is_admin()).ok_or(NoAdminLayer)?;
        for (key, text) in values {
            if text.is_empty() {
                admin.values.remove(key);
            } else {
                admin.values.insert(key.into(), Value::from_yaml(text));
            }
        }
        self.publish(&layers);
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

fn layers(layered: &LayeredRuntime, service_cluster: &str) -> ConfigResult<Vec<Layer>> {
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
                    if layers.iter().any(Layer::is_admin) {
                        return Err(ConfigError::new(
                            "Too many admin layers specified in LayeredRuntime, at most one may be specified",
                        ));
                    }
                    layer.kind = Kind::Admin;
                }
                Some(LayerSpecifier::DiskLayer(disk)) => {
                    layer.kind =
                        Kind::Disk(disk::Folder::from_proto(disk, service_cluster).at("disk_layer")?);
                }
                Some(LayerSpecifier::RtdsLayer(rtds)) => {
                    let source = rtds.rtds_config.as_ref();
                    let source = source.ok_or_else(|| ConfigError::missing("rtds_config"));
                    let source = source.and_then(|s| ConfigSource::from_proto(s).at("rtds_config"));
                    layer.kind = Kind::Rtds(rtds.name.clone(), source.at("rtds_layer")?);
                }
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
