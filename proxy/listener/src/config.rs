//! A listener's model: its message checked and compiled, its filters made. No socket is opened here.

use std::hash::BuildHasher;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::config::listener::v3::listener::connection_balance_config::BalanceType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext;
use foldhash::fast::FixedState;
use sampan_core::Address;
use sampan_core::access_log::AccessLogger;
use sampan_core::drain::Drain;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::overload::OverloadState;
use sampan_core::stats::Scope;
use sampan_core::stream_info::Metadata;
use sampan_tls::{ServerContext, TlsSlot};

use crate::balance::Balance;
use crate::chain::ChainMatcher;
use crate::context::{FactoryContext, Server, TrafficDirection, Want, Wants};
use crate::filters::{ListenerFilterEntry, OriginalDst};
use crate::network::{ConnectionFilter, NetworkFilter, NetworkFilterRegistry, TerminalFilter};
use crate::proto::{decode, message_name, nonzero, refuse, u32_of};
use crate::socket_options::{Keepalive, SocketOption};
use crate::stats::{ListenerStats, scope_name};

/// A listener, ready to be bound and served; shared by all workers.
pub struct ListenerConfig {
    /// The name; a random one where the configuration has none.
    pub name: Arc<str>,
    /// Addresses, the main one first.
    pub addresses: Vec<ListenAddress>,
    /// Where the listener's stats stand.
    pub scope: Scope,
    /// Its stats.
    pub(crate) stats: ListenerStats,
    /// `traffic_direction`
    pub traffic_direction: TrafficDirection,
    /// `bind_to_port`
    pub bind_to_port: bool,
    /// One socket per worker instead of one for all.
    pub reuse_port: bool,
    /// `use_original_dst`: hand redirected connections to the listener of their destination.
    pub use_original_dst: bool,
    /// `tcp_backlog_size`
    pub backlog: i32,
    pub(crate) transparent: Option<bool>,
    pub(crate) freebind: Option<bool>,
    pub(crate) mptcp: bool,
    pub(crate) max_accepts_per_event: u32,
    pub(crate) ignore_global_limit: bool,
    /// None where no overload manager concerns this listener.
    pub(crate) overload: Option<Arc<OverloadState>>,
    pub(crate) limit_key: String,
    /// Connections of all workers, from accept to close.
    pub(crate) open: AtomicU64,
    pub(crate) buffer_limit: u32,
    pub(crate) access_log: Vec<AccessLogger>,
    pub(crate) filters: Vec<ListenerFilterEntry>,
    pub(crate) filters_timeout: Option<Duration>,
    pub(crate) continue_on_timeout: bool,
    pub(crate) matcher: ChainMatcher,
    /// `exact_balance`
    pub(crate) balance: Option<Balance>,
    pub(crate) chains: Vec<Arc<FilterChain>>,
    pub(crate) default_chain: Option<Arc<FilterChain>>,
    wants: Vec<Want>,
}

/// One address of a listener.
#[derive(Debug, Clone)]
pub struct ListenAddress {
    /// The address as configured.
    pub address: Address,
    /// `ipv4_compat`: an IPv6 socket that takes IPv4 too.
    pub ipv4_compat: bool,
    /// Mode of a unix socket's file.
    pub mode: u32,
    pub(crate) options: Vec<SocketOption>,
    pub(crate) keepalive: Option<Keepalive>,
}

/// A filter chain, ready to serve.
pub struct FilterChain {
    /// Of the message: a listener that is updated in place keeps the chains that stay.
    hash: u64,
    pub(crate) drain: Drain,
    pub(crate) name: Arc<str>,
    pub(crate) tls: Option<Arc<TlsSlot<ServerContext>>>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) filters: Vec<Arc<dyn ConnectionFilter>>,
    /// None: the chain has no filters and closes each connection.
    pub(crate) terminal: Option<Arc<dyn TerminalFilter>>,
}

