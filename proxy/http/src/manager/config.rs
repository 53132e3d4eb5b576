//! The model of `HttpConnectionManager`.

mod protocol;
mod request;

pub use protocol::header_case;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::google::protobuf::{BoolValue, Duration as ProtoDuration, UInt32Value};
use ipnet::IpNet;
use pb::http_connection_manager as hcm;
use sampan_codec::h1::{self, ServerOptions};
use sampan_codec::h2;
use sampan_core::access_log::AccessLogger;
use sampan_core::drain::Signal;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::overload::OverloadState;
use sampan_core::stats::Lazy;
use sampan_core::stream_info::ConnectionInfo;
use sampan_listener::{FactoryContext, Worker};

use self::protocol::{Jittered, h1_stream_errors, http1, http2, limits};
use self::request::{early_mutations, request_id, request_options};
use super::discovered::Discovered;
use super::local_reply::LocalReplyConfig;
use super::origin::Detector;
use super::path::PathOptions;
use super::proxy_status::ProxyStatus;
use super::stats::{ListenerStats, ManagerStats};
use super::xfcc::ClientCert;
use crate::filter::{HttpFilter, HttpFilterContext, HttpFilterKind, HttpFilterRegistry};
use crate::route::{HeaderMutations, RouteSource};
use crate::router::RouterConfig;
use crate::tracing::{Tracing, idle_stats};

/// A connection manager, ready to serve; shared by all workers.
pub struct Manager {
    /// `codec_type`
    pub codec: Codec,
    /// Stats below `http.PREFIX`.
    pub stats: ManagerStats,
    /// Stats below the listener.
    pub listener_stats: ListenerStats,
    /// HTTP/1
    pub h1: ServerOptions,
    /// A bad message over HTTP/1 does not end its connection (`stream_error_on_invalid_http_message`).
    pub stream_errors: bool,
    /// HTTP/2
    pub h2: h2::Options,
    h1_stats: Lazy<h1::CodecStats>,
    /// Its codec's stats, made with the first such connection, as in Envoy.
    h2_stats: Lazy<Arc<h2::CodecStats>>,
    /// Timeouts and counts.
    pub limits: Limits,
    /// What is done to a request's headers.
    pub request: RequestOptions,
    /// `tracing`
    pub tracing: Option<Tracing>,
    /// `early_header_mutation_extensions`
    pub early_mutations: Vec<HeaderMutations>,
    /// `server_name`
    pub server_name: String,
    /// `server_header_transformation`
    pub server_header: ServerHeader,
    /// `via`
    pub via: String,
    /// `proxy_status_config`
    pub proxy_status: Option<ProxyStatus>,
    /// `always_set_request_id_in_response`
    pub request_id_in_response: bool,
    /// `proxy_100_continue`
    pub proxy_100_continue: bool,
    /// `upgrade_configs`, by lower-case type.
    pub upgrades: HashMap<Box<str>, Upgrade>,
    /// `http_filters`
    pub chain: Chain,
    /// Where routes come from.
    pub routes: RouteSource,
    /// `access_log`
    pub access_log: Vec<AccessLogger>,
    /// `access_log_options.flush_access_log_on_new_request`
    pub log_on_new_request: bool,
    /// `access_log_options.flush_log_on_tunnel_successfully_established`
    pub log_on_tunnel: bool,
    /// `access_log_options.access_log_flush_interval`
    pub log_interval: Option<Duration>,
    /// `local_reply_config`
    pub local_reply: LocalReplyConfig,
    /// `per_connection_buffer_limit_bytes` of the listener.
    pub buffer_limit: u32,
    /// The overload manager's state, where one concerns the listener.
    pub overload: Option<Arc<OverloadState>>,
    /// The listener's `drain_type` is `MODIFY_ONLY`.
    pub drain_modify_only: bool,
    /// `append_local_overload`
    pub append_local_overload: bool,
}

/// `codec_type`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// By ALPN, else by the first bytes.
    Auto,
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Timeouts and counts; `None` is never.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `common_http_protocol_options.idle_timeout`
    pub idle_timeout: Option<Duration>,
    /// `common_http_protocol_options.max_connection_duration`; [`Limits::connection_duration`] adds its jitter.
    max_connection_duration: Option<Jittered>,
    /// `http1_safe_max_connection_duration`
    pub http1_safe_max_connection_duration: bool,
    /// `common_http_protocol_options.max_stream_duration`
    pub max_stream_duration: Option<Duration>,
    /// `common_http_protocol_options.max_requests_per_connection`; 0 is no limit.
    pub max_requests_per_connection: u32,
    /// `stream_idle_timeout`
    pub stream_idle_timeout: Option<Duration>,
    /// `stream_flush_timeout`
    pub stream_flush_timeout: Option<Duration>,
    /// `request_timeout`
    pub request_timeout: Option<Duration>,
    /// `request_headers_timeout`
    pub request_headers_timeout: Option<Duration>,
    /// `drain_timeout`; [`Limits::drain_timeout`] adds its jitter.
    drain_timeout: Jittered,
    /// `delayed_close_timeout`
    pub delayed_close_timeout: Duration,
}

