//! CDS: clusters come, change and go.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Message;
use sampan_config::last_good::KeptResource;
use sampan_core::error::ConfigResult;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_upstream::{Cluster, ClusterConfig, Origin};
use tokio::sync::watch;
use xds_client::{Decoded, Pause, Resource, types};

use super::endpoints::Eds;
use super::resource::{Checked, checked, decode};
use super::source::kept;
use super::{Context, Subscriber};

/// The subscriber of `dynamic_resources.cds_config`.
pub struct Cds {
    changes: Changes,
    version: RefCell<Arc<str>>,
    answered: watch::Sender<bool>,
    /// `config_reload`
    reloads: Counter,
    /// `config_reload_time_ms`
    reloaded_at: Gauge,
}

/// What takes clusters and gives them up.
pub(super) struct Changes {
    context: Rc<Context>,
    eds: Rc<Eds>,
    /// From now on new clusters warm aside.
    serving: Cell<bool>,
    /// While clusters warm aside the control plane is not told that it may go on.
    warming: Rc<RefCell<Option<Pause>>>,
}

/// What became of a resource.
enum Taken {
    Same,
    New,
}

impl Cds {
    pub(super) fn new(context: Rc<Context>, eds: Rc<Eds>, scope: &Scope) -> Self {
        Self {
            changes: Changes::new(context, eds, false),
            version: RefCell::new("".into()),
            answered: watch::Sender::new(false),
            reloads: scope.counter("config_reload"),
            reloaded_at: scope.gauge("config_reload_time_ms"),
        }
    }

    /// The version of the last response, refused clusters or not.
    pub fn version(&self) -> Arc<str> {
        self.version.borrow().clone()
    }

    /// Returns when the first answer has come, or is known not to.
    pub(super) async fn answered(&self) {
        // The sender lives in self, so that waiting cannot fail.
        let _ = self.answered.subscribe().wait_for(|done| *done).await;
    }

    pub(super) fn serving(&self) {
        self.changes.serving.set(true);
    }

    fn done(&self, wrong: &[String], new: usize) -> Result<(), String> {
        self.changes.outcome(wrong)?;
        if new > 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.reloads.inc();
            self.reloaded_at.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        }
        self.answered.send_replace(true);
        Ok(())
    }
}

impl Changes {
    pub(super) fn new(context: Rc<Context>, eds: Rc<Eds>, serving: bool) -> Self {
        Self { context, eds, serving: Cell::new(serving), warming: Rc::default() }
    }

    fn take(&self, resource: &Checked<'_, Message>) -> ConfigResult<Taken> {
        let clusters = &self.context.clusters;
        match clusters.newest(&resource.message.name).as_deref().map(Cluster::origin) {
            // What the bootstrap says stays.
            Some(None) => return Ok(Taken::Same),
            Some(Some(origin)) if origin.bytes == *resource.bytes => return Ok(Taken::Same),
            _ => {}
        }
        clusters.count(&resource.message.name);
        let config = ClusterConfig::from_proto(resource.message, true)?;
        let origin = Origin {
            version: resource.version.into(),
            // A copy of its own: a slice would keep the whole response.
            bytes: resource.bytes.to_vec().into(),
            updated: SystemTime::now(),
        };
        let cluster = clusters.update(config, Some(origin), self.serving.get())?;
        self.eds.follow(&cluster);
        Ok(Taken::New)
    }

    /// One request for all endpoints and secrets that clusters want until this is dropped.
    pub(super) fn together(&self) -> Option<Pause> {
        self.context.pause(&[types::ENDPOINTS, types::SECRET])
    }

    /// Takes what is new. Gives the reasons why some was not taken, and how much changed.
    pub(super) fn take_all(&self, resources: &[Checked<'_, Message>]) -> (Vec<String>, usize) {
        let mut names = HashSet::new();
        let mut wrong = Vec::new();
        let mut new = 0;
        for resource in resources {
            let name = resource.message.name.as_str();
            if !names.insert(name) {
                wrong.push(format!("{name}: duplicate cluster {name} found"));
                continue;
            }
            match self.take(resource) {
                Ok(Taken::Same) => {}
                Ok(Taken::New) => new += 1,
                Err(error) => wrong.push(format!("{name}: {error}")),
            }
        }
        (wrong, new)
    }

    pub(super) fn remove(&self, name: &str) -> bool {
        let clusters = &self.context.clusters;
        let removed = clusters.newest(name).is_some_and(|c| c.origin().is_some()) && clusters.remove(name);
        if removed {
            self.eds.forget(name);
        }
        removed
    }

    fn remove_others(&self, resources: &[Checked<'_, Message>]) {
        let names: HashSet<_> = resources.iter().map(|r| r.message.name.as_str()).collect();
        let clusters = &self.context.clusters;
        let all = clusters.clusters().all().into_iter().chain(clusters.waiting());
        for cluster in all.filter(|c| !names.contains(&**c.name())) {
            self.remove(cluster.name());
        }
    }

    /// What the control plane is told of reasons like these.
    pub(super) fn outcome(&self, wrong: &[String]) -> Result<(), String> {
        self.hold_back();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!("Error adding/updating cluster(s) {}", wrong.join(", ")))
    }

    /// As in Envoy, CDS is answered when the clusters that warm aside have their endpoints.
    fn hold_back(&self) {
        let clusters = &self.context.clusters;
        if clusters.waiting().is_empty() || self.warming.borrow().is_some() {
            return;
        }
        let Some(pause) = self.context.pause(&[types::CLUSTER]) else { return };
        self.warming.replace(Some(pause));
        let (clusters, warming) = (clusters.clone(), self.warming.clone());
        tokio::task::spawn_local(async move {
            clusters.initialised().await;
            drop(warming.take());
        });
    }
}

impl Subscriber for Cds {
    fn type_url(&self) -> &'static str {
        types::CLUSTER
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode::<Message>(&self.changes.context, resource)
    }

    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let _together = self.changes.together();
        let resources = checked(resources);
        let (wrong, new) = self.changes.take_all(&resources);
        self.changes.remove_others(&resources);
        *self.version.borrow_mut() = version.into();
        self.done(&wrong, new)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let _together = self.changes.together();
        let (wrong, new) = self.changes.take_all(&checked(added));
        let removed = removed.iter().filter(|name| self.changes.remove(name)).count();
        if new + removed > 0 {
            *self.version.borrow_mut() = version.into();
        }
        self.done(&wrong, new)
    }

    fn failed(&self) {
        self.answered.send_replace(true);
    }

    fn in_force(&self) -> Vec<KeptResource> {
        let clusters = &self.changes.context.clusters;
        let waiting = clusters.waiting();
        let newer: HashSet<_> = waiting.iter().map(|cluster| cluster.name().clone()).collect();
        let all = clusters.clusters().all().into_iter().filter(|cluster| !newer.contains(cluster.name()));
        let all = all.chain(waiting);
        all.filter_map(|cluster| cluster.origin().map(|o| kept(&o.version, &o.bytes))).collect()
    }
}
