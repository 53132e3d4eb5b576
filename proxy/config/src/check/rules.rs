//! The constraints of protoc-gen-validate.
//!
//! A field's rules are the bytes of `validate.FieldRules` as they stand in the schema; they are short, so they are
//! read anew for every value. The reasons are worded as the generated C++ validators word them.
//!
//! Here stand the rules of fields, of what repeats and of messages; those of one value are in [`number`] and [`text`].

mod format;
mod number;
mod text;

use std::borrow::Cow;

use crate::{
    error::{ErrorKind, LoadError, Path},
    group::{Grouped, default_of},
    schema::{Field, Kind, Message, WellKnown},
    wire::{Reader, Value, WireError},
};

use number::{Limits, Number};

/// Numbers of `FieldRules` that are not those of numbers (1 to 12 have one shape, see [`number::number_kind`]).
mod kind {
    pub(super) const BOOL: u32 = 13;
    pub(super) const STRING: u32 = 14;
    pub(super) const BYTES: u32 = 15;
    pub(super) const ENUM: u32 = 16;
    pub(super) const MESSAGE: u32 = 17;
    pub(super) const REPEATED: u32 = 18;
    pub(super) const MAP: u32 = 19;
    pub(super) const ANY: u32 = 20;
    pub(super) const DURATION: u32 = 21;
    pub(super) const TIMESTAMP: u32 = 22;
}

fn fields(rules: &[u8]) -> impl Iterator<Item = (u32, Value<'_>)> {
    // The schema's bytes are well formed; its test reads them all.
    Reader::new(rules).map_while(Result::ok)
}

fn parts(rules: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    fields(rules).filter_map(|(number, value)| match value {
        Value::Bytes(bytes) => Some((number, bytes)),
        _ => None,
    })
}

fn of(rules: &[u8], wanted: u32) -> Option<&[u8]> {
    parts(rules).find(|(number, _)| *number == wanted).map(|(_, bytes)| bytes)
}

fn flag(rules: &[u8], wanted: u32) -> bool {
    fields(rules).any(|(number, value)| number == wanted && value != Value::Varint(0))
}

fn violated(path: &Path<'_>, reason: impl Into<String>) -> LoadError {
    path.error(ErrorKind::Constraint, reason)
}

/// What makes two elements the same.
pub(super) fn bits(value: &Value<'_>) -> Vec<u8> {
    match value {
        Value::Varint(n) | Value::Fixed64(n) => n.to_le_bytes().to_vec(),
        Value::Fixed32(n) => n.to_le_bytes().to_vec(),
        Value::Bytes(bytes) => bytes.to_vec(),
    }
}

/// A value for an error message or a path.
pub(super) fn show<'a>(field: Field, value: &Value<'a>) -> Cow<'a, str> {
    match (field.kind(), value) {
        (_, Value::Bytes(bytes)) => String::from_utf8_lossy(bytes),
        (Kind::Bool, Value::Varint(n)) => Cow::Borrowed(if *n == 0 { "false" } else { "true" }),
        _ => Cow::Owned(Number::of(field.kind(), value).map(|n| n.to_string()).unwrap_or_default()),
    }
}

/// Rules of a field that is not there.
pub(super) fn absent(field: Field, rules: &[u8], path: &Path<'_>) -> Result<(), LoadError> {
    // A member of a oneof that is not set has no rules to keep.
    if rules.is_empty() || field.oneof().is_some() {
        return Ok(());
    }
    if field.is_map() {
        return Map::read(rules).check(0, path);
    }
    if field.is_repeated() {
        return Repeated::read(rules).check(0, path);
    }
    if field.kind() == Kind::Message {
        let required = parts(rules).any(|(number, rules)| match number {
            kind::MESSAGE => flag(rules, 2),
            kind::ANY | kind::DURATION | kind::TIMESTAMP => flag(rules, 1),
            _ => false,
        });
        return if required { Err(violated(path, "value is required")) } else { Ok(()) };
    }
    if field.has_presence() {
        return Ok(());
    }
    scalar(field, &default_of(field), rules, path)
}

/// Rules of a repeated field.
#[derive(Default)]
pub(super) struct Repeated<'r> {
    size: Size,
    pub(super) unique: bool,
    pub(super) items: &'r [u8],
}

impl<'r> Repeated<'r> {
    pub(super) fn read(rules: &'r [u8]) -> Self {
        let mut out = Self::default();
        for (number, value) in of(rules, kind::REPEATED).into_iter().flat_map(fields) {
            match (number, value) {
                (1, Value::Varint(n)) => out.size.min = n,
                (2, Value::Varint(n)) => out.size.max = Some(n),
                (3, Value::Varint(n)) => out.unique = n != 0,
                (4, Value::Bytes(rules)) => out.items = rules,
                (5, Value::Varint(n)) => out.size.ignore_empty = n != 0,
                _ => {}
            }
        }
        out
    }

    pub(super) fn check(&self, count: usize, path: &Path<'_>) -> Result<(), LoadError> {
        self.size.check(count, "item(s)", path)
    }
}

/// Rules of a map.
#[derive(Default)]
pub(super) struct Map<'r> {
    size: Size,
    pub(super) keys: &'r [u8],
    pub(super) values: &'r [u8],
}

