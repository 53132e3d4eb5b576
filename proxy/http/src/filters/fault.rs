//! `envoy.filters.http.fault`: delays, aborts, slow responses; fixed, by percentage, or as the client's headers ask.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::envoy::extensions::filters::common::fault::v3 as common;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as pb;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::google::protobuf::{Any, Struct};
use sampan_codec::{Body, BodyError, BodyStream, Frame};
use sampan_core::HeaderMap;
use sampan_core::error::{ConfigError, ConfigResult};
use sampan_core::header::HeaderId;
use sampan_core::matcher::{HeaderMatcher, all_headers_match};
use sampan_core::runtime::{Fraction, Runtime};
use sampan_core::stats::{Counter, Gauge, Scope};
use sampan_core::stream_info::ResponseFlag;

use crate::filter::{
    HttpFilter, HttpFilterContext, HttpFilterKind, LocalReply, Outcome, Response, RouteConfig, State, Step,
    decode,
};
use crate::manager::duration;
use crate::stream::Stream;
use crate::timer::Timer;

pub(super) const TYPE: &str = "envoy.extensions.filters.http.fault.v3.HTTPFault";

/// How often a slowed body moves on.
const TICK: Duration = Duration::from_millis(63);

struct Fault {
    name: Box<str>,
    settings: Settings,
    scope: Scope,
    aborts_injected: Counter,
    delays_injected: Counter,
    faults_overflow: Counter,
    response_rl_injected: Counter,
    active_faults: Gauge,
}

/// A value from the configuration, or from a header of the request.
enum Source<T> {
    Fixed(T),
    Header,
}

/// How often, unless the header that controls the fault says less.
struct Chance {
    fraction: Fraction,
    percent: FractionalPercent,
    key: String,
}

struct Settings {
    delay: Option<(Source<Duration>, Chance)>,
    abort: Option<(Source<Status>, Chance)>,
    rate: Option<(Source<u64>, Chance)>,
    body: String,
    upstream_cluster: String,
    headers: Vec<HeaderMatcher>,
    nodes: Vec<String>,
    max_active: Option<u32>,
    keys: Keys,
    no_cluster_stats: bool,
    metadata: Struct,
}

#[derive(Clone, Copy)]
enum Status {
    Http(u16),
    Grpc(u32),
}

struct Keys {
    delay_duration: String,
    abort_http: String,
    abort_grpc: String,
    max_active: String,
}

fn or(configured: &str, default: &str) -> String {
    if configured.is_empty() { default.to_owned() } else { configured.to_owned() }
}

impl Chance {
    fn new(percent: Option<&FractionalPercent>, key: &str) -> Self {
        let percent = percent.copied().unwrap_or_default();
        Self { fraction: Fraction::fixed(&percent).with_key(key), percent, key: key.to_owned() }
    }

    /// Whether it happens. `header` can lower what the configuration allows, not raise it; runtime overrides both,
    /// by the key of the client's cluster (`of_cluster`) alone where the client names one.
    fn hit(&self, header: Option<HeaderId>, of_cluster: &str, stream: &Stream) -> bool {
        let (runtime, random) = (&stream.worker.runtime, stream.worker.random());
        let asked = header.and_then(|id| stream.request.get_str(id)).and_then(|v| v.parse::<u32>().ok());
        let key = (!of_cluster.is_empty()).then(|| cluster_key(stream, of_cluster)).flatten();
        if asked.is_none() && key.is_none() {
            return self.fraction.hit(runtime, random);
        }
        let mut percent = self.percent;
        percent.numerator = asked.unwrap_or(u32::MAX).min(percent.numerator);
        Fraction::fixed(&percent).with_key(key.as_ref().unwrap_or(&self.key)).hit(runtime, random)
    }
}

/// `fault.http.CLUSTER.NAME`, where the client says which cluster it belongs to.
fn cluster_key(stream: &Stream, name: &str) -> Option<String> {
    let cluster = stream.request.get_str(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER)?;
    Some(format!("fault.http.{cluster}.{name}"))
}

/// What runtime says under the key of the client's cluster.
fn of_cluster(stream: &Stream, runtime: &Runtime, name: &str, default: u64) -> u64 {
    cluster_key(stream, name).map_or(default, |key| runtime.integer(&key, default))
}

impl<T> Source<T> {
    fn percentage_header(&self, id: HeaderId) -> Option<HeaderId> {
        matches!(self, Self::Header).then_some(id)
    }
}

