//! Where a connection manager's routes come from, and how a stream holds what it found.

use std::borrow::Cow;
use std::sync::{Arc, Weak};

use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::Rds;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use sampan_core::config_source::ConfigSource;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stats::Scope;
use sampan_core::stream_info::StreamInfo;
use sampan_listener::{FactoryContext, KnownClusters};

use super::scopes::Scoped;
use super::slot::RouteSlot;
use super::{
    Action, ClusterAction, Found, HostsOnDemand, Redirect, RequestView, Route, RouteTable, VirtualHost,
    WeightedCluster, WorkerTable, hosts_source,
};
use crate::filter::{HttpFilterRegistry, LocalReply, RouteConfig};
use crate::filters::cors::Policy as CorsPolicy;
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
pub enum RouteSource {
    /// One table.
    One(Arc<RouteSlot>),
    /// The table of a request's scope.
    Scoped(Box<Scoped>),
}

/// What a manager wants of RDS; whoever makes listeners sees to it.
pub struct WantedRoutes {
    /// `route_config_name`
    pub name: Arc<str>,
    /// `config_source`
    pub source: ConfigSource,
    /// `http.PREFIX.`
    pub scope: Scope,
    /// Who waits; gone with the last connection of the manager.
    pub slot: Weak<RouteSlot>,
}

/// What a manager wants whose own table has `vhds`.
pub struct WantedHosts {
    /// The table.
    pub table: RouteConfiguration,
    /// Who waits; gone with the last connection of the manager.
    pub slot: Weak<RouteSlot>,
}

impl RouteSource {
    /// From the manager's `route_specifier`.
    pub fn from_proto(
        message: Option<&RouteSpecifier>,
        scope: &Scope,
        context: &FactoryContext,
        registry: &HttpFilterRegistry,
    ) -> ConfigResult<Self> {
        let slot = match message {
            Some(RouteSpecifier::RouteConfig(config)) => {
                inline(config, context, registry).at("route_config")?
            }
            Some(RouteSpecifier::Rds(rds)) => wanted(rds, scope, context).at("rds")?,
            Some(RouteSpecifier::ScopedRoutes(scoped)) => {
                let scoped = Scoped::from_proto(scoped, scope, context, registry).at("scoped_routes")?;
                return Ok(Self::Scoped(Box::new(scoped)));
            }
            None => return Err(ConfigError::missing("route_specifier")),
        };
        Ok(Self::One(slot))
    }

    /// The table in force for a request, as this worker holds it.
    pub fn table(&self, request: &HeaderMap) -> SharedTable {
        match self {
            Self::One(slot) => SharedTable(slot.table()),
            Self::Scoped(scoped) => SharedTable(scoped.with(request, RouteSlot::table)),
        }
    }

    /// Where hosts that the table in force does not have are asked for. As in Envoy the tables of scopes have no such.
    pub fn hosts_on_demand(&self) -> Option<HostsOnDemand> {
        match self {
            Self::One(slot) => slot.hosts_on_demand(),
            Self::Scoped(_) => None,
        }
    }

    /// The table of a request whose headers have changed; none where headers do not matter.
    pub fn table_again(&self, request: &HeaderMap) -> Option<SharedTable> {
        match self {
            Self::One(_) => None,
            Self::Scoped(scoped) => Some(SharedTable(scoped.with(request, RouteSlot::table))),
        }
    }
}

/// A slot with a table of the manager's own, whose virtual hosts may grow.
fn inline(
    config: &RouteConfiguration,
    context: &FactoryContext,
    registry: &HttpFilterRegistry,
) -> ConfigResult<Arc<RouteSlot>> {
    let with = RouteContext { registry, clusters: &*context.server.clusters, validate_clusters: true };
    let slot = RouteSlot::new(RouteTable::with_hosts_on_demand(config, &with, None)?);
    if let Some(vhds) = &config.vhds {
        hosts_source(vhds)?;
        context.want(WantedHosts { table: config.clone(), slot: Arc::downgrade(&slot) });
    }
    Ok(slot)
}

/// A slot that finds no route until RDS has answered.
fn wanted(rds: &Rds, scope: &Scope, context: &FactoryContext) -> ConfigResult<Arc<RouteSlot>> {
    let source = rds.config_source.as_ref().ok_or_else(|| ConfigError::missing("config_source"))?;
    let source = ConfigSource::from_proto(source).at("config_source")?;
    let slot = RouteSlot::new(RouteTable::default());
    context.want(WantedRoutes {
        name: rds.route_config_name.as_str().into(),
        source,
        scope: scope.clone(),
        slot: Arc::downgrade(&slot),
    });
    Ok(slot)
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

    /// The path as the route was looked for, where that was without parameters (`;x` of each segment).
    pub fn bare_path<'h>(&self, headers: &'h HeaderMap) -> Option<Cow<'h, [u8]>> {
        self.virtual_host().bare_path(headers.get(HeaderId::PATH)?)
    }

    /// The route's name; empty where it has none.
    pub fn name(&self) -> &str {
        self.route().map_or("", |route| &route.name)
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

    /// The deprecated policies of route and virtual host, in this order.
    pub(crate) fn old_cors(&self) -> impl Iterator<Item = &Arc<CorsPolicy>> {
        let of_route = self.cluster_action().and_then(|action| action.cors.as_ref());
        of_route.into_iter().chain(&self.virtual_host().cors)
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
