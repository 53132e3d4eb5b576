//! The router: the end of every chain. Picks cluster, host and connection, forwards, tries again.
//!
//! ```text
//!   decide    no route, redirect, direct response, cluster
//!   finalize  header mutations, rewrites, timeouts, x-envoy-*
//!   attempt   host, connection, head and body up, head down      — again as the retry policy says
//!   answer    codes counted, x-envoy-upstream-service-time; the body follows by itself (body.rs)
//! ```

mod body;
mod codes;
mod exchange;
mod retry;
mod shadow;
mod timeouts;
mod upload;

use std::borrow::Cow;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::google::protobuf::Any;
use sampan_codec::h1::ResponseHead;
use sampan_codec::{Body, BodyError, CodecError, ResetReason};
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::format::FormatContext;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stats::{Counter, Scope};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::{
    ConnectFailure, ConnectOptions, Host, HttpLease, LbContext, PoolError, Priority, WorkerCluster,
    WorkerHost,
};

use crate::filter::{HttpFilterContext, HttpFilterKind, LocalReply, Response, decode};
use crate::manager::{has_token, split_port};
use crate::route::{Action, ClusterAction, Decision, Redirect, Selected};
use crate::stream::Stream;
use body::UpstreamBody;
use codes::VirtualCounters;
use exchange::Exchange;
use retry::{Retry, RetryState};
use timeouts::Timeouts;
use upload::Upload;

/// The router's type.
pub const TYPE: &str = "envoy.extensions.filters.http.router.v3.Router";

/// The model of `Router`, with its counters.
pub struct RouterConfig {
    dynamic_stats: bool,
    suppress_envoy_headers: bool,
    respect_expected_timeout: bool,
    strict_headers: Vec<HeaderId>,
    rq_total: Counter,
    no_route: Counter,
    no_cluster: Counter,
    rq_direct_response: Counter,
    rq_redirect: Counter,
    rq_retry_skipped_request_not_complete: Counter,
    root: Scope,
}

/// How forwarding ended without a response.
pub enum End {
    /// This instead.
    Reply(Box<LocalReply>),
    /// The stream is cut.
    Reset,
}

impl From<LocalReply> for End {
    fn from(reply: LocalReply) -> Self {
        Self::Reply(Box::new(reply))
    }
}

/// Why an attempt brought no response.
#[derive(Debug)]
enum Failure {
    Overflow,
    Connect(ConnectFailure),
    /// The upstream reset the stream before it did anything.
    Refused,
    /// The stream ended; whether anything of the request may have been processed.
    Reset {
        reason: ResetReason,
        sent: bool,
    },
    Protocol(CodecError),
    PerTryTimeout,
    PerTryIdleTimeout,
    Timeout,
    /// The client's side failed.
    Downstream(BodyError),
}

impl Failure {
    fn request_sent(&self) -> bool {
        !matches!(self, Self::Overflow | Self::Connect(_) | Self::Refused | Self::Reset { sent: false, .. })
    }
}

impl RouterConfig {
    /// Parses the filter's configuration.
    pub fn factory(any: &Any, context: &HttpFilterContext<'_>) -> ConfigResult<HttpFilterKind> {
        let message: Router = decode(any)?;
        let unsupported = |set: bool, field: &str| {
            if set { Err(ConfigError::unsupported("this field").at(field)) } else { Ok(()) }
        };
        unsupported(!message.upstream_log.is_empty(), "upstream_log")?;
        unsupported(message.upstream_log_options.is_some(), "upstream_log_options")?;
        unsupported(!message.upstream_http_filters.is_empty(), "upstream_http_filters")?;
        unsupported(
            message.suppress_grpc_request_failure_code_stats,
            "suppress_grpc_request_failure_code_stats",
        )?;
        let scope: Scope = context.factory.root_scope().scope(context.stat_prefix);
        let counter = |name| scope.counter(name);
        let strict = message.strict_check_headers.iter().enumerate().map(|(i, name)| {
            match HeaderId::from_lower(name.to_ascii_lowercase().as_bytes()) {
                id @ (HeaderId::X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS
                | HeaderId::X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS
                | HeaderId::X_ENVOY_MAX_RETRIES
                | HeaderId::X_ENVOY_RETRY_ON
                | HeaderId::X_ENVOY_RETRY_GRPC_ON) => Ok(id),
                _ => Err(ConfigError::new("not one of the headers that can be checked"))
                    .at_index("strict_check_headers", i),
            }
        });
        Ok(HttpFilterKind::Router(Arc::new(Self {
            dynamic_stats: message.dynamic_stats.is_none_or(|b| b.value),
            suppress_envoy_headers: message.suppress_envoy_headers,
            respect_expected_timeout: message.respect_expected_rq_timeout,
            strict_headers: strict.collect::<ConfigResult<_>>()?,
            rq_total: counter("rq_total"),
            no_route: counter("no_route"),
            no_cluster: counter("no_cluster"),
            rq_direct_response: counter("rq_direct_response"),
            rq_redirect: counter("rq_redirect"),
            rq_retry_skipped_request_not_complete: counter("rq_retry_skipped_request_not_complete"),
            root: context.factory.root_scope(),
        })))
    }
}

