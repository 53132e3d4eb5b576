//! The hosts of a dynamic_forward_proxy cluster that one worker has used, by name.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::{ClusterCore, WorkerHost};
use crate::dns_cache::{Entry, Load, Waiting};
use crate::host::Health;

/// A host, and where the cache keeps its name.
type Used = (Rc<WorkerHost>, Arc<Entry>);

#[derive(Default)]
pub(super) struct Names {
    hosts: RefCell<HashMap<Arc<str>, Used, RandomState>>,
    /// The removal that was last seen.
    removals: Cell<u64>,
}

/// What became of the search for a host.
pub enum Choice {
    /// It is found.
    Host(Rc<WorkerHost>),
    /// There is none; the details are the cluster's own, if it has something to say.
    None(Option<Arc<str>>),
    /// Its name is being resolved.
    Later(Resolving),
}

/// A name that is being resolved. It is, also where nobody waits for it any more.
pub struct Resolving {
    entry: Arc<Entry>,
    _waiting: Waiting,
}

impl Resolving {
    /// Returns when it was, well or not. Its key is to be looked for again then, its details say why it is not found.
    pub async fn done(self) -> Arc<Entry> {
        self.entry.resolved().await;
        self.entry
    }
}

impl Names {
    /// The host of a name, if it is known and well.
    pub(super) fn find(&self, core: &Rc<ClusterCore>, key: &str) -> Option<Rc<WorkerHost>> {
        let names = core.cluster.names()?;
        let removals = names.removals();
        if self.removals.replace(removals) != removals {
            self.forget_gone();
        }
        let mut hosts = self.hosts.borrow_mut();
        let (host, entry) = match hosts.get(key) {
            Some(here) => here,
            None => {
                let named = names.get(key)?;
                let host = WorkerHost::new(&named.host, core);
                hosts.entry(named.entry.key.clone()).or_insert((host, named.entry))
            }
        };
        if host.host.health() == Health::Unhealthy {
            return None;
        }
        entry.touch();
        Some(host.clone())
    }

    /// The host of a name, which may first have to be resolved.
    pub(super) fn choose(&self, core: &Rc<ClusterCore>, key: &str, port: u16) -> Choice {
        if let Some(host) = self.find(core, key) {
            return Choice::Host(host);
        }
        let Some(names) = core.cluster.names() else { return Choice::None(None) };
        let Some(waiting) = names.cache.wait() else {
            return Choice::None(Some("dns_cache_pending_requests_overflow".into()));
        };
        match names.cache.load_key(key.into(), port) {
            Load::Known(entry) => Choice::None(Some(entry.details())),
            Load::Wait(entry) => Choice::Later(Resolving { entry, _waiting: waiting }),
            Load::Overflow => Choice::None(Some("dns_cache_overflow".into())),
        }
    }

    #[cold]
    fn forget_gone(&self) {
        self.hosts.borrow_mut().retain(|_, (host, _)| {
            let gone = host.host.is_gone();
            if gone {
                host.drain();
            }
            !gone
        });
    }

    pub(super) fn drain(&self) {
        for (host, _) in self.hosts.borrow().values() {
            host.drain();
        }
    }
}
