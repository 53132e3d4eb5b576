//! `cluster.NAME.upstream_rq_2xx`, `external.upstream_rq_200` and their kin: counters that exist once a response of
//! that code was seen. Each worker keeps its handles, so that charging one looks nothing up by name.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use foldhash::fast::FixedState;
use sampan_core::stats::{Counter, Histogram, Scope, Unit};
use sampan_upstream::Cluster;

use crate::route::Counted;

/// The counters of one scope (`cluster.NAME.`, `cluster.NAME.external.` …).
struct Codes {
    scope: Scope,
    completed: Counter,
    time: Option<Histogram>,
    classes: [Option<Counter>; 5],
    /// Few, and nearly always the same: a search from the front costs less than a hash.
    codes: Vec<(u16, Counter)>,
}

impl Codes {
    fn new(scope: Scope) -> Self {
        Self {
            completed: scope.counter("upstream_rq_completed"),
            time: None,
            classes: Default::default(),
            codes: Vec::new(),
            scope,
        }
    }

    fn charge(&mut self, status: u16) {
        self.completed.inc();
        let class = usize::from(status / 100);
        if (1..=5).contains(&class) {
            let scope = &self.scope;
            self.classes[class - 1]
                .get_or_insert_with(|| scope.counter(&format!("upstream_rq_{class}xx")))
                .inc();
        }
        match self.codes.iter().find(|(code, _)| *code == status) {
            Some((_, counter)) => counter.inc(),
            None => {
                let name = match status {
                    100..=599 => format!("upstream_rq_{status}"),
                    _ => "upstream_rq_unknown".to_owned(),
                };
                let counter = self.scope.counter(&name);
                counter.inc();
                self.codes.push((status, counter));
            }
        }
    }

    fn time(&mut self, milliseconds: u64) {
        let scope = &self.scope;
        self.time
            .get_or_insert_with(|| scope.histogram("upstream_rq_time", Unit::Milliseconds))
            .record(milliseconds);
    }
}

struct ClusterCodes {
    cluster: Arc<Cluster>,
    all: Codes,
    internal: Option<Codes>,
    external: Option<Codes>,
    canary: Option<Codes>,
    retry: Option<Codes>,
    /// What filters count.
    others: HashMap<Box<str>, Counter, FixedState>,
}

/// What is counted for a virtual cluster or a route, by one worker.
pub(super) struct PartCounters {
    owner: Arc<Counted>,
    codes: RefCell<Codes>,
    pub(super) retry: Counter,
    pub(super) retry_limit_exceeded: Counter,
    pub(super) retry_overflow: Counter,
    pub(super) retry_success: Counter,
    pub(super) timeout: Counter,
    total: Counter,
}

type Parts = HashMap<usize, Rc<PartCounters>, FixedState>;

thread_local! {
    static PARTS: RefCell<Parts> = RefCell::new(Parts::default());
}

impl PartCounters {
    /// This worker's counters of a part of a virtual host.
    fn of(owner: &Arc<Counted>, root: &Scope) -> Rc<Self> {
        PARTS.with_borrow_mut(|all| {
            let key = Arc::as_ptr(owner).addr();
            if let Some(found) = all.get(&key) {
                return found.clone();
            }
            // What only this map still holds belongs to tables that have been replaced.
            all.retain(|_, one| Arc::strong_count(&one.owner) > 1);
            let scope = root.scope("vhost").scope(&owner.virtual_host).scope(owner.kind).scope(&owner.name);
            let fresh = Rc::new(Self {
                owner: owner.clone(),
                retry: scope.counter("upstream_rq_retry"),
                retry_limit_exceeded: scope.counter("upstream_rq_retry_limit_exceeded"),
                retry_overflow: scope.counter("upstream_rq_retry_overflow"),
                retry_success: scope.counter("upstream_rq_retry_success"),
                timeout: scope.counter("upstream_rq_timeout"),
                total: scope.counter("upstream_rq_total"),
                codes: RefCell::new(Codes::new(scope)),
            });
            all.insert(key, fresh.clone());
            fresh
        })
    }
}

/// The counters of a request beside its cluster's.
#[derive(Clone, Default)]
pub(super) struct RequestCounters {
    virtual_cluster: Option<Rc<PartCounters>>,
    route: Option<Rc<PartCounters>>,
}

