//! `envoy.access_loggers.http_grpc` and `tcp_grpc`: entries for an `AccessLogService`, on one stream for each worker.
//!
//! Loggers with the same `common_config` share stream and batches, as in Envoy. `logs_written` and `logs_dropped` count HTTP
//! entries only, and what was handed to a stream counts as written whatever becomes of it.

mod entry;

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::ApiVersion;
use envoy_types::pb::envoy::data::accesslog::v3 as data;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3 as pb;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::Identifier;
use prost::Message;

use crate::config_source::GrpcService;
use crate::custom_tag::CustomTag;
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::export::{Exporter, Exporters, Kind, Plan, Setting, Shape, Way, field};
use crate::format::FormatContext;
use crate::header::HeaderName;
use crate::stats::Counter;

const PATH: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";

/// A logger to an access log service.
pub struct GrpcLogger {
    exporter: Arc<Exporter>,
    common: Common,
    what: What,
}

/// What entries of both kinds show beyond the usual.
struct Common {
    filter_state: Vec<String>,
    custom_tags: Vec<CustomTag>,
}

enum What {
    Http { headers: Headers, written: Counter, dropped: Counter },
    Tcp,
}

/// Headers to log, by the name under which they are shown.
struct Headers {
    request: Vec<(String, HeaderName)>,
    response: Vec<(String, HeaderName)>,
    trailers: Vec<(String, HeaderName)>,
}

impl GrpcLogger {
    /// From `HttpGrpcAccessLogConfig`.
    pub(super) fn http(message: &pb::HttpGrpcAccessLogConfig, exporters: &Exporters) -> ConfigResult<Self> {
        let common = common_config(message.common_config.as_ref())?;
        let names = |names: &[String]| {
            let lower = |name: &String| name.to_ascii_lowercase();
            names.iter().map(|name| (lower(name), HeaderName::new(lower(name)))).collect()
        };
        let headers = Headers {
            request: names(&message.additional_request_headers_to_log),
            response: names(&message.additional_response_headers_to_log),
            trailers: names(&message.additional_response_trailers_to_log),
        };
        let scope = exporters.scope("access_logs.grpc_access_log");
        let (written, dropped) = (scope.counter("logs_written"), scope.counter("logs_dropped"));
        Ok(Self {
            exporter: exporter(common, Kind::Http, exporters).at("common_config")?,
            common: Common::from_proto(common).at("common_config")?,
            what: What::Http { headers, written, dropped },
        })
    }

    /// From `TcpGrpcAccessLogConfig`.
    pub(super) fn tcp(message: &pb::TcpGrpcAccessLogConfig, exporters: &Exporters) -> ConfigResult<Self> {
        let common = common_config(message.common_config.as_ref())?;
        Ok(Self {
            exporter: exporter(common, Kind::Tcp, exporters).at("common_config")?,
            common: Common::from_proto(common).at("common_config")?,
            what: What::Tcp,
        })
    }

    /// Logs a stream.
    pub(super) fn log(&self, context: &FormatContext<'_>) {
        let common_properties = Some(entry::common(context, &self.common));
        match &self.what {
            What::Http { headers, written, dropped } => {
                let entry = data::HttpAccessLogEntry {
                    common_properties,
                    protocol_version: entry::protocol(context.info.protocol) as i32,
                    request: Some(entry::request(context, &headers.request)),
                    response: Some(entry::response(context, headers)),
                };
                let kept = self.exporter.push(&entry);
                if kept { written } else { dropped }.inc();
            }
            What::Tcp => {
                let bytes = &context.info.bytes;
                let connection_properties = Some(data::ConnectionProperties {
                    received_bytes: bytes.received,
                    sent_bytes: bytes.sent,
                });
                self.exporter.push(&data::TcpAccessLogEntry { common_properties, connection_properties });
            }
        }
    }
}

impl Common {
    fn from_proto(message: &pb::CommonGrpcAccessLogConfig) -> ConfigResult<Self> {
        Ok(Self {
            filter_state: message.filter_state_objects_to_log.clone(),
            custom_tags: CustomTag::list_from_proto(&message.custom_tags, "custom_tags")?,
        })
    }
}

fn common_config(
    message: Option<&pb::CommonGrpcAccessLogConfig>,
) -> ConfigResult<&pb::CommonGrpcAccessLogConfig> {
    message.ok_or_else(|| ConfigError::missing("common_config"))
}

/// When batches go out, and how large they may grow.
pub(super) fn buffering(message: &pb::CommonGrpcAccessLogConfig) -> (Setting, usize) {
    let interval = message.buffer_flush_interval.as_ref().map_or(1000, |interval| {
        let (seconds, nanos) = (interval.seconds.max(0).unsigned_abs(), interval.nanos.max(0).unsigned_abs());
        seconds.saturating_mul(1000).saturating_add(u64::from(nanos / 1_000_000))
    });
    (Setting::Fixed(interval), message.buffer_size_bytes.map_or(16_384, |size| size.value as usize))
}

/// The service of a `common_config`, which must not be of the second version and has no retries.
pub(super) fn service(message: &pb::CommonGrpcAccessLogConfig) -> ConfigResult<Arc<GrpcService>> {
    #[allow(deprecated, reason = "it is known, and refused")]
    if message.transport_api_version == ApiVersion::V2 as i32 {
        let reason = "V2 (and AUTO) xDS transport protocol versions are deprecated";
        return Err(ConfigError::new(reason).at("transport_api_version"));
    }
    if message.grpc_stream_retry_policy.is_some() {
        return Err(ConfigError::unsupported("this field").at("grpc_stream_retry_policy"));
    }
    let service = message.grpc_service.as_ref().ok_or_else(|| ConfigError::missing("grpc_service"))?;
    GrpcService::from_proto(service).map(Arc::new).at("grpc_service")
}

fn exporter(
    message: &pb::CommonGrpcAccessLogConfig,
    kind: Kind,
    exporters: &Exporters,
) -> ConfigResult<Arc<Exporter>> {
    let service = service(message)?;
    let (interval, limit) = buffering(message);
    // `http_logs` and `tcp_logs` of the message, whose entries are its first field.
    let logs = if kind == Kind::Http { 2 } else { 3 };
    Ok(exporters.shared(kind, message.encode_to_vec(), || {
        let identifier = Identifier { node: Some(exporters.node()), log_name: message.log_name.clone() };
        Plan {
            way: Way::Stream { service, path: PATH, first: field(1, &identifier) },
            shape: Shape::Message { levels: vec![(logs, Default::default())], record: 1 },
            interval,
            limit,
            records: None,
            most: None,
            sent: None,
            timed: None,
        }
    }))
}
