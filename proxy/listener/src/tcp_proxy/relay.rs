//! Moves bytes between two connections until both directions have ended.
//!
//! ```text
//!            small bursts: read into a scratch buffer of the thread, write what was read
//!   source ==============================================================================> destination
//!            bulk, both plain TCP: splice(2) into a pipe, splice(2) out of it
//! ```
//!
//! An idle connection holds no buffer and no pipe: the scratch buffer belongs to the thread, what the destination
//! did not take at once is kept aside until it does, and pipes come from a pool. A read that filled little of the
//! scratch buffer is one call for the read and one for the write, less than splicing costs; a direction that fills
//! it splices from then on, and copies again when a burst was small.
//!
//! The end of one direction is passed on as the end of the other side's input (half-close); a reset ends all, and so
//! does the end of what carries a tunnel.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use sampan_tls::Transport;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// The most that one read copies.
const SCRATCH: usize = 64 * 1024;
/// From this size on a burst counts as bulk.
const BULK: usize = 16 * 1024;
/// What a pipe holds.
const PIPE: usize = 256 * 1024;
/// How much one direction moves before the thread's other connections get their turn.
const TURN: usize = 1024 * 1024;
/// Pipes that a thread keeps for reuse.
const KEPT_PIPES: usize = 32;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// Which of the two connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The client's.
    Down,
    /// The upstream host's.
    Up,
}

/// One connection broke; without a failure both directions end by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Whose fault.
    pub(crate) side: Side,
    /// By a reset.
    pub(crate) reset: bool,
}

/// Is told of bytes as they are read.
pub(crate) trait Progress {
    /// So many bytes are on their way to that side.
    fn moved(&self, to: Side, bytes: usize);
}

/// A pipe with what was spliced into it.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    fn take() -> io::Result<Self> {
        if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // A user may have too many large pipes already; a small one works too.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE as i32));
        Ok(Self { read, write, held: 0 })
    }

    /// Back to the pool; one that still holds bytes of its connection is closed instead.
    fn give_back(self) {
        PIPES.with_borrow_mut(|pipes| {
            if self.held == 0 && pipes.len() < KEPT_PIPES {
                pipes.push(self);
            }
        });
    }

    fn poll_fill(&mut self, source: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(source.poll_read_ready(cx))?;
            let moved = source.try_io(Interest::READABLE, || transfer(source, &self.write, PIPE));
            match moved {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Ok(n) => {
                    self.held = n;
                    return Poll::Ready(Ok(n));
                }
                failed => return Poll::Ready(failed),
            }
        }
    }

    fn poll_empty(&mut self, destination: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(destination.poll_write_ready(cx))?;
            let moved =
                destination.try_io(Interest::WRITABLE, || transfer(&self.read, destination, self.held));
            match moved {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Ok(n) => {
                    self.held -= n;
                    return Poll::Ready(Ok(n));
                }
                failed => return Poll::Ready(failed),
            }
        }
    }
}

fn transfer(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, len, flags)?)
}

/// One direction.
struct Direction {
    to: Side,
    /// Read, but not yet taken by the destination.
    kept: Vec<u8>,
    kept_from: usize,
    pipe: Option<Pipe>,
    splicing: bool,
    /// Bytes since the source last ran dry.
    burst: usize,
    /// The destination (TLS) may hold bytes of ours.
    unflushed: bool,
    source_ended: bool,
    done: bool,
}

impl Drop for Direction {
    fn drop(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            pipe.give_back();
        }
    }
}

impl Direction {
    fn new(to: Side) -> Self {
        Self {
            to,
            kept: Vec::new(),
            kept_from: 0,
            pipe: None,
            splicing: false,
            burst: 0,
            unflushed: false,
            source_ended: false,
            done: false,
        }
    }

    fn source_broke(&self, e: &io::Error) -> Broken {
        let side = if self.to == Side::Up { Side::Down } else { Side::Up };
        Broken { side, reset: e.kind() == io::ErrorKind::ConnectionReset }
    }

    fn destination_broke(&self, e: &io::Error) -> Broken {
        Broken { side: self.to, reset: e.kind() == io::ErrorKind::ConnectionReset }
    }

