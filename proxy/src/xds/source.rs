//! A subscription: a source, its counters, and the one that takes what it delivers.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use sampan_config::{DiscoveryFile, LoadOptions, Resource, UnknownFields, load_discovery_file};
use sampan_core::config_source::{ConfigSource, SourceKind};
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Gauge, Histogram, Scope, TextReadout, Unit};

use super::Context;
use super::file::Watch;

/// One type's side of a subscription.
pub trait Subscriber {
    /// Takes everything that there is. The error names what was not taken, and why.
    fn update(&self, version: &str, resources: Vec<Resource>) -> Result<(), String>;
    /// No answer, or none that can be read, or one that was refused: what is in force stays.
    fn failed(&self);
}

/// `update_*`, `version`, …: the same for every type.
pub struct SubscriptionStats {
    init_fetch_timeout: Counter,
    update_attempt: Counter,
    update_failure: Counter,
    update_rejected: Counter,
    update_success: Counter,
    update_time: Gauge,
    version: Gauge,
    version_text: TextReadout,
    update_duration: Histogram,
}

impl SubscriptionStats {
    /// Makes them.
    pub fn new(scope: &Scope) -> Self {
        Self {
            init_fetch_timeout: scope.counter("init_fetch_timeout"),
            update_attempt: scope.counter("update_attempt"),
            update_failure: scope.counter("update_failure"),
            update_rejected: scope.counter("update_rejected"),
            update_success: scope.counter("update_success"),
            update_time: scope.gauge("update_time"),
            version: scope.gauge("version"),
            version_text: scope.text_readout("version_text"),
            update_duration: scope.histogram("update_duration", Unit::Milliseconds),
        }
    }

    fn accepted(&self, version: &str, since: Instant) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.update_success.inc();
        self.update_time.set(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        self.version.set(twox_hash::XxHash64::oneshot(0, version.as_bytes()));
        self.version_text.set(version);
        self.update_duration.record(u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
    }
}

/// A subscription under way; it ends when this is dropped.
pub struct Source(#[allow(dead_code, reason = "held for its drop")] Option<Watch>);

impl Source {
    /// Begins. A file is read at once.
    pub fn start(
        context: &Rc<Context>,
        source: &ConfigSource,
        stats: SubscriptionStats,
        subscriber: Rc<dyn Subscriber>,
    ) -> Self {
        let SourceKind::Path { path, watched_directory } = &source.kind;
        let file = Rc::new(File {
            context: context.clone(),
            path: path.clone(),
            stats,
            subscriber,
            reading: Cell::new(false),
        });
        let reader = file.clone();
        let watch = context.watcher.as_ref().and_then(|watcher| {
            let moved = Rc::new(move || reader.read());
            let watch = match watched_directory {
                Some(folder) => watcher.watch_folder(folder, moved),
                None => watcher.watch_file(path, moved),
            };
            watch.inspect_err(|e| super::log_error(&format!("cannot watch {}: {e}", path.display()))).ok()
        });
        file.read();
        Self(watch)
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
    fn read(&self) {
        if self.reading.replace(true) {
            return;
        }
        let since = Instant::now();
        self.stats.update_attempt.inc();
        let unknown = if self.context.reject_unknown { UnknownFields::Reject } else { UnknownFields::Warn };
        match load_discovery_file(&self.path, &LoadOptions { unknown, ..LoadOptions::default() }) {
            Ok(DiscoveryFile { version, resources }) => match self.subscriber.update(&version, resources) {
                Ok(()) => self.stats.accepted(&version, since),
                Err(reason) => {
                    warn(&format!("Filesystem config update rejected: {reason}"));
                    self.stats.update_rejected.inc();
                    self.subscriber.failed();
                }
            },
            Err(error) => {
                warn(&format!("Filesystem config update failure: in {}, {error}", self.path.display()));
                self.stats.update_failure.inc();
                self.subscriber.failed();
            }
        }
        self.reading.set(false);
    }
}

fn warn(text: &str) {
    sampan_core::log!(Component::Config, Level::Warn, "{text}");
}

impl SubscriptionStats {
    /// No first answer in time.
    #[allow(dead_code, reason = "files answer at once; streams do not")]
    pub fn timed_out(&self) {
        self.init_fetch_timeout.inc();
    }
}
