//! CEL expressions over what is known of a stream: Envoy's attributes (`request.host`, `connection.mtls`, …).
//!
//! The crate `cel` parses and evaluates. Of the attributes only those parts are made that an expression names by their
//! first word; what is not there (a missing header, a response that has not come) is a missing key, so that the
//! expression fails, as in Envoy. Attributes that are times or durations (`request.time`, `request.duration`,
//! `response.backend_latency`, `upstream.cx_pool_ready_duration`) are not there, nor is `xds.node`; see
//! `docs/divergences.md`.
//!
//! Expressions come as text (access logs, metrics) or parsed (conditions of RBAC, `parsed`).
//!
//! Source: `source/extensions/filters/common/expr/context.cc`.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use cel::common::ast::{EntryExpr, Expr, IdedEntryExpr};
use cel::objects::Value;
use cel::{Context, Env, IdedExpr};
use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind};

use crate::address::Address;
use crate::error::{ConfigError, ConfigResult};
use crate::format::{FormatContext, grpc_status_of};
use crate::header::{HeaderId, HeaderMap};
use crate::peer::PeerState;
use crate::stream_info::{Metadata, StateObject, TlsInfo};

mod parsed;

/// Longer expressions, and deeper ones, are an attack on the stack, not a configuration.
const LONGEST: usize = 4 * 1024;
const DEEPEST: usize = 32;
/// What the parser needs for the longest.
const PARSER_STACK: usize = 64 << 20;

type Fields = HashMap<String, Value>;

/// First words of attributes.
const ROOTS: [&str; 10] = [
    "request",
    "response",
    "source",
    "destination",
    "connection",
    "upstream",
    "metadata",
    "filter_state",
    "upstream_filter_state",
    "xds",
];

/// A parsed expression.
pub struct Expression {
    expr: IdedExpr,
    roots: Vec<&'static str>,
    source: Box<str>,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Expression({:?})", self.source)
    }
}

fn environment() -> Arc<Env> {
    static STANDARD: OnceLock<Arc<Env>> = OnceLock::new();
    STANDARD.get_or_init(|| Arc::new(Env::stdlib())).clone()
}

/// How many levels an expression has.
fn depth(of: &IdedExpr) -> usize {
    let deepest = |all: &mut dyn Iterator<Item = &IdedExpr>| all.map(depth).max().unwrap_or(0);
    let entry = |entry: &IdedEntryExpr| match &entry.expr {
        EntryExpr::StructField(field) => depth(&field.value),
        EntryExpr::MapEntry(entry) => depth(&entry.key).max(depth(&entry.value)),
    };
    1 + match &of.expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => 0,
        Expr::Call(call) => deepest(&mut call.target.as_deref().into_iter().chain(&call.args)),
        Expr::List(list) => deepest(&mut list.elements.iter()),
        Expr::Map(map) => map.entries.iter().map(entry).max().unwrap_or(0),
        Expr::Struct(of) => of.entries.iter().map(entry).max().unwrap_or(0),
        Expr::Select(select) => depth(&select.operand),
        Expr::Comprehension(c) => {
            deepest(&mut [&c.iter_range, &c.accu_init, &c.loop_cond, &c.loop_step, &c.result].into_iter())
        }
    }
}

/// Parses, on a stack that is large enough for whatever fits into [`LONGEST`].
fn compile(source: &str) -> Result<IdedExpr, String> {
    let parse = || {
        let program = environment().compile(source).map_err(|e| e.to_string())?;
        if depth(program.expression()) > DEEPEST {
            return Err(format!("more than {DEEPEST} levels"));
        }
        Ok(program.expression().clone())
    };
    let parser = std::thread::Builder::new().name("cel".to_owned()).stack_size(PARSER_STACK);
    std::thread::scope(|scope| match parser.spawn_scoped(scope, parse).map(|thread| thread.join()) {
        Ok(Ok(parsed)) => parsed,
        Ok(Err(_)) | Err(_) => Err("the parser broke".to_owned()),
    })
}

impl Expression {
    /// Parses.
    pub fn parse(source: &str) -> ConfigResult<Self> {
        if source.len() > LONGEST {
            return Err(ConfigError::new("a CEL expression of more than 4 KiB"));
        }
        let expr = compile(source)
            .map_err(|e| ConfigError::new(format!("failed to parse CEL expression {source:?}: {e}")))?;
        Ok(Self::of(expr, source))
    }

    fn of(expr: IdedExpr, source: &str) -> Self {
        let references = expr.references();
        let roots = ROOTS.into_iter().filter(|root| references.has_variable(root)).collect();
        Self { expr, roots, source: source.into() }
    }

