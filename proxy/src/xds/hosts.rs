//! VHDS: virtual hosts of a route table that come when a request asks for them, or unasked, each on its own.
//!
//! A table's subscription takes every resource called `TABLE/…`. A stream that finds no route asks for `TABLE/HOST` and
//! waits until a response names that, as a resource or as its alias; a resource without a value says that there is no such
//! host. What was answered once is not asked again, whatever became of it (Envoy 1.40).
//! Hosts are known by their own names: those that come replace those of the same name, and `removed_resources` takes them.
//!
//! Clients choose those names, so that they are bounded ([`Asked`]), other than in Envoy.
//!
//! Hosts of the last good configuration serve until the control plane speaks of them, and it is asked for each by its name.
//!
//! A table that is the first in its place waits for the first answer, and so does the listener of an inline one. Delta only.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, Vhds, VirtualHost};
use prost::Message as _;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::{ConfigSource, SourceKind};
use sampan_core::stats::{Counter, Scope};
use sampan_http::route::{Demand, HostsOnDemand};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use xds_client::{Decoded, Resource, Variant, types};

use super::resource::{Checked, checked, decode};
use super::routes::Table;
use super::source::kept;
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
    asked: RefCell<Asked>,
    stream: RefCell<Weak<Source>>,
    /// Hosts of the last good configuration that the control plane has said nothing of.
    kept: RefCell<BTreeSet<String>>,
    /// There was an answer, or there will be none in time.
    settled: Cell<bool>,
    config_reload: Counter,
    /// A question counts as one.
    update_attempt: Counter,
}

/// Names that a table asks for.
const MOST_ASKED: usize = 1000;

/// The names that were asked for, at most [`MOST_ASKED`]. For one more the oldest is let go that has its answer, those
/// without a host first; where none has, nothing is asked, so that a control plane never owes more answers than that.
#[derive(Default)]
struct Asked {
    /// Who waits for a name; none: it was answered.
    names: HashMap<Rc<str>, Option<Vec<oneshot::Sender<()>>>>,
    /// Those whose answer was that there is no such host, the oldest first.
    unknown: VecDeque<Rc<str>>,
    /// Those that got a host.
    known: VecDeque<Rc<str>>,
    /// Those without an answer.
    open: VecDeque<Rc<str>>,
}

impl Asked {
    /// Makes place for one more. Gives the name that is asked for no more, or nothing where there is no place.
    fn make_place(&mut self) -> Option<Option<Rc<str>>> {
        if self.names.len() < MOST_ASKED {
            return Some(None);
        }
        let oldest = self.unknown.pop_front().or_else(|| self.known.pop_front()).or_else(|| {
            // A control plane that does not answer must not keep the places of those who have gone.
            let waits = |name: &Rc<str>| self.names.get(name).is_some_and(awaited);
            if self.open.front().is_some_and(waits) { None } else { self.open.pop_front() }
        })?;
        self.names.remove(&oldest);
        Some(Some(oldest))
    }

    /// A name has its answer. Gives those who waited.
    fn answered(&mut self, name: &str, known: bool) -> Vec<oneshot::Sender<()>> {
        let Some((name, waiting)) = self.names.get_key_value(name) else { return Vec::new() };
        if waiting.is_none() {
            return Vec::new();
        }
        let name = name.clone();
        self.open.retain(|open| *open != name);
        if known { &mut self.known } else { &mut self.unknown }.push_back(name.clone());
        self.names.insert(name, None).flatten().unwrap_or_default()
    }
}

/// Whether somebody still waits for the answer.
fn awaited(waiting: &Option<Vec<oneshot::Sender<()>>>) -> bool {
    waiting.iter().flatten().any(|one| !one.is_closed())
}

/// Where a table's hosts come from, if Envoy would ask there.
pub fn source(context: &Context, message: &Vhds) -> Result<ConfigSource, String> {
    let source = sampan_http::route::hosts_source(message).map_err(|e| e.to_string())?;
    match (&source.kind, &context.ads) {
        (SourceKind::Ads, None) => {
            Err("vhds: ADS config source specified but no ADS configured in bootstrap.".to_owned())
        }
        (SourceKind::Ads, Some(ads)) if ads.variant() != Variant::Delta => {
            Err("vhds: ADS must use DELTA_GRPC api_type when used as VHDS config source.".to_owned())
        }
        _ => Ok(source),
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
            stream: RefCell::default(),
            kept: RefCell::default(),
            settled: Cell::default(),
            config_reload: scope.counter("config_reload"),
            update_attempt: scope.counter("update_attempt"),
        });
        let stats = SubscriptionStats::new(scope);
        let stream = Rc::new(Source::start(context, source, stats, subscriber.clone()));
        subscriber.stream.replace(Rc::downgrade(&stream));
        subscriber.ask_for_kept();
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
        let name: Rc<str> = format!("{}/{host}", subscriber.name).into();
        let mut asked = subscriber.asked.borrow_mut();
        match asked.names.get_mut(&name) {
            Some(None) => drop(answer.send(())),
            Some(Some(waiting)) => {
                subscriber.update_attempt.inc();
                if waiting.len() == waiting.capacity() {
                    waiting.retain(|one| !one.is_closed());
                }
                waiting.push(answer);
            }
            None => {
                let Some(oldest) = asked.make_place() else { continue };
                subscriber.update_attempt.inc();
                asked.names.insert(name.clone(), Some(vec![answer]));
                asked.open.push_back(name.clone());
                stream.ask(&name);
                if let Some(oldest) = oldest {
                    stream.forget(&oldest);
                }
            }
        }
    }
}

