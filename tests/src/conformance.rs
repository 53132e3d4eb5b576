//! Scores against the RFCs rather than against Envoy: raw HTTP/1 requests, and h2spec for HTTP/2.

use std::path::Path;
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::Duration;

use futures_util::future::join_all;
use regex::Regex;
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;
use tokio::time::{Instant, timeout};

use crate::case::Case;
use crate::error::{Context, Error, Result};
use crate::names::regex;
use crate::net::{Stream, Wire, raw, text};
use crate::process::Subject;
use crate::run::World;

/// How long after the last byte a response is taken for whole.
const QUIET: Duration = Duration::from_millis(250);
/// How many rows are tried at once.
const AT_ONCE: usize = 8;

static STATUS: LazyLock<Regex> = LazyLock::new(|| regex(r"HTTP/1\.[01] (\d{3})"));

/// One row of `conformance/http1.yaml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What is tried.
    pub name: String,
    /// Where it stands.
    pub rfc: String,
    /// The bytes.
    pub send: String,
    /// What the outcome matches.
    pub want: String,
}

/// How a subject did.
pub struct Score {
    /// Rows passed.
    pub passed: usize,
    /// All rows.
    pub total: usize,
    /// Rows failed, with what was seen.
    pub failed: Vec<(String, String)>,
}

fn stage_case(name: &str) -> Result<Case> {
    // Envoy lets the last words sink in for a second before it closes, longer than h2spec waits.
    let config = json!({ "hcm": { "delayed_close_timeout": "0.1s" } });
    let tree =
        json!({ "about": name, "upstreams": { "a": {} }, "config": config, "expect": { "none": null } });
    let mut case: Case = serde_json::from_value(tree).map_err(|e| Error::Case(e.to_string()))?;
    case.name = name.to_owned();
    Ok(case)
}

/// Runs all rows against a subject.
pub async fn http1(world: &World, subject: &Subject, file: &Path) -> Result<Score> {
    let rows = std::fs::read_to_string(file).trying("read the rows")?;
    let rows: Vec<Row> = serde_saphyr::from_str(&rows).map_err(|e| Error::Case(e.to_string()))?;
    let stage = world.stage(&stage_case("http1")?, subject).await?;
    let to = format!("127.0.0.1:{}", stage.names.get("listener.main")?);
    let mut failed = Vec::new();
    for some in rows.chunks(AT_ONCE) {
        for (row, outcome) in some.iter().zip(join_all(some.iter().map(|row| try_row(&to, row))).await) {
            let outcome = outcome?;
            let want = Regex::new(&row.want).map_err(|e| Error::Case(e.to_string()))?;
            if !want.is_match(&outcome) {
                failed.push((row.name.clone(), format!("{outcome:?}, RFC {} wants {}", row.rfc, row.want)));
            }
        }
    }
    stage.subject.stop().await;
    Ok(Score { passed: rows.len() - failed.len(), total: rows.len(), failed })
}

/// The statuses that came, and `!` when the connection was closed.
async fn try_row(to: &str, row: &Row) -> Result<String> {
    let mut wire = Wire::new(Stream::connect(to, None).await.trying("connect")?);
    wire.send(&raw(&row.send)).await;
    let mut last = Instant::now();
    while last.elapsed() < QUIET {
        match timeout(QUIET - last.elapsed(), wire.fill()).await {
            Ok(true) => last = Instant::now(),
            Ok(false) | Err(_) => break,
        }
    }
    let seen = text(&wire.seen);
    let statuses: Vec<&str> =
        STATUS.captures_iter(&seen).filter_map(|c| c.get(1)).map(|m| m.as_str()).collect();
    Ok(format!("{}{}", statuses.join(","), if wire.end.is_some() { "!" } else { "" }))
}

/// Runs h2spec against a subject.
pub async fn http2(world: &World, subject: &Subject, h2spec: &Path) -> Result<Score> {
    let stage = world.stage(&stage_case("http2")?, subject).await?;
    let port = stage.names.get("listener.main")?;
    let report = stage.dir.join("h2spec.xml");
    let run = Command::new(h2spec)
        .args(["-h", "127.0.0.1", "-p", &port, "-o", "1", "-j"])
        .arg(&report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let status = timeout(Duration::from_secs(300), run).await;
    status.map_err(|_| Error::Subject("h2spec did not end".into()))?.trying("run h2spec")?;
    stage.subject.stop().await;
    let report = std::fs::read_to_string(&report).trying("read h2spec's report")?;
    let case = regex(r#"(?s)<testcase package="([^"]*)" classname="([^"]*)"[^>]*?(/>|>(.*?)</testcase>)"#);
    let mut score = Score { passed: 0, total: 0, failed: Vec::new() };
    for found in case.captures_iter(&report) {
        score.total += 1;
        let inside = found.get(4).map_or("", |m| m.as_str());
        if inside.contains("<failure") || inside.contains("<error") {
            let words = inside.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty());
            let said = words.collect::<Vec<_>>().join(" ");
            score.failed.push((format!("{} {}", &found[1], &found[2]).replace("&#34;", "\""), said));
        } else {
            score.passed += 1;
        }
    }
    Ok(score)
}
