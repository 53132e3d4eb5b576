//! The DNS cache of dynamic_forward_proxy: names that clients choose, resolved when they are first asked for.
//!
//! ```text
//!   worker    load: known, or wait, or no room          (filters, and clusters where no filter has asked)
//!   control   one task per name: ask, tell clusters and who waits, ask again when the answer is old
//! ```
//!
//! Caches are found by name; whoever uses one keeps all of them alive, and two configurations of one name must be alike.
//! A name stays as long as somebody asks for it within `host_ttl`, and with the address that it had when it does not
//! resolve any more. How many there are (`max_hosts`) and how many wait (`max_pending_requests`) is limited, because
//! strangers name them.

pub mod name;

mod entry;
mod lookup;
mod pending;

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_core::{ConfigError, ConfigResult};
use tokio::runtime::Handle;

use crate::cluster::Cluster;
use crate::config::DnsCacheConfig;
use crate::dns::{SharedResolver, back_off};
use lookup::{Answer, look_up};
use pending::Pending;

pub use entry::Entry;
pub use pending::Waiting;

/// The caches of a process by name. Clones share.
#[derive(Clone)]
pub struct DnsCaches(Arc<Caches>);

struct Caches {
    scope: Scope,
    resolver: SharedResolver,
    set: Mutex<Weak<Set>>,
}

type Set = Mutex<HashMap<Arc<str>, Arc<DnsCache>>>;

/// A cache in use. Clones share.
#[derive(Clone)]
pub struct DnsCacheUser {
    cache: Arc<DnsCache>,
    _set: Arc<Set>,
}

impl Deref for DnsCacheUser {
    type Target = Arc<DnsCache>;

    fn deref(&self) -> &Self::Target {
        &self.cache
    }
}

/// One cache.
pub struct DnsCache {
    config: Arc<DnsCacheConfig>,
    stats: Stats,
    resolver: SharedResolver,
    /// Where names are asked for; none outside of a process that serves.
    control: Option<Handle>,
    entries: Mutex<HashMap<Arc<str>, Arc<Entry>>>,
    pending: Arc<Pending>,
    clusters: Mutex<Vec<Weak<Cluster>>>,
}

/// `dns_cache.NAME.*`
struct Stats {
    query_attempt: Counter,
    query_failure: Counter,
    query_success: Counter,
    query_timeout: Counter,
    host_added: Counter,
    host_address_changed: Counter,
    host_overflow: Counter,
    host_removed: Counter,
    pending_overflow: Counter,
    filtered: Counter,
    hosts: Gauge,
    /// Nothing is loaded from a key value store.
    _cache_load: Counter,
}

/// Names that are longer are none, and nothing is kept of them.
const LONGEST: usize = 512;

/// What a cache knows of a name.
pub enum Load {
    /// How it resolved, well or not.
    Known(Arc<Entry>),
    /// It is being resolved.
    Wait(Arc<Entry>),
    /// There are too many.
    Overflow,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DnsCaches {
    /// No caches yet; their stats are made below `scope`, the root.
    pub fn new(scope: &Scope) -> Self {
        Self::with_resolver(scope, SharedResolver::default())
    }

    pub(crate) fn with_resolver(scope: &Scope, resolver: SharedResolver) -> Self {
        Self(Arc::new(Caches { scope: scope.clone(), resolver, set: Mutex::default() }))
    }

    /// The cache of a configuration, made now if nobody uses one of that name.
    pub fn get(&self, config: &Arc<DnsCacheConfig>) -> ConfigResult<DnsCacheUser> {
        let mut weak = lock(&self.0.set);
        let set = weak.upgrade().unwrap_or_default();
        *weak = Arc::downgrade(&set);
        drop(weak);
        let mut caches = lock(&set);
        if let Some(cache) = caches.get(&config.name) {
            if cache.config != *config {
                return Err(ConfigError::new(format!(
                    "config specified DNS cache '{}' with different settings",
                    config.name
                )));
            }
            let cache = cache.clone();
            drop(caches);
            return Ok(DnsCacheUser { cache, _set: set });
        }
        let cache = DnsCache::new(config.clone(), &self.0.scope, self.0.resolver.clone());
        caches.insert(config.name.clone(), cache.clone());
        drop(caches);
        for (host, port) in &config.preresolved {
            cache.load(host, *port);
        }
        Ok(DnsCacheUser { cache, _set: set })
    }
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        Self {
            query_attempt: scope.counter("dns_query_attempt"),
            query_failure: scope.counter("dns_query_failure"),
            query_success: scope.counter("dns_query_success"),
            query_timeout: scope.counter("dns_query_timeout"),
            host_added: scope.counter("host_added"),
            host_address_changed: scope.counter("host_address_changed"),
            host_overflow: scope.counter("host_overflow"),
            host_removed: scope.counter("host_removed"),
            pending_overflow: scope.counter("dns_rq_pending_overflow"),
            filtered: scope.counter("dns_address_filter_out"),
            hosts: scope.gauge("num_hosts"),
            _cache_load: scope.counter("cache_load"),
        }
    }
}

