//! The client's side of a connection: a request out, its response in, then perhaps the next.

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::BytesMut;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::Protocol;
use sampan_tls::Transport;

use super::decode::Decoder;
use super::encode::{self, Encoder, HeaderCase, Shape};
use super::io::Io;
use super::parse::{self, Framing, Head, Limits};
use crate::body::{BodyError, Frame};
use crate::error::{CodecError, ResetReason};

/// What a cluster's configuration says about HTTP/1.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Bytes of a response head.
    pub max_header_bytes: usize,
    /// Headers of a response head.
    pub max_headers: usize,
    /// `enable_trailers`
    pub enable_trailers: bool,
    /// Spelling of request header names.
    pub case: HeaderCase,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            max_header_bytes: 80 * 1024,
            max_headers: 100,
            enable_trailers: false,
            case: HeaderCase::Lower,
        }
    }
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// `:status` first.
    pub headers: HeaderMap,
    /// The status.
    pub status: u16,
    /// Whether no body follows.
    pub end: bool,
    /// The response accepts an upgrade or CONNECT: what follows is a tunnel.
    pub tunnel: bool,
}

/// A connection to an upstream.
pub struct ClientConnection {
    io: Io,
    options: Rc<ClientOptions>,
    limits: Limits,
    decoder: Decoder,
    encoder: Encoder,
    head_request: bool,
    connect: bool,
    upgrade: bool,
    searched: usize,
    request_sent: bool,
    response_begun: bool,
    keep_alive: bool,
    /// What follows is a tunnel: its end, however it comes, is the connection's.
    tunnel: bool,
    /// There is no HTTP at all: the peer's end is an end as any other.
    raw: bool,
    close_notified: bool,
    failed: bool,
    protocol_error: bool,
    /// Of the exchange under way: those of the header lines sent and received.
    header_bytes: (usize, usize),
}

/// The connection ended inside a message.
const CUT: BodyError = BodyError::Protocol(CodecError::parse("HPE_INVALID_EOF_STATE"));
const GONE: BodyError = BodyError::Reset(ResetReason::ConnectionTermination);

impl ClientConnection {
    /// A connection that is connected.
    pub fn new(transport: Transport, options: Rc<ClientOptions>) -> Self {
        let limits = Limits {
            max_bytes: options.max_header_bytes,
            max_headers: options.max_headers,
            spelling: options.case.spelling(),
            allow_custom_methods: false,
        };
        Self {
            io: Io::new(transport),
            options,
            limits,
            decoder: Decoder::Done,
            encoder: Encoder::None,
            head_request: false,
            connect: false,
            upgrade: false,
            searched: 0,
            request_sent: true,
            response_begun: false,
            keep_alive: true,
            tunnel: false,
            raw: false,
            close_notified: false,
            failed: false,
            protocol_error: false,
            header_bytes: (0, 0),
        }
    }

    /// Whether the connection may carry another exchange: the one before is over on both sides and neither side
    /// wants to close.
    pub fn is_reusable(&self) -> bool {
        self.keep_alive
            && !self.failed
            && self.request_sent
            && self.decoder.is_done()
            && self.response_begun
            && self.io.inbox.is_empty()
            && self.io.is_flushed()
            && !self.io.read_eof
    }

    /// For an idle connection: whether the peer has closed it or sent what nobody asked for. Costs no system call
    /// while no event was seen.
    pub fn is_stale(&mut self) -> bool {
        if self.io.inbox.is_empty() && self.io.is_quiet() {
            return false;
        }
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_stale(&mut cx).is_ready()
    }

    /// [`ClientConnection::is_stale`] to wait for.
    pub fn poll_stale(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.io.inbox.is_empty() {
            return Poll::Ready(());
        }
        self.io.poll_fill(cx).map(|_| ())
    }

    /// Whether the peer has closed or broken the connection.
    pub fn closed_by_peer(&self) -> bool {
        self.io.read_eof
    }

    /// Whether the peer broke the protocol, also by what it sent when nobody had asked. A 408 on an idle connection
    /// is how some peers say that they close it.
    pub fn broke_protocol(&self) -> bool {
        const TIMEOUT: [&[u8]; 2] = [b"HTTP/1.1 408", b"HTTP/1.0 408"];
        let idle = self.decoder.is_done() && self.request_sent && !self.failed;
        self.protocol_error
            || (idle && !self.io.inbox.is_empty() && !TIMEOUT.iter().any(|t| self.io.inbox.starts_with(t)))
    }

