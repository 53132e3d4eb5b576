//! What an entry says of a stream. Source: `envoy/data/accesslog/v3/accesslog.proto`, and what Envoy 1.40 fills in.

use std::collections::HashMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::data::accesslog::v3 as data;
use envoy_types::pb::envoy::data::accesslog::v3::http_access_log_entry::HttpVersion;
use envoy_types::pb::envoy::data::accesslog::v3::response_flags::{Unauthorized, unauthorized};
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::certificate_properties::{
    SubjectAltName, subject_alt_name::San,
};
use envoy_types::pb::envoy::data::accesslog::v3::tls_properties::{CertificateProperties, TlsVersion};
use envoy_types::pb::google::protobuf::{Any, Duration, Timestamp, UInt32Value};

use super::{Common, Headers};
use crate::address::{Address, host};
use crate::custom_tag::sanitized;
use crate::format::{FormatContext, stream_id};
use crate::header::{HeaderId, HeaderMap, HeaderName};
use crate::stream_info::{CertInfo, Protocol, ResponseFlag, ResponseFlags, StreamInfo, TlsInfo};

/// Properties of streams of both kinds.
pub(super) fn common(context: &FormatContext<'_>, config: &Common) -> data::AccessLogCommon {
    let info = context.info;
    let connection = &info.connection;
    let upstream = info.upstream.as_deref();
    let since = |at: Option<Instant>| at.map(|at| duration(at.saturating_duration_since(info.start)));
    let of_upstream =
        |get: fn(&crate::stream_info::UpstreamInfo) -> Option<Instant>| since(upstream.and_then(get));
    let host = upstream.and_then(|upstream| upstream.host.as_ref());
    #[allow(deprecated, reason = "Envoy 1.40 still fills in `intermediate_log_entry`")]
    data::AccessLogCommon {
        downstream_remote_address: Some(address(&info.remote)),
        downstream_direct_remote_address: Some(address(&connection.direct_remote)),
        downstream_local_address: Some(address(&connection.local)),
        tls_properties: tls(info),
        start_time: Some(timestamp(info.start_system)),
        duration: since(info.end),
        time_to_last_rx_byte: since(info.last_downstream_rx),
        time_to_first_upstream_tx_byte: of_upstream(|u| u.first_tx),
        time_to_last_upstream_tx_byte: of_upstream(|u| u.last_tx),
        time_to_first_upstream_rx_byte: of_upstream(|u| u.first_rx),
        time_to_last_upstream_rx_byte: of_upstream(|u| u.last_rx),
        time_to_first_downstream_tx_byte: since(info.first_downstream_tx),
        time_to_last_downstream_tx_byte: since(info.last_downstream_tx),
        upstream_remote_address: host.map(address),
        upstream_local_address: upstream.and_then(|u| u.local.as_ref()).map(address),
        upstream_cluster: host.and(info.cluster.as_deref()).unwrap_or_default().to_owned(),
        upstream_transport_failure_reason: upstream
            .and_then(|u| u.transport_failure.as_deref())
            .unwrap_or_default()
            .to_owned(),
        response_flags: (!info.flags.is_empty()).then(|| flags(info.flags)),
        metadata: info.dynamic_metadata.as_deref().filter(|all| !all.is_empty()).map(|all| {
            core_pb::Metadata {
                filter_metadata: all.iter().map(|(filter, value)| (filter.clone(), value.clone())).collect(),
                ..Default::default()
            }
        }),
        route_name: info.route_name.as_deref().unwrap_or_default().to_owned(),
        filter_state_objects: filter_state(info, &config.filter_state),
        custom_tags: config
            .custom_tags
            .iter()
            .filter_map(|tag| Some((tag.name().to_owned(), tag.value(context)?.into_owned())))
            .collect(),
        upstream_request_attempt_count: info.attempts,
        connection_termination_details: info.termination_details.as_deref().unwrap_or_default().to_owned(),
        stream_id: stream_id_of(context),
        intermediate_log_entry: info.end.is_none(),
        downstream_transport_failure_reason: connection
            .transport_failure
            .as_deref()
            .unwrap_or_default()
            .to_owned(),
        downstream_wire_bytes_sent: info.bytes.wire_sent,
        downstream_wire_bytes_received: info.bytes.wire_received,
        upstream_wire_bytes_sent: info.bytes.upstream_wire_sent,
        upstream_wire_bytes_received: info.bytes.upstream_wire_received,
        access_log_type: context.log_type as i32,
        sample_rate: 0.0,
    }
}

