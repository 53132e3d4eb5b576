//! RDS: one subscription for each route table and source, whoever uses it. Its virtual hosts may come on their own
//! ([`super::hosts`]).

use std::cell::RefCell;
use std::rc::{Rc, Weak as RcWeak};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, Vhds};
use prost::Message;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_http::filter::HttpFilterRegistry;
use sampan_http::route::{HostsOnDemand, RouteContext, RouteSlot, RouteTable, WantedRoutes};
use sampan_listener::{ListenerConfig, Server};
use tokio::sync::watch;
use xds_client::{Decoded, Resource, types};

use super::resource::{Checked, checked, decode};
use super::source::kept;
use super::{Context, Source, Subscriber, SubscriptionStats, hosts};

/// All RDS subscriptions.
pub struct Rds {
    context: Rc<Context>,
    compiler: Rc<Compiler>,
    all: RefCell<Vec<Subscription>>,
}

struct Compiler {
    registry: HttpFilterRegistry,
    server: Arc<Server>,
}

struct Subscription {
    source: ConfigSource,
    table: Rc<Table>,
    _stream: Source,
}

/// The subscriber of one table.
pub(super) struct Table {
    this: RcWeak<Table>,
    context: Rc<Context>,
    compiler: Rc<Compiler>,
    pub(super) name: Arc<str>,
    /// `http.PREFIX.`
    scope: Scope,
    /// What came last, as it came.
    given: RefCell<Option<Bytes>>,
    /// What it says, where its hosts come on their own.
    base: RefCell<Option<(RouteConfiguration, hosts::Subscription)>>,
    /// What is to be in force when its hosts have come for the first time.
    first: RefCell<Option<Current>>,
    users: RefCell<Vec<Weak<RouteSlot>>>,
    current: RefCell<Option<Current>>,
    answered: watch::Sender<bool>,
    config_reload: Counter,
    config_reload_time_ms: Gauge,
    update_empty: Counter,
}

/// A table in force.
#[derive(Clone)]
pub struct Current {
    /// `version_info`
    pub version: Arc<str>,
    /// The message.
    pub bytes: Bytes,
    /// When it came.
    pub updated: SystemTime,
    compiled: Arc<RouteTable>,
}

impl Rds {
    pub(super) fn new(context: Rc<Context>, server: Arc<Server>) -> Self {
        let mut registry = HttpFilterRegistry::default();
        sampan_http::filters::register(&mut registry);
        let compiler = Rc::new(Compiler { registry, server });
        Self { context, compiler, all: RefCell::default() }
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        self.tidy();
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedRoutes>());
        let answers: Vec<_> = wanted.map(|wanted| self.subscribe(wanted).answered.subscribe()).collect();
        async move {
            for mut answer in answers {
                // A subscription that ended is awaited by nobody.
                let _ = answer.wait_for(|done| *done).await;
            }
        }
    }

    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let all = self.all.borrow();
        let answered = |wanted: &&WantedRoutes| {
            let same = |s: &&Subscription| s.source == wanted.source && s.table.name == wanted.name;
            all.iter().find(same).is_some_and(|s| *s.table.answered.borrow())
        };
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedRoutes>());
        let names = wanted.filter(|wanted| !answered(wanted));
        names.map(|w| format!("shared target RdsRouteConfigSubscription RDS init {}", w.name)).collect()
    }

    /// Subscribes to one table; who gives up its slot ends it.
    pub(super) fn follow_one(&self, wanted: &WantedRoutes) -> watch::Receiver<bool> {
        self.tidy();
        self.subscribe(wanted).answered.subscribe()
    }

    /// Compiles a table that came with something else.
    pub(super) fn compile(
        &self,
        message: &RouteConfiguration,
        validate_clusters: bool,
    ) -> Result<RouteTable, String> {
        let Compiler { registry, server } = &*self.compiler;
        let context = RouteContext { registry, clusters: &*server.clusters, validate_clusters };
        RouteTable::from_proto(message, &context).map_err(|e| e.to_string())
    }

    fn subscribe(&self, wanted: &WantedRoutes) -> Rc<Table> {
        let same = |s: &&Subscription| s.source == wanted.source && s.table.name == wanted.name;
        let found = self.all.borrow().iter().find(same).map(|s| s.table.clone());
        if let Some(table) = found {
            table.serve(wanted.slot.clone());
            return table;
        }
        let scope = wanted.scope.scope("rds").scope(&wanted.name);
        let table = Rc::new_cyclic(|this| Table {
            this: this.clone(),
            context: self.context.clone(),
            compiler: self.compiler.clone(),
            name: wanted.name.clone(),
            scope: wanted.scope.clone(),
            given: RefCell::default(),
            base: RefCell::default(),
            first: RefCell::default(),
            users: RefCell::new(vec![wanted.slot.clone()]),
            current: RefCell::default(),
            answered: watch::Sender::new(false),
            config_reload: scope.counter("config_reload"),
            config_reload_time_ms: scope.gauge("config_reload_time_ms"),
            update_empty: scope.counter("update_empty"),
        });
        let stats = SubscriptionStats::new(&scope);
        let stream = Source::start(&self.context, &wanted.source, stats, table.clone());
        let source = wanted.source.clone();
        self.all.borrow_mut().push(Subscription { source, table: table.clone(), _stream: stream });
        table
    }

    /// Ends what nobody uses any more.
    pub(super) fn tidy(&self) {
        self.all.borrow_mut().retain(|s| {
            let mut users = s.table.users.borrow_mut();
            users.retain(|user| user.strong_count() > 0);
            !users.is_empty()
        });
    }

    /// The tables in force.
    pub fn current(&self) -> Vec<Current> {
        self.all.borrow().iter().filter_map(|s| s.table.current.borrow().clone()).collect()
    }
}

