//! Which host: per worker, rebuilt when the cluster's hosts change.
//!
//! Priority first (by availability, as Envoy spreads load over levels), then locality (only with
//! `locality_weighted_lb_config`), then host. In panic (too few healthy hosts) all hosts of a level count.
//! Round robin with equal weights is an index that starts at random; with unequal weights, and for least request
//! with unequal weights, an [`edf`] schedule from which a random number of picks was taken first. So it is while a
//! host starts slowly, which takes a part of its weight from it, and until the hosts change after that.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use crate::circuit::Priority;
use crate::cluster::Cluster;
use crate::config::{LbConfig, LbPolicy, SlowStart};
use crate::host::{Health, Host, HostSet};
use crate::worker::{Destination, WorkerHost};

mod edf;
mod hash;
mod previous;
mod priority;
#[cfg(test)]
mod tests;

use edf::Edf;
use hash::Table;
pub(crate) use hash::{Size, Tables};
pub use previous::PreviousPriorities;
use priority::Loads;

/// What a request brings to the choice.
#[derive(Default, Clone)]
pub struct LbContext<'a> {
    /// The number of the hash policy; none: a random number.
    pub hash: Option<u64>,
    /// Priority of the route: which circuit breakers and pools.
    pub priority: Priority,
    /// A retry's `retry_priority`.
    pub previous_priorities: Option<&'a PreviousPriorities>,
    /// Hosts not wanted (a retry's host predicates); asked at most `max_attempts` times, then the last host is taken.
    pub exclude: Option<&'a dyn Fn(&Host) -> bool>,
    /// `host_selection_retry_max_attempts`, at least one pick is made.
    pub max_attempts: u32,
    /// Where the request goes, for clusters that ask it.
    pub destination: Option<Destination<'a>>,
    /// An address that is taken if it is there and healthy (`override_host`); strict: nothing else then.
    pub override_host: Option<(&'a str, bool)>,
}

/// A random source of one worker; not for secrets.
pub(crate) struct Random(Cell<u64>);

impl Random {
    pub(crate) fn new() -> Self {
        Self(Cell::new(rand::random()))
    }

    /// splitmix64
    pub(crate) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// The hosts of one source: all, healthy or degraded ones of a level or of a locality in it.
struct Source {
    hosts: Vec<Rc<WorkerHost>>,
    next: Cell<usize>,
    schedule: Option<RefCell<Edf>>,
}

/// Localities with weights, and a source for each.
struct Weighted {
    schedule: RefCell<Edf>,
    weights: Vec<f64>,
    sources: Vec<Source>,
}

struct Level {
    all: Source,
    healthy: Source,
    degraded: Source,
    healthy_weighted: Option<Weighted>,
    degraded_weighted: Option<Weighted>,
}

/// The balancer of one cluster on one worker.
pub(crate) struct LoadBalancer {
    weights: Weights,
    fail_on_panic: bool,
    levels: Vec<Level>,
    loads: Loads,
    /// Of a hashing policy: one for each level.
    tables: Vec<Table>,
    random: Rc<Random>,
}

/// A host, and whether panic chose it.
pub(crate) struct Pick {
    pub(crate) host: Rc<WorkerHost>,
    pub(crate) panic: bool,
}

impl LoadBalancer {
    /// A balancer over a host set of a cluster that was made at `created`; `worker_host` gives the worker's object for a host.
    pub(crate) fn new(
        cluster: &Cluster,
        set: &HostSet,
        random: &Rc<Random>,
        mut worker_host: impl FnMut(&std::sync::Arc<Host>) -> Rc<WorkerHost>,
    ) -> Self {
        let (overprovisioning, by_weight) = (set.overprovisioning_factor, set.weighted_priority_health);
        let config = &cluster.config().lb;
        let weights = Weights::new(config, set, cluster.created());
        let builder = Builder { weights: &weights, random };
        let mut levels = Vec::with_capacity(set.priorities.len());
        let mut all = Vec::with_capacity(set.priorities.len());
        for localities in &set.priorities {
            let hosts: Vec<(u32, Vec<Rc<WorkerHost>>)> = localities
                .iter()
                .map(|l| (l.weight, l.hosts.iter().map(&mut worker_host).collect()))
                .collect();
            levels.push(builder.level(&hosts, config.locality_weighted, overprovisioning));
            all.push(hosts);
        }
        let loads = Loads::new(
            levels.iter().map(|l| priority::Availability {
                total: priority::size(&l.all.hosts, by_weight),
                healthy: priority::size(&l.healthy.hosts, by_weight),
                degraded: priority::size(&l.degraded.hosts, by_weight),
                hosts: l.all.hosts.len() as u64,
                healthy_hosts: l.healthy.hosts.len() as u64,
                degraded_hosts: l.degraded.hosts.len() as u64,
            }),
            overprovisioning,
            config.panic_threshold,
        );
        let tables = all.iter().enumerate().map_while(|(i, localities)| {
            let tables = cluster.tables();
            Table::new(&config.policy, tables, i, localities, loads.panic(i), config.locality_weighted)
        });
        Self {
            tables: tables.collect(),
            weights,
            fail_on_panic: config.fail_traffic_on_panic,
            levels,
            loads,
            random: random.clone(),
        }
    }

