//! Session resumption on the server's side.
//!
//! Tickets and the session cache belong to one context: a new certificate, a new validation context or another
//! filter chain has other keys and an empty cache, so that no session outlives the rules under which it was made
//! (CVE-2022-21654). A resumed session's certificate is verified again as well, see `server`.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::server::{ProducesTickets, ServerSessionMemoryCache, StoresServerSessions};

/// BoringSSL's default session lifetime.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(7200);
/// BoringSSL's default number of sessions in a context's cache.
const CACHE_SIZE: usize = 20_480;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Tickets that expire after `session_timeout`.
#[derive(Debug)]
pub(crate) struct Tickets {
    inner: Arc<dyn ProducesTickets>,
    lifetime: u32,
}

impl Tickets {
    pub(crate) fn new(timeout: Option<Duration>) -> Result<Arc<Self>, rustls::Error> {
        let lifetime = timeout.unwrap_or(DEFAULT_LIFETIME).as_secs();
        Ok(Arc::new(Self {
            inner: rustls::crypto::aws_lc_rs::Ticketer::new()?,
            lifetime: u32::try_from(lifetime).unwrap_or(u32::MAX),
        }))
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.inner.encrypt(&stamp(plain))
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        unstamp(&self.inner.decrypt(cipher)?, u64::from(self.lifetime))
    }
}

/// The cache for clients without tickets, made when the first of them comes; sessions in it expire likewise.
pub(crate) struct LazyCache {
    cache: OnceLock<Arc<ServerSessionMemoryCache>>,
    lifetime: u64,
}

impl LazyCache {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Self { cache: OnceLock::new(), lifetime: timeout.unwrap_or(DEFAULT_LIFETIME).as_secs() }
    }

    fn fresh(&self, stamped: &[u8]) -> Option<Vec<u8>> {
        unstamp(stamped, self.lifetime)
    }
}

impl fmt::Debug for LazyCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LazyCache")
    }
}

impl StoresServerSessions for LazyCache {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.cache.get_or_init(|| ServerSessionMemoryCache::new(CACHE_SIZE)).put(key, stamp(&value))
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.fresh(&self.cache.get()?.get(key)?)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.fresh(&self.cache.get()?.take(key)?)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// A session with the time of its making before it.
fn stamp(session: &[u8]) -> Vec<u8> {
    let mut stamped = Vec::with_capacity(8 + session.len());
    stamped.extend_from_slice(&now().to_be_bytes());
    stamped.extend_from_slice(session);
    stamped
}

/// The session, if it is young enough.
fn unstamp(stamped: &[u8], lifetime: u64) -> Option<Vec<u8>> {
    let (stamp, session) = stamped.split_first_chunk::<8>()?;
    let age = now().checked_sub(u64::from_be_bytes(*stamp))?;
    (age <= lifetime).then(|| session.to_vec())
}
