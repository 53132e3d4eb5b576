//! OpenTelemetry: where a provider's spans go.

use std::sync::Arc;

use bytes::Bytes;
use envoy_types::pb::envoy::config::trace::v3::OpenTelemetryConfig;
use envoy_types::pb::google::protobuf::BoolValue;
use sampan_core::config_source::GrpcService;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::export::{Exporter, Kind, Plan, Setting, Shape, Way, field, millis};
use sampan_core::http_service::HttpService;
use sampan_core::otlp::{self, Resource, Scope};
use sampan_listener::FactoryContext;

const PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// The exporter of a provider; those of the same `key` share it.
pub(super) fn exporter(
    message: &OpenTelemetryConfig,
    key: Vec<u8>,
    context: &FactoryContext,
) -> ConfigResult<Arc<Exporter>> {
    let way = way(message)?;
    let resource = resource(message)?;
    let exporters = context.server.access_logs.exporters();
    Ok(exporters.shared(Kind::Spans, key, || plan(way, &resource, message, context)))
}

/// To the one service of the message. Envoy 1.40 looks for its cluster when it sends.
fn way(message: &OpenTelemetryConfig) -> ConfigResult<Way> {
    match (&message.grpc_service, &message.http_service, &message.exporter) {
        (Some(service), None, None) => {
            let mut service = GrpcService::from_proto(service).at("grpc_service")?;
            service.metadata.insert(0, ("user-agent".to_owned(), otlp::user_agent()));
            Ok(Way::Call { service: Arc::new(service), path: PATH, done: Box::new(|_, _| {}) })
        }
        (None, Some(service), None) => {
            let service = HttpService::otlp(service).at("http_service")?;
            let timeout = Setting::Fixed(millis(service.timeout));
            Ok(Way::Post { service: Arc::new(service), timeout, done: Box::new(|_, _| {}) })
        }
        (None, None, Some(exporter)) => {
            Err(ConfigError::unsupported(format_args!("exporter '{}'", exporter.name)).at("exporter"))
        }
        _ => Err(ConfigError::new(
            "OpenTelemetry Tracer must have exactly one of gRPC, HTTP, or custom exporter configured.",
        )),
    }
}

fn plan(way: Way, resource: &Resource, message: &OpenTelemetryConfig, context: &FactoryContext) -> Plan {
    let stats = context.root_scope().scope("tracing.opentelemetry");
    let runtime = |key, usual| Setting::Runtime(context.server.runtime.clone(), key, usual);
    let scope = Scope { name: "envoy".to_owned(), version: otlp::VERSION.to_owned() };
    let resource = if resource.attributes.is_empty() { Bytes::new() } else { field(1, resource) };
    let scope = if is_set(message.set_instrumentation_scope) { field(1, &scope) } else { Bytes::new() };
    let most = message.max_cache_size.map_or(1024, |most| u64::from(most.value));
    Plan {
        way,
        shape: Shape::Message { levels: vec![(1, resource), (2, scope)], record: 2 },
        interval: runtime("tracing.opentelemetry.flush_interval_ms", 5000),
        limit: usize::MAX,
        records: Some(runtime("tracing.opentelemetry.min_flush_spans", 5)),
        most: Some((most, stats.counter("spans_dropped"))),
        sent: Some(stats.counter("spans_sent")),
        timed: Some(stats.counter("timer_flushed")),
    }
}

fn is_set(field: Option<BoolValue>) -> bool {
    field.is_none_or(|set| set.value)
}

fn resource(message: &OpenTelemetryConfig) -> ConfigResult<Resource> {
    let mut resource = Resource::default();
    if is_set(message.set_service_name_resource_attribute) {
        let name = Some(message.service_name.as_str()).filter(|name| !name.is_empty());
        resource.attributes.push(otlp::text("service.name", name.unwrap_or("unknown_service:envoy")));
    }
    if is_set(message.set_telemetry_sdk_resource_attributes) {
        let sdk = [("language", "rust"), ("name", "envoy"), ("version", otlp::VERSION)];
        let sdk = sdk.map(|(key, value)| otlp::text(&format!("telemetry.sdk.{key}"), value));
        resource.attributes.extend(sdk);
    }
    otlp::detect(&message.resource_detectors, &mut resource)?;
    Ok(resource)
}
