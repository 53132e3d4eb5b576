//! Hosts and host sets.
//!
//! A [`Host`] keeps its identity for as long as the cluster lists its address in its locality: counters, pools and
//! balancer state hang on it; weight, priority, health and metadata change in place. A [`HostSet`] is immutable and swapped as a whole.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use sampan_core::Address;
use sampan_core::stream_info::Metadata;
use smallvec::SmallVec;

use crate::outlier::Monitor;
use crate::proxy_header::Tlvs;
use crate::stats::HostStats;

/// Region, zone and sub-zone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locality {
    /// `region`
    pub region: Box<str>,
    /// `zone`
    pub zone: Arc<str>,
    /// `sub_zone`
    pub sub_zone: Box<str>,
}

/// Why a host may not be fit for traffic; Envoy's names in `/clusters`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum HealthFlag {
    /// `failed_active_hc`
    FailedActiveHc = 0x1,
    /// `failed_outlier_check`
    FailedOutlierCheck = 0x2,
    /// `failed_eds_health`
    FailedEdsHealth = 0x4,
    /// `degraded_active_hc`
    DegradedActiveHc = 0x8,
    /// `degraded_eds_health`
    DegradedEdsHealth = 0x10,
    /// `pending_dynamic_removal`
    PendingDynamicRemoval = 0x20,
    /// `pending_active_hc`
    PendingActiveHc = 0x40,
    /// `excluded_via_immediate_hc_fail`
    ExcludedViaImmediateHcFail = 0x80,
    /// `active_hc_timeout`
    ActiveHcTimeout = 0x100,
    /// `eds_status_draining`
    EdsStatusDraining = 0x200,
}

const FLAGS: [(HealthFlag, &str); 10] = [
    (HealthFlag::FailedActiveHc, "/failed_active_hc"),
    (HealthFlag::FailedOutlierCheck, "/failed_outlier_check"),
    (HealthFlag::FailedEdsHealth, "/failed_eds_health"),
    (HealthFlag::DegradedActiveHc, "/degraded_active_hc"),
    (HealthFlag::DegradedEdsHealth, "/degraded_eds_health"),
    (HealthFlag::PendingDynamicRemoval, "/pending_dynamic_removal"),
    (HealthFlag::PendingActiveHc, "/pending_active_hc"),
    (HealthFlag::ExcludedViaImmediateHcFail, "/excluded_via_immediate_hc_fail"),
    (HealthFlag::ActiveHcTimeout, "/active_hc_timeout"),
    (HealthFlag::EdsStatusDraining, "/eds_status_draining"),
];

/// The flags that the endpoint's `health_status` decides.
const FROM_EDS: u32 = HealthFlag::FailedEdsHealth as u32
    | HealthFlag::DegradedEdsHealth as u32
    | HealthFlag::EdsStatusDraining as u32;

/// Picked since the last clean-up.
const PICKED: u32 = 1;
/// Taken away by the clean-up.
const GONE: u32 = 2;

/// What the flags add up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Takes traffic.
    Healthy,
    /// Takes traffic when the healthy ones do not suffice.
    Degraded,
    /// Takes traffic in panic only.
    Unhealthy,
}

/// One endpoint.
pub struct Host {
    address: Arc<Address>,
    /// Where it is now, once a LOGICAL_DNS host has moved. Few do: a cell that all can exchange costs its readers, and those
    /// who drop it most.
    moved: OnceLock<Box<ArcSwap<Address>>>,
    flags: AtomicU32,
    /// `hostname` of the endpoint, or the DNS name it was resolved from.
    pub hostname: Arc<str>,
    /// Locality.
    pub locality: Arc<Locality>,
    weight: AtomicU32,
    priority: AtomicU32,
    described: ArcSwapOption<Description>,
    /// Of an ORIGINAL_DST cluster: [`PICKED`] and [`GONE`].
    marks: AtomicU32,
    /// Which of the cluster's transport sockets it takes: 0 the cluster's own, n the match n - 1.
    transport_socket: AtomicU32,
    /// Where the cluster has outlier detection.
    monitor: Option<Box<Monitor>>,
    /// Where the cluster starts hosts slowly: when it was first seen to be healthy.
    healthy_since: Option<Box<OnceLock<Instant>>>,
    /// Counters.
    pub stats: HostStats,
}

/// What else an endpoint may say of itself.
struct Description {
    metadata: Option<Arc<Metadata>>,
    tlvs: Option<Arc<Tlvs>>,
}

