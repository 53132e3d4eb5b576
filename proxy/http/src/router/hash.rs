//! The hash of a request, for clusters whose policy hashes; a client without the cookie to hash is given one.

use std::fmt::Write as _;

use sampan_core::xxhash::xxh64;

use super::Forward;
use crate::route::Cookie;

impl Forward<'_> {
    pub(super) fn set_hash(&mut self) {
        if !self.cluster.hashes() {
            return;
        }
        let connection = &self.stream.info.connection;
        let ends = || format!("{}{}", connection.remote, connection.local);
        let mut cookies = Vec::new();
        let mut make = |cookie: &Cookie| {
            // The same for all streams of a connection, so that those that race get the same.
            let value = format!("{:016x}", xxh64(ends().as_bytes(), 0));
            cookies.push(set_cookie(cookie, &value));
            value
        };
        self.hash = self.action.hash.hash(&self.stream.request, &self.stream.info, Some(&mut make));
        self.cookies = cookies;
    }
}

fn set_cookie(cookie: &Cookie, value: &str) -> String {
    let mut text = format!("{}=\"{value}\"", cookie.name);
    if let Some(ttl) = cookie.ttl.filter(|ttl| !ttl.is_zero()) {
        let _ = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if !cookie.path.is_empty() {
        let _ = write!(text, "; Path={}", cookie.path);
    }
    for (name, value) in &cookie.attributes {
        let _ = match value.is_empty() {
            true => write!(text, "; {name}"),
            false => write!(text, "; {name}={value}"),
        };
    }
    text.push_str("; HttpOnly");
    text
}