impl Settings {
    fn from_proto(message: pb::HttpFault) -> ConfigResult<Self> {
        let delay = message.delay.as_ref().map(|d| {
            use common::fault_delay::FaultDelaySecifier as D;
            let source = match &d.fault_delay_secifier {
                Some(D::FixedDelay(d)) => Source::Fixed(duration(d)),
                Some(D::HeaderDelay(_)) => Source::Header,
                None => return Err(ConfigError::missing("fault_delay_secifier").at("delay")),
            };
            let key = or(&message.delay_percent_runtime, "fault.http.delay.fixed_delay_percent");
            Ok((source, Chance::new(d.percentage.as_ref(), &key)))
        });
        let abort = message.abort.as_ref().map(|a| {
            use pb::fault_abort::ErrorType as E;
            let source = match &a.error_type {
                Some(E::HttpStatus(s)) => Source::Fixed(Status::Http(*s as u16)),
                Some(E::GrpcStatus(s)) => Source::Fixed(Status::Grpc(*s)),
                Some(E::HeaderAbort(_)) => Source::Header,
                None => return Err(ConfigError::missing("error_type").at("abort")),
            };
            let key = or(&message.abort_percent_runtime, "fault.http.abort.abort_percent");
            Ok((source, Chance::new(a.percentage.as_ref(), &key)))
        });
        let rate = message.response_rate_limit.as_ref().map(|r| {
            use common::fault_rate_limit::LimitType as L;
            let source = match &r.limit_type {
                Some(L::FixedLimit(l)) => Source::Fixed(l.limit_kbps),
                Some(L::HeaderLimit(_)) => Source::Header,
                None => return Err(ConfigError::missing("limit_type").at("response_rate_limit")),
            };
            let key =
                or(&message.response_rate_limit_percent_runtime, "fault.http.rate_limit.response_percent");
            Ok((source, Chance::new(r.percentage.as_ref(), &key)))
        });
        let body = message.abort.as_ref().map(|a| a.response_body.clone()).unwrap_or_default();
        Ok(Self {
            delay: delay.transpose()?,
            abort: abort.transpose()?,
            rate: rate.transpose()?,
            body: or(&body, "fault filter abort"),
            upstream_cluster: message.upstream_cluster,
            headers: HeaderMatcher::list_from_proto(&message.headers, "headers")?,
            nodes: message.downstream_nodes,
            max_active: message.max_active_faults.map(|n| n.value),
            keys: Keys {
                delay_duration: or(&message.delay_duration_runtime, "fault.http.delay.fixed_duration_ms"),
                abort_http: or(&message.abort_http_status_runtime, "fault.http.abort.http_status"),
                abort_grpc: or(&message.abort_grpc_status_runtime, "fault.http.abort.grpc_status"),
                max_active: or(&message.max_active_faults_runtime, "fault.http.max_active_faults"),
            },
            no_cluster_stats: message.disable_downstream_cluster_stats,
            metadata: message.filter_metadata.unwrap_or_default(),
        })
    }

    fn applies(&self, stream: &Stream) -> bool {
        let cluster = stream.info.cluster.as_deref().unwrap_or_default();
        let node = stream.request.get_str(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_NODE);
        (self.upstream_cluster.is_empty() || self.upstream_cluster == cluster)
            && (self.nodes.is_empty() || node.is_some_and(|n| self.nodes.iter().any(|m| m == n)))
            && all_headers_match(&self.headers, &stream.request)
    }

    fn delay(&self, stream: &Stream, runtime: &Runtime) -> Option<Duration> {
        let (source, chance) = self.delay.as_ref()?;
        if !chance.hit(
            source.percentage_header(HeaderId::X_ENVOY_FAULT_DELAY_REQUEST_PERCENTAGE),
            "delay.fixed_delay_percent",
            stream,
        ) {
            return None;
        }
        let base = match source {
            Source::Fixed(delay) => *delay,
            Source::Header => milliseconds(&stream.request, HeaderId::X_ENVOY_FAULT_DELAY_REQUEST)?,
        };
        let delay = runtime.integer(&self.keys.delay_duration, base.as_millis() as u64);
        let delay = of_cluster(stream, runtime, "delay.fixed_duration_ms", delay);
        Some(Duration::from_millis(delay)).filter(|d| !d.is_zero())
    }

