//! `CertificateValidationContext`: who may be at the other end.
//!
//! The chain is verified with webpki, which knows no depth, no validity of trust anchors and no certificate that
//! is trusted as it stands; these three are added here. After the chain come the matchers, in Envoy's order:
//! subject alternative names, then hashes. Nothing here fails open: what cannot be parsed does not match.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, digest};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
};
use x509_parser::certificate::X509Certificate;

use crate::cert_info::parse;
use crate::params::Side;
use crate::san::{self, San, SanMatcher};
use crate::spiffe::Spiffe;
use crate::stats::SslStats;

/// Why a peer is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The chain; depth and OpenSSL's words.
    Chain { depth: usize, reason: &'static str, kind: ChainFailure },
    /// None of the connection's names: these, and the certificate's.
    SanList(String, String),
    /// None of the configured matchers; the certificate's names.
    SanMatcher(String),
    /// None of the hashes.
    Hash,
    /// The key may not sign.
    KeyUsage,
    /// The SPIFFE validator, before the chain.
    Spiffe(&'static str),
    /// The SPIFFE validator's matchers.
    SpiffeSan,
    /// No matcher at all could vouch for the certificate.
    Nothing,
}

/// What is wrong with a chain, for the alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChainFailure {
    Malformed,
    UnknownIssuer,
    Expired,
    NotYetValid,
    Revoked,
    NoCrl,
    CrlExpired,
    Purpose,
    Other,
}

/// What webpki's anchor leaves out of a trusted certificate.
#[derive(Debug)]
struct Anchor {
    der: CertificateDer<'static>,
    not_before: i64,
    not_after: i64,
}

/// The trusted certificates and how chains to them are verified.
#[derive(Debug)]
pub(crate) struct Trust {
    /// In the order of `anchors`.
    certificates: Vec<Anchor>,
    anchors: Vec<TrustAnchor<'static>>,
    crls: Vec<CertRevocationList<'static>>,
    leaf_crl_only: bool,
    allow_expired: bool,
    /// How many certificates may stand between leaf and anchor.
    max_intermediates: Option<usize>,
}

/// A validation context.
#[derive(Debug, Default)]
pub(crate) struct Validator {
    pub(crate) trust: Option<Trust>,
    pub(crate) accept_untrusted: bool,
    pub(crate) matchers: Vec<SanMatcher>,
    pub(crate) hashes: Vec<[u8; 32]>,
    pub(crate) spkis: Vec<[u8; 32]>,
    pub(crate) auto_sni_san: bool,
    /// Takes the place of all others.
    pub(crate) spiffe: Option<Spiffe>,
}

impl Trust {
    /// Nothing is trusted yet.
    pub(crate) fn new(leaf_crl_only: bool, allow_expired: bool, max_intermediates: Option<usize>) -> Self {
        Self {
            certificates: Vec::new(),
            anchors: Vec::new(),
            crls: Vec::new(),
            leaf_crl_only,
            allow_expired,
            max_intermediates,
        }
    }

    /// Adds a trusted certificate; `false` where it is none.
    pub(crate) fn add(&mut self, der: CertificateDer<'static>) -> bool {
        let Ok(anchor) = webpki::anchor_from_trusted_cert(&der).map(|a| a.to_owned()) else { return false };
        let Some(certificate) = parse(&der) else { return false };
        let validity = certificate.validity();
        let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        self.anchors.push(anchor);
        self.certificates.push(Anchor { der, not_before, not_after });
        true
    }

    /// Adds a revocation list.
    pub(crate) fn add_crl(&mut self, crl: CertRevocationList<'static>) {
        self.crls.push(crl);
    }

    /// The subjects of the anchors, for the certificate request.
    pub(crate) fn subjects(&self) -> Vec<rustls::DistinguishedName> {
        let mut subjects: Vec<&[u8]> = self.anchors.iter().map(|a| a.subject.as_ref()).collect();
        subjects.dedup();
        subjects.into_iter().map(rustls::DistinguishedName::in_sequence).collect()
    }

