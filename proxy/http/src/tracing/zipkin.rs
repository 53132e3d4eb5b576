//! Zipkin: what a provider's message says, and its spans as collectors want them, in JSON or in protobuf (API v2).
//!
//! `timer_flushed` counts only batches that waited. Ids in protobuf are Envoy's: a trace's in network order, a span's as the
//! machine has it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::trace::v3::ZipkinConfig;
use envoy_types::pb::envoy::config::trace::v3::zipkin_config::{
    CollectorEndpointVersion, TraceContextOption,
};
use envoy_types::pb::opentelemetry::proto::common::v1::any_value::Value;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::export::{Exporter, Kind, Plan, Posted, Setting, Shape, Way};
use sampan_core::format::{hex, write_json_string};
use sampan_core::header::HeaderId;
use sampan_core::http_service::{HttpService, Parts};
use sampan_core::local_info;
use sampan_core::otlp::{self, CLIENT};
use sampan_listener::FactoryContext;

/// What makes a context.
#[derive(Debug, Clone, Copy)]
pub struct Zipkin {
    /// `trace_id_128bit`
    pub wide: bool,
    /// `shared_span_context`: a server's span is its caller's.
    pub shared: bool,
    /// `timestamp_trace_ids`
    pub timed: bool,
    /// `USE_B3_WITH_W3C_PROPAGATION`
    pub w3c: bool,
    /// The request's span is a server's whatever the direction: the proxy is a hop of its own (`spawn_upstream_span`,
    /// `split_spans_for_request`).
    pub hop: bool,
}

impl Zipkin {
    /// From the message.
    #[allow(deprecated, reason = "`split_spans_for_request` is deprecated and still known")]
    pub(super) fn from_proto(config: &ZipkinConfig, child: bool) -> Self {
        Self {
            wide: config.trace_id_128bit,
            shared: config.shared_span_context.is_none_or(|shared| shared.value),
            timed: config.timestamp_trace_ids,
            w3c: config.trace_context_option() == TraceContextOption::UseB3WithW3cPropagation,
            hop: child || config.split_spans_for_request,
        }
    }
}

/// Where spans are posted to.
pub(super) struct Reporter {
    exporter: Arc<Exporter>,
    /// `HTTP_PROTO`
    protobuf: bool,
    shared: bool,
    /// The node's cluster.
    service: String,
}

impl Reporter {
    /// From the message; reporters of the same `key` share an exporter.
    pub(super) fn from_proto(
        config: &ZipkinConfig,
        key: Vec<u8>,
        context: &FactoryContext,
    ) -> ConfigResult<Self> {
        let protobuf = match config.collector_endpoint_version() {
            CollectorEndpointVersion::HttpJson => false,
            CollectorEndpointVersion::HttpProto => true,
            other => {
                let reason = format_args!("version {}", other.as_str_name());
                return Err(ConfigError::unsupported(reason).at("collector_endpoint_version"));
            }
        };
        let service = service(config)?;
        if !context.server.clusters.has(&service.cluster) {
            return Err(ConfigError::new(format!(
                "envoy.tracers.zipkin: unknown cluster '{}'",
                service.cluster
            )));
        }
        let kind = if protobuf { "application/x-protobuf" } else { "application/json" };
        let mut service = service.header(HeaderId::CONTENT_TYPE, kind);
        if let Some(message) = &config.collector_service {
            service = service.with(message).at("collector_service")?;
        }
        let exporters = context.server.access_logs.exporters();
        Ok(Self {
            exporter: exporters.shared(Kind::Spans, key, || plan(service, protobuf, context)),
            protobuf,
            shared: config.shared_span_context.is_none_or(|shared| shared.value),
            service: context.server.node.cluster.clone(),
        })
    }

    /// Sends a span.
    pub(super) fn push(&self, span: &otlp::Span) {
        let form = Form { span, shared: self.shared && span.kind != CLIENT, service: &self.service };
        if self.protobuf {
            self.exporter.push(&form.message());
        } else {
            self.exporter.push_json(&form.json());
        }
    }
}

