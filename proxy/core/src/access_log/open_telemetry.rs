//! `envoy.access_loggers.open_telemetry`: log records for an OTLP collector, in calls of their own.
//!
//! Of `common_config` (deprecated and what Istio sends) only the service, the log's name and the buffering count: its tags and
//! filter state objects do not, as in Envoy 1.40. `logs_written` and `logs_dropped` are what the collector says: a call that
//! fails drops its records, a partial success those that were rejected, a POST that is not answered with 200 all of them; what
//! is for no cluster is not counted at all.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::CommonGrpcAccessLogConfig;
use envoy_types::pb::envoy::extensions::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig;
use envoy_types::pb::opentelemetry::proto::common::v1::any_value::Value;
use envoy_types::pb::opentelemetry::proto::common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList};
use prost::Message;

use super::grpc::{buffering, service};
use crate::config_source::GrpcService;
use crate::custom_tag::{CustomTag, sanitized};
use crate::error::{AtField, ConfigError, ConfigResult};
use crate::export::{Exporter, Exporters, Kind, Plan, Posted, Setting, Shape, Way, field, millis};
use crate::format::{Extensions, FormatContext, Formatter};
use crate::http_service::HttpService;
use crate::otlp;

const PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";

/// A logger to an OTLP collector.
pub struct OpenTelemetryLogger {
    exporter: Arc<Exporter>,
    body: Option<Template>,
    attributes: Vec<(String, Template)>,
    custom_tags: Vec<CustomTag>,
    filter_state: Vec<String>,
}

/// A value whose texts are formats.
enum Template {
    Text(Formatter),
    Map(Vec<(String, Template)>),
    List(Vec<Template>),
}

impl OpenTelemetryLogger {
    /// From the message.
    #[allow(deprecated, reason = "`common_config` is deprecated and still what Istio sends")]
    pub(super) fn from_proto(
        message: &OpenTelemetryAccessLogConfig,
        exporters: &Exporters,
    ) -> ConfigResult<Self> {
        let formatters = Extensions::from_proto(&message.formatters, "formatters")?;
        let body = match &message.body {
            Some(body) if body.value.is_some() => Some(Template::from_proto(body, &formatters).at("body")?),
            _ => None,
        };
        let attributes = message.attributes.as_ref().map(|list| pairs(list, &formatters).at("attributes"));
        Ok(Self {
            exporter: exporter(message, exporters)?,
            body,
            attributes: attributes.transpose()?.unwrap_or_default(),
            custom_tags: CustomTag::list_from_proto(&message.custom_tags, "custom_tags")?,
            filter_state: message.filter_state_objects_to_log.clone(),
        })
    }

    /// Logs a stream.
    pub(super) fn log(&self, context: &FormatContext<'_>) {
        let info = context.info;
        let mut attributes = values(&self.attributes, context);
        for key in &self.filter_state {
            let object = info.state(key);
            let object = object.or_else(|| info.upstream_filter_state.as_ref()?.get(key).cloned());
            if let Some(json) = object.and_then(|object| object.typed()) {
                attributes.push(otlp::text(key, json.to_string()));
            }
        }
        for tag in &self.custom_tags {
            if let Some(value) = tag.value(context) {
                attributes.push(otlp::text(tag.name(), value));
            }
        }
        self.exporter.push(&otlp::LogRecord {
            time_unix_nano: otlp::nanos(info.start_system),
            body: self.body.as_ref().map(|body| body.value(context)),
            attributes,
            trace_id: info.trace_id.as_deref().map(otlp::trace_id).unwrap_or_default(),
            span_id: info.span_id.as_deref().map(otlp::id).unwrap_or_default(),
        });
    }
}

impl Template {
    fn from_proto(message: &AnyValue, formatters: &Extensions) -> ConfigResult<Self> {
        Ok(match &message.value {
            Some(Value::StringValue(text)) => {
                Self::Text(Formatter::parse(text, formatters).at("string_value")?)
            }
            Some(Value::KvlistValue(list)) => Self::Map(pairs(list, formatters).at("kvlist_value")?),
            Some(Value::ArrayValue(list)) => {
                let item = |(i, value)| Self::from_proto(value, formatters).at_index("values", i);
                let items: ConfigResult<_> = list.values.iter().enumerate().map(item).collect();
                Self::List(items.at("array_value")?)
            }
            _ => {
                return Err(ConfigError::new(
                    "Only string values, nested key value lists and array values are supported in \
                     OpenTelemetry access log format.",
                ));
            }
        })
    }

    fn value(&self, context: &FormatContext<'_>) -> AnyValue {
        AnyValue {
            value: Some(match self {
                Self::Text(format) => {
                    let mut out = Vec::new();
                    format.write(context, &mut out);
                    let text = String::from_utf8(out);
                    Value::StringValue(text.unwrap_or_else(|e| sanitized(e.as_bytes()).into_owned()))
                }
                Self::Map(pairs) => Value::KvlistValue(KeyValueList { values: values(pairs, context) }),
                Self::List(items) => {
                    let values = items.iter().map(|item| item.value(context)).collect();
                    Value::ArrayValue(ArrayValue { values })
                }
            }),
        }
    }
}

