//! `/config_dump`: sections, one kind of resource, names by expression, field masks.
//!
//! A mask is applied to the printed JSON, whose names are those of the messages; whether a path exists is asked
//! of the schema first, as Envoy does (an unknown path makes the section not apply, and an index into a list is
//! no path).

use envoy_types::pb::envoy::admin::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message as _, Name as _};
use regex::Regex;
use sampan_config::PrintOptions;
use sampan_config::schema::Message;
use serde_json::{Map, Value};

use crate::json::{json_of, packed};
use crate::source::Section;
use crate::{Admin, Query, Reply};

const ORDER: [Section; 9] = [
    Section::Bootstrap,
    Section::Clusters,
    Section::HttpExtensions,
    Section::NetworkExtensions,
    Section::ListenerExtensions,
    Section::Listeners,
    Section::ScopedRoutes,
    Section::Routes,
    Section::Secrets,
];

fn plain(status: u16, body: String) -> Reply {
    Reply { status, content_type: "text/plain", body }
}

pub(crate) fn config_dump(admin: &Admin, query: &Query) -> Reply {
    let names = match query.get("name_regex").map(|r| (r, Regex::new(&format!("^(?:{r})$")))) {
        None => None,
        Some((_, Ok(regex))) => Some(regex),
        Some((text, Err(error))) => {
            let reason = error.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            let body =
                format!("INVALID_ARGUMENT: Error while parsing name_regex from {text}: {reason}: {text}");
            return plain(400, body);
        }
    };
    let sections = sections(admin, query.has("include_eds"), names.as_ref());
    if !query.has("mask") && !query.has("resource") {
        let configs = sections.into_iter().map(|(_, any)| any).collect();
        return json_of(&pb::ConfigDump { configs }, false);
    }
    let mask: Option<Vec<&str>> = query.get("mask").map(|m| m.split(',').filter(|p| !p.is_empty()).collect());
    let configs = match query.get("resource") {
        Some(resource) => one_resource(&sections, resource, mask.as_deref()),
        None => everything(sections, mask.as_deref()),
    };
    match configs {
        Ok(configs) => Reply::json(pretty(configs)),
        Err(reply) => reply,
    }
}

/// Sections as their message and their JSON, without `@type`.
fn sections(admin: &Admin, endpoints: bool, names: Option<&Regex>) -> Vec<(Message, Any)> {
    let mut sections = Vec::new();
    for section in ORDER {
        if section == Section::Listeners && endpoints {
            let any = endpoints_dump(admin, names);
            sections.extend(Message::of_type_url(&any.type_url).map(|message| (message, any)));
        }
        let Some(mut any) = admin.source.config(section) else { continue };
        if let Some(names) = names {
            any = filtered(any, names);
        }
        if let Some(message) = Message::of_type_url(&any.type_url) {
            sections.push((message, any));
        }
    }
    sections
}

fn endpoints_dump(admin: &Admin, names: Option<&Regex>) -> Any {
    let mut dump = pb::EndpointsConfigDump::default();
    for (added_via_api, assignment) in admin.source.endpoints() {
        if names.is_some_and(|names| !names.is_match(&assignment.cluster_name)) {
            continue;
        }
        let endpoint_config = Some(packed(&assignment));
        if added_via_api {
            dump.dynamic_endpoint_configs.push(pb::endpoints_config_dump::DynamicEndpointConfig {
                endpoint_config,
                ..Default::default()
            });
        } else {
            dump.static_endpoint_configs.push(pb::endpoints_config_dump::StaticEndpointConfig {
                endpoint_config,
                ..Default::default()
            });
        }
    }
    packed(&dump)
}

/// The first field of clusters, listeners and route tables alike.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

fn name_of(any: Option<&Any>) -> String {
    any.and_then(|any| Named::decode(any.value.as_slice()).ok()).unwrap_or_default().name
}

/// Keeps the resources whose name matches.
fn filtered(any: Any, names: &Regex) -> Any {
    fn edit<T: prost::Message + prost::Name + Default>(any: Any, keep: impl Fn(&mut T)) -> Any {
        let Ok(mut message) = T::decode(any.value.as_slice()) else { return any };
        keep(&mut message);
        packed(&message)
    }
    let is = |suffix: &str| any.type_url.ends_with(suffix);
    let named = |any: Option<&Any>| names.is_match(&name_of(any));
    if is(pb::ClustersConfigDump::NAME) {
        return edit::<pb::ClustersConfigDump>(any, |m| {
            m.static_clusters.retain(|c| named(c.cluster.as_ref()));
            m.dynamic_active_clusters.retain(|c| named(c.cluster.as_ref()));
            m.dynamic_warming_clusters.retain(|c| named(c.cluster.as_ref()));
        });
    }
    // `ScopedRoutesConfigDump` ends with `RoutesConfigDump` too.
    if is(&format!(".{}", pb::RoutesConfigDump::NAME)) {
        return edit::<pb::RoutesConfigDump>(any, |m| {
            m.static_route_configs.retain(|c| named(c.route_config.as_ref()));
            m.dynamic_route_configs.retain(|c| named(c.route_config.as_ref()));
        });
    }
    if is(pb::ListenersConfigDump::NAME) {
        return edit::<pb::ListenersConfigDump>(any, |m| {
            m.static_listeners.retain(|l| named(l.listener.as_ref()));
            m.dynamic_listeners.retain(|l| names.is_match(&l.name));
        });
    }
    if is(pb::EcdsConfigDump::NAME) {
        return edit::<pb::EcdsConfigDump>(any, |m| {
            m.ecds_filters.retain(|f| named(f.ecds_filter.as_ref()));
        });
    }
    if is(pb::SecretsConfigDump::NAME) {
        return edit::<pb::SecretsConfigDump>(any, |m| {
            m.static_secrets.retain(|s| names.is_match(&s.name));
            m.dynamic_active_secrets.retain(|s| names.is_match(&s.name));
            m.dynamic_warming_secrets.retain(|s| names.is_match(&s.name));
        });
    }
    any
}

