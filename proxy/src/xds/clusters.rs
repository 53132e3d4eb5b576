//! CDS: clusters come, change and go.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Message;
use sampan_config::last_good::KeptResource;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_upstream::{Cluster, ClusterConfig, Origin};
use xds_client::{Decoded, Pause, Resource, types};

use super::answer::Answer;
use super::endpoints::Eds;
use super::resource::{Known, decode_new, known};
use super::source::kept;
use super::{Context, Subscriber};

/// The subscriber of `dynamic_resources.cds_config`.
pub struct Cds {
    changes: Changes,
    version: RefCell<Arc<str>>,
    answered: Answer,
    /// `config_reload`
    reloads: Counter,
    /// `config_reload_time_ms`
    reloaded_at: Gauge,
}

/// What takes clusters and gives them up.
pub(super) struct Changes {
    context: Rc<Context>,
    eds: Rc<Eds>,
    /// Of the cluster that came last: most came with one response and share it.
    version: RefCell<Arc<str>>,
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
            answered: Answer::default(),
            reloads: scope.counter("config_reload"),
            reloaded_at: scope.gauge("config_reload_time_ms"),
        }
    }

    /// The version of the last response that changed something, refused clusters or not.
    pub fn version(&self) -> Arc<str> {
        self.version.borrow().clone()
    }

    /// Returns when the first answer has come, or is known not to.
    pub(super) async fn answered(&self) {
        self.answered.awaited().settled().await;
    }

    pub(super) fn serving(&self) {
        self.changes.serving.set(true);
    }

    fn applied(&self, version: &str, changes: usize) {
        if changes > 0 {
            *self.version.borrow_mut() = version.into();
        }
    }

    fn done(&self, wrong: &[String], new: usize) -> Result<(), String> {
        self.changes.outcome(wrong)?;
        if new > 0 {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.reloads.inc();
            self.reloaded_at.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        }
        self.answered.settle();
        Ok(())
    }
}

impl Changes {
    pub(super) fn new(context: Rc<Context>, eds: Rc<Eds>, serving: bool) -> Self {
        let version = RefCell::new("".into());
        Self { context, eds, version, serving: Cell::new(serving), warming: Rc::default() }
    }

    fn take(&self, resource: &Known<'_, Message>) -> ConfigResult<Taken> {
        let clusters = &self.context.clusters;
        match clusters.newest(resource.name).as_deref().map(Cluster::origin) {
            // What the bootstrap says stays.
            Some(None) => return Ok(Taken::Same),
            Some(Some(origin)) if origin.bytes == *resource.bytes => return Ok(Taken::Same),
            _ => {}
        }
        clusters.count(resource.name);
        let message = resource.message().map_err(ConfigError::new)?;
        let config = ClusterConfig::from_proto(&message, true)?;
        let mut version = self.version.borrow_mut();
        if **version != *resource.version {
            *version = resource.version.into();
        }
        let origin = Origin {
            version: version.clone(),
            // A copy of its own: a slice would keep the whole response.
            bytes: resource.bytes.to_vec().into(),
            updated: SystemTime::now(),
        };
        drop(version);
        let cluster = clusters.update(config, Some(origin), self.serving.get())?;
        self.eds.follow(&cluster);
        Ok(Taken::New)
    }

    /// One request for all endpoints and secrets that clusters want until this is dropped.
    pub(super) fn together(&self) -> Option<Pause> {
        self.context.pause(&[types::ENDPOINTS, types::SECRET])
    }

