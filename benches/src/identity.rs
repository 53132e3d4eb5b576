//! The certificate that every subject serves in the TLS cases: ECDSA P-256, self-signed, made anew per run.

use std::{fs, path::Path, sync::Arc};

use rustls::{ClientConfig, RootCertStore, client::Resumption};
use tokio_rustls::TlsConnector;

use crate::error::{BenchError, Result};

/// The name in the certificate.
pub const SERVER_NAME: &str = "bench.example.com";

/// A certificate and its key.
pub struct Identity(rcgen::CertifiedKey<rcgen::KeyPair>);

impl Identity {
    /// Makes one.
    pub fn generate() -> Result<Self> {
        rcgen::generate_simple_self_signed(vec![SERVER_NAME.to_owned()])
            .map(Self)
            .map_err(|e| BenchError::Subject(format!("certificate: {e}")))
    }

    /// Writes `cert.pem`, `key.pem` and, for HAProxy, both as `both.pem`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let (cert, key) = (self.0.cert.pem(), self.0.signing_key.serialize_pem());
        let both = format!("{cert}{key}");
        for (name, text) in [("cert.pem", &cert), ("key.pem", &key), ("both.pem", &both)] {
            fs::write(dir.join(name), text).map_err(BenchError::io(name))?;
        }
        Ok(())
    }

    /// A client that trusts this certificate alone. It never resumes, so each connection is a full handshake.
    pub fn connector(&self) -> Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.cert.der().clone()).map_err(|e| BenchError::Subject(format!("certificate: {e}")))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| BenchError::Subject(format!("TLS client: {e}")))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
