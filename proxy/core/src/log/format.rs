//! Patterns of lines, in spdlog's notation.
//!
//! `%g`, `%s`, `%#` and `%@` name the place in Sampan's source, `%!` (the function) is empty. Times are UTC.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

use super::level::{Component, Level};

/// The pattern when `--log-format` is not given.
pub const DEFAULT_FORMAT: &str = "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v";

/// A compiled pattern in spdlog's notation; a flag that is not known stands as it is written.
pub struct Format(Vec<Piece>);

/// A flag of a JSON format that prints the message as it is: it would break the JSON around it.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
#[error("setJsonLogFormat error: INVALID_ARGUMENT: Usage of {0} is unavailable for JSON log formats")]
pub struct JsonFormatError(&'static str);

/// The flags that print something. Without effect: `%^` and `%$`, the output has no colours.
const FLAGS: &str = "vtPlLngs#@!YmdHMSTXeFfEzDxRrCIpAaBbhcoiuOj_";

impl Format {
    /// Compiles a pattern.
    pub fn parse(pattern: &str) -> Self {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = pattern;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            let spec = &rest[at + 1..];
            let (pad, flag) = pad_of(spec);
            let Some(c) = flag.chars().next() else {
                rest = "";
                break;
            };
            rest = &flag[c.len_utf8()..];
            if c == '%' {
                text.push('%');
            } else if FLAGS.contains(c) {
                pieces.push(Piece::Text(std::mem::take(&mut text)));
                pieces.push(Piece::Flag(c, pad));
            } else if !matches!(c, '^' | '$') {
                text.push('%');
                text.push(c);
            }
        }
        text.push_str(rest);
        pieces.push(Piece::Text(text));
        Self(pieces)
    }

    /// A JSON object as a pattern (`application_log_config.log_format.json_format`), printed on one line with its
    /// keys sorted. The message must be asked for as `%j`.
    pub fn json(format: &Struct) -> Result<Self, JsonFormatError> {
        let pattern = json_of(&Kind::StructValue(format.clone())).to_string();
        match ["%v", "%_"].into_iter().find(|flag| pattern.contains(flag)) {
            Some(flag) => Err(JsonFormatError(flag)),
            None => Ok(Self::parse(&pattern)),
        }
    }

    pub(super) fn render(&self, line: &Line<'_>) -> String {
        let mut out = String::with_capacity(160);
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Flag(flag, pad) => {
                    let start = out.len();
                    // Writing to a string cannot fail.
                    let _ = line.flag(&mut out, *flag);
                    pad.apply(&mut out, start);
                }
            }
        }
        out.push('\n');
        out
    }
}

enum Piece {
    Text(String),
    Flag(char, Pad),
}

/// `%8l`, `%-8l`, `%=8l`, and with `!` cut to the width.
#[derive(Clone, Copy, Default)]
struct Pad {
    width: usize,
    side: char,
    cut: bool,
}

impl Pad {
    fn apply(self, out: &mut String, start: usize) {
        let length = out[start..].chars().count();
        let missing = self.width.saturating_sub(length);
        let before = match self.side {
            '-' => 0,
            '=' => missing / 2,
            _ => missing,
        };
        out.insert_str(start, &" ".repeat(before));
        out.push_str(&" ".repeat(missing - before));
        if self.cut && length > self.width {
            let end = out[start..].char_indices().nth(self.width).map_or(out.len(), |(i, _)| start + i);
            out.truncate(end);
        }
    }
}

fn pad_of(spec: &str) -> (Pad, &str) {
    let (side, digits) = match spec.strip_prefix(['-', '=']) {
        Some(digits) => (spec.as_bytes()[0] as char, digits),
        None => ('>', spec),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    // spdlog pads to 64 at most.
    match digits[..end].parse::<usize>() {
        Ok(width) => {
            let after = &digits[end..];
            let cut = after.strip_prefix('!').filter(|flag| !flag.is_empty());
            (Pad { width: width.min(64), side, cut: cut.is_some() }, cut.unwrap_or(after))
        }
        Err(_) => (Pad::default(), spec),
    }
}

fn json_of(kind: &Kind) -> serde_json::Value {
    let value = |v: &Value| v.kind.as_ref().map_or(serde_json::Value::Null, json_of);
    match kind {
        Kind::NullValue(_) => serde_json::Value::Null,
        Kind::NumberValue(n) if n.fract() == 0.0 && n.abs() < 1e15 => (*n as i64).into(),
        Kind::NumberValue(n) => (*n).into(),
        Kind::StringValue(s) => s.as_str().into(),
        Kind::BoolValue(b) => (*b).into(),
        Kind::ListValue(list) => list.values.iter().map(value).collect(),
        Kind::StructValue(fields) => {
            let sorted: BTreeMap<_, _> = fields.fields.iter().map(|(k, v)| (k.clone(), value(v))).collect();
            serde_json::Value::Object(sorted.into_iter().collect())
        }
    }
}

pub(super) struct Line<'a> {
    pub(super) now: jiff::Zoned,
    pub(super) component: Component,
    pub(super) level: Level,
    pub(super) file: &'a str,
    pub(super) line: u32,
    pub(super) message: &'a str,
    /// Since the line before.
    pub(super) elapsed: Duration,
}

