//! From endpoints to a host set, keeping the hosts that stay.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use sampan_core::Address;
use smallvec::SmallVec;

use super::{Cluster, Resolved};
use crate::config::{EndpointConfig, EndpointTarget, LoadAssignment, LocalityConfig};
use crate::host::{Host, HostSet, HostSpec, LocalityHosts};

/// Hosts of before, by address.
pub(super) type Kept = HashMap<Address, SmallVec<[Arc<Host>; 1]>, RandomState>;

/// A host set under way.
pub(super) struct Building {
    pub(super) kept: Kept,
    /// Whether a host that stayed is described otherwise.
    pub(super) changed: bool,
}

impl Building {
    /// The hosts of an assignment. A host stays if its address, name and locality do.
    pub(super) fn hosts(
        &mut self,
        cluster: &Cluster,
        assignment: &LoadAssignment,
        resolved: &Resolved,
    ) -> HostSet {
        let mut set = HostSet {
            overprovisioning_factor: assignment.overprovisioning_factor,
            weighted_priority_health: assignment.weighted_priority_health,
            ..HostSet::default()
        };
        for (l, locality) in assignment.localities.iter().enumerate() {
            let mut hosts = Vec::with_capacity(locality.endpoints.len());
            for (e, endpoint) in locality.endpoints.iter().enumerate() {
                let (addresses, hostname) = match &endpoint.target {
                    EndpointTarget::Address(address) => (std::slice::from_ref(address), &endpoint.hostname),
                    EndpointTarget::Name(name, _) => (
                        resolved.get(&(l, e)).map(Vec::as_slice).unwrap_or_default(),
                        if endpoint.hostname.is_empty() { name } else { &endpoint.hostname },
                    ),
                };
                for address in addresses {
                    hosts.push(self.host(cluster, locality, endpoint, hostname, address));
                }
            }
            add(&mut set, locality, hosts);
        }
        // A mesh has thousands of these, nearly all with one locality.
        set.priorities.iter_mut().for_each(Vec::shrink_to_fit);
        set.priorities.shrink_to_fit();
        set
    }

    fn host(
        &mut self,
        cluster: &Cluster,
        locality: &LocalityConfig,
        endpoint: &EndpointConfig,
        hostname: &Arc<str>,
        address: &Address,
    ) -> Arc<Host> {
        let transport_socket = cluster.socket_index(endpoint.metadata.as_deref());
        // Envoy looks for the socket for each description, and again when it finds that the metadata changed.
        cluster.count_socket(transport_socket);
        let kept = self.kept.get_mut(address).and_then(|list| {
            let at = list.iter().position(|h| h.hostname == *hostname && h.locality == locality.locality)?;
            Some(list.swap_remove(at))
        });
        let spec = HostSpec {
            address: address.clone(),
            hostname,
            weight: endpoint.weight,
            priority: locality.priority,
            locality: &locality.locality,
            metadata: &endpoint.metadata,
            tlvs: &endpoint.tlvs,
            flags: endpoint.flags,
            transport_socket,
            monitored: cluster.outlier().is_some(),
            starts_slowly: cluster.config().lb.slow_start.is_some(),
        };
        match kept {
            Some(host) => {
                if host.metadata() != endpoint.metadata {
                    cluster.count_socket(transport_socket);
                }
                self.changed |= host.update(&spec);
                host
            }
            None => Arc::new(Host::new(spec)),
        }
    }
}

fn add(set: &mut HostSet, locality: &LocalityConfig, mut hosts: Vec<Arc<Host>>) {
    let level = locality.priority as usize;
    if set.priorities.len() <= level {
        set.priorities.resize_with(level + 1, Vec::new);
    }
    let level = &mut set.priorities[level];
    // Entries of one locality are one locality, whatever their number.
    match level.iter_mut().find(|have| have.locality == locality.locality) {
        Some(have) => {
            have.hosts.append(&mut hosts);
            have.weight = have.weight.max(locality.weight);
        }
        None => {
            level.push(LocalityHosts { locality: locality.locality.clone(), weight: locality.weight, hosts })
        }
    }
}
