//! Rules of strings and bytes: lengths, patterns, parts, lists.

use std::{
    collections::HashMap,
    sync::{Mutex, OnceLock},
};

use regex::bytes::{Regex, RegexBuilder};

use super::{fields, flag, format, parts};
use crate::wire::Value;

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

/// `StringRules`, by number: 1 `const`, 2 and 3 `min_len` and `max_len`, 4 and 5 the same in bytes, 6 `pattern`, 7 `prefix`,
/// 8 `suffix`, 9 `contains`, 10 `in`, 11 `not_in`, 19 `len`, 20 `len_bytes`, 23 `not_contains`, 25 `strict`, 26
/// `ignore_empty`; the others are formats.
pub(super) fn string(value: &[u8], rules: &[u8]) -> Result<(), String> {
    // Bounds and switches.
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
        format::check(number, on, text, n(25) != Some(0))?;
    }
    Ok(())
}

fn contains(value: &[u8], part: &[u8]) -> bool {
    part.is_empty() || value.windows(part.len()).any(|window| window == part)
}

/// `BytesRules`, by number: 1 `const`, 2 and 3 `min_len` and `max_len`, 4 `pattern`, 5 `prefix`, 6 `suffix`, 7 `contains`,
/// 8 `in`, 9 `not_in`, 13 `len`, 14 `ignore_empty`. No rule of the schema asks for an address (10 to 12).
pub(super) fn bytes(value: &[u8], rules: &[u8]) -> Result<(), String> {
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
