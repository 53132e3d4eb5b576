//! The client's side.
//!
//! What a connection's options add (names to verify, other ALPN protocols) makes another rustls configuration;
//! those in use are kept, because rustls resumes a session only with the very verifier that made it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{CommonTlsContext, UpstreamTlsContext};
use rustls::ClientConfig;
use rustls::SignatureScheme;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use sampan_core::error::AtField;
use sampan_core::stats::Scope;
use sampan_core::stream_info::{CertInfo, TlsInfo};
use sampan_core::{ConfigError, ConfigResult};
use tokio_rustls::TlsConnector;

use crate::common::Common;
use crate::context::{ClientOptions, HandshakeError, LoadedCertificate, admin_certificate};
use crate::failure::{Opening, handshake_error, no_versions};
use crate::params::Side;
use crate::peers::Peers;
use crate::server::verify_again;
use crate::stats::SslStats;
use crate::validation::Validator;
use crate::verifier::{ServerVerifier, Verifier};
use crate::{StaticSecrets, Transport};

/// How many configurations of options are kept; past it they are made anew.
const VARIANTS: usize = 64;

/// An upstream TLS context, ready to connect.
pub struct ClientContext {
    sni: Option<String>,
    auto_host_sni: bool,
    unusable: bool,
    alpn: Vec<Vec<u8>>,
    base: ClientConfig,
    provider: Arc<CryptoProvider>,
    variants: Mutex<HashMap<Variant, Arc<ClientConfig>>>,
    validator: Arc<Validator>,
    local: Option<Arc<CertInfo>>,
    peers: Peers,
    stats: Arc<SslStats>,
    ca: Option<LoadedCertificate>,
    chains: Vec<LoadedCertificate>,
}

impl std::fmt::Debug for ClientContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientContext").field("sni", &self.sni).finish_non_exhaustive()
    }
}

/// What of the options is part of a configuration.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Variant {
    alpn: Vec<Vec<u8>>,
    verify_sans: Vec<String>,
    with_sni: bool,
}

/// Our certificate, offered whatever authorities the server names, as OpenSSL does.
#[derive(Debug)]
struct Only(Arc<CertifiedKey>);

