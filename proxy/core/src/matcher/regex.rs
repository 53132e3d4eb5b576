//! Regular expressions as Envoy 1.40 evaluates them: RE2's syntax, on bytes, in linear time.

use std::fmt;

use ::regex::bytes;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher};

use super::syntax::translate;
use crate::error::{AtField, ConfigError, ConfigResult};

/// How large a compiled expression may become. RE2's program size, which Envoy limits, has no counterpart.
const SIZE_LIMIT: usize = 2 << 20;

/// A compiled expression.
#[derive(Clone)]
pub struct Regex {
    /// Anchored at both ends: what nearly every user asks for.
    whole: bytes::Regex,
    pattern: Box<str>,
}

/// `RegexMatchAndSubstitute`: every match in the text is replaced.
#[derive(Clone, Debug)]
pub struct RegexRewrite {
    regex: bytes::Regex,
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
enum Part {
    Literal(Vec<u8>),
    Group(usize),
}

fn compile(pattern: &str, prefix: &str, suffix: &str) -> ConfigResult<bytes::Regex> {
    let translated = translate(pattern).map_err(|e| ConfigError::new(format!("{e} in regex '{pattern}'")))?;
    bytes::RegexBuilder::new(&format!("{prefix}{translated}{suffix}"))
        .unicode(false)
        .size_limit(SIZE_LIMIT)
        .build()
        .map_err(|e| match e {
            ::regex::Error::CompiledTooBig(_) => {
                ConfigError::new(format!("regex '{pattern}' is too large when compiled"))
            }
            _ => ConfigError::new(format!("invalid regex '{pattern}'")),
        })
}

impl Regex {
    /// Compiles a pattern.
    pub fn new(pattern: &str) -> ConfigResult<Self> {
        Ok(Self { whole: compile(pattern, "\\A(?:", ")\\z")?, pattern: pattern.into() })
    }

    /// From the message.
    pub fn from_proto(message: &RegexMatcher) -> ConfigResult<Self> {
        if message.regex.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("regex"));
        }
        Self::new(&message.regex).at("regex")
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: impl AsRef<[u8]>) -> bool {
        self.whole.is_match(text.as_ref())
    }

    /// The first capture group of a whole match.
    pub fn first_group<'t>(&self, text: &'t [u8]) -> Option<&'t [u8]> {
        Some(self.whole.captures(text)?.get(1)?.as_bytes())
    }

    /// The pattern as it was configured.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }
}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.pattern)
    }
}

impl RegexRewrite {
    /// From the message; a group that the pattern does not have is refused.
    pub fn from_proto(message: &RegexMatchAndSubstitute) -> ConfigResult<Self> {
        let pattern = message.pattern.as_ref().ok_or_else(|| ConfigError::missing("pattern"))?;
        if pattern.regex.is_empty() {
            let e = ConfigError::new("value length must be at least 1 characters");
            return Err(e.at("regex").at("pattern"));
        }
        let regex = compile(&pattern.regex, "", "").at("regex").at("pattern")?;
        let parts = rewrite_parts(&message.substitution, regex.captures_len()).at("substitution")?;
        Ok(Self { regex, parts })
    }

    /// The text with every match replaced; `None` where nothing matched.
    pub fn replace(&self, text: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(text.len());
        let mut last = 0;
        for captures in self.regex.captures_iter(text) {
            let Some(whole) = captures.get(0) else { continue };
            out.extend_from_slice(&text[last..whole.start()]);
            for part in &self.parts {
                match part {
                    Part::Literal(bytes) => out.extend_from_slice(bytes),
                    Part::Group(group) => {
                        out.extend_from_slice(captures.get(*group).map_or(&[][..], |m| m.as_bytes()));
                    }
                }
            }
            last = whole.end();
        }
        if last == 0 && out.is_empty() && !self.regex.is_match(text) {
            return None;
        }
        out.extend_from_slice(&text[last..]);
        Some(out)
    }
}