/// The collector, as far as its host and path.
fn service(config: &ZipkinConfig) -> ConfigResult<HttpService> {
    if let Some(message) = &config.collector_service {
        let (cluster, uri) = HttpService::target(message);
        let parts = Parts::of(uri);
        return Ok(match parts.absolute {
            true if !parts.host.is_empty() => HttpService::new(cluster, parts.host, parts.path),
            true => HttpService::new(cluster, cluster, parts.path),
            false => HttpService::new(cluster, cluster, uri),
        });
    }
    if config.collector_cluster.is_empty() || config.collector_endpoint.is_empty() {
        return Err(ConfigError::new(
            "collector_cluster and collector_endpoint must be specified when not using collector_service",
        ));
    }
    let host = match config.collector_hostname.as_str() {
        "" => &config.collector_cluster,
        host => host,
    };
    Ok(HttpService::new(&config.collector_cluster, host, &config.collector_endpoint))
}

fn plan(service: HttpService, protobuf: bool, context: &FactoryContext) -> Plan {
    let stats = context.root_scope().scope("tracing.zipkin");
    let sent = stats.counter("reports_sent");
    let dropped = stats.counter("reports_dropped");
    let failed = stats.counter("reports_failed");
    let skipped = stats.counter("reports_skipped_no_cluster");
    let runtime = |key, usual| Setting::Runtime(context.server.runtime.clone(), key, usual);
    Plan {
        way: Way::Post {
            service: Arc::new(service),
            // That of the message has no effect, as in Envoy.
            timeout: runtime("tracing.zipkin.request_timeout", 5000),
            done: Box::new(move |_, posted| match posted {
                Posted::Status(202) => sent.inc(),
                Posted::Status(_) => dropped.inc(),
                Posted::Broken => failed.inc(),
                Posted::NoCluster => skipped.inc(),
            }),
        },
        shape: if protobuf { Shape::Message { levels: Vec::new(), record: 1 } } else { Shape::Json },
        interval: runtime("tracing.zipkin.flush_interval_ms", 5000),
        limit: usize::MAX,
        records: Some(runtime("tracing.zipkin.min_flush_spans", 5)),
        most: None,
        sent: Some(stats.counter("spans_sent")),
        timed: Some(stats.counter("timer_flushed")),
    }
}

/// A span to be written down.
struct Form<'a> {
    span: &'a otlp::Span,
    /// Its ids are its caller's.
    shared: bool,
    service: &'a str,
}

