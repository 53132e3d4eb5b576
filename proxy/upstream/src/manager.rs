//! The cluster manager: named slots, on the control thread.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use sampan_core::ConfigResult;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_tls::StaticSecrets;
use tokio::sync::watch;

use crate::cluster::Cluster;
use crate::config::{ClusterConfig, Discovery};
use crate::dns;

/// The slots that all threads share. Workers take the lock only for names they have not used before.
#[derive(Default)]
pub struct Clusters(RwLock<BTreeMap<Arc<str>, Arc<Cluster>>>);

/// Adds, replaces and removes clusters.
pub struct ClusterManager {
    clusters: Arc<Clusters>,
    scope: Scope,
    secrets: StaticSecrets,
    stats: ManagerStats,
    resolver: dns::SharedResolver,
    /// How many clusters have not had their first answer.
    warming: watch::Sender<usize>,
}

struct ManagerStats {
    added: Counter,
    modified: Counter,
    removed: Counter,
    active: Gauge,
    /// Printed by Envoy too; nothing here moves them yet.
    _unmoved: ([Counter; 4], Gauge),
}

impl Clusters {
    /// The cluster of a name.
    pub fn get(&self, name: &str) -> Option<Arc<Cluster>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All clusters, by name.
    pub fn all(&self) -> Vec<Arc<Cluster>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl ClusterManager {
    /// A manager without clusters; its counters and theirs are made below `scope`, the root.
    pub fn new(scope: &Scope, secrets: StaticSecrets) -> Self {
        let own = scope.scope("cluster_manager");
        Self {
            clusters: Arc::default(),
            secrets,
            stats: ManagerStats {
                added: own.counter("cluster_added"),
                modified: own.counter("cluster_modified"),
                removed: own.counter("cluster_removed"),
                active: own.gauge("active_clusters"),
                _unmoved: (
                    [
                        own.counter("cluster_updated"),
                        own.counter("cluster_updated_via_merge"),
                        own.counter("update_merge_cancelled"),
                        own.counter("update_out_of_merge_window"),
                    ],
                    own.gauge("warming_clusters"),
                ),
            },
            scope: scope.clone(),
            resolver: dns::SharedResolver::default(),
            warming: watch::Sender::new(0),
        }
    }

    /// The slots, for the workers.
    pub fn clusters(&self) -> Arc<Clusters> {
        self.clusters.clone()
    }

    /// Puts a cluster into the slot of its name. A DNS cluster begins to resolve: this needs a tokio runtime.
    pub fn add(&self, config: ClusterConfig) -> ConfigResult<Arc<Cluster>> {
        let cluster = Arc::new(Cluster::new(config, &self.scope, &self.secrets)?);
        let mut map = self.clusters.0.write().unwrap_or_else(PoisonError::into_inner);
        match map.insert(cluster.name().clone(), cluster.clone()) {
            Some(old) => {
                old.retire();
                self.stats.modified.inc();
            }
            None => {
                self.stats.added.inc();
                self.stats.active.inc();
            }
        }
        drop(map);
        match &cluster.config().discovery {
            Discovery::Static => {}
            Discovery::StrictDns(dns) | Discovery::LogicalDns(dns) => {
                dns::start(&cluster, dns, &self.resolver, &self.warming);
            }
        }
        Ok(cluster)
    }

    /// Empties a slot.
    pub fn remove(&self, name: &str) -> bool {
        let mut map = self.clusters.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(old) = map.remove(name) else { return false };
        old.retire();
        self.stats.removed.inc();
        self.stats.active.dec();
        true
    }

    /// Returns when every cluster has had its first answer from DNS, good or bad: listeners open after that.
    pub async fn initialised(&self) {
        // The sender lives in self, so that waiting cannot fail.
        let _ = self.warming.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Makes the stats of all clusters, used or not: what `/stats` without `usedonly` shows in Envoy.
    pub fn materialise_stats(&self) {
        for cluster in self.clusters.all() {
            cluster.stats();
        }
    }
}
