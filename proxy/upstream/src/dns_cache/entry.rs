//! A name in a cache.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::time::{Duration, Instant};

use sampan_core::clock;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::name::Authority;
use super::{lock, same};

/// A name and what is known of it.
pub struct Entry {
    /// `HOST:PORT`, as it is looked for.
    pub key: Arc<str>,
    name: Box<str>,
    port: u16,
    known: Mutex<Known>,
    complete: watch::Sender<bool>,
    /// When somebody last asked for it, in milliseconds.
    used: AtomicU64,
    task: OnceLock<AbortHandle>,
}

struct Known {
    addresses: Vec<IpAddr>,
    details: Arc<str>,
    failed: bool,
}

/// What [`Entry::used`] counts from.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn milliseconds(at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(*BEGIN).as_millis()).unwrap_or(u64::MAX)
}

impl Entry {
    pub(super) fn new(key: Arc<str>, default_port: u16) -> Self {
        let Authority { host, port, .. } = Authority::parse(&key);
        Self {
            name: host.into(),
            port: port.unwrap_or(default_port),
            known: Mutex::new(Known { addresses: Vec::new(), details: "not_resolved".into(), failed: false }),
            complete: watch::Sender::new(false),
            used: AtomicU64::new(milliseconds(Instant::now())),
            task: OnceLock::new(),
            key,
        }
    }

    /// What is asked of DNS.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where it is; none: it did not resolve.
    pub fn address(&self) -> Option<SocketAddr> {
        let ip = lock(&self.known).addresses.first().copied()?;
        Some(SocketAddr::new(ip, self.port))
    }

    /// How it resolved, for the details of a response.
    pub fn details(&self) -> Arc<str> {
        lock(&self.known).details.clone()
    }

    /// Nobody could tell whether there is such a name.
    pub(super) fn has_failed(&self) -> bool {
        lock(&self.known).failed
    }

    /// Whether it was resolved, well or not.
    pub(super) fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    pub(super) fn complete(&self) {
        self.complete.send_replace(true);
    }

    /// Returns when it was resolved, well or not.
    pub async fn resolved(&self) {
        // The sender lives in self, so that waiting cannot fail.
        let _ = self.complete.subscribe().wait_for(|done| *done).await;
    }

    /// Takes an answer; addresses that are there stay where there are none. Whether there are others than before.
    pub(super) fn take(&self, addresses: Vec<IpAddr>, details: Arc<str>, failed: bool) -> bool {
        let mut known = lock(&self.known);
        let changed = !addresses.is_empty() && !same(&addresses, &known.addresses);
        if changed {
            *known = Known { addresses, details, failed };
        } else if known.addresses.is_empty() {
            (known.details, known.failed) = (details, failed);
        }
        changed
    }

    /// Somebody asks for it.
    pub(crate) fn touch(&self) {
        // Written rarely: workers share it.
        let (now, last) = (milliseconds(clock::recent()), self.used.load(Ordering::Relaxed));
        if now > last + 10 {
            self.used.store(now, Ordering::Relaxed);
        }
    }

    /// Since when nobody has.
    pub(super) fn idle(&self) -> Duration {
        let last = self.used.load(Ordering::Relaxed);
        Duration::from_millis(milliseconds(Instant::now()).saturating_sub(last))
    }

    pub(super) fn own_task(&self, task: AbortHandle) {
        // There is one task for an entry.
        let _ = self.task.set(task);
    }

    pub(super) fn end_task(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}
