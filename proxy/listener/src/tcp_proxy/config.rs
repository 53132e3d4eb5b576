//! The model of `tcp_proxy`.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::BackoffStrategy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::envoy::r#type::v3::hash_policy::PolicySpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_upstream::OnDemand;

use crate::context::Worker;
use crate::proto::{duration, nonzero, refuse, u32_of};

const DEFAULT_DISCOVERY_TIMEOUT: Duration = Duration::from_secs(60);
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A `TcpProxy` message, checked.
#[derive(Debug)]
pub(super) struct TcpProxyConfig {
    pub(super) stat_prefix: String,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) max_connect_attempts: u32,
    max_duration: Option<Duration>,
    back_off: Option<BackOff>,
    /// Up to so much of the duration is added, as a share of it.
    jitter: f64,
    clusters: Clusters,
    /// Where clusters are asked for that are not there.
    pub(super) on_demand: Option<Arc<OnDemand>>,
    /// `hash_policy: [{source_ip: {}}]`
    pub(super) hash_source_ip: bool,
    /// Log when the client has connected.
    pub(super) log_on_start: bool,
    /// Log when the host has connected.
    pub(super) log_on_connected: bool,
    /// Log every so often.
    pub(super) log_interval: Option<Duration>,
}

/// `backoff_options`
#[derive(Debug, Clone, Copy)]
struct BackOff {
    base: Duration,
    max: Duration,
}

impl BackOff {
    fn from_proto(m: &BackoffStrategy) -> ConfigResult<Self> {
        let base = m.base_interval.as_ref().ok_or_else(|| ConfigError::missing("base_interval"))?;
        let base = duration(base).at("base_interval")?;
        let max = m.max_interval.as_ref().map(duration).transpose().at("max_interval")?.unwrap_or(base * 10);
        if max < base {
            let reason = "max_backoff_interval must be greater or equal to base_backoff_interval";
            return Err(ConfigError::new(reason));
        }
        Ok(Self { base, max })
    }
}

#[derive(Debug)]
enum Clusters {
    One(Arc<str>),
    /// Each with the sum of the weights up to and with its own.
    Weighted(Vec<(u64, Arc<str>)>),
}

impl TcpProxyConfig {
    #[allow(deprecated, reason = "Envoy still honours the deprecated fields")]
    pub(super) fn from_proto(m: &pb::TcpProxy) -> ConfigResult<Self> {
        refuse_unsupported(m)?;
        if m.stat_prefix.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("stat_prefix"));
        }
        let idle_timeout = match &m.idle_timeout {
            None => Some(DEFAULT_IDLE_TIMEOUT),
            given => nonzero(given.as_ref(), "idle_timeout")?,
        };
        let options = m.access_log_options.unwrap_or_default();
        let interval = options.access_log_flush_interval.or(m.access_log_flush_interval);
        let jitter = m.max_downstream_connection_duration_jitter_percentage.as_ref().map_or(0.0, |p| p.value);
        Ok(Self {
            stat_prefix: m.stat_prefix.clone(),
            idle_timeout,
            max_connect_attempts: u32_of(m.max_connect_attempts).unwrap_or(1),
            max_duration: nonzero(
                m.max_downstream_connection_duration.as_ref(),
                "max_downstream_connection_duration",
            )?,
            back_off: m
                .backoff_options
                .as_ref()
                .map(BackOff::from_proto)
                .transpose()
                .at("backoff_options")?,
            jitter: jitter / 100.0,
            clusters: Clusters::from_proto(m.cluster_specifier.as_ref())?,
            on_demand: on_demand(m.on_demand.as_ref()).at("on_demand")?,
            hash_source_ip: !m.hash_policy.is_empty(),
            log_on_start: options.flush_access_log_on_start,
            log_on_connected: options.flush_access_log_on_connected || m.flush_access_log_on_connected,
            log_interval: nonzero(interval.as_ref(), "access_log_flush_interval")?,
        })
    }

    /// The cluster for a connection, or for a further attempt of it.
    pub(super) fn pick(&self, worker: &Worker) -> &str {
        match &self.clusters {
            Clusters::One(name) => name,
            Clusters::Weighted(list) => {
                let total = list.last().map_or(1, |(sum, _)| *sum);
                pick_weighted(list, worker.random() % total)
            }
        }
    }

    /// How long to wait behind an attempt, the first of which is 1.
    pub(super) fn back_off(&self, attempt: u32, random: impl FnOnce() -> u64) -> Option<Duration> {
        self.back_off.map(|BackOff { base, max }| {
            let bound = base.saturating_mul(2u32.saturating_pow(attempt.saturating_sub(1))).min(max);
            Duration::from_millis(random() % (bound.as_millis() as u64).max(1))
        })
    }

    /// `max_downstream_connection_duration` of a connection, with its share of jitter.
    pub(super) fn max_duration(&self, random: u64) -> Option<Duration> {
        let share = random as f64 / u64::MAX as f64;
        self.max_duration.map(|d| d.mul_f64(1.0 + self.jitter * share))
    }
}

fn on_demand(message: Option<&pb::tcp_proxy::OnDemand>) -> ConfigResult<Option<Arc<OnDemand>>> {
    let Some(message) = message.filter(|message| message.odcds_config.is_some()) else { return Ok(None) };
    let pb::tcp_proxy::OnDemand { odcds_config, resources_locator, timeout } = message;
    let default = DEFAULT_DISCOVERY_TIMEOUT;
    OnDemand::from_proto(odcds_config.as_ref(), resources_locator, timeout.as_ref(), default).map(Some)
}

