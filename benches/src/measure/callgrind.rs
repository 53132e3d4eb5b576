//! User instructions per request.
//!
//! The subject runs under `valgrind --tool=callgrind` with a single worker. After the warm-up a dump is made
//! (`vgdb … dump`), which also sets the counters to zero; then n1 exchanges and a dump, then n2 exchanges and a
//! dump. The figure is (Ir2 - Ir1) / (n2 - n1): start-up and warm-up fall away with the first dump, and what
//! comes once per phase (the dump itself, timers that fire by the clock at about the same rate) with the
//! difference. valgrind sees user space only; the kernel's share is in the CPU figure.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    case::Case,
    error::{BenchError, Result},
    lab::Lab,
    measure::begin,
    report::Value,
    subject::{Running, Subject},
};

/// Everything is some fifty times slower there.
const LIMIT: Duration = Duration::from_secs(300);
const FILE: &str = "callgrind.out";

/// Measures one case with one subject; `more` exchanges against a fifth of that.
pub async fn measure(lab: &Lab, subject: &Subject, case: &Case, more: usize) -> Result<Value> {
    let less = more / 5;
    // The directory is named after the port, which only `begin` knows: valgrind puts the pid in.
    let out = format!("--callgrind-out-file={}/{FILE}.%p", lab.dir().display());
    let wrapper = ["valgrind".to_owned(), "--tool=callgrind".to_owned(), out];
    let (mut running, mut load) = begin(lab, subject, case, &wrapper, LIMIT).await?;
    let base = lab.dir().join(format!("{FILE}.{}", running.pid()));
    dump(&running)?;
    for n in [less, more] {
        if let Err(error) = load.run(n).await {
            return Err(running.blame(error));
        }
        dump(&running)?;
    }
    let part = |n: u32| total(&base.with_file_name(format!("{FILE}.{}.{n}", running.pid())));
    let (small, large) = (part(2)?, part(3)?);
    let spent = large
        .checked_sub(small)
        .ok_or_else(|| tool(format!("{more} exchanges cost {large} instructions, {less} cost {small}")))?;
    let value = spent as f64 / (more - less) as f64;
    let detail = serde_json::json!({ "exchanges": [less, more], "instructions": [small, large] });
    Ok(Value { value, ratio: None, detail })
}

fn tool(what: impl Into<String>) -> BenchError {
    BenchError::Tool { tool: "callgrind", what: what.into() }
}

/// Asks valgrind to write its counters and to begin anew.
fn dump(running: &Running) -> Result<()> {
    let status = Command::new("vgdb")
        .arg(format!("--pid={}", running.pid()))
        .arg("dump")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(BenchError::io("vgdb"))?;
    if status.success() { Ok(()) } else { Err(tool(format!("vgdb ends with {status}"))) }
}

/// The `totals:` line of a dump.
fn total(path: &Path) -> Result<u64> {
    let file = File::open(path).map_err(BenchError::io("callgrind dump"))?;
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(BenchError::io("callgrind dump"))?;
        if let Some(rest) = line.strip_prefix(b"totals:") {
            let text = String::from_utf8_lossy(rest);
            return text.trim().parse().map_err(|_| tool(format!("totals: {text}")));
        }
    }
    Err(tool("a dump without totals"))
}
