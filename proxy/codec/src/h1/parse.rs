//! Heads: from bytes to a [`HeaderMap`], and what they say about the body (RFC 9112 sections 2 to 6).

mod plain;

use std::mem::MaybeUninit;

use sampan_core::header::{HeaderId, HeaderMap, Spelling};
use sampan_core::stream_info::Protocol;

use crate::error::CodecError;

/// How a message's body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Until the connection closes; upgrades and CONNECT too.
    Close,
}

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
    /// Range of the request target in the head (requests); the status (responses).
    pub(super) target: (usize, usize),
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
const CHUNKED_LENGTH: CodecError = CodecError::bad(
    "http1.content_length_and_chunked_not_allowed",
    "both 'Content-Length' and 'Transfer-Encoding' are set",
);
const BAD_ENCODING: CodecError = CodecError {
    status: 501,
    details: "http1.invalid_transfer_encoding",
    message: "unsupported transfer encoding",
};
/// Neither HTTP/1.1 nor an accepted HTTP/1.0.
pub(super) const LOW_VERSION: CodecError =
    CodecError { status: 426, details: "low_version", message: "Upgrade required for HTTP/1.0 or HTTP/0.9" };
const BODY_DISALLOWED: CodecError = CodecError::bad("http1.body_disallowed", "unsupported content length");

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

const INLINE_HEADERS: usize = 64;

/// The offset of a part within the whole; both come from the parser, which slices and never copies.
fn offset(whole: &[u8], part: &[u8]) -> (usize, usize) {
    (part.as_ptr().addr() - whole.as_ptr().addr(), part.len())
}

fn first_line(head: &[u8]) -> usize {
    memchr::memchr(b'\n', head).map_or(0, |at| at + 1)
}

/// Whether a complete head could be in `bytes`: an empty line is there. `from` is where the last search ended.
pub(super) fn head_may_be_complete(bytes: &[u8], from: usize) -> bool {
    let start = from.saturating_sub(3);
    memchr::memchr_iter(b'\n', &bytes[start..]).any(|at| {
        let rest = &bytes[start + at + 1..];
        rest.starts_with(b"\n") || rest.starts_with(b"\r\n")
    })
}

/// Runs `parse` with room for up to `max` headers, on the stack where few are allowed.
fn with_room<'b, T>(max: usize, parse: impl FnOnce(&mut [MaybeUninit<httparse::Header<'b>>]) -> T) -> T {
    if max <= INLINE_HEADERS {
        let mut room = [const { MaybeUninit::uninit() }; INLINE_HEADERS];
        parse(&mut room[..max])
    } else {
        let mut room = vec![MaybeUninit::uninit(); max];
        parse(&mut room)
    }
}

fn parse_error(error: httparse::Error) -> CodecError {
    match error {
        httparse::Error::TooManyHeaders => TOO_MANY,
        httparse::Error::HeaderValue => INVALID_CHARACTERS,
        httparse::Error::HeaderName => CodecError::parse("HPE_INVALID_HEADER_TOKEN"),
        httparse::Error::Version => CodecError::parse("HPE_INVALID_VERSION"),
        httparse::Error::Status => CodecError::parse("HPE_INVALID_STATUS"),
        httparse::Error::NewLine => CodecError::parse("HPE_CR_EXPECTED"),
        httparse::Error::Token => CodecError::parse("HPE_INVALID_URL"),
    }
}

/// A request head. `Ok(None)`: more bytes are needed. Pseudo headers are not set yet, but for
/// `:method`, and `:path` where the target has the origin form.
pub(super) fn request(bytes: &[u8], limits: &Limits, method_only: bool) -> Result<Option<Head>, CodecError> {
    if let Some(head) = plain::request(bytes, limits) {
        return Ok(Some(head));
    }
    any_request(bytes, limits, method_only)
}

