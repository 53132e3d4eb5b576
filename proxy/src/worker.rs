//! A worker thread: one runtime, its listeners, its connections, its pools.

use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use sampan_core::drain::Signal;
use sampan_listener::{ListenSockets, ListenerConfig, Listeners, Server, Worker};
use sampan_upstream::{Clusters, WorkerClusters};
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};

/// What the control thread tells a worker.
pub enum Order {
    /// Serve this listener; answered once it accepts.
    Listen(Arc<ListenerConfig>, ListenSockets, oneshot::Sender<std::io::Result<()>>),
    /// Serve the sockets of the listener of that name with this from now on.
    Update(Arc<ListenerConfig>),
    /// Close the listening sockets of these listeners.
    StopListening(Vec<Arc<str>>),
    /// Close the idle connections of clusters that lost their slot.
    DropReplaced,
}

/// The control thread's end of a worker.
pub struct Handle {
    orders: mpsc::UnboundedSender<Order>,
    thread: thread::JoinHandle<()>,
}

impl Handle {
    /// Starts a worker.
    pub fn start(
        id: u32,
        server: Arc<Server>,
        clusters: Arc<Clusters>,
        drain: Signal,
    ) -> std::io::Result<Self> {
        let (orders, inbox) = mpsc::unbounded_channel();
        let thread =
            thread::Builder::new().name(format!("wrk:worker_{id}")).spawn(move || match runtime() {
                Ok(runtime) => runtime.block_on(work(id, server, clusters, drain, inbox)),
                Err(error) => crate::logging::critical(&error),
            })?;
        Ok(Self { orders, thread })
    }

    /// Gives an order. A worker that has ended needs none.
    pub fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// Ends the worker with what it still serves.
    pub fn end(self) {
        drop(self.orders);
        // A worker that panicked has said so on stderr.
        let _ = self.thread.join();
    }
}

/// A worker's deadlines are its own affair, see [`sampan_core::time`].
fn runtime() -> std::io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_io().build_local(LocalOptions::default())
}

async fn work(
    id: u32,
    server: Arc<Server>,
    clusters: Arc<Clusters>,
    drain: Signal,
    mut inbox: mpsc::UnboundedReceiver<Order>,
) {
    match sampan_core::time::install() {
        Ok(timers) => tokio::task::spawn_local(timers),
        Err(error) => return crate::logging::critical(&error),
    };
    let clusters = Rc::new(WorkerClusters::new(clusters));
    sampan_http::router::uplink::install(&clusters);
    let worker = Rc::new(Worker::new(id, server, clusters.clone(), drain));
    let listeners = Listeners::new(worker);
    while let Some(order) = inbox.recv().await {
        match order {
            Order::Listen(config, sockets, done) => {
                // A control thread that waits no more is on its way out.
                let _ = done.send(listeners.add(config, sockets));
            }
            Order::Update(config) => listeners.update(config),
            Order::StopListening(names) => names.iter().for_each(|name| listeners.remove(name)),
            Order::DropReplaced => {
                clusters.prune();
                sampan_http::router::drop_replaced();
            }
        }
    }
}
