//! What collectors are sent, as trees: the gRPC messages of a body, or the one message of an OTLP/HTTP body or of Zipkin's,
//! decoded by the request's path.
//!
//! What changes from run to run is made comparable here: addresses become `address:port` (so that ports get their names), times
//! and durations become words, and ids of traces and spans become `trace1`, `span1`, … in the order in which they were seen, so
//! that a tree still shows whose child a span is. Attributes become a map: Envoy's order is that of a hash table.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::grpc;

/// A message: its name, then number, JSON name and type of its fields (`*` repeats).
type Message = (&'static str, &'static [(u64, &'static str, &'static str)]);

/// OTLP and Zipkin, as far as Envoy writes them. Source: opentelemetry-proto v1, `zipkin.proto` v2.
const MESSAGES: &[Message] = &[
    ("Zipkin", &[(1, "spans", "*ZipkinSpan")]),
    (
        "ZipkinSpan",
        &[
            (1, "traceId", "trace"),
            (2, "parentId", "span"),
            (3, "id", "span"),
            (4, "kind", "int"),
            (5, "name", "string"),
            (6, "timestamp", "time"),
            (7, "duration", "duration"),
            (8, "localEndpoint", "Endpoint"),
            (10, "annotations", "*Annotation"),
            (11, "attributes", "*Tag"),
            (13, "shared", "int"),
        ],
    ),
    (
        "Endpoint",
        &[(1, "serviceName", "string"), (2, "ipv4", "string"), (3, "ipv6", "string"), (4, "port", "int")],
    ),
    ("Annotation", &[(1, "timestamp", "time"), (2, "value", "string")]),
    ("Tag", &[(1, "key", "string"), (2, "value", "string")]),
    ("Logs", &[(1, "resourceLogs", "*ResourceLogs")]),
    (
        "ResourceLogs",
        &[(1, "resource", "Resource"), (2, "scopeLogs", "*ScopeLogs"), (3, "schemaUrl", "string")],
    ),
    ("ScopeLogs", &[(1, "scope", "Scope"), (2, "logRecords", "*LogRecord")]),
    (
        "LogRecord",
        &[
            (1, "timeUnixNano", "time"),
            (11, "observedTimeUnixNano", "time"),
            (2, "severityNumber", "int"),
            (5, "body", "AnyValue"),
            (6, "attributes", "*KeyValue"),
            (8, "flags", "fixed32"),
            (9, "traceId", "trace"),
            (10, "spanId", "span"),
        ],
    ),
    ("Resource", &[(1, "attributes", "*KeyValue")]),
    ("Scope", &[(1, "name", "string"), (2, "version", "string")]),
    ("KeyValue", &[(1, "key", "string"), (2, "value", "AnyValue")]),
    ("List", &[(1, "values", "*AnyValue")]),
    ("KeyValues", &[(1, "values", "*KeyValue")]),
    (
        "AnyValue",
        &[
            (1, "stringValue", "string"),
            (2, "boolValue", "int"),
            (3, "intValue", "int"),
            (5, "arrayValue", "List"),
            (6, "kvlistValue", "KeyValues"),
        ],
    ),
    ("Traces", &[(1, "resourceSpans", "*ResourceSpans")]),
    (
        "ResourceSpans",
        &[(1, "resource", "Resource"), (2, "scopeSpans", "*ScopeSpans"), (3, "schemaUrl", "string")],
    ),
    ("ScopeSpans", &[(1, "scope", "Scope"), (2, "spans", "*Span")]),
    (
        "Span",
        &[
            (1, "traceId", "trace"),
            (2, "spanId", "span"),
            (3, "traceState", "string"),
            (4, "parentSpanId", "span"),
            (5, "name", "string"),
            (6, "kind", "int"),
            (7, "startTimeUnixNano", "time"),
            (8, "endTimeUnixNano", "time"),
            (9, "attributes", "*KeyValue"),
            (11, "events", "*Event"),
            (15, "status", "Status"),
            (16, "flags", "fixed32"),
        ],
    ),
    ("Event", &[(1, "timeUnixNano", "time"), (2, "name", "string"), (3, "attributes", "*KeyValue")]),
    ("Status", &[(2, "message", "string"), (3, "code", "int")]),
];

