//! The cluster manager: named slots, on the control thread.
//!
//! A cluster whose hosts (DNS, EDS) or secrets (SDS) must come first *warms*: while the process starts, it takes its
//! slot at once and [`ClusterManager::initialised`] waits for it; later it waits aside, and what held the slot before
//! serves on until the first answer of each, good or bad. Who awaits one holds a [`Warming`] and drops it then.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use sampan_core::ConfigResult;
use sampan_core::error::AtField;
use sampan_core::peer;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_tls::StaticSecrets;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cluster::{Cluster, Origin, destinations};
use crate::config::{BindConfig, ClusterConfig, Discovery, ExchangeConfig};
use crate::demand::{Demand, Discovered, OnDemand};
use crate::dns;
use crate::dns_cache::DnsCaches;
use crate::outlier::{self, EventLog};

/// The slots that all threads share. Workers take the lock only for names they have not used before.
#[derive(Default)]
pub struct Clusters {
    slots: RwLock<BTreeMap<Arc<str>, Arc<Cluster>>>,
    /// Where clusters that are not there are asked for.
    demands: OnceLock<mpsc::UnboundedSender<Demand>>,
}

/// Adds, replaces and removes clusters.
pub struct ClusterManager {
    slots: Arc<Slots>,
    scope: Scope,
    secrets: StaticSecrets,
    resolver: dns::SharedResolver,
    caches: DnsCaches,
    bind: Option<Box<BindConfig>>,
    events: Option<Arc<EventLog>>,
    node: Arc<peer::Node>,
    /// What connections of clusters begin with, by configuration: most clusters of a mesh have the same.
    exchanges: Mutex<Vec<(ExchangeConfig, Arc<peer::Exchange>)>>,
}

/// What [`Warming`] guards reach.
struct Slots {
    clusters: Arc<Clusters>,
    /// Clusters that are not in their slots yet.
    aside: Mutex<BTreeMap<Arc<str>, Arc<Cluster>>>,
    stats: ManagerStats,
    /// How many clusters have not had their first answer.
    warming: watch::Sender<usize>,
    /// Grows when a slot loses a cluster.
    replaced: watch::Sender<u64>,
    /// Grows when a slot gets its first cluster.
    appeared: watch::Sender<u64>,
}

struct ManagerStats {
    added: Counter,
    modified: Counter,
    removed: Counter,
    active: Gauge,
    warming: Gauge,
    /// Printed by Envoy too; nothing here moves them yet.
    _unmoved: [Counter; 4],
}

