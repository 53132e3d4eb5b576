//! RDS: one subscription for each route table and source, whoever uses it.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::stats::{Counter, Gauge};
use sampan_http::filter::HttpFilterRegistry;
use sampan_http::route::{RouteContext, RouteSlot, RouteTable, WantedRoutes};
use sampan_listener::{ListenerConfig, Server};
use tokio::sync::watch;
use xds_client::{Decoded, Resource, types};

use super::resource::{Checked, checked, decode};
use super::source::kept;
use super::{Context, Source, Subscriber, SubscriptionStats};

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
struct Table {
    context: Rc<Context>,
    compiler: Rc<Compiler>,
    name: Arc<str>,
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
        let table = Rc::new(Table {
            context: self.context.clone(),
            compiler: self.compiler.clone(),
            name: wanted.name.clone(),
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
        if self.current.borrow().as_ref().is_some_and(|current| current.bytes == *bytes) {
            return Ok(());
        }
        let Compiler { registry, server } = &*self.compiler;
        let context = RouteContext { registry, clusters: &*server.clusters, validate_clusters: false };
        let compiled = Arc::new(RouteTable::from_proto(message, &context).map_err(|e| e.to_string())?);
        for slot in self.users.borrow().iter().filter_map(Weak::upgrade) {
            slot.publish(compiled.clone());
        }
        let updated = SystemTime::now();
        // A copy of its own: a slice would keep the whole response.
        let bytes = bytes.to_vec().into();
        self.current.replace(Some(Current { version: version.into(), bytes, updated, compiled }));
        self.config_reload.inc();
        let now = updated.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.config_reload_time_ms.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        Ok(())
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
        self.answered.send_replace(true);
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
