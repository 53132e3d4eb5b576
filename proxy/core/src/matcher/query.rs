//! `route.v3.QueryParameterMatcher` and the query string of a path.
//!
//! Names and values are compared as they were sent, without percent-decoding, and of a repeated parameter the
//! first counts, as in Envoy's router.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;

use super::StringMatcher;
use crate::error::{AtField, ConfigError, ConfigResult};

/// A condition on one query parameter.
#[derive(Debug, Clone)]
pub struct QueryParameterMatcher {
    name: Box<[u8]>,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Present(bool),
    String(StringMatcher),
}

impl QueryParameterMatcher {
    /// From the message; without a specifier the parameter must be present.
    pub fn from_proto(message: &pb::QueryParameterMatcher) -> ConfigResult<Self> {
        use pb::query_parameter_matcher::QueryParameterMatchSpecifier as S;
        if message.name.is_empty() || message.name.len() > 1024 {
            return Err(ConfigError::new("value length must be between 1 and 1024 bytes").at("name"));
        }
        let what = match &message.query_parameter_match_specifier {
            None => What::Present(true),
            Some(S::PresentMatch(present)) => What::Present(*present),
            Some(S::StringMatch(m)) => What::String(StringMatcher::from_proto(m).at("string_match")?),
        };
        Ok(Self { name: message.name.as_bytes().into(), what })
    }

    /// From a repeated field.
    pub fn list_from_proto(messages: &[pb::QueryParameterMatcher], field: &str) -> ConfigResult<Vec<Self>> {
        messages.iter().enumerate().map(|(i, m)| Self::from_proto(m).at_index(field, i)).collect()
    }

    /// Whether the query of a `:path` satisfies the condition.
    pub fn matches(&self, path: &[u8]) -> bool {
        let value = query_parameter(path, &self.name);
        match &self.what {
            What::Present(present) => value.is_some() == *present,
            What::String(matcher) => value.is_some_and(|v| matcher.matches(v)),
        }
    }

    /// The same on the decoded name and value, as the rate limit actions have it.
    pub fn matches_decoded(&self, path: &[u8]) -> bool {
        let value = decoded_query_parameter(path, &self.name);
        match &self.what {
            What::Present(present) => value.is_some() == *present,
            What::String(matcher) => value.is_some_and(|v| matcher.matches(&v)),
        }
    }
}

/// The query of a `:path` without its `?` and without a fragment; empty where there is none.
pub fn query_of(path: &[u8]) -> &[u8] {
    let path = &path[..memchr::memchr(b'#', path).unwrap_or(path.len())];
    memchr::memchr(b'?', path).map_or(&[], |at| &path[at + 1..])
}

/// The parameters of a `:path` in order, undecoded; one without `=` has an empty value.
pub fn query_parameters(path: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    query_of(path).split(|b| *b == b'&').filter(|part| !part.is_empty()).map(|part| {
        match memchr::memchr(b'=', part) {
            Some(at) => (&part[..at], &part[at + 1..]),
            None => (part, &part[part.len()..]),
        }
    })
}

/// The first value of a parameter.
pub fn query_parameter<'a>(path: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    query_parameters(path).find(|(n, _)| *n == name).map(|(_, v)| v)
}

/// The first value of a parameter, names and values decoded.
pub fn decoded_query_parameter<'a>(path: &'a [u8], name: &[u8]) -> Option<Cow<'a, [u8]>> {
    query_parameters(path).find(|(n, _)| &*percent_decoded(n) == name).map(|(_, v)| percent_decoded(v))
}

/// `%XX` taken for the byte that it stands for; what is malformed stays, and `+` is no space.
pub fn percent_decoded(text: &[u8]) -> Cow<'_, [u8]> {
    let Some(first) = memchr::memchr(b'%', text) else { return Cow::Borrowed(text) };
    let digit = |at: usize| text.get(at).and_then(|c| char::from(*c).to_digit(16)).map(|d| d as u8);
    let mut out = Vec::with_capacity(text.len());
    out.extend_from_slice(&text[..first]);
    let mut at = first;
    while let Some(byte) = text.get(at) {
        if *byte == b'%'
            && let (Some(high), Some(low)) = (digit(at + 1), digit(at + 2))
        {
            out.push(high << 4 | low);
            at += 3;
        } else {
            out.push(*byte);
            at += 1;
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_as_sent() {
        let path = b"/p?a=1&b&c=&a=2&d=x%20y";
        assert_eq!(query_parameter(path, b"a"), Some(&b"1"[..]));
        assert_eq!(query_parameter(path, b"b"), Some(&b""[..]));
        assert_eq!(query_parameter(path, b"c"), Some(&b""[..]));
        assert_eq!(query_parameter(path, b"d"), Some(&b"x%20y"[..]));
        assert_eq!(query_parameter(path, b"e"), None);
        assert_eq!(query_parameter(b"/p", b"p"), None);
    }

    #[test]
    fn what_is_decoded() {
        let decoded = |text: &'static str| percent_decoded(text.as_bytes());
        assert_eq!(&*decoded("a+b"), b"a+b");
        assert_eq!(&*decoded("a%20b%C3%a9"), "a bé".as_bytes());
        assert_eq!(&*decoded("%%41%4%zz%"), b"%A%4%zz%");
        assert_eq!(decoded_query_parameter(b"/?%61=%41&a=2", b"a").as_deref(), Some(&b"A"[..]));
    }

    #[test]
    fn presence_and_value() {
        use pb::query_parameter_matcher::QueryParameterMatchSpecifier as S;
        let make = |specifier| {
            QueryParameterMatcher::from_proto(&pb::QueryParameterMatcher {
                name: "a".into(),
                query_parameter_match_specifier: specifier,
            })
            .unwrap()
        };
        assert!(make(None).matches(b"/?a") && !make(None).matches(b"/?b"));
        assert!(make(Some(S::PresentMatch(false))).matches(b"/?b"));
        assert!(!make(Some(S::PresentMatch(false))).matches(b"/?a"));
    }
}
