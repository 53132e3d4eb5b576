//! Tables as an operator would write them, and what they do with a request. Expectations of single cases were seen
//! of Envoy 1.40; whole suites of its route checker run in [`router_check`] where they are at hand.

mod actions;
mod lookup;
mod router_check;

use std::rc::Rc;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_config::{Format, LoadOptions, load_text};
use sampan_core::address::Address;
use sampan_core::error::ConfigResult;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::runtime::Runtime;
use sampan_core::stream_info::{ConnectionInfo, StreamInfo};

use super::*;
use crate::filter::HttpFilterRegistry;

pub(super) fn message(yaml: &str) -> pb::RouteConfiguration {
    load_text(Format::Yaml, yaml, &LoadOptions::default()).unwrap().decode().unwrap()
}

fn compile(yaml: &str) -> ConfigResult<RouteTable> {
    let registry = HttpFilterRegistry::default();
    let known = |name: &str| name != "unknown";
    let context = RouteContext { registry: &registry, clusters: &known, validate_clusters: true };
    RouteTable::from_proto(&message(yaml), &context)
}

/// A table whose only virtual host takes all hosts and has these routes, each a line of YAML in flow style.
fn routes(lines: &[&str]) -> RouteTable {
    compile(&with_routes(lines)).unwrap()
}

pub(super) fn with_routes(lines: &[&str]) -> String {
    let mut yaml = "virtual_hosts:\n- name: all\n  domains: [\"*\"]\n  routes:\n".to_owned();
    lines.iter().for_each(|line| yaml.push_str(&format!("  - {line}\n")));
    yaml
}

pub(super) fn info() -> StreamInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    let connection =
        ConnectionInfo::accepted(1, "l".into(), address("127.0.0.1:80"), address("127.0.0.1:4567"));
    StreamInfo::new(1, Rc::new(connection), None)
}

pub(super) fn request(authority: &str, path: &str) -> HeaderMap {
    let mut headers = HeaderMap::default();
    headers.append(HeaderId::METHOD, "GET");
    headers.append(HeaderId::AUTHORITY, authority);
    headers.append(HeaderId::SCHEME, "http");
    headers.append(HeaderId::PATH, path);
    headers.append(HeaderId::X_FORWARDED_PROTO, "http");
    headers
}

fn find(table: &RouteTable, headers: &HeaderMap) -> Option<Found> {
    table.find(&RequestView { headers, info: &info(), random: 0, runtime: &Runtime::default() })
}

/// The number of the route of a path.
fn route_of(table: &RouteTable, path: &str) -> Option<u32> {
    find(table, &request("a", path)).map(|found| found.route)
}

#[test]
fn hosts_are_found_exactly_then_by_longest_suffix_then_by_longest_prefix() {
    let host = |name: &str, domains: &str| {
        format!(
            "- {{name: {name}, domains: [{domains}], \
             routes: [{{match: {{prefix: /}}, route: {{cluster: a}}}}]}}\n"
        )
    };
    let hosts = [
        host("any", "\"*\""),
        host("exact", "a.example.com, \"d.example.com:81\""),
        host("suffix", "\"*.example.com\""),
        host("longer", "\"*.b.example.com\", \"*-x.example.com\""),
        host("prefix", "\"a.*\", \"www.example.*\""),
    ];
    let table = compile(&format!("virtual_hosts:\n{}", hosts.concat())).unwrap();
    let name = |authority: &str| {
        let found = find(&table, &request(authority, "/")).unwrap();
        table.virtual_hosts[found.virtual_host as usize].name.to_string()
    };
    for (authority, expected) in [
        ("a.example.com", "exact"),
        ("A.Example.COM", "exact"),
        ("a.example.com:80", "prefix"),
        ("d.example.com:81", "exact"),
        ("d.example.com", "suffix"),
        ("x.b.example.com", "longer"),
        ("a-x.example.com", "longer"),
        (".b.example.com", "suffix"),
        (".example.com", "any"),
        ("a.", "any"),
        ("a.b", "prefix"),
        ("www.example.com", "suffix"),
        ("www.example.org", "prefix"),
        ("", "any"),
    ] {
        assert_eq!(name(authority), expected, "{authority}");
    }
    let port = compile(
        "{ignore_port_in_host_matching: true, virtual_hosts: [{name: a, domains: [a.example.com], \
         routes: [{match: {prefix: /}, route: {cluster: a}}]}]}",
    )
    .unwrap();
    assert!(find(&port, &request("a.example.com:8080", "/")).is_some());
    assert!(find(&port, &request("b.example.com:8080", "/")).is_none());
}

