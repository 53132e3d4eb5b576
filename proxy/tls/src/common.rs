//! `CommonTlsContext`: certificates, validation, parameters and ALPN of both sides.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type as SecretType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, SdsSecretConfig, TlsCertificate,
};
use prost::Message as _;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};

use crate::cert_info::cert_info;
use crate::certificate::Certificate;
use crate::context::LoadedCertificate;
use crate::params::{self, Params, Side};
use crate::stats::SslStats;
use crate::validation::Validator;
use crate::validation_config::Validation;
use crate::{SecretKind, StaticSecrets};

/// What both contexts are made of.
pub(crate) struct Common {
    pub(crate) certificates: Vec<Certificate>,
    pub(crate) validation: Option<Validation>,
    pub(crate) params: Params,
    pub(crate) alpn: Vec<Vec<u8>>,
}

impl Common {
    pub(crate) fn from_proto(
        message: &CommonTlsContext,
        secrets: &StaticSecrets,
        side: Side,
        auto_sni_san: bool,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let params = Params::from_proto(message.tls_params.as_ref(), side).at("tls_params")?;
        let certificates = certificates(message, secrets, side)?;
        let validation = validation(message, secrets, side, auto_sni_san)?;
        Ok(Self { certificates, validation, params, alpn: params::alpn(&message.alpn_protocols)? })
    }

    /// Checks what can be checked before the secrets are there.
    pub(crate) fn precheck(message: &CommonTlsContext, side: Side) -> ConfigResult<()> {
        refuse_unsupported(message)?;
        check_number(message, side)?;
        Params::from_proto(message.tls_params.as_ref(), side).at("tls_params")?;
        params::alpn(&message.alpn_protocols).map(drop)
    }

    /// Takes out the validator; one that looks at nothing if there is no validation context.
    pub(crate) fn take_validator(&mut self) -> Arc<Validator> {
        Arc::new(self.validation.as_mut().map(|v| std::mem::take(&mut v.validator)).unwrap_or_default())
    }

    /// What `/certs` shows of the context: the authority and the chains.
    pub(crate) fn loaded(&self) -> (Option<LoadedCertificate>, Vec<LoadedCertificate>) {
        let ca = self.validation.as_ref().and_then(|v| {
            let der = match &v.validator.spiffe {
                Some(spiffe) => spiffe.first()?,
                None => v.validator.trust.as_ref()?.first()?,
            };
            Some(LoadedCertificate { path: v.ca_path.clone(), info: Arc::new(cert_info(der)) })
        });
        let chains = self
            .certificates
            .iter()
            .map(|c| LoadedCertificate { path: c.path.clone(), info: c.info.clone() })
            .collect();
        (ca, chains)
    }

    pub(crate) fn count_expirations(&self, stats: &SslStats, ca: Option<&LoadedCertificate>) {
        if let Some(validation) = &self.validation {
            // Without an authority Envoy's gauge says the end of time.
            let seconds = ca.map_or(i64::MAX, |c| c.info.not_after);
            stats.set_expiration(&validation.stat_name, seconds);
        }
        for certificate in &self.certificates {
            stats.set_expiration(&certificate.stat_name, certificate.info.not_after);
        }
    }
}

#[expect(deprecated, reason = "what is deprecated is refused by name too")]
fn refuse_unsupported(message: &CommonTlsContext) -> ConfigResult<()> {
    let refuse = |set: bool, field: &str, what: &str| {
        if set { Err(ConfigError::unsupported(what).at(field)) } else { Ok(()) }
    };
    refuse(
        message.tls_certificate_provider_instance.is_some(),
        "tls_certificate_provider_instance",
        "a certificate provider",
    )?;
    if let Some(selector) = &message.custom_tls_certificate_selector {
        return Err(ConfigError::unsupported(format!("certificate selector '{}'", selector.name))
            .at("custom_tls_certificate_selector"));
    }
    refuse(
        message.tls_certificate_certificate_provider.is_some(),
        "tls_certificate_certificate_provider",
        "a certificate provider",
    )?;
    refuse(
        message.tls_certificate_certificate_provider_instance.is_some(),
        "tls_certificate_certificate_provider_instance",
        "a certificate provider",
    )?;
    if let Some(handshaker) = &message.custom_handshaker {
        return Err(
            ConfigError::unsupported(format!("handshaker '{}'", handshaker.name)).at("custom_handshaker")
        );
    }
    refuse(message.key_log.as_ref().is_some_and(|k| !k.path.is_empty()), "key_log", "logging of TLS keys")
}

