//! Delta: requests and responses carry changes only. An answer belongs to its response, so answers queue; what changed
//! in what is asked for goes with the next of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use super::{Batch, Lives, Name, WILDCARD, check_ttl, detail, refusal, ttl};
use crate::handler::{Refusal, Resource};
use crate::types;
use crate::wire::{self, DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// One type on one stream.
#[derive(Debug)]
pub struct Subscription {
    type_url: String,
    names: BTreeSet<Name>,
    /// What the server gave and did not take away. Versions are often the same.
    known: BTreeMap<Name, Rc<str>>,
    /// Of those the ones of which the server said that there is no such resource (VHDS).
    absent: BTreeSet<Name>,
    added: BTreeSet<Name>,
    removed: BTreeSet<Name>,
    /// Of `added` those that the server was told to give up, which it was not told yet.
    renewed: BTreeSet<Name>,
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
            absent: BTreeSet::new(),
            added: BTreeSet::new(),
            removed: BTreeSet::new(),
            renewed: BTreeSet::new(),
            answers: VecDeque::new(),
            first: true,
            open: false,
            pauses: 0,
            lives: Lives::default(),
        }
    }

    /// Asks for another name; [`WILDCARD`] is everything.
    pub fn add(&mut self, name: &Name) {
        if self.names.insert(name.clone()) {
            if self.removed.remove(name) {
                self.renewed.insert(name.clone());
            }
            self.added.insert(name.clone());
        }
    }

    /// Asks for a name no longer.
    pub fn remove(&mut self, name: &str) {
        if !self.names.remove(name) {
            return;
        }
        // What the server was not told yet is not worth a word, so that names that come and go leave nothing behind.
        if !self.added.remove(name) || self.renewed.remove(name) {
            self.removed.insert(name.into());
        }
        if name == WILDCARD {
            self.known.retain(|name, _| self.names.contains(name));
            self.absent.retain(|name| self.names.contains(name));
            self.lives.0.retain(|name, _| self.names.contains(&**name));
        } else if self.absent.remove(name) || !self.names.contains(WILDCARD) {
            // Under a wildcard the server may keep what was let go, if there is such: it stays known.
            self.known.remove(name);
            self.lives.0.remove(name);
        }
    }

    /// What is asked for.
    pub fn names(&self) -> &BTreeSet<Name> {
        &self.names
    }

    /// A new stream: all is asked for again, with the versions known; answers to the old one are void.
    pub fn stream_opened(&mut self) {
        self.open = true;
        self.first = true;
        self.answers.clear();
        self.removed.clear();
        self.renewed.clear();
        self.added = self.names.clone();
    }

    /// The stream is gone; the versions stay.
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

    /// Names and versions that are in force.
    pub fn known(&self) -> &BTreeMap<Name, Rc<str>> {
        &self.known
    }

    /// Whether there is a request to be sent now.
    pub fn is_due(&mut self) -> bool {
        if self.first {
            // Nothing was asked for on this stream that could be let go.
            self.removed.clear();
        }
        let due = !self.answers.is_empty() || !self.added.is_empty() || !self.removed.is_empty();
        self.open && self.pauses == 0 && due
    }

    /// The request to be sent now, without the node.
    pub fn next_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        if !self.is_due() {
            return None;
        }
        let mut subscribe = std::mem::take(&mut self.added);
        // A first request for everything and nothing else names nothing.
        if self.first && subscribe.len() == 1 && subscribe.contains(WILDCARD) {
            subscribe.clear();
        }
        let known = self.first.then(|| self.known.iter()).into_iter().flatten();
        let known = known.map(|(name, version)| (name.to_string(), version.to_string())).collect();
        let unsubscribe = std::mem::take(&mut self.removed);
        self.renewed.clear();
        self.first = false;
        let (response_nonce, error_detail) = self.answers.pop_front().unwrap_or_default();
        Some(DeltaDiscoveryRequest {
            node: None,
            type_url: self.type_url.clone(),
            resource_names_subscribe: subscribe.iter().map(|name| name.to_string()).collect(),
            resource_names_unsubscribe: unsubscribe.iter().map(|name| name.to_string()).collect(),
            initial_resource_versions: known,
            response_nonce,
            error_detail,
        })
    }

    fn is_heart_beat(&self, resource: &wire::Resource) -> bool {
        // A virtual host without a value is one that there is not.
        self.type_url != types::VIRTUAL_HOST
            && resource.resource.is_none()
            && self.known.get(&*resource.name).is_some_and(|version| **version == *resource.version)
    }

    fn check(&self, response: &DeltaDiscoveryResponse) -> Result<(), Refusal> {
        let mut seen = BTreeSet::new();
        for resource in &response.resources {
            if !seen.insert(&resource.name) {
                let reason = format!("duplicate name {} found among added/updated resources", resource.name);
                return Err(refusal("", reason));
            }
            check_ttl(resource)?;
            let answers_alias = resource.resource.is_none() && !resource.aliases.is_empty();
            if self.is_heart_beat(resource) || answers_alias {
                continue;
            }
            let type_url = resource.resource.as_ref().map_or("", |any| any.type_url.as_str());
            if type_url != self.type_url {
                let reason = format!(
                    "type URL {type_url} embedded in an individual Any does not match the message-wide type URL {} in \
                     DeltaDiscoveryResponse",
                    self.type_url
                );
                return Err(refusal(&resource.name, reason));
            }
        }
        for name in &response.removed_resources {
            if !seen.insert(name) {
                let reason = format!("duplicate name {name} found in the union of added+removed resources");
                return Err(refusal("", reason));
            }
        }
        Ok(())
    }

    /// Takes a response apart. Whatever becomes of it, [`Self::answer`] is to be called next.
    ///
    /// # Errors
    /// What makes no sense, whatever the resources mean.
    pub fn take_apart(&self, response: &DeltaDiscoveryResponse) -> Result<Batch, Refusal> {
        self.check(response)?;
        let fresh = response.resources.iter().filter(|resource| !self.is_heart_beat(resource)).cloned();
        let resources = fresh.map(|resource| {
            let (type_url, value) = resource.resource.map(|any| (any.type_url, any.value)).unzip();
            Resource {
                name: resource.name,
                version: resource.version,
                type_url: type_url.unwrap_or_default(),
                value,
                aliases: resource.aliases,
                ttl: ttl(resource.ttl),
            }
        });
        Ok(Batch { resources: resources.collect(), removed: response.removed_resources.clone() })
    }

    /// The answer that a later [`Self::next_request`] gives.
    pub fn answer(&mut self, response: DeltaDiscoveryResponse, outcome: Result<(), Refusal>, now: Instant) {
        let error = outcome.err().map(detail);
        if error.is_none() {
            self.accept(response.resources, response.removed_resources, now);
        }
        self.answers.push_back((response.nonce, error));
    }

    fn accept(&mut self, resources: Vec<wire::Resource>, removed: Vec<String>, now: Instant) {
        let mut version: Rc<str> = "".into();
        for resource in resources {
            // Of what there is not, only what is asked for matters.
            let absent = resource.resource.is_none() && self.type_url == types::VIRTUAL_HOST;
            let asked = self.names.get(&*resource.name);
            if asked.is_none() && (absent || !self.names.contains(WILDCARD)) {
                continue;
            }
            self.lives.set(&resource.name, ttl(resource.ttl), now);
            if *version != *resource.version {
                version = resource.version.into();
            }
            if let (true, Some(name)) = (absent, asked) {
                self.absent.insert(name.clone());
            } else {
                self.absent.remove(&*resource.name);
            }
            match self.known.get_mut(&*resource.name) {
                Some(known) => *known = version.clone(),
                None => {
                    let name = asked.cloned().unwrap_or_else(|| resource.name.into());
                    self.known.insert(name, version.clone());
                }
            }
        }
        for name in removed {
            self.lives.0.remove(&name);
            self.known.remove(&*name);
            self.absent.remove(&*name);
        }
    }

    /// When [`Self::expire`] is to be called.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lives.next()
    }

    /// What was not renewed in time; it is to be taken away, and nobody is answered.
    pub fn expire(&mut self, now: Instant) -> Vec<String> {
        let removed = self.lives.expire(now);
        for name in &removed {
            self.known.remove(&**name);
        }
        removed
    }
}