fn pick_weighted(list: &[(u64, Arc<str>)], at: u64) -> &str {
    let index = list.partition_point(|(sum, _)| *sum <= at);
    list.get(index).map_or("", |(_, name)| name)
}

impl Clusters {
    fn from_proto(specifier: Option<&ClusterSpecifier>) -> ConfigResult<Self> {
        match specifier {
            None => Err(ConfigError::missing("cluster_specifier")),
            Some(ClusterSpecifier::Cluster(name)) => Ok(Self::One(name.as_str().into())),
            Some(ClusterSpecifier::WeightedClusters(weighted)) => {
                let mut sum = 0;
                let mut list = Vec::new();
                for (index, cluster) in weighted.clusters.iter().enumerate() {
                    let at = |e: ConfigError| e.index(index).at("clusters").at("weighted_clusters");
                    refuse(cluster.metadata_match.is_some(), "metadata_match").map_err(at)?;
                    if cluster.weight == 0 {
                        return Err(at(
                            ConfigError::new("value must be greater than or equal to 1").at("weight")
                        ));
                    }
                    sum += u64::from(cluster.weight);
                    list.push((sum, cluster.name.as_str().into()));
                }
                if list.is_empty() {
                    return Err(ConfigError::new("value must contain at least 1 item(s)").at("clusters"))
                        .at("weighted_clusters");
                }
                Ok(Self::Weighted(list))
            }
        }
    }
}

#[allow(deprecated, reason = "deprecated fields are refused where Envoy honours them")]
fn refuse_unsupported(m: &pb::TcpProxy) -> ConfigResult<()> {
    refuse(m.metadata_match.is_some(), "metadata_match")?;
    for (index, policy) in m.hash_policy.iter().enumerate() {
        let by_state = matches!(policy.policy_specifier, Some(PolicySpecifier::FilterState(_)));
        refuse(by_state, "filter_state").map_err(|e| e.index(index).at("hash_policy"))?;
    }
    refuse(!m.proxy_protocol_tlvs.is_empty(), "proxy_protocol_tlvs")?;
    refuse(m.upstream_connect_mode() != pb::UpstreamConnectMode::Immediate, "upstream_connect_mode")?;
    refuse(m.max_early_data_bytes.is_some(), "max_early_data_bytes")?;
    refuse(m.check_drain_close.is_some_and(|b| b.value), "check_drain_close")?;
    let options = m.access_log_options.is_some();
    let twice = |field| format!("Only one of {field} or access_log_options can be specified.");
    match options {
        true if m.flush_access_log_on_connected => {
            Err(ConfigError::new(twice("flush_access_log_on_connected")))
        }
        true if m.access_log_flush_interval.is_some() => {
            Err(ConfigError::new(twice("access_log_flush_interval")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Duration as ProtoDuration;

    use super::*;

    fn message(specifier: ClusterSpecifier) -> pb::TcpProxy {
        pb::TcpProxy { stat_prefix: "t".into(), cluster_specifier: Some(specifier), ..Default::default() }
    }

    #[test]
    fn weights() {
        let cluster = |name: &str, weight| pb::tcp_proxy::weighted_cluster::ClusterWeight {
            name: name.into(),
            weight,
            metadata_match: None,
        };
        let weighted = pb::tcp_proxy::WeightedCluster { clusters: vec![cluster("a", 1), cluster("b", 3)] };
        let config =
            TcpProxyConfig::from_proto(&message(ClusterSpecifier::WeightedClusters(weighted))).unwrap();
        let Clusters::Weighted(list) = &config.clusters else { panic!("not weighted") };
        let picks: Vec<&str> = (0..4).map(|at| pick_weighted(list, at)).collect();
        assert_eq!(picks, ["a", "b", "b", "b"]);
    }

    #[test]
    fn defaults_and_refusals() {
        let one = || message(ClusterSpecifier::Cluster("a".into()));
        let config = TcpProxyConfig::from_proto(&one()).unwrap();
        assert_eq!((config.idle_timeout, config.max_connect_attempts), (Some(DEFAULT_IDLE_TIMEOUT), 1));
        let zero = ProtoDuration { seconds: 0, nanos: 0 };
        let config = TcpProxyConfig::from_proto(&pb::TcpProxy { idle_timeout: Some(zero), ..one() }).unwrap();
        assert_eq!(config.idle_timeout, None);
        let refused = pb::TcpProxy { max_early_data_bytes: Some(Default::default()), ..one() };
        let error = TcpProxyConfig::from_proto(&refused).unwrap_err().to_string();
        assert_eq!(error, "max_early_data_bytes: max_early_data_bytes is not supported");
        let strategy = |base, max: Option<i64>| BackoffStrategy {
            base_interval: Some(ProtoDuration { seconds: base, nanos: 0 }),
            max_interval: max.map(|seconds| ProtoDuration { seconds, nanos: 0 }),
        };
        let with = |strategy| pb::TcpProxy { backoff_options: Some(strategy), ..one() };
        let config = TcpProxyConfig::from_proto(&with(strategy(1, Some(3)))).unwrap();
        let longest = |attempt| config.back_off(attempt, || 59_999_999).map(|wait| wait.as_millis());
        assert_eq!([longest(1), longest(2), longest(3)], [Some(999), Some(1999), Some(2999)]);
        assert!(TcpProxyConfig::from_proto(&with(strategy(3, Some(1)))).is_err());
        let none = pb::TcpProxy { cluster_specifier: None, ..one() };
        assert_eq!(TcpProxyConfig::from_proto(&none).unwrap_err().path(), "cluster_specifier");
    }
}
