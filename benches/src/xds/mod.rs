//! What it costs to be driven by a control plane, in the state of the world and in delta.
//!
//! | Row | What is done |
//! |---|---|
//! | `change-…-N` | one endpoint set of N clusters changes, again and again, each change some time after the answer to the last, so that it finds cold caches |
//! | `change-all-…` | the same, but the response carries all endpoint sets and one of them is another |
//! | `same-…` | the response carries all endpoint sets and none is another; the counters must say that nothing was rebuilt |
//! | `…-clusters-…` | the same two with clusters instead of endpoint sets |
//! | `rate-…` | 1,000 changes a second for five seconds |
//! | `unused-…` | resident memory that N clusters with endpoints, a virtual host for each, N route tables in scopes add, in KiB for each (not the program's own pages) |
//! | `bytes-…` | the same beyond the resources' own bytes |
//! | `first-`, `second-request` | CPU of the first and the second request to a cluster |
//! | `effect-…` | from the push to the first request that the new endpoint, the new route's cluster sees |
//! | `effect-flood-…` | the same with an endpoint, while others change 1,000 times a second |
//!
//! CPU is the process's ([`cpu_ns`]) for all threads.
//! Client, backends and control plane share this program's core; requests come one after the other, so that the
//! proxy's core is shared by its worker and its control thread as in a container with one CPU.

mod resources;
mod scene;
mod server;

use std::time::{Duration, Instant};

use tokio::{
    task::AbortHandle,
    time::{interval, sleep},
};
use xds_client::{Variant, types};

use self::scene::Scene;
use crate::{
    args::Args,
    case::rows,
    error::{BenchError, Result},
    lab::Lab,
    measure::callgrind,
    process::{cpu_ns, rss_anonymous_kib},
    report::{Metric, Report, Value},
    subject::{Kind, Subject},
};

const VARIANTS: [(Variant, &str); 2] = [(Variant::StateOfTheWorld, "sotw"), (Variant::Delta, "delta")];
const MANY: usize = 10_000;
/// The service whose endpoints change.
const CHANGED: usize = 7;
/// Between two changes that come one after the other.
const APART: Duration = Duration::from_millis(30);
/// Services with a virtual host where nothing else is said.
const ROUTED: usize = 10;

/// The rows' names, by variant: a table in the report wants them for ever.
macro_rules! row {
    ($name:literal, $variant:expr) => {
        match $variant {
            Variant::StateOfTheWorld => concat!($name, "-sotw"),
            Variant::Delta => concat!($name, "-delta"),
        }
    };
}

/// Measures all of it with those who speak xDS.
pub async fn run(args: &Args, lab: &Lab, subjects: &[Subject], report: &mut Report, progress: impl Fn(&str)) {
    for subject in subjects.iter().filter(|s| matches!(s.kind, Kind::Envoy | Kind::Sampan)) {
        let mut run = Run { args, lab, subject, report };
        for (variant, name) in VARIANTS {
            progress(&format!("xDS, {name}: {}", subject.kind.name()));
            if args.selects(rows::XDS_CHANGES) {
                for services in [100, 1000, MANY] {
                    run.changes(variant, services).await;
                }
            }
            if args.selects(rows::XDS_RATE) {
                run.rate(variant).await;
            }
            if args.selects(rows::XDS_EFFECTS) {
                run.effects(variant).await;
            }
        }
        if args.selects(rows::XDS_UNUSED) {
            progress(&format!("xDS, memory and first requests: {}", subject.kind.name()));
            run.unused().await;
        }
        let asked_for = args.selects(rows::XDS_INSTRUCTIONS) && !(args.quick && args.filters.is_empty());
        // Envoy would take a quarter of an hour to start under valgrind.
        if subject.kind == Kind::Sampan && asked_for {
            for services in [100, 1000, MANY] {
                progress(&format!("xDS, instructions with {services} clusters"));
                run.instructions(services).await;
            }
        }
    }
}

/// Of a proxy and what it was sent, in KiB.
#[derive(Clone, Copy)]
struct Footprint {
    resident: f64,
    bytes: f64,
}

struct Run<'a> {
    args: &'a Args,
    lab: &'a Lab,
    subject: &'a Subject,
    report: &'a mut Report,
}

