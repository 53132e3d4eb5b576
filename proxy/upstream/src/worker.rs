//! Clusters as one worker sees them: everything `Rc`, nothing locked.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use foldhash::fast::RandomState;
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::{Metadata, StreamInfo};

use crate::circuit::{Breakers, Priority};
use crate::cluster::Cluster;
use crate::config::Discovery;
use crate::demand::{Discovered, OnDemand};
use crate::host::{Host, HostSet};
use crate::lb::{LbContext, LoadBalancer, Random};
use crate::manager::Clusters;
use crate::outlier::{Monitor, Outcome};
use crate::pool::{Pools, Sweeper};
use crate::stats::ClusterStats;

use destinations::Destinations;
use names::Names;
pub use names::{Choice, Resolving};

mod destinations;
mod names;

/// The clusters of one worker. Clones share.
#[derive(Clone)]
pub struct WorkerClusters(Rc<Inner>);

struct Inner {
    shared: Arc<Clusters>,
    used: RefCell<HashMap<Arc<str>, Rc<WorkerCluster>, RandomState>>,
    random: Rc<Random>,
    sweeper: Rc<Sweeper>,
}

/// What the hosts of a cluster share on one worker.
pub(crate) struct ClusterCore {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) stats: Arc<ClusterStats>,
    pub(crate) breakers: [Arc<Breakers>; 2],
    pub(crate) sweeper: Rc<Sweeper>,
}

/// A cluster on one worker: its balancer, and its hosts with their pools.
pub struct WorkerCluster {
    core: Rc<ClusterCore>,
    random: Rc<Random>,
    generation: Cell<u64>,
    balancer: RefCell<LoadBalancer>,
    hosts: RefCell<HashMap<usize, Rc<WorkerHost>, RandomState>>,
    /// Of an ORIGINAL_DST cluster.
    destinations: Option<Box<Destinations>>,
    /// Of a dynamic_forward_proxy cluster.
    names: Option<Box<Names>>,
}

/// Where a request or connection says itself that it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination<'a> {
    /// To an address: of an ORIGINAL_DST cluster.
    Address(SocketAddr),
    /// To a host by its name, as a DNS cache looks for it, and with the port that it has where it says none: of a
    /// dynamic_forward_proxy cluster.
    Name(Cow<'a, str>, u16),
}

/// A host on one worker: its pools.
pub struct WorkerHost {
    /// The host.
    pub host: Arc<Host>,
    pub(crate) core: Rc<ClusterCore>,
    pub(crate) removed: Cell<bool>,
    metadata: RefCell<Option<Arc<Metadata>>>,
    canary: Cell<bool>,
    pub(crate) pools: RefCell<Pools>,
}

impl WorkerClusters {
    /// The worker's view of the manager's clusters; made on the worker.
    pub fn new(shared: Arc<Clusters>) -> Self {
        Self(Rc::new(Inner {
            shared,
            used: RefCell::default(),
            random: Rc::new(Random::new()),
            sweeper: Rc::default(),
        }))
    }

    /// The cluster of a name. A name used before costs one hash lookup; a cluster that lost its slot is looked up
    /// anew and its idle connections are closed.
    pub fn get(&self, name: &str) -> Option<Rc<WorkerCluster>> {
        if let Some(cluster) = self.0.used.borrow().get(name)
            && cluster.core.cluster.is_current()
        {
            return Some(cluster.clone());
        }
        self.look_up(name)
    }

    #[cold]
    fn look_up(&self, name: &str) -> Option<Rc<WorkerCluster>> {
        if let Some(old) = self.0.used.borrow_mut().remove(name) {
            old.drain();
        }
        let cluster = WorkerCluster::new(self.0.shared.get(name)?, &self.0.random, &self.0.sweeper);
        let cluster = Rc::new(cluster);
        self.0.used.borrow_mut().insert(cluster.core.cluster.name().clone(), cluster.clone());
        Some(cluster)
    }

