//! Tracing: whether a request is sampled, what says so downstream and upstream, and the trace context that it carries on.
//!
//! The decision is made once the route is known, by Envoy's rules (`ConnectionManagerUtility::mutateTracingRequestHeader`),
//! is packed into the request id and counted below `http.PREFIX.tracing`. A provider decides the form of the context
//! ([`context`]): the peer's is continued with a span of this proxy's own ([`span`]), which goes to the provider's collector
//! ([`zipkin`], [`opentelemetry`]).

mod context;
mod opentelemetry;
mod sampler;
mod span;
mod zipkin;

use envoy_types::pb::envoy::config::route::v3 as route_pb;
use envoy_types::pb::envoy::config::trace::v3::{OpenTelemetryConfig, ZipkinConfig, tracing};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager as hcm;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, Percent};
use sampan_core::custom_tag::{CustomTag, sanitized};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::runtime::{Fraction, Runtime};
use sampan_core::stats::{Counter, Scope};
use sampan_listener::FactoryContext;
use sampan_listener::context::TrafficDirection;

use context::Beginning;
pub use context::Context;
use prost::Message;
use sampler::Sampler;
use span::{Sink, Spans};
use zipkin::{Reporter, Zipkin};

use crate::filter::{decode, message_name};
use crate::stream::Stream;

/// Where the request id, a UUID, tells of the decision.
const REASON_AT: usize = 14;

/// `tracing` of a connection manager.
pub struct Tracing {
    sampling: Sampling,
    provider: Option<Provider>,
    /// Where the provider's spans go.
    spans: Option<Spans>,
    /// `spawn_upstream_span`
    child: bool,
    /// Requests leave this workload (`OUTBOUND`): the operation's name goes with them, not with the responses.
    outbound: bool,
    /// `pack_trace_reason` of the request id.
    pack: bool,
    /// `use_request_id_for_trace_sampling`
    by_request_id: bool,
    stats: Stats,
}

/// Who makes the spans.
#[derive(Debug)]
pub enum Provider {
    /// Zipkin, with B3 headers.
    Zipkin(Zipkin),
    /// OpenTelemetry, with W3C headers.
    OpenTelemetry(Option<Sampler>),
}

/// `client_sampling`, `random_sampling`, `overall_sampling`, of a connection manager or of a route.
pub struct Sampling {
    client: Fraction,
    random: Fraction,
    overall: Fraction,
    /// `custom_tags`
    tags: Vec<CustomTag>,
}

/// `decorator` of a route.
pub struct Decorator {
    operation: Box<str>,
    propagate: bool,
}

struct Stats {
    random_sampling: Counter,
    service_forced: Counter,
    client_enabled: Counter,
    not_traceable: Counter,
}

/// The stats of a connection manager without tracing: it has them too.
pub fn idle_stats(scope: &Scope) {
    Stats::new(scope);
}

impl Stats {
    fn new(scope: &Scope) -> Self {
        let counter = |name: &str| scope.counter(&format!("tracing.{name}"));
        counter("health_check");
        Self {
            random_sampling: counter("random_sampling"),
            service_forced: counter("service_forced"),
            client_enabled: counter("client_enabled"),
            not_traceable: counter("not_traceable"),
        }
    }
}

/// Why a request is traced, as the digit in its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Reason {
    Not = b'4',
    Sampled = b'9',
    Service = b'a',
    Client = b'b',
}

fn fraction(numerator: u32, ten_thousand: bool, key: &str) -> Fraction {
    let mut percent = FractionalPercent { numerator, ..FractionalPercent::default() };
    if ten_thousand {
        percent.set_denominator(
            envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType::TenThousand,
        );
    }
    Fraction::fixed(&percent).with_key(key)
}

impl Sampling {
    fn of_manager(message: &hcm::Tracing) -> ConfigResult<Self> {
        // Client and overall sampling are whole per cents, as in Envoy.
        let whole = |p: &Option<Percent>| p.as_ref().map_or(100, |p| p.value as u32);
        let random = message.random_sampling.as_ref().map_or(10_000, |p| (p.value * 100.0).round() as u32);
        Ok(Self {
            client: fraction(whole(&message.client_sampling), false, "tracing.client_enabled"),
            random: fraction(random, true, "tracing.random_sampling"),
            overall: fraction(whole(&message.overall_sampling), false, "tracing.global_enabled"),
            tags: CustomTag::list_from_proto(&message.custom_tags, "custom_tags")?,
        })
    }

