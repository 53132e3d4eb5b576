//! `google.protobuf.Any` and what may stand in one.
//!
//! Control planes also send `TypedStruct` (of `xds.type.v3` and `udpa.type.v1`): a type URL with a JSON object in
//! place of the message, so that they need not know its type. Envoy turns it into the message when it uses it, here
//! that is done when it is loaded or unpacked.

use std::borrow::Cow;

use envoy_types::pb::google::protobuf::Any;

use crate::{
    encode::{Encoder, UnknownFields},
    error::{ErrorKind, LoadError, Path},
    group::{self, Grouped},
    json,
    schema::{Message, WellKnown},
    tape::{NodeKind, Tape},
    wire::{self, Value},
};

/// What Envoy puts before the name of a message.
const TYPE_URL_PREFIX: &str = "type.googleapis.com/";

/// Whether `message` is a `TypedStruct`.
pub(crate) fn is_typed_struct(message: Message) -> bool {
    matches!(message.name(), "xds.type.v3.TypedStruct" | "udpa.type.v1.TypedStruct")
}

/// The message that a `TypedStruct` with this type URL is to become. Some take the structure itself.
pub(crate) fn struct_target(type_url: &str) -> Option<Message> {
    Message::of_type_url(type_url).filter(|message| message.well_known() != WellKnown::Struct)
}

/// Writes field 1 of an `Any`.
pub(crate) fn put_type_url(out: &mut Vec<u8>, type_url: &str) {
    if type_url.contains('/') {
        wire::put_bytes(out, 1, type_url.as_bytes());
    } else {
        wire::put_bytes(out, 1, format!("{TYPE_URL_PREFIX}{type_url}").as_bytes());
    }
}

/// Type URL and value of an encoded `Any`. Bytes that are no `Any` give `None`.
pub(crate) fn parts(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (mut type_url, mut value): (&str, &[u8]) = ("", &[]);
    for field in wire::Reader::new(bytes) {
        match field.ok()? {
            (1, Value::Bytes(bytes)) => type_url = std::str::from_utf8(bytes).ok()?,
            (2, Value::Bytes(bytes)) => value = bytes,
            _ => {}
        }
    }
    Some((type_url, value))
}

/// Follows a `TypedStruct` to the message it names: its type URL and bytes. Anything else, and a structure that
/// names no known message, comes back as it is.
///
/// Members that the message does not have are left out: whether they may stand there is what [`crate::check()`] says.
pub fn resolve<'a>(type_url: &'a str, value: &'a [u8]) -> Result<(Cow<'a, str>, Cow<'a, [u8]>), LoadError> {
    resolve_at(type_url, value, UnknownFields::Ignore, &mut Vec::new(), &Path::ROOT)
}

/// [`resolve`] for a whole `Any`, as it stands in an extension's `typed_config`.
pub fn resolved(any: &Any) -> Result<Cow<'_, Any>, LoadError> {
    let (type_url, value) = resolve(&any.type_url, &any.value)?;
    Ok(match (type_url, value) {
        (Cow::Borrowed(_), Cow::Borrowed(_)) => Cow::Borrowed(any),
        (type_url, value) => Cow::Owned(Any { type_url: type_url.into_owned(), value: value.into_owned() }),
    })
}

