//! How a host is picked: `lb_policy` with its config, or the `load_balancing_policy` extension.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster, LoadBalancingPolicy, cluster};
use envoy_types::pb::envoy::config::core::v3::RuntimeDouble;
use envoy_types::pb::envoy::extensions::load_balancing_policies as ext;
use envoy_types::pb::google::protobuf as wkt;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::{duration, type_name, unpack};

/// The policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LbPolicy {
    /// `ROUND_ROBIN`
    RoundRobin,
    /// `LEAST_REQUEST`
    LeastRequest {
        /// `choice_count`
        choices: u32,
        /// `active_request_bias`
        bias: f64,
        /// `selection_method: FULL_SCAN`
        full_scan: bool,
    },
    /// `RANDOM`: weights do not count, as in Envoy.
    Random,
    /// `RING_HASH`
    RingHash {
        /// `minimum_ring_size`
        minimum: u64,
        /// `maximum_ring_size`
        maximum: u64,
        /// `hash_function: MURMUR_HASH_2`, else XXH64.
        murmur: bool,
        /// `use_hostname_for_hashing`
        hostname: bool,
    },
    /// `MAGLEV`
    Maglev {
        /// `table_size`
        size: u64,
        /// `use_hostname_for_hashing`
        hostname: bool,
    },
    /// `CLUSTER_PROVIDED`: an ORIGINAL_DST cluster knows its hosts itself.
    ClusterProvided,
}

/// The policy and what is common to all.
#[derive(Debug, Clone, PartialEq)]
pub struct LbConfig {
    /// The policy.
    pub policy: LbPolicy,
    /// `healthy_panic_threshold`, in per cent.
    pub panic_threshold: u32,
    /// `zone_aware_lb_config.fail_traffic_on_panic`
    pub fail_traffic_on_panic: bool,
    /// `locality_weighted_lb_config`
    pub locality_weighted: bool,
    /// `slow_start_config` of ROUND_ROBIN and LEAST_REQUEST.
    pub slow_start: Option<SlowStart>,
}

/// How a new host's share grows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// `slow_start_window`, above zero.
    pub window: Duration,
    /// `aggression`: 1 grows in a straight line, more sooner.
    pub aggression: f64,
    /// `min_weight_percent`, of 1.
    pub least: f64,
}

impl SlowStart {
    /// Without a window there is none. Envoy takes an aggression that is not above 0 for 1.
    fn new(
        window: Option<&wkt::Duration>,
        aggression: Option<&RuntimeDouble>,
        least: Option<f64>,
    ) -> ConfigResult<Option<Self>> {
        let window = duration(window).at("slow_start_window").at("slow_start_config")?.unwrap_or_default();
        // Envoy counts whole milliseconds.
        if window < Duration::from_millis(1) {
            return Ok(None);
        }
        let aggression = aggression.map_or(1.0, |a| a.default_value);
        let aggression = if aggression > 0.0 { aggression } else { 1.0 };
        Ok(Some(Self { window, aggression, least: least.unwrap_or(10.0) / 100.0 }))
    }

    /// By how much the weight of a host is less that has been healthy for so long.
    pub(crate) fn factor(&self, healthy: Duration) -> f64 {
        if healthy >= self.window {
            return 1.0;
        }
        let part = healthy.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        part.powf(1.0 / self.aggression).max(self.least)
    }

    fn from_extension(m: Option<&ext::common::v3::SlowStartConfig>) -> ConfigResult<Option<Self>> {
        m.map_or(Ok(None), |m| {
            let least = m.min_weight_percent.map(|p| p.value);
            Self::new(m.slow_start_window.as_ref(), m.aggression.as_ref(), least)
        })
    }

    fn from_cluster(m: Option<&cluster::SlowStartConfig>) -> ConfigResult<Option<Self>> {
        m.map_or(Ok(None), |m| {
            let least = m.min_weight_percent.map(|p| p.value);
            Self::new(m.slow_start_window.as_ref(), m.aggression.as_ref(), least)
        })
    }
}

