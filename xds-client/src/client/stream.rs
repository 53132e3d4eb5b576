//! The stream's task: open, send what is due, read, hand out, and again.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tokio::time::Sleep;

use super::watches::give;
use super::{Inner, Machine, Observer, RateLimit, Type, Variant, machine};
use crate::backoff::Backoff;
use crate::grpc::{Deframer, framed};
use crate::handler::{Decoded, Failure, Refusal, Resource};
use crate::state::Batch;
use crate::transport::{Call, End};
use crate::wire::{ControlPlane, DeltaDiscoveryResponse, DiscoveryResponse};

/// Runs until it is aborted.
pub(super) async fn keep_up(inner: Rc<Inner>) {
    let mut backoff = Backoff::new(inner.config.backoff.0, inner.config.backoff.1);
    let mut tokens = inner.config.rate_limit.map(Tokens::new);
    loop {
        let end = session(&inner, &mut backoff, &mut tokens).await;
        inner.observer.closed(&end);
        inner.observer.connected(false);
        inner.open.set(false);
        for of in inner.all() {
            machine!(of, machine => machine.stream_closed());
            of.failed(Failure::Connection);
        }
        tokio::time::sleep(backoff.next(rand::random())).await;
    }
}

async fn session(inner: &Rc<Inner>, backoff: &mut Backoff, tokens: &mut Option<Tokens>) -> End {
    let mut call = match inner.transport.open(&inner.config.path).await {
        Ok(call) => call,
        Err(end) => return end,
    };
    inner.observer.connected(true);
    inner.open.set(true);
    inner.node.borrow_mut().stream_opened();
    *inner.last.borrow_mut() = None;
    for of in inner.all() {
        machine!(of, machine => machine.stream_opened());
    }
    let mut deframer = Deframer::limited(inner.config.max_message);
    loop {
        match next_chunk(inner, &mut *call, tokens).await {
            Ok(chunk) => deframer.push(chunk),
            Err(end) => return end,
        }
        loop {
            match deframer.pop() {
                Ok(Some(message)) => {
                    backoff.reset();
                    inner.observer.received();
                    if let Err(end) = inner.receive(message) {
                        return end;
                    }
                    // The answer is on its way before the next response is looked at.
                    if let Err(end) = poll_fn(|cx| Poll::Ready(inner.send(&mut *call, tokens, cx))).await {
                        return end;
                    }
                }
                Ok(None) => break,
                Err(end) => return end,
            }
        }
    }
}

/// Sends what is due and lets old resources die until the peer says something.
async fn next_chunk(
    inner: &Rc<Inner>,
    call: &mut dyn Call,
    tokens: &mut Option<Tokens>,
) -> Result<Bytes, End> {
    let mut alarm: std::pin::Pin<&mut Sleep> = pin!(tokio::time::sleep(Duration::from_secs(3600)));
    poll_fn(|cx| {
        inner.waker.replace(Some(cx.waker().clone()));
        if let Poll::Ready(end) = call.poll_data(cx) {
            return Poll::Ready(end);
        }
        loop {
            if let Err(end) = inner.send(call, tokens, cx) {
                return Poll::Ready(Err(end));
            }
            let expiry = inner.all().iter().filter_map(|of| of.next_expiry()).min();
            let token = tokens.as_ref().and_then(Tokens::wanted_at);
            let Some(at) = expiry.into_iter().chain(token).min() else { return Poll::Pending };
            alarm.as_mut().reset(at.into());
            if alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            inner.expire();
        }
    })
    .await
}

impl Inner {
    fn all(&self) -> Vec<Rc<Type>> {
        self.types.borrow().clone()
    }

