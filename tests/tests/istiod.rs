//! A real istiod drives Sampan: it accepts everything, and the manual's scenarios run under load without a failed request.
//!
//! Needs root, iptables and the istiod that `tests/setup` builds, or the one that `ISTIOD_BIN` names (see `tests/README.md`); says so
//! and passes without root or one of them. Each check runs with Envoy first, against an istiod that leaves out what only Istio's build of Envoy has,
//! then with Sampan against the same, then with Sampan against an istiod as it is.

#![allow(clippy::disallowed_methods, reason = "for the threads of the proxy's workers")]
#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use sampan_tests::control_plane::{ControlPlane, Mode, Peer};
use sampan_tests::error::{Context, Result};
use sampan_tests::istiod::traffic::{Load, Tally, Target, ask, tally, until, workload};
use sampan_tests::istiod::{APPLICATION, Flavour, Istiod, PEER, Role, arrange, proxy};
use sampan_tests::names::Names;
use sampan_tests::process::{Running, Subject};
use sampan_tests::run::World;
use serde_json::json;
use tokio::time::sleep;

/// Set in the process that runs in the namespace.
const INSIDE: &str = "ISTIOD_TEST_INSIDE";

fn main() -> ExitCode {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/pilot-discovery");
    let named = std::env::var_os("ISTIOD_BIN").map(PathBuf::from);
    if named.is_none() && !usual.exists() {
        println!("istiod: skipped, there is no {}; tests/setup builds it where Go is", usual.display());
        return ExitCode::SUCCESS;
    }
    if named.is_none() && !nix::unistd::geteuid().is_root() {
        println!("istiod: skipped, its network namespace needs root");
        return ExitCode::SUCCESS;
    }
    let istiod = named.unwrap_or(usual);
    if std::env::var_os(INSIDE).is_none() {
        let Ok(program) = std::env::current_exe() else { return ExitCode::FAILURE };
        let status = Command::new("unshare").arg("-n").arg(program).env(INSIDE, "1").status();
        return match status {
            Ok(status) if status.success() => ExitCode::SUCCESS,
            Ok(_) => ExitCode::FAILURE,
            Err(error) => {
                println!("unshare: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match inside(&istiod) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn inside(istiod: &Path) -> Result<usize> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(world) = World::from_environment(root)? else { return Ok(1) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().trying("start a runtime")?;
    let failed = tokio::task::LocalSet::new().block_on(&runtime, all(&world, istiod))?;
    world.clean();
    Ok(failed)
}

/// One pairing of a proxy with an istiod.
struct Pair<'a> {
    world: &'a World,
    istiod: &'a Path,
    subject: &'a Subject,
    flavour: Flavour,
    delta: bool,
}

async fn all(world: &World, istiod: &Path) -> Result<usize> {
    arrange().await?;
    for (address, body) in [
        ("10.0.0.1:18080", "hello, http protocol server"),
        ("10.0.0.3:18080", "hello again"),
        ("10.0.0.11:18080", "v1"),
        ("10.0.0.12:18080", "v2"),
        ("127.0.0.1:8085", "by name"),
    ] {
        workload(address, body).await?;
    }
    let names = Names::default();
    // Fixed, because those that the harness picks may be what the mesh listens to.
    for (name, port) in
        [("control_plane", 15030), ("control_plane.other", 15031), ("control_plane.control", 15032)]
    {
        names.set(name, port);
    }
    names.set("certs", world.certs.dir().display());
    let secrets = ControlPlane {
        mode: Mode::Xds,
        version: "1".into(),
        resources: secrets(),
        running: true,
        ..Default::default()
    };
    let _sds = Peer::start(&secrets, &names, &world.dir, world.certs.dir()).await?;

    let mut subjects = vec![(&world.envoy, Flavour::Plain)];
    if let Some(sampan) = &world.sampan {
        subjects.extend([(sampan, Flavour::Plain), (sampan, Flavour::Whole)]);
    }
    let filter = std::env::var("CASE").unwrap_or_default();
    let (mut passed, mut failed) = (0, 0);
    // What Envoy has of the whole mesh, by role and protocol.
    let mut known = std::collections::BTreeMap::new();
    for (subject, flavour) in subjects {
        for delta in [false, true] {
            let pair = Pair { world, istiod, subject, flavour, delta };
            for check in
                ["sidecar", "router", "vm", "peer", "mutual", "gateway", "canary", "fault", "dynamic"]
            {
                let name = format!(
                    "istiod/{check}/{}/{flavour:?}/{}",
                    if delta { "delta" } else { "sotw" },
                    subject.name
                )
                .to_lowercase();
                if !name.contains(&filter) {
                    continue;
                }
                let started = Instant::now();
                let wrong = pair.run(check, &mut known).await.unwrap_or_else(|e| vec![e.to_string()]);
                let time = started.elapsed().as_secs_f32();
                if wrong.is_empty() {
                    passed += 1;
                    println!("ok {name} ({time:.1} s)");
                } else {
                    failed += 1;
                    println!("FAILED {name} ({time:.1} s)");
                    wrong.iter().for_each(|line| println!("  {line:.1500}"));
                }
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed)
}

/// What an agent's SDS would serve: the workload's own certificate and the files that gateways and rules name.
fn secrets() -> Vec<serde_json::Value> {
    let kind = "envoy.extensions.transport_sockets.tls.v3.Secret";
    let pair = json!({
        "certificate_chain": { "filename": "{{certs}}/server.pem" },
        "private_key": { "filename": "{{certs}}/server.key" },
    });
    let root = json!({ "trusted_ca": { "filename": "{{certs}}/ca.pem" } });
    let own = json!({
        "certificate_chain": { "filename": "{{certs}}/svid-mesh.pem" },
        "private_key": { "filename": "{{certs}}/svid-mesh.key" },
    });
    let mut all = Vec::new();
    for (name, pair) in [("default", own), ("file-cert:/etc/certs/cert.pem~/etc/certs/key.pem", pair)] {
        all.push(json!({ "@type": kind, "name": name, "tls_certificate": pair }));
    }
    for name in ["ROOTCA", "file-root:/etc/certs/ca.pem", "file-root:system"] {
        all.push(json!({ "@type": kind, "name": name, "validation_context": root }));
    }
    all
}

type Inventory = std::collections::BTreeMap<(String, bool), BTreeSet<String>>;

const HELLO: &str = "hello, http protocol server";
const TO_HELLO: Target =
    Target { to: "10.1.0.1:8080", source: APPLICATION, host: "hello.vmns.svc.cluster.local:8080", path: "/" };
const TO_TEST: Target = Target {
    to: "10.1.0.2:8080",
    source: APPLICATION,
    host: "httptest.app.svc.cluster.local:8080",
    path: "/",
};

impl Pair<'_> {
    async fn run(&self, check: &str, known: &mut Inventory) -> Result<Vec<String>> {
        let mesh = if matches!(check, "sidecar" | "router") { "whole" } else { "manual" };
        let dir = self
            .world
            .dir
            .join(format!("istiod-{check}-{:?}-{}-{}", self.flavour, self.delta, self.subject.name));
        fs::create_dir_all(&dir).trying("make the run's folder")?;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("istiod").join(mesh);
        let istiod = Istiod::start(self.istiod, &dir, &folder, self.flavour).await?;
        let role = match check {
            "sidecar" | "peer" | "mutual" => Role::Sidecar,
            "router" | "gateway" => Role::Router,
            _ => Role::Client,
        };
        let running = proxy(self.subject, role, self.delta, &dir).await?;
        let outcome = match check {
            "sidecar" | "router" => self.inventory(check, &running, known).await,
            "vm" => vm(&istiod).await,
            "peer" => peer(&istiod).await,
            "mutual" => {
                let front = proxy(self.subject, Role::Front, self.delta, &dir).await?;
                let outcome = mutual(&istiod, self.flavour).await;
                front.stop().await;
                outcome
            }
            "gateway" => gateway(&istiod).await,
            "canary" => canary(&istiod).await,
            "dynamic" => dynamic(&istiod).await,
            _ => fault(&istiod).await,
        };
        let mut wrong = outcome.unwrap_or_else(|e| vec![e.to_string()]);
        match running.admin_call("GET", "/stats").await {
            Ok((_, stats)) => wrong.extend(
                stats
                    .lines()
                    .filter(|l| {
                        l.split_once(": ").is_some_and(|(k, v)| k.ends_with("update_rejected") && v != "0")
                    })
                    .map(str::to_owned),
            ),
            Err(error) => wrong.push(error.to_string()),
        }
        wrong.extend(istiod.refusals());
        if !wrong.is_empty() && std::env::var_os("KEEP").is_some() {
            wrong.push(format!("see {}", dir.display()));
        }
        running.stop().await;
        istiod.stop().await;
        Ok(wrong)
    }

    /// Everything is accepted and becomes active; Sampan has the clusters and listeners that Envoy has.
    async fn inventory(&self, check: &str, running: &Running, known: &mut Inventory) -> Result<Vec<String>> {
        let mut wrong = settled(running).await?;
        let mut have = active(running).await?;
        // Nothing warms between two pushes either: what is there must stay the same for a while.
        for _ in 0..10 {
            sleep(Duration::from_secs(1)).await;
            let now = active(running).await?;
            if now == have && !now.is_empty() {
                break;
            }
            have = now;
        }
        wrong.extend(settled(running).await?);
        if have.len() < 40 {
            wrong.push(format!("only {} clusters and listeners", have.len()));
        }
        match known.get(&(check.to_owned(), self.delta)) {
            None => {
                known.insert((check.to_owned(), self.delta), have);
            }
            Some(want) => {
                wrong.extend(want.difference(&have).map(|name| format!("has no {name}")));
                wrong.extend(have.difference(want).map(|name| format!("has {name}, Envoy has not")));
            }
        }
        Ok(wrong)
    }
}

/// The names of the clusters, and of the listeners with their addresses.
async fn active(running: &Running) -> Result<BTreeSet<String>> {
    let (_, clusters) = running.admin_call("GET", "/clusters").await?;
    let (_, listeners) = running.admin_call("GET", "/listeners").await?;
    let clusters =
        clusters.lines().filter_map(|l| l.split_once("::observability_name::")).map(|(name, _)| name);
    Ok(clusters
        .map(|name| format!("cluster {name}"))
        .chain(listeners.lines().map(|line| format!("listener {line}")))
        .collect())
}

/// Waits until the first configuration is there and nothing warms.
async fn settled(running: &Running) -> Result<Vec<String>> {
    let wanted = |stats: &str, name: &str, holds: fn(u64) -> bool| {
        let value = stats.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ")?.parse().ok());
        value.is_some_and(holds)
    };
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let (_, stats) = running.admin_call("GET", "/stats").await?;
        let missing: Vec<String> = [
            ("cluster_manager.cds.update_success", (|v| v > 0) as fn(u64) -> bool),
            ("listener_manager.lds.update_success", |v| v > 0),
            ("cluster_manager.warming_clusters", |v| v == 0),
            ("listener_manager.total_listeners_warming", |v| v == 0),
            ("server.state", |v| v == 0),
        ]
        .into_iter()
        .filter(|(name, holds)| !wanted(&stats, name, *holds))
        .map(|(name, _)| format!("{name} is not as it must be"))
        .collect();
        if missing.is_empty() || Instant::now() > deadline {
            return Ok(missing);
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Reports what came beside the wanted answers.
fn only(what: &str, tally: &Tally, wanted: &[&str], wrong: &mut Vec<String>) {
    if tally.is_empty() || tally.keys().any(|answer| !wanted.contains(&answer.as_str())) {
        wrong.push(format!("{what}: {tally:?}, wanted only {wanted:?}"));
    }
}

fn expect(what: &str, seen: &str, wanted: &str, wrong: &mut Vec<String>) {
    if seen != wanted {
        wrong.push(format!("{what}: {seen:?} instead of {wanted:?}"));
    }
}

/// What share of the answers this one has, in percent.
fn share(tally: &Tally, answer: &str) -> usize {
    let all: usize = tally.values().sum();
    tally.get(answer).copied().unwrap_or(0) * 100 / all.max(1)
}

/// A container calls a service on VMs: VMs come and go by WorkloadEntries.
async fn vm(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    expect("the VM through its service", &until(&TO_HELLO, HELLO).await, HELLO, &mut wrong);
    let load = Load::start(TO_HELLO, 4);
    let second = "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm2, namespace: vmns}, \
                  spec: {address: 10.0.0.3, labels: {app: hello}}}";
    istiod.write("vm2.yaml", second)?;
    expect("a second VM", &until(&TO_HELLO, "hello again").await, "hello again", &mut wrong);
    only("while it came", &load.take(), &[HELLO, "hello again"], &mut wrong);
    istiod.remove("vm1.yaml")?;
    sleep(Duration::from_secs(3)).await;
    only("while the first went", &load.take(), &[HELLO, "hello again"], &mut wrong);
    sleep(Duration::from_millis(500)).await;
    only("with the second alone", &load.stop().await, &["hello again"], &mut wrong);
    Ok(wrong)
}

/// A peer without a proxy calls the workload: PERMISSIVE lets it, STRICT does not, live.
async fn peer(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let target = Target { to: "10.0.0.1:18080", source: PEER, host: "web", path: "/" };
    expect("PERMISSIVE", &until(&target, HELLO).await, HELLO, &mut wrong);
    let strict = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: default, namespace: app}, \
                  spec: {mtls: {mode: STRICT}}}";
    istiod.write("strict.yaml", strict)?;
    let refused = "closed without an answer";
    expect("STRICT", &until(&target, refused).await, refused, &mut wrong);
    istiod.remove("strict.yaml")?;
    expect("PERMISSIVE again", &until(&target, HELLO).await, HELLO, &mut wrong);
    Ok(wrong)
}

/// The gateway calls the workload in mutual TLS, with the certificates that an agent's SDS would serve; STRICT lets nobody
/// else in, and what rules say of the peer's identity holds.
async fn mutual(istiod: &Istiod, flavour: Flavour) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let plain = Target { to: "10.0.0.1:18080", source: PEER, host: "web", path: "/" };
    let front = Target { to: "127.0.0.1:2050", source: "127.0.0.1", host: "edge.test", path: "/" };
    expect("both in plain text", &until(&front, HELLO).await, HELLO, &mut wrong);
    let load = Load::start(front, 4);
    // Who has an account has a proxy: from now on it is spoken to in mutual TLS.
    let entry = "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm1, namespace: vmns}, \
                 spec: {address: 10.0.0.1, labels: {app: hello}, serviceAccount: hello}}";
    istiod.write("vm1.yaml", entry)?;
    sleep(Duration::from_secs(2)).await;
    let security = |kind: &str, spec: &str| {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: default, namespace: app}}, spec: {spec}}}"
        )
    };
    istiod.write("strict.yaml", &security("PeerAuthentication", "{mtls: {mode: STRICT}}"))?;
    let refused = "closed without an answer";
    expect("plain text under STRICT", &until(&plain, refused).await, refused, &mut wrong);
    expect("mutual TLS under STRICT", &ask(&front).await, HELLO, &mut wrong);
    let allow = |who: &str| {
        let spec = format!("{{action: ALLOW, rules: [{{from: [{{source: {{principals: [{who}]}}}}]}}]}}");
        security("AuthorizationPolicy", &spec)
    };
    istiod.write("allow.yaml", &allow("cluster.local/ns/vmns/sa/hello"))?;
    sleep(Duration::from_secs(2)).await;
    only("under load, allowed", &load.take(), &[HELLO], &mut wrong);
    // Without istio.alpn the sidecar takes the gateway's requests for TCP, which is judged when a connection comes.
    if flavour == Flavour::Plain {
        load.stop().await;
        return Ok(wrong);
    }
    istiod.write("allow.yaml", &allow("cluster.local/ns/vmns/sa/other"))?;
    expect("another account is allowed", &until(&front, "403").await, "403", &mut wrong);
    istiod.remove("allow.yaml")?;
    expect("everybody is allowed", &until(&front, HELLO).await, HELLO, &mut wrong);
    only("under load", &load.stop().await, &[HELLO, "403"], &mut wrong);
    Ok(wrong)
}

