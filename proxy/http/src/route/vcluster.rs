//! Requests of a virtual host that are counted together, wherever they are forwarded: those of a virtual cluster, and
//! those of routes with a `stat_prefix`.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderMap;
use sampan_core::matcher::{HeaderMatcher, all_headers_match};

/// Everything that no other virtual cluster takes.
const OTHER: &str = "other";

/// What is counted below `vhost.HOST.KIND.NAME`.
pub struct Counted {
    /// The virtual host.
    pub virtual_host: Arc<str>,
    /// `vcluster` or `route`
    pub kind: &'static str,
    /// The virtual cluster's name, the route's `stat_prefix`.
    pub name: Arc<str>,
}

impl Counted {
    /// A route's, where it has a `stat_prefix`.
    pub(super) fn route(message: &pb::Route, virtual_host: &Arc<str>) -> Option<Arc<Self>> {
        (!message.stat_prefix.is_empty()).then(|| {
            let name = message.stat_prefix.as_str().into();
            Arc::new(Self { virtual_host: virtual_host.clone(), kind: "route", name })
        })
    }
}

/// A compiled virtual cluster.
pub struct VirtualCluster {
    /// What counts its requests.
    pub counted: Arc<Counted>,
    headers: Vec<HeaderMatcher>,
}

impl VirtualCluster {
    /// The virtual host's, in order, and behind them one for all other requests; none where none is configured.
    pub(super) fn list(message: &pb::VirtualHost, virtual_host: &Arc<str>) -> ConfigResult<Vec<Self>> {
        let counted = |name: &str| {
            let (virtual_host, name) = (virtual_host.clone(), name.into());
            Arc::new(Counted { virtual_host, kind: "vcluster", name })
        };
        let mut all = Vec::new();
        for (i, one) in message.virtual_clusters.iter().enumerate() {
            let headers = match &one.headers[..] {
                [] => Err(ConfigError::new("virtual clusters must define 'headers'")),
                headers => HeaderMatcher::list_from_proto(headers, "headers"),
            };
            let headers = headers.at_index("virtual_clusters", i)?;
            all.push(Self { counted: counted(&one.name), headers });
        }
        if !all.is_empty() {
            all.push(Self { counted: counted(OTHER), headers: Vec::new() });
        }
        Ok(all)
    }

    /// Its name; none for the one that takes all other requests, which only its counters name.
    pub fn name(&self) -> Option<&Arc<str>> {
        (!self.headers.is_empty()).then_some(&self.counted.name)
    }

    /// Whether a request belongs to it.
    pub(super) fn takes(&self, headers: &HeaderMap) -> bool {
        all_headers_match(&self.headers, headers)
    }
}