impl VirtualHosts {
    /// Whether they are still there, and what they are now.
    fn ask_for_kept(&self) {
        // Without a stream yet: when it is there.
        let stream = self.stream.borrow().upgrade();
        stream.iter().for_each(|stream| self.kept.borrow().iter().for_each(|name| stream.ask(name)));
    }

    /// Puts other hosts into the table, if there are others; the answer is complete.
    fn take(&self, version: &str, hosts: Option<Hosts>, answer: &[Rc<Decoded>]) -> Result<(), String> {
        let Some(table) = self.table.upgrade() else { return Ok(()) };
        if let Some(hosts) = hosts {
            table.rebuild(version, |base| merge(base, &hosts))?;
            self.hosts.replace(hosts);
            self.config_reload.inc();
        }
        self.settled.set(true);
        table.complete();
        self.answered(answer);
        Ok(())
    }

    fn answered(&self, resources: &[Rc<Decoded>]) {
        let mut asked = self.asked.borrow_mut();
        for resource in resources {
            // What has no value tells that there is no such host.
            let known = resource.message.is::<VirtualHost>();
            for name in std::iter::once(&resource.name).chain(&resource.aliases) {
                for one in asked.answered(name, known) {
                    // A stream that went away waits for nothing.
                    let _ = one.send(());
                }
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

    /// There is no state of the world of virtual hosts: this is what was kept.
    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        let hosts: Hosts = named(resources).collect();
        self.kept.replace(hosts.keys().cloned().collect());
        self.ask_for_kept();
        self.take(version, Some(hosts), resources)
    }

    fn change(&self, version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        let mut hosts = self.hosts.borrow().clone();
        let gone = removed.iter().filter(|name| hosts.remove(*name).is_some()).count();
        let names = || added.iter().map(|resource| &resource.name);
        // Of what was kept an answer without a host says that there is none.
        names().filter(|name| self.kept.borrow().contains(*name)).for_each(|name| drop(hosts.remove(name)));
        hosts.extend(named(added));
        let changed = (gone > 0 || !added.is_empty()).then_some(hosts);
        self.take(version, changed, added)?;
        let mut kept = self.kept.borrow_mut();
        removed.iter().chain(names()).for_each(|name| drop(kept.take(name)));
        Ok(())
    }

    fn failed(&self) {
        self.settled.set(true);
        if let Some(table) = self.table.upgrade() {
            table.complete();
        }
    }

    fn in_force(&self) -> Vec<KeptResource> {
        self.hosts.borrow().values().map(|host| kept("", &host.encode_to_vec().into())).collect()
    }
}

/// Hosts under their own names.
fn named(resources: &[Rc<Decoded>]) -> impl Iterator<Item = (String, VirtualHost)> {
    checked(resources)
        .into_iter()
        .map(|Checked { message, .. }: Checked<'_, VirtualHost>| (message.name.clone(), message.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(asked: &mut Asked, name: &str) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        asked.names.insert(name.into(), Some(vec![sender]));
        asked.open.push_back(name.into());
        receiver
    }

    #[test]
    fn names_of_clients_are_bounded() {
        let mut asked = Asked::default();
        let mut waiting: Vec<_> = (0..MOST_ASKED).map(|i| ask(&mut asked, &i.to_string())).collect();
        assert_eq!(asked.make_place(), None, "each is awaited");
        assert_eq!(asked.answered("1", true).len(), 1);
        assert_eq!(asked.answered("2", false).len(), 1);
        assert!(asked.answered("2", true).is_empty() && asked.answered("none", true).is_empty());
        assert_eq!(asked.make_place(), Some(Some("2".into())), "there is no such host");
        assert_eq!(asked.make_place(), Some(None));
        waiting.push(ask(&mut asked, "more"));
        assert_eq!(asked.make_place(), Some(Some("1".into())), "it has its answer");
        waiting.push(ask(&mut asked, "most"));
        assert_eq!(asked.make_place(), None);
        drop(waiting.remove(0));
        assert_eq!(asked.make_place(), Some(Some("0".into())), "nobody waits for it");
        assert_eq!(asked.names.len(), asked.open.len() + asked.known.len() + asked.unknown.len());
    }
}
