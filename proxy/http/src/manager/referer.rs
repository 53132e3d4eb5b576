//! Which `referer` a request keeps: a URL without user information and fragment, or a reference relative to one.
//! Envoy's rules (`Utility::isValidRefererValue`), which rest on the URL parser of Node's http-parser.

use std::net::IpAddr;

/// Whether the value is kept.
pub fn is_valid(value: &[u8]) -> bool {
    absolute(value) || relative(value)
}

/// `scheme://host[:port][path][?query]`
fn absolute(value: &[u8]) -> bool {
    let scheme = |c: &&u8| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.');
    let length = value.iter().take_while(scheme).count();
    let Some(rest) = value[length..].strip_prefix(b"://") else { return false };
    let end = rest.iter().position(|c| matches!(c, b'/' | b'?')).unwrap_or(rest.len());
    let (host, path) = rest.split_at(end);
    value[0].is_ascii_alphabetic()
        && authority(host)
        && path.iter().all(|c| c.is_ascii_graphic() && *c != b'#')
}

/// A host and perhaps a port; user information is not taken.
fn authority(value: &[u8]) -> bool {
    let (host, port) = super::request::split_port(value);
    let number = |p: &[u8]| {
        let digits = p.iter().all(u8::is_ascii_digit);
        digits && std::str::from_utf8(p).is_ok_and(|p| p.parse::<u16>().is_ok())
    };
    if port.is_some_and(|p| !number(p)) {
        return false;
    }
    if let Some(v6) = host.strip_prefix(b"[").and_then(|h| h.strip_suffix(b"]")) {
        return std::str::from_utf8(v6).is_ok_and(|v6| v6.parse::<IpAddr>().is_ok());
    }
    !host.is_empty() && host.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-'))
}

/// No colon before the first slash, and only what may stand in a path or query (RFC 3986).
fn relative(value: &[u8]) -> bool {
    let mut slash = false;
    value.iter().all(|c| match c {
        b'/' => {
            slash = true;
            true
        }
        b':' => slash,
        _ => c.is_ascii_alphanumeric() || b"!$%&'()*+,-.;=?@_~".contains(c),
    })
}

#[cfg(test)]
mod tests {
    use super::is_valid;

    #[test]
    fn referers() {
        for kept in [
            "https://a.test/b?c=d:e",
            "http://a.test",
            "http://[::1]:80/",
            "http://a?b",
            "about",
            "a/b:c",
            "*",
            "",
            "?x",
            "http://a/\"{",
        ] {
            assert!(is_valid(kept.as_bytes()), "{kept}");
        }
        for dropped in [
            "http://u:p@a/",
            "http://u@a/",
            "https://a/#b",
            "about:blank",
            "a b",
            "a#b",
            "http:///a",
            "http://a:/",
            "http://a:99999/",
            "a:b/c",
            "{}",
            "http://[x]/",
            "http://a/b c",
        ] {
            assert!(!is_valid(dropped.as_bytes()), "{dropped}");
        }
    }
}
