//! The proxy's own log: Envoy's component names, levels and `--log-format` patterns.
//!
//! A level per component sits in an atomic, so a line that is not wanted costs one load and a comparison (see
//! [`log!`](crate::log!)); its arguments are not even evaluated. A wanted line is formatted and written under
//! one lock, as one write: lines of several threads do not mix. Nothing on the request path logs above debug.
//!
//! Times are UTC. In a pattern, `%g`, `%s`, `%#` and `%@` name the place in Sampan's source, `%!` (the function) is
//! empty.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

/// How grave a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Every step.
    Trace,
    /// For who looks for an error.
    Debug,
    /// Milestones.
    Info,
    /// Something to look at.
    Warn,
    /// Something failed.
    Error,
    /// The process cannot go on.
    Critical,
    /// Nothing is logged.
    Off,
}

/// The levels in order, as Envoy prints them.
pub const LEVELS: [Level; 7] =
    [Level::Trace, Level::Debug, Level::Info, Level::Warn, Level::Error, Level::Critical, Level::Off];

impl Level {
    /// The name that Envoy prints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Off => "off",
        }
    }

    /// From a name; `warn` is taken for `warning`.
    pub fn parse(name: &str) -> Option<Self> {
        if name == "warn" {
            return Some(Self::Warn);
        }
        LEVELS.into_iter().find(|l| l.name() == name)
    }
}

