use std::cell::RefCell;

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::{
    Address, Pipe as UnixSocket, SocketAddress, address, socket_address,
};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::stats::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::json::packed;

#[derive(Default)]
struct Fake {
    failed: Cell<bool>,
    drained: RefCell<Vec<DrainRequest>>,
    quit: Cell<bool>,
}

fn address(port: u32) -> Address {
    let address = SocketAddress {
        address: "127.0.0.1".into(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port)),
        ..Default::default()
    };
    Address { address: Some(address::Address::SocketAddress(address)) }
}

impl AdminSource for Fake {
    fn state(&self) -> pb::server_info::State {
        if self.failed.get() { pb::server_info::State::Draining } else { pb::server_info::State::Live }
    }
    fn server_info(&self) -> pb::ServerInfo {
        pb::ServerInfo { version: "v".into(), ..Default::default() }
    }
    fn clusters(&self) -> Vec<ClusterRow> {
        let host = HostRow {
            address: address(19903),
            address_text: "127.0.0.1:19903".into(),
            counters: vec![
                ("cx_connect_fail", 0),
                ("cx_total", 3),
                ("rq_error", 0),
                ("rq_success", 3),
                ("rq_timeout", 0),
                ("rq_total", 3),
            ],
            gauges: vec![("cx_active", 0), ("rq_active", 0), ("rq_pending_active", 0)],
            weight: 1,
            ..Default::default()
        };
        vec![ClusterRow {
            name: "c1".into(),
            observability_name: "c1".into(),
            hosts: vec![host],
            ..Default::default()
        }]
    }
    fn listeners(&self) -> Vec<ListenerRow> {
        vec![ListenerRow { name: "l1".into(), addresses: vec![(address(19902), "127.0.0.1:19902".into())] }]
    }
    fn certs(&self) -> pb::Certificates {
        pb::Certificates::default()
    }
    fn memory(&self) -> pb::Memory {
        pb::Memory { allocated: 6_551_256, ..Default::default() }
    }
    fn config(&self, section: Section) -> Option<Any> {
        let cluster = |name: &str| pb::clusters_config_dump::StaticCluster {
            cluster: Some(packed(&Cluster {
                name: name.into(),
                alt_stat_name: "x<y".into(),
                ..Default::default()
            })),
            last_updated: None,
        };
        match section {
            Section::Clusters => Some(packed(&pb::ClustersConfigDump {
                version_info: "7".into(),
                static_clusters: vec![cluster("c1"), cluster("d2")],
                ..Default::default()
            })),
            Section::Secrets => Some(packed(&pb::SecretsConfigDump::default())),
            _ => None,
        }
    }
    fn endpoints(&self) -> Vec<(bool, ClusterLoadAssignment)> {
        let of = |name: &str| ClusterLoadAssignment { cluster_name: name.into(), ..Default::default() };
        vec![(false, of("c1")), (true, of("d2"))]
    }
    fn fail_health_check(&self, fail: bool) {
        self.failed.set(fail);
    }
    fn drain_listeners(&self, request: DrainRequest) {
        self.drained.borrow_mut().push(request);
    }
    fn reopen_logs(&self) {}
    fn quit(&self) {
        self.quit.set(true);
    }
}

fn admin() -> (Rc<Fake>, Admin) {
    let (source, store) = (Rc::new(Fake::default()), Store::new());
    let layers = envoy_types::pb::envoy::config::bootstrap::v3::LayeredRuntime {
        layers: vec![envoy_types::pb::envoy::config::bootstrap::v3::RuntimeLayer {
            name: "admin".into(),
            layer_specifier: Some(
                envoy_types::pb::envoy::config::bootstrap::v3::runtime_layer::LayerSpecifier::AdminLayer(
                    Default::default(),
                ),
            ),
        }],
    };
    let runtime = Runtime::from_bootstrap(Some(&layers), &store.root(), "").unwrap();
    (source.clone(), Admin::new(source, store, runtime, AdminModel::default()))
}

fn ask(admin: &Admin, method: &str, path: &str) -> (u16, String) {
    let reply = admin.answer(&Request { method, path, form: "" });
    (reply.status, reply.body)
}