    /// Queues the request's head.
    pub fn send_head(&mut self, headers: &HeaderMap, end: bool) {
        let method = headers.get(HeaderId::METHOD).unwrap_or_default();
        self.connect = method == b"CONNECT";
        self.head_request = method == b"HEAD";
        self.upgrade = headers.contains(HeaderId::UPGRADE) && headers.lists(HeaderId::CONNECTION, "upgrade");
        if headers.lists(HeaderId::CONNECTION, "close") {
            self.keep_alive = false;
        }
        let shape = Shape {
            end,
            status: None,
            head: false,
            bodiless: matches!(method, b"GET" | b"HEAD" | b"DELETE" | b"TRACE" | b"CONNECT"),
            tunnel: self.connect || self.upgrade,
            http10: false,
        };
        (self.encoder, self.header_bytes.0) =
            encode::request(&mut self.io, headers, self.options.case, shape);
        self.header_bytes.1 = 0;
        self.request_sent = end;
        self.response_begun = false;
        self.searched = 0;
    }

    /// Makes the connection a tunnel without a request: what is sent and received are bytes. `first` goes first.
    pub fn open_raw(&mut self, first: &[u8]) {
        self.io.push_end(first);
        self.encoder = Encoder::Raw;
        self.decoder = Decoder::Close;
        (self.tunnel, self.raw, self.keep_alive, self.request_sent) = (true, true, false, false);
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.io.can_push() { Poll::Ready(Ok(())) } else { self.poll_flush(cx) }
    }

    /// Queues a frame of the request's body, or its end.
    pub fn send_frame(&mut self, frame: Option<Frame>, end: bool) {
        self.request_sent |= end || matches!(frame, Some(Frame::Trailers(_)));
        self.encoder.frame(&mut self.io, frame, end, self.options.enable_trailers);
    }

