//! The client's side: many streams over one connection.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{Method, Request, Uri};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_tls::Transport;

use super::convert::{self, HeadLimits, Receive};
use super::guard::{FrameGuard, Link};
use super::keepalive::Keepalive;
use super::wire::Meter;
use super::{CodecStats, Options};
use crate::body::{BodyError, BodyStream, Frame};
use crate::error::ResetReason;
use crate::h1::ResponseHead;

/// A handle to a connection; streams are opened on clones.
#[derive(Clone)]
pub struct ClientConnection {
    send: SendRequest<Bytes>,
    limits: HeadLimits,
    link: Rc<Link>,
}

/// One exchange. Its meter goes with it.
pub struct ClientStream {
    response: ResponseFuture,
    send: SendStream<Bytes>,
    receive: Option<Receive>,
    sent: bool,
    limits: HeadLimits,
    informational_done: bool,
    tunnel: Tunnel,
    malformed: bool,
    link: Rc<Link>,
}

/// What the request asked for besides an answer.
enum Tunnel {
    No,
    Connect,
    /// An upgrade of HTTP/1, sent as extended CONNECT (RFC 8441): what to.
    Upgrade(Box<[u8]>),
}

/// Drives a connection to its end; without it being polled nothing moves.
pub struct Driver {
    connection: h2::client::Connection<FrameGuard, Bytes>,
    link: Rc<Link>,
    keepalive: Option<Keepalive>,
    opened: u64,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverEnd {
    /// Nobody wanted it any more.
    Done,
    /// The peer left.
    Peer,
    /// The peer broke the protocol or a limit.
    Protocol,
    /// The peer does not answer pings.
    KeepaliveTimeout,
}

/// Exchanges settings.
pub async fn connect(
    transport: Transport,
    options: &Options,
    stats: &Arc<CodecStats>,
    random: u64,
) -> Result<(ClientConnection, Driver), h2::Error> {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(options.stream_window)
        .initial_connection_window_size(options.connection_window)
        .header_table_size(options.header_table_size)
        .max_header_list_size(options.decoded_list())
        // Until the peer's settings are there it takes what we are ready to send.
        .initial_max_send_streams(options.max_concurrent_streams as usize)
        .enable_push(false);
    if options.max_frame_size > 0 {
        builder.max_frame_size(options.max_frame_size);
    }
    stats.nghttp2_upstream_connections.inc();
    let link = Link::new(transport, options.wire(stats, false), false);
    let (send, mut connection) = builder.handshake(FrameGuard(link.clone())).await?;
    link.gather();
    let keepalive = options.keepalive.and_then(|k| Some(Keepalive::new(k, connection.ping_pong()?, random)));
    let driver = Driver { connection, link: link.clone(), keepalive, opened: 0 };
    Ok((ClientConnection { send, limits: options.head_limits(), link }, driver))
}

impl Future for Driver {
    type Output = DriverEnd;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<DriverEnd> {
        let this = &mut *self;
        match Pin::new(&mut this.connection).poll(cx) {
            Poll::Ready(Ok(())) if this.link.wire.is_cut_off() => return Poll::Ready(DriverEnd::Peer),
            Poll::Ready(Ok(())) => return Poll::Ready(DriverEnd::Done),
            // The streams that a GOAWAY allows have ended, whatever its code.
            Poll::Ready(Err(e)) if e.is_go_away() && e.is_remote() && !this.link.wire.is_cut_off() => {
                return Poll::Ready(DriverEnd::Done);
            }
            Poll::Ready(Err(e)) if e.is_library() => return Poll::Ready(DriverEnd::Protocol),
            Poll::Ready(Err(_)) => return Poll::Ready(DriverEnd::Peer),
            Poll::Pending => {}
        }
        let wire = &this.link.wire;
        if wire.flood().is_some() {
            return Poll::Ready(DriverEnd::Protocol);
        }
        if let Some(keepalive) = &mut this.keepalive {
            let opened = wire.opened();
            let fresh = std::mem::replace(&mut this.opened, opened) != opened;
            if keepalive.poll(cx, wire.frames_received(), fresh).is_ready() {
                wire.stats().keepalive_timeout.inc();
                return Poll::Ready(DriverEnd::KeepaliveTimeout);
            }
        }
        match this.link.poll_flush(cx) {
            Poll::Ready(Err(_)) => Poll::Ready(DriverEnd::Peer),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    }
}

impl Driver {
    /// Bytes read and written.
    pub fn wire_bytes(&self) -> (u64, u64) {
        self.link.bytes()
    }

