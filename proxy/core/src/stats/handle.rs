//! What stats are counted with.

use std::sync::{Arc, OnceLock};

use super::scope::{Scope, ScopeInner};
use super::slab;

/// What keeps a stat alive, and its id.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) scope: Arc<ScopeInner>,
    pub(super) id: u32,
}

/// A number that only grows.
#[derive(Clone)]
pub struct Counter(pub(super) Handle);

/// A number that goes up and down.
#[derive(Clone)]
pub struct Gauge(pub(super) Handle);

/// A distribution.
#[derive(Clone)]
pub struct Histogram(pub(super) Handle);

/// A text, such as the version of the last configuration.
#[derive(Clone)]
pub struct TextReadout(pub(super) Handle);

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
