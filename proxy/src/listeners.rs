//! The listeners of the process, on the control thread: added, changed, drained and removed while it serves.
//!
//! A listener has a slot by its name. What takes a slot is made completely before what was there goes: models
//! compiled, sockets bound, routes and secrets there (it *warms* until then, aside). Then
//!
//! - where only filter chains changed, the sockets stay and the chains that are the same stay with their connections
//!   (*in place*); the others drain;
//! - where the sockets' options are the same, they stay too, and all connections of before drain;
//! - else the new sockets listen before the old ones are closed.
//!
//! To drain is to ask clients to go ([`Phase::Leaving`]) for the drain time, and then to close what is left. With
//! `--drain-strategy gradual` ever more responses do so.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::admin::v3::UpdateFailureState;
use envoy_types::pb::envoy::admin::v3::unready_targets_dumps::UnreadyTargetsDump;
use envoy_types::pb::envoy::config::listener::v3::Listener as Message;
use prost::Message as _;
use sampan_core::Address;
use sampan_core::drain::{Drain, Phase};
use sampan_core::log::{Component, Level};
use sampan_listener::{
    Bound, ListenSockets, ListenerConfig, NetworkFilterRegistry, Server, TrafficDirection,
};
use sampan_upstream::Origin;
use tokio::sync::{Notify, oneshot};

use crate::cli::Options;
use crate::stats::ListenerManagerStats;
use crate::worker::{Handle, Order};
use crate::xds::Dependencies;

/// The workers, as the control thread holds them.
pub type Workers = Rc<RefCell<Vec<Handle>>>;

/// All listeners.
pub struct ListenerManager {
    server: Arc<Server>,
    registry: NetworkFilterRegistry,
    /// `listener_manager.*`
    pub stats: ListenerManagerStats,
    workers: Workers,
    sockets: usize,
    drain_time: Duration,
    ramp: Option<Duration>,
    all: RefCell<All>,
    /// What they wait for.
    dependencies: OnceCell<Dependencies>,
    /// Something moved in `all`.
    moved: Notify,
    /// A listener, or some of its chains, have no connections left.
    gone: Notify,
}

#[derive(Default)]
struct All {
    active: Vec<Rc<Entry>>,
    warming: Vec<Rc<Entry>>,
    draining: Vec<Rc<Entry>>,
    failures: Vec<Failure>,
    stopped: Vec<Arc<str>>,
}

/// A listener in one of its states.
pub struct Entry {
    /// The listener.
    pub config: Arc<ListenerConfig>,
    /// Its addresses, with the ports that the kernel chose.
    pub addresses: Vec<Address>,
    /// Where it came from; none: from the bootstrap.
    pub origin: Option<Origin>,
    /// New sockets, until they are given to the workers.
    bound: RefCell<Option<Bound>>,
    in_place: bool,
}

impl Entry {
    fn is_inbound(&self) -> bool {
        self.config.traffic_direction == TrafficDirection::Inbound
    }
}

/// A listener that was refused.
#[derive(Clone)]
pub struct Failure {
    /// Under which its state is shown, besides the one that has no name.
    pub name: Option<String>,
    /// What was refused, and why.
    pub state: UpdateFailureState,
}

/// What became of a listener.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is what it was, or the bootstrap's.
    Same,
    /// It serves, or warms.
    New,
}

fn find(list: &[Rc<Entry>], name: &str) -> Option<Rc<Entry>> {
    list.iter().find(|entry| &*entry.config.name == name).cloned()
}

impl ListenerManager {
    /// A manager of the bootstrap's listeners, which begin to serve with [`ListenerManager::open`].
    pub fn new(
        server: &Arc<Server>,
        workers: Workers,
        count: usize,
        options: &Options,
        bound: Vec<Bound>,
    ) -> Self {
        let entry = |bound: Bound| {
            let (config, addresses) = (bound.config.clone(), bound.addresses.clone());
            Rc::new(Entry { config, addresses, origin: None, bound: Some(bound).into(), in_place: false })
        };
        let active = bound.into_iter().map(entry).collect();
        Self {
            server: server.clone(),
            registry: crate::boot::network_filters(),
            stats: ListenerManagerStats::new(&server.stats),
            workers,
            sockets: count,
            drain_time: options.drain_time,
            ramp: options.ramp(),
            all: RefCell::new(All { active, ..All::default() }),
            dependencies: OnceCell::new(),
            moved: Notify::new(),
            gone: Notify::new(),
        }
    }

