//! Counters, gauges and histograms under Envoy's names.
//!
//! A [`Scope`] is a name prefix (`cluster.foo.`); handles made from it keep it alive, and with the last of them
//! its stats vanish from the output. (Scopes of one part, `server.` or `http.`, live as long as the store.) Handles
//! are made when a configuration becomes a runtime object, never per request.
//!
//! A stat is an id; its values lie in one slab per thread (see `slab`), so that counting needs no locked
//! instruction, and a stat that nobody has counted yet costs some bytes in its scope and nothing else. Tags are
//! taken out of the names when they are shown ([`tags`]), not when stats are made.
//!
//! Two scopes of the same prefix are one scope. A full name that was put together in two ways (`a.` + `b.c`,
//! `a.b.` + `c`) is shown once, with the sum.

mod config;
mod handle;
mod histogram;
pub(crate) mod number;
mod prometheus;
mod render;
mod scope;
mod slab;
mod tags;
mod thin;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwap;

pub use config::{StatsModel, refuse_sinks};
pub use handle::{Counter, Gauge, Histogram, Lazy, TextReadout};
pub use histogram::{DEFAULT_BUCKETS, Merged, QUANTILES, Statistics, Unit};
pub use number::{general, shortest, streamed};
pub use prometheus::prometheus;
pub use render::{BucketMode, Params, StatType, json, text};
pub use scope::{Scope, Tag};
pub use tags::{Extracted, Tags};
pub use thin::Thin;

use scope::{Entry, GivenTags, Kind, ScopeInner};

/// All stats of one process.
#[derive(Clone)]
pub struct Store(Arc<StoreInner>);

struct StoreInner {
    scopes: Mutex<HashMap<Arc<str>, Weak<ScopeInner>>>,
    symbols: Mutex<Symbols>,
    merged: Mutex<HashMap<u32, Merged>>,
    model: ArcSwap<StatsModel>,
    root: OnceLock<Arc<ScopeInner>>,
    /// Those that belong to the process, not to a configuration.
    kept: Mutex<Vec<Arc<ScopeInner>>>,
}

/// The last part of a name as a number: `upstream_rq_total` exists once, not once per cluster.
#[derive(Default)]
struct Symbols {
    ids: HashMap<Arc<str>, u32>,
    names: Vec<Arc<str>>,
}

impl Symbols {
    fn intern(&mut self, name: &str) -> u32 {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let (name, id) = (Arc::<str>::from(name), self.names.len() as u32);
        self.names.push(name.clone());
        self.ids.insert(name, id);
        id
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Store {
    fn default() -> Self {
        Self(Arc::new(StoreInner {
            scopes: Mutex::default(),
            symbols: Mutex::default(),
            merged: Mutex::default(),
            model: ArcSwap::from_pointee(StatsModel::default()),
            root: OnceLock::new(),
            kept: Mutex::default(),
        }))
    }
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what the bootstrap says on tags, rejected stats and buckets. Before the first stat is made: a stat
    /// that was made before is not shown if it is rejected, but it is not forgotten either.
    pub fn configure(&self, model: StatsModel) {
        self.0.model.store(Arc::new(model));
    }

    /// The configuration in force.
    pub fn model(&self) -> Arc<StatsModel> {
        self.0.model.load_full()
    }

    /// The scope without a prefix; its stats live as long as the store.
    pub fn root(&self) -> Scope {
        let inner = self.0.root.get_or_init(|| self.new_scope("".into(), None));
        Scope { inner: inner.clone(), store: self.clone() }
    }

    fn new_scope(&self, prefix: Arc<str>, tags: Option<Box<GivenTags>>) -> Arc<ScopeInner> {
        Arc::new(ScopeInner::new(prefix, tags, Arc::downgrade(&self.0)))
    }

    fn scope(&self, prefix: &str) -> Scope {
        self.keyed(prefix, || self.new_scope(prefix.into(), None))
    }

    /// A scope whose stats carry these tags, in this order, in place of those that their names would tell (Istio's
    /// metrics). A dot is put behind the name. It lives as long as the store, as do its stats.
    pub fn tagged(&self, name: &str, tags: Vec<Tag>) -> Scope {
        let prefix = format!("{name}.");
        let given = Box::new(GivenTags::new(&prefix, tags));
        let key = given.key.clone();
        self.keyed(&key, || self.new_scope(prefix.into(), Some(given)))
    }

    /// The scope of that key; made if there is none.
    fn keyed(&self, key: &str, make: impl FnOnce() -> Arc<ScopeInner>) -> Scope {
        let mut scopes = lock(&self.0.scopes);
        let inner = match scopes.get(key).and_then(Weak::upgrade) {
            Some(inner) => inner,
            None => {
                let inner = make();
                if inner.is_kept() {
                    lock(&self.0.kept).push(inner.clone());
                }
                scopes.insert(inner.key().clone(), Arc::downgrade(&inner));
                inner
            }
        };
        drop(scopes);
        Scope { inner, store: self.clone() }
    }

    /// Brings the histograms up to date; the control thread calls it every `stats_flush_interval`.
    pub fn flush(&self) {
        self.visit(
            |kind| matches!(kind, Kind::Histogram(_)),
            |_, stats, _| {
                for entry in stats {
                    let counts = slab::lock().bins(entry.id);
                    if !counts.is_empty() {
                        lock(&self.0.merged).entry(entry.id).or_default().update(&counts);
                    }
                }
            },
        );
    }

    /// Sets all counters to 0, as `/reset_counters` does.
    pub fn reset_counters(&self) {
        self.visit(
            |kind| kind == Kind::Counter,
            |_, stats, _| {
                let mut registry = slab::lock();
                stats.iter().for_each(|entry| registry.reset(entry.id));
            },
        );
    }

    /// The value of the counter or gauge of that full name; for tests and for the few stats that another part
    /// of the proxy reads.
    pub fn value(&self, name: &str) -> Option<u64> {
        let mut sum: Option<u64> = None;
        self.visit(
            |kind| matches!(kind, Kind::Counter | Kind::Gauge),
            |scope, stats, names| {
                let leaf = name.strip_prefix(&*scope.prefix).and_then(|l| l.strip_suffix(scope.suffix()));
                let Some(leaf) = leaf else { return };
                for entry in
                    stats.iter().filter(|e| names.get(e.symbol as usize).is_some_and(|n| **n == *leaf))
                {
                    let value = slab::lock().value(entry.id).0;
                    sum = Some(sum.unwrap_or(0).wrapping_add(value));
                }
            },
        );
        sum
    }

    /// Calls `f` with every scope, its stats of the wanted kinds, and the last parts of their names by symbol. The
    /// scope keeps the ids from being used again meanwhile.
    fn visit(&self, wanted: impl Fn(Kind) -> bool, mut f: impl FnMut(&ScopeInner, &[Entry], &[Arc<str>])) {
        let mut scopes: Vec<Arc<ScopeInner>> =
            lock(&self.0.scopes).values().filter_map(Weak::upgrade).collect();
        scopes.extend(self.0.root.get().cloned());
        for scope in &scopes {
            let mut stats = lock(&scope.stats).clone();
            stats.retain(|entry| wanted(entry.kind));
            // After the stats: all their symbols are there.
            let names = lock(&self.0.symbols);
            f(scope, &stats, &names.names);
        }
    }
}

#[cfg(test)]
mod tests;
