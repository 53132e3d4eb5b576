//! A cluster as all threads share it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use prost::bytes::Bytes;
use sampan_codec::h2::CodecStats;
use sampan_core::error::AtField;
use sampan_core::peer::Exchange;
use sampan_core::stats::{Counter, Lazy, Scope};
use sampan_core::{Address, ConfigResult};
use sampan_tls::{ClientContext, StaticSecrets, TlsSlot, WantedSecret};
use tokio::task::AbortHandle;

use crate::circuit::{Breakers, Priority};
use crate::config::{ClusterConfig, Discovery, LoadAssignment, Thresholds, TransportSocketConfig};
use crate::dns_cache::DnsCacheUser;
use crate::host::{Health, Host, HostSet};
use crate::lb::{Size, Tables};
use crate::manager::Warming;
use crate::outlier::{Detector, EventLog, OutlierStats, SuccessRates};
use crate::proxy_header::ProxyHeaderConfig;
use crate::stats::{ClusterStats, HostCounter, TableStats, TimeoutBudgetStats};

use building::{Building, Kept};
use destinations::Destinations;
use names::Names;

mod building;
pub(crate) mod destinations;
mod names;

/// What lies between a connection and the codec, ready to use; nothing for `raw_buffer`.
pub(crate) struct TransportSocket {
    /// What goes out first.
    pub(crate) header: Option<Arc<ProxyHeaderConfig>>,
    pub(crate) tls: Option<TlsSocket>,
}

/// TLS to a host.
pub(crate) struct TlsSocket {
    pub(crate) context: Arc<TlsSlot<ClientContext>>,
    pub(crate) auto_host_sni: bool,
    /// The context names protocols itself.
    pub(crate) alpn: bool,
}

/// What a cluster warms for beside names.
#[derive(Default)]
pub(crate) struct Awaited {
    /// EDS.
    pub(crate) endpoints: Option<Warming>,
    /// SDS.
    pub(crate) secrets: Option<Warming>,
}

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

/// Requests that `drop_overloads` dropped, for load reports.
#[derive(Default)]
struct OverloadDrops {
    count: HostCounter,
    category: Mutex<Box<str>>,
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

/// What is made at first use.
struct Used {
    stats: Arc<ClusterStats>,
    breakers: [Arc<Breakers>; 2],
    timeout_budget: Option<Arc<TimeoutBudgetStats>>,
    outlier: Option<Box<OutlierStats>>,
    /// The gauges of a hashing policy; a set must not meet another.
    table: Option<Mutex<TableStats>>,
    /// Of a hashing policy: what the workers share.
    tables: Tables,
    /// `upstream.proxyprotocol.v2_tlvs_exceed_max_length`, where a transport socket sends PROXY headers.
    tlvs_too_long: Option<Counter>,
    /// `total_match_count` of each transport socket.
    socket_matches: Vec<Counter>,
    /// The hosts of an ORIGINAL_DST cluster.
    destinations: Destinations,
    /// Stats of the HTTP/2 codec, made with the first such connection.
    h2: Lazy<Arc<CodecStats>>,
}

/// Addresses of names, by locality and endpoint.
pub(crate) type Resolved = HashMap<(usize, usize), Vec<Address>>;

/// What an update of the hosts did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebuild {
    /// Everything was as it is.
    Nothing,
    /// Something is another.
    Changed,
}

/// What the membership gauges show.
#[derive(Clone, Copy, Default)]
struct Membership {
    total: u64,
    healthy: u64,
    degraded: u64,
    max_weight: u64,
    /// Changes that came before the counters were made.
    changes: u64,
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
        let mut sockets =
            vec![TransportSocket::new(&config.transport_socket, secrets, &scope).at("transport_socket")?];
        for (i, m) in config.transport_socket_matches.iter().enumerate() {
            let socket = TransportSocket::new(&m.socket, secrets, &scope);
            sockets.push(socket.at("transport_socket").at_index("transport_socket_matches", i)?);
        }
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
            sockets: sockets.into(),
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