impl Run<'_> {
    fn record(&mut self, row: &'static str, unit: &'static str, value: Result<f64>) {
        self.report.record(Metric::Xds, row, unit, self.subject.kind, value.map(Value::plain));
    }

    async fn scene(&self, variant: Variant, services: usize, routed: usize) -> Result<Scene> {
        Scene::start(self.lab, self.subject, variant, (services, routed), &[]).await
    }

    async fn changes(&mut self, variant: Variant, services: usize) {
        let row = match services {
            100 => row!("change-100", variant),
            1000 => row!("change-1000", variant),
            _ => row!("change-10000", variant),
        };
        let scene = match self.scene(variant, services, ROUTED).await {
            Ok(scene) => scene,
            Err(error) => return self.record(row, "µs CPU each", Err(error)),
        };
        let n = if self.args.quick { 100 } else { 200 };
        let value = per_change(&scene, n).await;
        self.record(row, "µs CPU each", value);
        if services == MANY {
            let n = if self.args.quick { 3 } else { 10 };
            for (row, kind, other) in [
                (row!("change-all-10000", variant), types::ENDPOINTS, true),
                (row!("same-10000", variant), types::ENDPOINTS, false),
                (row!("change-all-clusters-10000", variant), types::CLUSTER, true),
                (row!("same-clusters-10000", variant), types::CLUSTER, false),
            ] {
                let value = whole(&scene, kind, n, other).await;
                self.record(row, "ms CPU each", value);
            }
        }
    }

    async fn rate(&mut self, variant: Variant) {
        let value = match self.scene(variant, MANY, ROUTED).await {
            Ok(scene) => rate(&scene).await,
            Err(error) => Err(error),
        };
        self.record(row!("rate", variant), "% of a core", value);
    }

    async fn effects(&mut self, variant: Variant) {
        let n = if self.args.quick { 50 } else { 300 };
        for (kind, flood, half, most) in [
            (
                types::ENDPOINTS,
                false,
                row!("effect-endpoint-p50", variant),
                row!("effect-endpoint-p99", variant),
            ),
            (types::ROUTES, false, row!("effect-route-p50", variant), row!("effect-route-p99", variant)),
            (types::ENDPOINTS, true, row!("effect-flood-p50", variant), row!("effect-flood-p99", variant)),
        ] {
            let times = match self.scene(variant, MANY, ROUTED).await {
                Ok(scene) => {
                    let _flood = flood.then(|| Flood::start(&scene));
                    effect(&scene, kind, n).await
                }
                Err(error) => Err(error),
            };
            match times {
                Ok(times) => {
                    self.record(half, "ms", Ok(times[times.len() / 2]));
                    self.record(most, "ms", Ok(times[times.len() * 99 / 100]));
                }
                Err(error) => self.record(half, "ms", Err(error)),
            }
        }
    }

    async fn unused(&mut self) {
        const ROWS: [&str; 6] = [
            "unused-cluster-10000",
            "bytes-cluster-10000",
            "unused-vhost-10000",
            "bytes-vhost-10000",
            "unused-table-10000",
            "bytes-table-10000",
        ];
        match self.memory().await {
            Ok(values) => {
                ROWS.iter().zip(values).for_each(|(row, value)| self.record(row, "KiB each", Ok(value)))
            }
            Err(error) => self.record(ROWS[0], "KiB each", Err(error)),
        }
        let times = match self.scene(Variant::Delta, MANY, MANY).await {
            Ok(scene) => first_requests(&scene, if self.args.quick { 100 } else { 500 }).await,
            Err(error) => Err(error),
        };
        match times {
            Ok([first, second]) => {
                self.record("first-request", "µs CPU", Ok(first));
                self.record("second-request", "µs CPU", Ok(second));
            }
            Err(error) => self.record("first-request", "µs CPU", Err(error)),
        }
    }

    /// KiB for each: clusters with endpoints, virtual hosts and route tables with their scopes, all of it and beyond their
    /// bytes.
    async fn memory(&self) -> Result<[f64; 6]> {
        let few = self.settled(self.scene(Variant::Delta, ROUTED, 1).await?).await?;
        let clusters = self.settled(self.scene(Variant::Delta, MANY, 1).await?).await?;
        let hosts = self.settled(self.scene(Variant::Delta, MANY, MANY).await?).await?;
        let scoped = |tables| Scene::scoped(self.lab, self.subject, Variant::Delta, tables);
        let (one, tables) = (self.settled(scoped(1).await?).await?, self.settled(scoped(MANY).await?).await?);
        let each = |more: Footprint, less: Footprint| {
            let (resident, bytes) = (more.resident - less.resident, more.bytes - less.bytes);
            [resident / MANY as f64, (resident - bytes) / MANY as f64]
        };
        let [[a, b], [c, d], [e, f]] = [each(clusters, few), each(hosts, clusters), each(tables, one)];
        Ok([a, b, c, d, e, f])
    }

    async fn settled(&self, scene: Scene) -> Result<Footprint> {
        // What a great update leaves in the allocator is given back after some seconds.
        sleep(Duration::from_secs(12)).await;
        let resident = rss_anonymous_kib(scene.running.pid())? as f64;
        let all = [types::CLUSTER, types::ENDPOINTS, types::ROUTES, types::SCOPED_ROUTES]
            .map(|kind| scene.plane.all(kind));
        let bytes: usize = all.iter().flatten().map(|(_, any)| any.value.len()).sum();
        Ok(Footprint { resident, bytes: bytes as f64 / 1024.0 })
    }

    async fn instructions(&mut self, services: usize) {
        let row = match services {
            100 => "instructions-100-delta",
            1000 => "instructions-1000-delta",
            _ => "instructions-10000-delta",
        };
        let value = self.counted(services).await;
        self.record(row, "per change", value);
    }

    async fn counted(&self, services: usize) -> Result<f64> {
        let mut profile = callgrind::Profile::new(self.lab.dir());
        let scene =
            Scene::start(self.lab, self.subject, Variant::Delta, (services, ROUTED), &profile.wrapper())
                .await?;
        change(&scene, 20).await?;
        let pid = scene.running.pid();
        let mut parts = Vec::new();
        for n in [0, 20, 120] {
            change(&scene, n).await?;
            parts.push(profile.part(pid)?);
        }
        Ok((parts[2] as f64 - parts[1] as f64) / 100.0)
    }
}

