//! State of the world: each request names all that is asked for, each response has all that is (of LDS and CDS) or all
//! that changed (of the others). A request is one state sent whole, so that several reasons to send make one request.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use prost::Message;

use super::{Lives, WILDCARD, detail, refusal, ttl};
use crate::handler::{Failure, Handler, Refusal, Resource, Update};
use crate::wire::{self, Any, DiscoveryRequest, DiscoveryResponse};

pub(super) const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

/// One type on one stream.
#[derive(Debug)]
pub struct Subscription {
    type_url: String,
    names: BTreeSet<String>,
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
        }
    }

    /// Everything that is asked for from now on; [`WILDCARD`] is everything.
    pub fn interest(&mut self, names: BTreeSet<String>) {
        if names != self.names {
            self.pending = self.open;
            self.lives.0.retain(|name, _| names.contains(WILDCARD) || names.contains(name));
            self.names = names;
        }
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
    pub fn stream_closed(&mut self, handler: &mut dyn Handler) {
        self.open = false;
        handler.failed(Failure::Connection);
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

    /// The request to be sent now, without the node.
    pub fn next_request(&mut self) -> Option<DiscoveryRequest> {
        // Asking for nothing where no name was sent would ask for everything.
        self.pending &= self.named || !self.names.is_empty();
        if !self.open || self.pauses > 0 || !(self.pending || self.answer) {
            return None;
        }
        self.pending = false;
        self.answer = false;
        let everything = self.names.len() == 1 && self.names.contains(WILDCARD) && !self.named;
        let resource_names: Vec<_> =
            if everything { Vec::new() } else { self.names.iter().cloned().collect() };
        self.named |= !resource_names.is_empty();
        Some(DiscoveryRequest {
            version_info: self.version.clone(),
            node: None,
            resource_names,
            type_url: self.type_url.clone(),
            response_nonce: self.nonce.clone(),
            error_detail: self.error.take(),
        })
    }

    /// A response of this type. It is answered by a later [`Self::next_request`].
    pub fn receive(&mut self, response: DiscoveryResponse, now: Instant, handler: &mut dyn Handler) {
        let DiscoveryResponse { version_info, resources, nonce, .. } = response;
        let outcome = self.unwrap(&version_info, resources, now, handler).and_then(|resources| {
            let lives: Vec<(String, Option<Duration>)> =
                resources.iter().map(|resource| (resource.name.clone(), resource.ttl)).collect();
            handler.update(Update { version: version_info.clone(), resources, removed: Vec::new() })?;
            for (name, ttl) in lives {
                self.lives.set(&name, ttl, now);
            }
            Ok(())
        });
        self.error = detail(outcome);
        if self.error.is_none() {
            self.version = version_info;
        }
        self.nonce = nonce;
        self.answer = true;
    }

    fn unwrap(
        &mut self,
        version: &str,
        resources: Vec<Any>,
        now: Instant,
        handler: &dyn Handler,
    ) -> Result<Vec<Resource>, Vec<Refusal>> {
        let mut all = Vec::with_capacity(resources.len());
        for any in resources {
            if any.type_url != WRAPPER {
                self.check(&any)?;
                let name = handler.name_of(&any.value).unwrap_or_default();
                let (type_url, value) = (any.type_url, Some(any.value));
                let version = version.to_owned();
                all.push(Resource { name, version, type_url, value, aliases: Vec::new(), ttl: None });
                continue;
            }
            let wrapped = wire::Resource::decode(any.value)
                .map_err(|error| refusal("", format!("a wrapped resource: {error}")))?;
            // A heart-beat prolongs the life of what is there and changes nothing.
            if wrapped.resource.is_none() && wrapped.version == self.version {
                self.lives.set(&wrapped.name, ttl(wrapped.ttl), now);
                continue;
            }
            all.push(self.wrapped(wrapped, version)?);
        }
        Ok(all)
    }

    fn wrapped(&self, wrapped: wire::Resource, version: &str) -> Result<Resource, Vec<Refusal>> {
        let Some(any) = wrapped.resource else {
            return Err(refusal(&wrapped.name, "a heart-beat for a version that is not the one known"));
        };
        self.check(&any)?;
        Ok(Resource {
            name: wrapped.name,
            version: if wrapped.version.is_empty() { version.to_owned() } else { wrapped.version },
            type_url: any.type_url,
            value: Some(any.value),
            aliases: wrapped.aliases,
            ttl: ttl(wrapped.ttl),
        })
    }

    fn check(&self, any: &Any) -> Result<(), Vec<Refusal>> {
        if any.type_url == self.type_url {
            return Ok(());
        }
        Err(refusal(
            "",
            format!("a resource of type {} in a response of type {}", any.type_url, self.type_url),
        ))
    }

    /// When [`Self::expire`] is to be called.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lives.next()
    }

    /// Takes away what was not renewed in time; nobody is answered.
    pub fn expire(&mut self, now: Instant, handler: &mut dyn Handler) {
        let removed = self.lives.expire(now);
        if !removed.is_empty() {
            drop(handler.update(Update { version: String::new(), resources: Vec::new(), removed }));
        }
    }
}
