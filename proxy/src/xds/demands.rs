//! On-demand CDS: clusters that streams ask for (HTTP filter `on_demand`, `tcp_proxy`), each by name.
//!
//! As in Envoy 1.40: on the aggregated stream each name is a subscription of its own; with a source of its own all are one,
//! whose second question waits for the first answer. What came is updated and removed like a cluster of CDS and stays
//! subscribed. A stream waits until the cluster is there, whoever brought it, until the server says that there is none, or
//! until its time is over. A name that was asked for is not asked for again: who wants it later waits for news of it.
//!
//! Clients choose names (`cluster_header`), so that those without a cluster are bounded, other than in Envoy: see
//! [`Origin::ask`].

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3::Cluster as Message;
use sampan_core::config_source::{ConfigSource, SourceKind};
use sampan_core::stats::Scope;
use sampan_upstream::{Demand, Discovered};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use xds_client::{Decoded, Resource, types};

use super::clusters::Changes;
use super::endpoints::Eds;
use super::resource::{decode_new, known};
use super::{Context, Source, Subscriber, SubscriptionStats};

/// Names of a source that have no cluster, and names that are waited for.
const MOST_UNKNOWN: usize = 1000;

/// Everything that was asked for.
struct Demands {
    context: Rc<Context>,
    changes: Changes,
    /// `cluster_manager.odcds.`
    scope: Scope,
    origins: RefCell<Vec<Rc<Origin>>>,
    pending: RefCell<HashMap<Arc<str>, Pending>>,
}

/// A name that streams wait for.
struct Pending {
    waiting: Vec<oneshot::Sender<Discovered>>,
    timeout: AbortHandle,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.timeout.abort();
    }
}

/// A source and the names that it was asked for.
struct Origin {
    demands: Weak<Demands>,
    source: ConfigSource,
    /// On the aggregated stream each with a subscription.
    names: RefCell<HashMap<Arc<str>, Option<Source>>>,
    /// Those that had no cluster when it was last looked, the oldest first.
    unknown: RefCell<VecDeque<Arc<str>>>,
    /// The one subscription to a source of its own.
    alone: RefCell<Option<Source>>,
    /// That has had an answer.
    answered: Cell<bool>,
}

/// The subscriber.
struct Names {
    context: Rc<Context>,
    origin: Weak<Origin>,
    /// The first, or only one.
    name: Arc<str>,
    /// There was an answer to the only one.
    settled: Cell<bool>,
}

/// Answers what workers ask for from now on.
pub(super) fn start(context: &Rc<Context>, eds: &Rc<Eds>, root: &Scope) {
    let demands = Rc::new(Demands {
        context: context.clone(),
        changes: Changes::new(context.clone(), eds.clone(), true),
        scope: root.scope("cluster_manager").scope("odcds"),
        origins: RefCell::default(),
        pending: RefCell::default(),
    });
    let mut questions = context.clusters.demands();
    let mut appeared = context.clusters.appeared();
    tokio::task::spawn_local(async move {
        loop {
            tokio::select! {
                question = questions.recv() => match question {
                    Some(question) => demands.ask(question),
                    None => return,
                },
                Ok(()) = appeared.changed() => demands.look(),
            }
        }
    });
}

impl Demands {
    fn ask(self: &Rc<Self>, Demand { on_demand, name, answer }: Demand) {
        if self.context.clusters.clusters().get(&name).is_some() {
            // A stream that went away waits for nothing.
            let _ = answer.send(Discovered::Available);
            return;
        }
        // To a control plane this is no name: it would send all that it has, because a client asked.
        if &*name == "*" {
            let _ = answer.send(Discovered::Missing);
            return;
        }
        let mut pending = self.pending.borrow_mut();
        if let Some(pending) = pending.get_mut(&name) {
            if pending.waiting.len() == pending.waiting.capacity() {
                pending.waiting.retain(|one| !one.is_closed());
            }
            return pending.waiting.push(answer);
        }
        if pending.len() >= MOST_UNKNOWN {
            return;
        }
        let (demands, of, after) = (self.clone(), name.clone(), on_demand.timeout);
        let timeout = tokio::task::spawn_local(async move {
            tokio::time::sleep(after).await;
            demands.finish(&of, Discovered::TimedOut);
        });
        pending.insert(name.clone(), Pending { waiting: vec![answer], timeout: timeout.abort_handle() });
        drop(pending);
        self.origin(&on_demand.source).ask(self, &name);
    }

    fn origin(self: &Rc<Self>, source: &ConfigSource) -> Rc<Origin> {
        let mut origins = self.origins.borrow_mut();
        if let Some(origin) = origins.iter().find(|origin| origin.source == *source) {
            return origin.clone();
        }
        let origin = Rc::new(Origin {
            demands: Rc::downgrade(self),
            source: source.clone(),
            names: RefCell::default(),
            unknown: RefCell::default(),
            alone: RefCell::default(),
            answered: Cell::default(),
        });
        origins.push(origin.clone());
        origin
    }

