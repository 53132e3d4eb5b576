//! The list as HTTP/1 writes it: with lower-case names, line by line, or with names as they were spelled.

use super::{HeaderId, HeaderMap, IN_LINE};

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

/// A piece of a head as HTTP/1 writes it, see [`HeaderMap::iter_lines`].
pub enum Piece<'m> {
    /// One or more whole lines, lower-case names.
    Lines(&'m [u8]),
    /// A well-known header that has no line yet, and its value.
    Known(HeaderId, &'m [u8]),
    /// Any other: lower-case name, value.
    Custom(&'m [u8], &'m [u8]),
}

impl HeaderMap {
    /// How the names of this message are spelled, whoever writes it.
    pub fn spelling(&self) -> Spelling {
        self.spelling
    }

    /// For parsers: sets [`HeaderMap::spelling`].
    pub fn set_spelling(&mut self, spelling: Spelling) {
        self.spelling = spelling;
    }

    /// The header lines of the head with lower-case names, as HTTP/1 writes them: what was received as lines and left
    /// alone comes as lines.
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

#[cfg(test)]
mod tests {
    use super::super::HeaderName;
    use super::*;

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
}
