//! A cluster as all threads share it.

mod building;
pub(crate) mod destinations;
mod drops;
mod hosts;
mod membership;
mod names;
mod socket;
mod used;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use prost::bytes::Bytes;
use sampan_core::ConfigResult;
use sampan_core::peer::Exchange;
use sampan_core::stats::Scope;
use sampan_tls::StaticSecrets;
use tokio::task::AbortHandle;

use crate::config::{ClusterConfig, Discovery};
use crate::dns_cache::DnsCacheUser;
use crate::host::HostSet;
use crate::manager::Warming;
use crate::outlier::{Detector, EventLog, SuccessRates};
use crate::stats::HostCounter;

pub use hosts::Rebuild;
pub(crate) use hosts::Resolved;
pub(crate) use socket::{TlsSocket, TransportSocket};

use drops::OverloadDrops;
use membership::Membership;
use names::Names;
use used::Used;

/// One cluster: its model, its hosts, its counters.
///
/// The model never changes; a changed configuration makes a new cluster that takes the slot of its name. Hosts
/// change in place.
pub struct Cluster {
    config: ClusterConfig,
    origin: Option<Origin>,
    created: Instant,
    scope: Scope,
    sockets: Box<[TransportSocket]>,
    sends_headers: bool,
    hosts: ArcSwap<HostSet>,
    /// The share of requests to drop, as bits.
    drop_share: AtomicU32,
    /// What became of that, where there is or was such a share.
    overload_drops: OnceLock<Box<OverloadDrops>>,
    generation: AtomicU64,
    current: AtomicBool,
    used: OnceLock<Box<Used>>,
    /// What the names of a DNS cluster resolve to. Whoever builds hosts holds it: one at a time.
    resolved: Mutex<Option<Box<Resolved>>>,
    reported: Mutex<Membership>,
    tasks: Mutex<Vec<AbortHandle>>,
    outlier: Option<Box<Detector>>,
    /// The hosts of a dynamic_forward_proxy cluster.
    names: Option<Box<Names>>,
    /// Whether the first answer on its hosts, good or bad, is still to come.
    pub(crate) warming: AtomicBool,
    awaited: Mutex<Awaited>,
    /// How many hosts took each transport socket, before the counters of that were made.
    socket_matches: Box<[AtomicU64]>,
    /// Requests that were dropped because there were too many or for `drop_overloads`, for load reports.
    dropped: HostCounter,
    /// TCP metadata exchange, where its filter is among the cluster's.
    pub(crate) exchange: Option<Arc<Exchange>>,
}

/// Where a cluster that was not in the bootstrap came from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The response's `version_info`.
    pub version: Arc<str>,
    /// The message.
    pub bytes: Bytes,
    /// When.
    pub updated: SystemTime,
}

/// What a cluster warms for beside names.
#[derive(Default)]
pub(crate) struct Awaited {
    /// EDS.
    pub(crate) endpoints: Option<Warming>,
    /// SDS.
    pub(crate) secrets: Option<Warming>,
}

impl Cluster {
    /// The runtime object of a model; STATIC hosts are there at once.
    pub fn new(
        config: ClusterConfig,
        origin: Option<Origin>,
        root: &Scope,
        secrets: &StaticSecrets,
        exchange: Option<Arc<Exchange>>,
        events: Option<Arc<EventLog>>,
        cache: Option<DnsCacheUser>,
    ) -> ConfigResult<Self> {
        let scope = root.scope("cluster").scope(&config.stat_name.replace(':', "_"));
        let sockets = TransportSocket::all(&config, secrets, &scope)?;
        let socket_matches = sockets.iter().map(|_| AtomicU64::new(0)).collect();
        let outlier = config.outlier.as_deref().map(|c| Box::new(Detector::new(c, events)));
        let cluster = Self {
            outlier,
            config,
            origin,
            created: Instant::now(),
            warming: AtomicBool::new(false),
            awaited: Mutex::default(),
            scope,
            sends_headers: sockets.iter().any(|socket| socket.header.is_some()),
            sockets,
            hosts: ArcSwap::default(),
            drop_share: AtomicU32::default(),
            overload_drops: OnceLock::new(),
            generation: AtomicU64::new(0),
            current: AtomicBool::new(true),
            used: OnceLock::new(),
            resolved: Mutex::default(),
            reported: Mutex::default(),
            tasks: Mutex::default(),
            names: cache.map(|cache| Box::new(Names::new(cache))),
            socket_matches,
            dropped: HostCounter::default(),
            exchange,
        };
        cluster.set_drops(&cluster.config.load_assignment);
        if cluster.config.discovery == Discovery::Static {
            cluster.rebuild(&cluster.config.load_assignment, &Resolved::default());
        }
        Ok(cluster)
    }

    /// The model.
    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// `name`
    pub fn name(&self) -> &Arc<str> {
        &self.config.name
    }

    /// Where it came from; none: from the bootstrap.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// `eds_cluster_config.service_name`
    pub fn eds_service_name(&self) -> Option<&str> {
        match &self.config.discovery {
            Discovery::Eds(eds) => eds.service_name.as_deref(),
            _ => None,
        }
    }

    /// What `UPSTREAM_CLUSTER` prints: `alt_stat_name` or the name.
    pub fn observability_name(&self) -> &Arc<str> {
        &self.config.stat_name
    }

    /// `cluster.NAME.`, for stats whose names are only known later (`upstream_rq_200`, …).
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    pub(crate) fn outlier(&self) -> Option<&Detector> {
        self.outlier.as_deref()
    }

    /// What outlier detection found of errors of external and of local origin, where it is on.
    pub fn success_rates(&self) -> Option<[SuccessRates; 2]> {
        self.outlier.as_ref().map(|detector| detector.rates())
    }

    /// When it was made.
    pub(crate) fn created(&self) -> Instant {
        self.created
    }

    /// Whether the slot of its name still holds this cluster.
    pub fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    pub(crate) fn retire(&self) {
        self.current.store(false, Ordering::Relaxed);
        self.withdraw();
        if let Some(names) = &self.names {
            names.retire();
        }
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }

    pub(crate) fn own_task(&self, task: AbortHandle) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// EDS has answered, well or not, or will not in time: the cluster warms for that no longer.
    pub fn settle_endpoints(&self) {
        // The lock is let go first.
        let warming = self.awaited().endpoints.take();
        drop(warming);
    }

    /// SDS has answered for all secrets, well or not, or will not in time: the cluster warms for that no longer.
    pub fn settle_secrets(&self) {
        let warming = self.awaited().secrets.take();
        drop(warming);
    }

    pub(crate) fn awaited(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the first answer on its hosts, good or bad, is still to come.
    pub fn is_warming(&self) -> bool {
        self.warming.load(Ordering::Relaxed)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.retire();
    }
}

#[cfg(test)]
mod tests;
