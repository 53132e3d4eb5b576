//! `istio.stats` (`stats.PluginConfig`): Istio's standard metrics, for HTTP streams and for TCP connections.
//!
//! ```text
//!   HTTP  istio_requests_total, istio_request_duration_milliseconds, istio_request_bytes, istio_response_bytes;
//!         for gRPC istio_request_messages_total and istio_response_messages_total besides
//!   TCP   istio_tcp_connections_opened_total, _closed_total, istio_tcp_sent_bytes_total, istio_tcp_received_bytes_total
//! ```
//!
//! Names, labels, their order and their values for what is unknown are those of istio/proxy
//! (`source/extensions/filters/http/istio_stats/istio_stats.cc`). A stat's full name is
//! `istiocustom.METRIC.TAG.VALUE…`, as in Istio; the Prometheus output prints `METRIC{TAG="VALUE",…}`.
//!
//! What a stream's labels follow from are its [`Facts`]. Each worker remembers the counters of the facts it has met, so
//! that a stream whose like was seen before costs a hash of a few words and names, and no allocation. Stats live as long
//! as the process, as Istio's do.
//!
//! Metric overrides with CEL expressions cost their evaluation for every stream.

mod facts;
pub mod network;
mod overrides;
mod service;
mod tags;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sampan_config::istio::{PluginConfig, Reporter as ReporterMessage};
use sampan_core::error::ConfigResult;
use sampan_core::format::FormatContext;
use sampan_core::peer::Peer;
use sampan_core::stats::{Counter, Histogram, Store, Tag, Unit};
use sampan_core::stream_info::StreamInfo;

use crate::context::{FactoryContext, TrafficDirection};
use facts::{Facts, OwnedFacts, Shape};
use overrides::Overrides;

/// The name space that Prometheus output leaves out.
const NAMESPACE: &str = "istiocustom";
/// How many sets of counters a worker remembers.
const REMEMBERED: usize = 8192;

/// From whose side it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reporter {
    /// The client's sidecar, or a gateway.
    Client,
    /// The server's sidecar.
    Server,
    /// A gateway that stands for the servers.
    ServerGateway,
}

