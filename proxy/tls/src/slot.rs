//! A TLS context whose secrets come by SDS, and may come again.
//!
//! A slot holds the context that serves, or none as long as a secret is missing: then a handshake fails, never is
//! there plain text instead. A new secret makes a new context for new connections; one that cannot be used changes
//! nothing.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use envoy_types::pb::envoy::admin::v3::Certificate;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::downstream_tls_context::SessionTicketKeysType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type as SecretType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, Secret, TlsSessionTicketKeys, UpstreamTlsContext,
};
use sampan_core::ConfigResult;
use sampan_core::config_source::ConfigSource;
use sampan_core::error::AtField;
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::TlsInfo;

use crate::common::Common;
use crate::params::Side;
use crate::secrets::ByName;
use crate::{
    ClientContext, ClientOptions, HandshakeError, SecretKind, ServerContext, StaticSecrets, Transport,
    server, tickets,
};

/// What is logged of a connection that came too early.
const NOT_READY: &str = "TLS_error:_Secret_is_not_supplied_by_SDS";

/// Puts what was prepared into force.
pub type Commit = Box<dyn FnOnce()>;

/// Who uses secrets of SDS.
pub trait SecretUser: Send + Sync {
    /// Makes ready for a secret, or says why it cannot be used.
    fn prepare(self: Arc<Self>, kind: SecretKind, name: &str, secret: &Arc<Secret>) -> ConfigResult<Commit>;
}

/// A secret that a context wants.
#[derive(Clone)]
pub struct WantedSecret {
    /// What it is for.
    pub kind: SecretKind,
    /// `name`
    pub name: Arc<str>,
    /// `sds_config`
    pub source: ConfigSource,
    /// Who waits; gone with the last connection of the context.
    pub user: Weak<dyn SecretUser>,
}

/// One of the two sides' contexts.
pub trait TlsContext: Sized + Send + Sync + 'static {
    /// Its message.
    type Message: Clone + Send + Sync;
    #[doc(hidden)]
    fn make(message: &Self::Message, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self>;
    #[doc(hidden)]
    fn common(message: &Self::Message) -> Option<&CommonTlsContext>;
    #[doc(hidden)]
    fn precheck(message: &Self::Message, secrets: &StaticSecrets) -> ConfigResult<()>;
    /// Where keys of session tickets come from.
    #[doc(hidden)]
    fn ticket_keys(_message: &Self::Message) -> Option<&SdsSecretConfig> {
        None
    }
    /// Below the listener's or the cluster's stats.
    const FACTORY: &'static str;
    /// What counts connections that came too early.
    const NOT_READY: &'static str;
}

/// A slot for a context.
pub struct TlsSlot<C> {
    current: ArcSwapOption<C>,
    waiting: Option<Waiting<C>>,
}

type Wanted = (SecretKind, Arc<str>, ConfigSource);

/// From the secrets that came to a context.
type Make<C> = Box<dyn Fn(&ByName) -> ConfigResult<C> + Send + Sync>;

/// What makes a context anew.
struct Waiting<C> {
    make: Make<C>,
    wanted: Vec<Wanted>,
    got: Mutex<ByName>,
    not_ready: Counter,
    updates: Counter,
}

impl<C: TlsContext> TlsSlot<C> {
    /// The slot of a message; its context is there at once unless it wants secrets of SDS.
    pub fn from_proto(
        message: &C::Message,
        secrets: &StaticSecrets,
        scope: &Scope,
    ) -> ConfigResult<Arc<Self>> {
        let mut wanted = match C::common(message) {
            Some(common) => wanted(common).at("common_tls_context")?,
            None => Vec::new(),
        };
        if let Some(keys) = C::ticket_keys(message) {
            let one = discovered(SecretKind::SessionTicketKeys, keys);
            wanted.extend(one.at("session_ticket_keys_sds_secret_config")?);
        }
        if wanted.is_empty() {
            let current = ArcSwapOption::from_pointee(C::make(message, secrets, scope)?);
            return Ok(Arc::new(Self { current, waiting: None }));
        }
        C::precheck(message, secrets)?;
        let factory = scope.scope(C::FACTORY);
        let (message, statics, scope) = (message.clone(), secrets.clone(), scope.clone());
        let make = move |got: &ByName| C::make(&message, &statics.with_discovered(got.clone()), &scope);
        let waiting = Waiting {
            make: Box::new(make),
            wanted,
            got: Mutex::default(),
            not_ready: factory.counter(C::NOT_READY),
            updates: factory.counter("ssl_context_update_by_sds"),
        };
        Ok(Arc::new(Self { current: ArcSwapOption::empty(), waiting: Some(waiting) }))
    }

    /// What has to be subscribed to.
    pub fn wants(self: &Arc<Self>) -> Vec<WantedSecret> {
        let user: Weak<Self> = Arc::downgrade(self);
        let wanted = self.waiting.iter().flat_map(|waiting| &waiting.wanted);
        wanted
            .map(|(kind, name, source)| WantedSecret {
                kind: *kind,
                name: name.clone(),
                source: source.clone(),
                user: user.clone(),
            })
            .collect()
    }

    fn ready(&self) -> Result<Arc<C>, HandshakeError> {
        self.current.load_full().ok_or_else(|| {
            if let Some(waiting) = &self.waiting {
                waiting.not_ready.inc();
            }
            HandshakeError(NOT_READY.into())
        })
    }
}

