//! Path normalisation: what every matcher and the upstream then see (RFC 3986 section 6, as Chromium's URL
//! canonicaliser, which Envoy uses, does it).

use std::borrow::Cow;

/// `path_with_escaped_slashes_action`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EscapedSlashes {
    /// `%2F` and `%5C` stay.
    #[default]
    Keep,
    /// 400.
    Reject,
    /// 307 to the path with slashes.
    Redirect,
    /// Go on with slashes.
    Forward,
}

/// What is to be done with the path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathOptions {
    /// `normalize_path`
    pub normalize: bool,
    /// `merge_slashes`
    pub merge_slashes: bool,
    /// `path_with_escaped_slashes_action`
    pub escaped_slashes: EscapedSlashes,
}

/// The verdict.
#[derive(Debug, PartialEq, Eq)]
pub enum Normalized {
    /// As it was.
    Same,
    /// Go on with this path.
    Changed(Vec<u8>),
    /// Redirect to this path.
    Redirect(Vec<u8>),
    /// 400; the path as far as it was normalised, where it was.
    Reject(Option<Vec<u8>>),
}

/// Normalises `path`, query included (which is left alone).
pub fn normalize(path: &[u8], options: PathOptions) -> Normalized {
    if path.contains(&b'#') {
        return Normalized::Reject(None);
    }
    if options == PathOptions::default() {
        return Normalized::Same;
    }
    let query = path.iter().position(|c| *c == b'?').unwrap_or(path.len());
    let (original, query) = path.split_at(query);
    let mut now = Cow::Borrowed(original);
    let mut redirect = false;
    if options.escaped_slashes != EscapedSlashes::Keep
        && let Some(unescaped) = unescape_slashes(&now)
    {
        match options.escaped_slashes {
            EscapedSlashes::Reject => return Normalized::Reject(Some([&unescaped, query].concat())),
            EscapedSlashes::Redirect => redirect = true,
            EscapedSlashes::Forward | EscapedSlashes::Keep => {}
        }
        now = Cow::Owned(unescaped);
    }
    if options.normalize && !is_canonical(&now) {
        match canonicalize(&now) {
            Some(canonical) => now = Cow::Owned(canonical),
            None => return Normalized::Reject(None),
        }
    }
    if options.merge_slashes && now.windows(2).any(|w| w == b"//") {
        now = Cow::Owned(merge_slashes(&now));
    }
    match now {
        Cow::Borrowed(_) => Normalized::Same,
        Cow::Owned(mut path) => {
            path.extend_from_slice(query);
            if redirect { Normalized::Redirect(path) } else { Normalized::Changed(path) }
        }
    }
}

/// Empty segments go; the first slash and the last stay, even where nothing is between them, as in Envoy.
fn merge_slashes(path: &[u8]) -> Vec<u8> {
    let mut merged = if path.starts_with(b"/") { b"/".to_vec() } else { Vec::new() };
    for (i, segment) in path.split(|c| *c == b'/').filter(|s| !s.is_empty()).enumerate() {
        if i > 0 {
            merged.push(b'/');
        }
        merged.extend_from_slice(segment);
    }
    if path.ends_with(b"/") {
        merged.push(b'/');
    }
    merged
}

fn unescape_slashes(path: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(path.len());
    let mut found = false;
    let mut i = 0;
    while i < path.len() {
        match path.get(i..i + 3) {
            Some([b'%', b'2', b'F' | b'f']) => {
                out.push(b'/');
                found = true;
                i += 3;
            }
            Some([b'%', b'5', b'C' | b'c']) => {
                out.push(b'\\');
                found = true;
                i += 3;
            }
            _ => {
                out.push(path[i]);
                i += 1;
            }
        }
    }
    found.then_some(out)
}

/// Whether nothing in the path would change: the common case, told without building anything.
fn is_canonical(path: &[u8]) -> bool {
    let plain = |c: &u8| c.is_ascii_alphanumeric() || b"/-_~!$&'()*+,;=:@".contains(c);
    path.iter().all(plain)
}

