//! Encoded messages to JSON, as Envoy's admin interface prints them.
//!
//! Envoy prints with protobuf's JSON printer: names as in the `.proto` file, fields in the order of their numbers,
//! 64-bit integers quoted, bytes in base64, `Any` opened with `@type` in front, durations with none, three, six or
//! nine decimals, enums by name; indented by one space per level if pretty. Members of maps come in the order of
//! their keys here; Envoy's order is that of a hash table.
//!
//! Sensitive fields are replaced by `[redacted]`, numbers among them are left out, as Envoy does before it shows a
//! configuration.

mod scalar;

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::{
    any,
    error::{ErrorKind, LoadError, Path},
    group::{self, Grouped, default_of},
    schema::{Field, Kind, Message, WellKnown},
    time,
    wire::{Value, WireError},
};

use scalar::{camel_path, quote, shortest_double, shortest_single, text_of};

/// Depth beyond which nothing is printed.
const MAX_DEPTH: usize = 100;

/// How to print.
#[derive(Debug, Clone, Copy, Default)]
pub struct PrintOptions {
    /// One member per line, indented by one space per level.
    pub pretty: bool,
    /// Replace what is sensitive.
    pub redact: bool,
    /// Print scalars and lists that have their default value too.
    pub defaults: bool,
}

/// Prints `bytes` as `message`.
pub fn to_json(message: Message, bytes: &[u8], options: PrintOptions) -> Result<String, LoadError> {
    let mut printer = Printer { out: String::with_capacity(bytes.len() * 2), options, indent: 0 };
    printer.message(message, bytes, false)?;
    if options.pretty {
        printer.out.push('\n');
    }
    Ok(printer.out)
}

/// Prints what an `Any` holds as JSON: with `@type` in front.
pub fn any_to_json(type_url: &str, value: &[u8], options: PrintOptions) -> Result<String, LoadError> {
    let mut printer = Printer { out: String::with_capacity(value.len() * 2), options, indent: 0 };
    printer.any(type_url, value, false)?;
    Ok(printer.out)
}

struct Printer {
    out: String,
    options: PrintOptions,
    indent: usize,
}

type Done = Result<(), LoadError>;

fn broken(message: Message, error: WireError) -> LoadError {
    Path::ROOT.error(ErrorKind::Syntax, format!("{}: {error}", message.name()))
}

impl Printer {
    fn line(&mut self) {
        if self.options.pretty {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', self.indent));
        }
    }

    /// Before each member: a comma unless it is the first, and a new line.
    fn member(&mut self, first: &mut bool) {
        if !*first {
            self.out.push(',');
        }
        *first = false;
        self.line();
    }

    fn open(&mut self, bracket: char) -> Done {
        self.out.push(bracket);
        self.indent += 1;
        if self.indent > MAX_DEPTH {
            return Err(LoadError::new(
                ErrorKind::TooLarge,
                "the message is nested too deeply to be printed",
            ));
        }
        Ok(())
    }

    fn close(&mut self, bracket: char, empty: bool) {
        self.indent -= 1;
        if !empty {
            self.line();
        }
        self.out.push(bracket);
    }

    fn name(&mut self, name: &str) {
        quote(&mut self.out, name);
        self.out.push(':');
        if self.options.pretty {
            self.out.push(' ');
        }
    }

    fn message(&mut self, message: Message, bytes: &[u8], sensitive: bool) -> Done {
        if message.well_known() == WellKnown::Any {
            let (type_url, value) = any::parts(bytes)
                .ok_or_else(|| LoadError::new(ErrorKind::Syntax, "not a google.protobuf.Any"))?;
            return self.any(type_url, value, sensitive);
        }
        let fields = Grouped::read(message, bytes).map_err(|e| broken(message, e))?;
        let last = |number: u32| fields.of(message, number).last().map(|(_, value)| *value);
        let integer = |number: u32| match last(number) {
            Some(Value::Varint(n)) => n,
            _ => 0,
        };
        match message.well_known() {
            WellKnown::Duration => {
                let text = time::format_duration(integer(1) as i64, integer(2) as i32);
                self.string(&text);
                Ok(())
            }
            WellKnown::Timestamp => {
                let text = time::format_timestamp(integer(1) as i64, integer(2) as i32);
                self.string(&text);
                Ok(())
            }
            WellKnown::Wrapper => match message.field(1) {
                Some(field) => self.scalar(field, last(1).unwrap_or(default_of(field)), sensitive),
                None => Ok(()),
            },
            WellKnown::Struct => match message.field(1) {
                Some(field) => self.map(field, fields.of(message, 1), sensitive),
                None => Ok(()),
            },
            WellKnown::List => match message.field(1) {
                Some(field) => self.repeated(field, fields.of(message, 1), sensitive),
                None => Ok(()),
            },
            WellKnown::Value => self.value(message, &fields, sensitive),
            WellKnown::FieldMask => {
                let paths: Vec<String> =
                    fields.of(message, 1).iter().filter_map(|(_, v)| camel_path(v)).collect();
                self.string(&paths.join(","));
                Ok(())
            }
            WellKnown::Any | WellKnown::No => {
                self.open('{')?;
                let mut first = true;
                self.fields(message, &fields, &mut first, sensitive)?;
                self.close('}', first);
                Ok(())
            }
        }
    }

