//! Values that would end their line of HTTP/1, or hide what is behind: those with CR, LF or NUL in them.
//!
//! No parser lets such a value in; what filters and formats put into headers may come from anywhere. The list knows how
//! much of its arena came from a parser or is as good, so that only the rest is looked at before a head is written.

use super::{HeaderMap, text_len};

impl HeaderMap {
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

    /// The name of a header with such a value, if there is one.
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
}

fn breaks_out(value: &[u8]) -> bool {
    // Words at a time: few values have a control character at all.
    let text = text_len(value, b' ');
    value[text..].iter().any(|b| matches!(b, b'\0' | b'\r' | b'\n'))
}

#[cfg(test)]
mod tests {
    use super::super::{HeaderId, HeaderName};
    use super::*;

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
}
