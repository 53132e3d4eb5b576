//! `RequestMirrorPolicy`: a copy of the request goes to another cluster and its answer to nobody.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::route_action::RequestMirrorPolicy;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderName;
use sampan_core::runtime::Fraction;

use super::{RouteContext, refuse};

/// A compiled mirror policy.
#[derive(Clone)]
pub struct Mirror {
    /// The cluster's name, or the header that holds it.
    pub cluster: Result<Arc<str>, HeaderName>,
    /// Of how many requests.
    pub fraction: Fraction,
    /// `disable_shadow_host_suffix_append`
    pub keep_host: bool,
}

impl Mirror {
    pub(super) fn list(messages: &[RequestMirrorPolicy]) -> ConfigResult<Vec<Self>> {
        messages
            .iter()
            .enumerate()
            .map(|(i, m)| Self::from_proto(m).at_index("request_mirror_policies", i))
            .collect()
    }

    /// Whether its cluster is there, where that matters.
    pub(super) fn check_cluster(&self, context: &RouteContext<'_>) -> ConfigResult<()> {
        match &self.cluster {
            Ok(name) if context.validate_clusters && !context.clusters.has(name) => {
                Err(ConfigError::new(format!("route: unknown shadow cluster '{name}'")).at("cluster"))
            }
            _ => Ok(()),
        }
    }

    fn from_proto(message: &RequestMirrorPolicy) -> ConfigResult<Self> {
        refuse(!message.request_headers_mutations.is_empty(), "request_headers_mutations")?;
        refuse(!message.host_rewrite_literal.is_empty(), "host_rewrite_literal")?;
        match (message.cluster.as_str(), message.cluster_header.as_str()) {
            ("", "") => {
                let reason =
                    "Exactly one of cluster or cluster_header in request mirror policy need to be specified";
                return Err(ConfigError::new(reason));
            }
            ("", _) | (_, "") => {}
            (name, header) => {
                return Err(ConfigError::new(format!(
                    "Only one of cluster '{name}' or cluster_header '{header}' in request mirror policy can be \
                     specified"
                )));
            }
        }
        Ok(Self {
            cluster: if message.cluster.is_empty() {
                Err(HeaderName::new(&message.cluster_header))
            } else {
                Ok(message.cluster.as_str().into())
            },
            fraction: message.runtime_fraction.as_ref().map_or(Fraction::ALWAYS, Fraction::from_proto),
            keep_host: message.disable_shadow_host_suffix_append,
        })
    }
}