    fn any(&mut self, type_url: &str, value: &[u8], sensitive: bool) -> Done {
        if type_url.is_empty() && value.is_empty() {
            self.out.push_str("{}");
            return Ok(());
        }
        let Some(message) = Message::of_type_url(type_url) else {
            return Err(LoadError::new(ErrorKind::UnknownType, format!("unknown type URL '{type_url}'")));
        };
        self.open('{')?;
        let mut first = true;
        self.member(&mut first);
        self.name("@type");
        self.string(type_url);
        if message.well_known() == WellKnown::No {
            let fields = Grouped::read(message, value).map_err(|e| broken(message, e))?;
            self.fields(message, &fields, &mut first, sensitive)?;
        } else {
            self.member(&mut first);
            self.name("value");
            self.message(message, value, sensitive)?;
        }
        self.close('}', first);
        Ok(())
    }

    fn fields(&mut self, message: Message, fields: &Grouped<'_>, first: &mut bool, sensitive: bool) -> Done {
        for (field, group) in fields.groups(message) {
            let sensitive = self.options.redact && (sensitive || field.is_sensitive());
            if !self.shown(field, group, sensitive) {
                continue;
            }
            self.member(first);
            self.name(field.name());
            if field.is_map() {
                self.map(field, group, sensitive)?;
            } else if field.is_repeated() {
                self.repeated(field, group, sensitive)?;
            } else if let Some(inner) = field.message() {
                self.message(inner, &group::merged(group), sensitive)?;
            } else {
                let value = group.last().map_or(default_of(field), |(_, value)| *value);
                self.scalar(field, value, sensitive)?;
            }
        }
        Ok(())
    }

