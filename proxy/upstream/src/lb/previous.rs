//! `previous_priorities`: a retry's load goes to the priorities that were not tried yet.
//!
//! After every `update_frequency` attempts the priorities of all hosts tried so far are taken out and the load is
//! spread over the others by their availability; where none is left, all count again and the attempts are forgotten.
//! Where all levels together are unavailable, the cluster's own loads hold.

use std::cell::RefCell;

use super::priority::Loads;
use crate::host::{Health, Host};

/// What one request's retries have tried.
pub struct PreviousPriorities {
    update_frequency: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// The priorities of the hosts tried.
    attempted: Vec<u32>,
    excluded: Vec<bool>,
    /// The loads of the last update, healthy and degraded; none where the cluster's own hold.
    loads: Option<(Vec<u32>, Vec<u32>)>,
}

impl PreviousPriorities {
    /// For one request.
    pub fn new(update_frequency: u32) -> Self {
        Self { update_frequency: update_frequency.max(1) as usize, state: RefCell::default() }
    }

    /// A host was tried.
    pub fn attempted(&self, host: &Host) {
        self.state.borrow_mut().attempted.push(host.priority());
    }

    /// The level for a hash.
    pub(super) fn choose(&self, own: &Loads, hash: u64) -> Option<(usize, Health)> {
        let mut state = self.state.borrow_mut();
        let attempts = state.attempted.len();
        if attempts < self.update_frequency {
            return own.choose(hash);
        }
        if attempts.is_multiple_of(self.update_frequency) {
            state.update(own);
        }
        match &state.loads {
            Some((healthy, degraded)) => Loads::choose_in(healthy, degraded, hash),
            None => own.choose(hash),
        }
    }
}

impl State {
    fn update(&mut self, own: &Loads) {
        let (healthy, degraded) = own.availability();
        self.excluded.resize(healthy.len(), false);
        for priority in &self.attempted {
            if let Some(excluded) = self.excluded.get_mut(*priority as usize) {
                *excluded = true;
            }
        }
        let left = |excluded: &[bool], list: &[u32]| -> Vec<u32> {
            list.iter().zip(excluded).map(|(load, excluded)| if *excluded { 0 } else { *load }).collect()
        };
        let mut loads = (left(&self.excluded, healthy), left(&self.excluded, degraded));
        if total(&loads) == 0 {
            self.excluded.fill(false);
            self.attempted.clear();
            loads = (healthy.to_vec(), degraded.to_vec());
        }
        self.loads = spread(&loads);
    }
}

/// Together at most 100.
fn total((healthy, degraded): &(Vec<u32>, Vec<u32>)) -> u32 {
    healthy.iter().chain(degraded).sum::<u32>().min(100)
}

/// Spreads 100 per cent by availability, first levels first; what rounding leaves goes round again.
fn spread(availability: &(Vec<u32>, Vec<u32>)) -> Option<(Vec<u32>, Vec<u32>)> {
    let available = total(availability);
    let mut loads = (vec![0; availability.0.len()], vec![0; availability.1.len()]);
    let mut left = 100;
    while left > 0 && available > 0 {
        let levels = loads.0.iter_mut().zip(&availability.0).chain(loads.1.iter_mut().zip(&availability.1));
        for (load, availability) in levels {
            let share = left.min(availability * 100 / available);
            *load += share;
            left -= share;
        }
    }
    (available > 0).then_some(loads)
}

#[cfg(test)]
mod tests {
    use super::super::priority::Availability;
    use super::*;

    /// Levels as (hosts, healthy hosts).
    fn own(levels: &[(u64, u64)]) -> Loads {
        let levels = levels.iter().map(|&(hosts, healthy)| Availability {
            total: hosts,
            healthy,
            degraded: 0,
            hosts,
            healthy_hosts: healthy,
            degraded_hosts: 0,
        });
        Loads::new(levels, 140, 50)
    }

    /// The share of each level after these priorities were tried, one after the other.
    fn shares(own: &Loads, frequency: u32, tried: &[u32]) -> Vec<usize> {
        let previous = PreviousPriorities::new(frequency);
        for priority in tried {
            previous.state.borrow_mut().attempted.push(*priority);
            previous.choose(own, 0);
        }
        let levels = own.availability().0.len();
        let mut shares = vec![0; levels];
        (0..100).for_each(|hash| shares[previous.choose(own, hash).unwrap().0] += 1);
        shares
    }

    #[test]
    fn tried_levels_get_nothing() {
        let own = own(&[(1, 1), (1, 1), (1, 1)]);
        assert_eq!(shares(&own, 1, &[]), [100, 0, 0]);
        assert_eq!(shares(&own, 1, &[0]), [0, 100, 0]);
        assert_eq!(shares(&own, 1, &[0, 1]), [0, 0, 100]);
        // All were tried: all count again.
        assert_eq!(shares(&own, 1, &[0, 1, 2]), [100, 0, 0]);
    }

    #[test]
    fn what_is_left_shares_by_availability() {
        let own = own(&[(2, 2), (10, 5), (10, 2), (10, 1)]);
        assert_eq!(own.availability().0, [100, 70, 28, 14]);
        assert_eq!(shares(&own, 1, &[0]), [0, 70, 28, 2]);
        assert_eq!(shares(&own, 1, &[0, 1]), [0, 0, 67, 33]);
    }

    #[test]
    fn only_every_so_many_attempts_change_it() {
        let own = own(&[(1, 1), (1, 1)]);
        assert_eq!(shares(&own, 2, &[0]), [100, 0]);
        assert_eq!(shares(&own, 2, &[0, 0]), [0, 100]);
        assert_eq!(shares(&own, 2, &[0, 0, 1]), [0, 100]);
    }

    #[test]
    fn nothing_available_leaves_the_cluster_s_own_loads() {
        let own = own(&[(3, 0), (1, 0)]);
        assert_eq!(shares(&own, 1, &[0]), [75, 25]);
    }
}