/// One filter, of either kind.
pub struct IstioStats {
    reporter: Reporter,
    host_fallback: bool,
    /// `tcp_reporting_duration`; none where connections report at their end only.
    pub report_every: Option<Duration>,
    own: Peer,
    overrides: Overrides,
    store: Store,
    /// Tells the facts of one filter from those of another.
    number: u64,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl IstioStats {
    /// The filter of a message.
    pub fn new(message: &PluginConfig, context: &FactoryContext) -> ConfigResult<Self> {
        let reporter = match (message.reporter(), context.traffic_direction) {
            (ReporterMessage::ServerGateway, _) => Reporter::ServerGateway,
            (ReporterMessage::Unspecified, TrafficDirection::Inbound) => Reporter::Server,
            (ReporterMessage::Unspecified, _) => Reporter::Client,
        };
        let every = match &message.tcp_reporting_duration {
            None => Some(Duration::from_secs(5)),
            given => crate::proto::nonzero(given.as_ref(), "tcp_reporting_duration")?,
        };
        let node = &context.server.node;
        let store = context.server.stats.clone();
        build_info(&store, &node.own.metadata);
        Ok(Self {
            reporter,
            host_fallback: !message.disable_host_header_fallback,
            report_every: every,
            own: own_labels(node),
            overrides: Overrides::new(message),
            store,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// Counts a stream that has ended.
    pub fn record_http(&self, context: &FormatContext<'_>) {
        let info = context.info;
        let grpc = sampan_core::format::is_grpc_request(context);
        let shape = if grpc { Shape::Grpc } else { Shape::Http };
        let status = if grpc { sampan_core::format::grpc_status_of(context) } else { None };
        let set = Facts::new(self, shape, context, status).set();
        set.count(0, 1);
        if let Some(end) = info.end {
            let duration = end.saturating_duration_since(info.start).as_millis();
            set.record(0, u64::try_from(duration).unwrap_or(u64::MAX));
        }
        set.record(1, info.bytes.wire_received);
        set.record(2, info.bytes.wire_sent);
        self.overrides.count(&set.custom, context);
    }

    /// Counts messages of a gRPC stream.
    pub fn record_messages(&self, context: &FormatContext<'_>, requests: u64, responses: u64) {
        let set = Facts::new(self, Shape::Messages, context, None).set();
        set.count(0, requests);
        set.count(1, responses);
    }

    /// The counters of a connection, whose labels are fixed with its first report.
    fn tcp(&self, info: &StreamInfo) -> Rc<Set> {
        Facts::new(self, Shape::Tcp, &FormatContext::new(info), None).set()
    }

    /// Makes the counters of facts that were not met before.
    fn make(&self, facts: &Facts<'_>) -> Set {
        let base = tags::all(facts);
        let scope = |metric: &str| {
            let tags = self.overrides.apply(metric, &base, &facts.values)?;
            Some(self.store.tagged(NAMESPACE, tags))
        };
        let counter = |metric: &str| scope(metric).map(|scope| scope.counter(&["istio_", metric].concat()));
        let histogram = |metric: &str, unit| {
            scope(metric).map(|scope| scope.histogram(&["istio_", metric].concat(), unit))
        };
        let names = facts.shape.counters();
        Set {
            counters: names.iter().map(|metric| counter(metric)).collect(),
            histograms: match facts.shape {
                Shape::Http | Shape::Grpc => vec![
                    histogram("request_duration_milliseconds", Unit::Milliseconds),
                    histogram("request_bytes", Unit::Bytes),
                    histogram("response_bytes", Unit::Bytes),
                ],
                Shape::Tcp | Shape::Messages => Vec::new(),
            },
            custom: match facts.shape {
                Shape::Messages => Vec::new(),
                _ => self.overrides.custom(&self.store, &facts.values),
            },
        }
    }
}

/// `istio_build{component="proxy",tag="VERSION"}`
fn build_info(store: &Store, metadata: &envoy_types::pb::google::protobuf::Struct) {
    use envoy_types::pb::google::protobuf::value::Kind;
    let version = match metadata.fields.get("ISTIO_VERSION").and_then(|v| v.kind.as_ref()) {
        Some(Kind::StringValue(version)) if !version.is_empty() => version.as_str(),
        _ => "unknown",
    };
    let tags: Vec<Tag> = vec![("component".into(), "proxy".into()), ("tag".into(), version.into())];
    store.tagged(NAMESPACE, tags).gauge("istio_build").set(1);
}

/// Our own labels come from the plain labels `app` and `version` alone.
fn own_labels(node: &crate::NodeInfo) -> Peer {
    use envoy_types::pb::google::protobuf::value::Kind;
    let mut own = node.own.peer(&[]);
    let labels = match node.own.metadata.fields.get("LABELS").and_then(|v| v.kind.as_ref()) {
        Some(Kind::StructValue(labels)) => Some(labels),
        _ => None,
    };
    let label = |key: &str| match labels.and_then(|l| l.fields.get(key)).and_then(|v| v.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text.clone(),
        _ => String::new(),
    };
    own.app = label("app");
    own.version = label("version");
    own
}

/// The counters of one set of facts; none stands for a metric that is dropped.
struct Set {
    counters: Vec<Option<Counter>>,
    histograms: Vec<Option<Histogram>>,
    custom: Vec<overrides::Custom>,
}

impl Set {
    fn count(&self, index: usize, n: u64) {
        if let Some(Some(counter)) = self.counters.get(index) {
            counter.add(n);
        }
    }

    fn record(&self, index: usize, value: u64) {
        if let Some(Some(histogram)) = self.histograms.get(index) {
            histogram.record(value);
        }
    }
}

type Sets = HashMap<u64, Vec<(OwnedFacts, Rc<Set>)>, foldhash::fast::FixedState>;

thread_local! {
    static SETS: RefCell<(usize, Sets)> = RefCell::default();
}

impl Facts<'_> {
    /// The counters of these facts: remembered, or made.
    fn set(&self) -> Rc<Set> {
        let hash = self.hash();
        let known = SETS.with_borrow(|(_, sets)| {
            let (_, set) = sets.get(&hash)?.iter().find(|(facts, _)| self.is(facts))?;
            Some(set.clone())
        });
        if let Some(set) = known {
            return set;
        }
        let set = Rc::new(self.stats.make(self));
        SETS.with_borrow_mut(|(count, sets)| {
            if *count >= REMEMBERED {
                sets.clear();
                *count = 0;
            }
            *count += 1;
            sets.entry(hash).or_default().push((self.to_owned(), set.clone()));
        });
        set
    }
}
