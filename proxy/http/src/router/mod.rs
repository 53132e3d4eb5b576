//! The router: the end of every chain. Picks cluster, host and connection, forwards, tries again.
//!
//! ```text
//!   decide    no route, redirect, direct response, cluster
//!   finalize  header mutations, rewrites, timeouts, x-envoy-*
//!   attempt   host, connection, head and body up, head down      — again as the retry policy says
//!   answer    codes counted, x-envoy-upstream-service-time; the body follows by itself (body.rs)
//! ```

mod attempt;
mod body;
pub mod callout;
mod codes;
mod config;
mod exchange;
mod failure;
pub mod grpc;
mod hash;
mod hedge;
mod internal_redirect;
mod outlier;
pub mod own_stream;
mod respond;
mod retry;
mod shadow;
mod timeouts;
mod tunnel;
pub mod uplink;
mod upload;

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::RoutingPriority;
use sampan_codec::h1::ResponseHead;
use sampan_core::clock;
use sampan_core::format::FormatContext;
use sampan_core::header::{HeaderId, HeaderMap};
use sampan_core::stream_info::ResponseFlag;
use sampan_upstream::{ConnectOptions, Host, PreviousPriorities, Priority, WorkerCluster, WorkerHost};

use crate::filter::{LocalReply, Response};
use crate::manager::split_port;
use crate::route::{Action, ClusterAction, Decision, Redirect, Selected};
use crate::stream::Stream;
use codes::RequestCounters;
pub use codes::drop_replaced;
/// What filters count under a cluster's name.
pub mod count {
    pub use super::codes::{internal, other};
}
pub use config::{RouterConfig, TYPE};
use exchange::Exchange;
use failure::Failure;
pub use internal_redirect::Followed;
pub(crate) use retry::jittered;
use retry::{Retry, RetryState};
use timeouts::Timeouts;
pub(crate) use tunnel::tunnels;
use upload::Upload;

/// How forwarding ended without a response.
pub enum End {
    /// This instead.
    Reply(Box<LocalReply>),
    /// The stream is cut.
    Reset,
    /// The upstream's redirect is followed: the stream is to be served anew.
    Follow(Box<Followed>),
}

impl From<LocalReply> for End {
    fn from(reply: LocalReply) -> Self {
        Self::Reply(Box::new(reply))
    }
}

/// What a fresh route means for the stream besides where it goes.
pub fn note_route(stream: &mut Stream) {
    let info = &mut stream.info;
    let virtual_host = stream.route.as_ref().map(Selected::virtual_host);
    info.virtual_host = virtual_host.map(|host| host.name.clone());
    info.virtual_host_metadata = virtual_host.and_then(|host| host.metadata.clone());
    let route = stream.route.as_ref().and_then(Selected::route);
    info.route_name = route.map(|r| r.name.clone()).filter(|name| !name.is_empty());
    info.route_metadata = route.and_then(|r| r.metadata.clone());
    let action = stream.route.as_ref().and_then(Selected::cluster_action);
    let weighted = stream.route.as_ref().and_then(Selected::weighted);
    let name = action.and_then(|action| action.cluster_name(weighted, &stream.request));
    info.cluster.clone_from(&name);
    info.cluster_observability = name;
    let Some(action) = action else { return };
    if let Some(idle) = action.idle_timeout {
        stream.timer.set_idle_timeout(idle);
    }
    match action.stream_duration {
        None if stream.manager.limits.max_stream_duration.is_none() => stream.timer.set_max_duration(None),
        duration => timeouts::refresh_duration(stream, duration),
    }
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
            let location = redirect.location(None, &stream.request, &stream.info);
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
    config::check_strict(stream, config)?;
    config::check_required(&stream.request)?;
    let mut forward = Forward::new(stream, config, &selected, action, cluster);
    let mut end = forward.run().await;
    if let Err(End::Reply(reply)) = &mut end {
        reply.by_router = true;
    }
    end
}

