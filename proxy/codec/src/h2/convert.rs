//! Between the crate `h2`'s messages and ours.

use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderName, HeaderValue};
use sampan_core::header::{HeaderId, HeaderMap};

use super::guard::Link;
use crate::body::{BodyError, BodyStream, Frame};
use crate::error::{CodecError, ResetReason};
use crate::h1::Underscores;

/// What an error of the crate means for a stream.
pub(super) fn reset_reason(error: &h2::Error) -> ResetReason {
    // A GOAWAY fails only the streams behind its last one: nobody has done anything for them.
    if error.reason() == Some(Reason::REFUSED_STREAM) || (error.is_go_away() && error.is_remote()) {
        return ResetReason::RemoteRefused;
    }
    // A peer that resets for a breach of the protocol is taken at its word, as in Envoy.
    if error.is_reset() && error.reason() == Some(Reason::PROTOCOL_ERROR) {
        return ResetReason::ProtocolError;
    }
    if error.is_reset() && error.is_remote() {
        return ResetReason::RemoteReset;
    }
    if error.is_library() {
        return ResetReason::ProtocolError;
    }
    ResetReason::ConnectionTermination
}

/// Envoy's limits on a head or trailers, which are reset, not answered, beyond them.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadLimits {
    /// Of all names and values, pseudo headers among them.
    pub(super) bytes: usize,
    /// Of headers, each `cookie` by itself.
    pub(super) count: usize,
    /// Of one header.
    pub(super) field: usize,
    pub(super) underscores: Underscores,
}

impl HeadLimits {
    fn check(&self, bytes: usize, count: usize) -> Result<(), CodecError> {
        if bytes > self.bytes {
            Err(LIST_TOO_LARGE)
        } else if count > self.count {
            Err(TOO_MANY_HEADERS)
        } else {
            Ok(())
        }
    }
}

const LIST_TOO_LARGE: CodecError =
    CodecError { status: 0, details: "http2.header_list_size_too_large", message: "header list too large" };
const TOO_MANY_HEADERS: CodecError =
    CodecError { status: 0, details: "http2.too_many_headers", message: "too many headers" };
const UNDERSCORE: CodecError = CodecError {
    status: 0,
    details: "http2.unexpected_underscore",
    message: "a header's name has an underscore",
};

/// A header that must not be there, or not like that.
pub(super) const INVALID: CodecError =
    CodecError { status: 0, details: "http2.invalid.header.field", message: "invalid header field" };
/// A head that lacks something, or whose parts contradict each other.
pub(super) const CONTRADICTORY: CodecError = CodecError {
    status: 0,
    details: "http2.violation.of.messaging.rule",
    message: "violation of a messaging rule",
};

/// Whether it is the message that is wrong, and not a limit that it breaks.
pub fn is_malformed(error: &CodecError) -> bool {
    [INVALID.details, CONTRADICTORY.details].contains(&error.details)
}

/// Counts what was wrong with a stream's head.
pub(super) fn count_refusal(link: &Link, stream: u32, error: &CodecError) {
    link.wire.refuse_head(stream);
    let stats = link.wire.stats();
    match error.details {
        details if details == LIST_TOO_LARGE.details => stats.header_list_size_too_large.inc(),
        details if details == TOO_MANY_HEADERS.details => stats.header_overflow.inc(),
        _ if is_malformed(error) => link.wire.note_malformed(stream),
        _ => stats.requests_rejected_with_underscores_in_headers.inc(),
    }
}

/// Appends regular headers to the pseudo headers that are there; several `cookie`s become one (RFC 9113 section
/// 8.2.3), which stands last as in Envoy. Returns how many were dropped for their underscores. What HTTP/1 would read
/// in another way (lengths, hosts that are empty or there twice) is refused.
pub(super) fn take_headers(
    to: &mut HeaderMap,
    from: &http::HeaderMap,
    limits: &HeadLimits,
) -> Result<u32, CodecError> {
    let (mut bytes, mut count, mut dropped) = (to.byte_size(), to.len(), 0);
    let (mut host, mut length, mut cookies) = (false, false, false);
    for (name, value) in from {
        let text = name.as_str().as_bytes();
        if limits.underscores != Underscores::Allow && memchr::memchr(b'_', text).is_some() {
            if limits.underscores == Underscores::Reject {
                return Err(UNDERSCORE);
            }
            dropped += 1;
            continue;
        }
        if name == http::header::HOST && to.contains(HeaderId::AUTHORITY) {
            if value.is_empty() || std::mem::replace(&mut host, true) {
                return Err(INVALID);
            }
            continue;
        }
        if name == http::header::CONTENT_LENGTH && (value.is_empty() || std::mem::replace(&mut length, true))
        {
            return Err(INVALID);
        }
        let field = text.len() + value.len();
        bytes += field;
        count += 1;
        limits.check(bytes, count)?;
        if field > limits.field {
            return Err(LIST_TOO_LARGE);
        }
        if name == http::header::COOKIE {
            cookies = true;
        } else {
            to.append_lower(text, value.as_bytes());
        }
    }
    if cookies {
        for value in from.get_all(http::header::COOKIE) {
            to.append_to_value(HeaderId::COOKIE, "; ", value.as_bytes());
        }
    }
    // Pseudo headers alone can be too much.
    limits.check(bytes, count)?;
    // Names and values are checked by the crate `http`.
    to.set_parsed();
    Ok(dropped)
}

