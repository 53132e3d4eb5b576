//! `virtual_clusters`: requests of a virtual host that are counted together, wherever they are forwarded.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderMap;
use sampan_core::matcher::{HeaderMatcher, all_headers_match};

/// Everything that no other virtual cluster takes.
const OTHER: &str = "other";

/// A compiled virtual cluster.
pub struct VirtualCluster {
    /// `name`
    pub name: Arc<str>,
    /// The virtual host that it belongs to.
    pub virtual_host: Arc<str>,
    headers: Vec<HeaderMatcher>,
}

impl VirtualCluster {
    /// The virtual host's, in order, and behind them one for all other requests; none where none is configured.
    pub(super) fn list(message: &pb::VirtualHost) -> ConfigResult<Vec<Arc<Self>>> {
        let virtual_host: Arc<str> = message.name.as_str().into();
        let mut all = Vec::new();
        for (i, one) in message.virtual_clusters.iter().enumerate() {
            let headers = match &one.headers[..] {
                [] => Err(ConfigError::new("virtual clusters must define 'headers'")),
                headers => HeaderMatcher::list_from_proto(headers, "headers"),
            };
            all.push(Arc::new(Self {
                name: one.name.as_str().into(),
                virtual_host: virtual_host.clone(),
                headers: headers.at_index("virtual_clusters", i)?,
            }));
        }
        if !all.is_empty() {
            all.push(Arc::new(Self { name: OTHER.into(), virtual_host, headers: Vec::new() }));
        }
        Ok(all)
    }

    /// Whether a request belongs to it.
    pub(super) fn takes(&self, headers: &HeaderMap) -> bool {
        all_headers_match(&self.headers, headers)
    }
}
