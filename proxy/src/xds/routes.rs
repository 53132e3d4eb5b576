//! RDS: one subscription for each route table and source, whoever uses it. Its virtual hosts may come on their own
//! ([`super::hosts`]), as may those of a connection manager's own table.

use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::rc::{Rc, Weak as RcWeak};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, Vhds};
use prost::Message;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_http::filter::HttpFilterRegistry;
use sampan_http::route::{
    HostsOnDemand, LazyTable, RouteContext, RouteSlot, RouteTable, WantedHosts, WantedRoutes,
};
use sampan_listener::{ListenerConfig, Server};
use xds_client::{Decoded, Resource, types};

use super::answer::{Answer, Awaited};
use super::resource::{Known, decode_new, known};
use super::source::{kept, warn};
use super::{Context, Source, Subscriber, SubscriptionStats, hosts};

/// All RDS subscriptions.
pub struct Rds {
    context: Rc<Context>,
    compiler: Arc<Compiler>,
    all: Rc<RefCell<Tables>>,
    /// Tables of connection managers whose hosts come on their own.
    inline: RefCell<Vec<Rc<Table>>>,
}

struct Compiler {
    registry: HttpFilterRegistry,
    server: Arc<Server>,
}

/// By name; nearly always one each.
type Tables = BTreeMap<Arc<str>, Vec<Subscription>>;

struct Subscription {
    source: ConfigSource,
    table: Rc<Table>,
    _stream: Source,
}

/// The subscriber of one table.
pub(super) struct Table {
    this: RcWeak<Table>,
    /// Itself and the others: the first of them decodes for all.
    all: RcWeak<RefCell<Tables>>,
    context: Rc<Context>,
    compiler: Arc<Compiler>,
    pub(super) name: Arc<str>,
    /// Below which the counters of its hosts stand, by its name.
    hosts_scope: Scope,
    /// What came last, as it came.
    given: RefCell<Option<Bytes>>,
    /// What it says, where its hosts come on their own.
    base: RefCell<Option<(RouteConfiguration, hosts::Subscription)>>,
    /// What is to be in force when its hosts have come for the first time.
    first: RefCell<Option<Current>>,
    users: RefCell<Vec<Weak<RouteSlot>>>,
    current: RefCell<Option<Current>>,
    answered: Answer,
    /// None where it is a connection manager's own.
    stats: Option<Stats>,
}

/// `http.PREFIX.rds.NAME.*`, besides what all subscriptions count.
struct Stats {
    config_reload: Counter,
    config_reload_time_ms: Gauge,
    update_empty: Counter,
}

/// Tables above this are compiled when they come: no request is to wait for one.
const AT_ONCE: usize = 64 * 1024;

/// A table in force.
#[derive(Clone)]
pub struct Current {
    /// `version_info`
    pub version: Arc<str>,
    /// The message.
    pub bytes: Bytes,
    /// When it came.
    pub updated: SystemTime,
    compiled: Arc<LazyTable>,
}