    fn abort(&self, stream: &Stream, runtime: &Runtime) -> Option<Status> {
        let (source, chance) = self.abort.as_ref()?;
        if !chance.hit(
            source.percentage_header(HeaderId::X_ENVOY_FAULT_ABORT_REQUEST_PERCENTAGE),
            "abort.abort_percent",
            stream,
        ) {
            return None;
        }
        let number = |id| stream.request.get_str(id).and_then(|v| v.parse::<u64>().ok());
        let status = match source {
            Source::Fixed(status) => *status,
            Source::Header => match number(HeaderId::X_ENVOY_FAULT_ABORT_REQUEST) {
                Some(code @ 200..=599) => Status::Http(code as u16),
                Some(_) => return None,
                None => Status::Grpc(number(HeaderId::X_ENVOY_FAULT_ABORT_GRPC_REQUEST)? as u32),
            },
        };
        let by_runtime = |key: &str, name: &str, code: u64| match cluster_key(stream, name) {
            Some(of_cluster) => runtime.integer(&of_cluster, code),
            None => runtime.integer(key, code),
        };
        Some(match status {
            Status::Http(code) => {
                Status::Http(by_runtime(&self.keys.abort_http, "abort.http_status", code.into()) as u16)
            }
            Status::Grpc(code) => {
                Status::Grpc(by_runtime(&self.keys.abort_grpc, "abort.grpc_status", code.into()) as u32)
            }
        })
    }

    fn rate(&self, stream: &Stream) -> Option<u64> {
        let (source, chance) = self.rate.as_ref()?;
        if !chance.hit(
            source.percentage_header(HeaderId::X_ENVOY_FAULT_THROUGHPUT_RESPONSE_PERCENTAGE),
            "",
            stream,
        ) {
            return None;
        }
        let rate = match source {
            Source::Fixed(kbps) => *kbps,
            Source::Header => {
                stream.request.get_str(HeaderId::X_ENVOY_FAULT_THROUGHPUT_RESPONSE)?.parse().ok()?
            }
        };
        Some(rate).filter(|r| *r > 0)
    }
}

fn milliseconds(headers: &HeaderMap, id: HeaderId) -> Option<Duration> {
    headers.get_str(id)?.parse().ok().map(Duration::from_millis)
}

pub(super) fn make(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
    let settings = Settings::from_proto(decode(any)?)?;
    let scope = context.factory.root_scope().scope(context.stat_prefix).scope("fault");
    Ok(HttpFilterKind::Filter(Arc::new(Fault {
        name: context.filter_name.into(),
        settings,
        aborts_injected: scope.counter("aborts_injected"),
        delays_injected: scope.counter("delays_injected"),
        faults_overflow: scope.counter("faults_overflow"),
        response_rl_injected: scope.counter("response_rl_injected"),
        active_faults: scope.gauge("active_faults"),
        scope,
    })))
}

pub(super) fn make_route(any: &Any) -> ConfigResult<RouteConfig> {
    Ok(Arc::new(Settings::from_proto(decode(any)?)?))
}

/// What a stream's faults hold: the count of active ones, and the rate of its response.
struct Active {
    gauge: Option<Gauge>,
    rate: Option<u64>,
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some(gauge) = &self.gauge {
            gauge.dec();
        }
    }
}

impl Fault {
    /// Counts a stream with faults once; false where there are too many.
    fn activate(&self, settings: &Settings, active: &mut Active, runtime: &Runtime) -> bool {
        if active.gauge.is_some() {
            return true;
        }
        let max = settings.max_active.map_or(u64::MAX, u64::from);
        if self.active_faults.value() >= runtime.integer(&settings.keys.max_active, max) {
            self.faults_overflow.inc();
            return false;
        }
        self.active_faults.inc();
        active.gauge = Some(self.active_faults.clone());
        true
    }

    fn abort(&self, settings: &Settings, stream: &mut Stream, status: Status) -> LocalReply {
        self.aborts_injected.inc();
        self.tell(settings, stream);
        self.count_cluster(settings, stream, "aborts_injected");
        let (code, grpc) = match status {
            Status::Http(code) => (code, None),
            Status::Grpc(code) => (200, Some(code)),
        };
        let mut reply = LocalReply::new(code, "fault_filter_abort")
            .body(settings.body.clone())
            .flag(ResponseFlag::FaultInjected);
        reply.grpc_status = grpc;
        reply
    }

    /// Dynamic metadata of an injected fault, also where none is configured: the log then shows an empty object.
    fn tell(&self, settings: &Settings, stream: &mut Stream) {
        *stream.info.dynamic_metadata_mut(&self.name) = settings.metadata.clone();
    }

    /// `fault.CLUSTER.aborts_injected`, of the cluster that the client says it belongs to.
    fn count_cluster(&self, settings: &Settings, stream: &Stream, name: &str) {
        let cluster =
            stream.request.get_str(HeaderId::X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER).unwrap_or_default();
        if !cluster.is_empty() && !settings.no_cluster_stats {
            self.scope.counter(&format!("{cluster}.{name}")).inc();
        }
    }

