//! The server's side: streams as they are opened.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http::{Request, Response};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::Protocol;
use sampan_tls::Transport;

use super::Options;
use super::convert::{self, Receive};
use crate::body::{Body, Frame};
use crate::error::{CodecError, ResetReason};
use crate::h1::RequestHead;

/// A connection; all its I/O happens while it is polled for streams.
pub struct ServerConnection {
    inner: h2::server::Connection<Transport, Bytes>,
    max_headers: usize,
}

/// The response's side of a stream.
pub struct Responder {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
    ended: bool,
}

impl ServerConnection {
    /// Reads the preface and exchanges settings.
    pub async fn handshake(transport: Transport, options: &Options) -> Result<Self, h2::Error> {
        let mut builder = h2::server::Builder::new();
        builder
            .max_concurrent_streams(options.max_concurrent_streams)
            .initial_window_size(options.stream_window)
            .initial_connection_window_size(options.connection_window)
            .header_table_size(options.header_table_size)
            .max_header_list_size(options.max_header_bytes);
        if options.max_frame_size > 0 {
            builder.max_frame_size(options.max_frame_size);
        }
        if options.allow_connect {
            builder.enable_connect_protocol();
        }
        let inner = builder.handshake(transport).await?;
        Ok(Self { inner, max_headers: options.max_headers })
    }

    /// The next stream; `None` once the connection is closed.
    #[allow(
        clippy::type_complexity,
        reason = "three parts of a stream, taken apart at once by the one caller"
    )]
    pub fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(Result<RequestHead, CodecError>, Body, Responder), h2::Error>>> {
        let Some(accepted) = ready!(self.inner.poll_accept(cx)) else { return Poll::Ready(None) };
        Poll::Ready(Some(accepted.map(|(request, respond)| {
            let (parts, body) = request.into_parts();
            let end = body.is_end_stream();
            let head = request_head(Request::from_parts(parts, ()), end, self.max_headers);
            let body = if end { Body::Empty } else { Body::stream(Receive::new(body)) };
            (head, body, Responder { respond, stream: None, ended: false })
        })))
    }

    /// GOAWAY now; streams that are open may finish.
    pub fn graceful_shutdown(&mut self) {
        self.inner.graceful_shutdown();
    }

    /// GOAWAY with a reason, and the end.
    pub fn abrupt_shutdown(&mut self, reason: Reason) {
        self.inner.abrupt_shutdown(reason);
    }

    /// Finishes what is queued and closes.
    pub fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        self.inner.poll_closed(cx)
    }
}

fn request_head(request: Request<()>, end: bool, max_headers: usize) -> Result<RequestHead, CodecError> {
    let mut headers = HeaderMap::with_capacity(512, request.headers().len() + 16);
    headers.append(HeaderId::METHOD, request.method().as_str());
    let uri = request.uri();
    if let Some(path) = uri.path_and_query() {
        headers.append(HeaderId::PATH, path.as_str());
    }
    if let Some(scheme) = uri.scheme_str() {
        headers.append(HeaderId::SCHEME, scheme);
    }
    match (uri.authority(), request.headers().get(http::header::HOST)) {
        (Some(authority), _) => headers.append(HeaderId::AUTHORITY, authority.as_str()),
        (None, Some(host)) => headers.append(HeaderId::AUTHORITY, host.as_bytes()),
        (None, None) => {}
    }
    let mut upgrade = request.method() == http::Method::CONNECT;
    if let Some(protocol) = request.extensions().get::<h2::ext::Protocol>() {
        headers.append(HeaderId::PSEUDO_PROTOCOL, protocol.as_str());
        upgrade = true;
    }
    convert::take_headers(&mut headers, request.headers(), max_headers)?;
    headers.remove(HeaderId::HOST);
    let bytes = headers.byte_size();
    Ok(RequestHead { headers, protocol: Protocol::Http2, end, upgrade, bytes, dropped_underscores: 0 })
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
            Some(stream) => convert::poll_send_ready(stream, cx),
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
            Some(stream) => convert::send_frame(stream, frame, end),
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
            Ok(_) => ResetReason::RemoteReset,
            Err(e) => convert::reset_reason(&e),
        })
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
    }
}