/// What a fresh route means for the stream besides where it goes.
pub fn note_route(stream: &mut Stream) {
    let Some(selected) = &stream.route else { return };
    stream.info.virtual_host = Some(selected.virtual_host().name.clone());
    let Some(route) = selected.route() else { return };
    if !route.name.is_empty() {
        stream.info.route_name = Some(route.name.clone());
    }
    stream.info.route_metadata = route.metadata.clone();
    let Some(action) = selected.cluster_action() else { return };
    if let Some(idle) = action.idle_timeout {
        stream.timer.set_idle_timeout(idle);
    }
    if let Some(max) = action.max_stream_duration {
        stream.timer.set_max_duration(max.map(|d| stream.info.start + d));
    }
    let name = action.cluster_name(selected.weighted(), &stream.request);
    stream.info.cluster.clone_from(&name);
    stream.info.cluster_observability = name;
}

/// What is counted when the stream is over.
pub fn charge_end(_stream: &Stream, _response: Option<&HeaderMap>) {}

/// Forwards a request, or answers it as its route says.
pub async fn forward(stream: &mut Stream, config: &Arc<RouterConfig>) -> Result<Response, End> {
    config.rq_total.inc();
    let Some(selected) = stream.route.clone() else {
        config.no_route.inc();
        return Err(LocalReply::new(404, "route_not_found").flag(ResponseFlag::NoRouteFound).into());
    };
    let action = match selected.decision() {
        Decision::Cluster(action) => action,
        Decision::ToHttps(redirect) => {
            config.rq_direct_response.inc();
            let location = redirect.location(None, &stream.request);
            return Err(LocalReply::new(301, "direct_response").header(HeaderId::LOCATION, location).into());
        }
        Decision::Action(action) => return Err(answer(stream, config, &selected, action)),
    };
    let Some(cluster) = find_cluster(stream, &selected, action) else {
        config.no_cluster.inc();
        stream.info.cluster = None;
        stream.info.cluster_observability = None;
        return Err(LocalReply::new(action.not_found, "cluster_not_found")
            .flag(ResponseFlag::NoClusterFound)
            .into());
    };
    check_strict(stream, config)?;
    Forward::new(stream, config, &selected, action, cluster).run().await
}

/// A redirect or direct response.
fn answer(stream: &Stream, config: &RouterConfig, selected: &Selected, action: &Action) -> End {
    match action {
        Action::Redirect(redirect) => {
            config.rq_redirect.inc();
            config.rq_direct_response.inc();
            let location = redirect.location(selected.route(), &stream.request);
            LocalReply::new(redirect.status(), "direct_response").header(HeaderId::LOCATION, location).into()
        }
        Action::Direct(direct) => {
            config.rq_direct_response.inc();
            let context =
                FormatContext { request: Some(&stream.request), ..FormatContext::new(&stream.info) };
            let mut reply = LocalReply::new(direct.status, "direct_response").body(direct.body(&context));
            if direct.status == 201 || (300..400).contains(&direct.status) {
                let here = Redirect::to_here().location(None, &stream.request);
                reply = reply.header(HeaderId::LOCATION, here);
            }
            reply.into()
        }
        Action::None | Action::Cluster(_) => {
            config.no_route.inc();
            LocalReply::new(404, "route_not_found").flag(ResponseFlag::NoRouteFound).into()
        }
    }
}

