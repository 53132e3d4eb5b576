//! Where the values live: one slab of cells per thread, summed when read.
//!
//! A cell has a single writer, the thread whose slab it is in, so a write is a load, an addition and a store
//! without a locked instruction. Readers take the registry's lock and add up the cells of all slabs. A thread
//! that ends leaves its slab with all values to the next thread that starts; slabs are never freed, so that the
//! way to a cell is a pointer and an index.
//!
//! A cell holds `value << 1 | 1`: the low bit tells a stat that was written from one that never was, which a
//! value of 0 cannot (`usedonly`).
//!
//! Ids are handed out once per process and used again after their scope is gone. Freeing sets the cells of all
//! threads to 0; nobody else writes them at that time because the last handle is gone, and who gets the id next
//! gets it through the registry's lock.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::histogram::{self, Bins};

/// Chunks of a directory.
const CHUNKS: usize = 1024;
/// Counters per chunk: a chunk is what a thread allocates when it first writes to one of its cells.
const CELLS: usize = 4096;
/// Histograms per chunk.
const HISTOGRAMS: usize = 256;
/// Id of stats that the configuration rejects: written, never read.
pub(super) const SINK: u32 = 0;

/// Id to cell; chunks come into being on first use.
struct Directory<T, const C: usize>([OnceLock<Box<[T; C]>>; CHUNKS]);

impl<T: Default, const C: usize> Directory<T, C> {
    const CAPACITY: u32 = (C * CHUNKS) as u32;

    fn new() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }

    #[inline]
    fn get(&self, id: u32) -> Option<&T> {
        let id = id as usize;
        Some(&self.0[id / C % CHUNKS].get()?[id % C])
    }

    /// Only for the owning thread (a second initialiser would wait, not fail).
    #[cold]
    #[inline(never)]
    fn make(&self, id: u32) -> &T {
        let id = id as usize;
        // Through a vector: a large array would pass over the stack.
        let make = || {
            let cells: Box<[T]> = (0..C).map(|_| T::default()).collect();
            cells.try_into().unwrap_or_else(|_| Box::new(std::array::from_fn(|_| T::default())))
        };
        &self.0[id / C % CHUNKS].get_or_init(make)[id % C]
    }

    #[inline]
    fn get_or_make(&self, id: u32) -> &T {
        match self.get(id) {
            Some(cell) => cell,
            None => self.make(id),
        }
    }
}

struct Slab {
    cells: Directory<AtomicU64, CELLS>,
    histograms: Directory<Bins, HISTOGRAMS>,
}

impl Slab {
    fn new() -> Self {
        Self { cells: Directory::new(), histograms: Directory::new() }
    }

    #[inline]
    fn add(&self, id: u32, n: u64) {
        let cell = self.cells.get_or_make(id);
        cell.store(cell.load(Relaxed).wrapping_add(n << 1) | 1, Relaxed);
    }

    #[inline]
    fn record(&self, id: u32, value: u64) {
        self.histograms.get_or_make(id).add(histogram::bin_of(value), 1);
    }

    fn bins(&self, id: u32) -> Option<&Bins> {
        self.histograms.get(id)
    }
}

