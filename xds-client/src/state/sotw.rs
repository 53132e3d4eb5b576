//! State of the world: each request names all that is asked for, each response has all that is (of LDS and CDS) or all
//! that changed (of the others). A request is one state sent whole, so that several reasons to send make one request.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;

use super::{Batch, Lives, Name, WILDCARD, check_ttl, detail, refusal, ttl};
use crate::grpc::framed_with;
use crate::handler::{Refusal, Resource};
use crate::wire::{self, Any, DiscoveryRequest, DiscoveryResponse};

pub(super) const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

/// One type on one stream.
#[derive(Debug)]
pub struct Subscription {
    type_url: String,
    names: BTreeSet<Name>,
    /// Names were sent on this stream: from then on an empty list asks for nothing instead of everything.
    named: bool,
    version: String,
    nonce: String,
    error: Option<wire::Status>,
    pending: bool,
    /// A response's answer is owed; it goes out whatever is subscribed.
    answer: bool,
    open: bool,
    pauses: u32,
    lives: Lives,
    /// The names as a request has them; none: they are not what they were.
    encoded: Option<Bytes>,
}

/// A request, without the node. Each names all that is asked for, so that ten thousand names are encoded once and not for
/// each answer.
#[derive(Debug)]
pub struct Request {
    /// All but the names.
    pub message: DiscoveryRequest,
    names: Bytes,
}

impl Request {
    /// As it goes out.
    pub fn framed(&self) -> Bytes {
        framed_with(&self.message, &self.names)
    }
}

impl Subscription {
    /// Asks for nothing yet.
    pub fn new(type_url: &str) -> Self {
        Self {
            type_url: type_url.to_owned(),
            names: BTreeSet::new(),
            named: false,
            version: String::new(),
            nonce: String::new(),
            error: None,
            pending: false,
            answer: false,
            open: false,
            pauses: 0,
            lives: Lives::default(),
            encoded: None,
        }
    }

    /// A watcher came or went. As in Envoy all is asked for again, also where another wants the same: the answer that it
    /// waits for may come no other way.
    pub fn touch(&mut self) {
        self.pending = self.open;
    }

    /// Asks for another name; [`WILDCARD`] is everything.
    pub fn add(&mut self, name: &Name) {
        if self.names.insert(name.clone()) {
            self.pending = self.open;
            self.encoded = None;
        }
    }

    /// Asks for a name no longer.
    pub fn remove(&mut self, name: &str) {
        if self.names.remove(name) {
            self.pending = self.open;
            self.encoded = None;
            self.lives.0.remove(name);
        }
    }

    /// What is asked for.
    pub fn names(&self) -> &BTreeSet<Name> {
        &self.names
    }

    /// A new stream: what is asked for is asked for again, with the version known and no nonce.
    pub fn stream_opened(&mut self) {
        self.open = true;
        self.named = false;
        self.nonce.clear();
        self.error = None;
        self.answer = false;
        self.pending = !self.names.is_empty();
    }

    /// The stream is gone; the version stays.
    pub fn stream_closed(&mut self) {
        self.open = false;
    }

    /// Holds requests back; each call needs its [`Self::resume`].
    pub fn pause(&mut self) {
        self.pauses += 1;
    }

    /// The last one lets requests go.
    pub fn resume(&mut self) {
        self.pauses = self.pauses.saturating_sub(1);
    }

    /// The version last accepted.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether there is a request to be sent now.
    pub fn is_due(&mut self) -> bool {
        // Asking for nothing where no name was sent would ask for everything.
        self.pending &= self.named || !self.names.is_empty();
        self.open && self.pauses == 0 && (self.pending || self.answer)
    }

    /// The request to be sent now.
    pub fn next_request(&mut self) -> Option<Request> {
        if !self.is_due() {
            return None;
        }
        self.pending = false;
        self.answer = false;
        let everything = self.names.len() == 1 && self.names.contains(WILDCARD) && !self.named;
        let names = if everything { Bytes::new() } else { self.encoded_names() };
        self.named |= !names.is_empty();
        let message = DiscoveryRequest {
            version_info: self.version.clone(),
            node: None,
            resource_names: Vec::new(),
            type_url: self.type_url.clone(),
            response_nonce: self.nonce.clone(),
            error_detail: self.error.take(),
        };
        Some(Request { message, names })
    }