/// A redirect or direct response.
fn answer(stream: &mut Stream, config: &RouterConfig, selected: &Selected, action: &Action) -> End {
    match action {
        Action::Redirect(redirect) => {
            config.rq_direct_response.inc();
            let location = redirect.location(selected.route(), &stream.request, &stream.info);
            redirect.rewrite(selected.route(), &mut stream.request, !config.suppress_envoy_headers);
            LocalReply::new(redirect.status(), "direct_response").header(HeaderId::LOCATION, location).into()
        }
        Action::Direct(direct) => {
            config.rq_direct_response.inc();
            let context =
                FormatContext { request: Some(&stream.request), ..FormatContext::new(&stream.info) };
            let mut reply = LocalReply::new(direct.status, "direct_response").body(direct.body(&context));
            if direct.status == 201 || (300..400).contains(&direct.status) {
                let here = Redirect::to_here().location(None, &stream.request, &stream.info);
                reply = reply.header(HeaderId::LOCATION, here);
            }
            reply.into()
        }
        Action::Cluster(_) => {
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
    if !stream.info.cluster.as_ref().is_some_and(|noted| Arc::ptr_eq(noted, &name)) {
        stream.info.cluster = Some(name);
    }
    stream.info.cluster_observability = Some(cluster.cluster().observability_name().clone());
    stream.info.cluster_metadata = cluster.cluster().config().metadata.clone();
    Some(cluster)
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
    previous_priorities: Option<Box<PreviousPriorities>>,
    /// The attempt's.
    host: Option<Rc<WorkerHost>>,
    /// Whether the attempt had a connection.
    connected: bool,
    /// What picks the host of a cluster that hashes.
    hash: Option<u64>,
    /// `set-cookie` for clients that had no cookie to hash.
    cookies: Vec<String>,
    internal: bool,
    /// An informational head has come: no other attempt can follow.
    informed: bool,
    /// The attempt before was too slow.
    timed_out: bool,
    /// An attempt that was too slow, and goes on (hedging).
    slow: Option<Box<Exchange>>,
    connect_options: Option<ConnectOptions>,
    counters: RequestCounters,
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
        stream.info.virtual_cluster = virtual_cluster.and_then(|one| one.name().cloned());
        let counted = selected.route().and_then(|route| route.counted.as_ref());
        let counters = RequestCounters::new(virtual_cluster.map(|one| &one.counted), counted, &config.root);
        Self {
            stream,
            config,
            selected,
            action,
            cluster,
            priority,
            timeouts: Timeouts::default(),
            tried: Vec::new(),
            previous_priorities: None,
            host: None,
            connected: false,
            hash: None,
            cookies: Vec::new(),
            internal,
            informed: false,
            timed_out: false,
            slow: None,
            connect_options: None,
            counters,
        }
    }

    /// By reference, as all that has much to hold: what is given by value has room in both futures and is copied.
    async fn run(&mut self) -> Result<Response, End> {
        if let Some(reply) = self.drop_overload() {
            return Err(reply.into());
        }
        self.timeouts = Timeouts::new(self.action, self.stream, self.config);
        self.set_attempt_headers(1);
        let keep_original = !self.config.suppress_envoy_headers;
        self.selected.finalize_request(&mut self.stream.request, &self.stream.info, keep_original);
        config::check_values(&self.stream.request)?;
        self.connect_options = self.connect_options();
        self.set_hash();
        let Stream { request, worker, .. } = &mut *self.stream;
        let mut retry = RetryState::new(&self.action.retry, request, &self.cluster, self.priority, worker);
        if let Some(retry) = &mut retry {
            retry.counters.clone_from(&self.counters);
        }
        if self.stream.upgrade.is_some() {
            retry = None;
        }
        if self.timeouts.hedging && retry.is_none() {
            // Nothing can take a slow attempt's place.
            self.timeouts.no_tries();
        }
        let body = std::mem::take(&mut self.stream.body);
        let limit = self.retry_buffer_limit();
        let shadows = shadow::begin(self.stream, self.action);
        let body = shadow::tee(body, shadows, limit);
        let keeps = retry.is_some() || self.action.redirects.is_some();
        let mut upload = Upload::new(body, keeps.then_some(limit), self.stream.info.bytes.received);
        if self.timeouts.hedging
            && let Some(retry) = retry
        {
            return Box::pin(self.hedge(upload, retry)).await;
        }
        loop {
            self.begin_attempt();
            let result = self.attempt(&mut upload).await;
            self.report(result.as_ref().map(|(head, _)| head));
            if let Err(failure) = &result {
                self.charge_failed(failure);
            }
            self.timed_out = matches!(result, Err(Failure::PerTryTimeout | Failure::PerTryIdleTimeout));
            let random = self.stream.worker.random();
            let decision = match (&mut retry, &result) {
                (None, _) => Retry::No,
                (Some(_), _) if self.informed => Retry::No,
                (Some(_), Err(Failure::Timeout | Failure::NoHost(_) | Failure::Downstream(_))) => Retry::No,
                (Some(_), _) if !upload.can_replay() => {
                    self.cluster.stats().retry_or_shadow_abandoned.inc();
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
            let (head, exchange) = result.map_err(|failure| self.fail(failure))?;
            return self.finish(head, exchange, upload);
        }
    }

    /// The head that is the request's answer.
    fn finish(
        &mut self,
        mut head: ResponseHead,
        mut exchange: Exchange,
        mut upload: Upload,
    ) -> Result<Response, End> {
        if let Some(reply) = self.unsuccessful_handshake(&head, &exchange) {
            exchange.note_wire(&self.stream.timer);
            return Err(reply.into());
        }
        match self.follow(&mut head, &mut exchange, &mut upload) {
            Some(end) => Err(end),
            None => Ok(self.respond(head, exchange, upload)),
        }
    }

    fn begin_attempt(&mut self) {
        self.stream.info.attempts += 1;
        if self.stream.info.attempts > 1 {
            self.stream.timer.next_attempt();
            self.set_attempt_headers(self.stream.info.attempts);
        }
    }

    fn retry_buffer_limit(&self) -> usize {
        let by_route = self.selected.route().and_then(|r| r.buffer_limit);
        by_route.map_or(self.stream.buffer_limit(), |limit| usize::try_from(limit).unwrap_or(usize::MAX))
    }

    /// Server name and subject names that follow the request's host.
    fn connect_options(&self) -> Option<ConnectOptions> {
        let http = &self.cluster.cluster().config().http;
        let left = ConnectOptions::of(&self.stream.info);
        if !http.auto_sni && !http.auto_san_validation {
            return left;
        }
        let headers = &self.stream.request;
        let named = (!http.auto_sni_header.is_empty())
            .then(|| headers.get_name(&sampan_core::HeaderName::new(&http.auto_sni_header)))
            .flatten()
            .filter(|v| !v.is_empty());
        let value = named.or_else(|| headers.get(HeaderId::AUTHORITY));
        let host = value.and_then(|value| std::str::from_utf8(split_port(value).0).ok());
        let Some(host) = host.map(|host| host.trim_matches(['[', ']'])) else { return left };
        let is_ip = host.parse::<std::net::IpAddr>().is_ok();
        // What filters have left comes before what follows from the host.
        let mut options = left.unwrap_or_default();
        if options.sni.is_none() && http.auto_sni && !is_ip {
            options.sni = Some(host.into());
        }
        if options.verify_sans.is_empty() && http.auto_san_validation {
            options.verify_sans.push(host.to_owned());
        }
        Some(options)
    }

    fn set_attempt_headers(&mut self, attempt: u32) {
        self.timeouts.tell(&mut self.stream.request, !self.config.suppress_envoy_headers);
        let host = self.selected.virtual_host();
        if host.attempt_count {
            self.stream.request.set(HeaderId::X_ENVOY_ATTEMPT_COUNT, attempt.to_string());
        }
        if host.tells_timeout_retry && attempt > 1 {
            let text = if self.timed_out { "true" } else { "false" };
            self.stream.request.set(HeaderId::X_ENVOY_IS_TIMEOUT_RETRY, text);
        }
    }

    /// An attempt that is followed by another; its connection is kept where nothing is left on it.
    fn give_up(&self, result: Result<(ResponseHead, Exchange), Failure>, upload: &Upload) {
        if let Some(host) = &self.host {
            host.host.stats.rq_error.inc();
        }
        let Ok((head, mut exchange)) = result else { return };
        exchange.note_wire(&self.stream.timer);
        if self.config.dynamic_stats {
            codes::charge_retried(self.cluster.cluster(), head.status);
        }
        if head.end && !head.tunnel && upload.is_received() {
            exchange.finish(true);
        }
    }

    async fn back_off(&mut self, delay: Duration) -> Result<(), End> {
        let until = clock::tick() + delay;
        let timer = self.stream.timer.clone();
        let timeouts = &mut self.timeouts;
        // The attempt that failed may have a second deadline of its own, which is nobody's now (CVE-2024-23322).
        timeouts.attempt_over();
        let waited = poll_fn(|cx| match timer.poll(cx, Some(until)) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => timeouts.poll(&timer, cx).map(Err),
        })
        .await;
        waited.map_err(|failure| self.fail(failure))
    }
}