fn find_cluster(
    stream: &mut Stream,
    selected: &Selected,
    action: &ClusterAction,
) -> Option<Rc<WorkerCluster>> {
    let name = action.cluster_name(selected.weighted(), &stream.request)?;
    let cluster = stream.worker.clusters.get(&name)?;
    stream.info.cluster = Some(name);
    stream.info.cluster_observability = Some(cluster.cluster().observability_name().clone());
    stream.info.cluster_metadata = cluster.cluster().config().metadata.clone();
    Some(cluster)
}

/// `strict_check_headers`
fn check_strict(stream: &Stream, config: &RouterConfig) -> Result<(), LocalReply> {
    for id in &config.strict_headers {
        let Some(value) = stream.request.get_str(*id) else { continue };
        let ok = match *id {
            HeaderId::X_ENVOY_RETRY_ON | HeaderId::X_ENVOY_RETRY_GRPC_ON => {
                crate::route::RetryOn::parse(value).1
            }
            _ => value.parse::<u64>().is_ok(),
        };
        if !ok {
            let name = id.name();
            return Err(LocalReply::new(400, format!("request_headers_failed_strict_check{{{name}}}"))
                .body(format!("invalid header '{name}' with value '{value}'"))
                .flag(ResponseFlag::InvalidEnvoyRequestHeaders));
        }
    }
    Ok(())
}

/// One request on its way.
struct Forward<'s> {
    stream: &'s mut Stream,
    config: &'s Arc<RouterConfig>,
    selected: &'s Selected,
    action: &'s ClusterAction,
    cluster: Rc<WorkerCluster>,
    priority: Priority,
    timeouts: Timeouts,
    tried: Vec<Arc<Host>>,
    /// The attempt's.
    host: Option<Rc<WorkerHost>>,
    internal: bool,
    connect_options: Option<ConnectOptions>,
    virtual_counters: Option<Rc<VirtualCounters>>,
}

impl<'s> Forward<'s> {
    fn new(
        stream: &'s mut Stream,
        config: &'s Arc<RouterConfig>,
        selected: &'s Selected,
        action: &'s ClusterAction,
        cluster: Rc<WorkerCluster>,
    ) -> Self {
        let priority = match action.priority {
            RoutingPriority::High => Priority::High,
            RoutingPriority::Default => Priority::Default,
        };
        let internal = stream.request.get(HeaderId::X_ENVOY_INTERNAL) == Some(b"true");
        let virtual_cluster = selected.virtual_host().virtual_cluster(&stream.request);
        stream.info.virtual_cluster = virtual_cluster.map(|one| one.name.clone());
        let virtual_counters = virtual_cluster.map(|one| VirtualCounters::of(one, &config.root));
        Self {
            stream,
            config,
            selected,
            action,
            cluster,
            priority,
            timeouts: Timeouts::default(),
            tried: Vec::new(),
            host: None,
            internal,
            connect_options: None,
            virtual_counters,
        }
    }

    async fn run(mut self) -> Result<Response, End> {
        self.timeouts = Timeouts::new(self.action, self.stream, self.config);
        self.set_attempt_headers(1);
        let keep_original = !self.config.suppress_envoy_headers;
        self.selected.finalize_request(&mut self.stream.request, &self.stream.info, keep_original);
        self.connect_options = self.connect_options();
        let mut retry =
            RetryState::new(&self.action.retry, &mut self.stream.request, &self.cluster, self.priority);
        if let Some(retry) = &mut retry {
            retry.virtual_counters.clone_from(&self.virtual_counters);
        }
        if self.stream.upgrade.is_some() {
            retry = None;
        }
        let body = std::mem::take(&mut self.stream.body);
        let limit = self.retry_buffer_limit();
        let shadows = shadow::begin(self.stream, self.action);
        let body = shadow::tee(body, shadows, limit);
        let mut upload = Upload::new(body, retry.is_some().then_some(limit));
        loop {
            self.stream.info.attempts += 1;
            if self.stream.info.attempts > 1 {
                self.set_attempt_headers(self.stream.info.attempts);
            }
            let result = self.attempt(&mut upload).await;
            if let Err(failure) = &result {
                self.charge_failed(failure);
            }
            let random = self.stream.worker.random();
            let decision = match (&mut retry, &result) {
                (None, _) => Retry::No,
                (Some(_), Err(Failure::Timeout | Failure::Downstream(_))) => Retry::No,
                (Some(_), _) if !upload.can_replay() => {
                    self.cluster.stats().retry_or_shadow_abandoned.inc();
                    Retry::No
                }
                (Some(_), Ok(_)) if !upload.is_received() => {
                    self.config.rq_retry_skipped_request_not_complete.inc();
                    Retry::No
                }
                (Some(retry), Ok((head, _))) => retry.on_response(head, random),
                (Some(retry), Err(failure)) => retry.on_failure(failure, random),
            };
            match decision {
                Retry::After(delay) => {
                    self.give_up(result, &upload);
                    upload.rewind();
                    self.back_off(delay).await?;
                    continue;
                }
                Retry::LimitExceeded => self.stream.info.flags.set(ResponseFlag::UpstreamRetryLimitExceeded),
                Retry::Overflow => self.stream.info.flags.set(ResponseFlag::UpstreamOverflow),
                Retry::No => {}
            }
            return match result {
                Ok((head, exchange)) => Ok(self.respond(head, exchange, upload)),
                Err(failure) => Err(self.fail(failure)),
            };
        }
    }

