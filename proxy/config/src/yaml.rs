//! YAML text to a [`Tape`], with the types that Envoy gives to scalars.
//!
//! Envoy reads YAML with yaml-cpp into JSON and that into the message. What follows from this:
//! - A quoted or block scalar is a string. A plain one is null (`~`, `null`, nothing), a boolean (`y`, `yes`, `true`,
//!   `on` and their opposites in three cases), an integer (decimal, `0x`, leading `0` for octal) or else a string: a
//!   plain `1.5` is the string "1.5", which a number field takes as a number. Integers beyond 32 bits are strings too.
//! - Tags other than `!` do not matter; a key tagged `!ignore` hides its member, whose anchors stay usable.
//! - Of several equal keys the last one counts. Merge keys (`<<`) are ordinary keys.
//! - Only the first document is read; what follows it is not even parsed.
//!
//! Aliases cost an index each here, but the encoder writes their target every time: it bounds the expansion.

mod relax;

use std::{borrow::Cow, collections::HashMap};

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, StrInput, Tag};

use crate::{
    error::{ErrorKind, LoadError, Position},
    tape::{NodeKind, Tape},
};

/// Depth that yaml-cpp allows.
pub(crate) const MAX_DEPTH: usize = 500;

/// Reads the first document of a YAML stream. An empty stream gives an empty tape.
pub(crate) fn parse(source: &str) -> Result<Tape<'_>, LoadError> {
    if u32::try_from(source.len()).is_err() {
        return Err(LoadError::new(ErrorKind::TooLarge, "the document is larger than 4 GiB"));
    }
    let source = source.strip_prefix('\u{feff}').unwrap_or(source);
    match Reader::read(source, source) {
        Ok(tape) => Ok(tape),
        // The parser is stricter than yaml-cpp in places.
        Err(error) => {
            relax::relax(source).and_then(|relaxed| Reader::read(source, &relaxed).ok()).ok_or(error)
        }
    }
}

struct Reader<'s, 't> {
    tape: Tape<'s>,
    /// What is parsed: the source, or a text that differs from it in blanks.
    text: &'t str,
    /// Node of each anchor, by the number that the parser gave it.
    anchors: Vec<Option<usize>>,
    offsets: Offsets<'t>,
}

/// The text of a scalar.
type Text<'t> = Cow<'t, str>;

/// The parser counts characters; the tape counts bytes.
struct Offsets<'s> {
    source: &'s str,
    ascii: bool,
    character: usize,
    byte: usize,
}

impl Offsets<'_> {
    fn byte(&mut self, character: usize) -> usize {
        if self.ascii {
            return character;
        }
        if character < self.character {
            (self.character, self.byte) = (0, 0);
        }
        let rest = self.source.get(self.byte..).unwrap_or_default();
        let skip = character - self.character;
        let bytes = rest.char_indices().nth(skip).map_or(rest.len(), |(at, _)| at);
        self.character = character;
        self.byte += bytes;
        self.byte
    }
}

