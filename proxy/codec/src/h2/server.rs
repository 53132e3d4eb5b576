//! The server's side: streams as they are opened.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Response};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::Protocol;
use sampan_tls::Transport;

use super::convert::{self, CONTRADICTORY, HeadLimits, INVALID, Receive, count_refusal};
use super::guard::{FrameGuard, Link};
use super::keepalive::Keepalive;
use super::wire::{Flood, Meter};
use super::{CodecStats, Options};
use crate::body::{Body, Frame};
use crate::error::{CodecError, ResetReason};
use crate::h1::RequestHead;

/// How many streams may wait to be accepted although they were reset: beyond what Envoy lets a connection have.
const PENDING_RESETS: usize = 1024;

/// The length of such a frame.
const RST_STREAM: u64 = 13;

/// A connection; all its I/O happens while it is polled for streams.
pub struct ServerConnection {
    inner: h2::server::Connection<FrameGuard, Bytes>,
    limits: HeadLimits,
    /// A malformed message ends its stream only.
    stream_errors: bool,
    link: Rc<Link>,
    keepalive: Option<Keepalive>,
}

/// A stream that the client has opened.
pub struct Accepted {
    /// Its head, or why it is to be reset.
    pub head: Result<RequestHead, CodecError>,
    /// Its body.
    pub body: Body,
    /// The way back.
    pub respond: Responder,
}

/// Why there are no more streams.
#[derive(Debug)]
pub enum End {
    /// Both sides were done, or the client left.
    Closed,
    /// The client broke the protocol; it was told so.
    Protocol,
    /// The client sent a malformed message, whose stream the codec has reset; it is to be left.
    Malformed,
    /// The client broke one of Envoy's limits; it is to be left.
    Flood(Flood),
    /// The client does not answer pings; it is to be left.
    KeepaliveTimeout,
}

/// The response's side of a stream.
pub struct Responder {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
    ended: bool,
    link: Rc<Link>,
}

impl ServerConnection {
    /// Reads the preface and exchanges settings.
    pub async fn handshake(
        transport: Transport,
        options: &Options,
        stats: &Arc<CodecStats>,
        random: u64,
    ) -> Result<Self, h2::Error> {
        let mut builder = h2::server::Builder::new();
        builder
            .max_concurrent_streams(options.max_concurrent_streams)
            .initial_window_size(options.stream_window)
            .initial_connection_window_size(options.connection_window)
            .header_table_size(options.header_table_size)
            .max_header_list_size(options.decoded_list())
            // Streams that are opened and reset at once are the connection manager's to judge.
            .max_pending_accept_reset_streams(PENDING_RESETS);
        if options.max_frame_size > 0 {
            builder.max_frame_size(options.max_frame_size);
        }
        if options.allow_connect {
            builder.enable_connect_protocol();
        }
        stats.nghttp2_downstream_connections.inc();
        let link = Link::new(transport, options.wire(stats, true), true);
        let mut inner = builder.handshake(FrameGuard(link.clone())).await?;
        link.gather();
        let keepalive = options.keepalive.and_then(|k| Some(Keepalive::new(k, inner.ping_pong()?, random)));
        let stream_errors = options.stream_errors;
        Ok(Self { inner, limits: options.head_limits(), stream_errors, link, keepalive })
    }

