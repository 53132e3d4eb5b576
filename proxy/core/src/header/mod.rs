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

pub use id::{HeaderId, HeaderName};
pub use map::{Entry, HeaderMap, Lines, Piece};
