//! The server's side: choosing a configuration by the ClientHello, then the handshake.
//!
//! rustls wants to know before the handshake what Envoy decides within it, so the ClientHello is read first and
//! one of a few configurations is taken:
//! - the certificate, by server name and by what signatures the client knows;
//! - with ALPN or without: no protocol in common means no ALPN in Envoy, a fatal alert in rustls;
//! - the order of cipher suites: TLS 1.3 follows the client, TLS 1.2 our list, and among suites of equal
//!   preference the client again.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::downstream_tls_context::{
    OcspStaplePolicy, SessionTicketKeysType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext,
};
use prost::Message as _;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ServerConfig, SupportedProtocolVersion, version};
use sampan_core::error::AtField;
use sampan_core::stats::Scope;
use sampan_core::stream_info::TlsInfo;
use sampan_core::{ConfigError, ConfigResult};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::{StartHandshake, TlsStream};

use crate::certificate::Certificate;
use crate::common::Common;
use crate::context::{HandshakeError, LoadedCertificate, admin_certificate};
use crate::failure::{Opening, handshake_error, no_versions, refusal_text};
use crate::params::Side;
use crate::peers::Peers;
use crate::sniff::Sniff;
use crate::stats::SslStats;
use crate::tickets::{self, LazyCache, SharedKeys, Tickets};
use crate::validation::{Trust, Validator};
use crate::verifier::{ClientVerifier, Verifier};
use crate::{StaticSecrets, Transport};

/// A downstream TLS context, ready to accept.
pub struct ServerContext {
    certificates: Vec<Certificate>,
    /// Positions of the certificates for a server name.
    names: HashMap<String, Vec<usize>>,
    full_scan: bool,
    alpn: Vec<Vec<u8>>,
    versions: Vec<&'static SupportedProtocolVersion>,
    provider: Arc<CryptoProvider>,
    prefer_client: bool,
    unusable: bool,
    configs: Configs,
    validator: Arc<Validator>,
    peers: Peers,
    stats: Arc<SslStats>,
    ca: Option<LoadedCertificate>,
    chains: Vec<LoadedCertificate>,
}

impl std::fmt::Debug for ServerContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerContext").field("chains", &self.chains).finish_non_exhaustive()
    }
}

/// In which order cipher suites are tried.
#[derive(Clone, Copy)]
enum Order {
    Client = 0,
    Server = 1,
    /// The server's, with groups of equal preference the other way round.
    Alternate = 2,
}

/// The configurations, each made when a ClientHello first wants it.
struct Configs {
    base: ServerConfig,
    alternate: Option<ServerConfig>,
    made: Vec<OnceLock<Arc<ServerConfig>>>,
}

/// How many configurations there are for one certificate: orders times ALPN.
const VARIANTS: usize = 6;

/// A resolver that knows one certificate.
#[derive(Debug)]
struct Only(Arc<CertifiedKey>);

impl ResolvesServerCert for Only {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ServerContext {
    /// A context of a filter chain; its counters (`ssl.handshake`, …) are made in `scope`, the listener's.
    pub fn from_proto(
        message: &DownstreamTlsContext,
        secrets: &StaticSecrets,
        scope: &Scope,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let empty = CommonTlsContext::default();
        let common = message.common_tls_context.as_ref().unwrap_or(&empty);
        let mut common = Common::from_proto(common, secrets, Side::Server, false).at("common_tls_context")?;
        let stats = Arc::new(SslStats::new(scope));
        let (ca, chains) = common.loaded();
        common.count_expirations(&stats, ca.as_ref());
        let validator = common.take_validator();
        let tickets = tickets(message, secrets, &common, ca.as_ref())?;
        let configs = Configs::new(message, tickets, &common, &validator, &stats)?;
        Ok(Self {
            names: names(&common.certificates),
            full_scan: message.full_scan_certs_on_sni_mismatch.as_ref().is_some_and(|v| v.value),
            certificates: common.certificates,
            alpn: common.alpn,
            versions: common.params.versions,
            provider: common.params.provider,
            prefer_client: message.prefer_client_ciphers,
            unusable: common.params.unusable,
            configs,
            validator,
            peers: Peers::default(),
            stats,
            ca,
            chains,
        })
    }

