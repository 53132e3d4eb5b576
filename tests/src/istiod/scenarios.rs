//! The manual's scenarios: each edits istiod's files and watches traffic. What they return is what was wrong.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::traffic::{Load, Tally, Target, ask, tally, until};
use super::{APPLICATION, Flavour, Istiod, PEER};
use crate::error::Result;
use crate::process::Running;

const HELLO: &str = "hello, http protocol server";
const TO_HELLO: Target =
    Target { to: "10.1.0.1:8080", source: APPLICATION, host: "hello.vmns.svc.cluster.local:8080", path: "/" };
const TO_TEST: Target = Target {
    to: "10.1.0.2:8080",
    source: APPLICATION,
    host: "httptest.app.svc.cluster.local:8080",
    path: "/",
};

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

/// A change is on its way: the load's answers are of the first kinds until they are of the second alone, and stay so.
async fn becomes(what: &str, load: &Load, during: &[&str], after: &[&str], wrong: &mut Vec<String>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let pure = |seen: &Tally| !seen.is_empty() && seen.keys().all(|answer| after.contains(&answer.as_str()));
    loop {
        sleep(Duration::from_millis(300)).await;
        let seen = load.take();
        if pure(&seen) {
            break;
        }
        only(what, &seen, during, wrong);
        if Instant::now() > deadline {
            return only(what, &seen, after, wrong);
        }
    }
    sleep(Duration::from_millis(300)).await;
    only(what, &load.take(), after, wrong);
}

/// v1 gets this part of 400 requests, in percent and but for `slack`. A change may be on its way for as long as [`until`] waits.
async fn divided(what: &str, part: usize, slack: usize, wrong: &mut Vec<String>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let seen = tally(&TO_TEST, 400).await;
        let all: usize = seen.values().sum();
        let share = seen.get("v1").copied().unwrap_or(0) * 100 / all.max(1);
        if share.abs_diff(part) <= slack {
            return;
        }
        if Instant::now() > deadline {
            return wrong.push(format!("{what}: {seen:?}"));
        }
    }
}

/// Waits until an admin page shows what it must.
async fn shows(
    running: &Running,
    page: &str,
    what: &str,
    wrong: &mut Vec<String>,
    holds: impl Fn(&str) -> bool,
) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds(&running.admin_call("GET", page).await?.1) {
        if Instant::now() > deadline {
            wrong.push(format!("{page} does not show {what}"));
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Waits until the clusters of [`SUBSETS`] are there, or gone.
async fn subsets(running: &Running, there: bool, wrong: &mut Vec<String>) -> Result<()> {
    let what = if there { "the subsets" } else { "that the subsets are gone" };
    shows(running, "/clusters", what, wrong, |clusters| {
        ["v1", "v2"].iter().all(|version| {
            let host = format!("outbound|8080|{version}|httptest.app.svc.cluster.local::10.");
            clusters.contains(&host) == there
        })
    })
    .await
}

/// A container calls a service on VMs: VMs come and go by WorkloadEntries.
pub async fn vm(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    expect("the VM through its service", &until(&TO_HELLO, HELLO).await, HELLO, &mut wrong);
    let load = Load::start(TO_HELLO, 4);
    let second = "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm2, namespace: vmns}, \
                  spec: {address: 10.0.0.3, labels: {app: hello}}}";
    istiod.write("vm2.yaml", second)?;
    expect("a second VM", &until(&TO_HELLO, "hello again").await, "hello again", &mut wrong);
    only("while it came", &load.take(), &[HELLO, "hello again"], &mut wrong);
    istiod.remove("vm1.yaml")?;
    becomes("without the first", &load, &[HELLO, "hello again"], &["hello again"], &mut wrong).await;
    load.stop().await;
    Ok(wrong)
}

/// A peer without a proxy calls the workload: PERMISSIVE lets it, STRICT does not, live.
pub async fn peer(istiod: &Istiod) -> Result<Vec<String>> {
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
pub async fn mutual(istiod: &Istiod, front: &Running, flavour: Flavour) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let plain = Target { to: "10.0.0.1:18080", source: PEER, host: "web", path: "/" };
    let edge = Target { to: "127.0.0.1:2050", source: "127.0.0.1", host: "edge.test", path: "/" };
    expect("both in plain text", &until(&edge, HELLO).await, HELLO, &mut wrong);
    let load = Load::start(edge, 4);
    // Who has an account has a proxy: from now on it is spoken to in mutual TLS.
    let entry = "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm1, namespace: vmns}, \
                 spec: {address: 10.0.0.1, labels: {app: hello}, serviceAccount: hello}}";
    istiod.write("vm1.yaml", entry)?;
    let cluster = "cluster.outbound|8080||hello.vmns.svc.cluster.local";
    shows(front, "/stats", "the first handshake", &mut wrong, |stats| {
        let handshakes = |l: &str| Some(l.strip_prefix(cluster)?.split_once(".ssl.handshake: ")?.1 != "0");
        stats.lines().any(|l| handshakes(l) == Some(true))
    })
    .await?;
    let security = |kind: &str, spec: &str| {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: {kind}, metadata: {{name: default, namespace: app}}, spec: {spec}}}"
        )
    };
    istiod.write("strict.yaml", &security("PeerAuthentication", "{mtls: {mode: STRICT}}"))?;
    let refused = "closed without an answer";
    expect("plain text under STRICT", &until(&plain, refused).await, refused, &mut wrong);
    expect("mutual TLS under STRICT", &ask(&edge).await, HELLO, &mut wrong);
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
    expect("another account is allowed", &until(&edge, "403").await, "403", &mut wrong);
    istiod.remove("allow.yaml")?;
    expect("everybody is allowed", &until(&edge, HELLO).await, HELLO, &mut wrong);
    only("under load", &load.stop().await, &[HELLO, "403"], &mut wrong);
    Ok(wrong)
}

