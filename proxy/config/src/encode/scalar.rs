//! Scalars of the JSON mapping.

use std::borrow::Cow;

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{Encoder, Place, UnknownFields, shorten};
use crate::{
    error::{ErrorKind, LoadError},
    schema::{Enum, Field, Kind},
    tape::NodeKind,
    wire,
};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireNone)
        .with_decode_allow_trailing_bits(true),
);

/// A value in the form that goes on the wire.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scalar<'t> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(Cow<'t, [u8]>),
}

impl Scalar<'_> {
    pub(super) fn default_of(kind: Kind) -> Self {
        match kind.wire_type() {
            1 => Self::Fixed64(0),
            2 => Self::Bytes(Cow::Borrowed(&[])),
            5 => Self::Fixed32(0),
            _ => Self::Varint(0),
        }
    }

    pub(super) fn is_default(&self) -> bool {
        match self {
            // Bits, not values: the default of a floating point number is +0.
            Self::Varint(n) | Self::Fixed64(n) => *n == 0,
            Self::Fixed32(n) => *n == 0,
            Self::Bytes(bytes) => bytes.is_empty(),
        }
    }

    /// Writes a whole field.
    pub(super) fn put(&self, out: &mut Vec<u8>, number: u32) {
        let wire_type = match self {
            Self::Varint(_) => 0,
            Self::Fixed64(_) => 1,
            Self::Bytes(_) => 2,
            Self::Fixed32(_) => 5,
        };
        wire::put_tag(out, number, wire_type);
        self.put_bare(out);
    }

    /// Writes the value without its tag: for packed fields.
    pub(super) fn put_bare(&self, out: &mut Vec<u8>) {
        match self {
            Self::Varint(n) => wire::put_varint(out, *n),
            Self::Fixed64(n) => out.extend_from_slice(&n.to_le_bytes()),
            Self::Fixed32(n) => out.extend_from_slice(&n.to_le_bytes()),
            Self::Bytes(bytes) => {
                wire::put_varint(out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
        }
    }
}

/// Largest magnitudes that a fraction may name for an integer: beyond them doubles are not exact.
const MAX_EXACT_SIGNED: f64 = 9_007_199_254_740_992.0;
const MAX_EXACT_UNSIGNED: f64 = 18_014_398_509_481_984.0;

impl<'t> Encoder<'t> {
    /// The value of a scalar field. `None` is an unknown enum name that is to be passed over.
    pub(super) fn scalar(&mut self, field: Field, place: Place<'_>) -> Result<Option<Scalar<'t>>, LoadError> {
        let value = match field.kind() {
            Kind::Double => Scalar::Fixed64(self.float(place)?.to_bits()),
            Kind::Float => Scalar::Fixed32(self.single(place)?.to_bits()),
            Kind::Int64 => Scalar::Varint(self.signed(place, i64::MIN, i64::MAX)? as u64),
            Kind::Int32 => Scalar::Varint(self.signed_32(place)? as u64),
            Kind::Sint64 => Scalar::Varint(zigzag(self.signed(place, i64::MIN, i64::MAX)?)),
            Kind::Sint32 => Scalar::Varint(zigzag(self.signed_32(place)?)),
            Kind::Sfixed64 => Scalar::Fixed64(self.signed(place, i64::MIN, i64::MAX)? as u64),
            Kind::Sfixed32 => Scalar::Fixed32(self.signed_32(place)? as u32),
            Kind::Uint64 => Scalar::Varint(self.unsigned(place, u64::MAX)?),
            Kind::Uint32 => Scalar::Varint(self.unsigned(place, u64::from(u32::MAX))?),
            Kind::Fixed64 => Scalar::Fixed64(self.unsigned(place, u64::MAX)?),
            Kind::Fixed32 => Scalar::Fixed32(self.unsigned(place, u64::from(u32::MAX))? as u32),
            Kind::Bool => Scalar::Varint(u64::from(self.boolean(place)?)),
            Kind::String => Scalar::Bytes(Cow::Borrowed(self.string(place, "a string")?.as_bytes())),
            Kind::Bytes => Scalar::Bytes(Cow::Owned(self.base64(place)?)),
            Kind::Enum => return self.enumeration(field, place),
            Kind::Message => return Ok(None),
        };
        Ok(Some(value))
    }

    /// A string or an error that says how to write one.
    pub(super) fn string(&self, place: Place<'_>, expected: &str) -> Result<&'t str, LoadError> {
        match self.tape.kind(place.node) {
            NodeKind::String => Ok(self.tape.text(place.node)),
            NodeKind::Array | NodeKind::Object => Err(self.mismatch(place, expected)),
            _ => Err(self.mismatch(place, &format!("{expected} (quoted)"))),
        }
    }

    /// The text of a number, quoted or not.
    fn digits(&self, place: Place<'_>, expected: &str) -> Result<&'t str, LoadError> {
        match self.tape.kind(place.node) {
            NodeKind::Number | NodeKind::String => Ok(self.tape.text(place.node)),
            _ => Err(self.mismatch(place, expected)),
        }
    }

    fn signed_32(&self, place: Place<'_>) -> Result<i64, LoadError> {
        self.signed(place, i64::from(i32::MIN), i64::from(i32::MAX))
    }

    fn signed(&self, place: Place<'_>, min: i64, max: i64) -> Result<i64, LoadError> {
        let text = self.digits(place, "an integer")?;
        let value = match text.parse::<i64>() {
            Ok(value) => value,
            Err(_) => self.whole(place, text, -MAX_EXACT_SIGNED, MAX_EXACT_SIGNED)? as i64,
        };
        if value < min || value > max {
            return Err(self.mismatch(place, &format!("an integer from {min} to {max}")));
        }
        Ok(value)
    }

    fn unsigned(&self, place: Place<'_>, max: u64) -> Result<u64, LoadError> {
        let text = self.digits(place, "an integer")?;
        let value = match text.parse::<u64>() {
            Ok(value) => value,
            Err(_) => self.whole(place, text, 0.0, MAX_EXACT_UNSIGNED)? as u64,
        };
        if value > max {
            return Err(self.mismatch(place, &format!("an integer from 0 to {max}")));
        }
        Ok(value)
    }

    /// An integer written as a fraction or with an exponent.
    fn whole(&self, place: Place<'_>, text: &str, min: f64, max: f64) -> Result<f64, LoadError> {
        match fraction(text) {
            Some(value) if value.is_finite() && value.fract() == 0.0 && (min..=max).contains(&value) => {
                Ok(value)
            }
            Some(value) if value < 0.0 && min == 0.0 => {
                Err(self.mismatch(place, "an integer that is not negative"))
            }
            _ => Err(self.mismatch(place, "an integer")),
        }
    }

    fn float(&self, place: Place<'_>) -> Result<f64, LoadError> {
        match self.digits(place, "a number")? {
            "NaN" => Ok(f64::NAN),
            text => fraction(text.trim_ascii()).ok_or_else(|| self.mismatch(place, "a number")),
        }
    }

    fn single(&self, place: Place<'_>) -> Result<f32, LoadError> {
        let value = self.float(place)?;
        let single = value as f32;
        if value.is_finite() && !single.is_finite() {
            return Err(self.mismatch(place, "a number of single precision"));
        }
        Ok(single)
    }

    fn boolean(&self, place: Place<'_>) -> Result<bool, LoadError> {
        match self.tape.kind(place.node) {
            NodeKind::True => return Ok(true),
            NodeKind::False => return Ok(false),
            NodeKind::String => {
                let text = self.tape.text(place.node);
                let is = |words: [&str; 5]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
                if is(["true", "t", "yes", "y", "1"]) {
                    return Ok(true);
                }
                if is(["false", "f", "no", "n", "0"]) {
                    return Ok(false);
                }
            }
            _ => {}
        }
        Err(self.mismatch(place, "true or false"))
    }

    fn base64(&self, place: Place<'_>) -> Result<Vec<u8>, LoadError> {
        let text = self.string(place, "a base64 string")?;
        let bare = match text.len() % 4 {
            0 => text.strip_suffix("==").or_else(|| text.strip_suffix('=')).unwrap_or(text),
            _ => text,
        };
        // Both alphabets are taken, even mixed.
        let standard: String = bare
            .chars()
            .map(|c| {
                if c == '-' {
                    '+'
                } else if c == '_' {
                    '/'
                } else {
                    c
                }
            })
            .collect();
        BASE64.decode(standard).map_err(|_| self.mismatch(place, "a base64 string"))
    }

    fn enumeration(&self, field: Field, place: Place<'_>) -> Result<Option<Scalar<'t>>, LoadError> {
        let Some(values) = field.enumeration() else { return Ok(None) };
        let number = match self.tape.kind(place.node) {
            NodeKind::Number => self.signed_32(place)?,
            NodeKind::String => {
                let text = self.tape.text(place.node);
                match values.value_by_name(text) {
                    Some(value) => i64::from(value.number()),
                    None => match text.trim().parse::<i32>() {
                        Ok(number) => i64::from(number),
                        Err(_) if self.unknown != UnknownFields::Reject => return Ok(None),
                        Err(_) => return Err(self.unknown_value(values, text, place)),
                    },
                }
            }
            _ => return Err(self.mismatch(place, &one_of(values))),
        };
        Ok(Some(Scalar::Varint(number as u64)))
    }

    fn unknown_value(&self, values: Enum, text: &str, place: Place<'_>) -> LoadError {
        let reason = format!("unknown enum value '{}', expected {}", shorten(text), one_of(values));
        self.fail(place, ErrorKind::Type, reason)
    }
}

fn one_of(values: Enum) -> String {
    let names: Vec<&str> = values.values().map(|value| value.name()).collect();
    format!("one of {}", names.join(", "))
}

/// A number as Abseil reads it: decimal, or hexadecimal with a binary exponent.
fn fraction(text: &str) -> Option<f64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) else {
        return text.parse().ok();
    };
    let (mantissa, exponent) = match hex.split_once(['p', 'P']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (hex, 0),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.is_empty() && part.is_empty() {
        return None;
    }
    let mut value = 0.0f64;
    for digit in whole.chars().chain(part.chars()) {
        value = value * 16.0 + f64::from(digit.to_digit(16)?);
    }
    let scale = exponent.checked_sub(i32::try_from(part.len()).ok()?.checked_mul(4)?)?;
    value *= 2f64.powi(scale);
    Some(if negative { -value } else { value })
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}
