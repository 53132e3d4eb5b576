//! VHDS: virtual hosts of a route table that come when a request asks for them, or unasked, each on its own.
//!
//! A table's subscription takes every resource called `TABLE/…`. A stream that finds no route asks for `TABLE/HOST` and
//! waits until a response names that, as a resource or as its alias; a resource without a value says that there is no such
//! host. What was answered once is not asked again, whatever became of it (Envoy 1.40).
//! Hosts are known by their own names: those that come replace those of the same name, and `removed_resources` takes them.
//!
//! A table that is the first in its place waits for the first answer. Delta only.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, Vhds, VirtualHost};
use sampan_core::config_source::{Api, ConfigSource, SourceKind};
use sampan_core::error::AtField;
use sampan_core::stats::{Counter, Scope};
use sampan_http::route::{Demand, HostsOnDemand};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use xds_client::{Decoded, Resource, Variant, types};

use super::resource::{Checked, checked, decode};
use super::routes::Table;
use super::{Context, Source, Subscriber, SubscriptionStats};

/// Hosts by name.
type Hosts = BTreeMap<String, VirtualHost>;

/// The `vhds` of a table.
pub struct Subscription {
    message: Vhds,
    subscriber: Rc<VirtualHosts>,
    task: AbortHandle,
    #[allow(dead_code, reason = "held for its drop")]
    stream: Rc<Source>,
    /// For the table's compiled form.
    pub on_demand: HostsOnDemand,
}

/// The subscriber.
struct VirtualHosts {
    context: Rc<Context>,
    table: Weak<Table>,
    name: Arc<str>,
    hosts: RefCell<Hosts>,
    /// Who waits for a name; none: it was answered.
    asked: RefCell<HashMap<String, Option<Vec<oneshot::Sender<()>>>>>,
    /// There was an answer, or there will be none in time.
    settled: Cell<bool>,
    config_reload: Counter,
    /// A question counts as one.
    update_attempt: Counter,
}

/// Where a table's hosts come from, if Envoy would ask there.
pub fn source(context: &Context, message: &Vhds) -> Result<ConfigSource, String> {
    const DELTA: &str =
        "vhds: only 'DELTA_GRPC' or 'ADS' (which uses Delta xDS) is supported as a config source.";
    let source = message.config_source.as_ref().ok_or("vhds.config_source: value is required")?;
    let source =
        ConfigSource::from_proto(source).at("config_source").at("vhds").map_err(|e| e.to_string())?;
    match (&source.kind, &context.ads) {
        (SourceKind::Ads, None) => {
            Err("vhds: ADS config source specified but no ADS configured in bootstrap.".to_owned())
        }
        (SourceKind::Ads, Some(ads)) if ads.variant() == Variant::Delta => Ok(source),
        (SourceKind::Api(api), _) if matches!(api.api, Api::Grpc { delta: true, .. }) => Ok(source),
        _ => Err(DELTA.to_owned()),
    }
}

impl Subscription {
    /// Begins.
    pub fn start(
        context: &Rc<Context>,
        source: &ConfigSource,
        message: Vhds,
        scope: &Scope,
        table: &Rc<Table>,
    ) -> Self {
        scope.counter("update_empty");
        let subscriber = Rc::new(VirtualHosts {
            context: context.clone(),
            table: Rc::downgrade(table),
            name: table.name.clone(),
            hosts: RefCell::default(),
            asked: RefCell::default(),
            settled: Cell::default(),
            config_reload: scope.counter("config_reload"),
            update_attempt: scope.counter("update_attempt"),
        });
        let stats = SubscriptionStats::new(scope);
        let stream = Rc::new(Source::start(context, source, stats, subscriber.clone()));
        let (on_demand, demands) = HostsOnDemand::new();
        let task = tokio::task::spawn_local(listen(demands, subscriber.clone(), stream.clone()));
        Self { message, subscriber, task: task.abort_handle(), stream, on_demand }
    }

    /// Whether this is what the table says.
    pub fn is_of(&self, message: &Vhds) -> bool {
        self.message == *message
    }

    /// Whether nobody waits for the first answer.
    pub fn is_settled(&self) -> bool {
        self.subscriber.settled.get()
    }

    /// The table with the hosts that came.
    pub fn complete(&self, table: &RouteConfiguration) -> RouteConfiguration {
        merge(table, &self.subscriber.hosts.borrow())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A table's own hosts and those that came, each sort by name, as Envoy shows them.
fn merge(table: &RouteConfiguration, hosts: &Hosts) -> RouteConfiguration {
    let mut whole = table.clone();
    if hosts.is_empty() {
        return whole;
    }
    let mut own = Hosts::new();
    for host in whole.virtual_hosts.drain(..) {
        own.entry(host.name.clone()).or_insert(host);
    }
    whole.virtual_hosts = own.into_values().chain(hosts.values().cloned()).collect();
    whole
}

/// Asks for what streams want.
async fn listen(
    mut demands: mpsc::UnboundedReceiver<Demand>,
    subscriber: Rc<VirtualHosts>,
    stream: Rc<Source>,
) {
    while let Some(Demand { host, answer }) = demands.recv().await {
        let name = format!("{}/{host}", subscriber.name);
        let mut asked = subscriber.asked.borrow_mut();
        match asked.get_mut(&name) {
            Some(None) => drop(answer.send(())),
            Some(Some(waiting)) => {
                subscriber.update_attempt.inc();
                waiting.retain(|one| !one.is_closed());
                waiting.push(answer);
            }
            None => {
                subscriber.update_attempt.inc();
                asked.insert(name.clone(), Some(vec![answer]));
                stream.ask(&name);
            }
        }
    }
}

impl VirtualHosts {
    fn answered<'a>(&self, names: impl Iterator<Item = &'a String>) {
        let mut asked = self.asked.borrow_mut();
        for waiting in names.filter_map(|name| asked.get_mut(name).and_then(Option::take)) {
            for one in waiting {
                // A stream that went away waits for nothing.
                let _ = one.send(());
            }
        }
    }
}

impl Subscriber for VirtualHosts {
    fn type_url(&self) -> &'static str {
        types::VIRTUAL_HOST
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn is_namespace(&self) -> bool {
        true
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        if resource.value.is_some() {
            return decode::<VirtualHost>(&self.context, resource);
        }
        let Resource { name, version, aliases, .. } = resource;
        Ok(Decoded { name, version, aliases, bytes: Default::default(), message: Box::new(()) })
    }

    /// There is no state of the world of virtual hosts.
    fn update(&self, _version: &str, _resources: &[Rc<Decoded>]) -> Result<(), String> {
        Ok(())
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let Some(table) = self.table.upgrade() else { return Ok(()) };
        let mut hosts = self.hosts.borrow().clone();
        let gone = removed.iter().filter(|name| hosts.remove(*name).is_some()).count();
        for Checked { message, .. } in checked::<VirtualHost>(added) {
            hosts.insert(message.name.clone(), message.clone());
        }
        if gone > 0 || !added.is_empty() {
            table.rebuild(version, |base| merge(base, &hosts))?;
            self.hosts.replace(hosts);
            self.config_reload.inc();
        }
        self.settled.set(true);
        table.complete();
        self.answered(added.iter().flat_map(|one| std::iter::once(&one.name).chain(&one.aliases)));
        Ok(())
    }

    fn failed(&self) {
        self.settled.set(true);
        if let Some(table) = self.table.upgrade() {
            table.complete();
        }
    }
}
