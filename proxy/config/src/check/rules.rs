//! The constraints of protoc-gen-validate.
//!
//! A field's rules are the bytes of `validate.FieldRules` as they stand in the schema; they are short, so they are
//! read anew for every value. The reasons are worded as the generated C++ validators word them.

use std::{
    borrow::Cow,
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, OnceLock},
};

use regex::bytes::{Regex, RegexBuilder};

use crate::{
    error::{ErrorKind, LoadError, Path},
    group::Grouped,
    schema::{Field, Kind, Message, WellKnown},
    wire::{Reader, Value, WireError},
};

/// Numbers of `FieldRules` that are not those of scalars (1 to 13 have one shape, see [`number`]).
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
    let value = match field.kind().wire_type() {
        1 => Value::Fixed64(0),
        2 => Value::Bytes(&[]),
        5 => Value::Fixed32(0),
        _ => Value::Varint(0),
    };
    scalar(field, &value, rules, path)
}

/// Rules of a repeated field.
#[derive(Default)]
pub(super) struct Repeated<'r> {
    min: u64,
    max: Option<u64>,
    pub(super) unique: bool,
    pub(super) items: &'r [u8],
    ignore_empty: bool,
}

impl<'r> Repeated<'r> {
    pub(super) fn read(rules: &'r [u8]) -> Self {
        let mut out = Self::default();
        for (number, value) in of(rules, kind::REPEATED).into_iter().flat_map(fields) {
            match (number, value) {
                (1, Value::Varint(n)) => out.min = n,
                (2, Value::Varint(n)) => out.max = Some(n),
                (3, Value::Varint(n)) => out.unique = n != 0,
                (4, Value::Bytes(rules)) => out.items = rules,
                (5, Value::Varint(n)) => out.ignore_empty = n != 0,
                _ => {}
            }
        }
        out
    }

    pub(super) fn check(&self, count: usize, path: &Path<'_>) -> Result<(), LoadError> {
        size(count, self.min, self.max, self.ignore_empty, "item(s)", path)
    }
}

/// Rules of a map.
#[derive(Default)]
pub(super) struct Map<'r> {
    min: u64,
    max: Option<u64>,
    pub(super) keys: &'r [u8],
    pub(super) values: &'r [u8],
    ignore_empty: bool,
}

impl<'r> Map<'r> {
    pub(super) fn read(rules: &'r [u8]) -> Self {
        let mut out = Self::default();
        for (number, value) in of(rules, kind::MAP).into_iter().flat_map(fields) {
            match (number, value) {
                (1, Value::Varint(n)) => out.min = n,
                (2, Value::Varint(n)) => out.max = Some(n),
                (4, Value::Bytes(rules)) => out.keys = rules,
                (5, Value::Bytes(rules)) => out.values = rules,
                (6, Value::Varint(n)) => out.ignore_empty = n != 0,
                _ => {}
            }
        }
        out
    }

    pub(super) fn check(&self, count: usize, path: &Path<'_>) -> Result<(), LoadError> {
        size(count, self.min, self.max, self.ignore_empty, "pair(s)", path)
    }
}