impl ResolvesClientCert for Only {
    fn resolve(&self, _hints: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.key.choose_scheme(schemes).map(|_| self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ClientContext {
    /// A context of a cluster; its counters are made in `scope`, the cluster's.
    pub fn from_proto(
        message: &UpstreamTlsContext,
        secrets: &StaticSecrets,
        scope: &Scope,
    ) -> ConfigResult<Self> {
        if message.allow_renegotiation {
            return Err(ConfigError::unsupported("renegotiation").at("allow_renegotiation"));
        }
        if message.sni.len() > 255 {
            return Err(ConfigError::new("value length must be at most 255 bytes").at("sni"));
        }
        let sni = (!message.sni.is_empty()).then(|| message.sni.clone());
        if let Some(name) = &sni {
            server_name(name).ok_or_else(|| ConfigError::unsupported(format!("SNI '{name}'")).at("sni"))?;
        }
        let empty = CommonTlsContext::default();
        let common = message.common_tls_context.as_ref().unwrap_or(&empty);
        let auto = message.auto_sni_san_validation;
        let mut common = Common::from_proto(common, secrets, Side::Client, auto).at("common_tls_context")?;
        let stats = Arc::new(SslStats::new(scope));
        let (ca, chains) = common.loaded();
        common.count_expirations(&stats, ca.as_ref());
        let validator = common.take_validator();
        let sessions = message.max_session_keys.as_ref().map_or(1, |v| v.value as usize);
        let certificate = common.certificates.first();
        let verifier = verifier(&validator, &common.params.provider, &stats, Vec::new(), true);
        let builder = ClientConfig::builder_with_provider(common.params.provider.clone())
            .with_protocol_versions(&common.params.versions)
            .map_err(|e| ConfigError::new(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut base = match certificate {
            Some(c) => builder.with_client_cert_resolver(Arc::new(Only(c.key.clone()))),
            None => builder.with_no_client_auth(),
        };
        base.resumption = match sessions {
            0 => Resumption::disabled(),
            n => Resumption::in_memory_sessions(n),
        };
        Ok(Self {
            sni,
            auto_host_sni: message.auto_host_sni,
            unusable: common.params.unusable,
            alpn: common.alpn,
            base,
            provider: common.params.provider,
            variants: Mutex::default(),
            validator,
            local: certificate.map(|c| c.info.clone()),
            peers: Peers::default(),
            stats,
            ca,
            chains,
        })
    }

    /// Whether the server name is the host's name (`auto_host_sni`), for which the caller sets the option.
    pub fn auto_host_sni(&self) -> bool {
        self.auto_host_sni
    }

    /// Whether the context itself names ALPN protocols.
    pub fn has_alpn(&self) -> bool {
        !self.alpn.is_empty()
    }

    /// The client's side of a handshake. The error's text is empty where the peer just went away.
    pub async fn connect(
        &self,
        transport: Transport,
        options: &ClientOptions,
    ) -> Result<(Transport, TlsInfo), HandshakeError> {
        if self.unusable {
            return Err(no_versions(&self.stats));
        }
        let sni = options.sni.as_deref().or(self.sni.as_deref()).filter(|s| !s.is_empty());
        // rustls wants a name even if none is sent.
        let text = sni.unwrap_or("no-sni.invalid");
        let name = server_name(text).ok_or_else(|| {
            HandshakeError(format!("TLS_error:|invalid server name {text}:TLS_error_end").into())
        })?;
        let config = self.config(options, sni.is_some());
        let stream = TlsConnector::from(config)
            .connect(name, Box::new(transport))
            .await
            .map_err(|error| handshake_error(&error, &self.stats, Opening::Other))?;
        let connection = stream.get_ref().1;
        let validated =
            verify_again(connection, &self.validator, Side::Client, sni, &options.verify_sans, &self.stats)?;
        self.stats.on_handshake(connection);
        let info = self.peers.tls_info(connection, sni, self.local.clone(), validated);
        Ok((Transport::TlsClient(Box::new(stream)), info))
    }

    /// This context's entry in the admin's `/certs`.
    pub fn admin_certificate(&self) -> envoy_types::pb::envoy::admin::v3::Certificate {
        admin_certificate(self.ca.as_ref(), &self.chains)
    }

    /// What `/certs` shows: the trusted authority and the chain of this context.
    pub fn certs(&self) -> (Option<&LoadedCertificate>, &[LoadedCertificate]) {
        (self.ca.as_ref(), &self.chains)
    }

    fn config(&self, options: &ClientOptions, with_sni: bool) -> Arc<ClientConfig> {
        let alpn = if options.alpn.is_empty() { &self.alpn } else { &options.alpn };
        let variant = Variant { alpn: alpn.clone(), verify_sans: options.verify_sans.clone(), with_sni };
        let mut variants = self.variants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = variants.get(&variant) {
            return config.clone();
        }
        let mut config = self.base.clone();
        config.alpn_protocols = alpn.clone();
        config.enable_sni = with_sni;
        let wanted = options.verify_sans.clone();
        config.dangerous().set_certificate_verifier(verifier(
            &self.validator,
            &self.provider,
            &self.stats,
            wanted,
            with_sni,
        ));
        let config = Arc::new(config);
        if variants.len() >= VARIANTS {
            variants.clear();
        }
        variants.insert(variant, config.clone());
        config
    }
}

fn server_name(text: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(text).ok().map(|name| name.to_owned())
}

fn verifier(
    validator: &Arc<Validator>,
    provider: &Arc<CryptoProvider>,
    stats: &Arc<SslStats>,
    wanted: Vec<String>,
    with_sni: bool,
) -> Arc<ServerVerifier> {
    let verifier =
        Verifier { validator: validator.clone(), provider: provider.clone(), stats: stats.clone() };
    Arc::new(ServerVerifier { verifier, wanted, with_sni })
}
