//! Well-known formats of strings, as the generated C++ validators check them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Holds a text to the format that the rule of this number asks for. `strict` matters for header names and values only.
pub(super) fn check(number: u32, on: u64, text: &str, strict: bool) -> Result<(), String> {
    let (valid, what) = match (number, on) {
        (_, 0) => return Ok(()),
        (12, _) => (
            text.split_once('@').is_some_and(|(user, host)| !user.is_empty() && hostname(host)),
            "email address",
        ),
        (13, _) => (hostname(text), "hostname"),
        (14, _) => (text.parse::<IpAddr>().is_ok(), "ip address"),
        (15, _) => (text.parse::<Ipv4Addr>().is_ok(), "ipv4 address"),
        (16, _) => (text.parse::<Ipv6Addr>().is_ok(), "ipv6 address"),
        (17, _) => (text.contains(':') && !text.contains(' '), "URI"),
        (18, _) => (!text.contains(' '), "URI reference"),
        (21, _) => (hostname(text) || text.parse::<IpAddr>().is_ok(), "hostname or ip address"),
        (22, _) => (uuid(text), "UUID"),
        (24, 1) => (header_name(text.as_bytes(), strict), "HTTP header name"),
        (24, 2) => (header_value(text.as_bytes(), strict), "HTTP header value"),
        _ => return Ok(()),
    };
    if valid { Ok(()) } else { Err(format!("value must be a valid {what}")) }
}

fn hostname(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    text.len() <= 253
        && text.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

fn uuid(text: &str) -> bool {
    text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() })
}

/// `^:?[0-9a-zA-Z!#$%&'*+-.^_|~\x60]+$`; note the range from `+` to `.`, which has a comma in it.
fn header_name(name: &[u8], strict: bool) -> bool {
    if !strict {
        return header_value(name, false);
    }
    let name = name.strip_prefix(b":").unwrap_or(name);
    !name.is_empty() && name.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+,-.^_|~`".contains(b))
}

/// `^[^\x00-\x08\x0A-\x1F\x7F]*$`, or only no NUL, CR and LF.
fn header_value(value: &[u8], strict: bool) -> bool {
    value.iter().all(|b| match b {
        0 | b'\n' | b'\r' => false,
        b'\t' => true,
        0x01..=0x1f | 0x7f => !strict,
        _ => true,
    })
}
