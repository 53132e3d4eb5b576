//! Loading files, merging, splitting, unpacking; deprecated and unknown fields.

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::PathBuf;

use envoy_types::pb::{
    envoy::{
        config::{bootstrap::v3::Bootstrap, cluster::v3::Cluster},
        extensions::filters::http::router::v3::Router,
        service::discovery::v3::DiscoveryResponse,
    },
    google::protobuf::{Any, Struct},
};
use prost::Message as _;
use sampan_config::{
    CheckOptions, ErrorKind, Format, LoadError, LoadOptions, PrintOptions, UnknownFields, any, check,
    load_bootstrap, load_discovery_file, load_text, schema::Message, split_bootstrap, to_json,
};

/// A file that is gone when the test ends.
struct File(PathBuf);

impl File {
    fn new(name: &str, content: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("sampan-load-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn json<T: prost::Name>(bytes: &[u8]) -> String {
    to_json(Message::of::<T>().unwrap(), bytes, PrintOptions::default()).unwrap()
}

fn from_yaml(text: &str, options: &LoadOptions<'_>) -> Result<Vec<u8>, LoadError> {
    load_bootstrap(None, Some(text), options).map(|loaded| loaded.bytes().to_vec())
}

/// As `/config_dump` of Envoy shows the same file and the same `--config-yaml`.
#[test]
fn yaml_is_merged_over_the_file() {
    let file = File::new(
        "merge.yaml",
        b"node: {id: a, cluster: c, metadata: {k: 1, l: 2}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 27342}}}
static_resources: {clusters: [{name: x}]}
",
    );
    let over = "{node: {id: b, metadata: {l: 3}}, static_resources: {clusters: [{name: w}]}, \
                stats_flush_on_admin: true, admin: {address: {pipe: {path: /x.sock}}}}";
    let loaded = load_bootstrap(Some(&file.0), Some(over), &LoadOptions::default()).unwrap();
    assert_eq!(
        json::<Bootstrap>(loaded.bytes()),
        "{\"node\":{\"id\":\"b\",\"cluster\":\"c\",\"metadata\":{\"k\":1,\"l\":3}},\
         \"static_resources\":{\"clusters\":[{\"name\":\"x\"},{\"name\":\"w\"}]},\
         \"admin\":{\"address\":{\"pipe\":{\"path\":\"/x.sock\"}}},\"stats_flush_on_admin\":true}"
    );
    let bootstrap = loaded.decode().unwrap();
    assert_eq!(bootstrap.node.unwrap().id, "b");
    assert_eq!(bootstrap.static_resources.unwrap().clusters.len(), 2);

    let parts = split_bootstrap(loaded.bytes()).unwrap();
    assert!(parts.bootstrap.static_resources.is_none() && parts.listeners.is_empty());
    let names: Vec<String> =
        parts.clusters.iter().map(|bytes| Cluster::decode(bytes.clone()).unwrap().name).collect();
    assert_eq!(names, ["x", "w"]);
    assert_eq!(parts.bootstrap.node.unwrap().cluster, "c");
}

#[test]
fn what_is_merged_is_checked_as_a_whole() {
    let file = File::new("whole.json", br#"{"admin": {"address": {"socket_address": {"address": "::1"}}}}"#);
    let options = LoadOptions::default();
    let error = load_bootstrap(Some(&file.0), None, &options).unwrap_err();
    assert_eq!(error.path, "admin.address.socket_address.port_specifier");
    let over = "admin: {address: {socket_address: {port_value: 1}}}";
    load_bootstrap(Some(&file.0), Some(over), &options).unwrap();
}

#[test]
fn binary_files() {
    let bytes =
        from_yaml("{node: {id: a}, static_resources: {clusters: [{name: x}]}}", &LoadOptions::default());
    let file = File::new("a.pb", &bytes.unwrap());
    let loaded = load_bootstrap(Some(&file.0), None, &LoadOptions::default()).unwrap();
    assert_eq!(loaded.decode().unwrap().node.unwrap().id, "a");
    let file = File::new("b.pb", b"\x0a\x05abc");
    let error = load_bootstrap(Some(&file.0), None, &LoadOptions::default()).unwrap_err();
    assert!(error.to_string().ends_with("envoy.config.bootstrap.v3.Bootstrap: truncated message"), "{error}");
}

#[test]
fn missing_sources() {
    let options = LoadOptions::default();
    assert_eq!(load_bootstrap(None, None, &options).unwrap_err().kind, ErrorKind::Io);
    assert_eq!(load_bootstrap(None, Some(""), &options).unwrap_err().kind, ErrorKind::Io);
    let error = load_bootstrap(Some("/nowhere/x.yaml".as_ref()), None, &options).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Io);
    assert!(error.to_string().starts_with("/nowhere/x.yaml: unable to read file: "), "{error}");
    let file = File::new("latin.yaml", b"node: {id: \"\xe9\"}");
    assert_eq!(load_bootstrap(Some(&file.0), None, &options).unwrap_err().kind, ErrorKind::Syntax);
}

#[test]
fn unknown_fields_by_option() {
    const TEXT: &str = "node: {id: a, bogus: 1}\nstatic_resources: {clusters: [{name: x, lb_policy: NEW}]}";
    let reject = load_bootstrap(None, Some(TEXT), &LoadOptions::default()).unwrap_err();
    assert_eq!(reject.kind, ErrorKind::UnknownField);
    assert_eq!(
        reject.to_string(),
        "--config-yaml:1:15: node.bogus: no such field 'bogus' in envoy.config.core.v3.Node"
    );
    let options = LoadOptions { unknown: UnknownFields::Warn, ..LoadOptions::default() };
    let warned = load_bootstrap(None, Some(TEXT), &options).unwrap();
    assert_eq!(warned.report.unknown.len(), 1);
    assert_eq!(
        json::<Bootstrap>(warned.bytes()),
        "{\"node\":{\"id\":\"a\"},\"static_resources\":{\"clusters\":[{\"name\":\"x\"}]}}"
    );

    // On the wire: field 15000 of Cluster.
    let mut cluster = Cluster { name: "x".to_owned(), ..Cluster::default() }.encode_to_vec();
    sampan_config::wire::put_bytes(&mut cluster, 15_000, b"?");
    let message = Message::of::<Cluster>().unwrap();
    let error = check(message, &cluster, &CheckOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "envoy.config.cluster.v3.Cluster has no field with number 15000");
    let options = CheckOptions { unknown: UnknownFields::Warn, ..CheckOptions::default() };
    assert_eq!(check(message, &cluster, &options).unwrap().unknown.len(), 1);
}

const DISALLOWED: &str = r#"
static_resources:
  listeners:
  - name: l
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: a
          route_config:
            virtual_hosts:
            - name: a
              domains: ["*"]
              rate_limits:
              - actions: [{dynamic_metadata: {descriptor_key: k, metadata_key: {key: a, path: [{key: b}]}}}]
"#;

/// Each verdict is Envoy's.
#[test]
fn deprecated_fields() {
    let error = from_yaml(DISALLOWED, &LoadOptions::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Deprecated);
    assert!(error.path.ends_with("rate_limits[0].actions[0].dynamic_metadata"), "{error}");
    assert!(error.reason.starts_with(
        "type envoy.config.route.v3.RateLimit.Action Using deprecated option \
         'envoy.config.route.v3.RateLimit.Action.dynamic_metadata' from file route_components.proto. This \
         configuration will be removed from Envoy soon."
    ));
    for key in [
        "envoy.deprecated_features:envoy.config.route.v3.RateLimit.Action.dynamic_metadata",
        "envoy.features.enable_all_deprecated_features",
    ] {
        let allowed = format!(
            "{DISALLOWED}\nlayered_runtime: {{layers: [{{name: s, static_layer: {{\"{key}\": true}}}}]}}"
        );
        let loaded = load_bootstrap(None, Some(&allowed), &LoadOptions::default()).unwrap();
        assert_eq!(loaded.report.deprecated.len(), 1);
    }
    // Outside of extensions the bootstrap is read before there is a runtime: a warning at most.
    let warned = "static_resources: {clusters: [{name: b, max_requests_per_connection: 5}]}\nlayered_runtime: {layers: \
                  [{name: s, static_layer: {envoy.features.fail_on_any_deprecated_feature: true}}]}";
    let loaded = load_bootstrap(None, Some(warned), &LoadOptions::default()).unwrap();
    assert_eq!(loaded.report.deprecated.len(), 1);
    assert_eq!(loaded.report.deprecated[0].path, "static_resources.clusters[0].max_requests_per_connection");
    // What comes by xDS is checked with a runtime.
    let cluster = load_text::<Cluster>(
        Format::Yaml,
        "{name: b, max_requests_per_connection: 5}",
        &LoadOptions::default(),
    );
    let bytes = cluster.unwrap().bytes().clone();
    let runtime = |key: &str| (key == "envoy.features.fail_on_any_deprecated_feature").then_some(true);
    let options = CheckOptions { runtime: Some(&runtime), ..CheckOptions::default() };
    assert_eq!(
        check(Message::of::<Cluster>().unwrap(), &bytes, &options).unwrap_err().kind,
        ErrorKind::Deprecated
    );
}

fn typed_struct(kind: &str, type_url: &str, value: &str) -> Any {
    let value = load_text::<Struct>(Format::Json, value, &LoadOptions::default()).unwrap();
    let mut bytes = Vec::new();
    sampan_config::wire::put_bytes(&mut bytes, 1, type_url.as_bytes());
    sampan_config::wire::put_bytes(&mut bytes, 2, value.bytes());
    Any { type_url: format!("type.googleapis.com/{kind}"), value: bytes }
}

#[test]
fn typed_structs_become_what_they_name() {
    const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    for kind in ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"] {
        let any = typed_struct(kind, ROUTER, r#"{"suppress_envoy_headers": true, "dynamic_stats": false}"#);
        let router: Router = any::unpack(&any).unwrap();
        assert!(router.suppress_envoy_headers);
        assert!(!router.dynamic_stats.unwrap().value);
        let (url, _) = any::resolve(&any.type_url, &any.value).unwrap();
        assert_eq!(url, ROUTER);
    }
    let any = typed_struct("xds.type.v3.TypedStruct", ROUTER, r#"{"nonsense": 1}"#);
    let message = Message::of::<Any>().unwrap();
    let error = check(message, &any.encode_to_vec(), &CheckOptions::default()).unwrap_err();
    assert_eq!(error.reason, "no such field 'nonsense' in envoy.extensions.filters.http.router.v3.Router");
    let warn = CheckOptions { unknown: UnknownFields::Warn, ..CheckOptions::default() };
    assert_eq!(check(message, &any.encode_to_vec(), &warn).unwrap().unknown.len(), 1);
    assert_eq!(any::unpack::<Router>(&any).unwrap(), Router::default());

    let any = typed_struct("xds.type.v3.TypedStruct", "type.googleapis.com/who.Knows", "{}");
    assert_eq!(any::resolve(&any.type_url, &any.value).unwrap().0, any.type_url);
    let error = any::unpack::<Router>(&any).unwrap_err();
    assert_eq!(
        error.reason,
        "expected envoy.extensions.filters.http.router.v3.Router, found 'xds.type.v3.TypedStruct'"
    );
}

#[test]
fn istio_messages_are_known() {
    const STATS: &str = "type.googleapis.com/stats.PluginConfig";
    let text = r#"{"disable_host_header_fallback": true, "tcp_reporting_duration": "5s", "reporter": "SERVER_GATEWAY",
                   "metrics": [{"dimensions": {"a": "b"}, "tags_to_remove": ["x"]}]}"#;
    let any = typed_struct("udpa.type.v1.TypedStruct", STATS, text);
    let (url, bytes) = any::resolve(&any.type_url, &any.value).unwrap();
    assert_eq!(url, STATS);
    let message = Message::find("stats.PluginConfig").unwrap();
    assert_eq!(
        to_json(message, &bytes, PrintOptions::default()).unwrap(),
        "{\"disable_host_header_fallback\":true,\"tcp_reporting_duration\":\"5s\",\
         \"metrics\":[{\"dimensions\":{\"a\":\"b\"},\"tags_to_remove\":[\"x\"]}],\"reporter\":\"SERVER_GATEWAY\"}"
    );
    for name in [
        "io.istio.http.peer_metadata.Config",
        "envoy.tcp.metadataexchange.config.MetadataExchange",
        "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig",
        "istio.networking.nds.v1.NameTable",
        "istio.v1.auth.IstioCertificateRequest",
    ] {
        assert!(Message::find(name).is_some(), "{name}");
    }
}

#[test]
fn every_any_is_visited() {
    let runtime = |_: &str| Some(true);
    let options = LoadOptions { runtime: Some(&runtime), ..LoadOptions::default() };
    let bytes = from_yaml(
        &DISALLOWED.replace(
            "          route_config:",
            "          http_filters: [{name: r, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]\n          route_config:",
        ),
        &options,
    )
    .unwrap();
    let mut seen = Vec::new();
    any::for_each_any(Message::of::<Bootstrap>().unwrap(), &bytes, &mut |path, type_url, _| {
        seen.push(format!("{path} {}", type_url.rsplit('.').next().unwrap()));
        Ok::<(), LoadError>(())
    })
    .unwrap();
    assert_eq!(
        seen,
        [
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config HttpConnectionManager",
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0].typed_config Router",
        ]
    );
}

#[test]
fn files_of_a_filesystem_subscription() {
    let file = File::new(
        "cds.yaml",
        b"version_info: '7'
resources:
- {\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: a}
- {\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, connect_timeout: 1s}
",
    );
    let loaded = load_discovery_file(&file.0, &LoadOptions::default()).unwrap();
    assert_eq!(loaded.version, "7");
    let message = Message::of_type_url(&loaded.resources[1].type_url).unwrap();
    assert_eq!(message, Message::of::<Cluster>().unwrap());
    check(message, &loaded.resources[0].value, &CheckOptions::default()).unwrap();
    let error = check(message, &loaded.resources[1].value, &CheckOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "name: value length must be at least 1 characters");
    assert!(Message::of::<DiscoveryResponse>().is_some());
}
