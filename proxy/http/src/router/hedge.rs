//! Hedging on a per-try timeout: the attempt that is slow goes on beside the one that takes its place, and the first
//! good answer wins.
//!
//! ```text
//!   attempt   as ever, but its per-try timeout ends nothing: it becomes a racer, and the policy may try again
//!   back off  the racers may answer meanwhile
//!   wait      no other attempt will come: what is left of the racers decides
//! ```
//!
//! An answer that the policy would have tried again is good enough only when nothing else is under way. The racers
//! have sent all of their request, so nothing but their answers is waited for; those that lose are reset.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use sampan_codec::BodyError;
use sampan_codec::h1::ResponseHead;
use sampan_core::clock;
use sampan_core::stream_info::{ResponseFlag, UpstreamInfo};
use sampan_upstream::WorkerHost;

use super::exchange::Exchange;
use super::failure::{Failure, reset};
use super::retry::{Retry, RetryState};
use super::upload::Upload;
use super::{End, Forward, outlier};
use crate::filter::Response;
use crate::stream::Stream;

/// An attempt that its per-try timeout left behind.
struct Racer {
    exchange: Exchange,
    host: Rc<WorkerHost>,
    upstream: Option<Box<UpstreamInfo>>,
    /// Another attempt was begun for it: it is not tried again.
    retried: bool,
}

/// All of them.
#[derive(Default)]
struct Race {
    racers: Vec<Racer>,
    /// Whether the request is gRPC.
    grpc: bool,
    /// What became of those that ended without an answer.
    lost: Vec<u16>,
}

/// What is done next.
enum Next {
    Attempt,
    BackOff(Instant),
    Wait,
}

/// What came first.
enum News {
    /// The attempt under way.
    Own(Result<(ResponseHead, Exchange), Failure>),
    /// A racer's answer.
    Racer(ResponseHead, Racer),
    /// The last racer's end.
    Lost(Failure),
    /// The back-off is over.
    Again,
    /// The request's deadline has passed.
    Failed(Failure),
}

impl Racer {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<ResponseHead, Failure>> {
        let _ = self.exchange.poll_flush(cx);
        loop {
            return match self.exchange.poll_head(cx) {
                // An informational head says nothing about who will win.
                Poll::Ready(Ok(head)) if (100..200).contains(&head.status) && head.status != 101 => continue,
                Poll::Ready(Ok(head)) => Poll::Ready(Ok(head)),
                Poll::Ready(Err(BodyError::Protocol(_) | BodyError::Request(_))) => {
                    Poll::Ready(Err(Failure::Protocol))
                }
                Poll::Ready(Err(BodyError::Reset(reason))) => Poll::Ready(Err(reset(reason, true))),
                Poll::Ready(Err(BodyError::Timeout)) => Poll::Ready(Err(Failure::Timeout)),
                Poll::Pending => Poll::Pending,
            };
        }
    }
}

impl Race {
    /// Ready with an answer that counts, or the end of the last racer where nothing `else_` is under way.
    fn poll(&mut self, retry: &RetryState<'_>, else_: bool, cx: &mut Context<'_>) -> Poll<News> {
        let mut i = 0;
        while i < self.racers.len() {
            let Poll::Ready(result) = self.racers[i].poll(cx) else {
                i += 1;
                continue;
            };
            clock::tick();
            let racer = self.racers.swap_remove(i);
            outlier::report(&racer.host, self.grpc, result.as_ref());
            let others = else_ || !self.racers.is_empty();
            match result {
                Ok(head) if racer.retried && others && retry.wants_response(&head) => {
                    racer.host.host.stats.rq_error.inc();
                }
                Ok(head) => return Poll::Ready(News::Racer(head, racer)),
                Err(failure) if others => self.lost.push(failure.status()),
                Err(failure) => return Poll::Ready(News::Lost(failure)),
            }
        }
        Poll::Pending
    }
}

