//! A subscription: a source, its counters, and the one that takes what it delivers.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prost::bytes::Bytes;
use sampan_config::last_good::KeptResource;
use sampan_config::{DiscoveryFile, ErrorKind, LoadOptions, load_discovery_file};
use sampan_core::config_source::{Api, ApiSource, ConfigSource, SourceKind};
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Histogram, Scope, TextReadout, Thin, Unit};
use tokio::sync::Notify;
use xds_client::{Client, Decoded, Failure, Resource, Update, Watcher, types};

use super::file::Watch;
use super::last_good::Keeper;
use super::{Context, rest};

/// One type's side of a subscription.
pub trait Subscriber {
    /// What it subscribes to.
    fn type_url(&self) -> &'static str;

    /// The one resource that it wants; none: all there are.
    fn name(&self) -> Option<&str> {
        None
    }

    /// That name is a namespace: everything below it is wanted, and some of it asked for by [`Source::ask`].
    fn is_namespace(&self) -> bool {
        false
    }

    /// Decodes and checks a resource. One that cannot be refuses the whole response.
    fn decode(&self, resource: Resource) -> Result<Decoded, String>;

    /// Takes everything that there is. The error names what was not taken, and why.
    fn update(&self, version: &str, resources: &[Rc<Decoded>]) -> Result<(), String>;

    /// Takes what is new, and takes away what is gone. Default, for those who want one resource: what is gone stays
    /// in force.
    fn change(&self, _version: &str, added: &[Rc<Decoded>], _removed: &[String]) -> Result<(), String> {
        match added {
            [] => Ok(()),
            [first, ..] => self.update(&first.version, added),
        }
    }

    /// No answer in time, or one that was refused: what is in force stays.
    fn failed(&self);

    /// What is in force, to be kept for a start without a control plane. Default: nothing is.
    fn in_force(&self) -> Vec<KeptResource> {
        Vec::new()
    }
}

/// A resource as it is kept; an empty version stands for that of the whole.
pub(super) fn kept(version: &str, value: &Bytes) -> KeptResource {
    KeptResource { version: version.to_owned(), value: value.clone() }
}

/// `update_*`, `version`, …: the same for every type. Ten thousand clusters have a subscription each, hence the thin handles.
pub struct SubscriptionStats {
    scope: Scope,
    init_fetch_timeout: Thin<Counter>,
    update_attempt: Thin<Counter>,
    update_failure: Thin<Counter>,
    update_rejected: Thin<Counter>,
    update_success: Thin<Counter>,
    update_time: Thin<Gauge>,
    version: Thin<Gauge>,
    version_text: Thin<TextReadout>,
    update_duration: Thin<Histogram>,
}

impl SubscriptionStats {
    /// Makes them.
    pub fn new(scope: &Scope) -> Self {
        let counter = |name| Thin::from(&scope.counter(name));
        let gauge = |name| Thin::from(&scope.gauge(name));
        Self {
            scope: scope.clone(),
            init_fetch_timeout: counter("init_fetch_timeout"),
            update_attempt: counter("update_attempt"),
            update_failure: counter("update_failure"),
            update_rejected: counter("update_rejected"),
            update_success: counter("update_success"),
            update_time: gauge("update_time"),
            version: gauge("version"),
            version_text: Thin::from(&scope.text_readout("version_text")),
            update_duration: Thin::from(&scope.histogram("update_duration", Unit::Milliseconds)),
        }
    }

    pub(super) fn attempted(&self) {
        self.update_attempt.stat(&self.scope).inc();
    }

    pub(super) fn unreachable(&self) {
        self.update_failure.stat(&self.scope).inc();
    }

    pub(super) fn rejected(&self) {
        self.update_rejected.stat(&self.scope).inc();
    }

    pub(super) fn timed_out(&self) {
        self.init_fetch_timeout.stat(&self.scope).inc();
    }

    pub(super) fn accepted(&self, version: &str, since: Instant) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let scope = &self.scope;
        self.update_success.stat(scope).inc();
        self.update_time.stat(scope).set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        self.version.stat(scope).set(twox_hash::XxHash64::oneshot(0, version.as_bytes()));
        self.version_text.stat(scope).set(version);
        let took = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.update_duration.stat(scope).record(took);
    }
}

/// A subscription under way; it ends when this is dropped.
#[allow(dead_code, reason = "held for their drop")]
pub enum Source {
    /// A file; none: it cannot be watched.
    File(Option<Watch>),
    /// Part of a stream; with its client where the stream carries nothing else.
    Stream(xds_client::Watch, Option<Client>),
    /// A control plane that is polled.
    Poll(rest::Poll),
    /// Nobody delivers.
    Nothing,
}

