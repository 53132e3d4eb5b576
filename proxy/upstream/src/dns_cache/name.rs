//! Names as clients write them: what is looked for in the cache, and what is asked of DNS.
//!
//! Nothing is decided here on whether a name is one: what cannot be resolved fails when it is resolved, as in Envoy.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr};

/// A host with its port, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Authority<'a> {
    /// The name, or the IP without brackets.
    pub host: &'a str,
    /// The port, where it says one.
    pub port: Option<u16>,
    /// Whether the host is an IP.
    pub ip: Option<IpAddr>,
}

impl<'a> Authority<'a> {
    /// What stands behind the last colon is the port, if it is one.
    pub fn parse(text: &'a str) -> Self {
        let parts = text.rsplit_once(':').filter(|_| !text.ends_with(']'));
        let (mut host, mut port) = (text, None);
        if let Some((before, digits)) = parts
            && let Some(number) = number(digits).and_then(|n| u16::try_from(n).ok())
        {
            (host, port) = (before, Some(number));
        }
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let ip = bare.parse().ok();
        Self { host: if ip.is_some() { bare } else { host }, port, ip }
    }

    /// As the HTTP filter looks for it: always with a port.
    pub fn key(&self, text: &'a str, default_port: u16) -> Cow<'a, str> {
        let port = self.port.unwrap_or(default_port);
        match self.ip {
            Some(IpAddr::V6(_)) => {
                let key = format!("[{}]:{port}", self.host);
                if key == text { Cow::Borrowed(text) } else { key.into() }
            }
            _ => key(if self.port.is_some() { self.plain(text, port) } else { text.into() }, default_port),
        }
    }

    /// The text, if it says the port in the plainest way.
    fn plain(&self, text: &'a str, port: u16) -> Cow<'a, str> {
        let digits = text.get(self.host.len() + 1..).unwrap_or_default();
        let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (port == 0 || !digits.starts_with('0'));
        if plain && text.starts_with(self.host) {
            text.into()
        } else {
            format!("{}:{port}", self.host).into()
        }
    }
}

/// As a host is looked for: with the default port where it says none.
pub fn key(host: Cow<'_, str>, default_port: u16) -> Cow<'_, str> {
    if has_port(&host) { host } else { format!("{host}:{default_port}").into() }
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':').is_some_and(|(_, digits)| number(digits).is_some())
}

/// A number as Envoy reads it: blanks around it and a plus before it do no harm.
fn number(text: &str) -> Option<u32> {
    let text = text.trim_matches([' ', '\t']);
    let digits = text.strip_prefix('+').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// What c-ares does not ask anybody.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Special {
    /// It is an address.
    Ip(IpAddr),
    /// This machine.
    Localhost,
    /// There is no such name.
    None,
    /// It is no name.
    Misformatted,
}

/// What a name is, if it is not one for a resolver.
pub(super) fn special(name: &str) -> Option<Special> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Some(Special::Ip(ip));
    }
    if is_below(name, "localhost") {
        return Some(Special::Localhost);
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'*' | b'/');
    let bare = name.strip_suffix('.').unwrap_or(name);
    if !name.bytes().all(allowed) || bare.len() > 253 || bare.split('.').any(|l| l.is_empty() || l.len() > 63)
    {
        return Some(Special::Misformatted);
    }
    // With a dot behind it c-ares asks for it; nobody is to find this machine so.
    if is_below(bare, "onion") || is_below(bare, "localhost") {
        return Some(Special::None);
    }
    None
}

/// Whether it is that name or one within it.
fn is_below(name: &str, domain: &str) -> bool {
    let rest = name.len().checked_sub(domain.len()).and_then(|at| name.split_at_checked(at));
    rest.is_some_and(|(before, end)| {
        end.eq_ignore_ascii_case(domain) && (before.is_empty() || before.ends_with('.'))
    })
}

/// The addresses of this machine.
pub(super) const LOOPBACKS: [IpAddr; 2] =
    [IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

#[cfg(test)]
mod tests {
    use super::*;

    fn of_filter(text: &str) -> String {
        Authority::parse(text).key(text, 80).into_owned()
    }

    fn of_cluster(text: &str) -> String {
        key(text.into(), 80).into_owned()
    }

    #[test]
    fn keys_have_ports() {
        for (text, filter, cluster) in [
            ("a", "a:80", "a:80"),
            ("a:8080", "a:8080", "a:8080"),
            ("a:08080", "a:8080", "a:08080"),
            ("a:+8080", "a:8080", "a:+8080"),
            ("a:", "a::80", "a::80"),
            ("a:99999", "a:99999", "a:99999"),
            ("a:b:80", "a:b:80", "a:b:80"),
            ("[::1]", "[::1]:80", "[::1]:80"),
            ("[::1]:8080", "[::1]:8080", "[::1]:8080"),
            ("[0::1]:8080", "[0::1]:8080", "[0::1]:8080"),
            ("127.0.0.1", "127.0.0.1:80", "127.0.0.1:80"),
        ] {
            assert_eq!((of_filter(text).as_str(), of_cluster(text).as_str()), (filter, cluster), "{text}");
        }
        assert!(matches!(Authority::parse("a:8080").key("a:8080", 80), Cow::Borrowed(_)));
        assert!(matches!(Authority::parse("[::1]:8080").key("[::1]:8080", 80), Cow::Borrowed(_)));
    }

    #[test]
    fn a_key_says_what_is_asked() {
        let parsed = |text| {
            let Authority { host, port, ip } = Authority::parse(text);
            (host, port, ip.is_some())
        };
        assert_eq!(parsed("a:80"), ("a", Some(80), false));
        assert_eq!(parsed("a::80"), ("a:", Some(80), false));
        assert_eq!(parsed("a:99999"), ("a:99999", None, false));
        assert_eq!(parsed("[::1]:80"), ("::1", Some(80), true));
        assert_eq!(parsed("[x]:80"), ("[x]", Some(80), false));
        assert_eq!(parsed("::1:80"), ("::1", Some(80), true));
    }

    #[test]
    fn some_names_are_nobodys_business() {
        let long = "a".repeat(64);
        for (name, what) in [
            ("127.0.0.1", Some(Special::Ip(LOOPBACKS[0]))),
            ("LocalHost", Some(Special::Localhost)),
            ("a.localhost", Some(Special::Localhost)),
            ("alocalhost", None),
            ("localhost.", Some(Special::None)),
            ("a.localhost.", Some(Special::None)),
            ("x.onion", Some(Special::None)),
            ("a..b", Some(Special::Misformatted)),
            (".a", Some(Special::Misformatted)),
            ("a b", Some(Special::Misformatted)),
            ("", Some(Special::Misformatted)),
            ("é", Some(Special::Misformatted)),
            (&long, Some(Special::Misformatted)),
            ("127.1", None),
            ("a_b.test.", None),
        ] {
            assert_eq!(special(name), what, "{name}");
        }
    }
}