/// Keeps a cluster warming until it is dropped, or until the last of its clones is.
#[derive(Clone)]
pub struct Warming(#[allow(dead_code, reason = "held for its drop")] Arc<WarmingInner>);

struct WarmingInner {
    slots: Arc<Slots>,
    cluster: Weak<Cluster>,
}

impl Drop for WarmingInner {
    fn drop(&mut self) {
        self.slots.warming.send_modify(|n| *n -= 1);
        if let Some(cluster) = self.cluster.upgrade() {
            cluster.warming.store(false, Ordering::Relaxed);
            self.slots.promote(&cluster);
        }
    }
}

impl Clusters {
    /// The cluster of a name.
    pub fn get(&self, name: &str) -> Option<Arc<Cluster>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All clusters, by name.
    pub fn all(&self) -> Vec<Arc<Cluster>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Asks for a cluster that is not there; what is returned ends with the answer.
    pub(crate) fn demand(
        &self,
        on_demand: &Arc<OnDemand>,
        name: &Arc<str>,
    ) -> impl Future<Output = Discovered> + use<> {
        let (answer, answered) = oneshot::channel();
        if let Some(demands) = self.demands.get() {
            // Where nobody listens any more the answer is dropped at once.
            let _ = demands.send(Demand { on_demand: on_demand.clone(), name: name.clone(), answer });
        }
        async move { answered.await.unwrap_or(Discovered::Missing) }
    }
}

impl Slots {
    fn aside(&self) -> std::sync::MutexGuard<'_, BTreeMap<Arc<str>, Arc<Cluster>>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a cluster into its slot.
    fn place(&self, cluster: &Arc<Cluster>) {
        let mut map = self.clusters.slots.write().unwrap_or_else(PoisonError::into_inner);
        let old = map.insert(cluster.name().clone(), cluster.clone());
        drop(map);
        match old {
            Some(old) => {
                // Counters go on where they are: they must not be without an owner in between.
                if old.is_used() {
                    cluster.stats();
                }
                old.retire();
                self.replaced.send_modify(|n| *n += 1);
            }
            None => {
                self.stats.active.inc();
                self.appeared.send_modify(|n| *n += 1);
            }
        }
    }

    /// Moves a cluster that waited aside into its slot.
    fn promote(&self, cluster: &Arc<Cluster>) {
        let mut aside = self.aside();
        if aside.get(cluster.name()).is_some_and(|c| Arc::ptr_eq(c, cluster)) {
            aside.remove(cluster.name());
            drop(aside);
            self.stats.warming.dec();
            self.place(cluster);
        }
    }
}

impl ClusterManager {
    /// A manager without clusters; its counters and theirs are made below `scope`, the root.
    pub fn new(scope: &Scope, secrets: StaticSecrets) -> Self {
        let own = scope.scope("cluster_manager");
        own.gauge("warming_clusters").touch();
        let stats = ManagerStats {
            added: own.counter("cluster_added"),
            modified: own.counter("cluster_modified"),
            removed: own.counter("cluster_removed"),
            active: own.gauge("active_clusters"),
            warming: own.gauge("warming_clusters"),
            _unmoved: [
                own.counter("cluster_updated"),
                own.counter("cluster_updated_via_merge"),
                own.counter("update_merge_cancelled"),
                own.counter("update_out_of_merge_window"),
            ],
        };
        let resolver = dns::SharedResolver::default();
        Self {
            caches: DnsCaches::with_resolver(scope, resolver.clone()),
            slots: Arc::new(Slots {
                clusters: Arc::default(),
                aside: Mutex::default(),
                stats,
                warming: watch::Sender::new(0),
                replaced: watch::Sender::new(0),
                appeared: watch::Sender::new(0),
            }),
            secrets,
            scope: scope.clone(),
            resolver,
            bind: None,
            events: None,
            node: Arc::default(),
            exchanges: Mutex::default(),
        }
    }

    /// With what peers are told of us.
    #[must_use]
    pub fn with_node(mut self, node: Arc<peer::Node>) -> Self {
        self.node = node;
        self
    }

    /// What peers are told of us.
    pub fn node(&self) -> &Arc<peer::Node> {
        &self.node
    }

    /// The caches of names that clients choose.
    pub fn dns_caches(&self) -> &DnsCaches {
        &self.caches
    }

    /// The metadata exchange of a configuration.
    fn exchange(&self, config: &ExchangeConfig) -> Arc<peer::Exchange> {
        let mut known = self.exchanges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, exchange)) = known.iter().find(|(of, _)| of == config) {
            return exchange.clone();
        }
        let (own, labels) = (self.node.peer(&config.additional_labels), config.additional_labels.clone());
        let stats = peer::ExchangeStats::new(&self.scope);
        let exchange = Arc::new(peer::Exchange::new(&config.protocol, &own, &self.node.id, labels, stats));
        known.push((config.clone(), exchange.clone()));
        exchange
    }

    /// `cluster_manager.upstream_bind_config`: for clusters that have none of their own.
    pub fn with_bind(self, bind: Option<BindConfig>) -> Self {
        Self { bind: bind.map(Box::new), ..self }
    }

    /// `cluster_manager.outlier_detection.event_log_path`
    #[must_use]
    pub fn with_events(self, events: Option<EventLog>) -> Self {
        Self { events: events.map(Arc::new), ..self }
    }

    /// The slots, for the workers.
    pub fn clusters(&self) -> Arc<Clusters> {
        self.slots.clusters.clone()
    }

    /// Puts a cluster into the slot of its name. A DNS cluster begins to resolve: this needs a tokio runtime.
    pub fn add(&self, config: ClusterConfig) -> ConfigResult<Arc<Cluster>> {
        self.count(&config.name);
        self.update(config, None, false)
    }

    /// Counts that a cluster is added or modified; one that is then refused is counted too, as in Envoy.
    pub fn count(&self, name: &str) {
        let counter =
            if self.newest(name).is_some() { &self.slots.stats.modified } else { &self.slots.stats.added };
        counter.inc();
    }

    /// Makes a cluster and puts it into the slot of its name, at once or, with `warm`, when its hosts are known.
    /// A cluster with EDS or SDS warms until it is settled ([`Cluster::settle_endpoints`], [`Cluster::settle_secrets`]).
    pub fn update(
        &self,
        config: ClusterConfig,
        origin: Option<Origin>,
        warm: bool,
    ) -> ConfigResult<Arc<Cluster>> {
        let exchange = config.exchange.as_deref().map(|config| self.exchange(config));
        let mut config = config;
        if config.bind.is_none() {
            config.bind.clone_from(&self.bind);
        }
        let cache = match &config.discovery {
            Discovery::Forward(forward) => Some(self.caches.get(&forward.cache).at("cluster_type")?),
            _ => None,
        };
        let cluster = Arc::new(Cluster::new(
            config,
            origin,
            &self.scope,
            &self.secrets,
            exchange,
            self.events.clone(),
            cache,
        )?);
        if let Some((_, cache)) = cluster.forwards() {
            cache.attach(&cluster);
        }
        let slots = &self.slots;
        let mut aside = slots.aside();
        let waiting = aside.remove(cluster.name());
        if waiting.is_some() {
            slots.stats.warming.dec();
        }
        if warm {
            aside.insert(cluster.name().clone(), cluster.clone());
            slots.stats.warming.inc();
        }
        drop(aside);
        if !warm {
            slots.place(&cluster);
        }
        let warming = self.warming(&cluster);
        if let Discovery::StrictDns(dns) | Discovery::LogicalDns(dns) = &cluster.config().discovery {
            dns::start(&cluster, dns, &self.resolver, &warming);
        }
        if let Some(outlier) = &cluster.config().outlier {
            outlier::start(&cluster, outlier.interval);
        }
        if let Discovery::OriginalDst(config) = &cluster.config().discovery {
            destinations::start(&cluster, config.cleanup_interval);
        }
        // Subscriptions to endpoints and secrets keep it warming; a plain STATIC one is warm now.
        if matches!(cluster.config().discovery, Discovery::Eds(_)) {
            cluster.awaited().endpoints = Some(warming.clone());
        }
        if !cluster.secrets().is_empty() {
            cluster.awaited().secrets = Some(warming);
        }
        Ok(cluster)
    }

    fn warming(&self, cluster: &Arc<Cluster>) -> Warming {
        self.slots.warming.send_modify(|n| *n += 1);
        cluster.warming.store(true, Ordering::Relaxed);
        Warming(Arc::new(WarmingInner { slots: self.slots.clone(), cluster: Arc::downgrade(cluster) }))
    }

    /// Empties a slot.
    pub fn remove(&self, name: &str) -> bool {
        let slots = &self.slots;
        let waiting = slots.aside().remove(name);
        if waiting.is_some() {
            slots.stats.warming.dec();
        }
        let mut map = slots.clusters.slots.write().unwrap_or_else(PoisonError::into_inner);
        let old = map.remove(name);
        drop(map);
        if old.is_none() && waiting.is_none() {
            return false;
        }
        slots.stats.removed.inc();
        if let Some(old) = old {
            old.retire();
            slots.stats.active.dec();
            slots.replaced.send_modify(|n| *n += 1);
        }
        true
    }

    /// The clusters that wait aside for their hosts, by name.
    pub fn waiting(&self) -> Vec<Arc<Cluster>> {
        self.slots.aside().values().cloned().collect()
    }

    /// The newest cluster of a name, in its slot or aside.
    pub fn newest(&self, name: &str) -> Option<Arc<Cluster>> {
        let waiting = self.slots.aside().get(name).cloned();
        waiting.or_else(|| self.slots.clusters.get(name))
    }

    /// Changes whenever a slot lost its cluster: workers then close what they hold of it.
    pub fn replaced(&self) -> watch::Receiver<u64> {
        self.slots.replaced.subscribe()
    }

    /// Changes whenever there is a cluster that was not there before.
    pub fn appeared(&self) -> watch::Receiver<u64> {
        self.slots.appeared.subscribe()
    }

    /// Where the workers' questions for clusters come out; to be called once.
    pub fn demands(&self) -> mpsc::UnboundedReceiver<Demand> {
        let (sender, receiver) = mpsc::unbounded_channel();
        // A second caller hears nothing.
        let _ = self.slots.clusters.demands.set(sender);
        receiver
    }

    /// Returns when every cluster has had its first answer, good or bad: listeners open after that.
    pub async fn initialised(&self) {
        // The sender lives in self, so that waiting cannot fail.
        let _ = self.slots.warming.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Returns when a cluster has had its first answer, good or bad, or is not there.
    pub async fn settled(&self, name: &str) {
        let warms = |_: &usize| !self.newest(name).is_some_and(|cluster| cluster.is_warming());
        // The sender lives in self, so that waiting cannot fail.
        let _ = self.slots.warming.subscribe().wait_for(warms).await;
    }

    /// Makes the stats of all clusters, used or not: what `/stats` without `usedonly` shows in Envoy.
    pub fn materialise_stats(&self) {
        for cluster in self.slots.clusters.all() {
            cluster.stats();
        }
    }
}