impl DnsCache {
    fn new(config: Arc<DnsCacheConfig>, scope: &Scope, resolver: SharedResolver) -> Arc<Self> {
        let scope = scope.scope("dns_cache").scope(&config.name.replace(':', "_"));
        Arc::new(Self {
            stats: Stats::new(&scope),
            pending: Arc::new(Pending::new(config.max_pending, &scope.scope("circuit_breakers"))),
            config,
            resolver,
            control: Handle::try_current().ok(),
            entries: Mutex::default(),
            clusters: Mutex::default(),
        })
    }

    /// A place among those who wait. None, which is counted: there are too many.
    pub fn wait(&self) -> Option<Waiting> {
        let waiting = Waiting::new(&self.pending);
        if waiting.is_none() {
            self.stats.pending_overflow.inc();
        }
        waiting
    }

    /// Whether there is a place.
    pub fn has_room(&self) -> bool {
        self.pending.has_room()
    }

    /// What is known of a host; the port counts where the host says none. A new one begins to resolve.
    pub fn load(self: &Arc<Self>, host: &str, port: u16) -> Load {
        self.load_key(name::key(host.into(), port), port)
    }

    /// The same for a key as [`name`] makes it.
    pub fn load_key(self: &Arc<Self>, key: Cow<'_, str>, port: u16) -> Load {
        if key.len() > LONGEST {
            let entry = Entry::new(key.as_ref().into(), port);
            entry.take(Vec::new(), lookup::misformatted().told(), true);
            entry.complete();
            return Load::Known(Arc::new(entry));
        }
        let mut entries = lock(&self.entries);
        let full = entries.len() >= self.config.max_hosts;
        let here = entries.get(&*key).cloned();
        let again = match &here {
            Some(entry) if entry.is_complete() => {
                if !self.config.asks_failed_anew || !entry.has_failed() {
                    return Load::Known(entry.clone());
                }
                true
            }
            _ => false,
        };
        // Also for a name that is being resolved, as in Envoy.
        if full {
            self.stats.host_overflow.inc();
            return Load::Overflow;
        }
        if let Some(entry) = here {
            if !again {
                return Load::Wait(entry);
            }
            entries.remove(&*key);
            self.forgotten(&entry);
        }
        let entry = Arc::new(Entry::new(key.as_ref().into(), port));
        entries.insert(entry.key.clone(), entry.clone());
        drop(entries);
        self.stats.host_added.inc();
        self.stats.hosts.inc();
        if let Some(control) = &self.control {
            entry.own_task(control.spawn(follow(Arc::downgrade(self), entry.clone())).abort_handle());
        }
        Load::Wait(entry)
    }

    /// A cluster learns of all names from now on. On the control thread.
    pub(crate) fn attach(&self, cluster: &Arc<Cluster>) {
        let mut clusters = lock(&self.clusters);
        clusters.retain(|cluster| cluster.strong_count() > 0);
        clusters.push(Arc::downgrade(cluster));
        drop(clusters);
        for entry in lock(&self.entries).values() {
            if let Some(address) = entry.address() {
                cluster.add_name(entry, address);
            }
        }
    }

