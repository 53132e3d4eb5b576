//! Buffered reading and writing of one connection.
//!
//! Reads go into a scratch buffer of the worker and from there to where the bytes belong, so that a connection
//! that waits holds no memory. Where a read has filled the scratch, the body's next piece is read into memory of its own
//! and passed on without a copy. Heads and small bodies are gathered in `out` and leave in one write; a large frame
//! is written behind them without being copied.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use rustix::net::SendFlags;
use sampan_tls::Transport;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::coop::poll_proceed;
use tokio_util::io::poll_read_buf;

/// What one read takes at most.
pub(super) const SCRATCH: usize = 16 * 1024;
/// What a body's piece takes that is read without the scratch: the largest that the allocator keeps at hand.
const PIECE: usize = 32 * 1024;
/// Up to this a frame is copied behind the head instead of being written beside it.
const COPY: usize = 4 * 1024;

thread_local! {
    static SCRATCH_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A transport with its leftovers.
pub(super) struct Io {
    transport: Transport,
    /// Received and not yet consumed.
    pub(super) inbox: BytesMut,
    out: Vec<u8>,
    out_at: usize,
    tail: Bytes,
    /// What follows `tail`: the end of a chunk.
    after: Vec<u8>,
    /// The peer has closed or broken the stream.
    pub(super) read_eof: bool,
    /// The last read got all it had room for.
    plenty: bool,
    /// See [`poll_read`].
    drained: bool,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
}

impl Io {
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            inbox: BytesMut::new(),
            out: Vec::new(),
            out_at: 0,
            tail: Bytes::new(),
            after: Vec::new(),
            read_eof: false,
            plenty: false,
            drained: false,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.transport
    }

    pub(super) fn into_parts(self) -> (Transport, BytesMut) {
        (self.transport, self.inbox)
    }

    /// Whether no event has come for a plain socket since it was last read empty.
    pub(super) fn is_quiet(&self) -> bool {
        let event = |tcp: &TcpStream| tcp.try_io(Interest::READABLE, || Ok(()));
        self.transport.plain_tcp().is_some_and(|tcp| would_block(&event(tcp)))
    }

    /// Reads once into the scratch and shows it to `see`; what `see` does not consume goes to the inbox. Only
    /// for an empty inbox. `Ok(None)` is the end of the stream.
    pub(super) fn poll_read_scratch<T>(
        &mut self,
        cx: &mut Context<'_>,
        see: impl FnOnce(&[u8]) -> (usize, T),
    ) -> Poll<io::Result<Option<T>>> {
        debug_assert!(self.inbox.is_empty());
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let read = ready!(poll_read(&mut self.transport, &mut self.drained, cx, scratch));
            self.read_eof |= !matches!(read, Ok(1..));
            let seen = &scratch[..read?];
            if seen.is_empty() {
                return Poll::Ready(Ok(None));
            }
            self.bytes_in += seen.len() as u64;
            self.plenty = seen.len() == SCRATCH;
            let (consumed, value) = see(seen);
            if consumed < seen.len() {
                self.inbox.extend_from_slice(&seen[consumed..]);
            }
            Poll::Ready(Ok(Some(value)))
        })
    }

    /// Reads once to the end of the inbox. 0 is the end of the stream.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let read = ready!(poll_read(&mut self.transport, &mut self.drained, cx, scratch));
            self.read_eof |= !matches!(read, Ok(1..));
            let seen = &scratch[..read?];
            self.bytes_in += seen.len() as u64;
            self.plenty = seen.len() == SCRATCH;
            self.inbox.extend_from_slice(seen);
            Poll::Ready(Ok(seen.len()))
        })
    }

    /// Takes at most `limit` bytes, from the inbox or by one read; empty is the end of the stream.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>, limit: u64) -> Poll<io::Result<Bytes>> {
        let limited = usize::try_from(limit).unwrap_or(usize::MAX);
        if self.inbox.is_empty() && self.plenty && limited > COPY {
            return self.poll_read_piece(cx, limited);
        }
        if self.inbox.is_empty() {
            let got = ready!(self.poll_read_scratch(cx, |seen| {
                let n = seen.len().min(limited);
                (n, Bytes::copy_from_slice(&seen[..n]))
            }))?;
            return Poll::Ready(Ok(got.unwrap_or_default()));
        }
        let n = self.inbox.len().min(limited);
        Poll::Ready(Ok(self.take_inbox(n)))
    }

    /// Reads once into memory that is passed on; empty is the end of the stream.
    fn poll_read_piece(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<io::Result<Bytes>> {
        // Who waits for more holds no memory meanwhile: the next read begins with the scratch again.
        self.plenty = false;
        let mut piece = BytesMut::with_capacity(limit.min(PIECE));
        let room = piece.capacity();
        let read = ready!(poll_read_buf(Pin::new(&mut self.transport), cx, &mut piece));
        self.read_eof |= !matches!(read, Ok(1..));
        let read = read?;
        self.bytes_in += read as u64;
        self.plenty = read == room;
        if read > limit {
            self.inbox = piece.split_off(limit);
        }
        Poll::Ready(Ok(piece.freeze()))
    }

    /// The first `n` bytes of the inbox.
    pub(super) fn take_inbox(&mut self, n: usize) -> Bytes {
        if n == self.inbox.len() {
            // Nothing stays behind with which the memory would be shared.
            return std::mem::take(&mut self.inbox).freeze();
        }
        self.inbox.split_to(n).freeze()
    }

    /// Forgets the first `n` bytes of the inbox, and its memory with the last.
    pub(super) fn drop_inbox(&mut self, n: usize) {
        self.inbox.advance(n);
        if self.inbox.is_empty() {
            self.inbox = BytesMut::new();
        }
    }

    /// Where heads and small frames are written to; flushed by [`Io::poll_flush`].
    pub(super) fn out(&mut self) -> &mut Vec<u8> {
        debug_assert!(self.tail.is_empty());
        if self.out.capacity() == 0 {
            self.out = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        }
        &mut self.out
    }

    /// Queues a frame's data. The caller has seen [`Io::is_flushed`] or has only queued heads before.
    pub(super) fn push(&mut self, data: Bytes) {
        if data.len() <= COPY {
            self.out().extend_from_slice(&data);
        } else {
            self.tail = data;
        }
    }

    /// Queues a chunk's data and its line end.
    pub(super) fn push_chunk(&mut self, data: Bytes) {
        self.push(data);
        self.push_end(b"\r\n");
    }

    /// Queues bytes behind whatever was queued last.
    pub(super) fn push_end(&mut self, bytes: &[u8]) {
        if self.tail.is_empty() {
            self.out().extend_from_slice(bytes);
        } else {
            self.after.extend_from_slice(bytes);
        }
    }

    /// Whether another frame can be queued: nothing large waits.
    pub(super) fn can_push(&self) -> bool {
        self.tail.is_empty() && self.out.len() - self.out_at < SCRATCH
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.tail.is_empty() && self.out_at == self.out.len()
    }

    /// Writes all that is queued.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_flushed() {
            let head = &self.out[self.out_at..];
            let n = if self.tail.is_empty() {
                ready!(poll_write(&mut self.transport, cx, head))?
            } else {
                let both = [IoSlice::new(head), IoSlice::new(&self.tail)];
                let both = if head.is_empty() { &both[1..] } else { &both[..] };
                ready!(Pin::new(&mut self.transport).poll_write_vectored(cx, both))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.bytes_out += n as u64;
            let from_head = n.min(self.out.len() - self.out_at);
            self.out_at += from_head;
            self.tail.advance(n - from_head);
            if self.tail.is_empty() && !self.after.is_empty() {
                let after = std::mem::take(&mut self.after);
                self.compact();
                self.out().extend_from_slice(&after);
            }
        }
        self.recycle();
        if self.transport.is_tls() {
            return Pin::new(&mut self.transport).poll_flush(cx);
        }
        Poll::Ready(Ok(()))
    }

    /// Drops what was written from the write buffer.
    fn compact(&mut self) {
        self.out.drain(..self.out_at);
        self.out_at = 0;
    }

    /// Gives the emptied write buffer back to the worker.
    fn recycle(&mut self) {
        self.out_at = 0;
        if self.out.capacity() > 0 {
            let mut out = std::mem::take(&mut self.out);
            out.clear();
            if out.capacity() <= 2 * SCRATCH {
                SPARE.with_borrow_mut(|spare| {
                    if spare.len() < 16 {
                        spare.push(out);
                    }
                });
            }
        }
    }

    /// Ends our direction of the stream.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

