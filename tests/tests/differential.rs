//! Runs every case of `tests/cases` with Envoy and with Sampan. See `tests/README.md`.

#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use sampan_tests::case::Case;
use sampan_tests::error::Result;
use sampan_tests::run::{Outcome, World};

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match run(root) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what is asked for; the number of failures.
fn run(root: &Path) -> Result<usize> {
    let Some(world) = World::from_environment(root)? else { return Ok(1) };
    let filter =
        std::env::var("CASE").ok().or_else(|| std::env::args().nth(1).filter(|a| !a.starts_with('-')));
    let cases: Vec<PathBuf> = Case::find(&root.join("cases"))?
        .into_iter()
        .filter(|file| {
            filter.as_ref().is_none_or(|f| file.with_extension("").display().to_string().contains(f))
        })
        .collect();
    let started = Instant::now();
    let judged = run_all(&world, &root.join("cases"), &cases);
    world.clean();
    let outcomes = again(root, judged)?;
    Ok(report(&outcomes, started))
}

type Judged = Vec<(PathBuf, Vec<Outcome>)>;

fn run_all(world: &World, root: &Path, cases: &[PathBuf]) -> Judged {
    let jobs = std::env::var("JOBS").ok().and_then(|j| j.parse().ok()).unwrap_or(4usize);
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(file) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let judged = judge(world, root, file);
                    if let Ok(mut outcomes) = outcomes.lock() {
                        outcomes.push((file.clone(), judged));
                    }
                }
            });
        }
    });
    outcomes.into_inner().unwrap_or_default()
}

/// How often a case may have the machine for itself.
const TRIES_ALONE: usize = 3;

/// Cases that failed beside others get the machine for themselves: several of them measure time, which a busy machine
/// stretches. What fails each time has failed; what passes at last is named, with what was wrong before.
fn again(root: &Path, judged: Judged) -> Result<Vec<Outcome>> {
    let failing = |outcomes: &[Outcome]| outcomes.iter().any(|o| !o.wrong.is_empty());
    let mut all = Vec::new();
    for (file, mut outcomes) in judged {
        for number in 1..=TRIES_ALONE {
            if !failing(&outcomes) {
                break;
            }
            // Fresh folders: a second run must not find the first one's logs.
            let Some(world) = World::from_environment(root)? else { break };
            let next = judge(&world, &root.join("cases"), &file);
            world.clean();
            if !failing(&next) {
                println!("passed only alone, try {number}; before that:");
                complain("wrong", &outcomes);
            }
            outcomes = next;
        }
        all.extend(outcomes);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Prints what was wrong; how many cases had something. `FAILED` is for what fails the run: readers of its log look for that.
fn complain(word: &str, outcomes: &[Outcome]) -> usize {
    let failed = outcomes.iter().filter(|o| !o.wrong.is_empty());
    failed
        .inspect(|outcome| {
            println!("{word} {}", outcome.name);
            for line in &outcome.wrong {
                println!("  {line}");
            }
        })
        .count()
}

fn judge(world: &World, root: &Path, file: &Path) -> Vec<Outcome> {
    let fail = |error: String| {
        let name = file.strip_prefix(root).unwrap_or(file).with_extension("").display().to_string();
        vec![Outcome { name, wrong: vec![error], diverges: false, shown: None }]
    };
    let case = match Case::load(root, file) {
        Ok(case) => case,
        Err(error) => return fail(error.to_string()),
    };
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => tokio::task::LocalSet::new().block_on(&runtime, world.judge(&case)),
        Err(error) => fail(error.to_string()),
    }
}

fn report(outcomes: &[Outcome], started: Instant) -> usize {
    for outcome in outcomes {
        if let Some(shown) = &outcome.shown {
            println!("=== {}\n{shown}", outcome.name);
        }
    }
    let diverging = outcomes.iter().filter(|o| o.diverges).count();
    println!("{diverging} diverge as they are marked (docs/divergences.md)");
    let failed = complain("FAILED", outcomes);
    println!(
        "{} passed, {} failed in {:.1} s",
        outcomes.len() - failed,
        failed,
        started.elapsed().as_secs_f32()
    );
    failed
}
