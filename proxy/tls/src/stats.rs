//! The counters of a context, under `ssl.` of the listener's or cluster's scope.
//!
//! The counters per cipher suite, version, curve and signature algorithm come to be with the first handshake
//! that used them, as in Envoy; later handshakes find the handle without a lock.

use std::sync::OnceLock;

use rustls::{CipherSuite, NamedGroup, ProtocolVersion, SignatureScheme};
use sampan_core::stats::{Counter, Scope};

/// The names OpenSSL gives to what rustls can negotiate.
const CIPHERS: &[(CipherSuite, &str)] = &[
    (CipherSuite::TLS13_AES_128_GCM_SHA256, "TLS_AES_128_GCM_SHA256"),
    (CipherSuite::TLS13_AES_256_GCM_SHA384, "TLS_AES_256_GCM_SHA384"),
    (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, "TLS_CHACHA20_POLY1305_SHA256"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, "ECDHE-ECDSA-AES128-GCM-SHA256"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, "ECDHE-RSA-AES128-GCM-SHA256"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, "ECDHE-ECDSA-AES256-GCM-SHA384"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, "ECDHE-RSA-AES256-GCM-SHA384"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE-ECDSA-CHACHA20-POLY1305"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE-RSA-CHACHA20-POLY1305"),
];

const VERSIONS: &[(ProtocolVersion, &str)] =
    &[(ProtocolVersion::TLSv1_2, "TLSv1.2"), (ProtocolVersion::TLSv1_3, "TLSv1.3")];

const CURVES: &[(NamedGroup, &str)] = &[
    (NamedGroup::X25519, "X25519"),
    (NamedGroup::secp256r1, "P-256"),
    (NamedGroup::secp384r1, "P-384"),
    (NamedGroup::X25519MLKEM768, "X25519MLKEM768"),
];

const SIGNATURES: &[(SignatureScheme, &str)] = &[
    (SignatureScheme::ECDSA_NISTP256_SHA256, "ecdsa_secp256r1_sha256"),
    (SignatureScheme::ECDSA_NISTP384_SHA384, "ecdsa_secp384r1_sha384"),
    (SignatureScheme::ECDSA_NISTP521_SHA512, "ecdsa_secp521r1_sha512"),
    (SignatureScheme::RSA_PSS_SHA256, "rsa_pss_rsae_sha256"),
    (SignatureScheme::RSA_PSS_SHA384, "rsa_pss_rsae_sha384"),
    (SignatureScheme::RSA_PSS_SHA512, "rsa_pss_rsae_sha512"),
    (SignatureScheme::RSA_PKCS1_SHA256, "rsa_pkcs1_sha256"),
    (SignatureScheme::RSA_PKCS1_SHA384, "rsa_pkcs1_sha384"),
    (SignatureScheme::RSA_PKCS1_SHA512, "rsa_pkcs1_sha512"),
    (SignatureScheme::ED25519, "ed25519"),
];

fn name_of<T: PartialEq>(table: &'static [(T, &'static str)], value: &T) -> &'static str {
    table.iter().find(|(v, _)| v == value).map_or("", |(_, name)| name)
}

/// `ECDHE-RSA-AES128-GCM-SHA256` and the like.
pub(crate) fn cipher_name(suite: CipherSuite) -> &'static str {
    name_of(CIPHERS, &suite)
}

/// `TLSv1.3`
pub(crate) fn version_name(version: ProtocolVersion) -> &'static str {
    name_of(VERSIONS, &version)
}

/// `X25519`
pub(crate) fn curve_name(group: NamedGroup) -> &'static str {
    name_of(CURVES, &group)
}

/// A family of counters, one per known value, made on first use.
struct Family<T: 'static> {
    prefix: &'static str,
    table: &'static [(T, &'static str)],
    counters: Box<[OnceLock<Counter>]>,
}

impl<T: PartialEq> Family<T> {
    fn new(prefix: &'static str, table: &'static [(T, &'static str)]) -> Self {
        Self { prefix, table, counters: table.iter().map(|_| OnceLock::new()).collect() }
    }

    fn inc(&self, scope: &Scope, value: &T) {
        if let Some(at) = self.table.iter().position(|(v, _)| v == value) {
            self.counters[at]
                .get_or_init(|| scope.counter(&format!("{}.{}", self.prefix, self.table[at].1)))
                .inc();
        }
    }
}

/// The counters of one context.
pub(crate) struct SslStats {
    scope: Scope,
    pub(crate) connection_error: Counter,
    pub(crate) handshake: Counter,
    pub(crate) session_reused: Counter,
    pub(crate) no_certificate: Counter,
    pub(crate) fail_verify_no_cert: Counter,
    pub(crate) fail_verify_error: Counter,
    pub(crate) fail_verify_san: Counter,
    pub(crate) fail_verify_cert_hash: Counter,
    ciphers: Family<CipherSuite>,
    versions: Family<ProtocolVersion>,
    curves: Family<NamedGroup>,
    signatures: Family<SignatureScheme>,
}

impl std::fmt::Debug for SslStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SslStats")
    }
}

impl SslStats {
    pub(crate) fn new(scope: &Scope) -> Self {
        let counter = |name: &str| scope.counter(&format!("ssl.{name}"));
        // The staples' and the key usage's counters exist in Envoy even though nothing here counts them.
        for name in [
            "ocsp_staple_failed",
            "ocsp_staple_omitted",
            "ocsp_staple_responses",
            "ocsp_staple_requests",
            "was_key_usage_invalid",
        ] {
            counter(name);
        }
        Self {
            scope: scope.clone(),
            connection_error: counter("connection_error"),
            handshake: counter("handshake"),
            session_reused: counter("session_reused"),
            no_certificate: counter("no_certificate"),
            fail_verify_no_cert: counter("fail_verify_no_cert"),
            fail_verify_error: counter("fail_verify_error"),
            fail_verify_san: counter("fail_verify_san"),
            fail_verify_cert_hash: counter("fail_verify_cert_hash"),
            ciphers: Family::new("ssl.ciphers", CIPHERS),
            versions: Family::new("ssl.versions", VERSIONS),
            curves: Family::new("ssl.curves", CURVES),
            signatures: Family::new("ssl.sigalgs", SIGNATURES),
        }
    }

    /// A handshake that is complete.
    pub(crate) fn on_handshake(&self, connection: &rustls::CommonState) {
        self.handshake.inc();
        if connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed) {
            self.session_reused.inc();
        }
        if let Some(suite) = connection.negotiated_cipher_suite() {
            self.ciphers.inc(&self.scope, &suite.suite());
        }
        if let Some(version) = connection.protocol_version() {
            self.versions.inc(&self.scope, &version);
        }
        if let Some(group) = connection.negotiated_key_exchange_group() {
            self.curves.inc(&self.scope, &group.name());
        }
        if connection.peer_certificates().is_none_or(<[_]>::is_empty) {
            self.no_certificate.inc();
        }
    }

    /// A signature of the peer that was valid.
    pub(crate) fn on_signature(&self, scheme: SignatureScheme) {
        self.signatures.inc(&self.scope, &scheme);
    }

    /// `ssl.certificate.NAME.expiration_unix_time_seconds`
    pub(crate) fn set_expiration(&self, certificate: &str, seconds: i64) {
        self.scope
            .gauge(&format!("ssl.certificate.{certificate}.expiration_unix_time_seconds"))
            .set(u64::try_from(seconds).unwrap_or(0));
    }
}