    fn retry_buffer_limit(&self) -> usize {
        let by_route = self.selected.route().and_then(|r| r.buffer_limit);
        let limit = by_route.unwrap_or(u64::from(self.stream.manager.buffer_limit));
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    /// Server name and subject names that follow the request's host.
    fn connect_options(&self) -> Option<ConnectOptions> {
        let http = &self.cluster.cluster().config().http;
        if !http.auto_sni && !http.auto_san_validation {
            return None;
        }
        let headers = &self.stream.request;
        let named = (!http.auto_sni_header.is_empty())
            .then(|| headers.get_name(&sampan_core::HeaderName::new(&http.auto_sni_header)))
            .flatten()
            .filter(|v| !v.is_empty());
        let value = named.or_else(|| headers.get(HeaderId::AUTHORITY))?;
        let host = std::str::from_utf8(split_port(value).0).ok()?.trim_matches(['[', ']']);
        let is_ip = host.parse::<std::net::IpAddr>().is_ok();
        Some(ConnectOptions {
            sni: (http.auto_sni && !is_ip).then(|| host.into()),
            verify_sans: if http.auto_san_validation { vec![host.to_owned()] } else { Vec::new() },
            alpn: Vec::new(),
        })
    }

    fn set_attempt_headers(&mut self, attempt: u32) {
        if !self.config.suppress_envoy_headers
            && let Some(expected) = self.timeouts.expected(Instant::now())
        {
            let mut text = itoa::Buffer::new();
            let text = text.format(expected.as_millis() as u64);
            self.stream.request.set(HeaderId::X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, text);
        }
        if self.selected.virtual_host().attempt_count {
            self.stream.request.set(HeaderId::X_ENVOY_ATTEMPT_COUNT, attempt.to_string());
        }
    }

    /// One attempt, to the response's head.
    async fn attempt(&mut self, upload: &mut Upload) -> Result<(ResponseHead, Exchange), Failure> {
        let host = self.pick().ok_or(Failure::Reset { reason: ResetReason::LocalReset, sent: false });
        let host = match host {
            Ok(host) => host,
            Err(_) => return Err(Failure::Connect(no_host())),
        };
        self.note_host(&host);
        self.host = Some(host.clone());
        let lease = self.connection(&host, upload).await?;
        self.note_connection(&lease);
        if let Some(counters) = &self.virtual_counters {
            counters.total.inc();
        }
        if self.action.auto_host_rewrite() && !host.host.hostname.is_empty() {
            let name = host.host.hostname.clone();
            self.action.set_host(&mut self.stream.request, name.as_bytes(), true);
        }
        let end = upload.is_empty() && self.stream.upgrade.is_none();
        let headers = for_protocol(&self.stream.request, &lease);
        let exchange = Exchange::start(lease, headers.as_ref().unwrap_or(&self.stream.request), end);
        let mut exchange = exchange.map_err(|reason| reset(reason, false))?;
        let now = Instant::now();
        self.stream.info.upstream_mut().first_tx = Some(now);
        if upload.is_received() {
            self.timeouts.request_received(now);
            self.timeouts.attempt_sent(now);
        }
        let mut sent = end;
        let mut last_tx = end.then_some(now);
        let tunnel = self.stream.upgrade.is_some();
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let head = poll_fn(|cx| {
            if !sent {
                match poll_upload(upload, &mut exchange, tunnel, &timer, cx) {
                    Poll::Ready(Ok(())) => {
                        sent = true;
                        let now = Instant::now();
                        last_tx = Some(now);
                        timeouts.request_received(now);
                        timeouts.attempt_sent(now);
                        timer.request_done();
                    }
                    Poll::Ready(Err(failure)) => return Poll::Ready(Err(failure)),
                    Poll::Pending => {}
                }
            }
            // A failed write may have an answer behind it: the read tells.
            let _ = exchange.poll_flush(cx);
            loop {
                match exchange.poll_head(cx) {
                    Poll::Ready(Ok(head)) if (100..200).contains(&head.status) && head.status != 101 => {
                        timer.push_informational(head.status, head.headers);
                        timer.touch();
                    }
                    Poll::Ready(Ok(head)) => return Poll::Ready(Ok(head)),
                    Poll::Ready(Err(BodyError::Protocol(e))) => {
                        return Poll::Ready(Err(Failure::Protocol(e)));
                    }
                    Poll::Ready(Err(BodyError::Reset(reason))) => {
                        return Poll::Ready(Err(reset(reason, true)));
                    }
                    Poll::Ready(Err(BodyError::Timeout)) => return Poll::Ready(Err(Failure::Timeout)),
                    Poll::Pending => break,
                }
            }
            timeouts.poll(&timer, cx).map(Err)
        })
        .await;
        self.stream.info.bytes.received = upload.received;
        if upload.is_received() {
            self.received(upload);
        }
        self.stream.info.upstream_mut().last_tx = last_tx;
        let head = head?;
        let now = Instant::now();
        timer.touch();
        self.stream.info.upstream_mut().first_rx = Some(now);
        Ok((head, exchange))
    }

    fn received(&mut self, upload: &Upload) {
        self.stream.info.bytes.received = upload.received;
        if self.stream.info.last_downstream_rx.is_none() {
            self.stream.info.last_downstream_rx = Some(Instant::now());
            self.stream.timer.request_done();
        }
    }

    fn pick(&mut self) -> Option<Rc<WorkerHost>> {
        let policy = &self.action.retry;
        let tried = &self.tried;
        let avoid = |host: &Host| tried.iter().any(|t| std::ptr::eq(&**t, host));
        let avoid_tried = policy.avoid_previous_hosts && !tried.is_empty();
        let context = LbContext {
            priority: self.priority,
            exclude: avoid_tried.then_some(&avoid as &dyn Fn(&Host) -> bool),
            max_attempts: policy.host_attempts,
            ..LbContext::default()
        };
        let host = self.cluster.pick(&context)?;
        if policy.avoid_previous_hosts {
            self.tried.push(host.host.clone());
        }
        Some(host)
    }

    /// A connection, while the request's deadlines hold.
    async fn connection(&mut self, host: &Rc<WorkerHost>, upload: &Upload) -> Result<HttpLease, Failure> {
        if upload.is_received() {
            self.timeouts.request_received(self.stream.info.start);
        }
        let h2 = self.stream.info.protocol == Some(sampan_core::stream_info::Protocol::Http2);
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let mut acquire = std::pin::pin!(host.http(self.priority, h2, self.connect_options.as_ref()));
        let mut waiting_since = None;
        let lease = poll_fn(|cx| match acquire.as_mut().poll(cx) {
            Poll::Ready(Ok(lease)) => Poll::Ready(Ok(lease)),
            Poll::Ready(Err(PoolError::Overflow)) => Poll::Ready(Err(Failure::Overflow)),
            Poll::Ready(Err(PoolError::Connect(failure))) => Poll::Ready(Err(Failure::Connect(failure))),
            Poll::Pending => {
                waiting_since.get_or_insert_with(Instant::now);
                timeouts.poll(&timer, cx).map(Err)
            }
        })
        .await;
        let waited = waiting_since.map_or(Duration::ZERO, |since| since.elapsed());
        self.stream.info.upstream_mut().pool_wait = Some(waited);
        lease
    }

    fn note_host(&mut self, host: &WorkerHost) {
        let upstream = self.stream.info.upstream_mut();
        let host = &host.host;
        upstream.host = Some((*host.address()).clone());
        upstream.host_name = Some(host.hostname.clone()).filter(|n| !n.is_empty());
        upstream.host_metadata = host.metadata.clone();
        upstream.locality_zone = Some(host.locality.zone.clone()).filter(|z| !z.is_empty());
        upstream.local = None;
        upstream.transport_failure = None;
        upstream.first_rx = None;
        upstream.last_rx = None;
    }

    fn note_connection(&mut self, lease: &HttpLease) {
        let (info, streams_before, _) = Exchange::info(lease);
        let upstream = self.stream.info.upstream_mut();
        upstream.local.clone_from(&info.local);
        upstream.connection_id = Some(info.id);
        upstream.tls.clone_from(&info.tls);
        upstream.protocol = Some(Exchange::protocol(lease));
        upstream.streams_before = streams_before;
        if streams_before == 0 {
            upstream.connect_start = Some(info.start);
            upstream.connect_complete = Some(info.connected);
            upstream.handshake_complete = info.handshake;
        }
    }

    /// Counts a timeout where it happens, whatever becomes of the request.
    fn charge_failed(&self, failure: &Failure) {
        let stats = self.cluster.stats();
        match failure {
            Failure::Timeout => {
                stats.upstream_rq_timeout.inc();
                if let Some(counters) = &self.virtual_counters {
                    counters.timeout.inc();
                }
            }
            Failure::PerTryTimeout => stats.upstream_rq_per_try_timeout.inc(),
            Failure::PerTryIdleTimeout => stats.upstream_rq_per_try_idle_timeout.inc(),
            _ => return,
        }
        if let Some(host) = &self.host {
            host.host.stats.rq_timeout.inc();
        }
    }

    /// An attempt that is followed by another; its connection is kept where nothing is left on it.
    fn give_up(&self, result: Result<(ResponseHead, Exchange), Failure>, upload: &Upload) {
        if let Some(host) = &self.host {
            host.host.stats.rq_error.inc();
        }
        let Ok((head, mut exchange)) = result else { return };
        if self.config.dynamic_stats {
            codes::charge_retried(self.cluster.cluster(), head.status);
        }
        if head.end && !head.tunnel && upload.is_received() {
            exchange.finish(true);
        }
    }

    async fn back_off(&mut self, delay: Duration) -> Result<(), End> {
        let until = Instant::now() + delay;
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        let waited = poll_fn(|cx| match timer.poll(cx, Some(until)) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => timeouts.poll(&timer, cx).map(Err),
        })
        .await;
        waited.map_err(|failure| self.fail(failure))
    }