impl RequestCounters {
    /// Those of a request's virtual cluster and of its route.
    pub(super) fn new(
        virtual_cluster: Option<&Arc<Counted>>,
        route: Option<&Arc<Counted>>,
        root: &Scope,
    ) -> Self {
        let of = |one| PartCounters::of(one, root);
        Self { virtual_cluster: virtual_cluster.map(of), route: route.map(of) }
    }

    fn each(&self, charge: impl FnMut(&Rc<PartCounters>)) {
        self.virtual_cluster.iter().chain(&self.route).for_each(charge);
    }

    pub(super) fn inc(&self, counter: impl Fn(&PartCounters) -> &Counter) {
        self.each(|one| counter(one).inc());
    }

    /// An attempt has begun.
    pub(super) fn begin(&self) {
        self.inc(|one| &one.total);
    }

    pub(super) fn charge(&self, status: u16) {
        self.each(|one| one.codes.borrow_mut().charge(status));
    }

    pub(super) fn time(&self, milliseconds: u64) {
        self.each(|one| one.codes.borrow_mut().time(milliseconds));
    }
}

type Cache = HashMap<usize, Rc<RefCell<ClusterCodes>>, FixedState>;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::new(Cache::default());
}

/// How a response counts besides its code.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    pub(super) internal: bool,
    pub(super) canary: bool,
}

fn with<T>(cluster: &Arc<Cluster>, charge: impl FnOnce(&mut ClusterCodes) -> T) -> T {
    let found = CACHE.with_borrow_mut(|cache| {
        let key = Arc::as_ptr(cluster).addr();
        if let Some(found) = cache.get(&key) {
            return found.clone();
        }
        cache.retain(|_, c| c.borrow().cluster.is_current());
        let fresh = Rc::new(RefCell::new(ClusterCodes {
            cluster: cluster.clone(),
            all: Codes::new(cluster.scope().clone()),
            internal: None,
            external: None,
            canary: None,
            retry: None,
            others: HashMap::default(),
        }));
        cache.insert(key, fresh.clone());
        fresh
    });
    charge(&mut found.borrow_mut())
}

/// Lets go of clusters that lost their slot.
pub fn drop_replaced() {
    let gone: Vec<_> = CACHE
        .with_borrow_mut(|cache| cache.extract_if(|_, codes| !codes.borrow().cluster.is_current()).collect());
    drop(gone);
}

fn origin(codes: &mut ClusterCodes, internal: bool) -> &mut Codes {
    let (slot, name) =
        if internal { (&mut codes.internal, "internal") } else { (&mut codes.external, "external") };
    let cluster = &codes.cluster;
    slot.get_or_insert_with(|| Codes::new(cluster.scope().scope(name)))
}

/// Counts a response's code.
pub(super) fn charge(cluster: &Arc<Cluster>, status: u16, kind: Kind) {
    with(cluster, |codes| {
        codes.all.charge(status);
        if kind.canary {
            let cluster = &codes.cluster;
            codes.canary.get_or_insert_with(|| Codes::new(cluster.scope().scope("canary"))).charge(status);
        }
        origin(codes, kind.internal).charge(status);
    });
}

/// Counts something else under the cluster's name, `ext_authz.ok` for one.
pub fn other(cluster: &Arc<Cluster>, what: &str) {
    with(cluster, |codes| {
        if let Some(counter) = codes.others.get(what) {
            return counter.inc();
        }
        let counter = codes.cluster.scope().counter(what);
        counter.inc();
        codes.others.insert(what.into(), counter);
    });
}

/// Counts the code of a reply that a filter made in the cluster's place.
pub fn internal(cluster: &Arc<Cluster>, status: u16) {
    charge(cluster, status, Kind { internal: true, canary: false });
}

/// Counts the code of a response that a retry took the place of.
pub(super) fn charge_retried(cluster: &Arc<Cluster>, status: u16) {
    with(cluster, |codes| {
        let cluster = &codes.cluster;
        codes.retry.get_or_insert_with(|| Codes::new(cluster.scope().scope("retry"))).charge(status);
    });
}

/// Records how long the upstream took.
pub(super) fn time(cluster: &Arc<Cluster>, milliseconds: u64, kind: Kind) {
    with(cluster, |codes| {
        codes.all.time(milliseconds);
        if let Some(canary) = codes.canary.as_mut().filter(|_| kind.canary) {
            canary.time(milliseconds);
        }
        origin(codes, kind.internal).time(milliseconds);
    });
}