fn size(
    count: usize,
    min: u64,
    max: Option<u64>,
    ignore_empty: bool,
    what: &str,
    path: &Path<'_>,
) -> Result<(), LoadError> {
    let count = count as u64;
    if ignore_empty && count == 0 {
        return Ok(());
    }
    if count < min {
        return Err(violated(path, format!("value must contain at least {min} {what}")));
    }
    match max {
        Some(max) if count > max => {
            Err(violated(path, format!("value must contain no more than {max} {what}")))
        }
        _ => Ok(()),
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
            kind::DURATION => time(message, bytes, rules, 1, path)?,
            kind::TIMESTAMP => time(message, bytes, rules, 1, path)?,
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

/// Rules of durations and timestamps: `required` has the number `first`, then follow const and the bounds.
fn time(message: Message, bytes: &[u8], rules: &[u8], first: u32, path: &Path<'_>) -> Result<(), LoadError> {
    let broken = |e: WireError| path.error(ErrorKind::Syntax, e.to_string());
    let value = time_of(message, bytes).map_err(broken)?;
    let mut limits: Limits<(i64, i32)> = Limits::default();
    for (number, limit) in parts(rules) {
        let limit = time_of(message, limit).map_err(broken)?;
        match number - first {
            1 => limits.equal = Some(limit),
            2 => limits.less = Some((limit, false)),
            3 => limits.less = Some((limit, true)),
            4 => limits.greater = Some((limit, false)),
            5 => limits.greater = Some((limit, true)),
            6 => limits.within.push(limit),
            7 => limits.without.push(limit),
            _ => {}
        }
    }
    limits
        .check(value, |(seconds, nanos)| crate::time::format_duration(*seconds, *nanos))
        .map_err(|reason| violated(path, reason))
}

/// The bounds that numbers, durations and timestamps have in common. A bound is inclusive if its flag says so.
struct Limits<T> {
    equal: Option<T>,
    less: Option<(T, bool)>,
    greater: Option<(T, bool)>,
    within: Vec<T>,
    without: Vec<T>,
}

impl<T> Default for Limits<T> {
    fn default() -> Self {
        Self { equal: None, less: None, greater: None, within: Vec::new(), without: Vec::new() }
    }
}

impl<T: PartialOrd + Copy> Limits<T> {
    fn check(&self, value: T, show: impl Fn(&T) -> String) -> Result<(), String> {
        if let Some(equal) = &self.equal
            && value != *equal
        {
            return Err(format!("value must equal {}", show(equal)));
        }
        // A value that compares with nothing (NaN) passes all bounds, as it does in C++.
        let above = self.less.filter(|(limit, inclusive)| value > *limit || !inclusive && value == *limit);
        let below = self.greater.filter(|(limit, inclusive)| value < *limit || !inclusive && value == *limit);
        match (self.less, self.greater) {
            // A lower bound above the upper one means: outside of the two.
            (Some((less, _)), Some((greater, _))) if less < greater => {
                if above.is_some() && below.is_some() {
                    return Err(format!("value must be outside range {} to {}", show(&less), show(&greater)));
                }
            }
            (Some((less, up)), Some((greater, down))) if above.is_some() || below.is_some() => {
                let (open, close) = (if down { '[' } else { '(' }, if up { ']' } else { ')' });
                return Err(format!(
                    "value must be inside range {open}{}, {}{close}",
                    show(&greater),
                    show(&less)
                ));
            }
            _ => {
                if let Some((limit, inclusive)) = above {
                    let or_equal = if inclusive { " or equal to" } else { "" };
                    return Err(format!("value must be less than{or_equal} {}", show(&limit)));
                }
                if let Some((limit, inclusive)) = below {
                    let or_equal = if inclusive { " or equal to" } else { "" };
                    return Err(format!("value must be greater than{or_equal} {}", show(&limit)));
                }
            }
        }
        let list = |values: &[T]| values.iter().map(&show).collect::<Vec<_>>().join(", ");
        if !self.within.is_empty() && !self.within.contains(&value) {
            return Err(format!("value must be in list [{}]", list(&self.within)));
        }
        if self.without.contains(&value) {
            return Err(format!("value must not be in list [{}]", list(&self.without)));
        }
        Ok(())
    }
}

/// Any number: 128 bits hold the integers of both signs.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Number {
    Integer(i128),
    Float(f64),
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(n) => write!(f, "{n}"),
            Self::Float(n) => write!(f, "{n}"),
        }
    }
}

impl Number {
    fn of(kind: Kind, value: &Value<'_>) -> Option<Self> {
        Some(match (kind, *value) {
            (Kind::Double, Value::Fixed64(bits)) => Self::Float(f64::from_bits(bits)),
            (Kind::Float, Value::Fixed32(bits)) => Self::Float(f64::from(f32::from_bits(bits))),
            (Kind::Uint64 | Kind::Bool, Value::Varint(n)) => Self::Integer(i128::from(n)),
            (Kind::Uint32, Value::Varint(n)) => Self::Integer(i128::from(n as u32)),
            (Kind::Int32 | Kind::Enum, Value::Varint(n)) => Self::Integer(i128::from(n as i32)),
            (Kind::Int64, Value::Varint(n)) => Self::Integer(i128::from(n as i64)),
            (Kind::Sint32 | Kind::Sint64, Value::Varint(n)) => {
                Self::Integer(i128::from((n >> 1) as i64 ^ -((n & 1) as i64)))
            }
            (Kind::Fixed64, Value::Fixed64(n)) => Self::Integer(i128::from(n)),
            (Kind::Sfixed64, Value::Fixed64(n)) => Self::Integer(i128::from(n as i64)),
            (Kind::Fixed32, Value::Fixed32(n)) => Self::Integer(i128::from(n)),
            (Kind::Sfixed32, Value::Fixed32(n)) => Self::Integer(i128::from(n as i32)),
            _ => return None,
        })
    }
}

/// The kind whose rules have this number in `FieldRules`.
fn number_kind(number: u32) -> Option<Kind> {
    Some(match number {
        1 => Kind::Float,
        2 => Kind::Double,
        3 => Kind::Int32,
        4 => Kind::Int64,
        5 => Kind::Uint32,
        6 => Kind::Uint64,
        7 => Kind::Sint32,
        8 => Kind::Sint64,
        9 => Kind::Fixed32,
        10 => Kind::Fixed64,
        11 => Kind::Sfixed32,
        12 => Kind::Sfixed64,
        _ => return None,
    })
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
            (kind::STRING, Value::Bytes(bytes)) => string(bytes, rules),
            (kind::BYTES, Value::Bytes(value)) => bytes(value, rules),
            (kind::ENUM, Value::Varint(n)) => enumeration(field, *n as i32, rules),
            (kind::BOOL, Value::Varint(n)) => boolean(*n != 0, rules),
            _ => match number_kind(number) {
                Some(kind) => numeric(kind, value, rules),
                None => Ok(()),
            },
        };
        checked.map_err(|reason| violated(path, reason))?;
    }
    Ok(())
}