macro_rules! components {
    ($($variant:ident $name:literal,)*) => {
        /// Which part of the proxy speaks. Envoy's loggers, in its order; some stand for parts that Sampan does
        /// not have (yet) so that tools which set their level do not fail.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Component { $($variant,)* }

        impl Component {
            /// All components.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Envoy's name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

components! {
    A2a "a2a", Admin "admin", AiProtocolManager "ai_protocol_manager",
    AlternateProtocolsCache "alternate_protocols_cache", Aws "aws", Assert "assert", Backtrace "backtrace",
    BasicAuth "basic_auth", CacheFilter "cache_filter", Client "client", Config "config",
    Connection "connection", ConnHandler "conn_handler", Compression "compression",
    CredentialInjector "credential_injector", Decompression "decompression", Dns "dns", Dubbo "dubbo",
    EnvoyBug "envoy_bug", ExtAuthz "ext_authz", ExtProc "ext_proc", Rocketmq "rocketmq", File "file",
    Filter "filter", ForwardProxy "forward_proxy", Geolocation "geolocation", Grpc "grpc",
    HappyEyeballs "happy_eyeballs", Hc "hc", HealthChecker "health_checker", Http "http", Http2 "http2",
    Hystrix "hystrix", Init "init", Io "io", Jwt "jwt", JsonRpc "json_rpc", Kafka "kafka",
    KeyValueStore "key_value_store", Lua "lua", LocalRateLimit "local_rate_limit", Main "main",
    Matcher "matcher", Mcp "mcp", Misc "misc", Mongo "mongo", MultiConnection "multi_connection",
    Notification "notification", Oauth2 "oauth2", Quic "quic", QuicStream "quic_stream", Pool "pool",
    RateLimitQuota "rate_limit_quota", Rbac "rbac", Rds "rds", Redis "redis", Router "router",
    Runtime "runtime", Stats "stats", Secret "secret", Sse "sse", Tap "tap", Testing "testing",
    Thrift "thrift", Tracing "tracing", Upstream "upstream", Udp "udp", Wasm "wasm", Websocket "websocket",
    Golang "golang", StatsSinks "stats_sinks", DynamicModules "dynamic_modules", IpTagging "ip_tagging",
}

const COUNT: usize = Component::ALL.len();

static LEVEL: [AtomicU8; COUNT] = [const { AtomicU8::new(Level::Info as u8) }; COUNT];

/// The level that applies to a component.
pub fn level(component: Component) -> Level {
    LEVELS[usize::from(LEVEL[component as usize].load(Ordering::Relaxed)) % LEVELS.len()]
}

/// Whether a line would be written.
#[inline]
pub fn enabled(component: Component, level: Level) -> bool {
    level as u8 >= LEVEL[component as usize].load(Ordering::Relaxed)
}

/// Sets one component's level.
pub fn set_level(component: Component, level: Level) {
    LEVEL[component as usize].store(level as u8, Ordering::Relaxed);
}

/// Sets every component's level (`-l`).
pub fn set_all(level: Level) {
    Component::ALL.iter().for_each(|c| set_level(*c, level));
}

/// Why levels could not be set.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum LevelError {
    /// No such level.
    #[error("unknown logger level")]
    Level,
    /// No such component.
    #[error("unknown logger name")]
    Component,
    /// `name` or `:level` is missing.
    #[error("empty logger name or empty logger level")]
    Empty,
}

/// Sets levels given as `upstream:debug,http:trace`; all or none.
pub fn set_levels(pairs: &str) -> Result<(), LevelError> {
    let mut changes = Vec::new();
    for pair in pairs.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (name, level) = pair.split_once(':').unwrap_or((pair, ""));
        if name.is_empty() || level.is_empty() {
            return Err(LevelError::Empty);
        }
        changes.push((name, Level::parse(level).ok_or(LevelError::Level)?));
    }
    let mut found = Vec::new();
    for (name, level) in changes {
        let component = Component::ALL.iter().find(|c| c.name() == name).ok_or(LevelError::Component)?;
        found.push((*component, level));
    }
    found.into_iter().for_each(|(component, level)| set_level(component, level));
    Ok(())
}

/// The pattern when `--log-format` is not given.
pub const DEFAULT_FORMAT: &str = "[%Y-%m-%d %T.%e][%t][%l][%n] [%g:%#] %v";

enum Piece {
    Text(String),
    Flag(char, Pad),
}

/// `%8l`, `%-8l`, `%=8l`, and with `!` cut to the width.
#[derive(Clone, Copy, Default)]
struct Pad {
    width: usize,
    side: char,
    cut: bool,
}

impl Pad {
    fn apply(self, out: &mut String, start: usize) {
        let length = out[start..].chars().count();
        let missing = self.width.saturating_sub(length);
        let before = match self.side {
            '-' => 0,
            '=' => missing / 2,
            _ => missing,
        };
        out.insert_str(start, &" ".repeat(before));
        out.push_str(&" ".repeat(missing - before));
        if self.cut && length > self.width {
            let end = out[start..].char_indices().nth(self.width).map_or(out.len(), |(i, _)| start + i);
            out.truncate(end);
        }
    }
}

/// A compiled pattern in spdlog's notation; a flag that is not known stands as it is written.
pub struct Format(Vec<Piece>);

/// Why a format is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum FormatError {
    /// The message as it is would break the JSON around it.
    #[error("setJsonLogFormat error: INVALID_ARGUMENT: Usage of {0} is unavailable for JSON log formats")]
    Json(&'static str),
}

/// The flags that print something. Without effect: `%^` and `%$`, the output has no colours.
const FLAGS: &str = "vtPlLngs#@!YmdHMSTXeFfEzDxRrCIpAaBbhcoiuOj_";

impl Format {
    /// Compiles a pattern.
    pub fn parse(pattern: &str) -> Result<Self, FormatError> {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut rest = pattern;
        while let Some(at) = rest.find('%') {
            text.push_str(&rest[..at]);
            let spec = &rest[at + 1..];
            let (pad, flag) = pad_of(spec);
            let Some(c) = flag.chars().next() else {
                rest = "";
                break;
            };
            rest = &flag[c.len_utf8()..];
            if c == '%' {
                text.push('%');
            } else if FLAGS.contains(c) {
                pieces.push(Piece::Text(std::mem::take(&mut text)));
                pieces.push(Piece::Flag(c, pad));
            } else if !matches!(c, '^' | '$') {
                text.push('%');
                text.push(c);
            }
        }
        text.push_str(rest);
        Ok(Self::closed(pieces, text))
    }

    fn closed(mut pieces: Vec<Piece>, text: String) -> Self {
        pieces.push(Piece::Text(text));
        Self(pieces)
    }

    /// A JSON object as a pattern (`application_log_config.log_format.json_format`), printed on one line with its
    /// keys sorted. The message must be asked for as `%j`.
    pub fn json(format: &Struct) -> Result<Self, FormatError> {
        let pattern = json_of(&Kind::StructValue(format.clone())).to_string();
        match ["%v", "%_"].into_iter().find(|flag| pattern.contains(flag)) {
            Some(flag) => Err(FormatError::Json(flag)),
            None => Self::parse(&pattern),
        }
    }

    fn render(&self, line: &Line<'_>) -> String {
        let mut out = String::with_capacity(160);
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Flag(flag, pad) => {
                    let start = out.len();
                    // Writing to a string cannot fail.
                    let _ = line.flag(&mut out, *flag);
                    pad.apply(&mut out, start);
                }
            }
        }
        out.push('\n');
        out
    }
}

