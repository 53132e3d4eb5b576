//! The hosts of an ORIGINAL_DST cluster that one worker has used, by address.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;

use foldhash::fast::RandomState;

use super::{ClusterCore, WorkerHost};

#[derive(Default)]
pub(super) struct Destinations {
    hosts: RefCell<HashMap<SocketAddr, Rc<WorkerHost>, RandomState>>,
    /// The clean-up that was last seen.
    cleanups: Cell<u64>,
}

impl Destinations {
    pub(super) fn pick(&self, core: &Rc<ClusterCore>, address: SocketAddr) -> Rc<WorkerHost> {
        let cleanups = core.cluster.destinations().cleanups();
        if self.cleanups.replace(cleanups) != cleanups {
            self.forget_gone();
        }
        let mut hosts = self.hosts.borrow_mut();
        let host = hosts
            .entry(address)
            .or_insert_with(|| WorkerHost::new(&core.cluster.destination(address), core))
            .clone();
        host.host.picked();
        host
    }

    #[cold]
    fn forget_gone(&self) {
        self.hosts.borrow_mut().retain(|_, host| {
            let gone = host.host.is_gone();
            if gone {
                host.drain();
            }
            !gone
        });
    }

    pub(super) fn drain(&self) {
        for host in self.hosts.borrow().values() {
            host.drain();
        }
    }
}