    /// `tracing` of a route, in place of the connection manager's.
    pub fn of_route(message: &route_pb::Tracing) -> ConfigResult<Self> {
        for (text, field) in
            [(&message.operation, "operation"), (&message.upstream_operation, "upstream_operation")]
        {
            if !text.is_empty() {
                return Err(ConfigError::unsupported("this field").at(field));
            }
        }
        let one = |p: &Option<FractionalPercent>, key| {
            p.as_ref().map_or_else(|| fraction(100, false, key), |p| Fraction::fixed(p).with_key(key))
        };
        Ok(Self {
            client: one(&message.client_sampling, "tracing.client_enabled"),
            random: one(&message.random_sampling, "tracing.random_sampling"),
            overall: one(&message.overall_sampling, "tracing.global_enabled"),
            tags: CustomTag::list_from_proto(&message.custom_tags, "custom_tags")?,
        })
    }
}

impl Decorator {
    /// From the message.
    pub fn from_proto(message: &route_pb::Decorator) -> Self {
        let propagate = message.propagate.is_none_or(|p| p.value);
        Self { operation: message.operation.as_str().into(), propagate }
    }
}

impl Provider {
    fn from_proto(
        message: &tracing::Http,
        manager: &hcm::Tracing,
        context: &FactoryContext,
    ) -> ConfigResult<(Self, Spans)> {
        let Some(tracing::http::ConfigType::TypedConfig(any)) = &message.config_type else {
            return Err(ConfigError::missing("typed_config"));
        };
        let key = message.encode_to_vec();
        let child = manager.spawn_upstream_span.is_some_and(|spawn| spawn.value);
        match message_name(any) {
            "envoy.config.trace.v3.ZipkinConfig" => {
                let config: ZipkinConfig = decode(any)?;
                let reporter = Reporter::from_proto(&config, key, context)?;
                let zipkin = Zipkin::from_proto(&config, child);
                let spans = Spans::new(Sink::Zipkin(reporter), manager, zipkin.hop);
                Ok((Self::Zipkin(zipkin), spans))
            }
            "envoy.config.trace.v3.OpenTelemetryConfig" => {
                let config: OpenTelemetryConfig = decode(any)?;
                let sampler = config.sampler.as_ref().map(|s| Sampler::from_proto(s).at("sampler"));
                let exporter = opentelemetry::exporter(&config, key, context)?;
                let spans = Spans::new(Sink::Otlp(exporter), manager, child);
                Ok((Self::OpenTelemetry(sampler.transpose()?), spans))
            }
            _ => Err(ConfigError::unsupported(format!("tracer '{}' ({})", message.name, any.type_url))),
        }
    }
}

impl Tracing {
    /// From the field; `prefix` is the connection manager's.
    #[allow(deprecated)] // What is deprecated here was replaced by the listener's direction and has no effect.
    pub fn from_proto(
        message: &hcm::Tracing,
        context: &FactoryContext,
        prefix: &str,
        (pack, by_request_id): (bool, bool),
    ) -> ConfigResult<Self> {
        let scope = context.root_scope().scope(prefix);
        let provider = message.provider.as_ref().or(context.server.tracing.as_ref());
        let provider = provider.map(|p| Provider::from_proto(p, message, context));
        let (provider, spans) = provider.transpose().at("provider")?.unzip();
        Ok(Self {
            sampling: Sampling::of_manager(message)?,
            provider,
            spans,
            child: message.spawn_upstream_span.is_some_and(|spawn| spawn.value),
            outbound: context.traffic_direction == TrafficDirection::Outbound,
            pack,
            by_request_id,
            stats: Stats::new(&scope),
        })
    }

    /// The route is known: decides, and begins the span. An internal redirect decides again.
    pub fn begin(&self, stream: &mut Stream) {
        let route = stream.route.as_ref().and_then(|route| route.route());
        let sampling = route.and_then(|r| r.sampling.as_ref()).unwrap_or(&self.sampling);
        let reason =
            self.decide(sampling, &mut stream.request, &stream.worker.runtime, || stream.worker.random());
        match reason {
            Reason::Not => self.stats.not_traceable.inc(),
            Reason::Sampled => self.stats.random_sampling.inc(),
            Reason::Service => self.stats.service_forced.inc(),
            Reason::Client => self.stats.client_enabled.inc(),
        }
        stream.info.trace_reason = reason as u8;
        let request = Beginning {
            headers: &stream.request,
            traced: reason != Reason::Not,
            outbound: self.outbound,
            start: stream.info.start_system,
        };
        let random = || stream.worker.random();
        let provider = self.provider.as_ref();
        stream.trace = provider.and_then(|p| Context::begin(p, request, random)).map(Box::new);
        if let Some(trace) = &mut stream.trace {
            let (trace_id, span_id) = trace.ids();
            stream.info.trace_id = Some(trace_id.into());
            // Envoy's Zipkin tracer tells the log nothing of its spans.
            let told = matches!(self.provider, Some(Provider::OpenTelemetry(_)));
            stream.info.span_id = told.then(|| span_id.into());
            trace.child = self.child.then(|| stream.worker.random());
            if trace.sampled && self.spans.is_some() {
                trace.name = self.operation(route.and_then(|r| r.decorator.as_ref()), &stream.request);
                trace.outbound = self.outbound;
            }
        }
        stream.operation_set =
            stream.request.contains(HeaderId::X_ENVOY_DECORATOR_OPERATION) && !self.outbound;
        if !self.outbound {
            stream.request.remove(HeaderId::X_ENVOY_DECORATOR_OPERATION);
        } else if let Some(decorator) = route.and_then(|r| r.decorator.as_ref()).filter(|d| d.propagate) {
            stream.request.set(HeaderId::X_ENVOY_DECORATOR_OPERATION, &*decorator.operation);
        }
    }

