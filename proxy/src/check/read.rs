//! What a file holds, told by the members at its top; what is binary, by what it decodes as.

use std::path::Path;
use std::time::Instant;

use envoy_types::pb::envoy::admin::v3 as admin;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};
use envoy_types::pb::google::protobuf::value::Kind as Kinds;
use envoy_types::pb::google::protobuf::{Any, Struct, Value};
use prost::Message;
use sampan_config::{Format, LoadOptions, UnknownFields, load_text};
use xds_client::state::delta::Subscription;
use xds_client::state::sotw::Subscription as World;
use xds_client::wire;

use super::{dump, name_of};

/// What a file holds.
pub(super) enum Content {
    /// With its text where that is in no file.
    Bootstrap(Option<String>),
    /// Of a response, where names may stand once.
    Response(Vec<Any>),
    Resources(Vec<Any>),
}

/// What stands for the standard input.
pub(super) const STDIN: &str = "-";

/// Reads a file.
///
/// # Errors
/// What is not even one of these, and what refuses a response as a whole.
pub(super) fn read(file: &Path) -> Result<Content, String> {
    let unread = |e: std::io::Error| format!("cannot be read: {e}");
    if file.as_os_str() == STDIN {
        let text = std::io::read_to_string(std::io::stdin()).map_err(unread)?;
        let format = if text.trim_start().starts_with(['{', '[']) { Format::Json } else { Format::Yaml };
        return match content(format, text.clone())? {
            Content::Bootstrap(_) => Ok(Content::Bootstrap(Some(text))),
            content => Ok(content),
        };
    }
    let bytes = std::fs::read(file).map_err(unread)?;
    let format = Format::of_file(file);
    if format == Format::Binary {
        return binary(&bytes);
    }
    content(format, String::from_utf8(bytes).map_err(|e| e.to_string())?)
}

fn content(format: Format, text: String) -> Result<Content, String> {
    let options = LoadOptions { unknown: UnknownFields::Warn, skip_any: true, ..LoadOptions::default() };
    let start = behind_comments(&text);
    let is_list = start.trim_start().starts_with("- ");
    if is_list || start.trim_start().starts_with('[') {
        // A list of resources is a response without its envelope.
        let text = match format {
            Format::Yaml if is_list => format!("resources:\n{start}"),
            _ => format!("{{\"resources\": {start}}}"),
        };
        return response(format, &text, &options);
    }
    match kind(&text) {
        Kind::Bootstrap => Ok(Content::Bootstrap(None)),
        Kind::Response => response(format, &text, &options),
        Kind::Resource => {
            let any = load_text::<Any>(format, &text, &options).and_then(|any| any.decode());
            any.map(|any| Content::Resources(vec![any])).map_err(|e| e.to_string())
        }
        Kind::Dump => {
            let dump = load_text::<admin::ConfigDump>(format, &text, &options).and_then(|d| d.decode());
            dump.map(|d| Content::Resources(dump::resources(&d))).map_err(|e| e.to_string())
        }
    }
}

/// From the first line on that says something: no comment, and not that a document begins.
fn behind_comments(mut text: &str) -> &str {
    while let Some((line, rest)) = text.split_once('\n') {
        let line = line.trim();
        if !(line.is_empty() || line.starts_with('#') || line == "---") {
            break;
        }
        text = rest;
    }
    text
}

/// All kinds are protobuf. A bootstrap's fields do not make a response whose resources have types, nor do those of one
/// response make the other: where the one has a resource's type, the other has a version or a name.
fn binary(bytes: &[u8]) -> Result<Content, String> {
    let typed = |any: &Any| any.type_url.contains('/') && name_of(any).starts_with("envoy.");
    let response = DiscoveryResponse::decode(bytes).unwrap_or_default();
    if response.resources.iter().any(typed) {
        return world(response);
    }
    match DeltaDiscoveryResponse::decode(bytes) {
        Ok(delta) if delta.resources.iter().filter_map(|r| r.resource.as_ref()).any(typed) => changes(delta),
        _ if response.resources.iter().any(|any| any.type_url.contains('/')) => world(response),
        _ => Ok(Content::Bootstrap(None)),
    }
}

/// Both kinds of response call their resources so; those of a change are wrapped, which those of the other kind say in their
/// `@type`.
fn response(format: Format, text: &str, options: &LoadOptions<'_>) -> Result<Content, String> {
    let members = load_text::<Struct>(format, text, options).and_then(|members| members.decode());
    let is_wrapper = |item: &Value| match &item.kind {
        Some(Kinds::StructValue(item)) => {
            item.fields.contains_key("resource") && !item.fields.contains_key("@type")
        }
        _ => false,
    };
    let wrapped = members.is_ok_and(|members| match members.fields.get("resources").map(|v| &v.kind) {
        Some(Some(Kinds::ListValue(list))) => list.values.iter().any(is_wrapper),
        _ => false,
    });
    if wrapped {
        let delta = load_text::<DeltaDiscoveryResponse>(format, text, options).and_then(|r| r.decode());
        return delta.map_err(|e| e.to_string()).and_then(changes);
    }
    let response = load_text::<DiscoveryResponse>(format, text, options).and_then(|r| r.decode());
    response.map_err(|e| e.to_string()).and_then(world)
}

/// What a stream would refuse as a whole is refused here in its words. A file need not name its type.
fn world(response: DiscoveryResponse) -> Result<Content, String> {
    let whole = wire::DiscoveryResponse::decode(response.encode_to_vec().as_slice());
    let whole = whole.map_err(|e| e.to_string())?;
    if !whole.type_url.is_empty() {
        let (mut stream, now) = (World::new(&whole.type_url), Instant::now());
        let opened = stream.take_apart(whole.resources, &whole.version_info, now);
        opened.map_err(|refusal| refusal.reason)?;
    }
    Ok(Content::Response(response.resources))
}

/// What a stream would refuse as a whole is refused here in its words. What was removed is a name and no more, and a
/// heart-beat has nothing to check.
fn changes(mut delta: DeltaDiscoveryResponse) -> Result<Content, String> {
    delta.resources.retain(|resource| resource.resource.is_some());
    let first = delta.resources.first().and_then(|r| r.resource.as_ref());
    if delta.type_url.is_empty()
        && let Some(first) = first
    {
        delta.type_url = first.type_url.clone();
    }
    let whole = wire::DeltaDiscoveryResponse::decode(delta.encode_to_vec().as_slice());
    let whole = whole.map_err(|e| e.to_string())?;
    Subscription::new(&whole.type_url).take_apart(&whole).map_err(|refusal| refusal.reason)?;
    Ok(Content::Response(delta.resources.into_iter().filter_map(|r| r.resource).collect()))
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bootstrap,
    Response,
    Resource,
    Dump,
}

/// By the members at the top. A text that cannot be read is a bootstrap, whose errors say why.
pub(super) fn kind(text: &str) -> Kind {
    let keys: Vec<String> = match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => map.into_iter().map(|(key, _)| key).collect(),
        _ => text
            .lines()
            .filter(|line| !line.starts_with([' ', '\t', '#', '-']))
            .filter_map(|line| line.trim_start_matches('{').split_once(':'))
            .map(|(key, _)| key.trim().trim_matches(['"', '\'']).to_owned())
            .collect(),
    };
    let has = |key: &str| keys.iter().any(|k| k == key);
    if has("@type") {
        Kind::Resource
    } else if ["resources", "removed_resources", "removedResources"].into_iter().any(has) {
        Kind::Response
    } else if has("configs") {
        Kind::Dump
    } else {
        Kind::Bootstrap
    }
}
