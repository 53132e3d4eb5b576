//! Protobuf's text form (`.pb_text`).
//!
//! Read straight into the encoded message. What the form's specification has is read: fields by name or number in
//! `{}` or `<>`, lists, `#` comments, adjacent strings, escapes, integers in three radices, `inf` and `nan`, enums by
//! name or number, `Any` opened as `[type.googleapis.com/NAME] { … }`, separators `,` and `;`. A field that is not
//! repeated may stand once, and of a oneof one member.

use crate::{
    error::{ErrorKind, LoadError, Path, Position},
    json,
    schema::{Field, Kind, Message, WellKnown},
    wire,
};

/// Reads `source` as `message`.
pub(crate) fn parse(message: Message, source: &str) -> Result<Vec<u8>, LoadError> {
    let mut reader = Reader { source, at: 0, out: Vec::with_capacity(source.len() / 2), depth: 0 };
    reader.fields(message, None, &Path::ROOT)?;
    Ok(reader.out)
}

struct Reader<'s> {
    source: &'s str,
    at: usize,
    out: Vec<u8>,
    depth: usize,
}

type Done = Result<(), LoadError>;

impl<'s> Reader<'s> {
    fn error(&self, path: &Path<'_>, reason: impl Into<String>) -> LoadError {
        let mut error = path.error(ErrorKind::Syntax, reason);
        error.position = Some(Position::of(self.source, self.at));
        error
    }

