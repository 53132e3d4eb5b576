//! Listener filters: they look at a connection before its filter chain is chosen.
//!
//! A filter sees the bytes by `MSG_PEEK`, so that whoever serves the connection reads them again from the socket,
//! and a plain socket stays one that `splice(2)` can take. A filter is asked again with all bytes from the first
//! whenever more have come; it keeps no state of its own.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::stream_info::{ConnectionInfo, Metadata};
use sampan_tls::Transport;

use crate::context::FactoryContext;

mod http_inspector;
mod original_dst;
mod predicate;
mod proxy_protocol;
mod tls_inspector;

pub(crate) use original_dst::OriginalDst;
use predicate::Predicate;
pub use proxy_protocol::fuzz_parse as fuzz_proxy_protocol;

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
    pub(crate) filter: Box<dyn ListenerFilter>,
    disabled: Option<Predicate>,
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
            Some(ConfigType::ConfigDiscovery(_)) => {
                return Err(ConfigError::unsupported("config_discovery").at("config_discovery"));
            }
            None => return Err(ConfigError::missing("typed_config")),
        };
        let made = match registry().get(crate::proto::message_name(&any.type_url)) {
            Some(factory) => factory(any, context),
            None => Err(ConfigError::unsupported(format_args!("listener filter type {:?}", any.type_url))),
        };
        Ok(Self { filter: made.at("typed_config")?, disabled })
    }

    pub(crate) fn always(filter: Box<dyn ListenerFilter>) -> Self {
        Self { filter, disabled: None }
    }

    pub(crate) fn applies(&self, info: &ConnectionInfo) -> bool {
        !self.disabled.as_ref().is_some_and(|p| p.matches(info))
    }
}
