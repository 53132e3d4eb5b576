//! One run of one case with one subject, and the verdict over the runs of both.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tokio::time::sleep;

use crate::case::{Case, Verdict};
use crate::certs::Certs;
use crate::client::Client;
use crate::config::assemble;
use crate::control_plane::{Peer, SETTLE, silent};
use crate::error::{Context, Error, Result};
use crate::names::{Names, host_address};
use crate::observe::{check, covers, differences, masked};
use crate::process::{Running, Subject};
use crate::traffic::Run;
use crate::upstream::Upstream;

/// What the runs share.
pub struct World {
    /// Certificates.
    pub certs: Certs,
    /// Folder for the runs' files.
    pub dir: PathBuf,
    /// The oracle.
    pub envoy: Subject,
    /// What is tested; none runs the oracle alone.
    pub sampan: Option<Subject>,
    /// Show what was observed.
    pub show: bool,
    /// The text of `docs/divergences.md`.
    pub divergences: String,
}

/// A subject that runs between its upstreams.
pub struct Stage {
    /// Ports and paths.
    pub names: Names,
    /// The upstreams by name.
    pub upstreams: Vec<(String, Rc<Upstream>)>,
    /// The subject.
    pub subject: Running,
    /// Its control plane.
    pub control_plane: Option<Peer>,
    /// The run's folder.
    pub dir: PathBuf,
}

/// The outcome of one case.
pub struct Outcome {
    /// Name of the case.
    pub name: String,
    /// What is wrong; empty for a pass.
    pub wrong: Vec<String>,
    /// It diverges as marked.
    pub diverges: bool,
    /// What Envoy showed, when asked for.
    pub shown: Option<String>,
}

impl World {
    /// The world that the environment asks for (see `tests/README.md`); says what is missing and gives none without it.
    pub fn from_environment(root: &Path) -> Result<Option<World>> {
        let workspace = root.join("..");
        let path = |variable: &str, usual: &str| {
            let path = std::env::var_os(variable).map_or_else(|| workspace.join(usual), PathBuf::from);
            if path.exists() {
                return Ok(Some(path));
            }
            let missing = format!("no {}: see tests/README.md", path.display());
            std::io::Write::write_all(&mut std::io::stderr(), format!("{missing}\n").as_bytes())
                .trying("say so")?;
            Ok::<_, Error>(None)
        };
        let Some(envoy) = path("ENVOY_BIN", "target/oracle/envoy")? else { return Ok(None) };
        let sampan = if std::env::var("SUBJECT").as_deref() == Ok("envoy") {
            None
        } else {
            let Some(binary) = path("SAMPAN_BIN", "target/release/sampan")? else { return Ok(None) };
            Some(Subject { name: "sampan", binary })
        };
        let dir = std::env::temp_dir().join(format!("sampan-{}", std::process::id()));
        Ok(Some(World {
            certs: Certs::make(&dir.join("certs"))?,
            dir,
            envoy: Subject { name: "envoy", binary: envoy },
            sampan,
            show: std::env::var_os("SHOW").is_some(),
            divergences: fs::read_to_string(workspace.join("docs/divergences.md")).unwrap_or_default(),
        }))
    }

