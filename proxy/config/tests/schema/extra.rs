//! Messages that no crate carries, written by hand: Istio's own and the few of `xds.*` and `google.protobuf` that the
//! descriptor set of `envoy-types` lacks; and rules that Envoy 1.40 has beyond that set.
//!
//! One line per field: number, name, type, then marks (`oneof=NAME`, `rules=HEX` with the bytes of
//! `validate.FieldRules`). A line that ends in `{` opens a message or `enum NAME {`.

use crate::descriptor::{Enum, EnumValue, Field, Message, Oneof, Types};

const EXTRA: &str = include_str!("extra.txt");

/// Adds the messages and rules of `extra.txt`.
pub fn add(types: &mut Types) {
    let mut open = Open::Nothing;
    for line in EXTRA.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), &mut open) {
            (["}"], _) => close(std::mem::take(&mut open), types),
            (["amend", message, field, rules], Open::Nothing) => amend(types, message, field, rules),
            (["enum", name, "{"], Open::Nothing) => {
                open = Open::Enum(Enum { name: (*name).to_owned(), values: Vec::new() });
            }
            ([name, "{"], Open::Nothing) => {
                let message =
                    Message { name: (*name).to_owned(), file: "-".to_owned(), ..Message::default() };
                open = Open::Message(message);
            }
            ([number, name], Open::Enum(e)) => e.values.push(EnumValue {
                name: (*name).to_owned(),
                number: number.parse().expect("an enum number"),
                ..EnumValue::default()
            }),
            ([number, name, kind, marks @ ..], Open::Message(message)) => {
                let number = number.parse().expect("a field number");
                let entry = field(message, number, name, kind, marks);
                types.messages.extend(entry);
            }
            _ => panic!("extra.txt: {line}"),
        }
    }
}

#[derive(Default)]
enum Open {
    #[default]
    Nothing,
    Message(Message),
    Enum(Enum),
}

fn close(open: Open, types: &mut Types) {
    match open {
        Open::Message(message) => types.messages.push(message),
        Open::Enum(e) => types.enums.push(e),
        Open::Nothing => panic!("extra.txt: nothing to close"),
    }
}

fn amend(types: &mut Types, message: &str, field: &str, rules: &str) {
    let message = types.messages.iter_mut().find(|m| m.name == message).expect("amended message");
    let field = message.fields.iter_mut().find(|f| f.name == field).expect("amended field");
    field.rules = if rules == "-" { Vec::new() } else { hex(rules) };
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex digits"))
        .collect()
}

/// Adds a field; a map brings its entry message with it.
fn field(message: &mut Message, number: u32, name: &str, kind: &str, marks: &[&str]) -> Option<Message> {
    let mut out = Field { name: name.to_owned(), json_name: camel(name), number, ..Field::default() };
    let mut entry = None;
    let kind = if let Some(inner) = kind.strip_prefix("repeated:") {
        out.repeated = true;
        inner
    } else {
        kind
    };
    if let Some(pair) = kind.strip_prefix("map:") {
        let (key, value) = pair.split_once(',').expect("map:KEY,VALUE");
        let mut map = Message {
            name: format!("{}.{}Entry", message.name, pascal(name)),
            file: "-".to_owned(),
            map_entry: true,
            ..Message::default()
        };
        field(&mut map, 1, "key", key, &[]);
        field(&mut map, 2, "value", value, &[]);
        out.repeated = true;
        out.kind = 11;
        out.type_name = map.name.clone();
        entry = Some(map);
    } else {
        set_kind(&mut out, kind);
    }
    for mark in marks {
        if let Some(oneof) = mark.strip_prefix("oneof=") {
            let index = message.oneofs.iter().position(|o| o.name == oneof).unwrap_or_else(|| {
                message.oneofs.push(Oneof { name: oneof.to_owned(), required: false });
                message.oneofs.len() - 1
            });
            out.oneof = Some(index as u32);
        } else if let Some(rules) = mark.strip_prefix("rules=") {
            out.rules = hex(rules);
        } else {
            panic!("extra.txt: unknown mark {mark}");
        }
    }
    message.fields.push(out);
    entry
}

fn set_kind(out: &mut Field, kind: &str) {
    let scalar = ["double", "float", "int64", "uint64", "int32", "fixed64", "fixed32", "bool", "string"];
    if let Some(index) = scalar.iter().position(|s| *s == kind) {
        out.kind = index as u8 + 1;
    } else if kind == "bytes" {
        out.kind = 12;
    } else if kind == "uint32" {
        out.kind = 13;
    } else if let Some(name) = kind.strip_prefix("enum:") {
        out.kind = 14;
        out.type_name = name.to_owned();
    } else {
        out.kind = 11;
        out.type_name = kind.to_owned();
    }
}

fn pascal(name: &str) -> String {
    name.split('_').map(|part| part[..1].to_uppercase() + &part[1..]).collect()
}

fn camel(name: &str) -> String {
    let pascal = pascal(name);
    pascal[..1].to_lowercase() + &pascal[1..]
}
