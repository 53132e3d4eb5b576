//! The control plane of a case: a process of `tests/peers/go-control-plane` for each subject, what the bootstrap says of it, and
//! what it was asked.
//!
//! `control_plane: {mode: ads, resources: […]}` starts one that serves the resources (in the words of [`crate::xds`]) and lays over
//! the bootstrap a node, the static cluster `xds_cluster` and `dynamic_resources`. The text `$control_plane` anywhere in the
//! configuration or in a resource becomes the ConfigSource that leads to it in the case's mode.
//!
//! Requests are observed by type, in order. Their nonces depend on how the types interleave, so that a request says instead
//! which response of its type and stream it `answers`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::config;
use crate::error::{Context, Error, Result, case_error};
use crate::http1::{Body, Head};
use crate::names::Names;
use crate::net::{Stream, Wire};
use crate::observe::{Waited, check};
use crate::xds;

/// The name of the static cluster.
const CLUSTER: &str = "xds_cluster";
/// How long something that is waited for may take.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// How the proxy asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One stream, state of the world.
    #[default]
    Ads,
    /// One stream, delta.
    DeltaAds,
    /// A stream for each type, state of the world.
    Xds,
    /// A stream for each type, delta.
    Delta,
    /// Polling.
    Rest,
}

/// A case's control plane.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlane {
    /// How the proxy asks.
    #[serde(default)]
    pub mode: Mode,
    /// Version of the first snapshot.
    #[serde(default = "one")]
    pub version: String,
    /// The first snapshot: whole resources, or the words of [`crate::xds`].
    #[serde(default)]
    pub resources: Vec<Value>,
    /// What the bootstrap subscribes to; what is in `resources` of `cds` and `lds` when absent.
    pub types: Option<Vec<String>>,
    /// Over TLS; `mutual` demands the certificate `client`.
    pub tls: Option<Tls>,
    /// Over a unix socket.
    #[serde(default)]
    pub unix: bool,
    /// Endpoints come from a cache of their own, one by one.
    #[serde(default)]
    pub mux: bool,
    /// Renew resources with a TTL so often, in milliseconds.
    pub heartbeat_ms: Option<u64>,
    /// Laid over the ApiConfigSource.
    #[serde(default)]
    pub api: Map<String, Value>,
    /// Laid over each ConfigSource that leads to the control plane.
    #[serde(default)]
    pub source: Map<String, Value>,
    /// Trouble from the start.
    pub trouble: Option<Map<String, Value>>,
    /// The process starts with the case; otherwise with a step.
    #[serde(default = "yes")]
    pub running: bool,
    /// Wait until the subject is ready; otherwise only until its admin interface answers.
    #[serde(default = "yes")]
    pub ready: bool,
}

/// TLS between proxy and control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    /// The server shows a certificate.
    Server,
    /// Both do.
    Mutual,
}

fn one() -> String {
    "1".into()
}
fn yes() -> bool {
    true
}

/// What a step `control_plane` does.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Starts the process.
    Start,
    /// Ends the process.
    Stop,
    /// Both, on the same ports and with the same snapshot.
    Restart,
    /// Ends every open stream.
    Close,
    /// Ends the trouble.
    Calm,
    /// From now on each response is in trouble: `hang`, `close`, `garbage`, `malformed`, `refuse`, `repeat`, `delay_ms`, `types`.
    Trouble(Map<String, Value>),
    /// A response that nobody asked for: `type`, `version`, `nonce`, `resources` (null: none), `names`, `versions`, `ttls`, `aliases`,
    /// `removed`, `type_url`.
    Send(Map<String, Value>),
    /// What the load reporting service answers from now on: a LoadStatsResponse.
    LoadStats(Map<String, Value>),
}

