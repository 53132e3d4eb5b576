//! Filter chain match: from what is known about a connection to the filter chain that serves it.
//!
//! The order of criteria is Envoy's (`envoy.config.listener.v3.FilterChainMatch`): destination port, destination
//! IP, server name, transport protocol, application protocols, direct source IP, source type, source IP, source
//! port. At each step the most specific entry is taken and **never given back**: a connection to a port that has
//! its own entries is not matched against entries without a port, even if none of the port's entries fits. So the
//! chains compile to nested maps and a match is a walk down.
//!
//! Addresses that are no IP (unix sockets) are matched as `255.255.255.255`, port 0, as Envoy does.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::listener::v3::FilterChainMatch;
use envoy_types::pb::xds::core::v3::TypedExtensionConfig;
use envoy_types::pb::xds::r#type::matcher::v3::Matcher;
use ipnet::IpNet;
use sampan_core::Address;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::matcher::ConnectionInput;
use sampan_core::matcher::tree::{Found, MatchTree, TreeContext};
use sampan_core::stream_info::ConnectionInfo;

use crate::proto::{decode, message_name};

/// How a listener finds the chain for a connection.
pub(crate) enum ChainMatcher {
    /// By the chains' own criteria.
    Criteria(Criteria),
    /// By `filter_chain_matcher`, which leads to a chain by its name.
    Tree(Box<MatchTree<ConnectionInput, Option<usize>>>),
}

/// Which chain serves a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// The chain of this number.
    Chain(usize),
    /// None: the listener's default chain.
    Nothing,
    /// A chain that is not there; not the default chain either.
    Nobody,
}

/// The compiled criteria of a listener's chains; chains are numbers.
#[derive(Debug, Default)]
pub(crate) struct Criteria {
    ports: HashMap<u16, Prefixes<ServerNames>>,
}

type ServerNames = HashMap<Box<str>, TransportProtocols>;
type TransportProtocols = HashMap<Box<str>, ApplicationProtocols>;
type ApplicationProtocols = HashMap<Box<str>, Prefixes<SourceTypes>>;
/// Any, same IP or loopback, external.
type SourceTypes = [Option<Prefixes<SourcePorts>>; 3];
type SourcePorts = HashMap<u16, usize>;

/// Longest prefix match: one hash map per prefix length that occurs.
#[derive(Debug)]
struct Prefixes<T> {
    any: Option<T>,
    v4: Vec<(u8, HashMap<u32, T>)>,
    v6: Vec<(u8, HashMap<u128, T>)>,
}

impl<T> Default for Prefixes<T> {
    fn default() -> Self {
        Self { any: None, v4: Vec::new(), v6: Vec::new() }
    }
}

impl<T: Default> Prefixes<T> {
    fn entry(&mut self, prefix: Option<IpNet>) -> &mut T {
        match prefix {
            None => self.any.get_or_insert_with(T::default),
            Some(IpNet::V4(net)) => {
                slot(&mut self.v4, net.prefix_len()).entry(net.network().to_bits()).or_default()
            }
            Some(IpNet::V6(net)) => {
                slot(&mut self.v6, net.prefix_len()).entry(net.network().to_bits()).or_default()
            }
        }
    }

    fn find(&self, ip: IpAddr) -> Option<&T> {
        let found = match ip {
            IpAddr::V4(ip) => {
                let bits = ip.to_bits();
                self.v4.iter().find_map(|(len, map)| map.get(&(bits & mask32(*len))))
            }
            IpAddr::V6(ip) => {
                let bits = ip.to_bits();
                self.v6.iter().find_map(|(len, map)| map.get(&(bits & mask128(*len))))
            }
        };
        found.or(self.any.as_ref())
    }
}

/// The map of one prefix length; lengths descend.
fn slot<K, T>(levels: &mut Vec<(u8, HashMap<K, T>)>, len: u8) -> &mut HashMap<K, T> {
    let at = levels.partition_point(|(l, _)| *l > len);
    if levels.get(at).is_none_or(|(l, _)| *l != len) {
        levels.insert(at, (len, HashMap::new()));
    }
    &mut levels[at].1
}

