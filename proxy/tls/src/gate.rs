//! A byte stream whose first byte has to be allowed: nothing of the client's passes before somebody outside has said
//! yes, while what is sent to the client goes its way.
//!
//! The question is asked with the client's first byte (or its end); when the answer is no, reading fails, which ends
//! whatever serves the connection. Dropping the stream drops the question. Once it is open it is out of the way.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use crate::transport::Transport;

/// Whether the client may go on.
pub type Answer = Pin<Box<dyn Future<Output = bool>>>;

/// Begins to ask; it is told how many bytes have come.
pub type Ask = Box<dyn FnOnce(usize) -> Answer>;

/// As much as is read before the answer is there.
const FIRST: usize = 16 * 1024;

/// The stream.
pub struct Gated {
    pub(crate) inner: Transport,
    state: State,
    first: Vec<u8>,
    at: usize,
}

enum State {
    Closed(Ask),
    Asking(Answer),
    Open,
    Refused,
}

impl Gated {
    pub(crate) fn new(inner: Transport, ask: Ask) -> Self {
        Self { inner, state: State::Closed(ask), first: Vec::new(), at: 0 }
    }

    /// Whether the stream below can be used in this one's place.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Open) && self.at == self.first.len()
    }

    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.state {
                State::Closed(_) => {
                    let mut first = vec![0; FIRST];
                    let mut read = ReadBuf::new(&mut first);
                    ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
                    let length = read.filled().len();
                    first.truncate(length);
                    first.shrink_to_fit();
                    self.first = first;
                    if let State::Closed(ask) = std::mem::replace(&mut self.state, State::Refused) {
                        self.state = State::Asking(ask(length));
                    }
                }
                State::Asking(answer) => {
                    let allowed = ready!(answer.as_mut().poll(cx));
                    self.state = if allowed { State::Open } else { State::Refused };
                }
                State::Open if self.at < self.first.len() => {
                    let part = (self.first.len() - self.at).min(buf.remaining());
                    buf.put_slice(&self.first[self.at..self.at + part]);
                    self.at += part;
                    if self.at == self.first.len() {
                        (self.first, self.at) = (Vec::new(), 0);
                    }
                    return Poll::Ready(Ok(()));
                }
                State::Open => return Pin::new(&mut self.inner).poll_read(cx, buf),
                State::Refused => return Poll::Ready(Err(io::ErrorKind::PermissionDenied.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    async fn through(allowed: bool) -> (io::Result<Vec<u8>>, u32) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let asked = Rc::new(Cell::new(0));
        let counted = asked.clone();
        let mut gated = Transport::Unix(ours);
        gated.close_until(Box::new(move |length| {
            assert_eq!(length, 5);
            counted.set(counted.get() + 1);
            Box::pin(async move { allowed })
        }));
        gated.write_all(b"greeting").await.unwrap();
        let mut greeting = [0; 8];
        theirs.read_exact(&mut greeting).await.unwrap();
        assert_eq!((&greeting, asked.get()), (b"greeting", 0), "nobody is asked before the client speaks");
        theirs.write_all(b"hello").await.unwrap();
        theirs.shutdown().await.unwrap();
        let mut all = Vec::new();
        let read = gated.read_to_end(&mut all).await;
        (read.map(|_| all), asked.get())
    }

    #[tokio::test]
    async fn what_came_first_passes_when_it_is_allowed() {
        let (read, asked) = through(true).await;
        assert_eq!((read.unwrap(), asked), (b"hello".to_vec(), 1));
    }

    #[tokio::test]
    async fn nothing_passes_when_it_is_not() {
        let (read, asked) = through(false).await;
        assert_eq!((read.unwrap_err().kind(), asked), (io::ErrorKind::PermissionDenied, 1));
    }
}