    /// The operation's name: the caller's or the route's, or the direction.
    fn operation(&self, decorator: Option<&Decorator>, headers: &HeaderMap) -> String {
        let text = |id| headers.get(id).map(sanitized).unwrap_or_default();
        let told = text(HeaderId::X_ENVOY_DECORATOR_OPERATION);
        match decorator {
            _ if !self.outbound && !told.is_empty() => told.into_owned(),
            Some(decorator) if !decorator.operation.is_empty() => decorator.operation.to_string(),
            // Zipkin names a span after the host, whatever its direction.
            _ if matches!(self.provider, Some(Provider::Zipkin(_))) => text(HeaderId::AUTHORITY).into_owned(),
            _ if self.outbound => format!("egress {}", text(HeaderId::AUTHORITY)),
            _ => "ingress".to_owned(),
        }
    }

    /// The stream is over: its spans go to the collector, if it is sampled.
    pub fn finish(&self, stream: &Stream, context: &FormatContext<'_>) {
        let Some(trace) = stream.trace.as_ref().filter(|trace| trace.is_reported()) else { return };
        let Some(spans) = &self.spans else { return };
        let route = stream.route.as_ref().and_then(|route| route.route());
        let of_route = route.and_then(|r| r.sampling.as_ref()).map_or(&[][..], |sampling| &sampling.tags);
        spans.finish(stream, trace, context, &[of_route, &self.sampling.tags]);
    }

    /// What a response tells of the operation's name: inbound the caller learns it, outbound it stays here.
    pub fn respond(&self, stream: &Stream, response: &mut HeaderMap) {
        if self.outbound {
            response.remove(HeaderId::X_ENVOY_DECORATOR_OPERATION);
            return;
        }
        let route = stream.route.as_ref().and_then(|route| route.route());
        let decorator =
            route.and_then(|r| r.decorator.as_ref()).filter(|d| d.propagate && !stream.operation_set);
        if let Some(decorator) = decorator {
            response.set(HeaderId::X_ENVOY_DECORATOR_OPERATION, &*decorator.operation);
        }
    }

    fn decide(
        &self,
        sampling: &Sampling,
        headers: &mut HeaderMap,
        runtime: &Runtime,
        random: impl Fn() -> u64,
    ) -> Reason {
        if !self.by_request_id {
            return Reason::Sampled;
        }
        let Some(number) = headers.get(HeaderId::X_REQUEST_ID).and_then(number) else { return Reason::Not };
        let result = number % 10_000;
        let before = self.packed(headers);
        let mut reason = before;
        if reason == Reason::Not {
            if headers.contains(HeaderId::X_CLIENT_TRACE_ID) && sampling.client.hit(runtime, random()) {
                reason = Reason::Client;
            } else if headers.contains(HeaderId::X_ENVOY_FORCE_TRACE) {
                reason = Reason::Service;
            } else if sampling.random.hit(runtime, result) {
                reason = Reason::Sampled;
            }
        }
        if reason != Reason::Not && !sampling.overall.hit(runtime, result) {
            reason = Reason::Not;
        }
        if reason != before && self.pack {
            pack(headers, reason);
        }
        reason
    }

    /// The decision of whoever gave the request its id.
    fn packed(&self, headers: &HeaderMap) -> Reason {
        let id = headers.get(HeaderId::X_REQUEST_ID).filter(|id| self.pack && id.len() == 36);
        match id.map(|id| id[REASON_AT]) {
            Some(b'9') => Reason::Sampled,
            Some(b'a') => Reason::Service,
            Some(b'b') => Reason::Client,
            _ => Reason::Not,
        }
    }
}

/// Takes a stranger's decision out of the request id that he may choose.
pub fn forget_reason(headers: &mut HeaderMap) {
    pack(headers, Reason::Not);
}

fn pack(headers: &mut HeaderMap, reason: Reason) {
    let id = headers.get(HeaderId::X_REQUEST_ID).and_then(|id| <[u8; 36]>::try_from(id).ok());
    if let Some(mut id) = id.filter(|id| id[REASON_AT] != reason as u8) {
        id[REASON_AT] = reason as u8;
        headers.set(HeaderId::X_REQUEST_ID, id);
    }
}

/// The number that the first eight digits of a request id make; none where they are no digits.
fn number(id: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(id.get(..8)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}