fn json(message: Message, any: &Any) -> Map<String, Value> {
    let options = PrintOptions { pretty: false, redact: true, defaults: false };
    let text = sampan_config::to_json(message, &any.value, options).unwrap_or_default();
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn typed(type_url: &str, fields: Map<String, Value>) -> Value {
    let mut map = Map::new();
    map.insert("@type".into(), type_url.into());
    map.extend(fields);
    Value::Object(map)
}

fn everything(sections: Vec<(Message, Any)>, mask: Option<&[&str]>) -> Result<Vec<Value>, Reply> {
    let mut configs = Vec::new();
    for (message, any) in sections {
        let mut fields = json(message, &any);
        if let Some(mask) = mask {
            if !mask.iter().all(|path| path_exists(message, path)) {
                continue;
            }
            fields = trimmed(&fields, mask);
        }
        configs.push(typed(&any.type_url, fields));
    }
    match mask {
        Some(mask) if configs.is_empty() => {
            let mask = mask.join(",");
            Err(plain(400, format!("FieldMask {mask} could not be successfully applied to any configs.")))
        }
        _ => Ok(configs),
    }
}

fn one_resource(
    sections: &[(Message, Any)],
    resource: &str,
    mask: Option<&[&str]>,
) -> Result<Vec<Value>, Reply> {
    let found = sections.iter().find_map(|(m, any)| Some((*m, any, m.field_by_name(resource)?)));
    let Some((message, any, field)) = found else {
        return Err(plain(404, format!("{resource} not found in config dump")));
    };
    if !field.is_repeated() {
        let body = format!("{resource} is not a repeated field. Use ?mask={resource} to get only this field");
        return Err(plain(400, body));
    }
    let Some(element) = field.message() else { return Ok(Vec::new()) };
    let mut fields = json(message, any);
    let Some(Value::Array(items)) = fields.remove(resource) else { return Ok(Vec::new()) };
    let type_url = format!("type.googleapis.com/{}", element.name());
    let mut configs = Vec::new();
    for item in items {
        let Value::Object(mut item) = item else { continue };
        if let Some(mask) = mask {
            if !mask.iter().all(|path| resource_path_exists(element, &item, path)) {
                let paths: String = mask.iter().map(|p| format!("paths: {p:?}\n")).collect();
                return Err(plain(
                    400,
                    format!("FieldMask goo.gle/debugproto \n{paths} could not be successfully used."),
                ));
            }
            item = trimmed(&item, mask);
        }
        configs.push(typed(&type_url, item));
    }
    Ok(configs)
}

/// Whether the path leads through single messages to a field.
fn path_exists(message: Message, path: &str) -> bool {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    match message.field_by_name(first) {
        None => false,
        Some(_) if rest.is_empty() => true,
        Some(field) => !field.is_repeated() && field.message().is_some_and(|m| path_exists(m, rest)),
    }
}

/// The same, through the `Any` that holds the resource.
fn resource_path_exists(message: Message, item: &Map<String, Value>, path: &str) -> bool {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    let inner = item.get(first).and_then(|v| v.get("@type")).and_then(Value::as_str);
    match inner.and_then(Message::of_type_url) {
        Some(inner) if !rest.is_empty() => path_exists(inner, rest),
        _ => path_exists(message, path),
    }
}

/// Only what the paths name; `@type` stays.
fn trimmed(fields: &Map<String, Value>, paths: &[&str]) -> Map<String, Value> {
    let mut out = Map::new();
    for (key, value) in fields {
        let below: Vec<&str> = paths
            .iter()
            .filter_map(|path| match path.strip_prefix(key.as_str()) {
                Some("") => Some(""),
                Some(rest) => rest.strip_prefix('.'),
                None => None,
            })
            .collect();
        if key == "@type" || below.contains(&"") {
            out.insert(key.clone(), value.clone());
        } else if let (false, Value::Object(inner)) = (below.is_empty(), value) {
            out.insert(key.clone(), Value::Object(trimmed(inner, &below)));
        }
    }
    out
}

/// Indented by one space, with the characters escaped that protobuf's printer escapes.
fn pretty(configs: Vec<Value>) -> String {
    let mut dump = Map::new();
    if !configs.is_empty() {
        dump.insert("configs".into(), Value::Array(configs));
    }
    crate::json::pretty(&Value::Object(dump))
}
