//! A cluster as all threads share it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use sampan_codec::h2::CodecStats;
use sampan_core::error::AtField;
use sampan_core::stats::{Counter, Lazy, Scope};
use sampan_core::{Address, ConfigResult};
use sampan_tls::{ClientContext, StaticSecrets};
use tokio::task::AbortHandle;

use crate::circuit::{Breakers, Priority};
use crate::config::{
    ClusterConfig, Discovery, EndpointTarget, LoadAssignment, Thresholds, TransportSocketConfig,
};
use crate::host::{Health, Host, HostSet, HostSpec, LocalityHosts};
use crate::stats::{ClusterStats, TimeoutBudgetStats};

/// What lies between a connection and the codec, ready to use.
#[allow(clippy::large_enum_variant, reason = "one or two for each cluster")]
pub(crate) enum TransportSocket {
    /// Nothing.
    Raw,
    /// TLS; `alpn`: the context names protocols itself.
    Tls { context: ClientContext, alpn: bool },
}

/// One cluster: its model, its hosts, its counters.
///
/// The model never changes; a changed configuration makes a new cluster that takes the slot of its name. Hosts
/// change in place.
pub struct Cluster {
    config: ClusterConfig,
    scope: Scope,
    sockets: Vec<TransportSocket>,
    hosts: ArcSwap<HostSet>,
    generation: AtomicU64,
    current: AtomicBool,
    used: OnceLock<Used>,
    resolved: Mutex<Resolved>,
    reported: Mutex<Membership>,
    tasks: Mutex<Vec<AbortHandle>>,
    /// How many hosts took each transport socket, before the counters of that were made.
    socket_matches: Vec<AtomicU64>,
}

/// What is made at first use.
struct Used {
    stats: Arc<ClusterStats>,
    breakers: [Arc<Breakers>; 2],
    timeout_budget: Option<Arc<TimeoutBudgetStats>>,
    /// `total_match_count` of each transport socket.
    socket_matches: Vec<Counter>,
    /// Stats of the HTTP/2 codec, made with the first such connection.
    h2: Lazy<Arc<CodecStats>>,
}

/// Addresses of names, by locality and endpoint.
pub(crate) type Resolved = HashMap<(usize, usize), Vec<Address>>;

/// What the membership gauges show.
#[derive(Clone, Copy, Default)]
struct Membership {
    total: u64,
    healthy: u64,
    degraded: u64,
    max_weight: u64,
}

