//! Scores Envoy and Sampan against the RFCs: raw HTTP/1 rows and h2spec. Sampan must fail nothing that Envoy passes.

#![allow(clippy::print_stdout, reason = "a test program reports on stdout")]

use std::path::Path;
use std::process::ExitCode;

use sampan_tests::conformance::{Score, http1, http2};
use sampan_tests::error::{Context, Result};
use sampan_tests::run::World;

fn main() -> ExitCode {
    match run(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAILED {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(root: &Path) -> Result<bool> {
    let Some(world) = World::from_environment(root)? else { return Ok(false) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().trying("start a runtime")?;
    let good = tokio::task::LocalSet::new().block_on(&runtime, both(&world, root))?;
    world.clean();
    Ok(good)
}

async fn both(world: &World, root: &Path) -> Result<bool> {
    let rows = root.join("conformance/http1.yaml");
    let envoy = http1(world, &world.envoy, &rows).await?;
    let sampan = match &world.sampan {
        Some(sampan) => Some(http1(world, sampan, &rows).await?),
        None => None,
    };
    let mut good = report("HTTP/1", &envoy, sampan.as_ref());
    let h2spec = root.join("../target/oracle/h2spec");
    if h2spec.exists() {
        let envoy = http2(world, &world.envoy, &h2spec).await?;
        let sampan = match &world.sampan {
            Some(sampan) => Some(http2(world, sampan, &h2spec).await?),
            None => None,
        };
        good &= report("h2spec", &envoy, sampan.as_ref());
    } else {
        println!("h2spec: skipped, tests/setup has not built it");
    }
    Ok(good)
}

/// Prints the scores; false when Sampan fails what Envoy passes.
fn report(what: &str, envoy: &Score, sampan: Option<&Score>) -> bool {
    println!("{what}: envoy {}/{}", envoy.passed, envoy.total);
    if std::env::var_os("SHOW").is_some() {
        envoy.failed.iter().for_each(|(name, seen)| println!("  missed: {name}: {seen}"));
    }
    let Some(sampan) = sampan else { return true };
    println!("{what}: sampan {}/{}", sampan.passed, sampan.total);
    let mut good = sampan.total == envoy.total;
    for (name, seen) in &sampan.failed {
        let worse = !envoy.failed.iter().any(|(n, _)| n == name);
        let word = if worse { "FAILED, and Envoy passes it" } else { "missed" };
        println!("  {word}: {name}: {seen}");
        good &= !worse;
    }
    good
}
