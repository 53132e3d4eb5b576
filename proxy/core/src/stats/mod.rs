//! Counters, gauges and histograms under Envoy's names.
//!
//! A [`Scope`] is a name prefix (`cluster.foo.`); handles made from it keep their stat alive. Handles are made
//! when a configuration becomes a runtime object, never per request.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// All stats of one process.
#[derive(Clone, Default)]
pub struct Store(Arc<Mutex<BTreeMap<String, Arc<AtomicU64>>>>);

/// A prefix under which stats are made.
#[derive(Clone)]
pub struct Scope {
    store: Store,
    prefix: Arc<str>,
}

/// A number that only grows.
#[derive(Clone)]
pub struct Counter(Arc<AtomicU64>);

/// A number that goes up and down.
#[derive(Clone)]
pub struct Gauge(Arc<AtomicU64>);

/// A distribution.
#[derive(Clone)]
pub struct Histogram(Arc<AtomicU64>);

/// What a histogram's values are measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// No unit.
    Unspecified,
    /// Bytes.
    Bytes,
    /// Microseconds.
    Microseconds,
    /// Milliseconds.
    Milliseconds,
    /// Per cent, scaled.
    Percent,
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The scope without a prefix.
    pub fn root(&self) -> Scope {
        Scope { store: self.clone(), prefix: "".into() }
    }
}

impl Scope {
    /// A scope below this one; a `.` is put between.
    pub fn scope(&self, name: &str) -> Scope {
        Scope { store: self.store.clone(), prefix: format!("{}{name}.", self.prefix).into() }
    }

    fn slot(&self, name: &str) -> Arc<AtomicU64> {
        let mut all = self.store.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(format!("{}{name}", self.prefix)).or_default().clone()
    }

    /// The counter of that name.
    pub fn counter(&self, name: &str) -> Counter {
        Counter(self.slot(name))
    }

    /// The gauge of that name.
    pub fn gauge(&self, name: &str) -> Gauge {
        Gauge(self.slot(name))
    }

    /// The histogram of that name.
    pub fn histogram(&self, name: &str, _unit: Unit) -> Histogram {
        Histogram(self.slot(name))
    }
}

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum over all threads; not for the request path.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Gauge {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.sub(1);
    }

    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes away.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// Sets the value; only for gauges that the control thread alone writes.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The sum over all threads; not for the request path.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Histogram {
    /// Records one value.
    pub fn record(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }
}