fn numeric(kind: Kind, value: &Value<'_>, rules: &[u8]) -> Result<(), String> {
    let Some(value) = Number::of(kind, value) else { return Ok(()) };
    let mut limits = Limits::default();
    for (number, limit) in fields(rules) {
        if number == 8 {
            let empty = matches!(value, Number::Integer(0)) || value == Number::Float(0.0);
            if empty && limit != Value::Varint(0) {
                return Ok(());
            }
            continue;
        }
        let Some(limit) = Number::of(kind, &limit) else { continue };
        match number {
            1 => limits.equal = Some(limit),
            2 => limits.less = Some((limit, false)),
            3 => limits.less = Some((limit, true)),
            4 => limits.greater = Some((limit, false)),
            5 => limits.greater = Some((limit, true)),
            6 => limits.within.push(limit),
            7 => limits.without.push(limit),
            _ => {}
        }
    }
    limits.check(value, Number::to_string)
}

fn boolean(value: bool, rules: &[u8]) -> Result<(), String> {
    match fields(rules).find(|(number, _)| *number == 1) {
        Some((_, Value::Varint(equal))) if value != (equal != 0) => {
            Err(format!("value must equal {}", equal != 0))
        }
        _ => Ok(()),
    }
}

fn enumeration(field: Field, value: i32, rules: &[u8]) -> Result<(), String> {
    let mut limits: Limits<i32> = Limits::default();
    for (number, limit) in fields(rules) {
        let Value::Varint(limit) = limit else { continue };
        match number {
            1 => limits.equal = Some(limit as i32),
            2 if limit != 0 && field.enumeration().is_some_and(|e| e.value(value).is_none()) => {
                return Err("value must be one of the defined enum values".to_owned());
            }
            3 => limits.within.push(limit as i32),
            4 => limits.without.push(limit as i32),
            _ => {}
        }
    }
    let name = |number: &i32| match field.enumeration().and_then(|e| e.value(*number)) {
        Some(value) => value.name().to_owned(),
        None => number.to_string(),
    };
    limits.check(value, name)
}

/// The length of a text or of bytes against its bounds.
fn length(length: usize, exact: Option<u64>, min: u64, max: Option<u64>, unit: &str) -> Result<(), String> {
    let length = length as u64;
    match (exact, max) {
        (Some(exact), _) if length != exact => Err(format!("value length must be {exact} {unit}")),
        _ if length < min => Err(format!("value length must be at least {min} {unit}")),
        (_, Some(max)) if length > max => Err(format!("value length must be at most {max} {unit}")),
        _ => Ok(()),
    }
}

fn quoted(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(bytes))
}

fn string(value: &[u8], rules: &[u8]) -> Result<(), String> {
    // By number; those of bounds and switches are below 27.
    let mut numbers = [None; 27];
    let mut plain = true;
    for (number, rule) in fields(rules) {
        match (numbers.get_mut(number as usize), rule) {
            (Some(slot), Value::Varint(n)) => *slot = Some(n),
            _ => plain = false,
        }
        plain &= number < 6;
    }
    if value.is_empty() && numbers[26].is_some_and(|on| on != 0) {
        return Ok(());
    }
    let text = std::str::from_utf8(value).unwrap_or_default();
    let n = |wanted: usize| numbers[wanted];
    if n(19).is_some() || n(2).is_some() || n(3).is_some() {
        length(text.chars().count(), n(19), n(2).unwrap_or(0), n(3), "characters")?;
    }
    length(value.len(), n(20), n(4).unwrap_or(0), n(5), "bytes")?;
    if plain {
        return Ok(());
    }
    let mut listed = (false, false);
    for (number, rule) in parts(rules) {
        match number {
            1 if value != rule => return Err(format!("value must equal {}", quoted(rule))),
            6 if !pattern(rule).is_none_or(|regex| regex.is_match(value)) => {
                return Err(format!("value does not match regex pattern {}", quoted(rule)));
            }
            7 if !value.starts_with(rule) => {
                return Err(format!("value does not have prefix {}", quoted(rule)));
            }
            8 if !value.ends_with(rule) => {
                return Err(format!("value does not have suffix {}", quoted(rule)));
            }
            9 if !contains(value, rule) => {
                return Err(format!("value does not contain substring {}", quoted(rule)));
            }
            10 => listed = (true, listed.1 || value == rule),
            11 if value == rule => return Err(format!("value must not be {}", quoted(rule))),
            23 if contains(value, rule) => return Err(format!("value contains substring {}", quoted(rule))),
            _ => {}
        }
    }
    if listed == (true, false) {
        let list: Vec<String> =
            parts(rules).filter(|(n, _)| *n == 10).map(|(_, rule)| quoted(rule)).collect();
        return Err(format!("value must be in list [{}]", list.join(", ")));
    }
    for (number, on) in fields(rules) {
        let Value::Varint(on) = on else { continue };
        format_of(number, on, text, n(25) != Some(0))?;
    }
    Ok(())
}

