//! The HTTP filters, one file each, and the registry's lines.

mod alpn;
mod buffer;
pub(crate) mod cors;
mod dynamic_forward_proxy;
pub(crate) mod ext_authz;
mod fault;
mod grpc_stats;
mod header_mutation;
mod health_check;
mod istio_stats;
pub mod jwt_authn;
mod local_ratelimit;
mod lua;
mod mutation_rules;
mod on_demand;
mod peer_metadata;
mod rbac;
mod set_filter_state;
mod wasm;
mod with_matcher;

pub(crate) use buffer::discard_ready;

use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{ConfigError, ConfigResult};

use crate::filter::{HttpFilterContext, HttpFilterFactory, HttpFilterKind, HttpFilterRegistry, RouteConfig};
use crate::router::{self, RouterConfig};

type Make = fn(&Any, &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind>;
type MakeRoute = fn(&Any) -> ConfigResult<RouteConfig>;
/// A filter's type, how it is made, and the same for its configuration on a route.
type Line = (&'static str, Make, Option<(&'static str, MakeRoute)>);

/// Registers every filter: its type, that of its configuration on a route, and how each is made.
pub fn register(registry: &mut HttpFilterRegistry) {
    let lines: [Line; 20] = [
        (router::TYPE, RouterConfig::factory, None),
        (buffer::TYPE, buffer::make, Some((buffer::ROUTE_TYPE, buffer::make_route))),
        (cors::TYPE, cors::make, Some((cors::ROUTE_TYPE, cors::make_route))),
        (
            dynamic_forward_proxy::TYPE,
            dynamic_forward_proxy::make,
            Some((dynamic_forward_proxy::ROUTE_TYPE, dynamic_forward_proxy::make_route)),
        ),
        (ext_authz::TYPE, ext_authz::make, Some((ext_authz::ROUTE_TYPE, ext_authz::make_route))),
        (fault::TYPE, fault::make, Some((fault::TYPE, fault::make_route))),
        (
            header_mutation::TYPE,
            header_mutation::make,
            Some((header_mutation::ROUTE_TYPE, header_mutation::make_route)),
        ),
        (health_check::TYPE, health_check::make, None),
        (istio_stats::TYPE, istio_stats::make, None),
        (jwt_authn::TYPE, jwt_authn::make, Some((jwt_authn::ROUTE_TYPE, jwt_authn::make_route))),
        (
            local_ratelimit::TYPE,
            local_ratelimit::make,
            Some((local_ratelimit::TYPE, local_ratelimit::make_route)),
        ),
        (lua::TYPE, lua::make, Some((lua::ROUTE_TYPE, lua::make_route))),
        (on_demand::TYPE, on_demand::make, Some((on_demand::ROUTE_TYPE, on_demand::make_route))),
        (peer_metadata::TYPE, peer_metadata::make, None),
        (wasm::TYPE, wasm::make, None),
        (with_matcher::TYPE, with_matcher::make, Some((with_matcher::ROUTE_TYPE, with_matcher::make_route))),
        (alpn::TYPE, alpn::make, None),
        (grpc_stats::TYPE, grpc_stats::make, None),
        (rbac::TYPE, rbac::make, Some((rbac::ROUTE_TYPE, rbac::make_route))),
        (
            set_filter_state::TYPE,
            set_filter_state::make,
            Some((set_filter_state::TYPE, set_filter_state::make_route)),
        ),
    ];
    for (message, filter, route) in lines {
        let factory = HttpFilterFactory { filter, route: route.map(|(_, make)| make) };
        registry.register(message, route.map(|(name, _)| name), factory);
    }
}

/// Refuses a field that is set and that Sampan does not implement.
fn refuse(set: bool, field: &str) -> ConfigResult<()> {
    if set { Err(ConfigError::unsupported("this field").at(field)) } else { Ok(()) }
}