/// The gateway on port 2050, whose root VirtualService delegates; a delegate comes, changes and goes.
async fn gateway(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let root = Target { to: "127.0.0.1:2050", source: "127.0.0.1", host: "edge.test", path: "/" };
    let test = Target { path: "/test", ..root };
    expect("/", &until(&root, HELLO).await, HELLO, &mut wrong);
    let delegate = |version: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: test, namespace: app}}, \
             spec: {{http: [{{route: [{{destination: {{host: httptest.app.svc.cluster.local, subset: {version}}}}}]}}]}}}}"
        )
    };
    istiod.write("subsets.yaml", SUBSETS)?;
    let load = Load::start(root, 4);
    sleep(Duration::from_secs(2)).await;
    istiod.write("test.yaml", &delegate("v1"))?;
    expect("/test", &until(&test, "v1").await, "v1", &mut wrong);
    let tested = Load::start(test, 2);
    istiod.write("test.yaml", &delegate("v2"))?;
    expect("/test, changed", &until(&test, "v2").await, "v2", &mut wrong);
    sleep(Duration::from_millis(500)).await;
    only("/test while it changed", &tested.stop().await, &["v1", "v2"], &mut wrong);
    istiod.remove("test.yaml")?;
    // Without the delegate its route is gone, and the next one matches.
    expect("/test without its delegate", &until(&test, HELLO).await, HELLO, &mut wrong);
    only("/ meanwhile", &load.stop().await, &[HELLO], &mut wrong);
    Ok(wrong)
}

