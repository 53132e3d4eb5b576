//! The `proxy-status` header (RFC 9209) of `proxy_status_config`: what a response flag says, in words that all proxies share.
//!
//! Several flags may be set; the first of [`ERRORS`] speaks. A response without any of them gets no header. Its details are
//! written as Envoy writes them, which is no quoted string of RFC 8941 where a backslash is among them.

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ProxyStatusConfig, proxy_status_config::ProxyName,
};
use sampan_core::header::{HeaderMap, HeaderName};
use sampan_core::stream_info::ResponseFlag::{self, *};
use sampan_core::stream_info::StreamInfo;

/// Flag, error type and its recommended status; 0 is none.
const ERRORS: &[(ResponseFlag, &str, u16)] = &[
    (FailedLocalHealthCheck, "destination_unavailable", 503),
    (NoHealthyUpstream, "destination_unavailable", 503),
    (UpstreamRequestTimeout, "http_response_timeout", 504),
    (DurationTimeout, "connection_timeout", 504),
    (LocalReset, "connection_timeout", 504),
    (UpstreamRemoteReset, "connection_terminated", 502),
    (UpstreamConnectionFailure, "connection_refused", 502),
    (UnauthorizedExternalService, "connection_refused", 502),
    (UpstreamConnectionTermination, "connection_terminated", 502),
    (OverloadManager, "connection_limit_reached", 503),
    (DropOverload, "connection_limit_reached", 503),
    (FaultInjected, "http_request_error", 0),
    (DownstreamConnectionTermination, "connection_terminated", 502),
    (DownstreamRemoteReset, "connection_terminated", 502),
    (UpstreamOverflow, "connection_limit_reached", 503),
    (NoRouteFound, "destination_not_found", 500),
    (RateLimited, "connection_limit_reached", 503),
    (RateLimitServiceError, "connection_limit_reached", 503),
    (UpstreamRetryLimitExceeded, "destination_unavailable", 503),
    (StreamIdleTimeout, "http_response_timeout", 504),
    (InvalidEnvoyRequestHeaders, "http_request_error", 0),
    (DownstreamProtocolError, "http_request_error", 0),
    (UpstreamMaxStreamDurationReached, "http_response_timeout", 504),
    (NoFilterConfigFound, "proxy_configuration_error", 500),
    (UpstreamProtocolError, "http_protocol_error", 502),
    (NoClusterFound, "destination_unavailable", 503),
    (DnsResolutionFailed, "dns_error", 502),
];

/// `proxy_status_config`
#[derive(Debug)]
pub struct ProxyStatus {
    header: HeaderName,
    name: String,
    details: bool,
    termination: bool,
    flags: bool,
    recommended: bool,
}

impl ProxyStatus {
    /// Of the message; the name is the server's where it gives none.
    pub fn from_proto(message: &ProxyStatusConfig, server_name: &str, node_id: &str) -> Self {
        let name = match &message.proxy_name {
            Some(ProxyName::LiteralProxyName(name)) => name,
            // Whatever the value, as in Envoy.
            Some(ProxyName::UseNodeId(_)) => node_id,
            None => server_name,
        };
        Self {
            header: HeaderName::new("proxy-status"),
            name: name.to_owned(),
            details: !message.remove_details,
            termination: !message.remove_connection_termination_details,
            flags: !message.remove_response_flags,
            recommended: message.set_recommended_response_code,
        }
    }

    /// Adds the header behind what other proxies said; the value is the status that the response is to have instead of its own.
    pub(super) fn apply(&self, info: &StreamInfo, headers: &mut HeaderMap) -> Option<u16> {
        let (_, error, status) = ERRORS.iter().find(|(flag, ..)| info.flags.has(*flag))?;
        self.append(error, info, headers);
        (self.recommended && *status != 0).then_some(*status)
    }

    fn append(&self, error: &str, info: &StreamInfo, headers: &mut HeaderMap) {
        let mut value = format!("{}; error={error}", self.name);
        if self.details
            && let Some(details) = &info.details
        {
            value.push_str("; details=\"");
            escape(details, &mut value);
            if self.termination
                && let Some(details) = &info.termination_details
            {
                value.push_str("; ");
                escape(details, &mut value);
            }
            if self.flags {
                value.push_str("; ");
                for (i, flag) in info.flags.short().enumerate() {
                    value.push_str(if i == 0 { "" } else { "," });
                    value.push_str(flag);
                }
            }
            value.push('"');
        }
        if let Some(others) = headers.get_name(&self.header).filter(|others| !others.is_empty()) {
            value.insert_str(0, &format!("{}, ", String::from_utf8_lossy(others)));
        }
        headers.set_name(&self.header, value);
    }
}

fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '\r' => out.push_str("\\r"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '"' => out.push_str("\\\""),
            c => out.push(c),
        }
    }
}