/// The expectations in this file are what Envoy 1.40 answered to the same.
#[test]
fn clusters_and_listeners_are_envoys() {
    let (_, admin) = admin();
    let host = "c1::127.0.0.1:19903::";
    let limits = |p: &str| {
        format!(
            "c1::{p}_priority::max_connections::1024\nc1::{p}_priority::max_pending_requests::1024\n\
             c1::{p}_priority::max_requests::1024\nc1::{p}_priority::max_retries::3\n"
        )
    };
    let rest = [
        "cx_active::0",
        "cx_connect_fail::0",
        "cx_total::3",
        "rq_active::0",
        "rq_error::0",
        "rq_pending_active::0",
        "rq_success::3",
        "rq_timeout::0",
        "rq_total::3",
        "hostname::",
        "health_flags::healthy",
        "weight::1",
        "region::",
        "zone::",
        "sub_zone::",
        "canary::false",
        "priority::0",
        "success_rate::-1",
        "local_origin_success_rate::-1",
    ];
    let expected = format!(
        "c1::observability_name::c1\n{}{}c1::added_via_api::false\n{}",
        limits("default"),
        limits("high"),
        rest.map(|line| format!("{host}{line}\n")).concat()
    );
    assert_eq!(ask(&admin, "GET", "/clusters"), (200, expected));
    assert_eq!(ask(&admin, "GET", "/clusters?filter=zzz"), (200, String::new()));
    assert_eq!(ask(&admin, "GET", "/clusters?filter=("), (400, "Invalid re2 regex".into()));
    let expected = include_str!("testdata/clusters.json");
    assert_eq!(ask(&admin, "GET", "/clusters?format=json"), (200, expected.into()));
    assert_eq!(ask(&admin, "GET", "/listeners"), (200, "l1::127.0.0.1:19902\n".into()));
    let expected = include_str!("testdata/listeners.json");
    assert_eq!(ask(&admin, "GET", "/listeners?format=json"), (200, expected.into()));
}

#[test]
fn commands_want_post_and_reach_the_source() {
    let (source, admin) = admin();
    let expected = (405, "Method GET not allowed, POST required.".to_owned());
    for path in ["/quitquitquit", "/reset_counters", "/logging", "/healthcheck/fail", "/drain_listeners"] {
        assert_eq!(ask(&admin, "GET", path), expected, "{path}");
    }
    assert_eq!(ask(&admin, "POST", "/healthcheck/fail"), (200, "OK\n".into()));
    assert_eq!(ask(&admin, "GET", "/ready"), (503, "DRAINING\n".into()));
    assert_eq!(ask(&admin, "POST", "/healthcheck/ok"), (200, "OK\n".into()));
    assert_eq!(ask(&admin, "GET", "/ready"), (200, "LIVE\n".into()));
    assert_eq!(ask(&admin, "POST", "/drain_listeners?graceful&inboundonly").0, 200);
    let expected = DrainRequest { graceful: true, inbound_only: true, skip_exit: false };
    assert_eq!(source.drained.borrow().as_slice(), [expected]);
    assert!(!source.quit.get());
    assert_eq!(ask(&admin, "POST", "/quitquitquit"), (200, "OK\n".into()));
    assert!(source.quit.get());
}

#[test]
fn small_endpoints_are_envoys() {
    let (_, admin) = admin();
    assert_eq!(ask(&admin, "GET", "/help"), (200, include_str!("testdata/help.txt").into()));
    let (status, body) = ask(&admin, "GET", "/nosuch");
    assert_eq!(
        (status, body.starts_with("invalid path. admin commands are:\n  /: Admin home page\n")),
        (404, true)
    );
    assert_eq!(ask(&admin, "GET", "/certs"), (200, "{\n \"certificates\": []\n}\n".into()));
    assert_eq!(ask(&admin, "GET", "/init_dump"), (200, "{}\n".into()));
    assert_eq!(ask(&admin, "GET", "/hot_restart_version"), (200, "disabled".into()));
    assert!(
        ask(&admin, "GET", "/memory")
            .1
            .starts_with("{\n \"allocated\": \"6551256\",\n \"heap_size\": \"0\",\n")
    );
    assert!(
        ask(&admin, "GET", "/server_info").1.starts_with("{\n \"version\": \"v\",\n \"state\": \"LIVE\",\n")
    );
    assert_eq!(ask(&admin, "POST", "/heapprofiler?enable=y").0, 501);
    assert_eq!(ask(&admin, "POST", "/cpuprofiler"), (400, "?enable=<y|n>\n".into()));
    assert!(ask(&admin, "GET", "/stats/recentlookups").1.starts_with("Lookup tracking is not enabled."));
    assert_eq!(ask(&admin, "POST", "/stats/recentlookups/enable"), (200, "OK\n".into()));
    assert_eq!(ask(&admin, "GET", "/stats/recentlookups"), (200, "   Count Lookup\n\ntotal: 0\n".into()));
}