    /// Writes what is queued.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(self.io.poll_flush(cx));
        self.failed |= flushed.is_err();
        Poll::Ready(flushed)
    }

    /// Ends our direction (a tunnel's half-close).
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.poll_shutdown(cx)
    }

    /// The next head: informational ones first, each by itself.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, BodyError>> {
        let result = ready!(self.poll_head_inner(cx));
        self.note(result.as_ref().err());
        Poll::Ready(result)
    }

    fn note(&mut self, error: Option<&BodyError>) {
        self.failed |= error.is_some();
        self.protocol_error |= matches!(error, Some(BodyError::Protocol(_)));
    }

    fn poll_head_inner(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, BodyError>> {
        loop {
            if self.io.inbox.is_empty() {
                self.searched = 0;
                let limits = self.limits;
                let read = ready!(self.io.poll_read_scratch(cx, |seen| read_head(seen, &limits)));
                match read {
                    Err(_) | Ok(None) => return Poll::Ready(Err(GONE)),
                    Ok(Some(Err(e))) => return Poll::Ready(Err(BodyError::Protocol(e))),
                    Ok(Some(Ok(Some(head)))) => return Poll::Ready(self.accept(head)),
                    Ok(Some(Ok(None))) => {}
                }
            } else if self.searched == 0 || parse::head_may_be_complete(&self.io.inbox, self.searched) {
                let (used, result) = read_head(&self.io.inbox, &self.limits);
                self.searched = self.io.inbox.len();
                self.io.drop_inbox(used);
                if let Some(head) = result.map_err(BodyError::Protocol)? {
                    self.searched = 0;
                    return Poll::Ready(self.accept(head));
                }
                if !matches!(ready!(self.io.poll_fill(cx)), Ok(1..)) {
                    return Poll::Ready(Err(CUT));
                }
            } else {
                if self.io.inbox.len() > self.limits.max_bytes + 4096 {
                    return Poll::Ready(Err(BodyError::Protocol(parse::TOO_LARGE)));
                }
                self.searched = self.io.inbox.len();
                if !matches!(ready!(self.io.poll_fill(cx)), Ok(1..)) {
                    return Poll::Ready(Err(CUT));
                }
            }
        }
    }

    fn accept(&mut self, head: Head) -> Result<ResponseHead, BodyError> {
        self.header_bytes.1 += head.header_bytes();
        let Head { mut headers, protocol, status, .. } = head;
        let protocol_error = |details, message| BodyError::Protocol(CodecError::bad(details, message));
        let no_content = status < 200 || status == 204;
        if no_content && headers.contains(HeaderId::TRANSFER_ENCODING) {
            return Err(protocol_error(
                "http1.transfer_encoding_not_allowed",
                "transfer encoding not allowed in 1xx or 204",
            ));
        }
        if no_content && headers.contains(HeaderId::CONTENT_LENGTH) {
            if headers.get(HeaderId::CONTENT_LENGTH) != Some(b"0") {
                return Err(protocol_error(
                    "http1.content_length_not_allowed",
                    "content length not allowed in 1xx or 204",
                ));
            }
            headers.remove(HeaderId::CONTENT_LENGTH);
        }
        let upgraded = self.upgrade
            && headers.contains(HeaderId::UPGRADE)
            && headers.lists(HeaderId::CONNECTION, "upgrade");
        let framing = parse::framing(&mut headers, false, false).map_err(BodyError::Protocol)?;
        if (100..200).contains(&status) && status != 101 {
            return Ok(ResponseHead { headers, status, end: true, tunnel: false });
        }
        // An upgrade is accepted by its headers, whatever the status says: what comes behind such a head has no
        // framing. Without them a 101 is a response without a body.
        self.tunnel = upgraded || (self.connect && (200..300).contains(&status));
        self.response_begun = true;
        self.close_notified = wants_close(protocol, &headers);
        self.keep_alive &= !self.close_notified && !self.tunnel;
        self.decoder = if self.tunnel {
            Decoder::Close
        } else if self.head_request || no_content || status == 304 {
            Decoder::Done
        } else {
            let framing = framing.unwrap_or(Framing::Close);
            self.keep_alive &= framing != Framing::Close;
            framing.into()
        };
        Ok(ResponseHead { headers, status, end: self.decoder.is_done(), tunnel: self.tunnel })
    }

    /// The next frame of the response's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let until_close = self.decoder == Decoder::Close;
        let frame =
            ready!(self.decoder.poll_frame(&mut self.io, &self.limits, self.options.enable_trailers, cx));
        let frame = match frame {
            None if self.tunnel && !self.raw => Some(Err(GONE)),
            Some(Err(BodyError::Reset(_))) if self.tunnel => Some(Err(GONE)),
            // A reset ends such a body as well as a close does, as in Envoy.
            Some(Err(BodyError::Reset(_))) if until_close => None,
            Some(Err(BodyError::Reset(_))) => Some(Err(CUT)),
            frame => frame,
        };
        self.note(frame.as_ref().and_then(|f| f.as_ref().err()));
        Poll::Ready(frame)
    }

    /// Whether the response was wholly read.
    pub fn response_done(&self) -> bool {
        self.response_begun && self.decoder.is_done()
    }

    /// Bytes of the header lines of the exchange under way as Envoy counts them, sent and received.
    pub fn header_bytes(&self) -> (u64, u64) {
        (self.header_bytes.0 as u64, self.header_bytes.1 as u64)
    }

    /// Whether the request was a CONNECT.
    pub fn is_connect(&self) -> bool {
        self.connect
    }

    /// Whether the request was wholly queued.
    pub fn request_sent(&self) -> bool {
        self.request_sent
    }

    /// Whether the response asked to close the connection.
    pub fn close_notified(&self) -> bool {
        self.close_notified
    }

    /// Whether any byte of the response has come.
    pub fn response_begun(&self) -> bool {
        self.response_begun || !self.io.inbox.is_empty()
    }

    /// Bytes read and written on the wire so far.
    pub fn wire_bytes(&self) -> (u64, u64) {
        (self.io.bytes_in, self.io.bytes_out)
    }

    /// The transport below.
    pub fn transport(&self) -> &Transport {
        self.io.transport()
    }

    /// The transport and unread bytes.
    pub fn into_parts(self) -> (Transport, BytesMut) {
        self.io.into_parts()
    }
}

fn read_head(bytes: &[u8], limits: &Limits) -> (usize, Result<Option<Head>, CodecError>) {
    let result = parse::response(bytes, limits);
    (result.as_ref().ok().and_then(Option::as_ref).map_or(0, |head| head.len), result)
}

fn wants_close(protocol: Protocol, headers: &HeaderMap) -> bool {
    (protocol == Protocol::Http10 && !headers.lists(HeaderId::CONNECTION, "keep-alive"))
        || headers.lists(HeaderId::CONNECTION, "close")
        || headers.lists(HeaderId::PROXY_CONNECTION, "close")
}
