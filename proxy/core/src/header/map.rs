//! The list itself.

mod plain;

pub(super) use plain::host_len;
pub use plain::text_len;

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use super::{HeaderId, HeaderName, HeaderSet};

/// One header: where its parts lie in the arena.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
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

/// How many lists' memory a thread keeps, and of which size at most.
const SPARES: usize = 64;
const MOST_SPARE: usize = 8 * 1024;

thread_local! {
    static SPARE: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

impl Entry {
    /// The value is about to be another.
    fn leave_line(&mut self) {
        if self.spelled == IN_LINE {
            self.spelled = NO_SPELLING;
        }
    }
}

fn breaks_out(value: &[u8]) -> bool {
    // Words at a time: few values have a control character at all.
    let text = text_len(value, b' ');
    value[text..].iter().any(|b| matches!(b, b'\0' | b'\r' | b'\n'))
}

/// A piece of a head as HTTP/1 writes it, see [`HeaderMap::iter_lines`].
pub enum Piece<'m> {
    /// One or more whole lines, lower-case names.
    Lines(&'m [u8]),
    /// A well-known header that has no line yet, and its value.
    Known(HeaderId, &'m [u8]),
    /// Any other: lower-case name, value.
    Custom(&'m [u8], &'m [u8]),
}

/// What is known of how a message's names were spelled, and how names that were not received with it shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spelling {
    /// Nothing was kept.
    #[default]
    Unknown,
    /// Kept; other names are lower case.
    Kept,
    /// Kept; other names are `Proper-Case`.
    KeptOrProper,
}

/// An ordered list of headers; see the module.
#[derive(Clone, Default)]
pub struct HeaderMap {
    arena: Vec<u8>,
    entries: Vec<Entry>,
    /// Which names may be there: most look-ups are for headers that a message does not have.
    present: HeaderSet,
    /// A well-known name may be there more than once.
    repeats: bool,
    spelling: Spelling,
    /// What lies before this in the arena was read by a parser, which lets no value end its line, or is as good.
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
        Self {
            arena: Vec::with_capacity(bytes),
            entries: Vec::with_capacity(headers),
            present: HeaderSet::EMPTY,
            repeats: false,
            spelling: Spelling::Unknown,
            parsed: 0,
        }
    }

    /// An empty list with room, in memory that another has left to the thread if there is any.
    pub fn spare(bytes: usize, headers: usize) -> Self {
        let Some(mut spare) = SPARE.with_borrow_mut(Vec::pop) else {
            return Self::with_capacity(bytes, headers);
        };
        spare.arena.reserve(bytes);
        spare.entries.reserve(headers);
        spare
    }

    /// Leaves the memory to the thread's next list.
    pub fn recycle(mut self) {
        if (1..=MOST_SPARE).contains(&self.arena.capacity()) {
            self.clear();
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < SPARES {
                    spare.push(self);
                }
            });
        }
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

    /// How the names of this message are spelled, whoever writes it.
    pub fn spelling(&self) -> Spelling {
        self.spelling
    }

    /// For parsers: sets [`HeaderMap::spelling`].
    pub fn set_spelling(&mut self, spelling: Spelling) {
        self.spelling = spelling;
    }

    fn note(&mut self, id: HeaderId) {
        self.repeats |= !self.present.add(id) && id != HeaderId::CUSTOM;
    }

    /// An entry at the end of the list.
    fn push(&mut self, entry: Entry) {
        self.note(entry.id);
        self.entries.push(entry);
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

    /// For parsers: takes a raw head into the arena; [`HeaderMap::push_raw`] then names ranges of it.
    pub fn load(&mut self, head: &[u8]) {
        self.clear();
        self.arena.extend_from_slice(head);
        self.set_parsed();
    }

    /// For parsers: no value that is there so far ends its line ([`HeaderMap::breaks_out`]).
    pub fn set_parsed(&mut self) {
        self.parsed = self.arena.len() as u32;
    }

    /// Puts in values that cannot end their line, being checked or made here; nobody looks for that in them again.
    pub fn trusted(&mut self, put: impl FnOnce(&mut Self)) {
        let all = self.parsed as usize == self.arena.len();
        put(self);
        if all {
            self.set_parsed();
        }
    }

    /// For parsers: a header whose name and value lie in the loaded head at these offsets. The name is lowered in
    /// place; with `keep_spelling` a lowered copy is made beside.
    pub fn push_raw(&mut self, name: (usize, usize), value: (usize, usize), keep_spelling: bool) -> HeaderId {
        let (mut at, len) = name;
        let mut spelled = if self.is_line(name, value) { IN_LINE } else { NO_SPELLING };
        if keep_spelling {
            spelled = at as u32;
            at = self.arena.len();
            self.arena.extend_from_within(name.0..name.0 + len);
        }
        let lower = &mut self.arena[at..at + len];
        lower.make_ascii_lowercase();
        let id = HeaderId::from_lower(lower);
        self.push(Entry {
            id,
            name_len: len as u16,
            name: at as u32,
            value: value.0 as u32,
            value_len: value.1 as u32,
            spelled,
        });
        id
    }

    /// Whether name and value lie in the arena just as HTTP/1 writes them.
    fn is_line(&self, name: (usize, usize), value: (usize, usize)) -> bool {
        let (colon, end) = (name.0 + name.1, value.0 + value.1);
        value.0 == colon + 2
            && self.arena.get(colon..value.0) == Some(b": ")
            && self.arena.get(end..end + 2) == Some(b"\r\n")
    }

    /// For parsers: a well-known header whose value lies in the loaded head.
    pub fn push_raw_known(&mut self, id: HeaderId, value: (usize, usize)) {
        self.push(Entry {
            id,
            name_len: id.name().len() as u16,
            name: 0,
            value: value.0 as u32,
            value_len: value.1 as u32,
            spelled: NO_SPELLING,
        });
    }

    /// For parsers: a range of the loaded head.
    pub fn raw(&self, range: (usize, usize)) -> &[u8] {
        &self.arena[range.0..range.0 + range.1]
    }

    /// For parsers: [`HeaderMap::push_raw_known`] before all others.
    pub fn push_raw_first(&mut self, id: HeaderId, value: (usize, usize)) {
        self.push_raw_known(id, value);
        self.entries.rotate_right(1);
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

    fn is(&self, e: &Entry, name: &HeaderName) -> bool {
        match name {
            HeaderName::Known(id) => e.id == *id,
            HeaderName::Custom(bytes) => e.id == HeaderId::CUSTOM && self.name_bytes(e) == &bytes[..],
        }
    }

    /// The entries to search for an id: none where it cannot be.
    fn having(&self, id: HeaderId) -> &[Entry] {
        if self.present.contains(id) { &self.entries } else { &[] }
    }

    /// The first value of a well-known header.
    pub fn get(&self, id: HeaderId) -> Option<&[u8]> {
        self.position(id).map(|at| self.value_bytes(&self.entries[at]))
    }

    /// The first value of a well-known header as text; `None` too where it is not UTF-8.
    pub fn get_str(&self, id: HeaderId) -> Option<&str> {
        self.get(id).and_then(|v| std::str::from_utf8(v).ok())
    }

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

    /// The first value of any header.
    pub fn get_name(&self, name: &HeaderName) -> Option<&[u8]> {
        if !self.present.contains(name.id()) {
            return None;
        }
        self.entries.iter().find(|e| self.is(e, name)).map(|e| self.value_bytes(e))
    }

    /// All values of a well-known header, in order.
    pub fn get_all(&self, id: HeaderId) -> impl Iterator<Item = &[u8]> {
        self.having(id).iter().filter(move |e| e.id == id).map(|e| self.value_bytes(e))
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

    /// Puts a header before all others (pseudo headers made by a codec).
    pub fn insert_first(&mut self, id: HeaderId, value: impl AsRef<[u8]>) {
        let e = self.entry(id, b"", value.as_ref());
        self.note(id);
        self.entries.insert(0, e);
    }

    /// The name of a header whose value would end its line of HTTP/1, or hide what is behind: one with CR, LF or NUL in it.
    /// No parser lets such a value in; what filters and formats put into headers may come from anywhere.
    pub fn breaks_out(&self) -> Option<&[u8]> {
        // All that was made lies together, with what it replaced: one look suffices for nearly all lists.
        let made = &self.arena[self.parsed as usize..];
        if made.is_empty() || !breaks_out(made) {
            return None;
        }
        let mut made = self.entries.iter().filter(|e| e.value >= self.parsed);
        made.find(|e| breaks_out(self.value_bytes(e))).map(|e| self.name_bytes(e))
    }

    /// Removes what [`HeaderMap::breaks_out`] finds.
    pub fn remove_broken(&mut self) {
        if self.breaks_out().is_some() {
            self.remove_if(|_, _, value| breaks_out(value));
        }
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

    /// All headers in order: id, lower-case name, value.
    pub fn iter(&self) -> impl Iterator<Item = (HeaderId, &[u8], &[u8])> {
        self.entries.iter().map(|e| (e.id, self.name_bytes(e), self.value_bytes(e)))
    }

    /// The header lines of the head with lower-case names, as HTTP/1 writes them: what was received as lines and left alone comes as lines.
    pub fn iter_lines(&self) -> Lines<'_> {
        Lines { map: self, at: 0 }
    }

    /// All headers in order with the name as it was spelled on the wire, where that was kept; an authority's is that
    /// of `host`.
    pub fn iter_spelled(&self) -> impl Iterator<Item = (HeaderId, &[u8], Option<&[u8]>, &[u8])> {
        self.entries.iter().map(|e| {
            let len = if e.id == HeaderId::AUTHORITY { "host".len() } else { usize::from(e.name_len) };
            let at = e.spelled as usize;
            let spelled = (e.spelled < IN_LINE).then(|| &self.arena[at..at + len]);
            (e.id, self.name_bytes(e), spelled, self.value_bytes(e))
        })
    }
}

/// See [`HeaderMap::iter_lines`].
pub struct Lines<'m> {
    map: &'m HeaderMap,
    at: usize,
}

impl<'m> Iterator for Lines<'m> {
    type Item = Piece<'m>;

    fn next(&mut self) -> Option<Piece<'m>> {
        let Self { map, at } = self;
        let first = loop {
            let first = map.entries.get(*at)?;
            *at += 1;
            if !first.id.is_pseudo() || first.id == HeaderId::AUTHORITY {
                break first;
            }
        };
        if first.spelled != IN_LINE {
            let value = map.value_bytes(first);
            return Some(match first.id {
                HeaderId::CUSTOM => Piece::Custom(map.name_bytes(first), value),
                HeaderId::AUTHORITY => Piece::Known(HeaderId::HOST, value),
                id => Piece::Known(id, value),
            });
        }
        let mut end = first.value + first.value_len + 2;
        while let Some(next) = map.entries.get(*at)
            && next.spelled == IN_LINE
            && next.name == end
        {
            end = next.value + next.value_len + 2;
            *at += 1;
        }
        Some(Piece::Lines(&map.arena[first.name as usize..end as usize]))
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
    fn raw_names_are_lowered_and_spelling_is_kept_on_demand() {
        let mut h = HeaderMap::new();
        h.load(b"X-Foo: bar");
        assert_eq!(h.push_raw((0, 5), (7, 3), true), HeaderId::CUSTOM);
        let (_, name, spelled, value) = h.iter_spelled().next().unwrap();
        assert_eq!((name, spelled, value), (&b"x-foo"[..], Some(&b"X-Foo"[..]), &b"bar"[..]));
    }

    fn lines(h: &HeaderMap) -> Vec<String> {
        let piece = |p: Piece<'_>| match p {
            Piece::Lines(lines) => String::from_utf8_lossy(lines).into_owned(),
            Piece::Known(id, v) => format!("<{}={}>", id.name(), String::from_utf8_lossy(v)),
            Piece::Custom(n, v) => {
                format!("<{}={}>", String::from_utf8_lossy(n), String::from_utf8_lossy(v))
            }
        };
        h.iter_lines().map(piece).collect()
    }

    #[test]
    fn lines_left_alone_stay_lines() {
        let mut h = HeaderMap::new();
        h.load(b"A: 1\r\nHost: x\r\nB:2\r\nC: 3\r\nd: 4\r\n");
        for (name, value) in
            [((0, 1), (3, 1)), ((6, 4), (12, 1)), ((15, 1), (17, 1)), ((20, 1), (23, 1)), ((26, 1), (29, 1))]
        {
            h.push_raw(name, value, false);
        }
        assert_eq!(lines(&h), ["a: 1\r\nhost: x\r\n", "<b=2>", "c: 3\r\nd: 4\r\n"]);
        h.set_name(&HeaderName::new("c"), "5");
        h.promote(HeaderId::HOST, HeaderId::AUTHORITY);
        h.append_to_value(HeaderId::AUTHORITY, ",", b"y");
        assert_eq!(lines(&h), ["<host=x,y>", "a: 1\r\n", "<b=2>", "<c=5>", "d: 4\r\n"]);
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
    fn a_value_that_ends_its_line_is_found() {
        let mut h = HeaderMap::new();
        h.append(HeaderId::PATH, "/a");
        h.append_lower(b"x-a", b"tab\tand \xff");
        assert_eq!(h.breaks_out(), None);
        for bad in ["a\r\nb: c", "a\n", "\r", "a\0b"] {
            let mut h = h.clone();
            h.set(HeaderId::PATH, bad);
            assert_eq!(h.breaks_out(), Some(&b":path"[..]));
            h.set(HeaderId::PATH, "/");
            h.append_to_existing(&HeaderName::new("x-a"), ",", bad.as_bytes());
            assert_eq!(h.breaks_out(), Some(&b"x-a"[..]));
            h.remove_broken();
            assert_eq!((h.breaks_out(), h.len()), (None, 1));
        }
    }

    #[test]
    fn what_is_trusted_is_not_looked_at_and_what_is_not_is() {
        let mut h = HeaderMap::new();
        h.trusted(|h| h.append(HeaderId::DATE, "\n"));
        assert_eq!(h.breaks_out(), None);
        h.append(HeaderId::SERVER, "\n");
        h.trusted(|h| h.append(HeaderId::VIA, "a"));
        assert_eq!(h.breaks_out(), Some(&b"server"[..]));
    }

    #[test]
    fn a_value_grows_behind_a_separator() {
        let mut h = HeaderMap::new();
        h.append_to_value(HeaderId::X_FORWARDED_FOR, ",", b"1.1.1.1");
        h.append_to_value(HeaderId::X_FORWARDED_FOR, ",", b"2.2.2.2");
        assert_eq!(h.get(HeaderId::X_FORWARDED_FOR), Some(&b"1.1.1.1,2.2.2.2"[..]));
    }
}