/// RE2's rewrite string: `\0` to `\9` are groups, `\\` is a backslash.
fn rewrite_parts(substitution: &str, groups: usize) -> ConfigResult<Vec<Part>> {
    let mut parts = Vec::new();
    let mut literal = Vec::new();
    let mut bytes = substitution.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            literal.push(byte);
            continue;
        }
        match bytes.next() {
            Some(b'\\') => literal.push(b'\\'),
            Some(digit) if digit.is_ascii_digit() => {
                let group = usize::from(digit - b'0');
                if group >= groups {
                    return Err(ConfigError::new(format!(
                        "Rewrite schema requests {group} matches, but the regexp only has {} \
                         parenthesized subexpressions.",
                        groups - 1
                    )));
                }
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(Part::Group(group));
            }
            _ => {
                return Err(ConfigError::new(
                    "Rewrite schema error: '\\' must be followed by a digit or '\\'.",
                ));
            }
        }
    }
    if !literal.is_empty() {
        parts.push(Part::Literal(literal));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, text: &[u8]) -> bool {
        Regex::new(pattern).unwrap().matches(text)
    }

    #[test]
    fn bytes_are_matched_as_envoy_matches_them() {
        // Seen from Envoy 1.40 with the same patterns and header values.
        for (pattern, text, expected) in [
            (".*", &b"\xff"[..], true),
            ("a.b", b"a\xffb", true),
            ("a.b", "aéb".as_bytes(), false),
            ("é.*", "éz".as_bytes(), true),
            ("é.*", b"\xc3\xa9\xff", true),
            ("[^x]+", b"a\xffb", true),
            (r"\w+", "éz".as_bytes(), false),
            (r"\D+", b"\xff", true),
            (r"\C+", b"\xff", true),
            ("(?i)k", "\u{212a}".as_bytes(), false),
            ("[a-zA-Z0-9_.-]*", b"abc\xff", false),
            ("abc", b"xabcx", false),
            ("a|ab", b"ab", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {}", text.escape_ascii());
        }
    }

    #[test]
    fn what_the_crate_reads_otherwise_is_rewritten() {
        for (pattern, text, expected) in [
            (r"\Qa.b\E+", "a.bb", true),
            (r"\Qa.b", "axb", false),
            ("[a&&b]", "&", true),
            ("[[a]", "[", true),
            ("[]a]", "]", true),
            ("[a-]", "-", true),
            ("[^]a]", "b", true),
            ("a{,2}", "a{,2}", true),
            ("a{", "a{", true),
            (r"\<", "<", true),
            (r"\101\x42\x{43}", "ABC", true),
            (r"\s", "\u{b}", false),
            ("[[:space:]]", "\u{b}", true),
            ("[[:^digit:]]", "a", true),
            (r"\pL+", "abc", true),
            (r"\p{Lu}", "a", false),
            ("(?P<n>a)(?i:B)", "ab", true),
            ("]", "]", true),
            ("x*?", "xx", true),
            ("(?i)[^k]", "K", false),
        ] {
            assert_eq!(matches(pattern, text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn what_re2_refuses_is_refused() {
        for pattern in [
            "a**", "(a", "[a", r"\1", r"a\", "(?=a)", "(?<!a)", r"\q", "a{1001}", "(?x)a", "[z-a]", "*",
            "[[:x:]]",
            // Balanced only together with the group that anchors: these must not match by halves.
            "a)|(?:b", ")(", "a)|b",
        ] {
            assert!(Regex::new(pattern).is_err(), "{pattern}");
        }
    }

    #[test]
    fn no_pattern_panics() {
        use rand::{Rng, SeedableRng};
        const PARTS: &[&str] = &[
            "a",
            "\\",
            "[",
            "]",
            "[^",
            "-",
            "a-c",
            "[:alpha:]",
            "[:",
            ":]",
            "(",
            "(?",
            "(?i)",
            "(?P<",
            ">",
            ")",
            "|",
            "*",
            "+",
            "?",
            "{",
            "{2}",
            "{,",
            "}",
            "^",
            ".",
            "\\Q",
            "\\E",
            "\\x",
            "\\x{",
            "\\p",
            "\\p{L",
            "\\1",
            "\\0",
            "é",
            "\n",
            "\\C",
            "9999",
        ];
        let mut random = rand::rngs::SmallRng::seed_from_u64(1);
        for _ in 0..3_000 {
            let parts = random.random_range(0..8);
            let pattern: String = (0..parts).map(|_| PARTS[random.random_range(0..PARTS.len())]).collect();
            if let Ok(regex) = Regex::new(&pattern) {
                regex.matches("aé\n");
            }
        }
    }

    #[test]
    fn rewrite_replaces_every_match() {
        let make = |regex: &str, substitution: &str| {
            RegexRewrite::from_proto(&RegexMatchAndSubstitute {
                pattern: Some(RegexMatcher { regex: regex.into(), ..Default::default() }),
                substitution: substitution.into(),
            })
        };
        let rewrite = make("^/service/([^/]+)(/.*)$", r"\2/instance/\1").unwrap();
        assert_eq!(rewrite.replace(b"/service/foo/v1").as_deref(), Some(&b"/v1/instance/foo"[..]));
        assert_eq!(rewrite.replace(b"/other"), None);
        assert_eq!(make("o", r"\\0").unwrap().replace(b"foo").as_deref(), Some(&br"f\0\0"[..]));
        assert!(make("(a)", r"\2").is_err());
        assert!(make("(a)", r"\x").is_err());
    }
}