fn stream_id_of(context: &FormatContext<'_>) -> String {
    let mut out = Vec::new();
    if stream_id(context, &mut out) { sanitized(&out).into_owned() } else { String::new() }
}

fn filter_state(info: &StreamInfo, keys: &[String]) -> HashMap<String, Any> {
    let find = |key: &String| {
        let object = info.state(key).or_else(|| info.upstream_filter_state.as_ref()?.get(key).cloned())?;
        Some((key.clone(), object.message()?))
    };
    keys.iter().filter_map(find).collect()
}

/// The request's properties.
pub(super) fn request(
    context: &FormatContext<'_>,
    names: &[(String, HeaderName)],
) -> data::HttpRequestProperties {
    let headers = context.request;
    let bytes = &context.info.bytes;
    let of = |id| text(headers, id);
    let method = core_pb::RequestMethod::from_str_name(&of(HeaderId::METHOD));
    data::HttpRequestProperties {
        request_method: method.unwrap_or_default() as i32,
        scheme: of(HeaderId::SCHEME),
        authority: of(HeaderId::AUTHORITY),
        port: None,
        path: of(HeaderId::PATH),
        user_agent: of(HeaderId::USER_AGENT),
        referer: of(HeaderId::REFERER),
        forwarded_for: of(HeaderId::X_FORWARDED_FOR),
        request_id: of(HeaderId::X_REQUEST_ID),
        original_path: of(HeaderId::X_ENVOY_ORIGINAL_PATH),
        request_headers_bytes: headers.map_or(0, |headers| headers.byte_size() as u64),
        request_body_bytes: bytes.received,
        request_headers: logged(headers, names).collect(),
        upstream_header_bytes_sent: bytes.upstream_header_sent,
        downstream_header_bytes_received: bytes.header_received,
    }
}

/// The response's properties.
pub(super) fn response(context: &FormatContext<'_>, names: &Headers) -> data::HttpResponseProperties {
    let info = context.info;
    let code = Some(u32::from(info.response_code)).filter(|code| *code != 0);
    data::HttpResponseProperties {
        response_code: code.map(|value| UInt32Value { value }),
        response_headers_bytes: context.response.map_or(0, |headers| headers.byte_size() as u64),
        response_body_bytes: info.bytes.sent,
        response_headers: logged(context.response, &names.response).collect(),
        response_trailers: logged(context.trailers, &names.trailers).collect(),
        response_code_details: info.details.as_deref().unwrap_or_default().to_owned(),
        upstream_header_bytes_received: info.bytes.upstream_header_received,
        downstream_header_bytes_sent: info.bytes.header_sent,
    }
}

/// The protocol's number.
pub(super) fn protocol(protocol: Option<Protocol>) -> HttpVersion {
    match protocol {
        None => HttpVersion::ProtocolUnspecified,
        Some(Protocol::Http10) => HttpVersion::Http10,
        Some(Protocol::Http11) => HttpVersion::Http11,
        Some(Protocol::Http2) => HttpVersion::Http2,
        Some(Protocol::Http3) => HttpVersion::Http3,
    }
}

fn text(headers: Option<&HeaderMap>, id: HeaderId) -> String {
    headers.and_then(|headers| headers.get(id)).map(|value| sanitized(value).into_owned()).unwrap_or_default()
}

fn logged<'a>(
    headers: Option<&'a HeaderMap>,
    names: &'a [(String, HeaderName)],
) -> impl Iterator<Item = (String, String)> + 'a {
    let headers = headers.into_iter();
    headers.flat_map(move |headers| {
        names.iter().filter_map(move |(shown, name)| {
            let value = headers.joined(name)?;
            Some((shown.clone(), sanitized(&value).into_owned()))
        })
    })
}

fn address(address: &Address) -> core_pb::Address {
    use core_pb::address::Address as A;
    use core_pb::envoy_internal_address::AddressNameSpecifier;
    use core_pb::socket_address::PortSpecifier;
    let address = match address {
        Address::Ip(ip) => A::SocketAddress(core_pb::SocketAddress {
            address: host(ip).to_string(),
            port_specifier: Some(PortSpecifier::PortValue(ip.port().into())),
            ..Default::default()
        }),
        Address::Pipe(path) => A::Pipe(core_pb::Pipe { path: path.to_string(), mode: 0 }),
        Address::Internal(listener, endpoint) => A::EnvoyInternalAddress(core_pb::EnvoyInternalAddress {
            address_name_specifier: Some(AddressNameSpecifier::ServerListenerName(listener.to_string())),
            endpoint_id: endpoint.to_string(),
        }),
    };
    core_pb::Address { address: Some(address) }
}

