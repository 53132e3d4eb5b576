//! JSON text to a [`Tape`].
//!
//! Envoy reads JSON with protobuf's parser in its lenient mode, so this reader takes what that takes beyond RFC 8259:
//! trailing commas, single-quoted strings, bare words as keys, control characters within strings, `\'` and `\U`. It
//! refuses what that refuses: comments, leading zeros, unpaired surrogates, more than 100 levels, anything after the
//! document.

use crate::{
    error::{ErrorKind, LoadError, Position},
    tape::{NodeKind, Tape},
};

/// Depth that protobuf's JSON parser allows.
pub(crate) const MAX_DEPTH: usize = 100;

/// Reads one JSON document.
pub(crate) fn parse(source: &str) -> Result<Tape<'_>, LoadError> {
    if u32::try_from(source.len()).is_err() {
        return Err(LoadError::new(ErrorKind::TooLarge, "the document is larger than 4 GiB"));
    }
    let mut reader = Reader { source, at: 0, tape: Tape::new(source), text: String::new() };
    reader.document()?;
    Ok(reader.tape)
}

struct Reader<'s> {
    source: &'s str,
    at: usize,
    tape: Tape<'s>,
    text: String,
}

/// What comes next within a container.
#[derive(PartialEq)]
enum Then {
    Member,
    End,
}

