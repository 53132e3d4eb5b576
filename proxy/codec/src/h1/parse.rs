//! Heads: from bytes to a [`HeaderMap`], and what they say about the body (RFC 9112 sections 2 to 6).
//!
//! Nearly all heads are `plain` and read in one pass; the others, and what is to be refused, go through the whole `grammar`.

mod framing;
mod fuzz;
mod grammar;
mod plain;

use sampan_core::header::{HeaderId, HeaderMap, Spelling};
use sampan_core::stream_info::Protocol;

use crate::error::CodecError;

pub(super) use framing::{Framing, framing};
pub use fuzz::fuzz_parse;
pub(super) use grammar::trailers;

/// What the parser must know of its connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_bytes: usize,
    pub(super) max_headers: usize,
    pub(super) spelling: Spelling,
    pub(super) allow_custom_methods: bool,
}

/// A parsed start of a message.
pub(super) struct Head {
    pub(super) headers: HeaderMap,
    pub(super) protocol: Protocol,
    /// Bytes of the head on the wire.
    pub(super) len: usize,
    /// Those of its first line, the line end included.
    pub(super) first_line: usize,
    /// Of a request: the range of its target in the head.
    pub(super) target: (usize, usize),
    /// Of a response.
    pub(super) status: u16,
}

impl Head {
    /// Bytes of the header lines as Envoy counts what it receives: a name, its value and three. To be asked before the
    /// list is changed; exact where lines are written as usual, with one space behind the colon.
    pub(super) fn header_bytes(&self) -> usize {
        let pseudo = if self.headers.contains(HeaderId::PATH) { 2 } else { 1 };
        self.len.saturating_sub(self.first_line + 2 + self.headers.len() - pseudo).max(3)
    }
}

pub(super) const TOO_LARGE: CodecError =
    CodecError { status: 431, details: "http1.headers_too_large", message: "headers size exceeds limit" };
pub(super) const TOO_MANY: CodecError =
    CodecError { status: 431, details: "http1.too_many_headers", message: "headers count exceeds limit" };
const INVALID_CHARACTERS: CodecError =
    CodecError::bad("http1.invalid_characters", "header value contains invalid chars");
/// Neither HTTP/1.1 nor an accepted HTTP/1.0.
pub(super) const LOW_VERSION: CodecError =
    CodecError { status: 426, details: "low_version", message: "Upgrade required for HTTP/1.0 or HTTP/0.9" };

/// The methods of Envoy's parser (those of Node's http-parser).
static METHODS: &[&str] = &[
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "CONNECT",
    "TRACE",
    "ACL",
    "BIND",
    "CHECKOUT",
    "COPY",
    "LINK",
    "LOCK",
    "MERGE",
    "MKACTIVITY",
    "MKCALENDAR",
    "MKCOL",
    "MOVE",
    "MSEARCH",
    "NOTIFY",
    "PROPFIND",
    "PROPPATCH",
    "PURGE",
    "REBIND",
    "REPORT",
    "SEARCH",
    "SOURCE",
    "SUBSCRIBE",
    "UNBIND",
    "UNLINK",
    "UNLOCK",
    "UNSUBSCRIBE",
];

/// Whether a complete head could be in `bytes`: an empty line is there. `from` is where the last search ended.
pub(super) fn head_may_be_complete(bytes: &[u8], from: usize) -> bool {
    let start = from.saturating_sub(3);
    memchr::memchr_iter(b'\n', &bytes[start..]).any(|at| {
        let rest = &bytes[start + at + 1..];
        rest.starts_with(b"\n") || rest.starts_with(b"\r\n")
    })
}

/// A request head. `Ok(None)`: more bytes are needed. Pseudo headers are not set yet, but for
/// `:method`, and `:path` where the target has the origin form.
pub(super) fn request(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    if let Some(head) = plain::request(bytes, limits) {
        return Ok(Some(head));
    }
    grammar::request(bytes, limits)
}

/// A response head. `Ok(None)`: more bytes are needed. `:status` is set.
pub(super) fn response(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    if let Some(head) = plain::response(bytes, limits) {
        return Ok(Some(head));
    }
    grammar::response(bytes, limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const LIMITS: Limits = Limits {
        max_bytes: 4096,
        max_headers: 100,
        spelling: Spelling::Unknown,
        allow_custom_methods: false,
    };

    fn parse(text: &str) -> Result<Option<Head>, CodecError> {
        request(text.as_bytes(), &LIMITS)
    }

    #[test]
    fn reads_a_request() {
        let head = parse("GET /a?b HTTP/1.1\r\nHost: x\r\nX-Foo:  bar \r\n\r\nrest").unwrap().unwrap();
        let all: Vec<_> = head.headers.iter().map(|(_, n, v)| (n.to_vec(), v.to_vec())).collect();
        assert_eq!(
            all,
            [
                (b":path".to_vec(), b"/a?b".to_vec()),
                (b":method".to_vec(), b"GET".to_vec()),
                (b"host".to_vec(), b"x".to_vec()),
                (b"x-foo".to_vec(), b"bar".to_vec())
            ]
        );
        assert_eq!(head.protocol, Protocol::Http11);
        assert_eq!(head.target, (4, 4));
    }

    #[test]
    fn refuses_bad_lines() {
        for bad in [
            "FOO / HTTP/1.1\r\n\r\n",
            "get / HTTP/1.1\r\n\r\n",
            "GET foo HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nA B: c\r\n\r\n",
            "GET / HTTP/1.1\r\nA : c\r\n\r\n",
            "GET / HTTP/1.1\r\nA: \0\r\n\r\n",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse("GET / HTTP/1.1\r\nA: b\r\n").unwrap().is_none());
    }

    #[test]
    fn folded_lines_are_joined() {
        let head = parse("GET / HTTP/1.1\r\nA: b\r\n c\r\n\td\r\nHost: x\r\n\r\nrest").unwrap().unwrap();
        assert_eq!(head.len, 41);
        let all: Vec<_> = head.headers.iter().map(|(_, n, v)| (n.to_vec(), v.to_vec())).skip(2).collect();
        assert_eq!(all, [(b"a".to_vec(), b"b c\td".to_vec()), (b"host".to_vec(), b"x".to_vec())]);
        assert!(parse("GET / HTTP/1.1\r\nA: b\r\n c\r\n").unwrap().is_none());
        assert!(parse("GET / HTTP/1.1\r\n A: b\r\n\r\n").is_err());
        assert!(parse("GET / HTTP/1.1\r\nA: b\r\n c\x01\r\n\r\n").is_err());
    }

    #[test]
    fn refused_lines_are_told_apart() {
        let error = |text: &str| parse(text).map(|_| ()).unwrap_err();
        assert_eq!(error("GET /\r\n\r\n"), LOW_VERSION);
        assert_eq!(error("GET / HTTP/2.0\r\n\r\n"), LOW_VERSION);
        assert_eq!(error("GET /\x01 HTTP/1.1\r\n\r\n"), INVALID_CHARACTERS);
        assert_eq!(error("GET /a b HTTP/1.1\r\n\r\n").status, 400);
        assert_eq!(error("PRI * HTTP/2.0\r\n\r\n").status, 400);
        assert!(parse("GET  /two HTTP/1.1\r\n\r\n").unwrap().is_some());
    }

    #[test]
    fn reads_a_response() {
        let head = response(b"HTTP/1.1  204 No Content\r\nA: b\r\n\r\n", &LIMITS).unwrap().unwrap();
        assert_eq!(head.headers.get(HeaderId::STATUS), Some(&b"204"[..]));
        assert_eq!(head.status, 204);
    }
}
