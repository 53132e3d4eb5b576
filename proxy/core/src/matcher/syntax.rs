//! RE2's regular expression syntax, rewritten into that of the crate `regex`.
//!
//! The two agree on most of the language but not on all of it: the crate reads `[a&&b]`, `[[a]`, `\<` and
//! `a{,2}` as operators where RE2 sees literals, knows no `\Q…\E`, `\C` and octal escapes, and counts `\v` among
//! `\s`. Envoy 1.40 compiles its expressions for Latin-1, that is for bytes: `.` is one byte, a non-ASCII
//! character in the pattern is the bytes of its UTF-8 form. So the result is pure ASCII and is to be compiled
//! with Unicode switched off.
//!
//! Source: RE2's `doc/syntax.txt`.

use std::fmt::Write;

/// The longest repetition RE2 takes.
const MAX_REPEAT: u32 = 1000;

/// The bytes a class or an escape stands for.
struct Set([bool; 256]);

impl Set {
    fn of(pick: impl Fn(u8) -> bool) -> Self {
        Self(std::array::from_fn(|b| pick(b as u8)))
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine |= theirs;
        }
    }

    /// Writes the class; an empty set matches nothing and must still be a class.
    fn write(&self, negated: bool, out: &mut String) {
        if !self.0.contains(&true) {
            out.push_str(if negated { "[\\x00-\\xff]" } else { "[^\\x00-\\xff]" });
            return;
        }
        out.push_str(if negated { "[^" } else { "[" });
        let mut at = 0;
        while at < 256 {
            if !self.0[at] {
                at += 1;
                continue;
            }
            let first = at;
            while at < 256 && self.0[at] {
                at += 1;
            }
            let _ = write!(out, "\\x{first:02x}-\\x{:02x}", at - 1);
        }
        out.push(']');
    }
}

/// What an escape means, in or out of a class.
enum Escape {
    Byte(u8),
    Set(Box<Set>),
}

impl Escape {
    fn set(pick: impl Fn(u8) -> bool) -> Self {
        Self::Set(Box::new(Set::of(pick)))
    }
}

struct Translator<'a> {
    pattern: &'a [u8],
    at: usize,
    out: String,
    /// How many groups are open.
    open: usize,
}

/// Rewrites an RE2 pattern; the error is RE2's words.
pub(super) fn translate(pattern: &str) -> Result<String, String> {
    let mut t = Translator {
        pattern: pattern.as_bytes(),
        at: 0,
        out: String::with_capacity(pattern.len() + 8),
        open: 0,
    };
    let mut repeated = false;
    while let Some(byte) = t.peek() {
        let repeat = t.repetition(byte)?;
        if repeat && repeated {
            return Err("bad repetition operator".to_owned());
        }
        repeated = repeat;
        if !repeat {
            t.item(byte)?;
        }
    }
    if t.open > 0 {
        return Err(format!("missing closing ): {pattern}"));
    }
    Ok(t.out)
}