impl Forward<'_> {
    /// The request with hedging, to its response.
    pub(super) async fn hedge(
        &mut self,
        mut upload: Upload,
        mut retry: RetryState<'_>,
    ) -> Result<Response, End> {
        let mut race = Race { grpc: Stream::is_grpc(&self.stream.request), ..Race::default() };
        let mut next = Next::Attempt;
        loop {
            let news = self.next_news(&next, &mut upload, &retry, &mut race).await;
            if let News::Own(result) = &news {
                self.report(result.as_ref().map(|(head, _)| head));
            }
            race.lost.drain(..).for_each(|status| self.charge_local(status));
            let result = match news {
                News::Again => {
                    next = Next::Attempt;
                    continue;
                }
                News::Failed(failure) => {
                    // One of them is the request's own.
                    race.racers.iter().skip(1).for_each(|racer| self.charge_racer(racer));
                    self.charge_failed(&failure);
                    return Err(self.fail(failure));
                }
                News::Own(Err(failure @ (Failure::Timeout | Failure::Downstream(_)))) => {
                    race.racers.iter().for_each(|racer| self.charge_racer(racer));
                    self.charge_failed(&failure);
                    return Err(self.fail(failure));
                }
                News::Own(Err(Failure::PerTryTimeout | Failure::PerTryIdleTimeout)) => {
                    self.timed_out = true;
                    next = self.slow(&mut upload, &mut retry, &mut race);
                    continue;
                }
                News::Own(result) => result,
                // It had its retry: there is nothing to decide.
                News::Racer(head, racer) if racer.retried => {
                    let exchange = self.take_over(racer);
                    drop(race);
                    return self.finish(head, exchange, upload);
                }
                News::Racer(head, racer) => Ok((head, self.take_over(racer))),
                News::Lost(failure) => return Err(self.fail(failure)),
            };
            self.timed_out = false;
            let random = self.stream.worker.random();
            let decision = match &result {
                _ if self.informed || !upload.can_replay() => Retry::No,
                Ok((head, _)) => retry.on_response(head, random),
                Err(failure) => retry.on_failure(failure, random),
            };
            if let Retry::After(delay) = decision {
                self.give_up(result, &upload);
                upload.rewind();
                next = Next::BackOff(clock::tick() + delay);
                continue;
            }
            let could_not = self.flag(&decision);
            match result {
                // Something better may still come.
                Ok((_, exchange)) if could_not && !race.racers.is_empty() => {
                    exchange.host().host.stats.rq_error.inc();
                    next = Next::Wait;
                }
                Ok((head, exchange)) => {
                    drop(race);
                    return self.finish(head, exchange, upload);
                }
                Err(failure) if !race.racers.is_empty() => {
                    self.charge_local(failure.status());
                    next = Next::Wait;
                }
                Err(failure) => return Err(self.fail(failure)),
            }
        }
    }

    async fn next_news(
        &mut self,
        next: &Next,
        upload: &mut Upload,
        retry: &RetryState<'_>,
        race: &mut Race,
    ) -> News {
        match next {
            Next::Attempt => {
                self.begin_attempt();
                let mut attempt = pin!(self.attempt(upload));
                poll_fn(|cx| match race.poll(retry, true, cx) {
                    Poll::Ready(news) => Poll::Ready(news),
                    Poll::Pending => attempt.as_mut().poll(cx).map(News::Own),
                })
                .await
            }
            Next::BackOff(until) => {
                let timer = self.stream.timer.clone();
                let timeouts = &mut self.timeouts;
                poll_fn(|cx| {
                    if let Poll::Ready(news) = race.poll(retry, true, cx) {
                        return Poll::Ready(news);
                    }
                    match timer.poll(cx, Some(*until)) {
                        Poll::Ready(()) => Poll::Ready(News::Again),
                        Poll::Pending => timeouts.poll(&timer, cx).map(News::Failed),
                    }
                })
                .await
            }
            Next::Wait => {
                let timer = self.stream.timer.clone();
                let timeouts = &mut self.timeouts;
                poll_fn(|cx| match race.poll(retry, false, cx) {
                    Poll::Ready(news) => Poll::Ready(news),
                    Poll::Pending => timeouts.poll(&timer, cx).map(News::Failed),
                })
                .await
            }
        }
    }

    /// The attempt's own timeout has passed: it becomes a racer.
    fn slow(&mut self, upload: &mut Upload, retry: &mut RetryState<'_>, race: &mut Race) -> Next {
        self.timeouts.attempt_over();
        let decision = match upload.can_replay() {
            true => retry.hedge(self.stream.worker.random()),
            false => Retry::No,
        };
        self.flag(&decision);
        if let (Some(exchange), Some(host)) = (self.slow.take(), self.host.clone()) {
            let upstream = self.stream.info.upstream.clone();
            let retried = matches!(decision, Retry::After(_));
            race.racers.push(Racer { exchange: *exchange, host, upstream, retried });
        }
        match decision {
            Retry::After(delay) => {
                upload.rewind();
                Next::BackOff(clock::tick() + delay)
            }
            _ => Next::Wait,
        }
    }

    /// Says why there is no other attempt; whether one was wanted.
    fn flag(&mut self, decision: &Retry) -> bool {
        let flags = &mut self.stream.info.flags;
        match decision {
            Retry::LimitExceeded => flags.set(ResponseFlag::UpstreamRetryLimitExceeded),
            Retry::Overflow => flags.set(ResponseFlag::UpstreamOverflow),
            Retry::After(_) | Retry::No => return false,
        }
        true
    }

    /// A racer's answer is the request's: what is known of the upstream is what is known of its own.
    fn take_over(&mut self, racer: Racer) -> Exchange {
        self.host = Some(racer.host);
        self.stream.info.upstream = racer.upstream;
        self.stream.info.upstream_mut().first_rx = Some(clock::recent());
        self.stream.timer.touch();
        racer.exchange
    }

    /// A racer that was still under way when the request's deadline passed.
    fn charge_racer(&self, racer: &Racer) {
        self.cluster.stats().upstream_rq_timeout.inc();
        self.counters.inc(|counters| &counters.timeout);
        racer.host.host.stats.rq_timeout.inc();
        self.charge_local(self.timeouts.status());
    }
}