impl ControlPlane {
    /// Lays what leads to the control plane over the bootstrap.
    pub fn announce(&self, bootstrap: &mut Value) -> Result<()> {
        let mut cluster =
            json!({ "host": "127.0.0.1", "endpoints": ["{{control_plane}}"], "connect_timeout": "1s" });
        if self.mode != Mode::Rest {
            cluster["http2"] = true.into();
        }
        if let Some(tls) = self.tls {
            let mut context = json!({ "sni": "server.test", "common_tls_context": {
                "validation_context": { "trusted_ca": { "filename": "{{certs}}/ca.pem" } } } });
            if tls == Tls::Mutual {
                context["common_tls_context"]["tls_certificates"] = json!([{
                    "certificate_chain": { "filename": "{{certs}}/client.pem" },
                    "private_key": { "filename": "{{certs}}/client.key" },
                }]);
            }
            cluster["tls"] = context;
        }
        let mut cluster = config::qualified(config::cluster(CLUSTER, cluster)?)?;
        if self.unix {
            cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"] =
                json!({ "pipe": { "path": "{{dir}}/xds" } });
        }
        let mut with = json!({ "node": { "id": "node", "cluster": "cluster" } });
        if matches!(self.mode, Mode::Ads | Mode::DeltaAds) {
            with["dynamic_resources"]["ads_config"] = self.api();
        }
        for kind in self.subscribed() {
            with["dynamic_resources"][format!("{kind}_config")] = self.source();
        }
        let given = std::mem::replace(bootstrap, with);
        config::merge(bootstrap, given);
        let clusters = bootstrap["static_resources"]["clusters"].as_array_mut();
        clusters.ok_or_else(|| Error::Case("no static clusters".into()))?.push(cluster);
        self.sources(bootstrap);
        Ok(())
    }

    fn subscribed(&self) -> Vec<&str> {
        match &self.types {
            Some(types) => types.iter().map(String::as_str).collect(),
            None => [("cds", "cluster"), ("lds", "listener")]
                .into_iter()
                .filter(|(_, word)| self.resources.iter().any(|r| r.get(word).is_some()))
                .map(|(kind, _)| kind)
                .collect(),
        }
    }

    fn api(&self) -> Value {
        let mut api = match self.mode {
            Mode::Rest => json!({
                "api_type": "REST", "cluster_names": [CLUSTER], "refresh_delay": "0.1s", "request_timeout": "1s",
            }),
            mode => {
                let delta = matches!(mode, Mode::DeltaAds | Mode::Delta);
                json!({
                    "api_type": if delta { "DELTA_GRPC" } else { "GRPC" },
                    "grpc_services": [{ "envoy_grpc": { "cluster_name": CLUSTER } }],
                })
            }
        };
        api["transport_api_version"] = "V3".into();
        config::merge(&mut api, self.api.clone().into());
        api
    }

    fn source(&self) -> Value {
        let mut source = match self.mode {
            Mode::Ads | Mode::DeltaAds => json!({ "ads": {} }),
            _ => json!({ "api_config_source": self.api() }),
        };
        source["resource_api_version"] = "V3".into();
        config::merge(&mut source, self.source.clone().into());
        source
    }

    /// Puts the ConfigSource in the place of `$control_plane`.
    fn sources(&self, tree: &mut Value) {
        match tree {
            Value::String(text) if text == "$control_plane" => *tree = self.source(),
            Value::Array(items) => items.iter_mut().for_each(|v| self.sources(v)),
            Value::Object(map) => map.values_mut().for_each(|v| self.sources(v)),
            _ => {}
        }
    }

    /// A snapshot as the process takes it.
    fn snapshot(&self, given: Map<String, Value>, names: &Names) -> Result<Value> {
        let mut parts = given;
        let mut list = config::array(parts.remove("resources"), "resources")?
            .into_iter()
            .map(xds::resource)
            .collect::<Result<Value>>()?;
        self.sources(&mut list);
        let list = names.fill_tree(&config::qualified(list)?)?;
        let mut whole = json!({ "resources": list });
        for word in ["version", "versions"] {
            if let Some(value) = parts.remove(word) {
                whole[word] = value;
            }
        }
        config::nothing_left(&parts, "a snapshot")?;
        Ok(whole)
    }
}

/// The process of one run.
pub struct Peer {
    plan: ControlPlane,
    binary: PathBuf,
    child: Option<Child>,
    grpc: String,
    rest: String,
    control: String,
    certs: PathBuf,
    /// The snapshot that is served, for a restart.
    snapshot: Value,
    /// What the processes before this one have recorded.
    before: Value,
}

