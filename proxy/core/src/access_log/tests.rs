//! Filters, files and their writer.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::config::accesslog::v3::access_log_filter::FilterSpecifier as S;
use envoy_types::pb::envoy::config::core::v3::RuntimeUInt32;
use envoy_types::pb::envoy::data::accesslog::v3::AccessLogType;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

use super::*;
use crate::address::Address;
use crate::header::{HeaderId, HeaderMap};
use crate::stats::Store;
use crate::stream_info::{ConnectionInfo, Protocol, ResponseFlag, StreamInfo};

fn stream() -> StreamInfo {
    let address = Address::Ip("127.0.0.1:1".parse().unwrap());
    let connection = ConnectionInfo::accepted(1, "l".into(), address.clone(), address);
    let mut info = StreamInfo::new(1, Rc::new(connection), Some(Protocol::Http11));
    info.start_system = SystemTime::UNIX_EPOCH;
    info.end = Some(info.start + Duration::from_millis(5));
    info.response_code = 404;
    info
}

/// A directory of its own per test, removed with it.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("sampan-log-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn file_message(path: &str, format: Option<file_access_log::AccessLogFormat>) -> pb::AccessLog {
    let message = FileAccessLog { path: path.to_owned(), access_log_format: format };
    let any = Any { type_url: FileAccessLog::type_url(), value: message.encode_to_vec() };
    pb::AccessLog {
        name: "a".into(),
        filter: None,
        config_type: Some(pb::access_log::ConfigType::TypedConfig(any)),
    }
}

#[allow(deprecated)]
fn text(format: &str) -> Option<file_access_log::AccessLogFormat> {
    Some(file_access_log::AccessLogFormat::Format(format.to_owned()))
}

fn manager(store: &Store, min_size: usize, interval: Duration) -> AccessLogManager {
    AccessLogManager::new(&store.root(), FlushPolicy { min_size, interval })
}

const LONG: Duration = Duration::from_secs(3600);

