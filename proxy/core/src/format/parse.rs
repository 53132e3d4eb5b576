//! Format strings and structs into pieces.

use std::sync::LazyLock;

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use regex::Regex;

use super::command::command;
use super::json::{JsonNode, write_json_number, write_json_string};
use super::{Extensions, Piece};
use crate::error::{ConfigError, ConfigResult};

/// `%COMMAND(PARAMETERS):LENGTH%`; the parameters end at the first `)` that makes the rest fit.
static COMMAND: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^%([A-Z0-9_]+)(?:\((.*?)\))?(?::([0-9]+))?%").ok());

/// How deep a JSON format may nest.
const MAX_DEPTH: usize = 64;

/// Splits a text format into literals and operators.
pub(super) fn parse_text(text: &str, extensions: Extensions) -> ConfigResult<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut literal = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let Some(percent) = rest.find('%') else {
            literal.extend_from_slice(rest.as_bytes());
            break;
        };
        literal.extend_from_slice(&rest.as_bytes()[..percent]);
        at += percent;
        let rest = &text[at..];
        if rest.starts_with("%%") {
            literal.push(b'%');
            at += 2;
            continue;
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
        }
        let invalid = || {
            ConfigError::new(format!(
                "Incorrect configuration: {text}. Couldn't find valid command at position {at}"
            ))
        };
        let found = COMMAND.as_ref().and_then(|c| c.captures(rest)).ok_or_else(invalid)?;
        let length = match found.get(3) {
            Some(digits) => Some(digits.as_str().parse::<usize>().map_err(|_| invalid())?),
            None => None,
        };
        let name = found.get(1).map_or("", |m| m.as_str());
        let parameters = found.get(2).map_or("", |m| m.as_str());
        pieces.push(Piece::Op(command(name, parameters, length, extensions)?));
        at += found.get(0).map_or(1, |m| m.len());
    }
    if !literal.is_empty() {
        pieces.push(Piece::Literal(literal));
    }
    Ok(pieces)
}

/// A JSON format.
pub(super) fn parse_struct(format: &Struct, extensions: Extensions) -> ConfigResult<JsonNode> {
    parse_map(format, extensions, 0)
}

fn parse_map(format: &Struct, extensions: Extensions, depth: usize) -> ConfigResult<JsonNode> {
    let mut keys: Vec<_> = format.fields.iter().collect();
    keys.sort_unstable_by(|a, b| a.0.cmp(b.0));
    let mut entries = Vec::with_capacity(keys.len());
    for (key, value) in keys {
        let mut name = Vec::with_capacity(key.len() + 3);
        write_json_string(key, &mut name);
        name.push(b':');
        entries.push((name, parse_value(value, extensions, depth + 1).map_err(|e| e.key(key))?));
    }
    Ok(JsonNode::Map(entries))
}

fn parse_value(value: &Value, extensions: Extensions, depth: usize) -> ConfigResult<JsonNode> {
    if depth > MAX_DEPTH {
        return Err(ConfigError::new("the format is nested too deep"));
    }
    let raw = |write: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        write(&mut out);
        JsonNode::Raw(out)
    };
    Ok(match &value.kind {
        None | Some(Kind::NullValue(_)) => JsonNode::Null,
        Some(Kind::BoolValue(b)) => JsonNode::Raw(b.to_string().into_bytes()),
        Some(Kind::NumberValue(n)) => raw(&|out| write_json_number(*n, out)),
        Some(Kind::StructValue(inner)) => parse_map(inner, extensions, depth)?,
        Some(Kind::ListValue(list)) => {
            let parse = |(i, v)| parse_value(v, extensions, depth + 1).map_err(|e: ConfigError| e.index(i));
            JsonNode::List(list.values.iter().enumerate().map(parse).collect::<ConfigResult<_>>()?)
        }
        Some(Kind::StringValue(text)) => {
            let mut pieces = parse_text(text, extensions)?;
            match pieces.as_slice() {
                [] => JsonNode::Raw(b"\"\"".to_vec()),
                [Piece::Literal(literal)] => raw(&|out| write_json_string(literal, out)),
                [Piece::Op(_)] => match pieces.pop() {
                    Some(Piece::Op(op)) => JsonNode::Op(op),
                    _ => JsonNode::Null,
                },
                _ => JsonNode::Text(pieces),
            }
        }
    })
}
