//! `RING_HASH` and `MAGLEV`: the same host for the same hash, and the same as Envoy's.
//!
//! A table is made for each priority, over its healthy hosts (all of them in panic). Hosts stand for their `hash_key`
//! in the endpoint's `envoy.lb` metadata, else their host name where that is asked for, else their address.
//! Ring: libketama's, each host at `weight * size` places, XXH64 (or MurmurHash2) of `KEY_0`, `KEY_1`, … Maglev: the
//! paper's listing 1 with weights; offset and skip are XXH64 of the key with seeds 0 and 1.
//!
//! The places follow from keys and weights alone. The worker that comes first makes them, the others share them.

use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use envoy_types::pb::google::protobuf::value::Kind;
use sampan_core::xxhash::xxh64;

use crate::config::LbPolicy;
use crate::host::{Health, Host};
use crate::worker::WorkerHost;

/// The hosts of one priority by hash.
pub(super) struct Table {
    hosts: Vec<Rc<WorkerHost>>,
    shared: Arc<Shared>,
}

/// What a table is on all workers.
struct Shared {
    keys: Vec<String>,
    weights: Vec<f64>,
    places: Places,
    /// How many places there are, and the fewest and the most of one host: for the gauges.
    size: Size,
}

/// The tables of a cluster, by priority, for as long as a worker has them.
#[derive(Default)]
pub(crate) struct Tables(Mutex<Vec<Weak<Shared>>>);

impl Tables {
    /// The table of these hosts. Who comes while it is made waits: to make another would take as long.
    fn shared(
        &self,
        level: usize,
        keys: Vec<String>,
        weights: Vec<f64>,
        make: impl FnOnce(&[String], &[f64]) -> (Places, Size),
    ) -> Arc<Shared> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() <= level {
            all.resize_with(level + 1, Weak::new);
        }
        if let Some(have) = all[level].upgrade().filter(|have| have.keys == keys && have.weights == weights) {
            return have;
        }
        let (places, size) = make(&keys, &weights);
        let new = Arc::new(Shared { keys, weights, places, size });
        all[level] = Arc::downgrade(&new);
        new
    }
}

enum Places {
    /// Sorted hashes, each with its host.
    Ring(Vec<(u64, u32)>),
    /// A host for each remainder.
    Maglev(Vec<u32>),
}

/// What the gauges of a table show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) all: u64,
    pub(crate) min: u64,
    pub(crate) max: u64,
}

/// Hosts with their shares of 1.
struct Shares {
    hosts: Vec<(Rc<WorkerHost>, f64)>,
    min: f64,
    max: f64,
}

impl Shares {
    fn new(localities: &[(u32, Vec<Rc<WorkerHost>>)], panic: bool, by_locality: bool) -> Self {
        let mut shares = Self { hosts: Vec::new(), min: 1.0, max: 0.0 };
        let fit = |hosts: &[Rc<WorkerHost>]| -> Vec<_> {
            hosts.iter().filter(|h| panic || h.host.health() == Health::Healthy).cloned().collect()
        };
        let sum: u64 = localities.iter().map(|(weight, _)| u64::from(*weight)).sum();
        if by_locality && sum > 0 {
            for (weight, hosts) in localities.iter().filter(|(weight, _)| *weight > 0) {
                shares.add(fit(hosts), f64::from(*weight) / sum as f64);
            }
        } else if !by_locality {
            shares.add(localities.iter().flat_map(|(_, hosts)| fit(hosts)).collect(), 1.0);
        }
        shares
    }

    fn add(&mut self, hosts: Vec<Rc<WorkerHost>>, share: f64) {
        let sum: u64 = hosts.iter().map(|h| u64::from(h.host.weight())).sum();
        for host in hosts {
            let weight = f64::from(host.host.weight()) * share / sum as f64;
            self.min = self.min.min(weight);
            self.max = self.max.max(weight);
            self.hosts.push((host, weight));
        }
    }
}

impl Table {
    /// The table of a hashing policy; none for the others.
    pub(super) fn new(
        policy: &LbPolicy,
        tables: &Tables,
        level: usize,
        localities: &[(u32, Vec<Rc<WorkerHost>>)],
        panic: bool,
        by_locality: bool,
    ) -> Option<Self> {
        let (LbPolicy::RingHash { hostname, .. } | LbPolicy::Maglev { hostname, .. }) = *policy else {
            return None;
        };
        let Shares { hosts, min, max } = Shares::new(localities, panic, by_locality);
        let keys = hosts.iter().map(|(host, _)| key(&host.host, hostname)).collect();
        let (hosts, weights) = hosts.into_iter().unzip();
        let shared = tables.shared(level, keys, weights, |keys, weights| match *policy {
            LbPolicy::RingHash { minimum, maximum, murmur, .. } => {
                ring(keys, weights, min, (minimum, maximum), murmur)
            }
            LbPolicy::Maglev { size, .. } => maglev(keys, weights, max, size),
            _ => (Places::Ring(Vec::new()), Size::default()),
        });
        Some(Self { hosts, shared })
    }

    /// For the gauges.
    pub(super) fn size(&self) -> Size {
        self.shared.size
    }

    /// The host of a hash; `attempt` counts how many were refused before.
    pub(super) fn host(&self, hash: u64, attempt: u32) -> Option<&Rc<WorkerHost>> {
        let index = match &self.shared.places {
            Places::Ring(ring) if ring.is_empty() => return None,
            Places::Ring(ring) => {
                let first = ring.partition_point(|(at, _)| *at < hash);
                let first = if first == ring.len() { 0 } else { first };
                ring[(first + attempt as usize) % ring.len()].1
            }
            Places::Maglev(table) if table.is_empty() => return None,
            Places::Maglev(table) => {
                let turned = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
                table[(turned % table.len() as u64) as usize]
            }
        };
        self.hosts.get(index as usize)
    }
}

