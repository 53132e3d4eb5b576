//! The hosts of a dynamic_forward_proxy cluster: one for each name that its cache has resolved. The cache says what comes,
//! moves and goes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sampan_core::Address;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::state_values::{dynamic_host, dynamic_port};
use sampan_core::stream_info::StreamInfo;

use super::Cluster;
use crate::config::{Discovery, ForwardConfig};
use crate::dns_cache::{DnsCache, DnsCacheUser, Entry, name};
use crate::host::Host;
use crate::worker::Destination;

/// Hosts by name.
pub(crate) struct Names {
    pub(crate) cache: Arc<DnsCache>,
    /// Until the cluster loses its slot: workers may hold it for longer, and another cache may have the name then.
    used: Mutex<Option<DnsCacheUser>>,
    hosts: Mutex<HashMap<Arc<str>, Named>>,
    removals: AtomicU64,
}

/// A host and where the cache keeps its name.
#[derive(Clone)]
pub(crate) struct Named {
    pub(crate) host: Arc<Host>,
    pub(crate) entry: Arc<Entry>,
}

impl Names {
    pub(super) fn new(cache: DnsCacheUser) -> Self {
        let removals = AtomicU64::default();
        Self { cache: Arc::clone(&cache), used: Mutex::new(Some(cache)), hosts: Mutex::default(), removals }
    }

    /// The cluster has lost its slot.
    pub(super) fn retire(&self) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Grows when a host was taken away.
    pub(crate) fn removals(&self) -> u64 {
        self.removals.load(Ordering::Relaxed)
    }

    /// The host of a name.
    pub(crate) fn get(&self, key: &str) -> Option<Named> {
        self.hosts().get(key).cloned()
    }

    fn hosts(&self) -> MutexGuard<'_, HashMap<Arc<str>, Named>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    /// Its kind's configuration and its cache, if it is a dynamic_forward_proxy cluster.
    pub fn forwards(&self) -> Option<(&ForwardConfig, &Arc<DnsCache>)> {
        match (&self.config.discovery, self.names()) {
            (Discovery::Forward(config), Some(names)) => Some((config, &names.cache)),
            _ => None,
        }
    }

    /// The port of hosts that name none.
    pub fn default_port(&self) -> u16 {
        if self.sockets[0].tls.is_some() { 443 } else { 80 }
    }

    /// The host that a request or, without headers, a connection names, if it names one: what filters have left, the
    /// request's host, the server name that TLS asks for.
    pub(crate) fn named_by<'a>(
        &self,
        headers: Option<&'a HeaderMap>,
        info: Option<&StreamInfo>,
    ) -> Option<Destination<'a>> {
        self.names()?;
        let (host, port) = match info.filter(|info| info.may_have_state()) {
            Some(info) => (dynamic_host(info), dynamic_port(info)),
            None => (None, None),
        };
        let host = match (host, headers) {
            (Some(host), _) => Cow::Owned(host),
            (None, Some(headers)) => String::from_utf8_lossy(headers.get(HeaderId::AUTHORITY)?),
            (None, None) => Cow::Owned(info?.connection.requested_server_name.as_deref()?.to_owned()),
        };
        let port = port.unwrap_or_else(|| self.default_port());
        (!host.is_empty()).then(|| Destination::Name(name::key(host, port), port))
    }

    /// Of a dynamic_forward_proxy cluster.
    pub(crate) fn names(&self) -> Option<&Names> {
        self.names.as_deref()
    }

    /// A name has resolved, or to another address than before.
    pub(crate) fn add_name(&self, entry: &Arc<Entry>, address: SocketAddr) {
        let Some(names) = self.names() else { return };
        let mut hosts = names.hosts();
        if let Some(Named { host, .. }) = hosts.get(&entry.key) {
            let address = Address::Ip(address);
            if *host.address() != address {
                host.set_address(address);
            }
            return;
        }
        let host = self.made(address, &entry.key);
        hosts.insert(entry.key.clone(), Named { host: host.clone(), entry: entry.clone() });
        self.publish_another(host);
    }

    /// The cache has given up a name.
    pub(crate) fn remove_name(&self, key: &str) {
        let Some(names) = self.names() else { return };
        let mut hosts = names.hosts();
        let Some(Named { host, .. }) = hosts.remove(key) else { return };
        host.set_gone();
        self.publish_without_gone();
        names.removals.fetch_add(1, Ordering::Relaxed);
    }
}
