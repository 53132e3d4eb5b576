//! Memory of lists that are done with, for the lists to come.

use std::cell::RefCell;

use super::HeaderMap;

/// How many lists' memory a thread keeps, and of which size at most.
const SPARES: usize = 64;
const MOST_SPARE: usize = 8 * 1024;

thread_local! {
    static SPARE: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

impl HeaderMap {
    /// An empty list with room, in memory that another has left to the thread if there is any.
    pub fn spare(bytes: usize, headers: usize) -> Self {
        let Some(mut spare) = SPARE.with_borrow_mut(Vec::pop) else {
            return Self::with_capacity(bytes, headers);
        };
        spare.arena.reserve(bytes);
        spare.entries.reserve(headers);
        spare
    }

    /// Leaves the memory to the thread's next list.
    pub fn recycle(mut self) {
        if (1..=MOST_SPARE).contains(&self.arena.capacity()) {
            self.clear();
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < SPARES {
                    spare.push(self);
                }
            });
        }
    }
}
