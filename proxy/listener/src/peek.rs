//! Looking at the first bytes of a connection without taking them.
//!
//! `MSG_PEEK` returns the same bytes again and again, so the wait is for *more* than was seen. The readiness that
//! tokio keeps comes from an edge-triggered event per arrival: a peek that saw nothing new reports `WouldBlock`,
//! which clears the readiness, and the next segment sets it again. Nothing spins, and a socket without news costs
//! nothing. The price: whoever gives up while the readiness is cleared but bytes are there must call [`rearm`].

use std::io;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv};
use sampan_tls::Transport;
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

const FIRST: usize = 4 * 1024;

/// Waits for more than `seen` bytes and puts all that are there, at most `max`, into `buffer` from its start.
/// 0: the peer has closed and nothing more will come.
pub(crate) async fn more(
    transport: &Transport,
    seen: usize,
    max: usize,
    buffer: &std::cell::RefCell<Vec<u8>>,
) -> io::Result<usize> {
    loop {
        let ready = readable(transport).await?;
        let looked = try_io(transport, || {
            let n = peek(transport, max, &mut buffer.borrow_mut())?;
            let news = n > seen || n == 0 || ready.is_read_closed();
            if news { Ok(if n > seen { n } else { 0 }) } else { Err(io::ErrorKind::WouldBlock.into()) }
        });
        match looked {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// Takes bytes off the socket that were peeked at before.
pub(crate) fn consume(
    transport: &Transport,
    n: usize,
    buffer: &std::cell::RefCell<Vec<u8>>,
) -> io::Result<()> {
    let mut buffer = buffer.borrow_mut();
    let mut left = n;
    while left > 0 {
        let taken = recv(raw_fd(transport)?, &mut buffer[..left], MsgFlags::MSG_DONTWAIT)?;
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= taken;
    }
    Ok(())
}

/// Registers the socket anew, so that bytes which are there already are reported to the next reader.
pub(crate) fn rearm(transport: Transport) -> io::Result<Transport> {
    Ok(match transport {
        Transport::Tcp(s) => Transport::Tcp(TcpStream::from_std(s.into_std()?)?),
        Transport::Unix(s) => Transport::Unix(UnixStream::from_std(s.into_std()?)?),
        tls => tls,
    })
}

/// Peeks; the buffer grows when it was too small for what is there.
fn peek(transport: &Transport, max: usize, buffer: &mut Vec<u8>) -> io::Result<usize> {
    if buffer.len() < FIRST {
        buffer.resize(FIRST, 0);
    }
    loop {
        let end = buffer.len().min(max);
        let n = recv(raw_fd(transport)?, &mut buffer[..end], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
        if n < end || end == max {
            return Ok(n);
        }
        buffer.resize(max, 0);
    }
}

async fn readable(transport: &Transport) -> io::Result<Ready> {
    match transport {
        Transport::Tcp(s) => s.ready(Interest::READABLE).await,
        Transport::Unix(s) => s.ready(Interest::READABLE).await,
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn try_io<R>(transport: &Transport, f: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    match transport {
        Transport::Tcp(s) => s.try_io(Interest::READABLE, f),
        Transport::Unix(s) => s.try_io(Interest::READABLE, f),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn raw_fd(transport: &Transport) -> io::Result<std::os::fd::RawFd> {
    match transport {
        Transport::Tcp(s) => Ok(s.as_raw_fd()),
        Transport::Unix(s) => Ok(s.as_raw_fd()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}
