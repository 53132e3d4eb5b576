//! TLS contexts: the border that listeners and clusters use.

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    DownstreamTlsContext, Secret, UpstreamTlsContext,
};
use sampan_core::stats::Scope;
use sampan_core::stream_info::TlsInfo;
use sampan_core::{ConfigError, ConfigResult};
use thiserror::Error;

use crate::Transport;

/// The bootstrap's `static_resources.secrets`, by name.
#[derive(Default, Clone)]
pub struct StaticSecrets(pub HashMap<String, Arc<Secret>>);

/// A downstream TLS context, ready to accept.
pub struct ServerContext {}

/// An upstream TLS context, ready to connect.
pub struct ClientContext {}

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

/// Why a handshake failed, as `*_TRANSPORT_FAILURE_REASON` prints it.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct HandshakeError(pub Arc<str>);

impl ServerContext {
    /// A context of a filter chain; its counters (`ssl.handshake`, …) are made in `scope`, the listener's.
    pub fn from_proto(
        _message: &DownstreamTlsContext,
        _secrets: &StaticSecrets,
        _scope: &Scope,
    ) -> ConfigResult<Self> {
        Err(ConfigError::unsupported("DownstreamTlsContext"))
    }

    /// The server's side of a handshake.
    pub async fn accept(&self, _transport: Transport) -> Result<(Transport, TlsInfo), HandshakeError> {
        Err(HandshakeError("not supported".into()))
    }
}

impl ClientContext {
    /// A context of a cluster; its counters are made in `scope`, the cluster's.
    pub fn from_proto(
        _message: &UpstreamTlsContext,
        _secrets: &StaticSecrets,
        _scope: &Scope,
    ) -> ConfigResult<Self> {
        Err(ConfigError::unsupported("UpstreamTlsContext"))
    }

    /// The client's side of a handshake.
    pub async fn connect(
        &self,
        _transport: Transport,
        _options: &ClientOptions,
    ) -> Result<(Transport, TlsInfo), HandshakeError> {
        Err(HandshakeError("not supported".into()))
    }
}
