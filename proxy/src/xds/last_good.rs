//! The last good configuration (`--last-good-config-path`): what control planes gave is kept in a file, and serves after
//! a start without them until they are there.
//!
//! # What is kept
//!
//! What is in force of every subscription that a control plane serves, asked of the subscribers when the file is
//! written: no second copy is held in memory. Private keys, session ticket keys and generic secrets that SDS brought are
//! left out ([`Subscriber::in_force`] of `secrets`): a disk is no place for what a control plane hands out in memory on
//! purpose, and a secret that is missing is never plain text. A key that stands inside of a listener or cluster is part
//! of it and is kept, which is why the file is its owner's alone. Times to live are not kept: what had one lives until
//! the control plane answers.
//!
//! # When it is written
//!
//! A second after the first change since it was last written, aside and then moved to its place; then not for ten times
//! as long as that took. First when the start is over, so that a start that goes wrong leaves the file as it was.
//! What is not subscribed to any more goes then. Once more at the end of the process.
//!
//! # When it serves
//!
//! Where a subscription has had no answer yet and its stream fails, its poll fails, or nothing came for
//! `initial_fetch_timeout` or [`GRACE`]. What is stored takes the way of an answer ([`Subscriber::update`]) and counts as
//! one. The control plane is told nothing of it: it is asked as by a new process. Its first answer to a subscription to
//! everything, delta too, is all that there is, and what is not in it goes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::core::v3::Node;
use prost::bytes::Bytes;
use sampan_config::last_good::{LIMIT, LastGood as Form, LastGoodError, Subscription};
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Scope};
use tokio::sync::Notify;

use super::source::{Subscriber, SubscriptionStats, take, warn};

/// How long a control plane that says nothing has.
const GRACE: Duration = Duration::from_secs(5);
/// How long changes are gathered.
const GATHER: Duration = Duration::from_secs(1);

/// The file, and what it is about.
pub struct LastGood {
    path: PathBuf,
    node: Node,
    /// What was read at the start and has had no answer yet.
    stored: RefCell<HashMap<Key, Subscription>>,
    saved_at: i64,
    /// Whether those who were heard of are there.
    sources: RefCell<HashMap<Rc<str>, bool>>,
    /// The later ones have greater numbers.
    all: RefCell<BTreeMap<u64, Rc<One>>>,
    next: Cell<u64>,
    /// The start is over.
    complete: Cell<bool>,
    dirty: Cell<bool>,
    changed: Notify,
    in_use: Gauge,
    writes: Counter,
    write_failure: Counter,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    source: Rc<str>,
    type_url: Rc<str>,
    name: Rc<str>,
}

/// One subscription.
struct One {
    key: Key,
    subscriber: Rc<dyn Subscriber>,
    state: Cell<State>,
    /// The next answer has all that there is.
    whole: Cell<bool>,
    version: RefCell<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// There was no answer.
    Waiting,
    /// What was stored is in force.
    Stored,
    /// What the control plane said is in force.
    Answered,
}

/// A subscription's side; what it has is kept until this is dropped.
pub struct Keeper {
    of: Rc<LastGood>,
    id: u64,
    one: Rc<One>,
}

impl LastGood {
    /// Reads the file, if there is a usable one.
    pub fn open(path: &Path, node: &Node, root: &Scope) -> Rc<Self> {
        let found = read(path, node).unwrap_or_else(|error| {
            warn(&format!("the last good configuration in {} is not used: {error}", path.display()));
            None
        });
        let Form { saved_at, subscriptions, .. } = found.unwrap_or_default();
        let key = |s: &Subscription| Key {
            source: s.source.as_str().into(),
            type_url: s.type_url.as_str().into(),
            name: s.name.as_str().into(),
        };
        let scope = root.scope("control_plane");
        let this = Rc::new(Self {
            path: path.to_owned(),
            node: node.clone(),
            stored: RefCell::new(subscriptions.into_iter().map(|s| (key(&s), s)).collect()),
            saved_at,
            sources: RefCell::default(),
            all: RefCell::default(),
            next: Cell::default(),
            complete: Cell::default(),
            dirty: Cell::default(),
            changed: Notify::new(),
            in_use: scope.gauge("last_good_in_use"),
            writes: scope.counter("last_good_writes"),
            write_failure: scope.counter("last_good_write_failure"),
        });
        tokio::task::spawn_local(this.clone().keep_writing());
        this
    }

