//! The way through the filters: requests in order to the router, responses in reverse, watched for the client's end and
//! the deadlines.

use std::pin::pin;

use sampan_codec::ResetReason;
use sampan_core::clock;
use sampan_core::header::{HeaderId, HeaderMap};

use super::watch::watched;
use super::{Exchange, Failure};
use crate::filter::{LocalReply, Outcome, Response, State, Step};
use crate::filters::discard_ready;
use crate::manager::config::{Chain, Manager};
use crate::manager::responder::Responder;
use crate::router;
use crate::stream::Stream;
use crate::timer::Timer;

impl Exchange {
    /// The chain that serves this request: the listener's, or an upgrade's own.
    fn chain<'m>(stream: &Stream, manager: &'m Manager) -> Result<&'m Chain, LocalReply> {
        let Some(upgrade) = &stream.upgrade else { return Ok(&manager.chain) };
        let configured = manager.upgrades.get(upgrade);
        let by_route = stream.route.as_ref().and_then(|route| route.upgrade_enabled(upgrade));
        let enabled = by_route.unwrap_or_else(|| configured.is_some_and(|c| c.enabled));
        if !enabled || (configured.is_none() && by_route.is_none()) {
            if stream.route.is_none() {
                return Ok(&manager.chain);
            }
            manager.stats.downstream_rq_ws_on_non_ws_route.inc();
            return Err(LocalReply::new(403, "upgrade_failed"));
        }
        manager.stats.downstream_cx_upgrades_total.inc();
        Ok(configured.and_then(|c| c.chain.as_ref()).unwrap_or(&manager.chain))
    }

    /// Filters in order, then the router.
    pub(super) async fn process(&mut self, responder: &mut Responder) -> Result<Response, Failure> {
        let manager = self.stream.manager.clone();
        let chain = match Self::chain(&self.stream, &manager) {
            Ok(chain) => chain,
            Err(reply) => {
                self.close = true;
                if let Responder::H2(h2) = responder {
                    h2.shared.leave();
                }
                return Err(Failure::Reply(Box::new(reply)));
            }
        };
        self.states.resize_with(chain.filters.len(), || None);
        let Self { stream, states, .. } = self;
        let timer = stream.timer.clone();
        if !chain.filters.is_empty()
            && let Some(response) = request_filters(chain, stream, states, responder, &timer).await?
        {
            return Ok(response);
        }
        let run = pin!(async {
            let Some(router) = &chain.router else {
                // No filter at all: nobody answers, as in Envoy, until a timeout does.
                return std::future::pending().await;
            };
            router::forward(stream, router).await.map_err(|end| match end {
                router::End::Reply(reply) => Failure::Reply(reply),
                router::End::Reset => Failure::Reset,
                router::End::Follow(followed) => Failure::Follow(followed),
            })
        });
        watched(run, responder, &timer).await
    }

    /// Turns a failure into the reply that it means, then lets the response pass the filters in reverse.
    pub(super) async fn finish_response(
        &mut self,
        processed: Result<Response, Failure>,
        responder: &mut Responder,
        through_filters: bool,
    ) -> Result<Response, ResetReason> {
        let mut response = match processed {
            Ok(response) => response,
            Err(failure) => {
                let reply = match failure {
                    Failure::Gone(reason) => return Err(reason),
                    Failure::Reset | Failure::Follow(_) => return Err(ResetReason::LocalReset),
                    Failure::Reply(reply) => *reply,
                    Failure::Expired(what) => self.expired(what),
                };
                self.local_response(reply)
            }
        };
        if !through_filters {
            return Ok(response);
        }
        match self.filter_response(&mut response, responder).await {
            Ok(()) => {}
            Err(Failure::Gone(reason)) => return Err(reason),
            Err(Failure::Reset | Failure::Follow(_)) => return Err(ResetReason::LocalReset),
            Err(Failure::Reply(reply)) => response = self.local_response(*reply),
            Err(Failure::Expired(what)) => {
                let reply = self.expired(what);
                response = self.local_response(reply);
            }
        }
        Ok(response)
    }

    /// Lets a response's trailers pass the filters in reverse.
    pub(super) fn pass_trailers(stream: &Stream, response: Option<&HeaderMap>, trailers: &mut HeaderMap) {
        let Some(response) = response else { return };
        for named in Self::chain_of(stream, &stream.manager).filters.iter().rev() {
            if !stream.filter_disabled(named) {
                named.filter.on_response_trailers(stream, response, trailers);
            }
        }
    }

    /// The filters in reverse.
    async fn filter_response(
        &mut self,
        response: &mut Response,
        responder: &mut Responder,
    ) -> Result<(), Failure> {
        let manager = self.stream.manager.clone();
        let chain = Self::chain_of(&self.stream, &manager);
        if chain.filters.is_empty() {
            return Ok(());
        }
        self.states.resize_with(chain.filters.len(), || None);
        let Self { stream, states, .. } = self;
        let timer = stream.timer.clone();
        let run = pin!(async {
            for (named, state) in chain.filters.iter().zip(states.iter_mut()).rev() {
                if stream.filter_disabled(named) {
                    continue;
                }
                match named.filter.on_response(stream, response, state).outcome().await {
                    Outcome::Continue => {}
                    Outcome::Reply(reply) => return Err(Failure::Reply(reply)),
                    Outcome::Respond(other) => *response = *other,
                    Outcome::Reset => return Err(Failure::Reset),
                }
            }
            if response.headers.contains(HeaderId::STATUS) {
                return Ok(());
            }
            let details = "filter_removed_required_response_headers{missing_required_header:_:status}";
            let reply = LocalReply::new(502, details).body("missing required header: :status");
            Err(Failure::Reply(Box::new(reply)))
        });
        watched(run, responder, &timer).await
    }

    /// [`Exchange::chain`] once it was decided.
    pub(super) fn chain_of<'m>(stream: &Stream, manager: &'m Manager) -> &'m Chain {
        let own =
            stream.upgrade.as_ref().and_then(|u| manager.upgrades.get(u)).and_then(|u| u.chain.as_ref());
        own.unwrap_or(&manager.chain)
    }
}

/// The request's way through the filters; a response ends it there.
async fn request_filters(
    chain: &Chain,
    stream: &mut Stream,
    states: &mut [State],
    responder: &mut Responder,
    timer: &Timer,
) -> Result<Option<Response>, Failure> {
    // A client that leaves within its body is noticed while a filter waits, which does not read it.
    let ahead = !stream.body.is_end();
    if ahead {
        responder.read_ahead(true);
    }
    let answered = {
        let filters = pin!(async {
            for (named, state) in chain.filters.iter().zip(states) {
                if stream.filter_disabled(named) {
                    continue;
                }
                let step = named.filter.on_request(stream, state);
                let waits = matches!(step, Step::Wait(_));
                let (outcome, waited) = step.outcome_and_wait().await;
                if waits {
                    stream.resumed = Some(clock::tick());
                }
                match outcome {
                    Outcome::Continue => {}
                    Outcome::Reply(reply) => {
                        if waited && !reply.close && stream.upgrade.is_none() {
                            discard_ready(stream);
                        }
                        return Err(Failure::Reply(reply));
                    }
                    Outcome::Respond(response) => return Ok(Some(*response)),
                    Outcome::Reset => return Err(Failure::Reset),
                }
            }
            Ok(None)
        });
        watched(filters, responder, timer).await
    };
    if ahead {
        responder.read_ahead(false);
        if matches!(answered, Err(Failure::Gone(_))) {
            discard_ready(stream);
        }
    }
    answered
}