fn any_request(bytes: &[u8], limits: &Limits, method_only: bool) -> Result<Option<Head>, CodecError> {
    check_first_line(bytes, limits, method_only)?;
    unfolding(bytes, limits, |bytes| {
        // Few requests have many headers; the large room is only used when the small one was not enough.
        match request_within(bytes, limits, limits.max_headers.min(INLINE_HEADERS)) {
            Err(e) if e == TOO_MANY && limits.max_headers > INLINE_HEADERS => {
                request_within(bytes, limits, limits.max_headers)
            }
            other => other,
        }
    })
}

fn request_within(bytes: &[u8], limits: &Limits, room: usize) -> Result<Option<Head>, CodecError> {
    with_room(room, |room| {
        let mut parsed = httparse::Request::new(&mut []);
        let mut config = httparse::ParserConfig::default();
        config.allow_multiple_spaces_in_request_line_delimiters(true);
        let len = match config.parse_request_with_uninit_headers(&mut parsed, bytes, room) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => {
                return if bytes.len() > limits.max_bytes { Err(TOO_LARGE) } else { Ok(None) };
            }
            Err(e @ (httparse::Error::Version | httparse::Error::Token)) => {
                return Err(refused_line(bytes, e, limits));
            }
            Err(e) => return Err(parse_error(e)),
        };
        if len > limits.max_bytes + 4 * parsed.headers.len() + 32 {
            return Err(TOO_LARGE);
        }
        // Both are there once the parser is through.
        let (method, target) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
        if !limits.allow_custom_methods && !METHODS.contains(&method) {
            return Err(CodecError::parse("HPE_INVALID_METHOD"));
        }
        if !url_is_valid(target.as_bytes(), method == "CONNECT") {
            return Err(refused_line(bytes, httparse::Error::Token, limits));
        }
        let protocol = if parsed.version == Some(1) { Protocol::Http11 } else { Protocol::Http10 };
        let mut headers = HeaderMap::with_capacity(len + 160, parsed.headers.len() + 12);
        headers.load(&bytes[..len]);
        let target = offset(bytes, target.as_bytes());
        if bytes[target.0] == b'/' {
            headers.push_raw_known(HeaderId::PATH, target);
        }
        headers.push_raw_known(HeaderId::METHOD, offset(bytes, method.as_bytes()));
        load_headers(&mut headers, bytes, parsed.headers, limits.spelling)?;
        let first_line = first_line(bytes);
        Ok(Some(Head { headers, protocol, len, first_line, target, status: 0 }))
    })
}

/// What is wrong with a request line, as Envoy tells it: control bytes, no version or one that is not 1.1, anything else.
fn refused_line(bytes: &[u8], error: httparse::Error, limits: &Limits) -> CodecError {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.iter().any(|c| (*c < b' ' && !matches!(c, b'\t' | b'\r')) || *c == 127) {
        return INVALID_CHARACTERS;
    }
    let mut parts = line.split(|b| *b == b' ').filter(|part| !part.is_empty());
    let known = |method: &[u8]| limits.allow_custom_methods || METHODS.iter().any(|m| m.as_bytes() == method);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(method), Some(_), None, None) if known(method) => LOW_VERSION,
        (Some(method), Some(_), Some([b'H', b'T', b'T', b'P', b'/', major, b'.', minor]), None)
            if known(method)
                && major.is_ascii_digit()
                && minor.is_ascii_digit()
                && (*major, *minor) != (b'1', b'1') =>
        {
            LOW_VERSION
        }
        _ => parse_error(error),
    }
}

/// Tries a head that the parser refuses again with its folded lines joined (RFC 9112 section 5.2): like Envoy, only the line
/// end goes, the spaces behind it stay.
fn unfolding(
    bytes: &[u8],
    limits: &Limits,
    parse: impl Fn(&[u8]) -> Result<Option<Head>, CodecError>,
) -> Result<Option<Head>, CodecError> {
    let error = match parse(bytes) {
        Err(error) => error,
        parsed => return parsed,
    };
    let (mut joined, mut folded, mut from, mut first) = (Vec::new(), false, 0, true);
    for end in memchr::memchr_iter(b'\n', bytes) {
        let line = &bytes[from..end];
        if line.strip_suffix(b"\r").unwrap_or(line).is_empty() {
            if !folded {
                return Err(error);
            }
            joined.extend_from_slice(&bytes[from..=end]);
            let head = parse(&joined)?;
            return Ok(head.map(|head| Head { len: end + 1, ..head }));
        }
        let fold = !first && matches!(bytes.get(end + 1), Some(b' ' | b'\t'));
        folded |= fold;
        let line = if fold { line.strip_suffix(b"\r").unwrap_or(line) } else { &bytes[from..=end] };
        joined.extend_from_slice(line);
        (from, first) = (end + 1, false);
    }
    let fold_may_follow = folded && bytes.len() <= limits.max_bytes;
    if fold_may_follow { Ok(None) } else { Err(error) }
}