impl Cluster {
    /// The runtime object of a model; STATIC hosts are there at once.
    pub fn new(config: ClusterConfig, root: &Scope, secrets: &StaticSecrets) -> ConfigResult<Self> {
        let scope = root.scope("cluster").scope(&config.stat_name.replace(':', "_"));
        let mut sockets =
            vec![TransportSocket::new(&config.transport_socket, secrets, &scope).at("transport_socket")?];
        for (i, m) in config.transport_socket_matches.iter().enumerate() {
            let socket = TransportSocket::new(&m.socket, secrets, &scope);
            sockets.push(socket.at("transport_socket").at_index("transport_socket_matches", i)?);
        }
        let socket_matches = sockets.iter().map(|_| AtomicU64::new(0)).collect();
        let cluster = Self {
            config,
            scope,
            sockets,
            hosts: ArcSwap::default(),
            generation: AtomicU64::new(0),
            current: AtomicBool::new(true),
            used: OnceLock::new(),
            resolved: Mutex::default(),
            reported: Mutex::default(),
            tasks: Mutex::default(),
            socket_matches,
        };
        if cluster.config.discovery == Discovery::Static {
            cluster.rebuild(&Resolved::default());
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

    /// What `UPSTREAM_CLUSTER` prints: `alt_stat_name` or the name.
    pub fn observability_name(&self) -> &Arc<str> {
        &self.config.stat_name
    }

    /// `cluster.NAME.`, for stats whose names are only known later (`upstream_rq_200`, …).
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The counters; made now if nobody asked before.
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.used().stats
    }

    /// Whether the counters were made.
    pub fn is_used(&self) -> bool {
        self.used.get().is_some()
    }

    /// The circuit breakers of a priority.
    pub fn breakers(&self, priority: Priority) -> &Arc<Breakers> {
        &self.used().breakers[priority as usize]
    }

    /// The stats of the HTTP/2 codec.
    pub(crate) fn h2_stats(&self) -> &Arc<CodecStats> {
        self.used().h2.get()
    }

    /// The histograms of `track_timeout_budgets`, where it is set.
    pub fn timeout_budget(&self) -> Option<&Arc<TimeoutBudgetStats>> {
        self.used().timeout_budget.as_ref()
    }

    /// The limits of a priority.
    pub fn thresholds(&self, priority: Priority) -> Thresholds {
        let breakers = self.config.circuit_breakers.as_ref();
        breakers.map(|b| b.thresholds[priority as usize].clone()).unwrap_or_default()
    }

    /// The hosts of now.
    pub fn hosts(&self) -> Arc<HostSet> {
        self.hosts.load_full()
    }

    /// Grows whenever the hosts or their health change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Whether the slot of its name still holds this cluster.
    pub fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed)
    }

    pub(crate) fn socket(&self, host: &Host) -> &TransportSocket {
        self.sockets.get(host.transport_socket).unwrap_or(&self.sockets[0])
    }

    pub(crate) fn retire(&self) {
        self.current.store(false, Ordering::Relaxed);
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }

    pub(crate) fn own_task(&self, task: AbortHandle) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    fn used(&self) -> &Used {
        self.used.get_or_init(|| {
            let stats = Arc::new(ClusterStats::new(&self.scope));
            self.report(&stats);
            if self.config.discovery == Discovery::Static && self.generation() > 0 {
                stats.membership_change.inc();
            }
            let breakers = |priority, name| {
                let scope = self.scope.scope("circuit_breakers").scope(name);
                Arc::new(Breakers::new(&self.thresholds(priority), &scope))
            };
            let names = self.config.transport_socket_matches.iter().map(|m| m.name.as_str());
            let socket_matches = std::iter::once("default")
                .chain(names)
                .zip(&self.socket_matches)
                .map(|(name, count)| {
                    let counter = self.scope.scope(name).counter("total_match_count");
                    counter.add(count.swap(0, Ordering::Relaxed));
                    counter
                })
                .collect();
            Used {
                stats,
                h2: Lazy::new(self.scope.clone(), |scope| Arc::new(CodecStats::new(scope))),
                socket_matches,
                breakers: [breakers(Priority::Default, "default"), breakers(Priority::High, "high")],
                timeout_budget: self
                    .config
                    .track_timeout_budgets
                    .then(|| Arc::new(TimeoutBudgetStats::new(&self.scope))),
            }
        })
    }

    /// Takes a name's addresses; `false` where they were the same.
    pub(crate) fn set_resolved(&self, locality: usize, endpoint: usize, addresses: Vec<Address>) -> bool {
        let mut resolved = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let same = resolved
            .get(&(locality, endpoint))
            .is_some_and(|old| old.len() == addresses.len() && old.iter().all(|a| addresses.contains(a)));
        if same {
            return false;
        }
        resolved.insert((locality, endpoint), addresses);
        self.rebuild(&resolved);
        true
    }

    /// Takes the one address of a LOGICAL_DNS cluster: the host stays, new connections go there.
    pub(crate) fn set_logical_address(&self, address: Address) -> bool {
        if let Some(host) = self.hosts.load().hosts().next() {
            let changed = *host.address() != address;
            if changed {
                host.set_address(address);
            }
            return changed;
        }
        self.set_resolved(0, 0, vec![address])
    }

    fn rebuild(&self, resolved: &Resolved) {
        let old = self.hosts.load_full();
        let mut kept: HashMap<(Address, u32), Vec<Arc<Host>>> = HashMap::new();
        for host in old.hosts() {
            kept.entry(((*host.address()).clone(), host.priority)).or_default().push(host.clone());
        }
        let set = self.build(&self.config.load_assignment, resolved, &mut kept);
        self.hosts.store(Arc::new(set));
        self.generation.fetch_add(1, Ordering::Relaxed);
        if let Some(used) = self.used.get() {
            used.stats.membership_change.inc();
            self.report(&used.stats);
        }
    }

    fn build(
        &self,
        assignment: &LoadAssignment,
        resolved: &Resolved,
        kept: &mut HashMap<(Address, u32), Vec<Arc<Host>>>,
    ) -> HostSet {
        let mut set = HostSet::default();
        for (l, locality) in assignment.localities.iter().enumerate() {
            let mut hosts = Vec::with_capacity(locality.endpoints.len());
            for (e, endpoint) in locality.endpoints.iter().enumerate() {
                let (addresses, hostname) = match &endpoint.target {
                    EndpointTarget::Address(address) => (std::slice::from_ref(address), &endpoint.hostname),
                    EndpointTarget::Name(name, _) => (
                        resolved.get(&(l, e)).map(Vec::as_slice).unwrap_or_default(),
                        if endpoint.hostname.is_empty() { name } else { &endpoint.hostname },
                    ),
                };
                for address in addresses {
                    let key = (address.clone(), locality.priority);
                    let old = kept.get_mut(&key).and_then(|list| {
                        let at = list.iter().position(|h| {
                            h.weight == endpoint.weight
                                && h.hostname == *hostname
                                && h.locality == locality.locality
                        })?;
                        Some(list.swap_remove(at))
                    });
                    hosts.push(old.unwrap_or_else(|| {
                        Arc::new(Host::new(HostSpec {
                            address: address.clone(),
                            hostname,
                            weight: endpoint.weight,
                            priority: locality.priority,
                            locality: &locality.locality,
                            metadata: &endpoint.metadata,
                            flags: endpoint.flags,
                            transport_socket: self.socket_index(endpoint.metadata.as_deref()),
                        }))
                    }));
                }
            }
            let level = locality.priority as usize;
            if set.priorities.len() <= level {
                set.priorities.resize_with(level + 1, Vec::new);
            }
            let level = &mut set.priorities[level];
            // Entries of one locality are one locality, whatever their number.
            match level.iter_mut().find(|have| have.locality == locality.locality) {
                Some(have) => {
                    have.hosts.append(&mut hosts);
                    have.weight = have.weight.max(locality.weight);
                }
                None => level.push(LocalityHosts {
                    locality: locality.locality.clone(),
                    weight: locality.weight,
                    hosts,
                }),
            }
        }
        set
    }

    fn socket_index(&self, metadata: Option<&sampan_core::stream_info::Metadata>) -> usize {
        let matches = &self.config.transport_socket_matches;
        let index = matches.iter().position(|m| m.matches(metadata)).map_or(0, |i| i + 1);
        match self.used.get() {
            Some(used) => used.socket_matches[index].inc(),
            None => {
                self.socket_matches[index].fetch_add(1, Ordering::Relaxed);
            }
        }
        index
    }

    /// Moves the membership gauges from what was last shown to what is.
    fn report(&self, stats: &ClusterStats) {
        let hosts = self.hosts.load();
        let mut now = Membership::default();
        for host in hosts.hosts() {
            now.total += 1;
            now.healthy += u64::from(host.health() == Health::Healthy);
            now.degraded += u64::from(host.health() == Health::Degraded);
            // Envoy sets it when a set changes, which a STATIC cluster's never does.
            if self.config.discovery != Discovery::Static {
                now.max_weight = now.max_weight.max(u64::from(host.weight));
            }
        }
        let mut old = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        for (gauge, before, after) in [
            (&stats.membership_total, old.total, now.total),
            (&stats.membership_healthy, old.healthy, now.healthy),
            (&stats.membership_degraded, old.degraded, now.degraded),
            (&stats.max_host_weight, old.max_weight, now.max_weight),
        ] {
            if after > before {
                gauge.add(after - before);
            } else if before > after {
                gauge.sub(before - after);
            }
        }
        *old = now;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.retire();
        if let Some(used) = self.used.get() {
            self.hosts.store(Arc::default());
            self.report(&used.stats);
        }
    }
}

impl Cluster {
    /// The entries of the admin's `/certs`: one for each TLS context.
    pub fn certificates(&self) -> Vec<envoy_types::pb::envoy::admin::v3::Certificate> {
        let tls = self.sockets.iter().filter_map(|socket| match socket {
            TransportSocket::Tls { context, .. } => Some(context.admin_certificate()),
            TransportSocket::Raw => None,
        });
        tls.collect()
    }
}

impl TransportSocket {
    fn new(config: &TransportSocketConfig, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self> {
        match config {
            TransportSocketConfig::Raw => Ok(Self::Raw),
            TransportSocketConfig::Tls(message) => {
                let context = ClientContext::from_proto(message, secrets, scope).at("typed_config")?;
                let alpn = message.common_tls_context.as_ref().is_some_and(|c| !c.alpn_protocols.is_empty());
                Ok(Self::Tls { context, alpn })
            }
        }
    }
}
