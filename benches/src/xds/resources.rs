//! What the control plane serves: clusters with endpoints as istiod names them, one route table, one listener.

use std::net::SocketAddr;

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster,
                circuit_breakers::Thresholds,
                cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy},
            },
            core::v3::{
                Address, AggregatedConfigSource, ConfigSource, SocketAddress,
                address::Address as AddressKind, config_source::ConfigSourceSpecifier,
                socket_address::PortSpecifier,
            },
            endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint},
            listener::v3::{Filter, FilterChain, Listener, filter},
            route::v3::{
                Route, RouteAction, RouteConfiguration, RouteMatch, ScopedRouteConfiguration, VirtualHost,
                route, route_action, route_match,
                scoped_route_configuration::{Key, key},
            },
        },
        extensions::filters::{
            http::router::v3::Router,
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, Rds, ScopedRds, ScopedRoutes,
                http_connection_manager::RouteSpecifier,
                http_filter,
                scoped_routes::{
                    ConfigSpecifier, ScopeKeyBuilder,
                    scope_key_builder::{
                        FragmentBuilder,
                        fragment_builder::{self, HeaderValueExtractor, header_value_extractor::ExtractType},
                    },
                },
            },
        },
    },
    google::protobuf::{Any as Packed, Duration, UInt32Value},
};
use prost::{Message, Name};
use xds_client::{types, wire::Any};

/// The route table.
pub const TABLE: &str = "80";

/// A resource and its name.
pub type Named = (String, Any);

/// As istiod names a service's cluster.
pub fn name(i: usize) -> String {
    format!("outbound|80||svc-{i}.ns.svc.cluster.local")
}

/// The `host` of a service.
pub fn host(i: usize) -> String {
    format!("svc-{i}.ns.svc.cluster.local")
}

fn ads() -> Option<ConfigSource> {
    let config_source_specifier = Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {}));
    Some(ConfigSource { config_source_specifier, resource_api_version: 2, ..Default::default() })
}

fn packed(name: String, type_url: &str, message: &impl Message) -> Named {
    (name, Any { type_url: type_url.to_owned(), value: message.encode_to_vec().into() })
}

fn typed<M: Message + Name>(message: &M) -> Packed {
    Packed { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

fn address(ip: String, port: u16) -> Option<Address> {
    let port_specifier = Some(PortSpecifier::PortValue(port.into()));
    let socket = SocketAddress { address: ip, port_specifier, ..Default::default() };
    Some(Address { address: Some(AddressKind::SocketAddress(socket)) })
}

/// An EDS cluster with istiod's circuit breakers.
pub fn cluster(i: usize) -> Named {
    cluster_with(i, 10)
}

/// The same with this `connect_timeout`.
pub fn cluster_with(i: usize, seconds: i64) -> Named {
    let most = Some(UInt32Value { value: u32::MAX });
    let message = Cluster {
        name: name(i),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: ads(), service_name: name(i) }),
        connect_timeout: Some(Duration { seconds, nanos: 0 }),
        lb_policy: LbPolicy::LeastRequest.into(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![Thresholds {
                max_connections: most,
                max_pending_requests: most,
                max_requests: most,
                max_retries: most,
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    packed(name(i), types::CLUSTER, &message)
}

/// Three endpoints, all of them the backend at this port.
pub fn endpoints(i: usize, port: u16) -> Named {
    let endpoint = |k: usize| {
        let endpoint = Endpoint { address: address(format!("127.0.0.{k}"), port), ..Default::default() };
        let host_identifier = Some(lb_endpoint::HostIdentifier::Endpoint(endpoint));
        LbEndpoint { host_identifier, ..Default::default() }
    };
    let lb_endpoints = (1..=3).map(endpoint).collect();
    let endpoints = vec![LocalityLbEndpoints { lb_endpoints, ..Default::default() }];
    let message = ClusterLoadAssignment { cluster_name: name(i), endpoints, ..Default::default() };
    packed(name(i), types::ENDPOINTS, &message)
}

/// A virtual host for each service; `to` says to which service's cluster its requests go.
pub fn routes(services: usize, to: impl Fn(usize) -> usize) -> Named {
    table(TABLE.into(), (0..services).map(|i| virtual_host(i, to(i))).collect())
}

fn virtual_host(i: usize, to: usize) -> VirtualHost {
    let action = RouteAction {
        cluster_specifier: Some(route_action::ClusterSpecifier::Cluster(name(to))),
        timeout: Some(Duration::default()),
        ..Default::default()
    };
    let path_specifier = Some(route_match::PathSpecifier::Prefix("/".into()));
    let route = Route {
        r#match: Some(RouteMatch { path_specifier, ..Default::default() }),
        action: Some(route::Action::Route(action)),
        ..Default::default()
    };
    let domains = vec![host(i), format!("{}:80", host(i))];
    VirtualHost { name: format!("{}:80", host(i)), domains, routes: vec![route], ..Default::default() }
}

fn table(name: String, virtual_hosts: Vec<VirtualHost>) -> Named {
    let message = RouteConfiguration { name: name.clone(), virtual_hosts, ..Default::default() };
    packed(name, types::ROUTES, &message)
}

/// A scope with a table of its own, which has one virtual host.
pub fn scope(i: usize) -> [Named; 2] {
    let (name, key) = (format!("scope-{i}"), key::fragment::Type::StringKey(i.to_string()));
    let message = ScopedRouteConfiguration {
        name: name.clone(),
        route_configuration_name: format!("table-{i}"),
        key: Some(Key { fragments: vec![key::Fragment { r#type: Some(key) }] }),
        ..Default::default()
    };
    [packed(name, types::SCOPED_ROUTES, &message), table(format!("table-{i}"), vec![virtual_host(i, 0)])]
}

/// HTTP with the route table.
pub fn listener(at: SocketAddr) -> Named {
    let rds = Rds { route_config_name: TABLE.into(), config_source: ads() };
    http(at, RouteSpecifier::Rds(rds))
}

/// HTTP with the scopes; a header says which.
pub fn scoped_listener(at: SocketAddr) -> Named {
    let header = HeaderValueExtractor {
        name: "x-scope".into(),
        extract_type: Some(ExtractType::Index(0)),
        ..Default::default()
    };
    let fragment = fragment_builder::Type::HeaderValueExtractor(header);
    let scopes = ScopedRoutes {
        name: "scopes".into(),
        scope_key_builder: Some(ScopeKeyBuilder {
            fragments: vec![FragmentBuilder { r#type: Some(fragment) }],
        }),
        rds_config_source: ads(),
        config_specifier: Some(ConfigSpecifier::ScopedRds(ScopedRds {
            scoped_rds_config_source: ads(),
            ..Default::default()
        })),
    };
    http(at, RouteSpecifier::ScopedRoutes(scopes))
}

fn http(at: SocketAddr, routes: RouteSpecifier) -> Named {
    let router = HttpFilter {
        name: "envoy.filters.http.router".into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(typed(&Router::default()))),
        ..Default::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: "front".into(),
        route_specifier: Some(routes),
        http_filters: vec![router],
        ..Default::default()
    };
    let filter = Filter {
        name: "envoy.filters.network.http_connection_manager".into(),
        config_type: Some(filter::ConfigType::TypedConfig(typed(&manager))),
    };
    let message = Listener {
        name: "front".into(),
        address: address(at.ip().to_string(), at.port()),
        filter_chains: vec![FilterChain { filters: vec![filter], ..Default::default() }],
        ..Default::default()
    };
    packed("front".into(), types::LISTENER, &message)
}
