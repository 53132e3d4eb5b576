use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};

use super::read::{Kind, kind};
use super::*;

/// Files of one test, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sampan-check-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The verdict without the folder's name.
fn check(folder: &Folder, arguments: &[String]) -> (bool, String) {
    let verdict = Request::parse(arguments).unwrap().run();
    (verdict.good, verdict.text.replace(&format!("{}/", folder.0.display()), ""))
}

const ROUTES: &str = r#"{"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", "name": "r",
    "virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "c"}}]}]}"#;

#[test]
fn good_files_of_all_kinds() {
    let folder = Folder::new("good");
    let response = format!(r#"{{"version_info": "1", "resources": [{ROUTES}]}}"#);
    let dump = format!(
        r#"{{"configs": [{{"@type": "type.googleapis.com/envoy.admin.v3.RoutesConfigDump",
            "dynamic_route_configs": [{{"version_info": "1", "route_config": {ROUTES}}}]}}]}}"#
    );
    let list = "- \"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster\n  name: c\n  connect_timeout: 1s\n";
    let files = [
        folder.file("bootstrap.yaml", "node: {id: a, cluster: b}\n"),
        folder.file("response.json", &response),
        folder.file("one.json", ROUTES),
        folder.file("dump.json", dump),
        folder.file("list.yaml", list),
        folder.file("said.yaml", format!("# What c is.\n---\n\n{list}")),
    ];
    let all =
        "bootstrap.yaml: OK\nresponse.json: OK\none.json: OK\ndump.json: OK\nlist.yaml: OK\nsaid.yaml: OK\n";
    assert_eq!(check(&folder, &files), (true, all.to_owned()));
}

#[test]
fn what_is_wrong_is_said_of_each_resource() {
    let folder = Folder::new("wrong");
    let response = r#"{"version_info": "1", "resources": [
        {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c", "type": "STATIC", "eds_cluster_config": {}},
        {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "", "connect_timeout": "1s"},
        {"@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "l", "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": "s",
            "tls_certificate": {"certificate_chain": {"inline_string": "no"}, "private_key": {"inline_string": "no"}}},
        {"@type": "type.googleapis.com/envoy.service.runtime.v3.Runtime", "name": "t", "layer": {"a": null}},
        {"@type": "type.googleapis.com/envoy.admin.v3.Memory"}
    ]}"#;
    let part = r#"{"configs": [{"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.DynamicCluster", "version_info": "1",
        "cluster": {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c", "connect_timeout": "0s"}}]}"#;
    let files = [
        folder.file("bad.json", response),
        folder.file("part.json", part),
        folder.file("broken.json", "{"),
        folder.0.join("none").display().to_string(),
    ];
    let (good, text) = check(&folder, &files);
    let lines: Vec<&str> = text.lines().collect();
    assert!(!good);
    let begins = [
        "bad.json: cluster 'c': ",
        "bad.json: name: ",
        "bad.json: listener 'l': filter_chains: no filter chains specified",
        "bad.json: secret 's': ",
        "bad.json: runtime layer 't': Invalid runtime entry value for a",
        "bad.json: envoy.admin.v3.Memory: no such resource is known",
        "part.json: cluster 'c': connect_timeout: value must be greater than 0s",
        "broken.json: ",
        "none: cannot be read: ",
    ];
    assert_eq!(lines.len(), begins.len(), "{text}");
    for (line, begin) in lines.iter().zip(begins) {
        assert!(line.starts_with(begin), "{line:?} should begin with {begin:?}");
    }
}