/// Waits for what another thread does.
fn eventually(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !what() {
        assert!(Instant::now() < end, "did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_default_format_is_envoys() {
    let (dir, store) = (Dir::new("default"), Store::new());
    let manager = manager(&store, 1 << 16, LONG);
    let path = dir.path("a");
    let logger =
        AccessLogger::from_proto(&file_message(&path, text("")), &manager, &Runtime::default()).unwrap();
    let mut request = HeaderMap::new();
    request.append(HeaderId::METHOD, "GET");
    request.append(HeaderId::PATH, "/d");
    request.append(HeaderId::AUTHORITY, "h.com");
    let info = stream();
    let context = FormatContext { request: Some(&request), ..FormatContext::new(&info) };
    logger.log(&context);
    assert_eq!(fs::read_to_string(&path).unwrap(), "");
    assert_eq!(store.value("filesystem.write_buffered"), Some(1));
    manager.flush();
    let expected =
        "[1970-01-01T00:00:00.000Z] \"GET /d HTTP/1.1\" 404 - 0 0 5 - \"-\" \"-\" \"-\" \"h.com\" \"-\"\n";
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    assert_eq!(store.value("filesystem.write_completed"), Some(1));
    assert_eq!(store.value("filesystem.write_total_buffered"), Some(0));
}

#[test]
fn json_formats_old_and_new() {
    let (dir, store) = (Dir::new("json"), Store::new());
    let manager = manager(&store, 1 << 16, LONG);
    let kind = Kind::StringValue("%RESPONSE_CODE%".into());
    let format = Struct { fields: [("c".to_owned(), Value { kind: Some(kind) })].into_iter().collect() };
    let path = dir.path("a");
    #[allow(deprecated)]
    let formats = [
        file_access_log::AccessLogFormat::JsonFormat(format.clone()),
        file_access_log::AccessLogFormat::TypedJsonFormat(format),
    ];
    let info = stream();
    for format in formats {
        let message = file_message(&path, Some(format));
        let logger = AccessLogger::from_proto(&message, &manager, &Runtime::default()).unwrap();
        logger.log(&FormatContext::new(&info));
    }
    drop(manager);
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"c\":404}\n{\"c\":404}\n");
}

#[test]
fn size_and_interval_wake_the_writer() {
    let (dir, store) = (Dir::new("wake"), Store::new());
    let by_size = manager(&store, 100, LONG);
    let path = dir.path("size");
    let file = by_size.open(Target::Path(path.clone())).unwrap();
    file.write_with(|out| out.extend_from_slice(&[b'a'; 99]));
    file.write_with(|out| out.extend_from_slice(b"bb"));
    eventually(|| fs::read(&path).unwrap().len() == 101);
    assert_eq!(store.value("filesystem.flushed_by_timer"), Some(0));

    let by_time = manager(&store, 1 << 16, Duration::from_millis(5));
    let path = dir.path("time");
    let file = by_time.open(Target::Path(path.clone())).unwrap();
    file.write_with(|out| out.extend_from_slice(b"x\n"));
    eventually(|| fs::read(&path).unwrap() == b"x\n");
    assert!(store.value("filesystem.flushed_by_timer") > Some(0));
}

#[test]
fn a_moved_file_is_opened_anew() {
    let (dir, store) = (Dir::new("reopen"), Store::new());
    let manager = manager(&store, 1 << 16, LONG);
    let (path, moved) = (dir.path("a"), dir.path("b"));
    let file = manager.open(Target::Path(path.clone())).unwrap();
    file.write_with(|out| out.extend_from_slice(b"1\n"));
    manager.flush();
    fs::rename(&path, &moved).unwrap();
    file.write_with(|out| out.extend_from_slice(b"2\n"));
    manager.reopen();
    eventually(|| fs::read(&path).is_ok_and(|text| text == b"2\n"));
    assert_eq!(fs::read(&moved).unwrap(), b"1\n");
    fs::remove_dir_all(&dir.0).unwrap();
    manager.reopen();
    eventually(|| store.value("filesystem.reopen_failed") > Some(0));
}

#[test]
fn lines_of_many_threads_stay_whole() {
    let (dir, store) = (Dir::new("threads"), Store::new());
    let manager = manager(&store, 200, Duration::from_millis(1));
    let path = dir.path("a");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let file = manager.open(Target::Path(path.clone())).unwrap();
            scope.spawn(move || {
                for line in 0..500 {
                    file.write_with(|out| out.extend_from_slice(format!("<{thread} {line}>\n").as_bytes()));
                }
            });
        }
    });
    manager.flush();
    let text = fs::read_to_string(&path).unwrap();
    let mut next = [0; 4];
    for line in text.lines() {
        let (thread, number) = line[1..line.len() - 1].split_once(' ').unwrap();
        let thread: usize = thread.parse().unwrap();
        assert_eq!(number.parse::<u32>().unwrap(), next[thread]);
        next[thread] += 1;
    }
    assert_eq!(next, [500; 4]);
}

#[test]
fn a_panicking_line_leaves_nothing() {
    let (dir, store) = (Dir::new("panic"), Store::new());
    let manager = manager(&store, 1 << 16, LONG);
    let path = dir.path("a");
    let file = manager.open(Target::Path(path.clone())).unwrap();
    file.write_with(|out| out.extend_from_slice(b"1\n"));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        file.write_with(|out| {
            out.extend_from_slice(b"half a li");
            panic!("expected");
        });
    }));
    assert!(panicked.is_err());
    file.write_with(|out| out.extend_from_slice(b"2\n"));
    manager.flush();
    assert_eq!(fs::read(&path).unwrap(), b"1\n2\n");
}

#[test]
fn a_full_disk_costs_lines_not_memory() {
    let store = Store::new();
    let manager = manager(&store, 1 << 16, LONG);
    let file = manager.open(Target::Path("/dev/full".into())).unwrap();
    file.write_with(|out| out.extend_from_slice(b"x\n"));
    manager.flush();
    assert_eq!(store.value("filesystem.write_failed"), Some(1));
    assert_eq!(store.value("filesystem.write_total_buffered"), Some(0));
}

