//! Following an upstream's redirect inside of the proxy: the request's headers become those of the redirect's target,
//! and the connection manager serves them anew, filters and all (Envoy's `recreateStream`). What cannot be followed
//! is the client's to follow.

use sampan_codec::h1::ResponseHead;
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::stats::{Counter, Scope};

use super::upload::Upload;
use super::{End, Exchange, Forward};
use crate::route::{InternalRedirects, RedirectStep};
use crate::stream::Stream;

/// Why redirects were passed on.
pub(super) struct RedirectStats {
    bad_location: Counter,
    no_route: Counter,
    predicate: Counter,
    too_many: Counter,
    unsafe_scheme: Counter,
}

impl RedirectStats {
    pub(super) fn new(scope: &Scope) -> Self {
        let counter = |name: &str| scope.counter(&format!("passthrough_internal_redirect_{name}"));
        Self {
            bad_location: counter("bad_location"),
            no_route: counter("no_route"),
            predicate: counter("predicate"),
            too_many: counter("too_many_redirects"),
            unsafe_scheme: counter("unsafe_scheme"),
        }
    }
}

/// A response that was followed; the stream already is the request to its target.
pub struct Followed {
    /// Its status.
    pub status: u16,
    /// Its headers, for the log.
    pub headers: HeaderMap,
}

/// The parts of an absolute URL.
struct Target<'u> {
    scheme: &'u [u8],
    authority: &'u [u8],
    /// With the query, without the fragment.
    path: &'u [u8],
}

impl<'u> Target<'u> {
    fn parse(url: &'u [u8]) -> Option<Self> {
        let colon = url.iter().position(|c| *c == b':')?;
        let (scheme, rest) = (&url[..colon], url[colon..].strip_prefix(b"://")?);
        if scheme.is_empty() || !scheme.iter().all(u8::is_ascii_alphabetic) {
            return None;
        }
        let end = rest.iter().position(|c| matches!(c, b'/' | b'?' | b'#')).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        // User information is not part of the authority.
        let authority = authority.rsplit(|c| *c == b'@').next().unwrap_or_default();
        let path = if path.is_empty() { b"/" } else { path };
        let path = path.split(|c| *c == b'#').next().unwrap_or_default();
        let plain = path.iter().all(|c| *c > b' ' && *c != 0x7f);
        (valid_authority(authority) && plain).then_some(Self { scheme, authority, path })
    }
}

/// A name or a bracketed IPv6 address, and perhaps a port.
fn valid_authority(authority: &[u8]) -> bool {
    let (host, port) = crate::manager::split_port(authority);
    let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
    if port.is_some_and(|port| text(port).parse::<u16>().is_err()) {
        return false;
    }
    match host.strip_prefix(b"[").and_then(|host| host.strip_suffix(b"]")) {
        Some(ip) => text(ip).parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.iter().all(|c| c.is_ascii_alphanumeric() || b"-._".contains(c)),
    }
}

