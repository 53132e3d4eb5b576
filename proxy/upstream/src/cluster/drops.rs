//! Requests that are answered without asking a host: for `drop_overloads`, or because there were too many.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use super::Cluster;
use crate::config::LoadAssignment;
use crate::stats::HostCounter;

/// Requests that `drop_overloads` dropped, for load reports.
#[derive(Default)]
pub(super) struct OverloadDrops {
    count: HostCounter,
    category: Mutex<Box<str>>,
}

impl Cluster {
    /// Requests that were dropped because there were too many, or for `drop_overloads`.
    pub fn dropped(&self) -> &HostCounter {
        &self.dropped
    }

    /// The share of requests that are to be answered without asking a host (`drop_overloads`).
    pub fn drop_share(&self) -> f32 {
        f32::from_bits(self.drop_share.load(Ordering::Relaxed))
    }

    /// A request was answered for that.
    pub fn count_overload_drop(&self) {
        self.dropped.inc();
        self.overload_drops.get().into_iter().for_each(|drops| drops.count.inc());
    }

    /// How many requests were, and what that is called; none where there never was such a share.
    pub fn overload_drops(&self) -> Option<(u64, Box<str>)> {
        let drops = self.overload_drops.get()?;
        let category = drops.category.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some((drops.count.value(), category))
    }

    pub(super) fn set_drops(&self, assignment: &LoadAssignment) {
        if assignment.drop_share > 0.0 {
            let drops = self.overload_drops.get_or_init(Box::default);
            *drops.category.lock().unwrap_or_else(PoisonError::into_inner) = assignment.drop_category.clone();
        }
        self.drop_share.store(assignment.drop_share.to_bits(), Ordering::Relaxed);
    }
}