    /// The server's side of a handshake. The error's text is empty where the peer just went away.
    pub async fn accept(&self, transport: Transport) -> Result<(Transport, TlsInfo), HandshakeError> {
        if self.unusable {
            return Err(no_versions(&self.stats));
        }
        let mut acceptor =
            LazyConfigAcceptor::new(rustls::server::Acceptor::default(), Sniff::new(Box::new(transport)));
        let start = match (&mut acceptor).await {
            Ok(start) => start,
            Err(error) => {
                let opening = acceptor.take_io().map_or(Opening::Other, |io| io.opening());
                return Err(handshake_error(&error, &self.stats, opening));
            }
        };
        let (certificate, config) = self.choose(&start.client_hello());
        let opening = start.io.opening();
        let start = StartHandshake::from_parts(start.accepted, start.io.inner);
        let stream =
            start.into_stream(config).await.map_err(|error| handshake_error(&error, &self.stats, opening))?;
        let info = self.finish(&stream, certificate)?;
        Ok((Transport::TlsServer(Box::new(stream)), info))
    }

    /// This context's entry in the admin's `/certs`.
    pub fn admin_certificate(&self) -> envoy_types::pb::envoy::admin::v3::Certificate {
        admin_certificate(self.ca.as_ref(), &self.chains)
    }

    /// What `/certs` shows: the trusted authority and the chains of this context.
    pub fn certs(&self) -> (Option<&LoadedCertificate>, &[LoadedCertificate]) {
        (self.ca.as_ref(), &self.chains)
    }

    fn finish(
        &self,
        stream: &TlsStream<Box<Transport>>,
        certificate: &Certificate,
    ) -> Result<TlsInfo, HandshakeError> {
        let connection = stream.get_ref().1;
        let validated = verify_again(connection, &self.validator, Side::Server, None, &[], &self.stats)?;
        self.stats.on_handshake(connection);
        Ok(self.peers.tls_info(
            connection,
            connection.server_name(),
            Some(certificate.info.clone()),
            validated,
        ))
    }

    fn choose(&self, hello: &ClientHello<'_>) -> (&Certificate, Arc<ServerConfig>) {
        let at = self.choose_certificate(hello);
        let alpn = match hello.alpn() {
            Some(mut offered) => offered.any(|o| self.alpn.iter().any(|a| a == o)),
            None => true,
        };
        let config = self.configs.get(at, self.order(hello), alpn, &self.certificates[at], &self.alpn);
        (&self.certificates[at], config)
    }

    fn order(&self, hello: &ClientHello<'_>) -> Order {
        let offered = hello.cipher_suites();
        let tls13 = self.versions.contains(&&version::TLS13)
            && offered.iter().any(|s| {
                matches!(
                    s,
                    CipherSuite::TLS13_AES_128_GCM_SHA256
                        | CipherSuite::TLS13_AES_256_GCM_SHA384
                        | CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
                )
            });
        if tls13 || self.prefer_client {
            return Order::Client;
        }
        let Some(alternate) = &self.configs.alternate else { return Order::Server };
        // The client's favourite of ours: where both lists agree to put it first in its group, that one counts.
        let ours = |p: &CryptoProvider| p.cipher_suites.iter().map(|s| s.suite()).collect::<Vec<_>>();
        let (normal, reversed) = (ours(&self.provider), ours(alternate.crypto_provider()));
        let position = |list: &[CipherSuite], suite| list.iter().position(|s| *s == suite);
        match offered.iter().find(|s| position(&normal, **s) != position(&reversed, **s)) {
            Some(first) if position(&reversed, *first) < position(&normal, *first) => Order::Alternate,
            _ => Order::Server,
        }
    }

