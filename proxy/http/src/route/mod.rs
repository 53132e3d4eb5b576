//! The route table: from a request to what shall be done with it.
//!
//! ```text
//!   hosts     authority -> virtual host: exact, longest suffix, longest prefix, *     (host.rs)
//!   routes    path, headers, query, … -> the first route that matches               (matching.rs, index.rs)
//!   action    cluster, redirect, direct response                                    (action.rs)
//! ```
//!
//! A table is compiled once, immutable and shared by all workers; a worker's [`SharedTable`] counts references
//! without atomics. A stream keeps the table it began with, whatever updates come.

mod action;
mod connect;
mod forward;
mod hash;
mod headers;
mod host;
mod index;
mod internal_redirect;
mod lazy;
mod matching;
mod mirror;
mod mutations;
mod on_demand;
mod per_filter;
mod rate_limit;
mod redirect;
mod retry;
mod retry_host;
mod rewrite;
mod scopes;
mod slot;
mod source;
mod template;
mod tree;
mod vcluster;
mod weighted;

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::tree::MatchTree;
use sampan_core::stream_info::{Metadata, StreamInfo};

pub use action::{Action, DirectResponse};
pub use connect::ConnectConfig;
pub use forward::{ClusterAction, GrpcTimeout, StreamDuration};
pub use hash::{Cookie, HashPolicies, MakeCookie};
pub use headers::{HeaderMutations, Values, append as append_header, as_stored, is_inline};
pub use internal_redirect::{InternalRedirects, RedirectStep, Redirected};
pub use lazy::LazyTable;
pub use mirror::Mirror;
pub use on_demand::{Demand, HostsOnDemand, hosts_source};
pub use per_filter::FilterConfigs;
pub use rate_limit::{Descriptor, Descriptors, Entry, RateLimit, RateLimits};
pub use redirect::Redirect;
pub use retry::{BackOff, RetryOn, RetryPolicy};
pub use retry_host::HostPredicate;
pub use scopes::{ScopeSlot, Scopes, WantedScopes, key as scope_key};
pub use slot::RouteSlot;
pub use source::{Decision, RouteContext, RouteSource, Selected, SharedTable, WantedHosts, WantedRoutes};
pub(crate) use template::Template;
pub use vcluster::{Counted, VirtualCluster};
pub use weighted::{ClusterChoice, WeightedCluster};

use crate::filters::cors::Policy as CorsPolicy;
use crate::manager::split_port;
use crate::tracing::{Decorator, Sampling};
use host::Hosts;
pub(crate) use matching::{RouteMatch, without_query};
use mutations::Mutations;
use tree::{Lookup, Routes};

/// A compiled `RouteConfiguration`; without one it finds no route.
#[derive(Default)]
pub struct RouteTable {
    /// `name`
    pub name: Arc<str>,
    hosts: Hosts,
    /// Where hosts that it does not have are asked for.
    on_demand: Option<HostsOnDemand>,
    /// Virtual hosts, in their order.
    pub virtual_hosts: Vec<VirtualHost>,
    /// `internal_only_headers`
    pub internal_only_headers: Vec<HeaderName>,
    mutations: Mutations,
    most_specific_last: bool,
    ignore_port: bool,
    /// `vhost_header`, in place of `:authority`.
    host_header: Option<HeaderName>,
    filter_configs: FilterConfigs,
}

/// A compiled `VirtualHost`.
pub struct VirtualHost {
    /// `name`
    pub name: Arc<str>,
    require_tls: pb::virtual_host::TlsRequirementType,
    routes: Vec<Route>,
    lookup: Lookup,
    /// `ignore_path_parameters_in_path_matching` of the table.
    ignore_parameters: bool,
    mutations: Mutations,
    filter_configs: FilterConfigs,
    virtual_clusters: Vec<VirtualCluster>,
    /// `include_request_attempt_count`
    pub attempt_count: bool,
    /// `include_is_timeout_retry_header`
    pub tells_timeout_retry: bool,
    /// `include_attempt_count_in_response`
    pub attempt_count_in_response: bool,
    /// `metadata`
    pub metadata: Option<Arc<Metadata>>,
    /// `rate_limits`
    pub rate_limits: RateLimits,
    cors: Option<Arc<CorsPolicy>>,
}

/// A compiled `Route`.
pub struct Route {
    /// `name`
    pub name: Arc<str>,
    matching: RouteMatch,
    /// What is done with the request.
    pub action: Action,
    mutations: Mutations,
    filter_configs: FilterConfigs,
    /// `metadata`
    pub metadata: Option<Arc<Metadata>>,
    /// `request_body_buffer_limit`, `per_request_buffer_limit_bytes`
    pub buffer_limit: Option<u64>,
    /// `decorator`
    pub decorator: Option<Decorator>,
    /// `tracing`
    pub sampling: Option<Sampling>,
    /// What counts its requests: `stat_prefix`.
    pub counted: Option<Arc<Counted>>,
}

