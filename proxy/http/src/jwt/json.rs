//! A JSON object from a stranger as a `google.protobuf.Struct`: RFC 8259, no member twice, at most 128 levels.

use std::collections::hash_map::Entry;
use std::fmt;

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Reads an object; none where the text is none.
pub(super) fn object(text: &[u8]) -> Option<Struct> {
    let Json(value) = serde_json::from_slice(text).ok()?;
    match value.kind {
        Some(Kind::StructValue(object)) => Some(object),
        _ => None,
    }
}

/// Escapes the control characters that stand in strings as they are: RFC 8259 forbids them, Envoy's parser does not, and a key that a
/// YAML file folds has line ends in it.
pub(super) fn escaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let (mut string, mut escape) = (false, false);
    for &byte in text {
        if string && byte < b' ' {
            out.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
            continue;
        }
        string ^= byte == b'"' && !escape;
        escape = string && byte == b'\\' && !escape;
        out.push(byte);
    }
    out
}

/// A member as text.
pub(super) enum Text<'o> {
    Missing,
    /// It is there but no text.
    Other,
    Is(&'o str),
}

/// A member of an object that should be text.
pub(super) fn text<'o>(object: &'o Struct, name: &str) -> Text<'o> {
    match object.fields.get(name).map(|value| &value.kind) {
        None => Text::Missing,
        Some(Some(Kind::StringValue(text))) => Text::Is(text),
        Some(_) => Text::Other,
    }
}

struct Json(Value);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader).map(|kind| Self(Value { kind: Some(kind) }))
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::NullValue(0))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::BoolValue(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::NumberValue(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::NumberValue(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
        Ok(Kind::NumberValue(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::StringValue(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Kind, E> {
        Ok(Kind::StringValue(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Kind, A::Error> {
        let mut values = Vec::new();
        while let Some(Json(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Kind::ListValue(ListValue { values }))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kind, A::Error> {
        let mut object = Struct::default();
        while let Some((name, Json(value))) = map.next_entry::<String, Json>()? {
            match object.fields.entry(name) {
                Entry::Occupied(_) => return Err(A::Error::custom("a member stands twice")),
                Entry::Vacant(place) => place.insert(value),
            };
        }
        Ok(Kind::StructValue(object))
    }
}
