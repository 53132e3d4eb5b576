//! The resources of what `/config_dump` printed, whole or in part: `?resource=dynamic_listeners` prints the members of that
//! field as messages of their own.

use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};

use super::name_of;
use admin::clusters_config_dump::{DynamicCluster, StaticCluster};
use admin::ecds_config_dump::EcdsFilterConfig;
use admin::endpoints_config_dump::{DynamicEndpointConfig, StaticEndpointConfig};
use admin::listeners_config_dump::{DynamicListener, StaticListener};
use admin::routes_config_dump::{DynamicRouteConfig, StaticRouteConfig};
use admin::scoped_routes_config_dump::{DynamicScopedRouteConfigs, InlineScopedRouteConfigs};

/// What came from a control plane or a bootstrap; what was refused then is not among them.
pub(super) fn resources(dump: &admin::ConfigDump) -> Vec<Any> {
    let mut out = Vec::new();
    for any in &dump.configs {
        section(any, &mut out);
        part(any, &mut out);
    }
    out
}

fn decoded<M: Message + Default + Name>(any: &Any) -> Option<M> {
    (name_of(any) == M::full_name()).then(|| M::decode(any.value.as_slice()).ok()).flatten()
}

fn section(any: &Any, out: &mut Vec<Any>) {
    if let Some(m) = decoded::<admin::ClustersConfigDump>(any) {
        out.extend(m.static_clusters.into_iter().filter_map(|c| c.cluster));
        out.extend(m.dynamic_active_clusters.into_iter().filter_map(|c| c.cluster));
        out.extend(m.dynamic_warming_clusters.into_iter().filter_map(|c| c.cluster));
    } else if let Some(m) = decoded::<admin::ListenersConfigDump>(any) {
        out.extend(m.static_listeners.into_iter().filter_map(|l| l.listener));
        out.extend(m.dynamic_listeners.into_iter().flat_map(states));
    } else if let Some(m) = decoded::<admin::RoutesConfigDump>(any) {
        out.extend(m.static_route_configs.into_iter().filter_map(|r| r.route_config));
        out.extend(m.dynamic_route_configs.into_iter().filter_map(|r| r.route_config));
    } else if let Some(m) = decoded::<admin::ScopedRoutesConfigDump>(any) {
        out.extend(m.inline_scoped_route_configs.into_iter().flat_map(|s| s.scoped_route_configs));
        out.extend(m.dynamic_scoped_route_configs.into_iter().flat_map(|s| s.scoped_route_configs));
    } else if let Some(m) = decoded::<admin::EcdsConfigDump>(any) {
        out.extend(m.ecds_filters.into_iter().filter_map(|f| f.ecds_filter));
    } else if let Some(m) = decoded::<admin::EndpointsConfigDump>(any) {
        out.extend(m.static_endpoint_configs.into_iter().filter_map(|e| e.endpoint_config));
        out.extend(m.dynamic_endpoint_configs.into_iter().filter_map(|e| e.endpoint_config));
    }
}

fn part(any: &Any, out: &mut Vec<Any>) {
    out.extend(decoded::<StaticCluster>(any).and_then(|m| m.cluster));
    out.extend(decoded::<DynamicCluster>(any).and_then(|m| m.cluster));
    out.extend(decoded::<StaticListener>(any).and_then(|m| m.listener));
    out.extend(decoded::<DynamicListener>(any).into_iter().flat_map(states));
    out.extend(decoded::<StaticRouteConfig>(any).and_then(|m| m.route_config));
    out.extend(decoded::<DynamicRouteConfig>(any).and_then(|m| m.route_config));
    let scopes = decoded::<InlineScopedRouteConfigs>(any).map(|m| m.scoped_route_configs);
    out.extend(scopes.into_iter().flatten());
    let scopes = decoded::<DynamicScopedRouteConfigs>(any).map(|m| m.scoped_route_configs);
    out.extend(scopes.into_iter().flatten());
    out.extend(decoded::<EcdsFilterConfig>(any).and_then(|m| m.ecds_filter));
    out.extend(decoded::<StaticEndpointConfig>(any).and_then(|m| m.endpoint_config));
    out.extend(decoded::<DynamicEndpointConfig>(any).and_then(|m| m.endpoint_config));
}

fn states(listener: DynamicListener) -> impl Iterator<Item = Any> {
    [listener.active_state, listener.warming_state].into_iter().flatten().filter_map(|state| state.listener)
}
