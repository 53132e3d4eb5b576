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
    /// For parsers: loads a head and reads its header lines, from `at` to behind the empty line; tells where that is.
    /// `None` where they are not plain, not complete, or more than `max`: the list is then of no use.
    ///
    /// What stands behind the head is not the list's to keep: the head is loaded bit by bit, until its end is there.
    pub fn load_plain_lines(&mut self, head: &[u8], mut at: usize, mut max: usize) -> Option<usize> {
        self.arena.extend_from_slice(&head[..head.len().min(at + FIRST_BIT)]);
        loop {
            let line = self.arena.get_mut(at..)?;
            if line.starts_with(b"\r\n") {
                self.arena.truncate(at + 2);
                self.set_parsed();
                return Some(at + 2);
            }
            let Some((name_len, value_len)) = plain_line(line) else {
                let loaded = self.arena.len();
                if loaded == head.len() {
                    return None;
                }
                // Cut off, perhaps. A name that was lowered already is lowered again.
                self.arena.extend_from_slice(&head[loaded..head.len().min(loaded + NEXT_BIT)]);
                continue;
            };
            max = max.checked_sub(1)?;
            let id = HeaderId::from_lower(&line[..usize::from(name_len)]);
            let value = at + usize::from(name_len) + 2;
            self.push(Entry {
                id,
                name_len,
                name: at as u32,
                value: value as u32,
                value_len: value_len as u32,
                spelled: IN_LINE,
            });
            at = value + value_len + 2;
        }
    }
}

/// What is loaded of a head at first, behind its first line, and each time that it was not enough.
const FIRST_BIT: usize = 512;
const NEXT_BIT: usize = 1024;

/// The lengths of name and value of a plain line. The name is lowered.
#[inline]
fn plain_line(line: &mut [u8]) -> Option<(u16, usize)> {
    let name_len = lower_name(line);
    let value = line[name_len..].strip_prefix(b": ")?;
    let value_len = text_len(value, b' ');
    let (text, rest) = value.split_at(value_len);
    if matches!((text.first()?, text.last()?), (b' ', _) | (_, b' ')) || !rest.starts_with(b"\r\n") {
        return None;
    }
    let name_len = u16::try_from(name_len).ok().filter(|len| *len > 0)?;
    Some((name_len, value_len))
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
        *chunk = u8x16::new(FIRST[count]).bitselect(lower, bytes).to_array();
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

/// All ones in as many of the first lanes.
static FIRST: [[u8; 16]; 17] = {
    let mut all = [[0; 16]; 17];
    let mut count = 0;
    while count <= 16 {
        let mut lane = 0;
        while lane < count {
            all[count][lane] = 0xff;
            lane += 1;
        }
        count += 1;
    }
    all
};

/// How many bytes there are before one that is below `least` or DEL.
pub fn text_len(bytes: &[u8], least: u8) -> usize {
    run_of(bytes, |bytes| bytes.simd_ge(u8x16::splat(least)) & !bytes.simd_eq(u8x16::splat(0x7f)))
}

/// How many bytes from the first are what nearly all hosts and ports are made of: letters, digits, `-`, `.` and `:`.
pub fn host_len(bytes: &[u8]) -> usize {
    run_of(bytes, |bytes| {
        let lower = bytes | u8x16::splat(b'a' - b'A');
        let letter = within(lower, b'a', b'z');
        letter | within(bytes, b'0', b':') | within(bytes, b'-', b'.')
    })
}

/// How many bytes from the first are of a kind to which 0 does not belong.
#[inline]
fn run_of(bytes: &[u8], is: impl Fn(u8x16) -> u8x16) -> usize {
    let (chunks, rest) = bytes.as_chunks::<16>();
    for (index, chunk) in chunks.iter().enumerate() {
        let count = run(is(u8x16::new(*chunk)));
        if count < 16 {
            return index * 16 + count;
        }
    }
    let mut last = [0; 16];
    last[..rest.len()].copy_from_slice(rest);
    chunks.len() * 16 + run(is(u8x16::new(last)))
}

#[cfg(test)]
mod tests {
    use super::super::HeaderName;
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
    fn a_plain_host_ends_where_it_ends() {
        for end in 0..=255u8 {
            let plain = end.is_ascii_alphanumeric() || b"-.:".contains(&end);
            assert_eq!(host_len(&[b'a', end]), 1 + usize::from(plain), "{end}");
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
            let end = h.load_plain_lines(head.as_bytes(), 0, 2)?;
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

    #[test]
    fn wherever_a_long_head_is_cut_it_is_read_and_nothing_behind_it_is_kept() {
        for long in 0..FIRST_BIT + NEXT_BIT + 40 {
            let head = format!("First: {}b\r\nSecond-Name: c d\r\n\r\n", "a".repeat(long));
            let mut h = HeaderMap::new();
            let all = [head.as_bytes(), &[b'x'; 3000]].concat();
            assert_eq!(h.load_plain_lines(&all, 0, 2), Some(head.len()));
            assert_eq!(h.arena, head.to_ascii_lowercase().as_bytes());
            assert_eq!(h.get_name(&HeaderName::new("second-name")), Some(&b"c d"[..]));
        }
    }
}
