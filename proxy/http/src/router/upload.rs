//! The request's body on its way up, with what a retry needs of it.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use sampan_codec::{Body, BodyError, Frame};
use sampan_core::HeaderMap;

/// A request body that can be sent again as long as it fits the retry buffer.
pub(super) struct Upload {
    body: Body,
    /// What was sent, for another attempt; none once it outgrew its limit or where nobody will retry.
    kept: Option<Kept>,
    /// Where in `kept` this attempt stands.
    at: usize,
    ended: bool,
    /// Nothing was read of the body yet.
    untouched: bool,
    /// Bytes of the body that came from the client.
    pub(super) received: u64,
}

struct Kept {
    data: Vec<Bytes>,
    trailers: Option<Box<HeaderMap>>,
    room: usize,
}

/// The next piece of the upload.
pub(super) struct Piece {
    pub(super) frame: Option<Frame>,
    pub(super) end: bool,
}

impl Upload {
    /// `received` is how much had come before, where the request is served anew.
    pub(super) fn new(body: Body, retry_buffer: Option<usize>, received: u64) -> Self {
        let ended = body.is_end();
        let kept = retry_buffer.map(|room| Kept { data: Vec::new(), trailers: None, room });
        Self { body, kept, at: 0, ended, untouched: true, received }
    }

    /// Whether nothing is to be sent behind the head.
    pub(super) fn is_empty(&self) -> bool {
        self.ended && self.kept.as_ref().is_none_or(|k| k.data.is_empty() && k.trailers.is_none())
    }

    /// Whether the client has sent all.
    pub(super) fn is_received(&self) -> bool {
        self.ended
    }

    /// Whether another attempt could begin from the start.
    pub(super) fn can_replay(&self) -> bool {
        self.kept.is_some() || self.untouched
    }

    /// Another attempt begins.
    pub(super) fn rewind(&mut self) {
        self.at = 0;
    }

    /// What was kept, as the body of a request that takes this one's place; trailers stay behind, as in Envoy.
    pub(super) fn again(&mut self) -> Body {
        match self.kept.take().map(|kept| kept.data) {
            Some(mut data) if data.len() == 1 => Body::full(data.remove(0)),
            Some(data) if !data.is_empty() => Body::full(data.concat()),
            _ => Body::Empty,
        }
    }

    /// No further attempt will come: what was kept goes.
    pub(super) fn forget(&mut self) {
        if let Some(kept) = &self.kept
            && self.at >= kept.data.len()
            && kept.trailers.is_none()
        {
            self.kept = None;
        }
    }

    /// The next piece; `None` when this attempt has sent everything.
    pub(super) fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, BodyError>> {
        if let Some(kept) = &self.kept {
            if let Some(data) = kept.data.get(self.at) {
                self.at += 1;
                let last = self.at == kept.data.len() && self.ended && kept.trailers.is_none();
                return Poll::Ready(Ok(Piece { frame: Some(Frame::Data(data.clone())), end: last }));
            }
            if let Some(trailers) = &kept.trailers {
                return Poll::Ready(Ok(Piece {
                    frame: Some(Frame::Trailers((**trailers).clone())),
                    end: true,
                }));
            }
        }
        if self.ended {
            return Poll::Ready(Ok(Piece { frame: None, end: true }));
        }
        let frame = ready!(self.body.poll_frame(cx));
        self.untouched = false;
        match frame {
            None => {
                self.ended = true;
                Poll::Ready(Ok(Piece { frame: None, end: true }))
            }
            Some(Err(error)) => Poll::Ready(Err(error)),
            Some(Ok(frame)) => {
                self.keep(&frame);
                self.ended = matches!(frame, Frame::Trailers(_)) || self.body.is_end();
                Poll::Ready(Ok(Piece { frame: Some(frame), end: self.ended }))
            }
        }
    }

    fn keep(&mut self, frame: &Frame) {
        if let Frame::Data(data) = frame {
            self.received += data.len() as u64;
        }
        let Some(kept) = &mut self.kept else { return };
        match frame {
            Frame::Data(data) if data.len() <= kept.room => {
                kept.room -= data.len();
                kept.data.push(data.clone());
                self.at += 1;
            }
            Frame::Data(_) => self.kept = None,
            Frame::Trailers(trailers) => kept.trailers = Some(Box::new(trailers.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn a_kept_body_is_sent_again() {
        let mut upload = Upload::new(Body::full("hello"), Some(10), 0);
        for _ in 0..2 {
            upload.rewind();
            let piece = poll_fn(|cx| upload.poll_piece(cx)).await.unwrap();
            assert!(matches!(piece.frame, Some(Frame::Data(d)) if d == "hello"));
            if !piece.end {
                let piece = poll_fn(|cx| upload.poll_piece(cx)).await.unwrap();
                assert!(piece.frame.is_none() && piece.end);
            }
        }
        assert_eq!(upload.received, 5);
    }

    #[tokio::test]
    async fn a_large_body_is_sent_once() {
        let mut upload = Upload::new(Body::full("hello"), Some(3), 0);
        poll_fn(|cx| upload.poll_piece(cx)).await.unwrap();
        assert!(!upload.can_replay());
    }
}