/// What is done to a request's headers before anything reads them.
pub struct RequestOptions {
    /// `use_remote_address`
    pub use_remote_address: bool,
    /// `xff_num_trusted_hops`
    pub xff_num_trusted_hops: u32,
    /// `original_ip_detection_extensions`, or else `x-forwarded-for` by the number of hops.
    pub origin: Vec<Detector>,
    /// `skip_xff_append`
    pub skip_xff_append: bool,
    /// `internal_address_config`
    pub internal: Option<Internal>,
    /// `append_x_forwarded_port`
    pub append_x_forwarded_port: bool,
    /// `scheme_header_transformation.scheme_to_overwrite`
    pub scheme: Option<&'static str>,
    /// `scheme_header_transformation.match_upstream`: the scheme is that of the connection to the first host.
    pub scheme_of_upstream: bool,
    /// `add_user_agent`: the service cluster's name.
    pub user_agent: Option<String>,
    /// The node's id, sent with `add_user_agent`.
    pub node: String,
    /// `generate_request_id`
    pub generate_request_id: bool,
    /// `preserve_external_request_id`
    pub preserve_external_request_id: bool,
    /// `request_id_extension`'s `pack_trace_reason`
    pub pack_trace_reason: bool,
    /// `forward_client_cert_details`, `set_current_client_cert_details`, `forward_client_cert_matcher`
    pub client_cert: ClientCert,
    /// `forward_proto_config`
    pub forward_proto: Option<ForwardProto>,
    /// Path normalisation.
    pub path: PathOptions,
    /// `strip_trailing_host_dot`
    pub strip_trailing_host_dot: bool,
    /// `strip_matching_host_port`, `strip_any_host_port`
    pub strip_port: StripPort,
}

/// `internal_address_config`
#[derive(Debug, Clone)]
pub struct Internal {
    /// `cidr_ranges`, or else the private ranges of RFC 1918 and 4193.
    pub ranges: Vec<IpNet>,
    /// `unix_sockets`
    pub unix_sockets: bool,
}

/// `forward_proto_config`
#[derive(Debug, Clone)]
pub struct ForwardProto {
    /// `https_destination_ports`
    pub https: Vec<u32>,
    /// `http_destination_ports`
    pub http: Vec<u32>,
}

impl ForwardProto {
    /// The scheme that the destination port of the PROXY header means.
    pub fn scheme(&self, connection: &ConnectionInfo, tls: bool) -> &'static str {
        let port = connection.local.port().filter(|_| connection.local_restored).map(u32::from);
        match port {
            Some(port) if self.https.contains(&port) => "https",
            Some(port) if self.http.contains(&port) => "http",
            _ if tls => "https",
            _ => "http",
        }
    }
}

/// How the host's port is stripped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StripPort {
    /// Not.
    Keep,
    /// If it is the listener's.
    Matching,
    /// Always.
    Any,
}

/// `server_header_transformation`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerHeader {
    /// Ours.
    Overwrite,
    /// Ours where there is none.
    AppendIfAbsent,
    /// The upstream's, or none.
    PassThrough,
}

/// An upgrade that the listener knows.
pub struct Upgrade {
    /// Whether routes that say nothing allow it.
    pub enabled: bool,
    /// Its own filters, if it has some.
    pub chain: Option<Chain>,
}

/// HTTP filters in order, and the router that ends them.
pub struct Chain {
    /// All but the last.
    pub filters: Vec<NamedFilter>,
    /// The last; none where there is no filter at all.
    pub router: Option<Arc<RouterConfig>>,
}

/// A filter with its name in the chain, by which routes configure it.
pub struct NamedFilter {
    /// `http_filters[].name`
    pub name: Arc<str>,
    /// The filter.
    pub filter: Arc<dyn HttpFilter>,
    /// `disabled`: off unless a route switches it on.
    pub disabled: bool,
}

/// A proto duration; negative ones were refused by the constraints.
pub fn duration(message: &ProtoDuration) -> Duration {
    Duration::new(message.seconds.max(0) as u64, message.nanos.max(0) as u32)
}

/// A duration where 0 means never.
fn or_never(message: Option<&ProtoDuration>, default: Option<Duration>) -> Option<Duration> {
    match message {
        Some(d) => Some(duration(d)).filter(|d| !d.is_zero()),
        None => default,
    }
}

