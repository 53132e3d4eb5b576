//! JSON as Envoy's loggers write it.

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

use super::op::Op;
use super::{FormatContext, Piece, write_pieces};

/// A node of a JSON format.
#[derive(Debug)]
pub(super) enum JsonNode {
    /// `null` in the configuration.
    Null,
    /// A constant, already JSON.
    Raw(Vec<u8>),
    /// One operator: its type is kept.
    Op(Op),
    /// Several pieces: a string.
    Text(Vec<Piece>),
    /// Keys are JSON strings with their colon, sorted.
    Map(Vec<(Vec<u8>, JsonNode)>),
    List(Vec<JsonNode>),
}

/// Writes a node; false where it is left out because it is empty (what was written is to be cut off again).
pub(super) fn write_node(
    node: &JsonNode,
    context: &FormatContext<'_>,
    omit_empty: bool,
    out: &mut Vec<u8>,
) -> bool {
    match node {
        JsonNode::Raw(raw) => out.extend_from_slice(raw),
        JsonNode::Null => return null(omit_empty, out),
        JsonNode::Op(op) => {
            let start = out.len();
            if !op.write_json(context, out) {
                out.truncate(start);
                return null(omit_empty, out);
            }
        }
        JsonNode::Text(pieces) => {
            out.push(b'"');
            write_pieces(pieces, context, omit_empty, true, out);
            out.push(b'"');
        }
        JsonNode::Map(entries) => {
            let mut any = false;
            out.push(b'{');
            for (key, value) in entries {
                let before = out.len();
                if any {
                    out.push(b',');
                }
                out.extend_from_slice(key);
                if write_node(value, context, omit_empty, out) {
                    any = true;
                } else {
                    out.truncate(before);
                }
            }
            out.push(b'}');
            return any || !omit_empty;
        }
        JsonNode::List(values) => {
            let mut any = false;
            out.push(b'[');
            for value in values {
                let before = out.len();
                if any {
                    out.push(b',');
                }
                if write_node(value, context, omit_empty, out) {
                    any = true;
                } else {
                    out.truncate(before);
                }
            }
            out.push(b']');
        }
    }
    true
}

fn null(omit_empty: bool, out: &mut Vec<u8>) -> bool {
    out.extend_from_slice(b"null");
    !omit_empty
}

/// Whether a byte cannot stand in a JSON string as it is, or needs a look at the whole string.
fn needs_care(byte: u8) -> bool {
    !matches!(byte, 0x20..0x7f) || matches!(byte, b'"' | b'\\')
}

/// Escapes what was written behind `start` so that it can stand in a JSON string.
pub(super) fn escape_tail(out: &mut Vec<u8>, start: usize) {
    // Without an early end, so that the compiler looks at many bytes at once: nearly all values are plain.
    if !out[start..].iter().fold(false, |odd, b| odd | needs_care(*b)) {
        return;
    }
    let raw = out.split_off(start);
    escape_into(&raw, out);
}

/// Valid UTF-8 keeps its characters and gets the short escapes; a string that is not gets every odd byte as
/// `\u00xx`. The two ways are Envoy's.
fn escape_into(raw: &[u8], out: &mut Vec<u8>) {
    let valid = std::str::from_utf8(raw).is_ok();
    for &byte in raw {
        match byte {
            _ if !needs_care(byte) => out.push(byte),
            _ if !valid => hex_escape(byte, out),
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            8 => out.extend_from_slice(b"\\b"),
            12 => out.extend_from_slice(b"\\f"),
            0..0x20 => hex_escape(byte, out),
            _ => out.push(byte),
        }
    }
}

fn hex_escape(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend_from_slice(b"\\u00");
    out.push(DIGITS[usize::from(byte >> 4)]);
    out.push(DIGITS[usize::from(byte & 15)]);
}

/// A JSON string with its quotes.
pub fn write_json_string(text: impl AsRef<[u8]>, out: &mut Vec<u8>) {
    out.push(b'"');
    let start = out.len();
    out.extend_from_slice(text.as_ref());
    escape_tail(out, start);
    out.push(b'"');
}

/// A number of a `google.protobuf.Value`: the shorter of plain and scientific notation (`100000` is `1e+05`).
pub fn write_json_number(number: f64, out: &mut Vec<u8>) {
    if number.is_finite() {
        out.extend_from_slice(crate::stats::streamed(number).as_bytes());
    } else {
        out.extend_from_slice(b"null");
    }
}

/// A `google.protobuf.Value`; the keys of structs are sorted.
pub fn write_json_value(value: &Value, out: &mut Vec<u8>) {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => out.extend_from_slice(b"null"),
        Some(Kind::BoolValue(b)) => out.extend_from_slice(if *b { b"true" } else { b"false" }),
        Some(Kind::NumberValue(n)) => write_json_number(*n, out),
        Some(Kind::StringValue(s)) => write_json_string(s, out),
        Some(Kind::StructValue(s)) => write_json_struct(s, out),
        Some(Kind::ListValue(list)) => {
            out.push(b'[');
            for (i, value) in list.values.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_json_value(value, out);
            }
            out.push(b']');
        }
    }
}

pub(super) fn write_json_struct(fields: &Struct, out: &mut Vec<u8>) {
    let mut keys: Vec<_> = fields.fields.iter().collect();
    keys.sort_unstable_by(|a, b| a.0.cmp(b.0));
    out.push(b'{');
    for (i, (key, value)) in keys.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write_json_string(key, out);
        out.push(b':');
        write_json_value(value, out);
    }
    out.push(b'}');
}
