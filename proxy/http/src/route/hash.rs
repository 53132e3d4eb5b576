//! `hash_policy`: a number that is the same for all requests that belong together.
//!
//! Policies are asked in order; what each yields is mixed into the number so far, turned by one bit, so that two equal
//! policies do not cancel each other out. A `terminal` policy ends the list once there is a number. The hash is XXH64
//! with seed 0, over the same bytes as in Envoy, so that both send a request to the same host.

use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3::route_action as pb;
use pb::hash_policy::PolicySpecifier;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::matcher::{RegexRewrite, cookie_value, query_parameter};
use sampan_core::stream_info::StreamInfo;
use sampan_core::xxhash::xxh64;
use smallvec::SmallVec;

use crate::manager::duration;

/// A compiled list of policies.
#[derive(Default)]
pub struct HashPolicies(Vec<Policy>);

struct Policy {
    source: Source,
    terminal: bool,
}

enum Source {
    Header { name: HeaderName, rewrite: Option<RegexRewrite> },
    Cookie(Cookie),
    ClientIp,
    QueryParameter(Box<[u8]>),
}

/// A cookie whose value is hashed.
#[derive(Debug)]
pub struct Cookie {
    /// Its name.
    pub name: Box<str>,
    /// `ttl`: whoever has no such cookie is given one that lives that long; without it nobody is given one.
    pub ttl: Option<Duration>,
    /// `path`
    pub path: Box<str>,
    /// `attributes`: names and values.
    pub attributes: Vec<(Box<str>, Box<str>)>,
}

/// Makes the value of a cookie that a client lacks; empty for none.
pub type MakeCookie<'a> = &'a mut dyn FnMut(&Cookie) -> String;

impl HashPolicies {
    pub(super) fn from_proto(messages: &[pb::HashPolicy]) -> ConfigResult<Self> {
        let mut policies = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            if let Some(source) = Source::from_proto(message).at_index("hash_policy", i)? {
                policies.push(Policy { source, terminal: message.terminal });
            }
        }
        Ok(Self(policies))
    }

    /// The request's number; none where no policy yields one. Cookies are made only where `make_cookie` is given.
    pub fn hash(
        &self,
        headers: &HeaderMap,
        info: &StreamInfo,
        mut make_cookie: Option<MakeCookie<'_>>,
    ) -> Option<u64> {
        let mut all: Option<u64> = None;
        for policy in &self.0 {
            if let Some(hash) = policy.source.hash(headers, info, &mut make_cookie) {
                all = Some(all.unwrap_or(0).rotate_left(1) ^ hash);
            }
            if policy.terminal && all.is_some() {
                break;
            }
        }
        all
    }
}

impl Source {
    /// None for a policy that never yields anything.
    fn from_proto(message: &pb::HashPolicy) -> ConfigResult<Option<Self>> {
        let specifier =
            message.policy_specifier.as_ref().ok_or_else(|| ConfigError::missing("policy_specifier"))?;
        Ok(Some(match specifier {
            PolicySpecifier::Header(header) => {
                let rewrite = header.regex_rewrite.as_ref().map(RegexRewrite::from_proto).transpose();
                Self::Header {
                    name: HeaderName::new(&header.header_name),
                    rewrite: rewrite.at("regex_rewrite").at("header")?,
                }
            }
            PolicySpecifier::Cookie(cookie) => Self::Cookie(Cookie {
                name: cookie.name.as_str().into(),
                ttl: cookie.ttl.as_ref().map(|ttl| Duration::from_secs(duration(ttl).as_secs())),
                path: cookie.path.as_str().into(),
                attributes: cookie
                    .attributes
                    .iter()
                    .map(|a| (a.name.as_str().into(), a.value.as_str().into()))
                    .collect(),
            }),
            PolicySpecifier::ConnectionProperties(properties) if properties.source_ip => Self::ClientIp,
            PolicySpecifier::ConnectionProperties(_) => return Ok(None),
            PolicySpecifier::QueryParameter(parameter) => {
                Self::QueryParameter(parameter.name.as_bytes().into())
            }
            PolicySpecifier::FilterState(_) => {
                return Err(ConfigError::unsupported("filter_state").at("filter_state"));
            }
        }))
    }

