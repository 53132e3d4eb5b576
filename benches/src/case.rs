//! The cases, their sizes, and the targets that Sampan is held to.

use crate::{
    config::{Front, Upstream},
    load::Workload,
    report::{Metric, Target},
};

/// One traffic pattern through one set-up.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Name in the tables and for the filter.
    pub name: &'static str,
    /// What is counted.
    pub unit: &'static str,
    /// The traffic.
    pub workload: Workload,
    /// The proxy's listener.
    pub front: Front,
    /// The backend's protocol.
    pub upstream: Upstream,
    /// Exchanges per CPU round; a fifth with `--quick`.
    pub requests: usize,
    /// The larger of the two counts under callgrind and strace, the smaller is a fifth; half with `--quick`.
    pub traced: usize,
}

const fn case(
    name: &'static str,
    workload: Workload,
    front: Front,
    upstream: Upstream,
    requests: usize,
    traced: usize,
) -> Case {
    Case { name, unit: "request", workload, front, upstream, requests, traced }
}

/// All traffic cases.
pub const CASES: [Case; 11] = [
    case("h1-1k", Workload::Http1 { size: 1024 }, Front::Http1, Upstream::Http1, 20_000, 1500),
    case("h1-10k", Workload::Http1 { size: 10 * 1024 }, Front::Http1, Upstream::Http1, 20_000, 1000),
    case("h1-100k", Workload::Http1 { size: 100 * 1024 }, Front::Http1, Upstream::Http1, 5000, 500),
    case("h1-post-1k", Workload::Http1Post { size: 1024 }, Front::Http1, Upstream::Http1, 20_000, 1000),
    case("istio-like", Workload::Http1 { size: 1024 }, Front::IstioLike, Upstream::Http1, 20_000, 1500),
    case("h2-h1", Workload::Http2 { size: 1024 }, Front::Http2, Upstream::Http1, 20_000, 1000),
    case("h2-h2", Workload::Http2 { size: 1024 }, Front::Http2, Upstream::Http2, 20_000, 1000),
    case("tls-kept", Workload::TlsKept { size: 1024 }, Front::Tls, Upstream::Http1, 20_000, 1000),
    Case {
        unit: "connection",
        ..case("tls-handshake", Workload::TlsHandshake, Front::Tls, Upstream::Http1, 2000, 250)
    },
    Case { unit: "MiB", ..case("tcp-bulk", Workload::TcpBulk, Front::Tcp, Upstream::Tcp, 2048, 200) },
    Case {
        unit: "connection",
        ..case("tcp-connection", Workload::TcpConnection, Front::Tcp, Upstream::Tcp, 5000, 500)
    },
];

/// Names of the rows that are not traffic cases.
pub mod rows {
    /// Resident memory after the start.
    pub const IDLE: &str = "idle";
    /// Memory per kept connection with 2,000 open.
    pub const PER_CONNECTION_2000: &str = "idle-connections-2000";
    /// Memory per kept connection with 5,000 open.
    pub const PER_CONNECTION_5000: &str = "idle-connections-5000";
    /// Resident memory after 5,000 connections were closed.
    pub const CLOSED: &str = "closed-connections-5000";
    /// Start to ready with one listener and one cluster.
    pub const START: &str = "start";
    /// Start to ready with 2,000 clusters and virtual hosts.
    pub const START_2000: &str = "start-2000";
    /// Resident memory with 2,000 clusters and virtual hosts.
    pub const IDLE_2000: &str = "idle-2000";

    /// CPU for changes that a control plane sends one after the other.
    pub const XDS_CHANGES: &str = "xds-changes";
    /// CPU at 1,000 changes a second.
    pub const XDS_RATE: &str = "xds-rate";
    /// Time from a push to its effect.
    pub const XDS_EFFECTS: &str = "xds-effects";
    /// Memory of what is not used, and its first request.
    pub const XDS_UNUSED: &str = "xds-unused";
    /// Instructions for each change; not in a quick run, if not asked for.
    pub const XDS_INSTRUCTIONS: &str = "xds-instructions";

    /// What a filter can select besides the cases: the run of the memory figures, the two of starts, and the control plane's.
    pub const GROUPS: [&str; 8] =
        ["memory", START, START_2000, XDS_CHANGES, XDS_RATE, XDS_EFFECTS, XDS_UNUSED, XDS_INSTRUCTIONS];
}

/// What Sampan must reach, where something was promised.
#[must_use]
pub fn target(metric: Metric, case: &str) -> Option<Target> {
    let target = match (metric, case) {
        (Metric::Cpu, "h1-1k" | "istio-like") => Target::Ratio(0.30),
        (Metric::Cpu, "h2-h2") => Target::Ratio(0.35),
        (Metric::Cpu, "tcp-bulk" | "tcp-connection") => Target::Ratio(0.60),
        (Metric::Instructions, "h1-1k") => Target::Value(20_000.0),
        (Metric::Memory, rows::IDLE) => Target::Value(10.0),
        (Metric::Memory, rows::PER_CONNECTION_2000 | rows::PER_CONNECTION_5000) => Target::Value(6.0),
        (Metric::Memory, rows::IDLE_2000) => Target::Value(40.0),
        (Metric::Xds, "rate-delta") => Target::Value(5.0),
        (Metric::Start, rows::START) => Target::Value(50.0),
        (Metric::Start, rows::START_2000) => Target::Value(250.0),
        _ => return None,
    };
    Some(target)
}