#[test]
fn stats_parameters_are_checked() {
    let (_, admin) = admin();
    admin.stats.root().counter("a").add(2);
    admin.stats.root().counter("b");
    assert_eq!(ask(&admin, "GET", "/stats?filter=^a"), (200, "a: 2\n".into()));
    assert!(!ask(&admin, "GET", "/stats?usedonly&filter=%5E%5Bab%5D%24").1.contains("b: 0"));
    assert_eq!(ask(&admin, "GET", "/stats?format=json&filter=^a").1, r#"{"stats":[{"name":"a","value":2}]}"#);
    let prometheus = "# TYPE envoy_a counter\nenvoy_a{} 2\n";
    assert_eq!(ask(&admin, "GET", "/stats/prometheus?format=json&filter=^a").1, prometheus);
    assert_eq!(ask(&admin, "GET", "/stats?format=prometheus&filter=^a").1, prometheus);
    let bad = [
        ("format=x", "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"),
        ("type=x", "invalid &type= param"),
        ("hidden=x", "usage: /stats?hidden=(include|only|exclude)\n\n"),
        ("format=prometheus&histogram_buckets=detailed", "unsupported prometheus histogram bucket mode"),
        (
            "histogram_buckets=x",
            "usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n",
        ),
    ];
    for (query, expected) in bad {
        assert_eq!(ask(&admin, "GET", &format!("/stats?{query}")), (400, expected.into()));
    }
    assert!(ask(&admin, "GET", "/stats?filter=(").1.starts_with("Invalid re2 regex: "));
    assert_eq!(ask(&admin, "POST", "/reset_counters"), (200, "OK\n".into()));
    assert_eq!(ask(&admin, "GET", "/stats?filter=^a"), (200, "a: 0\n".into()));
}

#[test]
fn runtime_is_shown_and_changed() {
    let (_, admin) = admin();
    let (status, body) = ask(&admin, "POST", "/runtime_modify");
    assert_eq!((status, body.starts_with("usage: /runtime_modify?key1=value1")), (400, true));
    assert_eq!(ask(&admin, "POST", "/runtime_modify?a.b=5"), (200, "OK\n".into()));
    let form = admin.answer(&Request { method: "POST", path: "/runtime_modify", form: "c=1" });
    assert_eq!(form.body, "OK\n");
    assert_eq!(
        ask(&admin, "GET", "/runtime").1,
        "{\n \"entries\": {\n  \"a.b\": {\n   \"final_value\": \"5\",\n   \"layer_values\": [\n    \"5\"\n   ]\n  },\n  \
         \"c\": {\n   \"final_value\": \"1\",\n   \"layer_values\": [\n    \"1\"\n   ]\n  }\n },\n \"layers\": [\n  \
         \"admin\"\n ]\n}\n"
    );
}

#[test]
fn logging_lists_and_changes_levels() {
    let (_, admin) = admin();
    let (status, body) = ask(&admin, "POST", "/logging?level=&paths=kafka:debug");
    assert_eq!(status, 200);
    assert!(
        body.starts_with("active loggers:\n  a2a: info\n  admin: info\n")
            && body.contains("\n  kafka: debug\n")
    );
    let (status, body) = ask(&admin, "POST", "/logging?nosuch=debug");
    assert_eq!(status, 400);
    assert!(
        body.starts_with(
            "error: unknown logger name\n\nusage: /logging?<name>=<level> (change single level)\n"
        )
    );
    assert!(body.contains("levels: trace debug info warning error critical off \nactive loggers:\n"));
    assert!(ask(&admin, "POST", "/logging?redis=x").1.starts_with("error: unknown logger level\n"));
    assert!(ask(&admin, "POST", "/logging?a=1&b=2").1.starts_with("error: invalid number of parameters\n"));
}

#[test]
fn config_dump_selects_and_masks() {
    let (_, admin) = admin();
    let dump = ask(&admin, "GET", "/config_dump").1;
    assert!(dump.starts_with(
        "{\n \"configs\": [\n  {\n   \"@type\": \"type.googleapis.com/envoy.admin.v3.ClustersConfigDump\",\n   \
         \"version_info\": \"7\",\n   \"static_clusters\": [\n"
    ));
    assert!(dump.contains("x\\u003cy"));
    let d = ask(&admin, "GET", "/config_dump?name_regex=d.*").1;
    assert!(d.contains("\"d2\"") && !d.contains("\"c1\""));
    assert_eq!(
        ask(&admin, "GET", "/config_dump?resource=static_clusters&mask=cluster.name").1.replace([' ', '\n'], ""),
        ["c1", "d2"].map(|name| format!(
            "{{\"@type\":\"type.googleapis.com/envoy.admin.v3.ClustersConfigDump.StaticCluster\",\"cluster\":{{\
             \"@type\":\"type.googleapis.com/envoy.config.cluster.v3.Cluster\",\"name\":\"{name}\"}}}}"
        )).join(",").pipe(|items| format!("{{\"configs\":[{items}]}}"))
    );
    assert_eq!(
        ask(&admin, "GET", "/config_dump?mask=version_info").1.replace([' ', '\n'], ""),
        "{\"configs\":[{\"@type\":\"type.googleapis.com/envoy.admin.v3.ClustersConfigDump\",\"version_info\":\"7\"}]}"
    );
    let endpoints = ask(&admin, "GET", "/config_dump?resource=dynamic_endpoint_configs&include_eds").1;
    assert!(endpoints.contains("\"cluster_name\": \"d2\"") && !endpoints.contains("c1"));
    let missing = ask(&admin, "GET", "/config_dump?resource=dynamic_endpoint_configs");
    assert_eq!(missing.0, 404);
    let mask = "/config_dump?resource=static_clusters&mask=foo";
    let expected = "FieldMask goo.gle/debugproto \npaths: \"foo\"\n could not be successfully used.";
    assert_eq!(ask(&admin, "GET", mask), (400, expected.into()));
    let through_a_list =
        "/config_dump?resource=static_clusters&mask=cluster.load_assignment.endpoints.lb_endpoints";
    assert_eq!(ask(&admin, "GET", through_a_list).0, 400);
    assert_eq!(ask(&admin, "GET", "/config_dump?mask=static_clusters.cluster").0, 400);
    assert_eq!(ask(&admin, "GET", "/config_dump?resource=x"), (404, "x not found in config dump".into()));
    let expected = "FieldMask x could not be successfully applied to any configs.";
    assert_eq!(ask(&admin, "GET", "/config_dump?mask=x"), (400, expected.into()));
    let (status, body) = ask(&admin, "GET", "/config_dump?resource=version_info");
    assert_eq!((status, body.contains("is not a repeated field. Use ?mask=version_info")), (400, true));
    assert_eq!(ask(&admin, "GET", "/config_dump?name_regex=(").0, 400);
}

/// So that a chain of values reads in order.
trait Pipe: Sized {
    fn pipe<T>(self, f: impl FnOnce(Self) -> T) -> T {
        f(self)
    }
}

impl<T> Pipe for T {}

#[test]
fn html_escapes_what_others_named() {
    let (_, admin) = admin();
    admin.stats.root().counter("cluster.<script>alert('x')</script>.rq");
    let body = ask(&admin, "GET", "/stats?format=html").1;
    assert!(body.contains("cluster.&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;.rq: 0"));
    assert!(!body.contains("<script>"));
    let home = ask(&admin, "GET", "/").1;
    assert!(home.contains("<form action='quitquitquit' method='post'") && !home.contains("<logger_name1>"));
}

#[test]
fn paths_outside_the_list_are_refused() {
    use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher};
    let prefix = StringMatcher {
        match_pattern: Some(string_matcher::MatchPattern::Prefix("/stats".into())),
        ignore_case: false,
    };
    let message = envoy_types::pb::envoy::config::bootstrap::v3::Admin {
        allow_paths: vec![prefix],
        ..Default::default()
    };
    let model = AdminModel::parse(&message).unwrap();
    let admin = Admin::new(Rc::new(Fake::default()), Store::new(), Runtime::default(), model);
    assert_eq!(ask(&admin, "GET", "/ready"), (403, "request to path /ready not allowed".into()));
    assert_eq!(ask(&admin, "GET", "/stats?usedonly").0, 200);
    assert_eq!(ask(&admin, "POST", "/stats?x").0, 200);
}

