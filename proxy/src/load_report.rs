//! LRS: load is reported to a server that asks for it (`cluster_manager.load_stats_config`).
//!
//! ```text
//!   open, say who we are ──> the server names clusters and an interval ──> a report every so often
//!         ^──────────────────── 5 s behind the end of the stream, with the last answer in force
//! ```
//!
//! A report tells what was counted since the one before, by cluster and locality, and by endpoint where it is wanted. Hosts count
//! for `/clusters` and never go back, so that the reporter remembers where each of them stood; a host that came since
//! stood at nothing. A cluster that is named begins to be counted then, unless it was named before.
//!
//! As in Envoy 1.40 a locality without any request is left out, its cluster is not, and `lrs_server` of clusters says
//! nothing. Named metrics (ORCA) are not there: backends' load reports are not read.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::{Locality, Node};
use envoy_types::pb::envoy::config::endpoint::v3::cluster_stats::DroppedRequests;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterStats, UpstreamEndpointStats, UpstreamLocalityStats,
};
use envoy_types::pb::envoy::service::load_stats::v3::{LoadStatsRequest, LoadStatsResponse};
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use prost::Message;
use prost::bytes::Bytes;
use sampan_core::log::{Component, Level};
use sampan_core::stats::{Counter, Scope};
use sampan_upstream::host::LocalityHosts;
use sampan_upstream::{Cluster, ClusterManager, Host};
use xds_client::grpc::{Deframer, framed};
use xds_client::{Call, End, Transport};

use crate::view::proto_address;

const CALL: &str = "/envoy.service.load_stats.v3.LoadReportingService/StreamLoadStats";
const ALL_CLUSTERS: &str = "envoy.lrs.supports_send_all_clusters";
const RETRY: Duration = Duration::from_secs(5);

/// The reporter, which lives as long as the process.
pub struct Reporter {
    clusters: Arc<ClusterManager>,
    transport: Rc<dyn Transport>,
    node: Node,
    max_message: usize,
    stats: Stats,
    /// What the server said last.
    answer: Option<LoadStatsResponse>,
    tracked: BTreeMap<String, Tracked>,
}

/// `load_reporter.*`, named from the server's side.
struct Stats {
    errors: Counter,
    requests: Counter,
    responses: Counter,
    retries: Counter,
}

/// A cluster that is counted.
struct Tracked {
    since: Instant,
    /// Where each host stood.
    hosts: HashMap<*const Host, (Weak<Host>, Load)>,
    dropped: (Weak<Cluster>, Drops),
}

/// Requests that a cluster answered itself.
#[derive(Clone, Copy, Default)]
struct Drops {
    all: u64,
    /// `drop_overloads`
    overload: u64,
}

#[derive(Clone, Copy, Default)]
struct Load {
    successful: u64,
    errors: u64,
    issued: u64,
    in_progress: u64,
}

enum Event {
    Chunk(Bytes),
    /// The time for a report.
    Time,
}

impl Reporter {
    /// Begins to report.
    pub fn start(
        clusters: &Arc<ClusterManager>,
        (transport, max_message): (Rc<dyn Transport>, usize),
        node: &Node,
        root: &Scope,
    ) {
        let scope = root.scope("load_reporter");
        let mut node = node.clone();
        node.client_features.push(ALL_CLUSTERS.to_owned());
        let this = Self {
            clusters: clusters.clone(),
            transport,
            node,
            max_message,
            stats: Stats {
                errors: scope.counter("errors"),
                requests: scope.counter("requests"),
                responses: scope.counter("responses"),
                retries: scope.counter("retries"),
            },
            answer: None,
            tracked: BTreeMap::new(),
        };
        tokio::task::spawn_local(this.run());
    }

    async fn run(mut self) {
        loop {
            let end = self.session().await;
            if end.code == 0 {
                log(Level::Debug, &format!("closed gracefully, {}", end.message));
            } else {
                self.stats.errors.inc();
                log(Level::Warn, &format!("closed: {end}"));
            }
            let text =
                format!("Load reporter stats stream/connection will retry in {} ms.", RETRY.as_millis());
            sampan_core::log!(Component::Upstream, Level::Info, "{text}");
            tokio::time::sleep(RETRY).await;
            self.stats.retries.inc();
        }
    }