impl Reader<'_> {
    fn error(&self, reason: impl Into<String>) -> LoadError {
        let mut error = LoadError::new(ErrorKind::Syntax, reason);
        error.position = Some(Position::of(self.source, self.at));
        error
    }

    fn peek(&self) -> Option<u8> {
        self.source.as_bytes().get(self.at).copied()
    }

    /// Skips white space and looks at what follows.
    fn token(&mut self) -> Result<u8, LoadError> {
        while let Some(byte) = self.peek() {
            if !matches!(byte, b' ' | b'\n' | b'\r' | b'\t') {
                return Ok(byte);
            }
            self.at += 1;
        }
        Err(self.error("unexpected end of the document"))
    }

    fn unexpected(&self, expected: &str) -> LoadError {
        let found = self.source[self.at..].chars().next().map_or('?', |c| c);
        self.error(format!("unexpected character '{found}', expected {expected}"))
    }

    fn document(&mut self) -> Result<(), LoadError> {
        self.value()?;
        // Containers are worked off in a loop, not by recursion: a deep document costs no stack.
        while let Some((kind, members)) = self.tape.open_members() {
            let object = kind == NodeKind::Object;
            if object && members % 2 == 1 {
                self.value()?;
                continue;
            }
            match self.next_member(object, members == 0)? {
                Then::End => {
                    self.tape.close();
                }
                Then::Member if object => self.key()?,
                Then::Member => self.value()?,
            }
        }
        if self.token().is_ok() {
            return Err(self.error("unexpected characters after the end of the document"));
        }
        Ok(())
    }

    fn next_member(&mut self, object: bool, first: bool) -> Result<Then, LoadError> {
        let (end, name) = if object { (b'}', "',' or '}'") } else { (b']', "',' or ']'") };
        let mut byte = self.token()?;
        if !first && byte == b',' {
            self.at += 1;
            byte = self.token()?;
        } else if !first && byte != end {
            return Err(self.unexpected(name));
        }
        if byte == end {
            self.at += 1;
            return Ok(Then::End);
        }
        Ok(Then::Member)
    }

    fn key(&mut self) -> Result<(), LoadError> {
        match self.token()? {
            b'"' | b'\'' => self.string()?,
            byte if byte == b'_' || byte.is_ascii_alphabetic() => {
                let start = self.at;
                while self.peek().is_some_and(|byte| byte == b'_' || byte.is_ascii_alphanumeric()) {
                    self.at += 1;
                }
                if matches!(&self.source[start..self.at], "null" | "true" | "false") {
                    self.at = start;
                    return Err(self.error("expected a key"));
                }
                self.tape.push_source(NodeKind::String, start, self.at);
            }
            _ => return Err(self.unexpected("a key or '}'")),
        }
        if self.token()? != b':' {
            return Err(self.unexpected("':'"));
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self) -> Result<(), LoadError> {
        match self.token()? {
            b'{' => self.open(NodeKind::Object),
            b'[' => self.open(NodeKind::Array),
            b'"' | b'\'' => self.string(),
            b'-' | b'0'..=b'9' => self.number(),
            b't' => self.literal("true", NodeKind::True),
            b'f' => self.literal("false", NodeKind::False),
            b'n' => self.literal("null", NodeKind::Null),
            _ => Err(self.unexpected("a value")),
        }
    }

    fn open(&mut self, kind: NodeKind) -> Result<(), LoadError> {
        if self.tape.depth() >= MAX_DEPTH {
            let mut error = self.error(format!("more than {MAX_DEPTH} levels of nesting"));
            error.kind = ErrorKind::TooLarge;
            return Err(error);
        }
        self.tape.open(kind, self.at);
        self.at += 1;
        Ok(())
    }

    fn literal(&mut self, word: &str, kind: NodeKind) -> Result<(), LoadError> {
        if !self.source[self.at..].starts_with(word) {
            return Err(self.error(format!("expected '{word}'")));
        }
        self.tape.push_literal(kind, self.at);
        self.at += word.len();
        Ok(())
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Result<(), LoadError> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let leading = self.peek();
        let integral = self.digits();
        if integral == 0 {
            return Err(self.error("expected a number"));
        }
        if leading == Some(b'0') && integral > 1 {
            return Err(self.error("a number cannot have a leading zero"));
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            if self.digits() == 0 {
                return Err(self.error("a number cannot end in a period"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.error("a number needs digits in its exponent"));
            }
        }
        let text = &self.source[start..self.at];
        if !text.parse::<f64>().is_ok_and(f64::is_finite) {
            return Err(self.error(format!("the number {text} is out of range")));
        }
        self.tape.push_source(NodeKind::Number, start, self.at);
        Ok(())
    }

    fn string(&mut self) -> Result<(), LoadError> {
        let quote = self.source.as_bytes()[self.at];
        let begin = self.at;
        self.at += 1;
        let start = self.at;
        loop {
            match self.peek() {
                None => return Err(self.error("the string has no end")),
                Some(byte) if byte == quote => {
                    self.tape.push_source(NodeKind::String, start, self.at);
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => break,
                Some(_) => self.at += 1,
            }
        }
        self.text.clear();
        self.text.push_str(&self.source[start..self.at]);
        self.escaped(quote)?;
        self.tape.push_owned(NodeKind::String, &self.text, begin);
        Ok(())
    }

    /// The rest of a string from its first escape on.
    fn escaped(&mut self, quote: u8) -> Result<(), LoadError> {
        loop {
            let rest = &self.source[self.at..];
            let Some(c) = rest.chars().next() else { return Err(self.error("the string has no end")) };
            self.at += c.len_utf8();
            if c == char::from(quote) {
                return Ok(());
            }
            if c != '\\' {
                self.text.push(c);
                continue;
            }
            let Some(escape) = self.peek() else { return Err(self.error("the string has no end")) };
            self.at += 1;
            let c = match escape {
                b'"' | b'\\' | b'/' | b'\'' => char::from(escape),
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                b'u' | b'U' => self.unicode()?,
                _ => {
                    self.at -= 1;
                    return Err(self.unexpected("an escape"));
                }
            };
            self.text.push(c);
        }
    }

    fn unicode(&mut self) -> Result<char, LoadError> {
        let high = self.hex()?;
        let code = if (0xd800..0xdc00).contains(&high) {
            if !self.source[self.at..].starts_with("\\u") {
                return Err(self.error("expected a low surrogate"));
            }
            self.at += 2;
            let low = self.hex()?;
            if !(0xdc00..0xe000).contains(&low) {
                return Err(self.error("expected a low surrogate"));
            }
            0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00)
        } else {
            high
        };
        char::from_u32(code).ok_or_else(|| self.error("unpaired surrogate"))
    }

    fn hex(&mut self) -> Result<u32, LoadError> {
        let digits =
            self.source.get(self.at..self.at + 4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        self.at += 4;
        code.ok_or_else(|| {
            let mut error = LoadError::new(ErrorKind::Syntax, "expected four hexadecimal digits");
            error.position = Some(Position::of(self.source, self.at - 4));
            error
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(source: &str) -> String {
        parse(source).expect_err(source).to_string()
    }

    #[test]
    fn lenient_syntax_is_read() {
        let tape = parse(" {a: 'x', \"b\\u0041\\uD83D\\uDE00\": [1,-2.5e3,], c: {}, d: [true,false,null],} ")
            .unwrap();
        let pairs: Vec<_> = tape.pairs(0).map(|(k, v)| (tape.text(k).to_owned(), tape.kind(v))).collect();
        assert_eq!(pairs.len(), 4);
        assert_eq!(pairs[0], ("a".to_owned(), NodeKind::String));
        assert_eq!(pairs[1], ("bA😀".to_owned(), NodeKind::Array));
        let array = tape.pairs(0).nth(1).unwrap().1;
        let numbers: Vec<_> = tape.elements(array).map(|e| tape.text(e).to_owned()).collect();
        assert_eq!(numbers, ["1", "-2.5e3"]);
    }

    #[test]
    fn faults_name_their_place() {
        assert_eq!(error("{\"a\": 1\n \"b\": 2}"), "2:2: unexpected character '\"', expected ',' or '}'");
        assert_eq!(error("{} x"), "1:4: unexpected characters after the end of the document");
        assert_eq!(error(""), "1:1: unexpected end of the document");
        assert_eq!(error("{\"a\": 01}"), "1:9: a number cannot have a leading zero");
        assert_eq!(error("\"\\ud800\""), "1:8: expected a low surrogate");
        assert_eq!(error("// c"), "1:1: unexpected character '/', expected a value");
        assert_eq!(parse(&"[".repeat(101)).unwrap_err().kind, ErrorKind::TooLarge);
        assert!(parse(&("[".repeat(100) + &"]".repeat(100))).is_ok());
        for bad in [
            "{a:1 b:2}",
            "[1 2]",
            "{1:2}",
            "{,}",
            "[,]",
            "tru",
            "nul",
            "'abc",
            "\"\\x\"",
            "-",
            "1e",
            "1e999",
            "\"\\u12\"",
        ] {
            error(bad);
        }
    }
}
