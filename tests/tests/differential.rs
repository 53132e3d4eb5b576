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
            println!("{error}");
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
    // Fresh folders: a second run of a case must not find the first one's logs.
    world.clean();
    let Some(world) = World::from_environment(root)? else { return Ok(1) };
    let outcomes = again(&world, &root.join("cases"), judged);
    let failed = report(&outcomes, started);
    world.clean();
    Ok(failed)
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

/// Cases that failed beside others get the machine for themselves once: several of them measure time, which a busy
/// machine stretches. What fails alone too has failed; what passes then is named.
fn again(world: &World, root: &Path, judged: Judged) -> Vec<Outcome> {
    let failing = |outcomes: &[Outcome]| outcomes.iter().any(|o| !o.wrong.is_empty());
    let mut all = Vec::new();
    for (file, outcomes) in judged {
        if !failing(&outcomes) {
            all.extend(outcomes);
            continue;
        }
        let second = judge(world, root, &file);
        if !failing(&second) {
            println!("passed only when run alone: {}", file.strip_prefix(root).unwrap_or(&file).display());
        }
        all.extend(second);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
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
    let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.wrong.is_empty()).collect();
    for outcome in &failed {
        println!("FAILED {}", outcome.name);
        for line in &outcome.wrong {
            println!("  {line}");
        }
    }
    let diverging: Vec<&str> = outcomes.iter().filter(|o| o.diverges).map(|o| o.name.as_str()).collect();
    if !diverging.is_empty() {
        println!("known divergences: {}", diverging.join(", "));
    }
    println!(
        "{} passed, {} failed in {:.1} s",
        outcomes.len() - failed.len(),
        failed.len(),
        started.elapsed().as_secs_f32()
    );
    failed.len()
}