/// `n` changes, each after the answer to the last.
async fn change(scene: &Scene, n: usize) -> Result<()> {
    for i in 0..n {
        let port = scene.backend(i).port;
        scene.plane.push(&[resources::endpoints(CHANGED, port)]);
        scene.plane.answered(types::ENDPOINTS, scene.limit).await?;
        sleep(APART).await;
    }
    Ok(())
}

/// CPU from here on, in µs.
struct Meter {
    pid: u32,
    before: u64,
}

impl Meter {
    fn start(scene: &Scene) -> Result<Self> {
        let pid = scene.running.pid();
        Ok(Self { pid, before: cpu_ns(pid)? })
    }

    fn spent(&self) -> Result<f64> {
        Ok(cpu_ns(self.pid)?.saturating_sub(self.before) as f64 / 1e3)
    }
}

async fn per_change(scene: &Scene, n: usize) -> Result<f64> {
    change(scene, 20).await?;
    let meter = Meter::start(scene)?;
    change(scene, n).await?;
    Ok(meter.spent()? / n as f64)
}

/// Responses that carry all endpoint sets or clusters, of which one is another or none. ms for each.
async fn whole(scene: &Scene, kind: &str, n: usize, other: bool) -> Result<f64> {
    let clusters = kind == types::CLUSTER;
    let rebuilds = if clusters { "cluster_modified" } else { "membership_change" };
    const NOT_REBUILT: &str = "update_no_rebuild";
    let (rebuilt, not) = (scene.counted(rebuilds).await?, scene.counted(NOT_REBUILT).await?);
    let mut all = scene.plane.all(kind);
    let place = all.iter().position(|(name, _)| *name == resources::name(CHANGED)).unwrap_or(0);
    let mut spent = 0.0;
    for i in 0..n {
        // Another port than the last change left there.
        let endpoints = resources::endpoints(CHANGED, scene.backend(i).port);
        if other {
            all[place] =
                if clusters { resources::cluster_with(CHANGED, 1 + i as i64) } else { endpoints.clone() };
        }
        let meter = Meter::start(scene)?;
        scene.plane.push(&all);
        if clusters && other {
            // What the changed cluster waits for before the response is answered.
            scene.plane.push(&[endpoints]);
        }
        scene.plane.answered(kind, scene.limit).await?;
        spent += meter.spent()?;
    }
    let (rebuilt, not) = (scene.counted(rebuilds).await? - rebuilt, scene.counted(NOT_REBUILT).await? - not);
    let untouched = if clusters { 0 } else { (n * all.len()) as u64 };
    if clusters && other && rebuilt != n as u64 {
        return Err(BenchError::Subject(format!("{n} pushes with one changed cluster: {rebuilt} rebuilt")));
    }
    if !other && (rebuilt, not) != (0, untouched) {
        let said = format!("{n} identical pushes of {}: {rebuilt} rebuilt, {not} not", all.len());
        return Err(BenchError::Subject(said));
    }
    Ok(spent / 1e3 / n as f64)
}

