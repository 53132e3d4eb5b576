//! The server's side of a connection: request heads in, responses out, one exchange at a time.
//!
//! The connection is shared by the one who reads the request's body and the one who writes the response; both
//! live on one worker, so sharing is an `Rc`.

mod accept;
mod hop;
mod options;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use sampan_core::header::HeaderMap;
use sampan_core::stream_info::Protocol;
use sampan_tls::Transport;

use super::decode::Decoder;
use super::encode::{self, Encoder, Shape};
use super::io::Io;
use super::parse::{self, Head, Limits};
use crate::body::{BodyError, BodyStream, Frame};
use crate::error::CodecError;

pub use options::{ServerOptions, UNDERSCORE, Underscores};

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    /// Pseudo headers first.
    pub headers: HeaderMap,
    /// HTTP/1.0 or 1.1.
    pub protocol: Protocol,
    /// Whether no body follows.
    pub end: bool,
    /// `connection: upgrade` with an `upgrade`, or CONNECT: what follows is a tunnel.
    pub upgrade: bool,
    /// Bytes of the head.
    pub bytes: usize,
    /// Those of its header lines, as Envoy counts them: a separator of two and a line end are three.
    pub header_bytes: usize,
    /// Headers dropped for an underscore.
    pub dropped_underscores: u32,
}

/// Why there is no (further) request.
#[derive(Debug)]
pub enum HeadError {
    /// The client broke the protocol: answer with the status, then close.
    Protocol(CodecError),
    /// The connection ended; inside a head when `true`.
    Closed(bool),
    /// The socket failed.
    Io(io::Error),
}

/// A connection; clones share it.
#[derive(Clone)]
pub struct ServerConnection(Rc<RefCell<Inner>>);

struct Inner {
    io: Io,
    options: Rc<ServerOptions>,
    limits: Limits,
    decoder: Decoder,
    encoder: Encoder,
    protocol: Protocol,
    head_request: bool,
    connect: bool,
    /// How far the inbox was searched for the end of a head.
    searched: usize,
    /// The client has half-closed or failed while a request was under way.
    gone: bool,
    /// [`ServerConnection::read_ahead`]
    read_ahead: bool,
    /// A request's body has broken the framing.
    malformed: bool,
    /// The size of a head that was read and then refused, and of its header lines.
    refused: (u64, u64),
}

/// The body of the request under way.
pub struct RequestBody(ServerConnection);

impl ServerConnection {
    /// A fresh connection.
    pub fn new(transport: Transport, options: Rc<ServerOptions>) -> Self {
        let limits = Limits {
            max_bytes: options.max_header_bytes,
            max_headers: options.max_headers,
            spelling: options.case.spelling(),
            allow_custom_methods: options.allow_custom_methods,
        };
        Self(Rc::new(RefCell::new(Inner {
            io: Io::new(transport),
            options,
            limits,
            decoder: Decoder::Done,
            encoder: Encoder::None,
            protocol: Protocol::Http11,
            head_request: false,
            connect: false,
            searched: 0,
            gone: false,
            read_ahead: false,
            malformed: false,
            refused: (0, 0),
        })))
    }

    /// Bytes that were read from the transport before the codec took over.
    pub fn unread(&self, bytes: &[u8]) {
        self.0.borrow_mut().io.inbox.extend_from_slice(bytes);
    }

    /// The next request's head. The one before must be over.
    pub fn poll_head(&self, cx: &mut Context<'_>) -> Poll<Result<RequestHead, HeadError>> {
        self.0.borrow_mut().poll_head(cx)
    }

    /// Whether bytes of a next request are here already.
    pub fn has_input(&self) -> bool {
        !self.0.borrow().io.inbox.is_empty()
    }

    /// The body of the request under way.
    pub fn body(&self) -> RequestBody {
        RequestBody(self.clone())
    }

    /// Whether the request under way was wholly read.
    pub fn request_done(&self) -> bool {
        let inner = self.0.borrow();
        inner.decoder.is_done() && !inner.malformed
    }

    /// Queues an informational head (100, 102, 103).
    pub fn send_informational(&self, status: u16, headers: &HeaderMap) {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        let shape = Shape {
            end: true,
            status: Some(status),
            head: false,
            bodiless: false,
            tunnel: true,
            http10: false,
        };
        encode::response(&mut inner.io, inner.protocol, headers, inner.options.case, shape);
    }

    /// Queues the response's head and tells the bytes of its header lines. `tunnel`: the response accepts an upgrade or
    /// CONNECT.
    pub fn send_head(&self, status: u16, headers: &HeaderMap, end: bool, tunnel: bool) -> usize {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        let http10 = inner.protocol == Protocol::Http10;
        let shape =
            Shape { end, status: Some(status), head: inner.head_request, bodiless: false, tunnel, http10 };
        let (encoder, bytes) =
            encode::response(&mut inner.io, inner.protocol, headers, inner.options.case, shape);
        inner.encoder = encoder;
        bytes
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        if inner.io.can_push() { Poll::Ready(Ok(())) } else { inner.io.poll_flush(cx) }
    }

    /// Queues a frame of the response's body, or its end.
    pub fn send_frame(&self, frame: Option<Frame>, end: bool) {
        let mut inner = self.0.borrow_mut();
        let inner = &mut *inner;
        inner.encoder.frame(&mut inner.io, frame, end, inner.options.enable_trailers);
    }