fn pairs(list: &KeyValueList, formatters: &Extensions) -> ConfigResult<Vec<(String, Template)>> {
    let pair = |(i, pair): (usize, &KeyValue)| {
        let value = pair.value.as_ref().unwrap_or(&AnyValue { value: None });
        let value = Template::from_proto(value, formatters).at("value");
        Ok((pair.key.clone(), value.at_index("values", i)?))
    };
    list.values.iter().enumerate().map(pair).collect()
}

fn values(pairs: &[(String, Template)], context: &FormatContext<'_>) -> Vec<KeyValue> {
    let pair = |(key, value): &(String, Template)| KeyValue {
        key: key.clone(),
        value: Some(value.value(context)),
        ..Default::default()
    };
    pairs.iter().map(pair).collect()
}

#[allow(deprecated, reason = "see above")]
fn exporter(message: &OpenTelemetryAccessLogConfig, exporters: &Exporters) -> ConfigResult<Arc<Exporter>> {
    let common = message.common_config.as_ref();
    let to = transport(message)?;
    // The message's own settings, where they are, in place of those of `common_config`.
    let own = CommonGrpcAccessLogConfig {
        log_name: message.log_name.clone(),
        buffer_flush_interval: message.buffer_flush_interval,
        buffer_size_bytes: message.buffer_size_bytes,
        ..Default::default()
    };
    let of_common = common.cloned().unwrap_or_default();
    let (interval, limit) = buffering(&CommonGrpcAccessLogConfig {
        buffer_flush_interval: own.buffer_flush_interval.or(of_common.buffer_flush_interval),
        buffer_size_bytes: own.buffer_size_bytes.or(of_common.buffer_size_bytes),
        ..Default::default()
    });
    let log_name = if own.log_name.is_empty() { of_common.log_name } else { own.log_name };
    let resource = resource(message, &log_name, exporters)?;
    Ok(exporters.shared(Kind::OpenTelemetry, message.encode_to_vec(), || {
        let scope = exporters.scope("access_logs.open_telemetry_access_log");
        let (written, dropped) = (
            scope.counter(&format!("{}logs_written", message.stat_prefix)),
            scope.counter(&format!("{}logs_dropped", message.stat_prefix)),
        );
        let done = move |count: u32, rejected: u64| {
            dropped.add(rejected);
            written.add(u64::from(count) - rejected);
        };
        Plan {
            way: match to {
                Transport::Grpc(service) => Way::Call {
                    service,
                    path: PATH,
                    done: Box::new(move |count, answer| {
                        let all = u64::from(count);
                        done(count, answer.map_or(all, |answer| otlp::rejected(&answer).min(all)));
                    }),
                },
                Transport::Http(service) => Way::Post {
                    timeout: Setting::Fixed(millis(service.timeout)),
                    service: Arc::new(service),
                    done: Box::new(move |count, posted| match posted {
                        Posted::Status(200) => done(count, 0),
                        Posted::Status(_) | Posted::Broken => done(count, count.into()),
                        Posted::NoCluster => {}
                    }),
                },
            },
            shape: Shape::Message {
                levels: vec![(1, field(1, &resource)), (2, Default::default())],
                record: 2,
            },
            interval,
            limit,
            records: None,
            most: None,
            sent: None,
            timed: None,
        }
    }))
}

/// The way to the collector.
enum Transport {
    Grpc(Arc<GrpcService>),
    Http(HttpService),
}

/// The one of three fields that is set.
#[allow(deprecated, reason = "see above")]
fn transport(message: &OpenTelemetryAccessLogConfig) -> ConfigResult<Transport> {
    let common = message.common_config.as_ref().filter(|common| common.grpc_service.is_some());
    match (&message.grpc_service, &message.http_service, common) {
        (Some(direct), None, None) => GrpcService::from_proto(direct)
            .map(|service| Transport::Grpc(Arc::new(service)))
            .at("grpc_service"),
        (None, Some(http), None) => HttpService::otlp(http).map(Transport::Http).at("http_service"),
        (None, None, Some(common)) => service(common).map(Transport::Grpc).at("common_config"),
        (None, None, None) => Err(ConfigError::new(
            "OpenTelemetry access logger requires one of: grpc_service, common_config.grpc_service, or \
             http_service to be configured",
        )),
        _ => Err(ConfigError::new(
            "OpenTelemetry access logger can only have one transport configured. Specify exactly one of: grpc_service, \
             http_service, or common_config.grpc_service.",
        )),
    }
}

fn resource(
    message: &OpenTelemetryAccessLogConfig,
    log_name: &str,
    exporters: &Exporters,
) -> ConfigResult<otlp::Resource> {
    let mut resource = otlp::Resource::default();
    if !message.disable_builtin_labels {
        let node = exporters.node();
        let zone = node.locality.map(|locality| locality.zone).unwrap_or_default();
        let labels = [
            ("log_name", log_name),
            ("zone_name", &zone),
            ("cluster_name", &node.cluster),
            ("node_name", &node.id),
        ];
        resource.attributes.extend(labels.map(|(key, value)| otlp::text(key, value)));
    }
    otlp::detect(&message.resource_detectors, &mut resource)?;
    for own in message.resource_attributes.iter().flat_map(|list| &list.values) {
        resource.attributes.retain(|label| label.key != own.key);
        resource.attributes.push(own.clone());
    }
    Ok(resource)
}