    /// Begins to serve the bootstrap's listeners; an error is one of listen(2) or of a worker.
    pub async fn open(&self) -> Result<(), crate::boot::BootError> {
        let active = self.active();
        self.stats.added.add(active.iter().filter(|e| e.origin.is_none()).count() as u64);
        for entry in active {
            let Some(bound) = entry.bound.take() else { continue };
            let answers = self.give(&entry.config, bound.listen()?);
            self.counted(answers).await.map_err(|e| {
                crate::boot::BootError::System(format!("listener '{}'", entry.config.name), e)
            })?;
        }
        self.stats.workers_started.set(1);
        self.show();
        Ok(())
    }

    /// Takes a listener that LDS has, or says why not.
    pub fn update(
        self: &Rc<Self>,
        message: &Message,
        origin: Origin,
        deps: &Dependencies,
    ) -> Result<Taken, String> {
        let name = message.name.as_str();
        let (active, warming) = {
            let all = self.all.borrow();
            (find(&all.active, name), find(&all.warming, name))
        };
        match warming.as_ref().or(active.as_ref()).map(|e| &e.origin) {
            // What the bootstrap says stays.
            Some(None) => return Ok(Taken::Same),
            Some(Some(now)) if now.bytes == origin.bytes => return Ok(Taken::Same),
            _ => {}
        }
        let is = |entry: &Rc<Entry>| entry.origin.as_ref().is_some_and(|now| now.bytes == origin.bytes);
        if active.as_ref().is_some_and(is) {
            // What warms is not wanted any more, and what serves is what is wanted.
            self.all.borrow_mut().warming.retain(|e| &*e.config.name != name);
            self.stats.modified.inc();
            self.show();
            return Ok(Taken::New);
        }
        let entry = Rc::new(
            self.make(message, origin, active.as_deref())
                .map_err(|reason| format!("error adding listener '{}': {reason}", address_of(message)))?,
        );
        if active.is_some() || warming.is_some() {
            self.stats.modified.inc();
        } else {
            self.stats.added.inc();
        }
        self.stats.in_place_updated.add(u64::from(entry.in_place));
        let mut all = self.all.borrow_mut();
        all.warming.retain(|e| &*e.config.name != name);
        all.warming.push(entry.clone());
        drop(all);
        let mut warm = Box::pin(deps.follow(&entry.config));
        let at_once = {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            warm.as_mut().poll(&mut context).is_ready()
        };
        if at_once {
            self.activate(&entry);
        } else {
            let this = self.clone();
            tokio::task::spawn_local(async move {
                warm.await;
                this.activate(&entry);
            });
        }
        self.show();
        Ok(Taken::New)
    }

    fn make(&self, message: &Message, origin: Origin, active: Option<&Entry>) -> Result<Entry, String> {
        let old = active.filter(|active| only_chains_differ(active, message)).map(|active| &*active.config);
        let made = match old {
            Some(old) => ListenerConfig::in_place_of(old, message, &self.server, &self.registry),
            None => ListenerConfig::from_proto(message, &self.server, &self.registry),
        };
        let config = Arc::new(made.map_err(|e| e.to_string())?);
        self.check_addresses(&config)?;
        let (bound, addresses) = match active.filter(|active| config.fits_sockets_of(&active.config)) {
            Some(active) => (None, active.addresses.clone()),
            None => {
                let bound = Bound::bind(config.clone(), self.sockets).map_err(|e| {
                    self.stats.create_failure.inc();
                    e.to_string()
                })?;
                let addresses = bound.addresses.clone();
                (Some(bound), addresses)
            }
        };
        // Envoy shows a listener that was updated in place under the version of before.
        let version = old.and(active).and_then(|active| active.origin.as_ref()).map(|o| o.version.clone());
        let origin = Some(Origin { version: version.unwrap_or(origin.version), ..origin });
        Ok(Entry { config, addresses, origin, bound: bound.into(), in_place: old.is_some() })
    }

    /// Two listeners on one address would share its connections by chance.
    fn check_addresses(&self, new: &ListenerConfig) -> Result<(), String> {
        let all = self.all.borrow();
        let others = all.active.iter().chain(&all.warming).filter(|e| e.config.name != new.name);
        for other in others.filter(|e| e.config.bind_to_port && new.bind_to_port) {
            let taken = |address: &Address| other.addresses.contains(address) && address.port() != Some(0);
            if let Some(address) = new.addresses.iter().map(|a| &a.address).find(|address| taken(address)) {
                return Err(format!(
                    "'{}' has duplicate address '{address}' as existing listener, to check if the listener has \
                     duplicated addresses with other listeners or 'enable_reuse_port' is set to 'false' for the \
                     listener",
                    new.name
                ));
            }
        }
        Ok(())
    }

