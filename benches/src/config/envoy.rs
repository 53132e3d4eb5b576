//! Envoy's bootstrap, for Envoy and for Sampan.
//!
//! Counters are flushed once a minute instead of every five seconds, so that a slow run under callgrind does
//! not pay for more flushes per request than a fast one.

use std::{fmt::Write as _, net::SocketAddr};

use super::{Front, Setup, Upstream};

const TYPES: &str = "type.googleapis.com/envoy";

/// The values of the `istio-contract` JSON access log.
const LOG_FIELDS: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("route_name", "%ROUTE_NAME%"),
];

pub(super) fn yaml(setup: &Setup) -> String {
    if let Front::Xds { control_plane, delta } = setup.front {
        return dynamic(setup, control_plane, delta);
    }
    let mut out = format!(
        "node:\n  id: bench\n  cluster: bench\n\
         stats_flush_interval: 60s\n\
         admin:\n  address:\n    socket_address: {{ address: {}, port_value: {} }}\n\
         static_resources:\n  listeners:\n  - name: front\n    address:\n\
         \x20     socket_address: {{ address: {}, port_value: {} }}\n",
        setup.admin.ip(),
        setup.admin.port(),
        setup.listen.ip(),
        setup.listen.port()
    );
    if setup.front == Front::IstioLike {
        out.push_str("    listener_filters:\n");
        for name in ["tls_inspector", "http_inspector"] {
            let kind = if name == "tls_inspector" { "TlsInspector" } else { "HttpInspector" };
            let _ = write!(
                out,
                "    - name: envoy.filters.listener.{name}\n      typed_config:\n\
                 \x20       \"@type\": {TYPES}.extensions.filters.listener.{name}.v3.{kind}\n"
            );
        }
    }
    out.push_str("    filter_chains:\n    - filters:\n");
    if setup.front == Front::Tcp {
        tcp_proxy(&mut out)
    } else {
        connection_manager(&mut out, setup)
    }
    if setup.front == Front::Tls {
        tls(&mut out, setup);
    }
    out.push_str("  clusters:\n");
    match setup.front {
        Front::Services(n) => (0..n).for_each(|i| cluster(&mut out, &format!("svc-{i}"), setup)),
        _ => cluster(&mut out, "backend", setup),
    }
    out
}

/// A bootstrap that leads to a control plane; nothing is given up because it takes long.
fn dynamic(setup: &Setup, control_plane: SocketAddr, delta: bool) -> String {
    let kind = if delta { "DELTA_GRPC" } else { "GRPC" };
    let source = "{ initial_fetch_timeout: 0s, resource_api_version: V3, ads: {} }";
    format!(
        "node: {{ id: bench, cluster: bench }}\n\
         stats_flush_interval: 60s\n\
         admin: {{ address: {{ socket_address: {{ address: {}, port_value: {} }} }} }}\n\
         dynamic_resources:\n  \
           ads_config:\n    \
             api_type: {kind}\n    transport_api_version: V3\n    set_node_on_first_message_only: true\n    \
             grpc_services: [{{ envoy_grpc: {{ cluster_name: xds }} }}]\n  \
           cds_config: {source}\n  lds_config: {source}\n\
         static_resources:\n  clusters:\n  - name: xds\n    type: STATIC\n    typed_extension_protocol_options:\n      \
           envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
             \"@type\": {TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
             explicit_http_config: {{ http2_protocol_options: {{}} }}\n    \
           load_assignment: {{ cluster_name: xds, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ \
             socket_address: {{ address: {}, port_value: {} }} }} }} }}] }}] }}\n",
        setup.admin.ip(),
        setup.admin.port(),
        control_plane.ip(),
        control_plane.port()
    )
}

fn tcp_proxy(out: &mut String) {
    let _ = write!(
        out,
        "      - name: envoy.filters.network.tcp_proxy\n        typed_config:\n\
         \x20         \"@type\": {TYPES}.extensions.filters.network.tcp_proxy.v3.TcpProxy\n\
         \x20         stat_prefix: front\n\
         \x20         cluster: backend\n"
    );
}