impl Line<'_> {
    fn flag(&self, out: &mut String, flag: char) -> fmt::Result {
        let now = &self.now;
        match flag {
            'v' => out.write_str(self.message),
            '_' => write!(out, "{}", self.message.escape_debug()),
            'j' => {
                let quoted = serde_json::Value::from(self.message).to_string();
                out.write_str(quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default())
            }
            't' => write!(out, "{}", nix::unistd::gettid()),
            'P' => write!(out, "{}", std::process::id()),
            'l' => out.write_str(self.level.name()),
            'L' => write!(out, "{}", self.level.name().as_bytes()[0].to_ascii_uppercase() as char),
            'n' => out.write_str(self.component.name()),
            'g' => out.write_str(self.file),
            's' => out.write_str(self.file.rsplit('/').next().unwrap_or_default()),
            '#' => write!(out, "{}", self.line),
            '@' => write!(out, "{}:{}", self.file, self.line),
            '!' => Ok(()),
            'e' => write!(out, "{:03}", now.millisecond()),
            'f' => write!(out, "{:06}", now.subsec_nanosecond() / 1000),
            'F' => write!(out, "{:09}", now.subsec_nanosecond()),
            'E' => write!(out, "{}", now.timestamp().as_second()),
            'z' => out.write_str("+00:00"),
            'o' => write!(out, "{}", self.elapsed.as_millis()),
            'i' => write!(out, "{}", self.elapsed.as_micros()),
            'u' => write!(out, "{}", self.elapsed.as_nanos()),
            'O' => write!(out, "{}", self.elapsed.as_secs()),
            'C' => write!(out, "{}", now.strftime("%y")),
            other => {
                // The rest is as in strftime.
                let text = now.strftime(match other {
                    'Y' => "%Y",
                    'm' => "%m",
                    'd' => "%d",
                    'H' => "%H",
                    'M' => "%M",
                    'S' => "%S",
                    'T' | 'X' => "%H:%M:%S",
                    'r' => "%I:%M:%S %p",
                    'c' => "%a %b %e %H:%M:%S %Y",
                    'D' | 'x' => "%m/%d/%y",
                    'R' => "%H:%M",
                    'I' => "%I",
                    'p' => "%p",
                    'A' => "%A",
                    'a' => "%a",
                    'B' => "%B",
                    _ => "%b",
                });
                write!(out, "{text}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(message: &str) -> Line<'_> {
        let now = jiff::Timestamp::from_millisecond(1_792_556_112_007).unwrap();
        Line {
            now: now.to_zoned(jiff::tz::TimeZone::UTC),
            component: Component::Upstream,
            level: Level::Warn,
            file: "proxy/a/b.rs",
            line: 7,
            message,
            elapsed: Duration::from_millis(380),
        }
    }

    #[test]
    fn patterns_are_spdlogs() {
        let text = Format::parse("[%Y-%m-%d %T.%e][%l][%n] [%g:%#] %v 100%%").render(&line("hi"));
        assert_eq!(text, "[2026-10-21 04:15:12.007][warning][upstream] [proxy/a/b.rs:7] hi 100%\n");
        let text = Format::parse("{\"m\":\"%j\",\"s\":\"%s\",\"l\":\"%L\"}").render(&line("a\"b\n"));
        assert_eq!(text, "{\"m\":\"a\\\"b\\n\",\"s\":\"b.rs\",\"l\":\"W\"}\n");
        // What Envoy 1.40 printed for the same pattern.
        let pattern = "A%v|%q|%10l|%-10l|%=11l|%o|%i|%u|%O|%^|%$|%%|%x|%X|%r|%h|%w|%8Q|%a|%3!n|%";
        let expected = "Ahi|%q|   warning|warning   |  warning  |380|380000|380000000|0|||%|10/21/26|04:15:12|\
                        04:15:12 AM|Oct|%w|%Q|Wed|ups|\n";
        assert_eq!(Format::parse(pattern).render(&line("hi")), expected);
    }

    #[test]
    fn json_formats_escape_the_message() {
        let text = |s: &str| Value { kind: Some(Kind::StringValue(s.into())) };
        let format = |fields: Vec<(&str, Value)>| Struct {
            fields: fields.into_iter().map(|(k, v)| (k.into(), v)).collect(),
        };
        let inner = Value { kind: Some(Kind::StructValue(format(vec![("x", text("%n"))]))) };
        let number = Value { kind: Some(Kind::NumberValue(3.0)) };
        let log = format(vec![("msg", text("%j")), ("lvl", text("%l")), ("n", inner), ("num", number)]);
        assert_eq!(
            Format::json(&log).unwrap().render(&line("a\"b")),
            "{\"lvl\":\"warning\",\"msg\":\"a\\\"b\",\"n\":{\"x\":\"upstream\"},\"num\":3}\n"
        );
        let error = Format::json(&format(vec![("m", text("%v"))])).err().unwrap();
        assert_eq!(
            error.to_string(),
            "setJsonLogFormat error: INVALID_ARGUMENT: Usage of %v is unavailable for JSON log formats"
        );
    }
}
