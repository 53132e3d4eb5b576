//! Earliest deadline first: weighted round robin with real weights.
//!
//! Every entry's deadline lies `1 / weight` behind the time of its last pick; the earliest is picked. Entries with
//! the same deadline go in the order in which they were put there.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

struct Entry {
    deadline: f64,
    order: u64,
    index: u32,
}

impl Entry {
    fn key(&self) -> (f64, u64) {
        (self.deadline, self.order)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        let ((a, i), (b, j)) = (self.key(), other.key());
        a.total_cmp(&b).then(i.cmp(&j))
    }
}

/// A schedule over indices.
pub(super) struct Edf {
    heap: BinaryHeap<Reverse<Entry>>,
    order: u64,
}

impl Edf {
    /// A schedule with these weights, all above 0.
    pub(super) fn new(weights: impl Iterator<Item = f64>) -> Self {
        let heap: BinaryHeap<_> = weights
            .enumerate()
            .map(|(i, weight)| Reverse(Entry { deadline: 1.0 / weight, order: i as u64, index: i as u32 }))
            .collect();
        Self { order: heap.len() as u64, heap }
    }

    /// Picks an index and puts it back with the weight it has now.
    pub(super) fn pick(&mut self, weight: impl FnOnce(usize) -> f64) -> Option<usize> {
        let mut top = self.heap.peek_mut()?;
        let entry = &mut top.0;
        let index = entry.index as usize;
        entry.deadline += 1.0 / weight(index);
        entry.order = self.order;
        self.order += 1;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_follow_the_weights_smoothly() {
        let weights = [1.0, 2.0, 3.0];
        let mut edf = Edf::new(weights.into_iter());
        let picks: Vec<_> = (0..12).map(|_| edf.pick(|i| weights[i]).unwrap()).collect();
        let count = |i| picks.iter().filter(|p| **p == i).count();
        assert_eq!((count(0), count(1), count(2)), (2, 4, 6));
        assert!(picks.windows(3).all(|w| w != [2, 2, 2]));
    }
}