    /// The next stream. What is queued is written when there is none.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<Accepted, End>> {
        loop {
            let Some(polled) = self.poll_next(cx) else { continue };
            return polled;
        }
    }

    /// None: a stream came that is not served.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Option<Poll<Result<Accepted, End>>> {
        Some(match self.inner.poll_accept(cx) {
            Poll::Ready(Some(Ok((request, respond)))) => {
                // The connection ends with the malformed one.
                let (wire, id) = (&self.link.wire, respond.stream_id().as_u32());
                wire.take_on(id);
                if !self.stream_errors && wire.malformed().is_some_and(|first| id > first) {
                    wire.close(id);
                    return None;
                }
                Poll::Ready(Ok(self.accepted(request, respond)))
            }
            Poll::Ready(None) => Poll::Ready(Err(End::Closed)),
            Poll::Ready(Some(Err(error))) => {
                let end = if error.is_library() { End::Protocol } else { End::Closed };
                Poll::Ready(Err(end))
            }
            Poll::Pending => {
                let wire = &self.link.wire;
                wire.drained();
                if wire.malformed().is_some() && !self.stream_errors {
                    return Some(Poll::Ready(Err(End::Malformed)));
                }
                if let Some(flood) = wire.flood() {
                    return Some(Poll::Ready(Err(End::Flood(flood))));
                }
                if let Some(keepalive) = &mut self.keepalive
                    && keepalive.poll(cx, wire.frames_received(), false).is_ready()
                {
                    wire.stats().keepalive_timeout.inc();
                    return Some(Poll::Ready(Err(End::KeepaliveTimeout)));
                }
                match self.link.poll_flush(cx) {
                    Poll::Ready(Err(_)) => Poll::Ready(Err(End::Closed)),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                }
            }
        })
    }

    /// How many streams were turned away for malformed heads since this was last asked, and what is sent for each. To
    /// be asked when there is no stream.
    pub fn take_unseen(&self) -> (usize, u64) {
        (self.link.wire.take_unseen(), if self.stream_errors { RST_STREAM } else { 0 })
    }

    /// How many streams have come that were not handed out.
    pub fn unserved(&self) -> usize {
        self.link.wire.unserved()
    }

    fn accepted(&self, request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Accepted {
        let (parts, body) = request.into_parts();
        let id = respond.stream_id().as_u32();
        let end = body.is_end_stream();
        let head = request_head(&parts, end, &self.limits);
        if let Err(error) = &head {
            count_refusal(&self.link, id, error);
        } else if let Ok(RequestHead { dropped_underscores: dropped @ 1.., .. }) = &head {
            self.link.wire.stats().dropped_headers_with_underscores.add(u64::from(*dropped));
        }
        let body =
            if end { Body::Empty } else { Body::stream(Receive::new(body, self.limits, self.link.clone())) };
        Accepted {
            head,
            body,
            respond: Responder { respond, stream: None, ended: false, link: self.link.clone() },
        }
    }

    /// Announces that the connection goes away; streams are taken as before.
    pub fn shutdown_notice(&mut self) {
        self.link.send_goaway(u32::MAX);
    }

    /// GOAWAY: later streams than those that came so far are not served.
    pub fn goaway(&mut self) {
        self.link.wire.stats().goaway_sent.inc();
        self.link.send_goaway(self.link.wire.highest());
    }

    /// Whether streams are open, or data of theirs is not yet sent.
    pub fn has_streams(&self) -> bool {
        self.inner.has_streams()
    }

    /// Writes what is queued.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.link.poll_flush(cx).map(drop)
    }

    /// Writes what is queued and closes our side.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.link.poll_shutdown(cx).map(drop)
    }

    /// Bytes read and written.
    pub fn wire_bytes(&self) -> (u64, u64) {
        self.link.bytes()
    }
}

/// What Envoy's codec refuses and the crate takes.
fn check(request: &Parts) -> Result<(), CodecError> {
    let uri = &request.uri;
    let scheme = uri.scheme_str();
    if scheme.is_some_and(|s| !s.starts_with(|first: char| first.is_ascii_alphabetic())) {
        return Err(INVALID);
    }
    match uri.authority() {
        Some(authority) if memchr::memchr(b'@', authority.as_str().as_bytes()).is_some() => {
            return Err(INVALID);
        }
        Some(_) => {}
        None if request.method == http::Method::CONNECT => return Err(CONTRADICTORY),
        None => match request.headers.get(http::header::HOST) {
            Some(host) if host.is_empty() => return Err(INVALID),
            Some(_) => {}
            None => return Err(CONTRADICTORY),
        },
    }
    if request.extensions.get::<h2::ext::Protocol>().is_some_and(|p| p.as_str().is_empty()) {
        return Err(INVALID);
    }
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let asterisk = path == "*" && request.method == http::Method::OPTIONS;
    let of_http = scheme.is_none_or(|s| s.eq_ignore_ascii_case("http") || s.eq_ignore_ascii_case("https"));
    if !path.starts_with('/') && !asterisk && of_http {
        return Err(CONTRADICTORY);
    }
    Ok(())
}

fn request_head(request: &Parts, end: bool, limits: &HeadLimits) -> Result<RequestHead, CodecError> {
    check(request)?;
    let mut headers = HeaderMap::with_capacity(512, request.headers.len() + 16);
    // Extended CONNECT (RFC 8441) takes the form of an HTTP/1 upgrade: routes, filters and logs know only that.
    let connect = request.method == http::Method::CONNECT;
    let protocol = request.extensions.get::<h2::ext::Protocol>().map(h2::ext::Protocol::as_str);
    let upgrade = protocol.filter(|p| connect && !p.is_empty() && *p != "bytestream");
    headers.append(HeaderId::METHOD, if upgrade.is_some() { "GET" } else { request.method.as_str() });
    let uri = &request.uri;
    if let Some(path) = uri.path_and_query() {
        headers.append(HeaderId::PATH, path.as_str());
    }
    if let Some(scheme) = uri.scheme_str() {
        headers.append(HeaderId::SCHEME, scheme);
    }
    match (uri.authority(), request.headers.get(http::header::HOST)) {
        (Some(authority), _) => headers.append(HeaderId::AUTHORITY, authority.as_str()),
        (None, Some(host)) => headers.append(HeaderId::AUTHORITY, host.as_bytes()),
        (None, None) => {}
    }
    if upgrade.is_none()
        && let Some(protocol) = protocol
    {
        headers.append(HeaderId::PSEUDO_PROTOCOL, protocol);
    }
    let dropped_underscores = convert::take_headers(&mut headers, &request.headers, limits)?;
    let bytes = headers.byte_size();
    if let Some(to) = upgrade {
        headers.append(HeaderId::UPGRADE, to);
        headers.append(HeaderId::CONNECTION, "upgrade");
    }
    let upgrade = connect || protocol.is_some();
    let (protocol, header_bytes) = (Protocol::Http2, bytes);
    Ok(RequestHead { headers, protocol, end, upgrade, bytes, header_bytes, dropped_underscores })
}

