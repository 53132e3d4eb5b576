//! Frame heads out of a byte stream (RFC 9113 section 4.1), without a copy of anything but split heads.
//!
//! ```text
//!   +-----------------------------------------------+
//!   |                 Length (24)                   |
//!   +---------------+---------------+---------------+
//!   |   Type (8)    |   Flags (8)   |
//!   +-+-------------+---------------+-------------------------------+
//!   |R|                 Stream Identifier (31)                      |
//!   +=+=============================================================+
//! ```
//!
//! The scanner trusts nothing: a length that never comes leaves it waiting, as it leaves the codec.

/// Length of a frame's head.
pub(super) const HEAD: usize = 9;
/// The client's connection preface, which stands before its first frame.
pub(super) const PREFACE: u64 = 24;

/// Frame types that matter here.
pub(super) mod kind {
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
}

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const PADDED: u8 = 8;

/// A frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) length: u32,
    pub(super) kind: u8,
    flags: u8,
    pub(super) stream: u32,
    /// Padding of DATA, its length byte included.
    padding: u32,
    /// The code of RST_STREAM.
    pub(super) code: u32,
}

impl Head {
    fn parse(bytes: &[u8]) -> Self {
        let [a, b, c, kind, flags, d, e, f, g, ref more @ ..] = *bytes else {
            return Self { length: 0, kind: u8::MAX, flags: 0, stream: 0, padding: 0, code: 0 };
        };
        let mut head = Self {
            length: u32::from_be_bytes([0, a, b, c]),
            kind,
            flags,
            stream: u32::from_be_bytes([d, e, f, g]) & 0x7fff_ffff,
            padding: 0,
            code: 0,
        };
        match *more {
            [pad, ..] if head.is_padded_data() => head.padding = u32::from(pad) + 1,
            [a, b, c, d, ..] if kind == kind::RST_STREAM => head.code = u32::from_be_bytes([a, b, c, d]),
            _ => {}
        }
        head
    }

    fn is_padded_data(&self) -> bool {
        self.kind == kind::DATA && self.flags & PADDED != 0
    }

    /// How many bytes of the frame must be seen for [`Head::parse`] to be complete.
    fn needs(bytes: &[u8]) -> usize {
        let head = Self::parse(bytes);
        let more = match head.kind {
            kind::RST_STREAM => 4,
            _ if head.is_padded_data() => 1,
            _ => 0,
        };
        HEAD + more.min(head.length as usize)
    }

    /// Bytes of the payload, without padding.
    pub(super) fn payload(&self) -> u32 {
        self.length.saturating_sub(self.padding)
    }

    /// Bytes on the wire.
    pub(super) fn wire(&self) -> u64 {
        u64::from(self.length) + HEAD as u64
    }

    /// Whether the sender's side of the stream ends with this frame.
    pub(super) fn ends_stream(&self) -> bool {
        matches!(self.kind, kind::DATA | kind::HEADERS) && self.flags & END_STREAM != 0
    }

    /// Whether this is the answer to a PING.
    pub(super) fn is_pong(&self) -> bool {
        self.kind == kind::PING && self.flags & ACK != 0
    }
}

/// Where in the byte stream we are.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// Bytes until the next head.
    skip: u64,
    /// A head that was split between two pieces.
    partial: [u8; HEAD + 4],
    have: usize,
}

impl Scanner {
    /// A scanner that first passes over some bytes.
    pub(super) fn behind(skip: u64) -> Self {
        Self { skip, ..Self::default() }
    }

    /// Whether the next byte begins a frame.
    pub(super) fn at_boundary(&self) -> bool {
        self.skip == 0 && self.have == 0
    }

    /// Shows each frame of the next piece to `seen` until it refuses one; then says where in the piece that begins
    /// (0 where it began before).
    #[inline]
    pub(super) fn scan(&mut self, piece: &[u8], mut seen: impl FnMut(&Head) -> bool) -> Option<usize> {
        let mut at = 0;
        loop {
            let left = piece.len() - at;
            if self.skip >= left as u64 {
                self.skip -= left as u64;
                return None;
            }
            at += self.skip as usize;
            self.skip = 0;
            let start = at.saturating_sub(self.have);
            let head = if self.have == 0 && piece.len() - at >= HEAD + 4 {
                Head::parse(&piece[at..at + HEAD + 4])
            } else {
                let head = self.assemble(piece, &mut at)?;
                self.have = 0;
                if !seen(&head) {
                    return Some(start);
                }
                continue;
            };
            if !seen(&head) {
                return Some(at);
            }
            self.skip = head.wire();
        }
    }

