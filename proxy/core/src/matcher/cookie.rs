//! `route.v3.CookieMatcher`, and how cookies are read.

use envoy_types::pb::envoy::config::route::v3 as pb;

use super::StringMatcher;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::header::{HeaderId, HeaderMap};

/// A condition on one cookie.
#[derive(Debug, Clone)]
pub struct CookieMatcher {
    name: Box<[u8]>,
    value: StringMatcher,
    invert: bool,
}

impl CookieMatcher {
    /// From the message.
    pub fn from_proto(message: &pb::CookieMatcher) -> ConfigResult<Self> {
        if message.name.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("name"));
        }
        let value = message.string_match.as_ref().ok_or_else(|| ConfigError::missing("string_match"))?;
        Ok(Self {
            name: message.name.as_bytes().into(),
            value: StringMatcher::from_proto(value).at("string_match")?,
            invert: message.invert_match,
        })
    }

    /// From a repeated field.
    pub fn list_from_proto(messages: &[pb::CookieMatcher], field: &str) -> ConfigResult<Vec<Self>> {
        messages.iter().enumerate().map(|(i, m)| Self::from_proto(m).at_index(field, i)).collect()
    }

    /// Whether a request's cookie satisfies the condition. One that is not there satisfies the inverted ones.
    pub fn matches(&self, headers: &HeaderMap) -> bool {
        cookie_value(headers, &self.name).is_some_and(|value| self.value.matches(value)) != self.invert
    }
}

/// The value of the first cookie of that name, without the quotes around it. What has no `=` is no cookie; only spaces
/// before a name count for nothing.
pub fn cookie_value<'h>(headers: &'h HeaderMap, name: &[u8]) -> Option<&'h [u8]> {
    let cookies = headers.get_all(HeaderId::COOKIE).flat_map(|line| line.split(|c| *c == b';'));
    for cookie in cookies {
        let Some(equals) = memchr::memchr(b'=', cookie) else { continue };
        let start = cookie.iter().position(|c| *c != b' ').unwrap_or(0);
        if cookie.get(start..equals) == Some(name) {
            let value = &cookie[equals + 1..];
            let unquoted = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\""));
            return Some(unquoted.unwrap_or(value));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::r#type::matcher::v3 as m;

    use super::*;

    fn headers(lines: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        lines.iter().for_each(|line| headers.append(HeaderId::COOKIE, line));
        headers
    }

    fn matcher(name: &str, value: &str, invert_match: bool) -> ConfigResult<CookieMatcher> {
        let exact = m::string_matcher::MatchPattern::Exact(value.to_owned());
        CookieMatcher::from_proto(&pb::CookieMatcher {
            name: name.to_owned(),
            string_match: Some(m::StringMatcher { ignore_case: false, match_pattern: Some(exact) }),
            invert_match,
        })
    }

    #[test]
    fn the_first_of_a_name_counts() {
        let all = headers(&["b; a=1;  c=\"q\"; a=2", "d=\"half; e=; f =x"]);
        for (name, value) in [
            ("a", Some("1")),
            ("c", Some("q")),
            ("d", Some("\"half")),
            ("e", Some("")),
            ("b", None),
            ("f", None),
            ("f ", Some("x")),
        ] {
            assert_eq!(cookie_value(&all, name.as_bytes()), value.map(str::as_bytes), "{name}");
        }
    }

    #[test]
    fn a_missing_cookie_satisfies_inverted_conditions_only() {
        let none = headers(&[]);
        assert!(!matcher("a", "", false).unwrap().matches(&none));
        assert!(matcher("a", "1", true).unwrap().matches(&none));
        assert!(!matcher("a", "1", true).unwrap().matches(&headers(&["a=1"])));
        assert!(matcher("a", "1", true).unwrap().matches(&headers(&["a=2"])));
    }

    #[test]
    fn names_and_conditions_are_asked_for() {
        assert_eq!(matcher("", "1", false).unwrap_err().path(), "name");
        let none = pb::CookieMatcher { name: "a".into(), ..Default::default() };
        assert_eq!(CookieMatcher::from_proto(&none).unwrap_err().path(), "string_match");
    }
}