impl Forward<'_> {
    /// Follows a response, if its route says so and it can be followed; then the stream has become the new request.
    pub(super) fn follow(
        &mut self,
        head: &mut ResponseHead,
        exchange: &mut Exchange,
        upload: &mut Upload,
    ) -> Option<End> {
        let policy = self.action.redirects.as_deref().filter(|policy| policy.follows(head.status))?;
        let complete = upload.is_received() && upload.can_replay();
        let from_http = scheme_is_http(self.stream);
        let original = original_url(&self.stream.request, from_http);
        if !complete || !self.turn(policy, head, from_http) {
            self.cluster.stats().upstream_internal_redirect_failed_total.inc();
            return None;
        }
        let request = &mut self.stream.request;
        let method = request.get(HeaderId::METHOD).unwrap_or_default();
        if head.status == 303 && method != b"GET" && method != b"HEAD" {
            request.set(HeaderId::METHOD, "GET");
            request.remove(HeaderId::CONTENT_LENGTH);
        } else {
            self.stream.body = upload.again();
        }
        request.set_name(&HeaderName::new("x-envoy-original-url"), original);
        self.stream.redirected.get_or_insert_default().count += 1;
        self.cluster.stats().upstream_internal_redirect_succeeded_total.inc();
        if head.end {
            exchange.finish(true);
        }
        let headers = std::mem::take(&mut head.headers);
        Some(End::Follow(Box::new(Followed { status: head.status, headers })))
    }

    /// Makes the request one to the redirect's target and finds its route, or leaves the request as it was.
    fn turn(&mut self, policy: &InternalRedirects, head: &ResponseHead, from_http: bool) -> bool {
        let stats = &self.config.redirects;
        let Some(location) = head.headers.get(HeaderId::LOCATION) else { return false };
        if !self.stream.request.contains(HeaderId::PATH) {
            return false;
        }
        let Some(target) = Target::parse(location) else {
            stats.bad_location.inc();
            return false;
        };
        let to_http = target.scheme.eq_ignore_ascii_case(b"http");
        if !policy.cross_scheme && from_http != to_http {
            stats.unsafe_scheme.inc();
            return false;
        }
        if self.stream.redirected.as_ref().map_or(0, |r| r.count) >= policy.max {
            stats.too_many.inc();
            return false;
        }
        let saved = self.stream.request.clone();
        let request = &mut self.stream.request;
        for name in &policy.headers_to_copy {
            request.remove_name(name);
            for value in head.headers.get_all_name(name) {
                request.append_name(name, value);
            }
        }
        request.set(HeaderId::SCHEME, target.scheme);
        request.set(HeaderId::AUTHORITY, target.authority);
        request.set(HeaderId::PATH, target.path);
        self.stream.refresh_route();
        let allowed = match &self.stream.route {
            None => {
                stats.no_route.inc();
                false
            }
            Some(to) => {
                let step = RedirectStep {
                    from: self.selected.name(),
                    to: to.name(),
                    from_https: !from_http,
                    to_https: !to_http,
                    info: &self.stream.info,
                };
                let allowed = policy.allows(&step, self.stream.redirected.get_or_insert_default());
                if !allowed {
                    stats.predicate.inc();
                }
                allowed
            }
        };
        if !allowed {
            self.stream.request = saved;
            // The response passes the filters of the route by which the request came.
            self.stream.route = Some(self.selected.clone());
        }
        allowed
    }
}

fn scheme_is_http(stream: &Stream) -> bool {
    let scheme = stream.request.get(HeaderId::SCHEME).unwrap_or_default();
    scheme.eq_ignore_ascii_case(b"http") || stream.info.connection.tls.is_none()
}

fn original_url(request: &HeaderMap, http: bool) -> Vec<u8> {
    let scheme: &[u8] = if http { b"http://" } else { b"https://" };
    let part = |id| request.get(id).unwrap_or_default();
    [scheme, part(HeaderId::AUTHORITY), part(HeaderId::PATH)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_urls_are_targets() {
        let parts = |url: &str| {
            let target = Target::parse(url.as_bytes())?;
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            Some((text(target.scheme), text(target.authority), text(target.path)))
        };
        for (url, expected) in [
            ("http://a/b?c=d#e", Some(("http", "a", "/b?c=d"))),
            ("HTTPS://a.b:81", Some(("HTTPS", "a.b:81", "/"))),
            ("http://a?b", Some(("http", "a", "?b"))),
            ("http://u:p@[::1]:80/", Some(("http", "[::1]:80", "/"))),
            ("http://a#b", Some(("http", "a", ""))),
            ("/relative", None),
            ("//a/b", None),
            ("http:///b", None),
            ("http://", None),
            ("http:a", None),
            ("ht tp://a", None),
            ("http://a b/", None),
            ("http://a:port/", None),
            ("http://a:70000/", None),
            ("http://a/b c", None),
            ("http://[::g]/", None),
            ("", None),
        ] {
            let expected = expected.map(|(s, a, p)| (s.to_owned(), a.to_owned(), p.to_owned()));
            assert_eq!(parts(url), expected, "{url}");
        }
    }
}
