//! The verdict of `--mode validate` on a folder of configurations, Envoy's beside Sampan's.
//!
//! `CONFIGS` names the folder (Envoy's own repository, for instance; its `configs/` and `docs/root/` hold the 162 files that
//! `docs/compatibility.md` counts); every `.yaml` below it is judged by both, from within the folder, because the files name
//! others by relative paths. Without `CONFIGS` there is nothing to do. What Envoy accepts and Sampan refuses for something that
//! it does not support, by name, is counted apart; anything else is a disagreement and fails the run.

#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use sampan_tests::error::{Context, Result};
use sampan_tests::process::Subject;
use sampan_tests::run::World;

/// How a file was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    BothAccept,
    BothRefuse,
    Unsupported,
    Disagreement,
}

impl Row {
    fn words(self) -> &'static str {
        match self {
            Self::BothAccept => "both accept",
            Self::BothRefuse => "both refuse",
            Self::Unsupported => "refused by Sampan, naming what it does not support",
            Self::Disagreement => "disagreement",
        }
    }
}

fn main() -> ExitCode {
    let Some(folder) = std::env::var_os("CONFIGS").map(PathBuf::from) else {
        println!("configurations: skipped, CONFIGS names no folder");
        return ExitCode::SUCCESS;
    };
    match run(&folder) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(folder: &Path) -> Result<bool> {
    let Some(world) = World::from_environment(Path::new(env!("CARGO_MANIFEST_DIR")))? else {
        return Ok(false);
    };
    let Some(sampan) = &world.sampan else { return Ok(false) };
    let (envoy, sampan) = (absolute(&world.envoy)?, absolute(sampan)?);
    std::env::set_current_dir(folder).trying(format!("enter {}", folder.display()))?;
    let mut files = Vec::new();
    find(Path::new("."), &mut files)?;
    files.sort();
    let judged = Mutex::new(BTreeMap::<Row, Vec<String>>::new());
    let next = Mutex::new(files.iter());
    std::thread::scope(|scope| {
        for _ in 0..std::env::var("JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(4usize) {
            scope.spawn(|| {
                while let Some(file) = next.lock().ok().and_then(|mut files| files.next()) {
                    let (row, line) = judge(&envoy, &sampan, file);
                    if let Ok(mut judged) = judged.lock() {
                        judged.entry(row).or_default().push(line);
                    }
                }
            });
        }
    });
    world.clean();
    Ok(report(judged.into_inner().unwrap_or_default(), files.len()))
}

/// The subject by a path that holds in every folder.
fn absolute(subject: &Subject) -> Result<Subject> {
    let binary = fs::canonicalize(&subject.binary).trying(format!("find {}", subject.binary.display()))?;
    Ok(Subject { name: subject.name, binary })
}

fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let trying = || format!("list {}", folder.display());
    for entry in fs::read_dir(folder).trying(trying())? {
        let path = entry.trying(trying())?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "yaml") {
            files.push(path.strip_prefix(".").map_or_else(|_| path.clone(), Path::to_path_buf));
        }
    }
    Ok(())
}

fn judge(envoy: &Subject, sampan: &Subject, file: &Path) -> (Row, String) {
    let name = file.display();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let verdicts = runtime.trying("start a runtime").and_then(|runtime| {
        runtime.block_on(async { Ok((envoy.validate(file).await?, sampan.validate(file).await?)) })
    });
    let ((theirs, theirs_said), (ours, ours_said)) = match verdicts {
        Ok(verdicts) => verdicts,
        Err(error) => return (Row::Disagreement, format!("{name}: {error}")),
    };
    let last = |said: &str| {
        let line = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        line.split_once("configuration: ").map_or(line, |(_, reason)| reason).to_owned()
    };
    let row = match (theirs, ours) {
        (true, true) => Row::BothAccept,
        (false, false) => Row::BothRefuse,
        (true, false) if ours_said.contains(" not supported") => Row::Unsupported,
        _ => Row::Disagreement,
    };
    let said = if ours { theirs_said } else { ours_said };
    (row, if theirs && ours { name.to_string() } else { format!("{name}: {}", last(&said)) })
}

fn report(judged: BTreeMap<Row, Vec<String>>, total: usize) -> bool {
    let verbose = std::env::var_os("SHOW").is_some();
    for (row, lines) in &judged {
        println!("{:>4} of {total}: {}", lines.len(), row.words());
        if verbose || *row == Row::Disagreement {
            let mut lines = lines.clone();
            lines.sort();
            lines.iter().for_each(|line| println!("       {line}"));
        }
    }
    !judged.contains_key(&Row::Disagreement)
}
