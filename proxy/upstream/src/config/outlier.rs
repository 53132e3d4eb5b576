//! `outlier_detection`.

use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3::OutlierDetection as Message;
use envoy_types::pb::google::protobuf::UInt32Value;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use super::duration;

/// When a host is ejected, and for how long; the field is Envoy's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is Envoy's of that name")]
pub struct OutlierConfig {
    pub consecutive_5xx: u32,
    pub consecutive_gateway_failure: u32,
    pub consecutive_local_origin_failure: u32,
    pub split_external_local_origin_errors: bool,
    pub interval: Duration,
    pub base_ejection_time: Duration,
    pub max_ejection_time: Duration,
    pub max_ejection_time_jitter: Duration,
    pub max_ejection_percent: u32,
    pub always_eject_one_host: bool,
    pub success_rate_minimum_hosts: u32,
    pub success_rate_request_volume: u32,
    pub success_rate_stdev_factor: u32,
    pub failure_percentage_threshold: u32,
    pub failure_percentage_minimum_hosts: u32,
    pub failure_percentage_request_volume: u32,
    /// By [`crate::outlier::Ejection`], in per cent.
    pub enforcing: [u32; 7],
}

impl OutlierConfig {
    pub(super) fn from_proto(m: &Message) -> ConfigResult<Self> {
        for (present, field) in [
            (!m.monitors.is_empty(), "monitors"),
            (m.detect_degraded_hosts.is_some_and(|v| v.value), "detect_degraded_hosts"),
        ] {
            if present {
                return Err(ConfigError::unsupported(field).at(field));
            }
        }
        let time = |value, field, default| Ok(duration(value).at(field)?.unwrap_or(default));
        let base = time(m.base_ejection_time.as_ref(), "base_ejection_time", Duration::from_secs(30))?;
        let longest = base.max(Duration::from_secs(300));
        let max = time(m.max_ejection_time.as_ref(), "max_ejection_time", longest)?;
        if max < base {
            return Err(ConfigError::new(
                "outlier detector's max_ejection_time cannot be smaller than base_ejection_time",
            )
            .at("max_ejection_time"));
        }
        let number = |value: Option<UInt32Value>, default| value.map_or(default, |v| v.value);
        Ok(Self {
            consecutive_5xx: number(m.consecutive_5xx, 5),
            consecutive_gateway_failure: number(m.consecutive_gateway_failure, 5),
            consecutive_local_origin_failure: number(m.consecutive_local_origin_failure, 5),
            split_external_local_origin_errors: m.split_external_local_origin_errors,
            interval: time(m.interval.as_ref(), "interval", Duration::from_secs(10))?,
            base_ejection_time: base,
            max_ejection_time: max,
            max_ejection_time_jitter: time(
                m.max_ejection_time_jitter.as_ref(),
                "max_ejection_time_jitter",
                Duration::ZERO,
            )?,
            max_ejection_percent: number(m.max_ejection_percent, 10).min(100),
            always_eject_one_host: m.always_eject_one_host.is_some_and(|v| v.value),
            success_rate_minimum_hosts: number(m.success_rate_minimum_hosts, 5),
            success_rate_request_volume: number(m.success_rate_request_volume, 100),
            success_rate_stdev_factor: number(m.success_rate_stdev_factor, 1900),
            failure_percentage_threshold: number(m.failure_percentage_threshold, 85),
            failure_percentage_minimum_hosts: number(m.failure_percentage_minimum_hosts, 5),
            failure_percentage_request_volume: number(m.failure_percentage_request_volume, 50),
            enforcing: [
                number(m.enforcing_consecutive_5xx, 100),
                number(m.enforcing_consecutive_gateway_failure, 0),
                number(m.enforcing_consecutive_local_origin_failure, 100),
                number(m.enforcing_success_rate, 100),
                number(m.enforcing_local_origin_success_rate, 100),
                number(m.enforcing_failure_percentage, 0),
                number(m.enforcing_failure_percentage_local_origin, 0),
            ],
        })
    }
}
