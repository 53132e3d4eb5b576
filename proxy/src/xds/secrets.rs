//! SDS: one subscription for each secret, kind of secret and source, whoever uses it.
//!
//! A secret that not all of its users can take is refused, and what they have goes on. The files that a secret names
//! are read anew when something is moved into their folders (or into `watched_directory`).

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak as RcWeak};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use envoy_types::pb::envoy::config::core::v3::{DataSource, WatchedDirectory, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use foldhash::fast::FixedState;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::stats::Counter;
use sampan_listener::ListenerConfig;
use sampan_tls::{SecretKind, SecretUser, WantedSecret};
use sampan_upstream::Cluster;
use xds_client::{Decoded, Resource, types};

use super::answer::{Answer, Awaited};
use super::file::Watch;
use super::resource::{Checked, checked, decode};
use super::source::kept;
use super::{Context, Source, Subscriber, SubscriptionStats};

/// All SDS subscriptions.
pub struct Secrets {
    context: Rc<Context>,
    all: RefCell<Vec<Subscription>>,
}

struct Subscription {
    source: ConfigSource,
    secret: Rc<Slot>,
    _stream: Source,
}

/// The subscriber of one secret.
struct Slot {
    context: Rc<Context>,
    me: RcWeak<Slot>,
    kind: SecretKind,
    name: Arc<str>,
    users: RefCell<Vec<Weak<dyn SecretUser>>>,
    current: RefCell<Option<CurrentSecret>>,
    /// Of the files that the secret in force names.
    files: Cell<u64>,
    watches: RefCell<Vec<Watch>>,
    answered: Answer,
    key_rotation_failed: Counter,
}

/// A secret, in force or awaited.
#[derive(Clone)]
pub struct CurrentSecret {
    /// `name`
    pub name: Arc<str>,
    /// `version_info`
    pub version: Arc<str>,
    /// When it came.
    pub updated: SystemTime,
    /// The message.
    pub secret: Arc<Secret>,
    bytes: Bytes,
}

impl Secrets {
    pub(super) fn new(context: Rc<Context>) -> Self {
        Self { context, all: RefCell::default() }
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all of it has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        self.tidy();
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedSecret>());
        Awaited::all(wanted.map(|wanted| self.subscribe(wanted).answered.awaited()).collect())
    }

    /// Subscribes to what a cluster wants. Files answer at once; what is awaited then returns when the rest has been
    /// answered, and is none where nothing is missing.
    pub(super) fn follow_cluster(&self, cluster: &Cluster) -> Option<impl Future<Output = ()> + use<>> {
        let wants = cluster.secrets();
        if wants.is_empty() {
            return None;
        }
        self.tidy();
        let answers = wants.iter().map(|wanted| self.subscribe(wanted).answered.awaited());
        let missing: Vec<_> = answers.filter(|answer| !answer.is_settled()).collect();
        (!missing.is_empty()).then(|| Awaited::all(missing))
    }

    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let all = self.all.borrow();
        let answered = |wanted: &&WantedSecret| {
            all.iter().find(|s| s.is(wanted)).is_some_and(|s| s.secret.answered.is_settled())
        };
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedSecret>());
        wanted
            .filter(|wanted| !answered(wanted))
            .map(|w| format!("shared target SdsApi {}", w.name))
            .collect()
    }

    fn subscribe(&self, wanted: &WantedSecret) -> Rc<Slot> {
        let found = self.all.borrow().iter().find(|s| s.is(wanted)).map(|s| s.secret.clone());
        if let Some(secret) = found {
            secret.serve(wanted.user.clone());
            return secret;
        }
        let scope = self.context.root.scope("sds").scope(&wanted.name);
        let secret = Rc::new_cyclic(|me| Slot {
            context: self.context.clone(),
            me: me.clone(),
            kind: wanted.kind,
            name: wanted.name.clone(),
            users: RefCell::new(vec![wanted.user.clone()]),
            current: RefCell::default(),
            files: Cell::default(),
            watches: RefCell::default(),
            answered: Answer::default(),
            key_rotation_failed: scope.counter("key_rotation_failed"),
        });
        let stats = SubscriptionStats::new(&scope);
        let stream = Source::start(&self.context, &wanted.source, stats, secret.clone());
        let source = wanted.source.clone();
        self.all.borrow_mut().push(Subscription { source, secret: secret.clone(), _stream: stream });
        secret
    }

    /// Ends what nobody uses any more.
    pub(super) fn tidy(&self) {
        self.all.borrow_mut().retain(|s| {
            let mut users = s.secret.users.borrow_mut();
            users.retain(|user| user.strong_count() > 0);
            !users.is_empty()
        });
    }

    /// The secrets in force, and the names of those that have not come; kind by kind.
    pub fn current(&self) -> (Vec<CurrentSecret>, Vec<Arc<str>>) {
        let all = self.all.borrow();
        let mut all: Vec<_> = all.iter().collect();
        all.sort_by_key(|s| s.secret.kind);
        let here = all.iter().filter_map(|s| s.secret.current.borrow().clone()).collect();
        let missing = all.iter().filter(|s| s.secret.current.borrow().is_none());
        (here, missing.map(|s| s.secret.name.clone()).collect())
    }
}

impl Subscription {
    fn is(&self, wanted: &WantedSecret) -> bool {
        let secret = &self.secret;
        (secret.kind, &secret.name, &self.source) == (wanted.kind, &wanted.name, &wanted.source)
    }
}