    /// Gives a warm listener its slot.
    fn activate(self: &Rc<Self>, entry: &Rc<Entry>) {
        let mut all = self.all.borrow_mut();
        let waiting = all.warming.len();
        all.warming.retain(|e| !Rc::ptr_eq(e, entry));
        // Something newer came, or it was removed; or nothing is served any more.
        if all.warming.len() == waiting || self.server.drain.phase() >= Phase::Draining {
            return;
        }
        match entry.bound.take().map(Bound::listen) {
            Some(Ok(sockets)) => {
                let answers = self.give(&entry.config, sockets);
                let this = self.clone();
                tokio::task::spawn_local(async move { this.counted(answers).await });
            }
            Some(Err(error)) => {
                sampan_core::log!(
                    Component::Config,
                    Level::Error,
                    "listener '{}': {error}",
                    entry.config.name
                );
                self.stats.create_failure.inc();
                return;
            }
            None => {
                for worker in self.workers.borrow().iter() {
                    worker.order(Order::Update(entry.config.clone()));
                    self.stats.create_success.inc();
                }
            }
        }
        let slot = all.active.iter_mut().find(|e| e.config.name == entry.config.name);
        let old = match slot {
            Some(slot) => Some(std::mem::replace(slot, entry.clone())),
            None => {
                all.active.push(entry.clone());
                None
            }
        };
        drop(all);
        if let Some(old) = old {
            self.drain(old, Some(entry));
        }
        self.show();
    }

    /// Removes what LDS has no more. Says whether it was there.
    pub fn remove(self: &Rc<Self>, name: &str) -> bool {
        let mut all = self.all.borrow_mut();
        let is = |e: &Rc<Entry>| &*e.config.name == name && e.origin.is_some();
        let before = all.warming.len();
        all.warming.retain(|e| !is(e));
        let waited = all.warming.len() < before;
        let at = all.active.iter().position(is);
        let old = at.map(|at| all.active.remove(at));
        drop(all);
        let removed = waited || old.is_some();
        self.stats.removed.add(u64::from(removed));
        if let Some(old) = old {
            for worker in self.workers.borrow().iter() {
                worker.order(Order::StopListening(vec![old.config.name.clone()]));
            }
            self.drain(old, None);
        }
        self.show();
        removed
    }