fn mask32(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

fn mask128(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl ChainMatcher {
    /// Of the chains' names and criteria, in their order.
    pub(crate) fn new<'a>(
        chains: impl Iterator<Item = (&'a str, Option<&'a FilterChainMatch>)>,
    ) -> ConfigResult<Self> {
        Criteria::new(chains).map(Self::Criteria)
    }

    /// Of `filter_chain_matcher` and the chains' names. The chains' criteria do not count.
    pub(crate) fn of_tree<'a>(tree: &Matcher, chains: impl Iterator<Item = &'a str>) -> ConfigResult<Self> {
        let mut names = Names(HashMap::new());
        for (index, name) in chains.enumerate() {
            let wrong = match name {
                "" => "\"name\" field is required when using a listener matcher".to_owned(),
                name if names.0.insert(name.into(), index).is_none() => continue,
                name => format!("\"name\" field is duplicated with value '{name}'"),
            };
            return Err(ConfigError::new(wrong).index(index).at("filter_chains"));
        }
        let tree = MatchTree::from_proto(tree, &mut names).at("filter_chain_matcher")?;
        Ok(Self::Tree(Box::new(tree)))
    }

    /// The chain for a connection.
    pub(crate) fn find(&self, connection: &ConnectionInfo) -> Match {
        match self {
            Self::Criteria(criteria) => criteria.find(connection).map_or(Match::Nothing, Match::Chain),
            Self::Tree(tree) => match tree.find(connection, &mut |_| {}) {
                Found::Action(chain) => chain.map_or(Match::Nobody, Match::Chain),
                Found::Nothing | Found::Pending => Match::Nothing,
            },
        }
    }
}

/// The chains by name, for the actions of a tree.
struct Names(HashMap<Box<str>, usize>);

impl TreeContext for Names {
    type Input = ConnectionInput;
    type Action = Option<usize>;
    const KEEP_MATCHING: bool = false;

    fn input(&mut self, config: &TypedExtensionConfig) -> ConfigResult<ConnectionInput> {
        let any = config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        ConnectionInput::from_any(any)?.ok_or_else(|| {
            ConfigError::unsupported(format!("input type {:?}", any.type_url)).at("typed_config")
        })
    }

    fn action(&mut self, config: &TypedExtensionConfig) -> ConfigResult<Option<usize>> {
        let any = config.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"))?;
        if message_name(&any.type_url) != "google.protobuf.StringValue" {
            let error = ConfigError::unsupported(format!("filter chain action type {:?}", any.type_url));
            return Err(error.at("typed_config"));
        }
        let name: String = decode(any).at("typed_config")?;
        Ok(self.0.get(name.as_str()).copied())
    }
}