impl Rds {
    pub(super) fn new(context: Rc<Context>, server: Arc<Server>) -> Self {
        let mut registry = HttpFilterRegistry::default();
        sampan_http::filters::register(&mut registry);
        let compiler = Arc::new(Compiler { registry, server });
        Self { context, compiler, all: Rc::default(), inline: RefCell::default() }
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        self.tidy();
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedRoutes>());
        let tables = wanted.map(|wanted| self.subscribe(wanted)).chain(self.grow(listener));
        Awaited::all(tables.map(|table| table.answered.awaited()).collect())
    }

    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let answered =
            |wanted: &&WantedRoutes| self.find(wanted).is_some_and(|table| table.answered.is_settled());
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedRoutes>());
        let names = wanted.filter(|wanted| !answered(wanted));
        let mut names: Vec<_> =
            names.map(|w| format!("shared target RdsRouteConfigSubscription RDS init {}", w.name)).collect();
        let inline = self.inline.borrow();
        let waits =
            |table: &&Rc<Table>| inlined(listener).any(|w| table.is_of(w)) && !table.answered.is_settled();
        let own = inline.iter().filter(waits);
        names.extend(own.map(|t| format!("target StaticRouteConfigProvider local-init-target {}", t.name)));
        names
    }

    /// Subscribes to one table; who gives up its slot ends it with the next [`Self::tidy`].
    pub(super) fn follow_one(&self, wanted: &WantedRoutes) -> Awaited {
        self.subscribe(wanted).answered.awaited()
    }

    /// Compiles a table that came with something else.
    pub(super) fn compile(&self, message: &RouteConfiguration) -> Result<RouteTable, String> {
        RouteTable::from_proto(message, &self.compiler.context(true)).map_err(|e| e.to_string())
    }

    fn find(&self, wanted: &WantedRoutes) -> Option<Rc<Table>> {
        let all = self.all.borrow();
        let found = all.get(&wanted.name)?.iter().find(|s| s.source == wanted.source);
        found.map(|s| s.table.clone())
    }

    fn subscribe(&self, wanted: &WantedRoutes) -> Rc<Table> {
        if let Some(table) = self.find(wanted) {
            table.serve(wanted.slot.clone());
            return table;
        }
        let rds = wanted.scope.scope("rds");
        let (scope, hosts) = (rds.scope(&wanted.name), rds.scope("vhds"));
        let own = Stats {
            config_reload: scope.counter("config_reload"),
            config_reload_time_ms: scope.gauge("config_reload_time_ms"),
            update_empty: scope.counter("update_empty"),
        };
        let table = self.table(&wanted.name, &wanted.slot, hosts, Some(own));
        let stats = SubscriptionStats::new(&scope);
        let stream = Source::start(&self.context, &wanted.source, stats, table.clone());
        let source = wanted.source.clone();
        let subscription = Subscription { source, table: table.clone(), _stream: stream };
        match self.all.borrow_mut().entry(wanted.name.clone()) {
            Entry::Occupied(same) => same.into_mut().push(subscription),
            // A vector that grew by itself would have room for four.
            Entry::Vacant(place) => drop(place.insert(vec![subscription])),
        }
        table
    }

    fn table(
        &self,
        name: &Arc<str>,
        user: &Weak<RouteSlot>,
        hosts_scope: Scope,
        stats: Option<Stats>,
    ) -> Rc<Table> {
        Rc::new_cyclic(|this| Table {
            this: this.clone(),
            all: Rc::downgrade(&self.all),
            context: self.context.clone(),
            compiler: self.compiler.clone(),
            name: name.clone(),
            hosts_scope,
            given: RefCell::default(),
            base: RefCell::default(),
            first: RefCell::default(),
            users: RefCell::new(vec![user.clone()]),
            current: RefCell::default(),
            answered: Answer::default(),
            stats,
        })
    }

    /// Subscribes to the hosts of a listener's own tables.
    fn grow(&self, listener: &ListenerConfig) -> Vec<Rc<Table>> {
        let mut inline = self.inline.borrow_mut();
        let mut tables = Vec::new();
        for wanted in inlined(listener) {
            if let Some(table) = inline.iter().find(|table| table.is_of(wanted)) {
                tables.push(table.clone());
                continue;
            }
            let name = Arc::from(wanted.table.name.as_str());
            let scope = self.context.root.scope("vhds");
            let table = self.table(&name, &wanted.slot, scope, None);
            if let Some(vhds) = &wanted.table.vhds {
                match table.take_with_hosts(&wanted.table, vhds, "") {
                    Ok(first) => {
                        table.first.replace(Some(first));
                        // Hosts that were kept are there at once.
                        if table.is_settled() {
                            table.complete();
                        }
                    }
                    Err(error) => {
                        warn(&error);
                        table.answered.settle();
                    }
                }
            }
            inline.push(table.clone());
            tables.push(table);
        }
        tables
    }

    /// The bytes of a connection manager's own table with the hosts that came.
    pub fn with_hosts(&self, name: &str) -> Option<Bytes> {
        let inline = self.inline.borrow();
        let table = inline.iter().find(|table| &*table.name == name)?;
        table.current.borrow().as_ref().map(|current| current.bytes.clone())
    }

    /// Who has these slots gives them up, although workers may hold them for a while.
    pub(super) fn give_up(&self, slots: &[Arc<RouteSlot>]) {
        if slots.is_empty() {
            return;
        }
        let slots: HashSet<_> = slots.iter().map(Arc::as_ptr).collect();
        for subscription in self.all.borrow().values().flatten() {
            subscription.table.users.borrow_mut().retain(|user| !slots.contains(&user.as_ptr()));
        }
        self.tidy();
    }

    /// Ends what nobody uses any more.
    pub(super) fn tidy(&self) {
        self.inline.borrow_mut().retain(|table| table.is_used());
        self.all.borrow_mut().retain(|_, same| {
            same.retain(|s| s.table.is_used());
            !same.is_empty()
        });
    }

    /// The tables in force.
    pub fn current(&self) -> Vec<Current> {
        let all = self.all.borrow();
        all.values().flatten().filter_map(|s| s.table.current.borrow().clone()).collect()
    }
}