    /// A subscription begins.
    pub fn keep(self: &Rc<Self>, source: &str, subscriber: &Rc<dyn Subscriber>) -> Keeper {
        let key = Key {
            source: source.into(),
            type_url: subscriber.type_url().into(),
            name: subscriber.name().unwrap_or_default().into(),
        };
        let one = Rc::new(One {
            key,
            subscriber: subscriber.clone(),
            state: State::Waiting.into(),
            whole: Cell::default(),
            version: RefCell::default(),
        });
        let id = self.next.replace(self.next.get() + 1);
        self.all.borrow_mut().insert(id, one.clone());
        Keeper { of: self.clone(), id, one }
    }

    /// The start is over: what nobody subscribed to is kept no longer.
    pub fn started(&self) {
        self.complete.set(true);
        let wanted: HashSet<_> = self.all.borrow().values().map(|one| one.key.clone()).collect();
        self.stored.borrow_mut().retain(|key, _| wanted.contains(key));
        if self.dirty.get() {
            self.changed.notify_one();
        }
    }

    fn touch(&self) {
        self.dirty.set(true);
        if self.complete.get() {
            self.changed.notify_one();
        }
    }

    async fn keep_writing(self: Rc<Self>) {
        loop {
            self.changed.notified().await;
            tokio::time::sleep(GATHER).await;
            if !self.dirty.replace(false) {
                continue;
            }
            let since = Instant::now();
            let (form, path) = (self.form(), self.path.clone());
            let written = tokio::task::spawn_blocking(move || write(&path, &form)).await;
            self.written(written.unwrap_or_else(|error| Err(io::Error::other(error))));
            tokio::time::sleep(since.elapsed() * 10).await;
        }
    }

    /// Writes what has changed, now.
    pub fn flush(&self) {
        if self.complete.get() && self.dirty.replace(false) {
            self.written(write(&self.path, &self.form()));
        }
    }

