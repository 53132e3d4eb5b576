//! The proxy's own log: Envoy's component names, levels and `--log-format` patterns.
//!
//! A level per component sits in an atomic, so a line that is not wanted costs one load and a comparison (see
//! [`log!`](crate::log!)); its arguments are not even evaluated. A wanted line is formatted and written under
//! one lock, as one write: lines of several threads do not mix. Nothing on the request path logs above debug.

mod format;
mod level;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use format::{DEFAULT_FORMAT, Format, JsonFormatError};
pub use level::{Component, LEVELS, Level, LevelError, enabled, level, set_all, set_level, set_levels};

use format::Line;

enum Target {
    Stderr,
    File(File, PathBuf),
}

struct Sink {
    target: Target,
    format: Option<Format>,
    escaped: bool,
    last: Option<Instant>,
}

static SINK: Mutex<Sink> =
    Mutex::new(Sink { target: Target::Stderr, format: None, escaped: false, last: None });

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets the pattern (`--log-format`, `application_log_config.log_format.text_format`).
pub fn set_format(format: Format) {
    sink().format = Some(format);
}

/// Writes lines with C's escape sequences for what is not printable ASCII (`--log-format-escaped`).
pub fn escape() {
    sink().escaped = true;
}

fn open(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Logs to a file instead of stderr (`--log-path`).
pub fn set_path(path: PathBuf) -> io::Result<()> {
    let file = open(&path)?;
    sink().target = Target::File(file, path);
    Ok(())
}

/// Opens the file anew, after it was rotated away.
pub fn reopen() -> io::Result<()> {
    let mut sink = sink();
    if let Target::File(file, path) = &mut sink.target {
        *file = open(path)?;
    }
    Ok(())
}

/// Writes a line; called by [`log!`](crate::log!) when the level allows it.
#[cold]
pub fn write(component: Component, level: Level, file: &str, line: u32, message: fmt::Arguments<'_>) {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let message = message.to_string();
    let mut sink = sink();
    let at = Instant::now();
    let elapsed = sink.last.replace(at).map_or(Duration::ZERO, |last| at.saturating_duration_since(last));
    let line = Line { now, component, level, file, line, message: &message, elapsed };
    let format = sink.format.get_or_insert_with(|| Format::parse(DEFAULT_FORMAT));
    let mut text = format.render(&line);
    if sink.escaped {
        text = escaped(&text);
    }
    // A log that cannot be written is no reason to fail, and there is nobody left to tell.
    let _ = match &mut sink.target {
        Target::Stderr => io::stderr().write_all(text.as_bytes()),
        Target::File(file, _) => file.write_all(text.as_bytes()),
    };
}

/// The line in C's notation, but for its end.
fn escaped(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    for byte in line.strip_suffix('\n').unwrap_or(line).bytes() {
        match byte {
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b'"' | b'\'' | b'\\' => out.extend(['\\', byte.into()]),
            b' '..=b'~' => out.push(byte.into()),
            _ => out.push_str(&format!("\\{byte:03o}")),
        }
    }
    out.push('\n');
    out
}

/// `log!(Component::Upstream, Level::Debug, "{} hosts", n)`: formatted only if that level is on.
#[macro_export]
macro_rules! log {
    ($component:expr, $level:expr, $($message:tt)+) => {
        if $crate::log::enabled($component, $level) {
            $crate::log::write($component, $level, file!(), line!(), format_args!($($message)+));
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_in_c_notation() {
        assert_eq!(escaped("a\tb \"c'\\\r\n\u{1}é\n"), "a\\tb \\\"c\\'\\\\\\r\\n\\001\\303\\251\n");
    }

    #[test]
    fn the_file_is_opened_anew() {
        let path = std::env::temp_dir().join(format!("sampan-log-{}", std::process::id()));
        set_path(path.clone()).unwrap();
        crate::log!(Component::Thrift, Level::Error, "one {}", 1);
        std::fs::remove_file(&path).unwrap();
        reopen().unwrap();
        crate::log!(Component::Thrift, Level::Error, "two");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(
            text.contains("[error][thrift]") && text.ends_with("two\n") && !text.contains("one"),
            "{text}"
        );
    }
}