fn pad_of(spec: &str) -> (Pad, &str) {
    let (side, digits) = match spec.strip_prefix(['-', '=']) {
        Some(digits) => (spec.as_bytes()[0] as char, digits),
        None => ('>', spec),
    };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    // spdlog pads to 64 at most.
    match digits[..end].parse::<usize>() {
        Ok(width) => {
            let after = &digits[end..];
            let cut = after.strip_prefix('!').filter(|flag| !flag.is_empty());
            (Pad { width: width.min(64), side, cut: cut.is_some() }, cut.unwrap_or(after))
        }
        Err(_) => (Pad::default(), spec),
    }
}

fn json_of(kind: &Kind) -> serde_json::Value {
    let value = |v: &Value| v.kind.as_ref().map_or(serde_json::Value::Null, json_of);
    match kind {
        Kind::NullValue(_) => serde_json::Value::Null,
        Kind::NumberValue(n) if n.fract() == 0.0 && n.abs() < 1e15 => (*n as i64).into(),
        Kind::NumberValue(n) => (*n).into(),
        Kind::StringValue(s) => s.as_str().into(),
        Kind::BoolValue(b) => (*b).into(),
        Kind::ListValue(list) => list.values.iter().map(value).collect(),
        Kind::StructValue(fields) => {
            let sorted: BTreeMap<_, _> = fields.fields.iter().map(|(k, v)| (k.clone(), value(v))).collect();
            serde_json::Value::Object(sorted.into_iter().collect())
        }
    }
}

struct Line<'a> {
    now: jiff::Zoned,
    component: Component,
    level: Level,
    file: &'a str,
    line: u32,
    message: &'a str,
    /// Since the line before.
    elapsed: Duration,
}

impl Line<'_> {
    fn flag(&self, out: &mut String, flag: char) -> fmt::Result {
        let now = &self.now;
        match flag {
            'v' => out.write_str(self.message),
            '_' => write!(out, "{}", self.message.escape_debug()),
            'j' => {
                let quoted = serde_json::Value::from(self.message).to_string();
                out.write_str(quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default())
            }
            't' => write!(out, "{}", nix::unistd::gettid()),
            'P' => write!(out, "{}", std::process::id()),
            'l' => out.write_str(self.level.name()),
            'L' => write!(out, "{}", self.level.name().as_bytes()[0].to_ascii_uppercase() as char),
            'n' => out.write_str(self.component.name()),
            'g' => out.write_str(self.file),
            's' => out.write_str(self.file.rsplit('/').next().unwrap_or_default()),
            '#' => write!(out, "{}", self.line),
            '@' => write!(out, "{}:{}", self.file, self.line),
            '!' => Ok(()),
            'e' => write!(out, "{:03}", now.millisecond()),
            'f' => write!(out, "{:06}", now.subsec_nanosecond() / 1000),
            'F' => write!(out, "{:09}", now.subsec_nanosecond()),
            'E' => write!(out, "{}", now.timestamp().as_second()),
            'z' => out.write_str("+00:00"),
            'o' => write!(out, "{}", self.elapsed.as_millis()),
            'i' => write!(out, "{}", self.elapsed.as_micros()),
            'u' => write!(out, "{}", self.elapsed.as_nanos()),
            'O' => write!(out, "{}", self.elapsed.as_secs()),
            'C' => write!(out, "{}", now.strftime("%y")),
            other => {
                // The rest is as in strftime.
                let text = now.strftime(match other {
                    'Y' => "%Y",
                    'm' => "%m",
                    'd' => "%d",
                    'H' => "%H",
                    'M' => "%M",
                    'S' => "%S",
                    'T' | 'X' => "%H:%M:%S",
                    'r' => "%I:%M:%S %p",
                    'c' => "%a %b %e %H:%M:%S %Y",
                    'D' | 'x' => "%m/%d/%y",
                    'R' => "%H:%M",
                    'I' => "%I",
                    'p' => "%p",
                    'A' => "%A",
                    'a' => "%a",
                    'B' => "%B",
                    _ => "%b",
                });
                write!(out, "{text}")
            }
        }
    }
}

enum Target {
    Stderr,
    File(File, PathBuf),
}

