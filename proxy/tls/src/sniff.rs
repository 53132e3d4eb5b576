//! Remembers the first bytes of a handshake: one that begins like an HTTP request, or with a
//! version that is too old, gets its own failure reason. HTTP is answered with nothing, not with an alert.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::Transport;
use crate::failure::Opening;

/// A record's header, a handshake message's and the version in a ClientHello.
const LENGTH: usize = 11;

/// A transport whose first bytes are known.
pub(crate) struct Sniff {
    pub(crate) inner: Box<Transport>,
    first: [u8; LENGTH],
    seen: usize,
}

impl Sniff {
    pub(crate) fn new(inner: Box<Transport>) -> Self {
        Self { inner, first: [0; LENGTH], seen: 0 }
    }

    pub(crate) fn opening(&self) -> Opening {
        let first = &self.first[..self.seen];
        // The methods that BoringSSL knows.
        if [b"GET ".as_slice(), b"POST ", b"HEAD ", b"PUT "].iter().any(|method| first.starts_with(method)) {
            return Opening::Http;
        }
        match first {
            // Handshake record, ClientHello, its version.
            [0x16, _, _, _, _, 0x01, _, _, _, 3, minor] if *minor < 3 => Opening::Old,
            _ => Opening::Other,
        }
    }
}

impl AsyncRead for Sniff {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let seen = self.seen;
        for (slot, byte) in self.first[seen..].iter_mut().zip(&buf.filled()[before..]) {
            *slot = *byte;
        }
        self.seen = (seen + buf.filled().len() - before).min(LENGTH);
        polled
    }
}

impl AsyncWrite for Sniff {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.opening() == Opening::Http {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
