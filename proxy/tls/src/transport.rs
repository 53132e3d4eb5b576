//! The byte stream under every codec: plain or TLS, over TCP or a unix socket.
//!
//! One enum instead of a boxed trait: a connection's reads and writes are a jump table away, and `tcp_proxy` can
//! take the plain sockets out for `splice(2)`.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use sampan_core::peer::{Exchange, PeerCell, PeerExchange};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use tokio_rustls::{client, server};

use crate::gate::{self, Gated};
use crate::paced::Paced;
use crate::tap::{Tap, Tapped};

/// A byte stream within another protocol.
pub trait Tunnel: AsyncRead + AsyncWrite + Unpin {
    /// Whether what carries it is gone. What is read then is its end, what is written is lost.
    fn is_over(&self) -> bool;
}

/// A connected byte stream.
pub enum Transport {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A unix domain socket.
    Unix(UnixStream),
    /// TLS that we ended, as the server.
    TlsServer(Box<server::TlsStream<Box<Transport>>>),
    /// TLS that we began, as the client.
    TlsClient(Box<client::TlsStream<Box<Transport>>>),
    /// Istio's TCP metadata exchange above one of the others.
    Exchange(Box<PeerExchange<Transport>>),
    /// A client that has to be allowed first.
    Gated(Box<Gated>),
    /// One of the others with somebody who looks at its bytes.
    Tapped(Box<Tapped>),
    /// Plain TCP that is read seldom.
    Paced(Box<Paced>),
    /// A stream of another protocol.
    Tunnel(Box<dyn Tunnel>),
    /// Nothing: the stream was taken out.
    Taken,
}

macro_rules! each {
    ($self:expr, $stream:ident => $body:expr) => {
        match $self.get_mut() {
            Transport::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
            Transport::Unix($stream) => {
                let $stream = Pin::new($stream);
                $body
            }
            Transport::TlsServer($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::TlsClient($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::Exchange($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::Gated($stream) => {
                let $stream = Pin::new(&mut $stream.inner);
                $body
            }
            Transport::Tapped($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::Paced($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::Tunnel($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $body
            }
            Transport::Taken => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Self::Gated(gated) = this {
            return gated.poll_read(cx, buf);
        }
        let whole = Pin::new(this);
        // A peer that closes without close_notify has closed: HTTP's framing tells whether something is missing.
        match each!(whole, s => s.poll_read(cx, buf)) {
            Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
            polled => polled,
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, s => s.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, s => s.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => s.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => s.poll_shutdown(cx))
    }
}

impl Transport {
    /// The plain TCP socket below, if there is one and no TLS above it.
    pub fn plain_tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(s) => Some(s),
            Self::Gated(s) if s.is_open() => s.inner.plain_tcp(),
            _ => None,
        }
    }

    /// The TCP socket at the bottom, below TLS too.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(s) => Some(s),
            Self::Unix(_) => None,
            Self::TlsServer(s) => s.get_ref().0.tcp(),
            Self::TlsClient(s) => s.get_ref().0.tcp(),
            Self::Exchange(s) => s.inner().tcp(),
            Self::Tapped(s) => s.inner().tcp(),
            Self::Gated(s) => s.inner.tcp(),
            Self::Paced(s) => Some(s.tcp()),
            Self::Tunnel(_) | Self::Taken => None,
        }
    }

    /// Whether reads and writes pass through TLS.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::TlsServer(_) | Self::TlsClient(_) => true,
            Self::Exchange(s) => s.inner().is_tls(),
            Self::Tapped(s) => s.inner().is_tls(),
            Self::Gated(s) => s.inner.is_tls(),
            Self::Tcp(_) | Self::Unix(_) | Self::Paced(_) | Self::Tunnel(_) | Self::Taken => false,
        }
    }

    /// Whether this is a tunnel that is over in both directions.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Tunnel(tunnel) if tunnel.is_over())
    }

    /// Lets nothing of the peer's pass until the answer is yes; `ask` is called with its first byte.
    pub fn close_until(&mut self, ask: gate::Ask) {
        let inner = std::mem::replace(self, Self::Taken);
        *self = Self::Gated(Box::new(Gated::new(inner, ask)));
    }

    /// Lets somebody look at what passes from now on.
    pub fn tap(&mut self, tap: Box<dyn Tap>) {
        let inner = std::mem::replace(self, Self::Taken);
        *self = Self::Tapped(Box::new(Tapped::new(inner, tap)));
    }

    /// From now on a peer that sends little very often is read seldom ([`Paced`]). Only plain TCP can be.
    pub fn pace(&mut self) {
        *self = match std::mem::replace(self, Self::Taken) {
            Self::Tcp(tcp) => Self::Paced(Box::new(Paced::new(tcp))),
            other => other,
        };
    }

    /// Begins Istio's metadata exchange on it, if ALPN has agreed on that.
    pub fn exchange(&mut self, exchange: &Arc<Exchange>, alpn: Option<&str>) -> Rc<PeerCell> {
        let (begun, cell) = exchange.begin(std::mem::replace(self, Self::Taken), alpn);
        *self = begun.map_or_else(|same| same, |begun| Self::Exchange(Box::new(begun)));
        cell
    }
}