    /// The first trusted certificate, which the admin shows.
    pub(crate) fn first(&self) -> Option<&CertificateDer<'static>> {
        self.certificates.first().map(|a| &a.der)
    }

    pub(crate) fn verify(&self, chain: &[CertificateDer<'_>], side: Side) -> Result<(), Refusal> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let refusal = match self.verify_at(chain, side, now) {
            Ok(()) => return Ok(()),
            Err(refusal) => refusal,
        };
        let dated =
            matches!(refusal, Refusal::Chain { kind: ChainFailure::Expired | ChainFailure::NotYetValid, .. });
        if !self.allow_expired || !dated {
            return Err(refusal);
        }
        // Any moment at which the chain was valid will do; the candidates are where validities begin and end.
        let mut last = refusal;
        for moment in moments(chain) {
            match self.verify_at(chain, side, moment) {
                Ok(()) => return Ok(()),
                Err(refusal) => last = refusal,
            }
        }
        Err(last)
    }

    fn verify_at(&self, chain: &[CertificateDer<'_>], side: Side, at: Duration) -> Result<(), Refusal> {
        let (leaf, rest) = chain.split_first().ok_or(Refusal::Nothing)?;
        let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
        if let Some(anchor) = self.certificates.iter().find(|a| a.der == *leaf) {
            return self.verify_pinned(anchor, side, seconds);
        }
        let end_entity = EndEntityCert::try_from(leaf).map_err(|e| refusal_of(&e))?;
        let crls: Vec<&CertRevocationList<'_>> = self.crls.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|builder| {
            builder
                .with_depth(if self.leaf_crl_only {
                    RevocationCheckDepth::EndEntity
                } else {
                    RevocationCheckDepth::Chain
                })
                .with_status_policy(UnknownStatusPolicy::Deny)
                .with_expiration_policy(if self.allow_expired {
                    ExpirationPolicy::Ignore
                } else {
                    ExpirationPolicy::Enforce
                })
                .build()
        });
        // Which of the checks that webpki does not know refused a path.
        let own = std::cell::Cell::new(None);
        let check = |path: &VerifiedPath<'_>| match self.check_path(path, seconds) {
            Ok(()) => Ok(()),
            Err(refusal) => {
                own.set(Some(refusal));
                Err(webpki::Error::UnknownIssuer)
            }
        };
        end_entity
            .verify_for_usage(
                algorithms(),
                &self.anchors,
                rest,
                UnixTime::since_unix_epoch(at),
                usage(side),
                revocation,
                Some(&check),
            )
            .map(|_| ())
            .map_err(|error| own.take().unwrap_or_else(|| refusal_of(&error)))
    }

    fn check_path(&self, path: &VerifiedPath<'_>, seconds: i64) -> Result<(), Refusal> {
        let depth = path.intermediate_certificates().count();
        if self.max_intermediates.is_some_and(|max| depth > max) {
            return Err(Refusal::Chain {
                depth,
                reason: "certificate chain too long",
                kind: ChainFailure::Other,
            });
        }
        let anchor = path.anchor();
        let same = |a: &TrustAnchor<'_>| {
            a.subject == anchor.subject && a.subject_public_key_info == anchor.subject_public_key_info
        };
        let mut last = Ok(());
        for (_, candidate) in self.anchors.iter().zip(&self.certificates).filter(|(a, _)| same(a)) {
            last = self.check_validity(candidate, depth + 1, seconds);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    fn check_validity(&self, anchor: &Anchor, depth: usize, seconds: i64) -> Result<(), Refusal> {
        if self.allow_expired {
            Ok(())
        } else if seconds > anchor.not_after {
            Err(Refusal::Chain { depth, reason: "certificate has expired", kind: ChainFailure::Expired })
        } else if seconds < anchor.not_before {
            Err(Refusal::Chain {
                depth,
                reason: "certificate is not yet valid",
                kind: ChainFailure::NotYetValid,
            })
        } else {
            Ok(())
        }
    }

    /// A leaf that is itself among the trusted certificates, as OpenSSL's partial chains allow.
    fn verify_pinned(&self, anchor: &Anchor, side: Side, seconds: i64) -> Result<(), Refusal> {
        self.check_validity(anchor, 0, seconds)?;
        let malformed =
            Refusal::Chain { depth: 0, reason: "unspecified error", kind: ChainFailure::Malformed };
        let certificate = parse(&anchor.der).ok_or(malformed.clone())?;
        match certificate.extended_key_usage() {
            Ok(Some(eku)) => {
                let allowed = eku.value.any
                    || if side == Side::Server { eku.value.client_auth } else { eku.value.server_auth };
                if allowed {
                    Ok(())
                } else {
                    Err(Refusal::Chain {
                        depth: 0,
                        reason: "unsupported certificate purpose",
                        kind: ChainFailure::Purpose,
                    })
                }
            }
            Ok(None) => Ok(()),
            Err(_) => Err(malformed),
        }
    }
}

