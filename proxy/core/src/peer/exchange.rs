//! TCP metadata exchange: what Istio's proxies tell each other of themselves before the first byte of the application.
//!
//! ```text
//!   magic 0x3D230467 | length | Any(Struct{x-envoy-peer-metadata, x-envoy-peer-metadata-id})     both big-endian u32
//! ```
//!
//! Only where ALPN has agreed on the configured protocol (`istio-peer-exchange`). Each side sends its own with its
//! first write, or as soon as it has read something, and takes the other's off the front of what it reads; neither
//! direction waits for the other, so protocols in which the server speaks first work. A peer that begins with
//! something else is passed on as it is. The end of the stream before the whole header passes on what there was.
//!
//! A length beyond [`LIMIT`] breaks the connection; Istio's proxy would wait for all of it.
//!
//! Source: `source/extensions/filters/network/metadata_exchange` of istio/proxy.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use envoy_types::pb::google::protobuf::{Any, Struct, value::Kind};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Peer, SharedPeer, wire};
use crate::stats::{Counter, Scope};

const MAGIC: u32 = 0x3D23_0467;
/// The most that a peer may have to say.
const LIMIT: usize = 1024 * 1024;

/// `metadata_exchange.*`
#[derive(Clone)]
pub struct ExchangeStats {
    alpn_protocol_found: Counter,
    alpn_protocol_not_found: Counter,
    initial_header_not_found: Counter,
    header_not_found: Counter,
    metadata_added: Counter,
}

impl ExchangeStats {
    /// Below the scope without a prefix.
    pub fn new(root: &Scope) -> Self {
        let scope = root.scope("metadata_exchange");
        Self {
            alpn_protocol_found: scope.counter("alpn_protocol_found"),
            alpn_protocol_not_found: scope.counter("alpn_protocol_not_found"),
            initial_header_not_found: scope.counter("initial_header_not_found"),
            header_not_found: scope.counter("header_not_found"),
            metadata_added: scope.counter("metadata_added"),
        }
    }
}

/// One filter's side of the exchange, shared by all its connections.
pub struct Exchange {
    protocol: Box<str>,
    additional: Vec<String>,
    hello: Box<[u8]>,
    stats: ExchangeStats,
}

impl Exchange {
    /// With what we tell of ourselves, our node's id and the labels to keep of what peers tell.
    pub fn new(protocol: &str, own: &Peer, id: &str, additional: Vec<String>, stats: ExchangeStats) -> Self {
        let any = wire::put_exchange(&own.encode(), id);
        let mut hello = Vec::with_capacity(any.len() + 8);
        hello.extend_from_slice(&MAGIC.to_be_bytes());
        hello.extend_from_slice(&u32::try_from(any.len()).unwrap_or_default().to_be_bytes());
        hello.extend_from_slice(&any);
        Self { protocol: protocol.into(), additional, hello: hello.into(), stats }
    }

    /// Begins the exchange on a connection if ALPN agreed on it; otherwise the outcome is known at once.
    pub fn begin<S>(
        self: &Arc<Self>,
        stream: S,
        alpn: Option<&str>,
    ) -> (Result<PeerExchange<S>, S>, Rc<PeerCell>) {
        if alpn.is_none_or(|alpn| alpn != &*self.protocol) {
            self.stats.alpn_protocol_not_found.inc();
            return (Err(stream), Rc::new(PeerCell(RefCell::new(Outcome::NotFound))));
        }
        self.stats.alpn_protocol_found.inc();
        let cell = Rc::new(PeerCell::default());
        let exchange = PeerExchange {
            inner: stream,
            config: self.clone(),
            unsent: Some(0),
            held: Vec::new(),
            state: State::Header,
            cell: cell.clone(),
        };
        (Ok(exchange), cell)
    }
}

/// What has come of the exchange so far.
#[derive(Debug, Clone, Default)]
pub enum Outcome {
    /// Nothing yet.
    #[default]
    Pending,
    /// The peer has told.
    Found(Rc<SharedPeer>),
    /// It does not take part.
    NotFound,
}

