//! The list itself: an arena of bytes, and entries that say which of them are a name or a value.
//!
//! A value that is replaced stays in the arena until the list goes: bytes are only ever added.

mod broken;
mod lines;
mod plain;
mod raw;
mod spare;

use std::borrow::Cow;
use std::fmt;

use super::{HeaderId, HeaderName, HeaderSet};

pub use lines::{Lines, Piece, Spelling};
pub(super) use plain::host_len;
pub use plain::text_len;

/// One header: where its parts lie in the arena.
#[derive(Clone, Copy, Debug)]
struct Entry {
    id: HeaderId,
    name_len: u16,
    name: u32,
    value: u32,
    value_len: u32,
    /// Where the name lies as it was spelled on the wire; [`NO_SPELLING`] where that was not kept, [`IN_LINE`] where
    /// name and value still lie in the arena as a line of HTTP/1.
    spelled: u32,
}

const NO_SPELLING: u32 = u32::MAX;
const IN_LINE: u32 = u32::MAX - 1;

impl Entry {
    /// The value is about to be another.
    fn leave_line(&mut self) {
        if self.spelled == IN_LINE {
            self.spelled = NO_SPELLING;
        }
    }
}

/// An ordered list of headers; see [`crate::header`].
#[derive(Clone, Default)]
pub struct HeaderMap {
    arena: Vec<u8>,
    entries: Vec<Entry>,
    /// Which names may be there: most look-ups are for headers that a message does not have.
    present: HeaderSet,
    /// A well-known name may be there more than once.
    repeats: bool,
    spelling: Spelling,
    /// How much of the arena came from a parser or is as good, see `broken`.
    parsed: u32,
}

impl HeaderMap {
    /// An empty list that owns no memory.
    pub const fn new() -> Self {
        Self {
            arena: Vec::new(),
            entries: Vec::new(),
            present: HeaderSet::EMPTY,
            repeats: false,
            spelling: Spelling::Unknown,
            parsed: 0,
        }
    }

    /// An empty list with room.
    pub fn with_capacity(bytes: usize, headers: usize) -> Self {
        Self { arena: Vec::with_capacity(bytes), entries: Vec::with_capacity(headers), ..Self::new() }
    }

    /// Forgets the headers and keeps the memory.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.entries.clear();
        self.present = HeaderSet::EMPTY;
        self.repeats = false;
        self.spelling = Spelling::Unknown;
        self.parsed = 0;
    }

    /// How many headers there are, repeated ones counted each, pseudo headers too.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of all names and values, Envoy's `byteSize`.
    pub fn byte_size(&self) -> usize {
        self.entries.iter().map(|e| usize::from(e.name_len) + e.value_len as usize).sum()
    }

    /// All headers in order: id, lower-case name, value.
    pub fn iter(&self) -> impl Iterator<Item = (HeaderId, &[u8], &[u8])> {
        self.entries.iter().map(|e| (e.id, self.name_bytes(e), self.value_bytes(e)))
    }
}

// What is there.
impl HeaderMap {
    /// Whether one of these may be there. Never wrong where it says no.
    pub fn may_have(&self, names: &HeaderSet) -> bool {
        self.present.meets(names)
    }

    /// Whether a well-known name may be there more than once. Never wrong where it says no.
    pub fn may_repeat(&self) -> bool {
        self.repeats
    }

    /// Whether a well-known header is there.
    pub fn contains(&self, id: HeaderId) -> bool {
        self.position(id).is_some()
    }

    /// The first value of a well-known header.
    pub fn get(&self, id: HeaderId) -> Option<&[u8]> {
        self.position(id).map(|at| self.value_bytes(&self.entries[at]))
    }

    /// The first value of a well-known header as text; `None` too where it is not UTF-8.
    pub fn get_str(&self, id: HeaderId) -> Option<&str> {
        self.get(id).and_then(|v| std::str::from_utf8(v).ok())
    }

