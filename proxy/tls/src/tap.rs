//! A stream whose bytes somebody looks at on their way, without holding them back.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::Transport;

/// Who looks.
pub trait Tap {
    /// Bytes that the peer sent.
    fn read(&mut self, bytes: &[u8]);
    /// Bytes that the peer was sent.
    fn written(&mut self, bytes: &[u8]);
    /// The peer sends no more.
    fn ended(&mut self);
}

/// The stream and its observer.
pub struct Tapped {
    inner: Transport,
    tap: Box<dyn Tap>,
}

impl Tapped {
    pub(crate) fn new(inner: Transport, tap: Box<dyn Tap>) -> Self {
        Self { inner, tap }
    }

    pub(crate) fn inner(&self) -> &Transport {
        &self.inner
    }
}

impl AsyncRead for Tapped {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let room = buf.remaining() > 0;
        let result = ready!(Pin::new(&mut this.inner).poll_read(cx, buf));
        match &buf.filled()[before..] {
            [] if room => this.tap.ended(),
            bytes => this.tap.read(bytes),
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Tapped {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.inner).poll_write(cx, buf))?;
        this.tap.written(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