    /// Removes the runs' files unless `KEEP` is set.
    pub fn clean(&self) {
        if std::env::var_os("KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    /// Runs a case with both subjects; a table of verdicts gives one outcome for each row.
    pub async fn judge(&self, case: &Case) -> Vec<Outcome> {
        if !case.validate.is_empty() {
            let mut outcomes = Vec::new();
            for row in &case.validate {
                let name = format!("{}#{}", case.name, row.name);
                let (wrong, diverges, shown) = self.verdict(&name, row).await.unwrap_or_else(failed);
                outcomes.push(Outcome { name, wrong, diverges, shown });
            }
            return outcomes;
        }
        let (wrong, diverges, shown) = self.compare(case).await.unwrap_or_else(failed);
        vec![Outcome { name: case.name.clone(), wrong, diverges, shown }]
    }

    /// Sampan against what the case expects, without the oracle.
    async fn alone(&self, case: &Case) -> Result<Judged> {
        let Some(sampan) = &self.sampan else { return Ok((Vec::new(), false, None)) };
        let seen = self.observe(case, sampan, &case.expect).await?;
        let shown = self.show.then(|| serde_json::to_string_pretty(&seen).unwrap_or_default());
        let mut wrong = Vec::new();
        check(&Value::Object(case.expect.clone()), &seen, "", &mut wrong);
        Ok((wrong, false, shown))
    }

    async fn compare(&self, case: &Case) -> Result<Judged> {
        if case.sampan_only.is_some() {
            return self.alone(case).await;
        }
        let envoy = self.observe(case, &self.envoy, &case.expect).await?;
        let shown = self.show.then(|| serde_json::to_string_pretty(&envoy).unwrap_or_default());
        let mut wrong = Vec::new();
        check(&Value::Object(case.expect.clone()), &envoy, "", &mut wrong);
        for line in &mut wrong {
            *line = format!("envoy at {line}");
        }
        let (Some(sampan), true) = (&self.sampan, wrong.is_empty()) else { return Ok((wrong, false, shown)) };
        // What Envoy showed is what is waited for.
        let awaited = envoy.as_object().cloned().unwrap_or_default();
        let sampan = match self.observe(case, sampan, &awaited).await {
            Ok(sampan) => sampan,
            Err(error) => {
                let marked = case.divergence.is_some() && case.diverges_at.is_empty();
                if !marked {
                    wrong.push(format!("sampan: {error}"));
                }
                self.listed(&case.name, case.divergence.as_deref(), marked, &mut wrong);
                return Ok((wrong, marked, shown));
            }
        };
        // Refusals differ in their wording: each must say what the case expects of it.
        let mut found = Vec::new();
        differences(&worded(&envoy), &worded(&sampan), "", &mut found);
        found.retain(|(path, _)| !case.ignore.iter().any(|pattern| covers(pattern, path)));
        if let (Some(wanted), Some(seen)) = (case.expect.get("control_plane"), sampan.get("control_plane")) {
            let mut misses = Vec::new();
            check(wanted, seen, "control_plane", &mut misses);
            found.extend(misses.into_iter().map(|miss| ("control_plane".to_owned(), miss)));
        }
        let known = |path: &str| {
            case.divergence.is_some()
                && (case.diverges_at.is_empty()
                    || case.diverges_at.iter().any(|pattern| covers(pattern, path)))
        };
        let diverges = found.iter().any(|(path, _)| known(path));
        wrong.extend(found.iter().filter(|(p, _)| !known(p)).map(|(p, text)| format!("at {p}\n    {text}")));
        self.listed(&case.name, case.divergence.as_deref(), diverges, &mut wrong);
        Ok((wrong, diverges, shown))
    }

    /// A marked divergence must be one, and stand in the document.
    fn listed(&self, name: &str, reason: Option<&str>, diverges: bool, wrong: &mut Vec<String>) {
        if reason.is_none() {
            return;
        }
        if !diverges {
            wrong.push("marked as divergent, but it is not: remove the mark".into());
        }
        if !self.divergences.contains(name) {
            wrong.push(format!("marked as divergent, but docs/divergences.md does not name {name}"));
        }
    }

    async fn verdict(&self, name: &str, row: &Verdict) -> Result<Judged> {
        let names = Names::default();
        let dir = self.folder(name, "validate", &names)?;
        let text = match &row.text {
            Some(text) => names.fill(text)?,
            None => serde_json::to_string_pretty(&names.fill_tree(&assemble(&row.config, &[])?)?)
                .unwrap_or_default(),
        };
        let file = dir.join(format!("config.{}", row.ext));
        fs::write(&file, text).trying("write the configuration")?;
        let (accepted, said) = self.envoy.validate(&file).await?;
        // Envoy varies the blanks of its messages on purpose.
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        let shown = self.show.then(|| format!("accepted: {accepted}\n{said}"));
        let mut wrong = Vec::new();
        let mut says =
            |who: &str, said: &str, pattern: Option<&String>| match pattern.map(|p| regex::Regex::new(p)) {
                Some(Ok(pattern)) if !pattern.is_match(said) => {
                    wrong.push(format!("{who} does not say {pattern}: {said:.800}"))
                }
                Some(Err(error)) => wrong.push(error.to_string()),
                _ => {}
            };
        says("envoy", &said, row.envoy.as_ref());
        let mut diverges = false;
        if let Some(sampan) = &self.sampan {
            let (verdict, said) = sampan.validate(&file).await?;
            if verdict == accepted {
                says("sampan", &said, row.sampan.as_ref());
            } else if row.divergence.is_some() {
                diverges = true;
            } else {
                says("sampan", "", None);
                wrong.push(format!("envoy accepts: {accepted}, sampan accepts: {verdict}: {said:.800}"));
            }
            self.listed(name, row.divergence.as_deref(), diverges, &mut wrong);
        }
        if accepted != row.accept {
            wrong.push(format!("expected accept: {}, envoy accepts: {accepted}: {said:.800}", row.accept));
        }
        Ok((wrong, diverges, shown))
    }

    fn folder(&self, case: &str, subject: &str, names: &Names) -> Result<PathBuf> {
        // Short, because a unix socket's path has 107 bytes.
        let dir = self.dir.join(format!("{}-{subject}", case.replace(['/', '#', ' '], "_")));
        fs::create_dir_all(&dir).trying("make the run's folder")?;
        names.set("dir", dir.display());
        // A case that is run once more begins with an empty log.
        let _ = fs::remove_file(dir.join("access.log"));
        names.set("log", dir.join("access.log").display());
        names.set("certs", self.certs.dir().display());
        if let Some(address) = host_address() {
            names.set("host_ip", address);
        }
        Ok(dir)
    }

    /// Starts a subject between the upstreams of a case.
    pub async fn stage(&self, case: &Case, subject: &Subject) -> Result<Stage> {
        let names = Names::default();
        let dir = self.folder(&case.name, subject.name, &names)?;
        let mut upstreams = Vec::new();
        for (name, script) in &case.upstreams {
            let (upstream, port) = Upstream::start(name, script, &self.certs).await?;
            names.set(format!("upstream.{name}"), port);
            upstreams.push((name.clone(), upstream));
        }
        let scripts: Vec<_> = case.upstreams.iter().collect();
        let mut config = assemble(&case.config, &scripts)?;
        crate::xds::announce(&case.files, &mut config);
        crate::xds::write(&case.files, &dir, &names)?;
        let mut control_plane = None;
        if let Some(plan) = &case.control_plane {
            plan.announce(&mut config)?;
            control_plane = Some(Peer::start(plan, &names, &dir, self.certs.dir()).await?);
        }
        let config = names.fill_tree(&config)?;
        let file = dir.join("config.json");
        fs::write(&file, serde_json::to_string_pretty(&config).unwrap_or_default())
            .trying("write the configuration")?;
        let args = case.args.iter().map(|a| names.fill(a)).collect::<Result<Vec<_>>>()?;
        let admin = format!("127.0.0.1:{}", names.get("admin")?);
        let ready = case.control_plane.as_ref().is_none_or(|plan| plan.ready);
        let subject = subject.start(&file, admin, &args, ready).await?;
        Ok(Stage { names, upstreams, subject, control_plane, dir })
    }

    async fn observe(&self, case: &Case, subject: &Subject, awaited: &Map<String, Value>) -> Result<Value> {
        let stage = self.stage(case, subject).await?;
        let Stage { names, upstreams, subject: running, control_plane, dir } = stage;
        let mut run = Run {
            client: Client::new(&names, &self.certs),
            names: &names,
            dir: dir.clone(),
            subject: running,
            control_plane,
            seen: Map::new(),
            next: 1,
            awaited,
        };
        for step in &case.traffic {
            run.step(step).await?;
        }
        let stats = run.stats(case).await?;
        let log = run.log(&dir.join("access.log"), case).await;
        let mut tree = std::mem::take(&mut run.seen);
        if let Some(peer) = &run.control_plane {
            peer.settle(Duration::from_secs(1)).await?;
            let none = Map::new();
            let wanted = awaited.get("control_plane").and_then(Value::as_object).unwrap_or(&none);
            tree.insert("control_plane".into(), peer.wait(wanted, &names, SETTLE).await?.have);
        }
        let Run { subject: running, client, .. } = run;
        drop(client);
        settle(&upstreams, awaited).await;
        let requests: Map<String, Value> =
            upstreams.iter().map(|(name, upstream)| (name.clone(), upstream.observation())).collect();
        let exited = tree.contains_key("exit");
        let said = running.said();
        if running.stop().await && !exited {
            return Err(Error::Subject(format!("{} ended during the traffic:\n{said}", subject.name)));
        }
        // A panic ends its own stream and nothing else: only what was said tells of it.
        if said.contains(" panicked at ") {
            return Err(Error::Subject(format!("{} panicked:\n{said}", subject.name)));
        }
        tree.insert("upstream".into(), requests.into());
        if let Some(log) = log {
            tree.insert("log".into(), log);
        }
        if !stats.is_empty() {
            tree.insert("stats".into(), stats.into());
        }
        masked(&names.hide_tree(&tree.into()), &case.mask)
    }
}

/// An observation without the wording of refusals.
fn worded(tree: &Value) -> Value {
    let mut tree = tree.clone();
    if let Some(seen) = tree.get_mut("control_plane") {
        *seen = silent(seen);
    }
    tree
}

type Judged = (Vec<String>, bool, Option<String>);

fn failed(error: Error) -> Judged {
    (vec![error.to_string()], false, None)
}

/// Gives upstreams the time to note how their connections ended, where that is watched.
async fn settle(upstreams: &[(String, Rc<Upstream>)], awaited: &Map<String, Value>) {
    let Some(Value::Object(wanted)) = awaited.get("upstream") else { return };
    let deadline = Instant::now() + Duration::from_secs(1);
    let done = || {
        upstreams.iter().all(|(name, upstream)| {
            let Some(want) = wanted.get(name) else { return true };
            let mut wrong = Vec::new();
            check(want, &upstream.observation(), "", &mut wrong);
            wrong.is_empty()
        })
    };
    while !done() && Instant::now() < deadline {
        sleep(Duration::from_millis(10)).await;
    }
}