fn flag(message: Option<BoolValue>, default: bool) -> bool {
    message.map_or(default, |b| b.value)
}

fn number(message: Option<UInt32Value>, default: u32) -> u32 {
    message.map_or(default, |n| n.value)
}

/// Refuses a field that is set and that Sampan does not implement.
fn refuse(set: bool, field: &str) -> ConfigResult<()> {
    if set { Err(ConfigError::unsupported("this field").at(field)) } else { Ok(()) }
}

impl Manager {
    /// Parses the message.
    #[allow(deprecated)] // `flush_access_log_on_new_request`, `access_log_flush_interval`: deprecated and still taken.
    pub fn from_proto(
        message: &pb::HttpConnectionManager,
        context: &FactoryContext,
        registry: &HttpFilterRegistry,
    ) -> ConfigResult<Self> {
        refuse_unsupported(message)?;
        let common = message.common_http_protocol_options.unwrap_or_default();
        let prefix = format!("http.{}", message.stat_prefix);
        let h1 = http1(message, &common)?;
        let h2 = http2(message, &common)?;
        let routes = {
            let scope = context.root_scope().scope(&prefix);
            RouteSource::from_proto(message.route_specifier.as_ref(), &scope, context, registry)?
        };
        let chain = chain(&message.http_filters, context, registry, &prefix, "http_filters")?;
        let mut upgrades = HashMap::new();
        for (i, upgrade) in message.upgrade_configs.iter().enumerate() {
            let chain = if upgrade.filters.is_empty() {
                None
            } else {
                Some(
                    self::chain(&upgrade.filters, context, registry, &prefix, "filters")
                        .at_index("upgrade_configs", i)?,
                )
            };
            let name = upgrade.upgrade_type.to_ascii_lowercase().into_boxed_str();
            if upgrades.insert(name, Upgrade { enabled: flag(upgrade.enabled, true), chain }).is_some() {
                return Err(ConfigError::new(format!(
                    "multiple upgrade configs with the name {:?}",
                    upgrade.upgrade_type
                ))
                .index(i)
                .at("upgrade_configs"));
            }
        }
        let log = message.access_log_options.unwrap_or_default();
        let interval = log.access_log_flush_interval.or(message.access_log_flush_interval);
        for (twice, field) in [
            (message.flush_access_log_on_new_request, "flush_access_log_on_new_request"),
            (message.access_log_flush_interval.is_some(), "access_log_flush_interval"),
        ] {
            if twice && message.access_log_options.is_some() {
                let reason = format!("Only one of {field} or access_log_options can be specified.");
                return Err(ConfigError::new(reason));
            }
        }
        let server_name = if message.server_name.is_empty() { "envoy" } else { &message.server_name };
        Ok(Self {
            codec: match message.codec_type() {
                hcm::CodecType::Auto => Codec::Auto,
                hcm::CodecType::Http1 => Codec::Http1,
                hcm::CodecType::Http2 => Codec::Http2,
                hcm::CodecType::Http3 => return Err(ConfigError::unsupported("HTTP3").at("codec_type")),
            },
            stats: ManagerStats::new(&context.root_scope().scope(&prefix)),
            listener_stats: ListenerStats::new(&context.listener_scope.scope(&prefix)),
            h1,
            h2,
            h1_stats: Lazy::new(context.root_scope().clone(), h1::CodecStats::new),
            stream_errors: h1_stream_errors(message),
            h2_stats: Lazy::new(context.root_scope().clone(), |scope| Arc::new(h2::CodecStats::new(scope))),
            limits: limits(message, &common),
            request: request_options(message, context)?,
            tracing: tracing(message, context, &prefix)?,
            early_mutations: early_mutations(&message.early_header_mutation_extensions)?,
            proxy_status: message
                .proxy_status_config
                .as_ref()
                .map(|status| ProxyStatus::from_proto(status, server_name, &context.server.node.id)),
            server_name: server_name.to_owned(),
            server_header: match message.server_header_transformation() {
                hcm::ServerHeaderTransformation::Overwrite => ServerHeader::Overwrite,
                hcm::ServerHeaderTransformation::AppendIfAbsent => ServerHeader::AppendIfAbsent,
                hcm::ServerHeaderTransformation::PassThrough => ServerHeader::PassThrough,
            },
            via: message.via.clone(),
            request_id_in_response: message.always_set_request_id_in_response,
            proxy_100_continue: message.proxy_100_continue,
            upgrades,
            chain,
            routes,
            access_log: context.access_loggers(&message.access_log, "access_log")?,
            log_on_new_request: message.flush_access_log_on_new_request
                || log.flush_access_log_on_new_request,
            log_interval: interval.as_ref().map(duration),
            log_on_tunnel: log.flush_log_on_tunnel_successfully_established,
            local_reply: LocalReplyConfig::from_proto(message.local_reply_config.as_ref(), context)
                .at("local_reply_config")?,
            buffer_limit: context.buffer_limit,
            overload: context.overload.clone(),
            drain_modify_only: context.drain_modify_only,
            append_local_overload: message.append_local_overload,
        })
    }
}

