//! `StringMatcher`, `ListStringMatcher`, `PathMatcher`.

use envoy_types::pb::envoy::r#type::matcher::v3 as pb;
use memchr::memmem;

use super::Regex;
use crate::error::{AtField, ConfigError, ConfigResult};

/// How a text is compared; with `ignore_case` ASCII letters compare without case.
#[derive(Debug, Clone)]
pub enum StringMatcher {
    /// The whole text.
    Exact {
        /// What it must be.
        value: Box<[u8]>,
        /// Without case.
        ignore_case: bool,
    },
    /// Its beginning.
    Prefix {
        /// How it must begin.
        value: Box<[u8]>,
        /// Without case.
        ignore_case: bool,
    },
    /// Its end.
    Suffix {
        /// How it must end.
        value: Box<[u8]>,
        /// Without case.
        ignore_case: bool,
    },
    /// A part of it.
    Contains {
        /// What it must contain; in lower case where `ignore_case`.
        value: Box<[u8]>,
        /// Without case.
        ignore_case: bool,
    },
    /// The whole text by an expression (`ignore_case` has no effect on it).
    Regex(Regex),
}

fn bytes(value: &str) -> Box<[u8]> {
    value.as_bytes().into()
}

fn not_empty(value: &str, field: &str) -> ConfigResult<Box<[u8]>> {
    if value.is_empty() {
        return Err(ConfigError::new("value length must be at least 1 characters").at(field));
    }
    Ok(bytes(value))
}

impl StringMatcher {
    /// An exact, case-sensitive matcher.
    pub fn exact(value: impl AsRef<[u8]>) -> Self {
        Self::Exact { value: value.as_ref().into(), ignore_case: false }
    }

    /// A case-sensitive prefix matcher.
    pub fn prefix(value: impl AsRef<[u8]>) -> Self {
        Self::Prefix { value: value.as_ref().into(), ignore_case: false }
    }

    /// From the message; `custom` is refused by name.
    pub fn from_proto(message: &pb::StringMatcher) -> ConfigResult<Self> {
        use pb::string_matcher::MatchPattern as P;
        let ignore_case = message.ignore_case;
        Ok(match &message.match_pattern {
            None => return Err(ConfigError::missing("match_pattern")),
            Some(P::Exact(v)) => Self::Exact { value: bytes(v), ignore_case },
            Some(P::Prefix(v)) => Self::Prefix { value: not_empty(v, "prefix")?, ignore_case },
            Some(P::Suffix(v)) => Self::Suffix { value: not_empty(v, "suffix")?, ignore_case },
            Some(P::Contains(v)) => {
                let mut value = not_empty(v, "contains")?;
                if ignore_case {
                    value.make_ascii_lowercase();
                }
                Self::Contains { value, ignore_case }
            }
            Some(P::SafeRegex(r)) => Self::Regex(Regex::from_proto(r).at("safe_regex")?),
            Some(P::Custom(c)) => {
                return Err(
                    ConfigError::unsupported(format!("string matcher extension '{}'", c.name)).at("custom")
                );
            }
        })
    }

    /// From a repeated field.
    pub fn list_from_proto(messages: &[pb::StringMatcher], field: &str) -> ConfigResult<Vec<Self>> {
        messages.iter().enumerate().map(|(i, m)| Self::from_proto(m).at_index(field, i)).collect()
    }

    /// Whether the text matches.
    pub fn matches(&self, text: impl AsRef<[u8]>) -> bool {
        let text = text.as_ref();
        match self {
            Self::Exact { value, ignore_case } => same(text, value, *ignore_case),
            Self::Prefix { value, ignore_case } => {
                text.get(..value.len()).is_some_and(|head| same(head, value, *ignore_case))
            }
            Self::Suffix { value, ignore_case } => {
                text.len().checked_sub(value.len()).is_some_and(|at| same(&text[at..], value, *ignore_case))
            }
            Self::Contains { value, ignore_case: false } => memmem::find(text, value).is_some(),
            Self::Contains { value, .. } => {
                text.windows(value.len().max(1)).any(|part| part.eq_ignore_ascii_case(value))
            }
            Self::Regex(regex) => regex.matches(text),
        }
    }
}

fn same(a: &[u8], b: &[u8], ignore_case: bool) -> bool {
    if ignore_case { a.eq_ignore_ascii_case(b) } else { a == b }
}

/// A string matcher on a path without query and fragment.
#[derive(Debug, Clone)]
pub struct PathMatcher(StringMatcher);

impl PathMatcher {
    /// A matcher for paths.
    pub fn new(matcher: StringMatcher) -> Self {
        Self(matcher)
    }

    /// From the message.
    pub fn from_proto(message: &pb::PathMatcher) -> ConfigResult<Self> {
        match &message.rule {
            Some(pb::path_matcher::Rule::Path(path)) => Ok(Self(StringMatcher::from_proto(path).at("path")?)),
            None => Err(ConfigError::missing("rule")),
        }
    }

    /// Whether the path of a `:path` value matches.
    pub fn matches(&self, path: impl AsRef<[u8]>) -> bool {
        let path = path.as_ref();
        let end = memchr::memchr2(b'?', b'#', path).unwrap_or(path.len());
        self.0.matches(&path[..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(pattern: pb::string_matcher::MatchPattern, ignore_case: bool) -> StringMatcher {
        StringMatcher::from_proto(&pb::StringMatcher { ignore_case, match_pattern: Some(pattern) }).unwrap()
    }

    #[test]
    fn each_kind_with_and_without_case() {
        use pb::string_matcher::MatchPattern as P;
        for (pattern, text, with_case, without) in [
            (P::Exact("Ab".into()), "aB", false, true),
            (P::Prefix("Ab".into()), "aBc", false, true),
            (P::Suffix("Ab".into()), "caB", false, true),
            (P::Contains("Ab".into()), "xaBx", false, true),
            (P::Contains("Ab".into()), "x", false, false),
            (P::Suffix("Ab".into()), "b", false, false),
            (P::Exact("Ab".into()), "Ab", true, true),
        ] {
            assert_eq!(make(pattern.clone(), false).matches(text), with_case, "{pattern:?}");
            assert_eq!(make(pattern.clone(), true).matches(text), without, "{pattern:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_match_too() {
        assert!(StringMatcher::prefix("a").matches(b"a\xff"));
        assert!(!StringMatcher::exact("a").matches(b"a\xff"));
    }

    #[test]
    fn empty_patterns_and_extensions_are_refused() {
        use pb::string_matcher::MatchPattern as P;
        let parse =
            |p| StringMatcher::from_proto(&pb::StringMatcher { match_pattern: p, ignore_case: false });
        assert_eq!(parse(None).unwrap_err().path(), "match_pattern");
        assert_eq!(parse(Some(P::Prefix(String::new()))).unwrap_err().path(), "prefix");
        assert_eq!(parse(Some(P::Custom(Default::default()))).unwrap_err().path(), "custom");
    }

    #[test]
    fn a_path_ends_at_query_or_fragment() {
        let m = PathMatcher::new(StringMatcher::exact("/a"));
        assert!(m.matches("/a?b") && m.matches("/a#b") && m.matches("/a") && !m.matches("/ab"));
    }
}
