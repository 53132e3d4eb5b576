//! Session resumption on the server's side.
//!
//! Tickets and the session cache belong to one context: a new certificate, a new validation context or another
//! filter chain has other keys and an empty cache, so that no session outlives the rules under which it was made
//! (CVE-2022-21654). With `session_ticket_keys` proxies share keys; a ticket then carries the mark of the context that made
//! it, which is that of every proxy with the same configuration. Its form is ours: Envoy does not read it. A resumed session's certificate is verified again as well, see `server`.
//!
//! Keys may come by SDS. A secret of another kind has none; as in Envoy it is taken, and nobody is served until keys come.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::digest::{SHA256, digest};
use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::downstream_tls_context::SessionTicketKeysType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type as SecretType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    DownstreamTlsContext, TlsSessionTicketKeys,
};
use rustls::server::{ProducesTickets, ServerSessionMemoryCache, StoresServerSessions};
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use crate::{SecretKind, StaticSecrets, data_source};

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
        Ok(Self::under(rustls::crypto::aws_lc_rs::Ticketer::new()?, timeout))
    }

    /// Tickets that `inner` makes.
    pub(crate) fn under(inner: Arc<dyn ProducesTickets>, timeout: Option<Duration>) -> Arc<Self> {
        let lifetime = timeout.unwrap_or(DEFAULT_LIFETIME).as_secs();
        Arc::new(Self { inner, lifetime: u32::try_from(lifetime).unwrap_or(u32::MAX) })
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

/// The length of a key in `session_ticket_keys`: a name of 16 bytes, then the secret.
const KEY_LENGTH: usize = 80;
const NAME_LENGTH: usize = 16;

struct SharedKey {
    name: [u8; NAME_LENGTH],
    key: RandomizedNonceKey,
}

/// Tickets under configured keys: the first encrypts, each decrypts what bears its name.
pub(crate) struct SharedKeys {
    keys: Vec<SharedKey>,
    /// The context's mark, authenticated with each ticket.
    context: [u8; 32],
}

/// The keys that are configured, and that must be there unless SDS brings them; none: the context makes its own.
pub(crate) fn configured<'a>(
    message: &'a DownstreamTlsContext,
    secrets: &'a StaticSecrets,
) -> ConfigResult<Option<&'a TlsSessionTicketKeys>> {
    match &message.session_ticket_keys_type {
        Some(SessionTicketKeysType::SessionTicketKeys(keys)) => Ok(Some(keys)),
        Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(config)) => {
            match secrets.get(SecretKind::SessionTicketKeys, config) {
                Some(SecretType::SessionTicketKeys(keys)) => Ok(Some(keys)),
                None if config.sds_config.is_none() => {
                    let reason = format!("Unknown tls session ticket keys: {}", config.name);
                    Err(ConfigError::new(reason).at("name").at("session_ticket_keys_sds_secret_config"))
                }
                _ => Ok(None),
            }
        }
        _ => Ok(None),
    }
}

/// Checks keys.
pub fn check(keys: &TlsSessionTicketKeys) -> ConfigResult<()> {
    SharedKeys::new(keys, &[]).map(drop)
}

impl SharedKeys {
    /// `context` is what tells the context from others; not the keys, so that they can be rotated.
    pub(crate) fn new(keys: &TlsSessionTicketKeys, context: &[u8]) -> ConfigResult<Self> {
        let one = |source: &DataSource| {
            let loaded = data_source::read(source)?;
            let Some((name, secret)) =
                loaded.bytes.split_first_chunk().filter(|_| loaded.bytes.len() == KEY_LENGTH)
            else {
                return Err(ConfigError::new(format!(
                    "Incorrect TLS session ticket key length. Length {}, expected length {KEY_LENGTH}.",
                    loaded.bytes.len()
                )));
            };
            let secret = digest(&SHA256, secret);
            let key = RandomizedNonceKey::new(&AES_256_GCM, secret.as_ref())
                .map_err(|e| ConfigError::new(e.to_string()))?;
            Ok(SharedKey { name: *name, key })
        };
        let one = |(i, source)| one(source).at_index("keys", i).at("session_ticket_keys");
        let keys = keys.keys.iter().enumerate().map(one);
        let mut mark = [0; 32];
        mark.copy_from_slice(digest(&SHA256, context).as_ref());
        Ok(Self { keys: keys.collect::<ConfigResult<_>>()?, context: mark })
    }
}

impl fmt::Debug for SharedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKeys")
    }
}

impl ProducesTickets for SharedKeys {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        DEFAULT_LIFETIME.as_secs() as u32
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let key = self.keys.first()?;
        let mut sealed = plain.to_vec();
        let nonce = key.key.seal_in_place_append_tag(Aad::from(&self.context), &mut sealed).ok()?;
        Some([&key.name[..], nonce.as_ref(), &sealed].concat())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let (name, rest) = cipher.split_first_chunk::<NAME_LENGTH>()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        let key = self.keys.iter().find(|key| key.name == *name)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::from(nonce);
        key.key.open_in_place(nonce, Aad::from(&self.context), &mut sealed).ok().map(|plain| plain.to_vec())
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

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;

    use super::*;

    fn keys(given: &[(u8, usize)]) -> TlsSessionTicketKeys {
        let source = |&(byte, length)| DataSource {
            specifier: Some(Specifier::InlineBytes(vec![byte; length])),
            ..Default::default()
        };
        TlsSessionTicketKeys { keys: given.iter().map(source).collect() }
    }

    #[test]
    fn proxies_with_the_same_keys_read_each_others_tickets() {
        let ours = SharedKeys::new(&keys(&[(1, 80)]), b"context").unwrap();
        let rotated = SharedKeys::new(&keys(&[(2, 80), (1, 80)]), b"context").unwrap();
        let ticket = ours.encrypt(b"session").unwrap();
        assert_eq!(ours.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(rotated.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(ours.decrypt(&rotated.encrypt(b"session").unwrap()), None);
        assert_ne!(ours.encrypt(b"session").unwrap(), ticket);
    }

    #[test]
    fn tickets_of_other_contexts_and_broken_ones_are_none() {
        let ours = SharedKeys::new(&keys(&[(1, 80)]), b"context").unwrap();
        let other = SharedKeys::new(&keys(&[(1, 80)]), b"another").unwrap();
        let mut ticket = ours.encrypt(b"session").unwrap();
        assert_eq!(other.decrypt(&ticket), None);
        assert_eq!(ours.decrypt(&ticket[..20]), None);
        *ticket.last_mut().unwrap() ^= 1;
        assert_eq!(ours.decrypt(&ticket), None);
        let short = check(&keys(&[(1, 80), (1, 3)])).unwrap_err().to_string();
        assert_eq!(
            short,
            "session_ticket_keys.keys[1]: Incorrect TLS session ticket key length. Length 3, expected length 80."
        );
    }
}
