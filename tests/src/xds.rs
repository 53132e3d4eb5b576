//! Files of dynamic resources: written before the subject starts (`files`) and moved over while it serves (`write`).
//!
//! A file `NAME` stands at `{{dir}}/NAME.json` and holds a `DiscoveryResponse`, given as `{version: "1", resources: […]}`; a
//! text is written as it is. A name with a slash is the file's path below `{{dir}}`. A resource is a whole one (with `@type`) or one of these words:
//!
//! | Word | Resource |
//! |---|---|
//! | `cluster: {name: a, …}` | as in `config.clusters`; `eds: FILE` makes it an EDS cluster of that file (`$control_plane`: of that) |
//! | `endpoints: {name: a, to: [a, {to: b, …}], …}` | a ClusterLoadAssignment with one locality; other fields are laid over it |
//! | `routes: {name: t, to: a, …}` | a RouteConfiguration that sends all to a cluster; other fields are laid over it |
//! | `listener: {name: l, …}` | as in `config.listeners` |
//!
//! The files `cds` and `lds` are named in the bootstrap's `dynamic_resources`.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config;
use crate::error::{Context, Result, case_error};
use crate::names::Names;

const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
const ROUTES: &str = "envoy.config.route.v3.RouteConfiguration";
const LISTENER: &str = "envoy.config.listener.v3.Listener";

/// Where a file stands.
pub fn source(name: &str) -> Value {
    json!({ "resource_api_version": "V3", "path_config_source": { "path": format!("{{{{dir}}}}/{name}.json") } })
}

/// Names the files `cds` and `lds` in the bootstrap, and the node that Envoy wants then.
pub fn announce(files: &Map<String, Value>, bootstrap: &mut Value) {
    if files.is_empty() {
        return;
    }
    let mut with = json!({ "node": { "id": "node", "cluster": "cluster" } });
    for name in ["cds", "lds"] {
        if files.contains_key(name) {
            with["dynamic_resources"][format!("{name}_config")] = source(name);
        }
    }
    let given = std::mem::replace(bootstrap, with);
    config::merge(bootstrap, given);
}

/// Puts files into their places, each with one move.
pub fn write(files: &Map<String, Value>, dir: &Path, names: &Names) -> Result<()> {
    for (name, content) in files {
        let text = match content {
            Value::String(text) => names.fill(text)?,
            content => {
                let tree = names.fill_tree(&config::qualified(response(content.clone())?)?)?;
                serde_json::to_string_pretty(&tree).unwrap_or_default()
            }
        };
        let aside = dir.join(format!("{}.new", name.replace('/', "_")));
        let place = if name.contains('/') { dir.join(name) } else { dir.join(format!("{name}.json")) };
        if let Some(folder) = place.parent() {
            std::fs::create_dir_all(folder).trying("make a folder")?;
        }
        std::fs::write(&aside, text).trying("write a file of resources")?;
        std::fs::rename(&aside, place).trying("move a file of resources")?;
    }
    Ok(())
}

fn response(content: Value) -> Result<Value> {
    let mut parts = config::object(Some(content), "a file of resources")?;
    let version = parts.remove("version").unwrap_or("".into());
    let resources = config::array(parts.remove("resources"), "resources")?;
    config::nothing_left(&parts, "a file of resources")?;
    let resources = resources.into_iter().map(resource).collect::<Result<Vec<_>>>()?;
    Ok(json!({ "version_info": version, "resources": resources }))
}

pub(crate) fn resource(given: Value) -> Result<Value> {
    if given.is_null() {
        return Ok(given);
    }
    let mut map = config::object(Some(given), "a resource")?;
    if map.contains_key("@type") {
        return Ok(map.into());
    }
    let Some((word, given)) = map.iter_mut().next() else { return case_error("an empty resource") };
    let mut parts = config::object(Some(given.take()), word)?;
    let name = parts.remove("name").and_then(|n| n.as_str().map(str::to_owned)).unwrap_or_default();
    // A resource with a TTL stands in an envelope.
    let ttl = parts.remove("ttl");
    let (kind, mut message) = match word.as_str() {
        "cluster" => (CLUSTER, cluster(&name, parts)?),
        "endpoints" => (ENDPOINTS, endpoints(&name, parts)?),
        "routes" => (ROUTES, routes(&name, parts)),
        "listener" => (LISTENER, config::listener(&name, parts)?),
        word => return case_error(format!("no resource is called {word}")),
    };
    message["@type"] = kind.into();
    Ok(match ttl {
        Some(ttl) => json!({ "resource": message, "ttl": ttl }),
        None => message,
    })
}

fn cluster(name: &str, mut parts: Map<String, Value>) -> Result<Value> {
    if let Some(file) = parts.remove("eds") {
        parts.insert("type".into(), "EDS".into());
        parts.insert("load_assignment".into(), Value::Null);
        let source = match file.as_str() {
            Some("$control_plane") => file,
            name => source(name.unwrap_or_default()),
        };
        parts.insert("eds_cluster_config".into(), json!({ "eds_config": source }));
    }
    config::cluster(name, parts.into())
}

fn endpoints(name: &str, mut parts: Map<String, Value>) -> Result<Value> {
    let to = config::array(parts.remove("to"), "to")?;
    let list: Vec<Value> = to.into_iter().map(|e| config::endpoint("127.0.0.1", e)).collect();
    let mut message = json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": list }] });
    config::merge(&mut message, parts.into());
    // `localities` are entries of `endpoints` whose endpoints are given by `to`.
    if let Some(Value::Array(localities)) = message.as_object_mut().and_then(|m| m.remove("localities")) {
        let entry = |locality: Value| -> Result<Value> {
            let mut parts = config::object(Some(locality), "localities")?;
            let to = config::array(parts.remove("to"), "to")?;
            let list: Vec<Value> = to.into_iter().map(|e| config::endpoint("127.0.0.1", e)).collect();
            parts.insert("lb_endpoints".into(), list.into());
            Ok(parts.into())
        };
        message["endpoints"] = localities.into_iter().map(entry).collect::<Result<Vec<_>>>()?.into();
    }
    Ok(message)
}

fn routes(name: &str, mut parts: Map<String, Value>) -> Value {
    let to = parts.remove("to").unwrap_or("none".into());
    let mut message = json!({
        "name": name,
        "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
            { "match": { "prefix": "/" }, "route": { "cluster": to } },
        ] }],
    });
    config::merge(&mut message, parts.into());
    message
}