    fn each_cluster(&self, f: impl Fn(&Cluster)) {
        let clusters: Vec<_> = lock(&self.clusters).iter().filter_map(Weak::upgrade).collect();
        clusters.iter().for_each(|cluster| f(cluster));
    }

    fn forgotten(&self, entry: &Entry) {
        entry.end_task();
        self.stats.host_removed.inc();
        self.stats.hosts.dec();
    }

    /// Nobody has asked for it for long.
    fn remove(&self, entry: &Arc<Entry>) {
        if entry.address().is_some() {
            self.each_cluster(|cluster| cluster.remove_name(&entry.key));
        }
        let mut entries = lock(&self.entries);
        if entries.get(&entry.key).is_some_and(|here| Arc::ptr_eq(here, entry)) {
            entries.remove(&entry.key);
            self.forgotten(entry);
        }
    }

    async fn ask(config: &DnsCacheConfig, resolver: &SharedResolver, name: &str) -> Result<Answer, Answer> {
        let answer = look_up(resolver, config.family, name);
        let answer = match config.query_timeout {
            None => answer.await,
            Some(limit) => sampan_core::time::timeout(limit, answer)
                .await
                .map_err(|_| Answer::failure("resolve_timeout"))?,
        };
        Ok(answer.without(config.denied.as_ref()))
    }

    /// Takes an answer. Says when to look at the name again.
    fn take(&self, entry: &Arc<Entry>, answer: &Answer, failures: &mut u32) -> Duration {
        let counter = if answer.failed { &self.stats.query_failure } else { &self.stats.query_success };
        counter.inc();
        if answer.denied {
            self.stats.filtered.inc();
        }
        if entry.take(answer.addresses.clone(), answer.told(), answer.failed)
            && let Some(address) = entry.address()
        {
            self.each_cluster(|cluster| cluster.add_name(entry, address));
            self.stats.host_address_changed.inc();
        }
        entry.complete();
        if !answer.failed {
            *failures = 0;
            let least = self.config.min_refresh_rate;
            return if answer.addresses.is_empty() {
                self.config.refresh_rate
            } else {
                answer.ttl.max(least)
            };
        }
        *failures += 1;
        match self.config.failure_rate {
            // It is not asked again, only given up when nobody wants it.
            _ if self.config.asks_failed_anew => self.config.host_ttl,
            Some(rate) => back_off(rate, *failures),
            None => self.config.refresh_rate,
        }
    }
}

impl Drop for DnsCache {
    fn drop(&mut self) {
        let entries = self.entries.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.stats.hosts.sub(entries.len() as u64);
        entries.values().for_each(|entry| entry.end_task());
    }
}

/// Asks for a name again and again, until nobody asks for it.
async fn follow(cache: Weak<DnsCache>, entry: Arc<Entry>) {
    let mut failures = 0;
    loop {
        let Some(this) = cache.upgrade() else { return };
        let (config, resolver) = (this.config.clone(), this.resolver.clone());
        this.stats.query_attempt.inc();
        drop(this);
        let answer = DnsCache::ask(&config, &resolver, entry.name()).await;
        let Some(this) = cache.upgrade() else { return };
        if answer.is_err() {
            this.stats.query_timeout.inc();
        }
        let (Ok(answer) | Err(answer)) = answer;
        let mut wait = this.take(&entry, &answer, &mut failures);
        drop(this);
        loop {
            sampan_core::time::sleep(wait).await;
            let Some(this) = cache.upgrade() else { return };
            if entry.idle() > config.host_ttl {
                return this.remove(&entry);
            }
            if !(answer.failed && config.asks_failed_anew) {
                break;
            }
            wait = config.host_ttl;
        }
    }
}

/// Whether two lists hold the same.
fn same(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.len() == b.len() && a.iter().all(|ip| b.contains(ip))
}

#[cfg(test)]
mod tests;