/// The tables of a listener's own whose hosts come on their own.
fn inlined(listener: &ListenerConfig) -> impl Iterator<Item = &WantedHosts> {
    listener.wants().iter().filter_map(|want| want.downcast_ref())
}

impl Compiler {
    fn context(&self, validate_clusters: bool) -> RouteContext<'_> {
        RouteContext { registry: &self.registry, clusters: &*self.server.clusters, validate_clusters }
    }

    fn compile(
        &self,
        message: &RouteConfiguration,
        on_demand: Option<&HostsOnDemand>,
    ) -> Result<RouteTable, String> {
        let table = RouteTable::with_hosts_on_demand(message, &self.context(false), on_demand.cloned());
        table.map_err(|e| e.to_string())
    }

    /// Compiles what was accepted. Clusters that are gone since then do not matter.
    fn compile_again(&self, bytes: &Bytes) -> RouteTable {
        let message = RouteConfiguration::decode(&**bytes).map_err(|e| e.to_string());
        let table = message.and_then(|message| {
            self.compile(&RouteConfiguration { validate_clusters: None, ..message }, None)
        });
        table.unwrap_or_else(|error| {
            warn(&format!("a route table that was accepted does not compile: {error}"));
            RouteTable::default()
        })
    }
}

impl Table {
    fn is_used(&self) -> bool {
        let mut users = self.users.borrow_mut();
        users.retain(|user| user.strong_count() > 0);
        !users.is_empty()
    }

    fn is_of(&self, wanted: &WantedHosts) -> bool {
        self.users.borrow().iter().any(|user| user.ptr_eq(&wanted.slot))
    }

    /// Gives another user the table in force.
    fn serve(&self, user: Weak<RouteSlot>) {
        if let (Some(slot), Some(current)) = (user.upgrade(), &*self.current.borrow()) {
            slot.publish(current.compiled.clone());
        }
        self.users.borrow_mut().push(user);
    }

    fn take(&self, resource: &Known<'_, RouteConfiguration>) -> Result<(), String> {
        let Known { name, bytes, version, .. } = *resource;
        if *name != *self.name {
            return Err(
                self.unexpected(format!("Unexpected RDS configuration (expecting {}): {name}", self.name))
            );
        }
        if self.given.borrow().as_ref() == Some(bytes) {
            return Ok(());
        }
        // A copy of its own: a slice would keep the whole response.
        let bytes = Bytes::from(bytes.to_vec());
        let message = resource.message()?;
        let next = match &message.vhds {
            None => {
                let compiled = self.compiler.compile(&message, None)?;
                let compiled = self.at_first_use(compiled, &bytes);
                self.base.take();
                Current {
                    version: version.into(),
                    bytes: bytes.clone(),
                    updated: SystemTime::now(),
                    compiled: Arc::new(compiled),
                }
            }
            Some(vhds) => self.take_with_hosts(&message, vhds, version)?,
        };
        self.given.replace(Some(bytes));
        let waits = !self.is_settled() && self.current.borrow().is_none();
        if waits {
            self.first.replace(Some(next));
        } else {
            self.first.take();
            self.publish(next);
        }
        Ok(())
    }

    fn unexpected(&self, reason: String) -> String {
        let name = &self.name;
        sampan_core::log!(Component::Rds, Level::Warn, "rds: route config '{name}' rejected: {reason}");
        reason
    }

    /// Whether nobody waits for hosts.
    fn is_settled(&self) -> bool {
        self.base.borrow().as_ref().is_none_or(|(_, hosts)| hosts.is_settled())
    }

