//! The transport sockets of a cluster, one of which each host takes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use envoy_types::pb::envoy::admin::v3::Certificate;
use sampan_core::ConfigResult;
use sampan_core::error::AtField;
use sampan_core::stats::Scope;
use sampan_core::stream_info::Metadata;
use sampan_tls::{ClientContext, StaticSecrets, TlsSlot, WantedSecret};

use super::Cluster;
use crate::config::{ClusterConfig, TransportSocketConfig};
use crate::host::Host;
use crate::proxy_header::ProxyHeaderConfig;

/// What lies between a connection and the codec, ready to use; nothing for `raw_buffer`.
pub(crate) struct TransportSocket {
    /// What goes out first.
    pub(crate) header: Option<Arc<ProxyHeaderConfig>>,
    pub(crate) tls: Option<TlsSocket>,
}

/// TLS to a host.
pub(crate) struct TlsSocket {
    pub(crate) context: Arc<TlsSlot<ClientContext>>,
    pub(crate) auto_host_sni: bool,
    /// The context names protocols itself.
    pub(crate) alpn: bool,
}

impl TransportSocket {
    /// Those of a cluster: the one for hosts that none of the matches takes, then those of the matches.
    pub(super) fn all(
        config: &ClusterConfig,
        secrets: &StaticSecrets,
        scope: &Scope,
    ) -> ConfigResult<Box<[Self]>> {
        let mut all = vec![Self::new(&config.transport_socket, secrets, scope).at("transport_socket")?];
        for (i, m) in config.transport_socket_matches.iter().enumerate() {
            let socket = Self::new(&m.socket, secrets, scope);
            all.push(socket.at("transport_socket").at_index("transport_socket_matches", i)?);
        }
        Ok(all.into())
    }

    fn new(config: &TransportSocketConfig, secrets: &StaticSecrets, scope: &Scope) -> ConfigResult<Self> {
        let Some(message) = &config.tls else { return Ok(Self { header: config.header.clone(), tls: None }) };
        let mut context = TlsSlot::from_proto(&**message, secrets, scope).at("typed_config");
        if config.header.is_some() {
            context = context.at("transport_socket").at("typed_config");
        }
        let alpn = message.common_tls_context.as_ref().is_some_and(|c| !c.alpn_protocols.is_empty());
        let tls = TlsSocket { context: context?, auto_host_sni: message.auto_host_sni, alpn };
        Ok(Self { header: config.header.clone(), tls: Some(tls) })
    }
}

impl Cluster {
    /// The secrets that its transport sockets want of SDS.
    pub fn secrets(&self) -> Vec<WantedSecret> {
        self.sockets.iter().filter_map(|s| s.tls.as_ref()).flat_map(|tls| tls.context.wants()).collect()
    }

    /// The entries of the admin's `/certs`: one for each TLS context.
    pub fn certificates(&self) -> Vec<Certificate> {
        let tls = self.sockets.iter().filter_map(|socket| socket.tls.as_ref());
        tls.filter_map(|tls| tls.context.admin_certificate()).collect()
    }

    pub(crate) fn socket(&self, host: &Host) -> &TransportSocket {
        self.sockets.get(host.transport_socket()).unwrap_or(&self.sockets[0])
    }

    /// Whether a transport socket sends PROXY headers.
    pub(crate) fn sends_headers(&self) -> bool {
        self.sends_headers
    }

    pub(super) fn socket_index(&self, metadata: Option<&Metadata>) -> u32 {
        let matches = &self.config.transport_socket_matches;
        matches.iter().position(|m| m.matches(metadata)).map_or(0, |i| i as u32 + 1)
    }

    pub(super) fn count_socket(&self, index: u32) {
        let index = index as usize;
        match self.used.get() {
            Some(used) => used.socket_matches[index].inc(),
            None => {
                self.socket_matches[index].fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
