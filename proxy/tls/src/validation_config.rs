//! A validation context from its message.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::certificate_validation_context::TrustChainVerification;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, SubjectAltNameMatcher,
};
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject as _;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};
use webpki::{CertRevocationList, OwnedCertRevocationList};

use crate::certificate::{certificates, unnamed};
use crate::data_source::{self, Loaded};
use crate::params::Side;
use crate::san::SanMatcher;
use crate::spiffe::Spiffe;
use crate::validation::{Trust, Validator};

/// A validation context and where its authority came from.
#[derive(Debug)]
pub(crate) struct Validation {
    pub(crate) validator: Validator,
    /// The file of `trusted_ca`, or `<inline>`.
    pub(crate) ca_path: String,
    /// The name in `ssl.certificate.NAME.…`.
    pub(crate) stat_name: String,
    pub(crate) suppress_client_ca_list: bool,
}

impl Validation {
    /// `name` is the static secret's, if the context comes from one.
    pub(crate) fn from_proto(
        message: &CertificateValidationContext,
        name: Option<&str>,
        side: Side,
        auto_sni_san: bool,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let ca = data_source::read_field(message.trusted_ca.as_ref(), "trusted_ca")?;
        let crl = data_source::read_field(message.crl.as_ref(), "crl")?;
        let sans = match_sans(message)?;
        if let Some(custom) = &message.custom_validator_config {
            let spiffe = Spiffe::from_proto(custom, message, sans).at("custom_validator_config")?;
            return Ok(Self {
                ca_path: spiffe.ca_path.clone(),
                stat_name: name.map_or_else(|| unnamed_ca(message), str::to_owned),
                suppress_client_ca_list: message.suppress_client_ca_list,
                validator: Validator { spiffe: Some(spiffe), ..Validator::default() },
            });
        }
        if ca.is_none() {
            refuse_without_ca(message, &crl, &sans, auto_sni_san)?;
        }
        let trust = ca.as_ref().map(|ca| trust(message, ca, crl.as_ref(), side)).transpose()?;
        let validator = Validator {
            trust,
            accept_untrusted: TrustChainVerification::try_from(message.trust_chain_verification)
                .map_err(|_| ConfigError::new("unknown value").at("trust_chain_verification"))?
                == TrustChainVerification::AcceptUntrusted,
            matchers: sans,
            hashes: hashes(&message.verify_certificate_hash)?,
            spkis: spkis(&message.verify_certificate_spki)?,
            auto_sni_san,
            spiffe: None,
        };
        let stat_name = name.map_or_else(|| unnamed_ca(message), str::to_owned);
        Ok(Self {
            validator,
            ca_path: ca.map(|c| c.path).unwrap_or_default(),
            stat_name,
            suppress_client_ca_list: message.suppress_client_ca_list,
        })
    }
}

fn unnamed_ca(message: &CertificateValidationContext) -> String {
    use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
    match &message.trusted_ca {
        None => "unnamed_ca_cert".to_owned(),
        Some(source) => match &source.specifier {
            Some(Specifier::InlineBytes(bytes)) => unnamed("unnamed_ca_cert_", bytes),
            _ => unnamed("unnamed_ca_cert_", &[]),
        },
    }
}

fn refuse_unsupported(message: &CertificateValidationContext) -> ConfigResult<()> {
    let refuse = |set: bool, field: &str, what: &str| {
        if set { Err(ConfigError::unsupported(what).at(field)) } else { Ok(()) }
    };
    refuse(
        message.ca_certificate_provider_instance.is_some(),
        "ca_certificate_provider_instance",
        "a certificate provider",
    )?;
    refuse(message.system_root_certs.is_some(), "system_root_certs", "the system's root certificates")?;
    refuse(
        message.require_signed_certificate_timestamp.as_ref().is_some_and(|v| v.value),
        "require_signed_certificate_timestamp",
        "requiring a signed certificate timestamp",
    )?;
    Ok(())
}

fn refuse_without_ca(
    message: &CertificateValidationContext,
    crl: &Option<Loaded>,
    sans: &[SanMatcher],
    auto_sni_san: bool,
) -> ConfigResult<()> {
    if let Some(crl) = crl {
        let reason = format!("Failed to load CRL from {} without trusted CA", crl.path);
        return Err(ConfigError::new(reason).at("crl"));
    }
    if !sans.is_empty() {
        return Err(ConfigError::new(
            "SAN-based verification of peer certificates without trusted CA is insecure and not allowed",
        ));
    }
    if message.allow_expired_certificate {
        return Err(ConfigError::new("Certificate validity period is always ignored without trusted CA")
            .at("allow_expired_certificate"));
    }
    if auto_sni_san {
        return Err(ConfigError::new(
            "'auto_sni_san_validation' was configured without configuring a trusted CA",
        ));
    }
    Ok(())
}

