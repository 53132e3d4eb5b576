//! The router filter's configuration.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::google::protobuf::Any;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;

use super::internal_redirect::RedirectStats;
use crate::filter::{HttpFilterContext, HttpFilterKind, LocalReply, decode};
use crate::stream::Stream;

/// The router's type.
pub const TYPE: &str = "envoy.extensions.filters.http.router.v3.Router";

/// The model of `Router`, with its counters.
pub struct RouterConfig {
    pub(super) dynamic_stats: bool,
    pub(super) suppress_envoy_headers: bool,
    pub(super) respect_expected_timeout: bool,
    /// `start_child_span`
    pub(super) starts_span: bool,
    pub(super) strict_headers: Vec<HeaderId>,
    pub(super) rq_total: Counter,
    pub(super) no_route: Counter,
    pub(super) no_cluster: Counter,
    pub(super) rq_direct_response: Counter,
    pub(super) redirects: RedirectStats,
    /// `rq_reset_after_downstream_response_started`, which Envoy counts for gRPC alone.
    pub(super) rq_reset_after_response: Counter,
    pub(super) root: Scope,
}

impl RouterConfig {
    /// Parses the filter's configuration.
    #[allow(deprecated, reason = "`start_child_span` is deprecated and still taken")]
    pub fn factory(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
        let message: Router = decode(any)?;
        let unsupported = |set: bool, field: &str| {
            if set { Err(ConfigError::unsupported("this field").at(field)) } else { Ok(()) }
        };
        unsupported(!message.upstream_log.is_empty(), "upstream_log")?;
        unsupported(message.upstream_log_options.is_some(), "upstream_log_options")?;
        unsupported(
            message.reject_connect_request_early_data.is_some_and(|b| b.value),
            "reject_connect_request_early_data",
        )?;
        unsupported(!message.upstream_http_filters.is_empty(), "upstream_http_filters")?;
        unsupported(
            message.suppress_grpc_request_failure_code_stats,
            "suppress_grpc_request_failure_code_stats",
        )?;
        let scope: Scope = context.factory.root_scope().scope(context.stat_prefix);
        let counter = |name| scope.counter(name);
        // There are no load shed points, and Envoy 1.40 counts redirects with the direct responses.
        counter("rq_overload_local_reply");
        counter("rq_redirect");
        let strict = message.strict_check_headers.iter().enumerate().map(|(i, name)| {
            match HeaderId::from_lower(name.to_ascii_lowercase().as_bytes()) {
                id @ (HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS
                | HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS
                | HeaderId::X_ENVOY_MAX_RETRIES
                | HeaderId::X_ENVOY_RETRY_ON
                | HeaderId::X_ENVOY_RETRY_GRPC_ON) => Ok(id),
                _ => Err(ConfigError::new("not one of the headers that can be checked"))
                    .at_index("strict_check_headers", i),
            }
        });
        Ok(HttpFilterKind::Router(Arc::new(Self {
            dynamic_stats: message.dynamic_stats.is_none_or(|b| b.value),
            suppress_envoy_headers: message.suppress_envoy_headers,
            respect_expected_timeout: message.respect_expected_rq_timeout,
            starts_span: message.start_child_span,
            strict_headers: strict.collect::<ConfigResult<_>>()?,
            rq_total: counter("rq_total"),
            no_route: counter("no_route"),
            no_cluster: counter("no_cluster"),
            rq_direct_response: counter("rq_direct_response"),
            redirects: RedirectStats::new(&scope),
            rq_reset_after_response: counter("rq_reset_after_downstream_response_started"),
            root: context.factory.root_scope(),
        })))
    }
}

/// A filter may have removed what no request can go without.
pub(super) fn check_required(request: &HeaderMap) -> Result<(), LocalReply> {
    let missing = match request.get(HeaderId::METHOD) {
        None => HeaderId::METHOD,
        Some(b"CONNECT") if !request.contains(HeaderId::AUTHORITY) => HeaderId::AUTHORITY,
        Some(method) if method != b"CONNECT" && !request.contains(HeaderId::PATH) => HeaderId::PATH,
        Some(_) => return Ok(()),
    };
    Err(unfit("missing required header", missing.name()))
}

/// A filter, or what a route adds, may have put something into a header that no header can carry.
pub(super) fn check_values(request: &HeaderMap) -> Result<(), LocalReply> {
    let Some(name) = request.breaks_out() else { return Ok(()) };
    Err(unfit("invalid header value for", &String::from_utf8_lossy(name)))
}

fn unfit(what: &str, name: &str) -> LocalReply {
    let details = format!("filter_removed_required_request_headers{{{}:_{name}}}", what.replace(' ', "_"));
    LocalReply::new(503, details).body(format!("{what}: {name}")).flag(ResponseFlag::DownstreamProtocolError)
}

/// `strict_check_headers`
pub(super) fn check_strict(stream: &Stream, config: &RouterConfig) -> Result<(), LocalReply> {
    for id in &config.strict_headers {
        let Some(value) = stream.request.get_str(*id) else { continue };
        let ok = match *id {
            HeaderId::X_ENVOY_RETRY_ON | HeaderId::X_ENVOY_RETRY_GRPC_ON => {
                crate::route::RetryOn::parse(value).1
            }
            _ => value.parse::<u64>().is_ok(),
        };
        if !ok {
            let name = id.name();
            return Err(LocalReply::new(400, format!("request_headers_failed_strict_check{{{name}}}"))
                .body(format!("invalid header '{name}' with value '{value}'"))
                .flag(ResponseFlag::InvalidEnvoyRequestHeaders));
        }
    }
    Ok(())
}