impl Peer {
    /// Starts it, unless the case wants to do that later.
    pub async fn start(plan: &ControlPlane, names: &Names, dir: &Path, certs: &Path) -> Result<Peer> {
        let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/control-plane");
        let binary = std::env::var_os("CONTROL_PLANE_BIN").map_or(usual, PathBuf::from);
        if !binary.exists() {
            return case_error(format!("no {}: run tests/setup", binary.display()));
        }
        let port = |name: &str| Ok::<_, Error>(format!("127.0.0.1:{}", names.get(name)?));
        let (main, other) = (port("control_plane")?, port("control_plane.other")?);
        let rest = plan.mode == Mode::Rest;
        let mut peer = Peer {
            grpc: match (rest, plan.unix) {
                (true, _) => other.clone(),
                (false, true) => format!("unix:{}", dir.join("xds").display()),
                (false, false) => main.clone(),
            },
            rest: if rest { main } else { other },
            control: port("control_plane.control")?,
            certs: certs.to_path_buf(),
            binary,
            child: None,
            snapshot: plan.snapshot(
                Map::from_iter([
                    ("version".to_owned(), plan.version.clone().into()),
                    ("resources".to_owned(), plan.resources.clone().into()),
                ]),
                names,
            )?,
            before: json!({ "opened": 0, "requests": {}, "responses": {} }),
            plan: plan.clone(),
        };
        if plan.running {
            peer.run().await?;
            if let Some(trouble) = &plan.trouble {
                peer.call("PUT", "/trouble", &trouble.clone().into()).await?;
            }
        }
        Ok(peer)
    }

    async fn run(&mut self) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command.args(["-grpc", &self.grpc, "-control", &self.control]);
        if self.plan.mode == Mode::Rest {
            command.args(["-rest", &self.rest]);
        }
        for (flag, set) in [
            ("-ads", matches!(self.plan.mode, Mode::Ads | Mode::DeltaAds) && !self.plan.mux),
            ("-mux", self.plan.mux),
        ] {
            if set {
                command.arg(flag);
            }
        }
        if let Some(ms) = self.plan.heartbeat_ms {
            command.arg("-heartbeat").arg(format!("{ms}ms"));
        }
        let certs = |name: &str| self.certs.join(name);
        if let Some(tls) = self.plan.tls {
            command.arg("-tls-cert").arg(certs("server.pem")).arg("-tls-key").arg(certs("server.key"));
            if tls == Tls::Mutual {
                command.arg("-tls-client-ca").arg(certs("ca.pem"));
            }
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .trying(format!("run {}", self.binary.display()))?;
        if let Some(out) = child.stdout.take() {
            let mut line = String::new();
            let ready = timeout(SETTLE * 3, BufReader::new(out).read_line(&mut line)).await;
            if !matches!(ready, Ok(Ok(_))) || line.trim() != "ready" {
                return Err(Error::Subject("the control plane is not ready".into()));
            }
        }
        self.child = Some(child);
        let snapshot = self.snapshot.clone();
        self.call("PUT", "/snapshot", &snapshot).await?;
        Ok(())
    }

    async fn stop(&mut self) -> Result<()> {
        self.before = self.seen().await?;
        if let Some(mut child) = self.child.take() {
            child.kill().await.trying("end the control plane")?;
        }
        Ok(())
    }

    /// Serves another snapshot: `version`, `versions`, `resources`.
    pub async fn push(&mut self, given: &Map<String, Value>, names: &Names) -> Result<()> {
        self.snapshot = self.plan.snapshot(given.clone(), names)?;
        if self.child.is_some() {
            let snapshot = self.snapshot.clone();
            self.call("PUT", "/snapshot", &snapshot).await?;
        }
        Ok(())
    }

    /// Makes trouble, or ends it.
    pub async fn act(&mut self, act: &Act, names: &Names) -> Result<()> {
        match act {
            Act::Start => return self.run().await,
            Act::Stop => return self.stop().await,
            Act::Restart => {
                self.stop().await?;
                return self.run().await;
            }
            Act::Close => self.call("POST", "/close", &json!({})).await?,
            Act::Calm => self.call("PUT", "/trouble", &json!({})).await?,
            Act::Trouble(trouble) => self.call("PUT", "/trouble", &trouble.clone().into()).await?,
            Act::LoadStats(answer) => self.call("PUT", "/load_stats", &answer.clone().into()).await?,
            Act::Send(given) => return self.send(given, names).await,
        };
        Ok(())
    }

    /// Sends a response that nobody asked for.
    pub async fn send(&self, given: &Map<String, Value>, names: &Names) -> Result<()> {
        let mut parts = given.clone();
        let resources = parts.remove("resources");
        let resources = resources.into_iter().map(|r| ("resources".into(), r)).collect();
        let mut whole = self.plan.snapshot(resources, names)?;
        config::merge(&mut whole, parts.into());
        self.call("POST", "/send", &whole).await?;
        Ok(())
    }