    /// The host for a request.
    pub(crate) fn pick(&self, context: &LbContext<'_>) -> Option<Pick> {
        if let Some((address, strict)) = context.override_host {
            let found = self.find(address);
            if strict || found.is_some() {
                return found.map(|host| Pick { host, panic: false });
            }
        }
        if !self.tables.is_empty() {
            return self.pick_hashed(context);
        }
        let Some(exclude) = context.exclude else { return self.pick_once(context) };
        let mut attempts = context.max_attempts.max(1);
        loop {
            let pick = self.pick_once(context)?;
            attempts -= 1;
            if attempts == 0 || !exclude(&pick.host.host) {
                return Some(pick);
            }
        }
    }

    /// Whether all that a request could have met is in panic: a cluster without hosts is.
    pub(crate) fn is_in_panic(&self) -> bool {
        self.loads.all_panic()
    }

    /// A hashing policy looks at healthy hosts only, and tries other places of the table for another host.
    fn pick_hashed(&self, context: &LbContext<'_>) -> Option<Pick> {
        let hash = context.hash.unwrap_or_else(|| self.random.next());
        let (level, _) = self.loads.only().or_else(|| self.loads.choose(hash))?;
        let table = self.tables.get(level)?;
        let mut attempt = 0;
        loop {
            let host = table.host(hash, attempt)?;
            attempt += 1;
            let wanted = context.exclude.is_none_or(|exclude| !exclude(&host.host));
            if wanted || attempt >= context.max_attempts {
                return Some(Pick { host: host.clone(), panic: self.loads.panic(level) });
            }
        }
    }

    /// What the gauges of a hashing policy show: its last priority's table.
    pub(crate) fn table_size(&self) -> Option<Size> {
        self.tables.last().map(Table::size)
    }

    fn find(&self, address: &str) -> Option<Rc<WorkerHost>> {
        self.levels
            .iter()
            .flat_map(|l| &l.all.hosts)
            .find(|h| h.host.health() != Health::Unhealthy && h.host.address().to_string() == address)
            .cloned()
    }

    fn pick_once(&self, context: &LbContext<'_>) -> Option<Pick> {
        let hash = || context.hash.unwrap_or_else(|| self.random.next());
        let (level, health) = match (context.previous_priorities, self.loads.only()) {
            (Some(previous), _) => previous.choose(&self.loads, hash())?,
            (None, Some(only)) => only,
            (None, None) => self.loads.choose(hash())?,
        };
        let chosen = self.levels.get(level)?;
        if self.loads.panic(level) {
            if self.fail_on_panic {
                return None;
            }
            return self.host_of(&chosen.all).map(|host| Pick { host, panic: true });
        }
        let (source, weighted) = match health {
            Health::Degraded => (&chosen.degraded, &chosen.degraded_weighted),
            _ => (&chosen.healthy, &chosen.healthy_weighted),
        };
        let source = match weighted {
            None => source,
            Some(weighted) => {
                let index = weighted.schedule.borrow_mut().pick(|i| weighted.weights[i])?;
                weighted.sources.get(index)?
            }
        };
        self.host_of(source).map(|host| Pick { host, panic: false })
    }

    fn host_of(&self, source: &Source) -> Option<Rc<WorkerHost>> {
        let count = source.hosts.len();
        if count == 0 {
            return None;
        }
        if let Some(schedule) = &source.schedule {
            let index = schedule.borrow_mut().pick(|i| self.weights.of(&source.hosts[i].host))?;
            return source.hosts.get(index).cloned();
        }
        let index = match self.weights.policy {
            LbPolicy::RoundRobin => {
                let next = source.next.get();
                source.next.set(if next + 1 >= count { 0 } else { next + 1 });
                next
            }
            LbPolicy::Random
            | LbPolicy::ClusterProvided
            | LbPolicy::RingHash { .. }
            | LbPolicy::Maglev { .. } => (self.random.next() % count as u64) as usize,
            LbPolicy::LeastRequest { full_scan: true, .. } => self.least_of_all(source),
            LbPolicy::LeastRequest { choices, .. } => {
                // Choices are drawn with replacement; the first of equals stays.
                let mut best = (self.random.next() % count as u64) as usize;
                let active = |i: usize| source.hosts[i].host.stats.rq_active.value();
                for _ in 1..choices {
                    let other = (self.random.next() % count as u64) as usize;
                    if active(other) < active(best) {
                        best = other;
                    }
                }
                best
            }
        };
        source.hosts.get(index).cloned()
    }

