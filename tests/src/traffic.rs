//! The client's steps of one run, and the collecting of what shows afterwards: stats and the access log.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::future::{LocalBoxFuture, join_all};
use serde_json::{Map, Value};
use tokio::time::sleep;

use crate::case::{Case, Step};
use crate::client::Client;
use crate::control_plane::{Act, Peer};
use crate::error::{Error, Result, case_error};
use crate::names::Names;
use crate::observe::{Waited, check};
use crate::process::Running;

/// How long stats and log lines may take to arrive.
const SETTLE: Duration = Duration::from_secs(3);
/// How long a step waits for what it names: only a slow machine needs that long.
const PATIENCE: Duration = Duration::from_secs(20);

fn peer(peer: &mut Option<Peer>) -> Result<&mut Peer> {
    peer.as_mut().ok_or_else(no_peer)
}

fn no_peer() -> Error {
    Error::Case("the case has no control plane".into())
}

/// A run under way.
pub(crate) struct Run<'a> {
    pub(crate) client: Client<'a>,
    pub(crate) names: &'a Names,
    pub(crate) dir: PathBuf,
    pub(crate) subject: Running,
    pub(crate) control_plane: Option<Peer>,
    pub(crate) seen: Map<String, Value>,
    pub(crate) next: usize,
    pub(crate) awaited: &'a Map<String, Value>,
}

