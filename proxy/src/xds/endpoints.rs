//! EDS: one subscription for each EDS cluster.
//!
//! The cluster's hosts are exchanged as a whole; hosts that stay keep their pools and counters. An answer that is
//! refused, or none, ends the warming of a cluster and leaves its hosts as they are.
//!
//! In the state of the world a response may carry all endpoints again because of one: those whose bytes are in force are
//! told by their hash and neither checked nor decoded.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::rc::{Rc, Weak as RcWeak};
use std::sync::{Arc, Weak};
use std::time::Duration;

use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use foldhash::fast::{FixedState, RandomState};
use prost::Message;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::log::{Component, Level};
use sampan_upstream::{Cluster, Discovery, LoadAssignment, Rebuild};
use tokio::task::AbortHandle;
use xds_client::{Decoded, Resource, types};

use super::resource::decode;
use super::source::kept;
use super::{Context, Secrets, Source, Subscriber, SubscriptionStats};

/// The EDS subscriptions of all clusters.
pub struct Eds {
    context: Rc<Context>,
    secrets: Rc<Secrets>,
    book: Rc<Book>,
}

/// Who follows what, by cluster; more than one while a new one warms.
#[derive(Default)]
struct Book {
    clusters: RefCell<HashMap<Arc<str>, Vec<Following>, RandomState>>,
    /// The names of what is in force, by the hash of its bytes.
    in_force: RefCell<HashMap<u64, Arc<str>, RandomState>>,
}

/// In place of a message whose bytes are in force.
struct InForce;

struct Following {
    cluster: Weak<Cluster>,
    endpoints: Rc<Endpoints>,
    _source: Source,
}

/// The subscriber of one cluster.
struct Endpoints {
    context: Rc<Context>,
    book: RcWeak<Book>,
    cluster: Weak<Cluster>,
    name: Arc<str>,
    /// Of the bytes in force.
    hash: Rc<Cell<Option<u64>>>,
    /// What of it the book has.
    entered: Cell<Option<u64>>,
    stale_after: Cell<Option<Duration>>,
    /// What came last, for this cluster or for the one of before: where a changed cluster gets no answer of its own,
    /// it goes on with that.
    last: RefCell<Option<Bytes>>,
    stale: RefCell<Option<AbortHandle>>,
}

impl Eds {
    pub(super) fn new(context: Rc<Context>, secrets: Rc<Secrets>) -> Self {
        Self { context, secrets, book: Rc::default() }
    }

    /// Subscribes for a cluster: to its secrets, and to its endpoints if it is an EDS one.
    pub(super) fn follow(&self, cluster: &Arc<Cluster>) {
        self.follow_secrets(cluster);
        let name = cluster.name();
        let Discovery::Eds(eds) = &cluster.config().discovery else { return self.book.tidy(name) };
        let service = eds.service_name.as_ref().unwrap_or(name);
        let endpoints = Rc::new(Endpoints {
            context: self.context.clone(),
            book: Rc::downgrade(&self.book),
            cluster: Arc::downgrade(cluster),
            last: RefCell::new(self.last_of(name, service)),
            name: service.clone(),
            hash: Rc::default(),
            entered: Cell::default(),
            stale_after: Cell::default(),
            stale: RefCell::default(),
        });
        let stats = SubscriptionStats::new(cluster.scope());
        let source = Source::start(&self.context, &eds.source, stats, endpoints.clone());
        let following = Following { cluster: Arc::downgrade(cluster), endpoints, _source: source };
        let mut all = self.book.clusters.borrow_mut();
        // Most clusters never change: room for one.
        all.entry(name.clone()).or_insert_with(|| Vec::with_capacity(1)).push(following);
        drop(all);
        self.book.tidy(name);
    }

    /// As in Envoy a cluster warms until its secrets have been answered for, too.
    fn follow_secrets(&self, cluster: &Arc<Cluster>) {
        let Some(missing) = self.secrets.follow_cluster(cluster) else { return cluster.settle_secrets() };
        let (cluster, book) = (Arc::downgrade(cluster), Rc::downgrade(&self.book));
        tokio::task::spawn_local(async move {
            missing.await;
            if let (Some(cluster), Some(book)) = (cluster.upgrade(), book.upgrade()) {
                cluster.settle_secrets();
                book.tidy(cluster.name());
            }
        });
    }

    /// The endpoints that a cluster of this name has from this service.
    fn last_of(&self, name: &str, service: &str) -> Option<Bytes> {
        let all = self.book.clusters.borrow();
        let mut list = all.get(name)?.iter().rev();
        list.find_map(|f| f.endpoints.last.borrow().clone().filter(|_| *f.endpoints.name == *service))
    }

    /// Ends the subscriptions of a cluster that was removed.
    pub(super) fn forget(&self, name: &str) {
        let gone = self.book.clusters.borrow_mut().remove(name);
        drop(gone);
    }
}

impl Book {
    /// Ends the subscriptions of clusters of this name that have no slot any more.
    fn tidy(&self, name: &str) {
        let mut all = self.clusters.borrow_mut();
        let Some(list) = all.get_mut(name) else { return };
        let gone: Vec<_> =
            list.extract_if(.., |f| !f.cluster.upgrade().is_some_and(|c| c.is_current())).collect();
        if list.is_empty() {
            all.remove(name);
        }
        drop(all);
        drop(gone);
    }

    /// Exchanges the hash of what is in force of a name.
    fn enter(&self, name: &Arc<str>, old: Option<u64>, new: Option<u64>) {
        let mut in_force = self.in_force.borrow_mut();
        old.and_then(|old| in_force.remove(&old));
        if let Some(new) = new {
            in_force.insert(new, name.clone());
        }
    }
}