impl<'s, 't> Reader<'s, 't> {
    fn read(source: &'s str, text: &'t str) -> Result<Tape<'s>, LoadError> {
        let mut reader = Self {
            tape: Tape::new(source),
            text,
            anchors: Vec::new(),
            offsets: Offsets { source: text, ascii: text.is_ascii(), character: 0, byte: 0 },
        };
        reader.document(Parser::new_from_str(text))?;
        Ok(reader.tape)
    }

    fn push_text(&mut self, kind: NodeKind, text: &Text<'t>, at: usize) {
        match text {
            Cow::Borrowed(part) => {
                let start = (part.as_ptr() as usize).wrapping_sub(self.text.as_ptr() as usize);
                self.tape.push_text(kind, part, start, at);
            }
            Cow::Owned(text) => self.tape.push_owned(kind, text, at),
        }
    }

    fn error(&self, kind: ErrorKind, at: usize, reason: impl Into<String>) -> LoadError {
        let mut error = LoadError::new(kind, reason);
        error.position = Some(Position::of(self.tape.source(), at));
        error
    }

    fn document(&mut self, mut parser: Parser<'t, StrInput<'t>>) -> Result<(), LoadError> {
        while let Some(next) = parser.next_event() {
            let (event, span) = next.map_err(scan_error)?;
            let at = self.offsets.byte(span.start.index());
            match event {
                Event::Nothing | Event::StreamStart | Event::DocumentStart(_) => continue,
                Event::StreamEnd | Event::DocumentEnd => return Ok(()),
                Event::Alias(anchor) => self.alias(anchor, at)?,
                Event::Scalar(text, style, anchor, tag) => {
                    self.scalar(&text, style, anchor, tag.as_deref(), at)?
                }
                Event::SequenceStart(anchor, _) => self.open(NodeKind::Array, anchor, at)?,
                Event::MappingStart(anchor, _) => self.open(NodeKind::Object, anchor, at)?,
                Event::SequenceEnd => {
                    self.tape.close();
                }
                Event::MappingEnd => {
                    let object = self.tape.close();
                    self.drop_duplicates(object);
                }
            }
            if self.tape.depth() == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    fn is_key(&self) -> bool {
        matches!(self.tape.open_members(), Some((NodeKind::Object, members)) if members % 2 == 0)
    }

    fn anchor(&mut self, anchor: usize) {
        if anchor != 0 {
            if self.anchors.len() <= anchor {
                self.anchors.resize(anchor + 1, None);
            }
            self.anchors[anchor] = Some(self.tape.len());
        }
    }

    fn open(&mut self, kind: NodeKind, anchor: usize, at: usize) -> Result<(), LoadError> {
        if self.is_key() {
            return Err(self.error(ErrorKind::Syntax, at, "a key must be a scalar"));
        }
        if self.tape.depth() >= MAX_DEPTH {
            return Err(self.error(
                ErrorKind::TooLarge,
                at,
                format!("more than {MAX_DEPTH} levels of nesting"),
            ));
        }
        self.anchor(anchor);
        self.tape.open(kind, at);
        Ok(())
    }

    fn alias(&mut self, anchor: usize, at: usize) -> Result<(), LoadError> {
        let target = self.anchors.get(anchor).copied().flatten();
        let Some(target) = target else {
            return Err(self.error(ErrorKind::Syntax, at, "the alias names no anchor"));
        };
        if self.tape.is_open(target) {
            return Err(self.error(ErrorKind::Syntax, at, "the alias names a value that contains it"));
        }
        if !self.is_key() {
            self.tape.push_alias(target, at);
            return Ok(());
        }
        if matches!(self.tape.kind(target), NodeKind::Array | NodeKind::Object) {
            return Err(self.error(ErrorKind::Syntax, at, "a key must be a scalar"));
        }
        let text = match self.tape.kind(target) {
            NodeKind::Null => "null".to_owned(),
            NodeKind::True => "true".to_owned(),
            NodeKind::False => "false".to_owned(),
            _ => self.tape.text(target).to_owned(),
        };
        self.tape.push_owned(NodeKind::String, &text, at);
        Ok(())
    }

    fn scalar(
        &mut self,
        text: &Text<'t>,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
        at: usize,
    ) -> Result<(), LoadError> {
        let plain = style == ScalarStyle::Plain;
        let key = self.is_key();
        self.anchor(anchor);
        if key {
            let null = plain && tag.is_none() && is_null(text);
            if null {
                self.tape.push_owned(NodeKind::String, "null", at);
            } else {
                self.push_text(NodeKind::String, text, at);
            }
            if tag.is_some_and(|tag| tag.handle == "!" && tag.suffix == "ignore") {
                self.tape.hide(self.tape.len() - 1);
            }
            return Ok(());
        }
        // What the specification calls the non-specific tag: a string, whatever it looks like.
        let string = match tag {
            None => !plain,
            Some(tag) => {
                tag.handle.is_empty() && tag.suffix == "!" || tag.handle == "!" && tag.suffix.is_empty()
            }
        };
        if string {
            self.push_text(NodeKind::String, text, at);
        } else if plain && tag.is_none() && is_null(text) {
            self.tape.push_literal(NodeKind::Null, at);
        } else if let Some(value) = boolean(text) {
            self.tape.push_literal(if value { NodeKind::True } else { NodeKind::False }, at);
        } else if let Some(value) = integer(text) {
            let kind = if i32::try_from(value).is_ok() { NodeKind::Number } else { NodeKind::String };
            let digits = value.to_string();
            if digits == **text {
                self.push_text(kind, text, at);
            } else {
                self.tape.push_owned(kind, &digits, at);
            }
        } else {
            self.push_text(NodeKind::String, text, at);
        }
        Ok(())
    }

    /// Hides all but the last of equal keys.
    fn drop_duplicates(&mut self, object: usize) {
        const FEW: usize = 16;
        let keys: Vec<usize> = self.tape.pairs(object).map(|(key, _)| key).collect();
        let mut hidden = Vec::new();
        if keys.len() <= FEW {
            for (index, key) in keys.iter().enumerate() {
                let text = self.tape.text(*key);
                if keys[index + 1..].iter().any(|later| self.tape.text(*later) == text) {
                    hidden.push(*key);
                }
            }
        } else {
            let mut last = HashMap::with_capacity(keys.len());
            hidden.extend(keys.iter().filter_map(|key| last.insert(self.tape.text(*key), *key)));
        }
        for key in hidden {
            self.tape.hide(key);
        }
    }
}

fn scan_error(error: ScanError) -> LoadError {
    let mut out = LoadError::new(ErrorKind::Syntax, error.info());
    let marker = error.marker();
    out.position = Some(Position { line: marker.line() as u32, column: marker.col() as u32 + 1 });
    out
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// yaml-cpp's booleans: each word in lower case, capitalised or in upper case.
fn boolean(text: &str) -> Option<bool> {
    if text.is_empty() || text.len() > 5 {
        return None;
    }
    let tail = text.get(1..)?;
    let lower = |s: &str| s.bytes().all(|b| b.is_ascii_lowercase());
    let upper = |s: &str| s.bytes().all(|b| b.is_ascii_uppercase());
    if !(lower(text) || upper(&text[..1]) && (lower(tail) || upper(tail))) {
        return None;
    }
    match text.to_ascii_lowercase().as_str() {
        "y" | "yes" | "true" | "on" => Some(true),
        "n" | "no" | "false" | "off" => Some(false),
        _ => None,
    }
}

/// An integer as C reads it with base 0.
fn integer(text: &str) -> Option<i64> {
    let first = *text.as_bytes().first()?;
    if !matches!(first, b'0'..=b'9' | b'+' | b'-') {
        return None;
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    // `from_str_radix` would take another sign.
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let magnitude = i128::from_str_radix(digits, radix).ok()?;
    i64::try_from(if first == b'-' { -magnitude } else { magnitude }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(source: &str) -> Vec<String> {
        let tape = parse(source).unwrap();
        tape.pairs(0)
            .map(|(key, value)| {
                let value = tape.resolve(value);
                format!("{}={:?}:{}", tape.text(key), tape.kind(value), tape.text(value))
            })
            .collect()
    }

    #[test]
    fn scalars_have_the_types_of_yaml_cpp() {
        assert_eq!(
            values(
                "a: 1.5\nb: 0x1F\nc: 010\nd: '8'\ne: Yes\nf: yES\ng: ~\nh:\ni: 5000000000\nj: -7\nk: 08\nl: +3\nm: |\n  true\n"
            ),
            [
                "a=String:1.5",
                "b=Number:31",
                "c=Number:8",
                "d=String:8",
                "e=True:",
                "f=String:yES",
                "g=Null:",
                "h=Null:",
                "i=String:5000000000",
                "j=Number:-7",
                "k=String:08",
                "l=Number:3",
                "m=String:true\n",
            ]
        );
        assert_eq!(
            values("{a: !!str true, b: ! true, c: !!str 5, d: !!str ''}"),
            ["a=True:", "b=String:true", "c=Number:5", "d=String:"]
        );
    }

    #[test]
    fn anchors_duplicates_and_ignored_members() {
        assert_eq!(values("!ignore x: &a foo\nid: *a"), ["id=String:foo"]);
        assert_eq!(values("a: 1\nb: 2\na: 3"), ["b=Number:2", "a=Number:3"]);
        let many: String = (0..40).map(|i| format!("k{}: {i}\n", i % 20)).collect();
        assert_eq!(values(&many).len(), 20);
        assert_eq!(values(&many)[0], "k0=Number:20");
        assert_eq!(values("? &k key\n: 1\n*k : 2\nnull: x\n"), ["key=Number:2", "null=String:x"]);
        assert_eq!(parse("a: &x [*x]").unwrap_err().reason, "the alias names a value that contains it");
        assert!(parse("a: *nothing").unwrap_err().position.is_some());
        assert_eq!(parse("[a]: b").unwrap_err().reason, "a key must be a scalar");
    }

    #[test]
    fn only_the_first_document_is_read() {
        assert_eq!(values("a: 1\n---\nb: ["), ["a=Number:1"]);
        assert!(parse("").unwrap().is_empty());
        assert!(parse("# nothing\n").unwrap().is_empty());
        assert_eq!(values("\u{feff}é: ü\nb: x"), ["é=String:ü", "b=String:x"]);
        let tape = parse("é: ü\nb: x").unwrap();
        let b = tape.pairs(0).nth(1).unwrap().0;
        assert_eq!(tape.position(b), Position { line: 2, column: 1 });
    }

    #[test]
    fn nesting_is_bounded() {
        assert_eq!(parse(&"- ".repeat(600)).unwrap_err().kind, ErrorKind::TooLarge);
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