impl Source {
    /// Begins. A file is read at once.
    pub fn start(
        context: &Rc<Context>,
        source: &ConfigSource,
        stats: SubscriptionStats,
        subscriber: Rc<dyn Subscriber>,
    ) -> Self {
        match &source.kind {
            SourceKind::Path { path, watched_directory } => {
                File::start(context, path, watched_directory.as_deref(), stats, subscriber)
            }
            SourceKind::Ads => match &context.ads {
                Some(client) => {
                    let watch = Stream::start(context, (client, "ads"), source, stats, subscriber);
                    Self::Stream(watch, None)
                }
                None => nothing("ADS must be configured to support an ADS config source", &*subscriber),
            },
            SourceKind::Api(api) => Self::api(context, source, api, stats, subscriber),
        }
    }

    /// Asks for one more resource of a namespace; only a stream knows such.
    pub fn ask(&self, name: &str) {
        if let Self::Stream(watch, _) = self {
            watch.ask(name);
        }
    }

    /// Takes [`Self::ask`] back.
    pub fn forget(&self, name: &str) {
        if let Self::Stream(watch, _) = self {
            watch.forget(name);
        }
    }

    fn api(
        context: &Rc<Context>,
        source: &ConfigSource,
        api: &ApiSource,
        stats: SubscriptionStats,
        subscriber: Rc<dyn Subscriber>,
    ) -> Self {
        let delta = match &api.api {
            Api::Grpc { delta, .. } => delta,
            Api::Rest { cluster, refresh_delay, timeout } => {
                let question = rest::Question {
                    cluster: cluster.clone(),
                    delay: *refresh_delay,
                    timeout: *timeout,
                    initial: source.initial_fetch_timeout,
                };
                return match rest::start(context, question, stats, &subscriber) {
                    Some(poll) => Self::Poll(poll),
                    None => nothing("this type has no path of its own", &*subscriber),
                };
            }
        };
        let Some(path) = types::alone(subscriber.type_url(), super::grpc::variant(*delta)) else {
            return nothing("this type has no service of its own", &*subscriber);
        };
        match context.control.client(api, path, &stats.scope) {
            Some(client) => {
                let watch = Stream::start(context, (&client, api.cluster()), source, stats, subscriber);
                client.start();
                Self::Stream(watch, Some(client))
            }
            None => nothing("no gRPC service", &*subscriber),
        }
    }
}

fn nothing(why: &str, subscriber: &dyn Subscriber) -> Source {
    warn(&format!("{}: {why}", subscriber.type_url()));
    subscriber.failed();
    Source::Nothing
}

/// A subscription that a control plane serves.
struct Stream {
    updated: Rc<Notify>,
    stats: SubscriptionStats,
    subscriber: Rc<dyn Subscriber>,
    keeper: Option<Keeper>,
}

impl Stream {
    fn start(
        context: &Context,
        (client, serves): (&Client, &str),
        source: &ConfigSource,
        stats: SubscriptionStats,
        subscriber: Rc<dyn Subscriber>,
    ) -> xds_client::Watch {
        stats.attempted();
        let keeper = context.last_good.as_ref().map(|last_good| last_good.keep(serves, &subscriber));
        let name = subscriber.name().map(str::to_owned);
        let names: Vec<_> = name.iter().map(String::as_str).collect();
        let type_url = subscriber.type_url();
        let namespace = name.as_deref().filter(|_| subscriber.is_namespace());
        let stream = Rc::new(Self { updated: context.updated.clone(), stats, subscriber, keeper });
        let timeout = source.initial_fetch_timeout;
        let watch = match namespace {
            Some(namespace) => client.watch_namespace(type_url, namespace, stream.clone(), timeout),
            None => client.watch(type_url, &names, stream.clone(), timeout),
        };
        if let Some(keeper) = &stream.keeper {
            if keeper.is_silent() {
                keeper.late(&stream.stats);
            } else if let Some(after) = keeper.grace() {
                let waiting = Rc::downgrade(&stream);
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(after).await;
                    let stream = waiting.upgrade();
                    stream.and_then(|stream| Some(stream.keeper.as_ref()?.late(&stream.stats)))
                });
            }
        }
        watch
    }
}

impl Watcher for Stream {
    fn decode(&self, resource: Resource) -> Result<Decoded, String> {
        self.subscriber.decode(resource)
    }