    /// One stream, to its end.
    async fn session(&mut self) -> End {
        let transport = self.transport.clone();
        let mut call = match transport.open(CALL).await {
            Ok(call) => call,
            Err(end) => return end,
        };
        let mut deframer = Deframer::limited(self.max_message);
        let mut next = self.report(&mut *call);
        loop {
            match event(&mut *call, next).await {
                Err(end) => return end,
                Ok(Event::Time) => next = self.report(&mut *call),
                Ok(Event::Chunk(chunk)) => deframer.push(chunk),
            }
            loop {
                let message = match deframer.pop() {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(end) => return end,
                };
                match LoadStatsResponse::decode(message) {
                    Ok(answer) => self.answer = Some(answer),
                    Err(error) => {
                        return End::internal(format!("a response that cannot be decoded: {error}"));
                    }
                }
                self.stats.requests.inc();
                next = self.begin();
            }
        }
    }

    /// Sends what was counted; when to do it again.
    fn report(&mut self, call: &mut dyn Call) -> Option<Instant> {
        let by_endpoint = self.answer.as_ref().is_some_and(|answer| answer.report_endpoint_granularity);
        let now = Instant::now();
        let clusters = self.clusters.clusters();
        let stats = self
            .tracked
            .iter_mut()
            .filter_map(|(name, tracked)| Some(tracked.stats(&clusters.get(name)?, by_endpoint, now)));
        let request = LoadStatsRequest { node: Some(self.node.clone()), cluster_stats: stats.collect() };
        call.send(framed(&request));
        self.stats.responses.inc();
        self.begin()
    }

    /// Counts what the server wants from now on, and goes on with what it wanted before.
    fn begin(&mut self) -> Option<Instant> {
        let answer = self.answer.as_ref()?;
        let clusters = self.clusters.clusters();
        let names: Vec<String> = if answer.send_all_clusters {
            clusters.all().iter().map(|cluster| cluster.name().to_string()).collect()
        } else {
            answer.clusters.clone()
        };
        let mut before = std::mem::take(&mut self.tracked);
        for name in names {
            let tracked = before.remove(&name);
            let tracked = tracked.unwrap_or_else(|| Tracked::new(clusters.get(&name).as_ref()));
            self.tracked.insert(name, tracked);
        }
        let every = answer.load_reporting_interval.as_ref().map(sampan_http::manager::duration);
        Some(Instant::now() + every.unwrap_or_default().max(Duration::from_millis(1)))
    }
}

/// What happens next. A report waits until the one before is written.
async fn event(call: &mut dyn Call, next: Option<Instant>) -> Result<Event, End> {
    let never = Instant::now() + Duration::from_secs(24 * 3600);
    let mut alarm = pin!(tokio::time::sleep_until(next.unwrap_or(never).into()));
    poll_fn(|cx| {
        if let Poll::Ready(chunk) = call.poll_data(cx) {
            return Poll::Ready(chunk.map(Event::Chunk));
        }
        match call.poll_flush(cx) {
            Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(())) => {}
        }
        match alarm.as_mut().poll(cx) {
            Poll::Ready(()) if next.is_some() => Poll::Ready(Ok(Event::Time)),
            _ => Poll::Pending,
        }
    })
    .await
}

impl Tracked {
    /// Whatever was counted before is not reported.
    fn new(cluster: Option<&Arc<Cluster>>) -> Self {
        let mut this = Self { since: Instant::now(), hosts: HashMap::new(), dropped: Default::default() };
        if let Some(cluster) = cluster {
            let hosts = cluster.hosts();
            hosts.priorities.iter().flatten().flat_map(|one| &one.hosts).for_each(|host| {
                this.latch(host);
            });
            this.dropped(cluster);
        }
        this
    }

    /// What a host counted since it was asked last.
    fn latch(&mut self, host: &Arc<Host>) -> Load {
        let stats = &host.stats;
        let now = Load {
            successful: stats.rq_success.value(),
            errors: stats.rq_error.value(),
            issued: stats.rq_total.value(),
            in_progress: stats.rq_active.value(),
        };
        let (_, last) =
            self.hosts.entry(Arc::as_ptr(host)).or_insert_with(|| (Arc::downgrade(host), Load::default()));
        let since = now.since(last);
        *last = now;
        since
    }