const SUBSETS: &str = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: httptest, namespace: app}, \
                       spec: {host: httptest.app.svc.cluster.local, subsets: [{name: v1, labels: {version: v1}}, \
                       {name: v2, labels: {version: v2}}]}}";

/// A canary by subsets: 50/50, then 90/10, then gone.
async fn canary(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let split = |one: u32, two: u32| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: httptest, namespace: app}}, spec: \
             {{hosts: [httptest.app.svc.cluster.local], http: [{{headers: {{response: {{set: {{x-split: '{one}'}}}}}}, route: [\
             {{destination: {{host: httptest.app.svc.cluster.local, subset: v1}}, weight: {one}}}, \
             {{destination: {{host: httptest.app.svc.cluster.local, subset: v2}}, weight: {two}}}]}}]}}}}"
        )
    };
    expect("the service", &until(&TO_TEST, "v1").await, "v1", &mut wrong);
    let load = Load::start(TO_TEST, 4);
    // Subsets first: istiod does not wait for a cluster before it routes to it.
    istiod.write("subsets.yaml", SUBSETS)?;
    sleep(Duration::from_secs(2)).await;
    for (one, two) in [(50, 50), (90, 10)] {
        istiod.write("canary.yaml", &split(one, two))?;
        sleep(Duration::from_millis(1500)).await;
        let seen = tally(&TO_TEST, 400).await;
        let part = share(&seen, "v1");
        // Four standard deviations of 400 draws.
        let slack = if one == 50 { 10 } else { 6 };
        if part.abs_diff(one as usize) > slack {
            wrong.push(format!("{one}/{two}: {seen:?}"));
        }
    }
    istiod.remove("canary.yaml")?;
    sleep(Duration::from_secs(2)).await;
    istiod.remove("subsets.yaml")?;
    sleep(Duration::from_secs(2)).await;
    let seen = tally(&TO_TEST, 200).await;
    if share(&seen, "v1").abs_diff(50) > 14 {
        wrong.push(format!("without the canary: {seen:?}"));
    }
    only("under load", &load.stop().await, &["v1", "v2"], &mut wrong);
    Ok(wrong)
}

