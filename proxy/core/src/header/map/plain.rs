//! Header lines as nearly all peers write them, read in one pass.
//!
//! Plain is `name: value\r\n`: one space behind the colon, none at the end, no tab, no fold, a value that is not empty.
//! Names are checked, lowered and looked up and values checked where they lie. Everything else is for a parser that
//! knows the whole grammar; what is plain it must read just the same.

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

const ONES: u64 = u64::from_ne_bytes([1; 8]);
const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
const LOW: u64 = u64::from_ne_bytes([0x7f; 8]);

/// The high bit of each byte of `word` that is in the range; of bytes below 0x80, which the others must be masked out from.
const fn within(word: u64, first: u8, last: u8) -> u64 {
    let low = word & LOW;
    (low + ONES * (0x80 - first as u64)) ^ (low + ONES * (0x7f - last as u64))
}

/// Lowers the name that a line begins with, and tells how long it is. Letters, digits and dashes go eight at a time.
fn lower_name(line: &mut [u8]) -> usize {
    let mut at = 0;
    while let Some(chunk) = line.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<8>()) {
        let word = u64::from_le_bytes(*chunk);
        let lower = word | (within(word, b'A', b'Z') & !word & HIGH) >> 2;
        let plain = (within(lower, b'a', b'z') | within(lower, b'0', b'9') | within(lower, b'-', b'-'))
            & !word
            & HIGH;
        // How many bytes from the first are plain; the word's other bytes stay.
        let count = (plain ^ HIGH).trailing_zeros() / 8;
        let taken = u64::MAX.checked_shr(64 - 8 * count).unwrap_or(0);
        *chunk = (lower & taken | word & !taken).to_le_bytes();
        at += count as usize;
        if count < 8 {
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

/// How many bytes there are before one that is below `least` (at most 128) or DEL. Eight at a time: such a byte is one
/// from which the subtraction borrows.
pub fn text_len(bytes: &[u8], least: u8) -> usize {
    const DEL: u64 = u64::from_ne_bytes([0x7f; 8]);
    let (words, rest) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let low = word.wrapping_sub(ONES * u64::from(least)) & !word;
        let del = (word ^ DEL).wrapping_sub(ONES) & !(word ^ DEL);
        let found = (low | del) & HIGH;
        if found != 0 {
            // What borrows from a byte found is behind it: the first is right.
            return index * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    bytes.len() - rest.len() + rest.iter().take_while(|b| **b >= least && **b != 0x7f).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_where_it_ends() {
        for len in 0..20 {
            for end in 0..=255u8 {
                let mut bytes = vec![0xc3; 24];
                bytes[len] = end;
                let ends = end < b'!' || end == 0x7f;
                assert_eq!(text_len(&bytes, b'!'), if ends { len } else { 24 }, "{end} at {len}");
            }
        }
    }

    #[test]
    fn names_are_lowered_as_far_as_they_go() {
        for at in 0..20 {
            for byte in 0..=255u8 {
                let mut line = *b"Abc-DEF-0129-xyz-AZaz-";
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