fn connection_manager(out: &mut String, setup: &Setup) {
    let _ = write!(
        out,
        "      - name: envoy.filters.network.http_connection_manager\n        typed_config:\n\
         \x20         \"@type\": {TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager\n\
         \x20         stat_prefix: front\n"
    );
    let istio_like = setup.front == Front::IstioLike;
    if istio_like {
        istio_like_options(out);
    }
    out.push_str("          http_filters:\n");
    if istio_like {
        filter(out, "fault", "HTTPFault");
        filter(out, "cors", "Cors");
        filter(out, "header_mutation", "HeaderMutation");
        out.push_str(MUTATIONS);
    }
    filter(out, "router", "Router");
    out.push_str("          route_config:\n            name: front\n            virtual_hosts:\n");
    match setup.front {
        Front::Services(n) => {
            for i in 0..n {
                let _ = write!(
                    out,
                    "            - name: svc-{i}\n              domains: [\"svc-{i}.example.com\"]\n\
                     \x20             routes:\n              - match: {{ prefix: \"/\" }}\n\
                     \x20               route: {{ cluster: svc-{i} }}\n"
                );
            }
        }
        Front::IstioLike => out.push_str(ISTIO_LIKE_HOST),
        _ => out.push_str(
            "            - name: front\n              domains: [\"*\"]\n              routes:\n\
             \x20             - match: { prefix: \"/\" }\n                route: { cluster: backend }\n",
        ),
    }
}

/// What gateways commonly do: one header from the formatter for the upstream, one removed and one set for the client.
const MUTATIONS: &str = "              mutations:
                request_mutations:
                - append:
                    header: { key: x-client-address, value: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\" }
                    append_action: OVERWRITE_IF_EXISTS_OR_ADD
                response_mutations:
                - remove: x-powered-by
                - append:
                    header: { key: x-served-by, value: bench }
                    append_action: OVERWRITE_IF_EXISTS_OR_ADD
";

/// A route as istiod writes it for a service without a VirtualService, less the retry host predicate.
const ISTIO_LIKE_HOST: &str = "            - name: bench.example.com:80
              domains: [\"bench.example.com\", \"bench\", \"bench.default\", \"bench.default.svc\"]
              include_request_attempt_count: true
              routes:
              - name: default
                match: { prefix: \"/\" }
                route:
                  cluster: backend
                  timeout: 0s
                  max_grpc_timeout: 0s
                  retry_policy:
                    retry_on: connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes
                    num_retries: 2
                    host_selection_retry_max_attempts: 5
                    retriable_status_codes: [503]
";

fn istio_like_options(out: &mut String) {
    let _ = write!(
        out,
        "          server_name: istio-envoy\n          normalize_path: true\n\
         \x20         use_remote_address: false\n          stream_idle_timeout: 0s\n\
         \x20         upgrade_configs:\n          - upgrade_type: websocket\n\
         \x20         access_log:\n          - name: envoy.access_loggers.file\n            typed_config:\n\
         \x20             \"@type\": {TYPES}.extensions.access_loggers.file.v3.FileAccessLog\n\
         \x20             path: /dev/null\n              log_format:\n                json_format:\n"
    );
    for (name, value) in LOG_FIELDS {
        let _ = writeln!(out, "                  {name}: \"{value}\"");
    }
}

fn filter(out: &mut String, name: &str, message: &str) {
    let _ = write!(
        out,
        "          - name: envoy.filters.http.{name}\n            typed_config:\n\
         \x20             \"@type\": {TYPES}.extensions.filters.http.{name}.v3.{message}\n"
    );
}

fn tls(out: &mut String, setup: &Setup) {
    let dir = setup.dir.display();
    let _ = write!(
        out,
        "      transport_socket:\n        name: envoy.transport_sockets.tls\n        typed_config:\n\
         \x20         \"@type\": {TYPES}.extensions.transport_sockets.tls.v3.DownstreamTlsContext\n\
         \x20         common_tls_context:\n            tls_certificates:\n\
         \x20           - certificate_chain: {{ filename: {dir}/cert.pem }}\n\
         \x20             private_key: {{ filename: {dir}/key.pem }}\n"
    );
}

fn cluster(out: &mut String, name: &str, setup: &Setup) {
    let _ = write!(
        out,
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 5s\n    lb_policy: LEAST_REQUEST\n\
         \x20   load_assignment:\n      cluster_name: {name}\n      endpoints:\n      - lb_endpoints:\n\
         \x20       - endpoint:\n            address:\n\
         \x20             socket_address: {{ address: {}, port_value: {} }}\n",
        setup.backend.ip(),
        setup.backend.port()
    );
    if setup.upstream == Upstream::Http2 {
        let _ = write!(
            out,
            "    typed_extension_protocol_options:\n\
             \x20     envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n\
             \x20       \"@type\": {TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions\n\
             \x20       explicit_http_config:\n          http2_protocol_options: {{}}\n"
        );
    }
}