impl LbConfig {
    /// Whether the hash of a request picks its host.
    pub fn hashes(&self) -> bool {
        matches!(self.policy, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. })
    }

    /// `provided`: the kind of cluster brings its own balancer.
    pub(super) fn from_proto(m: &Cluster, provided: bool) -> ConfigResult<Self> {
        use cluster::common_lb_config::LocalityConfigSpecifier as L;
        let common = m.common_lb_config.as_ref();
        let threshold = common.and_then(|c| c.healthy_panic_threshold).map_or(50.0, |p| p.value);
        if !(0.0..=100.0).contains(&threshold) {
            return Err(ConfigError::new("value must be inside range [0, 100]")
                .at("common_lb_config.healthy_panic_threshold.value"));
        }
        let locality = common.and_then(|c| c.locality_config_specifier.as_ref());
        let mut config = Self {
            policy: LbPolicy::RoundRobin,
            panic_threshold: threshold.round() as u32,
            fail_traffic_on_panic: matches!(locality, Some(L::ZoneAwareLbConfig(z)) if z.fail_traffic_on_panic),
            locality_weighted: matches!(locality, Some(L::LocalityWeightedLbConfig(_))),
            slow_start: None,
        };
        match &m.load_balancing_policy {
            Some(policy) => config.extension(policy).at("load_balancing_policy")?,
            None => (config.policy, config.slow_start) = from_enum(m)?,
        }
        if provided != (config.policy == LbPolicy::ClusterProvided) {
            let (not, did) = if provided { ("not ", "provided") } else { ("", "did not provide") };
            return Err(ConfigError::new(format!(
                "cluster manager: cluster provided LB {not}specified but cluster '{}' {did} one. Check cluster \
                 documentation.",
                m.name
            ))
            .at("lb_policy"));
        }
        Ok(config)
    }

    /// The first policy of the list that is known counts.
    fn extension(&mut self, policy: &LoadBalancingPolicy) -> ConfigResult<()> {
        let Some(first) = policy.policies.first() else {
            return Err(ConfigError::new("cluster: didn't find a registered load balancer factory"));
        };
        let any = first.typed_extension_config.as_ref().and_then(|c| c.typed_config.as_ref());
        let any = any.ok_or_else(|| ConfigError::missing("typed_extension_config.typed_config"));
        self.typed(any?).at("typed_extension_config.typed_config").at_index("policies", 0)
    }

    fn typed(&mut self, any: &envoy_types::pb::google::protobuf::Any) -> ConfigResult<()> {
        let locality = match type_name(any) {
            "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin" => {
                let m: ext::round_robin::v3::RoundRobin = unpack(Some(any))?;
                self.slow_start = SlowStart::from_extension(m.slow_start_config.as_ref())?;
                self.policy = LbPolicy::RoundRobin;
                m.locality_lb_config
            }
            "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest" => {
                let m: ext::least_request::v3::LeastRequest = unpack(Some(any))?;
                self.slow_start = SlowStart::from_extension(m.slow_start_config.as_ref())?;
                let full_scan =
                    m.selection_method() == ext::least_request::v3::least_request::SelectionMethod::FullScan;
                self.policy = least_request(
                    m.choice_count.map(|v| v.value),
                    m.active_request_bias.as_ref(),
                    full_scan,
                )?;
                m.locality_lb_config
            }
            "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash" => {
                return self.typed_ring(&unpack(Some(any))?);
            }
            "envoy.extensions.load_balancing_policies.maglev.v3.Maglev" => {
                let m: ext::maglev::v3::Maglev = unpack(Some(any))?;
                let hostname = consistent(m.consistent_hashing_lb_config.as_ref())?;
                self.policy = maglev(m.table_size.map(|v| v.value), hostname)?;
                self.fail_traffic_on_panic = false;
                self.locality_weighted = m.locality_weighted_lb_config.is_some();
                return Ok(());
            }
            "envoy.extensions.load_balancing_policies.random.v3.Random" => {
                let m: ext::random::v3::Random = unpack(Some(any))?;
                self.policy = LbPolicy::Random;
                m.locality_lb_config
            }
            "envoy.extensions.load_balancing_policies.cluster_provided.v3.ClusterProvided" => {
                self.policy = LbPolicy::ClusterProvided;
                None
            }
            name => return Err(ConfigError::unsupported(name)),
        };
        self.locality(locality.as_ref()).at("locality_lb_config")
    }

    #[allow(deprecated, reason = "Envoy 1.40 still takes use_hostname_for_hashing")]
    fn typed_ring(&mut self, m: &ext::ring_hash::v3::RingHash) -> ConfigResult<()> {
        refuse(m.hash_balance_factor.is_some_and(|f| f.value > 0), "hash_balance_factor")?;
        let hostname = match &m.consistent_hashing_lb_config {
            Some(config) => consistent(Some(config))?,
            None => m.use_hostname_for_hashing,
        };
        let murmur = m.hash_function() == ext::ring_hash::v3::ring_hash::HashFunction::MurmurHash2;
        let sizes = (m.minimum_ring_size.map(|v| v.value), m.maximum_ring_size.map(|v| v.value));
        self.policy = ring_hash(sizes, murmur, hostname)?;
        self.fail_traffic_on_panic = false;
        self.locality_weighted = m.locality_weighted_lb_config.is_some();
        Ok(())
    }

    #[allow(deprecated, reason = "refused by name")]
    fn locality(&mut self, message: Option<&ext::common::v3::LocalityLbConfig>) -> ConfigResult<()> {
        use ext::common::v3::locality_lb_config::LocalityConfigSpecifier as L;
        // The typed form stands alone: nothing of common_lb_config's locality part counts beside it.
        self.locality_weighted = false;
        self.fail_traffic_on_panic = false;
        match message.and_then(|m| m.locality_config_specifier.as_ref()) {
            Some(L::LocalityWeightedLbConfig(_)) => self.locality_weighted = true,
            Some(L::ZoneAwareLbConfig(zone)) => {
                refuse(zone.force_local_zone.is_some(), "zone_aware_lb_config.force_local_zone")?;
                refuse(
                    zone.force_locality_direct_routing,
                    "zone_aware_lb_config.force_locality_direct_routing",
                )?;
                self.fail_traffic_on_panic = zone.fail_traffic_on_panic;
            }
            None => {}
        }
        Ok(())
    }
}