/// A static secret, or one that came by SDS.
fn secret<'a>(
    config: &SdsSecretConfig,
    secrets: &'a StaticSecrets,
    kind: SecretKind,
    what: &str,
) -> ConfigResult<&'a SecretType> {
    let unknown = || ConfigError::new(format!("Unknown static {what}: {}", config.name)).at("name");
    secrets.get(kind, config).ok_or_else(unknown)
}

fn check_number(message: &CommonTlsContext, side: Side) -> ConfigResult<()> {
    let (inline, named) = (&message.tls_certificates, &message.tls_certificate_sds_secret_configs);
    if side == Side::Server && inline.is_empty() && named.is_empty() {
        return Err(ConfigError::new("No TLS certificates found for server context"));
    }
    if side == Side::Server && !inline.is_empty() && !named.is_empty() {
        return Err(ConfigError::new("SDS and non-SDS TLS certificates may not be mixed in server contexts"));
    }
    if side == Side::Client && inline.len() + named.len() > 1 {
        return Err(ConfigError::new("Multiple TLS certificates are not supported for client contexts"));
    }
    Ok(())
}

fn certificates(
    message: &CommonTlsContext,
    secrets: &StaticSecrets,
    side: Side,
) -> ConfigResult<Vec<Certificate>> {
    check_number(message, side)?;
    let mut all = Vec::new();
    for (i, certificate) in message.tls_certificates.iter().enumerate() {
        // An empty message is skipped, as in Envoy.
        if *certificate != TlsCertificate::default() {
            all.push(Certificate::from_proto(certificate, None).at_index("tls_certificates", i)?);
        }
    }
    for (i, config) in message.tls_certificate_sds_secret_configs.iter().enumerate() {
        let load = || match secret(config, secrets, SecretKind::TlsCertificate, "secret")? {
            SecretType::TlsCertificate(c) => Certificate::from_proto(c, Some(&config.name)),
            _ => Err(ConfigError::new(format!("Unknown static secret: {}", config.name)).at("name")),
        };
        all.push(load().at_index("tls_certificate_sds_secret_configs", i)?);
    }
    if side == Side::Server && all.is_empty() {
        return Err(ConfigError::new("Server TlsCertificates must have a certificate specified"));
    }
    Ok(all)
}

#[expect(deprecated, reason = "what is deprecated is refused by name too")]
fn validation(
    message: &CommonTlsContext,
    secrets: &StaticSecrets,
    side: Side,
    auto_sni_san: bool,
) -> ConfigResult<Option<Validation>> {
    let named = |config: &SdsSecretConfig| match secret(
        config,
        secrets,
        SecretKind::ValidationContext,
        "certificate validation context",
    )? {
        SecretType::ValidationContext(context) => Ok(context.clone()),
        _ => Err(ConfigError::new(format!("Unknown static certificate validation context: {}", config.name))
            .at("name")),
    };
    let parse = |context: &CertificateValidationContext, name: Option<&str>| {
        Validation::from_proto(context, name, side, auto_sni_san).map(Some)
    };
    match &message.validation_context_type {
        None if auto_sni_san => {
            Err(ConfigError::new("'auto_sni_san_validation' was configured without a validation context"))
        }
        None => Ok(None),
        Some(ValidationContextType::ValidationContext(context)) => {
            parse(context, None).at("validation_context")
        }
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            let load = || parse(&named(config)?, Some(&config.name));
            load().at("validation_context_sds_secret_config")
        }
        Some(ValidationContextType::CombinedValidationContext(combined)) => {
            let load = || {
                let config = combined
                    .validation_context_sds_secret_config
                    .as_ref()
                    .ok_or_else(|| ConfigError::missing("validation_context_sds_secret_config"))?;
                let mut context = combined
                    .default_validation_context
                    .clone()
                    .ok_or_else(|| ConfigError::missing("default_validation_context"))?;
                let secret = named(config).at("validation_context_sds_secret_config")?;
                // Protobuf's merge: the secret's lists are appended, its scalars win.
                context
                    .merge(secret.encode_to_vec().as_slice())
                    .map_err(|e| ConfigError::new(e.to_string()))?;
                parse(&context, Some(&config.name))
            };
            load().at("combined_validation_context")
        }
        Some(ValidationContextType::ValidationContextCertificateProvider(_)) => {
            Err(ConfigError::unsupported("a certificate provider")
                .at("validation_context_certificate_provider"))
        }
        Some(ValidationContextType::ValidationContextCertificateProviderInstance(_)) => {
            Err(ConfigError::unsupported("a certificate provider")
                .at("validation_context_certificate_provider_instance"))
        }
    }
}