fn key(host: &Host, hostname: bool) -> String {
    let metadata = host.metadata();
    let named = metadata.as_ref().and_then(|m| m.get("envoy.lb")?.fields.get("hash_key")?.kind.as_ref());
    match named {
        Some(Kind::StringValue(key)) if !key.is_empty() => key.clone(),
        _ if hostname => host.hostname.to_string(),
        _ => host.address().to_string(),
    }
}

/// `least` is the least weight.
fn ring(
    keys: &[String],
    weights: &[f64],
    least: f64,
    (minimum, maximum): (u64, u64),
    murmur: bool,
) -> (Places, Size) {
    if keys.is_empty() {
        return (Places::Ring(Vec::new()), Size::default());
    }
    // The host with the least weight gets a whole number of places, unless the ring would be too large.
    let scale = ((least * minimum as f64).ceil() / least).min(maximum as f64);
    let all = scale.ceil() as u64;
    let mut size = Size { all, min: all, max: 0 };
    let mut ring = Vec::with_capacity(all as usize);
    let (mut have, mut want) = (0.0, 0.0);
    for (index, (key, weight)) in keys.iter().zip(weights).enumerate() {
        want += scale * weight;
        let mut places = 0u64;
        while have < want {
            let text = format!("{key}_{places}");
            let hash = if murmur { murmur2(text.as_bytes()) } else { xxh64(text.as_bytes(), 0) };
            ring.push((hash, index as u32));
            places += 1;
            have += 1.0;
        }
        size.min = size.min.min(places);
        size.max = size.max.max(places);
    }
    ring.sort_by_key(|(hash, _)| *hash);
    (Places::Ring(ring), size)
}

/// A host that looks for places.
struct Seeker {
    index: u32,
    offset: u64,
    skip: u64,
    weight: f64,
    target: f64,
    next: u64,
    count: u64,
}

/// `most` is the greatest weight.
fn maglev(keys: &[String], weights: &[f64], most: f64, size: u64) -> (Places, Size) {
    if keys.is_empty() {
        return (Places::Maglev(Vec::new()), Size::default());
    }
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|a, b| keys[*a].cmp(&keys[*b]));
    let mut seekers: Vec<Seeker> = order
        .into_iter()
        .map(|i| Seeker {
            index: i as u32,
            offset: xxh64(keys[i].as_bytes(), 0) % size,
            skip: xxh64(keys[i].as_bytes(), 1) % (size - 1) + 1,
            weight: weights[i],
            target: 0.0,
            next: 0,
            count: 0,
        })
        .collect();
    let mut table = vec![u32::MAX; size as usize];
    let mut left = size;
    let mut round = 1u32;
    while left > 0 {
        for seeker in &mut seekers {
            if left == 0 {
                break;
            }
            // A host with a third of the greatest weight is asked every third round.
            if f64::from(round) * seeker.weight < seeker.target {
                continue;
            }
            seeker.target += most;
            let mut place = seeker.place(size);
            while table[place] != u32::MAX {
                place = seeker.place(size);
            }
            table[place] = seeker.index;
            seeker.count += 1;
            left -= 1;
        }
        round += 1;
    }
    let counts = seekers.iter().map(|s| s.count);
    let shown = Size { all: size, min: counts.clone().min().unwrap_or(0), max: counts.max().unwrap_or(0) };
    (Places::Maglev(table), shown)
}

impl Seeker {
    /// The next place of its permutation.
    fn place(&mut self, size: u64) -> usize {
        let place = self.offset.wrapping_add(self.skip.wrapping_mul(self.next)) % size;
        self.next += 1;
        place as usize
    }
}

/// MurmurHash64A with the seed of the C++ standard library's `std::hash`.
fn murmur2(input: &[u8]) -> u64 {
    const MUL: u64 = 0xc6a4_a793_5bd1_e995;
    const SEED: u64 = 0xc70f_6907;
    let mix = |word: u64| {
        let word = word.wrapping_mul(MUL);
        (word ^ (word >> 47)).wrapping_mul(MUL)
    };
    let mut hash = SEED ^ (input.len() as u64).wrapping_mul(MUL);
    let words = input.chunks_exact(8);
    let rest = words.remainder();
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, byte| (n << 8) | u64::from(*byte));
    for word in words {
        hash = (hash ^ mix(number(word))).wrapping_mul(MUL);
    }
    if !rest.is_empty() {
        hash = (hash ^ number(rest)).wrapping_mul(MUL);
    }
    hash = (hash ^ (hash >> 47)).wrapping_mul(MUL);
    hash ^ (hash >> 47)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_a_table_as_long_as_the_hosts_are_the_same() {
        let tables = Tables::default();
        let made = std::cell::Cell::new(0);
        let table = |level, weight| {
            tables.shared(level, vec!["a".into()], vec![weight], |keys, weights| {
                made.set(made.get() + 1);
                ring(keys, weights, weight, (4, 8), false)
            })
        };
        let (first, second) = (table(0, 1.0), table(0, 1.0));
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&first, &table(1, 1.0)) && !Arc::ptr_eq(&first, &table(0, 0.5)));
        assert_eq!(made.get(), 3);
    }
}