/// The gateway on port 2050, whose root VirtualService delegates; a delegate comes, changes and goes.
pub async fn gateway(istiod: &Istiod, running: &Running) -> Result<Vec<String>> {
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
    subsets(running, true, &mut wrong).await?;
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
pub async fn canary(istiod: &Istiod, running: &Running) -> Result<Vec<String>> {
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
    subsets(running, true, &mut wrong).await?;
    // Slack: four standard deviations of 400 draws.
    for (one, two, slack) in [(50, 50, 10), (90, 10, 6)] {
        istiod.write("canary.yaml", &split(one, two))?;
        sleep(Duration::from_millis(1500)).await;
        divided(&format!("{one}/{two}"), one as usize, slack, &mut wrong).await;
    }
    istiod.remove("canary.yaml")?;
    divided("without the routes", 50, 10, &mut wrong).await;
    istiod.remove("subsets.yaml")?;
    subsets(running, false, &mut wrong).await?;
    divided("without the canary", 50, 10, &mut wrong).await;
    only("under load", &load.stop().await, &["v1", "v2"], &mut wrong);
    Ok(wrong)
}

/// Names that only clients know, each of them resolved when it is asked for.
pub async fn dynamic(istiod: &Istiod) -> Result<Vec<String>> {
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
pub async fn fault(istiod: &Istiod) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    expect("the service", &until(&TO_TEST, "v1").await, "v1", &mut wrong);
    let load = Load::start(TO_TEST, 4);
    let abort = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: httptest, namespace: app}, spec: \
                 {hosts: [httptest.app.svc.cluster.local], http: [{fault: {abort: {httpStatus: 599, percentage: {value: 100}}}, \
                 route: [{destination: {host: httptest.app.svc.cluster.local}}]}]}}";
    istiod.write("fault.yaml", abort)?;
    expect("the fault", &until(&TO_TEST, "599").await, "599", &mut wrong);
    becomes("with the fault", &load, &["v1", "v2", "599"], &["599"], &mut wrong).await;
    istiod.remove("fault.yaml")?;
    becomes("without the fault", &load, &["v1", "v2", "599"], &["v1", "v2"], &mut wrong).await;
    load.stop().await;
    Ok(wrong)
}