/// The names of the ids that one upstream has seen.
#[derive(Debug, Default)]
pub struct Ids(BTreeMap<Vec<u8>, String>);

impl Ids {
    fn name(&mut self, kind: &str, id: &[u8]) -> String {
        let next = self.0.values().filter(|name| name.starts_with(kind)).count() + 1;
        self.0.entry(id.to_vec()).or_insert_with(|| format!("{kind}{next}")).clone()
    }
}

/// The messages of a body to this path; none where the path is no collector's.
pub fn messages(path: &str, body: &[u8], ids: &mut Ids) -> Option<Value> {
    Some(match path {
        "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs" => {
            let all = grpc::messages("envoy.service.accesslog.v3.StreamAccessLogsMessage", body);
            comparable("", all.into())
        }
        "/opentelemetry.proto.collector.logs.v1.LogsService/Export" => {
            grpc::decoded(body, |message| otlp("Logs", message, ids)).into()
        }
        "/opentelemetry.proto.collector.trace.v1.TraceService/Export" => {
            grpc::decoded(body, |message| otlp("Traces", message, ids)).into()
        }
        "/v1/traces" => json!([otlp("Traces", body, ids)]),
        "/v1/logs" => json!([otlp("Logs", body, ids)]),
        "/api/v2/spans" => match serde_json::from_slice(body) {
            Ok(spans) => zipkin("", spans, ids),
            Err(_) => json!([otlp("Zipkin", body, ids)]),
        },
        _ => return None,
    })
}

fn comparable(key: &str, tree: Value) -> Value {
    let volatile = key.starts_with("time_to_") || key.starts_with("timeTo") || key == "duration";
    match tree {
        Value::String(_) if volatile => "DURATION".into(),
        Value::String(_) if key == "start_time" || key == "startTime" => "TIME".into(),
        Value::Array(items) => items.into_iter().map(|item| comparable(key, item)).collect(),
        Value::Object(map) => {
            let socket = map.get("socket_address").or_else(|| map.get("socketAddress"));
            if let Some(socket) = socket {
                let port = socket.get("port_value").or_else(|| socket.get("portValue"));
                let address = socket.get("address").and_then(Value::as_str).unwrap_or_default();
                return format!("{address}:{}", port.unwrap_or(&Value::Null)).into();
            }
            if key == "node" {
                return json!({ "id": map.get("id"), "cluster": map.get("cluster") });
            }
            let pairs = map.into_iter().map(|(key, value)| {
                let value = comparable(&key, value);
                (key, value)
            });
            pairs.collect::<Map<_, _>>().into()
        }
        other => other,
    }
}

/// Zipkin's JSON, in which a trace's first span has the trace's own id.
fn zipkin(key: &str, tree: Value, ids: &mut Ids) -> Value {
    match (key, tree) {
        ("timestamp", Value::Number(_)) => "TIME".into(),
        ("duration", Value::Number(_)) => "DURATION".into(),
        (_, Value::Array(items)) => items.into_iter().map(|item| zipkin("", item, ids)).collect(),
        (_, Value::Object(mut map)) => {
            // Envoy's order is that of a hash table.
            for (key, kind) in [("traceId", "trace"), ("parentId", "span"), ("id", "span")] {
                if let Some(Value::String(hex)) = map.get_mut(key) {
                    *hex = ids.name(kind, &hex_bytes(hex));
                }
            }
            let pairs = map.into_iter().map(|(key, value)| {
                let value = zipkin(&key, value, ids);
                (key, value)
            });
            pairs.collect::<Map<_, _>>().into()
        }
        (_, other) => other,
    }
}

