//! TLS contexts: the border that listeners and clusters use.

use std::sync::Arc;

use envoy_types::pb::envoy::admin::v3::{self as admin, subject_alternate_name::Name};
use envoy_types::pb::google::protobuf::Timestamp;
use sampan_core::stream_info::CertInfo;
use thiserror::Error;

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

impl From<&LoadedCertificate> for admin::CertificateDetails {
    fn from(certificate: &LoadedCertificate) -> Self {
        let info = &certificate.info;
        let names = |values: &[String], name: fn(String) -> Name| {
            values
                .iter()
                .map(|v| admin::SubjectAlternateName { name: Some(name(v.clone())) })
                .collect::<Vec<_>>()
        };
        let time = |seconds| Some(Timestamp { seconds, nanos: 0 });
        Self {
            path: certificate.path.clone(),
            serial_number: info.serial.clone(),
            subject_alt_names: [
                names(&info.dns_sans, Name::Dns),
                names(&info.uri_sans, Name::Uri),
                names(&info.ip_sans, Name::IpAddress),
            ]
            .concat(),
            days_until_expiration: certificate.days_until_expiration(),
            valid_from: time(info.not_before),
            expiration_time: time(info.not_after),
            ocsp_details: None,
        }
    }
}

/// One entry of `/certs`.
pub(crate) fn admin_certificate(
    ca: Option<&LoadedCertificate>,
    chains: &[LoadedCertificate],
) -> admin::Certificate {
    admin::Certificate {
        ca_cert: ca.into_iter().map(Into::into).collect(),
        cert_chain: chains.iter().map(Into::into).collect(),
    }
}
