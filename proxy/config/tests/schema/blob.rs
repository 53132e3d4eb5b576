//! Lays the types out as `schema.bin`; the reader in `src/schema.rs` documents the format.

use std::collections::HashMap;

use sampan_config::schema::layout::{self, flag};

use crate::descriptor::{Field, Message, Types};

/// Packages that no configuration message uses at run time.
const LEFT_OUT: &[&str] =
    &["validate", "udpa.annotations", "xds.annotations", "envoy.annotations", "google.api"];
/// What remains of `google.protobuf`: descriptors describe themselves to compilers only.
const WELL_KNOWN: &[(&str, u32)] = &[
    ("google.protobuf.Any", layout::WELL_KNOWN_ANY),
    ("google.protobuf.Struct", layout::WELL_KNOWN_STRUCT),
    ("google.protobuf.Value", layout::WELL_KNOWN_VALUE),
    ("google.protobuf.ListValue", layout::WELL_KNOWN_LIST),
    ("google.protobuf.Duration", layout::WELL_KNOWN_DURATION),
    ("google.protobuf.Timestamp", layout::WELL_KNOWN_TIMESTAMP),
    ("google.protobuf.FieldMask", layout::WELL_KNOWN_FIELD_MASK),
    ("google.protobuf.DoubleValue", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.FloatValue", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.Int64Value", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.UInt64Value", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.Int32Value", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.UInt32Value", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.BoolValue", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.StringValue", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.BytesValue", layout::WELL_KNOWN_WRAPPER),
    ("google.protobuf.Empty", layout::WELL_KNOWN_EMPTY),
    ("google.protobuf.Struct.FieldsEntry", 0),
];

fn kept(name: &str) -> bool {
    if name.starts_with("google.protobuf.") {
        return WELL_KNOWN.iter().any(|(known, _)| *known == name) || name == "google.protobuf.NullValue";
    }
    !LEFT_OUT.iter().any(|package| {
        name.strip_prefix(package).and_then(|rest| rest.strip_prefix('.')).is_some_and(|rest| {
            rest.starts_with(|c: char| c.is_ascii_uppercase()) || *package == "google.api"
        }) && !name.starts_with("google.api.expr.")
    })
}

/// Builds the blob.
pub fn build(mut types: Types) -> Vec<u8> {
    types.messages.retain(|m| kept(&m.name));
    types.enums.retain(|e| kept(&e.name));
    types.messages.sort_by(|a, b| a.name.cmp(&b.name));
    types.enums.sort_by(|a, b| a.name.cmp(&b.name));
    for pair in types.messages.windows(2) {
        assert_ne!(pair[0].name, pair[1].name, "a message is defined twice");
    }
    for message in &mut types.messages {
        message.fields.sort_by_key(|f| f.number);
    }
    Builder::default().build(&types)
}

fn bit(set: bool, flag: u32) -> u32 {
    if set { flag } else { 0 }
}

#[derive(Default)]
struct Builder {
    messages: Vec<u32>,
    fields: Vec<u32>,
    oneofs: Vec<u32>,
    enums: Vec<u32>,
    values: Vec<u32>,
    /// Strings and rules: each a two-byte length and the bytes, stored once.
    pool: Vec<u8>,
    pooled: HashMap<Vec<u8>, u32>,
}

impl Builder {
    fn build(mut self, types: &Types) -> Vec<u8> {
        // Offset 0 of the pool means "none".
        self.pool.extend_from_slice(&[0, 0]);
        let message_index: HashMap<&str, u32> =
            types.messages.iter().enumerate().map(|(i, m)| (m.name.as_str(), i as u32)).collect();
        let enum_index: HashMap<&str, u32> =
            types.enums.iter().enumerate().map(|(i, e)| (e.name.as_str(), i as u32)).collect();
        let entries: Vec<bool> = types.messages.iter().map(|m| m.map_entry).collect();
        for message in &types.messages {
            self.message(message);
            for field in &message.fields {
                self.field(field, &message_index, &enum_index, &entries);
            }
        }
        for e in &types.enums {
            let first = (self.values.len() / layout::VALUE_WORDS) as u32;
            let name = self.intern(e.name.as_bytes());
            self.enums.extend([name, first, e.values.len() as u32]);
            for value in &e.values {
                let name = self.intern(value.name.as_bytes());
                let flags = bit(value.deprecated, flag::VALUE_DEPRECATED)
                    | bit(value.disallowed, flag::VALUE_DISALLOWED);
                self.values.extend([name, value.number as u32, flags]);
            }
        }
        self.finish()
    }

