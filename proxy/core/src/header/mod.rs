//! The header list: ordered, with ids for well-known names, in one buffer.
//!
//! A head is parsed once and copied once: names and values lie in an arena that belongs to the list, an entry is
//! sixteen bytes of offsets and the id of a well-known name. Looking a well-known header up compares small
//! integers; adding one appends to the arena; nothing is reference counted. Names are lower case, as HTTP/2 has
//! them; the spelling received over HTTP/1 is kept beside where a listener preserves case.
//!
//! Pseudo headers (`:method`, `:path`, `:authority`, `:scheme`, `:status`, `:protocol`) are entries like any
//! other, as in Envoy, so that matchers, mutations and the formatter need no second way; they stand first.
//!
//! A repeated header is all its values: [`HeaderMap::get`] gives the first, [`HeaderMap::get_all`] all, and
//! who wants all of a header at once uses [`HeaderMap::joined`].

mod id;
mod map;

pub use id::{HeaderId, HeaderName, HeaderSet};
pub use map::{HeaderMap, Lines, Piece, Spelling, text_len};

/// The bytes of which an authority may be made.
const AUTHORITY_BYTES: [bool; 256] = {
    let mut table = [false; 256];
    let marks = b"-._~%!$&'()*+,;=:@[]";
    let mut i = 0;
    while i < 256 {
        table[i] = (i as u8).is_ascii_alphanumeric();
        i += 1;
    }
    i = 0;
    while i < marks.len() {
        table[marks[i] as usize] = true;
        i += 1;
    }
    table
};

/// Whether an authority has only bytes that Envoy lets pass.
pub fn authority_is_valid(authority: &[u8]) -> bool {
    let plain = map::host_len(authority);
    authority[plain..].iter().all(|c| AUTHORITY_BYTES[usize::from(*c)])
}