/// Percent of a core at 1,000 changes a second.
async fn rate(scene: &Scene) -> Result<f64> {
    const SECONDS: u64 = 5;
    let mut tick = interval(Duration::from_millis(1));
    let (begun, meter) = (Instant::now(), Meter::start(scene)?);
    for i in 0..SECONDS * 1000 {
        tick.tick().await;
        let port = scene.backend(usize::try_from(i).unwrap_or(0)).port;
        scene.plane.push(&[resources::endpoints(CHANGED, port)]);
    }
    scene.plane.answered(types::ENDPOINTS, scene.limit).await?;
    let taken = begun.elapsed();
    if taken > Duration::from_secs(SECONDS) * 11 / 10 {
        return Err(BenchError::Subject(format!("5,000 changes took {taken:.1?} instead of 5 s")));
    }
    Ok(meter.spent()? / taken.as_micros() as f64 * 100.0)
}

/// 1,000 changes a second, until it is dropped.
struct Flood(AbortHandle);

impl Flood {
    fn start(scene: &Scene) -> Self {
        let (plane, port) = (scene.plane.clone(), scene.backend(0).port);
        let flood = async move {
            let mut tick = interval(Duration::from_millis(1));
            for other in (0..MANY).cycle().filter(|i| !(CHANGED..=CHANGED + 1).contains(i)) {
                tick.tick().await;
                plane.push(&[resources::endpoints(other, port)]);
            }
        };
        Self(tokio::spawn(flood).abort_handle())
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Milliseconds from pushes to the first request at the new place, in order of length.
async fn effect(scene: &Scene, kind: &str, n: usize) -> Result<Vec<f64>> {
    // Routes lead to a service behind the one backend or to one behind the other.
    scene.plane.push(&[resources::endpoints(CHANGED + 1, scene.backend(1).port)]);
    scene.plane.answered(types::ENDPOINTS, scene.limit).await?;
    let mut client = scene.client().await?;
    let host = resources::host(CHANGED);
    client.ask(&host).await?;
    let mut times = Vec::with_capacity(n);
    for i in 1..=n {
        let to = scene.backend(i);
        to.take_first();
        let resource = if kind == types::ENDPOINTS {
            resources::endpoints(CHANGED, to.port)
        } else {
            resources::routes(ROUTED, |service| if service == CHANGED { CHANGED + i % 2 } else { service })
        };
        let sent = Instant::now();
        scene.plane.push(&[resource]);
        let came = loop {
            client.ask(&host).await?;
            if let Some(came) = to.take_first() {
                break came;
            }
            if sent.elapsed() > scene.limit {
                return Err(BenchError::Subject("a push without effect".into()));
            }
        };
        times.push((came - sent).as_secs_f64() * 1e3);
        sleep(APART).await;
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// CPU of the first and of the second request to a cluster, µs.
async fn first_requests(scene: &Scene, n: usize) -> Result<[f64; 2]> {
    let mut client = scene.client().await?;
    // The worker's, the listener's and the table's first request.
    for _ in 0..100 {
        client.ask(&resources::host(0)).await?;
    }
    let mut spent = [0.0; 2];
    for spent in &mut spent {
        let meter = Meter::start(scene)?;
        for i in 1..=n {
            client.ask(&resources::host(i * (MANY / n - 1))).await?;
        }
        *spent = meter.spent()? / n as f64;
    }
    Ok(spent)
}
