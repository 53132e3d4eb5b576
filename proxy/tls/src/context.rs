//! TLS contexts: the border that listeners and clusters use.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use sampan_core::stream_info::CertInfo;
use thiserror::Error;

/// The bootstrap's `static_resources.secrets`, by name.
#[derive(Default, Clone)]
pub struct StaticSecrets(pub HashMap<String, Arc<Secret>>);

/// A certificate in use, as the admin's `/certs` shows it.
#[derive(Debug, Clone)]
pub struct LoadedCertificate {
    /// The file it came from, or `<inline>`.
    pub path: String,
    /// Its facts: serial number, names, validity.
    pub info: Arc<CertInfo>,
}

impl LoadedCertificate {
    /// Whole days until it expires; 0 once it has.
    pub fn days_until_expiration(&self) -> u64 {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
        u64::try_from(self.info.not_after.saturating_sub(now)).unwrap_or(0) / 86_400
    }
}

/// What a client handshake takes beyond its context.
#[derive(Debug, Default, Clone)]
pub struct ClientOptions {
    /// Server name in place of the context's (`auto_sni`, transport socket options).
    pub sni: Option<String>,
    /// Names one of which the certificate must carry (`auto_san_validation`).
    pub verify_sans: Vec<String>,
    /// ALPN protocols in place of the context's; empty: the context's.
    pub alpn: Vec<Vec<u8>>,
}

/// Why a handshake failed, as `*_TRANSPORT_FAILURE_REASON` prints it; empty where the peer just went away.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct HandshakeError(pub Arc<str>);
