//! Secrets by what they are for and by name, as Envoy keeps them: a name may stand for one of each kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{SdsSecretConfig, Secret};
use sampan_core::{ConfigError, ConfigResult};

/// What a secret is for; in the order of `/config_dump`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecretKind {
    /// `tls_certificate`
    TlsCertificate,
    /// `validation_context`
    ValidationContext,
    /// `session_ticket_keys`
    SessionTicketKeys,
    /// `generic_secret`
    Generic,
}

impl SecretKind {
    fn of(secret: &Secret) -> Option<Self> {
        Some(match secret.r#type.as_ref()? {
            Type::TlsCertificate(_) => Self::TlsCertificate,
            Type::ValidationContext(_) => Self::ValidationContext,
            Type::SessionTicketKeys(_) => Self::SessionTicketKeys,
            Type::GenericSecret(_) => Self::Generic,
        })
    }

    fn message(self) -> &'static str {
        match self {
            Self::TlsCertificate => "TlsCertificate",
            Self::ValidationContext => "CertificateValidationContext",
            Self::SessionTicketKeys => "TlsSessionTicketKeys",
            Self::Generic => "GenericSecret",
        }
    }
}

/// Secrets by kind and name.
pub(crate) type ByName = BTreeMap<(SecretKind, Arc<str>), Arc<Secret>>;

/// The bootstrap's `static_resources.secrets`; then those that came by SDS, for a context that wants them. Of those the kind is
/// what is wanted, whatever came.
#[derive(Default, Clone)]
pub struct StaticSecrets {
    statics: Arc<ByName>,
    discovered: Arc<ByName>,
}

impl StaticSecrets {
    /// Adds a secret of the bootstrap.
    pub fn add(&mut self, secret: Secret) -> ConfigResult<()> {
        let kind = SecretKind::of(&secret).ok_or_else(|| ConfigError::new("Secret type not implemented"))?;
        let name: Arc<str> = secret.name.as_str().into();
        match Arc::make_mut(&mut self.statics).insert((kind, name), Arc::new(secret)) {
            None => Ok(()),
            Some(earlier) => {
                let reason = format!("Duplicate static {} secret name {}", kind.message(), earlier.name);
                Err(ConfigError::new(reason))
            }
        }
    }

    /// The bootstrap's secrets by kind, then by name.
    pub fn statics(&self) -> impl Iterator<Item = &Arc<Secret>> {
        self.statics.values()
    }

    pub(crate) fn with_discovered(&self, discovered: ByName) -> Self {
        Self { statics: self.statics.clone(), discovered: Arc::new(discovered) }
    }

    /// The secret that a context names.
    pub(crate) fn get(&self, kind: SecretKind, config: &SdsSecretConfig) -> Option<&Type> {
        let known = if config.sds_config.is_some() { &self.discovered } else { &self.statics };
        known.get(&(kind, config.name.as_str().into()))?.r#type.as_ref()
    }
}