    /// Takes bytes of a split head until it is whole; sets what is to be skipped behind them.
    #[cold]
    fn assemble(&mut self, piece: &[u8], at: &mut usize) -> Option<Head> {
        loop {
            let want = if self.have < HEAD { HEAD } else { Head::needs(&self.partial[..self.have]) };
            if self.have >= HEAD && self.have >= want {
                let head = Head::parse(&self.partial[..self.have]);
                self.skip = head.wire() - self.have as u64;
                return Some(head);
            }
            let take = (want - self.have).min(piece.len() - *at);
            if take == 0 {
                return None;
            }
            self.partial[self.have..self.have + take].copy_from_slice(&piece[*at..*at + take]);
            self.have += take;
            *at += take;
        }
    }
}

/// For the fuzz target: shows frames of bytes that come whole and in two pieces; they must be the same. Returns what
/// tells one outcome from another.
pub fn fuzz_frames(bytes: &[u8], cut: usize) -> u64 {
    let (first, second) = bytes.split_at(cut.min(bytes.len()));
    let frames = |pieces: &[&[u8]]| {
        let mut scanner = Scanner::default();
        let mut all = Vec::new();
        for piece in pieces {
            scanner.scan(piece, |head| {
                all.push((head.length, head.kind, head.flags, head.stream));
                true
            });
        }
        (all, scanner.at_boundary())
    };
    let whole = frames(&[bytes]);
    assert_eq!(whole.0, frames(&[first, second]).0, "frames hang on how they are cut");
    let kinds = whole.0.iter().take(6).fold(0, |sum, (_, kind, ..)| sum * 11 + u64::from(*kind % 11));
    kinds * 2 + u64::from(whole.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        out.extend([kind, flags]);
        out.extend(stream.to_be_bytes());
        out.extend(payload);
        out
    }

    fn stream() -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        bytes.extend(frame(kind::HEADERS, 4, 1, b"0123456789"));
        bytes.extend(frame(kind::DATA, PADDED, 1, &[2, 0, 0]));
        bytes.extend(frame(kind::DATA, END_STREAM, 1, b""));
        bytes.extend(frame(kind::RST_STREAM, 0, 3, &[0, 0, 0, 8]));
        bytes.extend(frame(kind::PING, ACK, 0, &[0; 8]));
        bytes
    }

    fn all(pieces: &mut dyn Iterator<Item = &[u8]>) -> Vec<Head> {
        let mut scanner = Scanner::behind(PREFACE);
        let mut heads = Vec::new();
        for piece in pieces {
            let stopped = scanner.scan(piece, |head| {
                heads.push(*head);
                true
            });
            assert_eq!(stopped, None);
        }
        assert!(scanner.at_boundary());
        heads
    }

    #[test]
    fn heads_are_the_same_however_the_bytes_are_cut() {
        let bytes = stream();
        let whole = all(&mut std::iter::once(&bytes[..]));
        assert_eq!(whole.len(), 6);
        assert_eq!((whole[2].length, whole[2].payload()), (3, 0));
        assert!(whole[3].ends_stream() && !whole[2].ends_stream());
        assert_eq!((whole[4].stream, whole[4].code), (3, 8));
        assert!(whole[5].is_pong());
        for size in 1..bytes.len() {
            assert_eq!(all(&mut bytes.chunks(size)), whole, "pieces of {size}");
        }
    }

    #[test]
    fn a_refused_frame_is_pointed_at() {
        let bytes = stream();
        let mut scanner = Scanner::behind(PREFACE);
        let at = scanner.scan(&bytes, |head| head.kind != kind::DATA);
        assert_eq!(at, Some(24 + 9 + 19));
        let mut scanner = Scanner::behind(PREFACE);
        assert_eq!(scanner.scan(&bytes[..54], |head| head.kind != kind::DATA), None);
        assert_eq!(scanner.scan(&bytes[54..], |head| head.kind != kind::DATA), Some(0));
    }
}
