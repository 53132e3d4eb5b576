//! istiod from files, the addresses of a small mesh, and a proxy in it, all in a network namespace of the test's own.
//!
//! In the namespace every address of 10.0.0.0/8 is local, so that workloads listen on their own addresses and services have theirs,
//! and iptables redirects as in a pod: what an application (10.0.0.99) sends to a service (10.1.0.0/16) goes to 15001, what a peer
//! (10.0.0.98) sends to the workload 10.0.0.1 to 15006.
//!
//! istiod is built from Go modules (`tests/peers/istiod`), or `ISTIOD_BIN` names a `pilot-discovery`. It serves `istio.stats`,
//! `istio.metadata_exchange` and `istio.alpn`, which only Istio's build of Envoy has; [`Flavour::Plain`] tells it not to, so that
//! Envoy itself can be asked. Lines of a mesh marked `# not plain` are for [`Flavour::Whole`] alone, those marked `# not yet` ask for
//! what Sampan refuses by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use crate::error::{Context, Error, Result};
use crate::process::{Running, Subject};

pub mod scenarios;
pub mod traffic;

/// The address whose connections are taken for those of the application behind the sidecar.
pub const APPLICATION: &str = "10.0.0.99";
/// The address whose connections to the workload are taken for those of a peer.
pub const PEER: &str = "10.0.0.98";

/// Which filters istiod sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Without those that Envoy lacks.
    Plain,
    /// As in a mesh.
    Whole,
}

/// Makes the addresses and redirections. Fails outside of a fresh network namespace.
pub async fn arrange() -> Result<()> {
    let redirect = |from: &str, to: &str, port: &str| {
        format!("iptables -t nat -A OUTPUT -p tcp -s {from} -d {to} -j REDIRECT --to-ports {port}")
    };
    for line in [
        "ip link set lo up".to_owned(),
        // No more than is served: a name server elsewhere in 10/8 would else be reachable, and silent.
        "ip route add local 10.0.0.0/14 dev lo".to_owned(),
        redirect(APPLICATION, "10.1.0.0/16", "15001"),
        redirect(PEER, "10.0.0.1", "15006"),
    ] {
        let mut words = line.split(' ');
        let program = words.next().unwrap_or_default();
        let output = Command::new(program).args(words).output().await.trying(&line)?;
        if !output.status.success() {
            return Err(Error::Subject(format!("{line}: {}", String::from_utf8_lossy(&output.stderr))));
        }
    }
    Ok(())
}

/// A running istiod. It dies with this value.
pub struct Istiod {
    child: Child,
    dir: PathBuf,
}

impl Istiod {
    /// Starts one in `dir` with the mesh of a folder of `tests/istiod`.
    pub async fn start(binary: &Path, dir: &Path, mesh: &Path, flavour: Flavour) -> Result<Istiod> {
        let config = dir.join("config");
        fs::create_dir_all(&config).trying("make istiod's folder")?;
        let mut files = Vec::new();
        for entry in fs::read_dir(mesh).trying(format!("read {}", mesh.display()))? {
            let file = entry.trying("list the mesh")?.path();
            let text = fs::read_to_string(&file).trying("read the mesh")?;
            let left_out = |line: &&str| {
                line.contains("# not yet") || (flavour == Flavour::Plain && line.contains("# not plain"))
            };
            let text: String =
                text.lines().filter(|line| !left_out(line)).map(|line| format!("{line}\n")).collect();
            files.push((file.file_name().unwrap_or_default().to_string_lossy().into_owned(), text));
        }
        let mesh_config = mesh.with_file_name("mesh.yaml");
        let mut text = fs::read_to_string(mesh_config).trying("read mesh.yaml")?;
        if flavour == Flavour::Plain {
            text.push_str("defaultProviders: {metrics: []}\n");
        }
        fs::write(dir.join("mesh.yaml"), text).trying("write mesh.yaml")?;
        let log = fs::File::create(dir.join("istiod.log")).trying("create istiod's log")?;
        let again = log.try_clone().trying("create istiod's log")?;
        let on = if flavour == Flavour::Whole { "true" } else { "false" };
        let child = Command::new(binary)
            .current_dir(dir)
            .envs([
                ("POD_NAMESPACE", "istio-system"),
                // Nobody asks for certificates here, and keys cost seconds.
                ("ENABLE_CA_SERVER", "false"),
                ("PILOT_CERT_PROVIDER", "none"),
                ("CLUSTER_ID", "Kubernetes"),
                ("PILOT_ENABLE_METADATA_EXCHANGE", on),
                ("PILOT_ENABLE_ALPN_FILTER", on),
            ])
            .args(["discovery", "--registries=", "--configDir=config", "--meshConfig=mesh.yaml"])
            .args(["--domain=cluster.local", "--httpAddr=127.0.0.1:18080", "--httpsAddr="])
            .args(["--grpcAddr=127.0.0.1:15010", "--secureGRPCAddr=", "--monitoringAddr=127.0.0.1:15014"])
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(again)
            .kill_on_drop(true)
            .spawn()
            .trying(format!("run {}", binary.display()))?;
        let istiod = Istiod { child, dir: dir.to_path_buf() };
        if !istiod.within(30, |istiod| istiod.said().contains("starting gRPC discovery service")).await {
            return istiod.fail();
        }
        // What it finds at its start it may lose in part: services, or workloads whose services it has not read yet. It is
        // therefore started empty and given the services first.
        for workloads in [false, true] {
            let pushes = istiod.pushes();
            let mut tries = 0;
            // It may listen before it watches its folder, and what it reads in between is not news later.
            while istiod.pushes() == pushes {
                tries += 1;
                match tries {
                    1 => sleep(Duration::from_millis(300)).await,
                    2..5 => {
                        for (name, _) in
                            files.iter().filter(|f| f.1.contains("kind: WorkloadEntry") == workloads)
                        {
                            istiod.remove(name)?;
                        }
                        sleep(Duration::from_secs(1)).await;
                    }
                    _ => return istiod.fail(),
                }
                for (name, text) in &files {
                    if text.contains("kind: WorkloadEntry") == workloads {
                        istiod.write(name, text)?;
                    }
                }
                istiod.within(3, |istiod| istiod.pushes() > pushes).await;
            }
        }
        Ok(istiod)
    }