    /// The expression's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    fn evaluate(&self, context: &FormatContext<'_>) -> Option<Value> {
        let mut variables = Context::with_env(environment());
        for root in &self.roots {
            variables.add_variable_from_value(*root, attribute(root, context));
        }
        Value::resolve(&self.expr, &variables).ok()
    }

    /// The value as text, as Envoy prints it; none where it cannot be evaluated.
    pub fn text(&self, context: &FormatContext<'_>) -> Option<String> {
        Some(match self.evaluate(context)? {
            Value::String(text) => text.to_string(),
            Value::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Value::Int(n) => n.to_string(),
            Value::UInt(n) => n.to_string(),
            Value::Float(n) => crate::stats::general(n, 6),
            Value::Bool(b) => b.to_string(),
            Value::Map(_) => "map value".to_owned(),
            Value::List(_) => "list value".to_owned(),
            _ => "null_type value".to_owned(),
        })
    }

    /// Whether it evaluates to `true`.
    pub fn is_true(&self, context: &FormatContext<'_>) -> bool {
        matches!(self.evaluate(context), Some(Value::Bool(true)))
    }
}

/// Collects the parts of an attribute that are there.
#[derive(Default)]
struct Object(Fields);

impl Object {
    fn put(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }

    fn put_some(&mut self, name: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.put(name, value);
        }
    }

    fn done(self) -> Value {
        Value::from(self.0)
    }
}

fn attribute(root: &str, context: &FormatContext<'_>) -> Value {
    let info = context.info;
    match root {
        "request" => request(context),
        "response" => response(context),
        "source" => address(&info.remote),
        "destination" => address(&info.connection.local),
        "connection" => connection(context),
        "upstream" => upstream(context),
        "metadata" => metadata(info.dynamic_metadata.as_deref()),
        "filter_state" => {
            let mut object = Object::default();
            info.each_state(|key, value| put_state(&mut object, key, value));
            object.done()
        }
        "upstream_filter_state" => {
            let mut object = Object::default();
            let state = info.upstream_filter_state.iter().flat_map(|state| state.iter());
            state.for_each(|(key, value)| put_state(&mut object, key, value));
            object.done()
        }
        _ => xds(context),
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn headers(map: Option<&HeaderMap>) -> Value {
    let mut fields = Fields::new();
    for (_, name, value) in map.into_iter().flat_map(HeaderMap::iter) {
        let value = lossy(value);
        match fields.entry(lossy(name)) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(value.into());
            }
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                // A repeated header is all its values.
                if let Value::String(first) = entry.get() {
                    let joined = format!("{first},{value}");
                    entry.insert(joined.into());
                }
            }
        }
    }
    Value::from(fields)
}

