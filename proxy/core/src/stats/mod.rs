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
mod histogram;
pub(crate) mod number;
mod prometheus;
mod render;
mod slab;
mod tags;
mod thin;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwap;

pub use config::{StatsModel, refuse_sinks};
pub use histogram::{DEFAULT_BUCKETS, Merged, QUANTILES, Statistics};
pub use number::{general, shortest, streamed};
pub use prometheus::prometheus;
pub use render::{BucketMode, Params, StatType, json, text};
pub use tags::{Extracted, Tags};
pub use thin::Thin;

/// All stats of one process.
#[derive(Clone)]
pub struct Store(Arc<StoreInner>);

struct StoreInner {
    scopes: Mutex<HashMap<Arc<str>, Weak<ScopeInner>>>,
    symbols: Mutex<Symbols>,
    merged: Mutex<HashMap<u32, Merged>>,
    model: ArcSwap<StatsModel>,
    root: OnceLock<Arc<ScopeInner>>,
    /// Scopes of one part (`server.`): they belong to the process, not to a configuration.
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

/// A prefix under which stats are made.
#[derive(Clone)]
pub struct Scope {
    inner: Arc<ScopeInner>,
    store: Store,
}

struct ScopeInner {
    prefix: Arc<str>,
    /// Tags that were given when it was made, in place of those that the names would tell.
    tags: Option<Box<GivenTags>>,
    store: Weak<StoreInner>,
    /// Sorted by symbol.
    stats: Mutex<Vec<Entry>>,
    /// By id; there are few.
    texts: Mutex<Vec<(u32, Arc<str>)>>,
}

/// Tag and value; the names of most are known beforehand.
pub type Tag = (Cow<'static, str>, Box<str>);

/// Tags that belong to every stat of a scope. Full names are `PREFIX LEAF.TAG.VALUE.TAG.VALUE…`, without the parts
/// that are empty.
struct GivenTags {
    tags: Box<[Tag]>,
    suffix: Box<str>,
    /// What tells the scope from others.
    key: Arc<str>,
}

impl GivenTags {
    fn new(prefix: &str, tags: Vec<Tag>) -> Self {
        let parts = tags.iter().flat_map(|(tag, value)| [&**tag, &**value]);
        let suffix: String = parts.filter(|part| !part.is_empty()).flat_map(|part| [".", part]).collect();
        // With all parts: which of them are empty makes a difference.
        let parts = tags.iter().flat_map(|(tag, value)| ["\0", tag, "\0", value]);
        let key: String = std::iter::once(prefix).chain(parts).collect();
        Self { tags: tags.into(), suffix: suffix.into(), key: key.into() }
    }
}

#[derive(Clone, Copy)]
struct Entry {
    symbol: u32,
    kind: Kind,
    id: u32,
}

/// What a stat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Text,
    Histogram(Unit),
}

/// What keeps a stat alive, and its id.
#[derive(Clone)]
struct Handle {
    scope: Arc<ScopeInner>,
    id: u32,
}

/// A number that only grows.
#[derive(Clone)]
pub struct Counter(Handle);

/// A number that goes up and down.
#[derive(Clone)]
pub struct Gauge(Handle);

/// A distribution.
#[derive(Clone)]
pub struct Histogram(Handle);

/// A text, such as the version of the last configuration.
#[derive(Clone)]
pub struct TextReadout(Handle);

/// What a histogram's values are measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// No unit.
    Unspecified,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
    /// Milliseconds.
    Milliseconds,
    /// Per cent: 1.0 is recorded as 1,000,000.
    Percent,
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
        Arc::new(ScopeInner {
            prefix,
            tags,
            store: Arc::downgrade(&self.0),
            stats: Mutex::default(),
            texts: Mutex::default(),
        })
    }

    fn scope(&self, prefix: String) -> Scope {
        let mut scopes = lock(&self.0.scopes);
        let inner = match scopes.get(prefix.as_str()).and_then(Weak::upgrade) {
            Some(inner) => inner,
            None => {
                let prefix = Arc::<str>::from(prefix);
                let inner = self.new_scope(prefix.clone(), None);
                if prefix.find('.') == Some(prefix.len() - 1) {
                    lock(&self.0.kept).push(inner.clone());
                }
                scopes.insert(prefix, Arc::downgrade(&inner));
                inner
            }
        };
        drop(scopes);
        Scope { inner, store: self.clone() }
    }

    /// A scope whose stats carry these tags, in this order, in place of those that their names would tell (Istio's
    /// metrics). A dot is put behind the name. It lives as long as the store, as do its stats.
    pub fn tagged(&self, name: &str, tags: Vec<Tag>) -> Scope {
        let prefix = format!("{name}.");
        let given = Box::new(GivenTags::new(&prefix, tags));
        let mut scopes = lock(&self.0.scopes);
        let inner = match scopes.get(&given.key).and_then(Weak::upgrade) {
            Some(inner) => inner,
            None => {
                let key = given.key.clone();
                let inner = self.new_scope(prefix.into(), Some(given));
                lock(&self.0.kept).push(inner.clone());
                scopes.insert(key, Arc::downgrade(&inner));
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

impl ScopeInner {
    fn full_name(&self, entry: Entry, names: &[Arc<str>]) -> String {
        let leaf = names.get(entry.symbol as usize).map_or("", |name| name);
        [&*self.prefix, leaf, self.suffix()].concat()
    }

    /// The text of a readout, if it was ever set.
    fn text(&self, id: u32) -> Option<Arc<str>> {
        lock(&self.texts).iter().find(|(of, _)| *of == id).map(|(_, text)| text.clone())
    }

    fn set_text(&self, id: u32, text: Arc<str>) {
        let mut texts = lock(&self.texts);
        match texts.iter_mut().find(|(of, _)| *of == id) {
            Some((_, old)) => *old = text,
            None => {
                texts.reserve_exact(1);
                texts.push((id, text));
            }
        }
    }

    /// What stands behind the last part of a name.
    fn suffix(&self) -> &str {
        self.tags.as_ref().map_or("", |given| &given.suffix)
    }

    /// Under what the store finds it.
    fn key(&self) -> &Arc<str> {
        self.tags.as_ref().map_or(&self.prefix, |given| &given.key)
    }
}

impl Scope {
    /// A scope below this one; a `.` is put between.
    pub fn scope(&self, name: &str) -> Scope {
        self.store.scope(format!("{}{name}.", self.inner.prefix))
    }

    /// The prefix, with the dot at its end.
    pub fn prefix(&self) -> &str {
        &self.inner.prefix
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn handle(&self, name: &str, kind: Kind) -> Handle {
        let symbol = lock(&self.store.0.symbols).intern(name);
        let mut stats = lock(&self.inner.stats);
        // Symbols grow, so a scope's stats are made in ascending order nearly always.
        let position = stats.partition_point(|e| e.symbol <= symbol);
        let same = stats[..position]
            .iter()
            .rev()
            .take_while(|e| e.symbol == symbol)
            .find(|e| std::mem::discriminant(&e.kind) == std::mem::discriminant(&kind));
        let id = match same {
            Some(entry) => entry.id,
            None if self.rejects(name) => slab::SINK,
            None => {
                let mut registry = slab::lock();
                let id = match kind {
                    Kind::Histogram(_) => registry.new_histogram(),
                    _ => registry.new_cell(),
                };
                if stats.len() == stats.capacity() {
                    // A scope is made with all its stats and then grows no more: doubling would leave room for nothing.
                    let more = (stats.len() / 4).max(4);
                    stats.reserve_exact(more);
                }
                stats.insert(position, Entry { symbol, kind, id });
                id
            }
        };
        drop(stats);
        Handle { scope: self.inner.clone(), id }
    }

    fn rejects(&self, name: &str) -> bool {
        let model = self.store.0.model.load();
        model.rejects_some() && model.rejects(&[&*self.inner.prefix, name, self.inner.suffix()].concat())
    }

    /// The counter of that name.
    pub fn counter(&self, name: &str) -> Counter {
        Counter(self.handle(name, Kind::Counter))
    }

    /// The gauge of that name.
    pub fn gauge(&self, name: &str) -> Gauge {
        Gauge(self.handle(name, Kind::Gauge))
    }

    /// The histogram of that name.
    pub fn histogram(&self, name: &str, unit: Unit) -> Histogram {
        Histogram(self.handle(name, Kind::Histogram(unit)))
    }

    /// The text of that name.
    pub fn text_readout(&self, name: &str) -> TextReadout {
        TextReadout(self.handle(name, Kind::Text))
    }
}

impl Drop for ScopeInner {
    fn drop(&mut self) {
        let stats = std::mem::take(self.stats.get_mut().unwrap_or_else(PoisonError::into_inner));
        let store = self.store.upgrade();
        // Backwards, so that the next scope gets the ids in ascending order and its cells lie together.
        for entry in stats.iter().rev() {
            if let Kind::Histogram(_) = entry.kind {
                if let Some(store) = &store {
                    lock(&store.merged).remove(&entry.id);
                }
                slab::lock().free_histogram(entry.id);
            } else {
                slab::lock().free_cell(entry.id);
            }
        }
        if let Some(store) = store {
            let mut scopes = lock(&store.scopes);
            // A new scope of the same prefix may have taken the place already.
            if scopes.get(self.key()).is_some_and(|s| s.strong_count() == 0) {
                scopes.remove(self.key());
            }
        }
    }
}

impl Counter {
    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds.
    #[inline]
    pub fn add(&self, n: u64) {
        slab::add(self.0.id, n);
    }

    /// The sum over all threads; not for the request path.
    pub fn value(&self) -> u64 {
        self.0.value()
    }
}

impl Gauge {
    /// Adds one.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    #[inline]
    pub fn dec(&self) {
        self.sub(1);
    }

    /// Adds.
    #[inline]
    pub fn add(&self, n: u64) {
        slab::add(self.0.id, n);
    }

    /// Sets the value that it has: who was set was used, at 0 too.
    pub fn touch(&self) {
        self.add(0);
    }

    /// Takes away.
    #[inline]
    pub fn sub(&self, n: u64) {
        slab::add(self.0.id, n.wrapping_neg());
    }

    /// Sets the value; only for gauges that the control thread alone writes.
    pub fn set(&self, n: u64) {
        self.add(n.wrapping_sub(self.value()));
    }

    /// The sum over all threads; not for the request path.
    pub fn value(&self) -> u64 {
        self.0.value()
    }
}

impl Handle {
    fn value(&self) -> u64 {
        if self.id == slab::SINK { 0 } else { slab::lock().value(self.id).0 }
    }
}

impl Histogram {
    /// Records one value.
    #[inline]
    pub fn record(&self, value: u64) {
        slab::record(self.0.id, value);
    }
}

impl TextReadout {
    /// Sets the text.
    pub fn set(&self, text: &str) {
        if self.0.id != slab::SINK {
            self.0.scope.set_text(self.0.id, text.into());
        }
    }
}

/// A set of stats that is made when it is first needed: what few requests of few clusters touch costs nothing
/// in all the others.
pub struct Lazy<T> {
    scope: Scope,
    make: fn(&Scope) -> T,
    cell: OnceLock<T>,
}

impl<T> Lazy<T> {
    /// Nothing yet.
    pub fn new(scope: Scope, make: fn(&Scope) -> T) -> Self {
        Self { scope, make, cell: OnceLock::new() }
    }

    /// The stats, made now if need be.
    pub fn get(&self) -> &T {
        self.cell.get_or_init(|| (self.make)(&self.scope))
    }
}

#[cfg(test)]
mod tests;
