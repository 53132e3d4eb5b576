//! `TlsCertificate`: a chain and its key, checked at load.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::TlsCertificate;
use rustls::SignatureAlgorithm;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sampan_core::error::AtField;
use sampan_core::stream_info::CertInfo;
use sampan_core::{ConfigError, ConfigResult};
use x509_parser::certificate::X509Certificate;
use x509_parser::public_key::PublicKey;

use crate::cert_info::{cert_info, parse};
use crate::data_source::{self, Loaded};

/// A certificate that we present.
#[derive(Debug)]
pub(crate) struct Certificate {
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) info: Arc<CertInfo>,
    /// The file, or `<inline>`.
    pub(crate) path: String,
    /// The name in `ssl.certificate.NAME.…`.
    pub(crate) stat_name: String,
    /// The names for which it is chosen: DNS names, else the common name; `*.` cut down to `.`.
    pub(crate) server_names: Vec<String>,
}

impl Certificate {
    /// Loads a certificate; `name` is the static secret's, if it comes from one.
    pub(crate) fn from_proto(message: &TlsCertificate, name: Option<&str>) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let chain = data_source::read_field(message.certificate_chain.as_ref(), "certificate_chain")?
            .ok_or_else(|| {
                ConfigError::new("Failed to load incomplete certificate from : certificate chain not set")
                    .at("certificate_chain")
            })?;
        let key = data_source::read_field(message.private_key.as_ref(), "private_key")?.ok_or_else(|| {
            ConfigError::new("Failed to load incomplete private key from path: ").at("private_key")
        })?;
        let certificates = certificates(&chain).at("certificate_chain")?;
        let broken = || {
            ConfigError::new(format!("Failed to load certificate chain from {}", chain.path))
                .at("certificate_chain")
        };
        let leaf = certificates.first().ok_or_else(broken)?;
        let parsed = parse(leaf).ok_or_else(broken)?;
        check_public_key(&parsed, &chain.path).at("certificate_chain")?;
        let server_names = server_names(&parsed);
        let info = Arc::new(cert_info(leaf));
        let key = certified_key(certificates.clone(), &key).at("private_key")?;
        // Envoy hashes the inline bytes only: all certificates from files share one name.
        let stat_name = name.map_or_else(|| unnamed("unnamed_cert_", inline_bytes(message)), str::to_owned);
        Ok(Self { key: Arc::new(key), info, path: chain.path, stat_name, server_names })
    }

    /// Whether its key is an ECDSA key.
    pub(crate) fn is_ecdsa(&self) -> bool {
        self.key.key.algorithm() == SignatureAlgorithm::ECDSA
    }
}

fn inline_bytes(message: &TlsCertificate) -> &[u8] {
    use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
    match message.certificate_chain.as_ref().and_then(|c| c.specifier.as_ref()) {
        Some(Specifier::InlineBytes(bytes)) => bytes,
        _ => &[],
    }
}

/// The name of a certificate without one: a prefix and the beginning of the hash of its inline bytes.
pub(crate) fn unnamed(prefix: &str, inline: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, inline);
    format!("{prefix}{}", &sampan_core::format::hex(digest.as_ref())[..8])
}

fn refuse_unsupported(message: &TlsCertificate) -> ConfigResult<()> {
    let refuse = |set: bool, field: &str, what: &str| {
        if set { Err(ConfigError::unsupported(what).at(field)) } else { Ok(()) }
    };
    refuse(message.pkcs12.is_some(), "pkcs12", "a PKCS#12 file")?;
    refuse(message.private_key_provider.is_some(), "private_key_provider", "a private key provider")?;
    refuse(message.password.is_some(), "password", "an encrypted private key")?;
    refuse(message.ocsp_staple.is_some(), "ocsp_staple", "an OCSP staple")?;
    refuse(message.tls_params.is_some(), "tls_params", "TLS parameters of one certificate")?;
    refuse(
        !message.signed_certificate_timestamp.is_empty(),
        "signed_certificate_timestamp",
        "a signed certificate timestamp",
    )
}

/// All certificates of a PEM file.
pub(crate) fn certificates(loaded: &Loaded) -> ConfigResult<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(&loaded.bytes).collect::<Result<_, _>>().map_err(|e: pem::Error| {
        ConfigError::new(format!("Failed to load certificate chain from {}: {e:?}", loaded.path))
    })
}

fn certified_key(chain: Vec<CertificateDer<'static>>, key: &Loaded) -> ConfigResult<CertifiedKey> {
    let failed = |cause: String| {
        ConfigError::new(format!("Failed to load private key from {}, Cause: {cause}", key.path))
    };
    let der = PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|e| failed(format!("{e:?}")))?;
    let signer = any_supported_type(&der).map_err(|e| failed(e.to_string()))?;
    let certified = CertifiedKey::new(chain, signer);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        // The key could not tell; signing will.
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(certified),
        Err(_) => Err(failed("KEY_VALUES_MISMATCH".into())),
    }
}

fn check_public_key(certificate: &X509Certificate<'_>, path: &str) -> ConfigResult<()> {
    match certificate.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < 2048 => Err(ConfigError::new(format!(
            "Failed to load certificate chain from {path}, only RSA certificates with 2048-bit or larger keys \
             are supported"
        ))),
        Ok(PublicKey::EC(point)) if !matches!(point.key_size(), 256 | 384 | 521 | 528) => {
            Err(ConfigError::new(format!(
                "Failed to load certificate chain from {path}, only P-256, P-384 or P-521 ECDSA certificates \
                 are supported"
            )))
        }
        _ => Ok(()),
    }
}

fn server_names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let cut = |name: &str| name.strip_prefix('*').filter(|r| r.starts_with('.')).unwrap_or(name).to_owned();
    if certificate.subject_alternative_name().is_ok_and(|e| e.is_some()) {
        return crate::san::sans(certificate)
            .iter()
            .filter(|s| s.kind == crate::san::Kind::Dns)
            .map(|s| cut(&s.value))
            .collect();
    }
    certificate
        .subject()
        .iter_common_name()
        .next()
        .and_then(|cn| cn.as_str().ok())
        .filter(|cn| !cn.is_empty())
        .map(cut)
        .into_iter()
        .collect()
}