    /// All values of a well-known header, in order.
    pub fn get_all(&self, id: HeaderId) -> impl Iterator<Item = &[u8]> {
        self.having(id).iter().filter(move |e| e.id == id).map(|e| self.value_bytes(e))
    }

    /// The first value of any header.
    pub fn get_name(&self, name: &HeaderName) -> Option<&[u8]> {
        if !self.present.contains(name.id()) {
            return None;
        }
        self.entries.iter().find(|e| self.is(e, name)).map(|e| self.value_bytes(e))
    }

    /// All values of any header, in order.
    pub fn get_all_name<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]> {
        self.having(name.id()).iter().filter(|e| self.is(e, name)).map(|e| self.value_bytes(e))
    }

    /// All values of a header joined by `,`. `None` where there is no such header.
    pub fn joined<'a>(&'a self, name: &'a HeaderName) -> Option<Cow<'a, [u8]>> {
        let mut values = self.get_all_name(name);
        let first = values.next()?;
        let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
        let mut all = [first, b",", second].concat();
        for value in values {
            all.push(b',');
            all.extend_from_slice(value);
        }
        Some(Cow::Owned(all))
    }

    /// Whether a header that is a list of tokens has this one, in any spelling.
    #[inline]
    pub fn lists(&self, id: HeaderId, token: &str) -> bool {
        // Nearly all messages have no such list.
        self.present.contains(id) && self.lists_it(id, token)
    }

    fn lists_it(&self, id: HeaderId, token: &str) -> bool {
        let is = |part: &[u8]| part.trim_ascii().eq_ignore_ascii_case(token.as_bytes());
        // Nearly all are one token.
        self.get_all(id).any(|value| match value.contains(&b',') {
            false => is(value),
            true => value.split(|b| *b == b',').any(is),
        })
    }
}

// Changes.
impl HeaderMap {
    /// Adds a header behind the others.
    pub fn append(&mut self, id: HeaderId, value: impl AsRef<[u8]>) {
        let e = self.entry(id, b"", value.as_ref());
        self.push(e);
    }

    /// Adds a header of any name behind the others.
    pub fn append_name(&mut self, name: &HeaderName, value: impl AsRef<[u8]>) {
        let e = self.entry(name.id(), name.as_bytes(), value.as_ref());
        self.push(e);
    }

    /// Adds a header whose lower-case name comes from a wire that already forbids upper case (HTTP/2).
    pub fn append_lower(&mut self, name: &[u8], value: &[u8]) -> HeaderId {
        let id = HeaderId::from_lower(name);
        let e = self.entry(id, name, value);
        self.push(e);
        id
    }

    /// Puts a header before all others (pseudo headers made by a codec).
    pub fn insert_first(&mut self, id: HeaderId, value: impl AsRef<[u8]>) {
        let e = self.entry(id, b"", value.as_ref());
        self.note(id);
        self.entries.insert(0, e);
    }

    /// Gives a header one value: the first entry's value is replaced in its place, further ones go.
    pub fn set(&mut self, id: HeaderId, value: impl AsRef<[u8]>) {
        match self.present.contains(id) {
            true => self.set_name(&HeaderName::Known(id), value),
            false => self.append(id, value),
        }
    }

    /// [`HeaderMap::set`] for any name.
    pub fn set_name(&mut self, name: &HeaderName, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        let first = self.having(name.id()).iter().position(|e| self.is(e, name));
        let Some(first) = first else { return self.append_name(name, value) };
        let at = self.store(value);
        self.entries[first].leave_line();
        self.entries[first].value = at;
        self.entries[first].value_len = value.len() as u32;
        let mut index = first + 1;
        while index < self.entries.len() {
            if self.is(&self.entries[index], name) {
                self.entries.remove(index);
            } else {
                index += 1;
            }
        }
    }

    /// Appends to a header's first value behind a separator, or sets it: how proxies grow `via` and
    /// `x-forwarded-for`.
    pub fn append_to_value(&mut self, id: HeaderId, separator: &str, more: &[u8]) {
        let Some(first) = self.position(id) else { return self.append(id, more) };
        if self.entries[first].value_len == 0 {
            return self.set(id, more);
        }
        self.grow(first, separator, more);
    }