/// What a host is made of.
pub(crate) struct HostSpec<'a> {
    pub(crate) address: Address,
    pub(crate) hostname: &'a Arc<str>,
    pub(crate) weight: u32,
    pub(crate) priority: u32,
    pub(crate) locality: &'a Arc<Locality>,
    pub(crate) metadata: &'a Option<Arc<Metadata>>,
    pub(crate) tlvs: &'a Option<Arc<Tlvs>>,
    pub(crate) flags: u32,
    pub(crate) transport_socket: u32,
    pub(crate) monitored: bool,
    pub(crate) starts_slowly: bool,
}

impl Description {
    /// None where there is nothing to say, as of nearly all endpoints.
    fn of(metadata: &Option<Arc<Metadata>>, tlvs: &Option<Arc<Tlvs>>) -> Option<Arc<Self>> {
        let some = metadata.is_some() || tlvs.is_some();
        some.then(|| Arc::new(Self { metadata: metadata.clone(), tlvs: tlvs.clone() }))
    }
}

impl Host {
    pub(crate) fn new(spec: HostSpec<'_>) -> Self {
        Self {
            address: Arc::new(spec.address),
            moved: OnceLock::new(),
            flags: AtomicU32::new(spec.flags),
            hostname: spec.hostname.clone(),
            weight: AtomicU32::new(spec.weight.max(1)),
            priority: AtomicU32::new(spec.priority),
            locality: spec.locality.clone(),
            described: ArcSwapOption::new(Description::of(spec.metadata, spec.tlvs)),
            marks: AtomicU32::new(PICKED),
            transport_socket: AtomicU32::new(spec.transport_socket),
            monitor: spec.monitored.then(Box::default),
            healthy_since: spec.starts_slowly.then(Box::default),
            stats: HostStats::default(),
        }
    }

    /// A host that starts slowly begins to when it is healthy for the first time. What ejects it for a while later does
    /// not begin that again, as in Envoy.
    pub(crate) fn begin(&self, now: Instant) {
        if let Some(since) = &self.healthy_since
            && self.health() == Health::Healthy
        {
            since.get_or_init(|| now);
        }
    }

    /// When it began, if it starts slowly.
    pub(crate) fn healthy_since(&self) -> Option<Instant> {
        self.healthy_since.as_ref()?.get().copied()
    }

    /// Marks a host of an ORIGINAL_DST cluster as picked, so that the next clean-up leaves it.
    pub(crate) fn picked(&self) {
        if self.marks.load(Ordering::Relaxed) & PICKED == 0 {
            self.marks.fetch_or(PICKED, Ordering::Relaxed);
        }
    }

    pub(crate) fn take_picked(&self) -> bool {
        self.marks.fetch_and(!PICKED, Ordering::Relaxed) & PICKED != 0
    }

    pub(crate) fn set_gone(&self) {
        self.marks.fetch_or(GONE, Ordering::Relaxed);
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.marks.load(Ordering::Relaxed) & GONE != 0
    }

    /// Where it is reached; a LOGICAL_DNS host's address changes.
    pub fn address(&self) -> Arc<Address> {
        match self.moved.get() {
            Some(moved) => moved.load_full(),
            None => self.address.clone(),
        }
    }

    pub(crate) fn set_address(&self, address: Address) {
        let address = Arc::new(address);
        self.moved.get_or_init(|| Box::new(ArcSwap::new(address.clone()))).store(address);
    }

    /// `load_balancing_weight`, at least 1.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Priority level, 0 the first.
    pub fn priority(&self) -> u32 {
        self.priority.load(Ordering::Relaxed)
    }

    /// Metadata of the endpoint. Requests read what their [`WorkerHost`](crate::WorkerHost) keeps of it.
    pub fn metadata(&self) -> Option<Arc<Metadata>> {
        self.described.load().as_ref()?.metadata.clone()
    }

    /// What a PROXY header to it says besides.
    pub(crate) fn tlvs(&self) -> Option<Arc<Tlvs>> {
        self.described.load().as_ref()?.tlvs.clone()
    }

    /// Which of the cluster's transport sockets a new connection takes.
    pub(crate) fn transport_socket(&self) -> usize {
        self.transport_socket.load(Ordering::Relaxed) as usize
    }

    /// `envoy.lb` `canary`
    pub fn canary(&self) -> bool {
        self.metadata().is_some_and(|m| is_canary(&m))
    }

    /// Takes over what a new description says of the same host; `true` if that is anything new.
    pub(crate) fn update(&self, spec: &HostSpec<'_>) -> bool {
        let swapped = |cell: &AtomicU32, new| cell.swap(new, Ordering::Relaxed) != new;
        // Connections that are there stay as they are; new ones take the new socket.
        let mut changed = swapped(&self.transport_socket, spec.transport_socket);
        changed |= swapped(&self.weight, spec.weight.max(1));
        changed |= swapped(&self.priority, spec.priority);
        let old = self.flags.load(Ordering::Relaxed);
        let flags = old & !FROM_EDS | spec.flags;
        if flags != old {
            self.flags.fetch_and(!FROM_EDS, Ordering::Relaxed);
            self.flags.fetch_or(spec.flags, Ordering::Relaxed);
            changed = true;
        }
        if self.metadata() != *spec.metadata || self.tlvs() != *spec.tlvs {
            self.described.store(Description::of(spec.metadata, spec.tlvs));
            changed = true;
        }
        changed
    }