    fn hash(
        &self,
        headers: &HeaderMap,
        info: &StreamInfo,
        make_cookie: &mut Option<MakeCookie<'_>>,
    ) -> Option<u64> {
        match self {
            Self::Header { name, rewrite } => hash_header(headers, name, rewrite.as_ref()),
            // An empty cookie counts for none.
            Self::Cookie(cookie) => {
                match cookie_value(headers, cookie.name.as_bytes()).filter(|v| !v.is_empty()) {
                    Some(value) => Some(xxh64(value, 0)),
                    None => {
                        let value = make_cookie.as_mut().filter(|_| cookie.ttl.is_some())?(cookie);
                        (!value.is_empty()).then(|| xxh64(value.as_bytes(), 0))
                    }
                }
            }
            Self::ClientIp => Some(xxh64(info.remote.ip()?.to_string().as_bytes(), 0)),
            Self::QueryParameter(name) => {
                let path = headers.get(HeaderId::PATH)?;
                query_parameter(path, name).map(|value| xxh64(value, 0))
            }
        }
    }
}

/// The order of a header's values does not count.
fn hash_header(headers: &HeaderMap, name: &HeaderName, rewrite: Option<&RegexRewrite>) -> Option<u64> {
    let rewritten: SmallVec<[Vec<u8>; 1]>;
    let mut values: SmallVec<[&[u8]; 4]> = headers.get_all_name(name).collect();
    if values.is_empty() {
        return None;
    }
    if let Some(rewrite) = rewrite {
        rewritten = values.iter().map(|v| rewrite.replace(v).unwrap_or_else(|| v.to_vec())).collect();
        values = rewritten.iter().map(Vec::as_slice).collect();
    }
    values.sort_unstable();
    Some(values.iter().fold(0, |seed, value| xxh64(value, seed)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::tests::{info, message, request, with_routes};

    fn policies(list: &str) -> HashPolicies {
        use envoy_types::pb::envoy::config::route::v3::route::Action;
        let route = format!("{{match: {{prefix: /}}, route: {{cluster: a, hash_policy: {list}}}}}");
        let config = message(&with_routes(&[&route]));
        let Some(Action::Route(action)) = &config.virtual_hosts[0].routes[0].action else { unreachable!() };
        HashPolicies::from_proto(&action.hash_policy).unwrap()
    }

    #[test]
    fn each_source_and_their_mixture() {
        let mut headers = request("a", "/p?q=one&q=two&empty");
        headers.append_lower(b"x", b"b");
        headers.append_lower(b"x", b"a");
        headers.append(HeaderId::COOKIE, "first=1; c=\"word\"; empty=");
        let hash = |list: &str| policies(list).hash(&headers, &info(), None);
        let x = |text: &str| xxh64(text.as_bytes(), 0);
        assert_eq!(hash("[{header: {header_name: X}}]"), Some(xxh64(b"b", x("a"))));
        let rewrite = "regex_rewrite: {pattern: {regex: \"[ab]\"}, substitution: c}";
        assert_eq!(hash(&format!("[{{header: {{header_name: X, {rewrite}}}}}]")), Some(xxh64(b"c", x("c"))));
        assert_eq!(hash("[{header: {header_name: none}}]"), None);
        assert_eq!(hash("[{cookie: {name: c}}]"), Some(x("word")));
        assert_eq!(hash("[{cookie: {name: empty}}]"), None);
        assert_eq!(hash("[{cookie: {name: none, ttl: 1s}}]"), None, "nobody makes one");
        assert_eq!(hash("[{query_parameter: {name: q}}]"), Some(x("one")));
        assert_eq!(hash("[{query_parameter: {name: empty}}]"), Some(x("")));
        assert_eq!(hash("[{connection_properties: {source_ip: true}}]"), Some(x("127.0.0.1")));
        assert_eq!(hash("[{connection_properties: {source_ip: false}}]"), None);
        let (c, q) = ("{cookie: {name: c}", "{query_parameter: {name: q}}");
        assert_eq!(hash(&format!("[{c}}}, {q}]")), Some(x("word").rotate_left(1) ^ x("one")));
        assert_eq!(hash(&format!("[{c}, terminal: true}}, {q}]")), Some(x("word")));
        assert_eq!(
            hash(&format!("[{{header: {{header_name: none}}, terminal: true}}, {q}]")),
            Some(x("one"))
        );
    }

    #[test]
    fn a_cookie_is_made_where_there_is_a_time_to_live() {
        let headers = request("a", "/");
        let made = |list: &str| {
            let mut names = Vec::new();
            let mut make = |cookie: &Cookie| {
                names.push(format!("{} {} {:?}", cookie.name, cookie.path, cookie.ttl));
                "made".to_owned()
            };
            let hash = policies(list).hash(&headers, &info(), Some(&mut make));
            (hash, names.join(","))
        };
        assert_eq!(made("[{cookie: {name: id}}]"), (None, String::new()));
        let expected = (Some(xxh64(b"made", 0)), "id /p Some(5s)".to_owned());
        assert_eq!(made("[{cookie: {name: id, path: /p, ttl: 5.5s}}]"), expected);
    }
}
