//! Failed handshakes in Envoy's words: `TLS_error:|CODE:SSL routines:OPENSSL_internal:REASON:DETAILS:TLS_error_end`.
//!
//! Codes and reasons are BoringSSL's for what both libraries tell apart; anything else carries rustls's own text
//! as the reason. A peer that just hangs up leaves no error, hence an empty text, as in Envoy.

use std::io;
use std::sync::Arc;

use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, OtherError, PeerIncompatible, PeerMisbehaved,
};

use crate::context::HandshakeError;
use crate::stats::SslStats;
use crate::validation::{ChainFailure, Refusal};

/// Library 16 (SSL) in BoringSSL's error codes.
const SSL_LIB: u32 = 0x1000_0000;

/// The peer reset its connection within the handshake: library 2 (system), and ECONNRESET.
const RESET: &str =
    "TLS_error:|33554536:system library:OPENSSL_internal:Connection reset by peer:TLS_error_end";

/// Our refusal inside a rustls error.
#[derive(Debug)]
struct Refused(Refusal);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&details(&self.0))
    }
}

impl std::error::Error for Refused {}

fn details(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Chain { depth, reason, .. } => format!(
            "verify cert failed: X509_verify_cert: certificate verification error at depth {depth}: {reason}"
        ),
        Refusal::SanList(expected, names) => format!(
            "verify cert failed: verify SAN list, expected SANs: [{expected}], certificate SANs: [{names}]"
        ),
        Refusal::SanMatcher(names) => {
            format!("verify cert failed: SAN matcher, certificate SANs are [{names}]")
        }
        Refusal::Hash => "verify cert failed: cert hash and spki".to_owned(),
        Refusal::KeyUsage => "KEY_USAGE_BIT_INCORRECT".to_owned(),
        Refusal::Spiffe(what) => format!("verify cert failed: {what}"),
        Refusal::SpiffeSan => "verify cert failed: SAN match".to_owned(),
        Refusal::Nothing => "verify cert failed".to_owned(),
    }
}

/// The rustls error of a refusal; its kind decides the alert.
pub(crate) fn tls_error(refusal: Refusal) -> Error {
    let kind = match &refusal {
        Refusal::Chain { kind, .. } => Some(*kind),
        _ => None,
    };
    let other = || CertificateError::Other(OtherError(Arc::new(Refused(refusal.clone()))));
    // Where rustls's own kinds have the right alert they are used; the text is made from them again.
    Error::InvalidCertificate(match kind {
        Some(ChainFailure::Malformed) => CertificateError::BadEncoding,
        Some(ChainFailure::UnknownIssuer) => CertificateError::UnknownIssuer,
        Some(ChainFailure::Expired) => CertificateError::Expired,
        Some(ChainFailure::NotYetValid) => CertificateError::NotValidYet,
        Some(ChainFailure::Revoked) => CertificateError::Revoked,
        Some(ChainFailure::NoCrl) => CertificateError::UnknownRevocationStatus,
        Some(ChainFailure::CrlExpired) => CertificateError::ExpiredRevocationList,
        Some(ChainFailure::Purpose) => CertificateError::InvalidPurpose,
        Some(ChainFailure::Other) | None => other(),
    })
}

fn certificate_details(error: &CertificateError) -> String {
    let at_leaf = |reason| details(&Refusal::Chain { depth: 0, reason, kind: ChainFailure::Other });
    match error {
        CertificateError::Other(OtherError(e)) => match e.downcast_ref::<Refused>() {
            Some(refused) => details(&refused.0),
            None => format!("verify cert failed: {e}"),
        },
        CertificateError::UnknownIssuer => at_leaf("unable to get local issuer certificate"),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            at_leaf("certificate has expired")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            at_leaf("certificate is not yet valid")
        }
        CertificateError::Revoked => at_leaf("certificate revoked"),
        CertificateError::UnknownRevocationStatus => at_leaf("unable to get certificate CRL"),
        CertificateError::ExpiredRevocationList => at_leaf("CRL has expired"),
        CertificateError::InvalidPurpose => at_leaf("unsupported certificate purpose"),
        other => format!("verify cert failed: {other}"),
    }
}

fn line(code: u32, reason: &str) -> String {
    format!("TLS_error:|{}:SSL routines:OPENSSL_internal:{reason}:TLS_error_end", SSL_LIB + code)
}

/// No version is enabled.
pub(crate) fn no_versions(stats: &SslStats) -> HandshakeError {
    stats.connection_error.inc();
    HandshakeError(line(280, "NO_SUPPORTED_VERSIONS_ENABLED").into())
}

/// The text of a refusal found after the handshake (a resumed session).
pub(crate) fn refusal_text(refusal: &Refusal) -> String {
    line(125, &format!("CERTIFICATE_VERIFY_FAILED:{}", details(refusal)))
}

