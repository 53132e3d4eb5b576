//! Delta: requests and responses carry changes only. An answer belongs to its response, so answers queue; what changed
//! in what is asked for goes with the next of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use super::{Lives, WILDCARD, detail, refusal, ttl};
use crate::handler::{Failure, Handler, Refusal, Resource, Update};
use crate::wire::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// One type on one stream.
#[derive(Debug)]
pub struct Subscription {
    type_url: String,
    names: BTreeSet<String>,
    /// What the server gave and did not take away.
    known: BTreeMap<String, String>,
    added: BTreeSet<String>,
    removed: BTreeSet<String>,
    answers: VecDeque<(String, Option<wire::Status>)>,
    first: bool,
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
            known: BTreeMap::new(),
            added: BTreeSet::new(),
            removed: BTreeSet::new(),
            answers: VecDeque::new(),
            first: true,
            open: false,
            pauses: 0,
            lives: Lives::default(),
        }
    }

    /// Everything that is asked for from now on; [`WILDCARD`] is everything.
    pub fn interest(&mut self, names: BTreeSet<String>) {
        for name in names.difference(&self.names) {
            self.removed.remove(name);
            self.added.insert(name.clone());
        }
        for name in self.names.difference(&names) {
            self.added.remove(name);
            self.removed.insert(name.clone());
        }
        self.names = names;
        // Under a wildcard the server may keep a name that was let go: it stays known.
        if !self.names.contains(WILDCARD) {
            self.known.retain(|name, _| self.names.contains(name));
            self.lives.0.retain(|name, _| self.names.contains(name));
        }
    }

    /// A new stream: all is asked for again, with the versions known; answers to the old one are void.
    pub fn stream_opened(&mut self) {
        self.open = true;
        self.first = true;
        self.answers.clear();
        self.removed.clear();
        self.added = self.names.clone();
    }

    /// The stream is gone; the versions stay.
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

    /// Names and versions that are in force.
    pub fn known(&self) -> &BTreeMap<String, String> {
        &self.known
    }

    /// The request to be sent now, without the node.
    pub fn next_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        if self.first {
            // Nothing was asked for on this stream that could be let go.
            self.removed.clear();
        }
        let due = !self.answers.is_empty() || !self.added.is_empty() || !self.removed.is_empty();
        if !self.open || self.pauses > 0 || !due {
            return None;
        }
        let mut subscribe = std::mem::take(&mut self.added);
        // A first request for everything and nothing else names nothing.
        if self.first && subscribe.len() == 1 && subscribe.contains(WILDCARD) {
            subscribe.clear();
        }
        let known = if self.first { self.known.clone() } else { BTreeMap::new() };
        let unsubscribe = std::mem::take(&mut self.removed);
        self.first = false;
        let (response_nonce, error_detail) = self.answers.pop_front().unwrap_or_default();
        Some(DeltaDiscoveryRequest {
            node: None,
            type_url: self.type_url.clone(),
            resource_names_subscribe: subscribe.into_iter().collect(),
            resource_names_unsubscribe: unsubscribe.into_iter().collect(),
            initial_resource_versions: known,
            response_nonce,
            error_detail,
        })
    }

    /// A response of this type. It is answered by a later [`Self::next_request`].
    pub fn receive(&mut self, response: DeltaDiscoveryResponse, now: Instant, handler: &mut dyn Handler) {
        let nonce = response.nonce.clone();
        let error = detail(self.check(&response).and_then(|()| self.apply(response, now, handler)));
        self.answers.push_back((nonce, error));
    }

    fn is_heart_beat(&self, resource: &wire::Resource) -> bool {
        resource.resource.is_none() && self.known.get(&resource.name) == Some(&resource.version)
    }

    fn check(&self, response: &DeltaDiscoveryResponse) -> Result<(), Vec<Refusal>> {
        let mut seen = BTreeSet::new();
        let names = response.resources.iter().map(|resource| &resource.name);
        for name in names.chain(&response.removed_resources) {
            if !seen.insert(name) {
                return Err(refusal(name, "named twice in a response"));
            }
        }
        for resource in &response.resources {
            let answers_alias = resource.resource.is_none() && !resource.aliases.is_empty();
            if self.is_heart_beat(resource) || answers_alias {
                continue;
            }
            let type_url = resource.resource.as_ref().map_or("", |any| any.type_url.as_str());
            if type_url != self.type_url {
                let reason = format!("of type {type_url:?} in a response of type {}", self.type_url);
                return Err(refusal(&resource.name, reason));
            }
        }
        Ok(())
    }

    fn apply(
        &mut self,
        response: DeltaDiscoveryResponse,
        now: Instant,
        handler: &mut dyn Handler,
    ) -> Result<(), Vec<Refusal>> {
        let mut versions = Vec::with_capacity(response.resources.len());
        let mut resources = Vec::with_capacity(response.resources.len());
        for resource in response.resources {
            let lives = ttl(resource.ttl);
            versions.push((resource.name.clone(), resource.version.clone(), lives));
            if self.is_heart_beat(&resource) {
                continue;
            }
            let (type_url, value) = resource.resource.map(|any| (any.type_url, any.value)).unzip();
            resources.push(Resource {
                name: resource.name,
                version: resource.version,
                type_url: type_url.unwrap_or_default(),
                value,
                aliases: resource.aliases,
                ttl: lives,
            });
        }
        let removed = response.removed_resources;
        let version = response.system_version_info;
        let outcome = handler.update(Update { version, resources, removed: removed.clone() });
        if outcome.as_ref().is_err_and(|refusals| !refusals.is_empty()) {
            return outcome;
        }
        for (name, version, ttl) in versions {
            if self.names.contains(WILDCARD) || self.names.contains(&name) {
                self.lives.set(&name, ttl, now);
                self.known.insert(name, version);
            }
        }
        for name in removed {
            self.lives.0.remove(&name);
            self.known.remove(&name);
        }
        Ok(())
    }

    /// When [`Self::expire`] is to be called.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lives.next()
    }

    /// Takes away what was not renewed in time; nobody is answered.
    pub fn expire(&mut self, now: Instant, handler: &mut dyn Handler) {
        let removed = self.lives.expire(now);
        for name in &removed {
            self.known.remove(name);
        }
        if !removed.is_empty() {
            drop(handler.update(Update { version: String::new(), resources: Vec::new(), removed }));
        }
    }
}