impl Table {
    /// Gives another user the table in force.
    fn serve(&self, user: Weak<RouteSlot>) {
        if let (Some(slot), Some(current)) = (user.upgrade(), &*self.current.borrow()) {
            slot.publish(current.compiled.clone());
        }
        self.users.borrow_mut().push(user);
    }

    fn take(&self, resource: &Checked<'_, RouteConfiguration>) -> Result<(), String> {
        let Checked { message, bytes, version } = *resource;
        if message.name != *self.name {
            return Err(format!("Unexpected RDS configuration (expecting {}): {}", self.name, message.name));
        }
        if self.given.borrow().as_ref() == Some(bytes) {
            return Ok(());
        }
        // A copy of its own: a slice would keep the whole response.
        let bytes = Bytes::from(bytes.to_vec());
        let next = match &message.vhds {
            None => {
                let compiled = self.compile(message, None)?;
                self.base.take();
                Current {
                    version: version.into(),
                    bytes: bytes.clone(),
                    updated: SystemTime::now(),
                    compiled,
                }
            }
            Some(vhds) => self.take_with_hosts(message, vhds, version)?,
        };
        self.given.replace(Some(bytes));
        let settled = self.base.borrow().as_ref().is_none_or(|(_, hosts)| hosts.is_settled());
        let waits = !settled && self.current.borrow().is_none();
        if waits {
            self.first.replace(Some(next));
        } else {
            self.first.take();
            self.publish(next);
        }
        Ok(())
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
            self.compile(message, None)?;
            let table = self.this.upgrade().ok_or("the route table is gone")?;
            let scope = self.scope.scope("rds").scope("vhds").scope(&self.name);
            let hosts = hosts::Subscription::start(&self.context, &source, vhds.clone(), &scope, &table);
            let last = self.base.replace(Some((message.clone(), hosts)));
            drop(last);
        }
        let mut base = self.base.borrow_mut();
        let (base, hosts) = base.as_mut().ok_or("the route table has no hosts")?;
        let whole = hosts.complete(message);
        let compiled = self.compile(&whole, Some(&hosts.on_demand))?;
        base.clone_from(message);
        let bytes = whole.encode_to_vec().into();
        Ok(Current { version: version.into(), bytes, updated: SystemTime::now(), compiled })
    }

    fn compile(
        &self,
        message: &RouteConfiguration,
        on_demand: Option<&HostsOnDemand>,
    ) -> Result<Arc<RouteTable>, String> {
        let Compiler { registry, server } = &*self.compiler;
        let context = RouteContext { registry, clusters: &*server.clusters, validate_clusters: false };
        let table = RouteTable::with_hosts_on_demand(message, &context, on_demand.cloned());
        table.map(Arc::new).map_err(|e| e.to_string())
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
        let compiled = self.compile(&whole, Some(&hosts.on_demand))?;
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
        self.answered.send_replace(true);
    }

    fn publish(&self, next: Current) {
        for slot in self.users.borrow().iter().filter_map(Weak::upgrade) {
            slot.publish(next.compiled.clone());
        }
        let now = next.updated.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.current.replace(Some(next));
        self.config_reload.inc();
        self.config_reload_time_ms.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
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
        decode::<RouteConfiguration>(&self.context, resource)
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        match checked(resources).as_slice() {
            [] => self.update_empty.inc(),
            [one] => self.take(one)?,
            more => return Err(format!("Unexpected RDS resource length: {}", more.len())),
        }
        if self.first.borrow().is_none() {
            self.answered.send_replace(true);
        }
        Ok(())
    }

    fn failed(&self) {
        self.answered.send_replace(true);
    }

    fn in_force(&self) -> Vec<KeptResource> {
        let current = self.current.borrow();
        current.iter().map(|now| kept(&now.version, &now.bytes)).collect()
    }
}
