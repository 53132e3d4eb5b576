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
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    case::Case,
    error::{BenchError, Result},
    lab::Lab,
    measure::begin,
    report::Value,
    subject::Subject,
};

/// Everything is some fifty times slower there.
const LIMIT: Duration = Duration::from_secs(300);
const FILE: &str = "callgrind.out";

/// Measures one case with one subject; `more` exchanges against a fifth of that.
pub async fn measure(lab: &Lab, subject: &Subject, case: &Case, more: usize) -> Result<Value> {
    let less = more / 5;
    let mut profile = Profile::new(lab.dir());
    let (mut running, mut load) = begin(lab, subject, case, &profile.wrapper(), LIMIT).await?;
    profile.part(running.pid())?;
    let mut parts = [0; 2];
    for (n, part) in [less, more].into_iter().zip(&mut parts) {
        if let Err(error) = load.run(n).await {
            return Err(running.blame(error));
        }
        *part = profile.part(running.pid())?;
    }
    let [small, large] = parts;
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

/// One process's dumps.
pub struct Profile {
    dir: PathBuf,
    dumps: u32,
}

impl Profile {
    /// Dumps go into this folder.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), dumps: 0 }
    }

    /// What to put before the program; valgrind puts the pid in.
    #[must_use]
    pub fn wrapper(&self) -> [String; 3] {
        let out = format!("--callgrind-out-file={}/{FILE}.%p", self.dir.display());
        ["valgrind".to_owned(), "--tool=callgrind".to_owned(), out]
    }

    /// Instructions since the last call, or since the start.
    pub fn part(&mut self, pid: u32) -> Result<u64> {
        dump(pid)?;
        self.dumps += 1;
        total(&self.dir.join(format!("{FILE}.{pid}.{}", self.dumps)))
    }
}

/// Asks valgrind to write its counters and to begin anew.
fn dump(pid: u32) -> Result<()> {
    let status = Command::new("vgdb")
        .arg(format!("--pid={pid}"))
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
