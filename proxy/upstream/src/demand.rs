//! On-demand CDS, the workers' side: a stream asks for a cluster that is not there and waits.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::ConfigSource as Message;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use sampan_core::config_source::{Api, ConfigSource, SourceKind};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use tokio::sync::oneshot;

use crate::config::duration;

/// Where clusters are asked for, and for how long a stream waits.
#[derive(Debug, PartialEq, Eq)]
pub struct OnDemand {
    /// Who is asked.
    pub source: ConfigSource,
    /// How long.
    pub timeout: Duration,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovered {
    /// The cluster is there.
    Available,
    /// There is no such cluster.
    Missing,
    /// No answer in time.
    TimedOut,
}

/// A cluster that a stream waits for.
pub struct Demand {
    /// By whose configuration.
    pub on_demand: Arc<OnDemand>,
    /// Its name.
    pub name: Arc<str>,
    /// The answer; dropped where there will be none.
    pub answer: oneshot::Sender<Discovered>,
}

impl OnDemand {
    /// Checks the fields that the filters' messages have in common; the source's is named by the caller.
    pub fn from_proto(
        source: Option<&Message>,
        locator: &str,
        timeout: Option<&ProtoDuration>,
        default: Duration,
    ) -> ConfigResult<Arc<Self>> {
        let source = source.ok_or_else(|| ConfigError::missing("config_source_specifier"))?;
        let source = ConfigSource::from_proto(source)?;
        let fits = match &source.kind {
            SourceKind::Ads => true,
            SourceKind::Api(api) => matches!(api.api, Api::Grpc { delta: true, .. }),
            SourceKind::Path { .. } => false,
        };
        // Envoy takes others and ends when such a one answers.
        if !fits {
            return Err(ConfigError::unsupported("a source of clusters on demand but ads and DELTA_GRPC"));
        }
        if !locator.is_empty() {
            return Err(ConfigError::unsupported("resources_locator").at("resources_locator"));
        }
        let timeout = duration(timeout).at("timeout")?.unwrap_or(default);
        Ok(Arc::new(Self { source, timeout }))
    }
}