async fn exchange(stream: &mut tokio::net::TcpStream, request: &str, end: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut out = Vec::new();
    while !String::from_utf8_lossy(&out).ends_with(end) {
        assert_ne!(stream.read_buf(&mut out).await.unwrap(), 0, "{}", String::from_utf8_lossy(&out));
    }
    String::from_utf8(out).unwrap()
}

/// The interface behind its listener.
fn served(address: Address) -> (Store, String) {
    let (_, admin) = admin();
    let store = admin.stats.clone();
    let runtime = admin.runtime.clone();
    let known = |_: &str| false;
    let server = sampan_listener::Server::new(
        store.clone(),
        runtime,
        Default::default(),
        Default::default(),
        std::sync::Arc::new(known),
    );
    let message =
        envoy_types::pb::envoy::config::bootstrap::v3::Admin { address: Some(address), ..Default::default() };
    let listener = Listener::new(&AdminModel::parse(&message).unwrap(), &server).unwrap().unwrap();
    let clusters = sampan_upstream::ClusterManager::new(&store.root(), Default::default());
    (store, listener.serve(Rc::new(admin), clusters.clusters()).unwrap())
}

#[tokio::test(flavor = "current_thread")]
async fn the_wire_looks_like_envoys() {
    tokio::task::LocalSet::new().run_until(exchanges()).await;
}

