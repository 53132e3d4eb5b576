//! One stream to a control plane, kept up for as long as the client lives, and all that is subscribed on it.
//!
//! ```text
//!   Client::watch ──> types ──> what is asked for, as a state machine each (crate::state)
//!                       ^             |
//!   stream (a task)     | responses   | requests
//!     open, send, read ─┘<────────────┘
//! ```
//!
//! All of it lives on one thread ([`tokio::task::spawn_local`]): watchers are called from the stream's task, one
//! response at a time, and may watch, let go and pause from within. A response is read only when the one before was
//! handed out and its answer is on the way, so that a fast server fills the connection's window and no queue here.
//!
//! As in Envoy: the types are asked for in the order in which they were first watched; what a response makes a watcher
//! ask for goes out before that response's answer; the back-off starts anew with the first response of a stream.

mod stream;
#[cfg(test)]
mod tests;
mod watches;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::AbortHandle;

use crate::handler::{Failure, Watcher};
use crate::state::{NodePolicy, delta, sotw};
use crate::transport::{End, Transport};
use watches::{Entry, Watches};

/// The protocol's two variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Requests name all that is wanted, responses have all that is.
    StateOfTheWorld,
    /// Requests and responses carry changes.
    Delta,
}

/// What a client is told once.
#[derive(Clone, Debug)]
pub struct Config {
    /// The gRPC call: [`crate::types::aggregated`] or [`crate::types::alone`].
    pub path: String,
    /// Which variant that call speaks.
    pub variant: Variant,
    /// The encoded `envoy.config.core.v3.Node`.
    pub node: Bytes,
    /// `set_node_on_first_message_only`
    pub node_on_first_message_only: bool,
    /// The first and the greatest bound of the wait before the next stream.
    pub backoff: (Duration, Duration),
    /// The greatest message that is taken (`max_receive_message_length`); 0: no limit.
    pub max_message: usize,
    /// `rate_limit_settings`: none, no limit.
    pub rate_limit: Option<RateLimit>,
}

/// How many requests go out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateLimit {
    /// At once.
    pub max_tokens: u32,
    /// In a second.
    pub fill_rate: f64,
}

/// What the world may want to know of the stream.
pub trait Observer {
    /// A stream was opened, or the last one is gone.
    fn connected(&self, _connected: bool) {}
    /// Why the last one is gone.
    fn closed(&self, _end: &End) {}
    /// A message came.
    fn received(&self) {}
    /// What the control plane calls itself.
    fn identifier(&self, _identifier: &str) {}
    /// How many types have a request that the rate limit holds back.
    fn held_back(&self, _types: usize) {}
    /// The rate limit held a request back.
    fn rate_limited(&self) {}
    /// A response of a type that was never asked for; it is not answered.
    fn unwanted(&self, _type_url: &str, _version: &str) {}
    /// A response was refused; the watchers hear of it next.
    fn refused(&self, _type_url: &str, _reason: &str) {}
}

/// A client. Clones share; the stream ends with the last of them and of their watches.
#[derive(Clone)]
pub struct Client(Rc<Owner>);

/// What ends the stream when it is dropped; the stream's task holds the rest.
struct Owner {
    inner: Rc<Inner>,
    task: RefCell<Option<AbortHandle>>,
}

struct Inner {
    config: Config,
    transport: Rc<dyn Transport>,
    observer: Rc<dyn Observer>,
    types: RefCell<Vec<Rc<Type>>>,
    /// The type whose response was read last: its requests go last.
    last: RefCell<Option<Rc<Type>>>,
    node: RefCell<NodePolicy>,
    /// The stream's task, when it sleeps.
    waker: RefCell<Option<Waker>>,
    next_id: Cell<u64>,
    /// A stream is there.
    open: Cell<bool>,
}

/// One type on the stream.
struct Type {
    url: Box<str>,
    machine: RefCell<Machine>,
    watches: RefCell<Watches>,
    /// It was watched once, and not only paused.
    watched: Cell<bool>,
}

enum Machine {
    World(sotw::Subscription),
    Delta(delta::Subscription),
}

/// Calls the same method of both variants.
macro_rules! machine {
    ($of:expr, $machine:ident => $call:expr) => {
        match &mut *$of.machine.borrow_mut() {
            Machine::World($machine) => $call,
            Machine::Delta($machine) => $call,
        }
    };
}
use machine;

/// An interest in resources; it ends when this is dropped.
pub struct Watch {
    client: Client,
    of: Rc<Type>,
    entry: Rc<Entry>,
}

/// Holds requests of some types back until it is dropped.
#[must_use]
pub struct Pause {
    client: Client,
    types: Vec<Rc<Type>>,
}

impl Client {
    /// A client that is not connected yet.
    pub fn new(config: Config, transport: Rc<dyn Transport>, observer: Rc<dyn Observer>) -> Self {
        let node = NodePolicy::new(config.node.clone(), config.node_on_first_message_only);
        let inner = Rc::new(Inner {
            config,
            transport,
            observer,
            types: RefCell::default(),
            last: RefCell::default(),
            node: RefCell::new(node),
            waker: RefCell::default(),
            next_id: Cell::default(),
            open: Cell::default(),
        });
        Self(Rc::new(Owner { inner, task: RefCell::default() }))
    }

