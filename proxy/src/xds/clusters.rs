//! CDS: clusters come, change and go.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Message;
use sampan_config::Resource;
use sampan_core::error::ConfigResult;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_upstream::{Cluster, ClusterConfig, Origin};
use tokio::sync::watch;

use super::endpoints::Eds;
use super::resource::{Checked, decode};
use super::{Context, Subscriber};

/// The subscriber of `dynamic_resources.cds_config`.
pub struct Cds {
    context: Rc<Context>,
    eds: Rc<Eds>,
    version: RefCell<Arc<str>>,
    /// From now on new clusters warm aside.
    serving: Cell<bool>,
    answered: watch::Sender<bool>,
    /// `config_reload`
    reloads: Counter,
    /// `config_reload_time_ms`
    reloaded_at: Gauge,
}

/// What became of a resource.
enum Taken {
    Same,
    New,
}

impl Cds {
    pub(super) fn new(context: Rc<Context>, eds: Rc<Eds>, scope: &Scope) -> Self {
        Self {
            context,
            eds,
            version: RefCell::new("".into()),
            serving: Cell::new(false),
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
        self.serving.set(true);
    }

    fn take(&self, version: &Arc<str>, resource: &Checked<Message>) -> ConfigResult<Taken> {
        let clusters = &self.context.clusters;
        match clusters.newest(&resource.message.name).as_deref().map(Cluster::origin) {
            // What the bootstrap says stays.
            Some(None) => return Ok(Taken::Same),
            Some(Some(origin)) if origin.bytes == resource.bytes => return Ok(Taken::Same),
            _ => {}
        }
        clusters.count(&resource.message.name);
        let config = ClusterConfig::from_proto(&resource.message, true)?;
        let origin = Origin {
            version: version.clone(),
            // A copy of its own: a slice would keep the whole response.
            bytes: resource.bytes.to_vec().into(),
            updated: SystemTime::now(),
        };
        let cluster = clusters.update(config, Some(origin), self.serving.get())?;
        self.eds.follow(&cluster);
        Ok(Taken::New)
    }

    fn remove_others(&self, names: &HashSet<&str>) {
        let clusters = &self.context.clusters;
        let all = clusters.clusters().all().into_iter().chain(clusters.waiting());
        for cluster in all.filter(|c| c.origin().is_some() && !names.contains(&**c.name())) {
            clusters.remove(cluster.name());
            self.eds.forget(cluster.name());
        }
    }
}

impl Subscriber for Cds {
    fn update(&self, version: &str, resources: Vec<Resource>) -> Result<(), String> {
        let resources = decode::<Message>(&self.context, resources)?;
        let version = Arc::<str>::from(version);
        let mut names = HashSet::new();
        let mut wrong = Vec::new();
        let mut new = 0;
        for resource in &resources {
            let name = resource.message.name.as_str();
            if !names.insert(name) {
                wrong.push(format!("{name}: duplicate cluster {name} found"));
                continue;
            }
            match self.take(&version, resource) {
                Ok(Taken::Same) => {}
                Ok(Taken::New) => new += 1,
                Err(error) => wrong.push(format!("{name}: {error}")),
            }
        }
        self.remove_others(&names);
        *self.version.borrow_mut() = version;
        if !wrong.is_empty() {
            return Err(format!("Error adding/updating cluster(s) {}", wrong.join(", ")));
        }
        if new > 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.reloads.inc();
            self.reloaded_at.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        }
        self.answered.send_replace(true);
        Ok(())
    }

    fn failed(&self) {
        self.answered.send_replace(true);
    }
}