    /// Envoy's choice: names first, then a wildcard for one label, then (if wanted) all; ECDSA before RSA where
    /// the client knows it.
    fn choose_certificate(&self, hello: &ClientHello<'_>) -> usize {
        if self.certificates.len() == 1 {
            return 0;
        }
        let schemes = hello.signature_schemes();
        let fits = |c: &Certificate| c.key.key.choose_scheme(schemes).is_some();
        let ecdsa_client = self.certificates.iter().any(|c| c.is_ecdsa() && fits(c))
            || schemes.iter().any(|s| {
                matches!(
                    s,
                    rustls::SignatureScheme::ECDSA_NISTP256_SHA256
                        | rustls::SignatureScheme::ECDSA_NISTP384_SHA384
                        | rustls::SignatureScheme::ECDSA_NISTP521_SHA512
                )
            });
        let best = |positions: &mut dyn Iterator<Item = usize>| {
            let mut candidate = None;
            for at in positions {
                let certificate = &self.certificates[at];
                if certificate.is_ecdsa() {
                    if ecdsa_client && fits(certificate) {
                        return Some(at);
                    }
                } else if !ecdsa_client {
                    return Some(at);
                } else {
                    candidate = candidate.or(Some(at));
                }
            }
            candidate
        };
        let named = |name: &str| best(&mut self.names.get(name).into_iter().flatten().copied());
        if let Some(sni) = hello.server_name() {
            if let Some(at) = named(sni) {
                return at;
            }
            let wildcard = sni.char_indices().skip(1).find(|(_, c)| *c == '.').map(|(i, _)| &sni[i..]);
            if let Some(at) = wildcard.filter(|w| w.len() > 1).and_then(named) {
                return at;
            }
            if !self.full_scan {
                return 0;
            }
        }
        best(&mut (0..self.certificates.len())).unwrap_or(0)
    }
}

/// Verifies what the handshake did not: a resumed session's certificate, whose time or rules may have passed, and
/// whether an untrusted certificate that was taken would have been verified.
pub(crate) fn verify_again(
    connection: &rustls::CommonState,
    validator: &Validator,
    side: Side,
    sni: Option<&str>,
    wanted: &[String],
    stats: &SslStats,
) -> Result<bool, HandshakeError> {
    let Some(chain) = connection.peer_certificates().filter(|c| !c.is_empty()) else { return Ok(false) };
    if !validator.verifies() && wanted.is_empty() {
        return Ok(false);
    }
    let resumed = connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
    if !resumed && !validator.accept_untrusted {
        return Ok(true);
    }
    validator
        .verify(chain, side, sni, wanted, resumed.then_some(stats))
        .map_err(|refusal| HandshakeError(refusal_text(&refusal).into()))
}

fn names(certificates: &[Certificate]) -> HashMap<String, Vec<usize>> {
    let mut names: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, certificate) in certificates.iter().enumerate() {
        for name in &certificate.server_names {
            // SNI comes in lower case; of two certificates with the same kind of key the earlier one wins.
            let positions = names.entry(name.to_ascii_lowercase()).or_default();
            if !positions.iter().any(|p| certificates[*p].is_ecdsa() == certificate.is_ecdsa()) {
                positions.push(at);
            }
        }
    }
    names
}

/// Checks what can be checked before the secrets are there.
pub(crate) fn precheck(message: &DownstreamTlsContext, secrets: &StaticSecrets) -> ConfigResult<()> {
    refuse_unsupported(message)?;
    session_timeout(message)?;
    tickets::configured(message, secrets)?.map_or(Ok(()), tickets::check)?;
    let empty = CommonTlsContext::default();
    let common = message.common_tls_context.as_ref().unwrap_or(&empty);
    Common::precheck(common, Side::Server).at("common_tls_context")
}

fn refuse_unsupported(message: &DownstreamTlsContext) -> ConfigResult<()> {
    if message.require_sni.as_ref().is_some_and(|v| v.value) {
        return Err(ConfigError::unsupported("requiring SNI").at("require_sni"));
    }
    if message.ocsp_staple_policy != i32::from(OcspStaplePolicy::LenientStapling) {
        return Err(ConfigError::unsupported("OCSP stapling").at("ocsp_staple_policy"));
    }
    Ok(())
}

/// None where stateless resumption is off.
fn tickets(
    message: &DownstreamTlsContext,
    secrets: &StaticSecrets,
    common: &Common,
    ca: Option<&LoadedCertificate>,
) -> ConfigResult<Option<Arc<Tickets>>> {
    let timeout = session_timeout(message)?;
    if let Some(keys) = tickets::configured(message, secrets)? {
        let keys = SharedKeys::new(keys, &mark(message, common, ca))?;
        return Ok(Some(Tickets::under(Arc::new(keys), timeout)));
    }
    match message.session_ticket_keys_type {
        Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)) => Ok(None),
        _ => Tickets::new(timeout).map(Some).map_err(|e| ConfigError::new(e.to_string())),
    }
}

/// What tells a context whose tickets others can read from another context: certificates by whom they name, as in Envoy, so that a
/// session outlives their rotation; the rest of the configuration as it stands; the authority, which a secret may have changed.
fn mark(message: &DownstreamTlsContext, common: &Common, ca: Option<&LoadedCertificate>) -> Vec<u8> {
    let mut rules = DownstreamTlsContext { session_ticket_keys_type: None, ..message.clone() };
    if let Some(common) = &mut rules.common_tls_context {
        common.tls_certificates.clear();
        common.tls_certificate_sds_secret_configs.clear();
    }
    let mut mark = rules.encode_length_delimited_to_vec();
    let mut add = |text: &str| {
        mark.extend_from_slice(text.as_bytes());
        mark.push(0);
    };
    for certificate in &common.certificates {
        let info = &certificate.info;
        add(&info.subject);
        add(&info.issuer);
        [&info.dns_sans, &info.uri_sans, &info.ip_sans].into_iter().flatten().for_each(|name| add(name));
    }
    add(ca.map_or("", |ca| &ca.info.sha256));
    mark
}

