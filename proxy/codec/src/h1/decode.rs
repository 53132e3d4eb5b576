//! Bodies from the wire: RFC 9112 sections 6 and 7.

use std::task::{Context, Poll, ready};

use sampan_core::HeaderMap;

use super::io::Io;
use super::parse::{self, Framing, Limits};
use crate::body::{BodyError, Frame};
use crate::error::{CodecError, ResetReason};

/// The longest line of a chunk's size with its extensions.
const MAX_CHUNK_LINE: usize = 4 * 1024;

const BAD_CHUNK: BodyError = BodyError::Protocol(CodecError::parse("HPE_INVALID_CHUNK_SIZE"));

/// Where in its body a message stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoder {
    Length(u64),
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    Close,
    Done,
}

impl From<Framing> for Decoder {
    fn from(framing: Framing) -> Self {
        match framing {
            Framing::None | Framing::Length(0) => Self::Done,
            Framing::Length(n) => Self::Length(n),
            Framing::Chunked => Self::ChunkSize,
            Framing::Close => Self::Close,
        }
    }
}

fn gone<T>(_: T) -> BodyError {
    BodyError::Reset(ResetReason::ConnectionTermination)
}

impl Decoder {
    pub(super) fn is_done(self) -> bool {
        self == Self::Done
    }

    /// The next frame; `None` at the end of the body.
    pub(super) fn poll_frame(
        &mut self,
        io: &mut Io,
        limits: &Limits,
        keep_trailers: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        let result = ready!(self.poll_inner(io, limits, keep_trailers, cx));
        if !matches!(result, Ok(Some(Frame::Data(_)))) {
            *self = Self::Done;
        }
        Poll::Ready(result.transpose())
    }

    fn poll_inner(
        &mut self,
        io: &mut Io,
        limits: &Limits,
        keep_trailers: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Frame>, BodyError>> {
        loop {
            match *self {
                Self::Done => return Poll::Ready(Ok(None)),
                Self::Length(left) => {
                    let data = ready!(io.poll_take(cx, left)).map_err(gone)?;
                    if data.is_empty() {
                        return Poll::Ready(Err(gone(())));
                    }
                    *self = match left - data.len() as u64 {
                        0 => Self::Done,
                        left => Self::Length(left),
                    };
                    return Poll::Ready(Ok(Some(Frame::Data(data))));
                }
                Self::Close => {
                    let data = ready!(io.poll_take(cx, u64::MAX)).map_err(gone)?;
                    if data.is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                    return Poll::Ready(Ok(Some(Frame::Data(data))));
                }
                Self::ChunkSize => match chunk_size(&io.inbox)? {
                    None => ready!(fill(io, cx))?,
                    Some((size, used)) => {
                        io.drop_inbox(used);
                        *self = if size == 0 { Self::Trailers } else { Self::ChunkData(size) };
                    }
                },
                Self::ChunkData(left) => {
                    let data = ready!(io.poll_take(cx, left)).map_err(gone)?;
                    if data.is_empty() {
                        return Poll::Ready(Err(gone(())));
                    }
                    *self = match left - data.len() as u64 {
                        0 => Self::ChunkEnd,
                        left => Self::ChunkData(left),
                    };
                    self.skip_ahead(io)?;
                    return Poll::Ready(Ok(Some(Frame::Data(data))));
                }
                Self::ChunkEnd => match line_end(&io.inbox)? {
                    None => ready!(fill(io, cx))?,
                    Some(used) => {
                        io.drop_inbox(used);
                        *self = Self::ChunkSize;
                    }
                },
                Self::Trailers => match take_trailers(io, limits)? {
                    None => ready!(fill(io, cx))?,
                    Some(trailers) if trailers.is_empty() || !keep_trailers => return Poll::Ready(Ok(None)),
                    Some(trailers) => return Poll::Ready(Ok(Some(Frame::Trailers(trailers)))),
                },
            }
        }
    }

    /// Behind a chunk's data: if the end of the body lies in the inbox already, the data was the last frame, and
    /// its reader can say so.
    fn skip_ahead(&mut self, io: &mut Io) -> Result<(), BodyError> {
        if *self == Self::ChunkEnd && io.inbox.starts_with(b"\r\n0\r\n\r\n") {
            io.drop_inbox(7);
            *self = Self::Done;
        }
        Ok(())
    }
}

fn fill(io: &mut Io, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
    match ready!(io.poll_fill(cx)) {
        Ok(0) | Err(_) => Poll::Ready(Err(gone(()))),
        Ok(_) => Poll::Ready(Ok(())),
    }
}

/// `1A;extension\r\n`: the size and how long the line is.
fn chunk_size(bytes: &[u8]) -> Result<Option<(u64, usize)>, BodyError> {
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        return if bytes.len() > MAX_CHUNK_LINE { Err(BAD_CHUNK) } else { Ok(None) };
    };
    if end > MAX_CHUNK_LINE {
        return Err(BAD_CHUNK);
    }
    // A bare LF is where another parser may see another line.
    let Some(line) = bytes[..end].strip_suffix(b"\r") else { return Err(BAD_CHUNK) };
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    let rest = &line[digits..];
    let spaces = rest.iter().take_while(|b| matches!(b, b' ' | b'\t')).count();
    // A lone CR in an extension is how two parsers come to see two messages.
    let extension_ok = matches!(rest.get(spaces), None | Some(b';')) && !rest.contains(&b'\r');
    if digits == 0 || digits > 16 || !extension_ok {
        return Err(BAD_CHUNK);
    }
    let size = line[..digits].iter().try_fold(0u64, |n, d| {
        let digit = char::from(*d).to_digit(16)?;
        n.checked_mul(16)?.checked_add(u64::from(digit))
    });
    size.map(|size| Some((size, end + 1))).ok_or(BAD_CHUNK)
}

