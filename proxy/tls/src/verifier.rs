//! The validation context in rustls's clothes, for both sides.
//!
//! The signature of the handshake is always verified, also where no validation context asks who the peer is: with
//! the bare key, so that certificates that webpki does not read (version 1) work where they are not verified.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, SignatureScheme,
};
use webpki::RawPublicKeyEntity;

use crate::cert_info::parse;
use crate::failure::tls_error;
use crate::params::Side;
use crate::stats::SslStats;
use crate::validation::{Refusal, Validator};

const PREFERRED: &[SignatureScheme] = &[
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PKCS1_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PKCS1_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PKCS1_SHA512,
];

/// What both verifiers share.
pub(crate) struct Verifier {
    pub(crate) validator: Arc<Validator>,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) stats: Arc<SslStats>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("validator", &self.validator).finish_non_exhaustive()
    }
}

impl Verifier {
    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
        tls13: bool,
    ) -> Result<HandshakeSignatureValid, Error> {
        let bad = |e| Error::InvalidCertificate(e);
        let parsed = parse(certificate).ok_or(bad(CertificateError::BadEncoding))?;
        let spki = SubjectPublicKeyInfoDer::from(parsed.public_key().raw);
        let entity = RawPublicKeyEntity::try_from(&spki).map_err(|_| bad(CertificateError::BadEncoding))?;
        let allowed = !tls13
            || !matches!(
                signed.scheme,
                SignatureScheme::RSA_PKCS1_SHA256
                    | SignatureScheme::RSA_PKCS1_SHA384
                    | SignatureScheme::RSA_PKCS1_SHA512
            );
        let (_, algorithms) = self
            .provider
            .signature_verification_algorithms
            .mapping
            .iter()
            .find(|(scheme, _)| *scheme == signed.scheme && allowed)
            .ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
        // In TLS 1.3 a scheme names its curve: the first algorithm is the one.
        let candidates = if tls13 { &algorithms[..1] } else { algorithms };
        for algorithm in candidates {
            match entity.verify_signature(*algorithm, message, signed.signature()) {
                Ok(()) => {
                    self.stats.on_signature(signed.scheme);
                    return Ok(HandshakeSignatureValid::assertion());
                }
                Err(webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_)) => {}
                Err(_) => return Err(bad(CertificateError::BadSignature)),
            }
        }
        Err(bad(CertificateError::BadSignature))
    }

    /// BoringSSL's order, so that peers choose what they choose with Envoy; then what only rustls knows.
    fn schemes(&self) -> Vec<SignatureScheme> {
        let mut schemes = self.provider.signature_verification_algorithms.supported_schemes();
        schemes.sort_by_key(|s| PREFERRED.iter().position(|p| p == s).unwrap_or(PREFERRED.len()));
        schemes
    }
}

fn chain<'a>(leaf: &CertificateDer<'a>, rest: &[CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf).chain(rest).cloned().collect()
}

/// Whether the key may sign a handshake, as its certificate says; all our suites have the server sign.
fn may_sign(leaf: &CertificateDer<'_>) -> bool {
    let Some(certificate) = parse(leaf) else { return false };
    match certificate.key_usage() {
        Ok(Some(usage)) => usage.value.digital_signature(),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// What both of rustls's traits want in the same words.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.verifier.signature(message, certificate, signed, false)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.verifier.signature(message, certificate, signed, true)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.verifier.schemes()
        }
    };
}

/// Verifies clients.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) verifier: Verifier,
    pub(crate) mandatory: bool,
    pub(crate) subjects: Vec<DistinguishedName>,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let v = &self.verifier;
        v.validator
            .verify(&chain(leaf, rest), Side::Server, None, &[], Some(&v.stats))
            .map(|_| ClientCertVerified::assertion())
            .map_err(tls_error)
    }

    signatures!();
}

/// Verifies servers.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    pub(crate) verifier: Verifier,
    /// Names of the connection's options.
    pub(crate) wanted: Vec<String>,
    /// Whether the server name that rustls hands over was really asked for.
    pub(crate) with_sni: bool,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let v = &self.verifier;
        if !may_sign(leaf) {
            return Err(tls_error(Refusal::KeyUsage));
        }
        if !v.validator.verifies() && self.wanted.is_empty() {
            return Ok(ServerCertVerified::assertion());
        }
        let name = name.to_str();
        v.validator
            .verify(
                &chain(leaf, rest),
                Side::Client,
                self.with_sni.then_some(&*name),
                &self.wanted,
                Some(&v.stats),
            )
            .map(|_| ServerCertVerified::assertion())
            .map_err(tls_error)
    }

    signatures!();
}