async fn exchanges() {
    let (store, at) = served(address(0));
    let mut stream = tokio::net::TcpStream::connect(&at).await.unwrap();
    let answer = exchange(&mut stream, "GET /ready HTTP/1.1\r\nhost: x\r\n\r\n", "0\r\n\r\n").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<&str> = head.lines().collect();
    assert!(lines.remove(4).starts_with("date: "));
    assert_eq!(
        lines,
        [
            "HTTP/1.1 200 OK",
            "content-type: text/plain; charset=UTF-8",
            "cache-control: no-cache, max-age=0",
            "x-content-type-options: nosniff",
            "server: envoy",
            "transfer-encoding: chunked"
        ]
    );
    assert_eq!(body, "5\r\nLIVE\n\r\n0\r\n\r\n");
    assert_eq!(store.value("listener.admin.downstream_cx_active"), Some(1));
    let form = "POST /runtime_modify HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\
                content-type: application/x-www-form-urlencoded\r\n\r\na=1";
    assert!(exchange(&mut stream, form, "0\r\n\r\n").await.contains("\r\nOK\n\r\n"));
    let old = exchange(&mut stream, "GET /ready HTTP/1.0\r\n\r\n", "Upgrade Required").await;
    assert!(old.contains(" 426 Upgrade Required\r\n"), "{old}");
    assert_eq!(store.value("http.admin.downstream_rq_total"), Some(3));
    assert_eq!(store.value("listener.admin.http.admin.downstream_rq_2xx"), Some(2));
    assert_eq!(store.value("http.admin.downstream_rq_4xx"), Some(1));
}

#[tokio::test(flavor = "current_thread")]
async fn a_unix_socket_replaces_another() {
    tokio::task::LocalSet::new().run_until(over_a_unix_socket()).await;
}

async fn over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("sampan-admin-{}.sock", std::process::id()));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let pipe = UnixSocket { path: path.to_str().unwrap().into(), mode: 0 };
    let (_, at) = served(Address { address: Some(address::Address::Pipe(pipe)) });
    assert_eq!(at, path.to_str().unwrap());
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("LIVE"), "{answer}");
    std::fs::remove_file(&path).unwrap();
}