    /// How many requests the cluster dropped since it was asked last: in all, and by category those of `drop_overloads`.
    fn dropped(&mut self, cluster: &Arc<Cluster>) -> (u64, Vec<DroppedRequests>) {
        let (overload, category) = cluster.overload_drops().unwrap_or_default();
        let now = Drops { all: cluster.dropped().value(), overload };
        let same = self.dropped.0.as_ptr() == Arc::as_ptr(cluster);
        let last = if same { self.dropped.1 } else { Drops::default() };
        self.dropped = (Arc::downgrade(cluster), now);
        let one = DroppedRequests { category: category.into(), dropped_count: now.overload - last.overload };
        (now.all - last.all, Some(one).filter(|one| one.dropped_count > 0).into_iter().collect())
    }

    fn stats(&mut self, cluster: &Arc<Cluster>, by_endpoint: bool, now: Instant) -> ClusterStats {
        // An address that is used again would be taken for the host that had it.
        self.hosts.retain(|_, (host, _)| host.strong_count() > 0);
        let hosts = cluster.hosts();
        let localities = hosts
            .priorities
            .iter()
            .zip(0..)
            .flat_map(|(all, priority)| all.iter().map(move |one| (one, priority)));
        let localities = localities.filter_map(|(one, priority)| self.locality(one, priority, by_endpoint));
        let upstream_locality_stats = localities.collect();
        let interval = now.duration_since(self.since);
        self.since = now;
        let (total_dropped_requests, dropped_requests) = self.dropped(cluster);
        ClusterStats {
            cluster_name: cluster.name().to_string(),
            cluster_service_name: cluster.eds_service_name().unwrap_or_default().to_owned(),
            upstream_locality_stats,
            total_dropped_requests,
            dropped_requests,
            load_report_interval: Some(ProtoDuration {
                seconds: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(interval.subsec_micros() * 1000).unwrap_or_default(),
            }),
        }
    }

    fn locality(
        &mut self,
        one: &LocalityHosts,
        priority: u32,
        by_endpoint: bool,
    ) -> Option<UpstreamLocalityStats> {
        let mut sum = Load::default();
        let mut endpoints = Vec::new();
        for host in &one.hosts {
            let load = self.latch(host);
            sum.add(load);
            if by_endpoint && !load.is_nothing() {
                endpoints.push(UpstreamEndpointStats {
                    address: Some(proto_address(&host.address())),
                    total_successful_requests: load.successful,
                    total_error_requests: load.errors,
                    total_requests_in_progress: load.in_progress,
                    total_issued_requests: load.issued,
                    ..Default::default()
                });
            }
        }
        let place = &one.locality;
        (!sum.is_nothing()).then(|| UpstreamLocalityStats {
            locality: Some(Locality {
                region: place.region.to_string(),
                zone: place.zone.to_string(),
                sub_zone: place.sub_zone.to_string(),
            }),
            priority,
            total_successful_requests: sum.successful,
            total_error_requests: sum.errors,
            total_requests_in_progress: sum.in_progress,
            total_issued_requests: sum.issued,
            upstream_endpoint_stats: endpoints,
            ..Default::default()
        })
    }
}

impl Load {
    /// Requests in progress are no sum.
    fn since(self, last: &Self) -> Self {
        Self {
            successful: self.successful - last.successful,
            errors: self.errors - last.errors,
            issued: self.issued - last.issued,
            in_progress: self.in_progress,
        }
    }

    fn add(&mut self, other: Self) {
        self.successful += other.successful;
        self.errors += other.errors;
        self.issued += other.issued;
        self.in_progress += other.in_progress;
    }

    fn is_nothing(self) -> bool {
        self.successful + self.errors + self.issued + self.in_progress == 0
    }
}

fn log(level: Level, text: &str) {
    sampan_core::log!(Component::Upstream, level, "StreamLoadStats gRPC config stream {text}");
}