/// Well-known formats. `strict` matters for header names and values only.
fn format_of(number: u32, on: u64, text: &str, strict: bool) -> Result<(), String> {
    let (valid, what) = match (number, on) {
        (_, 0) => return Ok(()),
        (12, _) => (
            text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && hostname(host)),
            "email address",
        ),
        (13, _) => (hostname(text), "hostname"),
        (14, _) => (text.parse::<IpAddr>().is_ok(), "ip address"),
        (15, _) => (text.parse::<Ipv4Addr>().is_ok(), "ipv4 address"),
        (16, _) => (text.parse::<Ipv6Addr>().is_ok(), "ipv6 address"),
        (17, _) => (text.contains(':') && !text.contains(' '), "URI"),
        (18, _) => (!text.contains(' '), "URI reference"),
        (21, _) => (hostname(text) || text.parse::<IpAddr>().is_ok(), "hostname or ip address"),
        (22, _) => (uuid(text), "UUID"),
        (24, 1) => (header_name(text.as_bytes(), strict), "HTTP header name"),
        (24, 2) => (header_value(text.as_bytes(), strict), "HTTP header value"),
        _ => return Ok(()),
    };
    if valid { Ok(()) } else { Err(format!("value must be a valid {what}")) }
}

fn hostname(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    text.len() <= 253
        && text.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

fn uuid(text: &str) -> bool {
    text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() })
}

/// `^:?[0-9a-zA-Z!#$%&'*+-.^_|~\x60]+$`; note the range from `+` to `.`, which has a comma in it.
fn header_name(name: &[u8], strict: bool) -> bool {
    if !strict {
        return header_value(name, false);
    }
    let name = name.strip_prefix(b":").unwrap_or(name);
    !name.is_empty() && name.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+,-.^_|~`".contains(b))
}

/// `^[^\x00-\x08\x0A-\x1F\x7F]*$`, or only no NUL, CR and LF.
fn header_value(value: &[u8], strict: bool) -> bool {
    value.iter().all(|b| match b {
        0 | b'\n' | b'\r' => false,
        b'\t' => true,
        0x01..=0x1f | 0x7f => !strict,
        _ => true,
    })
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    part.is_empty() || value.windows(part.len()).any(|window| window == part)
}

fn bytes(value: &[u8], rules: &[u8]) -> Result<(), String> {
    if value.is_empty() && flag(rules, 14) {
        return Ok(());
    }
    let n = |wanted: u32| {
        fields(rules).find_map(|(number, value)| match value {
            Value::Varint(n) if number == wanted => Some(n),
            _ => None,
        })
    };
    length(value.len(), n(13), n(2).unwrap_or(0), n(3), "bytes")?;
    for (number, rule) in parts(rules) {
        let valid = match number {
            1 => value == rule,
            4 => pattern(rule).is_none_or(|regex| regex.is_match(value)),
            5 => value.starts_with(rule),
            6 => value.ends_with(rule),
            7 => contains(value, rule),
            9 => value != rule,
            _ => true,
        };
        if !valid {
            return Err("value does not match its constraint".to_owned());
        }
    }
    let mut allowed = parts(rules).filter(|(number, _)| *number == 8).peekable();
    if allowed.peek().is_some() && !allowed.any(|(_, rule)| rule == value) {
        return Err("value must be one of those listed".to_owned());
    }
    Ok(())
}

/// The compiled pattern; each is compiled when it is first needed. The schema has a handful, all of which compile.
fn pattern(rule: &[u8]) -> Option<Regex> {
    static COMPILED: OnceLock<Mutex<HashMap<Vec<u8>, Regex>>> = OnceLock::new();
    let compiled = COMPILED.get_or_init(Mutex::default);
    let mut compiled = compiled.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(regex) = compiled.get(rule) {
        return Some(regex.clone());
    }
    // Bytes, not characters: the patterns are ASCII, and the tables of Unicode are large.
    let regex = RegexBuilder::new(std::str::from_utf8(rule).ok()?).unicode(false).build().ok()?;
    compiled.insert(rule.to_vec(), regex.clone());
    Some(regex)
}