    /// The same for any name, but only where there is such a header.
    pub fn append_to_existing(&mut self, name: &HeaderName, separator: &str, more: &[u8]) {
        if let Some(first) = self.entries.iter().position(|e| self.is(e, name)) {
            let separator = if self.entries[first].value_len == 0 { "" } else { separator };
            self.grow(first, separator, more);
        }
    }

    /// Gives the first header `from` the id `to` and the first place (`host` becomes `:authority`); further ones
    /// stay. Tells whether there was one.
    pub fn promote(&mut self, from: HeaderId, to: HeaderId) -> bool {
        let Some(index) = self.position(from) else { return false };
        let e = &mut self.entries[index];
        let host = (from, to) == (HeaderId::HOST, HeaderId::AUTHORITY);
        let spelled = if host && e.spelled < IN_LINE { e.spelled } else { NO_SPELLING };
        (e.id, e.name_len, e.spelled) = (to, to.name().len() as u16, spelled);
        self.note(to);
        // Few stand before it: a rotation would cost more.
        (0..index).rev().for_each(|at| self.entries.swap(at, at + 1));
        true
    }

    /// Removes a well-known header; tells whether it was there.
    pub fn remove(&mut self, id: HeaderId) -> bool {
        if !self.present.contains(id) {
            return false;
        }
        let before = self.entries.len();
        self.entries.retain(|e| e.id != id);
        if id != HeaderId::CUSTOM {
            self.present.remove(id);
        }
        before != self.entries.len()
    }

    /// Removes a header of any name; tells whether it was there.
    pub fn remove_name(&mut self, name: &HeaderName) -> bool {
        match name {
            HeaderName::Known(id) => self.remove(*id),
            HeaderName::Custom(_) if !self.present.contains(HeaderId::CUSTOM) => false,
            HeaderName::Custom(custom) => {
                self.remove_if(|id, bytes, _| id == HeaderId::CUSTOM && bytes == &custom[..])
            }
        }
    }

    /// Removes every header that the predicate picks (id, lower-case name, value); tells whether there was one.
    pub fn remove_if(&mut self, mut pick: impl FnMut(HeaderId, &[u8], &[u8]) -> bool) -> bool {
        let mut entries = std::mem::take(&mut self.entries);
        let before = entries.len();
        entries.retain(|e| !pick(e.id, self.name_bytes(e), self.value_bytes(e)));
        self.entries = entries;
        before != self.entries.len()
    }
}

// The arena and its entries.
impl HeaderMap {
    fn note(&mut self, id: HeaderId) {
        self.repeats |= !self.present.add(id) && id != HeaderId::CUSTOM;
    }

    /// An entry at the end of the list.
    fn push(&mut self, entry: Entry) {
        self.note(entry.id);
        self.entries.push(entry);
    }

    fn store(&mut self, bytes: &[u8]) -> u32 {
        let at = self.arena.len() as u32;
        self.arena.extend_from_slice(bytes);
        at
    }

    fn entry(&mut self, id: HeaderId, name: &[u8], value: &[u8]) -> Entry {
        let (name, name_len) = match id {
            HeaderId::CUSTOM => (self.store(name), name.len() as u16),
            known => (0, known.name().len() as u16),
        };
        let value_len = value.len() as u32;
        let value = self.store(value);
        Entry { id, name_len, name, value, value_len, spelled: NO_SPELLING }
    }

    fn grow(&mut self, first: usize, separator: &str, more: &[u8]) {
        let e = self.entries[first];
        let at = self.arena.len();
        self.arena.extend_from_within(e.value as usize..(e.value + e.value_len) as usize);
        self.arena.extend_from_slice(separator.as_bytes());
        self.arena.extend_from_slice(more);
        self.entries[first].leave_line();
        self.entries[first].value = at as u32;
        self.entries[first].value_len = (self.arena.len() - at) as u32;
    }