fn line_end(bytes: &[u8]) -> Result<Option<usize>, BodyError> {
    match bytes {
        [b'\n', ..] => Ok(Some(1)),
        [b'\r', b'\n', ..] => Ok(Some(2)),
        [] | [b'\r'] => Ok(None),
        _ => Err(BAD_CHUNK),
    }
}

fn take_trailers(io: &mut Io, limits: &Limits) -> Result<Option<HeaderMap>, BodyError> {
    let parsed = parse::trailers(&io.inbox, limits).map_err(BodyError::Protocol)?;
    Ok(parsed.map(|(headers, len)| {
        io.drop_inbox(len);
        headers
    }))
}

/// For the fuzz target: takes bytes apart as a chunked body, as [`Decoder`] does. Returns what tells one outcome from
/// another: how many chunks there were and how it ended.
pub fn fuzz_chunks(bytes: &[u8]) -> u64 {
    let mut rest = bytes;
    let mut chunks = 0;
    loop {
        let (size, used) = match chunk_size(rest) {
            Ok(Some(found)) => found,
            Ok(None) => return chunks * 8,
            Err(_) => return chunks * 8 + 1,
        };
        rest = &rest[used..];
        if size == 0 {
            let limits = Limits {
                max_bytes: 1 << 14,
                max_headers: 100,
                spelling: sampan_core::header::Spelling::Unknown,
                allow_custom_methods: false,
            };
            return match parse::trailers(rest, &limits) {
                Err(_) => chunks * 8 + 2,
                Ok(None) => chunks * 8 + 3,
                Ok(Some((trailers, len))) => {
                    assert!(len <= rest.len(), "trailers end behind what came");
                    chunks * 8 + 4 + u64::from(!trailers.is_empty())
                }
            };
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let Some(behind) = rest.get(size..) else { return chunks * 8 + 6 };
        rest = match line_end(behind) {
            Ok(Some(used)) => &behind[used..],
            Ok(None) | Err(_) => return chunks * 8 + 7,
        };
        chunks = (chunks + 1).min(64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_lines() {
        assert_eq!(chunk_size(b"1a\r\nx"), Ok(Some((26, 4))));
        assert_eq!(chunk_size(b"5;a=b\r\n"), Ok(Some((5, 7))));
        assert_eq!(chunk_size(b"5 ;a\r\n"), Ok(Some((5, 6))));
        assert_eq!(chunk_size(b"5"), Ok(None));
        for bad in [
            &b"\r\n"[..],
            b"g\r\n",
            b"-1\r\n",
            b"5 5\r\n",
            b"5;\r5\r\n",
            b"11111111111111111\r\n",
            b"0x5\r\n",
        ] {
            assert_eq!(chunk_size(bad), Err(BAD_CHUNK), "{}", bad.escape_ascii());
        }
    }
}
