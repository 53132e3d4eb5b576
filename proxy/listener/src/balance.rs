//! `exact_balance`: a connection goes to the worker that serves the fewest of its listener's.
//!
//! Every worker takes part with its count and a way to hand it sockets. Who accepts one picks the worker under a lock
//! and counts the connection there at once, so that two who accept at the same time do not pick the same. Listeners
//! without it have none of this: the kernel spreads connections over the workers' sockets.

use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sampan_core::Address;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The workers of one listener.
#[derive(Default)]
pub(crate) struct Balance(Mutex<Vec<Member>>);

struct Member {
    worker: u32,
    open: Arc<AtomicU64>,
    sockets: UnboundedSender<Handed>,
}

/// A socket for another worker.
pub(crate) struct Handed {
    pub(crate) stream: TcpStream,
    pub(crate) local: Address,
    pub(crate) peer: Address,
    pub(crate) counted: Counted,
}

/// One connection in a worker's count.
pub(crate) struct Counted(Arc<AtomicU64>);

impl Counted {
    pub(crate) fn new(open: &Arc<AtomicU64>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Balance {
    /// Takes a worker in; what comes for it, and its count.
    pub(crate) fn join(&self, worker: u32) -> (UnboundedReceiver<Handed>, Arc<AtomicU64>) {
        let (sockets, inbox) = unbounded_channel();
        let open = Arc::new(AtomicU64::new(0));
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        members.push(Member { worker, open: open.clone(), sockets });
        (inbox, open)
    }

    /// A worker takes no more; what is on its way to it still comes.
    pub(crate) fn leave(&self, worker: u32) {
        let mut members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|member| member.worker != worker);
    }

    /// The worker for a connection that `here` has accepted (none: that one), where the connection counts from now on.
    pub(crate) fn pick(&self, here: u32) -> Option<(Option<UnboundedSender<Handed>>, Counted)> {
        let members = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let least = members.iter().min_by_key(|member| member.open.load(Ordering::Relaxed))?;
        let other = (least.worker != here).then(|| least.sockets.clone());
        Some((other, Counted::new(&least.open)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_take_the_next() {
        let balance = Balance::default();
        let (_inbox, a) = balance.join(0);
        let (_inbox, b) = balance.join(1);
        let at =
            |here| balance.pick(here).and_then(|(other, counted)| other.map(|_| Arc::ptr_eq(&counted.0, &b)));
        assert_eq!(at(0), None);
        let first = Counted::new(&a);
        assert_eq!(at(0), Some(true));
        let second = Counted::new(&b);
        assert_eq!(at(1), Some(false));
        drop(second);
        assert_eq!(at(1), None);
        drop(first);
        balance.leave(0);
        assert_eq!(at(0), Some(true));
    }
}
