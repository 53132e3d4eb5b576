//! How load is spread over priority levels, and when a level is in panic.
//!
//! A level's availability is `healthy / total * overprovisioning_factor`, at most 100. Load goes to the healthy
//! hosts of the levels in order, what is left to the degraded ones; rounding goes to the first available level.
//! A level is in panic when all levels together cannot carry 100 and fewer of its hosts than the threshold are
//! healthy or degraded. If all are in panic, load follows the number of hosts.

use std::rc::Rc;

use crate::host::Health;
use crate::worker::WorkerHost;

/// The state of one level.
pub(super) struct Availability {
    pub(super) total: u64,
    pub(super) healthy: u64,
    pub(super) degraded: u64,
    pub(super) hosts: u64,
    pub(super) healthy_hosts: u64,
    pub(super) degraded_hosts: u64,
}

/// What the levels carry, in per cent.
pub(super) struct Loads {
    healthy: Vec<u32>,
    degraded: Vec<u32>,
    /// How available each level is, healthy and degraded hosts apart.
    availability: (Vec<u32>, Vec<u32>),
    panic: Vec<bool>,
    only: Option<(usize, Health)>,
}

/// The number of hosts or their weight.
pub(super) fn size(hosts: &[Rc<WorkerHost>], by_weight: bool) -> u64 {
    if by_weight { hosts.iter().map(|h| u64::from(h.host.weight())).sum() } else { hosts.len() as u64 }
}

impl Loads {
    pub(super) fn new(
        levels: impl Iterator<Item = Availability>,
        overprovisioning: u32,
        panic_threshold: u32,
    ) -> Self {
        let levels: Vec<_> = levels.collect();
        let percent = |part: u64, whole: u64| {
            (u64::from(overprovisioning) * part).checked_div(whole).unwrap_or(0).min(100) as u32
        };
        let health: Vec<_> = levels.iter().map(|l| percent(l.healthy, l.total)).collect();
        let degraded_health: Vec<_> = levels.iter().map(|l| percent(l.degraded, l.total)).collect();
        let available = (health.iter().sum::<u32>() + degraded_health.iter().sum::<u32>()).min(100);
        let (mut healthy, mut degraded) = (vec![0; levels.len()], vec![0; levels.len()]);
        let mut panic = vec![false; levels.len()];
        if available > 0 {
            let mut left = spread(&mut healthy, &health, 100, available);
            left = spread(&mut degraded, &degraded_health, left, available);
            let first = |list: &[u32]| list.iter().position(|h| *h > 0);
            if let Some(i) = first(&health) {
                healthy[i] += left;
            } else if let Some(i) = first(&degraded_health) {
                degraded[i] += left;
            }
        }
        if available < 100 {
            for (is, level) in panic.iter_mut().zip(&levels) {
                let fit = (100 * (level.healthy_hosts + level.degraded_hosts))
                    .checked_div(level.hosts)
                    .unwrap_or(0);
                *is = fit < u64::from(panic_threshold);
            }
        }
        if levels.is_empty() {
            panic.push(panic_threshold > 0);
        }
        if panic.iter().all(|p| *p) {
            by_hosts(&levels, &mut healthy);
            degraded.fill(0);
        }
        let availability = (health, degraded_health);
        let mut loads = Self { healthy, degraded, availability, panic, only: None };
        loads.only = loads.find_only();
        loads
    }

    fn find_only(&self) -> Option<(usize, Health)> {
        let full = |list: &[u32]| list.iter().position(|load| *load == 100);
        if let Some(i) = full(&self.healthy) {
            return Some((i, Health::Healthy));
        }
        full(&self.degraded).map(|i| (i, Health::Degraded))
    }

    /// The level that carries everything.
    pub(super) fn only(&self) -> Option<(usize, Health)> {
        self.only
    }

    /// Whether a level is in panic.
    pub(super) fn panic(&self, level: usize) -> bool {
        self.panic.get(level).copied().unwrap_or(false)
    }

    /// Whether every level is.
    pub(super) fn all_panic(&self) -> bool {
        self.panic.iter().all(|p| *p)
    }

    /// How available the levels' healthy and degraded hosts are, in per cent.
    pub(super) fn availability(&self) -> (&[u32], &[u32]) {
        (&self.availability.0, &self.availability.1)
    }

    /// The level for a hash.
    pub(super) fn choose(&self, hash: u64) -> Option<(usize, Health)> {
        Self::choose_in(&self.healthy, &self.degraded, hash)
    }

    /// The same over other loads.
    pub(super) fn choose_in(healthy: &[u32], degraded: &[u32], hash: u64) -> Option<(usize, Health)> {
        let hash = (hash % 100) as u32 + 1;
        let mut sum = 0;
        for (list, health) in [(healthy, Health::Healthy), (degraded, Health::Degraded)] {
            for (i, load) in list.iter().enumerate() {
                sum += load;
                if hash <= sum {
                    return Some((i, health));
                }
            }
        }
        None
    }
}

/// Gives each level its scaled availability until nothing is left; returns what is left.
fn spread(loads: &mut [u32], availability: &[u32], total: u32, available: u32) -> u32 {
    let mut left = total;
    for (load, availability) in loads.iter_mut().zip(availability) {
        *load = left.min(availability * 100 / available);
        left -= *load;
    }
    left
}

/// All levels are in panic: by the number of hosts; rounding to the first level that has any.
fn by_hosts(levels: &[Availability], loads: &mut [u32]) {
    let all: u64 = levels.iter().map(|l| l.hosts).sum();
    let Some(first) = levels.iter().position(|l| l.hosts > 0) else {
        if let Some(load) = loads.first_mut() {
            *load = 100;
        }
        return;
    };
    for (load, level) in loads.iter_mut().zip(levels) {
        *load = (100 * level.hosts / all) as u32;
    }
    loads[first] += 100 - loads.iter().sum::<u32>();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(levels: &[(u64, u64, u64)], threshold: u32) -> Loads {
        let levels = levels.iter().map(|&(hosts, healthy, degraded)| Availability {
            total: hosts,
            healthy,
            degraded,
            hosts,
            healthy_hosts: healthy,
            degraded_hosts: degraded,
        });
        Loads::new(levels, 140, threshold)
    }

    /// The table of Envoy's documentation on priority levels.
    #[test]
    fn load_over_two_levels() {
        for (healthy, expected) in
            [(100, [100, 0]), (72, [100, 0]), (71, [99, 1]), (50, [70, 30]), (25, [35, 65]), (0, [0, 100])]
        {
            let loads = loads(&[(100, healthy, 0), (100, 100, 0)], 50);
            assert_eq!(loads.healthy, expected, "{healthy}% healthy");
            assert_eq!(loads.panic, [false, false]);
        }
    }

    #[test]
    fn degraded_take_what_the_healthy_cannot() {
        let loads = loads(&[(10, 5, 5)], 50);
        assert_eq!((loads.healthy[0], loads.degraded[0]), (70, 30));
    }

    #[test]
    fn panic_below_the_threshold() {
        assert!(!loads(&[(10, 5, 0)], 50).panic(0));
        assert!(loads(&[(10, 4, 0)], 50).panic(0));
        assert!(!loads(&[(10, 0, 0)], 0).panic(0));
        let total = loads(&[(30, 0, 0), (10, 0, 0)], 50);
        assert_eq!(total.healthy, [75, 25]);
    }
}