const DEFAULT_BUFFER_LIMIT: u32 = 1024 * 1024;
const DEFAULT_FILTERS_TIMEOUT: Duration = Duration::from_secs(15);

impl ListenerConfig {
    /// Checks and compiles a listener.
    pub fn from_proto(
        message: &pb::Listener,
        server: &Arc<Server>,
        registry: &NetworkFilterRegistry,
    ) -> ConfigResult<Self> {
        Self::make(message, server, registry, None)
    }

    /// The same with the filter chains of `old` that did not change; nothing but filter chains may have changed.
    pub fn in_place_of(
        old: &Self,
        message: &pb::Listener,
        server: &Arc<Server>,
        registry: &NetworkFilterRegistry,
    ) -> ConfigResult<Self> {
        Self::make(message, server, registry, Some(old))
    }

    fn make(
        message: &pb::Listener,
        server: &Arc<Server>,
        registry: &NetworkFilterRegistry,
        old: Option<&Self>,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let addresses = addresses(message)?;
        let name: Arc<str> = match message.name.as_str() {
            "" => format!("{:032x}", rand::random::<u128>()).into(),
            name => name.into(),
        };
        let scope =
            server.stats.root().scope(&scope_name(&message.stat_prefix, &addresses[0].address.to_string()));
        let context = FactoryContext {
            server: server.clone(),
            listener_name: name.clone(),
            listener_scope: scope.clone(),
            listener_metadata: message.metadata.as_ref().map(metadata),
            traffic_direction: message.traffic_direction(),
            drain_modify_only: message.drain_type() == pb::listener::DrainType::ModifyOnly,
            filter_chain: "".into(),
            tls: false,
            wants: Wants::default(),
            buffer_limit: u32_of(message.per_connection_buffer_limit_bytes).unwrap_or(DEFAULT_BUFFER_LIMIT),
            overload: server.overload.clone().filter(|_| !message.bypass_overload_manager),
        };
        if message.filter_chains.is_empty() && message.default_filter_chain.is_none() {
            return Err(ConfigError::new("no filter chains specified").at("filter_chains"));
        }
        let criteria = message.filter_chains.iter().map(|c| (c.name.as_str(), c.filter_chain_match.as_ref()));
        let matcher = match &message.filter_chain_matcher {
            None => ChainMatcher::new(criteria)?,
            Some(tree) => {
                let names = message.filter_chains.iter().map(|c| c.name.as_str());
                ChainMatcher::of_tree(tree, names)?
            }
        };
        let chain = |c: &pb::FilterChain| {
            let hash = FixedState::default().hash_one(prost::Message::encode_to_vec(c));
            match old.and_then(|old| old.all_chains().find(|c| c.hash == hash)) {
                Some(same) => Ok(same.clone()),
                None => FilterChain::from_proto(c, hash, &context, registry).map(Arc::new),
            }
        };
        let chains = message.filter_chains.iter().enumerate();
        let chains =
            chains.map(|(i, c)| chain(c).at_index("filter_chains", i)).collect::<ConfigResult<_>>()?;
        let default_chain =
            message.default_filter_chain.as_ref().map(chain).transpose().at("default_filter_chain")?;
        let use_original_dst = message.use_original_dst.is_some_and(|b| b.value);
        let filters_timeout = match &message.listener_filters_timeout {
            None => Some(DEFAULT_FILTERS_TIMEOUT),
            given => nonzero(given.as_ref(), "listener_filters_timeout")?,
        };
        let is_pipe = matches!(addresses[0].address, Address::Pipe(_));
        Ok(Self {
            limit_key: format!("envoy.resource_limits.listener.{name}.connection_limit"),
            name,
            addresses,
            stats: ListenerStats::new(&scope),
            scope,
            traffic_direction: message.traffic_direction(),
            bind_to_port: bind_to_port(message),
            reuse_port: !is_pipe && message.enable_reuse_port.is_none_or(|b| b.value),
            use_original_dst,
            backlog: u32_of(message.tcp_backlog_size)
                .map_or_else(somaxconn, |n| i32::try_from(n).unwrap_or(i32::MAX)),
            transparent: message.transparent.map(|b| b.value),
            freebind: message.freebind.map(|b| b.value),
            mptcp: message.enable_mptcp,
            max_accepts_per_event: u32_of(message.max_connections_to_accept_per_socket_event)
                .unwrap_or(u32::MAX),
            ignore_global_limit: message.ignore_global_conn_limit,
            overload: context.overload.clone(),
            open: AtomicU64::new(0),
            buffer_limit: context.buffer_limit,
            access_log: context.access_loggers(&message.access_log, "access_log")?,
            filters: listener_filters(message, &context, use_original_dst)?,
            filters_timeout,
            continue_on_timeout: message.continue_on_listener_filters_timeout,
            matcher,
            balance: message.connection_balance_config.as_ref().map(|_| Balance::default()),
            chains,
            default_chain,
            wants: std::mem::take(&mut *context.wants.lock().unwrap_or_else(PoisonError::into_inner)),
        })
    }
}