impl Run<'_> {
    /// Takes one step.
    pub(crate) async fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Exit(limit) => {
                let Ok(limit) = limit.parse() else { return case_error("exit: wants milliseconds") };
                let code = self.subject.exit(Duration::from_millis(limit)).await;
                self.seen.insert("exit".into(), code.into());
            }
            Step::Restart { ready } => self.subject.restart(*ready).await?,
            Step::Push(snapshot) => peer(&mut self.control_plane)?.push(snapshot, self.names).await?,
            Step::ControlPlane(act) if !matches!(act, Act::Send(_)) => {
                peer(&mut self.control_plane)?.act(act, self.names).await?;
            }
            Step::Parallel(lists) => {
                let first = self.next;
                let runs = lists.iter().enumerate().map(|(at, list)| self.list(list, first + 100 * (at + 1)));
                for seen in join_all(runs).await {
                    self.seen.extend(seen?);
                }
            }
            step => {
                if let Some((name, value)) = self.single(step, self.next).await? {
                    if name == format!("r{}", self.next) {
                        self.next += 1;
                    }
                    if self.seen.insert(name.clone(), value).is_some() {
                        return case_error(format!("two steps are called {name}"));
                    }
                }
            }
        }
        Ok(())
    }

    fn peer(&self) -> Result<&Peer> {
        self.control_plane.as_ref().ok_or_else(no_peer)
    }

    async fn list(&self, steps: &[Step], mut next: usize) -> Result<Map<String, Value>> {
        let mut seen = Map::new();
        for step in steps {
            if let Some((name, value)) = self.single(step, next).await? {
                next += 1;
                seen.insert(name, value);
            }
        }
        Ok(seen)
    }

    fn single<'s>(
        &'s self,
        step: &'s Step,
        next: usize,
    ) -> LocalBoxFuture<'s, Result<Option<(String, Value)>>> {
        Box::pin(async move {
            let named = |name: &Option<String>| name.clone().unwrap_or_else(|| format!("r{next}"));
            Ok(match step {
                Step::Http(s) => Some((named(&s.name), self.client.http(s).await?)),
                Step::Raw(s) => Some((named(&s.name), self.client.raw(s).await?)),
                Step::Admin(s) => Some((named(&s.name), self.client.admin(s, &self.subject).await?)),
                Step::Runtime(values) => {
                    let query: Vec<String> =
                        values.iter().map(|(k, v)| format!("{k}={}", crate::http1::scalar(v))).collect();
                    let path = format!("/runtime_modify?{}", query.join("&"));
                    let (head, body) = self.subject.admin_call("POST", &path).await?;
                    if head.status() != 200 {
                        return Err(Error::Subject(format!("POST {path}: {} {body}", head.status())));
                    }
                    None
                }
                Step::Sleep(ms) => {
                    sleep(Duration::from_millis(*ms)).await;
                    None
                }
                Step::WaitStats(wanted) => {
                    self.read_stats(wanted, PATIENCE).await?.or_vain(wanted)?;
                    None
                }
                Step::Write(files) => {
                    crate::xds::write(files, &self.dir, self.names)?;
                    None
                }
                Step::Close(name) => {
                    self.client.close(name);
                    None
                }
                Step::Signal(name) => {
                    self.subject.signal(name)?;
                    None
                }
                Step::ControlPlane(Act::Send(given)) => {
                    self.peer()?.send(given, self.names).await?;
                    None
                }
                Step::WaitControlPlane(wanted) => {
                    self.peer()?.wait(wanted, self.names, PATIENCE).await?.or_vain(wanted)?;
                    None
                }
                Step::Exit(_)
                | Step::Restart { .. }
                | Step::Parallel(_)
                | Step::Push(_)
                | Step::ControlPlane(_) => {
                    return case_error(
                        "exit, restart, parallel and changes of the control plane do not nest",
                    );
                }
            })
        })
    }

    /// Reads stats until they have the wanted values or the time is over.
    async fn read_stats(
        &self,
        wanted: &Map<String, Value>,
        patience: Duration,
    ) -> Result<Waited<Map<String, Value>>> {
        let deadline = Instant::now() + patience;
        loop {
            let (_, text) = self.subject.admin_call("GET", "/stats").await?;
            let mut have = Map::new();
            for name in wanted.keys() {
                let line = self.names.fill(name)?;
                let value = text.lines().find_map(|l| l.strip_prefix(&line)?.strip_prefix(": "));
                let value =
                    value.map_or(Value::Null, |v| v.parse::<i64>().map_or_else(|_| v.into(), Value::from));
                have.insert(name.clone(), value);
            }
            let mut wrong = Vec::new();
            let seen = self.names.hide_tree(&Value::Object(have.clone()));
            check(&self.names.hide_tree(&Value::Object(wanted.clone())), &seen, "", &mut wrong);
            if wrong.is_empty() || Instant::now() > deadline {
                return Ok(Waited { have, wrong });
            }
            sleep(Duration::from_millis(15)).await;
        }
    }

    /// The stats that are expected or asked for.
    pub(crate) async fn stats(&self, case: &Case) -> Result<Map<String, Value>> {
        if self.seen.contains_key("exit") {
            return Ok(Map::new());
        }
        let mut wanted = match self.awaited.get("stats") {
            Some(Value::Object(wanted)) => wanted.clone(),
            _ => Map::new(),
        };
        // The wanted values of the comparison carry the case's names already.
        for name in &case.stats {
            wanted.entry(name.clone()).or_insert_with(|| "~.*".into());
        }
        if wanted.is_empty() {
            return Ok(wanted);
        }
        let free: Vec<String> = wanted.iter().filter(|(_, v)| *v == "~.*").map(|(k, _)| k.clone()).collect();
        let firm: Map<String, Value> =
            wanted.iter().filter(|(k, _)| !free.contains(k)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut have = self.read_stats(&firm, SETTLE).await?.have;
        if !free.is_empty() {
            let all: Map<String, Value> = free.into_iter().map(|k| (k, Value::Null)).collect();
            let (_, text) = self.subject.admin_call("GET", "/stats").await?;
            for name in all.keys() {
                let line = self.names.fill(name)?;
                let value = text.lines().find_map(|l| l.strip_prefix(&line)?.strip_prefix(": "));
                have.insert(
                    name.clone(),
                    value.map_or(Value::Null, |v| v.parse::<i64>().map_or_else(|_| v.into(), Value::from)),
                );
            }
        }
        Ok(have)
    }

    /// Waits for as many lines as are awaited, and a moment for one too many.
    pub(crate) async fn log(&self, file: &Path, case: &Case) -> Option<Value> {
        let wanted = self.awaited.get("log").and_then(Value::as_array).map(Vec::len);
        if wanted.is_none() && case.config.get("log").is_none() && !file.exists() {
            return None;
        }
        let deadline = Instant::now() + SETTLE;
        let lines = || -> Vec<String> {
            let text = fs::read(file).unwrap_or_default();
            String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
        };
        let wanted = wanted.unwrap_or(1);
        while lines().len() < wanted && Instant::now() < deadline {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_millis(60)).await;
        let mut lines = lines();
        if case.sort_log {
            lines.sort();
        }
        Some(lines.into())
    }
}