fn hex_bytes(hex: &str) -> Vec<u8> {
    let pairs = hex.as_bytes().chunks(2).map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok());
    pairs.collect::<Option<_>>().unwrap_or_default()
}

fn otlp(kind: &str, bytes: &[u8], ids: &mut Ids) -> Value {
    let Some((_, fields)) = MESSAGES.iter().find(|(name, _)| *name == kind) else { return Value::Null };
    let mut tree = Map::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some((number, value, after)) = field(rest) else { return json!("undecodable") };
        rest = after;
        let Some((_, name, kind)) = fields.iter().find(|(n, ..)| *n == number) else {
            tree.insert(format!("field {number}"), "unknown".into());
            continue;
        };
        let (repeated, kind) = kind.strip_prefix('*').map_or((false, *kind), |kind| (true, kind));
        let value = match (kind, value) {
            ("string", Wire::Bytes(b)) => String::from_utf8_lossy(b).into(),
            ("trace" | "span", Wire::Bytes(b)) => ids.name(kind, b).into(),
            ("time", Wire::Number(n)) => if n == 0 { "0" } else { "TIME" }.into(),
            ("duration", Wire::Number(_)) => "DURATION".into(),
            (_, Wire::Number(n)) => n.into(),
            (kind, Wire::Bytes(b)) => otlp(kind, b, ids),
        };
        if let ("attributes", Value::Object(pair)) = (*name, &value) {
            let all = tree.entry(*name).or_insert_with(|| json!({}));
            all.as_object_mut().into_iter().for_each(|all| all.extend(pair.clone()));
        } else if repeated {
            let list = tree.entry(*name).or_insert_with(|| json!([]));
            list.as_array_mut().into_iter().for_each(|list| list.push(value.clone()));
        } else {
            tree.insert((*name).to_owned(), value);
        }
    }
    if matches!(kind, "KeyValue" | "Tag") {
        let key = tree.get("key").and_then(Value::as_str).unwrap_or_default().to_owned();
        return json!({ key: tree.remove("value") });
    }
    tree.into()
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn field(bytes: &[u8]) -> Option<(u64, Wire<'_>, &[u8])> {
    let (tag, rest) = varint(bytes)?;
    let fixed = |width: usize| {
        let (number, rest) = rest.split_at_checked(width)?;
        Some((number.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)), rest))
    };
    let (value, rest) = match tag & 7 {
        0 => varint(rest).map(|(n, rest)| (Wire::Number(n), rest))?,
        1 => fixed(8).map(|(n, rest)| (Wire::Number(n), rest))?,
        5 => fixed(4).map(|(n, rest)| (Wire::Number(n), rest))?,
        2 => {
            let (length, rest) = varint(rest)?;
            let (bytes, rest) = rest.split_at_checked(length as usize)?;
            (Wire::Bytes(bytes), rest)
        }
        _ => return None,
    };
    Some((tag >> 3, value, rest))
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut number = 0;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        number |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((number, &bytes[at + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_read_by_the_table() {
        let span =
            [b"\x0a\x02ab\x12\x01c\x22\x01d\x2a\x04name".as_slice(), b"\x4a\x0a\x0a\x01k\x12\x05\x0a\x03val"];
        let span = span.concat();
        let mut ids = Ids::default();
        let seen = otlp("Span", &span, &mut ids);
        let expected = json!({
            "traceId": "trace1", "spanId": "span1", "parentSpanId": "span2", "name": "name",
            "attributes": { "k": { "stringValue": "val" } },
        });
        assert_eq!(seen, expected);
        assert_eq!(otlp("Span", b"\x12\x01d", &mut ids), json!({ "spanId": "span2" }));
        assert_eq!(otlp("Span", b"\x12\x09d", &mut ids), json!("undecodable"));
        assert!(messages("/", b"", &mut ids).is_none());
    }
}