fn session_timeout(message: &DownstreamTlsContext) -> ConfigResult<Option<Duration>> {
    let Some(timeout) = &message.session_timeout else { return Ok(None) };
    match u64::try_from(timeout.seconds) {
        Ok(seconds) if seconds < 4_294_967_296 => Ok(Some(Duration::from_secs(seconds))),
        _ => Err(ConfigError::new("value must be inside range [0s, 4294967296s)").at("session_timeout")),
    }
}

impl Configs {
    fn new(
        message: &DownstreamTlsContext,
        tickets: Option<Arc<Tickets>>,
        common: &Common,
        validator: &Arc<Validator>,
        stats: &Arc<SslStats>,
    ) -> ConfigResult<Self> {
        let verifier = verifier(message, common, validator, stats);
        let build = |provider: &Arc<CryptoProvider>| {
            let mut config = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&common.params.versions)
                .map_err(|e| ConfigError::new(e.to_string()))?
                .with_client_cert_verifier(verifier.clone())
                .with_cert_resolver(Arc::new(Only(common.certificates[0].key.clone())));
            config.session_storage = Arc::new(NoServerSessionStorage {});
            Ok(config)
        };
        let mut base = build(&common.params.provider)?;
        let mut alternate = common.params.alternate.as_ref().map(build).transpose()?;
        // rustls fills the cache even for clients that take tickets, peers' chains and all; with tickets on, it
        // would be memory for nobody.
        let stateful = tickets.is_none() && !message.disable_stateful_session_resumption;
        let timeout = session_timeout(message)?;
        let cache = stateful.then(|| Arc::new(LazyCache::new(timeout)));
        for config in std::iter::once(&mut base).chain(alternate.as_mut()) {
            match &tickets {
                Some(tickets) => config.ticketer = tickets.clone(),
                // TLS 1.3 resumes with tickets only.
                None => config.send_tls13_tickets = 0,
            }
            if let Some(cache) = &cache {
                config.session_storage = cache.clone();
            }
        }
        let made = (0..common.certificates.len() * VARIANTS).map(|_| OnceLock::new()).collect();
        Ok(Self { base, alternate, made })
    }

    fn get(
        &self,
        at: usize,
        order: Order,
        with_alpn: bool,
        certificate: &Certificate,
        alpn: &[Vec<u8>],
    ) -> Arc<ServerConfig> {
        let slot = at * VARIANTS + order as usize * 2 + usize::from(with_alpn);
        self.made[slot]
            .get_or_init(|| {
                let mut config = match (order, &self.alternate) {
                    (Order::Alternate, Some(alternate)) => alternate.clone(),
                    _ => self.base.clone(),
                };
                config.ignore_client_order = !matches!(order, Order::Client);
                config.cert_resolver = Arc::new(Only(certificate.key.clone()));
                config.alpn_protocols = if with_alpn { alpn.to_vec() } else { Vec::new() };
                Arc::new(config)
            })
            .clone()
    }
}

fn verifier(
    message: &DownstreamTlsContext,
    common: &Common,
    validator: &Arc<Validator>,
    stats: &Arc<SslStats>,
) -> Arc<dyn rustls::server::danger::ClientCertVerifier> {
    if !validator.verifies() {
        // As in Envoy, requiring a certificate means nothing without something to verify it with.
        return WebPkiClientVerifier::no_client_auth();
    }
    let required = message.require_client_certificate.as_ref().is_some_and(|v| v.value);
    // Matchers refuse a client without a certificate even if none is required, unless untrusted ones are taken.
    let mandatory = validator.spiffe.is_some()
        || (required && validator.trust.is_some())
        || (validator.has_matchers() && !validator.accept_untrusted);
    let hide = common.validation.as_ref().is_some_and(|v| v.suppress_client_ca_list);
    let subjects = match (&validator.spiffe, &validator.trust) {
        _ if hide => Vec::new(),
        (Some(spiffe), _) => spiffe.subjects(),
        (None, trust) => trust.as_ref().map(Trust::subjects).unwrap_or_default(),
    };
    Arc::new(ClientVerifier {
        verifier: Verifier {
            validator: validator.clone(),
            provider: common.params.provider.clone(),
            stats: stats.clone(),
        },
        mandatory,
        subjects,
    })
}
