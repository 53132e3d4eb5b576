//! Where tokens stand in a request: headers behind a prefix, query parameters, cookies.
//!
//! A place is looked at once for all providers that name it; which issuers' tokens may stand there is checked when the
//! token was read. Tokens are found in the order headers, parameters, cookies, each by name.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::{cookie_value, decoded_query_parameter, percent_decoded};

use crate::route::is_inline;

/// The places of some providers.
pub(super) struct Locations(Vec<Location>);

pub(super) struct Location {
    place: Place,
    /// Issuers whose tokens may stand here; none: all.
    issuers: Option<Vec<String>>,
}

enum Place {
    Header(HeaderName, Box<[u8]>),
    Parameter(Box<[u8]>),
    Cookie(Box<[u8]>),
}

/// A token as it stands in a request.
pub(super) struct Token<'l> {
    pub(super) text: String,
    pub(super) location: &'l Location,
}

/// In which order places are looked at.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Header(String, String),
    Parameter(String),
    Cookie(String),
}

impl Locations {
    pub(super) fn new(providers: &[pb::JwtProvider]) -> Self {
        let mut places: BTreeMap<Key, Option<Vec<String>>> = BTreeMap::new();
        for provider in providers {
            let headers = provider.from_headers.iter();
            let headers = headers.map(|h| Key::Header(h.name.to_ascii_lowercase(), h.value_prefix.clone()));
            let parameters = provider.from_params.iter().cloned().map(Key::Parameter);
            let cookies = provider.from_cookies.iter().cloned().map(Key::Cookie);
            let mut keys: Vec<_> = headers.chain(parameters).chain(cookies).collect();
            if keys.is_empty() {
                keys.push(Key::Header("authorization".to_owned(), "Bearer ".to_owned()));
                keys.push(Key::Parameter("access_token".to_owned()));
            }
            for key in keys {
                let issuers = places.entry(key).or_insert_with(|| Some(Vec::new()));
                match issuers {
                    _ if provider.issuer.is_empty() => *issuers = None,
                    Some(issuers) => issuers.push(provider.issuer.clone()),
                    None => {}
                }
            }
        }
        let bytes = |text: &str| text.as_bytes().into();
        let location = |(key, issuers): (Key, _)| Location {
            place: match &key {
                Key::Header(name, prefix) => Place::Header(HeaderName::new(name), bytes(prefix)),
                Key::Parameter(name) => Place::Parameter(bytes(name)),
                Key::Cookie(name) => Place::Cookie(bytes(name)),
            },
            issuers,
        };
        Self(places.into_iter().map(location).collect())
    }

    /// All tokens of a request.
    pub(super) fn tokens(&self, request: &HeaderMap) -> Vec<Token<'_>> {
        let mut tokens = Vec::new();
        for location in &self.0 {
            let mut add = |text: &[u8]| {
                // What is no text is no token either, but it is there.
                let text = String::from_utf8_lossy(text).into_owned();
                tokens.push(Token { text, location });
            };
            match &location.place {
                Place::Header(name, prefix) if is_one(name) => {
                    let value = request.joined(name);
                    value.iter().filter_map(|value| behind(value, prefix)).for_each(&mut add);
                }
                Place::Header(name, prefix) => {
                    request.get_all_name(name).filter_map(|value| behind(value, prefix)).for_each(&mut add);
                }
                Place::Parameter(name) => {
                    let path = request.get(HeaderId::PATH).unwrap_or_default();
                    decoded_query_parameter(path, name).iter().for_each(|value| add(value));
                }
                Place::Cookie(name) => cookie_value(request, name).into_iter().for_each(&mut add),
            }
        }
        tokens
    }
}

/// Headers of which Envoy sees one value, however many lines there are.
fn is_one(name: &HeaderName) -> bool {
    let id = name.id();
    id == HeaderId::AUTHORIZATION || (id != HeaderId::CUSTOM && is_inline(id))
}

/// What follows a prefix that may stand anywhere in a value, from the first character on that a token may have.
fn behind<'v>(value: &'v [u8], prefix: &[u8]) -> Option<&'v [u8]> {
    if prefix.is_empty() {
        return Some(value);
    }
    let at = memchr::memmem::find(value, prefix)? + prefix.len();
    let token = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let start = value[at..].iter().position(token);
    Some(start.map_or(value, |start| &value[at + start..]))
}

/// A path without a query parameter. The others stay as they were sent: were they decoded, as Envoy does it, `%26` would
/// part one into two, and the upstream would read parameters that no rule has seen.
fn without_parameter(path: &[u8], name: &[u8]) -> Vec<u8> {
    let Some(query) = memchr::memchr(b'?', path) else { return path.to_vec() };
    let named = |part: &[u8]| {
        let end = memchr::memchr(b'=', part).unwrap_or(part.len());
        &*percent_decoded(&part[..end]) == name
    };
    let mut out = path[..query].to_vec();
    let mut separator = b'?';
    for part in path[query + 1..].split(|c| *c == b'&').filter(|part| !named(part)) {
        out.push(separator);
        out.extend_from_slice(part);
        separator = b'&';
    }
    out
}

impl Location {
    pub(super) fn allows(&self, issuer: &str) -> bool {
        self.issuers.as_ref().is_none_or(|issuers| issuers.iter().any(|i| i == issuer))
    }

    /// Takes the token out of the request, so that it is not forwarded. Cookies stay, as in Envoy.
    pub(super) fn remove(&self, request: &mut HeaderMap) {
        match &self.place {
            Place::Header(name, _) => {
                request.remove_name(name);
            }
            Place::Parameter(name) => {
                let path = without_parameter(request.get(HeaderId::PATH).unwrap_or_default(), name);
                request.set(HeaderId::PATH, path);
            }
            Place::Cookie(_) => {}
        }
    }

    /// Whether [`Location::remove`] changes the path.
    pub(super) fn in_path(&self) -> bool {
        matches!(self.place, Place::Parameter(_))
    }
}
