//! Where the values live: one slab of cells per thread, summed when read.
//!
//! A cell has a single writer, the thread whose slab it is in, so a write is a load, an addition and a store
//! without a locked instruction. Readers take the registry's lock and add up the cells of all slabs. A thread
//! that ends folds its cells into the retired slab under that lock, so no reader sees a value twice or not at
//! all.
//!
//! A cell holds `value << 1 | 1`: the low bit tells a stat that was written from one that never was, which a
//! value of 0 cannot (`usedonly`).
//!
//! Ids are handed out once per process and used again after their scope is gone. Freeing sets the cells of all
//! threads to 0; nobody else writes them at that time because the last handle is gone, and who gets the id next
//! gets it through the registry's lock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::histogram::{self, Bins};

/// Entries of the two upper levels of a directory.
const FAN: usize = 512;
/// Counters per chunk: a chunk is what a thread allocates when it first writes to one of its cells.
const CELLS: usize = 32;
/// Histograms per chunk.
const HISTOGRAMS: usize = 4;
/// Id of stats that the configuration rejects: written, never read.
pub(super) const SINK: u32 = 0;

type Chunk<T, const C: usize> = OnceLock<Box<[T; C]>>;

/// Id to cell in two steps; the lower levels come into being on first use.
struct Directory<T, const C: usize>([OnceLock<Box<[Chunk<T, C>; FAN]>>; FAN]);

impl<T: Default, const C: usize> Directory<T, C> {
    const CAPACITY: u32 = (C * FAN * FAN) as u32;

    fn new() -> Self {
        Self(std::array::from_fn(|_| OnceLock::new()))
    }

    #[inline]
    fn get(&self, id: u32) -> Option<&T> {
        let id = id as usize;
        let chunk = self.0[id / C / FAN % FAN].get()?[id / C % FAN].get()?;
        Some(&chunk[id % C])
    }

    /// Only for the owning thread (a second initialiser would wait, not fail).
    #[cold]
    fn make(&self, id: u32) -> &T {
        let id = id as usize;
        let middle =
            self.0[id / C / FAN % FAN].get_or_init(|| Box::new(std::array::from_fn(|_| OnceLock::new())));
        let chunk = middle[id / C % FAN].get_or_init(|| Box::new(std::array::from_fn(|_| T::default())));
        &chunk[id % C]
    }

    #[inline]
    fn get_or_make(&self, id: u32) -> &T {
        match self.get(id) {
            Some(cell) => cell,
            None => self.make(id),
        }
    }

    fn for_each(&self, mut f: impl FnMut(u32, &T)) {
        for (i, middle) in self.0.iter().enumerate() {
            for (j, chunk) in middle.get().into_iter().flat_map(|m| m.iter().enumerate()) {
                for (k, cell) in chunk.get().into_iter().flat_map(|c| c.iter().enumerate()) {
                    f(((i * FAN + j) * C + k) as u32, cell);
                }
            }
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
}

/// The calling thread's slab; its end folds the values into the retired one.
struct Mine(Arc<Slab>);

impl Mine {
    fn register() -> Self {
        let slab = Arc::new(Slab::new());
        lock().slabs.push(slab.clone());
        Self(slab)
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        let mut registry = lock();
        registry.slabs.retain(|s| !Arc::ptr_eq(s, &self.0));
        let retired = registry.retired();
        self.0.cells.for_each(|id, cell| {
            let cell = cell.load(Relaxed);
            if cell & 1 == 1 {
                retired.add(id, ((cell as i64) >> 1) as u64);
            }
        });
        self.0.histograms.for_each(|id, bins| {
            bins.for_each(|bin, count| retired.histograms.get_or_make(id).add(bin, count));
        });
    }
}

thread_local! {
    static MINE: Mine = Mine::register();
}

/// Adds to a counter or gauge on behalf of the calling thread.
#[inline]
pub(super) fn add(id: u32, n: u64) {
    // A thread whose locals are being torn down writes to the retired slab, under the lock.
    if MINE.try_with(|mine| mine.0.add(id, n)).is_err() {
        lock().retired().add(id, n);
    }
}

/// Records a histogram value on behalf of the calling thread.
#[inline]
pub(super) fn record(id: u32, value: u64) {
    if MINE.try_with(|mine| mine.0.record(id, value)).is_err() {
        lock().retired().record(id, value);
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

    /// A fresh id, or the sink when eight million stats exist.
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
    slabs: Vec<Arc<Slab>>,
    retired: Option<Arc<Slab>>,
    cells: Ids,
    histograms: Ids,
    /// What `/reset_counters` subtracts: the reader must not write the cells of other threads.
    baselines: Option<HashMap<u32, u64>>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    slabs: Vec::new(),
    retired: None,
    cells: Ids::new(Directory::<AtomicU64, CELLS>::CAPACITY),
    histograms: Ids::new(Directory::<Bins, HISTOGRAMS>::CAPACITY),
    baselines: None,
});

/// The registry; held while stats are made, freed or read.
pub(super) fn lock() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    fn retired(&mut self) -> Arc<Slab> {
        self.retired.get_or_insert_with(|| Arc::new(Slab::new())).clone()
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Slab>> {
        self.slabs.iter().chain(&self.retired)
    }

    pub(super) fn new_cell(&mut self) -> u32 {
        self.cells.take()
    }

    pub(super) fn new_histogram(&mut self) -> u32 {
        self.histograms.take()
    }

    /// The value summed over all threads, and whether any thread ever wrote it.
    pub(super) fn value(&self, id: u32) -> (u64, bool) {
        let (mut sum, mut used) = (0_u64, 0);
        for cell in self.all().filter_map(|s| s.cells.get(id)) {
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
        for bins in self.all().filter_map(|s| s.histograms.get(id)) {
            bins.for_each(|bin, n| *counts.entry(bin).or_default() += n);
        }
        counts
    }

    pub(super) fn free_cell(&mut self, id: u32) {
        for cell in self.all().filter_map(|s| s.cells.get(id)) {
            cell.store(0, Relaxed);
        }
        if let Some(baselines) = &mut self.baselines {
            baselines.remove(&id);
        }
        self.cells.give_back(id);
    }

    pub(super) fn free_histogram(&mut self, id: u32) {
        for bins in self.all().filter_map(|s| s.histograms.get(id)) {
            bins.clear();
        }
        self.histograms.give_back(id);
    }
}
