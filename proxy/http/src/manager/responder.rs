//! The way back to the client, the same for all codecs.

use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use sampan_codec::h1::ServerConnection;
use sampan_codec::{Frame, ResetReason, h2};
use sampan_core::drain::Signal;
use sampan_core::header::{HeaderId, HeaderMap};

use super::exchange::Exchange;
use super::h2::Shared;
use super::request::is_upgrade;

/// Writes one exchange's response.
pub enum Responder {
    /// HTTP/1: the connection itself, who may end it, and when it asks its client to go.
    H1(ServerConnection, Signal, Option<Instant>),
    /// HTTP/2: a stream.
    H2(Box<H2>),
}

/// A stream's response and its connection.
pub struct H2 {
    /// The stream.
    pub stream: h2::Responder,
    /// What it shares with the connection.
    pub shared: Rc<Shared>,
    /// The exchange, once it has handed all to the codec.
    pub finished: Option<Box<Exchange>>,
    /// The stream is to be reset behind what is queued, with this code.
    pub cut: Option<h2::Reason>,
}

impl Responder {
    /// Of an HTTP/2 stream.
    pub fn h2(stream: h2::Responder, shared: Rc<Shared>) -> Self {
        Self::H2(Box::new(H2 { stream, shared, finished: None, cut: None }))
    }

    /// Sends an informational head.
    pub fn send_informational(&mut self, status: u16, headers: &HeaderMap) {
        match self {
            Self::H1(connection, ..) => connection.send_informational(status, headers),
            // 101 has no place in HTTP/2.
            Self::H2(h2) if status != 101 => h2.stream.send_informational(status, headers),
            Self::H2(_) => {}
        }
    }

    /// Queues the response's head. HTTP/1 tells the bytes of its header lines, HTTP/2 has a meter.
    pub fn send_head(
        &mut self,
        status: u16,
        headers: &HeaderMap,
        end: bool,
        tunnel: bool,
    ) -> Result<u64, ResetReason> {
        match self {
            Self::H1(connection, ..) => Ok(connection.send_head(status, headers, end, tunnel) as u64),
            Self::H2(h2) => {
                // An upgrade that HTTP/1 answers with 101 is answered with 200 here (RFC 8441 section 5), and has no
                // length.
                let status = if tunnel && status == 101 { 200 } else { status };
                if is_upgrade(headers) && headers.get(HeaderId::CONTENT_LENGTH) == Some(b"0") {
                    let mut headers = headers.clone();
                    headers.remove(HeaderId::CONTENT_LENGTH);
                    return h2.stream.send_head(status, &headers, end).map(|()| 0);
                }
                h2.stream.send_head(status, headers, end).map(|()| 0)
            }
        }
    }

    /// Waits until another frame can be queued.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match self {
            Self::H1(connection, ..) => {
                connection.poll_ready(cx).map_err(|_| ResetReason::ConnectionTermination)
            }
            Self::H2(h2) => h2.stream.poll_ready(cx),
        }
    }

    /// Queues a frame of the body, or its end.
    pub fn send_frame(&mut self, frame: Option<Frame>, end: bool) -> Result<(), ResetReason> {
        match self {
            Self::H1(connection, ..) => {
                connection.send_frame(frame, end);
                Ok(())
            }
            Self::H2(h2) => h2.stream.send_frame(frame, end),
        }
    }

    /// Writes what is queued. HTTP/2 writes by itself.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ResetReason>> {
        match self {
            Self::H1(connection, ..) => {
                connection.poll_flush(cx).map_err(|_| ResetReason::ConnectionTermination)
            }
            Self::H2(_) => Poll::Ready(Ok(())),
        }
    }

    /// Whether the client's end is looked for behind a body that is not read yet; over HTTP/2 it always is.
    pub fn read_ahead(&mut self, ahead: bool) {
        if let Self::H1(connection, ..) = self {
            connection.read_ahead(ahead);
        }
    }

    /// Ready once the client has given up, or the drain's deadline has passed.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<ResetReason> {
        match self {
            Self::H1(connection, drain, _) => {
                if !drain.is_closing() {
                    ready!(connection.poll_gone(cx));
                }
                Poll::Ready(ResetReason::ConnectionTermination)
            }
            Self::H2(h2) => h2.stream.poll_gone(cx),
        }
    }

    /// Whether the client has given up, as far as is known by now.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::H1(connection, ..) => connection.is_gone(),
            Self::H2(h2) => h2.shared.is_over() || h2.stream.meter().reset_by_peer.is_some(),
        }
    }

    /// Whether the drain's deadline has passed. HTTP/2 looks by itself.
    pub fn is_closing(&self) -> bool {
        match self {
            Self::H1(_, drain, _) => drain.is_closing(),
            Self::H2(_) => false,
        }
    }

    /// Bytes consumed and written on the wire, where the codec tells.
    pub fn wire_bytes(&self) -> Option<(u64, u64)> {
        match self {
            Self::H1(connection, ..) => Some(connection.consumed_bytes()),
            Self::H2(_) => None,
        }
    }
}
