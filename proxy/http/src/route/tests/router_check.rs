//! Runs suites in the format of Envoy's route checker: `NAME.yaml` is a `RouteConfiguration`,
//! `NAME.golden.proto.json` lists requests and what shall become of them. Our own stand in `tables`, tried
//! beside Envoy 1.40 but for random numbers and metadata; `SAMPAN_ROUTER_CHECK` names a folder with others.

use std::collections::BTreeMap;
use std::path::Path;

use sampan_core::header::HeaderName;
use sampan_core::matcher::HeaderMatcher;
use serde_json::Value;

use super::*;
use crate::route::ClusterChoice;

/// What happened to a request.
#[derive(Default)]
struct Outcome {
    cluster: String,
    virtual_cluster: String,
    virtual_host: String,
    path: String,
    host: String,
    location: String,
    redirect_code: u64,
    request: HeaderMap,
    response: HeaderMap,
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn append(headers: &mut HeaderMap, extra: &Value) {
    for header in list(extra) {
        headers.append_name(&HeaderName::new(text(header, "key")), text(header, "value"));
    }
}

fn request_of(input: &Value) -> HeaderMap {
    let scheme = if input["ssl"] == true { "https" } else { "http" };
    let mut headers = request(text(input, "authority"), text(input, "path"));
    headers.set(HeaderId::METHOD, text(input, "method"));
    headers.set(HeaderId::SCHEME, scheme);
    headers.set(HeaderId::X_FORWARDED_PROTO, scheme);
    if input["internal"] == true {
        headers.append(HeaderId::X_ENVOY_INTERNAL, "true");
    }
    append(&mut headers, &input["additional_request_headers"]);
    headers
}

fn info_of(input: &Value) -> StreamInfo {
    use envoy_types::pb::google::protobuf::Struct;
    let mut info = info();
    for metadata in list(&input["dynamic_metadata"]) {
        let value: Struct = load_text(Format::Json, &metadata["value"].to_string(), &LoadOptions::default())
            .unwrap()
            .decode()
            .unwrap();
        let namespace = text(metadata, "metadata_namespace");
        let fresh = info.dynamic_metadata.as_ref().is_none_or(|m| !m.contains_key(namespace));
        let fields = &mut info.dynamic_metadata_mut(namespace).fields;
        if fresh || metadata["allow_overwrite"] == true {
            fields.extend(value.fields);
        }
    }
    info
}

/// The checker switches a runtime fraction on where the case names its key, and off elsewhere.
fn runtime_of(config: &pb::RouteConfiguration, active: &str) -> Runtime {
    let mut values = BTreeMap::new();
    for route in config.virtual_hosts.iter().flat_map(|h| &h.routes) {
        if let Some(fraction) = route.r#match.as_ref().and_then(|m| m.runtime_fraction.as_ref())
            && fraction.runtime_key != active
        {
            values.insert(fraction.runtime_key.clone(), "0".to_owned());
        }
    }
    Runtime::new(values)
}

fn run(table: &RouteTable, config: &pb::RouteConfiguration, input: &Value) -> Outcome {
    let mut headers = request_of(input);
    let info = info_of(input);
    let mut out = Outcome::default();
    append(&mut out.response, &input["additional_response_headers"]);
    let random = number(&input["random_value"]);
    let runtime = runtime_of(config, text(input, "runtime"));
    let view = RequestView { headers: &headers, info: &info, random, runtime: &runtime };
    let found = table.find(&view);
    if let Some(found) = found {
        let (host, route) = table.levels(found);
        let virtual_cluster =
            host.virtual_cluster(&headers).map(|c| c.counted.name.to_string()).unwrap_or_default();
        match route.map(|r| &r.action) {
            Some(Action::Cluster(action)) => {
                let weighted = action.pick(|| random, &headers, &info, &runtime);
                out.cluster = match &action.choice {
                    ClusterChoice::Header(name) if headers.get_name(name).is_none() => String::new(),
                    _ => action.cluster_name(weighted, &headers).unwrap_or_default().to_string(),
                };
                out.virtual_host = host.name.to_string();
                out.virtual_cluster = virtual_cluster;
                let route = route.unwrap();
                for level in [&route.mutations, &host.mutations, &table.mutations] {
                    level.request.apply_to_request(&mut headers, &info);
                }
                action.rewrite(route, &mut headers, &info, true);
                out.path = headers.get_str(HeaderId::PATH).unwrap().to_owned();
                out.host = headers.get_str(HeaderId::AUTHORITY).unwrap().to_owned();
            }
            Some(Action::Redirect(redirect)) => {
                out.redirect_code = redirect.status().into();
                out.location = String::from_utf8(redirect.location(route, &headers, &info)).unwrap();
            }
            None => {
                let redirect = Redirect::to_https();
                out.redirect_code = redirect.status().into();
                out.location = String::from_utf8(redirect.location(None, &headers, &info)).unwrap();
            }
            Some(Action::Direct(direct)) => {
                out.redirect_code = direct.status.into();
                // The checker shows the request's own address for a direct response.
                let own = ["scheme", "authority", "path"].map(|n| {
                    let name = HeaderName::new(format!(":{n}"));
                    String::from_utf8_lossy(headers.get_name(&name).unwrap()).into_owned()
                });
                out.location = format!("{}://{}{}", own[0], own[1], own[2]);
                if !direct.body.is_empty() {
                    out.response.append(HeaderId::CONTENT_LENGTH, direct.body.len().to_string());
                    out.response.append(HeaderId::CONTENT_TYPE, "text/plain");
                }
            }
        }
        let levels = [route.map(|r| &r.mutations), Some(&host.mutations), Some(&table.mutations)];
        for level in levels.into_iter().flatten() {
            level.response.apply_to_response(&mut out.response, &headers, &info);
        }
    }
    out.request = headers;
    out
}

fn check(expected: &Value, outcome: &Outcome) -> Vec<String> {
    let mut wrong = Vec::new();
    let texts = [
        ("cluster_name", &outcome.cluster),
        ("virtual_cluster_name", &outcome.virtual_cluster),
        ("virtual_host_name", &outcome.virtual_host),
        ("path_rewrite", &outcome.path),
        ("host_rewrite", &outcome.host),
        ("path_redirect", &outcome.location),
    ];
    for (key, actual) in texts {
        if let Some(expected) = expected[key].as_str()
            && expected != actual
        {
            wrong.push(format!("{key}: expected {expected:?}, is {actual:?}"));
        }
    }
    if !expected["code_redirect"].is_null() && number(&expected["code_redirect"]) != outcome.redirect_code {
        wrong.push(format!("code_redirect: is {}", outcome.redirect_code));
    }
    for (side, headers) in [("request", &outcome.request), ("response", &outcome.response)] {
        for matcher in list(&expected[format!("{side}_header_matches")]) {
            let message = load_text(Format::Json, &matcher.to_string(), &LoadOptions::default()).unwrap();
            if !HeaderMatcher::from_proto(&message.decode().unwrap()).unwrap().matches(headers) {
                wrong.push(format!("{side} header: {matcher}"));
            }
        }
        for header in list(&expected[format!("{side}_header_fields")]) {
            let actual = headers.get_name(&HeaderName::new(text(header, "key"))).unwrap_or_default();
            if actual != text(header, "value").as_bytes() {
                wrong.push(format!("{side} header: {header}"));
            }
        }
    }
    wrong
}

/// The number of cases of a suite and what went wrong.
fn suite(config: &Path, golden: &Path) -> (usize, Vec<String>) {
    let name = golden.file_name().unwrap().to_string_lossy().into_owned();
    let mut config = message(&std::fs::read_to_string(config).unwrap());
    for route in config.virtual_hosts.iter_mut().flat_map(|h| &mut h.routes) {
        let fraction = route.r#match.as_mut().and_then(|m| m.runtime_fraction.as_mut());
        // As the checker does it: a fraction of nothing could never be tested.
        if let Some(percent) = fraction.and_then(|f| f.default_value.as_mut())
            && percent.numerator == 0
        {
            percent.numerator = 1;
        }
    }
    let registry = HttpFilterRegistry::default();
    let context = RouteContext { registry: &registry, clusters: &|_: &str| true, validate_clusters: false };
    let table = match RouteTable::from_proto(&config, &context) {
        Ok(table) => table,
        Err(e) => return (0, vec![format!("{name}: {e}")]),
    };
    let golden = std::fs::read_to_string(golden).unwrap();
    let golden = regex::Regex::new(r",(\s*[\]}])").unwrap().replace_all(&golden, "$1");
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let mut wrong = Vec::new();
    for case in list(&golden["tests"]) {
        for fault in check(&case["validate"], &run(&table, &config, &case["input"])) {
            wrong.push(format!("{name}: {}: {fault}", text(case, "test_name")));
        }
    }
    (list(&golden["tests"]).len(), wrong)
}

#[test]
fn our_own_tables() {
    run_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/route/tests/tables"));
}

#[test]
fn suites_of_the_route_checker() {
    if let Some(folder) = std::env::var_os("SAMPAN_ROUTER_CHECK") {
        run_folder(Path::new(&folder));
    }
}

fn run_folder(folder: &Path) {
    let mut cases = 0;
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let golden = entry.unwrap().path();
        let name = golden.file_name().unwrap().to_string_lossy().into_owned();
        // One suite consists of cases that are meant to fail.
        if let Some(suite_name) = name.strip_suffix(".golden.proto.json")
            && !suite_name.ends_with("Failures")
        {
            let (count, faults) = suite(&golden.with_file_name(format!("{suite_name}.yaml")), &golden);
            cases += count;
            wrong.extend(faults);
        }
    }
    assert!(wrong.is_empty(), "of {cases} cases:\n{}", wrong.join("\n"));
    assert!(cases > 0, "no suites in the folder");
    println!("{cases} cases");
}