/// The names as the crate `http` has them, by id: making one costs a hash and a search.
static NAMES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
    let pseudo = HeaderName::from_static("x");
    HeaderId::all()
        .map(|id| if id.name().starts_with(':') { pseudo.clone() } else { name(id.name().as_bytes()) })
        .collect()
});

fn name(text: &[u8]) -> HeaderName {
    HeaderName::from_lowercase(text).unwrap_or_else(|_| HeaderName::from_static("x"))
}

/// Headers whose values never come again: in HPACK's table they would only push out what does, and be compared with
/// each other for every request.
fn is_unique(id: HeaderId) -> bool {
    matches!(
        id,
        HeaderId::X_REQUEST_ID | HeaderId::TRACEPARENT | HeaderId::X_B3_TRACEID | HeaderId::X_B3_SPANID
    )
}

/// All but pseudo headers. What HTTP/2 cannot carry was refused when it came in or was set.
pub(super) fn give_headers(from: &HeaderMap, to: &mut http::HeaderMap) {
    let names = &**NAMES;
    to.reserve(from.len());
    for (id, text, value) in from.iter() {
        let connection_only = matches!(
            id,
            HeaderId::CONNECTION
                | HeaderId::KEEP_ALIVE
                | HeaderId::PROXY_CONNECTION
                | HeaderId::TRANSFER_ENCODING
                | HeaderId::UPGRADE
                | HeaderId::HOST
        );
        if id.is_pseudo() || connection_only {
            continue;
        }
        let name = match id {
            HeaderId::CUSTOM => HeaderName::from_lowercase(text).ok(),
            id => names.get(id.index()).cloned(),
        };
        if let (Some(name), Ok(mut value)) = (name, HeaderValue::from_bytes(value)) {
            value.set_sensitive(is_unique(id));
            to.append(name, value);
        }
    }
}

/// A received body.
pub(super) struct Receive {
    stream: RecvStream,
    data_done: bool,
    limits: HeadLimits,
    link: Rc<Link>,
}

impl Receive {
    pub(super) fn new(stream: RecvStream, limits: HeadLimits, link: Rc<Link>) -> Self {
        Self { stream, data_done: false, limits, link }
    }
}

impl BodyStream for Receive {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        while !self.data_done {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // The crate refuses a release only of what it never gave out.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::Data(data))));
                    }
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(BodyError::Reset(reset_reason(&e))))),
                None => self.data_done = true,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(None) => Poll::Ready(None),
            Ok(Some(trailers)) => {
                let mut headers = HeaderMap::new();
                if let Err(e) = take_headers(&mut headers, &trailers, &self.limits) {
                    count_refusal(&self.link, self.stream.stream_id().as_u32(), &e);
                    return Poll::Ready(Some(Err(BodyError::Protocol(e))));
                }
                Poll::Ready(Some(Ok(Frame::Trailers(headers))))
            }
            Err(e) => Poll::Ready(Some(Err(BodyError::Reset(reset_reason(&e))))),
        }
    }

    fn is_end(&self) -> bool {
        self.stream.is_end_stream()
    }
}

/// How much of a stream's data the crate may hold while the peer's window is shut.
const QUEUE: u64 = 64 * 1024;

/// Waits until the stream's queue has room, or the peer's window takes all of it and more.
pub(super) fn poll_send_ready(
    stream: &mut SendStream<Bytes>,
    link: &Link,
    cx: &mut Context<'_>,
) -> Poll<Result<(), ResetReason>> {
    if link.wire.pending(stream.stream_id().as_u32()) < QUEUE || stream.capacity() > 0 {
        return Poll::Ready(Ok(()));
    }
    stream.reserve_capacity(16 * 1024);
    match ready!(stream.poll_capacity(cx)) {
        Some(Ok(_)) => Poll::Ready(Ok(())),
        Some(Err(e)) => Poll::Ready(Err(reset_reason(&e))),
        None => Poll::Ready(Err(ResetReason::RemoteReset)),
    }
}

/// Queues a frame or the end.
pub(super) fn send_frame(
    stream: &mut SendStream<Bytes>,
    frame: Option<Frame>,
    end: bool,
    link: &Link,
) -> Result<(), ResetReason> {
    let sent = match frame {
        None => stream.send_data(Bytes::new(), end),
        Some(Frame::Data(data)) => {
            link.wire.queued(stream.stream_id().as_u32(), data.len());
            stream.send_data(data, end)
        }
        Some(Frame::Trailers(trailers)) => {
            let mut map = http::HeaderMap::new();
            give_headers(&trailers, &mut map);
            stream.send_trailers(map)
        }
    };
    sent.map_err(|e| reset_reason(&e))
}