#[expect(deprecated, reason = "the untyped matchers are still served")]
fn match_sans(message: &CertificateValidationContext) -> ConfigResult<Vec<SanMatcher>> {
    let field = "match_typed_subject_alt_names";
    if !message.match_typed_subject_alt_names.is_empty() {
        return message
            .match_typed_subject_alt_names
            .iter()
            .enumerate()
            .map(|(i, m)| SanMatcher::from_proto(m).at_index(field, i))
            .collect();
    }
    // The untyped matchers of old apply to every kind of name.
    let mut all = Vec::new();
    for (i, matcher) in message.match_subject_alt_names.iter().enumerate() {
        for kind in [SanType::Dns, SanType::Uri, SanType::Email, SanType::IpAddress] {
            let typed = SubjectAltNameMatcher {
                san_type: kind.into(),
                matcher: Some(matcher.clone()),
                ..Default::default()
            };
            all.push(SanMatcher::from_proto(&typed).at_index("match_subject_alt_names", i)?);
        }
    }
    Ok(all)
}

fn trust(
    message: &CertificateValidationContext,
    ca: &Loaded,
    crl: Option<&Loaded>,
    side: Side,
) -> ConfigResult<Trust> {
    let failed = || {
        ConfigError::new(format!("Failed to load trusted CA certificates from {}", ca.path)).at("trusted_ca")
    };
    // The field counts the anchor; only servers look at it, as in Envoy.
    let depth = message.max_verify_depth.as_ref().filter(|_| side == Side::Server);
    let mut trust = Trust::new(
        message.only_verify_leaf_cert_crl,
        message.allow_expired_certificate,
        depth.map(|v| v.value.saturating_sub(1) as usize),
    );
    let all = certificates(ca).map_err(|_| failed())?;
    if all.is_empty() {
        return Err(failed());
    }
    for der in all {
        if !trust.add(der) {
            return Err(failed());
        }
    }
    for der in revocation_lists(ca).at("trusted_ca")? {
        trust.add_crl(der);
    }
    if let Some(crl) = crl {
        let lists = revocation_lists(crl).at("crl")?;
        if lists.is_empty() {
            return Err(ConfigError::new(format!("Failed to load CRL from {}", crl.path)).at("crl"));
        }
        for list in lists {
            trust.add_crl(list);
        }
    }
    Ok(trust)
}

pub(crate) fn revocation_lists(loaded: &Loaded) -> ConfigResult<Vec<CertRevocationList<'static>>> {
    let failed = |e: String| ConfigError::new(format!("Failed to load CRL from {}: {e}", loaded.path));
    CertificateRevocationListDer::pem_slice_iter(&loaded.bytes)
        .map(|der| {
            let der = der.map_err(|e| failed(format!("{e:?}")))?;
            let list = OwnedCertRevocationList::from_der(&der).map_err(|e| failed(e.to_string()))?;
            Ok(CertRevocationList::from(list))
        })
        .collect()
}

fn hashes(texts: &[String]) -> ConfigResult<Vec<[u8; 32]>> {
    let decode = |text: &str| -> Option<[u8; 32]> {
        // 95 characters: pairs with colons between.
        let text: String =
            if text.len() == 95 { text.chars().filter(|c| *c != ':').collect() } else { text.to_owned() };
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut out = [0; 32];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(out)
    };
    let each = |(i, text): (usize, &String)| {
        decode(text)
            .ok_or_else(|| ConfigError::new(format!("Invalid hex-encoded SHA-256 {text}")))
            .at_index("verify_certificate_hash", i)
    };
    texts.iter().enumerate().map(each).collect()
}

fn spkis(texts: &[String]) -> ConfigResult<Vec<[u8; 32]>> {
    let each = |(i, text): (usize, &String)| {
        STANDARD
            .decode(text)
            .ok()
            .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok())
            .ok_or_else(|| ConfigError::new(format!("Invalid base64-encoded SHA-256 {text}")))
            .at_index("verify_certificate_spki", i)
    };
    texts.iter().enumerate().map(each).collect()
}