impl Slot {
    /// Gives another user the secret in force.
    fn serve(&self, user: Weak<dyn SecretUser>) {
        if let (Some(user), Some(current)) = (user.upgrade(), &*self.current.borrow()) {
            match user.prepare(self.kind, &self.name, &current.secret) {
                Ok(commit) => commit(),
                Err(error) => super::log_error(&format!("secret '{}': {error}", self.name)),
            }
        }
        self.users.borrow_mut().push(user);
    }

    /// All users take it, or none does.
    fn give(&self, secret: &Arc<Secret>) -> Result<(), String> {
        let users: Vec<_> = self.users.borrow().iter().filter_map(Weak::upgrade).collect();
        let prepared = users.into_iter().map(|user| user.prepare(self.kind, &self.name, secret));
        let commits = prepared.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        commits.into_iter().for_each(|commit| commit());
        Ok(())
    }

    fn take(&self, resource: &Checked<'_, Secret>) -> Result<(), String> {
        let Checked { message: secret, bytes, version } = *resource;
        if secret.name != *self.name {
            return Err(format!("Unexpected SDS secret (expecting {}): {}", self.name, secret.name));
        }
        let secret = Arc::new(secret.clone());
        let files = contents(&secret);
        let same = self.current.borrow().as_ref().is_some_and(|now| now.bytes == *bytes);
        if !same || files != self.files.get() {
            self.give(&secret)?;
            self.files.set(files);
            self.watch(&secret);
            let (name, version) = (self.name.clone(), version.into());
            // A copy of its own: a slice would keep the whole response.
            let bytes = bytes.to_vec().into();
            let updated = SystemTime::now();
            self.current.replace(Some(CurrentSecret { name, version, updated, secret, bytes }));
        }
        Ok(())
    }

    /// Reads the files anew when something is moved to where they stand.
    fn watch(&self, secret: &Secret) {
        let Some(watcher) = &self.context.watcher else { return };
        let moved = self.me.clone();
        let moved: Rc<dyn Fn()> = Rc::new(move || {
            if let Some(slot) = moved.upgrade() {
                slot.rotate();
            }
        });
        let watches = folders(secret).into_iter().filter_map(|folder| {
            let watch = watcher.watch_folder(&folder, moved.clone());
            watch.inspect_err(|e| super::log_error(&format!("cannot watch {}: {e}", folder.display()))).ok()
        });
        let watches = watches.collect();
        drop(self.watches.replace(watches));
    }

    fn rotate(&self) {
        let Some(secret) = self.current.borrow().as_ref().map(|now| now.secret.clone()) else { return };
        let files = contents(&secret);
        if files == self.files.get() {
            return;
        }
        match self.give(&secret) {
            Ok(()) => self.files.set(files),
            Err(reason) => {
                let text = format!("Failed to reload certificates: secret '{}': {reason}", self.name);
                sampan_core::log!(sampan_core::log::Component::Misc, sampan_core::log::Level::Warn, "{text}");
                self.key_rotation_failed.inc();
            }
        }
    }
}

impl Subscriber for Slot {
    fn type_url(&self) -> &'static str {
        types::SECRET
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode::<Secret>(&self.context, resource)
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        match checked(resources).as_slice() {
            [] => return Err(format!("Missing SDS resources for {} in onConfigUpdate()", self.name)),
            [one] => self.take(one)?,
            more => {
                return Err(format!(
                    "Unexpected SDS secrets length for {}, number of added resources {}, number of removed \
                     resources 0. Expected sum is 1",
                    self.name,
                    more.len()
                ));
            }
        }
        self.answered.settle();
        Ok(())
    }

    fn failed(&self) {
        self.answered.settle();
    }

    /// No key is written to a disk: certificates are kept whose key is a file's name, and what peers are verified with.
    fn in_force(&self) -> Vec<KeptResource> {
        let current = self.current.borrow();
        let current = current.iter().filter(|now| !holds_key(&now.secret));
        current.map(|now| kept(&now.version, &now.bytes)).collect()
    }
}

/// Whether somebody who has the message could speak in the name of its owner.
fn holds_key(secret: &Secret) -> bool {
    let named = |source: &DataSource| matches!(source.specifier, Some(Specifier::Filename(_)));
    match &secret.r#type {
        Some(Type::TlsCertificate(c)) => {
            c.private_key_provider.is_some()
                || [&c.private_key, &c.password, &c.pkcs12].into_iter().flatten().any(|s| !named(s))
        }
        Some(Type::ValidationContext(_)) => false,
        _ => true,
    }
}

/// What a secret is made of, and the folder that says when to look again.
fn sources(secret: &Secret) -> (Vec<&DataSource>, Option<&WatchedDirectory>) {
    match &secret.r#type {
        Some(Type::TlsCertificate(c)) => {
            let all = [&c.certificate_chain, &c.private_key, &c.password, &c.ocsp_staple];
            (all.into_iter().flatten().collect(), c.watched_directory.as_ref())
        }
        Some(Type::ValidationContext(v)) => {
            ([&v.trusted_ca, &v.crl].into_iter().flatten().collect(), v.watched_directory.as_ref())
        }
        _ => (Vec::new(), None),
    }
}

fn files(secret: &Secret) -> impl Iterator<Item = &Path> {
    sources(secret).0.into_iter().filter_map(|source| match &source.specifier {
        Some(Specifier::Filename(path)) => Some(Path::new(path)),
        _ => None,
    })
}

fn folders(secret: &Secret) -> BTreeSet<PathBuf> {
    match sources(secret).1 {
        Some(folder) => std::iter::once(PathBuf::from(&folder.path)).collect(),
        None => files(secret).filter_map(Path::parent).map(Path::to_path_buf).collect(),
    }
}

fn contents(secret: &Secret) -> u64 {
    FixedState::default().hash_one(files(secret).map(|path| std::fs::read(path).ok()).collect::<Vec<_>>())
}
