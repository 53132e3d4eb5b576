//! The hosts of an ORIGINAL_DST cluster: made by whichever worker is first asked for an address, taken away when an
//! interval has passed in which nobody picked them and at whose end nobody holds a connection to them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Cluster;
use crate::host::{Host, HostSet, HostSpec, LocalityHosts};

/// Hosts by address.
#[derive(Default)]
pub(crate) struct Destinations {
    hosts: Mutex<HashMap<SocketAddr, Arc<Host>>>,
    cleanups: AtomicU64,
}

impl Destinations {
    /// Grows when hosts were taken away.
    pub(crate) fn cleanups(&self) -> u64 {
        self.cleanups.load(Ordering::Relaxed)
    }
}

impl Cluster {
    pub(crate) fn destinations(&self) -> &Destinations {
        &self.used().destinations
    }

    /// The host at an address, made now if it is not there.
    pub(crate) fn destination(&self, address: SocketAddr) -> Arc<Host> {
        let mut hosts = self.destinations().hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = hosts.get(&address) {
            return host.clone();
        }
        let host = self.made(address, &format!("{}{address}", self.name()).into());
        hosts.insert(address, host.clone());
        self.publish_another(host.clone());
        host
    }

    /// A host that traffic has named.
    pub(super) fn made(&self, address: SocketAddr, hostname: &Arc<str>) -> Arc<Host> {
        let transport_socket = self.socket_index(None);
        self.count_socket(transport_socket);
        Arc::new(Host::new(HostSpec {
            address: address.into(),
            hostname,
            weight: 1,
            priority: 0,
            locality: &Arc::default(),
            metadata: &None,
            tlvs: &None,
            flags: 0,
            transport_socket,
            monitored: self.outlier().is_some(),
            starts_slowly: false,
        }))
    }

    /// Takes away the hosts that were not picked since the last time and have no connections.
    fn clean_up(&self) {
        if self.used.get().is_none() {
            return;
        }
        let mut hosts = self.destinations().hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = hosts.len();
        hosts.retain(|_, host| {
            let keep =
                host.take_picked() || host.stats.cx_active.value() > 0 || host.stats.rq_active.value() > 0;
            if !keep {
                host.set_gone();
            }
            keep
        });
        if hosts.len() < before {
            self.publish_without_gone();
            self.destinations().cleanups.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn publish_another(&self, host: Arc<Host>) {
        self.publish_destinations(self.hosts.load().hosts().cloned().chain([host]).collect());
    }

    pub(super) fn publish_without_gone(&self) {
        self.publish_destinations(self.hosts.load().hosts().filter(|h| !h.is_gone()).cloned().collect());
    }

    fn publish_destinations(&self, hosts: Vec<Arc<Host>>) {
        let level = vec![LocalityHosts { locality: Arc::default(), weight: 0, hosts }];
        self.publish(HostSet { priorities: vec![level], ..HostSet::default() }, 1);
    }
}

/// Cleans up for as long as the cluster lives.
pub(crate) fn start(cluster: &Arc<Cluster>, interval: Duration) {
    let weak = Arc::downgrade(cluster);
    let task = tokio::spawn(async move {
        loop {
            sampan_core::time::sleep(interval).await;
            let Some(cluster) = weak.upgrade() else { return };
            cluster.clean_up();
        }
    });
    cluster.own_task(task.abort_handle());
}
