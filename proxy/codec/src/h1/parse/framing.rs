//! What a head says about the body behind it (RFC 9112 section 6). Two ways to read it are how requests are smuggled:
//! one `content-length`, nothing beside `transfer-encoding`, and that nothing but `chunked`.

use sampan_core::header::{HeaderId, HeaderMap};

use crate::error::CodecError;

/// How a message's body is delimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::h1) enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Until the connection closes; upgrades and CONNECT too.
    Close,
}

const CHUNKED_LENGTH: CodecError = CodecError::bad(
    "http1.content_length_and_chunked_not_allowed",
    "both 'Content-Length' and 'Transfer-Encoding' are set",
);
const BAD_ENCODING: CodecError = CodecError {
    status: 501,
    details: "http1.invalid_transfer_encoding",
    message: "unsupported transfer encoding",
};
const BODY_DISALLOWED: CodecError = CodecError::bad("http1.body_disallowed", "unsupported content length");

/// How the body of a message is delimited, from its headers alone. `transfer-encoding` (and a `content-length`
/// that it overrides) are taken out of the list. `None` for the default: no body in a request, until close in a
/// response.
pub(in crate::h1) fn framing(
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

#[cfg(test)]
mod tests {
    use super::super::{request, tests::LIMITS};
    use super::*;

    #[test]
    fn refuses_what_smuggles() {
        let framing_of = |h: &str| {
            let text = format!("POST / HTTP/1.1\r\n{h}\r\n\r\n");
            let mut head = request(text.as_bytes(), &LIMITS).unwrap().unwrap();
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
}
