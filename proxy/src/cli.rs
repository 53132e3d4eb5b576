//! The command line: Envoy's flags, one table ([`flags`]).
//!
//! `--flag value`, and `--flag=value` beside it. What older Envoys had and 1.40 dropped is accepted with a warning;
//! anything else is an error.

mod flags;

use std::path::PathBuf;
use std::time::Duration;

use sampan_config::UnknownFields;
use thiserror::Error;

use flags::{Action, FLAGS, help};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Serve.
    #[default]
    Serve,
    /// Check the configuration and exit.
    Validate,
    /// Initialise everything and exit.
    InitOnly,
}

/// `--drain-strategy`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DrainStrategy {
    /// Ever more connections over the drain time.
    #[default]
    Gradual,
    /// All at once.
    Immediate,
}

/// The parsed command line.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "one field a flag; the flags' help stands in the table of flags")]
pub struct Options {
    pub config_path: Option<PathBuf>,
    pub config_yaml: Option<String>,
    pub mode: Mode,
    pub concurrency: Option<u32>,
    pub service_cluster: String,
    pub service_node: String,
    pub service_zone: String,
    pub log_level: String,
    pub component_log_level: String,
    pub log_format: Option<String>,
    pub log_format_escaped: bool,
    pub log_path: Option<PathBuf>,
    pub drain_time: Duration,
    pub drain_strategy: DrainStrategy,
    pub parent_shutdown_time: Duration,
    pub restart_epoch: u32,
    pub base_id: u32,
    pub base_id_path: Option<PathBuf>,
    pub file_flush_interval: Duration,
    pub file_flush_min_size: usize,
    pub admin_address_path: Option<PathBuf>,
    pub allow_unknown_static: bool,
    pub reject_unknown_dynamic: bool,
    pub ignore_unknown_dynamic: bool,
    pub skip_deprecated_logs: bool,
    pub stats_tags: Vec<(String, String)>,
    pub cpuset_threads: bool,
    pub last_good_config_path: Option<PathBuf>,
    /// Flags that were given and have no effect; each becomes a warning in the log.
    pub without_effect: Vec<String>,
}

impl Options {
    /// Over what time clients are asked to go where a listener drains; none: all at once.
    pub fn ramp(&self) -> Option<Duration> {
        (self.drain_strategy == DrainStrategy::Gradual).then_some(self.drain_time)
    }