    /// Sends what is due, as long as the peer takes it.
    fn send(
        &self,
        call: &mut dyn Call,
        tokens: &mut Option<Tokens>,
        cx: &mut Context<'_>,
    ) -> Result<(), End> {
        loop {
            match call.poll_flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => return Err(end),
                Poll::Pending => return Ok(()),
            }
            if !self.is_due() {
                return Ok(());
            }
            if let Some(tokens) = tokens {
                let waited = tokens.wanted;
                let goes = tokens.take(Instant::now());
                if goes == waited {
                    self.observer.held_back(usize::from(!goes));
                }
                if !goes {
                    if !waited {
                        self.observer.rate_limited();
                    }
                    return Ok(());
                }
            }
            match self.next_request() {
                Some(request) => call.send(request),
                None => return Ok(()),
            }
        }
    }

    fn is_due(&self) -> bool {
        self.types.borrow().iter().any(|of| machine!(of, machine => machine.is_due()))
    }

    /// The type whose response was read last comes last: its answer waits for what the response made others ask for.
    fn next_request(&self) -> Option<Bytes> {
        let last = self.last.borrow().clone();
        let is_last = |of: &Rc<Type>| last.as_ref().is_some_and(|last| Rc::ptr_eq(last, of));
        let types = self.all();
        let ordered = types.iter().filter(|of| !is_last(of)).chain(&last);
        for of in ordered {
            let request = match &mut *of.machine.borrow_mut() {
                Machine::World(machine) => machine.next_request().map(|mut request| {
                    request.message.node = self.node.borrow_mut().for_request();
                    request.framed()
                }),
                Machine::Delta(machine) => machine.next_request().map(|mut request| {
                    request.node = self.node.borrow_mut().for_request();
                    framed(&request)
                }),
            };
            if request.is_some() {
                return request;
            }
        }
        None
    }

    fn receive(&self, message: Bytes) -> Result<(), End> {
        let broken =
            |error: prost::DecodeError| End::internal(format!("a response that cannot be decoded: {error}"));
        match self.config.variant {
            Variant::StateOfTheWorld => {
                let response = DiscoveryResponse::decode(message).map_err(broken)?;
                let (version, from) = (&response.version_info, response.control_plane.as_ref());
                if let Some(of) = self.recipient(&response.type_url, version, from) {
                    of.receive_world(response, &*self.observer);
                }
            }
            Variant::Delta => {
                let response = DeltaDiscoveryResponse::decode(message).map_err(broken)?;
                let (version, from) = (&response.system_version_info, response.control_plane.as_ref());
                if let Some(of) = self.recipient(&response.type_url, version, from) {
                    of.receive_delta(response, &*self.observer);
                }
            }
        }
        Ok(())
    }

    fn recipient(&self, type_url: &str, version: &str, from: Option<&ControlPlane>) -> Option<Rc<Type>> {
        let delta = self.config.variant == Variant::Delta;
        // In the state of the world Envoy answers also for a type that it only paused.
        let is = |of: &&Rc<Type>| &*of.url == type_url && (of.watched.get() || !delta);
        let of = self.types.borrow().iter().find(is).cloned();
        match &of {
            Some(_) => {
                if let Some(from) = from {
                    self.observer.identifier(&from.identifier);
                }
                self.last.borrow_mut().clone_from(&of);
            }
            None => self.observer.unwanted(type_url, version),
        }
        of
    }

    fn expire(&self) {
        let now = Instant::now();
        for of in self.all() {
            let dead = machine!(of, machine => machine.expire(now));
            if !dead.is_empty() {
                // Nobody is answered, so that a refusal has no one to go to.
                let _ = give(&of.watches, "", &[], &dead, (true, false));
            }
        }
    }
}