/// Characters that stay as they are.
fn passes(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@[]|^".contains(&c)
}

fn canonicalize(path: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len() + 8);
    let mut i = 0;
    while i < path.len() {
        let c = path[i];
        match c {
            b'/' | b'\\' => {
                let (dots, next) = dot_segment(path, i + 1);
                match dots {
                    0 => {
                        out.push(b'/');
                        i += 1;
                    }
                    1 => {
                        if next >= path.len() {
                            out.push(b'/');
                        }
                        i = next;
                    }
                    _ => {
                        let parent = out.iter().rposition(|c| *c == b'/').unwrap_or(0);
                        out.truncate(parent);
                        if next >= path.len() {
                            out.push(b'/');
                        }
                        i = next;
                    }
                }
            }
            b'%' => match path.get(i + 1..i + 3).and_then(unhex) {
                Some(0) => return None,
                // Unreserved characters need no escape; all others keep theirs as it is.
                Some(b) if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => {
                    out.push(b);
                    i += 3;
                }
                Some(_) => {
                    out.extend_from_slice(&path[i..i + 3]);
                    i += 3;
                }
                None => {
                    out.push(b'%');
                    i += 1;
                }
            },
            c if passes(c) => {
                out.push(c);
                i += 1;
            }
            c => {
                out.extend_from_slice(format!("%{c:02X}").as_bytes());
                i += 1;
            }
        }
    }
    Some(out)
}

/// Whether the segment that begins at `start` is `.` (1) or `..` (2), escaped dots included, and where it ends.
fn dot_segment(path: &[u8], start: usize) -> (usize, usize) {
    let mut i = start;
    let mut dots = 0;
    while i < path.len() {
        match &path[i..] {
            [b'/' | b'\\', ..] => break,
            // `..;x` is `..` to servers that know path parameters (CVE-2026-73551).
            [b';', ..] if dots > 0 => {
                i += path[i..].iter().take_while(|c| !matches!(c, b'/' | b'\\')).count();
                break;
            }
            [b'.', ..] => i += 1,
            [b'%', b'2', b'e' | b'E', ..] => i += 3,
            _ => return (0, start),
        }
        dots += 1;
        if dots > 2 {
            return (0, start);
        }
    }
    (dots, i)
}

fn unhex(hex: &[u8]) -> Option<u8> {
    let digit = |c: u8| char::from(c).to_digit(16);
    Some((digit(hex[0])? * 16 + digit(hex[1])?) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(path: &str) -> String {
        let options = PathOptions { normalize: true, ..PathOptions::default() };
        match normalize(path.as_bytes(), options) {
            Normalized::Same => path.to_owned(),
            Normalized::Changed(p) => String::from_utf8(p).unwrap(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn dots_and_escapes() {
        for (from, to) in [
            ("/a/b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/./b", "/a/b"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/../../b", "/b"),
            ("/a/%2e%2E/b", "/b"),
            ("/a\\b", "/a/b"),
            ("/a//b", "/a//b"),
            ("/%61", "/a"),
            ("/%2f", "/%2f"),
            ("/a b", "/a%20b"),
            ("/a?b/../c", "/a?b/../c"),
            ("/a/...", "/a/..."),
            ("/%zz", "/%zz"),
        ] {
            assert_eq!(canonical(from), to, "{from}");
        }
        assert_eq!(canonical("/%00"), "Reject(None)");
        assert_eq!(canonical("/a#b"), "Reject(None)");
    }

    #[test]
    fn slashes() {
        let options = PathOptions { merge_slashes: true, ..PathOptions::default() };
        assert_eq!(normalize(b"//a///b//?c//d", options), Normalized::Changed(b"/a/b/?c//d".to_vec()));
        let options = PathOptions { escaped_slashes: EscapedSlashes::Forward, ..PathOptions::default() };
        assert_eq!(normalize(b"/a%2Fb%5cc", options), Normalized::Changed(b"/a/b\\c".to_vec()));
    }
}
