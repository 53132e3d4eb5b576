//! The process of a control plane: it is given snapshots and trouble over its control port and asked what it has seen.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::{Act, ControlPlane, Mode, SETTLE, Tls};
use crate::config;
use crate::error::{Context, Error, Result, case_error};
use crate::http1::{Body, Head};
use crate::names::Names;
use crate::net::{Stream, Wire};
use crate::observe::{Waited, check};

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
