//! The transport below the crate `h2`: it shows every frame's head to [`Wire`] and gathers writes.
//!
//! The crate writes a frame at a time once a frame's payload is more than a few hundred bytes, and asks for a flush
//! behind each. Here what it writes is gathered while the connection's task runs, and written when the task is
//! about to wait ([`Link::poll_flush`], called by whoever drives the connection): the answers of a dozen streams
//! leave in one system call, and one TLS record. Gathered bytes are bounded; beyond [`GATHER`] the crate waits as it
//! would for a socket. The buffer belongs to the thread, not to the connection.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use sampan_tls::Transport;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::scan::{PREFACE, Scanner};
use super::wire::Wire;

/// How much is gathered before it is written.
const GATHER: usize = 64 * 1024;

thread_local! {
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A connection's transport and its books.
pub(super) struct Link {
    io: RefCell<Io>,
    pub(super) wire: Wire,
}

struct Io {
    transport: Transport,
    inbound: Scanner,
    outbound: Scanner,
    /// What was gathered, and how much of it is written.
    out: Vec<u8>,
    written: usize,
    gather: bool,
    /// A frame of ours, to be sent when the crate's last frame is complete.
    own: Option<[u8; 17]>,
    read_bytes: u64,
    written_bytes: u64,
}

impl Link {
    pub(super) fn new(transport: Transport, wire: Wire, server: bool) -> Rc<Self> {
        let preface = || Scanner::behind(PREFACE);
        Rc::new(Self {
            io: RefCell::new(Io {
                transport,
                inbound: if server { preface() } else { Scanner::default() },
                outbound: if server { Scanner::default() } else { preface() },
                out: Vec::new(),
                written: 0,
                gather: false,
                own: None,
                read_bytes: 0,
                written_bytes: 0,
            }),
            wire,
        })
    }

    /// From now on the driver flushes.
    pub(super) fn gather(&self) {
        self.io.borrow_mut().gather = true;
    }

    /// Writes what was gathered.
    pub(super) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.settle();
        self.io.borrow_mut().poll_write_out(cx)
    }

    /// Writes what was gathered and closes our side.
    pub(super) fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut io = self.io.borrow_mut();
        ready!(io.poll_write_out(cx))?;
        Pin::new(&mut io.transport).poll_shutdown(cx)
    }

    /// Bytes read and written.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let io = self.io.borrow();
        (io.read_bytes, io.written_bytes)
    }

    /// Sends GOAWAY with NO_ERROR behind the frames that are under way. `last` is the last stream that will be
    /// served.
    pub(super) fn send_goaway(&self, last: u32) {
        let mut frame = [0; 17];
        frame[2] = 8;
        frame[3] = 7;
        frame[9..13].copy_from_slice(&(last & 0x7fff_ffff).to_be_bytes());
        let mut io = self.io.borrow_mut();
        io.own = Some(frame);
        io.push_own();
    }
}

impl Io {
    fn pending(&self) -> usize {
        self.out.len() - self.written
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.out.capacity() == 0 {
            self.out = SPARE.take();
        }
        self.out.extend_from_slice(bytes);
    }

    fn push_own(&mut self) {
        if self.outbound.at_boundary()
            && let Some(frame) = self.own.take()
        {
            self.push(&frame);
        }
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.pending() > 0 {
            let rest = &self.out[self.written..];
            let n = ready!(Pin::new(&mut self.transport).poll_write(cx, rest))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.written_bytes += n as u64;
        }
        self.clear();
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    /// Everything gathered was written.
    fn clear(&mut self) {
        self.written = 0;
        self.out.clear();
        if self.out.capacity() > 0 {
            SPARE.set(std::mem::take(&mut self.out));
        }
    }

    fn poll_accept_bytes(
        &mut self,
        wire: &Wire,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total: usize = pieces.iter().map(|p| p.len()).sum();
        while self.pending() + total > GATHER {
            let mut all: SmallVec<[IoSlice<'_>; 8]> = SmallVec::new();
            if self.pending() > 0 {
                all.push(IoSlice::new(&self.out[self.written..]));
            }
            all.extend(pieces.iter().map(|p| IoSlice::new(p)));
            let n = ready!(Pin::new(&mut self.transport).poll_write_vectored(cx, &all))?;
            drop(all);
            self.written_bytes += n as u64;
            if n < self.pending() && n > 0 {
                self.written += n;
                continue;
            }
            let taken = n - self.pending().min(n);
            self.clear();
            if taken > 0 || n == 0 {
                self.account(wire, pieces, taken);
                return Poll::Ready(Ok(taken));
            }
        }
        for piece in pieces {
            self.push(piece);
        }
        self.account(wire, pieces, total);
        Poll::Ready(Ok(total))
    }

    /// Shows the first `taken` bytes of the pieces to the books.
    fn account(&mut self, wire: &Wire, pieces: &[IoSlice<'_>], mut taken: usize) {
        for piece in pieces {
            let part = &piece[..piece.len().min(taken)];
            taken -= part.len();
            self.outbound.scan(part, |head| {
                wire.sent(head);
                true
            });
        }
        self.push_own();
    }
}

/// What the crate reads and writes through.
pub(super) struct FrameGuard(pub(super) Rc<Link>);

impl AsyncRead for FrameGuard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Link { io, wire } = &*self.0;
        if wire.flood().is_some() {
            return Poll::Pending;
        }
        if wire.is_full() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let io = &mut *io.borrow_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut io.transport).poll_read(cx, buf))?;
        if buf.filled().len() == before {
            wire.note_closed();
        }
        io.read_bytes += (buf.filled().len() - before) as u64;
        let stopped = io.inbound.scan(&buf.filled()[before..], |head| wire.received(head));
        match stopped {
            None => Poll::Ready(Ok(())),
            // To have read nothing would mean the end. The driver looks for floods whenever the crate waits.
            Some(0) => {
                buf.set_filled(before);
                Poll::Pending
            }
            Some(at) => {
                buf.set_filled(before + at);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for FrameGuard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Link { io, wire } = &*self.0;
        io.borrow_mut().poll_accept_bytes(wire, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut io = self.0.io.borrow_mut();
        if io.gather { Poll::Ready(Ok(())) } else { io.poll_write_out(cx) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_shutdown(cx)
    }
}
