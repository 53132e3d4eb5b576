//! `circuit_breakers`: limits per priority.

use envoy_types::pb::envoy::config::cluster::v3 as pb;
use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use crate::circuit::Priority;

/// The limits of one priority.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// `max_connections`
    pub max_connections: u32,
    /// `max_pending_requests`
    pub max_pending_requests: u32,
    /// `max_requests`
    pub max_requests: u32,
    /// `max_retries`
    pub max_retries: u32,
    /// `retry_budget`, in place of `max_retries`.
    pub retry_budget: Option<RetryBudget>,
    /// `track_remaining`
    pub track_remaining: bool,
}

/// `retry_budget`
#[derive(Debug, Clone, PartialEq)]
pub struct RetryBudget {
    /// `budget_percent`
    pub percent: f64,
    /// `min_retry_concurrency`
    pub min_concurrency: u32,
}

/// The limits of both priorities and of each host.
#[derive(Debug, Clone, PartialEq)]
pub struct CircuitBreakers {
    /// `DEFAULT` and `HIGH`.
    pub thresholds: [Thresholds; 2],
    /// `per_host_thresholds.max_connections`
    pub per_host_max_connections: Option<u32>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
            track_remaining: false,
        }
    }
}

impl CircuitBreakers {
    pub(super) fn from_proto(message: &pb::CircuitBreakers) -> ConfigResult<Self> {
        let mut thresholds = [Thresholds::default(), Thresholds::default()];
        let mut seen = [false; 2];
        for (i, m) in message.thresholds.iter().enumerate() {
            let priority =
                if m.priority() == RoutingPriority::High { Priority::High } else { Priority::Default };
            // The first entry of a priority counts.
            if !std::mem::replace(&mut seen[priority as usize], true) {
                thresholds[priority as usize] = Thresholds::from_proto(m).at_index("thresholds", i)?;
            }
        }
        let mut per_host_max_connections = None;
        for (i, m) in message.per_host_thresholds.iter().enumerate() {
            let extra = m.max_pending_requests.is_some()
                || m.max_requests.is_some()
                || m.max_retries.is_some()
                || m.max_connection_pools.is_some()
                || m.retry_budget.is_some();
            if extra {
                return Err(ConfigError::new("only max_connections is supported in per_host_thresholds")
                    .index(i)
                    .at("per_host_thresholds"));
            }
            if m.priority() == RoutingPriority::Default && per_host_max_connections.is_none() {
                per_host_max_connections = m.max_connections.map(|v| v.value);
            }
        }
        Ok(Self { thresholds, per_host_max_connections })
    }
}

impl Thresholds {
    fn from_proto(m: &pb::circuit_breakers::Thresholds) -> ConfigResult<Self> {
        if m.max_connection_pools.is_some_and(|v| v.value != u32::MAX) {
            return Err(ConfigError::unsupported("max_connection_pools").at("max_connection_pools"));
        }
        let default = Self::default();
        Ok(Self {
            max_connections: m.max_connections.map_or(default.max_connections, |v| v.value),
            max_pending_requests: m.max_pending_requests.map_or(default.max_pending_requests, |v| v.value),
            max_requests: m.max_requests.map_or(default.max_requests, |v| v.value),
            max_retries: m.max_retries.map_or(default.max_retries, |v| v.value),
            retry_budget: m.retry_budget.as_ref().map(budget).transpose().at("retry_budget")?,
            track_remaining: m.track_remaining,
        })
    }
}

fn budget(m: &pb::circuit_breakers::thresholds::RetryBudget) -> ConfigResult<RetryBudget> {
    if m.budget_interval.is_some() {
        return Err(ConfigError::unsupported("budget_interval").at("budget_interval"));
    }
    let percent = m.budget_percent.as_ref().map_or(20.0, |p| p.value);
    if !(0.0..=100.0).contains(&percent) {
        return Err(ConfigError::new("value must be inside range [0, 100]").at("budget_percent.value"));
    }
    Ok(RetryBudget { percent, min_concurrency: m.min_retry_concurrency.map_or(3, |v| v.value) })
}
