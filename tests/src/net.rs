//! A byte stream of any kind, read with a buffer and ended in the three ways TCP knows.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::timeout;

/// Plain TCP, a unix socket, or TLS from either side.
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
    /// The client's side of TLS.
    TlsClient(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    /// The server's side of TLS.
    TlsServer(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

macro_rules! each {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream {
            Stream::Tcp($inner) => $call,
            Stream::Unix($inner) => $call,
            Stream::TlsClient($inner) => $call,
            Stream::TlsServer($inner) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), s => Pin::new(s).poll_write(cx, buf))
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => Pin::new(s).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), s => Pin::new(s).poll_shutdown(cx))
    }
}

impl Stream {
    /// Connects to `unix:PATH` or an address, from `source` when given.
    pub async fn connect(to: &str, source: Option<&str>) -> io::Result<Stream> {
        if let Some(path) = to.strip_prefix("unix:") {
            // `@name` is the abstract namespace, written with a leading NUL.
            let path = path.strip_prefix('@').map_or(path.to_owned(), |name| format!("\0{name}"));
            return UnixStream::connect(path).await.map(Stream::Unix);
        }
        let invalid = |e: std::net::AddrParseError| io::Error::new(io::ErrorKind::InvalidInput, e);
        let to: SocketAddr = to.parse().map_err(invalid)?;
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = source {
            let source = if source.contains(':') { source.to_owned() } else { format!("{source}:0") };
            socket.bind(source.parse().map_err(invalid)?)?;
        }
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(Stream::Tcp(stream))
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(s) => Some(s),
            Stream::Unix(_) => None,
            Stream::TlsClient(s) => Some(s.get_ref().0),
            Stream::TlsServer(s) => Some(s.get_ref().0),
        }
    }

    /// Holds back what is written until a segment is full or the close follows.
    pub fn cork(&self) {
        if let Some(stream) = self.tcp() {
            let _ = socket2::SockRef::from(stream).set_tcp_cork(true);
        }
    }

    /// Makes the close that follows an RST.
    pub fn abort_on_close(&self) {
        if let Some(stream) = self.tcp() {
            // The peer may have gone already; then there is nothing to abort.
            let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The peer closed.
    Fin,
    /// The peer reset, or broke TLS off.
    Rst,
    /// It did not end in time.
    Open,
}

impl End {
    /// For the observation.
    pub fn name(self) -> &'static str {
        match self {
            End::Fin => "fin",
            End::Rst => "rst",
            End::Open => "open",
        }
    }
}

/// A stream and what was read from it ahead.
pub struct Wire {
    /// The stream.
    pub stream: Stream,
    /// Read, not used yet.
    pub buf: BytesMut,
    /// All that was ever read.
    pub seen: Vec<u8>,
    /// Set once the peer ended it.
    pub end: Option<End>,
}

impl Wire {
    /// Wraps a stream.
    pub fn new(stream: Stream) -> Wire {
        Wire { stream, buf: BytesMut::new(), seen: Vec::new(), end: None }
    }

    /// Reads once; false when the peer has ended it.
    pub async fn fill(&mut self) -> bool {
        if self.end.is_some() {
            return false;
        }
        let before = self.buf.len();
        match self.stream.read_buf(&mut self.buf).await {
            Ok(0) => self.end = Some(End::Fin),
            Ok(_) => {
                self.seen.extend_from_slice(&self.buf[before..]);
                return true;
            }
            // rustls reports a close without close_notify this way.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => self.end = Some(End::Fin),
            Err(_) => self.end = Some(End::Rst),
        }
        false
    }

    /// Reads until the peer ends it or the time is over.
    pub async fn drain(&mut self, limit: Duration) -> End {
        let _ = timeout(limit, async { while self.fill().await {} }).await;
        self.end.unwrap_or(End::Open)
    }

    /// Reads exactly `count` bytes, fewer at the end.
    pub async fn take(&mut self, count: usize) -> Vec<u8> {
        while self.buf.len() < count && self.fill().await {}
        let count = count.min(self.buf.len());
        self.buf.split_to(count).to_vec()
    }

    /// Reads up to and including the next line feed; `None` at the end.
    pub async fn line(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.buf.iter().position(|b| *b == b'\n') {
                return Some(self.buf.split_to(at + 1).to_vec());
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    /// Writes all; what happens to bytes the peer no longer wants shows in how the stream ends.
    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// Closes for writing.
    pub async fn half_close(&mut self) {
        let _ = self.stream.shutdown().await;
    }
}

/// Bytes as text, one character per byte, so that any byte survives a case file.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

/// The way back; a character beyond one byte becomes its UTF-8 bytes.
pub fn raw(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match u8::try_from(u32::from(c)) {
            Ok(byte) => bytes.push(byte),
            Err(_) => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// A body for the observation: long ones by their length.
pub fn shown(body: &[u8]) -> String {
    if body.len() > 600 { format!("<{} bytes>", body.len()) } else { text(body) }
}