/// What a request is matched on.
pub struct RequestView<'a> {
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// What is known of it.
    pub info: &'a StreamInfo,
    /// A uniform random number.
    pub random: u64,
    /// For runtime fractions.
    pub runtime: &'a sampan_core::runtime::Runtime,
}

/// Where in a table a route stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Index of the virtual host.
    pub virtual_host: u32,
    /// Index of the route; [`Found::TLS_REDIRECT`] for the redirect that `require_tls` means.
    pub route: u32,
}

impl Found {
    /// See [`Found::route`].
    pub const TLS_REDIRECT: u32 = u32::MAX;
}

pub(crate) fn metadata(
    message: Option<&envoy_types::pb::envoy::config::core::v3::Metadata>,
) -> Option<Arc<Metadata>> {
    message.map(|m| Arc::new(m.filter_metadata.clone().into_iter().collect()))
}

fn refuse(set: bool, field: &str) -> ConfigResult<()> {
    if set { Err(ConfigError::unsupported("this field").at(field)) } else { Ok(()) }
}

impl RouteTable {
    /// Compiles the message.
    pub fn from_proto(message: &pb::RouteConfiguration, context: &RouteContext<'_>) -> ConfigResult<Self> {
        refuse(message.vhds.is_some(), "vhds")?;
        Self::with_hosts_on_demand(message, context, None)
    }

    /// The same of a table whose `vhds` somebody looks after.
    pub fn with_hosts_on_demand(
        message: &pb::RouteConfiguration,
        context: &RouteContext<'_>,
        on_demand: Option<HostsOnDemand>,
    ) -> ConfigResult<Self> {
        refuse(!message.cluster_specifier_plugins.is_empty(), "cluster_specifier_plugins")?;
        let validate = message.validate_clusters.map_or(context.validate_clusters, |v| v.value);
        let context = &RouteContext { validate_clusters: validate, ..*context };
        let mut virtual_hosts = Vec::with_capacity(message.virtual_hosts.len());
        let inherited = action::Inherited {
            retry: None,
            hedge: false,
            mirrors: &Mirror::list(&message.request_mirror_policies)?,
            ignore_parameters: message.ignore_path_parameters_in_path_matching,
            max_body: message.max_direct_response_body_size_bytes.map_or(4096, |m| m.value as usize),
        };
        for (i, host) in message.virtual_hosts.iter().enumerate() {
            virtual_hosts
                .push(VirtualHost::from_proto(host, context, &inherited).at_index("virtual_hosts", i)?);
        }
        Ok(Self {
            name: message.name.as_str().into(),
            hosts: Hosts::new(&message.virtual_hosts)?,
            on_demand,
            virtual_hosts,
            internal_only_headers: message.internal_only_headers.iter().map(HeaderName::new).collect(),
            mutations: Mutations::of(message)?,
            most_specific_last: message.most_specific_header_mutations_wins,
            ignore_port: message.ignore_port_in_host_matching,
            host_header: Some(&message.vhost_header).filter(|name| !name.is_empty()).map(HeaderName::new),
            filter_configs: FilterConfigs::from_proto(&message.typed_per_filter_config, context)?,
        })
    }

    /// The route of a request.
    pub fn find(&self, request: &RequestView<'_>) -> Option<Found> {
        let host = match &self.host_header {
            None => request.headers.get(HeaderId::AUTHORITY),
            Some(name) => request.headers.get_name(name),
        };
        let host = host.unwrap_or_default();
        let host = if self.ignore_port { split_port(host).0 } else { host };
        let index = self.hosts.find(host)?;
        let virtual_host = &self.virtual_hosts[index as usize];
        if virtual_host.requires_redirect(request) {
            return Some(Found { virtual_host: index, route: Found::TLS_REDIRECT });
        }
        let route = virtual_host.find(request)?;
        Some(Found { virtual_host: index, route })
    }

    /// Where the levels of a found route stand, most specific first.
    fn levels(&self, found: Found) -> (&VirtualHost, Option<&Route>) {
        let host = &self.virtual_hosts[found.virtual_host as usize];
        (host, host.routes.get(found.route as usize))
    }
}

