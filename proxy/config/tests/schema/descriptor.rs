//! Reads a `FileDescriptorSet` with its custom options.
//!
//! `prost-types` drops the extensions (`validate.rules`, deprecation and sensitivity marks), so the few fields of
//! `descriptor.proto` that matter are read straight from the wire.

use sampan_config::wire::{Reader, Value};

/// One message type, flattened out of its nesting.
#[derive(Clone, Default)]
pub struct Message {
    pub name: String,
    pub file: String,
    pub fields: Vec<Field>,
    pub oneofs: Vec<Oneof>,
    pub map_entry: bool,
    pub work_in_progress: bool,
    /// `validate.disabled` or `validate.ignored`: no rules are enforced for this message.
    pub unchecked: bool,
}

#[derive(Clone, Default)]
pub struct Field {
    pub name: String,
    pub json_name: String,
    pub number: u32,
    pub kind: u8,
    pub repeated: bool,
    /// Full name without the leading dot, for messages and enums.
    pub type_name: String,
    pub oneof: Option<u32>,
    pub optional: bool,
    pub packed: Option<bool>,
    pub deprecated: bool,
    pub disallowed: bool,
    pub sensitive: bool,
    pub work_in_progress: bool,
    pub rules: Vec<u8>,
}

#[derive(Clone, Default)]
pub struct Oneof {
    pub name: String,
    pub required: bool,
}

#[derive(Clone, Default)]
pub struct Enum {
    pub name: String,
    pub values: Vec<EnumValue>,
}

#[derive(Clone, Default)]
pub struct EnumValue {
    pub name: String,
    pub number: i32,
    pub deprecated: bool,
    pub disallowed: bool,
}

#[derive(Default)]
pub struct Types {
    pub messages: Vec<Message>,
    pub enums: Vec<Enum>,
}

/// Extension numbers of the annotations.
mod ext {
    pub const VALIDATE: u32 = 1071;
    pub const VALIDATE_IGNORED: u32 = 1072;
    /// `envoy.annotations.disallowed_by_default` (fields) and `_enum` (values).
    pub const DISALLOWED_FIELD: u32 = 189_503_207;
    pub const DISALLOWED_VALUE: u32 = 70_100_853;
    pub const UDPA_SENSITIVE: u32 = 76_569_463;
    pub const UDPA_FILE_STATUS: u32 = 222_707_719;
    /// One number for the file, message and field options.
    pub const XDS_STATUS: u32 = 226_829_418;
}

fn fields(bytes: &[u8]) -> impl Iterator<Item = (u32, Value<'_>)> {
    Reader::new(bytes).map(|field| field.expect("descriptor set is well formed"))
}

fn text(value: Value<'_>) -> String {
    match value {
        Value::Bytes(bytes) => String::from_utf8(bytes.to_vec()).expect("names are UTF-8"),
        _ => panic!("a name is length delimited"),
    }
}

fn bytes(value: Value<'_>) -> &[u8] {
    match value {
        Value::Bytes(bytes) => bytes,
        _ => panic!("expected a length delimited field"),
    }
}

fn number(value: Value<'_>) -> u64 {
    match value {
        Value::Varint(n) => n,
        _ => panic!("expected a varint"),
    }
}

impl Types {
    /// Reads all files of a serialized `FileDescriptorSet`.
    pub fn read(set: &[u8]) -> Self {
        let mut types = Self::default();
        for (n, file) in fields(set) {
            if n == 1 {
                types.read_file(bytes(file));
            }
        }
        types
    }

    fn read_file(&mut self, file: &[u8]) {
        let (mut name, mut package, mut wip, mut proto3) = (String::new(), String::new(), false, false);
        for (n, value) in fields(file) {
            match n {
                1 => name = text(value),
                2 => package = text(value),
                8 => wip = file_work_in_progress(bytes(value)),
                12 => proto3 = text(value) == "proto3",
                _ => {}
            }
        }
        let file_name = name.rsplit('/').next().unwrap_or_default().to_owned();
        for (n, value) in fields(file) {
            match n {
                4 => self.read_message(bytes(value), &package, &file_name, wip, proto3),
                5 => self.read_enum(bytes(value), &package),
                _ => {}
            }
        }
    }