    /// Takes what is new. Gives the reasons why some was not taken, and how much changed.
    pub(super) fn take_all(&self, resources: &[Known<'_, Message>]) -> (Vec<String>, usize) {
        let mut names = HashSet::new();
        let mut wrong = Vec::new();
        let mut new = 0;
        for resource in resources {
            let name = resource.name;
            if !names.insert(name) {
                let reason = format!("{name}: duplicate cluster {name} found");
                rejected(name, &reason);
                wrong.push(reason);
                continue;
            }
            match self.take(resource) {
                Ok(Taken::Same) => {}
                Ok(Taken::New) => new += 1,
                Err(error) => {
                    let reason = error.to_string();
                    rejected(name, &reason);
                    wrong.push(format!("{name}: {reason}"));
                }
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

    /// Says how many there were.
    fn remove_others(&self, resources: &[Known<'_, Message>]) -> usize {
        let names: HashSet<_> = resources.iter().map(|r| r.name).collect();
        let clusters = &self.context.clusters;
        let all = clusters.clusters().all().into_iter().chain(clusters.waiting());
        all.filter(|c| !names.contains(&**c.name())).filter(|c| self.remove(c.name())).count()
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

fn rejected(name: &str, reason: &str) {
    sampan_core::log!(Component::Upstream, Level::Warn, "cds: cluster '{name}' config rejected: {reason}");
}

impl Subscriber for Cds {
    fn type_url(&self) -> &'static str {
        types::CLUSTER
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode_new::<Message>(&self.changes.context, resource, |name, bytes| {
            let newest = self.changes.context.clusters.newest(name);
            newest.is_some_and(|c| c.origin().is_some_and(|origin| *origin.bytes == *bytes))
        })
    }

    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let _together = self.changes.together();
        let resources = known(resources);
        let (wrong, new) = self.changes.take_all(&resources);
        let removed = self.changes.remove_others(&resources);
        self.applied(version, new + removed);
        self.done(&wrong, new)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let _together = self.changes.together();
        let (wrong, new) = self.changes.take_all(&known(added));
        let removed = removed.iter().filter(|name| self.changes.remove(name)).count();
        self.applied(version, new + removed);
        self.done(&wrong, new)
    }

    fn failed(&self) {
        self.answered.settle();
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

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::Duration;
    use prost::Message as _;
    use sampan_core::stats::Store;

    use super::*;
    use crate::xds::Secrets;

    fn cds(store: &Store) -> Cds {
        let context = Context::of_tests(store);
        let eds = Rc::new(Eds::new(context.clone(), Rc::new(Secrets::new(context.clone()))));
        Cds::new(context, eds, &store.root().scope("cluster_manager").scope("cds"))
    }

    fn encoded(name: &str, seconds: i64) -> Vec<u8> {
        let connect_timeout = Some(Duration { seconds, nanos: 0 });
        Message { name: name.to_owned(), connect_timeout, ..Default::default() }.encode_to_vec()
    }

    /// Takes a response of the state of the world. Says how many resources were decoded, and what the answer is.
    fn push(cds: &Cds, all: &[Vec<u8>]) -> (usize, Result<(), String>) {
        let decode = |bytes: &Vec<u8>| {
            let (name, version) = (String::new(), "1".to_owned());
            let (type_url, value) = (types::CLUSTER.to_owned(), Some(bytes.clone().into()));
            Rc::new(
                cds.decode(Resource { name, version, type_url, value, aliases: vec![], ttl: None }).unwrap(),
            )
        };
        let all: Vec<_> = all.iter().map(decode).collect();
        let decoded = known::<Message>(&all).iter().filter(|one| one.decoded.is_some()).count();
        (decoded, cds.update("1", &all))
    }

    #[test]
    fn only_what_is_not_in_force_is_decoded() {
        let store = Store::new();
        let (cds, counted) = (cds(&store), |name: &str| store.value(&format!("cluster_manager.{name}")));
        let mut all = ["a", "b", "c"].map(|name| encoded(name, 1));
        assert_eq!(push(&cds, &all), (3, Ok(())));
        assert_eq!(push(&cds, &all), (0, Ok(())));
        assert_eq!((counted("cluster_modified"), counted("cds.config_reload")), (Some(0), Some(1)));
        all[1] = encoded("b", 2);
        assert_eq!(push(&cds, &all), (1, Ok(())));
        assert_eq!((counted("cluster_modified"), counted("cds.config_reload")), (Some(1), Some(2)));
        // What was taken away is in force no more.
        assert_eq!(push(&cds, &all[..2]), (0, Ok(())));
        assert_eq!((counted("cluster_removed"), push(&cds, &all)), (Some(1), (1, Ok(()))));
    }

    #[test]
    fn the_first_of_a_name_counts_wherever_its_bytes_are_from() {
        let store = Store::new();
        let cds = cds(&store);
        let (old, new) = (encoded("a", 1), encoded("a", 2));
        assert_eq!(push(&cds, std::slice::from_ref(&old)), (1, Ok(())));
        let (decoded, answer) = push(&cds, &[new.clone(), old]);
        assert_eq!((decoded, answer.unwrap_err().contains("duplicate cluster a found")), (1, true));
        assert_eq!(*cds.changes.context.clusters.newest("a").unwrap().origin().unwrap().bytes, *new);
    }

    /// The last field of a number counts: these bytes are another cluster than the one that they begin with.
    #[test]
    fn a_name_at_another_place_is_only_slower() {
        let store = Store::new();
        let cds = cds(&store);
        let (a, b) = (encoded("a", 1), [encoded("a", 1), encoded("b", 1)].concat());
        let without = [encoded("", 1), encoded("c", 1)].concat();
        for _ in 0..2 {
            let (decoded, answer) = push(&cds, &[a.clone(), b.clone(), without.clone()]);
            assert!(decoded >= 2 && answer.is_ok());
        }
        assert_eq!(store.value("cluster_manager.cluster_added"), Some(3));
        assert_eq!(store.value("cluster_manager.cluster_modified"), Some(0));
    }
}