fn algorithms() -> &'static [&'static dyn SignatureVerificationAlgorithm] {
    use std::sync::OnceLock;
    static ALL: OnceLock<&'static [&'static dyn SignatureVerificationAlgorithm]> = OnceLock::new();
    ALL.get_or_init(|| default_provider().signature_verification_algorithms.all)
}

/// A server verifies clients, a client servers.
fn usage(side: Side) -> KeyUsage {
    match side {
        Side::Server => KeyUsage::client_auth(),
        Side::Client => KeyUsage::server_auth(),
    }
}

fn moments(chain: &[CertificateDer<'_>]) -> Vec<Duration> {
    /// Enough for any honest chain, few enough for a dishonest one.
    const MOST: usize = 16;
    chain
        .iter()
        .filter_map(|der| parse(der))
        .flat_map(|c| [c.validity().not_after.timestamp(), c.validity().not_before.timestamp()])
        .filter_map(|seconds| u64::try_from(seconds).ok())
        .map(Duration::from_secs)
        .take(MOST)
        .collect()
}

fn refusal_of(error: &webpki::Error) -> Refusal {
    use webpki::Error as E;
    let (depth, reason, kind) = match error {
        E::UnknownIssuer => (0, "unable to get local issuer certificate", ChainFailure::UnknownIssuer),
        E::CertExpired { .. } => (0, "certificate has expired", ChainFailure::Expired),
        E::CertNotValidYet { .. } => (0, "certificate is not yet valid", ChainFailure::NotYetValid),
        E::CertRevoked => (0, "certificate revoked", ChainFailure::Revoked),
        E::UnknownRevocationStatus => (0, "unable to get certificate CRL", ChainFailure::NoCrl),
        E::CrlExpired { .. } => (0, "CRL has expired", ChainFailure::CrlExpired),
        E::InvalidCrlSignatureForPublicKey => (0, "CRL signature failure", ChainFailure::Other),
        E::InvalidSignatureForPublicKey => (0, "certificate signature failure", ChainFailure::Other),
        E::RequiredEkuNotFoundContext(_) => (0, "unsupported certificate purpose", ChainFailure::Purpose),
        E::EndEntityUsedAsCa => (1, "invalid CA certificate", ChainFailure::UnknownIssuer),
        E::PathLenConstraintViolated => (1, "path length constraint exceeded", ChainFailure::UnknownIssuer),
        E::NameConstraintViolation => (0, "permitted subtree violation", ChainFailure::Other),
        E::UnsupportedCertVersion => (0, "unsupported certificate version", ChainFailure::Other),
        E::CaUsedAsEndEntity => (0, "CA certificate used as end entity", ChainFailure::Other),
        _ => (0, "unspecified certificate verification error", ChainFailure::Malformed),
    };
    Refusal::Chain { depth, reason, kind }
}

impl Validator {
    /// Whether a certificate is looked at at all.
    pub(crate) fn verifies(&self) -> bool {
        self.trust.is_some() || self.accept_untrusted || self.has_matchers() || self.spiffe.is_some()
    }

    pub(crate) fn has_matchers(&self) -> bool {
        !self.matchers.is_empty() || !self.hashes.is_empty() || !self.spkis.is_empty()
    }

    /// Verifies a chain, leaf first. `Ok(true)`: verified; `Ok(false)`: taken without having been verified.
    ///
    /// `sni` is the name the client asked for, `wanted` the names of the connection's options.
    pub(crate) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        side: Side,
        sni: Option<&str>,
        wanted: &[String],
        stats: Option<&SslStats>,
    ) -> Result<bool, Refusal> {
        if !self.verifies() {
            // Names to verify but nothing to trust: a name that anybody can sign is worth nothing.
            if let Some(stats) = stats {
                stats.fail_verify_error.inc();
            }
            return Err(Refusal::Chain {
                depth: 0,
                reason: "unable to get local issuer certificate",
                kind: ChainFailure::UnknownIssuer,
            });
        }
        if let Some(spiffe) = &self.spiffe {
            let counted = |refusal: &Refusal| stats.iter().for_each(|stats| count(stats, refusal));
            return spiffe.verify(chain, side).map(|()| true).inspect_err(counted);
        }
        if let Some(trust) = &self.trust
            && let Err(refusal) = trust.verify(chain, side)
        {
            if let Some(stats) = stats {
                stats.fail_verify_error.inc();
            }
            return if self.accept_untrusted { Ok(false) } else { Err(refusal) };
        }
        let matched = self.match_leaf(chain.first(), sni, wanted).inspect_err(|refusal| {
            if let Some(stats) = stats {
                count(stats, refusal);
            }
        });
        match matched {
            Ok(matched) if matched || self.trust.is_some() => Ok(true),
            Ok(_) if self.accept_untrusted => Ok(false),
            Ok(_) => Err(Refusal::Nothing),
            Err(_) if self.accept_untrusted => Ok(false),
            Err(refusal) => Err(refusal),
        }
    }

    /// `Ok(true)`: some matcher vouches for the certificate; `Ok(false)`: there are none.
    fn match_leaf(
        &self,
        leaf: Option<&CertificateDer<'_>>,
        sni: Option<&str>,
        wanted: &[String],
    ) -> Result<bool, Refusal> {
        let sni_matcher = (wanted.is_empty() && self.auto_sni_san)
            .then(|| sni.filter(|s| !s.is_empty()))
            .flatten()
            .map(|name| [SanMatcher::Dns(name.to_owned())]);
        let matchers = sni_matcher.as_ref().map_or(self.matchers.as_slice(), |m| m.as_slice());
        let hashed = !self.hashes.is_empty() || !self.spkis.is_empty();
        if wanted.is_empty() && matchers.is_empty() && !hashed {
            return Ok(false);
        }
        let leaf = leaf.ok_or(Refusal::Nothing)?;
        let certificate = parse(leaf);
        let sans = certificate.as_ref().map(san::sans).unwrap_or_default();
        if !wanted.is_empty() && !san::verify_list(&sans, wanted) {
            return Err(Refusal::SanList(wanted.join(", "), names(&sans)));
        }
        if !matchers.is_empty() && !matchers.iter().any(|m| sans.iter().any(|s| m.matches(s))) {
            return Err(Refusal::SanMatcher(names(&sans)));
        }
        if hashed && !self.hash_matches(leaf, certificate.as_ref()) {
            return Err(Refusal::Hash);
        }
        Ok(true)
    }

    fn hash_matches(&self, leaf: &CertificateDer<'_>, certificate: Option<&X509Certificate<'_>>) -> bool {
        let among = |list: &[[u8; 32]], bytes: &[u8]| {
            let hash = digest::digest(&digest::SHA256, bytes);
            // All are compared, so that the time does not tell which came close.
            list.iter().fold(false, |found, h| {
                found | constant_time::verify_slices_are_equal(h, hash.as_ref()).is_ok()
            })
        };
        among(&self.hashes, leaf) || certificate.is_some_and(|c| among(&self.spkis, c.public_key().raw))
    }
}

fn names(sans: &[San]) -> String {
    sans.iter().map(|s| s.value.as_str()).collect::<Vec<_>>().join(", ")
}

fn count(stats: &SslStats, refusal: &Refusal) {
    match refusal {
        Refusal::SanList(..) | Refusal::SanMatcher(_) | Refusal::SpiffeSan => stats.fail_verify_san.inc(),
        Refusal::Hash => stats.fail_verify_cert_hash.inc(),
        Refusal::Chain { .. } | Refusal::KeyUsage | Refusal::Nothing | Refusal::Spiffe(_) => {
            stats.fail_verify_error.inc()
        }
    }
}
