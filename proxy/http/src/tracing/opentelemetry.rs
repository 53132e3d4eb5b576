//! OpenTelemetry: where a provider's spans go.

use std::sync::Arc;

use envoy_types::pb::envoy::config::trace::v3::OpenTelemetryConfig;
use sampan_core::config_source::GrpcService;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::export::{Exporter, Kind, Plan, Setting, Shape, Way, field};
use sampan_core::otlp::{self, Resource, Scope};
use sampan_listener::FactoryContext;

const PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// As Envoy names itself to collectors, with our version.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "/1.40.0-compatible/Clean/RELEASE/rustls");

/// The exporter of a provider; those of the same `key` share it.
pub(super) fn exporter(
    message: &OpenTelemetryConfig,
    key: Vec<u8>,
    context: &FactoryContext,
) -> ConfigResult<Option<Arc<Exporter>>> {
    if let Some(detector) = message.resource_detectors.first() {
        let what = format!("resource detector '{}'", detector.name);
        return Err(ConfigError::unsupported(what).index(0).at("resource_detectors"));
    }
    let Some(service) = &message.grpc_service else { return Ok(None) };
    let mut service = GrpcService::from_proto(service).at("grpc_service")?;
    service.metadata.insert(0, ("user-agent".to_owned(), format!("OTel-OTLP-Exporter-Envoy/{VERSION}")));
    let way = Way::Call { service: Arc::new(service), path: PATH, done: Box::new(|_, _| {}) };
    let exporters = context.server.access_logs.exporters();
    Ok(Some(exporters.shared(Kind::Spans, key, || plan(way, message, context))))
}

fn plan(way: Way, message: &OpenTelemetryConfig, context: &FactoryContext) -> Plan {
    let stats = context.root_scope().scope("tracing.opentelemetry");
    // It is there and stays 0: a batch always goes out whole.
    let _ = stats.counter("spans_dropped");
    let runtime = |key, usual| Setting::Runtime(context.server.runtime.clone(), key, usual);
    let scope = Scope { name: "envoy".to_owned(), version: VERSION.to_owned() };
    let levels = vec![(1, field(1, &resource(&message.service_name))), (2, field(1, &scope))];
    Plan {
        way,
        shape: Shape::Message { levels, record: 2 },
        interval: runtime("tracing.opentelemetry.flush_interval_ms", 5000),
        limit: usize::MAX,
        records: Some(runtime("tracing.opentelemetry.min_flush_spans", 5)),
        sent: Some(stats.counter("spans_sent")),
        timed: Some(stats.counter("timer_flushed")),
    }
}

fn resource(service: &str) -> Resource {
    let service = if service.is_empty() { "unknown_service:envoy" } else { service };
    Resource {
        attributes: vec![
            otlp::text("service.name", service),
            otlp::text("telemetry.sdk.language", "rust"),
            otlp::text("telemetry.sdk.name", "envoy"),
            otlp::text("telemetry.sdk.version", VERSION),
        ],
    }
}