    fn read_message(&mut self, descriptor: &[u8], prefix: &str, file: &str, wip: bool, proto3: bool) {
        let name = fields(descriptor).find(|(n, _)| *n == 1).map(|(_, v)| text(v)).unwrap_or_default();
        let full = format!("{prefix}.{name}");
        let mut message = Message {
            name: full.clone(),
            file: file.to_owned(),
            work_in_progress: wip,
            ..Message::default()
        };
        for (n, value) in fields(descriptor) {
            match n {
                2 => message.fields.push(read_field(bytes(value), proto3)),
                3 => self.read_message(bytes(value), &full, file, wip, proto3),
                4 => self.read_enum(bytes(value), &full),
                7 => read_message_options(bytes(value), &mut message),
                8 => message.oneofs.push(read_oneof(bytes(value))),
                _ => {}
            }
        }
        self.messages.push(message);
    }

    fn read_enum(&mut self, descriptor: &[u8], prefix: &str) {
        let mut out = Enum::default();
        for (n, value) in fields(descriptor) {
            match n {
                1 => out.name = format!("{prefix}.{}", text(value)),
                2 => out.values.push(read_enum_value(bytes(value))),
                _ => {}
            }
        }
        self.enums.push(out);
    }
}

fn file_work_in_progress(options: &[u8]) -> bool {
    fields(options).any(|(n, value)| match n {
        // udpa.annotations.StatusAnnotation.work_in_progress = 1, and the same in xds.annotations.v3.
        ext::UDPA_FILE_STATUS | ext::XDS_STATUS => status_work_in_progress(bytes(value)),
        _ => false,
    })
}

fn status_work_in_progress(status: &[u8]) -> bool {
    fields(status).any(|(n, value)| n == 1 && number(value) != 0)
}

fn read_message_options(options: &[u8], message: &mut Message) {
    for (n, value) in fields(options) {
        match n {
            7 => message.map_entry = number(value) != 0,
            ext::VALIDATE | ext::VALIDATE_IGNORED => message.unchecked |= number(value) != 0,
            ext::XDS_STATUS => message.work_in_progress |= status_work_in_progress(bytes(value)),
            _ => {}
        }
    }
}

fn read_oneof(descriptor: &[u8]) -> Oneof {
    let mut out = Oneof::default();
    for (n, value) in fields(descriptor) {
        match n {
            1 => out.name = text(value),
            2 => out.required = fields(bytes(value)).any(|(n, v)| n == ext::VALIDATE && number(v) != 0),
            _ => {}
        }
    }
    out
}

fn read_enum_value(descriptor: &[u8]) -> EnumValue {
    let mut out = EnumValue::default();
    for (n, value) in fields(descriptor) {
        match n {
            1 => out.name = text(value),
            2 => out.number = number(value) as i32,
            3 => {
                for (n, value) in fields(bytes(value)) {
                    match n {
                        1 => out.deprecated = number(value) != 0,
                        ext::DISALLOWED_VALUE => out.disallowed = number(value) != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    out
}

fn read_field(descriptor: &[u8], proto3: bool) -> Field {
    let mut out = Field::default();
    for (n, value) in fields(descriptor) {
        match n {
            1 => out.name = text(value),
            3 => out.number = number(value) as u32,
            4 => out.repeated = number(value) == 3,
            5 => out.kind = number(value) as u8,
            6 => out.type_name = text(value).trim_start_matches('.').to_owned(),
            8 => read_field_options(bytes(value), &mut out),
            9 => out.oneof = Some(number(value) as u32),
            10 => out.json_name = text(value),
            17 => out.optional = number(value) != 0,
            _ => {}
        }
    }
    if out.optional {
        // The oneof that proto3 `optional` makes up is no oneof to the reader of a configuration.
        out.oneof = None;
    }
    out.optional |= !proto3 && !out.repeated;
    out
}

fn read_field_options(options: &[u8], out: &mut Field) {
    for (n, value) in fields(options) {
        match n {
            2 => out.packed = Some(number(value) != 0),
            3 => out.deprecated = number(value) != 0,
            ext::DISALLOWED_FIELD => out.disallowed = number(value) != 0,
            ext::UDPA_SENSITIVE => out.sensitive = number(value) != 0,
            ext::XDS_STATUS => out.work_in_progress = status_work_in_progress(bytes(value)),
            ext::VALIDATE => out.rules.extend_from_slice(bytes(value)),
            _ => {}
        }
    }
}