/// For the fuzz target: each line a header as the crate `h2` hands them on, `name:value`, the first three the method,
/// the URI and the protocol of an extended CONNECT. What was taken in must go out again. Returns what tells one outcome
/// from another.
pub fn fuzz_head(bytes: &[u8]) -> u64 {
    let mut lines = bytes.split(|b| *b == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let (method, uri, protocol) = (next(), next(), next());
    let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
    let Ok(request) = http::Request::builder().method(method).uri(text(uri)).body(()) else { return 0 };
    let (mut parts, ()) = request.into_parts();
    if !protocol.is_empty() {
        parts.extensions.insert(h2::ext::Protocol::from(text(protocol)));
    }
    for line in lines.take(64) {
        let (name, value) = line.split_at(line.iter().position(|b| *b == b':').unwrap_or(line.len()));
        let name = http::HeaderName::from_bytes(name);
        let value = http::HeaderValue::from_bytes(value.get(1..).unwrap_or_default());
        if let (Ok(name), Ok(value)) = (name, value) {
            parts.headers.append(name, value);
        }
    }
    let underscores =
        if protocol.is_empty() { crate::h1::Underscores::Drop } else { crate::h1::Underscores::Reject };
    let limits = HeadLimits { bytes: 4096, count: 32, field: 512, underscores };
    match request_head(&parts, false, &limits) {
        Err(error) => 1 + error.details.len() as u64,
        Ok(head) => {
            let mut out = http::HeaderMap::new();
            convert::give_headers(&head.headers, &mut out);
            assert!(out.len() <= head.headers.len(), "a header came from nowhere");
            64 + head.headers.len() as u64 * 4
                + u64::from(head.upgrade) * 2
                + u64::from(head.dropped_underscores > 0)
        }
    }
}

fn response(status: u16, headers: &HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::BAD_GATEWAY);
    convert::give_headers(headers, response.headers_mut());
    response
}

impl Responder {
    /// Sends an informational head.
    pub fn send_informational(&mut self, status: u16, headers: &HeaderMap) {
        // A stream that is gone meanwhile tells so at its next use.
        let _ = self.respond.send_informational(response(status, headers));
    }

    /// Sends the response's head.
    pub fn send_head(&mut self, status: u16, headers: &HeaderMap, end: bool) -> Result<(), ResetReason> {
        let sent = self.respond.send_response(response(status, headers), end);
        self.stream = Some(sent.map_err(|e| convert::reset_reason(&e))?);
        self.ended = end;
        Ok(())
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match &mut self.stream {
            Some(stream) => convert::poll_send_ready(stream, &self.link, cx),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Queues a frame of the response's body, or its end.
    pub fn send_frame(&mut self, frame: Option<Frame>, end: bool) -> Result<(), ResetReason> {
        if self.ended {
            return Ok(());
        }
        self.ended = end || matches!(frame, Some(Frame::Trailers(_)));
        match &mut self.stream {
            Some(stream) => convert::send_frame(stream, frame, end, &self.link),
            None => Ok(()),
        }
    }

    /// Ready once the client has reset the stream or is gone.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<ResetReason> {
        let reset = match &mut self.stream {
            Some(stream) => ready!(stream.poll_reset(cx)),
            None => ready!(self.respond.poll_reset(cx)),
        };
        Poll::Ready(match reset {
            Ok(Reason::PROTOCOL_ERROR) => ResetReason::ProtocolError,
            Ok(_) => ResetReason::RemoteReset,
            Err(e) => convert::reset_reason(&e),
        })
    }

    /// What the stream has had on the wire so far.
    pub fn meter(&self) -> Meter {
        self.link.wire.meter(self.id())
    }

    fn id(&self) -> u32 {
        self.respond.stream_id().as_u32()
    }

    /// The codec's stats.
    pub fn stats(&self) -> &CodecStats {
        self.link.wire.stats()
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.link.wire.close(self.id());
    }
}