    /// Asks for a cluster that is not there; what is returned ends with the answer.
    pub fn demand(
        &self,
        on_demand: &Arc<OnDemand>,
        name: &Arc<str>,
    ) -> impl Future<Output = Discovered> + use<> {
        self.0.shared.demand(on_demand, name)
    }

    /// A random number; not for secrets.
    pub fn random(&self) -> u64 {
        self.0.random.next()
    }

    /// Closes the connections of clusters that lost their slot and were not asked for since; called when one did.
    pub fn prune(&self) {
        self.0.used.borrow_mut().retain(|_, cluster| {
            let current = cluster.core.cluster.is_current();
            if !current {
                cluster.drain();
            }
            current
        });
    }
}

impl WorkerCluster {
    fn new(cluster: Arc<Cluster>, random: &Rc<Random>, sweeper: &Rc<Sweeper>) -> Self {
        let core = Rc::new(ClusterCore {
            stats: cluster.stats().clone(),
            breakers: [Priority::Default, Priority::High].map(|p| cluster.breakers(p).clone()),
            sweeper: sweeper.clone(),
            cluster,
        });
        let empty = HostSet::default();
        let balancer = LoadBalancer::new(&core.cluster, &empty, random, |h| WorkerHost::new(h, &core));
        let this = Self {
            random: random.clone(),
            generation: Cell::new(u64::MAX),
            balancer: RefCell::new(balancer),
            hosts: RefCell::default(),
            destinations: matches!(core.cluster.config().discovery, Discovery::OriginalDst(_))
                .then(Box::default),
            names: core.cluster.names().map(|_| Box::default()),
            core,
        };
        this.refresh();
        this
    }

    /// The shared cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.core.cluster
    }

    /// The counters.
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.core.stats
    }

    /// The circuit breakers of a priority.
    pub fn breakers(&self, priority: Priority) -> &Arc<Breakers> {
        &self.core.breakers[priority as usize]
    }

    /// Whether [`LbContext::hash`] counts.
    pub fn hashes(&self) -> bool {
        self.core.cluster.config().lb.hashes()
    }

    /// Where a request or, without headers, a connection says that it goes, if this kind of cluster asks for that: for
    /// [`LbContext::destination`].
    pub fn destination<'a>(
        &self,
        headers: Option<&'a HeaderMap>,
        info: &StreamInfo,
    ) -> Option<Destination<'a>> {
        match &self.core.cluster.config().discovery {
            Discovery::OriginalDst(config) => {
                let address =
                    config.destination(headers, info, &self.core.stats.original_dst_host_invalid)?;
                Some(Destination::Address(address))
            }
            Discovery::Forward(_) => self.core.cluster.named_by(headers, Some(info)),
            _ => None,
        }
    }

    /// The same for a request that this proxy makes itself.
    pub fn destination_of_call<'a>(&self, headers: &'a HeaderMap) -> Option<Destination<'a>> {
        self.core.cluster.named_by(Some(headers), None)
    }

    /// Picks a host. `None`: no healthy upstream. A name that must be resolved first is none, but is resolved then.
    pub fn pick(&self, context: &LbContext<'_>) -> Option<Rc<WorkerHost>> {
        match self.choose(context) {
            Choice::Host(host) => Some(host),
            Choice::None(_) | Choice::Later(_) => None,
        }
    }

    /// Picks a host. Where there is none, `upstream_cx_none_healthy` was counted.
    pub fn choose(&self, context: &LbContext<'_>) -> Choice {
        let choice = match (&self.destinations, &self.names, &context.destination) {
            (None, None, _) => self.balance(context).map_or(Choice::None(None), Choice::Host),
            (Some(destinations), _, Some(Destination::Address(address))) => {
                Choice::Host(destinations.pick(&self.core, *address))
            }
            (_, Some(names), Some(Destination::Name(name, port))) => names.choose(&self.core, name, *port),
            (_, Some(_), _) => Choice::None(Some("empty_host_header".into())),
            _ => Choice::None(None),
        };
        if matches!(choice, Choice::None(_)) {
            self.core.stats.upstream_cx_none_healthy.inc();
        }
        choice
    }

    /// The host of a name, if a dynamic_forward_proxy cluster has it.
    pub fn named(&self, key: &str) -> Option<Rc<WorkerHost>> {
        self.names.as_ref()?.find(&self.core, key)
    }

    fn balance(&self, context: &LbContext<'_>) -> Option<Rc<WorkerHost>> {
        if self.generation.get() != self.core.cluster.generation() {
            self.refresh();
        }
        let balancer = self.balancer.borrow();
        let Some(pick) = balancer.pick(context) else {
            if context.override_host.is_none_or(|(_, strict)| !strict) && balancer.is_in_panic() {
                self.core.stats.lb_healthy_panic.inc();
            }
            return None;
        };
        if pick.panic {
            self.core.stats.lb_healthy_panic.inc();
        }
        Some(pick.host)
    }

    #[cold]
    fn refresh(&self) {
        // The generation first: a set that changes in between is looked at again.
        self.generation.set(self.core.cluster.generation());
        let set = self.core.cluster.hosts();
        let mut old = self.hosts.replace(HashMap::default());
        let mut now = HashMap::default();
        let balancer = LoadBalancer::new(&self.core.cluster, &set, &self.random, |host| {
            let key = Arc::as_ptr(host) as usize;
            let kept = old.remove(&key);
            kept.iter().for_each(|host| host.refresh());
            let worker_host = kept.unwrap_or_else(|| WorkerHost::new(host, &self.core));
            now.insert(key, worker_host.clone());
            worker_host
        });
        for gone in old.into_values() {
            gone.drain();
        }
        self.hosts.replace(now);
        if let Some(size) = balancer.table_size() {
            self.core.cluster.show_table(size);
        }
        self.balancer.replace(balancer);
    }

    fn drain(&self) {
        for host in self.hosts.borrow().values() {
            host.drain();
        }
        if let Some(destinations) = &self.destinations {
            destinations.drain();
        }
        if let Some(names) = &self.names {
            names.drain();
        }
    }
}

