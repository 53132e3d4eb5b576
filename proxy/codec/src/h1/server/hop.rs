//! What is for this hop only: `connection` and what it nominates, `upgrade`.

use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::matcher::StringMatcher;

use crate::error::CodecError;

/// Whether the request asks for an upgrade. `h2c` is not offered: that wish is taken out, and so are those to be ignored.
pub(super) fn take_upgrade(headers: &mut HeaderMap, ignored: &[StringMatcher]) -> bool {
    if !headers.contains(HeaderId::UPGRADE) || !headers.lists(HeaderId::CONNECTION, "upgrade") {
        return false;
    }
    if headers.get(HeaderId::UPGRADE).is_some_and(|u| u.eq_ignore_ascii_case(b"h2c")) {
        headers.remove(HeaderId::UPGRADE);
        headers.remove(HeaderId::HTTP2_SETTINGS);
        drop_connection_tokens(headers, |token| {
            token.eq_ignore_ascii_case(b"upgrade") || token.eq_ignore_ascii_case(b"http2-settings")
        });
        return false;
    }
    if ignored.is_empty() {
        return true;
    }
    let value = headers.get(HeaderId::UPGRADE).unwrap_or_default();
    let wishes = value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|wish| !wish.is_empty());
    let kept: Vec<_> = wishes.filter(|wish| !ignored.iter().any(|one| one.matches(wish))).collect();
    if kept.is_empty() {
        headers.remove(HeaderId::UPGRADE);
        drop_connection_tokens(headers, |token| token.eq_ignore_ascii_case(b"upgrade"));
        return false;
    }
    let kept = kept.join(&b","[..]);
    headers.set(HeaderId::UPGRADE, kept);
    true
}

/// Headers that `connection` nominates are for this hop only; nominating some of them is an attack.
pub(super) fn sanitize_connection(headers: &mut HeaderMap) -> Result<(), CodecError> {
    const REJECTED: CodecError =
        CodecError::bad("http1.connection_header_rejected", "Invalid nominated headers in Connection.");
    let value = headers.get(HeaderId::CONNECTION).unwrap_or_default();
    if value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close") {
        return Ok(());
    }
    let value = all(headers, HeaderId::CONNECTION).to_ascii_lowercase();
    let tokens: Vec<_> =
        value.split(|b| *b == b',').filter(|t| !t.is_empty()).map(<[u8]>::trim_ascii).collect();
    if tokens.len() >= 10 {
        return Err(REJECTED);
    }
    let mut nominated = Vec::new();
    for token in tokens {
        match HeaderId::from_lower(token) {
            HeaderId::KEEP_ALIVE | HeaderId::UPGRADE | HeaderId::HTTP2_SETTINGS => {}
            HeaderId::X_FORWARDED_FOR | HeaderId::X_FORWARDED_HOST | HeaderId::X_FORWARDED_PROTO => {
                return Err(REJECTED);
            }
            _ if token == b"close" => {}
            _ if token.starts_with(b":") => return Err(REJECTED),
            HeaderId::CONNECTION => nominated.push(token),
            HeaderId::TE => {
                let te = all(headers, HeaderId::TE);
                if te.len() > 256 {
                    return Err(REJECTED);
                }
                let trailers =
                    te.split(|b| *b == b',').any(|t| t.trim_ascii().eq_ignore_ascii_case(b"trailers"));
                if trailers {
                    headers.set(HeaderId::TE, "trailers");
                } else {
                    headers.remove(HeaderId::TE);
                    nominated.push(token);
                }
            }
            _ => {
                headers.remove_if(|_, name, _| name == token);
                nominated.push(token);
            }
        }
    }
    if !nominated.is_empty() {
        drop_connection_tokens(headers, |t| nominated.iter().any(|n| n.eq_ignore_ascii_case(t)));
    }
    Ok(())
}

/// Takes tokens out of `connection`, and the header with the last of them.
fn drop_connection_tokens(headers: &mut HeaderMap, drop: impl Fn(&[u8]) -> bool) {
    let value = all(headers, HeaderId::CONNECTION);
    let kept: Vec<_> = value
        .split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty() && !drop(token))
        .collect();
    if kept.is_empty() {
        headers.remove(HeaderId::CONNECTION);
    } else {
        headers.set(HeaderId::CONNECTION, kept.join(&b","[..]));
    }
}

/// All values of a header as one.
fn all(headers: &HeaderMap, id: HeaderId) -> Vec<u8> {
    headers.get_all(id).collect::<Vec<_>>().join(&b","[..])
}