impl VirtualHost {
    #[allow(deprecated)] // `cors` and `per_request_buffer_limit_bytes` are deprecated and still known.
    fn from_proto(
        message: &pb::VirtualHost,
        context: &RouteContext<'_>,
        inherited: &action::Inherited<'_>,
    ) -> ConfigResult<Self> {
        refuse(message.retry_policy_typed_config.is_some(), "retry_policy_typed_config")?;
        let retry =
            message.retry_policy.as_ref().map(RetryPolicy::from_proto).transpose().at("retry_policy")?;
        let own = Mirror::list(&message.request_mirror_policies)?;
        let mirrors = if own.is_empty() { inherited.mirrors } else { &own };
        let hedge = message.hedge_policy.as_ref().is_some_and(|p| p.hedge_on_per_try_timeout);
        let inherited = action::Inherited { retry: retry.as_ref(), hedge, mirrors, ..*inherited };
        let limit = message
            .request_body_buffer_limit
            .map(|l| l.value)
            .or(message.per_request_buffer_limit_bytes.map(|l| u64::from(l.value)));
        let name: Arc<str> = message.name.as_str().into();
        let make = |message: &pb::Route, context: &RouteContext<'_>| {
            let mut route = Route::from_proto(message, context, &inherited)?;
            route.counted = Counted::route(message, &name);
            route.buffer_limit = route.buffer_limit.or(limit);
            Ok(route)
        };
        let (routes, lookup) = match &message.matcher {
            None => {
                let mut routes = Vec::with_capacity(message.routes.len());
                for (i, route) in message.routes.iter().enumerate() {
                    routes.push(make(route, context).at_index("routes", i)?);
                }
                let all = Routes::from(0, &routes);
                (routes, Lookup::All(all))
            }
            Some(_) if !message.routes.is_empty() => {
                return Err(ConfigError::new("cannot set both matcher and routes on virtual host"));
            }
            Some(matcher) => {
                // Envoy never asks whether the clusters of a tree's routes are known.
                let context = RouteContext { validate_clusters: false, ..*context };
                let mut builder = tree::Builder { routes: Vec::new(), make: &|route| make(route, &context) };
                let tree = MatchTree::from_proto(matcher, &mut builder).at("matcher")?;
                (builder.routes, Lookup::Tree(tree))
            }
        };
        Ok(Self {
            virtual_clusters: VirtualCluster::list(message, &name)?,
            name,
            require_tls: message.require_tls(),
            routes,
            lookup,
            ignore_parameters: inherited.ignore_parameters,
            mutations: Mutations::of(message)?,
            filter_configs: FilterConfigs::from_proto(&message.typed_per_filter_config, context)?,
            attempt_count: message.include_request_attempt_count,
            tells_timeout_retry: message.include_is_timeout_retry_header,
            attempt_count_in_response: message.include_attempt_count_in_response,
            metadata: metadata(message.metadata.as_ref()),
            rate_limits: RateLimits::of_route(&message.rate_limits)?,
            cors: message.cors.as_ref().map(CorsPolicy::of_route).transpose().at("cors")?,
        })
    }

    /// The virtual cluster that a request counts for.
    pub fn virtual_cluster(&self, headers: &HeaderMap) -> Option<&VirtualCluster> {
        self.virtual_clusters.iter().find(|one| one.takes(headers))
    }

    fn requires_redirect(&self, request: &RequestView<'_>) -> bool {
        use pb::virtual_host::TlsRequirementType as Tls;
        let https = || request.headers.get(HeaderId::X_FORWARDED_PROTO).is_some_and(|p| p == b"https");
        match self.require_tls {
            Tls::None => false,
            Tls::All => !https(),
            Tls::ExternalOnly => !https() && request.headers.get(HeaderId::X_ENVOY_INTERNAL) != Some(b"true"),
        }
    }

    /// The path without query and parameters, where routes are looked for so.
    fn bare_path<'p>(&self, path: &'p [u8]) -> Option<Cow<'p, [u8]>> {
        self.ignore_parameters.then(|| matching::without_parameters(matching::without_query(path)))
    }

    fn find(&self, request: &RequestView<'_>) -> Option<u32> {
        let path = request.headers.get(HeaderId::PATH).unwrap_or_default();
        let bare = self.bare_path(path);
        let path = bare.as_deref().unwrap_or(matching::without_query(path));
        self.lookup.find(path, request, |i| self.routes[i as usize].matching.matches(path, request))
    }
}

impl Route {
    #[allow(deprecated)] // `per_request_buffer_limit_bytes` is deprecated and still taken.
    fn from_proto(
        message: &pb::Route,
        context: &RouteContext<'_>,
        inherited: &action::Inherited<'_>,
    ) -> ConfigResult<Self> {
        let matching = message.r#match.as_ref().ok_or_else(|| ConfigError::missing("match"))?;
        let action = message.action.as_ref().ok_or_else(|| ConfigError::missing("action"))?;
        let matching = RouteMatch::from_proto(matching).at("match")?;
        let action = Action::from_proto(action, &matching, context, inherited)?;
        Ok(Self {
            name: message.name.as_str().into(),
            matching,
            action,
            mutations: Mutations::of(message)?,
            filter_configs: FilterConfigs::from_proto(&message.typed_per_filter_config, context)?,
            metadata: metadata(message.metadata.as_ref()),
            buffer_limit: message
                .request_body_buffer_limit
                .map(|l| l.value)
                .or(message.per_request_buffer_limit_bytes.map(|l| u64::from(l.value))),
            decorator: message.decorator.as_ref().map(Decorator::from_proto),
            sampling: message.tracing.as_ref().map(|t| Sampling::of_route(t).at("tracing")).transpose()?,
            counted: None,
        })
    }

    /// How much of the path the match consumed, for prefix rewrites.
    pub fn matched(&self, path: &[u8]) -> Option<usize> {
        self.matching.matched(path)
    }
}

/// The table and the indices, as a worker holds them.
pub(crate) type WorkerTable = Rc<Arc<RouteTable>>;

#[cfg(test)]
mod tests;