/// Reads once. A plain socket is asked itself: the way through `AsyncRead` costs twice as much where there is nothing to
/// wait for, and libc's `recv` and `send` half as much again, being places where a thread may be cancelled.
///
/// `drained`: the read before took all that there was, so that an event is waited for before the next.
fn poll_read(
    transport: &mut Transport,
    drained: &mut bool,
    cx: &mut Context<'_>,
    into: &mut [u8],
) -> Poll<io::Result<usize>> {
    let Some(tcp) = transport.plain_tcp() else {
        let mut buf = ReadBuf::new(into);
        return Pin::new(transport).poll_read(cx, &mut buf).map_ok(|()| buf.filled().len());
    };
    if std::mem::take(drained) {
        ready!(tcp.poll_read_ready(cx))?;
    }
    loop {
        // Others want their turn too, however fast this peer sends.
        let turn = ready!(poll_proceed(cx));
        let mut read = 0;
        let tried = tcp.try_io(Interest::READABLE, || {
            read = rustix::io::read(tcp, &mut *into)?;
            *drained = (1..into.len()).contains(&read);
            // The socket is empty now: there is no need to try again before the next event.
            if *drained { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        if !*drained && would_block(&tried) {
            drop(turn);
            ready!(tcp.poll_read_ready(cx))?;
            continue;
        }
        turn.made_progress();
        let result = if *drained { Ok(()) } else { tried };
        return Poll::Ready(result.map(|()| read));
    }
}

/// Writes once, as [`poll_read`] reads.
fn poll_write(transport: &mut Transport, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
    let Some(tcp) = transport.plain_tcp() else { return Pin::new(transport).poll_write(cx, bytes) };
    loop {
        let written =
            tcp.try_io(Interest::WRITABLE, || Ok(rustix::net::send(tcp, bytes, SendFlags::NOSIGNAL)?));
        if !would_block(&written) {
            return Poll::Ready(written);
        }
        ready!(tcp.poll_write_ready(cx))?;
    }
}

fn would_block<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn a_long_body_comes_in_large_pieces_and_not_a_byte_more() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut io = Io::new(Transport::Unix(near));
        let sent: Vec<u8> = (0..150_000u32).map(|n| (n % 251) as u8).collect();
        let all = sent.clone();
        let writing = tokio::spawn(async move { far.write_all(&all).await.map(|()| far) });
        let (mut body, mut largest) = (Vec::new(), 0);
        while body.len() < 140_000 {
            let left = 140_000 - body.len() as u64;
            let piece = poll_fn(|cx| io.poll_take(cx, left)).await.unwrap();
            largest = largest.max(piece.len());
            body.extend_from_slice(&piece);
        }
        assert!(body == sent[..140_000] && largest > SCRATCH, "{largest}");
        let far = writing.await.unwrap().unwrap();
        while io.inbox.len() < 10_000 {
            poll_fn(|cx| io.poll_fill(cx)).await.unwrap();
        }
        assert!(io.inbox == sent[140_000..] && io.bytes_in == 150_000);
        drop(far);
        io.inbox.clear();
        let end = poll_fn(|cx| io.poll_take(cx, 1 << 20)).await.unwrap();
        assert!(end.is_empty() && io.read_eof);
    }
}