    /// The host with the fewest requests; among equals a random one.
    fn least_of_all(&self, source: &Source) -> usize {
        let (mut best, mut fewest, mut equals) = (0, u64::MAX, 0);
        for (i, host) in source.hosts.iter().enumerate() {
            let active = host.host.stats.rq_active.value();
            if active < fewest {
                (best, fewest, equals) = (i, active, 1);
            } else if active == fewest {
                equals += 1;
                if self.random.next().is_multiple_of(equals) {
                    best = i;
                }
            }
        }
        best
    }
}

/// What hosts weigh.
struct Weights {
    policy: LbPolicy,
    /// Until when a host may weigh less because it is new; none once that is over.
    slow: Cell<Option<(SlowStart, Instant)>>,
}

impl Weights {
    fn new(config: &LbConfig, set: &HostSet, created: Instant) -> Self {
        let slow = config.slow_start.map(|slow| {
            let latest = set.hosts().filter_map(|h| h.healthy_since()).max().unwrap_or(created);
            (slow, latest.max(created) + slow.window)
        });
        let slow = slow.filter(|(_, until)| Instant::now() <= *until);
        Self { policy: config.policy, slow: Cell::new(slow) }
    }

    /// Of a host, now.
    fn of(&self, host: &Host) -> f64 {
        let weight = f64::from(host.weight());
        let weight = match self.policy {
            LbPolicy::LeastRequest { bias, .. } => {
                let active = host.stats.rq_active.value() as f64 + 1.0;
                if bias == 1.0 { weight / active } else { weight / active.powf(bias) }
            }
            _ => weight,
        };
        match self.slow.get() {
            Some((slow, until)) => weight * self.slowness(host, &slow, until),
            None => weight,
        }
    }

    fn slowness(&self, host: &Host, slow: &SlowStart, until: Instant) -> f64 {
        let now = Instant::now();
        if now > until {
            self.slow.set(None);
            return 1.0;
        }
        let since = host.healthy_since().filter(|_| host.health() == Health::Healthy);
        since.map_or(1.0, |since| slow.factor(now.duration_since(since)))
    }
}

struct Builder<'a> {
    weights: &'a Weights,
    random: &'a Random,
}

impl Builder<'_> {
    fn level(
        &self,
        localities: &[(u32, Vec<Rc<WorkerHost>>)],
        weighted: bool,
        overprovisioning: u32,
    ) -> Level {
        let all = || localities.iter().flat_map(|(_, hosts)| hosts);
        let of = |health: Health| self.source(all().filter(|h| h.host.health() == health).cloned().collect());
        let by_locality =
            |health| weighted.then(|| self.weighted(localities, health, overprovisioning)).flatten();
        Level {
            all: self.source(all().cloned().collect()),
            healthy: of(Health::Healthy),
            degraded: of(Health::Degraded),
            healthy_weighted: by_locality(Health::Healthy),
            degraded_weighted: by_locality(Health::Degraded),
        }
    }

    /// Localities by weight times availability; none where no locality has a weight and a host.
    fn weighted(
        &self,
        localities: &[(u32, Vec<Rc<WorkerHost>>)],
        health: Health,
        overprovisioning: u32,
    ) -> Option<Weighted> {
        let (mut weights, mut sources) = (Vec::new(), Vec::new());
        for (weight, hosts) in localities {
            let fit: Vec<_> = hosts.iter().filter(|h| h.host.health() == health).cloned().collect();
            if *weight == 0 || fit.is_empty() {
                continue;
            }
            let share = fit.len() as f64 / hosts.len() as f64 * f64::from(overprovisioning) / 100.0;
            weights.push(f64::from(*weight) * share.min(1.0));
            sources.push(self.source(fit));
        }
        if weights.is_empty() {
            return None;
        }
        let mut schedule = Edf::new(weights.iter().copied());
        for _ in 0..self.random.next() % weights.len() as u64 {
            schedule.pick(|i| weights[i]);
        }
        Some(Weighted { schedule: RefCell::new(schedule), weights, sources })
    }

    fn source(&self, hosts: Vec<Rc<WorkerHost>>) -> Source {
        let count = hosts.len() as u64;
        if count == 0 {
            return Source { hosts, next: Cell::new(0), schedule: None };
        }
        let start = self.random.next() % count;
        let equal = hosts.iter().all(|h| h.host.weight() == hosts[0].host.weight());
        let weighs = matches!(self.weights.policy, LbPolicy::RoundRobin | LbPolicy::LeastRequest { .. });
        let scheduled = weighs && count > 1 && (!equal || self.weights.slow.get().is_some());
        let schedule = scheduled.then(|| {
            let weight = |i: usize| self.weights.of(&hosts[i].host);
            let mut schedule = Edf::new((0..hosts.len()).map(weight));
            for _ in 0..start {
                schedule.pick(weight);
            }
            RefCell::new(schedule)
        });
        Source { hosts, next: Cell::new(start as usize), schedule }
    }
}
