//! SRDS: scopes that come, change and go; each has its route table with it or wants it of RDS.
//!
//! A response whose scopes have a name or a key twice is refused as a whole, and so is one with a table that cannot be
//! compiled. Listeners wait for the scopes and for the tables that they name.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_http::route::{
    RouteSlot, RouteTable, ScopeSlot, Scopes as Map, WantedRoutes, WantedScopes, scope_key,
};
use sampan_listener::ListenerConfig;
use xds_client::{Decoded, Resource, types};

use super::answer::{Answer, Awaited};
use super::resource::{Checked, checked, decode};
use super::source::kept;
use super::{Context, Routes, Source, Subscriber, SubscriptionStats};

/// All SRDS subscriptions.
pub struct Srds {
    context: Rc<Context>,
    routes: Rc<Routes>,
    all: RefCell<Vec<Subscription>>,
}

struct Subscription {
    source: ConfigSource,
    scopes: Rc<Scopes>,
    _stream: Source,
}

/// The subscriber of one set of scopes.
struct Scopes {
    context: Rc<Context>,
    routes: Rc<Routes>,
    name: Arc<str>,
    source: Option<ConfigSource>,
    scope: Scope,
    users: RefCell<Vec<Weak<ScopeSlot>>>,
    all: RefCell<BTreeMap<String, Held>>,
    map: RefCell<Arc<Map>>,
    current: RefCell<Option<(Arc<str>, SystemTime)>>,
    answered: Answer,
    config_reload: Counter,
    config_reload_time_ms: Gauge,
    all_scopes: Gauge,
    active_scopes: Gauge,
}

/// A scope in force.
#[derive(Clone)]
struct Held {
    key: Box<[u8]>,
    bytes: Bytes,
    table: Arc<RouteSlot>,
    /// Of RDS, where the table comes from there.
    answered: Option<Awaited>,
}

/// A set of scopes in force.
pub struct CurrentScopes {
    /// `scoped_routes.name`
    pub name: Arc<str>,
    /// `version_info`
    pub version: Arc<str>,
    /// The messages.
    pub scopes: Vec<Bytes>,
    /// When it came.
    pub updated: SystemTime,
}

impl Srds {
    pub(super) fn new(context: Rc<Context>, routes: Rc<Routes>) -> Self {
        Self { context, routes, all: RefCell::default() }
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        self.tidy();
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedScopes>());
        let all: Vec<_> = wanted.map(|wanted| self.subscribe(wanted)).collect();
        async move {
            for scopes in all {
                scopes.answered.awaited().settled().await;
                let tables = scopes.all.borrow().values().filter_map(|s| s.answered.clone()).collect();
                Awaited::all(tables).await;
            }
        }
    }

    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let all = self.all.borrow();
        let table = |held: &Held| held.answered.as_ref().is_none_or(Awaited::is_settled);
        let answered = |wanted: &&WantedScopes| {
            let found = all.iter().find(|s| s.source == wanted.source);
            found.is_some_and(|s| s.scopes.answered.is_settled() && s.scopes.all.borrow().values().all(table))
        };
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedScopes>());
        let names = wanted.filter(|wanted| !answered(wanted));
        names.map(|_| "target ConfigSubscriptionCommonBase init target 'SRDS'".to_owned()).collect()
    }

    fn subscribe(&self, wanted: &WantedScopes) -> Rc<Scopes> {
        let found = self.all.borrow().iter().find(|s| s.source == wanted.source).map(|s| s.scopes.clone());
        if let Some(scopes) = found {
            if let Some(slot) = wanted.slot.upgrade() {
                slot.publish(scopes.map.borrow().clone());
            }
            scopes.users.borrow_mut().push(wanted.slot.clone());
            return scopes;
        }
        let scope = wanted.scope.scope("scoped_rds").scope(&wanted.name);
        scope.counter("update_empty");
        scope.gauge("on_demand_scopes");
        let scopes = Rc::new(Scopes {
            context: self.context.clone(),
            routes: self.routes.clone(),
            name: wanted.name.clone(),
            source: wanted.routes.clone(),
            scope: wanted.scope.clone(),
            users: RefCell::new(vec![wanted.slot.clone()]),
            all: RefCell::default(),
            map: RefCell::default(),
            current: RefCell::default(),
            answered: Answer::default(),
            config_reload: scope.counter("config_reload"),
            config_reload_time_ms: scope.gauge("config_reload_time_ms"),
            all_scopes: scope.gauge("all_scopes"),
            active_scopes: scope.gauge("active_scopes"),
        });
        let stats = SubscriptionStats::new(&scope);
        let stream = Source::start(&self.context, &wanted.source, stats, scopes.clone());
        let source = wanted.source.clone();
        self.all.borrow_mut().push(Subscription { source, scopes: scopes.clone(), _stream: stream });
        scopes
    }

    /// Ends what nobody uses any more.
    fn tidy(&self) {
        self.all.borrow_mut().retain(|s| {
            let mut users = s.scopes.users.borrow_mut();
            users.retain(|user| user.strong_count() > 0);
            !users.is_empty()
        });
    }

    /// The scopes in force.
    pub fn current(&self) -> Vec<CurrentScopes> {
        let dump = |s: &Subscription| {
            let (version, updated) = s.scopes.current.borrow().clone()?;
            let scopes = s.scopes.all.borrow().values().map(|held| held.bytes.clone()).collect();
            Some(CurrentScopes { name: s.scopes.name.clone(), version, scopes, updated })
        };
        self.all.borrow().iter().filter_map(dump).collect()
    }
}