#[test]
fn duplicate_domains_are_refused() {
    let two = |first: &str, second: &str| {
        let yaml =
            format!("virtual_hosts: [{{name: a, domains: [{first}]}}, {{name: b, domains: [{second}]}}]");
        compile(&yaml).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(two("a", "A").contains("Only unique values for domains are permitted"));
    assert!(two("\"*.a\"", "\"*.A\"").contains("Only unique values for domains are permitted"));
    assert!(two("\"a.*\"", "\"a.*\"").contains("Only unique values for domains are permitted"));
    assert!(two("\"*\"", "\"*\"").contains("Only a single wildcard domain is permitted"));
    assert_eq!(two("\"*.a\"", "\"a.*\""), "");
    let names = compile("virtual_hosts: [{name: a, domains: [a]}, {name: a, domains: [b]}]").err();
    assert!(names.is_none(), "Envoy takes two virtual hosts of one name");
}

#[test]
fn paths_match_as_written() {
    let table = routes(&[
        "{match: {path: /exact}, route: {cluster: a}}",
        "{match: {path: /Case, case_sensitive: false}, route: {cluster: a}}",
        "{match: {path_separated_prefix: /sep}, route: {cluster: a}}",
        "{match: {safe_regex: {regex: \"/re/[0-9]+\"}}, route: {cluster: a}}",
        "{match: {prefix: /Pre, case_sensitive: false}, route: {cluster: a}}",
        "{match: {prefix: /q, query_parameters: [{name: x, string_match: {exact: v}}]}, route: {cluster: a}}",
    ]);
    for (path, expected) in [
        ("/exact", Some(0)),
        ("/exact?x=y", Some(0)),
        ("/exact/", None),
        ("/Exact", None),
        ("/cASE", Some(1)),
        ("/casex", None),
        ("/sep", Some(2)),
        ("/sep/x", Some(2)),
        ("/sep?x", Some(2)),
        ("/separate", None),
        ("/re/12", Some(3)),
        ("/re/12?a", Some(3)),
        ("/re/12x", None),
        ("/x/re/12", None),
        ("/pREfix", Some(4)),
        ("/q", None),
        ("/q?x=v", Some(5)),
        ("/q?x=z", None),
    ] {
        assert_eq!(route_of(&table, path), expected, "{path}");
    }
}

#[test]
fn what_changes_behaviour_and_is_not_done_is_refused_by_name() {
    for (route, field) in [
        ("{match: {prefix: /}, route: {cluster: unknown}}", "unknown cluster 'unknown'"),
        (
            "{match: {prefix: /}, route: {cluster: a, retry_policy_typed_config: {\"@type\": type.googleapis.com/google.protobuf.Empty}}}",
            "retry_policy_typed_config",
        ),
        (
            "{match: {prefix: /}, route: {cluster: a, rate_limits: [{actions: [{remote_address: {}}, \
             {extension: {name: x, typed_config: {\"@type\": type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, \
             header_name: a}}}]}]}}",
            "rate_limits[0].actions[1].extension",
        ),
        (
            "{match: {prefix: /}, route: {cluster: a, prefix_rewrite: /x, \
             regex_rewrite: {pattern: {regex: v}, substitution: z}}}",
            "Specify only one of prefix_rewrite, regex_rewrite",
        ),
        (
            "{match: {prefix: /}, route: {cluster: a}, \
             request_headers_to_add: [{header: {key: \":path\", value: x}}]}",
            ":-prefixed or host headers may not be modified",
        ),
        (
            "{match: {prefix: /}, route: {cluster: a}, response_headers_to_remove: [\":status\"]}",
            ":-prefixed or host headers may not be removed",
        ),
        (
            "{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: a, weight: 0}]}}}",
            "greater than 0",
        ),
    ] {
        let error = compile(&with_routes(&[route])).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(field), "{route}: {error:?}");
    }
}

