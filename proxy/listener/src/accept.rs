//! Accepting on a worker: its listeners, their sockets, the limits.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use sampan_core::Address;
use sampan_core::overload::OverloadState;
use sampan_core::stream_info::{ConnectionInfo, Metadata};
use sampan_tls::Transport;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{JoinHandle, spawn_local};

use crate::balance::{Counted, Handed};
use crate::config::ListenerConfig;
use crate::connection;
use crate::context::Worker;
use crate::filters::Accepted;
use crate::socket::ListenSockets;
use crate::stats::WorkerCounters;

/// How long to wait when the process is out of file descriptors or memory.
const BACK_OFF: Duration = Duration::from_millis(50);
const GLOBAL_LIMIT: &str = "overload.global_downstream_max_connections";

/// All listeners of one worker. Lives on the worker's thread, inside its runtime.
pub struct Listeners {
    worker: Rc<Worker>,
    by_name: RefCell<HashMap<Arc<str>, Active>>,
    /// For `use_original_dst`.
    pub(crate) by_address: RefCell<HashMap<Address, Rc<WorkerListener>>>,
    /// What listener filters peek into; nobody keeps it over an await.
    pub(crate) scratch: RefCell<Vec<u8>>,
}

struct Active {
    slot: Rc<Slot>,
    accepting: Vec<JoinHandle<()>>,
}

/// What the sockets of a listener are served with; exchanged when the listener changes and its sockets stay.
struct Slot(RefCell<Rc<WorkerListener>>);

impl Slot {
    fn listener(&self) -> Rc<WorkerListener> {
        self.0.borrow().clone()
    }
}

/// A listener on this worker.
pub(crate) struct WorkerListener {
    pub(crate) config: Arc<ListenerConfig>,
    pub(crate) counters: WorkerCounters,
    pub(crate) worker: Rc<Worker>,
    pub(crate) all: Rc<Listeners>,
    /// Its connections, where workers take as many as others.
    open: Option<Arc<AtomicU64>>,
}

impl WorkerListener {
    /// Takes no more connections from other workers.
    fn leave(&self) {
        if let Some(balance) = &self.config.balance {
            balance.leave(self.worker.id);
        }
    }
}

/// Counts an accepted socket until it is closed.
pub(crate) struct Open(
    pub(crate) Rc<WorkerListener>,
    Admitted,
    #[expect(dead_code, reason = "its drop counts")] Option<Counted>,
);

/// What an accepted socket holds of the overload manager's connection limit.
#[derive(Default)]
struct Admitted(Option<Arc<OverloadState>>);

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(state) = &self.0 {
            state.release_connection();
        }
    }
}

impl Open {
    /// A connection that another listener hands on takes what it was admitted with along.
    pub(crate) fn handed_to(mut self, listener: &Rc<WorkerListener>) -> Self {
        Self::new(listener, std::mem::take(&mut self.1))
    }