fn size(map: Option<&HeaderMap>) -> i64 {
    map.map_or(0, |map| signed(map.byte_size() as u64))
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn request(context: &FormatContext<'_>) -> Value {
    let (info, mut object) = (context.info, Object::default());
    let get = |id| context.request.and_then(|r| r.get(id)).map(lossy);
    object.put("headers", headers(context.request));
    let received = signed(info.bytes.received);
    match get(HeaderId::CONTENT_LENGTH) {
        None => object.put("size", received),
        Some(length) => object.put_some("size", length.parse::<i64>().ok()),
    }
    object.put("total_size", received + size(context.request));
    object.put_some("protocol", info.protocol.map(|p| p.as_str()));
    for (name, id) in [
        ("path", HeaderId::PATH),
        ("host", HeaderId::AUTHORITY),
        ("scheme", HeaderId::SCHEME),
        ("method", HeaderId::METHOD),
        ("referer", HeaderId::REFERER),
        ("id", HeaderId::X_REQUEST_ID),
        ("useragent", HeaderId::USER_AGENT),
    ] {
        object.put_some(name, get(id));
    }
    if context.request.is_some() {
        let path = get(HeaderId::PATH).unwrap_or_default();
        let (path, query) = path.split_once('?').unwrap_or((&path, ""));
        object.put("url_path", path);
        object.put("query", query.split('#').next().unwrap_or_default());
    }
    object.done()
}

fn response(context: &FormatContext<'_>) -> Value {
    let (info, mut object) = (context.info, Object::default());
    object.put_some("code", (info.response_code != 0).then(|| i64::from(info.response_code)));
    object.put_some("code_details", info.details.as_deref());
    object.put("headers", headers(context.response));
    object.put("trailers", headers(context.trailers));
    object.put_some("grpc_status", grpc_status_of(context));
    object.put("flags", info.flags.legacy_bits());
    let sent = signed(info.bytes.sent);
    object.put("size", sent);
    object.put("total_size", sent + size(context.response) + size(context.trailers));
    object.done()
}

fn address(of: &Address) -> Value {
    let mut object = Object::default();
    object.put("address", of.to_string());
    object.put_some("port", of.port().map(i64::from));
    object.done()
}

/// What both sides' certificates tell.
fn tls(object: &mut Object, tls: Option<&TlsInfo>) {
    let Some(tls) = tls else { return };
    object.put("tls_version", tls.version);
    let sides = [
        (&tls.local, "subject_local_certificate", "uri_san_local_certificate", "dns_san_local_certificate"),
        (&tls.peer, "subject_peer_certificate", "uri_san_peer_certificate", "dns_san_peer_certificate"),
    ];
    for (certificate, subject, uri, dns) in sides {
        let Some(certificate) = certificate else { continue };
        object.put_some(subject, Some(certificate.subject.as_str()).filter(|s| !s.is_empty()));
        object.put_some(uri, certificate.uri_sans.first().map(String::as_str));
        object.put_some(dns, certificate.dns_sans.first().map(String::as_str));
    }
    object.put_some("sha256_peer_certificate_digest", tls.peer.as_ref().map(|peer| peer.sha256.as_str()));
}

fn connection(context: &FormatContext<'_>) -> Value {
    let (info, mut object) = (context.info, Object::default());
    let connection = &info.connection;
    object.put("mtls", connection.tls.as_ref().is_some_and(|tls| tls.peer.is_some()));
    object.put("requested_server_name", connection.requested_server_name.as_deref().unwrap_or_default());
    object.put("id", Value::UInt(connection.id));
    object.put_some("termination_details", info.termination_details.as_deref());
    object.put_some("transport_failure_reason", connection.transport_failure.as_deref());
    tls(&mut object, connection.tls.as_deref());
    object.done()
}

fn upstream(context: &FormatContext<'_>) -> Value {
    let mut object = Object::default();
    object.put("request_attempt_count", Value::UInt(u64::from(context.info.attempts)));
    if let Some(upstream) = &context.info.upstream {
        object.put_some("address", upstream.host.as_ref().map(ToString::to_string));
        object.put_some("port", upstream.host.as_ref().and_then(Address::port).map(i64::from));
        object.put_some("local_address", upstream.local.as_ref().map(ToString::to_string));
        object.put("transport_failure_reason", upstream.transport_failure.as_deref().unwrap_or_default());
        tls(&mut object, upstream.tls.as_deref());
    }
    object.done()
}

fn xds(context: &FormatContext<'_>) -> Value {
    let (info, mut object) = (context.info, Object::default());
    object.put_some("cluster_name", info.cluster.as_deref());
    object.put("cluster_metadata", metadata(info.cluster_metadata.as_deref()));
    object.put("route_name", info.route_name.as_deref().unwrap_or_default());
    object.put("route_metadata", metadata(info.route_metadata.as_deref()));
    object.put("virtual_host_name", info.virtual_host.as_deref().unwrap_or_default());
    object.put("virtual_host_metadata", metadata(info.virtual_host_metadata.as_deref()));
    let host = info.upstream.as_ref().and_then(|upstream| upstream.host_metadata.as_deref());
    object.put_some("upstream_host_metadata", host.map(|host| metadata(Some(host))));
    object.put("filter_chain_name", &*info.connection.filter_chain);
    object.put("listener_metadata", metadata(info.listener_metadata.as_deref()));
    object.done()
}

fn metadata(of: Option<&Metadata>) -> Value {
    let filters = of.into_iter().flatten().map(|(key, value)| (key.clone(), structure(value)));
    let mut object = Object::default();
    object.put("filter_metadata", Value::from(filters.collect::<Fields>()));
    object.done()
}

fn structure(of: &Struct) -> Value {
    Value::from(of.fields.iter().map(|(key, value)| (key.clone(), member(value))).collect::<Fields>())
}

fn member(value: &ProtoValue) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::NumberValue(n)) => Value::Float(*n),
        Some(Kind::StringValue(text)) => text.as_str().into(),
        Some(Kind::BoolValue(b)) => Value::Bool(*b),
        Some(Kind::StructValue(fields)) => structure(fields),
        Some(Kind::ListValue(list)) => Value::List(Arc::new(list.values.iter().map(member).collect())),
    }
}