    /// The counters; made now if nobody asked before.
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.used().stats
    }

    /// Requests that were dropped because there were too many, or for `drop_overloads`.
    pub fn dropped(&self) -> &HostCounter {
        &self.dropped
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

    pub(crate) fn outlier(&self) -> Option<&Detector> {
        self.outlier.as_deref()
    }

    pub(crate) fn outlier_stats(&self) -> Option<&OutlierStats> {
        self.used().outlier.as_deref()
    }

    /// What outlier detection found of errors of external and of local origin, where it is on.
    pub fn success_rates(&self) -> Option<[SuccessRates; 2]> {
        self.outlier.as_ref().map(|detector| detector.rates())
    }

    /// Shows the size of a hashing policy's table.
    pub(crate) fn show_table(&self, size: Size) {
        if let Some(table) = &self.used().table {
            table.lock().unwrap_or_else(PoisonError::into_inner).show(size);
        }
    }

    /// The tables of a hashing policy.
    pub(crate) fn tables(&self) -> &Tables {
        &self.used().tables
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

    /// When it was made.
    pub(crate) fn created(&self) -> Instant {
        self.created
    }

    /// The share of requests that are to be answered without asking a host (`drop_overloads`).
    pub fn drop_share(&self) -> f32 {
        f32::from_bits(self.drop_share.load(Ordering::Relaxed))
    }

    /// A request was answered for that.
    pub fn count_overload_drop(&self) {
        self.dropped.inc();
        self.overload_drops.get().into_iter().for_each(|drops| drops.count.inc());
    }

    /// How many requests were, and what that is called; none where there never was such a share.
    pub fn overload_drops(&self) -> Option<(u64, Box<str>)> {
        let drops = self.overload_drops.get()?;
        let category = drops.category.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some((drops.count.value(), category))
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
        self.sockets.get(host.transport_socket()).unwrap_or(&self.sockets[0])
    }

    /// Whether a transport socket sends PROXY headers.
    pub(crate) fn sends_headers(&self) -> bool {
        self.sends_headers
    }

    pub(crate) fn count_long_tlvs(&self) {
        if let Some(counter) = &self.used().tlvs_too_long {
            counter.inc();
        }
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

    fn used(&self) -> &Used {
        self.used.get_or_init(|| {
            let stats = Arc::new(ClusterStats::new(&self.scope));
            // Envoy sets them, if to 0.
            for gauge in [&stats.membership_degraded, &stats.membership_excluded, &stats.warming_state] {
                gauge.touch();
            }
            self.report(&stats);
            let breakers = |priority, name| {
                let scope = self.scope.scope("circuit_breakers").scope(name);
                Arc::new(Breakers::new(&self.thresholds(priority), &scope))
            };
            let usual = breakers(Priority::Default, "default");
            usual.touch();
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
            Box::new(Used {
                stats,
                h2: Lazy::new(self.scope.clone(), |scope| Arc::new(CodecStats::new(scope))),
                table: TableStats::new(&self.config.lb.policy, &self.scope).map(Mutex::new),
                tables: Tables::default(),
                destinations: Destinations::default(),
                outlier: self.outlier.as_ref().map(|_| Box::new(OutlierStats::new(&self.scope))),
                tlvs_too_long: self
                    .sends_headers()
                    .then(|| self.scope.scope("upstream.proxyprotocol").counter("v2_tlvs_exceed_max_length")),
                socket_matches,
                breakers: [usual, breakers(Priority::High, "high")],
                timeout_budget: self
                    .config
                    .track_timeout_budgets
                    .then(|| Arc::new(TimeoutBudgetStats::new(&self.scope))),
            })
        })
    }

    /// Takes a name's addresses; `false` where they were the same.
    pub(crate) fn set_resolved(&self, locality: usize, endpoint: usize, addresses: Vec<Address>) -> bool {
        let mut resolved = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        let resolved = resolved.get_or_insert_default();
        let same = resolved
            .get(&(locality, endpoint))
            .is_some_and(|old| old.len() == addresses.len() && old.iter().all(|a| addresses.contains(a)));
        if same {
            return false;
        }
        resolved.insert((locality, endpoint), addresses);
        self.rebuild(&self.config.load_assignment, resolved);
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

    /// Takes what EDS says of the endpoints; what is in force goes on if it says nothing new.
    pub fn set_assignment(&self, assignment: &LoadAssignment) -> Rebuild {
        let _one_at_a_time = self.resolved.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_drops(assignment);
        self.rebuild(assignment, &Resolved::default())
    }

    fn set_drops(&self, assignment: &LoadAssignment) {
        if assignment.drop_share > 0.0 {
            let drops = self.overload_drops.get_or_init(Box::default);
            *drops.category.lock().unwrap_or_else(PoisonError::into_inner) = assignment.drop_category.clone();
        }
        self.drop_share.store(assignment.drop_share.to_bits(), Ordering::Relaxed);
    }

    /// EDS has answered, well or not, or will not in time: the cluster warms for that no longer.
    pub fn settle_endpoints(&self) {
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

    /// The secrets that its transport sockets want of SDS.
    pub fn secrets(&self) -> Vec<WantedSecret> {
        self.sockets.iter().filter_map(|s| s.tls.as_ref()).flat_map(|tls| tls.context.wants()).collect()
    }

    /// Whether the first answer on its hosts, good or bad, is still to come.
    pub fn is_warming(&self) -> bool {
        self.warming.load(Ordering::Relaxed)
    }

    fn rebuild(&self, assignment: &LoadAssignment, resolved: &Resolved) -> Rebuild {
        let old = self.hosts.load_full();
        let mut kept = Kept::default();
        for host in old.hosts() {
            kept.entry((*host.address()).clone()).or_default().push(host.clone());
        }
        let mut building = Building { kept, changed: false };
        let set = building.hosts(self, assignment, resolved);
        if self.generation() > 0 && !building.changed && set.same_shape(&old) {
            return Rebuild::Nothing;
        }
        // The first time counts even if there are no hosts.
        let changes = set.changed_priorities(&old).max(u64::from(self.generation() == 0));
        self.publish(set, changes);
        Rebuild::Changed
    }

    fn publish(&self, set: HostSet, changes: u64) {
        if self.config.lb.slow_start.is_some() {
            let now = Instant::now();
            set.hosts().for_each(|host| host.begin(now));
        }
        self.hosts.store(Arc::new(set));
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.reported.lock().unwrap_or_else(PoisonError::into_inner).changes += changes;
        if let Some(used) = self.used.get() {
            self.report(&used.stats);
        }
        if let Some(outlier) = &self.outlier {
            outlier.recount(self);
        }
    }

    /// A host's health is another: the workers balance anew.
    pub(crate) fn health_changed(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        if let Some(used) = self.used.get() {
            self.report(&used.stats);
        }
    }

    fn socket_index(&self, metadata: Option<&sampan_core::stream_info::Metadata>) -> u32 {
        let matches = &self.config.transport_socket_matches;
        matches.iter().position(|m| m.matches(metadata)).map_or(0, |i| i as u32 + 1)
    }

    fn count_socket(&self, index: u32) {
        let index = index as usize;
        match self.used.get() {
            Some(used) => used.socket_matches[index].inc(),
            None => {
                self.socket_matches[index].fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Moves the membership gauges from what was last shown to what is.
    fn report(&self, stats: &ClusterStats) {
        if !self.is_current() {
            return;
        }
        let hosts = self.hosts.load();
        let mut now = Membership::default();
        // Envoy sets it when it compares hosts of now and before, which these kinds of cluster never do.
        let listed = matches!(
            self.config.discovery,
            Discovery::Static | Discovery::OriginalDst(_) | Discovery::Forward(_)
        );
        let weighs = !listed && self.generation() > 0;
        now.max_weight = u64::from(weighs);
        for host in hosts.hosts() {
            now.total += 1;
            now.healthy += u64::from(host.health() == Health::Healthy);
            now.degraded += u64::from(host.health() == Health::Degraded);
            if weighs {
                now.max_weight = now.max_weight.max(u64::from(host.weight()));
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
        stats.membership_change.add(old.changes);
        *old = now;
    }

    /// Takes what the gauges show of this cluster back: another has its slot, or none.
    fn withdraw(&self) {
        let mut old = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(used) = self.used.get() else { return };
        if let Some(outlier) = &self.outlier {
            outlier.withdraw(self);
        }
        used.stats.membership_total.sub(old.total);
        used.stats.membership_healthy.sub(old.healthy);
        used.stats.membership_degraded.sub(old.degraded);
        used.stats.max_host_weight.sub(old.max_weight);
        *old = Membership::default();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.retire();
    }
}

impl Cluster {
    /// The entries of the admin's `/certs`: one for each TLS context.
    pub fn certificates(&self) -> Vec<envoy_types::pb::envoy::admin::v3::Certificate> {
        let tls = self.sockets.iter().filter_map(|socket| socket.tls.as_ref());
        tls.filter_map(|tls| tls.context.admin_certificate()).collect()
    }
}

impl TransportSocket {
    fn new(config: &TransportSocketConfig, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self> {
        let Some(message) = &config.tls else { return Ok(Self { header: config.header.clone(), tls: None }) };
        let mut context = TlsSlot::from_proto(&**message, secrets, scope).at("typed_config");
        if config.header.is_some() {
            context = context.at("transport_socket").at("typed_config");
        }
        let alpn = message.common_tls_context.as_ref().is_some_and(|c| !c.alpn_protocols.is_empty());
        let tls = TlsSocket { context: context?, auto_host_sni: message.auto_host_sni, alpn };
        Ok(Self { header: config.header.clone(), tls: Some(tls) })
    }
}