    /// Connects, now and whenever the stream ended. Calls after the first do nothing.
    pub fn start(&self) {
        let mut task = self.0.task.borrow_mut();
        if task.is_none() {
            let stream = stream::keep_up(self.0.inner.clone());
            *task = Some(tokio::task::spawn_local(stream).abort_handle());
        }
    }

    /// Asks for resources of a type; no name asks for all. `initial_fetch_timeout`: after that time without an answer
    /// the watcher is told so, once.
    pub fn watch(
        &self,
        type_url: &str,
        names: &[&str],
        watcher: Rc<dyn Watcher>,
        initial_fetch_timeout: Option<Duration>,
    ) -> Watch {
        self.begin(type_url, None, names, watcher, initial_fetch_timeout)
    }

    /// Takes whatever is called `NAMESPACE/…`, and asks for some of it by [`Watch::ask`]. As in Envoy the type's first
    /// request asks for everything, which is not taken back.
    pub fn watch_namespace(
        &self,
        type_url: &str,
        namespace: &str,
        watcher: Rc<dyn Watcher>,
        initial_fetch_timeout: Option<Duration>,
    ) -> Watch {
        self.begin(type_url, Some(namespace), &[], watcher, initial_fetch_timeout)
    }

    /// Which variant it speaks.
    pub fn variant(&self) -> Variant {
        self.0.inner.config.variant
    }

    fn begin(
        &self,
        type_url: &str,
        namespace: Option<&str>,
        names: &[&str],
        watcher: Rc<dyn Watcher>,
        initial_fetch_timeout: Option<Duration>,
    ) -> Watch {
        let of = self.of_type(type_url);
        of.watched.set(true);
        let id = self.0.inner.next_id.replace(self.0.inner.next_id.get() + 1);
        let entry = Rc::new(Entry::new(id, namespace, watcher));
        let new = of.watches.borrow_mut().add(&entry, names);
        machine!(of, machine => new.iter().for_each(|name| machine.add(name)));
        of.touch();
        if let Some(after) = initial_fetch_timeout {
            let waiting = Rc::downgrade(&entry);
            let task = tokio::task::spawn_local(async move {
                tokio::time::sleep(after).await;
                if let Some(entry) = waiting.upgrade() {
                    entry.answered.set(true);
                    entry.watcher.failed(Failure::Timeout);
                }
            });
            entry.timeout.replace(Some(task.abort_handle()));
        }
        self.wake();
        Watch { client: self.clone(), of, entry }
    }

    /// Holds requests of these types back.
    pub fn pause(&self, type_urls: &[&str]) -> Pause {
        let types: Vec<_> = type_urls.iter().map(|url| self.of_type(url)).collect();
        types.iter().for_each(|of| machine!(of, machine => machine.pause()));
        Pause { client: self.clone(), types }
    }

    /// The type's place, at the end where it has none yet.
    fn of_type(&self, url: &str) -> Rc<Type> {
        let mut types = self.0.inner.types.borrow_mut();
        if let Some(of) = types.iter().find(|of| &*of.url == url) {
            return of.clone();
        }
        let machine = match self.0.inner.config.variant {
            Variant::StateOfTheWorld => Machine::World(sotw::Subscription::new(url)),
            Variant::Delta => Machine::Delta(delta::Subscription::new(url)),
        };
        let (machine, watches) = (machine.into(), RefCell::default());
        let of = Rc::new(Type { url: url.into(), machine, watches, watched: Cell::default() });
        if self.0.inner.open.get() {
            machine!(of, machine => machine.stream_opened());
        }
        types.push(of.clone());
        of
    }

    fn wake(&self) {
        if let Some(waker) = &*self.0.inner.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

impl Watch {
    /// Exchanges what is asked for.
    pub fn update(&self, names: &[&str]) {
        let (new, gone) = self.of.watches.borrow_mut().exchange(&self.entry, names);
        machine!(self.of, machine => {
            new.iter().for_each(|name| machine.add(name));
            gone.iter().for_each(|name| machine.remove(name));
        });
        self.of.touch();
        self.client.wake();
    }

    /// Asks for one more.
    pub fn ask(&self, name: &str) {
        if let Some(name) = self.of.watches.borrow_mut().ask(&self.entry, name) {
            machine!(self.of, machine => machine.add(&name));
        }
        self.of.touch();
        self.client.wake();
    }

    /// Asks for a name no longer that came by [`Watch::ask`].
    pub fn forget(&self, name: &str) {
        if self.of.watches.borrow_mut().forget(&self.entry, name) {
            machine!(self.of, machine => machine.remove(name));
        }
        self.of.touch();
        self.client.wake();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let gone = self.of.watches.borrow_mut().remove(&self.entry);
        machine!(self.of, machine => gone.iter().for_each(|name| machine.remove(name)));
        self.of.touch();
        self.entry.end();
        self.client.wake();
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.types.iter().for_each(|of| machine!(of, machine => machine.resume()));
        self.client.wake();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Type {
    /// Tells every watcher. Who lets go while this goes on is told nothing more.
    fn failed(&self, why: Failure<'_>) {
        let all = self.watches.borrow().all();
        for entry in all.iter().filter(|entry| entry.is_alive()) {
            if why != Failure::Connection {
                entry.settle();
            }
            entry.watcher.failed(why);
        }
    }

    fn touch(&self) {
        if let Machine::World(machine) = &mut *self.machine.borrow_mut() {
            machine.touch();
        }
    }

    fn next_expiry(&self) -> Option<Instant> {
        machine!(self, machine => machine.next_expiry())
    }
}