    fn rest(&self) -> &'s str {
        self.source.get(self.at..).unwrap_or_default()
    }

    /// Skips blanks and comments and looks at what follows.
    fn peek(&mut self) -> Option<char> {
        loop {
            let rest = self.rest();
            let next = rest.chars().next()?;
            if next == '#' {
                self.at += rest.find('\n').unwrap_or(rest.len());
            } else if next.is_ascii_whitespace() || next == '\u{b}' {
                self.at += 1;
            } else {
                return Some(next);
            }
        }
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    fn expect(&mut self, wanted: char, path: &Path<'_>) -> Done {
        if self.eat(wanted) {
            return Ok(());
        }
        let found = self.peek().map_or("the end".to_owned(), |c| format!("'{c}'"));
        Err(self.error(path, format!("expected '{wanted}', found {found}")))
    }

    /// An identifier or a number: everything up to a character that can be part of neither.
    fn word(&mut self) -> &'s str {
        self.peek();
        let rest = self.rest();
        let mut previous = ' ';
        let end = rest
            .find(|c: char| {
                let exponent = matches!(previous, 'e' | 'E') && matches!(c, '+' | '-');
                previous = c;
                !(c.is_ascii_alphanumeric() || c == '_' || c == '.' || exponent)
            })
            .unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Fields up to the closing bracket, or to the end of the text.
    fn fields(&mut self, message: Message, close: Option<char>, path: &Path<'_>) -> Done {
        self.depth += 1;
        if self.depth > json::MAX_DEPTH {
            let mut error = self.error(path, format!("more than {} levels of nesting", json::MAX_DEPTH));
            error.kind = ErrorKind::TooLarge;
            return Err(error);
        }
        let mut seen = Seen::default();
        loop {
            match self.peek() {
                None if close.is_none() => break,
                None => return Err(self.error(path, "unexpected end of the text")),
                found if found == close => {
                    self.at += 1;
                    break;
                }
                Some('[') => self.any(message, path)?,
                Some(_) => self.member(message, &mut seen, path)?,
            }
            if !self.eat(',') {
                self.eat(';');
            }
        }
        self.depth -= 1;
        Ok(())
    }

    fn member(&mut self, message: Message, seen: &mut Seen, path: &Path<'_>) -> Done {
        let start = self.at;
        let name = self.word();
        let field = match name.parse::<u32>() {
            Ok(number) => message.field(number),
            Err(_) => message.fields().find(|field| field.name() == name),
        };
        let Some(field) = field else {
            self.at = start;
            let reason = match self.peek() {
                Some(c) if name.is_empty() => format!("expected a field, found '{c}'"),
                _ => format!("no such field '{name}' in {}", message.name()),
            };
            let mut error = self.error(&path.field(name), reason);
            error.kind = ErrorKind::UnknownField;
            return Err(error);
        };
        let path = path.known(field);
        if !field.is_repeated() && !field.is_map() && !seen.first(field) {
            return Err(self.error(&path, "the field, or another of its oneof, stands twice"));
        }
        let colon = self.eat(':');
        if !colon && field.message().is_none() {
            return Err(self.error(&path, "expected ':'"));
        }
        if self.peek() != Some('[') || !(field.is_repeated() || field.is_map()) {
            return self.value(field, &path);
        }
        self.at += 1;
        if self.eat(']') {
            return Ok(());
        }
        for index in 0.. {
            self.value(field, &path.index(index))?;
            if !self.eat(',') {
                break;
            }
        }
        self.expect(']', &path)
    }

    fn bracket(&mut self, path: &Path<'_>) -> Result<char, LoadError> {
        if self.eat('<') {
            return Ok('>');
        }
        self.expect('{', path)?;
        Ok('}')
    }

    fn value(&mut self, field: Field, path: &Path<'_>) -> Done {
        if let Some(inner) = field.message() {
            let close = self.bracket(path)?;
            let hole = wire::open(&mut self.out, field.number(), 64);
            self.fields(inner, Some(close), path)?;
            wire::close(&mut self.out, hole);
            return Ok(());
        }
        let number = field.number();
        match field.kind() {
            Kind::String | Kind::Bytes => {
                let bytes = self.string(path)?;
                if field.kind() == Kind::String && std::str::from_utf8(&bytes).is_err() {
                    return Err(self.error(path, "the string is not UTF-8"));
                }
                if field.has_presence() || field.is_repeated() || !bytes.is_empty() {
                    wire::put_bytes(&mut self.out, number, &bytes);
                }
                return Ok(());
            }
            _ => {}
        }
        let negative = self.eat('-');
        let word = self.word();
        let bits = scalar(field, negative, word).ok_or_else(|| {
            let sign = if negative { "-" } else { "" };
            self.error(path, format!("'{sign}{word}' does not fit the field's type"))
        })?;
        if bits == 0 && !field.has_presence() && !field.is_repeated() {
            return Ok(());
        }
        wire::put_tag(&mut self.out, number, field.kind().wire_type());
        match field.kind().wire_type() {
            1 => self.out.extend_from_slice(&bits.to_le_bytes()),
            5 => self.out.extend_from_slice(&(bits as u32).to_le_bytes()),
            _ => wire::put_varint(&mut self.out, bits),
        }
        Ok(())
    }

    /// `[type.googleapis.com/NAME] { … }` within an `Any`.
    fn any(&mut self, message: Message, path: &Path<'_>) -> Done {
        if message.well_known() != WellKnown::Any {
            return Err(self.error(path, "only a google.protobuf.Any can hold a type URL"));
        }
        self.at += 1;
        let rest = self.rest();
        let end = rest.find(']').ok_or_else(|| self.error(path, "expected ']'"))?;
        let type_url = rest[..end].trim();
        let inner = type_url.contains('/').then(|| Message::of_type_url(type_url)).flatten();
        let Some(inner) = inner else {
            let mut error = self.error(path, format!("unknown type URL '{type_url}'"));
            error.kind = ErrorKind::UnknownType;
            return Err(error);
        };
        self.at += end + 1;
        self.eat(':');
        let close = self.bracket(path)?;
        wire::put_bytes(&mut self.out, 1, type_url.as_bytes());
        let hole = wire::open(&mut self.out, 2, 64);
        self.fields(inner, Some(close), path)?;
        wire::close(&mut self.out, hole);
        Ok(())
    }

    /// One or more adjacent string literals.
    fn string(&mut self, path: &Path<'_>) -> Result<Vec<u8>, LoadError> {
        let mut out = Vec::new();
        if !matches!(self.peek(), Some('"' | '\'')) {
            return Err(self.error(path, "expected a string"));
        }
        while let Some(quote @ ('"' | '\'')) = self.peek() {
            self.at += 1;
            loop {
                let rest = self.rest();
                let Some(c) = rest.chars().next().filter(|c| *c != '\n') else {
                    return Err(self.error(path, "the string has no end"));
                };
                self.at += c.len_utf8();
                if c == quote {
                    break;
                }
                if c == '\\' {
                    self.escape(&mut out, path)?;
                } else {
                    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                }
            }
        }
        Ok(out)
    }

    /// As many digits as there are, up to `most`.
    fn digits(&mut self, radix: u32, most: usize) -> Option<u32> {
        let rest = self.rest();
        let count = rest.chars().take(most).take_while(|c| c.is_digit(radix)).count();
        self.at += count;
        u32::from_str_radix(&rest[..count], radix).ok()
    }

    fn escape(&mut self, out: &mut Vec<u8>, path: &Path<'_>) -> Done {
        let invalid = |reader: &Self| reader.error(path, "invalid escape in the string");
        let Some(c) = self.rest().chars().next() else { return Err(invalid(self)) };
        if c.is_digit(8) {
            let byte =
                self.digits(8, 3).and_then(|value| u8::try_from(value).ok()).ok_or_else(|| invalid(self))?;
            out.push(byte);
            return Ok(());
        }
        self.at += c.len_utf8();
        let byte = match c {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 11,
            '\\' | '\'' | '"' | '?' => c as u8,
            'x' | 'X' => self.digits(16, 2).ok_or_else(|| invalid(self))? as u8,
            'u' | 'U' => {
                let most = if c == 'u' { 4 } else { 8 };
                let before = self.at;
                let code = self.digits(16, most).filter(|_| self.at == before + most);
                let c = code.and_then(char::from_u32).ok_or_else(|| invalid(self))?;
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(invalid(self)),
        };
        out.push(byte);
        Ok(())
    }
}

/// Fields that stand already, and oneofs.
#[derive(Default)]
struct Seen {
    fields: Vec<u32>,
    oneofs: u64,
}

impl Seen {
    fn first(&mut self, field: Field) -> bool {
        let bit = field.oneof().map_or(0, |oneof| 1 << (oneof & 63));
        let again = self.fields.contains(&field.number()) || self.oneofs & bit != 0;
        self.fields.push(field.number());
        self.oneofs |= bit;
        !again
    }
}

fn integer(word: &str) -> Option<u64> {
    match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if word.len() > 1 && word.starts_with('0') => u64::from_str_radix(&word[1..], 8).ok(),
        // A sign has been read already; `parse` would take another one.
        None => word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.parse().ok()).flatten(),
    }
}