#[test]
fn unknown_clusters_are_those_that_no_file_has() {
    let folder = Folder::new("clusters");
    let listener = r#"{"@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "l",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "hcm", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "x", "route_config": {"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": "c"}}]}]},
            "http_filters": [{"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}]}}]}]}"#;
    let cluster = |name: &str| {
        format!(r#"{{"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "{name}"}}"#)
    };
    let listener = folder.file("listener.json", listener);
    assert!(check(&folder, std::slice::from_ref(&listener)).0);
    let there = folder.file("there.json", cluster("c"));
    assert!(check(&folder, &[listener.clone(), there]).0);
    let other = folder.file("other.json", cluster("d"));
    let (good, text) = check(&folder, &[listener, other]);
    assert!(!good && text.contains("route: unknown cluster 'c'"), "{text}");
}

#[test]
fn what_changed_is_checked_as_what_there_is() {
    let folder = Folder::new("delta");
    let of = |rest: &str| {
        format!(
            r#"{{"systemVersionInfo": "2", "typeUrl": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            "removedResources": ["gone"], "resources": [{{"name": "h", "version": "1", "ttl": "5s"}}, {rest}]}}"#
        )
    };
    let good = of(&format!(r#"{{"name": "r", "version": "2026-01-01T00:00:00Z/7", "resource": {ROUTES}}}"#));
    let bad = of(&format!(
        r#"{{"name": "r", "version": "1", "resource": {}}}"#,
        ROUTES.replace("prefix\": \"/\"", "safe_regex\": {\"regex\": \"(\"}")
    ));
    let yaml = format!(
        "system_version_info: '2'\nresources:\n- name: r\n  resource: {}\nremoved_resources: [gone]\n",
        ROUTES.replace('\n', " ")
    );
    let list = format!("- name: r\n  version: '1'\n  resource: {}\n", ROUTES.replace('\n', " "));
    let routes = RouteConfiguration { name: "envoy.r/envoy.r".into(), ..Default::default() };
    let any = Any { type_url: RouteConfiguration::type_url(), value: routes.encode_to_vec() };
    let wrapper = |name: &str, any: &Any| Wrapper {
        name: name.into(),
        version: "2026-01-01T00:00:00Z/7".into(),
        resource: Some(any.clone()),
        ..Default::default()
    };
    let delta = DeltaDiscoveryResponse { resources: vec![wrapper("r", &any)], ..Default::default() };
    let twice = DeltaDiscoveryResponse { resources: vec![wrapper("r", &any); 2], ..Default::default() };
    let world = DiscoveryResponse { resources: vec![any], ..Default::default() };
    let other = of(&format!(
        r#"{{"name": "r", "resource": {}}}"#,
        ROUTES.replace("RouteConfiguration", "VirtualHost")
    ));
    let files = [
        folder.file("good.json", &good),
        folder.file("good.yaml", &yaml),
        folder.file("list.yaml", &list),
        folder.file("delta.pb", delta.encode_to_vec()),
        folder.file("world.pb", world.encode_to_vec()),
        folder.file("removed.yaml", "removed_resources: [gone]\n"),
        folder.file("bad.json", &bad),
        folder.file("twice.pb", twice.encode_to_vec()),
        folder.file("other.json", &other),
        folder.file("untyped.json", r#"{"resources": [{"name": "c", "connect_timeout": "1s"}]}"#),
    ];
    let (verdict, text) = check(&folder, &files);
    assert!(!verdict);
    let begins = [
        "good.json: OK",
        "good.yaml: OK",
        "list.yaml: OK",
        "delta.pb: OK",
        "world.pb: OK",
        "removed.yaml: OK",
        "bad.json: route table 'r': ",
        "twice.pb: duplicate name r found among added/updated resources",
        "other.json: type URL type.googleapis.com/envoy.config.route.v3.VirtualHost embedded in an individual Any",
        "untyped.json: 1:16: resources[0]: expected \"@type\"",
    ];
    assert_eq!(text.lines().count(), begins.len(), "{text}");
    for (line, begin) in text.lines().zip(begins) {
        assert!(line.starts_with(begin), "{line:?} should begin with {begin:?}");
    }
}

#[test]
fn a_folder_is_its_files_and_a_response_names_each_once() {
    let folder = Folder::new("folder");
    let cluster = r#"{"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "c"}"#;
    folder.file("b.json", format!(r#"{{"resources": [{cluster}, {ROUTES}, {cluster}]}}"#));
    let typed = r#""type_url": "type.googleapis.com/envoy.config.cluster.v3.Cluster""#;
    folder.file("a.json", format!(r#"{{{typed}, "resources": [{cluster}, {ROUTES}]}}"#));
    folder.file("notes.md", "# none");
    let (good, text) = check(&folder, &[folder.0.display().to_string()]);
    let begins = [
        "a.json: type.googleapis.com/envoy.config.route.v3.RouteConfiguration does not match the message-wide type URL",
        "b.json: cluster 'c': duplicate cluster c found",
    ];
    assert!(!good);
    assert_eq!(text.lines().count(), begins.len(), "{text}");
    for (line, begin) in text.lines().zip(begins) {
        assert!(line.starts_with(begin), "{line:?} should begin with {begin:?}");
    }
}

#[test]
fn the_kind_of_a_text_is_told_by_its_members() {
    assert_eq!(kind("resources:\n- a\nversion_info: '1'\n"), Kind::Response);
    assert_eq!(kind("\"@type\": x\nname: y\n"), Kind::Resource);
    assert_eq!(kind("{\"configs\": []}"), Kind::Dump);
    assert_eq!(kind("node:\n  resources: 1\n"), Kind::Bootstrap);
    assert!(Request::parse(&["--what".to_owned(), "file".to_owned()]).is_none());
    assert!(Request::parse(&[]).is_none());
}
