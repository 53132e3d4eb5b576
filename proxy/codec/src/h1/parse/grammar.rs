//! Heads and trailers in the whole grammar, and every error: the way of all that is not plain. `httparse` finds the
//! parts; what it takes and Envoy refuses, or the other way round, is settled here.

use std::mem::MaybeUninit;

use sampan_core::header::{HeaderId, HeaderMap, Spelling};
use sampan_core::stream_info::Protocol;

use super::{Head, INVALID_CHARACTERS, LOW_VERSION, Limits, METHODS, TOO_LARGE, TOO_MANY};
use crate::error::CodecError;

/// See [`super::request`].
pub(super) fn request(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    check_first_byte(bytes, limits)?;
    unfolding(bytes, limits, |bytes| with_room(limits, |room| request_within(bytes, limits, room)))
}

fn request_within<'b>(
    bytes: &'b [u8],
    limits: &Limits,
    room: &mut Room<'b>,
) -> Result<Option<Head>, CodecError> {
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

/// Errors that Envoy sees before the head is complete.
fn check_first_byte(bytes: &[u8], limits: &Limits) -> Result<(), CodecError> {
    let Some(first) = bytes.first() else { return Ok(()) };
    if limits.allow_custom_methods {
        return Ok(());
    }
    if !METHODS.iter().any(|m| m.as_bytes()[0] == *first) {
        return Err(CodecError::parse("HPE_INVALID_METHOD"));
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

/// See [`super::response`].
pub(super) fn response(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, CodecError> {
    if bytes.first().is_some_and(|b| *b != b'H') {
        return Err(CodecError::parse("HPE_INVALID_CONSTANT"));
    }
    // Of whatever version a response says it is, it is read as one of 1.0 (Envoy).
    if let &[b'H', b'T', b'T', b'P', b'/', major @ b'0'..=b'9', b'.', minor @ b'0'..=b'9', b' ', ..] = bytes
        && !matches!((major, minor), (b'1', b'0' | b'1'))
    {
        let mut known = bytes.to_vec();
        known[5..8].copy_from_slice(b"1.0");
        return response(&known, limits);
    }
    unfolding(bytes, limits, |bytes| with_room(limits, |room| response_within(bytes, limits, room)))
}

fn response_within<'b>(
    bytes: &'b [u8],
    limits: &Limits,
    room: &mut Room<'b>,
) -> Result<Option<Head>, CodecError> {
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
}

/// Trailers after the last chunk, the closing empty line included. `Ok(None)`: more bytes are needed.
pub(in crate::h1) fn trailers(
    bytes: &[u8],
    limits: &Limits,
) -> Result<Option<(HeaderMap, usize)>, CodecError> {
    let mut room = vec![httparse::EMPTY_HEADER; limits.max_headers.min(1024)];
    match httparse::parse_headers(bytes, &mut room) {
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

/// Where `httparse` puts the headers that it finds.
type Room<'b> = [MaybeUninit<httparse::Header<'b>>];

/// How many of them have room on the stack.
const INLINE_HEADERS: usize = 64;

/// Runs `parse` with room for as many headers as are allowed. Few heads have many: the large room is only used when the
/// small one was not enough.
fn with_room<'b, T>(
    limits: &Limits,
    parse: impl Fn(&mut Room<'b>) -> Result<T, CodecError>,
) -> Result<T, CodecError> {
    let max = limits.max_headers;
    let mut room = [const { MaybeUninit::uninit() }; INLINE_HEADERS];
    match parse(&mut room[..max.min(INLINE_HEADERS)]) {
        Err(e) if e == TOO_MANY && max > INLINE_HEADERS => {
            let mut room = vec![MaybeUninit::uninit(); max];
            parse(&mut room)
        }
        other => other,
    }
}

/// The offset of a part within the whole; both come from the parser, which slices and never copies.
fn offset(whole: &[u8], part: &[u8]) -> (usize, usize) {
    (part.as_ptr().addr() - whole.as_ptr().addr(), part.len())
}

fn first_line(head: &[u8]) -> usize {
    memchr::memchr(b'\n', head).map_or(0, |at| at + 1)
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
