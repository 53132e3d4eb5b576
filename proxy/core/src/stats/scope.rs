//! Scopes: a prefix, and the stats that were made under it.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::handle::{Counter, Gauge, Handle, Histogram, TextReadout};
use super::histogram::Unit;
use super::{Store, StoreInner, lock, slab};

/// A prefix under which stats are made.
#[derive(Clone)]
pub struct Scope {
    pub(super) inner: Arc<ScopeInner>,
    pub(super) store: Store,
}

pub(super) struct ScopeInner {
    pub(super) prefix: Arc<str>,
    /// Tags that were given when it was made, in place of those that the names would tell.
    pub(super) tags: Option<Box<GivenTags>>,
    store: Weak<StoreInner>,
    /// Sorted by symbol.
    pub(super) stats: Mutex<Vec<Entry>>,
    /// By id; there are few.
    texts: Mutex<Vec<(u32, Arc<str>)>>,
}

#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) symbol: u32,
    pub(super) kind: Kind,
    pub(super) id: u32,
}

/// What a stat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Text,
    Histogram(Unit),
}

/// Tag and value; the names of most are known beforehand.
pub type Tag = (Cow<'static, str>, Box<str>);

/// Tags that belong to every stat of a scope. Full names are `PREFIX LEAF.TAG.VALUE.TAG.VALUE…`, without the parts
/// that are empty.
pub(super) struct GivenTags {
    pub(super) tags: Box<[Tag]>,
    suffix: Box<str>,
    /// What tells the scope from others.
    pub(super) key: Arc<str>,
}

impl GivenTags {
    pub(super) fn new(prefix: &str, tags: Vec<Tag>) -> Self {
        let parts = tags.iter().flat_map(|(tag, value)| [&**tag, &**value]);
        let suffix: String = parts.filter(|part| !part.is_empty()).flat_map(|part| [".", part]).collect();
        // With all parts: which of them are empty makes a difference.
        let parts = tags.iter().flat_map(|(tag, value)| ["\0", tag, "\0", value]);
        let key: String = std::iter::once(prefix).chain(parts).collect();
        Self { tags: tags.into(), suffix: suffix.into(), key: key.into() }
    }
}

impl Scope {
    /// A scope below this one; a `.` is put between.
    pub fn scope(&self, name: &str) -> Scope {
        self.store.scope(&format!("{}{name}.", self.inner.prefix))
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

impl ScopeInner {
    pub(super) fn new(prefix: Arc<str>, tags: Option<Box<GivenTags>>, store: Weak<StoreInner>) -> Self {
        Self { prefix, tags, store, stats: Mutex::default(), texts: Mutex::default() }
    }

    /// Whether it lives as long as the store: scopes of one part (`server.`) and those with tags of their own do.
    pub(super) fn is_kept(&self) -> bool {
        self.tags.is_some() || self.prefix.find('.') == Some(self.prefix.len() - 1)
    }

    pub(super) fn full_name(&self, entry: Entry, names: &[Arc<str>]) -> String {
        let leaf = names.get(entry.symbol as usize).map_or("", |name| name);
        [&*self.prefix, leaf, self.suffix()].concat()
    }

    /// The text of a readout, if it was ever set.
    pub(super) fn text(&self, id: u32) -> Option<Arc<str>> {
        lock(&self.texts).iter().find(|(of, _)| *of == id).map(|(_, text)| text.clone())
    }

    pub(super) fn set_text(&self, id: u32, text: Arc<str>) {
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
    pub(super) fn suffix(&self) -> &str {
        self.tags.as_ref().map_or("", |given| &given.suffix)
    }

    /// Under what the store finds it.
    pub(super) fn key(&self) -> &Arc<str> {
        self.tags.as_ref().map_or(&self.prefix, |given| &given.key)
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
