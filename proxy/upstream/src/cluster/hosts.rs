//! How the hosts change: what DNS or EDS says makes another set, which takes the place of the one in force.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use sampan_core::Address;

use super::Cluster;
use super::building::{Building, Kept};
use crate::config::LoadAssignment;
use crate::host::HostSet;

/// Addresses of names, by locality and endpoint.
pub(crate) type Resolved = HashMap<(usize, usize), Vec<Address>>;

/// What an update of the hosts did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebuild {
    /// Everything was as it is.
    Nothing,
    /// Something is another.
    Changed,
}

impl Cluster {
    /// The hosts of now.
    pub fn hosts(&self) -> Arc<HostSet> {
        self.hosts.load_full()
    }

    /// Grows whenever the hosts or their health change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Takes what EDS says of the endpoints; what is in force goes on if it says nothing new.
    pub fn set_assignment(&self, assignment: &LoadAssignment) -> Rebuild {
        let _one_at_a_time = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_drops(assignment);
        self.rebuild(assignment, &Resolved::default())
    }

    /// Takes a name's addresses; `false` where they were the same.
    pub(crate) fn set_resolved(&self, locality: usize, endpoint: usize, addresses: Vec<Address>) -> bool {
        let mut resolved = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let resolved = resolved.get_or_insert_default();
        let same = resolved
            .get(&(locality, endpoint))
            .is_some_and(|old| old.len() == addresses.len() && old.iter().all(|a| addresses.contains(a)));
        if same {
            return false;
        }
        resolved.insert((locality, endpoint), addresses);
        self.rebuild(&self.config.load_assignment, resolved);
        true
    }

    /// Takes the one address of a LOGICAL_DNS cluster: the host stays, new connections go there.
    pub(crate) fn set_logical_address(&self, address: Address) -> bool {
        if let Some(host) = self.hosts.load().hosts().next() {
            let changed = *host.address() != address;
            if changed {
                host.set_address(address);
            }
            return changed;
        }
        self.set_resolved(0, 0, vec![address])
    }

    /// A host's health is another: the workers balance anew.
    pub(crate) fn health_changed(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        if let Some(used) = self.used.get() {
            self.report(&used.stats);
        }
    }

    pub(super) fn rebuild(&self, assignment: &LoadAssignment, resolved: &Resolved) -> Rebuild {
        let old = self.hosts.load_full();
        let mut kept = Kept::default();
        for host in old.hosts() {
            kept.entry((*host.address()).clone()).or_default().push(host.clone());
        }
        let mut building = Building { kept, changed: false };
        let set = building.hosts(self, assignment, resolved);
        if self.generation() > 0 && !building.changed && set.same_shape(&old) {
            return Rebuild::Nothing;
        }
        // The first time counts even if there are no hosts.
        let changes = set.changed_priorities(&old).max(u64::from(self.generation() == 0));
        self.publish(set, changes);
        Rebuild::Changed
    }

    pub(super) fn publish(&self, set: HostSet, changes: u64) {
        if self.config.lb.slow_start.is_some() {
            let now = Instant::now();
            set.hosts().for_each(|host| host.begin(now));
        }
        self.hosts.store(Arc::new(set));
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.reported.lock().unwrap_or_else(PoisonError::into_inner).changes += changes;
        if let Some(used) = self.used.get() {
            self.report(&used.stats);
        }
        if let Some(outlier) = &self.outlier {
            outlier.recount(self);
        }
    }
}