    fn written(&self, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => self.writes.inc(),
            Err(error) => {
                self.write_failure.inc();
                let path = self.path.display();
                warn(&format!("the last good configuration cannot be written to {path}: {error}"));
            }
        }
    }

    /// All that is in force.
    fn form(&self) -> Form {
        let stored = self.stored.borrow();
        // Where several subscribe to the same, the newest that has something speaks.
        let mut all = BTreeMap::new();
        for one in self.all.borrow().values() {
            let Key { source, type_url, name } = &one.key;
            let resources: Vec<_> = one.subscriber.in_force();
            let subscription = match (one.state.get(), resources.is_empty()) {
                (State::Waiting, true) => stored.get(&one.key).cloned(),
                _ => Some(Subscription {
                    source: source.to_string(),
                    type_url: type_url.to_string(),
                    name: name.to_string(),
                    version: one.version.borrow().clone(),
                    resources,
                }),
            };
            // That there is nothing of a type is something to say; that a name has nothing is not.
            let says = |s: &Subscription| s.name.is_empty() || !s.resources.is_empty();
            if let Some(subscription) = subscription.filter(says) {
                all.insert((source.clone(), type_url.clone(), name.clone()), subscription);
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Form {
            node_id: self.node.id.clone(),
            node_cluster: self.node.cluster.clone(),
            saved_at: now.as_secs().cast_signed(),
            subscriptions: all.into_values().collect(),
        }
    }
}

impl Keeper {
    /// Whether the control plane is known not to answer.
    pub fn is_silent(&self) -> bool {
        self.of.sources.borrow().get(&self.one.key.source) == Some(&false)
    }

    /// How long is waited for a control plane that says nothing; none where nothing could take its place.
    pub fn grace(&self) -> Option<Duration> {
        self.of.stored.borrow().contains_key(&self.one.key).then_some(GRACE)
    }

    /// The stream or the poll failed. Whether what was stored is in force now.
    pub fn unreachable(&self, stats: &SubscriptionStats) -> bool {
        let source = &self.one.key.source;
        let first = self.of.sources.borrow_mut().insert(source.clone(), false) != Some(false);
        if first && self.one.state.get() == State::Waiting && self.grace().is_some() {
            let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let age = age.saturating_sub(self.of.saved_at.cast_unsigned());
            warn(&format!(
                "the control plane behind {source} does not answer: the last good configuration, kept {age} s ago, serves \
                 until it does"
            ));
        }
        self.late(stats)
    }

    /// Nothing came in time. Whether what was stored is in force now.
    pub fn late(&self, stats: &SubscriptionStats) -> bool {
        let one = &*self.one;
        match one.state.get() {
            State::Answered => return false,
            State::Stored => {
                one.whole.set(true);
                return true;
            }
            State::Waiting => {}
        }
        let Some(stored) = self.of.stored.borrow().get(&one.key).cloned() else { return false };
        let since = Instant::now();
        let resources = stored.resources.into_iter().map(|r| (stored.type_url.clone(), r.version, r.value));
        one.state.set(State::Stored);
        one.whole.set(true);
        one.version.replace(stored.version.clone());
        self.of.in_use.inc();
        match take(&*one.subscriber, &stored.version, resources) {
            Ok(()) => stats.accepted(&stored.version, since),
            Err(reason) => {
                warn(&format!("of the last good configuration, for {}: {reason}", one.key.type_url));
                stats.rejected();
                one.subscriber.failed();
            }
        }
        true
    }

    /// An answer came. Whether it is to be taken for all that there is.
    pub fn heard(&self) -> bool {
        self.of.sources.borrow_mut().insert(self.one.key.source.clone(), true);
        self.one.whole.take() && self.one.subscriber.name().is_none()
    }

    /// An answer was accepted.
    pub fn accepted(&self, version: &str) {
        let one = &*self.one;
        if one.state.replace(State::Answered) == State::Stored {
            self.end_use();
        }
        version.clone_into(&mut one.version.borrow_mut());
        self.of.stored.borrow_mut().remove(&one.key);
        self.of.touch();
    }

    fn end_use(&self) {
        self.of.in_use.dec();
        if self.of.in_use.value() == 0 {
            let text = "the last good configuration is no longer in use";
            sampan_core::log!(Component::Config, Level::Info, "{text}");
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.one.state.get() == State::Stored {
            self.end_use();
        }
        let gone = self.of.all.borrow_mut().remove(&self.id);
        drop(gone);
        self.of.touch();
    }
}

/// None: there is no file.
fn read(path: &Path, node: &Node) -> Result<Option<Form>, Unusable> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut bytes)?;
    Ok(Some(Form::read(Bytes::from(bytes), &node.id, &node.cluster)?))
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("{0}")]
    Form(#[from] LastGoodError),
}

/// Writes aside and moves to the place, so that there is always a whole file.
fn write(path: &Path, form: &Form) -> io::Result<()> {
    let bytes = form.write();
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::other(LastGoodError::Large(bytes.len() as u64)));
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // Two processes that share the file do not write into each other's.
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".new.{}", std::process::id()));
    // One that was left behind could belong to others.
    match std::fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    written.and_then(|()| std::fs::rename(&aside, path)).inspect_err(|_| {
        // What a full disk has of it helps nobody. That it could not be written is what is told.
        let _ = std::fs::remove_file(&aside);
    })?;
    File::open(folder)?.sync_all()
}
