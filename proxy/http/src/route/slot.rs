//! What holds a route table that may be exchanged while it serves, and each worker's view of it.
//!
//! A slot has a place, a small number that no other living slot has: a worker finds its own reference-counted wrapper of the table
//! there, whether the process has one table or ten thousand, and a stream's clone of that touches no atomic.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::ArcSwap;

use super::{HostsOnDemand, LazyTable, RouteTable, WorkerTable};

/// What holds a route table that may be exchanged while it serves.
pub struct RouteSlot {
    place: Place,
    /// Changes with the table: what a worker looks at for each request.
    version: AtomicU64,
    table: ArcSwap<LazyTable>,
}

impl RouteSlot {
    /// A slot with a table in it.
    pub fn new(table: RouteTable) -> Arc<Self> {
        Arc::new(Self {
            place: Place::take(),
            version: AtomicU64::new(0),
            table: ArcSwap::from_pointee(table.into()),
        })
    }

    /// Exchanges the table. Streams keep the one they began with.
    pub fn publish(&self, table: Arc<LazyTable>) {
        self.table.store(table);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The table in force, as this worker holds it.
    pub(super) fn table(self: &Arc<Self>) -> WorkerTable {
        TABLES.with_borrow_mut(|tables| {
            let version = self.version.load(Ordering::Acquire);
            match tables.by_place.get(self.place.0) {
                Some(Some(held)) if held.version == version && held.slot.as_ptr() == Arc::as_ptr(self) => {
                    held.table.clone()
                }
                _ => tables.hold(self, version),
            }
        })
    }

    /// Where virtual hosts that the table in force does not have are asked for.
    pub(super) fn hosts_on_demand(&self) -> Option<HostsOnDemand> {
        self.table.load().hosts_on_demand()
    }
}

/// A number of its own for as long as it lives.
struct Place(usize);

struct Places {
    free: Vec<usize>,
    count: usize,
}

static PLACES: Mutex<Places> = Mutex::new(Places { free: Vec::new(), count: 0 });

impl Place {
    fn take() -> Self {
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        Self(places.free.pop().unwrap_or_else(|| {
            places.count += 1;
            places.count - 1
        }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        PLACES.lock().unwrap_or_else(PoisonError::into_inner).free.push(self.0);
    }
}

/// A slot's table as a worker holds it.
struct Held {
    slot: Weak<RouteSlot>,
    version: u64,
    table: WorkerTable,
}

#[derive(Default)]
struct Tables {
    by_place: Vec<Option<Held>>,
    /// How many have come since those of dropped slots were last let go.
    come: usize,
}

thread_local! {
    static TABLES: RefCell<Tables> = RefCell::default();
}

impl Tables {
    fn hold(&mut self, slot: &Arc<RouteSlot>, version: u64) -> WorkerTable {
        let table: WorkerTable = Rc::new(slot.table.load().get().clone());
        let place = slot.place.0;
        self.come += 1;
        // So seldom that all of them together cost no more than their coming did.
        if self.come > self.by_place.len() / 2 {
            self.come = 0;
            let dropped = |held: &mut Held| held.slot.strong_count() == 0;
            self.by_place.iter_mut().for_each(|held| drop(held.take_if(dropped)));
        }
        if place >= self.by_place.len() {
            self.by_place.resize_with(place + 1, || None);
        }
        self.by_place[place] = Some(Held { slot: Arc::downgrade(slot), version, table: table.clone() });
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> RouteTable {
        RouteTable { name: name.into(), ..RouteTable::default() }
    }

    /// How many tables this worker holds.
    fn held() -> usize {
        TABLES.with_borrow(|tables| tables.by_place.iter().flatten().count())
    }

    #[test]
    fn each_slot_has_its_table_until_another_is_published() {
        let slots: Vec<_> = (0..50).map(|i| RouteSlot::new(named(&i.to_string()))).collect();
        for (i, slot) in slots.iter().enumerate() {
            let table = slot.table();
            assert_eq!(*table.name, *i.to_string());
            assert!(Rc::ptr_eq(&slot.table(), &table));
        }
        slots[7].publish(Arc::new(named("new").into()));
        assert_eq!(*slots[7].table().name, *"new");
        assert_eq!(*slots[8].table().name, *"8");
    }

    #[test]
    fn dropped_slots_leave_their_places_and_in_time_their_tables() {
        let kept = RouteSlot::new(named("kept"));
        for i in 0..200 {
            let slot = RouteSlot::new(named(&i.to_string()));
            // A new slot at an old place, and perhaps of an old version, does not get what was held there.
            assert_eq!(*slot.table().name, *i.to_string());
            assert_eq!(*kept.table().name, *"kept");
        }
        assert!(held() <= 110, "{}", held());
    }
}
