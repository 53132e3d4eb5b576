//! EDS: one subscription for each EDS cluster.
//!
//! The cluster's hosts are exchanged as a whole; hosts that stay keep their pools and counters. An answer that is
//! refused, or none, ends the warming of a cluster and leaves its hosts as they are.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use foldhash::fast::FixedState;
use sampan_config::Resource;
use sampan_upstream::{Cluster, Discovery, LoadAssignment, Rebuild};
use tokio::task::AbortHandle;

use super::resource::{Checked, decode};
use super::{Context, Secrets, Source, Subscriber, SubscriptionStats};

/// The EDS subscriptions of all clusters.
pub struct Eds {
    context: Rc<Context>,
    secrets: Rc<Secrets>,
    /// By cluster; more than one while a new one warms.
    following: RefCell<HashMap<Arc<str>, Vec<Following>>>,
}

struct Following {
    cluster: Weak<Cluster>,
    _source: Source,
}

/// The subscriber of one cluster.
struct Endpoints {
    context: Rc<Context>,
    cluster: Weak<Cluster>,
    name: Arc<str>,
    /// Of the bytes in force.
    hash: Rc<Cell<Option<u64>>>,
    stale: RefCell<Option<AbortHandle>>,
}

impl Eds {
    pub(super) fn new(context: Rc<Context>, secrets: Rc<Secrets>) -> Self {
        Self { context, secrets, following: RefCell::default() }
    }

    /// Subscribes for a cluster: to its secrets, and to its endpoints if it is an EDS one.
    pub(super) fn follow(&self, cluster: &Arc<Cluster>) {
        self.secrets.follow_cluster(cluster);
        let name = cluster.name();
        let Discovery::Eds(eds) = &cluster.config().discovery else {
            cluster.settle();
            return self.tidy(name);
        };
        let endpoints = Rc::new(Endpoints {
            context: self.context.clone(),
            cluster: Arc::downgrade(cluster),
            name: eds.service_name.as_deref().map_or_else(|| name.clone(), Into::into),
            hash: Rc::default(),
            stale: RefCell::default(),
        });
        let stats = SubscriptionStats::new(cluster.scope());
        let source = Source::start(&self.context, &eds.source, stats, endpoints);
        let following = Following { cluster: Arc::downgrade(cluster), _source: source };
        self.following.borrow_mut().entry(name.clone()).or_default().push(following);
        self.tidy(name);
    }

    /// Ends the subscriptions of clusters of this name that have no slot any more.
    fn tidy(&self, name: &str) {
        let mut all = self.following.borrow_mut();
        let Some(list) = all.get_mut(name) else { return };
        list.retain(|f| f.cluster.upgrade().is_some_and(|c| c.is_current()));
        if list.is_empty() {
            all.remove(name);
        }
    }

    /// Ends the subscriptions of a cluster that was removed.
    pub(super) fn forget(&self, name: &str) {
        self.following.borrow_mut().remove(name);
    }
}

impl Endpoints {
    fn take(&self, cluster: &Arc<Cluster>, resource: &Checked<ClusterLoadAssignment>) -> Result<(), String> {
        let message = &resource.message;
        if message.cluster_name != *self.name {
            return Err(format!(
                "Unexpected EDS cluster (expecting {}): {}",
                self.name, message.cluster_name
            ));
        }
        let hash = FixedState::default().hash_one(&resource.bytes);
        if self.hash.get() == Some(hash) {
            cluster.stats().update_no_rebuild.inc();
        } else {
            let assignment = LoadAssignment::from_proto(message, false).map_err(|e| e.to_string())?;
            if cluster.set_assignment(assignment) == Rebuild::Nothing {
                cluster.stats().update_no_rebuild.inc();
            }
            self.hash.set(Some(hash));
        }
        let after = message.policy.as_ref().and_then(|p| p.endpoint_stale_after.as_ref());
        self.watch_age(cluster, after.map(sampan_http::manager::duration));
        Ok(())
    }

    /// `endpoint_stale_after`: without another answer the endpoints go.
    fn watch_age(&self, cluster: &Arc<Cluster>, after: Option<Duration>) {
        if let Some(task) = self.stale.take() {
            task.abort();
        }
        let Some(after) = after.filter(|d| !d.is_zero()) else { return };
        cluster.stats().assignment_timeout_received.inc();
        let (cluster, hash) = (self.cluster.clone(), self.hash.clone());
        let task = tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            let Some(cluster) = cluster.upgrade() else { return };
            cluster.stats().assignment_stale.inc();
            cluster.set_assignment(LoadAssignment::default());
            hash.set(None);
        });
        self.stale.replace(Some(task.abort_handle()));
    }
}

impl Subscriber for Endpoints {
    fn update(&self, _version: &str, resources: Vec<Resource>) -> Result<(), String> {
        let resources = decode::<ClusterLoadAssignment>(&self.context, resources)?;
        let Some(cluster) = self.cluster.upgrade().filter(|c| c.is_current()) else { return Ok(()) };
        match resources.as_slice() {
            [] => cluster.stats().update_empty.inc(),
            [one] => self.take(&cluster, one)?,
            more => return Err(format!("Unexpected EDS resource length: {}", more.len())),
        }
        cluster.settle();
        Ok(())
    }

    fn failed(&self) {
        if let Some(cluster) = self.cluster.upgrade() {
            cluster.settle();
        }
    }
}

impl Drop for Endpoints {
    fn drop(&mut self) {
        if let Some(task) = self.stale.take() {
            task.abort();
        }
    }
}
