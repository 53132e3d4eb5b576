//! One runtime value: the text that was written and all that it can be read as.
//!
//! The readings are Envoy's: a number is an integer (rounded down) and a double, and a whole one is also a
//! boolean; `true` is a boolean only where it is not quoted; a struct with `numerator` and `denominator` is a
//! fraction.

use std::collections::BTreeMap;

use envoy_types::pb::google::protobuf::{Struct, Value as Proto, value::Kind};

use crate::error::{ConfigError, ConfigResult};
use crate::stats::general;

/// A value with its readings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Value {
    text: String,
    integer: Option<u64>,
    double: Option<f64>,
    boolean: Option<bool>,
    fraction: Option<(u64, u64)>,
}

impl Value {
    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn integer(&self) -> Option<u64> {
        self.integer
    }

    pub(super) fn double(&self) -> Option<f64> {
        self.double
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        self.boolean
    }

    /// Numerator and denominator.
    pub(super) fn fraction(&self) -> Option<(u64, u64)> {
        self.fraction.or_else(|| self.integer.map(|percent| (percent, 100)))
    }

    /// A value as an operator writes it: a YAML scalar, or a fraction in braces.
    pub(super) fn from_yaml(text: &str) -> Self {
        let trimmed = text.trim();
        let mut value = Self { text: text.into(), ..Self::default() };
        let inner = trimmed.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
        if let Some(inner) = inner {
            let fields = inner.split(',').filter(|f| !f.trim().is_empty()).filter_map(|f| f.split_once(':'));
            value.fraction = fraction(fields.map(|(k, v)| (unquoted(k), unquoted(v))));
        } else if let Ok(number) = unquoted(trimmed).parse() {
            value.set_number(number);
        } else if let Some(boolean) = yaml_boolean(trimmed) {
            value.boolean = Some(boolean);
        }
        value
    }

    fn set_number(&mut self, number: f64) {
        self.double = Some(number);
        if number < f64::from(i32::MAX) && number.fract() == 0.0 && number >= f64::from(i32::MIN) {
            self.boolean = Some(number != 0.0);
        }
        if (0.0..=u64::MAX as f64).contains(&number) {
            self.integer = Some(number as u64);
        }
    }
}

fn unquoted(text: &str) -> &str {
    text.trim().trim_matches(['"', '\''])
}

fn yaml_boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "y" | "Y" => Some(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "n" | "N" => Some(false),
        _ => None,
    }
}

/// A fraction, unless a field is unknown or the denominator is none.
fn fraction<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> Option<(u64, u64)> {
    let (mut numerator, mut denominator) = (0, 100);
    for (name, value) in fields {
        match (name, value) {
            ("numerator", number) => numerator = number.parse::<f64>().map_or(0, |n| n as u64),
            ("denominator", "HUNDRED") => denominator = 100,
            ("denominator", "TEN_THOUSAND") => denominator = 10_000,
            ("denominator", "MILLION") => denominator = 1_000_000,
            _ => return None,
        }
    }
    Some((numerator, denominator))
}

/// Turns a tree into keys with dots.
pub(super) fn flatten(tree: &Struct, prefix: &str, out: &mut BTreeMap<String, Value>) -> ConfigResult<()> {
    for (name, value) in &tree.fields {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        let mut parsed = Value::default();
        match &value.kind {
            Some(Kind::StringValue(text)) => {
                if let Ok(number) = text.trim().parse() {
                    parsed.set_number(number);
                }
                parsed.text.clone_from(text);
            }
            Some(Kind::NumberValue(number)) => {
                parsed.set_number(*number);
                parsed.text = general(*number, 6);
            }
            Some(Kind::BoolValue(boolean)) => {
                parsed.boolean = Some(*boolean);
                parsed.text = boolean.to_string();
            }
            Some(Kind::StructValue(inner)) if is_leaf(inner) => {
                let text = |v: &Proto| match &v.kind {
                    Some(Kind::NumberValue(n)) => general(*n, 17),
                    Some(Kind::StringValue(s)) => s.clone(),
                    _ => String::new(),
                };
                let fields: BTreeMap<_, _> =
                    inner.fields.iter().map(|(k, v)| (k.as_str(), text(v))).collect();
                parsed.fraction = fraction(fields.iter().map(|(k, v)| (*k, v.as_str())));
                parsed.text = debug_string(inner);
            }
            Some(Kind::StructValue(inner)) => {
                flatten(inner, &key, out)?;
                continue;
            }
            Some(Kind::ListValue(_) | Kind::NullValue(_)) | None => {
                return Err(ConfigError::new(format!("Invalid runtime entry value for {key}")));
            }
        }
        out.insert(key, parsed);
    }
    Ok(())
}

fn is_leaf(tree: &Struct) -> bool {
    tree.fields.is_empty() || tree.fields.contains_key("numerator") || tree.fields.contains_key("denominator")
}

/// The protobuf text form that Envoy shows for a struct (its first line is meant not to be parsed).
fn debug_string(tree: &Struct) -> String {
    let mut out = String::from("goo.gle/debugproto \n");
    for (key, value) in tree.fields.iter().collect::<BTreeMap<_, _>>() {
        let value = match &value.kind {
            Some(Kind::NumberValue(n)) => format!("    number_value: {}\n", general(*n, 17)),
            Some(Kind::StringValue(s)) => format!("    string_value: {s:?}\n"),
            Some(Kind::BoolValue(b)) => format!("    bool_value: {b}\n"),
            _ => String::new(),
        };
        out.push_str(&format!("fields {{\n  key: {key:?}\n  value {{\n{value}  }}\n}}\n"));
    }
    out
}