    /// What becomes of fields that a resource's message does not have.
    pub fn unknown_dynamic(&self) -> UnknownFields {
        match (self.reject_unknown_dynamic, self.ignore_unknown_dynamic) {
            (true, _) => UnknownFields::Reject,
            (false, true) => UnknownFields::Ignore,
            (false, false) => UnknownFields::Warn,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config_path: None,
            config_yaml: None,
            mode: Mode::Serve,
            concurrency: None,
            service_cluster: String::new(),
            service_node: String::new(),
            service_zone: String::new(),
            log_level: "info".to_owned(),
            component_log_level: String::new(),
            log_format: None,
            log_format_escaped: false,
            log_path: None,
            drain_time: Duration::from_secs(600),
            drain_strategy: DrainStrategy::Gradual,
            parent_shutdown_time: Duration::from_secs(900),
            restart_epoch: 0,
            base_id: 0,
            base_id_path: None,
            file_flush_interval: Duration::from_secs(10),
            file_flush_min_size: 64 * 1024,
            admin_address_path: None,
            allow_unknown_static: false,
            reject_unknown_dynamic: false,
            ignore_unknown_dynamic: false,
            skip_deprecated_logs: false,
            stats_tags: Vec::new(),
            cpuset_threads: false,
            last_good_config_path: None,
            without_effect: Vec::new(),
        }
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// Run with these options.
    Run(Box<Options>),
    /// Print this and exit with success.
    Print(String),
}

/// A command line that is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CliError {
    /// An unknown flag or a stray argument.
    #[error("PARSE ERROR: Argument: {0}\n             Couldn't find match for argument")]
    Unknown(String),
    /// A flag without its value.
    #[error("PARSE ERROR: Argument: --{0}\n             Missing a value for this argument!")]
    MissingValue(&'static str),
    /// A flag given twice.
    #[error("PARSE ERROR: Argument: (--{0})\n             Argument already set!")]
    Twice(&'static str),
    /// A value of the wrong kind.
    #[error(
        "PARSE ERROR: Argument: (--{flag})\n             Couldn't read argument value from string '{value}'"
    )]
    BadValue {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
    /// A value out of its range.
    #[error("error: {0}")]
    Invalid(String),
}

/// Parses the arguments behind the program's name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, CliError> {
    let mut options = Options::default();
    let mut seen = Vec::new();
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--version" => return Ok(Command::Print(version())),
            "-h" | "--help" => return Ok(Command::Print(help())),
            "--hot-restart-version" => return Ok(Command::Print("disabled".to_owned())),
            "--" | "--ignore_rest" => break,
            _ => {}
        }
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (argument.as_str(), None),
        };
        // One dash is enough for a long name too: so stand they in manuals of meshes for VMs.
        let long = name.strip_prefix("--").or_else(|| name.strip_prefix('-'));
        let found = FLAGS.iter().find(|f| long == Some(f.name) || f.short == Some(name));
        let Some(flag) = found else { return Err(CliError::Unknown(argument)) };
        if !flag.repeated && seen.contains(&flag.name) {
            return Err(CliError::Twice(flag.name));
        }
        seen.push(flag.name);
        let mut value = || inline.clone().or_else(|| rest.next()).ok_or(CliError::MissingValue(flag.name));
        match &flag.action {
            Action::Switch(_) | Action::NoEffect(false, _) if inline.is_some() => {
                return Err(CliError::Unknown(argument));
            }
            Action::Switch(set) => set(&mut options),
            Action::Text(set) => set(&mut options, value()?),
            Action::Checked(set) => set(&mut options, value()?)?,
            Action::Number(set) => {
                let value = value()?;
                let number = value.parse().map_err(|_| CliError::BadValue { flag: flag.name, value })?;
                set(&mut options, number);
            }
            Action::NoEffect(takes_value, why) => {
                if *takes_value {
                    value()?;
                }
                options.without_effect.push(format!("--{} {why}", flag.name));
            }
        }
    }
    if options.restart_epoch > 0 {
        return Err(CliError::Invalid(
            "--restart-epoch > 0 needs hot restart, which is not supported yet".to_owned(),
        ));
    }
    Ok(Command::Run(Box::new(options)))
}

/// The text of `--version`.
pub fn version() -> String {
    format!("sampan  version: {}/{}/Clean/RELEASE/rustls", env!("CARGO_PKG_VERSION"), "1.40.0-compatible")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options, CliError> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Command::Run(options) => Ok(*options),
            Command::Print(text) => panic!("printed {text}"),
        }
    }

    #[test]
    fn takes_what_pilot_agent_passes() {
        let o = options(
            "-c etc/istio/proxy/envoy-rev0.json -restart-epoch 0 --drain-time-s 45 --drain-strategy immediate \
             --local-address-ip-version v4 --file-flush-interval-msec 1000 --disable-hot-restart \
             --allow-unknown-static-fields -l warning --skip-deprecated-logs --concurrency 2 \
             --component-log-level misc:error --parent-shutdown-time-s 60 --bootstrap-version 3 --max-obj-name-len 189",
        )
        .unwrap();
        assert_eq!(o.drain_time, Duration::from_secs(45));
        assert_eq!(o.drain_strategy, DrainStrategy::Immediate);
        assert_eq!(o.concurrency, Some(2));
        assert!(o.allow_unknown_static);
        assert_eq!(o.without_effect.len(), 2);
    }

    #[test]
    fn refuses_what_envoy_refuses() {
        assert_eq!(options("--bogus").unwrap_err(), CliError::Unknown("--bogus".into()));
        assert_eq!(options("--base-id 1 --base-id 2").unwrap_err(), CliError::Twice("base-id"));
        assert_eq!(options("-c").unwrap_err(), CliError::MissingValue("config-path"));
        assert!(matches!(options("--concurrency abc"), Err(CliError::BadValue { .. })));
        assert_eq!(options("--mode x").unwrap_err().to_string(), "error: unknown mode 'x'");
        assert_eq!(options("-l x").unwrap_err().to_string(), "error: invalid log level specified 'x'");
    }

    #[test]
    fn equals_signs_work_too() {
        assert_eq!(options("--concurrency=3").unwrap().concurrency, Some(3));
    }
}