    /// Ends it, so that its ports are free for the next one.
    pub async fn stop(mut self) {
        let _ = self.child.kill().await;
    }

    fn pushes(&self) -> usize {
        self.said().matches("Push debounce stable").count()
    }

    fn fail<T>(&self) -> Result<T> {
        let said = self.said();
        let end: Vec<&str> = said.lines().rev().take(20).collect();
        Err(Error::Subject(format!("istiod does not serve, it said last:\n{}", end.join("\n"))))
    }

    async fn within(&self, seconds: u64, holds: impl Fn(&Istiod) -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while !holds(self) {
            if Instant::now() > deadline {
                return false;
            }
            sleep(Duration::from_millis(50)).await;
        }
        true
    }

    /// Writes a file of the mesh, as an operator would, with one move.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let aside = self.dir.join("aside");
        fs::write(&aside, text).trying("write a file of the mesh")?;
        fs::rename(&aside, self.dir.join("config").join(name)).trying("move a file of the mesh")
    }

    /// Takes a file of the mesh away.
    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.dir.join("config").join(name)).trying("remove a file of the mesh")
    }

    /// What it wrote.
    pub fn said(&self) -> String {
        fs::read_to_string(self.dir.join("istiod.log")).unwrap_or_default()
    }

    /// What a proxy refused.
    pub fn refusals(&self) -> Vec<String> {
        self.said().lines().filter(|l| l.contains("ACK ERROR")).map(str::to_owned).collect()
    }
}

/// Who the proxy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Beside the workload 10.0.0.1 (web in the whole mesh, hello in the manual's).
    Sidecar,
    /// Beside an application that only calls.
    Client,
    /// The gateway.
    Router,
    /// The gateway beside a sidecar: an admin interface of its own, and hosts take it for a peer ([`PEER`]).
    Front,
}

impl Role {
    fn admin(self) -> u16 {
        if self == Role::Front { 15099 } else { 15000 }
    }
}

/// Starts a proxy with a bootstrap that leads to istiod.
pub async fn proxy(subject: &Subject, role: Role, delta: bool, dir: &Path) -> Result<Running> {
    let file = dir.join(format!("{}-{role:?}.json", subject.name));
    fs::write(&file, bootstrap(role, delta).to_string()).trying("write the bootstrap")?;
    subject.start(&file, format!("127.0.0.1:{}", role.admin()), &[], false).await
}

fn bootstrap(role: Role, delta: bool) -> Value {
    let (kind, address, name, namespace, labels) = match role {
        Role::Sidecar => ("sidecar", "10.0.0.1", "web-1", "app", json!({ "app": "web", "version": "v1" })),
        Role::Client => ("sidecar", APPLICATION, "caller-1", "app", json!({ "app": "caller" })),
        Role::Router | Role::Front => {
            ("router", "10.0.0.2", "gw-1", "gw", json!({ "istio": "ingressgateway" }))
        }
    };
    let cluster = |name: &str, port: u16| {
        json!({
            "name": name, "type": "STATIC", "connect_timeout": "1s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": { "http2_protocol_options": {} } } },
            "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } } } }] }] },
        })
    };
    let bind = match role {
        Role::Front => {
            json!({ "upstream_bind_config": { "source_address": { "address": PEER, "port_value": 0 } } })
        }
        _ => json!({}),
    };
    let source = json!({ "ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s" });
    json!({
        "node": {
            "id": format!("{kind}~{address}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            "cluster": format!("{name}.{namespace}"),
            "locality": { "region": "region1", "zone": "zone1", "sub_zone": "sub1" },
            "metadata": {
                "NAMESPACE": namespace, "NAME": name, "WORKLOAD_NAME": name, "SERVICE_ACCOUNT": "default",
                "CLUSTER_ID": "Kubernetes", "MESH_ID": "cluster.local", "ISTIO_VERSION": "1.31.0",
                "INSTANCE_IPS": address, "INTERCEPTION_MODE": "REDIRECT", "LABELS": labels, "PROXY_CONFIG": {},
            },
        },
        "admin": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": role.admin() } } },
        "cluster_manager": bind,
        "dynamic_resources": {
            "ads_config": {
                "api_type": if delta { "DELTA_GRPC" } else { "GRPC" },
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "xds-grpc" } }],
            },
            "cds_config": source,
            "lds_config": source,
        },
        "static_resources": { "clusters": [cluster("xds-grpc", 15010), cluster("sds-grpc", 15030)] },
    })
}