impl Translator<'_> {
    fn peek(&self) -> Option<u8> {
        self.pattern.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn rest(&self) -> &[u8] {
        &self.pattern[self.at..]
    }

    fn literal(&mut self, byte: u8) {
        if byte.is_ascii_alphanumeric() {
            self.out.push(byte as char);
        } else {
            let _ = write!(self.out, "\\x{byte:02x}");
        }
    }

    /// Takes a repetition operator with its `?`; `{` that is none is left for a literal.
    fn repetition(&mut self, byte: u8) -> Result<bool, String> {
        let len = match byte {
            b'*' | b'+' | b'?' => 1,
            b'{' => match self.counted()? {
                Some(len) => len,
                None => return Ok(false),
            },
            _ => return Ok(false),
        };
        let operator = &self.pattern[self.at..self.at + len];
        self.out.push_str(&String::from_utf8_lossy(operator));
        self.at += len;
        if self.peek() == Some(b'?') {
            self.at += 1;
            self.out.push('?');
        }
        Ok(true)
    }

    /// The length of `{n}`, `{n,}` or `{n,m}` here.
    fn counted(&self) -> Result<Option<usize>, String> {
        let rest = self.rest();
        let Some(end) = rest.iter().position(|b| *b == b'}') else { return Ok(None) };
        let Ok(inner) = std::str::from_utf8(&rest[1..end]) else { return Ok(None) };
        let (low, high) = inner.split_once(',').unwrap_or((inner, inner));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if low.is_empty() || !digits(low) || !digits(high) {
            return Ok(None);
        }
        let number = |s: &str| s.parse::<u32>().unwrap_or(u32::MAX);
        let bad = number(low) > MAX_REPEAT
            || (!high.is_empty() && (number(high) > MAX_REPEAT || number(high) < number(low)));
        if bad {
            return Err(format!("invalid repetition size: {{{inner}}}"));
        }
        Ok(Some(end + 1))
    }

    fn item(&mut self, byte: u8) -> Result<(), String> {
        match byte {
            b'\\' => self.escape_outside(),
            b'[' => self.class(),
            b'(' => self.group(),
            // One too many would close the group that anchors the pattern at both ends.
            b')' if self.open == 0 => Err(format!("unexpected ): {}", String::from_utf8_lossy(self.pattern))),
            b')' => {
                self.at += 1;
                self.open -= 1;
                self.out.push(')');
                Ok(())
            }
            b'|' | b'.' | b'^' | b'$' => {
                self.at += 1;
                self.out.push(byte as char);
                Ok(())
            }
            _ => {
                self.at += 1;
                self.literal(byte);
                Ok(())
            }
        }
    }

    fn group(&mut self) -> Result<(), String> {
        self.at += 1;
        self.out.push('(');
        if self.peek() != Some(b'?') {
            self.open += 1;
            return Ok(());
        }
        let start = self.at;
        let end = self.rest().iter().position(|b| matches!(b, b')' | b':' | b'>')).map(|p| start + p + 1);
        let Some(end) = end else { return Err("missing closing ): (?".to_owned()) };
        let text = String::from_utf8_lossy(&self.pattern[start..end]).into_owned();
        let named =
            text.strip_prefix("?P<").or_else(|| text.strip_prefix("?<")).and_then(|t| t.strip_suffix('>'));
        let valid = match named {
            Some(name) => !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
            None => {
                !text.ends_with('>')
                    && text[1..text.len() - 1].bytes().all(|b| matches!(b, b'i' | b'm' | b's' | b'U' | b'-'))
            }
        };
        if !valid {
            return Err(format!("invalid perl operator: ({text}"));
        }
        self.open += usize::from(!text.ends_with(')'));
        // Without flags `(?)` does nothing in RE2 and is an error in the crate.
        self.out.push_str(if text == "?)" { "?:)" } else { &text });
        self.at = end;
        Ok(())
    }

    fn escape_outside(&mut self) -> Result<(), String> {
        match self.pattern.get(self.at + 1) {
            Some(b'Q') => {
                self.at += 2;
                while !self.rest().is_empty() {
                    if self.rest().starts_with(b"\\E") {
                        self.at += 2;
                        break;
                    }
                    let byte = self.pattern[self.at];
                    self.at += 1;
                    self.literal(byte);
                }
            }
            Some(&c @ (b'A' | b'z' | b'b' | b'B')) => {
                self.at += 2;
                self.out.push('\\');
                self.out.push(c as char);
            }
            Some(b'C') => {
                self.at += 2;
                self.out.push_str("(?s:.)");
            }
            _ => match self.escape()? {
                Escape::Byte(byte) => self.literal(byte),
                Escape::Set(set) => set.write(false, &mut self.out),
            },
        }
        Ok(())
    }

    /// An escape that means a byte or a set; the position is at the backslash.
    fn escape(&mut self) -> Result<Escape, String> {
        let start = self.at;
        self.at += 1;
        let Some(c) = self.next() else { return Err("trailing \\".to_owned()) };
        let byte = match c {
            b'd' => return Ok(Escape::set(|b| b.is_ascii_digit())),
            b'D' => return Ok(Escape::set(|b| !b.is_ascii_digit())),
            b'w' => return Ok(Escape::set(is_word)),
            b'W' => return Ok(Escape::set(|b| !is_word(b))),
            b's' => return Ok(Escape::set(is_space)),
            b'S' => return Ok(Escape::set(|b| !is_space(b))),
            b'p' | b'P' => return self.unicode_class(start),
            b'a' => 7,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 11,
            b'x' => self.hex().ok_or_else(|| self.bad_escape(start))?,
            b'0'..=b'7' => self.octal(c).ok_or_else(|| self.bad_escape(start))?,
            c if c.is_ascii() && !c.is_ascii_alphanumeric() => c,
            _ => return Err(self.bad_escape(start)),
        };
        Ok(Escape::Byte(byte))
    }

    fn bad_escape(&self, start: usize) -> String {
        format!("invalid escape sequence: {}", String::from_utf8_lossy(&self.pattern[start..self.at]))
    }

    /// `\x41` or `\x{41}`; a code point above 255 is no byte and can match nothing.
    fn hex(&mut self) -> Option<u8> {
        let digits = if self.peek() == Some(b'{') {
            let end = self.rest().iter().position(|b| *b == b'}')?;
            let digits = &self.pattern[self.at + 1..self.at + end];
            self.at += end + 1;
            digits
        } else {
            let digits = self.rest().get(..2)?;
            let digits = &self.pattern[self.at..self.at + digits.len()];
            self.at += 2;
            digits
        };
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    }

    /// Up to three octal digits; a lone `\1` would be a back reference, which RE2 has not.
    fn octal(&mut self, first: u8) -> Option<u8> {
        let digit = |b: Option<u8>| b.filter(|b| (b'0'..=b'7').contains(b)).map(|b| u32::from(b - b'0'));
        if first != b'0' && digit(self.peek()).is_none() {
            return None;
        }
        let mut value = u32::from(first - b'0');
        for _ in 0..2 {
            let Some(d) = digit(self.peek()) else { break };
            value = value * 8 + d;
            self.at += 1;
        }
        u8::try_from(value).ok()
    }

    /// `\pL`, `\p{Greek}`, `\P…`: those of the 256 Latin-1 characters that belong to the class.
    fn unicode_class(&mut self, start: usize) -> Result<Escape, String> {
        let end = match self.peek() {
            Some(b'{') => self.rest().iter().position(|b| *b == b'}').map(|p| self.at + p + 1),
            Some(_) => Some(self.at + 1),
            None => None,
        };
        let end = end.ok_or_else(|| "invalid character class range".to_owned())?;
        self.at = end;
        let text = String::from_utf8_lossy(&self.pattern[start..end]);
        let class =
            ::regex::Regex::new(&text).map_err(|_| format!("invalid character class range: {text}"))?;
        let mut buffer = [0; 4];
        let mut set = Set([false; 256]);
        for byte in 0..=255u8 {
            set.0[usize::from(byte)] = class.is_match(char::from(byte).encode_utf8(&mut buffer));
        }
        Ok(Escape::Set(Box::new(set)))
    }

    fn class(&mut self) -> Result<(), String> {
        let start = self.at;
        self.at += 1;
        let negated = self.peek() == Some(b'^');
        self.at += usize::from(negated);
        let mut set = Set([false; 256]);
        let mut first = true;
        loop {
            let missing =
                || format!("missing closing ]: {}", String::from_utf8_lossy(&self.pattern[start..]));
            match self.peek().ok_or_else(missing)? {
                b']' if !first => {
                    self.at += 1;
                    set.write(negated, &mut self.out);
                    return Ok(());
                }
                b'[' if self.rest().starts_with(b"[:") => {
                    if let Some(named) = self.posix_class()? {
                        set.add(&named);
                        first = false;
                        continue;
                    }
                }
                _ => {}
            }
            first = false;
            let low = match self.class_item()? {
                Escape::Set(other) => {
                    set.add(&other);
                    continue;
                }
                Escape::Byte(low) => low,
            };
            // `a-]`: the hyphen is a literal.
            if self.peek() == Some(b'-') && self.pattern.get(self.at + 1).is_some_and(|b| *b != b']') {
                self.at += 1;
                let Escape::Byte(high) = self.class_item()? else {
                    return Err("invalid character class range".to_owned());
                };
                if high < low {
                    return Err("invalid character class range".to_owned());
                }
                set.add(&Set::of(|b| (low..=high).contains(&b)));
            } else {
                set.0[usize::from(low)] = true;
            }
        }
    }

    fn class_item(&mut self) -> Result<Escape, String> {
        match self.peek() {
            Some(b'\\') => self.escape(),
            Some(byte) => {
                self.at += 1;
                Ok(Escape::Byte(byte))
            }
            None => Err("missing closing ]".to_owned()),
        }
    }

    /// `[:alpha:]`, `[:^alpha:]`.
    fn posix_class(&mut self) -> Result<Option<Set>, String> {
        let Some(end) = self.rest().windows(2).skip(2).position(|w| w == b":]") else { return Ok(None) };
        let name = String::from_utf8_lossy(&self.pattern[self.at + 2..self.at + end + 2]).into_owned();
        let bare = name.strip_prefix('^').unwrap_or(&name);
        let pick: fn(u8) -> bool = match bare {
            "alnum" => |b| b.is_ascii_alphanumeric(),
            "alpha" => |b| b.is_ascii_alphabetic(),
            "ascii" => |b| b.is_ascii(),
            "blank" => |b| matches!(b, b' ' | b'\t'),
            "cntrl" => |b| b.is_ascii_control(),
            "digit" => |b| b.is_ascii_digit(),
            "graph" => |b| b.is_ascii_graphic(),
            "lower" => |b| b.is_ascii_lowercase(),
            "print" => |b| b.is_ascii_graphic() || b == b' ',
            "punct" => |b| b.is_ascii_punctuation(),
            "space" => |b| is_space(b) || b == 11,
            "upper" => |b| b.is_ascii_uppercase(),
            "word" => is_word,
            "xdigit" => |b| b.is_ascii_hexdigit(),
            _ => return Err(format!("invalid character class range: [:{name}:]")),
        };
        self.at += end + 4;
        let inverted = bare.len() != name.len();
        Ok(Some(Set::of(|b| pick(b) != inverted)))
    }
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

fn is_space(b: u8) -> bool {
    matches!(b, b'\t' | b'\n' | 12 | b'\r' | b' ')
}
