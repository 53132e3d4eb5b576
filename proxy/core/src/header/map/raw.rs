//! How a parser of HTTP/1 fills the list: it loads a head as it came and names the ranges of it that are headers.

use super::{Entry, HeaderId, HeaderMap, IN_LINE, NO_SPELLING};

impl HeaderMap {
    /// For parsers: takes a raw head into the arena; [`HeaderMap::push_raw`] then names ranges of it.
    pub fn load(&mut self, head: &[u8]) {
        self.clear();
        self.arena.extend_from_slice(head);
        self.set_parsed();
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
}
