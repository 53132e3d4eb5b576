//! The client's side: many streams over one connection.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use http::{Method, Request, Uri};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_tls::Transport;

use super::Options;
use super::convert::{self, Receive};
use crate::body::{BodyError, BodyStream, Frame};
use crate::error::{CodecError, ResetReason};
use crate::h1::ResponseHead;

/// A handle to a connection; streams are opened on clones.
#[derive(Clone)]
pub struct ClientConnection {
    send: SendRequest<Bytes>,
    max_headers: usize,
}

/// One exchange.
pub struct ClientStream {
    response: ResponseFuture,
    send: SendStream<Bytes>,
    receive: Option<Receive>,
    sent: bool,
    max_headers: usize,
    informational_done: bool,
}

/// Exchanges settings. The future returned beside the handle drives the connection to its end; without it being
/// polled nothing moves.
pub async fn connect(
    transport: Transport,
    options: &Options,
) -> Result<(ClientConnection, impl Future<Output = Result<(), h2::Error>> + use<>), h2::Error> {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(options.stream_window)
        .initial_connection_window_size(options.connection_window)
        .header_table_size(options.header_table_size)
        .max_header_list_size(options.max_header_bytes)
        .enable_push(false);
    if options.max_frame_size > 0 {
        builder.max_frame_size(options.max_frame_size);
    }
    let (send, connection) = builder.handshake(transport).await?;
    Ok((ClientConnection { send, max_headers: options.max_headers }, connection))
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

    /// Opens a stream with the request's head.
    pub fn start(&mut self, headers: &HeaderMap, end: bool) -> Result<ClientStream, ResetReason> {
        let request = request(headers).ok_or(ResetReason::ProtocolError)?;
        let (response, send) = self.send.send_request(request, end).map_err(|e| convert::reset_reason(&e))?;
        Ok(ClientStream {
            response,
            send,
            receive: None,
            sent: end,
            max_headers: self.max_headers,
            informational_done: false,
        })
    }
}

/// The crate takes the pseudo headers apart from a URI; scheme and authority are needed beside the path.
fn request(headers: &HeaderMap) -> Option<Request<()>> {
    let method = Method::from_bytes(headers.get(HeaderId::METHOD)?).ok()?;
    let authority = headers.get(HeaderId::AUTHORITY).unwrap_or_default();
    let protocol = headers.get_str(HeaderId::PSEUDO_PROTOCOL);
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
    convert::give_headers(headers, request.headers_mut());
    Some(request)
}

impl ClientStream {
    /// The next head: informational ones first, each by itself.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, BodyError>> {
        let reset = |e: h2::Error| BodyError::Reset(convert::reset_reason(&e));
        if !self.informational_done {
            match self.response.poll_informational(cx) {
                Poll::Ready(Some(Ok(informational))) => {
                    let (parts, ()) = informational.into_parts();
                    return Poll::Ready(
                        head(parts.status, &parts.headers, true, self.max_headers)
                            .map_err(BodyError::Protocol),
                    );
                }
                Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(reset(e))),
                Poll::Ready(None) => self.informational_done = true,
                Poll::Pending => {}
            }
        }
        let response = ready!(std::pin::Pin::new(&mut self.response).poll(cx)).map_err(reset)?;
        let (parts, body) = response.into_parts();
        let end = body.is_end_stream();
        self.receive = Some(Receive::new(body));
        Poll::Ready(head(parts.status, &parts.headers, end, self.max_headers).map_err(BodyError::Protocol))
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        convert::poll_send_ready(&mut self.send, cx)
    }

    /// Queues a frame of the request's body, or its end.
    pub fn send_frame(&mut self, frame: Option<Frame>, end: bool) -> Result<(), ResetReason> {
        if self.sent {
            return Ok(());
        }
        self.sent = end || matches!(frame, Some(Frame::Trailers(_)));
        convert::send_frame(&mut self.send, frame, end)
    }

    /// The next frame of the response's body.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match &mut self.receive {
            Some(receive) => receive.poll_frame(cx),
            None => Poll::Ready(None),
        }
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

fn head(
    status: http::StatusCode,
    from: &http::HeaderMap,
    end: bool,
    max_headers: usize,
) -> Result<ResponseHead, CodecError> {
    let mut headers = HeaderMap::with_capacity(512, from.len() + 8);
    headers.append(HeaderId::STATUS, status.as_str());
    convert::take_headers(&mut headers, from, max_headers)?;
    let bytes = headers.byte_size();
    Ok(ResponseHead { headers, status: status.as_u16(), end, tunnel: false, bytes })
}