    /// Moves what can be moved; ready when the direction has ended. `last`: the other one has ended before.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        (source, destination): (&mut Transport, &mut Transport),
        last: bool,
        progress: &dyn Progress,
    ) -> Poll<Result<(), Broken>> {
        if self.done {
            return Poll::Ready(Ok(()));
        }
        let mut turn = 0;
        loop {
            ready!(self.poll_out(cx, destination))?;
            if self.source_ended {
                // Whoever has the connections closes both now, which says the end as well; in TLS it does not.
                let said = last && destination.plain_tcp().is_some();
                let ended = if said { Ok(()) } else { ready!(Pin::new(destination).poll_shutdown(cx)) };
                // A peer that is gone already needs no end; its other direction will tell.
                if let Err(e) = ended
                    && e.kind() != io::ErrorKind::NotConnected
                {
                    return Poll::Ready(Err(self.destination_broke(&e)));
                }
                self.done = true;
                return Poll::Ready(Ok(()));
            }
            if turn >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.poll_in(cx, source, destination) {
                Poll::Ready(n) => {
                    let n = n?;
                    if n > 0 {
                        progress.moved(self.to, n);
                    }
                    turn += n;
                    self.burst += n;
                    self.source_ended = n == 0;
                }
                Poll::Pending => {
                    self.splicing &= self.burst >= BULK;
                    self.burst = 0;
                    if let Some(pipe) = self.pipe.take() {
                        pipe.give_back();
                    }
                    return self.poll_flush(cx, destination).map_ok(|()| ()).and_pending();
                }
            }
        }
    }

    /// Reads once; in copy mode also writes at once what can be written.
    fn poll_in(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Transport,
        destination: &mut Transport,
    ) -> Poll<Result<usize, Broken>> {
        if self.splicing
            && let Some(source) = source.plain_tcp()
        {
            let pipe = match &mut self.pipe {
                Some(pipe) => pipe,
                None => {
                    // Ask first: a pipe is taken only for bytes that are there.
                    ready!(source.poll_read_ready(cx)).map_err(|e| self.source_broke(&e))?;
                    match Pipe::take() {
                        Ok(pipe) => self.pipe.insert(pipe),
                        Err(_) => return self.poll_copy_no_pipe(cx),
                    }
                }
            };
            let filled = ready!(pipe.poll_fill(source, cx));
            return Poll::Ready(filled.map_err(|e| self.source_broke(&e)));
        }
        let plain = source.plain_tcp().is_some() && destination.plain_tcp().is_some();
        let n = ready!(BUFFER.with_borrow_mut(|buffer| self.poll_copy(cx, source, destination, buffer)))?;
        self.splicing = plain && self.burst + n >= BULK;
        Poll::Ready(Ok(n))
    }

    /// Out of descriptors: go on by copying.
    fn poll_copy_no_pipe(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Broken>> {
        self.splicing = false;
        self.burst = 0;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut Transport,
        destination: &mut Transport,
        buffer: &mut Vec<u8>,
    ) -> Poll<Result<usize, Broken>> {
        if buffer.is_empty() {
            buffer.resize(SCRATCH, 0);
        }
        let mut space = ReadBuf::new(buffer);
        ready!(Pin::new(source).poll_read(cx, &mut space)).map_err(|e| self.source_broke(&e))?;
        let data = space.filled();
        let mut written = 0;
        while written < data.len() {
            match Pin::new(&mut *destination).poll_write(cx, &data[written..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(Broken { side: self.to, reset: false })),
                Poll::Ready(Ok(n)) => written += n,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(self.destination_broke(&e))),
                Poll::Pending => break,
            }
        }
        self.unflushed |= written > 0 && destination.is_tls();
        if written < data.len() {
            self.kept.extend_from_slice(&data[written..]);
        }
        Poll::Ready(Ok(data.len()))
    }

    /// Writes what was kept aside or spliced in.
    fn poll_out(&mut self, cx: &mut Context<'_>, destination: &mut Transport) -> Poll<Result<(), Broken>> {
        while self.kept_from < self.kept.len() {
            let written = ready!(Pin::new(&mut *destination).poll_write(cx, &self.kept[self.kept_from..]));
            let n = written.map_err(|e| self.destination_broke(&e))?;
            if n == 0 {
                return Poll::Ready(Err(Broken { side: self.to, reset: false }));
            }
            self.kept_from += n;
            self.unflushed |= destination.is_tls();
        }
        if self.kept_from > 0 {
            self.kept = Vec::new();
            self.kept_from = 0;
        }
        let Some(pipe) = &mut self.pipe else { return Poll::Ready(Ok(())) };
        while pipe.held > 0 {
            // A pipe is filled only for a plain destination.
            let Some(tcp) = destination.plain_tcp() else { return Poll::Ready(Ok(())) };
            let moved = ready!(pipe.poll_empty(tcp, cx));
            if let Err(e) = moved {
                return Poll::Ready(Err(self.destination_broke(&e)));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>, destination: &mut Transport) -> Poll<Result<(), Broken>> {
        if self.unflushed {
            let flushed = ready!(Pin::new(destination).poll_flush(cx));
            flushed.map_err(|e| self.destination_broke(&e))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// A flush that is complete leaves the direction waiting for its source.
trait AndPending {
    fn and_pending(self) -> Self;
}

impl AndPending for Poll<Result<(), Broken>> {
    fn and_pending(self) -> Self {
        match self {
            Poll::Ready(Ok(())) => Poll::Pending,
            other => other,
        }
    }
}

/// Moves bytes both ways until both directions have ended; tells where the one that ended last went to. That end is left to
/// the caller, who closes both connections.
pub(crate) async fn relay(
    down: &mut Transport,
    up: &mut Transport,
    progress: &dyn Progress,
) -> Result<Side, Broken> {
    let mut to_up = Direction::new(Side::Up);
    let mut to_down = Direction::new(Side::Down);
    std::future::poll_fn(|cx| {
        let answered = to_down.done;
        let one = to_up.poll(cx, (down, up), answered, progress)?;
        let other = to_down.poll(cx, (up, down), one.is_ready(), progress)?;
        match (one, other) {
            (Poll::Ready(()), Poll::Ready(())) if answered => Poll::Ready(Ok(Side::Up)),
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(Side::Down)),
            // Nobody is there for what the client may still send.
            (Poll::Pending, Poll::Ready(())) if up.is_over() => Poll::Ready(Ok(Side::Down)),
            _ => Poll::Pending,
        }
    })
    .await
}

#[cfg(test)]
mod tests;
