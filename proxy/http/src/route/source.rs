//! Where a connection manager's routes come from, and how a stream holds what it found.

use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stream_info::StreamInfo;
use sampan_listener::{FactoryContext, KnownClusters};

use super::{
    Action, ClusterAction, Found, Redirect, RequestView, Route, RouteTable, VirtualHost, WeightedCluster,
    WorkerTable,
};
use crate::filter::{HttpFilterRegistry, LocalReply, RouteConfig};
use crate::stream::Stream;

/// What compiling a route table needs.
#[derive(Clone, Copy)]
pub struct RouteContext<'a> {
    /// Parsers of `typed_per_filter_config`.
    pub registry: &'a HttpFilterRegistry,
    /// Which clusters exist.
    pub clusters: &'a dyn KnownClusters,
    /// Whether a route to an unknown cluster is refused.
    pub validate_clusters: bool,
}

impl RouteContext<'_> {
    pub(super) fn check_cluster(&self, name: &str) -> ConfigResult<()> {
        if self.validate_clusters && !self.clusters.has(name) {
            return Err(ConfigError::new(format!("route: unknown cluster '{name}'")));
        }
        Ok(())
    }
}

/// The routes of a connection manager.
pub struct RouteSource {
    table: Arc<RouteTable>,
}

thread_local! {
    /// This worker's reference-counted wrappers, by the table's address: a stream's clone touches no atomic.
    static TABLES: std::cell::RefCell<Vec<WorkerTable>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl RouteSource {
    /// From the manager's `route_specifier`.
    pub fn from_proto(
        message: Option<&RouteSpecifier>,
        context: &FactoryContext,
        registry: &HttpFilterRegistry,
    ) -> ConfigResult<Self> {
        let table = match message {
            Some(RouteSpecifier::RouteConfig(config)) => {
                let context =
                    RouteContext { registry, clusters: &*context.server.clusters, validate_clusters: true };
                RouteTable::from_proto(config, &context).at("route_config")?
            }
            Some(RouteSpecifier::Rds(_)) => return Err(ConfigError::unsupported("rds").at("rds")),
            Some(RouteSpecifier::ScopedRoutes(_)) => {
                return Err(ConfigError::unsupported("scoped_routes").at("scoped_routes"));
            }
            None => return Err(ConfigError::missing("route_specifier")),
        };
        Ok(Self { table: Arc::new(table) })
    }

    /// The table in force, as this worker holds it.
    pub fn table(&self) -> SharedTable {
        TABLES.with_borrow_mut(|tables| {
            if let Some(found) = tables.iter().find(|t| Arc::ptr_eq(t, &self.table)) {
                return SharedTable(found.clone());
            }
            let fresh = Rc::new(self.table.clone());
            // Tables that only this list still holds have been replaced.
            tables.retain(|t| Rc::strong_count(t) > 1 || Arc::strong_count(t) > 1);
            tables.push(fresh.clone());
            SharedTable(fresh)
        })
    }

    /// The compiled table.
    pub fn compiled(&self) -> &Arc<RouteTable> {
        &self.table
    }
}

/// A route table in a worker's hands.
#[derive(Clone)]
pub struct SharedTable(WorkerTable);

/// What a stream's route is: the table and places in it.
#[derive(Clone)]
pub struct Selected {
    table: SharedTable,
    found: Found,
    weighted: Option<u32>,
}

impl SharedTable {
    /// Headers that only the mesh itself may send.
    pub fn internal_only_headers(&self) -> &[HeaderName] {
        &self.0.internal_only_headers
    }

    /// The route of a stream.
    pub fn select(self, stream: &Stream) -> Option<Selected> {
        let random = stream.worker.random();
        let runtime = &stream.worker.runtime;
        let view = RequestView { headers: &stream.request, info: &stream.info, random, runtime };
        let found = self.0.find(&view)?;
        let selected = Selected { table: self, found, weighted: None };
        let weighted = selected.cluster_action().and_then(|action| {
            action.pick(|| stream.worker.random(), &stream.request, &stream.info, runtime)
        });
        Some(Selected { weighted, ..selected })
    }
}

/// What a route says to do; the redirect of `require_tls` is made on the fly.
pub enum Decision<'a> {
    /// Forward.
    Cluster(&'a ClusterAction),
    /// Answer as configured.
    Action(&'a Action),
    /// To https.
    ToHttps(Redirect),
}

impl Selected {
    /// The virtual host.
    pub fn virtual_host(&self) -> &VirtualHost {
        self.table.0.levels(self.found).0
    }

    /// The route; none for the redirect of `require_tls`.
    pub fn route(&self) -> Option<&Route> {
        self.table.0.levels(self.found).1
    }

    /// What to do.
    pub fn decision(&self) -> Decision<'_> {
        match self.route().map(|r| &r.action) {
            None => Decision::ToHttps(Redirect::to_https()),
            Some(Action::Cluster(action)) => Decision::Cluster(action),
            Some(action) => Decision::Action(action),
        }
    }

    /// The forwarding, if it is one.
    pub fn cluster_action(&self) -> Option<&ClusterAction> {
        self.route()?.action.cluster()
    }

    /// Which weighted cluster was picked.
    pub fn weighted(&self) -> Option<u32> {
        self.weighted
    }

    /// Whether the route says that an upgrade is allowed.
    pub fn upgrade_enabled(&self, upgrade: &str) -> Option<bool> {
        self.cluster_action()?.upgrade_enabled(upgrade)
    }

    fn configs(&self) -> impl Iterator<Item = &super::FilterConfigs> {
        let (host, route) = self.table.0.levels(self.found);
        let weighted = self.weighted_cluster();
        [
            weighted.map(|w| &w.filter_configs),
            route.map(|r| &r.filter_configs),
            Some(&host.filter_configs),
            Some(&self.table.0.filter_configs),
        ]
        .into_iter()
        .flatten()
    }

    /// The most specific configuration of a filter.
    pub fn filter_config(&self, name: &str) -> Option<RouteConfig> {
        self.configs().find_map(|level| level.get(name)?.config.clone())
    }

    /// The same, borrowed.
    pub fn filter_config_ref(&self, name: &str) -> Option<&(dyn std::any::Any + Send + Sync)> {
        self.configs().find_map(|level| level.get(name)?.config.as_deref())
    }

    /// All configurations of a filter, most specific first.
    pub fn filter_config_levels<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a RouteConfig> {
        self.configs().filter_map(move |level| level.get(name)?.config.as_ref())
    }

    /// Whether the most specific level that names the filter switches it off (`Some(true)`) or on.
    pub fn filter_disabled(&self, name: &str) -> Option<bool> {
        self.configs().find_map(|level| level.get(name)).map(|c| c.disabled)
    }
}

impl Selected {
    /// Header mutations of the request, then rewrites.
    pub fn finalize_request(&self, headers: &mut HeaderMap, info: &StreamInfo, keep_original: bool) {
        if let Some(weighted) = self.weighted_cluster() {
            weighted.mutations.request.apply_to_request(headers, info);
            if let Some(host) = &weighted.host_rewrite {
                headers.set(HeaderId::AUTHORITY, host.as_bytes());
            }
        }
        self.each_level(|level| level.request.apply_to_request(headers, info));
        if let (Some(route), Some(action)) = (self.route(), self.cluster_action()) {
            action.rewrite(route, headers, info, keep_original);
        }
    }

    /// Whether the route's mutations apply to a local reply: to all where it forwards, to its own else.
    pub fn decorates(&self, reply: &LocalReply) -> bool {
        self.cluster_action().is_some() || reply.details == "direct_response"
    }

    /// Header mutations of the response.
    pub fn finalize_response(&self, request: &HeaderMap, response: &mut HeaderMap, info: &StreamInfo) {
        if let Some(weighted) = self.weighted_cluster() {
            weighted.mutations.response.apply_to_response(response, request, info);
        }
        self.each_level(|level| level.response.apply_to_response(response, request, info));
    }

    fn weighted_cluster(&self) -> Option<&WeightedCluster> {
        self.cluster_action()?.weighted(self.weighted?)
    }

    /// Route, virtual host and table in the order in which their mutations apply; a weighted cluster's come before
    /// them, whatever that order.
    fn each_level(&self, mut apply: impl FnMut(&super::Mutations)) {
        let (host, route) = self.table.0.levels(self.found);
        let table = &self.table.0.mutations;
        if self.table.0.most_specific_last {
            apply(table);
            apply(&host.mutations);
        }
        if let Some(route) = route {
            apply(&route.mutations);
        }
        if !self.table.0.most_specific_last {
            apply(&host.mutations);
            apply(table);
        }
    }
}