fn duration(duration: std::time::Duration) -> Duration {
    Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos().cast_signed(),
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = duration(time.duration_since(UNIX_EPOCH).unwrap_or_default());
    Timestamp { seconds: since.seconds, nanos: since.nanos }
}

fn tls(info: &StreamInfo) -> Option<data::TlsProperties> {
    let sni = info.connection.requested_server_name.as_deref().unwrap_or_default();
    let tls = info.connection.tls.as_deref();
    if sni.is_empty() && tls.is_none() {
        return None;
    }
    let mut properties = tls.map(of_connection).unwrap_or_default();
    properties.tls_sni_hostname = sni.to_owned();
    Some(properties)
}

fn of_connection(tls: &TlsInfo) -> data::TlsProperties {
    let version = match tls.version {
        "TLSv1.2" => TlsVersion::TlSv12,
        "TLSv1.3" => TlsVersion::TlSv13,
        _ => TlsVersion::VersionUnspecified,
    };
    let certificate = |certificate: Option<&CertInfo>, issuer: bool| {
        let sans = certificate.map(|c| c.uri_sans.as_slice()).unwrap_or_default();
        CertificateProperties {
            subject_alt_name: sans
                .iter()
                .map(|uri| SubjectAltName { san: Some(San::Uri(uri.clone())) })
                .collect(),
            subject: certificate.map(|c| c.subject.clone()).unwrap_or_default(),
            issuer: certificate.filter(|_| issuer).map(|c| c.issuer.clone()).unwrap_or_default(),
        }
    };
    data::TlsProperties {
        tls_version: version as i32,
        tls_cipher_suite: Some(UInt32Value { value: tls.cipher_id().into() }),
        local_certificate_properties: Some(certificate(tls.local.as_deref(), false)),
        peer_certificate_properties: Some(certificate(tls.peer.as_deref(), true)),
        tls_session_id: tls.session_id.clone(),
        ..Default::default()
    }
}

fn flags(flags: ResponseFlags) -> data::ResponseFlags {
    use ResponseFlag as F;
    let has = |flag| flags.has(flag);
    data::ResponseFlags {
        failed_local_healthcheck: has(F::FailedLocalHealthCheck),
        no_healthy_upstream: has(F::NoHealthyUpstream),
        upstream_request_timeout: has(F::UpstreamRequestTimeout),
        local_reset: has(F::LocalReset),
        upstream_remote_reset: has(F::UpstreamRemoteReset),
        upstream_connection_failure: has(F::UpstreamConnectionFailure),
        upstream_connection_termination: has(F::UpstreamConnectionTermination),
        upstream_overflow: has(F::UpstreamOverflow),
        no_route_found: has(F::NoRouteFound),
        delay_injected: has(F::DelayInjected),
        fault_injected: has(F::FaultInjected),
        rate_limited: has(F::RateLimited),
        unauthorized_details: has(F::UnauthorizedExternalService)
            .then_some(Unauthorized { reason: unauthorized::Reason::ExternalService as i32 }),
        rate_limit_service_error: has(F::RateLimitServiceError),
        downstream_connection_termination: has(F::DownstreamConnectionTermination),
        upstream_retry_limit_exceeded: has(F::UpstreamRetryLimitExceeded),
        stream_idle_timeout: has(F::StreamIdleTimeout),
        invalid_envoy_request_headers: has(F::InvalidEnvoyRequestHeaders),
        downstream_protocol_error: has(F::DownstreamProtocolError),
        upstream_max_stream_duration_reached: has(F::UpstreamMaxStreamDurationReached),
        response_from_cache_filter: has(F::ResponseFromCacheFilter),
        no_filter_config_found: has(F::NoFilterConfigFound),
        duration_timeout: has(F::DurationTimeout),
        upstream_protocol_error: has(F::UpstreamProtocolError),
        no_cluster_found: has(F::NoClusterFound),
        overload_manager: has(F::OverloadManager),
        dns_resolution_failure: has(F::DnsResolutionFailed),
        downstream_remote_reset: has(F::DownstreamRemoteReset),
    }
}