    async fn call(&self, method: &str, path: &str, body: &Value) -> Result<String> {
        let body = body.to_string();
        let mut wire =
            Wire::new(Stream::connect(&self.control, None).await.trying("reach the control plane")?);
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: control\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        wire.send(head.as_bytes()).await;
        let answer = async {
            let head = Head::read(&mut wire).await?;
            let body = Body::of_response(&mut wire, &head, method).await;
            Some((head.status(), String::from_utf8_lossy(&body.bytes).into_owned()))
        };
        match timeout(SETTLE, answer).await {
            Ok(Some((200, text))) => Ok(text),
            Ok(Some((_, text))) => case_error(format!("{method} {path}: {text}")),
            _ => Err(Error::Subject(format!("the control plane does not answer {method} {path}"))),
        }
    }

    /// What was asked so far: the requests by type, `sent` (responses by type), `opened` and `open` (streams).
    pub async fn seen(&self) -> Result<Value> {
        let mut whole = self.before.clone();
        if self.child.is_none() {
            return Ok(whole);
        }
        let text = self.call("GET", "/log", &json!({})).await?;
        let mut now: Value = serde_json::from_str(&text).map_err(|e| Error::Subject(e.to_string()))?;
        let opened = whole["opened"].as_u64().unwrap_or(0);
        whole["opened"] = (opened + now["opened"].as_u64().unwrap_or(0)).into();
        whole["open"] = now["open"].take();
        whole["load"] = now["load"].take();
        for part in ["requests", "responses"] {
            let Value::Object(types) = now[part].take() else { continue };
            for (kind, list) in types {
                let Value::Array(mut list) = list else { continue };
                for one in &mut list {
                    if let Some(number) = one.get("stream").and_then(Value::as_u64) {
                        one["stream"] = (number + opened).into();
                    }
                }
                match &mut whole[part][kind] {
                    Value::Array(all) => all.append(&mut list),
                    empty => *empty = list.into(),
                }
            }
        }
        Ok(whole)
    }

    /// What a case sees of it: requests by type, and of `sent`, `opened`, `open` and `load` what it asks for.
    pub async fn observation(&self, asked: &Map<String, Value>) -> Result<Value> {
        let mut seen = self.seen().await?;
        let mut shown = match seen["requests"].take() {
            Value::Object(requests) => requests,
            _ => Map::new(),
        };
        for (name, part) in [("sent", "responses"), ("opened", "opened"), ("open", "open"), ("load", "load")]
        {
            if asked.contains_key(name) {
                shown.insert(name.into(), seen[part].take());
            }
        }
        Ok(shown.into())
    }

    /// Waits until the last response of each type has its answer: a proxy may show what a response did before its answer to it is
    /// here. Of a response that is answered by nobody the time tells.
    pub async fn settle(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !answered(&self.seen().await?) && Instant::now() < deadline {
            sleep(Duration::from_millis(15)).await;
        }
        Ok(())
    }

    /// Waits until it has seen what is wanted, or the time is over; what it has seen.
    pub async fn wait(
        &self,
        wanted: &Map<String, Value>,
        names: &Names,
        patience: Duration,
    ) -> Result<Waited<Value>> {
        let deadline = Instant::now() + patience;
        let firm = silent(&Value::Object(wanted.clone()));
        loop {
            let seen = self.observation(wanted).await?;
            let mut wrong = Vec::new();
            check(&firm, &silent(&names.hide_tree(&seen)), "", &mut wrong);
            if wrong.is_empty() || Instant::now() > deadline {
                return Ok(Waited { have: seen, wrong });
            }
            sleep(Duration::from_millis(15)).await;
        }
    }
}

/// Whether the last response of each type has its answer. Polls have none.
fn answered(seen: &Value) -> bool {
    let list = |part: &str, kind: &str| seen[part][kind].as_array().cloned().unwrap_or_default();
    seen["responses"].as_object().into_iter().flatten().all(|(kind, responses)| {
        let Some(stream) = responses.as_array().and_then(|r| r.last()?["stream"].as_u64()) else {
            return true;
        };
        let of_stream = |one: &Value| one["stream"] == stream;
        let sent = list("responses", kind).into_iter().filter(of_stream).count();
        list("requests", kind).iter().any(|one| of_stream(one) && one["answers"] == sent)
    })
}

/// A record whose refusals have lost their wording, in which the subjects may differ.
pub fn silent(tree: &Value) -> Value {
    match tree {
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| {
                let value =
                    if key == "error" && value.is_string() { "refused".into() } else { silent(value) };
                (key.clone(), value)
            })
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(silent).collect(),
        other => other.clone(),
    }
}
