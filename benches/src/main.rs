//! `cargo run --release -p sampan-benches`: see [`sampan_benches::args::HELP`].

use std::{
    fs,
    io::{self, Write as _},
    process::ExitCode,
};

use sampan_benches::{
    args::{Args, HELP},
    case::{CASES, rows},
    error::{BenchError, Result},
    run,
};

/// Exit status: 0, 1 when `--check` finds something, 2 when the run could not be made.
fn main() -> ExitCode {
    match bench() {
        Ok(complaints) if complaints.is_empty() => ExitCode::SUCCESS,
        Ok(complaints) => {
            let _ = writeln!(io::stderr(), "check failed:\n- {}", complaints.join("\n- "));
            ExitCode::from(1)
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "sampan-benches: {error}");
            ExitCode::from(2)
        }
    }
}

fn bench() -> Result<Vec<String>> {
    let args = Args::parse(std::env::args_os().skip(1))?;
    if args.help || args.list {
        let names: Vec<&str> = CASES.iter().map(|case| case.name).chain(rows::GROUPS).collect();
        let list = names.join("\n") + "\n";
        return print(if args.help { HELP } else { &list }).map(|()| Vec::new());
    }
    // One thread: the client and the backend share core 0, and a fork must happen on the thread that is bound.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BenchError::io("runtime"))?;
    let report = runtime.block_on(run::run(&args))?;
    print(&report.markdown())?;
    if let Some(path) = &args.json {
        fs::write(path, report.json()?).map_err(BenchError::io("--json"))?;
    }
    Ok(if args.check { report.complaints() } else { Vec::new() })
}

fn print(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).map_err(BenchError::io("stdout"))
}
