//! Virtual hosts by authority (`VirtualHost.domains`): exact, then the longest `*suffix`, then the longest
//! `prefix*`, then `*`. Case does not count.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::route::v3 as pb;
use foldhash::fast::FixedState;
use sampan_core::error::{ConfigError, ConfigResult};

type Names = HashMap<Box<[u8]>, u32, FixedState>;

/// The domains of all virtual hosts.
#[derive(Default)]
pub(super) struct Hosts {
    exact: Names,
    /// By length, longest first.
    suffixes: Vec<(usize, Names)>,
    prefixes: Vec<(usize, Names)>,
    any: Option<u32>,
}

fn insert(groups: &mut Vec<(usize, Names)>, name: &[u8], index: u32) -> bool {
    let group = match groups.iter_mut().position(|(len, _)| *len == name.len()) {
        Some(at) => &mut groups[at].1,
        None => {
            groups.push((name.len(), Names::default()));
            let last = groups.len() - 1;
            &mut groups[last].1
        }
    };
    group.insert(name.into(), index).is_none()
}

impl Hosts {
    pub(super) fn new(virtual_hosts: &[pb::VirtualHost]) -> ConfigResult<Self> {
        let mut hosts = Self::default();
        for (i, virtual_host) in virtual_hosts.iter().enumerate() {
            for (d, domain) in virtual_host.domains.iter().enumerate() {
                let lower = domain.to_ascii_lowercase();
                let index = i as u32;
                let fresh = if lower == "*" {
                    hosts.any.replace(index).is_none()
                } else if let Some(suffix) = lower.strip_prefix('*') {
                    insert(&mut hosts.suffixes, suffix.as_bytes(), index)
                } else if let Some(prefix) = lower.strip_suffix('*') {
                    insert(&mut hosts.prefixes, prefix.as_bytes(), index)
                } else {
                    hosts.exact.insert(lower.as_bytes().into(), index).is_none()
                };
                if !fresh {
                    let reason = if lower == "*" {
                        "Only a single wildcard domain is permitted".to_owned()
                    } else {
                        format!(
                            "Only unique values for domains are permitted. Duplicate entry of domain {domain}"
                        )
                    };
                    return Err(ConfigError::new(reason).index(d).at("domains").index(i).at("virtual_hosts"));
                }
            }
        }
        hosts.suffixes.sort_by_key(|(len, _)| std::cmp::Reverse(*len));
        hosts.prefixes.sort_by_key(|(len, _)| std::cmp::Reverse(*len));
        Ok(hosts)
    }

    pub(super) fn find(&self, host: &[u8]) -> Option<u32> {
        if self.exact.is_empty() && self.suffixes.is_empty() && self.prefixes.is_empty() {
            return self.any;
        }
        let mut small = [0u8; 128];
        let lowered;
        let host = if host.len() <= small.len() {
            let small = &mut small[..host.len()];
            small.copy_from_slice(host);
            small.make_ascii_lowercase();
            &*small
        } else {
            lowered = host.to_ascii_lowercase();
            &lowered
        };
        if let Some(found) = self.exact.get(host) {
            return Some(*found);
        }
        // A wildcard stands for at least one character.
        for (len, names) in &self.suffixes {
            if *len < host.len()
                && let Some(found) = names.get(&host[host.len() - len..])
            {
                return Some(*found);
            }
        }
        for (len, names) in &self.prefixes {
            if *len < host.len()
                && let Some(found) = names.get(&host[..*len])
            {
                return Some(*found);
            }
        }
        self.any
    }
}