impl ListenerConfig {
    pub(crate) fn all_chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.chains.iter().chain(&self.default_chain)
    }

    /// The drains of the filter chains that `new`, which takes this one's place, has not.
    pub fn leaving(&self, new: Option<&Self>) -> Vec<Drain> {
        let stays = |chain: &Arc<FilterChain>| {
            new.is_some_and(|new| new.all_chains().any(|other| Arc::ptr_eq(other, chain)))
        };
        self.all_chains().filter(|chain| !stays(chain)).map(|chain| chain.drain.clone()).collect()
    }

    /// Whether this one can serve on the sockets of `old`.
    pub fn fits_sockets_of(&self, old: &Self) -> bool {
        let same = |a: &ListenAddress, b: &ListenAddress| {
            a.address == b.address
                && a.ipv4_compat == b.ipv4_compat
                && a.mode == b.mode
                && a.options == b.options
                && a.keepalive == b.keepalive
        };
        self.addresses.len() == old.addresses.len()
            && self.addresses.iter().zip(&old.addresses).all(|(a, b)| same(a, b))
            && (self.bind_to_port, self.reuse_port, self.transparent, self.freebind, self.mptcp)
                == (old.bind_to_port, old.reuse_port, old.transparent, old.freebind, old.mptcp)
    }

    /// What its parts subscribe to; it is warm when all of that has been answered.
    pub fn wants(&self) -> &[Want] {
        &self.wants
    }

    /// The entries of the admin's `/certs`: one for each TLS context.
    pub fn certificates(&self) -> Vec<envoy_types::pb::envoy::admin::v3::Certificate> {
        self.all_chains()
            .filter_map(|chain| chain.tls.as_ref())
            .filter_map(|tls| tls.admin_certificate())
            .collect()
    }
}

impl FilterChain {
    fn from_proto(
        message: &pb::FilterChain,
        hash: u64,
        listener: &FactoryContext,
        registry: &NetworkFilterRegistry,
    ) -> ConfigResult<Self> {
        let tls = message.transport_socket.as_ref().map(|t| transport_socket(t, listener)).transpose();
        let tls = tls.at("transport_socket")?.flatten();
        let context = FactoryContext {
            filter_chain: message.name.as_str().into(),
            tls: tls.is_some(),
            ..listener.clone()
        };
        let mut filters = Vec::new();
        let mut terminal = None;
        let last = message.filters.len().saturating_sub(1);
        for (index, filter) in message.filters.iter().enumerate() {
            let made =
                network_filter(filter, &context, registry, index == last).and_then(|made| match made {
                    NetworkFilter::Terminal(_) if index != last => Err(ConfigError::new(format!(
                        "terminal filter named {} must be the last filter in a network filter chain",
                        filter.name
                    ))),
                    NetworkFilter::Connection(_) if index == last => Err(ConfigError::new(format!(
                        "non-terminal filter named {} is the last filter in a network filter chain",
                        filter.name
                    ))),
                    made => Ok(made),
                });
            match made.at_index("filters", index)? {
                NetworkFilter::Connection(f) => filters.push(f),
                NetworkFilter::Terminal(t) => terminal = Some(t),
            }
        }
        let connect_timeout =
            nonzero(message.transport_socket_connect_timeout.as_ref(), "transport_socket_connect_timeout")?;
        let drain = context.server.drain.child();
        Ok(Self { hash, drain, name: context.filter_chain, tls, connect_timeout, filters, terminal })
    }
}

