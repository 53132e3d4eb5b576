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
use sampan_tests::istiod::scenarios::{canary, dynamic, fault, gateway, mutual, peer, vm};
use sampan_tests::istiod::traffic::workload;
use sampan_tests::istiod::{Flavour, Istiod, Role, arrange, proxy};
use sampan_tests::names::Names;
use sampan_tests::process::{Running, Subject};
use sampan_tests::run::World;
use serde_json::json;
use tokio::time::sleep;

/// Set in the process that runs in the namespace.
const INSIDE: &str = "ISTIOD_TEST_INSIDE";

/// How often a check may be made, each time with an istiod of its own.
const TRIES: usize = 3;

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
            println!("FAILED {error}");
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
    let (mut passed, mut failed) = (0, Vec::new());
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
                let mut wrong = pair.attempt(check, &mut known).await;
                // istiod loses news now and then (tests/README.md): a fresh one tells whether it was that.
                for number in 2..=TRIES {
                    if wrong.is_empty() {
                        break;
                    }
                    println!("{name}, once more (try {number}); before that:");
                    complain(&wrong);
                    sleep(Duration::from_secs(1)).await;
                    wrong = pair.attempt(check, &mut known).await;
                }
                let time = started.elapsed().as_secs_f32();
                if wrong.is_empty() {
                    passed += 1;
                    println!("ok {name} ({time:.1} s)");
                } else {
                    failed.push((name, wrong));
                }
            }
        }
    }
    // Last, where a reader of a cut log looks first.
    for (name, wrong) in &failed {
        println!("FAILED {name}");
        complain(wrong);
    }
    let failed = failed.len();
    println!("{passed} passed, {failed} failed");
    Ok(failed)
}

fn complain(wrong: &[String]) {
    wrong.iter().for_each(|line| println!("  {line:.1500}"));
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

impl Pair<'_> {
    async fn attempt(&self, check: &str, known: &mut Inventory) -> Vec<String> {
        self.run(check, known).await.unwrap_or_else(|e| vec![e.to_string()])
    }

    async fn run(&self, check: &str, known: &mut Inventory) -> Result<Vec<String>> {
        let mesh = if matches!(check, "sidecar" | "router") { "whole" } else { "manual" };
        let dir = self
            .world
            .dir
            .join(format!("istiod-{check}-{:?}-{}-{}", self.flavour, self.delta, self.subject.name));
        // Of a try before this one.
        let _ = fs::remove_dir_all(&dir);
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
                let outcome = mutual(&istiod, &front, self.flavour).await;
                front.stop().await;
                outcome
            }
            "gateway" => gateway(&istiod, &running).await,
            "canary" => canary(&istiod, &running).await,
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
            None if wrong.is_empty() => {
                known.insert((check.to_owned(), self.delta), have);
            }
            None => {}
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
