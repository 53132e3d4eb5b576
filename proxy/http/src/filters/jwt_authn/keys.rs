//! Where a provider's keys come from.
//!
//! Remote keys are fetched when a token asks for them and there are none, or the old ones' time is over; they are then
//! there for all workers. Requests of one worker that want the same keys at the same time wait for one fetch: `jwks_fetch_*`
//! count fetches, where Envoy has one for each such request and worker. With `async_fetch` they are fetched on the control
//! thread before the listener serves, and again and again before their time is over; a fetch that fails leaves the old
//! keys in force.
//!
//! The request path reads a pointer; nothing is locked.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, Shared, WeakShared};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::log::{Component, Level};
use sampan_core::stats::Counter;
use sampan_upstream::WorkerClusters;

use crate::jwt::Jwks;
use crate::route::BackOff;
use crate::router::callout::{self, Request};
use crate::router::jittered;

/// How long before their time is over keys are fetched again.
const AHEAD: Duration = Duration::from_secs(5);

/// The bound of the first pause between two tries, where the policy names none.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// A provider's keys.
pub(super) enum KeySource {
    /// An empty text: no token is verified.
    None,
    Local(Jwks),
    Remote(Arc<Remote>),
}

/// `remote_jwks`, checked.
pub(super) struct RemoteModel {
    /// As it was given.
    pub(super) uri: String,
    pub(super) cluster: Arc<str>,
    pub(super) scheme: String,
    pub(super) authority: String,
    pub(super) path: String,
    /// None: a fetch may take as long as it likes.
    pub(super) timeout: Option<Duration>,
    pub(super) cache: Duration,
    /// Tries of a fetch at most, and the pauses between them.
    pub(super) attempts: u32,
    pub(super) back_off: BackOff,
    /// How long one try may take: with retries no longer than the longest pause, as in Envoy.
    pub(super) try_timeout: Option<Duration>,
    /// `async_fetch`
    pub(super) ahead: bool,
    /// The listener waits for the first fetch.
    pub(super) holds_listener: bool,
    pub(super) failed_pause: Duration,
}

/// Keys that are fetched.
pub(super) struct Remote {
    id: u64,
    model: RemoteModel,
    current: ArcSwapOption<Fetched>,
    counters: OnceLock<FetchCounters>,
    /// The control thread has fetched once, whatever came of it.
    fetched_ahead: AtomicBool,
}

/// Keys that were fetched.
pub(super) struct Fetched {
    pub(super) keys: Jwks,
    /// When they are to be fetched again; none: who keeps them fresh is somebody else.
    until: Option<Instant>,
}

/// `jwks_fetch_success`, `jwks_fetch_failed`
pub(super) struct FetchCounters {
    pub(super) success: Counter,
    pub(super) failed: Counter,
}

/// What a fetch brought; none where it failed.
pub(super) type Answer = Option<Arc<Fetched>>;
type Fetch = LocalBoxFuture<'static, Answer>;

thread_local! {
    /// Fetches under way on this worker.
    static UNDER_WAY: RefCell<HashMap<u64, WeakShared<Fetch>>> = RefCell::default();
}

impl KeySource {
    pub(super) fn remote(model: RemoteModel) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::Remote(Arc::new(Remote {
            id,
            model,
            current: ArcSwapOption::empty(),
            counters: OnceLock::new(),
            fetched_ahead: AtomicBool::default(),
        }))
    }
}

impl Remote {
    /// Says where fetches are counted; once.
    pub(super) fn count_with(&self, counters: FetchCounters) {
        // Made for one filter only, so that nobody has been here before.
        let _ = self.counters.set(counters);
    }

    /// `async_fetch`: what the control thread is asked for.
    pub(super) fn wanted(self: &Arc<Self>) -> Option<WantedKeys> {
        let wanted = WantedKeys { remote: Arc::downgrade(self), holds_listener: self.model.holds_listener };
        self.model.ahead.then_some(wanted)
    }

    /// The keys in force.
    pub(super) fn current(&self, now: Instant) -> Answer {
        self.current.load_full().filter(|fetched| fetched.until.is_none_or(|until| now < until))
    }

    /// Fetches, or waits for the fetch that is under way on this worker.
    pub(super) async fn fetched(self: &Arc<Self>, clusters: &Rc<WorkerClusters>) -> Answer {
        self.under_way(clusters).await
    }

