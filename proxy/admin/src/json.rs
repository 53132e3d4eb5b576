//! JSON as Envoy's admin interface writes it.

use envoy_types::pb::google::protobuf::Any;
use prost::Name;
use sampan_config::PrintOptions;
use sampan_config::schema::Message;
use serde_json::Value;

use crate::Reply;

/// A message as JSON; with `defaults`, fields that have their default value too.
pub(crate) fn json_of<T: prost::Message + Name>(message: &T, defaults: bool) -> Reply {
    let options = PrintOptions { pretty: true, redact: true, defaults };
    let bytes = message.encode_to_vec();
    match Message::find(&T::full_name()).map(|m| sampan_config::to_json(m, &bytes, options)) {
        Some(Ok(json)) => Reply::json(json),
        Some(Err(error)) => Reply::error(500, error.to_string()),
        None => Reply::error(500, format!("unknown message {}", T::full_name())),
    }
}

/// A message as an `Any`.
pub(crate) fn packed<T: prost::Message + Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec() }
}

/// JSON indented by one space, with the characters escaped that protobuf's printer escapes.
pub(crate) fn pretty(value: &Value) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    // A `Value` serialises, and a vector takes everything.
    let _ = serde::Serialize::serialize(value, &mut serializer);
    out.push(b'\n');
    // `<` and `>` stand only inside strings.
    String::from_utf8_lossy(&out).replace('<', "\\u003c").replace('>', "\\u003e")
}