    /// Whether the peer has sent GOAWAY.
    pub fn is_told_to_go(&self) -> bool {
        self.link.wire.is_told_to_go()
    }
}

impl ClientConnection {
    /// Ready when the peer's stream limit allows another stream; an error when the connection takes no more.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        self.send.poll_ready(cx).map_err(|e| convert::reset_reason(&e))
    }

    /// How many streams the peer allows at once.
    pub fn max_streams(&self) -> usize {
        self.send.current_max_send_streams()
    }

    /// Whether the peer offers extended CONNECT.
    pub fn extended_connect(&self) -> bool {
        self.send.is_extended_connect_protocol_enabled()
    }

    /// Opens a stream with the request's head. An upgrade becomes extended CONNECT, and the 200 that accepts it a 101
    /// with an upgrade's headers, so that nobody else need know. Whether the peer offers extended CONNECT is not
    /// asked, as in Envoy: one that does not refuses it.
    pub fn start(&mut self, headers: &HeaderMap, end: bool) -> Result<ClientStream, ResetReason> {
        let upgrade = upgrade(headers);
        let request = request(headers, upgrade).ok_or(ResetReason::ProtocolError)?;
        let tunnel = match upgrade {
            Some(to) => Tunnel::Upgrade(to.as_bytes().into()),
            None if request.method() == Method::CONNECT => Tunnel::Connect,
            None => Tunnel::No,
        };
        let (response, send) = self.send.send_request(request, end).map_err(|e| convert::reset_reason(&e))?;
        self.link.wire.open(send.stream_id().as_u32());
        Ok(ClientStream {
            response,
            send,
            receive: None,
            sent: end,
            limits: self.limits,
            informational_done: false,
            tunnel,
            malformed: false,
            link: self.link.clone(),
        })
    }
}

/// What an HTTP/1 request wants to upgrade to.
fn upgrade(headers: &HeaderMap) -> Option<&str> {
    let to = headers.get_str(HeaderId::UPGRADE)?;
    headers.lists(HeaderId::CONNECTION, "upgrade").then_some(to)
}

/// The crate takes the pseudo headers apart from a URI; scheme and authority are needed beside the path.
fn request(headers: &HeaderMap, upgrade: Option<&str>) -> Option<Request<()>> {
    let method = match upgrade {
        Some(_) => Method::CONNECT,
        None => Method::from_bytes(headers.get(HeaderId::METHOD)?).ok()?,
    };
    let authority = headers.get(HeaderId::AUTHORITY).unwrap_or_default();
    let protocol = upgrade.or_else(|| headers.get_str(HeaderId::PSEUDO_PROTOCOL));
    let mut uri = http::uri::Parts::default();
    if !authority.is_empty() {
        uri.authority = Some(authority.try_into().ok()?);
    }
    if method != Method::CONNECT || protocol.is_some() {
        let path = headers.get(HeaderId::PATH)?;
        uri.path_and_query = Some(path.try_into().ok()?);
        if uri.authority.is_some() {
            let scheme = headers.get(HeaderId::SCHEME).unwrap_or(b"http");
            uri.scheme = Some(scheme.try_into().ok()?);
        }
    }
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = Uri::from_parts(uri).ok()?;
    if let Some(protocol) = protocol {
        request.extensions_mut().insert(h2::ext::Protocol::from(protocol));
    }
    if upgrade.is_some() && headers.get(HeaderId::CONTENT_LENGTH) == Some(b"0") {
        let mut headers = headers.clone();
        headers.remove(HeaderId::CONTENT_LENGTH);
        convert::give_headers(&headers, request.headers_mut());
    } else {
        convert::give_headers(headers, request.headers_mut());
    }
    Some(request)
}

impl ClientStream {
    /// The next head: informational ones first, each by itself.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, BodyError>> {
        if !self.informational_done {
            match self.response.poll_informational(cx) {
                Poll::Ready(Some(Ok(informational))) => {
                    let (parts, ()) = informational.into_parts();
                    return Poll::Ready(self.head(parts.status, &parts.headers, true));
                }
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(self.reset_by(&e))),
                Poll::Ready(None) => self.informational_done = true,
                Poll::Pending => {}
            }
        }
        let response = ready!(Pin::new(&mut self.response).poll(cx)).map_err(|e| self.reset_by(&e))?;
        let (parts, body) = response.into_parts();
        let end = body.is_end_stream();
        self.receive = Some(Receive::new(body, self.limits, self.link.clone()));
        Poll::Ready(self.head(parts.status, &parts.headers, end))
    }

    /// Why there is no head.
    fn reset_by(&mut self, error: &h2::Error) -> BodyError {
        if error.is_reset() && error.is_library() {
            self.link.wire.note_malformed(self.send.stream_id().as_u32());
            self.malformed = true;
        }
        BodyError::Reset(convert::reset_reason(error))
    }

    /// Whether it was the response's head that was wrong, and not the connection.
    pub fn is_malformed(&self) -> bool {
        self.malformed
    }

    fn head(
        &mut self,
        status: http::StatusCode,
        from: &http::HeaderMap,
        end: bool,
    ) -> Result<ResponseHead, BodyError> {
        let mut headers = HeaderMap::with_capacity(512, from.len() + 8);
        headers.append(HeaderId::STATUS, status.as_str());
        let mut taken = convert::take_headers(&mut headers, from, &self.limits);
        // RFC 9113 section 8.6: what follows would be taken for another protocol.
        if status == http::StatusCode::SWITCHING_PROTOCOLS {
            taken = Err(convert::INVALID);
        }
        if let Err(error) = taken {
            convert::count_refusal(&self.link, self.send.stream_id().as_u32(), &error);
            if convert::is_malformed(&error) {
                self.malformed = true;
                self.send.send_reset(Reason::PROTOCOL_ERROR);
                return Err(BodyError::Reset(ResetReason::ProtocolError));
            }
            return Err(self.refuse());
        }
        let mut status = status.as_u16();
        let tunnel = match &self.tunnel {
            Tunnel::Upgrade(to) if status == 200 => {
                status = 101;
                headers.set(HeaderId::STATUS, "101");
                headers.set(HeaderId::UPGRADE, to);
                headers.set(HeaderId::CONNECTION, "upgrade");
                true
            }
            Tunnel::Connect => (200..300).contains(&status),
            Tunnel::Upgrade(_) | Tunnel::No => false,
        };
        Ok(ResponseHead { headers, status, end, tunnel })
    }

    /// The response breaks a limit: the stream is reset, and as in Envoy it looks as if the peer had done it.
    fn refuse(&mut self) -> BodyError {
        self.send.send_reset(Reason::INTERNAL_ERROR);
        BodyError::Reset(ResetReason::RemoteReset)
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        convert::poll_send_ready(&mut self.send, &self.link, cx)
    }

    /// Queues a frame of the request's body, or its end.
    pub fn send_frame(&mut self, frame: Option<Frame>, end: bool) -> Result<(), ResetReason> {
        if self.sent {
            return Ok(());
        }
        self.sent = end || matches!(frame, Some(Frame::Trailers(_)));
        convert::send_frame(&mut self.send, frame, end, &self.link)
    }

    /// The next frame of the response's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match &mut self.receive {
            Some(receive) => match receive.poll_frame(cx) {
                Poll::Ready(Some(Err(BodyError::Protocol(_)))) => Poll::Ready(Some(Err(self.refuse()))),
                polled => polled,
            },
            None => Poll::Ready(None),
        }
    }

    /// What the stream has had on the wire so far.
    pub fn meter(&self) -> Meter {
        self.link.wire.meter(self.send.stream_id().as_u32())
    }

    /// Whether the response was wholly read.
    pub fn response_done(&self) -> bool {
        self.receive.as_ref().is_some_and(BodyStream::is_end)
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        self.send.send_reset(reason);
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        self.link.wire.close(self.send.stream_id().as_u32());
    }
}
