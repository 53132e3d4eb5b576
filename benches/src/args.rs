//! The command line.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf};

use crate::{
    case::CASES,
    error::{BenchError, Result},
    report::Metric,
    subject::Kind,
};

/// What `--help` prints.
pub const HELP: &str = "\
Measures Sampan beside Envoy, HAProxy and nginx: CPU, instructions, system calls, memory, start.

cargo run --release -p sampan-benches -- [FILTER…] [OPTIONS]

  FILTER              only rows whose name contains it (see --list)
  --quick             a fifth of the requests, three rounds: for development, not for the README
  --rounds N          CPU rounds per case (7; quick: 3)
  --only M,…          cpu, instructions, syscalls, memory, start, xds
  --subjects S,…      envoy, sampan, haproxy, nginx
  --sampan PATH       default: beside this program (cargo build --release)
  --envoy PATH, --haproxy PATH, --nginx PATH   default: the name in PATH; for Envoy also the variable ENVOY
  --json FILE         all figures with their rounds and calls
  --check             exit status 1 if Sampan misses a target or could not be measured
  --keep              leave configurations, logs and profiles in the scratch directory
  --list              the rows
";

/// Parsed arguments.
#[derive(Debug, Default, PartialEq)]
pub struct Args {
    /// Parts of row names; none means all.
    pub filters: Vec<String>,
    /// Less of everything.
    pub quick: bool,
    /// Explicit count of CPU rounds.
    pub rounds: Option<usize>,
    /// Metrics; none means all.
    pub only: Vec<Metric>,
    /// Subjects; none means all.
    pub subjects: Vec<Kind>,
    /// Given binaries.
    pub paths: BTreeMap<Kind, PathBuf>,
    /// Where the JSON goes.
    pub json: Option<PathBuf>,
    /// Judge by exit status.
    pub check: bool,
    /// Keep the scratch directory.
    pub keep: bool,
    /// Print the rows and end.
    pub list: bool,
    /// Print [`HELP`] and end.
    pub help: bool,
}

impl Args {
    /// Reads the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let mut parsed = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let arg =
                arg.into_string().map_err(|a| BenchError::Usage(format!("not text: {}", a.display())))?;
            let mut value = || args.next().ok_or_else(|| BenchError::Usage(format!("{arg} needs a value")));
            match arg.as_str() {
                "--quick" => parsed.quick = true,
                "--check" => parsed.check = true,
                "--keep" => parsed.keep = true,
                "--list" => parsed.list = true,
                "--help" | "-h" => parsed.help = true,
                "--rounds" => {
                    let text = value()?.to_string_lossy().into_owned();
                    let rounds = text.parse().ok().filter(|&n: &usize| n > 0);
                    parsed.rounds =
                        Some(rounds.ok_or_else(|| {
                            BenchError::Usage(format!("--rounds {text}: a count, at least 1"))
                        })?);
                }
                "--only" => parsed.only = names(&arg, &value()?, Metric::from_name)?,
                "--subjects" => parsed.subjects = names(&arg, &value()?, Kind::from_name)?,
                "--json" => parsed.json = Some(value()?.into()),
                _ if arg.starts_with('-') => {
                    let kind = arg
                        .strip_prefix("--")
                        .and_then(Kind::from_name)
                        .ok_or_else(|| BenchError::Usage(format!("unknown option {arg}; see --help")))?;
                    parsed.paths.insert(kind, value()?.into());
                }
                _ => parsed.filters.push(arg),
            }
        }
        // A filter that selects nothing is a typing error, not an empty table.
        for filter in &parsed.filters {
            let known = CASES.iter().map(|c| c.name).chain(crate::case::rows::GROUPS);
            if !known.into_iter().any(|name| name.contains(filter.as_str())) {
                return Err(BenchError::Usage(format!("no row matches {filter:?}; see --list")));
            }
        }
        Ok(parsed)
    }

    /// Whether the filters select this row.
    #[must_use]
    pub fn selects(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()))
    }

    /// Whether this metric is wanted.
    #[must_use]
    pub fn wants(&self, metric: Metric) -> bool {
        self.only.is_empty() || self.only.contains(&metric)
    }

    /// The wanted subjects, Envoy first.
    #[must_use]
    pub fn kinds(&self) -> Vec<Kind> {
        Kind::ALL
            .into_iter()
            .filter(|kind| self.subjects.is_empty() || self.subjects.contains(kind))
            .collect()
    }

    /// CPU rounds per case.
    #[must_use]
    pub fn cpu_rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 3 } else { 7 })
    }
}

fn names<T>(option: &str, list: &OsString, from: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
    let list = list.to_string_lossy();
    list.split(',')
        .map(|name| from(name.trim()).ok_or_else(|| BenchError::Usage(format!("{option}: unknown {name:?}"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_full_line() {
        let args = parse("h1 --quick --only cpu,memory --subjects sampan,envoy --sampan /s --json o --check")
            .unwrap();
        assert!(args.quick && args.check && args.selects("h1-1k") && !args.selects("h2-h2"));
        assert!(args.wants(Metric::Memory) && !args.wants(Metric::Start));
        assert_eq!(args.kinds(), [Kind::Envoy, Kind::Sampan]);
        assert_eq!(args.paths[&Kind::Sampan], PathBuf::from("/s"));
        assert_eq!(args.cpu_rounds(), 3);
    }

    #[test]
    fn nothing_means_all() {
        let args = parse("").unwrap();
        assert_eq!(args.kinds(), Kind::ALL);
        assert!(args.selects("anything") && args.wants(Metric::Syscalls));
    }

    #[test]
    fn mistakes_are_named() {
        for line in ["--fast", "--rounds 0", "--rounds", "--only time", "--subjects apache", "nosuchcase"] {
            assert!(matches!(parse(line), Err(BenchError::Usage(_))), "{line}");
        }
    }
}
