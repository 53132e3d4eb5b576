//! Listener filters: they look at a connection before its filter chain is chosen.
//!
//! A filter sees the bytes by `MSG_PEEK`, so that whoever serves the connection reads them again from the socket,
//! and a plain socket stays one that `splice(2)` can take. A filter is asked again with all bytes from the first
//! whenever more have come; it keeps no state of its own.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::ExtensionConfigSource;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stream_info::{ConnectionInfo, Metadata};
use sampan_tls::Transport;

use crate::context::FactoryContext;
use crate::discovered::{ExtensionSlot, Make, Stage, make_alone};

mod http_inspector;
mod original_dst;
mod predicate;
mod proxy_protocol;
mod tls_inspector;

pub use http_inspector::fuzz as fuzz_http_inspector;
pub(crate) use original_dst::OriginalDst;
use predicate::Predicate;
pub use proxy_protocol::fuzz_parse as fuzz_proxy_protocol;
pub use tls_inspector::fuzz as fuzz_tls_inspector;

/// What listener filters find out about a connection.
pub(crate) struct Accepted {
    pub(crate) info: ConnectionInfo,
    pub(crate) metadata: Metadata,
}

/// What a filter says of the bytes so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The next filter's turn, after so many bytes were taken off the socket.
    Done { consume: usize },
    /// More bytes are needed.
    More,
    /// Close the connection.
    Close,
}

/// A listener filter.
pub(crate) trait ListenerFilter: Send + Sync {
    /// Before any byte; false: the filter wants no bytes.
    fn on_accept(&self, transport: &Transport, accepted: &mut Accepted) -> bool;

    /// The bytes so far, at most [`Self::max_bytes`], at least one.
    fn on_data(&self, data: &[u8], accepted: &mut Accepted) -> Step;

    /// How many bytes the filter may ask for.
    fn max_bytes(&self) -> usize;
}

/// A filter and when it is skipped.
pub(crate) struct ListenerFilterEntry {
    filter: Place,
    disabled: Option<Predicate>,
}

/// What stands in a listener filter's place.
enum Place {
    Fixed(Box<dyn ListenerFilter>),
    Discovered(Arc<ExtensionSlot<Arc<dyn ListenerFilter>>>),
}

/// A filter that one connection holds.
pub(crate) enum Current<'a> {
    Fixed(&'a dyn ListenerFilter),
    Discovered(Arc<dyn ListenerFilter>),
}

impl<'a> std::ops::Deref for Current<'a> {
    type Target = dyn ListenerFilter + 'a;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Fixed(filter) => *filter,
            Self::Discovered(filter) => &**filter,
        }
    }
}

type Factory = fn(&Any, &FactoryContext) -> ConfigResult<Box<dyn ListenerFilter>>;

/// Message name to factory.
fn registry() -> HashMap<&'static str, Factory> {
    let all: [(&'static str, Factory); 4] = [
        ("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector", tls_inspector::make),
        ("envoy.extensions.filters.listener.http_inspector.v3.HttpInspector", http_inspector::make),
        ("envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol", proxy_protocol::make),
        ("envoy.extensions.filters.listener.original_dst.v3.OriginalDst", original_dst::make),
    ];
    all.into_iter().collect()
}

impl ListenerFilterEntry {
    pub(crate) fn from_proto(filter: &pb::ListenerFilter, context: &FactoryContext) -> ConfigResult<Self> {
        use pb::listener_filter::ConfigType;
        let disabled =
            filter.filter_disabled.as_ref().map(Predicate::from_proto).transpose().at("filter_disabled")?;
        let any = match &filter.config_type {
            Some(ConfigType::TypedConfig(any)) => any,
            Some(ConfigType::ConfigDiscovery(discovery)) => {
                let slot = discovered(discovery, &filter.name, context).at("config_discovery")?;
                return Ok(Self { filter: Place::Discovered(slot), disabled });
            }
            None => return Err(ConfigError::missing("typed_config")),
        };
        let made = match registry().get(crate::proto::message_name(&any.type_url)) {
            Some(factory) => factory(any, context),
            None => Err(ConfigError::unsupported(format_args!("listener filter type {:?}", any.type_url))),
        };
        Ok(Self { filter: Place::Fixed(made.at("typed_config")?), disabled })
    }

    pub(crate) fn always(filter: Box<dyn ListenerFilter>) -> Self {
        Self { filter: Place::Fixed(filter), disabled: None }
    }

    /// The filter; none while ECDS has not sent one.
    pub(crate) fn filter(&self) -> Option<Current<'_>> {
        match &self.filter {
            Place::Fixed(filter) => Some(Current::Fixed(&**filter)),
            Place::Discovered(slot) => slot.current().map(Current::Discovered),
        }
    }

    pub(crate) fn applies(&self, info: &ConnectionInfo) -> bool {
        !self.disabled.as_ref().is_some_and(|p| p.matches(info))
    }
}

fn discovered(
    message: &ExtensionConfigSource,
    name: &str,
    context: &FactoryContext,
) -> ConfigResult<Arc<ExtensionSlot<Arc<dyn ListenerFilter>>>> {
    let registry = registry();
    ExtensionSlot::from_proto(message, name, Stage::Listener, context, |type_name| {
        let factory = *registry.get(type_name)?;
        let context = context.clone();
        let make: Make<Arc<dyn ListenerFilter>> =
            Box::new(move |config| make_alone(&context, |context| factory(config, context)).map(Into::into));
        Some(make)
    })
}