impl WorkerHost {
    fn new(host: &Arc<Host>, core: &Rc<ClusterCore>) -> Rc<Self> {
        Rc::new(Self {
            host: host.clone(),
            core: core.clone(),
            removed: Cell::new(false),
            metadata: RefCell::new(host.metadata()),
            canary: Cell::new(host.canary()),
            pools: RefCell::default(),
        })
    }

    /// The cluster.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.core.cluster
    }

    /// The endpoint's metadata, as of this worker's last look.
    pub fn metadata(&self) -> Option<Arc<Metadata>> {
        self.metadata.borrow().clone()
    }

    /// `envoy.lb` `canary`
    pub fn canary(&self) -> bool {
        self.canary.get()
    }

    /// Whether connections to it are TLS.
    pub fn is_tls(&self) -> bool {
        self.cluster().socket(&self.host).tls.is_some()
    }

    /// Takes over what changed in place.
    fn refresh(&self) {
        self.metadata.replace(self.host.metadata());
        self.canary.set(self.host.canary());
    }

    /// Tells outlier detection, where it is on, how something ended; `code` where the host answered with one.
    pub fn report(&self, outcome: Outcome, code: Option<u16>) {
        if let Some(monitor) = self.host.monitor() {
            self.report_to(monitor, outcome, code);
        }
    }

    fn report_to(&self, monitor: &Monitor, outcome: Outcome, code: Option<u16>) {
        if let Some(detector) = self.core.cluster.outlier() {
            detector.report(&self.core.cluster, &self.host, monitor, outcome, code);
        }
    }

    /// The cluster's counters.
    pub fn cluster_stats(&self) -> &Arc<ClusterStats> {
        &self.core.stats
    }

    /// No new requests come: idle connections close now, the others with their last request.
    fn drain(&self) {
        self.removed.set(true);
        for pools in self.pools.borrow().all() {
            pools.drain();
        }
    }
}
