//! OTLP's messages as far as they are written and read here. Source: opentelemetry-proto v1, `logs`, `trace`, `resource`,
//! `collector`; what `common` has comes from `envoy-types`.

mod detectors;

use std::time::{SystemTime, UNIX_EPOCH};

use envoy_types::pb::opentelemetry::proto::common::v1::{AnyValue, KeyValue, any_value::Value};
use prost::Message;

pub use detectors::detect;

/// As Envoy names itself to collectors, with our version.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "/1.40.0-compatible/Clean/RELEASE/rustls");

/// The `user-agent` of exports.
pub fn user_agent() -> String {
    format!("OTel-OTLP-Exporter-Envoy/{VERSION}")
}

/// `SPAN_KIND_SERVER`
pub const SERVER: i32 = 2;
/// `SPAN_KIND_CLIENT`
pub const CLIENT: i32 = 3;

/// `opentelemetry.proto.resource.v1.Resource`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Resource {
    /// Who sends.
    #[prost(message, repeated, tag = "1")]
    pub attributes: Vec<KeyValue>,
}

/// `opentelemetry.proto.logs.v1.LogRecord`
#[derive(Clone, PartialEq, prost::Message)]
pub struct LogRecord {
    /// When the stream began.
    #[prost(fixed64, tag = "1")]
    pub time_unix_nano: u64,
    /// The line.
    #[prost(message, optional, tag = "5")]
    pub body: Option<AnyValue>,
    /// What else is told.
    #[prost(message, repeated, tag = "6")]
    pub attributes: Vec<KeyValue>,
    /// 16 bytes, or none.
    #[prost(bytes = "vec", tag = "9")]
    pub trace_id: Vec<u8>,
    /// 8 bytes, or none.
    #[prost(bytes = "vec", tag = "10")]
    pub span_id: Vec<u8>,
}

/// `opentelemetry.proto.common.v1.InstrumentationScope`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Scope {
    /// Which program.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Which of its versions.
    #[prost(string, tag = "2")]
    pub version: String,
}

/// `opentelemetry.proto.trace.v1.Span`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Span {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub trace_id: Vec<u8>,
    /// 8 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub span_id: Vec<u8>,
    /// `tracestate`
    #[prost(string, tag = "3")]
    pub trace_state: String,
    /// 8 bytes, or none.
    #[prost(bytes = "vec", tag = "4")]
    pub parent_span_id: Vec<u8>,
    /// The operation.
    #[prost(string, tag = "5")]
    pub name: String,
    /// `SpanKind`
    #[prost(int32, tag = "6")]
    pub kind: i32,
    /// When it began.
    #[prost(fixed64, tag = "7")]
    pub start_time_unix_nano: u64,
    /// When it was over.
    #[prost(fixed64, tag = "8")]
    pub end_time_unix_nano: u64,
    /// What is told.
    #[prost(message, repeated, tag = "9")]
    pub attributes: Vec<KeyValue>,
    /// What happened on its way.
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
    /// How it ended.
    #[prost(message, optional, tag = "15")]
    pub status: Option<Status>,
    /// The W3C flags, and whether the parent is another's.
    #[prost(fixed32, tag = "16")]
    pub flags: u32,
}

/// `opentelemetry.proto.trace.v1.Span.Event`
#[derive(Clone, PartialEq, prost::Message)]
pub struct Event {
    /// When.
    #[prost(fixed64, tag = "1")]
    pub time_unix_nano: u64,
    /// What.
    #[prost(string, tag = "2")]
    pub name: String,
}

/// `opentelemetry.proto.trace.v1.Status`
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Status {
    /// `StatusCode`
    #[prost(int32, tag = "3")]
    pub code: i32,
}

/// The answer to an export: of logs and of spans alike.
#[derive(Clone, PartialEq, prost::Message)]
struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    partial_success: Option<PartialSuccess>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PartialSuccess {
    #[prost(int64, tag = "1")]
    rejected: i64,
}

/// How many records the collector says that it did not take.
pub fn rejected(answer: &[u8]) -> u64 {
    let partial = ExportResponse::decode(answer).ok().and_then(|answer| answer.partial_success);
    partial.map_or(0, |partial| partial.rejected.max(0).unsigned_abs())
}

/// An attribute that is a text.
pub fn text(key: &str, value: impl Into<String>) -> KeyValue {
    let value = AnyValue { value: Some(Value::StringValue(value.into())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

/// Nanoseconds since the epoch.
pub fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The bytes of an id in hexadecimal digits; nothing where it is none.
pub fn id(hex: &str) -> Vec<u8> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8);
    let pairs = hex.as_bytes().chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?));
    pairs.collect::<Option<_>>().unwrap_or_default()
}

/// The 16 bytes of a trace's id, which Zipkin may write with 16 digits.
pub fn trace_id(hex: &str) -> Vec<u8> {
    match hex.len() {
        32 => id(hex),
        16 => [vec![0; 8], id(hex)].concat(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_bytes() {
        assert_eq!(id("00ff7A"), [0, 0xff, 0x7a]);
        assert!(id("0").is_empty() && id("zz").is_empty() && trace_id("00").is_empty());
        assert_eq!(trace_id("48485a3953bb6124")[7..9], [0, 0x48]);
        assert_eq!(trace_id("0af7651916cd43dd8448eb211c80319c").len(), 16);
    }

    #[test]
    fn a_partial_success_tells_what_was_rejected() {
        assert_eq!(rejected(b""), 0);
        assert_eq!(rejected(b"\x0a\x02\x08\x03"), 3);
        assert_eq!(rejected(b"\xff"), 0);
    }
}