/// Names that only clients know, each of them resolved when it is asked for.
async fn dynamic(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let entry = "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: names, namespace: app}, spec: \
                 {hosts: ['*.localhost'], ports: [{number: 8085, name: http, protocol: HTTP}], resolution: DYNAMIC_DNS, \
                 location: MESH_EXTERNAL}}";
    istiod.write("dynamic.yaml", entry)?;
    let [one, other] = ["one.localhost:8085", "other.localhost:8085"].map(|host| Target {
        to: "10.1.0.9:8085",
        source: APPLICATION,
        host,
        path: "/",
    });
    expect("a name", &until(&one, "by name").await, "by name", &mut wrong);
    only("another name", &tally(&other, 20).await, &["by name"], &mut wrong);
    Ok(wrong)
}

/// Every request is aborted with 599, then none.
async fn fault(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    expect("the service", &until(&TO_TEST, "v1").await, "v1", &mut wrong);
    let load = Load::start(TO_TEST, 4);
    let abort = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: httptest, namespace: app}, spec: \
                 {hosts: [httptest.app.svc.cluster.local], http: [{fault: {abort: {httpStatus: 599, percentage: {value: 100}}}, \
                 route: [{destination: {host: httptest.app.svc.cluster.local}}]}]}}";
    istiod.write("fault.yaml", abort)?;
    expect("the fault", &until(&TO_TEST, "599").await, "599", &mut wrong);
    only("while it came", &load.take(), &["v1", "v2", "599"], &mut wrong);
    sleep(Duration::from_millis(300)).await;
    only("with the fault", &load.take(), &["599"], &mut wrong);
    istiod.remove("fault.yaml")?;
    let mut answer = ask(&TO_TEST).await;
    for _ in 0..100 {
        if answer != "599" {
            break;
        }
        sleep(Duration::from_millis(50)).await;
        answer = ask(&TO_TEST).await;
    }
    only("while it went", &load.take(), &["v1", "v2", "599"], &mut wrong);
    sleep(Duration::from_millis(300)).await;
    only("without the fault", &load.stop().await, &["v1", "v2"], &mut wrong);
    Ok(wrong)
}