fn assignment_of(message: &ClusterLoadAssignment, of: &Cluster) -> Result<LoadAssignment, String> {
    let assignment = LoadAssignment::from_proto(message, false).map_err(|e| e.to_string())?;
    if of.config().lb.hashes() {
        assignment.check_weights().map_err(|e| e.to_string())?;
    }
    Ok(assignment.with_each_host_once())
}

fn hash(bytes: &Bytes) -> u64 {
    FixedState::default().hash_one(bytes)
}

impl Endpoints {
    fn take(&self, cluster: &Arc<Cluster>, resource: &Decoded) -> Result<(), String> {
        let hash = hash(&resource.bytes);
        if self.hash.get() == Some(hash) {
            cluster.stats().update_no_rebuild.inc();
        } else if let Some(message) = resource.message.downcast_ref() {
            self.exchange(cluster, message, &resource.bytes, hash)?;
        } else {
            // In force for another cluster.
            let message = ClusterLoadAssignment::decode(&*resource.bytes).map_err(|e| e.to_string())?;
            self.exchange(cluster, &message, &resource.bytes, hash)?;
        }
        self.watch_age(cluster);
        Ok(())
    }

    fn exchange(
        &self,
        cluster: &Arc<Cluster>,
        message: &ClusterLoadAssignment,
        bytes: &Bytes,
        hash: u64,
    ) -> Result<(), String> {
        if message.cluster_name != *self.name {
            let reason =
                format!("Unexpected EDS cluster (expecting {}): {}", self.name, message.cluster_name);
            let name = cluster.name();
            sampan_core::log!(
                Component::Upstream,
                Level::Warn,
                "eds: cluster '{name}' config rejected: {reason}"
            );
            return Err(reason);
        }
        let assignment = assignment_of(message, cluster)?;
        if cluster.set_assignment(&assignment) == Rebuild::Nothing {
            cluster.stats().update_no_rebuild.inc();
        }
        self.hash.set(Some(hash));
        self.enter(Some(hash));
        // A copy of its own: a slice would keep the whole response.
        self.last.replace(Some(bytes.to_vec().into()));
        let after = message.policy.as_ref().and_then(|p| p.endpoint_stale_after.as_ref());
        self.stale_after.set(after.map(sampan_http::manager::duration));
        Ok(())
    }

    fn enter(&self, new: Option<u64>) {
        let old = self.entered.replace(new);
        if let Some(book) = self.book.upgrade() {
            book.enter(&self.name, old, new);
        }
    }

    /// There was an answer: the cluster takes its slot, if nothing else is missing, and who was there before is told
    /// nothing more then.
    fn settle(&self, cluster: &Cluster) {
        cluster.settle_endpoints();
        if let Some(book) = self.book.upgrade() {
            book.tidy(cluster.name());
        }
    }

    /// `endpoint_stale_after`: without another answer the endpoints go.
    fn watch_age(&self, cluster: &Arc<Cluster>) {
        if let Some(task) = self.stale.take() {
            task.abort();
        }
        let Some(after) = self.stale_after.get().filter(|d| !d.is_zero()) else { return };
        cluster.stats().assignment_timeout_received.inc();
        let (cluster, hash) = (self.cluster.clone(), self.hash.clone());
        let task = tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            let Some(cluster) = cluster.upgrade() else { return };
            cluster.stats().assignment_stale.inc();
            cluster.set_assignment(&LoadAssignment::default());
            hash.set(None);
        });
        self.stale.replace(Some(task.abort_handle()));
    }
}

impl Subscriber for Endpoints {
    fn type_url(&self) -> &'static str {
        types::ENDPOINTS
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        let known = resource.value.as_ref().and_then(|bytes| {
            let book = self.book.upgrade()?;
            let in_force = book.in_force.borrow();
            Some((in_force.get(&hash(bytes))?.to_string(), bytes.clone()))
        });
        let Some((name, bytes)) = known else {
            return decode::<ClusterLoadAssignment>(&self.context, resource);
        };
        let Resource { name: given, version, aliases, .. } = resource;
        let name = if given.is_empty() { name } else { given };
        Ok(Decoded { name, version, aliases, bytes, message: Box::new(InForce) })
    }

    /// An endpoint set that was taken away leaves the cluster as it is.
    fn change(&self, version: &str, added: &[Rc<Decoded>], _removed: &[String]) -> Result<(), String> {
        self.update(version, added)
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let Some(cluster) = self.cluster.upgrade().filter(|c| c.is_current()) else { return Ok(()) };
        match resources {
            [] => cluster.stats().update_empty.inc(),
            [one] => self.take(&cluster, one)?,
            more => return Err(format!("Unexpected EDS resource length: {}", more.len())),
        }
        self.settle(&cluster);
        Ok(())
    }

    fn failed(&self) {
        let Some(cluster) = self.cluster.upgrade() else { return };
        if self.hash.get().is_none()
            && let Some(bytes) = &*self.last.borrow()
            && let Ok(message) = ClusterLoadAssignment::decode(&**bytes)
            && let Ok(assignment) = assignment_of(&message, &cluster)
        {
            cluster.set_assignment(&assignment);
        }
        self.settle(&cluster);
    }

    fn in_force(&self) -> Vec<KeptResource> {
        self.last.borrow().iter().map(|bytes| kept("", bytes)).collect()
    }
}

impl Drop for Endpoints {
    fn drop(&mut self) {
        self.enter(None);
        if let Some(task) = self.stale.take() {
            task.abort();
        }
    }
}