/// Code and name of an alert the peer sent, in BoringSSL's table.
fn alert_reason(alert: AlertDescription) -> (u32, String) {
    let code = 1000 + u32::from(u8::from(alert));
    let name = match alert {
        AlertDescription::CloseNotify => "SSLV3_ALERT_CLOSE_NOTIFY",
        AlertDescription::UnexpectedMessage => "SSLV3_ALERT_UNEXPECTED_MESSAGE",
        AlertDescription::BadRecordMac => "SSLV3_ALERT_BAD_RECORD_MAC",
        AlertDescription::DecryptionFailed => "TLSV1_ALERT_DECRYPTION_FAILED",
        AlertDescription::RecordOverflow => "TLSV1_ALERT_RECORD_OVERFLOW",
        AlertDescription::HandshakeFailure => "SSLV3_ALERT_HANDSHAKE_FAILURE",
        AlertDescription::BadCertificate => "SSLV3_ALERT_BAD_CERTIFICATE",
        AlertDescription::UnsupportedCertificate => "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        AlertDescription::CertificateRevoked => "SSLV3_ALERT_CERTIFICATE_REVOKED",
        AlertDescription::CertificateExpired => "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        AlertDescription::CertificateUnknown => "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        AlertDescription::IllegalParameter => "SSLV3_ALERT_ILLEGAL_PARAMETER",
        AlertDescription::UnknownCA => "TLSV1_ALERT_UNKNOWN_CA",
        AlertDescription::AccessDenied => "TLSV1_ALERT_ACCESS_DENIED",
        AlertDescription::DecodeError => "TLSV1_ALERT_DECODE_ERROR",
        AlertDescription::DecryptError => "TLSV1_ALERT_DECRYPT_ERROR",
        AlertDescription::ProtocolVersion => "TLSV1_ALERT_PROTOCOL_VERSION",
        AlertDescription::InsufficientSecurity => "TLSV1_ALERT_INSUFFICIENT_SECURITY",
        AlertDescription::InternalError => "TLSV1_ALERT_INTERNAL_ERROR",
        AlertDescription::InappropriateFallback => "TLSV1_ALERT_INAPPROPRIATE_FALLBACK",
        AlertDescription::UserCanceled => "TLSV1_ALERT_USER_CANCELLED",
        AlertDescription::NoRenegotiation => "TLSV1_ALERT_NO_RENEGOTIATION",
        AlertDescription::UnsupportedExtension => "TLSV1_ALERT_UNSUPPORTED_EXTENSION",
        AlertDescription::UnrecognisedName => "TLSV1_ALERT_UNRECOGNIZED_NAME",
        AlertDescription::UnknownPSKIdentity => "TLSV1_ALERT_UNKNOWN_PSK_IDENTITY",
        AlertDescription::CertificateRequired => "TLSV1_ALERT_CERTIFICATE_REQUIRED",
        AlertDescription::NoApplicationProtocol => "TLSV1_ALERT_NO_APPLICATION_PROTOCOL",
        _ => return (code, format!("UNKNOWN_ALERT_TYPE_{}", u8::from(alert))),
    };
    (code, name.to_owned())
}

fn reason(error: &Error) -> (u32, String) {
    let named = |code, name: &str| (code, name.to_owned());
    match error {
        e if is_key_usage(e) => named(302, "KEY_USAGE_BIT_INCORRECT"),
        Error::InvalidCertificate(e) => {
            (125, format!("CERTIFICATE_VERIFY_FAILED:{}", certificate_details(e)))
        }
        Error::NoCertificatesPresented => (
            192,
            "PEER_DID_NOT_RETURN_A_CERTIFICATE:peer did not provide required client certificate".to_owned(),
        ),
        Error::AlertReceived(alert) => alert_reason(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => named(247, "WRONG_VERSION_NUMBER"),
        Error::InvalidMessage(InvalidMessage::UnknownProtocolVersion) => named(247, "WRONG_VERSION_NUMBER"),
        Error::InvalidMessage(_) => named(137, "DECODE_ERROR"),
        Error::DecryptError => named(139, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"),
        Error::InappropriateMessage { .. } | Error::InappropriateHandshakeMessage { .. } => {
            named(223, "UNEXPECTED_MESSAGE")
        }
        Error::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
        ) => named(240, "UNSUPPORTED_PROTOCOL"),
        Error::PeerIncompatible(
            PeerIncompatible::NoCipherSuitesInCommon
            | PeerIncompatible::NoSignatureSchemesInCommon
            | PeerIncompatible::NoKxGroupsInCommon
            | PeerIncompatible::NamedGroupsExtensionRequired
            | PeerIncompatible::NoEcPointFormatsInCommon
            | PeerIncompatible::SignatureAlgorithmsExtensionRequired,
        ) => named(184, "NO_SHARED_CIPHER"),
        Error::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol) => {
            named(259, "INVALID_ALPN_PROTOCOL")
        }
        Error::PeerSentOversizedRecord => named(198, "RECORD_TOO_LARGE"),
        other => (0, other.to_string()),
    }
}

fn is_key_usage(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(e))) = error else { return false };
    e.downcast_ref::<Refused>().is_some_and(|r| r.0 == Refusal::KeyUsage)
}

/// How a peer began that did not come to a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opening {
    /// With a ClientHello of TLS 1.2 or later, or with what is no TLS.
    Other,
    /// With an HTTP request.
    Http,
    /// With a ClientHello before TLS 1.2.
    Old,
}

/// The text of a failed handshake; counts what no verifier has counted.
pub(crate) fn handshake_error(error: &io::Error, stats: &SslStats, opening: Opening) -> HandshakeError {
    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<Error>()) else {
        // The socket failed or ended: no TLS error. Envoy counts neither, and tells of a reset.
        let text = match error.kind() {
            io::ErrorKind::ConnectionReset => RESET,
            _ => "",
        };
        return HandshakeError(text.into());
    };
    match tls {
        Error::NoCertificatesPresented => stats.fail_verify_no_cert.inc(),
        Error::InvalidCertificate(_) if !is_key_usage(tls) => {}
        _ => stats.connection_error.inc(),
    }
    let (code, reason) = match opening {
        Opening::Http => (156, "HTTP_REQUEST".to_owned()),
        Opening::Old => (240, "UNSUPPORTED_PROTOCOL".to_owned()),
        Opening::Other => reason(tls),
    };
    HandshakeError(line(code, &reason).into())
}
