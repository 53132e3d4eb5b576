//! Sampan: an Envoy-compatible L7 data plane.
//!
//! The program: command line ([`cli`]), [`mod@check`] of configuration alone, bootstrap to models ([`boot`]), threads ([`server`], [`worker`]), listeners ([`listeners`]), own stats ([`stats`]), what the admin interface shows ([`view`]), what changes while serving ([`xds`]), and the demonstration that runs without arguments ([`demo`]).

#![allow(clippy::disallowed_methods, reason = "nearly all here runs on the control thread")]

mod boot;
mod check;
mod cli;
mod demo;
mod listeners;
mod load_report;
mod logging;
mod overload;
mod server;
mod stats;
mod unsupported;
mod view;
mod worker;
mod xds;

use std::io::Write as _;
use std::process::ExitCode;

use cli::{Command, Mode, Options};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.is_empty() {
        return demo::run();
    }
    if arguments.first().is_some_and(|first| first == "check") {
        return check::main(&arguments[1..]);
    }
    match cli::parse(arguments) {
        Ok(Command::Print(text)) => {
            say(&text);
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => run(&options),
        Err(error) => {
            complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> ExitCode {
    if let Err(error) = logging::start(options) {
        complain(&format!("error: {error}"));
        return ExitCode::FAILURE;
    }
    let done = match options.mode {
        Mode::Validate => server::validate(options).map(|()| {
            let path = options.config_path.as_deref().unwrap_or_else(|| "".as_ref());
            say(&format!("configuration '{}' OK", path.display()));
        }),
        Mode::Serve | Mode::InitOnly => server::run(options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::critical(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints to standard output; a closed pipe is nobody's error.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
