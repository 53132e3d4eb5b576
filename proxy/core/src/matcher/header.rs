//! `route.v3.HeaderMatcher`.

use envoy_types::pb::envoy::config::route::v3 as pb;

use super::{Regex, StringMatcher};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::header::{HeaderId, HeaderMap, HeaderName};

/// A condition on one header of a list.
#[derive(Debug, Clone)]
pub struct HeaderMatcher {
    name: HeaderName,
    what: What,
    invert: bool,
    missing_as_empty: bool,
}

#[derive(Debug, Clone)]
enum What {
    Present(bool),
    Any,
    String(StringMatcher),
    /// From inclusive, to exclusive.
    Range(i64, i64),
}

impl HeaderMatcher {
    /// From the message; without a specifier the header must be present.
    #[allow(deprecated)] // Envoy 1.40 still takes the old specifiers, and so do we.
    pub fn from_proto(message: &pb::HeaderMatcher) -> ConfigResult<Self> {
        use pb::header_matcher::HeaderMatchSpecifier as S;
        if message.name.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("name"));
        }
        let not_empty = |value: &str, field: &str| match value.is_empty() {
            true => Err(ConfigError::new("value length must be at least 1 characters").at(field)),
            false => Ok(Box::from(value.as_bytes())),
        };
        let ignore_case = false;
        let what = match &message.header_match_specifier {
            None => What::Present(true),
            Some(S::PresentMatch(present)) => What::Present(*present),
            // The old exact match takes any value when it is empty.
            Some(S::ExactMatch(v)) if v.is_empty() => What::Any,
            Some(S::ExactMatch(v)) => What::String(StringMatcher::exact(v)),
            Some(S::SafeRegexMatch(r)) => {
                What::String(StringMatcher::Regex(Regex::from_proto(r).at("safe_regex_match")?))
            }
            Some(S::RangeMatch(r)) => What::Range(r.start, r.end),
            Some(S::PrefixMatch(v)) => {
                What::String(StringMatcher::Prefix { value: not_empty(v, "prefix_match")?, ignore_case })
            }
            Some(S::SuffixMatch(v)) => {
                What::String(StringMatcher::Suffix { value: not_empty(v, "suffix_match")?, ignore_case })
            }
            Some(S::ContainsMatch(v)) => {
                What::String(StringMatcher::Contains { value: not_empty(v, "contains_match")?, ignore_case })
            }
            Some(S::StringMatch(m)) => What::String(StringMatcher::from_proto(m).at("string_match")?),
        };
        let name = HeaderName::new(&message.name);
        Ok(Self {
            // A request's `host` is its `:authority`, under either name.
            name: if name.id() == HeaderId::HOST { HeaderId::AUTHORITY.into() } else { name },
            what,
            invert: message.invert_match,
            missing_as_empty: message.treat_missing_header_as_empty,
        })
    }

    /// From a repeated field.
    pub fn list_from_proto(messages: &[pb::HeaderMatcher], field: &str) -> ConfigResult<Vec<Self>> {
        messages.iter().enumerate().map(|(i, m)| Self::from_proto(m).at_index(field, i)).collect()
    }

    /// The header's name.
    pub fn name(&self) -> &HeaderName {
        &self.name
    }

    /// Whether the list satisfies the condition. A header that is not there satisfies no condition on its value,
    /// inverted or not, unless it counts as empty.
    pub fn matches(&self, headers: &HeaderMap) -> bool {
        if let What::Present(present) = self.what {
            let there = self.missing_as_empty || headers.get_name(&self.name).is_some();
            return (there == present) != self.invert;
        }
        // Each value is looked at by itself, and one is enough.
        let mut values = headers.get_all_name(&self.name).peekable();
        let hit = match values.peek() {
            Some(_) => values.any(|value| self.hits(value)),
            None if self.missing_as_empty => self.hits(b""),
            None => return false,
        };
        hit != self.invert
    }

    fn hits(&self, value: &[u8]) -> bool {
        match &self.what {
            What::Present(_) | What::Any => true,
            What::String(matcher) => matcher.matches(value),
            What::Range(start, end) => integer(value).is_some_and(|v| (*start..*end).contains(&v)),
        }
    }
}