/// Workloads are structures; of everything else the text counts.
fn put_state(object: &mut Object, key: &str, value: &StateObject) {
    if value.as_any().is::<PeerState>()
        && let Some(json) = value.typed()
    {
        object.put(key, from_json(json.get("value").unwrap_or(&json)));
    } else {
        object.put_some(key, value.plain().map(std::borrow::Cow::into_owned));
    }
}

fn from_json(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Object(map) => {
            Value::from(map.iter().map(|(key, value)| (key.clone(), from_json(value))).collect::<Fields>())
        }
        other => other.as_str().unwrap_or_default().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::peer::{self, Peer, SharedPeer};
    use crate::stream_info::{ConnectionInfo, Protocol, StreamInfo};

    fn info() -> StreamInfo {
        let local: std::net::SocketAddr = "127.0.0.1:80".parse().unwrap();
        let now = std::time::Instant::now();
        let connection = ConnectionInfo {
            filter_chain: "chain".into(),
            requested_server_name: Some("sni".into()),
            transport_protocol: "",
            start: now,
            start_system: std::time::SystemTime::now(),
            ..ConnectionInfo::accepted(7, "".into(), local.into(), local.into())
        };
        let mut info = StreamInfo::new(1, Rc::new(connection), Some(Protocol::Http11));
        info.response_code = 404;
        info.route_name = Some("r".into());
        let peer =
            Peer { workload: "w".into(), labels: vec![("role".into(), "x".into())], ..Peer::default() };
        peer::set(info.filter_state.get_or_insert_default(), peer::DOWNSTREAM, &SharedPeer::new(peer));
        info
    }

    fn text(source: &str) -> Option<String> {
        let info = info();
        let mut request = HeaderMap::new();
        request.set(HeaderId::METHOD, "GET");
        request.set(HeaderId::PATH, "/a/b?c=d");
        request.set(HeaderId::AUTHORITY, "host.test");
        request.append(HeaderId::ACCEPT, "x");
        request.append(HeaderId::ACCEPT, "y");
        let context = FormatContext { request: Some(&request), ..FormatContext::new(&info) };
        Expression::parse(source).unwrap().text(&context)
    }

    #[test]
    fn attributes() {
        for (source, expected) in [
            ("request.host", Some("host.test")),
            ("request.url_path", Some("/a/b")),
            ("request.query", Some("c=d")),
            ("request.headers['accept']", Some("x,y")),
            ("request.referer", None),
            ("has(request.referer) ? request.referer : 'none'", Some("none")),
            ("response.code", Some("404")),
            ("response.code >= 400 || connection.mtls", Some("true")),
            ("string(destination.port)", Some("80")),
            ("destination.address", Some("127.0.0.1:80")),
            ("connection.id", Some("7")),
            ("connection.requested_server_name", Some("sni")),
            ("xds.route_name + '-' + xds.filter_chain_name", Some("r-chain")),
            ("filter_state.downstream_peer.workload", Some("w")),
            ("filter_state['downstream_peer'].labels['role']", Some("x")),
            ("istio_operationId", None),
            ("request.headers", Some("map value")),
            ("'constant'", Some("constant")),
            ("request.path.startsWith('/a')", Some("true")),
            ("request.path.matches('^/[a-z]/')", Some("true")),
        ] {
            assert_eq!(text(source).as_deref(), expected, "{source}");
        }
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        assert!(Expression::parse("request.").is_err());
        assert!(Expression::parse(&"(".repeat(100)).is_err());
        assert!(Expression::parse(&"a".repeat(20_000)).is_err());
    }

    #[test]
    fn the_deepest_expressions_fit_on_a_workers_stack() {
        let shapes = |n: usize| {
            [
                format!("{}1", "1+".repeat(n)),
                format!("{}1{}", "(".repeat(n), ")".repeat(n)),
                format!("{}true", "!".repeat(n)),
                format!("{}false", "true||".repeat(n)),
                format!("{}1", "true?1:".repeat(n)),
                format!("{}1{}", "[".repeat(n), "]".repeat(n)),
                format!("request{}", ".a".repeat(n)),
            ]
        };
        let run = move || {
            for n in [DEEPEST - 1, 90, 1_000] {
                for source in shapes(n) {
                    // Either verdict will do, as long as there is one.
                    let info = info();
                    let context = FormatContext::new(&info);
                    let _ = Expression::parse(&source).map(|expression| expression.text(&context));
                }
            }
            assert!(Expression::parse(&shapes(DEEPEST - 1)[0]).is_ok());
            assert!(Expression::parse(&shapes(DEEPEST)[0]).is_err());
        };
        std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
    }
}