    /// Writes what is queued.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().io.poll_flush(cx)
    }

    /// Ends our direction.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().io.poll_shutdown(cx)
    }

    /// Ready once the client is gone while its request, already read, is being served. What it sends meanwhile
    /// (pipelined requests, the bytes of a tunnel) waits in the inbox, up to a head's limit.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.0.borrow_mut();
        if inner.gone {
            return Poll::Ready(());
        }
        let tunnel = inner.decoder == Decoder::Close;
        let ahead = !inner.decoder.is_done() && !tunnel;
        if ahead && !inner.read_ahead {
            return Poll::Pending;
        }
        while inner.io.inbox.len() <= inner.limits.max_bytes {
            match ready!(inner.io.poll_fill(cx)) {
                // Who reads the tunnel has found nothing yet.
                Ok(n) if n > 0 && (tunnel || ahead) => cx.waker().wake_by_ref(),
                Ok(n) if n > 0 => {}
                _ => {
                    inner.gone = true;
                    return Poll::Ready(());
                }
            }
        }
        Poll::Pending
    }

    /// Whether [`ServerConnection::poll_gone`] shall also look behind a body that nobody reads yet, as far as the limit
    /// of a head goes.
    pub fn read_ahead(&self, ahead: bool) {
        self.0.borrow_mut().read_ahead = ahead;
    }

    /// Whether the client was found to be gone, by [`ServerConnection::poll_gone`] or within its request's body.
    pub fn is_gone(&self) -> bool {
        self.0.borrow().gone
    }

    /// Whether a request's body broke the framing.
    pub fn is_malformed(&self) -> bool {
        self.0.borrow().malformed
    }

    /// Forgets the head that was refused and what came behind it; tells the bytes of all, and of the head's lines where
    /// it could be read.
    pub fn discard_input(&self) -> (u64, u64) {
        let mut inner = self.0.borrow_mut();
        let n = inner.io.inbox.len();
        inner.io.drop_inbox(n);
        (inner.refused.0 + n as u64, inner.refused.1)
    }

    /// Reads and drops what the client still sends; ready at its end. For a polite close.
    pub fn poll_discard(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.0.borrow_mut();
        loop {
            let n = inner.io.inbox.len();
            inner.io.drop_inbox(n);
            match ready!(inner.io.poll_fill(cx)) {
                Ok(n) if n > 0 => {}
                _ => return Poll::Ready(()),
            }
        }
    }

    /// Bytes read and written on the wire so far.
    pub fn wire_bytes(&self) -> (u64, u64) {
        let inner = self.0.borrow();
        (inner.io.bytes_in, inner.io.bytes_out)
    }

    /// The same without what was read ahead: where the current message stands.
    pub fn consumed_bytes(&self) -> (u64, u64) {
        let inner = self.0.borrow();
        (inner.io.bytes_in - inner.io.inbox.len() as u64, inner.io.bytes_out)
    }

    /// The transport and unread bytes, if nobody else holds the connection.
    pub fn into_parts(self) -> Option<(Transport, BytesMut)> {
        Rc::try_unwrap(self.0).ok().map(|inner| inner.into_inner().io.into_parts())
    }
}

impl Inner {
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<RequestHead, HeadError>> {
        loop {
            if self.io.inbox.is_empty() {
                self.searched = 0;
                let limits = self.limits;
                let read = ready!(self.io.poll_read_scratch(cx, |seen| read_head(seen, &limits)));
                match read.map_err(HeadError::Io)? {
                    None => return Poll::Ready(Err(HeadError::Closed(false))),
                    Some(Err(e)) => return Poll::Ready(Err(HeadError::Protocol(e))),
                    Some(Ok(Some(head))) => {
                        return Poll::Ready(self.accept(head).map_err(HeadError::Protocol));
                    }
                    Some(Ok(None)) => self.searched = self.io.inbox.len(),
                }
            } else if self.searched == 0
                || self.io.inbox.len() > self.limits.max_bytes
                || parse::head_may_be_complete(&self.io.inbox, self.searched)
            {
                let (used, result) = read_head(&self.io.inbox, &self.limits);
                self.searched = self.io.inbox.len();
                self.io.drop_inbox(used);
                if let Some(head) = result.map_err(HeadError::Protocol)? {
                    self.searched = 0;
                    return Poll::Ready(self.accept(head).map_err(HeadError::Protocol));
                }
                if !self.io.inbox.is_empty() && ready!(self.io.poll_fill(cx)).map_err(HeadError::Io)? == 0 {
                    return Poll::Ready(Err(HeadError::Closed(true)));
                }
            } else {
                self.searched = self.io.inbox.len();
                if ready!(self.io.poll_fill(cx)).map_err(HeadError::Io)? == 0 {
                    return Poll::Ready(Err(HeadError::Closed(true)));
                }
            }
        }
    }
}

/// Skips empty lines and parses; also how many bytes that took.
fn read_head(bytes: &[u8], limits: &Limits) -> (usize, Result<Option<Head>, CodecError>) {
    let skipped = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let result = parse::request(&bytes[skipped..], limits);
    let used = skipped + result.as_ref().ok().and_then(Option::as_ref).map_or(0, |head| head.len);
    (used, result)
}

impl BodyStream for RequestBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut inner = self.0.0.borrow_mut();
        let inner = &mut *inner;
        let trailers = inner.options.enable_trailers;
        let frame = ready!(inner.decoder.poll_frame(&mut inner.io, &inner.limits, trailers, cx));
        if let Some(Err(error)) = &frame {
            inner.gone |= matches!(error, BodyError::Reset(_));
            inner.malformed |= matches!(error, BodyError::Protocol(_));
        }
        Poll::Ready(frame)
    }

    fn is_end(&self) -> bool {
        self.0.request_done()
    }
}