fn network_filter(
    filter: &pb::Filter,
    context: &FactoryContext,
    registry: &NetworkFilterRegistry,
    last: bool,
) -> ConfigResult<NetworkFilter> {
    use pb::filter::ConfigType;
    match &filter.config_type {
        Some(ConfigType::TypedConfig(any)) => registry.make(any, context).at("typed_config"),
        Some(ConfigType::ConfigDiscovery(discovery)) => {
            crate::network::discovered(discovery, &filter.name, context, registry, last)
                .at("config_discovery")
        }
        None => Err(ConfigError::missing("typed_config")),
    }
}

fn transport_socket(
    socket: &core_pb::TransportSocket,
    context: &FactoryContext,
) -> ConfigResult<Option<Arc<TlsSlot<ServerContext>>>> {
    use core_pb::transport_socket::ConfigType;
    let Some(ConfigType::TypedConfig(any)) = &socket.config_type else {
        return Err(ConfigError::missing("typed_config"));
    };
    let made = match message_name(&any.type_url) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(None),
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => {
            decode::<DownstreamTlsContext>(any)
                .and_then(|m| TlsSlot::from_proto(&m, &context.server.secrets, &context.listener_scope))
                .map(|slot| {
                    slot.wants().into_iter().for_each(|want| context.want(want));
                    Some(slot)
                })
        }
        _ => Err(ConfigError::unsupported(format_args!("transport socket type {:?}", any.type_url))),
    };
    made.at("typed_config")
}

fn listener_filters(
    message: &pb::Listener,
    context: &FactoryContext,
    use_original_dst: bool,
) -> ConfigResult<Vec<ListenerFilterEntry>> {
    let mut filters = Vec::new();
    for (index, filter) in message.listener_filters.iter().enumerate() {
        filters.push(ListenerFilterEntry::from_proto(filter, context).at_index("listener_filters", index)?);
    }
    if use_original_dst {
        filters.push(ListenerFilterEntry::always(Box::new(OriginalDst)));
    }
    Ok(filters)
}

#[allow(deprecated, reason = "Envoy still honours the deprecated field")]
fn bind_to_port(message: &pb::Listener) -> bool {
    let deprecated = message.deprecated_v1.as_ref().and_then(|d| d.bind_to_port).map(|b| b.value);
    message.bind_to_port.map(|b| b.value).or(deprecated).unwrap_or(true)
}

#[allow(deprecated, reason = "deprecated fields are refused where Envoy honours them")]
fn refuse_unsupported(m: &pb::Listener) -> ConfigResult<()> {
    refuse(m.stats_matcher.is_some(), "stats_matcher")?;
    refuse(m.fcds_config.is_some(), "fcds_config")?;
    refuse(
        m.per_connection_buffer_high_watermark_timeout.is_some(),
        "per_connection_buffer_high_watermark_timeout",
    )?;
    refuse(m.udp_listener_config.is_some(), "udp_listener_config")?;
    refuse(m.api_listener.is_some(), "api_listener")?;
    refuse(m.listener_specifier.is_some(), "internal_listener")?;
    // No safe crate sets TCP_FASTOPEN; 0 is what the kernel does anyway.
    refuse(u32_of(m.tcp_fast_open_queue_length).is_some_and(|n| n > 0), "tcp_fast_open_queue_length")?;
    for (index, chain) in m.filter_chains.iter().chain(&m.default_filter_chain).enumerate() {
        refuse(chain.use_proxy_proto.is_some_and(|b| b.value), "use_proxy_proto")
            .at_index("filter_chains", index)?;
    }
    match m.connection_balance_config.as_ref().map(|c| &c.balance_type) {
        None => Ok(()),
        Some(None) => Err(ConfigError::new("No valid balance type for connection balance")),
        Some(Some(BalanceType::ExactBalance(_))) => Ok(()),
        Some(Some(_)) => Err(ConfigError::unsupported("this balance type")),
    }
    .at("connection_balance_config")
}