impl Criteria {
    /// Compiles the criteria of all chains, in their order. `names` are the chains' names, for the errors.
    fn new<'a>(chains: impl Iterator<Item = (&'a str, Option<&'a FilterChainMatch>)>) -> ConfigResult<Self> {
        let mut matcher = Self::default();
        let mut seen: Vec<(&str, FilterChainMatch)> = Vec::new();
        for (index, (name, criteria)) in chains.enumerate() {
            let criteria = criteria.cloned().unwrap_or_default();
            let added = same_rules(&seen, name, &criteria)
                .and_then(|()| matcher.add(index, &criteria))
                .at("filter_chain_match");
            added.at_index("filter_chains", index)?;
            seen.push((name, criteria));
        }
        Ok(matcher)
    }

    fn add(&mut self, chain: usize, m: &FilterChainMatch) -> ConfigResult<()> {
        if !m.address_suffix.is_empty() || m.suffix_len.is_some() {
            return Err(ConfigError::new("filter chain contains unimplemented fields"));
        }
        let port = port(m.destination_port.map_or(0, |p| p.value)).at("destination_port")?;
        let destinations = prefixes(&m.prefix_ranges).at("prefix_ranges")?;
        let sources = prefixes(&m.source_prefix_ranges).at("source_prefix_ranges")?;
        let direct = prefixes(&m.direct_source_prefix_ranges).at("direct_source_prefix_ranges")?;
        let names = server_names(&m.server_names)?;
        let alpn: Vec<&str> = or_any(m.application_protocols.iter().map(String::as_str), "");
        let ports = m
            .source_ports
            .iter()
            .map(|p| self::port(*p))
            .collect::<ConfigResult<Vec<_>>>()
            .at("source_ports")?;
        let ports = or_any(ports.into_iter(), 0);
        let kind = usize::try_from(m.source_type).ok().filter(|t| *t < 3);
        let Some(kind) = kind else {
            return Err(ConfigError::new("value is not a known source type").at("source_type"));
        };

        let by_ip = self.ports.entry(port).or_default();
        for destination in &destinations {
            let by_name = by_ip.entry(*destination);
            for name in &names {
                let by_transport = by_name.entry(name.as_str().into()).or_default();
                let by_alpn = by_transport.entry(m.transport_protocol.as_str().into()).or_default();
                for protocol in &alpn {
                    let by_direct = by_alpn.entry((*protocol).into()).or_default();
                    for direct in &direct {
                        let by_source = by_direct.entry(*direct)[kind].get_or_insert_default();
                        for source in &sources {
                            add_ports(by_source.entry(*source), &ports, chain)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// The chain for a connection.
    fn find(&self, connection: &ConnectionInfo) -> Option<usize> {
        let own = connection.local.port().and_then(|port| self.ports.get(&port));
        let by_ip = match own {
            Some(by_ip) => by_ip,
            None => self.ports.get(&0)?,
        };
        let by_name = by_ip.find(ip(&connection.local))?;
        let name = connection.requested_server_name.as_deref().unwrap_or_default();
        let by_transport = find_server_name(by_name, name)?;
        let by_alpn = by_transport.get(connection.transport_protocol).or_else(|| by_transport.get(""))?;
        let by_direct = connection
            .application_protocols
            .iter()
            .find_map(|p| by_alpn.get(&**p))
            .or_else(|| by_alpn.get(""))?;
        let [any, local, external] = by_direct.find(ip(&connection.direct_remote))?;
        let by_source = match (local, external) {
            (None, None) => any.as_ref(),
            _ if connection.is_local() => local.as_ref().or(any.as_ref()),
            _ => external.as_ref().or(any.as_ref()),
        }?;
        let by_port = by_source.find(ip(&connection.remote))?;
        by_port.get(&connection.remote.port().unwrap_or(0)).or_else(|| by_port.get(&0)).copied()
    }
}

/// Two chains with equal criteria.
fn same_rules(
    seen: &[(&str, FilterChainMatch)],
    name: &str,
    criteria: &FilterChainMatch,
) -> ConfigResult<()> {
    match seen.iter().find(|(_, other)| other == criteria) {
        None => Ok(()),
        Some((other, _)) => Err(ConfigError::new(format!(
            "filter chain '{name}' has the same matching rules defined as '{other}'"
        ))),
    }
}

fn add_ports(by_port: &mut SourcePorts, ports: &[u16], chain: usize) -> ConfigResult<()> {
    for port in ports {
        // One chain may name a port or prefix twice; Envoy refuses that as well.
        if by_port.insert(*port, chain).is_some() {
            return Err(ConfigError::new(
                "multiple filter chains with overlapping matching rules are defined",
            ));
        }
    }
    Ok(())
}

/// Exact name, then ever shorter suffixes at a dot, then chains without a name.
fn find_server_name<'a>(names: &'a ServerNames, name: &str) -> Option<&'a TransportProtocols> {
    if let Some(exact) = names.get(name) {
        return Some(exact);
    }
    let dots = name.bytes().enumerate().skip(1).filter(|(at, b)| *b == b'.' && at + 1 < name.len());
    for (at, _) in dots {
        if let Some(suffix) = names.get(&name[at..]) {
            return Some(suffix);
        }
    }
    names.get("")
}

fn ip(address: &Address) -> IpAddr {
    address.ip().unwrap_or(IpAddr::V4(Ipv4Addr::BROADCAST))
}

fn port(value: u32) -> ConfigResult<u16> {
    u16::try_from(value).map_err(|_| ConfigError::new("must be <= 65535"))
}

/// Names in lower case; `*.example.com` becomes the suffix `.example.com`.
fn server_names(names: &[String]) -> ConfigResult<Vec<String>> {
    let mut out = Vec::with_capacity(names.len().max(1));
    for (index, name) in names.iter().enumerate() {
        let lower = name.to_ascii_lowercase();
        out.push(match lower.strip_prefix('*') {
            Some(suffix) if suffix.starts_with('.') => suffix.to_owned(),
            None if !lower.contains('*') => lower,
            _ => {
                return Err(ConfigError::new("partial wildcards are not supported in \"server_names\"")
                    .index(index)
                    .at("server_names"));
            }
        });
    }
    if out.is_empty() {
        out.push(String::new());
    }
    Ok(out)
}

fn prefixes(ranges: &[CidrRange]) -> ConfigResult<Vec<Option<IpNet>>> {
    let mut out = Vec::with_capacity(ranges.len().max(1));
    for (index, range) in ranges.iter().enumerate() {
        out.push(Some(prefix(range).map_err(|e| e.index(index))?));
    }
    if out.is_empty() {
        out.push(None);
    }
    Ok(out)
}

/// A prefix as Envoy reads it: a length beyond the address' is the address' whole length, host bits are cut.
pub(crate) fn prefix(range: &CidrRange) -> ConfigResult<IpNet> {
    let ip: IpAddr = range.address_prefix.parse().map_err(|_| {
        ConfigError::new(format!("malformed IP address: {}", range.address_prefix)).at("address_prefix")
    })?;
    let bits: u8 = if ip.is_ipv4() { 32 } else { 128 };
    let len = range.prefix_len.map_or(0, |l| u8::try_from(l.value).unwrap_or(u8::MAX)).min(bits);
    IpNet::new(ip, len).map(|net| net.trunc()).map_err(|e| ConfigError::new(e.to_string()))
}

fn or_any<T>(items: impl Iterator<Item = T>, any: T) -> Vec<T> {
    let mut out: Vec<T> = items.collect();
    if out.is_empty() {
        out.push(any);
    }
    out
}

#[cfg(test)]
mod tests;