    fn encoded_names(&mut self) -> Bytes {
        let names = &self.names;
        let encode = || {
            let resource_names = names.iter().map(|name| name.to_string()).collect();
            DiscoveryRequest { resource_names, ..DiscoveryRequest::default() }.encode_to_vec().into()
        };
        self.encoded.get_or_insert_with(encode).clone()
    }

    /// Takes a response apart. Whatever becomes of it, [`Self::answer`] is to be called next.
    ///
    /// # Errors
    /// What makes no sense, whatever the resources mean.
    pub fn take_apart(&mut self, resources: Vec<Any>, version: &str, now: Instant) -> Result<Batch, Refusal> {
        let mut all = Vec::with_capacity(resources.len());
        for any in resources {
            if any.type_url != WRAPPER {
                self.check(&any)?;
                let (type_url, value) = (any.type_url, Some(any.value));
                let (name, version) = (String::new(), version.to_owned());
                all.push(Resource { name, version, type_url, value, aliases: Vec::new(), ttl: None });
                continue;
            }
            let wrapped = wire::Resource::decode(any.value)
                .map_err(|error| refusal("", format!("a wrapped resource: {error}")))?;
            check_ttl(&wrapped)?;
            // A heart-beat prolongs the life of what is there and changes nothing. Its version, and that of any wrapped
            // resource, is the response's (Envoy 1.40).
            if wrapped.resource.is_none() && version == self.version {
                self.lives.set(&wrapped.name, ttl(wrapped.ttl), now);
                continue;
            }
            all.push(self.wrapped(wrapped, version)?);
        }
        Ok(Batch { resources: all, removed: Vec::new() })
    }

    fn wrapped(&self, wrapped: wire::Resource, version: &str) -> Result<Resource, Refusal> {
        let Some(any) = wrapped.resource else {
            return Err(refusal(&wrapped.name, "a heart-beat for a version that is not the one known"));
        };
        self.check(&any)?;
        Ok(Resource {
            name: wrapped.name,
            version: version.to_owned(),
            type_url: any.type_url,
            value: Some(any.value),
            aliases: wrapped.aliases,
            ttl: ttl(wrapped.ttl),
        })
    }

    fn check(&self, any: &Any) -> Result<(), Refusal> {
        if any.type_url == self.type_url {
            return Ok(());
        }
        let reason = format!(
            "{} does not match the message-wide type URL {} in DiscoveryResponse",
            any.type_url, self.type_url
        );
        Err(refusal("", reason))
    }

    /// The answer that a later [`Self::next_request`] gives. `lives`: the names of what was taken, with their times to
    /// live.
    pub fn answer(
        &mut self,
        response: DiscoveryResponse,
        outcome: Result<Vec<(String, Option<Duration>)>, Refusal>,
        now: Instant,
    ) {
        match outcome {
            Ok(lives) => {
                for (name, ttl) in lives {
                    self.lives.set(&name, ttl, now);
                }
                self.version = response.version_info;
                self.error = None;
            }
            Err(refusal) => self.error = Some(detail(refusal)),
        }
        self.nonce = response.nonce;
        self.answer = true;
    }

    /// A response that nobody waits for. One that is empty is in force; another is answered with the version of before.
    pub fn unwatched(&mut self, response: DiscoveryResponse) {
        self.nonce = response.nonce;
        if response.resources.is_empty() {
            self.version = response.version_info;
        } else {
            self.answer = true;
        }
    }

    /// When [`Self::expire`] is to be called.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lives.next()
    }

    /// What was not renewed in time; it is to be taken away, and nobody is answered.
    pub fn expire(&mut self, now: Instant) -> Vec<String> {
        self.lives.expire(now)
    }
}