fn addresses(message: &pb::Listener) -> ConfigResult<Vec<ListenAddress>> {
    let options = socket_options(&message.socket_options).at("socket_options")?;
    let keepalive = message.tcp_keepalive.as_ref().map(Keepalive::from_proto);
    let main = message.address.as_ref().ok_or_else(|| ConfigError::missing("address"))?;
    let mut out = vec![ListenAddress::from_proto(main, options.clone(), keepalive.clone()).at("address")?];
    for (index, more) in message.additional_addresses.iter().enumerate() {
        let one = || {
            let address = more.address.as_ref().ok_or_else(|| ConfigError::missing("address"))?;
            let options = match &more.socket_options {
                Some(o) => socket_options(&o.socket_options).at("socket_options")?,
                None => options.clone(),
            };
            let keepalive =
                more.tcp_keepalive.as_ref().map(Keepalive::from_proto).or_else(|| keepalive.clone());
            ListenAddress::from_proto(address, options, keepalive).at("address")
        };
        out.push(one().at_index("additional_addresses", index)?);
    }
    Ok(out)
}

fn socket_options(options: &[core_pb::SocketOption]) -> ConfigResult<Vec<SocketOption>> {
    let each = options.iter().enumerate();
    each.filter_map(|(i, o)| SocketOption::from_proto(o).map_err(|e| e.index(i)).transpose()).collect()
}

impl ListenAddress {
    fn from_proto(
        message: &core_pb::Address,
        options: Vec<SocketOption>,
        keepalive: Option<Keepalive>,
    ) -> ConfigResult<Self> {
        use core_pb::address::Address as A;
        let address = Address::from_proto(message)?;
        let mut ipv4_compat = false;
        let mut mode = 0;
        match &message.address {
            Some(A::SocketAddress(s)) => {
                let field = |e: ConfigError| e.at("socket_address");
                refuse(s.protocol == core_pb::socket_address::Protocol::Udp as i32, "protocol")
                    .map_err(field)?;
                refuse(!s.resolver_name.is_empty(), "resolver_name").map_err(field)?;
                refuse(!s.network_namespace_filepath.is_empty(), "network_namespace_filepath")
                    .map_err(field)?;
                ipv4_compat = s.ipv4_compat;
                if ipv4_compat && !dual_stack_capable(&address) {
                    return Err(field(ConfigError::new(format!(
                        "Only IPv6 address '::' or valid IPv4-mapped IPv6 address can set ipv4_compat: {address}"
                    ))));
                }
            }
            Some(A::Pipe(p)) => mode = p.mode,
            _ => {}
        }
        Ok(Self { address, ipv4_compat, mode, options, keepalive })
    }
}

fn dual_stack_capable(address: &Address) -> bool {
    match address.ip() {
        Some(std::net::IpAddr::V6(ip)) => ip.is_unspecified() || ip.to_ipv4_mapped().is_some(),
        _ => false,
    }
}

/// Structs by filter name; typed metadata is not read by anything here.
fn metadata(message: &core_pb::Metadata) -> Arc<Metadata> {
    Arc::new(message.filter_metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
}

/// The kernel's longest accept queue, which is what Envoy asks for.
fn somaxconn() -> i32 {
    let text = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    text.trim().parse().unwrap_or(128)
}
