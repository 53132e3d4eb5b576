//! The whole run: every selected case with every subject, metric by metric, into a [`Report`].

use std::{
    io::{Write as _, stderr},
    time::Duration,
};

use crate::{
    args::Args,
    case::{CASES, Case, rows},
    config::{self, Front},
    error::Result,
    lab::Lab,
    measure::{callgrind, cpu, memory, start, strace},
    process,
    report::{Metric, Report, Value},
    subject::{Kind, Subject},
    xds,
};

/// Clusters and virtual hosts of the large start.
const SERVICES: usize = 2000;

/// Measures all that the arguments select. A subject that fails is part of the report; an error is the harness's own.
pub async fn run(args: &Args) -> Result<Report> {
    process::raise_file_limit()?;
    process::pin_self(process::HARNESS_CORE)?;
    let mut report = Report::new(settings(args));
    let subjects = find(args, &mut report);
    let lab = Lab::new(args.keep).await?;
    if args.keep {
        progress(&format!("scratch directory {}", lab.dir().display()));
    }
    for case in CASES.iter().filter(|case| args.selects(case.name)) {
        traffic(args, &lab, &subjects, case, &mut report).await?;
    }
    if args.wants(Metric::Memory) && args.selects("memory") {
        connections(args, &lab, &subjects, &mut report).await;
    }
    for (name, front) in [(rows::START, Front::Http1), (rows::START_2000, Front::Services(SERVICES))] {
        let memory_too = name == rows::START_2000 && args.wants(Metric::Memory);
        if args.selects(name) && (args.wants(Metric::Start) || memory_too) {
            starts(args, &lab, &subjects, name, front, &mut report);
        }
    }
    if args.wants(Metric::Xds) {
        xds::run(args, &lab, &subjects, &mut report, progress).await;
    }
    Ok(report)
}

fn settings(args: &Args) -> String {
    let quick = if args.quick { " Quick run: fewer requests, not for comparison." } else { "" };
    format!(
        "Proxy with one worker on core {}, client and backend on core {}; {} interleaved rounds for CPU time.{quick}",
        process::PROXY_CORE,
        process::HARNESS_CORE,
        args.cpu_rounds()
    )
}

fn progress(what: &str) {
    let _ = writeln!(stderr(), "… {what}");
}

fn find(args: &Args, report: &mut Report) -> Vec<Subject> {
    let mut subjects = Vec::new();
    for kind in args.kinds() {
        let variable = if kind == Kind::Envoy { std::env::var_os("ENVOY").map(Into::into) } else { None };
        let given = args.paths.get(&kind).cloned().or(variable);
        match Subject::find(kind, given.as_deref()) {
            Ok(subject) => {
                report.present(&subject);
                subjects.push(subject);
            }
            Err(why) => {
                progress(&format!("{} is missing: {why}", kind.name()));
                report.missing(kind, why);
            }
        }
    }
    subjects
}

/// One case: CPU for all subjects together, then the traced figures one by one.
async fn traffic(
    args: &Args,
    lab: &Lab,
    subjects: &[Subject],
    case: &Case,
    report: &mut Report,
) -> Result<()> {
    let mut able = Vec::new();
    let probe = lab.setup(case.front, case.upstream)?;
    for subject in subjects {
        match config::write(subject.kind, &probe) {
            Ok(_) => able.push(subject),
            Err(why) => {
                for metric in [Metric::Cpu, Metric::Instructions, Metric::Syscalls] {
                    if args.wants(metric) {
                        report.cannot(metric, case.name, case.unit, subject.kind, why);
                    }
                }
            }
        }
    }
    if args.wants(Metric::Cpu) {
        progress(&format!("{}: CPU", case.name));
        let requests = if args.quick { case.requests / 5 } else { case.requests };
        for (kind, value) in cpu::measure(lab, &able, case, args.cpu_rounds(), requests).await {
            report.record(Metric::Cpu, case.name, case.unit, kind, value);
        }
    }
    let traced = if args.quick { case.traced / 2 } else { case.traced };
    for subject in able {
        if args.wants(Metric::Instructions) {
            progress(&format!("{}: instructions of {}", case.name, subject.kind.name()));
            let value = callgrind::measure(lab, subject, case, traced).await;
            report.record(Metric::Instructions, case.name, case.unit, subject.kind, value);
        }
        if args.wants(Metric::Syscalls) {
            progress(&format!("{}: system calls of {}", case.name, subject.kind.name()));
            let value = strace::measure(lab, subject, case, traced).await;
            report.record(Metric::Syscalls, case.name, case.unit, subject.kind, value);
        }
    }
    Ok(())
}

async fn connections(args: &Args, lab: &Lab, subjects: &[Subject], report: &mut Report) {
    let rest = Duration::from_secs(if args.quick { 3 } else { 15 });
    for subject in subjects {
        progress(&format!("memory of {}", subject.kind.name()));
        let mut record = |case, unit, value| report.record(Metric::Memory, case, unit, subject.kind, value);
        match memory::measure(lab, subject, rest).await {
            Ok(memory) => {
                record(rows::IDLE, "MiB", Ok(Value::plain(memory.idle)));
                record(rows::PER_CONNECTION_2000, "KiB each", Ok(Value::plain(memory.per_connection_2000)));
                record(rows::PER_CONNECTION_5000, "KiB each", Ok(Value::plain(memory.per_connection_5000)));
                record(rows::CLOSED, "MiB", Ok(Value::plain(memory.closed)));
            }
            Err(error) => record(rows::IDLE, "MiB", Err(error)),
        }
    }
}

fn starts(
    args: &Args,
    lab: &Lab,
    subjects: &[Subject],
    name: &'static str,
    front: Front,
    report: &mut Report,
) {
    progress(name);
    let times = match (front, args.quick) {
        (Front::Services(_), true) => 1,
        (Front::Services(_), false) | (_, true) => 5,
        (_, false) => 11,
    };
    let all: Vec<&Subject> = subjects.iter().collect();
    for (kind, figures) in start::measure(lab, &all, front, times) {
        match figures {
            Ok((time, memory)) => {
                if args.wants(Metric::Start) {
                    report.record(Metric::Start, name, "ms", kind, Ok(time));
                }
                // The small set-up's memory comes with the connections.
                if name == rows::START_2000 && args.wants(Metric::Memory) {
                    report.record(Metric::Memory, rows::IDLE_2000, "MiB", kind, Ok(memory));
                }
            }
            Err(error) => report.record(Metric::Start, name, "ms", kind, Err(error)),
        }
    }
}