impl<'r> Map<'r> {
    pub(super) fn read(rules: &'r [u8]) -> Self {
        let mut out = Self::default();
        for (number, value) in of(rules, kind::MAP).into_iter().flat_map(fields) {
            match (number, value) {
                (1, Value::Varint(n)) => out.size.min = n,
                (2, Value::Varint(n)) => out.size.max = Some(n),
                (4, Value::Bytes(rules)) => out.keys = rules,
                (5, Value::Bytes(rules)) => out.values = rules,
                (6, Value::Varint(n)) => out.size.ignore_empty = n != 0,
                _ => {}
            }
        }
        out
    }

    pub(super) fn check(&self, count: usize, path: &Path<'_>) -> Result<(), LoadError> {
        self.size.check(count, "pair(s)", path)
    }
}

/// How many elements there may be.
#[derive(Default)]
struct Size {
    min: u64,
    max: Option<u64>,
    ignore_empty: bool,
}

impl Size {
    fn check(&self, count: usize, what: &str, path: &Path<'_>) -> Result<(), LoadError> {
        let count = count as u64;
        if self.ignore_empty && count == 0 {
            return Ok(());
        }
        let min = self.min;
        if count < min {
            return Err(violated(path, format!("value must contain at least {min} {what}")));
        }
        match self.max {
            Some(max) if count > max => {
                Err(violated(path, format!("value must contain no more than {max} {what}")))
            }
            _ => Ok(()),
        }
    }
}

/// Rules of a message that is there. Says whether what is within is to be checked.
pub(super) fn message(
    message: Message,
    bytes: &[u8],
    rules: &[u8],
    path: &Path<'_>,
) -> Result<bool, LoadError> {
    let mut descend = true;
    for (number, rules) in parts(rules) {
        match number {
            kind::MESSAGE => descend &= !flag(rules, 1),
            kind::ANY => any(bytes, rules, path)?,
            kind::DURATION | kind::TIMESTAMP => time(message, bytes, rules, path)?,
            _ => {}
        }
    }
    if message.well_known() == WellKnown::Wrapper
        && let Some(field) = message.field(1)
    {
        let fields =
            Grouped::read(message, bytes).map_err(|e| path.error(ErrorKind::Syntax, e.to_string()))?;
        match fields.of(message, 1).last() {
            Some((_, value)) => scalar(field, value, rules, path)?,
            None => absent(field, rules, path)?,
        }
    }
    Ok(descend)
}

fn any(bytes: &[u8], rules: &[u8], path: &Path<'_>) -> Result<(), LoadError> {
    let type_url = crate::any::parts(bytes).map_or("", |(type_url, _)| type_url);
    let list =
        |wanted: u32| parts(rules).filter(move |(number, _)| *number == wanted).map(|(_, bytes)| bytes);
    let mut allowed = list(2).peekable();
    if allowed.peek().is_some() && !allowed.any(|one| one == type_url.as_bytes()) {
        return Err(violated(path, format!("type URL '{type_url}' is not in the list of those allowed")));
    }
    if list(3).any(|one| one == type_url.as_bytes()) {
        return Err(violated(path, format!("type URL '{type_url}' is not allowed")));
    }
    Ok(())
}

/// Seconds and nanoseconds of a `Duration` or `Timestamp`.
pub(super) fn time_of(message: Message, bytes: &[u8]) -> Result<(i64, i32), WireError> {
    let fields = Grouped::read(message, bytes)?;
    let value = |number: u32| match fields.of(message, number).last() {
        Some((_, Value::Varint(n))) => *n,
        _ => 0,
    };
    Ok((value(1) as i64, value(2) as i32))
}

/// Rules of durations and timestamps: `required`, then the bounds as numbers have them.
fn time(message: Message, bytes: &[u8], rules: &[u8], path: &Path<'_>) -> Result<(), LoadError> {
    let broken = |e: WireError| path.error(ErrorKind::Syntax, e.to_string());
    let value = time_of(message, bytes).map_err(broken)?;
    let mut limits: Limits<(i64, i32)> = Limits::default();
    for (number, limit) in parts(rules) {
        limits.take(number - 1, time_of(message, limit).map_err(broken)?);
    }
    limits
        .check(value, |(seconds, nanos)| crate::time::format_duration(*seconds, *nanos))
        .map_err(|reason| violated(path, reason))
}

/// Rules of one scalar value.
pub(super) fn scalar(
    field: Field,
    value: &Value<'_>,
    rules: &[u8],
    path: &Path<'_>,
) -> Result<(), LoadError> {
    for (number, rules) in parts(rules) {
        let checked = match (number, value) {
            (kind::STRING, Value::Bytes(bytes)) => text::string(bytes, rules),
            (kind::BYTES, Value::Bytes(value)) => text::bytes(value, rules),
            (kind::ENUM, Value::Varint(n)) => number::enumeration(field, *n as i32, rules),
            (kind::BOOL, Value::Varint(n)) => number::boolean(*n != 0, rules),
            _ => match number::number_kind(number) {
                Some(kind) => number::numeric(kind, value, rules),
                None => Ok(()),
            },
        };
        checked.map_err(|reason| violated(path, reason))?;
    }
    Ok(())
}