    fn new(listener: &Rc<WorkerListener>, admitted: Admitted) -> Self {
        listener.config.open.fetch_add(1, Ordering::Relaxed);
        listener.worker.server.open_connections.fetch_add(1, Ordering::Relaxed);
        Self(listener.clone(), admitted, listener.open.as_ref().map(Counted::new))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.config.open.fetch_sub(1, Ordering::Relaxed);
        self.0.worker.server.open_connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Listeners {
    /// A worker without listeners.
    pub fn new(worker: Rc<Worker>) -> Rc<Self> {
        Rc::new(Self {
            worker,
            by_name: RefCell::default(),
            by_address: RefCell::default(),
            scratch: RefCell::default(),
        })
    }

    /// Serves a listener. A listener of the same name stops accepting; its connections live on.
    pub fn add(self: &Rc<Self>, config: Arc<ListenerConfig>, sockets: ListenSockets) -> io::Result<()> {
        let listener = self.listener(config);
        let slot = Rc::new(Slot(RefCell::new(listener.clone())));
        self.remove(&listener.config.name);
        let mut accepting = Vec::new();
        for (address, socket) in sockets.sockets {
            socket.set_nonblocking(true)?;
            accepting.push(match &address {
                Address::Pipe(_) => {
                    let socket = UnixListener::from_std(socket.into())?;
                    spawn_local(accept_unix(slot.clone(), socket, address.clone()))
                }
                _ => {
                    let socket = TcpListener::from_std(socket.into())?;
                    spawn_local(accept_tcp(slot.clone(), socket, address.clone()))
                }
            });
        }
        self.note_addresses(&listener);
        self.by_name.borrow_mut().insert(listener.config.name.clone(), Active { slot, accepting });
        Ok(())
    }

    fn listener(self: &Rc<Self>, config: Arc<ListenerConfig>) -> Rc<WorkerListener> {
        let scope = config.scope.scope(&self.worker.name());
        let (inbox, open) = config.balance.as_ref().map(|balance| balance.join(self.worker.id)).unzip();
        let listener = Rc::new(WorkerListener {
            counters: WorkerCounters::new(&scope),
            worker: self.worker.clone(),
            all: self.clone(),
            open,
            config,
        });
        if let Some(inbox) = inbox {
            spawn_local(take_in(listener.clone(), inbox));
        }
        listener
    }

    fn note_addresses(&self, listener: &Rc<WorkerListener>) {
        let mut by_address = self.by_address.borrow_mut();
        for address in &listener.config.addresses {
            by_address.insert(address.address.clone(), listener.clone());
        }
    }

    /// Serves the sockets of the listener of that name with another configuration from now on.
    pub fn update(self: &Rc<Self>, config: Arc<ListenerConfig>) {
        let by_name = self.by_name.borrow();
        // A listener that a drain has stopped stays stopped.
        let Some(active) = by_name.get(&config.name) else { return };
        let listener = self.listener(config);
        let old = active.slot.0.replace(listener.clone());
        old.leave();
        self.by_address.borrow_mut().retain(|_, l| !Rc::ptr_eq(l, &old));
        self.note_addresses(&listener);
    }

    /// Closes a listener's sockets; its connections live on.
    pub fn remove(&self, name: &str) {
        let Some(active) = self.by_name.borrow_mut().remove(name) else { return };
        active.accepting.iter().for_each(JoinHandle::abort);
        let listener = active.slot.listener();
        listener.leave();
        self.by_address.borrow_mut().retain(|_, l| !Rc::ptr_eq(l, &listener));
    }

    /// Closes the listening sockets of all listeners (drain).
    pub fn stop(&self) {
        let names: Vec<_> = self.by_name.borrow().keys().cloned().collect();
        names.iter().for_each(|name| self.remove(name));
    }

    /// The listener of an address, or of its port on any address.
    pub(crate) fn by_address(&self, address: &Address) -> Option<Rc<WorkerListener>> {
        let all = self.by_address.borrow();
        let any =
            |ip: IpAddr| address.port().and_then(|port| all.get(&Address::Ip(SocketAddr::new(ip, port))));
        let wildcard = || match address.ip()? {
            IpAddr::V4(_) => any(Ipv4Addr::UNSPECIFIED.into()).or_else(|| any(Ipv6Addr::UNSPECIFIED.into())),
            IpAddr::V6(_) => any(Ipv6Addr::UNSPECIFIED.into()),
        };
        all.get(address).or_else(wildcard).cloned()
    }
}

async fn accept_tcp(slot: Rc<Slot>, socket: TcpListener, address: Address) {
    // On a fixed address every connection's local address is known without asking the kernel.
    let fixed = address.ip().filter(|ip| !ip.is_unspecified()).map(|_| address.clone());
    let accept = |cx: &mut std::task::Context<'_>| socket.poll_accept(cx);
    run(&slot, accept, |(stream, peer)| {
        let local = match &fixed {
            Some(address) => address.clone(),
            None => stream.local_addr()?.into(),
        };
        let listener = slot.listener();
        let picked = listener.config.balance.as_ref().and_then(|balance| balance.pick(listener.worker.id));
        match picked {
            None | Some((None, _)) => on_accept(&listener, Transport::Tcp(stream), local, peer.into()),
            Some((Some(worker), counted)) => {
                let stream = stream.into_std()?;
                // A worker that has just left closes it.
                let _ = worker.send(Handed { stream, local, peer: peer.into(), counted });
            }
        }
        Ok(())
    })
    .await;
}

async fn accept_unix(slot: Rc<Slot>, socket: UnixListener, address: Address) {
    let accept = |cx: &mut std::task::Context<'_>| socket.poll_accept(cx);
    run(&slot, accept, |(stream, _peer)| {
        // A client of a unix socket has no name as a rule; Envoy gives it the listener's.
        on_accept(&slot.listener(), Transport::Unix(stream), address.clone(), address.clone());
        Ok(())
    })
    .await;
}

/// Serves what other workers have accepted for this one.
async fn take_in(listener: Rc<WorkerListener>, mut inbox: UnboundedReceiver<Handed>) {
    while let Some(Handed { stream, local, peer, counted }) = inbox.recv().await {
        if let Ok(stream) = TcpStream::from_std(stream) {
            on_accept(&listener, Transport::Tcp(stream), local, peer);
        }
        // By now it counts as an open one.
        drop(counted);
    }
}

/// Accepts in bursts of at most `max_connections_to_accept_per_socket_event`.
async fn run<T>(
    slot: &Slot,
    mut accept: impl FnMut(&mut std::task::Context<'_>) -> Poll<io::Result<T>>,
    mut handle: impl FnMut(T) -> io::Result<()>,
) {
    let mut stopped =
        slot.listener().config.overload.as_ref().map(|state| state.stop_accepting_connections());
    loop {
        let mut burst: u32 = 0;
        let mut next = Some(match &mut stopped {
            None => poll_fn(&mut accept).await,
            Some(stopped) => {
                // Clients wait in the kernel's queue meanwhile. The sender lives as long as the configuration.
                let _ = stopped.wait_for(|stopped| !*stopped).await;
                tokio::select! {
                    biased;
                    Ok(()) = stopped.changed() => continue,
                    accepted = poll_fn(&mut accept) => accepted,
                }
            }
        });
        while let Some(accepted) = next {
            match accepted.and_then(&mut handle) {
                Ok(()) => burst += 1,
                Err(e) if is_of_the_peer(&e) => {}
                Err(_) => sampan_core::time::sleep(BACK_OFF).await,
            }
            if burst >= slot.0.borrow().config.max_accepts_per_event {
                break;
            }
            next = poll_fn(|cx| match accept(cx) {
                Poll::Ready(accepted) => Poll::Ready(Some(accepted)),
                Poll::Pending => Poll::Ready(None),
            })
            .await;
        }
        slot.0.borrow().config.stats.accepted_per_event.record(burst.into());
        tokio::task::yield_now().await;
    }
}

/// The connection died between its arrival and accept; anything else is our own shortage.
fn is_of_the_peer(e: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(e.kind(), K::ConnectionAborted | K::ConnectionReset | K::NotConnected | K::Interrupted)
}

/// Asks the limit of connections of all listeners: the overload manager's, else the runtime key's. None: no more.
fn admitted(listener: &WorkerListener) -> Option<Admitted> {
    let config = &listener.config;
    if config.ignore_global_limit {
        return Some(Admitted::default());
    }
    match config.overload.as_ref().filter(|state| state.limits_connections()) {
        Some(state) => state.admit_connection().then(|| Admitted(Some(state.clone()))),
        None => {
            let open = listener.worker.server.open_connections.load(Ordering::Relaxed);
            (open < listener.worker.runtime.integer(GLOBAL_LIMIT, u64::MAX)).then(Admitted::default)
        }
    }
}

/// Checks the limits and hands the socket on; a socket over a limit is closed at once.
fn on_accept(listener: &Rc<WorkerListener>, transport: Transport, local: Address, peer: Address) {
    let (config, worker) = (&listener.config, &listener.worker);
    let server = &worker.server;
    let limit = |key| worker.runtime.integer(key, u64::MAX);
    let Some(admitted) = admitted(listener) else {
        config.stats.counters.downstream_global_cx_overflow.inc();
        return;
    };
    if config.overload.as_ref().is_some_and(|o| o.reject_incoming_connections.hits(|| worker.random())) {
        config.stats.counters.downstream_cx_overload_reject.inc();
        return;
    }
    if config.open.load(Ordering::Relaxed) >= limit(&config.limit_key) {
        config.stats.counters.downstream_cx_overflow.inc();
        return;
    }
    let info = ConnectionInfo::accepted(server.connection_id(), config.name.clone(), local, peer);
    let accepted = Accepted { info, metadata: Metadata::new() };
    connection::start(Open::new(listener, admitted), transport, accepted);
}
