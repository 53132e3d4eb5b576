//! Remembers the first bytes of a handshake: one that begins like an HTTP request gets its own failure reason.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::Transport;

/// A transport whose first bytes are known.
pub(crate) struct Sniff {
    pub(crate) inner: Box<Transport>,
    first: [u8; 5],
    seen: usize,
}

impl Sniff {
    pub(crate) fn new(inner: Box<Transport>) -> Self {
        Self { inner, first: [0; 5], seen: 0 }
    }

    /// Whether the peer speaks HTTP; the methods that BoringSSL knows.
    pub(crate) fn is_http(&self) -> bool {
        let first = &self.first[..self.seen];
        [b"GET ".as_slice(), b"POST ", b"HEAD ", b"PUT "].iter().any(|method| first.starts_with(method))
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
        self.seen = (seen + buf.filled().len() - before).min(5);
        polled
    }
}

impl AsyncWrite for Sniff {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
