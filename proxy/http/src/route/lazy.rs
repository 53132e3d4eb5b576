//! A table that comes into being with the first request that asks for it.
//!
//! A proxy may be sent ten thousand tables of which its requests use a dozen: what is accepted is known to compile, and its message
//! takes a tenth of the memory.

use std::sync::{Arc, OnceLock};

use super::{HostsOnDemand, RouteTable};

/// A table, or how it is made.
pub struct LazyTable {
    table: OnceLock<Arc<RouteTable>>,
    make: Option<Box<dyn Fn() -> RouteTable + Send + Sync>>,
}

impl LazyTable {
    /// To be made at its first use, on the thread that uses it.
    pub fn later(make: impl Fn() -> RouteTable + Send + Sync + 'static) -> Self {
        Self { table: OnceLock::new(), make: Some(Box::new(make)) }
    }

    /// Whether a request has asked for it, or it was there from the beginning.
    pub fn is_made(&self) -> bool {
        self.table.get().is_some()
    }

    pub(super) fn get(&self) -> &Arc<RouteTable> {
        let make = || self.make.as_ref().map_or_else(RouteTable::default, |make| make());
        self.table.get_or_init(|| Arc::new(make()))
    }

    /// Tables whose hosts come on their own are there from the beginning.
    pub(super) fn hosts_on_demand(&self) -> Option<HostsOnDemand> {
        self.table.get()?.on_demand.clone()
    }
}

impl From<RouteTable> for LazyTable {
    fn from(table: RouteTable) -> Self {
        Self { table: OnceLock::from(Arc::new(table)), make: None }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_table_is_made_once_and_not_before_it_is_used() {
        let made = Arc::new(AtomicU32::new(0));
        let count = made.clone();
        let table = LazyTable::later(move || {
            count.fetch_add(1, Ordering::Relaxed);
            RouteTable { name: "late".into(), ..RouteTable::default() }
        });
        assert!(!table.is_made() && table.hosts_on_demand().is_none());
        assert_eq!(made.load(Ordering::Relaxed), 0);
        assert!(Arc::ptr_eq(table.get(), table.get()) && *table.get().name == *"late");
        assert_eq!((made.load(Ordering::Relaxed), table.is_made()), (1, true));
        assert!(LazyTable::from(RouteTable::default()).is_made());
    }
}