#[test]
fn wrong_logs_are_refused_by_name() {
    let store = Store::new();
    let manager = manager(&store, 1 << 16, LONG);
    let error = |message: &pb::AccessLog| {
        let parsed = AccessLogger::from_proto(message, &manager, &Runtime::default());
        parsed.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let missing = error(&file_message("/nonexistent/a", None));
    assert_eq!(missing, "typed_config: unable to open file '/nonexistent/a': No such file or directory");
    assert!(error(&file_message("", None)).starts_with("typed_config.path: "));
    assert!(error(&file_message("/dev/null", text("%NOPE%"))).contains("format: Not supported field"));
    let bare = pb::AccessLog { name: "a".into(), ..Default::default() };
    assert_eq!(error(&bare), "Didn't find a registered implementation for 'a' with type URL: ''");
    let any = Any { type_url: "type.googleapis.com/envoy.x.Grpc".into(), value: Vec::new() };
    let grpc = pb::AccessLog { config_type: Some(pb::access_log::ConfigType::TypedConfig(any)), ..bare };
    assert_eq!(error(&grpc), "typed_config: access logger 'a' (envoy.x.Grpc) is not supported");
}

fn filter(specifier: S) -> pb::AccessLogFilter {
    pb::AccessLogFilter { filter_specifier: Some(specifier) }
}

fn passes_with(specifier: S, info: &StreamInfo, runtime: &Runtime) -> bool {
    let filter = AccessLogFilter::from_proto(&filter(specifier), runtime).unwrap();
    let context = FormatContext { log_type: AccessLogType::DownstreamEnd, ..FormatContext::new(info) };
    filter.passes(&context)
}

fn passes(specifier: S, info: &StreamInfo) -> bool {
    passes_with(specifier, info, &Runtime::default())
}

fn compare(op: pb::comparison_filter::Op, value: u32, key: &str) -> Option<pb::ComparisonFilter> {
    let value = RuntimeUInt32 { default_value: value, runtime_key: key.to_owned() };
    Some(pb::ComparisonFilter { op: op.into(), value: Some(value) })
}

#[test]
fn status_and_duration() {
    use pb::comparison_filter::Op;
    let info = stream();
    for (op, value, expected) in [
        (Op::Eq, 404, true),
        (Op::Eq, 405, false),
        (Op::Ge, 404, true),
        (Op::Ge, 405, false),
        (Op::Le, 404, true),
        (Op::Le, 403, false),
        (Op::Ne, 404, false),
        (Op::Ne, 1, true),
    ] {
        let status = S::StatusCodeFilter(pb::StatusCodeFilter { comparison: compare(op, value, "k") });
        assert_eq!(passes(status, &info), expected, "{op:?} {value}");
    }
    let slow = |ms| S::DurationFilter(pb::DurationFilter { comparison: compare(Op::Ge, ms, "") });
    assert!(passes(slow(5), &info) && !passes(slow(6), &info));
    let runtime = Runtime::new(BTreeMap::from([("k".to_owned(), "500".to_owned())]));
    let status = S::StatusCodeFilter(pb::StatusCodeFilter { comparison: compare(Op::Ge, 1, "k") });
    assert!(!passes_with(status, &info, &runtime));
}

#[test]
fn flags_types_health_checks_and_traces() {
    let mut info = stream();
    let flags = |names: &[&str]| {
        S::ResponseFlagFilter(pb::ResponseFlagFilter { flags: names.iter().map(|n| (*n).into()).collect() })
    };
    assert!(!passes(flags(&[]), &info));
    info.flags.set(ResponseFlag::UpstreamConnectionFailure);
    assert!(
        passes(flags(&[]), &info) && passes(flags(&["UH", "UF"]), &info) && !passes(flags(&["UH"]), &info)
    );

    let types = |list: &[AccessLogType], exclude| {
        S::LogTypeFilter(pb::LogTypeFilter { types: list.iter().map(|t| *t as i32).collect(), exclude })
    };
    assert!(passes(types(&[AccessLogType::DownstreamEnd], false), &info));
    assert!(!passes(types(&[AccessLogType::DownstreamEnd], true), &info));

    let not_check = || S::NotHealthCheckFilter(pb::NotHealthCheckFilter {});
    let traced = || S::TraceableFilter(pb::TraceableFilter {});
    assert!(passes(not_check(), &info) && !passes(traced(), &info));
    info.health_check = true;
    info.trace_reason = b'a';
    assert!(!passes(not_check(), &info) && passes(traced(), &info));
    let both = || vec![filter(not_check()), filter(traced())];
    assert!(!passes(S::AndFilter(pb::AndFilter { filters: both() }), &info));
    assert!(passes(S::OrFilter(pb::OrFilter { filters: both() }), &info));
}

#[test]
fn sampling_by_request_id_is_stable() {
    let mut info = stream();
    // 0x0000002a is 42 of a hundred.
    info.request_id = Some("0000002a-0000-4000-8000-000000000000".into());
    let sampled = |numerator| {
        S::RuntimeFilter(pb::RuntimeFilter {
            runtime_key: "k".into(),
            percent_sampled: Some(envoy_types::pb::envoy::r#type::v3::FractionalPercent {
                numerator,
                denominator: 0,
            }),
            use_independent_randomness: false,
        })
    };
    assert!(passes(sampled(43), &info) && !passes(sampled(42), &info));
    let runtime = Runtime::new(BTreeMap::from([("k".to_owned(), "100".to_owned())]));
    assert!(passes_with(sampled(0), &info, &runtime));
}