impl Form<'_> {
    fn is_client(&self) -> bool {
        self.span.kind == CLIENT
    }

    /// 8 bytes, or 16 where that does not do.
    fn trace_id(&self) -> &[u8] {
        let id = self.span.trace_id.as_slice();
        id.strip_prefix(&[0; 8]).unwrap_or(id)
    }

    fn start(&self) -> u64 {
        self.span.start_time_unix_nano / 1000
    }

    fn duration(&self) -> u64 {
        self.span.end_time_unix_nano.saturating_sub(self.span.start_time_unix_nano) / 1000
    }

    /// Tags without a value are left out.
    fn tags(&self) -> impl Iterator<Item = (&str, &str)> {
        self.span.attributes.iter().filter_map(|pair| match pair.value.as_ref()?.value.as_ref()? {
            Value::StringValue(text) if !text.is_empty() => Some((pair.key.as_str(), text.as_str())),
            _ => None,
        })
    }

    /// Events, and the end.
    fn annotations(&self) -> impl Iterator<Item = (u64, &str)> {
        let events = self.span.events.iter().map(|event| (event.time_unix_nano / 1000, event.name.as_str()));
        let end = (self.span.end_time_unix_nano / 1000, if self.is_client() { "cr" } else { "ss" });
        events.chain([end])
    }

    fn json(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        let member = |out: &mut Vec<u8>, name: &str, value: &str| {
            out.push(if out.is_empty() { b'{' } else { b',' });
            write_json_string(name, out);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        };
        let text = |out: &mut Vec<u8>, name: &str, value: &str| {
            member(out, name, "");
            write_json_string(value, out);
        };
        text(&mut out, "traceId", &hex(self.trace_id()));
        if !self.span.parent_span_id.is_empty() {
            text(&mut out, "parentId", &hex(&self.span.parent_span_id));
        }
        text(&mut out, "id", &hex(&self.span.span_id));
        text(&mut out, "kind", if self.is_client() { "CLIENT" } else { "SERVER" });
        if !self.span.name.is_empty() {
            text(&mut out, "name", &self.span.name);
        }
        member(&mut out, "timestamp", &self.start().to_string());
        member(&mut out, "duration", &self.duration().to_string());
        let mut endpoint = Vec::new();
        text(&mut endpoint, "ipv4", &local_info::address().to_string());
        member(&mut endpoint, "port", "0");
        if !self.service.is_empty() {
            text(&mut endpoint, "serviceName", self.service);
        }
        member(&mut out, "localEndpoint", "");
        out.append(&mut endpoint);
        out.extend_from_slice(b"},\"annotations\":[");
        for (i, (at, what)) in self.annotations().enumerate() {
            let mut annotation = Vec::new();
            member(&mut annotation, "timestamp", &at.to_string());
            text(&mut annotation, "value", what);
            out.extend_from_slice(if i == 0 { b"" } else { b"," });
            out.append(&mut annotation);
            out.push(b'}');
        }
        out.extend_from_slice(b"],\"tags\":");
        let mut tags = Vec::new();
        self.tags().for_each(|(name, value)| text(&mut tags, name, value));
        out.append(&mut tags);
        out.push(b'}');
        if self.shared {
            member(&mut out, "shared", "true");
        }
        out.push(b'}');
        out
    }

    fn message(&self) -> Span {
        let number = |id: &[u8]| <[u8; 8]>::try_from(id).map_or(0, u64::from_be_bytes);
        let span_id = |id: &[u8]| number(id).to_ne_bytes().to_vec();
        let parent = Some(&self.span.parent_span_id).filter(|id| !id.is_empty());
        let annotation = |(timestamp, value): (u64, &str)| Annotation { timestamp, value: value.to_owned() };
        let ipv4 = match local_info::address() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(_) => Vec::new(),
        };
        Span {
            trace_id: self.trace_id().to_vec(),
            parent_id: parent.map(|id| span_id(id)).unwrap_or_default(),
            id: span_id(&self.span.span_id),
            kind: if self.is_client() { 1 } else { 2 },
            name: self.span.name.clone(),
            timestamp: self.start(),
            duration: self.duration(),
            local_endpoint: Some(Endpoint { service_name: self.service.to_owned(), ipv4 }),
            annotations: self.annotations().map(annotation).collect(),
            tags: self.tags().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            shared: self.shared,
        }
    }
}

/// `zipkin.proto3.Span`
#[derive(Clone, PartialEq, prost::Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    parent_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    id: Vec<u8>,
    #[prost(int32, tag = "4")]
    kind: i32,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(fixed64, tag = "6")]
    timestamp: u64,
    #[prost(uint64, tag = "7")]
    duration: u64,
    #[prost(message, optional, tag = "8")]
    local_endpoint: Option<Endpoint>,
    #[prost(message, repeated, tag = "10")]
    annotations: Vec<Annotation>,
    #[prost(map = "string, string", tag = "11")]
    tags: HashMap<String, String>,
    #[prost(bool, tag = "13")]
    shared: bool,
}

/// `zipkin.proto3.Endpoint`
#[derive(Clone, PartialEq, prost::Message)]
struct Endpoint {
    #[prost(string, tag = "1")]
    service_name: String,
    #[prost(bytes = "vec", tag = "2")]
    ipv4: Vec<u8>,
}

/// `zipkin.proto3.Annotation`
#[derive(Clone, PartialEq, prost::Message)]
struct Annotation {
    #[prost(fixed64, tag = "1")]
    timestamp: u64,
    #[prost(string, tag = "2")]
    value: String,
}
