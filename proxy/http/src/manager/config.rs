//! The model of `HttpConnectionManager`.

mod chain;
mod protocol;
mod request;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::google::protobuf::{BoolValue, Duration as ProtoDuration, UInt32Value};
use pb::http_connection_manager as hcm;
use sampan_codec::h1::{self, ServerOptions};
use sampan_codec::h2;
use sampan_core::access_log::AccessLogger;
use sampan_core::drain::Signal;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::overload::OverloadState;
use sampan_core::stats::Lazy;
use sampan_listener::{FactoryContext, Worker};

use super::local_reply::LocalReplyConfig;
use super::proxy_status::ProxyStatus;
use super::stats::{ListenerStats, ManagerStats};
use crate::filter::HttpFilterRegistry;
use crate::route::{HeaderMutations, RouteSource};
use crate::tracing::{Tracing, idle_stats};

pub use chain::{Chain, NamedFilter, Upgrade};
pub use protocol::{Limits, header_case};
pub use request::{RequestOptions, StripPort};

use chain::{chain, upgrades};
use protocol::{h1_stream_errors, http1, http2, limits};
use request::{early_mutations, request_id, request_options};

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
        let upgrades = upgrades(message, context, registry, &prefix)?;
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