fn refuse(present: bool, field: &str) -> ConfigResult<()> {
    if present { Err(ConfigError::unsupported(field).at(field)) } else { Ok(()) }
}

fn least_request(
    choices: Option<u32>,
    bias: Option<&RuntimeDouble>,
    full_scan: bool,
) -> ConfigResult<LbPolicy> {
    let choices = choices.unwrap_or(2);
    if choices < 2 {
        return Err(ConfigError::new("value must be greater than or equal to 2").at("choice_count"));
    }
    let bias = bias.map_or(1.0, |b| b.default_value);
    Ok(LbPolicy::LeastRequest { choices, bias, full_scan })
}

/// `use_hostname_for_hashing`, where nothing else is asked for.
fn consistent(m: Option<&ext::common::v3::ConsistentHashingLbConfig>) -> ConfigResult<bool> {
    let Some(m) = m else { return Ok(false) };
    let balanced = m.hash_balance_factor.is_some_and(|f| f.value > 0);
    refuse(balanced, "hash_balance_factor").at("consistent_hashing_lb_config")?;
    refuse(!m.hash_policy.is_empty(), "hash_policy").at("consistent_hashing_lb_config")?;
    Ok(m.use_hostname_for_hashing)
}

fn ring_hash(sizes: (Option<u64>, Option<u64>), murmur: bool, hostname: bool) -> ConfigResult<LbPolicy> {
    const LARGEST: u64 = 8 * 1024 * 1024;
    let (minimum, maximum) = (sizes.0.unwrap_or(1024), sizes.1.unwrap_or(LARGEST));
    for (size, field) in [(minimum, "minimum_ring_size"), (maximum, "maximum_ring_size")] {
        if size > LARGEST {
            return Err(ConfigError::new("value must be less than or equal to 8388608").at(field));
        }
    }
    if minimum > maximum {
        return Err(ConfigError::new(format!(
            "ring hash: minimum_ring_size ({minimum}) > maximum_ring_size ({maximum})"
        ))
        .at("minimum_ring_size"));
    }
    Ok(LbPolicy::RingHash { minimum, maximum, murmur, hostname })
}