/// Errors that Envoy sees before the head is complete.
fn check_first_line(bytes: &[u8], limits: &Limits, method_only: bool) -> Result<(), CodecError> {
    let Some(first) = bytes.first() else { return Ok(()) };
    if limits.allow_custom_methods {
        return Ok(());
    }
    if !METHODS.iter().any(|m| m.as_bytes()[0] == *first) && !method_only {
        return Err(CodecError::parse("HPE_INVALID_METHOD"));
    }
    Ok(())
}

/// A response head. `Ok(None)`: more bytes are needed. `:status` is set.
pub(super) fn response(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    if let Some(head) = plain::response(bytes, limits) {
        return Ok(Some(head));
    }
    any_response(bytes, limits)
}

fn any_response(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    if bytes.first().is_some_and(|b| *b != b'H') {
        return Err(CodecError::parse("HPE_INVALID_CONSTANT"));
    }
    // Of whatever version a response says it is, it is read as one of 1.0 (Envoy).
    if let &[b'H', b'T', b'T', b'P', b'/', major @ b'0'..=b'9', b'.', minor @ b'0'..=b'9', b' ', ..] = bytes
        && !matches!((major, minor), (b'1', b'0' | b'1'))
    {
        let mut known = bytes.to_vec();
        known[5..8].copy_from_slice(b"1.0");
        return any_response(&known, limits);
    }
    unfolding(bytes, limits, |bytes| {
        match response_within(bytes, limits, limits.max_headers.min(INLINE_HEADERS)) {
            Err(e) if e == TOO_MANY && limits.max_headers > INLINE_HEADERS => {
                response_within(bytes, limits, limits.max_headers)
            }
            other => other,
        }
    })
}

fn response_within(bytes: &[u8], limits: &Limits, room: usize) -> Result<Option<Head>, CodecError> {
    with_room(room, |room| {
        let mut parsed = httparse::Response::new(&mut []);
        let mut config = httparse::ParserConfig::default();
        config.allow_multiple_spaces_in_response_status_delimiters(true);
        let len = match config.parse_response_with_uninit_headers(&mut parsed, bytes, room) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => {
                return if bytes.len() > limits.max_bytes { Err(TOO_LARGE) } else { Ok(None) };
            }
            Err(e) => return Err(parse_error(e)),
        };
        if len > limits.max_bytes + 4 * parsed.headers.len() + 32 {
            return Err(TOO_LARGE);
        }
        let protocol = if parsed.version == Some(1) { Protocol::Http11 } else { Protocol::Http10 };
        let status = parsed.code.unwrap_or_default();
        let mut headers = HeaderMap::with_capacity(len + 160, parsed.headers.len() + 8);
        headers.load(&bytes[..len]);
        // The three digits follow the version and the spaces.
        let digits = bytes.iter().position(|b| *b == b' ').unwrap_or(0);
        let digits = digits + bytes[digits..].iter().take_while(|b| **b == b' ').count();
        headers.push_raw_known(HeaderId::STATUS, (digits, 3));
        load_headers(&mut headers, bytes, parsed.headers, limits.spelling)?;
        Ok(Some(Head { headers, protocol, len, first_line: first_line(bytes), target: (0, 0), status }))
    })
}