pub(crate) fn resolve_at<'a>(
    type_url: &'a str,
    value: &'a [u8],
    unknown: UnknownFields,
    left_out: &mut Vec<LoadError>,
    path: &Path<'_>,
) -> Result<(Cow<'a, str>, Cow<'a, [u8]>), LoadError> {
    let outer = Message::of_type_url(type_url).filter(|message| is_typed_struct(*message));
    let Some(outer) = outer else { return Ok((Cow::Borrowed(type_url), Cow::Borrowed(value))) };
    let fields = Grouped::read(outer, value).map_err(|e| path.error(ErrorKind::Syntax, e.to_string()))?;
    let inner_url = match fields.of(outer, 1).last() {
        Some((_, Value::Bytes(bytes))) => std::str::from_utf8(bytes).unwrap_or_default(),
        _ => "",
    };
    let Some(inner) = struct_target(inner_url) else {
        return Ok((Cow::Borrowed(type_url), Cow::Borrowed(value)));
    };
    let structure = group::merged(fields.of(outer, 2));
    let mut tape = Tape::new("");
    let Some(shape) = Message::find("google.protobuf.Struct") else {
        return Ok((Cow::Borrowed(type_url), Cow::Borrowed(value)));
    };
    struct_to_tape(shape, &structure, &mut tape, path)?;
    let encoded = Encoder::new(&tape, unknown).node(inner, path, 0);
    // The tape has no text behind it: a place in it would mislead.
    let (bytes, warnings) = encoded.map_err(|error| LoadError { position: None, ..error })?;
    left_out.extend(warnings.into_iter().map(|error| LoadError { position: None, ..error }));
    let url =
        if inner_url.contains('/') { inner_url.to_owned() } else { format!("{TYPE_URL_PREFIX}{inner_url}") };
    Ok((Cow::Owned(url), Cow::Owned(bytes)))
}

/// A `Struct`, `Value` or `ListValue` as a tape.
fn struct_to_tape(
    message: Message,
    bytes: &[u8],
    tape: &mut Tape<'_>,
    path: &Path<'_>,
) -> Result<(), LoadError> {
    let broken = |e: wire::WireError| path.error(ErrorKind::Syntax, e.to_string());
    if tape.depth() > json::MAX_DEPTH {
        return Err(
            path.error(ErrorKind::TooLarge, format!("more than {} levels of nesting", json::MAX_DEPTH))
        );
    }
    let fields = Grouped::read(message, bytes).map_err(broken)?;
    match message.well_known() {
        WellKnown::Struct => {
            let Some(entry) = message.field(1).and_then(|field| field.message()) else { return Ok(()) };
            let Some(value) = entry.field(2).and_then(|field| field.message()) else { return Ok(()) };
            tape.open(NodeKind::Object, 0);
            // Of equal keys the last one counts.
            let mut entries = std::collections::BTreeMap::new();
            for (_, bytes) in fields.of(message, 1) {
                let Value::Bytes(bytes) = bytes else { continue };
                let entry = group::map_entry(entry, bytes).map_err(broken)?;
                let Some(Value::Bytes(key)) = entry.key.or(Some(Value::Bytes(&[]))) else { continue };
                entries.insert(String::from_utf8_lossy(key).into_owned(), entry.message.unwrap_or_default());
            }
            for (key, content) in entries {
                tape.push_owned(NodeKind::String, &key, 0);
                struct_to_tape(value, &content, tape, path)?;
            }
            tape.close();
        }
        WellKnown::List => {
            let Some(value) = message.field(1).and_then(|field| field.message()) else { return Ok(()) };
            tape.open(NodeKind::Array, 0);
            for (_, bytes) in fields.of(message, 1) {
                let Value::Bytes(bytes) = bytes else { continue };
                struct_to_tape(value, bytes, tape, path)?;
            }
            tape.close();
        }
        _ => return value_to_tape(message, &fields, tape, path),
    }
    Ok(())
}

fn value_to_tape(
    message: Message,
    fields: &Grouped<'_>,
    tape: &mut Tape<'_>,
    path: &Path<'_>,
) -> Result<(), LoadError> {
    for (field, group) in fields.groups(message) {
        let Some((_, value)) = group.last() else { continue };
        match (field.number(), value) {
            (2, Value::Fixed64(bits)) => {
                tape.push_owned(NodeKind::Number, &f64::from_bits(*bits).to_string(), 0);
            }
            (3, Value::Bytes(text)) => tape.push_owned(NodeKind::String, &String::from_utf8_lossy(text), 0),
            (4, Value::Varint(value)) => {
                tape.push_literal(if *value == 0 { NodeKind::False } else { NodeKind::True }, 0);
            }
            (5 | 6, Value::Bytes(_)) => {
                if let Some(inner) = field.message() {
                    return struct_to_tape(inner, &group::merged(group), tape, path);
                }
            }
            _ => tape.push_literal(NodeKind::Null, 0),
        }
        return Ok(());
    }
    tape.push_literal(NodeKind::Null, 0);
    Ok(())
}

