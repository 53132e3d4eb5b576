//! Spans, as Envoy's tracers fill them in (`HttpTracerUtility::finalizeDownstreamSpan`), in OTLP's form.
//!
//! A span is made when its stream ends, of what is known then; a stream that is not sampled costs nothing. With
//! `spawn_upstream_span` the upstream's span is made at the same time, one for the last attempt.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager as hcm;
use envoy_types::pb::opentelemetry::proto::common::v1::KeyValue;
use sampan_core::clock;
use sampan_core::custom_tag::{CustomTag, sanitized};
use sampan_core::export::Exporter;
use sampan_core::format::{FormatContext, is_grpc_request};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};
use sampan_core::otlp::{self, CLIENT, Event, SERVER, Span, Status};
use sampan_core::stream_info::StreamInfo;

use super::Context;
use super::zipkin::Reporter;
use crate::stream::Stream;

/// `STATUS_CODE_ERROR`
const ERROR: i32 = 2;

/// The context was sampled, and it is known whether its parent is another's.
const FLAGS: u32 = 0x101;
/// The parent is another's.
const REMOTE: u32 = 0x200;

/// Where spans go, and what they show beyond the usual.
pub(super) struct Spans {
    sink: Sink,
    longest_path: usize,
    verbose: bool,
    /// The request's span is a server's whatever the direction.
    hop: bool,
}

/// The provider's collector.
pub(super) enum Sink {
    /// One of OTLP.
    Otlp(Arc<Exporter>),
    /// Zipkin's.
    Zipkin(Reporter),
}

impl Spans {
    /// Spans for a connection manager.
    pub(super) fn new(sink: Sink, message: &hcm::Tracing, hop: bool) -> Self {
        let longest_path = message.max_path_tag_length.map_or(256, |length| length.value as usize);
        Self { sink, longest_path, verbose: message.verbose, hop }
    }

    fn push(&self, span: &Span) {
        match &self.sink {
            Sink::Otlp(exporter) => {
                exporter.push(span);
            }
            Sink::Zipkin(reporter) => reporter.push(span),
        }
    }

    /// The stream is over: sends its spans.
    pub(super) fn finish(
        &self,
        stream: &Stream,
        trace: &Context,
        context: &FormatContext<'_>,
        tags: &[&[CustomTag]],
    ) {
        let info = context.info;
        if let Some(upstream) = &info.upstream
            && let Some(span_id) = trace.child
            && trace.child_sampled
        {
            let mut span = self.span(trace, span_id, info);
            span.parent_span_id = trace.span.to_be_bytes().to_vec();
            span.kind = CLIENT;
            let name = info.cluster_observability.as_ref().or(info.cluster.as_ref());
            span.name = format!("router {} egress", name.map_or("", |name| name));
            if let Some(at) = upstream.first_tx {
                span.start_time_unix_nano = otlp::nanos(wall(info, at));
            }
            let mut tags = Tags(&mut span);
            if info.attempts > 1 {
                tags.set("retry.count", (info.attempts - 1).to_string());
            }
            tags.protocol(info);
            if let Some(host) = &upstream.host {
                tags.set("upstream_address", host.to_string());
                tags.set("peer.address", host.to_string());
            }
            self.common(&mut tags, context, &[]);
            // Of the client's side it knows nothing.
            span.events.retain(|event| !event.name.contains("downstream"));
            self.push(&span);
        }
        if !trace.sampled {
            return;
        }
        let mut span = self.span(trace, trace.span, info);
        if let Some(parent) = trace.parent {
            span.parent_span_id = parent.to_be_bytes().to_vec();
            span.flags |= REMOTE;
        }
        span.kind = if trace.outbound && !self.hop { CLIENT } else { SERVER };
        span.name.clone_from(&trace.name);
        let mut tags_of = Tags(&mut span);
        let node = &stream.worker.server.node;
        tags_of.set("node_id", node.id.clone());
        tags_of.set("zone", node.zone.clone());
        self.request(&mut tags_of, context);
        tags_of.set("request_size", info.bytes.received.to_string());
        tags_of.set("response_size", info.bytes.sent.to_string());
        self.common(&mut tags_of, context, tags);
        [context.response, context.trailers].into_iter().flatten().for_each(|headers| tags_of.grpc(headers));
        self.push(&span);
    }

    fn span(&self, trace: &Context, id: u64, info: &StreamInfo) -> Span {
        let end = info.end.unwrap_or_else(clock::recent);
        Span {
            trace_id: [trace.high.to_be_bytes(), trace.low.to_be_bytes()].concat(),
            span_id: id.to_be_bytes().to_vec(),
            trace_state: trace.state(),
            start_time_unix_nano: otlp::nanos(info.start_system),
            end_time_unix_nano: otlp::nanos(wall(info, end)),
            flags: FLAGS,
            ..Span::default()
        }
    }

