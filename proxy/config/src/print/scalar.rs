//! How single values look in protobuf's JSON: numbers, texts, paths of a field mask.

use crate::{
    schema::{Field, Kind},
    wire::Value,
};

/// A scalar that is no floating point number, as text: also the key of a map.
pub(super) fn text_of(field: Field, value: Value<'_>) -> String {
    match (field.kind(), value) {
        (_, Value::Bytes(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
        (Kind::Bool, Value::Varint(n)) => (n != 0).to_string(),
        (Kind::Int32, Value::Varint(n)) => (n as i32).to_string(),
        (Kind::Int64, Value::Varint(n)) => (n as i64).to_string(),
        (Kind::Uint32, Value::Varint(n)) => (n as u32).to_string(),
        (Kind::Sint32 | Kind::Sint64, Value::Varint(n)) => ((n >> 1) as i64 ^ -((n & 1) as i64)).to_string(),
        (Kind::Sfixed64, Value::Fixed64(n)) => (n as i64).to_string(),
        (Kind::Sfixed32, Value::Fixed32(n)) => (n as i32).to_string(),
        (_, Value::Varint(n) | Value::Fixed64(n)) => n.to_string(),
        (_, Value::Fixed32(n)) => n.to_string(),
    }
}

/// `a_b.c` to `aB.c`.
pub(super) fn camel_path(value: &Value<'_>) -> Option<String> {
    let Value::Bytes(path) = value else { return None };
    let mut out = String::new();
    let mut upper = false;
    for c in String::from_utf8_lossy(path).chars() {
        if c == '_' {
            upper = true;
        } else {
            out.push(if upper { c.to_ascii_uppercase() } else { c });
            upper = false;
        }
    }
    Some(out)
}

/// What C's `%.*g` prints: the form that protobuf uses.
fn general(value: f64, digits: usize) -> String {
    if value == 0.0 {
        return if value.is_sign_negative() { "-0".to_owned() } else { "0".to_owned() };
    }
    let scientific = format!("{value:.*e}", digits - 1);
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if exponent < -4 || exponent >= digits as i32 {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", trim(mantissa), exponent.unsigned_abs());
    }
    trim(&format!("{value:.*}", (digits as i32 - 1 - exponent).max(0) as usize))
}

/// Fifteen digits if they suffice, else seventeen.
pub(super) fn shortest_double(value: f64) -> String {
    let short = general(value, 15);
    if short.parse() == Ok(value) { short } else { general(value, 17) }
}

/// Six digits if they suffice, else nine.
pub(super) fn shortest_single(value: f32) -> String {
    let short = general(f64::from(value), 6);
    if short.parse() == Ok(value) { short } else { general(f64::from(value), 9) }
}

/// Appends a JSON string with the escapes of protobuf's printer: beyond what JSON demands it escapes what is
/// dangerous within HTML and characters that are not to be seen.
pub(super) fn quote(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if escaped(c) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

fn escaped(c: char) -> bool {
    matches!(
        u32::from(c),
        0x00..=0x1f
            | 0x3c
            | 0x3e
            | 0x7f..=0x9f
            | 0xad
            | 0x0600..=0x0603
            | 0x06dd
            | 0x070f
            | 0x17b4
            | 0x17b5
            | 0x200b..=0x200f
            | 0x2028..=0x202e
            | 0x2060..=0x2064
            | 0x206a..=0x206f
            | 0xfeff
            | 0xfff9..=0xfffb
            | 0x1_d173..=0x1_d17a
            | 0xe_0001
            | 0xe_0020..=0xe_007f
    )
}
