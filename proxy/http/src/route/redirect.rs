//! `RedirectAction`: an answer that sends the client elsewhere.

use std::borrow::Cow;

use envoy_types::pb::envoy::config::route::v3 as pb;
use sampan_core::error::{AtField, ConfigResult};
use sampan_core::format::{Extensions, FormatContext, Formatter};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::matcher::RegexRewrite;
use sampan_core::stream_info::StreamInfo;

use super::Route;
use super::matching::without_query;

/// A redirect.
pub struct Redirect {
    status: u16,
    https: bool,
    scheme: Box<str>,
    host: Box<str>,
    port: u32,
    path: Option<RedirectPath>,
    strip_query: bool,
}

enum RedirectPath {
    Path(Box<str>),
    Prefix(Box<[u8]>),
    Regex(RegexRewrite),
    Format(Formatter),
}

impl Redirect {
    /// The redirect that `require_tls` means.
    pub fn to_https() -> Self {
        Self {
            status: 301,
            https: true,
            scheme: "".into(),
            host: "".into(),
            port: 0,
            path: None,
            strip_query: false,
        }
    }

    /// No redirect at all: where the request already is.
    pub fn to_here() -> Self {
        Self { https: false, ..Self::to_https() }
    }

    pub(super) fn from_proto(message: &pb::RedirectAction) -> ConfigResult<Self> {
        use pb::redirect_action::{
            PathRewriteSpecifier, RedirectResponseCode as Code, SchemeRewriteSpecifier,
        };
        let (https, scheme) = match &message.scheme_rewrite_specifier {
            Some(SchemeRewriteSpecifier::HttpsRedirect(https)) => (*https, ""),
            Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => (false, scheme.as_str()),
            None => (false, ""),
        };
        Ok(Self {
            status: match message.response_code() {
                Code::MovedPermanently => 301,
                Code::Found => 302,
                Code::SeeOther => 303,
                Code::TemporaryRedirect => 307,
                Code::PermanentRedirect => 308,
            },
            https,
            scheme: scheme.into(),
            host: message.host_redirect.as_str().into(),
            port: message.port_redirect,
            path: match &message.path_rewrite_specifier {
                None => None,
                Some(PathRewriteSpecifier::PathRedirect(p)) => Some(RedirectPath::Path(p.as_str().into())),
                Some(PathRewriteSpecifier::PrefixRewrite(p)) => {
                    Some(RedirectPath::Prefix(p.as_bytes().into()))
                }
                Some(PathRewriteSpecifier::PathRewrite(text)) => Some(RedirectPath::Format(
                    Formatter::parse_header_value(text, &Extensions::NONE).at("path_rewrite")?,
                )),
                Some(PathRewriteSpecifier::RegexRewrite(r)) => {
                    Some(RedirectPath::Regex(RegexRewrite::from_proto(r).at("regex_rewrite")?))
                }
            },
            strip_query: message.strip_query,
        })
    }

    /// The status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Where to.
    pub fn location(&self, route: Option<&Route>, headers: &HeaderMap, info: &StreamInfo) -> Vec<u8> {
        let scheme_now = headers.get(HeaderId::SCHEME).unwrap_or(b"http");
        let scheme: &[u8] = if self.https {
            b"https"
        } else if self.scheme.is_empty() {
            scheme_now
        } else {
            self.scheme.as_bytes()
        };
        let host = self.authority(scheme_now, scheme, headers.get(HeaderId::AUTHORITY).unwrap_or_default());
        let path = headers.get(HeaderId::PATH).unwrap_or_default();
        let just_path = without_query(path);
        let query = if self.strip_query { b"" } else { &path[just_path.len()..] };
        let path = match &self.path {
            None => Cow::Owned([just_path, query].concat()),
            Some(RedirectPath::Path(p)) => with_query(Cow::Borrowed(p.as_bytes()), query),
            Some(RedirectPath::Format(format)) => {
                let mut new = Vec::new();
                format.write(&FormatContext { request: Some(headers), ..FormatContext::new(info) }, &mut new);
                if new.is_empty() {
                    new.extend_from_slice(just_path);
                }
                with_query(Cow::Owned(new), query)
            }
            Some(RedirectPath::Prefix(_) | RedirectPath::Regex(_)) => {
                Cow::Owned(self.rewritten(route, just_path, query).unwrap_or_default())
            }
        };
        let slash: &[u8] = if path.starts_with(b"/") { b"" } else { b"/" };
        [scheme, b"://", &host, slash, &path].concat()
    }

    /// The path as the redirect's rewrite leaves it; none where the new one is not made of the old one.
    fn rewritten(&self, route: Option<&Route>, path: &[u8], query: &[u8]) -> Option<Vec<u8>> {
        match self.path.as_ref()? {
            RedirectPath::Prefix(p) => {
                let matched = route.map_or(Some(0), |r| r.matched(path));
                let (new, rest): (&[u8], _) = matched.map_or((b"", path), |n| (p, &path[n..]));
                Some([new, rest, query].concat())
            }
            RedirectPath::Regex(r) => {
                Some([&r.replace(path).unwrap_or_else(|| path.to_vec()), query].concat())
            }
            RedirectPath::Path(_) | RedirectPath::Format(_) => None,
        }
    }

    /// Leaves the request with the path that the client is sent to, for who looks at it afterwards.
    pub fn rewrite(&self, route: Option<&Route>, headers: &mut HeaderMap, keep_original: bool) {
        let path = headers.get(HeaderId::PATH).unwrap_or_default().to_vec();
        let just_path = without_query(&path);
        let Some(new) = self.rewritten(route, just_path, &path[just_path.len()..]) else { return };
        headers.set(HeaderId::PATH, new);
        if keep_original {
            headers.set(HeaderId::X_ENVOY_ORIGINAL_PATH, path);
        }
    }

    fn authority(&self, scheme_now: &[u8], scheme: &[u8], host: &[u8]) -> Vec<u8> {
        let mut host = if self.host.is_empty() { host.to_vec() } else { self.host.as_bytes().to_vec() };
        if self.port > 0 {
            let name = crate::manager::split_port(&host).0.to_vec();
            host = [name, format!(":{}", self.port).into_bytes()].concat();
        } else if scheme_now != scheme {
            // The old scheme's default port is not the new one's.
            let (name, port) = crate::manager::split_port(&host);
            let default: &[u8] = if scheme_now == b"https" { b"443" } else { b"80" };
            if port == Some(default) {
                host = name.to_vec();
            }
        }
        host
    }
}

/// A query of the configuration stays; the request's goes behind a path that has none.
fn with_query<'p>(path: Cow<'p, [u8]>, query: &[u8]) -> Cow<'p, [u8]> {
    if query.is_empty() || path.contains(&b'?') { path } else { Cow::Owned([&path, query].concat()) }
}
