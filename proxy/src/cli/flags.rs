//! The table of flags.

use std::fmt::Write as _;
use std::time::Duration;

use sampan_core::log::Level;

use super::{CliError, DrainStrategy, Mode, Options};

/// What a flag does.
pub(super) enum Action {
    Switch(fn(&mut Options)),
    Text(fn(&mut Options, String)),
    /// A text that is not any text.
    Checked(fn(&mut Options, String) -> Result<(), CliError>),
    Number(fn(&mut Options, u32)),
    /// Known and without effect; the flag says whether a value follows.
    NoEffect(bool, &'static str),
}

/// A flag.
pub(super) struct Flag {
    pub(super) name: &'static str,
    pub(super) short: Option<&'static str>,
    pub(super) action: Action,
    help: &'static str,
    pub(super) repeated: bool,
}

const fn flag(name: &'static str, action: Action, help: &'static str) -> Flag {
    Flag { name, short: None, action, help, repeated: false }
}

const DROPPED: &str = "no longer has an effect in Envoy 1.40";
const NOT_HERE: &str = "has no effect in Sampan";

pub(super) static FLAGS: &[Flag] = &[
    Flag {
        short: Some("-c"),
        ..flag(
            "config-path",
            Action::Text(|o, v| o.config_path = Some(v.into())),
            "Path to the bootstrap: .yaml, .yml, .json, .pb or .pb_text",
        )
    },
    flag("config-yaml", Action::Text(|o, v| o.config_yaml = Some(v)), "Inline YAML, merged over the file"),
    flag("mode", Action::Checked(set_mode), "serve (default), validate or init_only"),
    flag(
        "concurrency",
        Action::Number(|o, n| o.concurrency = Some(n)),
        "Number of worker threads; default: one per hardware thread",
    ),
    flag("service-cluster", Action::Text(|o, v| o.service_cluster = v), "Cluster name of this node"),
    flag("service-node", Action::Text(|o, v| o.service_node = v), "Id of this node"),
    flag("service-zone", Action::Text(|o, v| o.service_zone = v), "Zone of this node"),
    Flag {
        short: Some("-l"),
        ..flag(
            "log-level",
            Action::Checked(set_log_level),
            "trace, debug, info, warning|warn, error, critical, off",
        )
    },
    flag("component-log-level", Action::Text(|o, v| o.component_log_level = v), "component:level,..."),
    flag(
        "log-format",
        Action::Text(|o, v| o.log_format = Some(v)),
        "Pattern of log lines, in spdlog's syntax",
    ),
    flag("log-format-escaped", Action::Switch(|o| o.log_format_escaped = true), "Escape control characters"),
    flag("log-path", Action::Text(|o, v| o.log_path = Some(v.into())), "Log to this file instead of stderr"),
    flag(
        "drain-time-s",
        Action::Number(|o, n| o.drain_time = Duration::from_secs(n.into())),
        "Seconds that a drain may take",
    ),
    flag("drain-strategy", Action::Checked(set_drain_strategy), "gradual (default) or immediate"),
    flag(
        "parent-shutdown-time-s",
        Action::Number(|o, n| o.parent_shutdown_time = Duration::from_secs(n.into())),
        "Seconds until a drained process ends",
    ),
    flag("restart-epoch", Action::Number(|o, n| o.restart_epoch = n), "Hot restart epoch; only 0 so far"),
    flag("base-id", Action::Number(|o, n| o.base_id = n), "Tells several proxies of one host apart"),
    flag(
        "base-id-path",
        Action::Text(|o, v| o.base_id_path = Some(v.into())),
        "File to which the base id is written",
    ),
    flag("use-dynamic-base-id", Action::NoEffect(false, NOT_HERE), "Nothing is shared by base id"),
    flag("disable-hot-restart", Action::Switch(|_| ()), "Hot restart is off"),
    flag(
        "local-address-ip-version",
        Action::Checked(|_, v| match v.as_str() {
            "v4" | "v6" => Ok(()),
            _ => Err(CliError::Invalid(format!("unknown IP address version '{v}'"))),
        }),
        "v4 or v6",
    ),
    flag(
        "file-flush-interval-msec",
        Action::Number(|o, n| o.file_flush_interval = Duration::from_millis(n.into())),
        "Milliseconds between flushes of access logs",
    ),
    flag(
        "file-flush-min-size-kb",
        Action::Number(|o, n| o.file_flush_min_size = n as usize * 1024),
        "Size at which an access log is flushed",
    ),
    flag(
        "admin-address-path",
        Action::Text(|o, v| o.admin_address_path = Some(v.into())),
        "File to which the admin address is written",
    ),
    flag(
        "allow-unknown-static-fields",
        Action::Switch(|o| o.allow_unknown_static = true),
        "Unknown fields of the bootstrap are no error",
    ),
    flag("allow-unknown-fields", Action::Switch(|o| o.allow_unknown_static = true), "The same, deprecated"),
    flag(
        "reject-unknown-dynamic-fields",
        Action::Switch(|o| o.reject_unknown_dynamic = true),
        "Unknown fields of xDS resources are an error",
    ),
    flag(
        "ignore-unknown-dynamic-fields",
        Action::Switch(|o| o.ignore_unknown_dynamic = true),
        "Unknown fields of xDS resources are not even counted",
    ),
    flag(
        "skip-deprecated-logs",
        Action::Switch(|o| o.skip_deprecated_logs = true),
        "No warnings about deprecated fields",
    ),
    Flag {
        repeated: true,
        ..flag("stats-tag", Action::Checked(add_stats_tag), "tag:value for all stats; may be repeated")
    },
    flag(
        "last-good-config-path",
        Action::Text(|o, v| o.last_good_config_path = Some(v.into())),
        "File that keeps what control planes gave and serves at a start without them (Sampan's own)",
    ),
    flag("cpuset-threads", Action::Switch(|o| o.cpuset_threads = true), "Count workers from the cpuset"),
    flag("enable-fine-grain-logging", Action::NoEffect(false, NOT_HERE), "Logging per file"),
    flag("log-stacktrace-single-entry", Action::NoEffect(false, NOT_HERE), "Form of stack traces"),
    flag("enable-mutex-tracing", Action::NoEffect(false, NOT_HERE), "Mutex contention"),
    flag("enable-core-dump", Action::NoEffect(false, NOT_HERE), "Core dumps"),
    flag("disable-extensions", Action::NoEffect(true, NOT_HERE), "Extensions to leave out"),
    flag("socket-path", Action::NoEffect(true, NOT_HERE), "Hot restart socket"),
    flag("socket-mode", Action::NoEffect(true, NOT_HERE), "Hot restart socket's mode"),
    flag("skip-hot-restart-on-no-parent", Action::NoEffect(false, NOT_HERE), "Hot restart"),
    flag("skip-hot-restart-parent-stats", Action::NoEffect(false, NOT_HERE), "Hot restart"),
    flag("v2-config-only", Action::NoEffect(false, DROPPED), "Dropped"),
    flag("allow-deprecated-v2-api", Action::NoEffect(false, DROPPED), "Dropped"),
    flag("bootstrap-version", Action::NoEffect(true, DROPPED), "Dropped"),
    flag("log-format-prefix-with-location", Action::NoEffect(true, DROPPED), "Dropped"),
    flag("max-obj-name-len", Action::NoEffect(true, DROPPED), "Dropped"),
    flag("max-stats", Action::NoEffect(true, DROPPED), "Dropped"),
    flag("use-fake-symbol-table", Action::NoEffect(true, DROPPED), "Dropped"),
    flag("use-libevent-buffers", Action::NoEffect(true, DROPPED), "Dropped"),
];

/// The text of `--help`.
pub(super) fn help() -> String {
    let mut text =
        "USAGE:\n   sampan [flags]       without flags: a demonstration mesh\n\nFlags:\n".to_owned();
    for flag in FLAGS {
        let value = match flag.action {
            Action::Switch(_) | Action::NoEffect(false, _) => "",
            Action::Text(_) | Action::Checked(_) | Action::NoEffect(true, _) => " <string>",
            Action::Number(_) => " <uint32_t>",
        };
        let short = flag.short.map(|s| format!("{s}, ")).unwrap_or_default();
        // Writing to a String does not fail.
        let _ = writeln!(text, "   {short}--{}{value}\n     {}", flag.name, flag.help);
    }
    text.push_str("   --version\n   --hot-restart-version\n   -h, --help");
    text
}

fn set_mode(o: &mut Options, v: String) -> Result<(), CliError> {
    o.mode = match v.as_str() {
        "serve" => Mode::Serve,
        "validate" => Mode::Validate,
        "init_only" => Mode::InitOnly,
        _ => return Err(CliError::Invalid(format!("unknown mode '{v}'"))),
    };
    Ok(())
}

fn set_log_level(o: &mut Options, v: String) -> Result<(), CliError> {
    if Level::parse(&v).is_none() {
        return Err(CliError::Invalid(format!("invalid log level specified '{v}'")));
    }
    o.log_level = v;
    Ok(())
}

fn set_drain_strategy(o: &mut Options, v: String) -> Result<(), CliError> {
    o.drain_strategy = match v.as_str() {
        "gradual" => DrainStrategy::Gradual,
        "immediate" => DrainStrategy::Immediate,
        _ => return Err(CliError::Invalid(format!("unknown drain-strategy '{v}'"))),
    };
    Ok(())
}

fn add_stats_tag(o: &mut Options, v: String) -> Result<(), CliError> {
    let Some((tag, value)) = v.split_once(':') else {
        return Err(CliError::Invalid(format!("misformatted stats-tag '{v}'")));
    };
    let name_ok = !tag.is_empty() && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !name_ok || value.contains('.') {
        return Err(CliError::Invalid(format!("misformatted stats-tag '{v}' contains invalid characters")));
    }
    o.stats_tags.push((tag.to_owned(), value.to_owned()));
    Ok(())
}