impl<C: TlsContext> SecretUser for TlsSlot<C> {
    fn prepare(self: Arc<Self>, kind: SecretKind, name: &str, secret: &Arc<Secret>) -> ConfigResult<Commit> {
        let Some(waiting) = &self.waiting else { return Ok(Box::new(|| {})) };
        let mut got = waiting.got.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let (SecretKind::SessionTicketKeys, Some(keys)) = (kind, keys(secret)) {
            tickets::check(keys)?;
        }
        got.insert((kind, name.into()), secret.clone());
        let there = |(kind, name, _): &Wanted| {
            let secret = got.get(&(*kind, name.clone()));
            secret.is_some_and(|s| *kind != SecretKind::SessionTicketKeys || keys(s).is_some())
        };
        let complete = waiting.wanted.iter().all(there);
        let made = if complete { Some(Arc::new((waiting.make)(&got)?)) } else { None };
        let this = self.clone();
        Ok(Box::new(move || {
            let Some(waiting) = &this.waiting else { return };
            *waiting.got.lock().unwrap_or_else(PoisonError::into_inner) = got;
            this.current.store(made);
            waiting.updates.inc();
        }))
    }
}

/// The keys of a secret that has some.
fn keys(secret: &Secret) -> Option<&TlsSessionTicketKeys> {
    match &secret.r#type {
        Some(SecretType::SessionTicketKeys(keys)) if !keys.keys.is_empty() => Some(keys),
        _ => None,
    }
}

/// None for a static secret.
fn discovered(kind: SecretKind, config: &SdsSecretConfig) -> ConfigResult<Option<Wanted>> {
    let source = config.sds_config.as_ref().map(ConfigSource::from_proto).transpose();
    Ok(source.at("sds_config")?.map(|source| (kind, Arc::from(config.name.as_str()), source)))
}

fn wanted(common: &CommonTlsContext) -> ConfigResult<Vec<Wanted>> {
    use ValidationContextType as V;
    let certificate = |config| discovered(SecretKind::TlsCertificate, config);
    let validation = |config| discovered(SecretKind::ValidationContext, config);
    let mut all = Vec::new();
    for (i, config) in common.tls_certificate_sds_secret_configs.iter().enumerate() {
        all.extend(certificate(config).at_index("tls_certificate_sds_secret_configs", i)?);
    }
    let field = "validation_context_sds_secret_config";
    match &common.validation_context_type {
        Some(V::ValidationContextSdsSecretConfig(config)) => all.extend(validation(config).at(field)?),
        Some(V::CombinedValidationContext(combined)) => {
            if let Some(config) = &combined.validation_context_sds_secret_config {
                all.extend(validation(config).at(field).at("combined_validation_context")?);
            }
        }
        _ => {}
    }
    Ok(all)
}

impl TlsContext for ServerContext {
    type Message = DownstreamTlsContext;
    const FACTORY: &'static str = "server_ssl_socket_factory";
    const NOT_READY: &'static str = "downstream_context_secrets_not_ready";

    fn make(message: &Self::Message, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self> {
        Self::from_proto(message, secrets, scope)
    }

    fn common(message: &Self::Message) -> Option<&CommonTlsContext> {
        message.common_tls_context.as_ref()
    }

    fn precheck(message: &Self::Message, secrets: &StaticSecrets) -> ConfigResult<()> {
        server::precheck(message, secrets)
    }

    fn ticket_keys(message: &Self::Message) -> Option<&SdsSecretConfig> {
        match &message.session_ticket_keys_type {
            Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(config)) => Some(config),
            _ => None,
        }
    }
}

impl TlsContext for ClientContext {
    type Message = UpstreamTlsContext;
    const FACTORY: &'static str = "client_ssl_socket_factory";
    const NOT_READY: &'static str = "upstream_context_secrets_not_ready";

    fn make(message: &Self::Message, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self> {
        Self::from_proto(message, secrets, scope)
    }

    fn common(message: &Self::Message) -> Option<&CommonTlsContext> {
        message.common_tls_context.as_ref()
    }

    fn precheck(message: &Self::Message, _secrets: &StaticSecrets) -> ConfigResult<()> {
        let common = message.common_tls_context.as_ref();
        common.map_or(Ok(()), |common| Common::precheck(common, Side::Client)).at("common_tls_context")
    }
}

impl TlsSlot<ServerContext> {
    /// See [`ServerContext::accept`].
    pub async fn accept(&self, transport: Transport) -> Result<(Transport, TlsInfo), HandshakeError> {
        self.ready()?.accept(transport).await
    }

    /// The entry of `/certs`; none while a secret is missing.
    pub fn admin_certificate(&self) -> Option<Certificate> {
        self.current.load().as_ref().map(|context| context.admin_certificate())
    }
}

impl TlsSlot<ClientContext> {
    /// See [`ClientContext::connect`].
    pub async fn connect(
        &self,
        transport: Transport,
        options: &ClientOptions,
    ) -> Result<(Transport, TlsInfo), HandshakeError> {
        self.ready()?.connect(transport, options).await
    }

    /// The entry of `/certs`; none while a secret is missing.
    pub fn admin_certificate(&self) -> Option<Certificate> {
        self.current.load().as_ref().map(|context| context.admin_certificate())
    }
}
