//! Who wants what of a type, and what a response means for each.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use foldhash::fast::RandomState;
use tokio::task::AbortHandle;

use crate::handler::{Decoded, Update, Watcher};
use crate::state::{Name, WILDCARD};

/// One watcher.
pub(super) struct Entry {
    id: u64,
    /// Sorted.
    names: RefCell<Vec<Name>>,
    /// It wants what stands below this name, too: `NAME/…`.
    namespace: Option<Box<str>>,
    pub(super) watcher: Rc<dyn Watcher>,
    alive: Cell<bool>,
    pub(super) answered: Cell<bool>,
    /// The task that waits for `initial_fetch_timeout`.
    pub(super) timeout: RefCell<Option<AbortHandle>>,
}

/// The watchers of a type. Later ones have greater ids.
#[derive(Default)]
pub(super) struct Watches {
    all: BTreeMap<u64, Rc<Entry>>,
    by_name: HashMap<Name, Vec<Rc<Entry>>, RandomState>,
    by_namespace: HashMap<Box<str>, Vec<Rc<Entry>>, RandomState>,
}

/// What one watcher gets of a response.
#[derive(Default)]
struct Share {
    resources: Vec<Rc<Decoded>>,
    removed: Vec<String>,
}

impl Entry {
    pub(super) fn new(id: u64, namespace: Option<&str>, watcher: Rc<dyn Watcher>) -> Self {
        Self {
            id,
            names: RefCell::default(),
            namespace: namespace.map(Into::into),
            watcher,
            alive: Cell::new(true),
            answered: Cell::default(),
            timeout: RefCell::default(),
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.get()
    }

    fn wants_all(&self) -> bool {
        self.names.borrow().iter().any(|name| **name == *WILDCARD)
    }

    /// An answer came: nothing is waited for.
    pub(super) fn settle(&self) {
        if !self.answered.replace(true)
            && let Some(task) = self.timeout.take()
        {
            task.abort();
        }
    }

    pub(super) fn end(&self) {
        self.alive.set(false);
        self.settle();
    }
}

/// The names as they are asked for: none stands for everything.
fn wanted<'a>(names: &'a [&'a str]) -> &'a [&'a str] {
    if names.is_empty() { &[WILDCARD] } else { names }
}

impl Watches {
    /// Returns the names that nobody wanted before.
    pub(super) fn add(&mut self, entry: &Rc<Entry>, names: &[&str]) -> Vec<Name> {
        self.all.insert(entry.id, entry.clone());
        if let Some(namespace) = &entry.namespace {
            self.by_namespace.entry(namespace.clone()).or_default().push(entry.clone());
            return vec![WILDCARD.into()];
        }
        self.exchange(entry, names).0
    }

    /// Returns the name if nobody wanted it before.
    pub(super) fn ask(&mut self, entry: &Rc<Entry>, name: &str) -> Option<Name> {
        let mut names = entry.names.borrow_mut();
        let place = names.binary_search_by(|have| (**have).cmp(name)).err()?;
        let (name, first) = self.put(entry, name);
        if names.is_empty() {
            // A vector that grew by itself would have room for four; nearly all want one.
            names.reserve_exact(1);
        }
        names.insert(place, name.clone());
        first.then_some(name)
    }

    /// The one copy of a name, and whether nobody wanted it before.
    fn put(&mut self, entry: &Rc<Entry>, name: &str) -> (Name, bool) {
        if let Some((name, _)) = self.by_name.get_key_value(name) {
            let name = name.clone();
            self.by_name.entry(name.clone()).or_default().push(entry.clone());
            return (name, false);
        }
        let name = Name::from(name);
        self.by_name.insert(name.clone(), vec![entry.clone()]);
        (name, true)
    }

    /// Returns the names that nobody wanted before, and those that nobody wants any more.
    pub(super) fn exchange(&mut self, entry: &Rc<Entry>, names: &[&str]) -> (Vec<Name>, Vec<Name>) {
        let new = wanted(names).iter().filter_map(|name| self.ask(entry, name)).collect();
        let mut now = wanted(names).to_vec();
        now.sort_unstable();
        let old = |name: &mut Name| now.binary_search(&&**name).is_err();
        let gone: Vec<Name> = entry.names.borrow_mut().extract_if(.., old).collect();
        (new, gone.into_iter().filter(|name| self.leave(entry, name)).collect())
    }

    /// Returns the names that nobody wants any more.
    pub(super) fn remove(&mut self, entry: &Rc<Entry>) -> Vec<Name> {
        self.all.remove(&entry.id);
        if let Some(namespace) = &entry.namespace
            && let Some(users) = self.by_namespace.get_mut(namespace)
        {
            users.retain(|user| user.id != entry.id);
        }
        let names = entry.names.take();
        names.into_iter().filter(|name| self.leave(entry, name)).collect()
    }

    /// Whether nobody wants this name any more.
    pub(super) fn forget(&mut self, entry: &Rc<Entry>, name: &str) -> bool {
        let mut names = entry.names.borrow_mut();
        let Ok(place) = names.binary_search_by(|have| (**have).cmp(name)) else { return false };
        names.remove(place);
        self.leave(entry, name)
    }

    /// Whether this was the name's last user.
    fn leave(&mut self, entry: &Rc<Entry>, name: &str) -> bool {
        let Some(users) = self.by_name.get_mut(name) else { return false };
        users.retain(|user| user.id != entry.id);
        if users.is_empty() {
            self.by_name.remove(name);
            return true;
        }
        false
    }

    /// All of them, the newest first: that is the order in which Envoy tells them.
    pub(super) fn all(&self) -> Vec<Rc<Entry>> {
        self.all.values().rev().cloned().collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The one that decodes for all.
    pub(super) fn first(&self) -> Option<Rc<Entry>> {
        self.all.values().next().cloned()
    }

    /// Whether anybody has to do with a resource of these names.
    pub(super) fn is_wanted(&self, name: &str, aliases: &[String]) -> bool {
        let mut names = std::iter::once(name).chain(aliases.iter().map(String::as_str));
        names.any(|name| self.interested(name).next().is_some())
    }

    fn interested(&self, name: &str) -> impl Iterator<Item = &Rc<Entry>> {
        let named = self.by_name.get(name).into_iter().flatten();
        let above = name.rsplit_once('/').and_then(|(namespace, _)| self.by_namespace.get(namespace));
        named.chain(above.into_iter().flatten()).chain(self.by_name.get(WILDCARD).into_iter().flatten())
    }

    /// What each has to do with a response, the newest first. Cost is that of the response, however many there are. Of
    /// resources with the same name who asked for it by that gets the first, as in Envoy; who wants everything gets all.
    fn shares(&self, resources: &[Rc<Decoded>], removed: &[String], whole: bool) -> Vec<(Rc<Entry>, Share)> {
        let mut shares: BTreeMap<u64, (Rc<Entry>, Share)> = BTreeMap::new();
        let fresh = |entry: &Rc<Entry>| (entry.clone(), Share::default());
        let mut seen = HashSet::with_capacity(resources.len());
        for resource in resources {
            let again = !seen.insert(resource.name.as_str());
            let aliases = resource.aliases.iter().filter(|alias| **alias != resource.name);
            for name in std::iter::once(&resource.name).chain(aliases) {
                for entry in self.interested(name) {
                    if again && !entry.wants_all() {
                        continue;
                    }
                    let share = &mut shares.entry(entry.id).or_insert_with(|| fresh(entry)).1;
                    if !share.resources.last().is_some_and(|last| Rc::ptr_eq(last, resource)) {
                        share.resources.push(resource.clone());
                    }
                }
            }
        }
        for name in removed {
            for entry in self.interested(name) {
                let share = &mut shares.entry(entry.id).or_insert_with(|| fresh(entry)).1;
                if share.removed.last() != Some(name) {
                    share.removed.push(name.clone());
                }
            }
        }
        if whole {
            // Who wants everything is told also that there is nothing.
            for entry in self.by_name.get(WILDCARD).into_iter().flatten() {
                shares.entry(entry.id).or_insert_with(|| fresh(entry));
            }
        }
        shares.into_values().rev().collect()
    }
}

/// Gives a response to those who have to do with it. As in Envoy the first refusal ends it: who comes later keeps what
/// it has. `whole`: who wants everything is told whatever is in it.
pub(super) fn give(
    watches: &RefCell<Watches>,
    version: &str,
    resources: &[Rc<Decoded>],
    removed: &[String],
    (delta, whole): (bool, bool),
) -> Result<(), String> {
    let shares = watches.borrow().shares(resources, removed, whole);
    for (entry, share) in shares.iter().filter(|(entry, _)| entry.is_alive()) {
        if !entry.is_alive() {
            continue;
        }
        entry.settle();
        let Share { resources, removed } = share;
        entry.watcher.update(&Update { version, resources, removed, delta })?;
    }
    Ok(())
}