    fn name_bytes(&self, e: &Entry) -> &[u8] {
        match e.id {
            HeaderId::CUSTOM => &self.arena[e.name as usize..e.name as usize + usize::from(e.name_len)],
            id => id.name().as_bytes(),
        }
    }

    fn value_bytes(&self, e: &Entry) -> &[u8] {
        &self.arena[e.value as usize..(e.value + e.value_len) as usize]
    }

    /// Where the first entry of a well-known header stands.
    fn position(&self, id: HeaderId) -> Option<usize> {
        if self.present.contains(id) { self.entries.iter().position(|e| e.id == id) } else { None }
    }

    /// The entries to search for an id: none where it cannot be.
    fn having(&self, id: HeaderId) -> &[Entry] {
        if self.present.contains(id) { &self.entries } else { &[] }
    }

    fn is(&self, e: &Entry, name: &HeaderName) -> bool {
        match name {
            HeaderName::Known(id) => e.id == *id,
            HeaderName::Custom(bytes) => e.id == HeaderId::CUSTOM && self.name_bytes(e) == &bytes[..],
        }
    }
}

impl fmt::Debug for HeaderMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.iter().map(|(_, n, v)| (n.escape_ascii().to_string(), v.escape_ascii().to_string())),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_replaces_in_place_and_drops_repeats() {
        let mut h = HeaderMap::new();
        h.append(HeaderId::ACCEPT, "a");
        h.append_lower(b"x-one", b"1");
        h.append(HeaderId::ACCEPT, "b");
        h.set(HeaderId::ACCEPT, "c");
        let all: Vec<_> = h.iter().map(|(_, n, v)| (n.to_vec(), v.to_vec())).collect();
        assert_eq!(all, [(b"accept".to_vec(), b"c".to_vec()), (b"x-one".to_vec(), b"1".to_vec())]);
    }

    #[test]
    fn repeated_values_join_with_a_comma() {
        let mut h = HeaderMap::new();
        let name = HeaderName::new("X-One");
        for v in ["1", "2", "3"] {
            h.append_name(&name, v);
        }
        assert_eq!(h.joined(&name).as_deref(), Some(&b"1,2,3"[..]));
        assert!(h.remove_name(&name));
        assert_eq!(h.joined(&name), None);
    }

    #[test]
    fn a_list_has_its_tokens() {
        let mut h = HeaderMap::new();
        h.append(HeaderId::CONNECTION, "keep-alive, Upgrade");
        h.append(HeaderId::CONNECTION, " Close ");
        let has = |token| h.lists(HeaderId::CONNECTION, token);
        assert!(has("upgrade") && has("keep-alive") && has("close"));
        assert!(!has("keep") && !h.lists(HeaderId::TE, "close"));
    }

    #[test]
    fn what_was_removed_is_not_found() {
        let mut h = HeaderMap::new();
        h.append(HeaderId::ACCEPT, "a");
        h.append_lower(b"x-one", b"1");
        assert!(h.remove(HeaderId::ACCEPT) && !h.remove(HeaderId::ACCEPT) && !h.contains(HeaderId::ACCEPT));
        assert!(!h.remove_name(&HeaderName::new("x-two")));
        h.append(HeaderId::ACCEPT, "b");
        assert_eq!(h.get(HeaderId::ACCEPT), Some(&b"b"[..]));
        h.clear();
        assert!(!h.contains(HeaderId::ACCEPT) && h.get_name(&HeaderName::new("x-one")).is_none());
    }

    #[test]
    fn a_value_grows_behind_a_separator() {
        let mut h = HeaderMap::new();
        h.append_to_value(HeaderId::X_FORWARDED_FOR, ",", b"1.1.1.1");
        h.append_to_value(HeaderId::X_FORWARDED_FOR, ",", b"2.2.2.2");
        assert_eq!(h.get(HeaderId::X_FORWARDED_FOR), Some(&b"1.1.1.1,2.2.2.2"[..]));
    }
}