/// Verdicts that Envoy 1.40 gave in `--mode validate`.
#[test]
fn verdicts_are_those_of_envoy() {
    const ACCEPTED: &str = "";
    let forward =
        |fields: &str| with_routes(&[&format!("{{match: {{prefix: /}}, route: {{cluster: a, {fields}}}}}")]);
    let body = |limit: u32, length: usize| {
        let route = format!(
            "{{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: \"{}\"}}}}}}",
            "x".repeat(length)
        );
        format!("max_direct_response_body_size_bytes: {limit}\n{}", with_routes(&[&route]))
    };
    let mirror = |cluster: &str| {
        format!("request_mirror_policies: [{{cluster: {cluster}}}]\n{}", forward("priority: HIGH"))
    };
    let per_filter = |fields: &str| {
        format!(
            "virtual_hosts: [{{name: v, domains: [v], typed_per_filter_config: {{x: {{\"@type\": \
             type.googleapis.com/envoy.config.route.v3.FilterConfig{fields}}}}}}}]"
        )
    };
    let unknown = "config: {\"@type\": type.googleapis.com/google.protobuf.Struct, value: {}}";
    for (yaml, expected) in [
        (body(5, 5), ACCEPTED),
        (body(5, 6), "response body size is 6 bytes; maximum is 5"),
        (body(5000, 5000), ACCEPTED),
        (mirror("a"), ACCEPTED),
        (mirror("unknown"), "unknown shadow cluster 'unknown'"),
        (format!("validate_clusters: false\n{}", mirror("unknown")), ACCEPTED),
        (forward("request_mirror_policies: [{}]"), "Exactly one of cluster or cluster_header"),
        (forward("request_mirror_policies: [{cluster: a, cluster_header: b}]"), "Only one of cluster 'a'"),
        (
            forward("upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: WebSocket}]"),
            "Duplicate upgrade WebSocket",
        ),
        (forward("hedge_policy: {}"), ACCEPTED),
        (
            forward(
                "hash_policy: [{header: {header_name: x}}, {cookie: {name: c, ttl: 5s}, terminal: true}]",
            ),
            ACCEPTED,
        ),
        (per_filter(""), "Empty route/virtual host per filter configuration for x filter"),
        (per_filter(", disabled: true"), ACCEPTED),
        (per_filter(", config: {}"), ACCEPTED),
        (per_filter(&format!(", {unknown}")), "google.protobuf.Struct"),
        (per_filter(&format!(", is_optional: true, {unknown}")), ACCEPTED),
        (
            with_routes(&[
                "{match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: a}, {name: a, weight: 1}]}}}",
            ]),
            "weight",
        ),
    ] {
        let error = compile(&yaml).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected) && error.is_empty() == expected.is_empty(), "{yaml}: {error:?}");
    }
}

#[test]
fn weighted_clusters_are_picked_by_hash_where_asked() {
    let table = routes(&["{match: {prefix: /}, route: {hash_policy: [{header: {header_name: x}}], \
                          weighted_clusters: {use_hash_policy: true, clusters: \
                          [{name: a, weight: 50}, {name: b, weight: 50}]}}}"]);
    let action = table.virtual_hosts[0].routes[0].action.cluster().unwrap();
    let runtime = Runtime::default();
    let pick = |value: &str, random: u64| {
        let mut headers = request("a", "/");
        headers.append_lower(b"x", value.as_bytes());
        action.pick(|| random, &headers, &info(), &runtime).unwrap()
    };
    // XXH64 of "abc" modulo 100 is 49, that of "a" 55.
    assert_eq!((pick("abc", 0), pick("abc", 99)), (0, 0));
    assert_eq!((pick("a", 0), pick("a", 99)), (1, 1));
    let none = request("a", "/");
    assert_eq!(action.pick(|| 99, &none, &info(), &runtime), Some(1));
    assert_eq!(action.pick(|| 0, &none, &info(), &runtime), Some(0));
}