    fn message(&mut self, message: &Message) {
        let first_field = (self.fields.len() / layout::FIELD_WORDS) as u32;
        let first_oneof = (self.oneofs.len() / layout::ONEOF_WORDS) as u32;
        let known = WELL_KNOWN.iter().find(|(name, _)| *name == message.name).map_or(0, |(_, kind)| *kind);
        let flags = known
            | bit(message.map_entry, flag::MAP_ENTRY)
            | bit(message.work_in_progress, flag::MESSAGE_WIP)
            | bit(message.unchecked, flag::UNCHECKED);
        let name = self.intern(message.name.as_bytes());
        let file = self.intern(message.file.as_bytes());
        let counts = message.fields.len() as u32 | (message.oneofs.len() as u32) << 16;
        self.messages.extend([name, file, flags, first_field, first_oneof, counts]);
        for oneof in &message.oneofs {
            let name = self.intern(oneof.name.as_bytes());
            self.oneofs.extend([name, u32::from(oneof.required)]);
        }
    }

    fn field(
        &mut self,
        field: &Field,
        messages: &HashMap<&str, u32>,
        enums: &HashMap<&str, u32>,
        entries: &[bool],
    ) {
        let type_index = match field.kind {
            11 => messages[field.type_name.as_str()],
            14 => enums[field.type_name.as_str()],
            _ => layout::NONE,
        };
        let map = field.kind == 11 && entries[type_index as usize];
        let presence = !field.repeated && (field.kind == 11 || field.oneof.is_some() || field.optional);
        let repeated = field.repeated && !map;
        let flags = bit(repeated, flag::REPEATED)
            | bit(map, flag::MAP)
            | bit(presence, flag::PRESENCE)
            | bit(field.deprecated, flag::DEPRECATED)
            | bit(field.disallowed, flag::DISALLOWED)
            | bit(field.sensitive, flag::SENSITIVE)
            | bit(field.work_in_progress, flag::FIELD_WIP)
            | bit(field.packed == Some(false), flag::UNPACKED);
        let oneof = field.oneof.map_or(0, |index| index + 1);
        let packed = u32::from(field.kind) | oneof << 8 | flags << 16;
        let name = self.intern(field.name.as_bytes());
        let json = self.intern(field.json_name.as_bytes());
        let rules = if field.rules.is_empty() { 0 } else { self.intern(&field.rules) };
        self.fields.extend([field.number, name, json, type_index, packed, rules]);
    }

    fn intern(&mut self, bytes: &[u8]) -> u32 {
        if let Some(at) = self.pooled.get(bytes) {
            return *at;
        }
        let at = self.pool.len() as u32;
        let length = u16::try_from(bytes.len()).expect("pool entries are short");
        self.pool.extend_from_slice(&length.to_le_bytes());
        self.pool.extend_from_slice(bytes);
        self.pooled.insert(bytes.to_vec(), at);
        at
    }

    fn finish(self) -> Vec<u8> {
        let sections = [&self.messages, &self.fields, &self.oneofs, &self.enums, &self.values];
        let mut header = vec![layout::MAGIC];
        let mut at = (layout::HEADER_WORDS * 4) as u32;
        for section in sections {
            header.push(at);
            at += section.len() as u32 * 4;
        }
        header.push(at);
        header.push((self.messages.len() / layout::MESSAGE_WORDS) as u32);
        header.push((self.enums.len() / layout::ENUM_WORDS) as u32);
        assert_eq!(header.len(), layout::HEADER_WORDS);
        let mut out = Vec::new();
        for word in header.iter().chain(sections.into_iter().flatten()) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.pool);
        out
    }
}