/// Unpacks an `Any` as `T`, through a `TypedStruct` if it is one. The bytes are taken to be checked.
pub fn unpack<T: prost::Message + prost::Name + Default>(any: &Any) -> Result<T, LoadError> {
    let (type_url, value) = resolve(&any.type_url, &any.value)?;
    let name = type_url.rsplit('/').next().unwrap_or_default();
    if name != T::full_name() {
        let reason = format!("expected {}, found '{name}'", T::full_name());
        return Err(LoadError::new(ErrorKind::UnknownType, reason));
    }
    T::decode(&*value).map_err(|e| LoadError::new(ErrorKind::Syntax, format!("{name}: {e}")))
}

/// What [`for_each_any`] calls: with path, type URL and bytes.
pub type Visitor<'v, E> = dyn FnMut(&Path<'_>, &str, &[u8]) -> Result<(), E> + 'v;

/// Calls `visit` with path, type URL and bytes of every `Any` in a message, outer ones first and then what stands
/// in them. `visit` gets a `TypedStruct` as the message that it names where that is known.
pub fn for_each_any<E: From<LoadError>>(
    message: Message,
    bytes: &[u8],
    visit: &mut Visitor<'_, E>,
) -> Result<(), E> {
    walk(message, bytes, &Path::ROOT, 0, visit)
}

fn walk<E: From<LoadError>>(
    message: Message,
    bytes: &[u8],
    path: &Path<'_>,
    depth: usize,
    visit: &mut Visitor<'_, E>,
) -> Result<(), E> {
    if depth > json::MAX_DEPTH {
        return Err(path.error(ErrorKind::TooLarge, "nested too deeply").into());
    }
    let broken = |e: wire::WireError| E::from(path.error(ErrorKind::Syntax, e.to_string()));
    if message.well_known() == WellKnown::Any {
        let Some((type_url, value)) = parts(bytes) else {
            return Err(path.error(ErrorKind::Syntax, "not a google.protobuf.Any").into());
        };
        if type_url.is_empty() {
            return Ok(());
        }
        let (type_url, value) = resolve_at(type_url, value, UnknownFields::Ignore, &mut Vec::new(), path)?;
        visit(path, &type_url, &value)?;
        return match Message::of_type_url(&type_url) {
            Some(inner) => walk(inner, &value, path, depth + 1, visit),
            None => Ok(()),
        };
    }
    let fields = Grouped::read(message, bytes).map_err(broken)?;
    for (field, group) in fields.groups(message) {
        let Some(inner) = field.message() else { continue };
        if group.is_empty() || inner.well_known() != WellKnown::No && inner.well_known() != WellKnown::Any {
            continue;
        }
        let at = path.known(field);
        if !field.is_repeated() && !field.is_map() {
            walk(inner, &group::merged(group), &at, depth + 1, visit)?;
            continue;
        }
        for (index, (_, value)) in group.iter().enumerate() {
            let Value::Bytes(bytes) = value else { continue };
            if !field.is_map() {
                walk(inner, bytes, &at.index(index), depth + 1, visit)?;
                continue;
            }
            let entry = group::map_entry(inner, bytes).map_err(broken)?;
            let target = inner.field(2).and_then(|field| field.message());
            if let (Some(target), Some(content)) = (target, entry.message) {
                let key = match entry.key {
                    Some(Value::Bytes(key)) => String::from_utf8_lossy(key).into_owned(),
                    Some(Value::Varint(key)) => key.to_string(),
                    _ => String::new(),
                };
                walk(target, &content, &at.key(&key), depth + 1, visit)?;
            }
        }
    }
    Ok(())
}
