//! ECDS: one subscription for each filter's name, place and source, whoever uses it.
//!
//! A configuration is taken by all of its users or by none. A listener that comes later and does not allow the type
//! that is in force serves its default until the next one comes (`config_conflict`), as in Envoy.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::google::protobuf::Any;
use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_core::config_source::ConfigSource;
use sampan_core::stats::Counter;
use sampan_listener::{ExtensionUser, ListenerConfig, Stage, WantedExtension};
use xds_client::{Decoded, Resource, types};

use super::answer::{Answer, Awaited};
use super::resource::{Known, decode_new, known};
use super::source::kept;
use super::{Context, Source, Subscriber, SubscriptionStats};

/// All ECDS subscriptions.
pub struct Extensions {
    context: Rc<Context>,
    all: RefCell<Vec<Subscription>>,
}

struct Subscription {
    source: ConfigSource,
    stage: Stage,
    extension: Rc<Extension>,
    _stream: Source,
}

/// The subscriber of one filter.
struct Extension {
    context: Rc<Context>,
    name: Arc<str>,
    users: RefCell<Vec<Weak<dyn ExtensionUser>>>,
    current: RefCell<Option<CurrentExtension>>,
    answered: Answer,
    config_reload: Counter,
    config_fail: Counter,
    config_conflict: Counter,
}

/// A configuration in force.
#[derive(Clone)]
pub struct CurrentExtension {
    /// `version_info`
    pub version: Arc<str>,
    /// The message.
    pub bytes: Bytes,
    /// When it came.
    pub updated: SystemTime,
    /// `typed_config`, followed to the message that it names.
    config: Arc<Any>,
}

impl Extensions {
    pub(super) fn new(context: Rc<Context>) -> Self {
        Self { context, all: RefCell::default() }
    }

    /// Subscribes to what a listener wants; what is awaited then returns when all that it waits for has been answered.
    pub fn follow(&self, listener: &ListenerConfig) -> impl Future<Output = ()> + use<> {
        self.tidy();
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedExtension>());
        let answers = wanted.filter_map(|wanted| {
            let extension = self.subscribe(wanted);
            wanted.warms.then(|| extension.answered.awaited())
        });
        Awaited::all(answers.collect())
    }

    /// What of a listener's wants was not answered yet, in Envoy's words.
    pub fn unready(&self, listener: &ListenerConfig) -> Vec<String> {
        let all = self.all.borrow();
        let answered = |wanted: &&WantedExtension| {
            let same = |s: &&Subscription| {
                s.stage == wanted.stage && s.source == wanted.source && s.extension.name == wanted.name
            };
            all.iter().find(same).is_some_and(|s| s.extension.answered.is_settled())
        };
        let wanted = listener.wants().iter().filter_map(|want| want.downcast_ref::<WantedExtension>());
        let names = wanted.filter(|wanted| wanted.warms && !answered(wanted));
        names.map(|w| format!("shared target FilterConfigSubscription init {}", w.name)).collect()
    }

    fn subscribe(&self, wanted: &WantedExtension) -> Rc<Extension> {
        let same = |s: &&Subscription| {
            s.stage == wanted.stage && s.source == wanted.source && s.extension.name == wanted.name
        };
        let found = self.all.borrow().iter().find(same).map(|s| s.extension.clone());
        if let Some(extension) = found {
            extension.serve(wanted.user.clone());
            return extension;
        }
        let scope = self.context.root.scope("extension_config_discovery");
        let scope = scope.scope(wanted.stage.stat_prefix()).scope(&wanted.name);
        let extension = Rc::new(Extension {
            context: self.context.clone(),
            name: wanted.name.clone(),
            users: RefCell::new(vec![wanted.user.clone()]),
            current: RefCell::default(),
            answered: Answer::default(),
            config_reload: scope.counter("config_reload"),
            config_fail: scope.counter("config_fail"),
            config_conflict: scope.counter("config_conflict"),
        });
        let stats = SubscriptionStats::new(&scope);
        let stream = Source::start(&self.context, &wanted.source, stats, extension.clone());
        let (source, stage) = (wanted.source.clone(), wanted.stage);
        let subscription = Subscription { source, stage, extension: extension.clone(), _stream: stream };
        self.all.borrow_mut().push(subscription);
        extension
    }

    /// Ends what nobody uses any more.
    fn tidy(&self) {
        self.all.borrow_mut().retain(|s| {
            let mut users = s.extension.users.borrow_mut();
            users.retain(|user| user.strong_count() > 0);
            !users.is_empty()
        });
    }

    /// The configurations in force of one place; none where no filter was ever wanted.
    pub fn current(&self, stage: Stage) -> Option<Vec<CurrentExtension>> {
        let all = self.all.borrow();
        let mine: Vec<_> = all.iter().filter(|s| s.stage == stage).collect();
        let current = mine.iter().filter_map(|s| s.extension.current.borrow().clone());
        (!mine.is_empty()).then(|| current.collect())
    }
}