impl Manager {
    /// Stats of the HTTP/1 codec.
    pub fn h1_stats(&self) -> &h1::CodecStats {
        self.h1_stats.get()
    }

    /// Stats of the HTTP/2 codec.
    pub fn h2_stats(&self) -> &Arc<h2::CodecStats> {
        self.h2_stats.get()
    }

    /// Whether a response asks its client to go: for a drain, because health checks are told to fail, or of overload.
    /// Counted where it does.
    pub fn asks_to_go(&self, drain: &Signal, worker: &Worker) -> bool {
        let failed = || !self.drain_modify_only && worker.server.health_check_failed.load(Ordering::Relaxed);
        let mut asks = failed() || drain.asks_to_go(|| worker.random());
        if !asks && let Some(overload) = &self.overload {
            asks = overload.disable_http_keepalive.hits(|| worker.random());
            if asks {
                self.stats.downstream_cx_overload_disable_keepalive.inc();
            }
        }
        if asks {
            self.stats.downstream_cx_drain_close.inc();
        }
        asks
    }
}

fn refuse_unsupported(message: &pb::HttpConnectionManager) -> ConfigResult<()> {
    refuse(message.typed_header_validation_config.is_some(), "typed_header_validation_config")?;
    refuse(
        message.add_proxy_protocol_connection_state.is_some_and(|b| !b.value),
        "add_proxy_protocol_connection_state",
    )?;
    if let Some(tracing) = &message.tracing {
        refuse(!tracing.operation.is_empty(), "tracing.operation")?;
        refuse(!tracing.upstream_operation.is_empty(), "tracing.upstream_operation")?;
        refuse(tracing.no_context_propagation, "tracing.no_context_propagation")?;
    }
    Ok(())
}

fn tracing(
    message: &pb::HttpConnectionManager,
    context: &FactoryContext,
    prefix: &str,
) -> ConfigResult<Option<Tracing>> {
    let Some(tracing) = &message.tracing else {
        idle_stats(&context.root_scope().scope(prefix));
        return Ok(None);
    };
    let request_id = request_id(message)?;
    let made =
        Tracing::from_proto(tracing, context, prefix, (request_id.pack, request_id.samples)).at("tracing")?;
    Ok(Some(made))
}

fn chain(
    filters: &[pb::HttpFilter],
    context: &FactoryContext,
    registry: &HttpFilterRegistry,
    stat_prefix: &str,
    field: &str,
) -> ConfigResult<Chain> {
    use pb::http_filter::ConfigType;
    let mut made = Vec::new();
    let mut router = None;
    for (i, message) in filters.iter().enumerate() {
        let config = match &message.config_type {
            Some(ConfigType::TypedConfig(any)) => any,
            Some(ConfigType::ConfigDiscovery(discovery)) => {
                if i + 1 == filters.len() {
                    let error = ConfigError::unsupported("discovery of the last filter");
                    return Err(error.at("config_discovery").index(i).at(field));
                }
                let filter = Discovered::from_proto(discovery, &message.name, context, registry, stat_prefix)
                    .at("config_discovery")
                    .at_index(field, i)?;
                let name = message.name.as_str().into();
                made.push(NamedFilter { name, filter: Arc::new(filter), disabled: message.disabled });
                continue;
            }
            None if message.is_optional => continue,
            None => return Err(ConfigError::missing("typed_config").index(i).at(field)),
        };
        if router.is_some() {
            return Err(ConfigError::new("a terminal filter must be the last filter in a http filter chain")
                .index(i - 1)
                .at(field));
        }
        let filter_context = HttpFilterContext { factory: context, stat_prefix, filter_name: &message.name };
        match registry.make(config, &filter_context) {
            Ok(HttpFilterKind::Router(config)) => router = Some(config),
            Ok(HttpFilterKind::Filter(filter)) => made.push(NamedFilter {
                name: message.name.as_str().into(),
                filter,
                disabled: message.disabled,
            }),
            Err(e) => return Err(e.at("typed_config").index(i).at(field)),
        }
    }
    if router.is_none()
        && let Some(last) = filters.last()
    {
        let reason = format!("non-terminal filter {:?} is the last filter in a http filter chain", last.name);
        return Err(ConfigError::new(reason).at(field));
    }
    Ok(Chain { filters: made, router })
}

/// The options as the codec of one worker's connections takes them.
pub fn codec_options(manager: &Manager) -> Rc<ServerOptions> {
    Rc::new(manager.h1.clone())
}
