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
    ];
    let all = "bootstrap.yaml: OK\nresponse.json: OK\none.json: OK\ndump.json: OK\nlist.yaml: OK\n";
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
        "part.json: connect_timeout: value must be greater than 0s",
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
fn the_kind_of_a_text_is_told_by_its_members() {
    assert_eq!(kind("resources:\n- a\nversion_info: '1'\n"), Kind::Response);
    assert_eq!(kind("\"@type\": x\nname: y\n"), Kind::Resource);
    assert_eq!(kind("{\"configs\": []}"), Kind::Dump);
    assert_eq!(kind("node:\n  resources: 1\n"), Kind::Bootstrap);
    assert!(Request::parse(&["--what".to_owned(), "file".to_owned()]).is_none());
    assert!(Request::parse(&[]).is_none());
}