    /// The same of a table whose hosts come on their own.
    fn take_with_hosts(
        &self,
        message: &RouteConfiguration,
        vhds: &Vhds,
        version: &str,
    ) -> Result<Current, String> {
        let source = hosts::source(&self.context, vhds)?;
        let same = self.base.borrow().as_ref().is_some_and(|(_, hosts)| hosts.is_of(vhds));
        if !same {
            // Whether it can be used is known before anybody is asked.
            self.compiler.compile(message, None)?;
            let table = self.this.upgrade().ok_or("the route table is gone")?;
            let scope = &self.hosts_scope.scope(&self.name);
            let hosts = hosts::Subscription::start(&self.context, &source, vhds.clone(), scope, &table);
            let last = self.base.replace(Some((message.clone(), hosts)));
            drop(last);
        }
        let mut base = self.base.borrow_mut();
        let (base, hosts) = base.as_mut().ok_or("the route table has no hosts")?;
        let whole = hosts.complete(message);
        let compiled = Arc::new(self.compiler.compile(&whole, Some(&hosts.on_demand))?.into());
        base.clone_from(message);
        let bytes = whole.encode_to_vec().into();
        Ok(Current { version: version.into(), bytes, updated: SystemTime::now(), compiled })
    }

    /// A table that nobody has asked for yet is let go until somebody does: its bytes are there.
    fn at_first_use(&self, compiled: RouteTable, bytes: &Bytes) -> LazyTable {
        let used = self.current.borrow().as_ref().is_some_and(|current| current.compiled.is_made());
        if used || bytes.len() > AT_ONCE {
            return compiled.into();
        }
        let (compiler, bytes) = (self.compiler.clone(), bytes.clone());
        LazyTable::later(move || compiler.compile_again(&bytes))
    }

    /// Exchanges the hosts that came on their own.
    pub(super) fn rebuild(
        &self,
        version: &str,
        whole: impl FnOnce(&RouteConfiguration) -> RouteConfiguration,
    ) -> Result<(), String> {
        let base = self.base.borrow();
        let Some((base, hosts)) = &*base else { return Ok(()) };
        let whole = whole(base);
        let compiled = Arc::new(self.compiler.compile(&whole, Some(&hosts.on_demand))?.into());
        let bytes = whole.encode_to_vec().into();
        let updated = SystemTime::now();
        self.first.take();
        self.publish(Current { version: version.into(), bytes, updated, compiled });
        Ok(())
    }

    /// Its hosts had an answer, or there is none: nobody waits for them.
    pub(super) fn complete(&self) {
        if let Some(first) = self.first.take() {
            self.publish(first);
        }
        self.answered.settle();
    }

    fn publish(&self, next: Current) {
        for slot in self.users.borrow().iter().filter_map(Weak::upgrade) {
            slot.publish(next.compiled.clone());
        }
        let now = next.updated.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.current.replace(Some(next));
        if let Some(stats) = &self.stats {
            stats.config_reload.inc();
            stats.config_reload_time_ms.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        }
    }
}

impl Subscriber for Table {
    fn type_url(&self) -> &'static str {
        types::ROUTES
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode_new::<RouteConfiguration>(&self.context, resource, |name, bytes| {
            let Some(all) = self.all.upgrade() else { return false };
            let all = all.borrow();
            let is = |s: &Subscription| s.table.given.borrow().as_deref() == Some(bytes);
            all.get(name).is_some_and(|same| same.iter().any(is))
        })
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        match known(resources).as_slice() {
            [] => self.stats.iter().for_each(|stats| stats.update_empty.inc()),
            [one] => self.take(one)?,
            more => return Err(self.unexpected(format!("Unexpected RDS resource length: {}", more.len()))),
        }
        if self.first.borrow().is_none() {
            self.answered.settle();
        }
        Ok(())
    }

    fn failed(&self) {
        self.answered.settle();
    }

    /// As it was given: hosts that came on their own are kept on their own.
    fn in_force(&self) -> Vec<KeptResource> {
        let (current, given) = (self.current.borrow(), self.given.borrow());
        current.iter().zip(&*given).map(|(now, given)| kept(&now.version, given)).collect()
    }
}
