//! Filters whose configuration comes by ECDS (`config_discovery`), and may come again.
//!
//! A slot stands in the chain in the filter's place. It holds the filter that serves new connections or streams:
//! the one that came last, else the default's, else none; without one Envoy serves nothing, and so do we. Who makes
//! listeners subscribes ([`WantedExtension`]) and hands over what comes.
//!
//! `type_urls` may name types that Sampan does not have as long as it has one of them: Istio always names Wasm beside
//! RBAC. A resource of such a type is refused by name when it comes.

use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use envoy_types::pb::envoy::config::core::v3::ExtensionConfigSource;
use envoy_types::pb::google::protobuf::Any;
use sampan_config::schema::Message;
use sampan_core::config_source::ConfigSource;
use sampan_core::error::{AtField, ConfigError, ConfigResult};

use crate::context::FactoryContext;
use crate::proto::message_name;

/// Makes a filter of its configuration.
pub type Make<T> = Box<dyn Fn(&Any) -> ConfigResult<T> + Send + Sync>;

/// Puts what was prepared into force.
pub type Commit = Box<dyn FnOnce()>;

/// Where in a connection's way a discovered filter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In a listener.
    Listener,
    /// In a filter chain.
    Network,
    /// In a connection manager.
    Http,
}

impl Stage {
    /// Below `extension_config_discovery`.
    pub fn stat_prefix(self) -> &'static str {
        match self {
            Self::Listener => "tcp_listener_filter",
            Self::Network => "network_filter",
            Self::Http => "http_filter",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Network => "network",
            Self::Http => "HTTP",
        }
    }
}

/// Who uses an extension of ECDS.
pub trait ExtensionUser: Send + Sync {
    /// Whether a configuration of that type may come.
    fn check_type(&self, name: &str) -> ConfigResult<()>;
    /// Makes ready for a configuration, or says why it cannot be used.
    fn prepare(self: Arc<Self>, config: &Any) -> ConfigResult<Commit>;
    /// The configuration is no more: the default serves again.
    fn removed(&self);
}

/// An extension that a listener wants.
pub struct WantedExtension {
    /// The filter's name.
    pub name: Arc<str>,
    /// Where it stands.
    pub stage: Stage,
    /// `config_source`
    pub source: ConfigSource,
    /// Whether the listener waits for it.
    pub warms: bool,
    /// Who waits; gone with the last connection that could use it.
    pub user: Weak<dyn ExtensionUser>,
}

/// A filter's place.
pub struct ExtensionSlot<T> {
    current: ArcSwapOption<T>,
    stage: Stage,
    /// None: a type that Sampan does not have.
    types: Vec<(String, Option<Make<T>>)>,
    default: Option<Any>,
}

impl<T: Clone + Send + Sync + 'static> ExtensionSlot<T> {
    /// The slot of a filter. `factory` says how a type is made.
    pub fn from_proto(
        message: &ExtensionConfigSource,
        name: &str,
        stage: Stage,
        context: &FactoryContext,
        factory: impl Fn(&str) -> Option<Make<T>>,
    ) -> ConfigResult<Arc<Self>> {
        let source = message.config_source.as_ref().ok_or_else(|| ConfigError::missing("config_source"))?;
        let source = ConfigSource::from_proto(source).at("config_source")?;
        let at_once = message.apply_default_config_without_warming;
        if at_once && message.default_config.is_none() {
            return Err(ConfigError::new(format!(
                "filter config {name} applied without warming but has no default config."
            )));
        }
        let mut types = Vec::with_capacity(message.type_urls.len());
        for url in &message.type_urls {
            let type_name = message_name(url);
            if Message::find(type_name).is_none() {
                let reason = format!("no factory found for a required type URL {type_name}.");
                return Err(ConfigError::new(reason).at("type_urls"));
            }
            types.push((type_name.to_owned(), factory(type_name)));
        }
        if types.iter().all(|(_, make)| make.is_none()) {
            let names: Vec<_> = types.iter().map(|(name, _)| name.as_str()).collect();
            let what = format!("{} filter type {}", stage.what(), names.join(", "));
            return Err(ConfigError::unsupported(what).at("type_urls"));
        }
        let slot = Self { current: ArcSwapOption::empty(), stage, types, default: None };
        let slot = match &message.default_config {
            None => slot,
            Some(default) => {
                slot.check_type(message_name(&default.type_url)).at("default_config")?;
                slot.current.store(Some(Arc::new(slot.make(default).at("default_config")?)));
                Self { default: Some(default.clone()), ..slot }
            }
        };
        let slot = Arc::new(slot);
        let weak: Weak<Self> = Arc::downgrade(&slot);
        context.want(WantedExtension { name: name.into(), stage, source, warms: !at_once, user: weak });
        Ok(slot)
    }

    /// What serves now.
    pub fn current(&self) -> Option<T> {
        self.current.load().as_deref().cloned()
    }

    fn make(&self, config: &Any) -> ConfigResult<T> {
        let name = message_name(&config.type_url);
        match self.types.iter().find(|(known, _)| known == name) {
            Some((_, Some(make))) => make(config).at("typed_config"),
            _ => {
                let what = format!("{} filter type {:?}", self.stage.what(), config.type_url);
                Err(ConfigError::unsupported(what).at("typed_config"))
            }
        }
    }
}

impl<T: Clone + Send + Sync + 'static> ExtensionUser for ExtensionSlot<T> {
    fn check_type(&self, name: &str) -> ConfigResult<()> {
        if self.types.iter().any(|(known, _)| known == name) {
            return Ok(());
        }
        let known: Vec<_> = self.types.iter().map(|(name, _)| name.as_str()).collect();
        Err(ConfigError::new(format!(
            "Error: filter config has type URL {name} but expect {}.",
            known.join(", ")
        )))
    }

    fn prepare(self: Arc<Self>, config: &Any) -> ConfigResult<Commit> {
        let made = Arc::new(self.make(config)?);
        Ok(Box::new(move || self.current.store(Some(made))))
    }

    fn removed(&self) {
        // The default was made once before; what it says has not changed.
        let default = self.default.as_ref().and_then(|default| self.make(default).ok());
        self.current.store(default.map(Arc::new));
    }
}

/// Makes a filter that may not subscribe to anything itself: nobody would hear of it.
pub fn make_alone<T>(
    context: &FactoryContext,
    make: impl FnOnce(&FactoryContext) -> ConfigResult<T>,
) -> ConfigResult<T> {
    let context = FactoryContext { wants: Default::default(), ..context.clone() };
    let made = make(&context)?;
    let wants = context.wants.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if wants.is_empty() {
        Ok(made)
    } else {
        Err(ConfigError::unsupported("a discovered filter that subscribes to more resources"))
    }
}