    /// The response's head, with what the router adds to it.
    fn respond(self, mut head: ResponseHead, mut exchange: Exchange, upload: Upload) -> Response {
        let Self { stream, config, selected, cluster, timeouts, internal, virtual_counters, .. } = self;
        let canary = head.headers.get(HeaderId::X_ENVOY_UPSTREAM_CANARY) == Some(b"true");
        let host = exchange.host();
        let kind = codes::Kind { internal, canary: canary || host.host.canary };
        if head.status >= 500 {
            host.host.stats.rq_error.inc();
        } else {
            host.host.stats.rq_success.inc();
        }
        if config.dynamic_stats && !stream.info.health_check {
            codes::charge(cluster.cluster(), head.status, kind);
            if let Some(counters) = &virtual_counters {
                counters.charge(head.status);
            }
        }
        let received = stream.info.last_downstream_rx.unwrap_or_else(Instant::now);
        let took = received.elapsed().as_millis() as u64;
        if !config.suppress_envoy_headers && stream.info.last_downstream_rx.is_some() {
            let mut text = itoa::Buffer::new();
            head.headers.set(HeaderId::X_ENVOY_UPSTREAM_SERVICE_TIME, text.format(took));
        }
        stream.info.details.get_or_insert(Cow::Borrowed("via_upstream"));
        stream.info.bytes.upstream_header_received = head.bytes as u64;
        stream.info.response_code = head.status;
        selected.finalize_response(&stream.request, &mut head.headers, &stream.info);
        if selected.virtual_host().attempt_count_in_response {
            head.headers.set(HeaderId::X_ENVOY_ATTEMPT_COUNT, stream.info.attempts.to_string());
        }
        let complete = head.end && !head.tunnel;
        let body = if complete && (upload.is_received() || exchange.is_h1()) {
            if let Some(bytes) = exchange.wire_bytes() {
                stream.timer.set_upstream_wire(bytes);
            }
            exchange.finish(upload.is_received());
            if config.dynamic_stats {
                codes::time(cluster.cluster(), took, kind);
                if let Some(counters) = &virtual_counters {
                    counters.time(took);
                }
            }
            Body::Empty
        } else {
            Body::stream(UpstreamBody::new(body::Parts {
                exchange,
                upload,
                timer: stream.timer.clone(),
                deadline: timeouts,
                tunnel: head.tunnel,
                complete,
                virtual_counters,
                charge: config.dynamic_stats.then(|| (cluster.cluster().clone(), kind, received)),
            }))
        };
        Response { status: head.status, headers: head.headers, body, tunnel: head.tunnel, local: false }
    }