    fn shown(&self, field: Field, group: &[(u16, Value<'_>)], sensitive: bool) -> bool {
        if sensitive && !matches!(field.kind(), Kind::String | Kind::Bytes | Kind::Message) {
            return false;
        }
        let Some((_, value)) = group.last() else {
            return self.options.defaults && (!field.has_presence() || field.is_repeated() || field.is_map());
        };
        if let Some(inner) = field.message().filter(|_| !field.is_repeated() && !field.is_map()) {
            // An empty Value says nothing, and protobuf prints nothing.
            return inner.well_known() != WellKnown::Value || !group::merged(group).is_empty();
        }
        field.has_presence()
            || field.is_repeated()
            || field.is_map()
            || self.options.defaults
            || *value != default_of(field)
    }

    fn repeated(&mut self, field: Field, group: &[(u16, Value<'_>)], sensitive: bool) -> Done {
        self.open('[')?;
        let mut first = true;
        let empty_value = field.message().is_some_and(|inner| inner.well_known() == WellKnown::Value);
        let visit = |_: usize, value: Value<'_>| -> Result<(), Fault> {
            match (field.message(), value) {
                (Some(_), Value::Bytes([])) if empty_value => {}
                (Some(inner), Value::Bytes(bytes)) => {
                    self.member(&mut first);
                    self.message(inner, bytes, sensitive)?;
                }
                _ => {
                    self.member(&mut first);
                    self.scalar(field, value, sensitive)?;
                }
            }
            Ok(())
        };
        group::each_element(field, group, visit).map_err(|Fault(error)| error)?;
        self.close(']', first);
        Ok(())
    }

    fn map(&mut self, field: Field, group: &[(u16, Value<'_>)], sensitive: bool) -> Done {
        let Some(entry) = field.message() else { return Ok(()) };
        let (Some(key_field), Some(value_field)) = (entry.field(1), entry.field(2)) else { return Ok(()) };
        let mut members = std::collections::BTreeMap::new();
        for (_, bytes) in group {
            let Value::Bytes(bytes) = bytes else { continue };
            let parts = group::map_entry(entry, bytes).map_err(|e| broken(entry, e))?;
            let key = parts.key.unwrap_or(default_of(key_field));
            members.insert(text_of(key_field, key), (parts.message, parts.value));
        }
        self.open('{')?;
        let mut first = true;
        for (key, (content, value)) in members {
            let inner = value_field.message();
            let content = content.unwrap_or_default();
            if inner.is_some_and(|inner| inner.well_known() == WellKnown::Value && content.is_empty()) {
                continue;
            }
            self.member(&mut first);
            self.name(&key);
            match inner {
                Some(inner) => self.message(inner, &content, sensitive)?,
                None => self.scalar(value_field, value.unwrap_or(default_of(value_field)), sensitive)?,
            }
        }
        self.close('}', first);
        Ok(())
    }

    fn value(&mut self, message: Message, fields: &Grouped<'_>, sensitive: bool) -> Done {
        for (field, group) in fields.groups(message) {
            let Some((_, value)) = group.last() else { continue };
            if let Some(inner) = field.message() {
                return self.message(inner, &group::merged(group), sensitive);
            }
            if field.kind() == Kind::Enum {
                break;
            }
            return self.scalar(field, *value, sensitive && field.kind() == Kind::String);
        }
        self.out.push_str("null");
        Ok(())
    }

    fn string(&mut self, text: &str) {
        quote(&mut self.out, text);
    }

    fn scalar(&mut self, field: Field, value: Value<'_>, sensitive: bool) -> Done {
        if sensitive && matches!(field.kind(), Kind::String | Kind::Bytes) {
            // Envoy puts these very bytes into the field; printed, bytes become base64.
            let text = if field.kind() == Kind::Bytes {
                STANDARD.encode("[redacted]")
            } else {
                "[redacted]".to_owned()
            };
            self.string(&text);
            return Ok(());
        }
        match (field.kind(), value) {
            (Kind::Bytes, Value::Bytes(bytes)) => {
                let text = STANDARD.encode(bytes);
                self.string(&text);
            }
            (Kind::String, Value::Bytes(bytes)) => {
                let text = String::from_utf8_lossy(bytes);
                quote(&mut self.out, &text);
            }
            (Kind::Double, Value::Fixed64(bits)) => self.float(f64::from_bits(bits), shortest_double),
            (Kind::Float, Value::Fixed32(bits)) => {
                let value = f32::from_bits(bits);
                self.float(f64::from(value), |_| shortest_single(value));
            }
            (Kind::Enum, Value::Varint(number)) => self.enumeration(field, number as i32),
            (kind, value) => {
                let text = text_of(field, value);
                let quoted = matches!(
                    kind,
                    Kind::Int64 | Kind::Uint64 | Kind::Fixed64 | Kind::Sfixed64 | Kind::Sint64
                );
                if quoted {
                    self.string(&text);
                } else {
                    self.out.push_str(&text);
                }
            }
        }
        Ok(())
    }

    fn float(&mut self, value: f64, shortest: impl Fn(f64) -> String) {
        if value.is_nan() {
            self.out.push_str("\"NaN\"");
        } else if value.is_infinite() {
            self.out.push_str(if value > 0.0 { "\"Infinity\"" } else { "\"-Infinity\"" });
        } else {
            let text = shortest(value);
            self.out.push_str(&text);
        }
    }

    fn enumeration(&mut self, field: Field, number: i32) {
        let Some(values) = field.enumeration() else { return };
        if values.name() == "google.protobuf.NullValue" {
            self.out.push_str("null");
            return;
        }
        match values.value(number) {
            Some(value) => self.string(value.name()),
            None => self.out.push_str(&number.to_string()),
        }
    }
}

/// An error from within a packed field, where the wire's errors are possible too.
struct Fault(LoadError);

impl From<LoadError> for Fault {
    fn from(error: LoadError) -> Self {
        Self(error)
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self(LoadError::new(ErrorKind::Syntax, error.to_string()))
    }
}