    fn drain(self: &Rc<Self>, old: Rc<Entry>, new: Option<&Rc<Entry>>) {
        let drains = old.config.leaving(new.map(|new| &*new.config));
        let in_place = new.is_some_and(|new| new.in_place);
        drains.iter().for_each(|drain| drain.leave(self.ramp));
        let (gauge, amount) = if in_place {
            drains.iter().for_each(Drain::removed_alone);
            (&self.stats.filter_chains_draining, drains.len() as u64)
        } else {
            self.all.borrow_mut().draining.push(old.clone());
            (&self.stats.draining, 1)
        };
        gauge.add(amount);
        let (this, gauge) = (self.clone(), gauge.clone());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(this.drain_time).await;
            drains.iter().for_each(|drain| drain.advance(Phase::Closing));
            for drain in &drains {
                Drain::idle(drain).await;
            }
            this.all.borrow_mut().draining.retain(|e| !Rc::ptr_eq(e, &old));
            gauge.sub(amount);
            drop((drains, old));
            this.gone.notify_one();
        });
    }

    fn give(&self, config: &Arc<ListenerConfig>, sockets: Vec<ListenSockets>) -> Vec<Answer> {
        let workers = self.workers.borrow();
        let order = |(worker, sockets): (&Handle, ListenSockets)| {
            let (done, answer) = oneshot::channel();
            worker.order(Order::Listen(config.clone(), sockets, done));
            answer
        };
        workers.iter().zip(sockets).map(order).collect()
    }

    async fn counted(&self, answers: Vec<Answer>) -> std::io::Result<()> {
        for answer in answers {
            let done = answer.await.unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into()));
            let counter = if done.is_ok() { &self.stats.create_success } else { &self.stats.create_failure };
            counter.inc();
            done?;
        }
        Ok(())
    }

    fn show(&self) {
        let all = self.all.borrow();
        self.stats.active.set(all.active.len() as u64);
        self.stats.warming.set(all.warming.len() as u64);
        self.moved.notify_one();
    }

    /// Returns when a listener that was to go is gone. For one caller at a time.
    pub async fn drained(&self) {
        self.gone.notified().await;
    }

    /// Returns when no listener waits for its routes or secrets. For one caller at a time.
    pub async fn warmed(&self) {
        while !self.all.borrow().warming.is_empty() {
            self.moved.notified().await;
        }
    }

    /// Asks the clients of the listeners that serve to go; they go on listening. Those that come later are not
    /// concerned, as in Envoy.
    pub fn leave(&self, inbound_only: bool) {
        for entry in self.active().iter().filter(|e| !inbound_only || e.is_inbound()) {
            entry.config.leaving(None).iter().for_each(|drain| drain.leave(self.ramp));
        }
    }

    /// Closes the listening sockets.
    pub fn stop(&self, inbound_only: bool) {
        let inbound = |e: &&Rc<Entry>| !inbound_only || e.is_inbound();
        let mut all = self.all.borrow_mut();
        let names: Vec<_> = all.active.iter().filter(inbound).map(|e| e.config.name.clone()).collect();
        let names: Vec<_> = names.into_iter().filter(|name| !all.stopped.contains(name)).collect();
        all.stopped.extend(names.iter().cloned());
        self.stats.stopped.add(names.len() as u64);
        for worker in self.workers.borrow().iter() {
            worker.order(Order::StopListening(names.clone()));
        }
    }

    /// What was refused of the last response.
    pub fn set_failures(&self, failures: Vec<Failure>) {
        self.all.borrow_mut().failures = failures;
    }

    /// What was refused of the last response.
    pub fn failures(&self) -> Vec<Failure> {
        self.all.borrow().failures.clone()
    }

    /// The listeners that serve.
    pub fn active(&self) -> Vec<Rc<Entry>> {
        self.all.borrow().active.clone()
    }

    /// Tells what listeners wait for.
    pub fn depend_on(&self, dependencies: Dependencies) {
        // There is one start.
        let _ = self.dependencies.set(dependencies);
    }

    /// `/init_dump`: what listeners wait for, in Envoy's words. Before the start is over it shows all of them, then
    /// those that warm. The number stands for the listener's message, as Envoy's own hash of it does there.
    pub fn unready(&self, started: bool) -> Vec<UnreadyTargetsDump> {
        let active = if started { Vec::new() } else { self.active() };
        let dump = |entry: Rc<Entry>| {
            let name = &entry.config.name;
            let bytes = entry.origin.as_ref().map_or(name.as_bytes(), |origin| &origin.bytes);
            let number = twox_hash::XxHash64::oneshot(0, bytes);
            UnreadyTargetsDump {
                name: format!("init manager Listener-local-init-manager {name} {number}"),
                target_names: self.dependencies.get().map_or_else(Vec::new, |d| d.unready(&entry.config)),
            }
        };
        active.into_iter().chain(self.warming()).map(dump).collect()
    }

    /// The listeners that wait for their routes.
    pub fn warming(&self) -> Vec<Rc<Entry>> {
        self.all.borrow().warming.clone()
    }

    /// The newest listener of a name, warming or active.
    pub fn newest(&self, name: &str) -> Option<Rc<Entry>> {
        let all = self.all.borrow();
        find(&all.warming, name).or_else(|| find(&all.active, name))
    }

    /// The listeners whose connections end, the last first.
    pub fn draining(&self) -> Vec<Rc<Entry>> {
        self.all.borrow().draining.iter().rev().cloned().collect()
    }
}

type Answer = oneshot::Receiver<std::io::Result<()>>;

fn address_of(message: &Message) -> String {
    let address = message.address.as_ref().and_then(|a| Address::from_proto(a).ok());
    address.map_or_else(|| message.name.clone(), |address| address.to_string())
}

/// Whether a message differs from what serves in its filter chains alone.
fn only_chains_differ(active: &Entry, message: &Message) -> bool {
    let bare = |mut message: Message| {
        message.filter_chains.clear();
        message.default_filter_chain = None;
        message.filter_chain_matcher = None;
        message
    };
    let old = active.origin.as_ref().and_then(|origin| Message::decode(&*origin.bytes).ok());
    old.is_some_and(|old| bare(old) == bare(message.clone()))
}