fn signed(negative: bool, word: &str, min: i64, max: i64) -> Option<i64> {
    let magnitude = i128::from(integer(word)?);
    let value = i64::try_from(if negative { -magnitude } else { magnitude }).ok()?;
    (min..=max).contains(&value).then_some(value)
}

fn unsigned(negative: bool, word: &str, max: u64) -> Option<u64> {
    integer(word).filter(|value| *value <= max && (!negative || *value == 0))
}

fn float(negative: bool, word: &str) -> Option<f64> {
    let word = word.to_ascii_lowercase();
    let value = match word.as_str() {
        "inf" | "infinity" => f64::INFINITY,
        "nan" => f64::NAN,
        word => match integer(word) {
            Some(value) => value as f64,
            None if word.starts_with(|c: char| c.is_ascii_digit() || c == '.') => {
                word.strip_suffix('f').unwrap_or(word).parse().ok()?
            }
            None => return None,
        },
    };
    Some(if negative { -value } else { value })
}

/// The bits of a value as they go on the wire.
fn scalar(field: Field, negative: bool, word: &str) -> Option<u64> {
    let (i32_min, i32_max) = (i64::from(i32::MIN), i64::from(i32::MAX));
    let zigzag = |value: i64| ((value << 1) ^ (value >> 63)) as u64;
    Some(match field.kind() {
        Kind::Double => float(negative, word)?.to_bits(),
        Kind::Float => u64::from((float(negative, word)? as f32).to_bits()),
        Kind::Int64 | Kind::Sfixed64 => signed(negative, word, i64::MIN, i64::MAX)? as u64,
        Kind::Int32 | Kind::Sfixed32 => signed(negative, word, i32_min, i32_max)? as u64,
        Kind::Sint64 => zigzag(signed(negative, word, i64::MIN, i64::MAX)?),
        Kind::Sint32 => zigzag(signed(negative, word, i32_min, i32_max)?),
        Kind::Uint64 | Kind::Fixed64 => unsigned(negative, word, u64::MAX)?,
        Kind::Uint32 | Kind::Fixed32 => unsigned(negative, word, u64::from(u32::MAX))?,
        Kind::Bool => match (negative, word) {
            (false, "true" | "True" | "t" | "1") => 1,
            (false, "false" | "False" | "f" | "0") => 0,
            _ => return None,
        },
        Kind::Enum => {
            let values = field.enumeration()?;
            match values.values().find(|value| value.name() == word && !negative) {
                Some(value) => i64::from(value.number()) as u64,
                None => signed(negative, word, i32_min, i32_max)? as u64,
            }
        }
        Kind::String | Kind::Bytes | Kind::Message => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::print::{PrintOptions, to_json};

    fn read(source: &str) -> Result<String, LoadError> {
        let message = Message::find("envoy.config.bootstrap.v3.Bootstrap").unwrap();
        let bytes = parse(message, source)?;
        to_json(message, &bytes, PrintOptions::default())
    }

    #[test]
    fn all_forms_are_read() {
        let source = r#"
            # a comment
            node { id: "a" 'b\x41\101\u00e9' cluster: "c"; locality: <zone: "z">, metadata {
                fields { key: "k" value { number_value: 1.5e1 } }
            } }
            static_resources {
                clusters: [ { name: "x" connect_timeout { seconds: 0x10 nanos: 500000000 } type: STATIC
                              lb_policy: 2 typed_extension_protocol_options { key: "e" value {
                                [type.googleapis.com/google.protobuf.StringValue] { value: "v" } } } },
                            { name: "y" alt_stat_name: "" respect_dns_ttl: true } ]
            }
            cluster_manager { load_stats_config { transport_api_version: V3 set_node_on_first_message_only: true } }
        "#;
        assert_eq!(
            read(source).unwrap(),
            "{\"node\":{\"id\":\"abAAé\",\"cluster\":\"c\",\"metadata\":{\"k\":15},\"locality\":{\"zone\":\"z\"}},\
             \"static_resources\":{\"clusters\":[{\"name\":\"x\",\"type\":\"STATIC\",\"connect_timeout\":\"16.500s\",\
             \"lb_policy\":\"RING_HASH\",\"typed_extension_protocol_options\":{\"e\":{\"@type\":\
             \"type.googleapis.com/google.protobuf.StringValue\",\"value\":\"v\"}}},{\"name\":\"y\",\
             \"respect_dns_ttl\":true}]},\"cluster_manager\":{\"load_stats_config\":\
             {\"set_node_on_first_message_only\":true,\"transport_api_version\":\"V3\"}}}"
        );
    }

    #[test]
    fn faults_name_their_place() {
        for (source, reason) in [
            ("node { id: 5 }", "1:12: node.id: expected a string"),
            ("node { bogus: 5 }", "1:8: node.bogus: no such field 'bogus' in envoy.config.core.v3.Node"),
            ("node { id: 'a' id: 'b' }", "1:18: node.id: the field, or another of its oneof, stands twice"),
            ("node { id: 'a", "1:14: node.id: the string has no end"),
            ("node {", "1:7: node: unexpected end of the text"),
            ("node: 5", "1:7: node: expected '{', found '5'"),
            (
                "admin { address { socket_address { port_value: -1 } } }",
                "1:50: admin.address.socket_address.port_value: '-1' does not fit the field's type",
            ),
            ("}", "1:1: expected a field, found '}'"),
        ] {
            assert_eq!(read(source).unwrap_err().to_string(), reason, "{source}");
        }
        let deep = "node{metadata{".to_owned() + &"fields{value{struct_value{".repeat(60);
        assert_eq!(read(&deep).unwrap_err().kind, ErrorKind::TooLarge);
    }
}