    fn under_way(self: &Arc<Self>, clusters: &Rc<WorkerClusters>) -> Shared<Fetch> {
        UNDER_WAY.with_borrow_mut(|all| {
            if let Some(fetch) = all.get(&self.id).and_then(WeakShared::upgrade)
                && fetch.peek().is_none()
            {
                return fetch;
            }
            all.retain(|_, fetch| fetch.upgrade().is_some());
            let (remote, clusters) = (self.clone(), clusters.clone());
            let fetch = async move { remote.fetch(&clusters, Some(remote.model.cache)).await };
            let fetch = fetch.boxed_local().shared();
            if let Some(weak) = fetch.downgrade() {
                all.insert(self.id, weak);
            }
            fetch
        })
    }

    async fn fetch(&self, clusters: &WorkerClusters, lifetime: Option<Duration>) -> Answer {
        let asked = self.ask(clusters);
        let answer = match self.model.timeout {
            Some(timeout) => {
                sampan_core::time::timeout(timeout, asked).await.unwrap_or_else(|_| Err("timeout".to_owned()))
            }
            None => asked.await,
        };
        let counters = self.counters.get();
        match answer {
            Ok(keys) => {
                let until = lifetime.map(|lifetime| Instant::now() + lifetime);
                let fetched = Arc::new(Fetched { keys, until });
                self.current.store(Some(fetched.clone()));
                counters.inspect(|c| c.success.inc());
                Some(fetched)
            }
            Err(reason) => {
                // What requests bring about must not fill the log.
                let level = if lifetime.is_some() { Level::Debug } else { Level::Warn };
                let (host, path) = (&self.model.authority, &self.model.path);
                sampan_core::log!(Component::Jwt, level, "keys from {host}{path}: {reason}");
                counters.inspect(|c| c.failed.inc());
                None
            }
        }
    }

    /// Tries until there is an answer that is no server's error.
    async fn ask(&self, clusters: &WorkerClusters) -> Result<Jwks, String> {
        let timeout = self.model.try_timeout.into_iter().chain(self.model.timeout).min();
        let mut attempt = 0;
        loop {
            let request = Request { timeout, ..Request::new(&self.model.cluster, self.head(), Bytes::new()) };
            let asked = callout::ask(clusters, request).await;
            attempt += 1;
            let again = !matches!(&asked, Ok(answer) if answer.status < 500);
            if again && attempt < self.model.attempts {
                let pause = jittered(self.model.back_off, || FIRST_PAUSE, attempt - 1, clusters.random());
                sampan_core::time::sleep(pause).await;
                continue;
            }
            let answer = asked?;
            if answer.status != 200 {
                return Err(format!("status {}", answer.status));
            }
            return Jwks::parse(&answer.body).map_err(|status| status.text().to_owned());
        }
    }

    fn head(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(256, 8);
        headers.append(HeaderId::METHOD, "GET");
        headers.append(HeaderId::SCHEME, &self.model.scheme);
        headers.append(HeaderId::AUTHORITY, &self.model.authority);
        headers.append(HeaderId::PATH, &self.model.path);
        headers.append(HeaderId::USER_AGENT, "Go-browser");
        headers
    }
}

/// Keys that the control thread fetches ahead of requests (`async_fetch`), for as long as their listener lives.
pub struct WantedKeys {
    remote: Weak<Remote>,
    /// The listener serves after the first fetch, whatever came of it.
    pub holds_listener: bool,
}

impl WantedKeys {
    /// The URI of keys for whose first fetch the listener still waits.
    pub fn awaited(&self) -> Option<String> {
        let remote = self.remote.upgrade().filter(|_| self.holds_listener)?;
        (!remote.fetched_ahead.load(Ordering::Relaxed)).then(|| remote.model.uri.clone())
    }

    /// Fetches again and again; `first` is called after the first time.
    pub fn follow(
        &self,
        clusters: WorkerClusters,
        first: impl FnOnce() + 'static,
    ) -> impl Future<Output = ()> + 'static {
        let remote = self.remote.clone();
        async move {
            let mut first = Some(first);
            loop {
                let Some(pause) = fetch_ahead(&remote, &clusters).await else { return };
                if let Some(first) = first.take() {
                    first();
                }
                sampan_core::time::sleep(pause).await;
            }
        }
    }
}

/// Fetches once and says when to do so again; none where nobody wants the keys any more.
async fn fetch_ahead(remote: &Weak<Remote>, clusters: &WorkerClusters) -> Option<Duration> {
    let remote = remote.upgrade()?;
    let cache = remote.model.cache;
    let good = if cache > AHEAD { cache - AHEAD } else { cache };
    let answer = remote.fetch(clusters, None).await;
    remote.fetched_ahead.store(true, Ordering::Relaxed);
    // A pause of nothing would ask without end.
    Some(if answer.is_some() { good } else { remote.model.failed_pause }.max(Duration::from_millis(1)))
}
