//! What ends an exchange while it waits for something else: the client, and the deadlines.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use sampan_codec::{BodyError, ResetReason};

use super::Failure;
use crate::manager::responder::Responder;
use crate::timer::Expired;

/// How the wait ended.
pub(super) enum PumpEnd {
    Client(ResetReason),
    Body(BodyError),
    Expired(Expired),
}

/// The client's end and the deadlines, while something else is pending.
pub(super) fn poll_watch(
    cx: &mut Context<'_>,
    responder: &mut Responder,
    timer: &crate::timer::Timer,
) -> Poll<PumpEnd> {
    if let Poll::Ready(reason) = responder.poll_gone(cx) {
        return Poll::Ready(PumpEnd::Client(reason));
    }
    timer.poll_expired(cx).map(PumpEnd::Expired)
}

/// Runs `work` while the client stays and no deadline passes; sends informational heads meanwhile.
pub(super) async fn watched<T>(
    mut work: Pin<&mut impl Future<Output = Result<T, Failure>>>,
    responder: &mut Responder,
    timer: &crate::timer::Timer,
) -> Result<T, Failure> {
    poll_fn(|cx| {
        let done = work.as_mut().poll(cx);
        timer.take_informational(|status, headers| responder.send_informational(status, headers));
        if let Poll::Ready(result) = done {
            return Poll::Ready(result);
        }
        if let Poll::Ready(Err(reason)) = responder.poll_flush(cx) {
            return Poll::Ready(Err(Failure::Gone(reason)));
        }
        match poll_watch(cx, responder, timer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(PumpEnd::Expired(what)) => Poll::Ready(Err(Failure::Expired(what))),
            Poll::Ready(PumpEnd::Client(reason)) => Poll::Ready(Err(Failure::Gone(reason))),
            Poll::Ready(PumpEnd::Body(_)) => Poll::Ready(Err(Failure::Reset)),
        }
    })
    .await
}