    async fn delayed(
        &self,
        stream: &mut Stream,
        route: Option<Arc<Settings>>,
        active: &mut Active,
        delay: Duration,
    ) -> Outcome {
        let until = Some(Instant::now() + delay);
        let timer = stream.timer.clone();
        std::future::poll_fn(|cx| timer.poll(cx, until)).await;
        let settings = route.as_deref().unwrap_or(&self.settings);
        let runtime = stream.worker.runtime.clone();
        match settings.abort(stream, &runtime) {
            Some(status) if self.activate(settings, active, &runtime) => {
                self.abort(settings, stream, status).outcome()
            }
            _ => Outcome::Continue,
        }
    }
}

impl HttpFilter for Fault {
    fn on_request<'a>(&'a self, stream: &'a mut Stream, state: &'a mut State) -> Step<'a> {
        let route = stream.route_config::<Settings>(&self.name);
        let settings = route.as_deref().unwrap_or(&self.settings);
        if !settings.applies(stream) {
            return Step::Continue;
        }
        let runtime = stream.worker.runtime.clone();
        let mut active = Active { gauge: None, rate: None };
        if let Some(rate) = settings.rate(stream)
            && self.activate(settings, &mut active, &runtime)
        {
            self.response_rl_injected.inc();
            active.rate = Some(rate);
        }
        if let Some(delay) = settings.delay(stream, &runtime)
            && self.activate(settings, &mut active, &runtime)
        {
            self.delays_injected.inc();
            self.count_cluster(settings, stream, "delays_injected");
            stream.info.flags.set(ResponseFlag::DelayInjected);
            self.tell(settings, stream);
            let slot = state.insert(Box::new(active));
            let Some(active) = slot.downcast_mut::<Active>() else { return Step::Continue };
            return Step::Wait(Box::pin(self.delayed(stream, route, active, delay)));
        }
        if let Some(status) = settings.abort(stream, &runtime)
            && self.activate(settings, &mut active, &runtime)
        {
            let reply = self.abort(settings, stream, status);
            *state = Some(Box::new(active));
            return Step::reply(reply);
        }
        if active.gauge.is_some() {
            *state = Some(Box::new(active));
        }
        Step::Continue
    }

    fn on_response<'a>(
        &'a self,
        stream: &'a mut Stream,
        response: &'a mut Response,
        state: &'a mut State,
    ) -> Step<'a> {
        let rate = state.as_ref().and_then(|s| s.downcast_ref::<Active>()).and_then(|a| a.rate);
        if let Some(kbps) = rate
            && !response.body.is_end()
        {
            let timer = stream.timer.clone();
            response.body.wrap(|body| Slow::new(body, kbps, timer));
        }
        Step::Continue
    }

    fn on_end(&self, _stream: &mut Stream, state: &mut State) {
        // The count ends with the stream.
        *state = None;
    }
}

/// A body at so many KiB a second.
struct Slow {
    body: Body,
    per_tick: usize,
    left: usize,
    next: Instant,
    held: Option<Bytes>,
    timer: Timer,
}

/// Bytes of a tick; any rate is possible, the client may choose it.
fn per_tick(kbps: u64) -> usize {
    let bytes = u128::from(kbps) * 1024 * TICK.as_millis() / 1000;
    usize::try_from(bytes).unwrap_or(usize::MAX).max(1)
}

impl Slow {
    fn new(body: Body, kbps: u64, timer: Timer) -> Self {
        let per_tick = per_tick(kbps);
        Self { body, per_tick, left: per_tick, next: Instant::now() + TICK, held: None, timer }
    }
}

impl BodyStream for Slow {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut data = match self.held.take() {
            Some(data) => data,
            None => match ready!(self.body.poll_frame(cx)) {
                Some(Ok(Frame::Data(data))) => data,
                other => return Poll::Ready(other),
            },
        };
        if self.left == 0 {
            if self.timer.poll(cx, Some(self.next)).is_pending() {
                self.held = Some(data);
                return Poll::Pending;
            }
            self.left = self.per_tick;
            self.next = Instant::now() + TICK;
        }
        let now = data.split_to(data.len().min(self.left));
        self.left -= now.len();
        self.held = Some(data).filter(|d| !d.is_empty());
        Poll::Ready(Some(Ok(Frame::Data(now))))
    }

    fn is_end(&self) -> bool {
        self.held.is_none() && self.body.is_end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_rate_has_a_tick() {
        assert_eq!((per_tick(0), per_tick(1), per_tick(1000)), (1, 64, 64_512));
        assert_eq!(per_tick(u64::MAX), usize::MAX);
    }
}