#[test]
fn metadata_that_is_missing_passes_unless_told_otherwise() {
    use envoy_types::pb::envoy::r#type::matcher::v3 as m;
    let matcher = || m::MetadataMatcher {
        filter: "f".into(),
        path: vec![m::metadata_matcher::PathSegment {
            segment: Some(m::metadata_matcher::path_segment::Segment::Key("k".into())),
        }],
        value: Some(m::ValueMatcher { match_pattern: Some(m::value_matcher::MatchPattern::BoolMatch(true)) }),
        invert: false,
    };
    let specifier = |if_missing: Option<bool>| {
        S::MetadataFilter(pb::MetadataFilter {
            matcher: Some(matcher()),
            match_if_key_not_found: if_missing
                .map(|value| envoy_types::pb::google::protobuf::BoolValue { value }),
        })
    };
    let mut info = stream();
    assert!(passes(specifier(None), &info) && !passes(specifier(Some(false)), &info));
    let value = Value { kind: Some(Kind::BoolValue(false)) };
    info.dynamic_metadata_mut("f").fields.insert("k".into(), value);
    assert!(!passes(specifier(None), &info));
}

#[test]
fn grpc_statuses() {
    let info = stream();
    let specifier =
        |status: i32, exclude| S::GrpcStatusFilter(pb::GrpcStatusFilter { statuses: vec![status], exclude });
    // 404 without a gRPC status counts as UNIMPLEMENTED.
    assert!(passes(specifier(12, false), &info) && !passes(specifier(12, true), &info));
}

#[test]
fn wrong_filters_are_refused() {
    let error = |specifier| {
        AccessLogFilter::from_proto(&filter(specifier), &Runtime::default()).err().unwrap().to_string()
    };
    let cel = S::ExtensionFilter(pb::ExtensionFilter { name: "cel".into(), config_type: None });
    assert_eq!(error(cel), "extension_filter: access log filter extension 'cel' is not supported");
    let flags = S::ResponseFlagFilter(pb::ResponseFlagFilter { flags: vec!["XX".into()] });
    assert!(error(flags).starts_with("response_flag_filter.flags[0]: "));
    assert!(error(S::AndFilter(pb::AndFilter { filters: Vec::new() })).starts_with("and_filter.filters"));
    assert!(error(S::StatusCodeFilter(pb::StatusCodeFilter { comparison: None })).contains("comparison"));
}

#[test]
fn loggers_are_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<AccessLogger>();
    shared::<AccessLogManager>();
    shared::<Formatter>();
}
