//! Bodies: streams of frames with back-pressure. Nothing is read from a socket before somebody polls for it.

use std::task::{Context, Poll};

use bytes::Bytes;
use sampan_core::HeaderMap;
use thiserror::Error;

use crate::error::ResetReason;

/// A piece of a body.
#[derive(Debug)]
pub enum Frame {
    /// Data; never empty.
    Data(Bytes),
    /// The trailers; nothing follows.
    Trailers(HeaderMap),
}

/// Why a body ended before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BodyError {
    /// The peer is gone, or reset the stream.
    #[error("stream reset: {}", .0.as_str())]
    Reset(ResetReason),
    /// The peer broke the framing; Envoy's details.
    #[error("{0}")]
    Protocol(crate::CodecError),
    /// Of a response: its request's body broke the framing; Envoy's details.
    #[error("{0}")]
    Request(crate::CodecError),
    /// A deadline of whoever makes the body has passed.
    #[error("timeout")]
    Timeout,
}

/// A source of frames. `None` is the end; after it or an error nobody polls again.
pub trait BodyStream {
    /// The next frame.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>>;

    /// Whether the end is known to be reached already, so that the last frame can be sent with the end mark.
    fn is_end(&self) -> bool {
        false
    }
}

/// A message's body.
#[derive(Default)]
pub enum Body {
    /// No body.
    #[default]
    Empty,
    /// All of it at hand.
    Full(Bytes),
    /// As it comes.
    Stream(Box<dyn BodyStream>),
}

impl Body {
    /// A body of these bytes.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() { Self::Empty } else { Self::Full(bytes) }
    }

    /// A body from a stream.
    pub fn stream(stream: impl BodyStream + 'static) -> Self {
        Self::Stream(Box::new(stream))
    }

    /// Whether nothing (more) will come.
    pub fn is_end(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Stream(s) => s.is_end(),
        }
    }

    /// The next frame.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Full(_) => match std::mem::take(self) {
                Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::Data(bytes)))),
                _ => Poll::Ready(None),
            },
            Self::Stream(s) => s.poll_frame(cx),
        }
    }

    /// [`Body::poll_frame`] as a future.
    pub async fn frame(&mut self) -> Option<Result<Frame, BodyError>> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Puts a layer around the body: how a filter changes it.
    pub fn wrap<S: BodyStream + 'static>(&mut self, layer: impl FnOnce(Body) -> S) {
        let inner = std::mem::take(self);
        *self = Self::Stream(Box::new(layer(inner)));
    }
}