/// Where a connection's exchange leaves its outcome for others.
#[derive(Debug, Default)]
pub struct PeerCell(RefCell<Outcome>);

impl PeerCell {
    /// The outcome so far.
    pub fn outcome(&self) -> Outcome {
        self.0.borrow().clone()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Magic and length are awaited.
    Header,
    /// So many bytes are awaited.
    Body(usize),
    /// Everything goes through.
    Done,
}

/// A stream that exchanges metadata on its way.
pub struct PeerExchange<S> {
    inner: S,
    config: Arc<Exchange>,
    /// How much of our own was sent; none once all was.
    unsent: Option<usize>,
    /// What was read and is not the application's yet.
    held: Vec<u8>,
    state: State,
    cell: Rc<PeerCell>,
}

impl<S> PeerExchange<S> {
    /// The stream below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Looks at what was read so far.
    fn advance(&mut self) -> io::Result<()> {
        if self.state == State::Header {
            let Some((magic, length)) = header(&self.held) else {
                self.config.stats.initial_header_not_found.inc();
                return Ok(());
            };
            if magic != MAGIC {
                self.config.stats.initial_header_not_found.inc();
                self.pass_through();
                return Ok(());
            }
            if length > LIMIT {
                let text = "a peer's metadata is longer than 1 MiB";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.held.drain(..8);
            self.state = State::Body(length);
        }
        if let State::Body(length) = self.state
            && self.held.len() >= length
        {
            match Any::decode(&self.held[..length]) {
                Err(_) => {
                    self.config.stats.header_not_found.inc();
                    self.pass_through();
                }
                Ok(any) => {
                    self.held.drain(..length);
                    self.state = State::Done;
                    self.take(&any);
                }
            }
        }
        Ok(())
    }

    fn pass_through(&mut self) {
        self.state = State::Done;
        *self.cell.0.borrow_mut() = Outcome::NotFound;
    }

    /// A `Struct` without the peer's key leaves the outcome open, as in Istio.
    fn take(&self, any: &Any) {
        let metadata = Struct::decode(any.value.as_slice()).unwrap_or_default();
        let value = metadata.fields.get("x-envoy-peer-metadata").and_then(|v| v.kind.as_ref());
        if let Some(Kind::StructValue(peer)) = value {
            let peer = Peer::from_struct(peer, &self.config.additional, None);
            *self.cell.0.borrow_mut() = Outcome::Found(SharedPeer::new(peer));
        }
    }
}

/// Magic and length.
fn header(bytes: &[u8]) -> Option<(u32, usize)> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let length = rest.first_chunk::<4>()?;
    Some((u32::from_be_bytes(*magic), u32::from_be_bytes(*length) as usize))
}

impl<S: AsyncWrite + Unpin> PeerExchange<S> {
    /// Sends our own, if it was not yet.
    fn poll_hello(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(sent) = self.unsent {
            if sent == 0 {
                self.config.stats.metadata_added.inc();
            }
            let rest = &self.config.hello[sent..];
            if rest.is_empty() {
                self.unsent = None;
                break;
            }
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, rest))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent = Some(sent + n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for PeerExchange<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.state != State::Done {
            let mut space = [0; 2048];
            let mut chunk = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                this.state = State::Done;
                break;
            }
            this.held.extend_from_slice(chunk.filled());
            if let Poll::Ready(sent) = this.poll_hello(cx) {
                sent?;
                // What is not flushed now is with the next write.
                if let Poll::Ready(flushed) = Pin::new(&mut this.inner).poll_flush(cx) {
                    flushed?;
                }
            }
            this.advance()?;
        }
        if this.held.is_empty() {
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        }
        let n = this.held.len().min(buf.remaining());
        buf.put_slice(&this.held[..n]);
        this.held.drain(..n);
        if this.held.is_empty() {
            this.held = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for PeerExchange<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_hello(cx))?;
        Pin::new(&mut this.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_hello(cx))?;
        Pin::new(&mut this.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