    /// What a failure means to the client.
    fn fail(&mut self, failure: Failure) -> End {
        if let Failure::Downstream(error) = failure {
            return downstream_failed(error);
        }
        let stats = self.cluster.stats().clone();
        let info = &mut self.stream.info;
        if let Failure::Connect(failure) = &failure
            && failure.reason.is_empty()
            && *failure == no_host()
        {
            return self.no_healthy_upstream();
        }
        let (status, flag, reason, transport) = match &failure {
            Failure::Timeout => {
                return self.timed_out("response_timeout");
            }
            Failure::PerTryTimeout => {
                return self.timed_out("upstream_per_try_timeout");
            }
            Failure::PerTryIdleTimeout => {
                return self.timed_out("upstream_per_try_idle_timeout");
            }
            Failure::Overflow => (503, ResponseFlag::UpstreamOverflow, "overflow", None),
            Failure::Connect(failure) => (
                503,
                ResponseFlag::UpstreamConnectionFailure,
                failure.reset_reason(),
                Some(failure.reason.clone()).filter(|r| !r.is_empty()),
            ),
            Failure::Refused => {
                (503, ResponseFlag::UpstreamRemoteReset, ResetReason::RemoteRefused.as_str(), None)
            }
            Failure::Reset { reason: reason @ ResetReason::RemoteReset, .. } => {
                stats.upstream_rq_rx_reset.inc();
                (503, ResponseFlag::UpstreamRemoteReset, reason.as_str(), None)
            }
            Failure::Reset { reason, .. } => (503, reset_flag(*reason), reason.as_str(), None),
            Failure::Protocol(error) => {
                stats.upstream_cx_protocol_error.inc();
                let status = if error.status == 431 { 503 } else { 502 };
                (status, ResponseFlag::UpstreamProtocolError, "protocol_error", None)
            }
            Failure::Downstream(_) => return End::Reset,
        };
        info.flags.set(flag);
        let mut details = reason.to_owned();
        let mut body = format!(
            "upstream connect error or disconnect/reset before headers. reset reason: {}",
            reason.replace('_', " ")
        );
        if info.attempts > 1 {
            body = body.replace("headers. reset", "headers. retried and the latest reset");
        }
        if let Some(transport) = transport {
            details = format!("{details}|{transport}");
            info.upstream_mut().transport_failure = Some(transport);
        }
        if let Failure::Protocol(error) = &failure {
            details = format!("{details}|{}", error.details);
        }
        let details = format!("upstream_reset_before_response_started{{{}}}", details.replace(' ', "_"));
        let overloaded = matches!(failure, Failure::Overflow) && !self.config.suppress_envoy_headers;
        self.charge_local(status);
        let mut reply = LocalReply::new(status, details).body(body);
        if overloaded {
            reply = reply.header(HeaderId::X_ENVOY_OVERLOADED, "true");
        }
        reply.into()
    }