    /// As in Envoy: a source of its own counts each question, also one that needs no request, and those that waited for
    /// the first answer as one.
    fn attempted(&self) {
        self.scope.counter("update_attempt").inc();
    }

    fn finish(&self, name: &str, discovered: Discovered) {
        let pending = self.pending.borrow_mut().remove(name);
        for one in pending.into_iter().flat_map(|mut pending| std::mem::take(&mut pending.waiting)) {
            let _ = one.send(discovered);
        }
    }

    /// There are new clusters.
    fn look(&self) {
        let clusters = self.context.clusters.clusters();
        let here = |name: &&Arc<str>| clusters.get(name).is_some();
        let found: Vec<_> = self.pending.borrow().keys().filter(here).cloned().collect();
        found.iter().for_each(|name| self.finish(name, Discovered::Available));
    }
}

impl Origin {
    /// Asks for a name unless it was asked for. In place of the oldest that has no cluster and is not waited for, if there
    /// are too many of them.
    fn ask(self: &Rc<Self>, demands: &Rc<Demands>, name: &Arc<str>) {
        let settled = self.alone.borrow().is_some() && self.answered.get();
        if settled {
            demands.attempted();
        }
        if self.names.borrow().contains_key(name) {
            return;
        }
        self.make_place(demands);
        self.unknown.borrow_mut().push_back(name.clone());
        let source = match &self.source.kind {
            SourceKind::Ads => Some(self.subscribe(demands, name)),
            _ => None,
        };
        let alone = source.is_none();
        self.names.borrow_mut().insert(name.clone(), source);
        if !alone {
            return;
        }
        let started = self.alone.borrow().is_some();
        if !started {
            let source = self.subscribe(demands, name);
            self.alone.replace(Some(source));
        } else if self.answered.get()
            && let Some(source) = &*self.alone.borrow()
        {
            source.ask(name);
        }
    }

    fn subscribe(self: &Rc<Self>, demands: &Rc<Demands>, name: &Arc<str>) -> Source {
        let subscriber = Names {
            context: demands.context.clone(),
            origin: Rc::downgrade(self),
            name: name.clone(),
            settled: Cell::default(),
        };
        let stats = SubscriptionStats::new(&demands.scope);
        Source::start(&demands.context, &self.source, stats, Rc::new(subscriber))
    }

    fn make_place(&self, demands: &Demands) {
        let mut unknown = self.unknown.borrow_mut();
        while unknown.len() >= MOST_UNKNOWN {
            let Some(oldest) = unknown.pop_front() else { return };
            if demands.context.clusters.newest(&oldest).is_some() {
                continue;
            }
            if demands.pending.borrow().contains_key(&oldest) {
                unknown.push_back(oldest);
                continue;
            }
            // Its subscription goes with it.
            let own = self.names.borrow_mut().remove(&oldest);
            if let (Some(None), Some(source)) = (own, &*self.alone.borrow()) {
                source.forget(&oldest);
            }
        }
    }

    /// The source of its own has answered: what waited for that is asked now.
    fn settle(&self) {
        if self.answered.replace(true) {
            return;
        }
        if let Some(source) = &*self.alone.borrow() {
            let names = self.names.borrow();
            if names.len() > 1
                && let Some(demands) = self.demands.upgrade()
            {
                demands.attempted();
            }
            names.keys().for_each(|name| source.ask(name));
        }
    }
}

impl Subscriber for Names {
    fn type_url(&self) -> &'static str {
        types::CLUSTER
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode_new::<Message>(&self.context, resource, |_, _| false)
    }

    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        self.change(version, resources, &[])
    }

    fn change(&self, _version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let Some(origin) = self.origin.upgrade() else { return Ok(()) };
        let Some(demands) = origin.demands.upgrade() else { return Ok(()) };
        let together = demands.changes.together();
        let (wrong, _) = demands.changes.take_all(&known(added));
        for name in removed {
            let mut unknown = origin.unknown.borrow_mut();
            if demands.changes.remove(name) && !unknown.iter().any(|known| **known == **name) {
                unknown.push_back(name.as_str().into());
            }
        }
        drop(together);
        self.settled.set(true);
        origin.settle();
        removed.iter().for_each(|name| demands.finish(name, Discovered::Missing));
        demands.changes.outcome(&wrong)
    }

    /// As in Envoy this ends the wait on the aggregated stream only.
    fn failed(&self) {
        let Some(origin) = self.origin.upgrade() else { return };
        origin.settle();
        if !self.settled.replace(true)
            && origin.source.kind == SourceKind::Ads
            && let Some(demands) = origin.demands.upgrade()
        {
            demands.finish(&self.name, Discovered::Missing);
        }
    }
}
