//! Rules of values that are compared with bounds: numbers, durations, timestamps, enums, booleans.

use std::fmt;

use super::fields;
use crate::{
    schema::{Field, Kind},
    wire::Value,
};

/// The bounds that numbers, durations and timestamps have in common. A bound is inclusive if its flag says so.
pub(super) struct Limits<T> {
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
    /// Takes a bound by its number among the rules of numbers, which have no `required` before them.
    pub(super) fn take(&mut self, number: u32, limit: T) {
        match number {
            1 => self.equal = Some(limit),
            2 => self.less = Some((limit, false)),
            3 => self.less = Some((limit, true)),
            4 => self.greater = Some((limit, false)),
            5 => self.greater = Some((limit, true)),
            6 => self.within.push(limit),
            7 => self.without.push(limit),
            _ => {}
        }
    }

    pub(super) fn check(&self, value: T, show: impl Fn(&T) -> String) -> Result<(), String> {
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
pub(super) enum Number {
    Integer(i128),
    Float(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(n) => write!(f, "{n}"),
            Self::Float(n) => write!(f, "{n}"),
        }
    }
}

impl Number {
    pub(super) fn of(kind: Kind, value: &Value<'_>) -> Option<Self> {
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
pub(super) fn number_kind(number: u32) -> Option<Kind> {
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

pub(super) fn numeric(kind: Kind, value: &Value<'_>, rules: &[u8]) -> Result<(), String> {
    let Some(value) = Number::of(kind, value) else { return Ok(()) };
    let mut limits = Limits::default();
    for (number, limit) in fields(rules) {
        // `ignore_empty`
        if number == 8 {
            let empty = matches!(value, Number::Integer(0)) || value == Number::Float(0.0);
            if empty && limit != Value::Varint(0) {
                return Ok(());
            }
            continue;
        }
        if let Some(limit) = Number::of(kind, &limit) {
            limits.take(number, limit);
        }
    }
    limits.check(value, Number::to_string)
}

pub(super) fn boolean(value: bool, rules: &[u8]) -> Result<(), String> {
    match fields(rules).find(|(number, _)| *number == 1) {
        Some((_, Value::Varint(equal))) if value != (equal != 0) => {
            Err(format!("value must equal {}", equal != 0))
        }
        _ => Ok(()),
    }
}

pub(super) fn enumeration(field: Field, value: i32, rules: &[u8]) -> Result<(), String> {
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