/// Trailers after the last chunk, the closing empty line included. `Ok(None)`: more bytes are needed.
pub(super) fn trailers(bytes: &[u8], limits: &Limits) -> Result<Option<(HeaderMap, usize)>, CodecError> {
    with_room(limits.max_headers.min(1024), |room| {
        // httparse fills an initialised slice only; trailers are rare enough for that.
        let mut slots = vec![httparse::EMPTY_HEADER; room.len()];
        match httparse::parse_headers(bytes, &mut slots) {
            Ok(httparse::Status::Complete((len, parsed))) => {
                let mut headers = HeaderMap::new();
                headers.load(&bytes[..len]);
                load_headers(&mut headers, bytes, parsed, Spelling::Unknown)?;
                Ok(Some((headers, len)))
            }
            Ok(httparse::Status::Partial) if bytes.len() > limits.max_bytes => Err(CodecError {
                status: 431,
                details: "http1.headers_too_large",
                message: "trailers size exceeds limit",
            }),
            Ok(httparse::Status::Partial) => Ok(None),
            Err(httparse::Error::TooManyHeaders) => Err(TOO_MANY),
            Err(e) => Err(parse_error(e)),
        }
    })
}

fn load_headers(
    headers: &mut HeaderMap,
    bytes: &[u8],
    parsed: &[httparse::Header<'_>],
    spelling: Spelling,
) -> Result<(), CodecError> {
    headers.set_spelling(spelling);
    let keep_spelling = spelling != Spelling::Unknown;
    for header in parsed {
        // Names are tokens (the parser says so), hence never longer than the head, whose limit is below 64 KiB
        // by default; a name past u16 is refused rather than cut.
        if header.name.len() > usize::from(u16::MAX) {
            return Err(TOO_LARGE);
        }
        let value = header.value.trim_ascii_end();
        headers.push_raw(offset(bytes, header.name.as_bytes()), offset(bytes, value), keep_spelling);
    }
    Ok(())
}

/// The characters that Envoy's parser accepts in a request target.
fn url_is_valid(url: &[u8], connect: bool) -> bool {
    let path_char = |c: &u8| *c == 9 || *c == 12 || (b'!'..=126).contains(c);
    match url.first() {
        None => return false,
        Some(b'/' | b'*') => return url[1..].iter().all(path_char),
        Some(_) => {}
    }
    let mut rest = url;
    if !connect {
        let scheme =
            url.iter().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.')).count();
        if !url[0].is_ascii_alphabetic() || !url[scheme..].starts_with(b"://") {
            return false;
        }
        rest = &url[scheme + 3..];
    }
    let path = rest.iter().position(|c| matches!(c, b'/' | b'?')).unwrap_or(rest.len());
    let (host, path) = rest.split_at(path);
    host.iter().all(|c| c.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=@[]_~".contains(c))
        && !host.windows(2).any(|w| w == b"@@")
        && path.iter().all(path_char)
}

/// The one `content-length` of a message: repeated or unreadable ones are refused.
fn content_length(headers: &HeaderMap) -> Result<Option<u64>, CodecError> {
    let mut all = headers.get_all(HeaderId::CONTENT_LENGTH);
    let Some(value) = all.next() else { return Ok(None) };
    if headers.may_repeat() && all.next().is_some() {
        return Err(CodecError::parse("HPE_UNEXPECTED_CONTENT_LENGTH"));
    }
    // Digits only: a sign or a list is how requests are smuggled (RUSTSEC-2021-0078).
    let length = value.iter().try_fold(0u64, |n, d| {
        let digit = d.is_ascii_digit().then(|| u64::from(d - b'0'))?;
        n.checked_mul(10)?.checked_add(digit)
    });
    length.filter(|_| !value.is_empty()).map(Some).ok_or(CodecError::parse("HPE_INVALID_CONTENT_LENGTH"))
}

/// How the body of a message is delimited, from its headers alone. `transfer-encoding` (and a `content-length`
/// that it overrides) are taken out of the list. `None` for the default: no body in a request, until close in a
/// response.
pub(super) fn framing(
    headers: &mut HeaderMap,
    connect: bool,
    allow_chunked_length: bool,
) -> Result<Option<Framing>, CodecError> {
    let length = content_length(headers)?;
    if connect && length.is_some() {
        if length != Some(0) {
            return Err(BODY_DISALLOWED);
        }
        headers.remove(HeaderId::CONTENT_LENGTH);
    }
    let mut encodings = headers.get_all(HeaderId::TRANSFER_ENCODING);
    let Some(encoding) = encodings.next() else { return Ok(length.map(Framing::Length)) };
    let chunked = encoding.eq_ignore_ascii_case(b"chunked") && encodings.next().is_none();
    drop(encodings);
    if length.is_some() && !connect {
        if !(chunked && allow_chunked_length) {
            return Err(CHUNKED_LENGTH);
        }
        headers.remove(HeaderId::CONTENT_LENGTH);
    }
    if !chunked || connect {
        return Err(BAD_ENCODING);
    }
    headers.remove(HeaderId::TRANSFER_ENCODING);
    Ok(Some(Framing::Chunked))
}

/// For the fuzz target: parses bytes as a request, a response and trailers, whole and cut off at `cut`. What is
/// complete in a part must be the same in the whole, and whether spellings are kept must not matter. Returns what
/// tells one outcome from another.
pub fn fuzz_parse(bytes: &[u8], cut: usize) -> u64 {
    let kept = fuzz_with(bytes, cut, Spelling::Kept);
    assert_eq!(kept, fuzz_with(bytes, cut, Spelling::Unknown), "the verdict hangs on the spelling");
    kept
}

fn fuzz_with(bytes: &[u8], cut: usize, spelling: Spelling) -> u64 {
    let limits = Limits { max_bytes: 1 << 14, max_headers: 100, spelling, allow_custom_methods: true };
    let part = &bytes[..cut.min(bytes.len())];
    let mut outcome = 0;
    for (parse, is_request) in [
        ((|bytes, limits| request(bytes, limits, false)) as fn(&[u8], &Limits) -> _, true),
        (response as fn(&[u8], &Limits) -> _, false),
    ] {
        let whole: Result<Option<Head>, CodecError> = parse(bytes, &limits);
        if let Ok(Some(first)) = parse(part, &limits) {
            let len = whole.as_ref().ok().and_then(Option::as_ref).map(|head| head.len);
            assert_eq!(len, Some(first.len), "a head that was complete is another with more behind it");
        }
        outcome = outcome * 31
            + match whole {
                Err(error) => error.details.len() as u64,
                Ok(None) => 1,
                Ok(Some(mut head)) => match framing(&mut head.headers, false, is_request) {
                    Ok(Some(Framing::Length(_))) => 2,
                    Ok(Some(_)) => 3,
                    Ok(None) => 4 + head.headers.len().min(8) as u64,
                    Err(error) => 16 + error.details.len() as u64,
                },
            };
    }
    outcome * 3 + trailers(bytes, &limits).map_or(0, |found| 1 + u64::from(found.is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        max_bytes: 4096,
        max_headers: 100,
        spelling: Spelling::Unknown,
        allow_custom_methods: false,
    };

    fn parse(text: &str) -> Result<Option<Head>, CodecError> {
        request(text.as_bytes(), &LIMITS, false)
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
    fn refuses_what_smuggles() {
        let framing_of = |h: &str| {
            let mut head = parse(&format!("POST / HTTP/1.1\r\n{h}\r\n\r\n")).unwrap().unwrap();
            framing(&mut head.headers, false, false)
        };
        assert_eq!(framing_of("Content-Length: 5"), Ok(Some(Framing::Length(5))));
        assert!(framing_of("Content-Length: +5").is_err());
        assert!(framing_of("Content-Length: 5\r\nContent-Length: 5").is_err());
        assert!(framing_of("Content-Length: 99999999999999999999").is_err());
        assert_eq!(framing_of("Content-Length: 5\r\nTransfer-Encoding: chunked"), Err(CHUNKED_LENGTH));
        assert_eq!(framing_of("Transfer-Encoding: chunked"), Ok(Some(Framing::Chunked)));
        assert_eq!(framing_of("Transfer-Encoding: gzip, chunked"), Err(BAD_ENCODING));
        assert_eq!(framing_of("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), Err(BAD_ENCODING));
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