    fn no_healthy_upstream(&mut self) -> End {
        self.charge_local(503);
        LocalReply::new(503, "no_healthy_upstream")
            .body("no healthy upstream")
            .flag(ResponseFlag::NoHealthyUpstream)
            .into()
    }

    fn timed_out(&mut self, details: &'static str) -> End {
        let status = if self.timeouts.alternative_response { 204 } else { 504 };
        self.charge_local(status);
        let reply = LocalReply::new(status, details).flag(ResponseFlag::UpstreamRequestTimeout);
        if status == 204 { reply.into() } else { reply.body("upstream request timeout").into() }
    }

    /// A local reply in the upstream's place counts as its code.
    fn charge_local(&self, status: u16) {
        if self.config.dynamic_stats {
            codes::charge(
                self.cluster.cluster(),
                status,
                codes::Kind { internal: self.internal, canary: false },
            );
            if let Some(counters) = &self.virtual_counters {
                counters.charge(status);
            }
        }
    }
}

/// No host to connect to; distinguished from real failures, which all have a reason or a timeout.
fn no_host() -> ConnectFailure {
    ConnectFailure { kind: sampan_upstream::ConnectFailureKind::Local, reason: "".into() }
}

fn reset(reason: ResetReason, sent: bool) -> Failure {
    match reason {
        ResetReason::RemoteRefused => Failure::Refused,
        ResetReason::ProtocolError => {
            Failure::Protocol(CodecError::bad("http2.protocol_error", "protocol error"))
        }
        reason => Failure::Reset { reason, sent },
    }
}