impl Scopes {
    /// Takes scopes beside those that stay.
    fn take(
        &self,
        version: &str,
        added: &[Checked<'_, ScopedRouteConfiguration>],
        stays: impl Fn(&str) -> bool,
    ) -> Result<(), String> {
        let fail = |reason: String| format!("Error adding/updating scoped route(s): {reason}");
        let mut names = HashSet::new();
        let old = self.all.borrow().clone();
        let new: HashSet<&str> = added.iter().map(|one| one.message.name.as_str()).collect();
        let kept = old.iter().filter(|(name, _)| !new.contains(name.as_str()) && stays(name));
        let mut keys: HashMap<Box<[u8]>, &str> =
            kept.clone().map(|(name, held)| (held.key.clone(), name.as_str())).collect();
        for one in added {
            let name = one.message.name.as_str();
            if !names.insert(name) {
                return Err(fail(format!("duplicate scoped route configuration '{name}' found")));
            }
            if let Some(first) = keys.insert(scope_key(one.message), name) {
                return Err(fail(format!(
                    "scope key conflict found, first scope is '{first}', second scope is '{name}'"
                )));
            }
        }
        let mut all: BTreeMap<String, Held> = kept.map(|(name, held)| (name.clone(), held.clone())).collect();
        let gone = old.keys().any(|name| !new.contains(name.as_str()) && !stays(name));
        let mut changed = gone;
        for one in added {
            let name = one.message.name.clone();
            let held = match old.get(&name).filter(|held| held.bytes == *one.bytes) {
                Some(same) => same.clone(),
                None => {
                    changed = true;
                    self.hold(one)?
                }
            };
            all.insert(name, held);
        }
        self.put(version, all, changed);
        Ok(())
    }

    fn hold(&self, one: &Checked<'_, ScopedRouteConfiguration>) -> Result<Held, String> {
        let message = one.message;
        // A copy of its own: a slice would keep the whole response.
        let (key, bytes) = (scope_key(message), one.bytes.to_vec().into());
        if let Some(routes) = &message.route_configuration {
            let table = self.routes.compile(routes)?;
            return Ok(Held { key, bytes, table: RouteSlot::new(table), answered: None });
        }
        if message.on_demand {
            return Err(format!("{}: on_demand is not supported", message.name));
        }
        if message.route_configuration_name.is_empty() {
            return Err("route_configuration_name is empty.".to_owned());
        }
        let Some(source) = self.source.clone() else {
            return Err("rds_config_source: value is required".to_owned());
        };
        let table = RouteSlot::new(RouteTable::default());
        let answered = self.routes.follow_one(&WantedRoutes {
            name: message.route_configuration_name.as_str().into(),
            source,
            scope: self.scope.clone(),
            slot: Arc::downgrade(&table),
        });
        Ok(Held { key, bytes, table, answered: Some(answered) })
    }

    fn put(&self, version: &str, all: BTreeMap<String, Held>, changed: bool) {
        if changed {
            let map: Map = all.values().map(|held| (held.key.clone(), held.table.clone())).collect();
            let map = Arc::new(map);
            for slot in self.users.borrow().iter().filter_map(Weak::upgrade) {
                slot.publish(map.clone());
            }
            self.map.replace(map);
        }
        self.all_scopes.set(all.len() as u64);
        self.active_scopes.set(all.values().filter(|held| held.answered.is_some()).count() as u64);
        let old = self.all.replace(all);
        let all = self.all.borrow();
        let stays =
            |name: &str, held: &Held| all.get(name).is_some_and(|now| Arc::ptr_eq(&now.table, &held.table));
        let gone = old.into_iter().filter(|(name, held)| !stays(name, held));
        let gone: Vec<_> = gone.map(|(_, held)| held.table).collect();
        drop(all);
        self.routes.give_up(&gone);
        let updated = SystemTime::now();
        if changed {
            self.current.replace(Some((version.into(), updated)));
        } else if let Some((_, last)) = &mut *self.current.borrow_mut() {
            *last = updated;
        }
        self.config_reload.inc();
        let now = updated.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.config_reload_time_ms.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        self.answered.settle();
    }
}

impl Subscriber for Scopes {
    fn type_url(&self) -> &'static str {
        types::SCOPED_ROUTES
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode::<ScopedRouteConfiguration>(&self.context, resource)
    }

    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        self.take(version, &checked(resources), |_| false)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        self.take(version, &checked(added), |name| !removed.iter().any(|gone| gone == name))
    }

    fn failed(&self) {
        self.answered.settle();
    }

    fn in_force(&self) -> Vec<KeptResource> {
        self.all.borrow().values().map(|held| kept("", &held.bytes)).collect()
    }
}