fn maglev(size: Option<u64>, hostname: bool) -> ConfigResult<LbPolicy> {
    let size = size.unwrap_or(65537);
    if size > 5_000_011 {
        return Err(ConfigError::new("value must be less than or equal to 5000011").at("table_size"));
    }
    let prime = size > 1 && (2..).take_while(|d| d * d <= size).all(|d| !size.is_multiple_of(d));
    if !prime {
        return Err(ConfigError::new("The table size of maglev must be prime number").at("table_size"));
    }
    Ok(LbPolicy::Maglev { size, hostname })
}

/// `common_lb_config.consistent_hashing_lb_config`
fn common_hashing(m: &Cluster) -> ConfigResult<bool> {
    let common = m.common_lb_config.as_ref().and_then(|c| c.consistent_hashing_lb_config.as_ref());
    let Some(config) = common else { return Ok(false) };
    let balanced = config.hash_balance_factor.is_some_and(|f| f.value > 0);
    refuse(balanced, "hash_balance_factor").at("common_lb_config.consistent_hashing_lb_config")?;
    Ok(config.use_hostname_for_hashing)
}

fn from_enum(m: &Cluster) -> ConfigResult<(LbPolicy, Option<SlowStart>)> {
    use cluster::{LbConfig as C, LbPolicy as P};
    let matches_policy = match (&m.lb_config, m.lb_policy()) {
        (None, _)
        | (Some(C::RoundRobinLbConfig(_)), P::RoundRobin)
        | (Some(C::LeastRequestLbConfig(_)), P::LeastRequest) => true,
        // Envoy takes a config of another policy and ignores it.
        (Some(_), _) => false,
    };
    let config = m.lb_config.as_ref().filter(|_| matches_policy);
    let slow_start = match config {
        Some(C::RoundRobinLbConfig(c)) => {
            SlowStart::from_cluster(c.slow_start_config.as_ref()).at("round_robin_lb_config")?
        }
        Some(C::LeastRequestLbConfig(c)) => {
            SlowStart::from_cluster(c.slow_start_config.as_ref()).at("least_request_lb_config")?
        }
        _ => None,
    };
    let policy = match m.lb_policy() {
        P::RoundRobin => Ok(LbPolicy::RoundRobin),
        P::LeastRequest => match config {
            Some(C::LeastRequestLbConfig(c)) => {
                least_request(c.choice_count.map(|v| v.value), c.active_request_bias.as_ref(), false)
                    .at("least_request_lb_config")
            }
            _ => least_request(None, None, false),
        },
        P::Random => Ok(LbPolicy::Random),
        P::RingHash => {
            let hostname = common_hashing(m)?;
            let ring = match &m.lb_config {
                Some(C::RingHashLbConfig(c)) => *c,
                _ => cluster::RingHashLbConfig::default(),
            };
            let murmur = ring.hash_function() == cluster::ring_hash_lb_config::HashFunction::MurmurHash2;
            let sizes = (ring.minimum_ring_size.map(|v| v.value), ring.maximum_ring_size.map(|v| v.value));
            ring_hash(sizes, murmur, hostname).at("ring_hash_lb_config")
        }
        P::Maglev => {
            let size = match &m.lb_config {
                Some(C::MaglevLbConfig(c)) => c.table_size.map(|v| v.value),
                _ => None,
            };
            maglev(size, common_hashing(m)?).at("maglev_lb_config")
        }
        P::ClusterProvided => Ok(LbPolicy::ClusterProvided),
        P::LoadBalancingPolicyConfig => Err(ConfigError::new(
            "cluster: LB policy LOAD_BALANCING_POLICY_CONFIG needs load_balancing_policy",
        )
        .at("lb_policy")),
    };
    Ok((policy?, slow_start))
}