/// Whether all conditions hold.
pub fn all_headers_match(matchers: &[HeaderMatcher], headers: &HeaderMap) -> bool {
    matchers.iter().all(|m| m.matches(headers))
}

/// A whole base 10 integer; white space around it and a sign are taken, as Envoy's parser does.
fn integer(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value.trim_ascii()).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::r#type::{matcher::v3 as m, v3::Int64Range};
    use pb::header_matcher::HeaderMatchSpecifier as S;

    use super::*;

    fn check(specifier: Option<S>, invert: bool, missing_as_empty: bool, values: &[&[u8]]) -> bool {
        let matcher = HeaderMatcher::from_proto(&pb::HeaderMatcher {
            name: "X-A".into(),
            invert_match: invert,
            treat_missing_header_as_empty: missing_as_empty,
            header_match_specifier: specifier,
        })
        .unwrap();
        let mut headers = HeaderMap::new();
        for v in values {
            headers.append_name(&HeaderName::new("x-a"), v);
        }
        matcher.matches(&headers)
    }

    fn text(pattern: m::string_matcher::MatchPattern) -> Option<S> {
        Some(S::StringMatch(m::StringMatcher { match_pattern: Some(pattern), ignore_case: false }))
    }

    #[test]
    fn presence() {
        for (present, invert, there, expected) in [
            (true, false, true, true),
            (true, false, false, false),
            (true, true, true, false),
            (true, true, false, true),
            (false, false, true, false),
            (false, false, false, true),
            (false, true, true, true),
            (false, true, false, false),
        ] {
            let values: &[&[u8]] = if there { &[b"v"] } else { &[] };
            assert_eq!(check(Some(S::PresentMatch(present)), invert, false, values), expected);
        }
        assert!(check(None, false, false, &[b""]));
        assert!(!check(None, false, false, &[]));
        assert!(check(Some(S::PresentMatch(true)), false, true, &[]));
    }

    #[test]
    fn one_value_of_a_repeated_header_is_enough() {
        use m::string_matcher::MatchPattern as P;
        assert!(!check(text(P::Exact("a,b".into())), false, false, &[b"a", b"b"]));
        assert!(!check(text(P::Contains("a,b".into())), false, false, &[b"a", b"b"]));
        assert!(check(text(P::Exact("b".into())), false, false, &[b"a", b"b"]));
        assert!(!check(text(P::Exact("b".into())), true, false, &[b"a", b"b"]));
        assert!(check(text(P::Exact("c".into())), true, false, &[b"a", b"b"]));
    }

    #[test]
    fn a_missing_header_matches_only_where_it_counts_as_empty() {
        use m::string_matcher::MatchPattern as P;
        assert!(!check(text(P::Exact("a".into())), true, false, &[]));
        assert!(check(text(P::Exact("a".into())), true, true, &[]));
        assert!(check(text(P::Exact(String::new())), false, true, &[]));
    }

    #[test]
    fn host_is_the_authority() {
        let matcher =
            HeaderMatcher::from_proto(&pb::HeaderMatcher { name: "Host".into(), ..Default::default() });
        let mut headers = HeaderMap::new();
        assert!(!matcher.as_ref().unwrap().matches(&headers));
        headers.append(HeaderId::AUTHORITY, "h.com");
        assert!(matcher.unwrap().matches(&headers));
    }

    #[test]
    fn ranges_take_integers_only() {
        let range = || Some(S::RangeMatch(Int64Range { start: -10, end: 5 }));
        for (value, expected) in [
            ("-10", true),
            ("4", true),
            ("5", false),
            ("+3", true),
            ("1.5", false),
            ("", false),
            ("4x", false),
        ] {
            assert_eq!(check(range(), false, false, &[value.as_bytes()]), expected, "{value}");
        }
        assert!(check(range(), true, false, &[b"x"]));
    }

    #[test]
    fn odd_bytes_do_not_slip_by_an_inverted_rule() {
        use m::string_matcher::MatchPattern as P;
        let any = m::RegexMatcher { regex: "admin.*".into(), ..Default::default() };
        assert!(check(text(P::SafeRegex(any.clone())), false, false, &[b"admin\xff"]));
        assert!(!check(text(P::SafeRegex(any)), true, false, &[b"admin\xff"]));
    }
}