impl Extension {
    /// Gives another user the configuration in force, if it may have it.
    fn serve(&self, user: Weak<dyn ExtensionUser>) {
        if let (Some(user), Some(current)) = (user.upgrade(), &*self.current.borrow()) {
            match user.check_type(name_of(&current.config)).and_then(|()| user.prepare(&current.config)) {
                Ok(commit) => commit(),
                Err(error) => {
                    super::log_error(&format!("extension '{}': {error}", self.name));
                    self.config_conflict.inc();
                }
            }
        }
        self.users.borrow_mut().push(user);
    }

    fn take(&self, resource: &Known<'_, TypedExtensionConfig>) -> Result<(), String> {
        let Known { name, bytes, version, .. } = *resource;
        if *name != *self.name {
            return Err(format!("Unexpected resource name in ExtensionConfigDS response: {name}"));
        }
        let message = resource.message()?;
        let given = message.typed_config.clone().unwrap_or_default();
        let (type_url, value) =
            sampan_config::any::resolve(&given.type_url, &given.value).map_err(|e| e.to_string())?;
        let config = Any { type_url: type_url.into_owned(), value: value.into_owned() };
        if self.current.borrow().as_ref().is_some_and(|current| *current.config == config) {
            return Ok(());
        }
        let users: Vec<_> = self.users.borrow().iter().filter_map(Weak::upgrade).collect();
        for user in &users {
            user.check_type(name_of(&config)).map_err(|e| e.to_string())?;
        }
        let prepared = users.into_iter().map(|user| user.prepare(&config));
        let commits = prepared.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        commits.into_iter().for_each(|commit| commit());
        let updated = SystemTime::now();
        // A copy of its own: a slice would keep the whole response.
        let bytes = bytes.to_vec().into();
        let config = Arc::new(config);
        self.current.replace(Some(CurrentExtension { version: version.into(), bytes, updated, config }));
        self.config_reload.inc();
        Ok(())
    }
}

impl Subscriber for Extension {
    fn type_url(&self) -> &'static str {
        types::EXTENSION
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        decode_new::<TypedExtensionConfig>(&self.context, resource, |_, _| false)
    }

    fn update(&self, _version: &str, resources: &[Rc<Decoded>]) -> Result<(), String> {
        match known(resources).as_slice() {
            [one] => self.take(one)?,
            more => {
                let count = more.len();
                return Err(format!("Unexpected number of resources in ExtensionConfigDS response: {count}"));
            }
        }
        self.answered.settle();
        Ok(())
    }

    fn change(&self, _version: &str, added: &[Rc<Decoded>], removed: &[String]) -> Result<(), String> {
        if !removed.is_empty() {
            self.current.replace(None);
            self.users.borrow().iter().filter_map(Weak::upgrade).for_each(|user| user.removed());
            self.config_reload.inc();
            return Ok(());
        }
        match added {
            [] => Ok(()),
            [first, ..] => self.update(&first.version, added),
        }
    }

    fn failed(&self) {
        self.config_fail.inc();
        self.answered.settle();
    }

    fn in_force(&self) -> Vec<KeptResource> {
        let current = self.current.borrow();
        current.iter().map(|now| kept(&now.version, &now.bytes)).collect()
    }
}

fn name_of(config: &Any) -> &str {
    config.type_url.rsplit('/').next().unwrap_or_default()
}
