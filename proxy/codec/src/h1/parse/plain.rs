//! Heads as nearly all peers write them, read in one pass: origin form, HTTP/1.1, plain header lines. `None` for any
//! other, and for what is to be refused: those are for the parser that knows the whole grammar and every error.

use sampan_core::header::{HeaderId, HeaderMap, Spelling, text_len};
use sampan_core::stream_info::Protocol;

use super::{Head, Limits, METHODS};

/// The longest head that is read here.
const MOST: usize = 4096;
/// The longest known method and a space.
const METHOD: usize = 16;

pub(super) fn request(bytes: &[u8], limits: &Limits) -> Option<Head> {
    let method = bytes.iter().take(METHOD).position(|b| *b == b' ')?;
    let at = method + 1;
    let len = text_len(&bytes[at..], b'!');
    let (target, rest) = bytes[at..].split_at(len);
    let known = METHODS.iter().any(|m| m.as_bytes() == &bytes[..method]);
    if !known || target.first() != Some(&b'/') || !target.is_ascii() {
        return None;
    }
    let line_end = b" HTTP/1.1\r\n";
    rest.strip_prefix(line_end)?;
    let first_line = at + len + line_end.len();
    let pseudo = [(HeaderId::PATH, (at, len)), (HeaderId::METHOD, (0, method))];
    let (headers, end) = lines(bytes, limits, &pseudo, first_line)?;
    Some(Head { headers, protocol: Protocol::Http11, len: end, first_line, target: (at, len), status: 0 })
}

pub(super) fn response(bytes: &[u8], limits: &Limits) -> Option<Head> {
    let &[hundreds @ b'0'..=b'9', tens @ b'0'..=b'9', ones @ b'0'..=b'9', b' ', ref rest @ ..] =
        bytes.strip_prefix(b"HTTP/1.1 ")?
    else {
        return None;
    };
    let digit = |byte: u8| u16::from(byte - b'0');
    let reason = text_len(rest, b' ');
    rest[reason..].strip_prefix(b"\r\n")?;
    let first_line = "HTTP/1.1 200 ".len() + reason + 2;
    let (headers, end) = lines(bytes, limits, &[(HeaderId::STATUS, (9, 3))], first_line)?;
    let status = digit(hundreds) * 100 + digit(tens) * 10 + digit(ones);
    Some(Head { headers, protocol: Protocol::Http11, len: end, first_line, target: (0, 0), status })
}

/// The lines from `start` on behind the pseudo headers of the first line, and where they end.
fn lines(
    bytes: &[u8],
    limits: &Limits,
    pseudo: &[(HeaderId, (usize, usize))],
    start: usize,
) -> Option<(HeaderMap, usize)> {
    if limits.spelling != Spelling::Unknown {
        return None;
    }
    let seen = &bytes[..bytes.len().min(MOST).min(limits.max_bytes)];
    let mut headers = HeaderMap::spare(seen.len().min(512) + 160, 24);
    pseudo.iter().for_each(|(id, value)| headers.push_raw_known(*id, *value));
    let Some(end) = headers.load_plain_lines(seen, start, limits.max_headers) else {
        headers.recycle();
        return None;
    };
    Some((headers, end))
}

#[cfg(test)]
mod tests {
    use super::super::{CodecError, grammar};
    use super::*;

    const LIMITS: Limits =
        Limits { max_bytes: 300, max_headers: 5, spelling: Spelling::Unknown, allow_custom_methods: false };

    fn shown(head: &Head) -> String {
        let Head { headers, protocol, len, first_line, target, status } = head;
        let lines = headers.iter_lines().count();
        format!("{headers:?} {lines} {protocol:?} {len} {first_line} {target:?} {status}")
    }

    /// Changes a head in some places and holds the two parsers against each other; tells how often the plain one read it.
    fn compare(
        heads: &[&str],
        plain: fn(&[u8], &Limits) -> Option<Head>,
        any: impl Fn(&[u8]) -> Result<Option<Head>, CodecError>,
    ) -> u32 {
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        let telling = b"\r\n \t:/\0\x7f\xc3?#@AzZ09-_HTP1.";
        let mut read = 0;
        for round in 0..12_000 {
            let mut head = heads[round % heads.len()].as_bytes().to_vec();
            for _ in 0..random(4) {
                let at = random(head.len().max(1));
                match random(4) {
                    _ if head.is_empty() => {}
                    0 => drop(head.remove(at)),
                    1 => head.insert(at, telling[random(telling.len())]),
                    2 => head[at] = telling[random(telling.len())],
                    _ => head.truncate(at.max(1)),
                }
            }
            if let Some(found) = plain(&head, &LIMITS) {
                read += 1;
                let other = any(&head);
                let other = other.as_ref().ok().and_then(Option::as_ref).map(shown);
                assert_eq!(Some(shown(&found)), other, "{}", head.escape_ascii());
            }
        }
        read
    }

    #[test]
    fn what_is_plain_reads_as_it_always_did() {
        let requests = [
            "GET /a?b=c HTTP/1.1\r\nHost: example.com\r\nUser-Agent: test/1 (x)\r\nAccept: */*\r\n\r\n",
            "OPTIONS /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nX-Custom-Name: some longer value, with more\r\n\r\nabc",
        ];
        let read = compare(&requests, request, |bytes| grammar::request(bytes, &LIMITS));
        assert!(read > 4_000, "{read}");
        let responses = [
            "HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 5\r\nDate: Sat, 21 Nov 2026 10:00:00 GMT\r\n\r\nhello",
            "HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\nETag: \"x\"\r\n\r\n0\r\n\r\n",
        ];
        let read = compare(&responses, response, |bytes| grammar::response(bytes, &LIMITS));
        assert!(read > 4_000, "{read}");
    }

    #[test]
    fn limits_hold() {
        let with = |headers: &str| request(format!("GET / HTTP/1.1\r\n{headers}\r\n").as_bytes(), &LIMITS);
        assert!(with(&"a: b\r\n".repeat(5)).is_some());
        assert!(with(&"a: b\r\n".repeat(6)).is_none());
        assert!(with(&format!("a: {}\r\n", "b".repeat(300))).is_none());
    }
}
