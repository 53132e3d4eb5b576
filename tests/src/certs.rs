//! The certificates of the test world, made anew in every run of the harness.
//!
//! `ca` signs `server` (server.test, *.wild.test), `other` (other.test), `client` (spiffe://td/ns/a/sa/client, client.test) and
//! `upstream` (upstream.test, spiffe://td/ns/b/sa/up); `rogue-ca` signs `rogue`, with the same names as `client`.
//! SPIFFE identities whose keys may only sign handshakes: `svid` (spiffe://td/ns/a/sa/svid), `svid-b` (spiffe://td/ns/b/sa/svid),
//! `svid-rogue`, and `svid-mesh` (spiffe://cluster.local/ns/vmns/sa/hello).

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};

use crate::case::{ClientTls, UpstreamTls};
use crate::error::{Context, Error, Result};

/// Where the certificates lie.
pub struct Certs {
    dir: PathBuf,
}

fn tls_error(error: impl std::fmt::Display) -> Error {
    Error::Case(format!("certificates: {error}"))
}

impl Certs {
    /// Makes all certificates in `dir`.
    pub fn make(dir: &Path) -> Result<Certs> {
        fs::create_dir_all(dir).trying("make the certificates' folder")?;
        let certs = Certs { dir: dir.to_path_buf() };
        let ca = certs.authority("ca")?;
        let rogue = certs.authority("rogue-ca")?;
        certs.leaf("server", &["server.test", "*.wild.test"], None, &ca)?;
        certs.leaf("other", &["other.test"], None, &ca)?;
        certs.leaf("client", &["client.test"], Some("spiffe://td/ns/a/sa/client"), &ca)?;
        certs.leaf("upstream", &["upstream.test"], Some("spiffe://td/ns/b/sa/up"), &ca)?;
        certs.of_purpose("server-only", ExtendedKeyUsagePurpose::ServerAuth, &ca)?;
        certs.of_purpose("client-only", ExtendedKeyUsagePurpose::ClientAuth, &ca)?;
        certs.svid("svid", "spiffe://td/ns/a/sa/svid", &ca)?;
        certs.svid("svid-b", "spiffe://td/ns/b/sa/svid", &ca)?;
        certs.svid("svid-mesh", "spiffe://cluster.local/ns/vmns/sa/hello", &ca)?;
        certs.svid("svid-rogue", "spiffe://td/ns/a/sa/svid", &rogue)?;
        certs.leaf("rogue", &["client.test", "server.test"], Some("spiffe://td/ns/a/sa/client"), &rogue)?;
        Ok(certs)
    }

    /// The folder, for `{{certs}}`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn write(&self, name: &str, pem: String, key: &KeyPair) -> Result<()> {
        fs::write(self.dir.join(format!("{name}.pem")), pem).trying("write a certificate")?;
        fs::write(self.dir.join(format!("{name}.key")), key.serialize_pem()).trying("write a key")
    }

    fn authority(&self, name: &str) -> Result<Issuer<'static, KeyPair>> {
        let key = KeyPair::generate().map_err(tls_error)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(tls_error)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).map_err(tls_error)?;
        self.write(name, certificate.pem(), &key)?;
        Ok(Issuer::new(params, key))
    }

    /// A SPIFFE identity: unlike the other leaves it says what its key may do.
    fn svid(&self, name: &str, uri: &str, ca: &Issuer<'_, KeyPair>) -> Result<()> {
        let key = KeyPair::generate().map_err(tls_error)?;
        let mut params = CertificateParams::new(Vec::new()).map_err(tls_error)?;
        params.subject_alt_names.push(SanType::URI(uri.try_into().map_err(tls_error)?));
        params.key_usages.push(KeyUsagePurpose::DigitalSignature);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, ca).map_err(tls_error)?;
        self.write(name, certificate.pem(), &key)
    }

    fn leaf(&self, name: &str, dns: &[&str], uri: Option<&str>, ca: &Issuer<'_, KeyPair>) -> Result<()> {
        let key = KeyPair::generate().map_err(tls_error)?;
        let names: Vec<String> = dns.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).map_err(tls_error)?;
        if let Some(uri) = uri {
            params.subject_alt_names.push(SanType::URI(uri.try_into().map_err(tls_error)?));
        }
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, "Test, Inc");
        let certificate = params.signed_by(&key, ca).map_err(tls_error)?;
        self.write(name, certificate.pem(), &key)
    }

    /// A certificate that says what it may be used for.
    fn of_purpose(
        &self,
        name: &str,
        purpose: ExtendedKeyUsagePurpose,
        ca: &Issuer<'_, KeyPair>,
    ) -> Result<()> {
        let key = KeyPair::generate().map_err(tls_error)?;
        let mut params = CertificateParams::new(vec!["both.test".to_owned()]).map_err(tls_error)?;
        params.extended_key_usages = vec![purpose];
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, ca).map_err(tls_error)?;
        self.write(name, certificate.pem(), &key)
    }

    fn chain(&self, name: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let pem =
            fs::read(self.dir.join(format!("{name}.pem"))).trying(format!("read certificate {name}"))?;
        let chain = CertificateDer::pem_reader_iter(BufReader::new(&pem[..]))
            .collect::<std::result::Result<_, _>>()
            .map_err(tls_error)?;
        let key = PrivateKeyDer::from_pem_file(self.dir.join(format!("{name}.key"))).map_err(tls_error)?;
        Ok((chain, key))
    }

    fn roots(&self) -> Result<Arc<RootCertStore>> {
        let mut roots = RootCertStore::empty();
        for certificate in self.chain("ca")?.0 {
            roots.add(certificate).map_err(tls_error)?;
        }
        Ok(Arc::new(roots))
    }

    /// The TLS of an upstream.
    pub fn server_config(&self, tls: &UpstreamTls) -> Result<Arc<ServerConfig>> {
        let (chain, key) = self.chain(&tls.cert)?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(tls_error)?;
        let builder = if tls.client_auth {
            let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
                .build()
                .map_err(tls_error)?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(chain, key).map_err(tls_error)?;
        config.alpn_protocols = tls.alpn.iter().map(|p| p.clone().into_bytes()).collect();
        Ok(Arc::new(config))
    }

    /// The TLS of a client, which accepts any certificate and lets the case judge it.
    pub fn client_config(&self, tls: &ClientTls) -> Result<Arc<ClientConfig>> {
        let versions: &[&rustls::SupportedProtocolVersion] = match tls.version.as_deref() {
            Some("1.2") => &[&rustls::version::TLS12],
            Some("1.3") => &[&rustls::version::TLS13],
            _ => rustls::ALL_VERSIONS,
        };
        let any = Arc::new(AcceptAny(provider().signature_verification_algorithms));
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .map_err(tls_error)?
            .dangerous()
            .with_custom_certificate_verifier(any);
        let mut config = match &tls.cert {
            Some(name) => {
                let (chain, key) = self.chain(name)?;
                builder.with_client_auth_cert(chain, key).map_err(tls_error)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = tls.alpn.iter().map(|p| p.clone().into_bytes()).collect();
        config.enable_sni = tls.sni.is_some();
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// The common name of a certificate.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    parsed.subject().iter_common_name().next()?.as_str().ok().map(str::to_owned)
}

#[derive(Debug)]
struct AcceptAny(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
