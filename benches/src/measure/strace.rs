//! System calls per request.
//!
//! `strace -c -f` is attached to the running and warm subject for n1 exchanges, detached, attached again for n2;
//! the figure is the difference of the two sums over the difference of the counts, so that the calls that
//! attaching restarts fall away. The detail gives each call. A traced proxy is slow, so the client's requests
//! pile up and one `epoll_wait` serves more of them than in normal running: read it as the cost under full load.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    case::Case,
    error::{BenchError, Result},
    lab::Lab,
    measure::begin,
    report::Value,
    subject::Subject,
};

const LIMIT: Duration = Duration::from_secs(120);

type Counts = BTreeMap<String, u64>;

/// Measures one case with one subject; `more` exchanges against a fifth of that.
pub async fn measure(lab: &Lab, subject: &Subject, case: &Case, more: usize) -> Result<Value> {
    let less = more / 5;
    let (mut running, mut load) = begin(lab, subject, case, &[], LIMIT).await?;
    let mut phases = Vec::new();
    for n in [less, more] {
        let file = lab.dir().join(format!("strace.{}.{n}", running.pid()));
        let tracer = Tracer::attach(running.pid(), &file)?;
        if let Err(error) = load.run(n).await {
            return Err(running.blame(error));
        }
        tracer.detach()?;
        let text = fs::read_to_string(&file).map_err(BenchError::io("strace summary"))?;
        phases.push(parse(&text)?);
    }
    let per_exchange = |name: &str| {
        let count = |phase: &Counts| phase.get(name).copied().unwrap_or(0) as f64;
        (count(&phases[1]) - count(&phases[0])) / (more - less) as f64
    };
    let mut calls = serde_json::Map::new();
    for name in phases[1].keys().filter(|name| per_exchange(name).abs() >= 0.005) {
        calls.insert(name.clone(), serde_json::json!((per_exchange(name) * 1000.0).round() / 1000.0));
    }
    let sum = |phase: &Counts| phase.values().sum::<u64>() as f64;
    let value = (sum(&phases[1]) - sum(&phases[0])) / (more - less) as f64;
    Ok(Value { value, ratio: None, detail: serde_json::Value::Object(calls) })
}

fn tool(what: impl Into<String>) -> BenchError {
    BenchError::Tool { tool: "strace", what: what.into() }
}

/// An attached strace; a drop without `detach` kills it, which lets the proxy go.
struct Tracer(Child);

impl Tracer {
    fn attach(pid: u32, file: &Path) -> Result<Self> {
        let mut child = Command::new("strace")
            .args(["-c", "-f", "-U", "calls,name", "-o"])
            .arg(file)
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(BenchError::io("strace"))?;
        let stderr = child.stderr.take().ok_or_else(|| tool("no stderr"))?;
        let tracer = Self(child);
        let mut line = String::new();
        BufReader::new(stderr).read_line(&mut line).map_err(BenchError::io("strace"))?;
        if line.contains(" attached") { Ok(tracer) } else { Err(tool(line.trim())) }
    }

    fn detach(mut self) -> Result<()> {
        let pid = i32::try_from(self.0.id()).map_err(|_| tool("process id"))?;
        kill(Pid::from_raw(pid), Signal::SIGINT)
            .map_err(|e| BenchError::Io { what: "strace".into(), source: e.into() })?;
        self.0.wait().map_err(BenchError::io("strace"))?;
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads the summary: a count and a name per line, between two rulers.
fn parse(text: &str) -> Result<Counts> {
    let rows = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let count = words.next()?.parse().ok()?;
        Some((words.next()?.to_owned(), count))
    });
    let mut counts: Counts = rows.collect();
    match counts.remove("total") {
        Some(total) if total == counts.values().sum::<u64>() => Ok(counts),
        Some(total) => Err(tool(format!("the summary's total is {total}, its rows sum to something else"))),
        // Nothing happened while it was attached.
        None if counts.is_empty() => Ok(counts),
        None => Err(tool("a summary without total")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_read() {
        let text = "    calls syscall\n--------- ------\n       12 read\n        6 writev\n--------- ----\n       18 total\n";
        let counts = parse(text).unwrap();
        assert_eq!(counts.len(), 2);
        assert_eq!(counts["read"], 12);
        assert!(parse(&text.replace("18", "19")).is_err());
        assert!(parse("        6 read\n").is_err());
    }
}