/// Gives the thread's slab to the next thread when this one ends.
struct Tenancy(Cell<Option<&'static Slab>>);

impl Drop for Tenancy {
    fn drop(&mut self) {
        MINE.set(None);
        lock().vacant.extend(self.0.get());
    }
}

thread_local! {
    /// The calling thread's slab. It has no destructor, so that reading it is one load.
    static MINE: Cell<Option<&'static Slab>> = const { Cell::new(None) };
    static TENANCY: Tenancy = const { Tenancy(Cell::new(None)) };
}

/// The thread's first write; or one of its last, when its locals are being torn down: then `write` gets the
/// slab that is only written under the lock.
#[cold]
#[inline(never)]
fn first(write: impl FnOnce(&Slab)) {
    let mut registry = lock();
    let slab = registry.vacant.pop().unwrap_or_else(|| {
        let slab: &'static Slab = Box::leak(Box::new(Slab::new()));
        registry.slabs.push(slab);
        slab
    });
    if TENANCY.try_with(|tenancy| tenancy.0.set(Some(slab))).is_ok() {
        MINE.set(Some(slab));
        write(slab);
    } else {
        write(slab);
        registry.vacant.push(slab);
    }
}

/// Adds to a counter or gauge on behalf of the calling thread.
#[inline]
pub(super) fn add(id: u32, n: u64) {
    match MINE.get() {
        Some(slab) => slab.add(id, n),
        None => first(move |slab| slab.add(id, n)),
    }
}

/// Records a histogram value on behalf of the calling thread.
#[inline]
pub(super) fn record(id: u32, value: u64) {
    match MINE.get() {
        Some(slab) => slab.record(id, value),
        None => first(move |slab| slab.record(id, value)),
    }
}

/// Hands out ids; the freed ones first.
struct Ids {
    next: u32,
    free: Vec<u32>,
    capacity: u32,
}

impl Ids {
    const fn new(capacity: u32) -> Self {
        Self { next: SINK + 1, free: Vec::new(), capacity }
    }

    /// A fresh id, or the sink when four million stats exist.
    fn take(&mut self) -> u32 {
        if let Some(id) = self.free.pop() {
            return id;
        }
        if self.next == self.capacity {
            return SINK;
        }
        self.next += 1;
        self.next - 1
    }

    fn give_back(&mut self, id: u32) {
        if id != SINK {
            self.free.push(id);
        }
    }
}

/// All slabs and the ids.
pub(super) struct Registry {
    slabs: Vec<&'static Slab>,
    /// Those of threads that have ended.
    vacant: Vec<&'static Slab>,
    cells: Ids,
    histograms: Ids,
    /// What `/reset_counters` subtracts: the reader must not write the cells of other threads.
    baselines: Option<HashMap<u32, u64>>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    slabs: Vec::new(),
    vacant: Vec::new(),
    cells: Ids::new(Directory::<AtomicU64, CELLS>::CAPACITY),
    histograms: Ids::new(Directory::<Bins, HISTOGRAMS>::CAPACITY),
    baselines: None,
});

/// The registry; held while stats are made, freed or read.
pub(super) fn lock() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    pub(super) fn new_cell(&mut self) -> u32 {
        self.cells.take()
    }

    pub(super) fn new_histogram(&mut self) -> u32 {
        self.histograms.take()
    }

    /// The value summed over all threads, and whether any thread ever wrote it.
    pub(super) fn value(&self, id: u32) -> (u64, bool) {
        let (mut sum, mut used) = (0_u64, 0);
        for cell in self.slabs.iter().filter_map(|s| s.cells.get(id)) {
            let cell = cell.load(Relaxed);
            used |= cell & 1;
            sum = sum.wrapping_add(((cell as i64) >> 1) as u64);
        }
        let baseline = self.baselines.as_ref().and_then(|b| b.get(&id)).copied().unwrap_or(0);
        (sum.wrapping_sub(baseline), used == 1)
    }

    /// Makes a counter read 0 from here on.
    pub(super) fn reset(&mut self, id: u32) {
        let (value, _) = self.value(id);
        if value != 0 {
            let baselines = self.baselines.get_or_insert_default();
            let baseline = baselines.entry(id).or_default();
            *baseline = baseline.wrapping_add(value);
        }
    }

    /// The bins of a histogram summed over all threads, ascending.
    pub(super) fn bins(&self, id: u32) -> histogram::Counts {
        let mut counts = histogram::Counts::new();
        for bins in self.slabs.iter().filter_map(|s| s.bins(id)) {
            bins.for_each(|bin, n| *counts.entry(bin).or_default() += n);
        }
        counts
    }

    pub(super) fn free_cell(&mut self, id: u32) {
        for cell in self.slabs.iter().filter_map(|s| s.cells.get(id)) {
            cell.store(0, Relaxed);
        }
        if let Some(baselines) = &mut self.baselines {
            baselines.remove(&id);
        }
        self.cells.give_back(id);
    }

    pub(super) fn free_histogram(&mut self, id: u32) {
        for bins in self.slabs.iter().filter_map(|s| s.bins(id)) {
            bins.clear();
        }
        self.histograms.give_back(id);
    }
}
