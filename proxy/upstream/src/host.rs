//! Hosts and host sets.
//!
//! A [`Host`] keeps its identity for as long as the cluster lists its address: counters, pools and balancer state
//! hang on it. A [`HostSet`] is immutable and swapped as a whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arc_swap::ArcSwap;
use sampan_core::Address;
use sampan_core::stream_info::Metadata;

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
    address: ArcSwap<Address>,
    flags: AtomicU32,
    /// `hostname` of the endpoint, or the DNS name it was resolved from.
    pub hostname: Arc<str>,
    /// `load_balancing_weight`, at least 1.
    pub weight: u32,
    /// Priority level, 0 the first.
    pub priority: u32,
    /// Locality.
    pub locality: Arc<Locality>,
    /// Metadata of the endpoint.
    pub metadata: Option<Arc<Metadata>>,
    /// `envoy.lb` `canary`
    pub canary: bool,
    /// Which of the cluster's transport sockets it takes: 0 the cluster's own, n the match n - 1.
    pub(crate) transport_socket: usize,
    /// Counters.
    pub stats: HostStats,
}

/// What a host is made of.
pub(crate) struct HostSpec<'a> {
    pub(crate) address: Address,
    pub(crate) hostname: &'a Arc<str>,
    pub(crate) weight: u32,
    pub(crate) priority: u32,
    pub(crate) locality: &'a Arc<Locality>,
    pub(crate) metadata: &'a Option<Arc<Metadata>>,
    pub(crate) flags: u32,
    pub(crate) transport_socket: usize,
}

impl Host {
    pub(crate) fn new(spec: HostSpec<'_>) -> Self {
        Self {
            address: ArcSwap::from_pointee(spec.address),
            flags: AtomicU32::new(spec.flags),
            hostname: spec.hostname.clone(),
            weight: spec.weight.max(1),
            priority: spec.priority,
            locality: spec.locality.clone(),
            canary: spec.metadata.as_ref().is_some_and(|m| is_canary(m)),
            metadata: spec.metadata.clone(),
            transport_socket: spec.transport_socket,
            stats: HostStats::default(),
        }
    }

    /// Where it is reached; a LOGICAL_DNS host's address changes.
    pub fn address(&self) -> Arc<Address> {
        self.address.load_full()
    }

    pub(crate) fn set_address(&self, address: Address) {
        self.address.store(Arc::new(address));
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
#[derive(Default)]
pub struct HostSet {
    /// Priority levels from 0 on; a gap is an empty level.
    pub priorities: Vec<Vec<LocalityHosts>>,
}

impl HostSet {
    /// All hosts, the first priority first.
    pub fn hosts(&self) -> impl Iterator<Item = &Arc<Host>> {
        self.priorities.iter().flatten().flat_map(|locality| &locality.hosts)
    }
}