    pub(crate) fn flags(&self) -> &AtomicU32 {
        &self.flags
    }

    pub(crate) fn monitor(&self) -> Option<&Monitor> {
        self.monitor.as_deref()
    }

    /// The success rates of the last interval, of errors of external and of local origin; -1 for too little to tell.
    pub fn success_rates(&self) -> Option<[f64; 2]> {
        self.monitor.as_ref().map(|m| m.success_rates())
    }

    /// Whether a flag is set.
    pub fn has_flag(&self, flag: HealthFlag) -> bool {
        self.flags.load(Ordering::Relaxed) & flag as u32 != 0
    }

    /// The health that the flags add up to.
    pub fn health(&self) -> Health {
        use HealthFlag as F;
        let flags = self.flags.load(Ordering::Relaxed);
        let any = |list: &[F]| list.iter().any(|f| flags & *f as u32 != 0);
        if any(&[F::FailedActiveHc, F::FailedOutlierCheck, F::FailedEdsHealth, F::EdsStatusDraining]) {
            Health::Unhealthy
        } else if any(&[F::DegradedActiveHc, F::DegradedEdsHealth]) {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    /// As `/clusters` prints them: `healthy`, or each flag behind a `/`.
    pub fn health_flags(&self) -> String {
        let flags: String =
            FLAGS.iter().filter(|(flag, _)| self.has_flag(*flag)).map(|(_, name)| *name).collect();
        if flags.is_empty() { "healthy".to_owned() } else { flags }
    }
}

fn is_canary(metadata: &Metadata) -> bool {
    use envoy_types::pb::google::protobuf::value::Kind;
    metadata
        .get("envoy.lb")
        .and_then(|lb| lb.fields.get("canary"))
        .is_some_and(|v| matches!(v.kind, Some(Kind::BoolValue(true))))
}

/// The hosts of one locality in one priority.
pub struct LocalityHosts {
    /// Locality.
    pub locality: Arc<Locality>,
    /// `load_balancing_weight` of the locality; 0 where none is set.
    pub weight: u32,
    /// Hosts.
    pub hosts: Vec<Arc<Host>>,
}

/// All hosts of a cluster, by priority and locality.
pub struct HostSet {
    /// Priority levels from 0 on; a gap is an empty level.
    pub priorities: Vec<Vec<LocalityHosts>>,
    /// `policy.overprovisioning_factor`, in per cent.
    pub overprovisioning_factor: u32,
    /// `policy.weighted_priority_health`
    pub weighted_priority_health: bool,
}

impl Default for HostSet {
    fn default() -> Self {
        Self { priorities: Vec::new(), overprovisioning_factor: 140, weighted_priority_health: false }
    }
}

impl HostSet {
    /// Whether the same hosts stand in the same places, whatever was changed in them.
    pub(crate) fn same_shape(&self, other: &Self) -> bool {
        let localities = |set: &Self| set.priorities.iter().map(Vec::len).collect::<Vec<_>>();
        let same_hosts = |a: &LocalityHosts, b: &LocalityHosts| {
            a.hosts.len() == b.hosts.len() && a.hosts.iter().zip(&b.hosts).all(|(a, b)| Arc::ptr_eq(a, b))
        };
        self.overprovisioning_factor == other.overprovisioning_factor
            && self.weighted_priority_health == other.weighted_priority_health
            && localities(self) == localities(other)
            && self
                .priorities
                .iter()
                .flatten()
                .zip(other.priorities.iter().flatten())
                .all(|(a, b)| a.locality == b.locality && a.weight == b.weight && same_hosts(a, b))
    }

    /// In how many priorities hosts came or went.
    pub(crate) fn changed_priorities(&self, old: &Self) -> u64 {
        fn hosts(set: &HostSet, level: usize) -> SmallVec<[*const Host; 8]> {
            let hosts = set.priorities.get(level).into_iter().flatten().flat_map(|l| &l.hosts);
            let mut hosts: SmallVec<_> = hosts.map(Arc::as_ptr).collect();
            hosts.sort_unstable();
            hosts.dedup();
            hosts
        }
        let levels = self.priorities.len().max(old.priorities.len());
        (0..levels).filter(|level| hosts(self, *level) != hosts(old, *level)).count() as u64
    }

    /// All hosts, the first priority first.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.priorities.iter().flatten().flat_map(|locality| &locality.hosts)
    }
}