impl Type {
    fn receive_world(&self, mut response: DiscoveryResponse, observer: &dyn Observer) {
        let now = Instant::now();
        if self.watches.borrow().is_empty() {
            if let Machine::World(machine) = &mut *self.machine.borrow_mut() {
                machine.unwatched(response);
            }
            return;
        }
        let empty = response.resources.is_empty();
        // What the watchers do in between may touch this machine: it is not borrowed meanwhile.
        let opened = match &mut *self.machine.borrow_mut() {
            Machine::World(machine) => {
                machine.take_apart(std::mem::take(&mut response.resources), &response.version_info, now)
            }
            Machine::Delta(_) => return,
        };
        let outcome = match opened {
            // Heart-beats alone say nothing of what else there is: who wants everything is told nothing.
            Ok(batch) if batch.resources.is_empty() && !empty => Ok(Vec::new()),
            opened => self.take(opened, &response.version_info, false, observer),
        };
        if let Machine::World(machine) = &mut *self.machine.borrow_mut() {
            machine.answer(response, outcome, now);
        }
    }

    fn receive_delta(&self, response: DeltaDiscoveryResponse, observer: &dyn Observer) {
        let now = Instant::now();
        let opened = match &*self.machine.borrow() {
            Machine::Delta(machine) => machine.take_apart(&response),
            Machine::World(_) => return,
        };
        let outcome = self.take(opened, &response.system_version_info, true, observer).map(drop);
        if let Machine::Delta(machine) = &mut *self.machine.borrow_mut() {
            machine.answer(response, outcome, now);
        }
    }

    /// Decodes all, then hands out. Gives the names that were taken, with their times to live.
    fn take(
        &self,
        opened: Result<Batch, Refusal>,
        version: &str,
        delta: bool,
        observer: &dyn Observer,
    ) -> Result<Vec<(String, Option<Duration>)>, Refusal> {
        let mut lives = Vec::new();
        let whole = |reason: String| Refusal { name: String::new(), reason };
        let taken = opened.and_then(|mut batch| {
            let empty = batch.resources.is_empty() && batch.removed.is_empty();
            if delta {
                // As in Envoy what nobody asked for is not looked at, so that it refuses nothing.
                let watches = self.watches.borrow();
                batch.resources.retain(|one| watches.is_wanted(&one.name, &one.aliases));
            }
            let decoded = self.decode(batch.resources, &mut lives).map_err(whole)?;
            give(&self.watches, version, &decoded, &batch.removed, (delta, !delta || empty)).map_err(whole)
        });
        if let Err(refusal) = &taken {
            observer.refused(&self.url, &refusal.reason);
            self.failed(Failure::Rejected(&refusal.reason));
        }
        taken.map(|()| lives)
    }

    fn decode(
        &self,
        resources: Vec<Resource>,
        lives: &mut Vec<(String, Option<Duration>)>,
    ) -> Result<Vec<Rc<Decoded>>, String> {
        let Some(first) = self.watches.borrow().first() else { return Ok(Vec::new()) };
        let decode = |resource: Resource| {
            let ttl = resource.ttl;
            let decoded = first.watcher.decode(resource)?;
            lives.push((decoded.name.clone(), ttl));
            Ok(Rc::new(decoded))
        };
        resources.into_iter().map(decode).collect()
    }
}

/// A token bucket.
struct Tokens {
    limit: RateLimit,
    left: f64,
    at: Instant,
    wanted: bool,
}

impl Tokens {
    fn new(limit: RateLimit) -> Self {
        Self { limit, left: f64::from(limit.max_tokens), at: Instant::now(), wanted: false }
    }

    fn take(&mut self, now: Instant) -> bool {
        let grown = now.saturating_duration_since(self.at).as_secs_f64() * self.limit.fill_rate;
        self.left = (self.left + grown).min(f64::from(self.limit.max_tokens));
        self.at = now;
        self.wanted = self.left < 1.0;
        if !self.wanted {
            self.left -= 1.0;
        }
        !self.wanted
    }

    /// When the token is there that a request waits for.
    fn wanted_at(&self) -> Option<Instant> {
        let missing = Duration::try_from_secs_f64((1.0 - self.left) / self.limit.fill_rate).ok();
        missing.filter(|_| self.wanted).map(|missing| self.at + missing)
    }
}