    fn request(&self, tags: &mut Tags<'_>, context: &FormatContext<'_>) {
        let Some(headers) = context.request else { return };
        let text = |id| headers.get(id).map(|value| sanitized(value).into_owned());
        let or_dash = |id| text(id).unwrap_or_else(|| "-".to_owned());
        if let Some(id) = text(HeaderId::X_REQUEST_ID) {
            tags.set("guid:x-request-id", id);
        }
        tags.set("http.url", self.url(headers));
        tags.set("http.method", text(HeaderId::METHOD).unwrap_or_default());
        tags.set("downstream_cluster", or_dash(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER));
        tags.set("user_agent", or_dash(HeaderId::USER_AGENT));
        tags.protocol(context.info);
        let peer = &context.info.connection.direct_remote;
        tags.set("peer.address", peer.ip().map_or_else(|| peer.to_string(), |ip| ip.to_string()));
        if let Some(id) = text(HeaderId::X_CLIENT_TRACE_ID) {
            tags.set("guid:x-client-trace-id", id);
        }
        if is_grpc_request(context) {
            let named = [
                ("grpc.path", HeaderId::PATH),
                ("grpc.authority", HeaderId::AUTHORITY),
                ("grpc.content_type", HeaderId::CONTENT_TYPE),
                ("grpc.timeout", HeaderId::GRPC_TIMEOUT),
            ];
            for (tag, id) in named {
                if let Some(value) = text(id) {
                    tags.set(tag, value);
                }
            }
        }
    }

    /// The request's URL before rewrites, its path no longer than allowed.
    fn url(&self, headers: &HeaderMap) -> String {
        let path = headers.get(HeaderId::X_ENVOY_ORIGINAL_PATH).or_else(|| headers.get(HeaderId::PATH));
        let path = path.unwrap_or_default();
        let of = |id| headers.get(id).unwrap_or_default();
        let path = &path[..path.len().min(self.longest_path)];
        let whole = [of(HeaderId::SCHEME), b"://", of(HeaderId::AUTHORITY), path].concat();
        sanitized(&whole).into_owned()
    }

    fn common(&self, tags: &mut Tags<'_>, context: &FormatContext<'_>, custom: &[&[CustomTag]]) {
        let info = context.info;
        tags.set("component", "proxy");
        if let Some(cluster) = &info.cluster {
            tags.set("upstream_cluster", &**cluster);
            let observed = info.cluster_observability.as_ref().unwrap_or(cluster);
            tags.set("upstream_cluster.name", &**observed);
        }
        let code = info.response_code;
        tags.set("http.status_code", code.to_string());
        if code >= if tags.0.kind == CLIENT { 400 } else { 500 } {
            tags.0.status = Some(Status { code: ERROR });
        }
        tags.set("response_flags", info.flags.to_string());
        if self.verbose {
            tags.0.events = events(info);
        }
        if code == 0 || code >= 500 {
            tags.set("error", "true");
        }
        for (i, list) in custom.iter().enumerate() {
            for tag in *list {
                let overridden = custom[..i].iter().any(|more| more.iter().any(|t| t.name() == tag.name()));
                if let Some(value) = tag.value(context).filter(|_| !overridden) {
                    tags.set(tag.name(), value);
                }
            }
        }
    }
}

/// A moment of the stream by the wall clock.
fn wall(info: &StreamInfo, at: Instant) -> SystemTime {
    info.start_system + at.saturating_duration_since(info.start)
}

fn events(info: &StreamInfo) -> Vec<Event> {
    let upstream = info.upstream.as_deref();
    let moments = [
        ("last_downstream_rx_byte_received", info.last_downstream_rx),
        ("first_upstream_tx_byte_sent", upstream.and_then(|u| u.first_tx)),
        ("last_upstream_tx_byte_sent", upstream.and_then(|u| u.last_tx)),
        ("first_upstream_rx_byte_received", upstream.and_then(|u| u.first_rx)),
        ("last_upstream_rx_byte_received", upstream.and_then(|u| u.last_rx)),
        ("first_downstream_tx_byte_sent", info.first_downstream_tx),
        ("last_downstream_tx_byte_sent", info.last_downstream_tx),
    ];
    let event = |(name, at): (&str, Option<Instant>)| {
        Some(Event { time_unix_nano: otlp::nanos(wall(info, at?)), name: name.to_owned() })
    };
    moments.into_iter().filter_map(event).collect()
}

/// A span's attributes, each name once.
struct Tags<'a>(&'a mut Span);

impl Tags<'_> {
    fn set(&mut self, name: &str, value: impl Into<String>) {
        let pair: KeyValue = otlp::text(name, value);
        match self.0.attributes.iter_mut().find(|known| known.key == name) {
            Some(known) => *known = pair,
            None => self.0.attributes.push(pair),
        }
    }

    fn protocol(&mut self, info: &StreamInfo) {
        self.set("http.protocol", info.protocol.map_or("-", |protocol| protocol.as_str()));
    }

    /// What a gRPC response says of its end.
    fn grpc(&mut self, headers: &HeaderMap) {
        let text = |name: &str| headers.get_name(&HeaderName::new(name)).map(|v| sanitized(v).into_owned());
        let Some(status) = text("grpc-status") else { return };
        let code = status.parse::<u32>().ok();
        let error = matches!(code, Some(2 | 4 | 12 | 13 | 14 | 15));
        self.0.status = Some(Status { code: if error { ERROR } else { 0 } });
        self.set("grpc.status_code", status);
        if let Some(message) = text("grpc-message") {
            self.set("grpc.message", message);
        }
        if error || code == Some(8) {
            self.set("error", "true");
        }
    }
}