fn reset_flag(reason: ResetReason) -> ResponseFlag {
    match reason {
        ResetReason::LocalReset => ResponseFlag::LocalReset,
        ResetReason::RemoteReset | ResetReason::RemoteRefused => ResponseFlag::UpstreamRemoteReset,
        ResetReason::ConnectionFailure => ResponseFlag::UpstreamConnectionFailure,
        ResetReason::ConnectionTermination => ResponseFlag::UpstreamConnectionTermination,
        ResetReason::Overflow => ResponseFlag::UpstreamOverflow,
        ResetReason::ProtocolError => ResponseFlag::UpstreamProtocolError,
    }
}

/// The client's body broke off or broke the rules.
fn downstream_failed(error: BodyError) -> End {
    match error {
        BodyError::Protocol(error) => {
            let mut reply =
                LocalReply::new(error.status, error.details).flag(ResponseFlag::DownstreamProtocolError);
            reply.close = true;
            reply.body("Bad Request").into()
        }
        BodyError::Reset(_) | BodyError::Timeout => End::Reset,
    }
}

/// Moves the request's body up until it is sent, or the client has no more for now.
fn poll_upload(
    upload: &mut Upload,
    exchange: &mut Exchange,
    tunnel: bool,
    timer: &crate::timer::Timer,
    cx: &mut Context<'_>,
) -> Poll<Result<(), Failure>> {
    loop {
        match exchange.poll_ready(cx) {
            Poll::Ready(Ok(())) => {}
            // An answer may lie behind the failed write: the reader decides.
            Poll::Ready(Err(_)) | Poll::Pending => return Poll::Pending,
        }
        match upload.poll_piece(cx) {
            Poll::Ready(Ok(piece)) => {
                timer.touch();
                let end = piece.end && !tunnel;
                if piece.frame.is_some() || end {
                    let _ = exchange.send_frame(piece.frame, end);
                }
                if piece.end {
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Downstream(error))),
            Poll::Pending => {
                let _ = exchange.poll_flush(cx);
                return Poll::Pending;
            }
        }
    }
}

/// An upgrade over HTTP/2 is an extended CONNECT, and the other way round; none where nothing changes.
fn for_protocol(headers: &HeaderMap, lease: &HttpLease) -> Option<HeaderMap> {
    match lease {
        HttpLease::H2(_) if has_token(headers, HeaderId::CONNECTION, b"upgrade") => {
            let mut changed = headers.clone();
            let protocol = headers.get(HeaderId::UPGRADE)?.to_vec();
            changed.set(HeaderId::METHOD, "CONNECT");
            changed.set(HeaderId::PSEUDO_PROTOCOL, protocol);
            changed.remove(HeaderId::UPGRADE);
            changed.remove(HeaderId::CONNECTION);
            changed.remove(HeaderId::CONTENT_LENGTH);
            Some(changed)
        }
        HttpLease::H1(_) if headers.contains(HeaderId::PSEUDO_PROTOCOL) => {
            let mut changed = headers.clone();
            let protocol = headers.get(HeaderId::PSEUDO_PROTOCOL)?.to_vec();
            changed.set(HeaderId::METHOD, "GET");
            changed.set(HeaderId::UPGRADE, protocol);
            changed.set(HeaderId::CONNECTION, "upgrade");
            changed.remove(HeaderId::PSEUDO_PROTOCOL);
            Some(changed)
        }
        _ => None,
    }
}