    fn update(&self, update: &Update<'_>) -> Result<(), String> {
        let since = Instant::now();
        let Update { version, resources, removed, delta } = *update;
        // In place of what was kept, the first answer of a delta stream has all that there is.
        let whole = self.keeper.as_ref().is_some_and(Keeper::heard);
        if delta && !whole {
            self.stats.attempted();
            self.subscriber.change(version, resources, removed)?;
        } else {
            self.subscriber.update(version, resources)?;
            self.stats.attempted();
        }
        self.stats.accepted(version, since);
        if let Some(keeper) = &self.keeper {
            keeper.accepted(version);
        }
        self.updated.notify_one();
        Ok(())
    }

    fn failed(&self, why: Failure<'_>) {
        let type_url = self.subscriber.type_url();
        match why {
            Failure::Connection => {
                self.stats.unreachable();
                if let Some(keeper) = &self.keeper {
                    keeper.unreachable(&self.stats);
                }
            }
            Failure::Timeout => {
                warn(&format!("gRPC config: initial fetch timed out for {type_url}"));
                self.stats.timed_out();
                if !self.keeper.as_ref().is_some_and(|keeper| keeper.late(&self.stats)) {
                    self.subscriber.failed();
                }
            }
            Failure::Rejected(reason) => {
                warn(&format!("gRPC config for {type_url} rejected: {reason}"));
                if let Some(keeper) = &self.keeper {
                    keeper.heard();
                }
                self.stats.rejected();
                self.subscriber.failed();
            }
        }
        self.stats.attempted();
    }
}

struct File {
    context: Rc<Context>,
    path: std::path::PathBuf,
    stats: SubscriptionStats,
    subscriber: Rc<dyn Subscriber>,
    /// A subscriber's own doing must not read the file again from within.
    reading: Cell<bool>,
}

impl File {
    fn start(
        context: &Rc<Context>,
        path: &std::path::Path,
        watched_directory: Option<&std::path::Path>,
        stats: SubscriptionStats,
        subscriber: Rc<dyn Subscriber>,
    ) -> Source {
        let (context, path) = (context.clone(), path.to_owned());
        let file = Rc::new(Self { context, path, stats, subscriber, reading: Cell::new(false) });
        let reader = file.clone();
        let watch = file.context.watcher.as_ref().and_then(|watcher| {
            let moved = Rc::new(move || reader.read());
            let watch = match watched_directory {
                Some(folder) => watcher.watch_folder(folder, moved),
                None => watcher.watch_file(&file.path, moved),
            };
            watch
                .inspect_err(|e| super::log_error(&format!("cannot watch {}: {e}", file.path.display())))
                .ok()
        });
        file.read();
        Source::File(watch)
    }

    fn read(&self) {
        if self.reading.replace(true) {
            return;
        }
        let since = Instant::now();
        self.stats.attempted();
        let options = LoadOptions { unknown: self.context.unknown, ..LoadOptions::default() };
        let rejected = |reason: String| {
            warn(&format!("Filesystem config update rejected: {reason}"));
            self.stats.rejected();
            self.subscriber.failed();
        };
        match load_discovery_file(&self.path, &options) {
            Ok(DiscoveryFile { version, resources, unknown }) => {
                self.context.tell_unknown(&unknown);
                match self.take(&version, resources) {
                    Ok(()) => self.stats.accepted(&version, since),
                    Err(reason) => rejected(reason),
                }
            }
            Err(error) if error.kind == ErrorKind::UnknownField => rejected(error.to_string()),
            Err(error) => {
                warn(&format!("Filesystem config update failure: in {}, {error}", self.path.display()));
                self.stats.unreachable();
                self.subscriber.failed();
            }
        }
        self.reading.set(false);
    }

    fn take(&self, version: &str, resources: Vec<sampan_config::Resource>) -> Result<(), String> {
        take(&*self.subscriber, version, resources.into_iter().map(|r| (r.type_url, String::new(), r.value)))
    }
}

/// Gives a whole response to its subscriber: types, versions (the response's where they are empty) and values.
pub(super) fn take(
    subscriber: &dyn Subscriber,
    version: &str,
    resources: impl Iterator<Item = (String, String, Bytes)>,
) -> Result<(), String> {
    let decode = |(type_url, own, value): (String, String, Bytes)| {
        let (name, version) = (String::new(), if own.is_empty() { version.to_owned() } else { own });
        let resource =
            Resource { name, version, type_url, value: Some(value), aliases: Vec::new(), ttl: None };
        subscriber.decode(resource).map(Rc::new)
    };
    let resources = resources.map(decode).collect::<Result<Vec<_>, _>>()?;
    subscriber.update(version, &resources)
}

pub(super) fn warn(text: &str) {
    sampan_core::log!(Component::Config, Level::Warn, "{text}");
}
