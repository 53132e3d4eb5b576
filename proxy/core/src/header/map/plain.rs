//! Header lines as nearly all peers write them, read in one pass.
//!
//! Plain is `name: value\r\n`: one space behind the colon, none at the end, no tab, no fold, a value that is not empty.
//! Names are checked, lowered and looked up and values checked where they lie. Everything else is for a parser that
//! knows the whole grammar; what is plain it must read just the same.

use wide::u8x16;

use super::{Entry, HeaderId, HeaderMap, IN_LINE};

/// A name's bytes in lower case; 0 for what no name may have (RFC 9110 section 5.6.2).
static LOWER_TOKEN: [u8; 256] = {
    let mut table = [0; 256];
    let marks = b"!#$%&'*+-.^_`|~";
    let mut i = 0;
    while i < 256 {
        if (i as u8).is_ascii_alphanumeric() {
            table[i] = (i as u8).to_ascii_lowercase();
        }
        i += 1;
    }
    i = 0;
    while i < marks.len() {
        table[marks[i] as usize] = marks[i];
        i += 1;
    }
    table
};

impl HeaderMap {
    /// For parsers: reads the header lines of the loaded head, from `at` to behind the empty line, and tells where that
    /// is; what was loaded behind it is dropped. `None` where they are not plain, not complete, or more than `max`: the
    /// list is then of no use.
    pub fn push_plain_lines(&mut self, mut at: usize, max: usize) -> Option<usize> {
        for _ in 0..=max {
            let line = self.arena.get_mut(at..)?;
            if line.starts_with(b"\r\n") {
                self.arena.truncate(at + 2);
                self.set_parsed();
                return Some(at + 2);
            }
            let name_len = lower_name(line);
            let value = line[name_len..].strip_prefix(b": ")?;
            let value_len = text_len(value, b' ');
            let (text, rest) = value.split_at(value_len);
            if matches!((text.first()?, text.last()?), (b' ', _) | (_, b' ')) || !rest.starts_with(b"\r\n") {
                return None;
            }
            let id = HeaderId::from_lower(&line[..name_len]);
            let value = at + name_len + 2;
            self.push(Entry {
                id,
                name_len: u16::try_from(name_len).ok().filter(|len| *len > 0)?,
                name: at as u32,
                value: value as u32,
                value_len: value_len as u32,
                spelled: IN_LINE,
            });
            at = value + value_len + 2;
        }
        None
    }
}

/// All ones where a byte is in the range.
fn within(bytes: u8x16, first: u8, last: u8) -> u8x16 {
    let from_first = bytes - u8x16::splat(first);
    from_first.simd_le(u8x16::splat(last - first))
}

/// How many lanes from the first are all ones.
fn run(lanes: u8x16) -> usize {
    lanes.to_bitmask().trailing_ones() as usize
}

/// Lowers the name that a line begins with, and tells how long it is. Letters, digits and dashes go sixteen at a time.
fn lower_name(line: &mut [u8]) -> usize {
    let mut at = 0;
    while let Some(chunk) = line.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<16>()) {
        let bytes = u8x16::new(*chunk);
        let lower = bytes | (within(bytes, b'A', b'Z') & u8x16::splat(b'a' - b'A'));
        let dash = lower.simd_eq(u8x16::splat(b'-'));
        let count = run(within(lower, b'a', b'z') | within(lower, b'0', b'9') | dash);
        let taken = PLACES.simd_lt(u8x16::splat(count as u8));
        *chunk = taken.bitselect(lower, bytes).to_array();
        at += count;
        if count < 16 {
            break;
        }
    }
    for byte in &mut line[at..] {
        let lower = LOWER_TOKEN[usize::from(*byte)];
        if lower == 0 {
            break;
        }
        *byte = lower;
        at += 1;
    }
    at
}

const PLACES: u8x16 = u8x16::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);

/// How many bytes there are before one that is below `least` or DEL.
pub fn text_len(bytes: &[u8], least: u8) -> usize {
    let is_text = |bytes: u8x16| bytes.simd_ge(u8x16::splat(least)) & !bytes.simd_eq(u8x16::splat(0x7f));
    let (chunks, rest) = bytes.as_chunks::<16>();
    for (index, chunk) in chunks.iter().enumerate() {
        let count = run(is_text(u8x16::new(*chunk)));
        if count < 16 {
            return index * 16 + count;
        }
    }
    // Padding is no text: least is above zero.
    let mut last = [0; 16];
    last[..rest.len()].copy_from_slice(rest);
    chunks.len() * 16 + run(is_text(u8x16::new(last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_where_it_ends() {
        for len in 0..36 {
            for end in 0..=255u8 {
                let mut bytes = vec![0xc3; 40];
                bytes[len] = end;
                let ends = if end < b'!' || end == 0x7f { len } else { 40 };
                assert_eq!(text_len(&bytes, b'!'), ends, "{end} at {len}");
            }
        }
    }

    #[test]
    fn names_are_lowered_as_far_as_they_go() {
        for at in 0..38 {
            for byte in 0..=255u8 {
                let mut line = *b"Abc-DEF-0129-xyz-AZaz-09-Header-Name-A";
                line[at] = byte;
                let mut lower = line;
                let wanted = line.iter().take_while(|b| LOWER_TOKEN[usize::from(**b)] != 0).count();
                assert_eq!(lower_name(&mut lower), wanted, "{byte} at {at}");
                assert!(
                    lower[..wanted] == line[..wanted].to_ascii_lowercase()
                        && lower[wanted..] == line[wanted..]
                );
            }
        }
    }

    #[test]
    fn plain_lines_are_read_and_others_are_not() {
        let read = |head: &str| {
            let mut h = HeaderMap::new();
            h.load(head.as_bytes());
            let end = h.push_plain_lines(0, 2)?;
            let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
            Some((end, h.iter().map(|(_, n, v)| (text(n), text(v))).collect::<Vec<_>>()))
        };
        let (end, all) = read("Host: x\r\nX-A: b c\r\n\r\nbody").unwrap();
        assert_eq!(end, 21);
        assert_eq!(all, [("host".into(), "x".into()), ("x-a".into(), "b c".into())]);
        assert_eq!(read("\r\n").unwrap().0, 2);
        for other in [
            "a:b\r\n\r\n",
            "a:  b\r\n\r\n",
            "a: b \r\n\r\n",
            "a: \r\n\r\n",
            "a: b\n\r\n",
            "a: b\r\n c\r\n\r\n",
            ": b\r\n\r\n",
            "a b: c\r\n\r\n",
            "a: b\tc\r\n\r\n",
            "a: b\x7f\r\n\r\n",
            "a: b\r\n",
            "a: b\r\n\r",
            "a: 1\r\nb: 2\r\nc: 3\r\n\r\n",
        ] {
            assert_eq!(read(other), None, "{other:?}");
        }
    }
}
