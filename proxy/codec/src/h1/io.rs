//! Buffered reading and writing of one connection.
//!
//! Reads go into a scratch buffer of the worker and from there to where the bytes belong, so that a connection
//! that waits holds no memory. Heads and small bodies are gathered in `out` and leave in one write; a large frame
//! is written behind them without being copied.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use sampan_tls::Transport;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What one read takes at most.
pub(super) const SCRATCH: usize = 16 * 1024;
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

    /// Reads once into the scratch and shows it to `see`; what `see` does not consume goes to the inbox. Only
    /// for an empty inbox. `Ok(None)` is the end of the stream.
    pub(super) fn poll_read_scratch<T>(
        &mut self,
        cx: &mut Context<'_>,
        see: impl FnOnce(&[u8]) -> (usize, T),
    ) -> Poll<io::Result<Option<T>>> {
        debug_assert!(self.inbox.is_empty());
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let mut buf = ReadBuf::new(scratch);
            let read = ready!(Pin::new(&mut self.transport).poll_read(cx, &mut buf));
            self.read_eof |= read.is_err();
            read?;
            let seen = buf.filled();
            if seen.is_empty() {
                self.read_eof = true;
                return Poll::Ready(Ok(None));
            }
            self.bytes_in += seen.len() as u64;
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
            let mut buf = ReadBuf::new(scratch);
            let read = ready!(Pin::new(&mut self.transport).poll_read(cx, &mut buf));
            self.read_eof |= read.is_err();
            read?;
            let seen = buf.filled();
            if seen.is_empty() {
                self.read_eof = true;
            }
            self.bytes_in += seen.len() as u64;
            self.inbox.extend_from_slice(seen);
            Poll::Ready(Ok(seen.len()))
        })
    }

    /// Takes at most `limit` bytes, from the inbox or by one read; empty is the end of the stream.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>, limit: u64) -> Poll<io::Result<Bytes>> {
        if self.inbox.is_empty() {
            let got = ready!(self.poll_read_scratch(cx, |seen| {
                let n = seen.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
                (n, Bytes::copy_from_slice(&seen[..n]))
            }))?;
            return Poll::Ready(Ok(got.unwrap_or_default()));
        }
        let n = self.inbox.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        Poll::Ready(Ok(self.take_inbox(n)))
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
                ready!(Pin::new(&mut self.transport).poll_write(cx, head))?
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