struct Sink {
    target: Target,
    format: Option<Format>,
    last: Option<Instant>,
}

static SINK: Mutex<Sink> = Mutex::new(Sink { target: Target::Stderr, format: None, last: None });

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets the pattern (`--log-format`, `application_log_config.log_format.text_format`).
pub fn set_format(format: Format) {
    sink().format = Some(format);
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
    let format = sink.format.get_or_insert_with(|| {
        Format::parse(DEFAULT_FORMAT).unwrap_or(Format(vec![Piece::Flag('v', Pad::default())]))
    });
    let text = format.render(&line);
    // A log that cannot be written is no reason to fail, and there is nobody left to tell.
    let _ = match &mut sink.target {
        Target::Stderr => io::stderr().write_all(text.as_bytes()),
        Target::File(file, _) => file.write_all(text.as_bytes()),
    };
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

    fn line(message: &str) -> Line<'_> {
        let now = jiff::Timestamp::from_millisecond(1_792_556_112_007).unwrap();
        Line {
            now: now.to_zoned(jiff::tz::TimeZone::UTC),
            component: Component::Upstream,
            level: Level::Warn,
            file: "proxy/a/b.rs",
            line: 7,
            message,
            elapsed: Duration::from_millis(380),
        }
    }

    #[test]
    fn patterns_are_spdlogs() {
        let text = Format::parse("[%Y-%m-%d %T.%e][%l][%n] [%g:%#] %v 100%%").unwrap().render(&line("hi"));
        assert_eq!(text, "[2026-10-21 04:15:12.007][warning][upstream] [proxy/a/b.rs:7] hi 100%\n");
        let text = Format::parse("{\"m\":\"%j\",\"s\":\"%s\",\"l\":\"%L\"}").unwrap().render(&line("a\"b\n"));
        assert_eq!(text, "{\"m\":\"a\\\"b\\n\",\"s\":\"b.rs\",\"l\":\"W\"}\n");
        // What Envoy 1.40 printed for the same pattern.
        let pattern = "A%v|%q|%10l|%-10l|%=11l|%o|%i|%u|%O|%^|%$|%%|%x|%X|%r|%h|%w|%8Q|%a|%3!n|%";
        let expected = "Ahi|%q|   warning|warning   |  warning  |380|380000|380000000|0|||%|10/21/26|04:15:12|\
                        04:15:12 AM|Oct|%w|%Q|Wed|ups|\n";
        assert_eq!(Format::parse(pattern).unwrap().render(&line("hi")), expected);
        assert!(Format::parse(DEFAULT_FORMAT).is_ok());
    }

    #[test]
    fn json_formats_escape_the_message() {
        let text = |s: &str| Value { kind: Some(Kind::StringValue(s.into())) };
        let format = |fields: Vec<(&str, Value)>| Struct {
            fields: fields.into_iter().map(|(k, v)| (k.into(), v)).collect(),
        };
        let inner = Value { kind: Some(Kind::StructValue(format(vec![("x", text("%n"))]))) };
        let number = Value { kind: Some(Kind::NumberValue(3.0)) };
        let log = format(vec![("msg", text("%j")), ("lvl", text("%l")), ("n", inner), ("num", number)]);
        assert_eq!(
            Format::json(&log).unwrap().render(&line("a\"b")),
            "{\"lvl\":\"warning\",\"msg\":\"a\\\"b\",\"n\":{\"x\":\"upstream\"},\"num\":3}\n"
        );
        let error = Format::json(&format(vec![("m", text("%v"))])).err().unwrap();
        assert_eq!(
            error.to_string(),
            "setJsonLogFormat error: INVALID_ARGUMENT: Usage of %v is unavailable for JSON log formats"
        );
    }

    #[test]
    fn levels_are_set_all_or_none() {
        assert_eq!(set_levels("sse:debug,nosuch:debug"), Err(LevelError::Component));
        assert_eq!(set_levels("sse:x"), Err(LevelError::Level));
        assert_eq!(set_levels("sse"), Err(LevelError::Empty));
        assert!(!enabled(Component::Sse, Level::Debug));
        set_levels("sse:debug,tap:off").unwrap();
        assert!(enabled(Component::Sse, Level::Debug) && !enabled(Component::Tap, Level::Critical));
        assert_eq!((level(Component::Sse), level(Component::Tap)), (Level::Debug, Level::Off));
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
