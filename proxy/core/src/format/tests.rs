//! What each operator prints; expectations marked so were printed by Envoy 1.40 for the same input.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::google::protobuf::{ListValue, Struct, Value, value::Kind};

use super::*;
use crate::address::Address;
use crate::header::{HeaderId, HeaderName};
use crate::stream_info::{
    CertInfo, ConnectionInfo, Metadata, Protocol, ResponseFlag, StreamInfo, TlsInfo, UpstreamInfo,
};

fn connection() -> ConnectionInfo {
    let address = |text: &str| Address::Ip(text.parse().unwrap());
    ConnectionInfo {
        filter_chain: "fc".into(),
        ..ConnectionInfo::accepted(7, "l".into(), address("127.0.0.1:21803"), address("10.1.2.3:4567"))
    }
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn fields(entries: Vec<(&str, Value)>) -> Struct {
    Struct { fields: entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }
}

fn text_value(text: &str) -> Value {
    value(Kind::StringValue(text.to_owned()))
}

fn route_metadata() -> Metadata {
    let list =
        ListValue { values: vec![value(Kind::NumberValue(1.0)), text_value("x"), value(Kind::NullValue(0))] };
    let inner = fields(vec![("b", value(Kind::BoolValue(true))), ("a", value(Kind::ListValue(list)))]);
    let all = fields(vec![
        ("k", text_value("v")),
        ("n", value(Kind::NumberValue(100_000.0))),
        ("i", value(Kind::NumberValue(-7.0))),
        ("o", value(Kind::StructValue(inner))),
    ]);
    [("ns".to_owned(), all)].into_iter().collect()
}

/// A stream as the tests see it: a request with odd bytes, answered by an upstream.
struct Case {
    request: HeaderMap,
    response: HeaderMap,
    trailers: HeaderMap,
    info: StreamInfo,
}

fn case_on(connection: ConnectionInfo) -> Case {
    let mut request = HeaderMap::new();
    request.append(HeaderId::METHOD, "GET");
    request.append(HeaderId::PATH, "/d?a=1%20b&c");
    request.append(HeaderId::AUTHORITY, "h.com:8080");
    request.append(HeaderId::USER_AGENT, b"a\xff\"\\\tb");
    for v in ["1", "2"] {
        request.append_name(&HeaderName::new("x-dup"), v);
    }
    request.append_name(&HeaderName::new("x-utf"), "é\tq");
    let mut response = HeaderMap::new();
    response.append(HeaderId::STATUS, "200");
    response.append_name(&HeaderName::new("x-a"), "b");
    let mut trailers = HeaderMap::new();
    trailers.append(HeaderId::GRPC_STATUS, "7");
    let mut info = StreamInfo::new(1, Rc::new(connection), Some(Protocol::Http11));
    info.start_system = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_236_416_478);
    info.end = Some(info.start + Duration::from_millis(12));
    info.response_code = 200;
    info.details = Some("via upstream".into());
    info.bytes.sent = 100_000;
    info.route_name = Some("dr".into());
    info.route_metadata = Some(Arc::new(route_metadata()));
    info.cluster = Some("c".into());
    info.cluster_observability = Some("alt_c".into());
    info.upstream = Some(Box::new(UpstreamInfo {
        host: Some(Address::Ip("[2001:db8::1]:80".parse().unwrap())),
        host_name: Some("hosty:99".into()),
        local: Some(Address::Ip("[::1]:5".parse().unwrap())),
        transport_failure: Some("delayed connect error: x".into()),
        first_rx: Some(info.start + Duration::from_micros(3500)),
        ..UpstreamInfo::default()
    }));
    Case { request, response, trailers, info }
}

fn case() -> Case {
    case_on(connection())
}

impl Case {
    fn context(&self) -> FormatContext<'_> {
        FormatContext {
            request: Some(&self.request),
            response: Some(&self.response),
            trailers: Some(&self.trailers),
            info: &self.info,
            local_reply_body: b"body",
            log_type: AccessLogType::DownstreamEnd,
        }
    }

    fn text(&self, format: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let extensions = Extensions { req_without_query: true };
        Formatter::parse(format, &extensions).unwrap().write(&self.context(), &mut out);
        out
    }

    fn json(&self, format: Struct, omit_empty: bool) -> String {
        let mut out = Vec::new();
        let formatter = Formatter::parse_json(&format, omit_empty, &Extensions::NONE).unwrap();
        formatter.write(&self.context(), &mut out);
        String::from_utf8(out).unwrap()
    }
}

#[test]
fn operators_of_a_request() {
    let case = case();
    for (format, expected) in [
        ("%REQ(:METHOD)% %%", "GET %"),
        ("%REQ(X-NO?:PATH):4%", "/d?a"),
        ("%REQ(x-dup)% %REQ(no)% %REQ(Host)%", "1 - h.com:8080"),
        ("%RESP(X-A)% %TRAILER(grpc-status)% %STREAM_INFO_REQ(:method)%", "b 7 GET"),
        ("%START_TIME%", "2026-11-21T04:46:56.478Z"),
        ("%START_TIME(%s.%6f)%", "1795236416.478000"),
        ("%DURATION% %RESPONSE_DURATION% %REQUEST_TX_DURATION%", "12 3 -"),
        ("%COMMON_DURATION(DS_RX_BEG:US_RX_BEG:us)%", "3500"),
        ("%COMMON_DURATION(foo:bar)% %COMMON_DURATION(DS_CX_BEG:DS_CX_BEG)%", "- 0"),
        ("%PROTOCOL% %UPSTREAM_PROTOCOL% %RESPONSE_CODE% %BYTES_SENT%", "HTTP/1.1 - 200 100000"),
        ("%RESPONSE_CODE_DETAILS% %RESPONSE_CODE_DETAILS(ALLOW_WHITESPACES)%", "via_upstream via upstream"),
        ("%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG% [%CUSTOM_FLAGS%]", "- - []"),
        (
            "%UPSTREAM_HOST% %UPSTREAM_HOST_NAME% %UPSTREAM_HOST_NAME_WITHOUT_PORT%",
            "[2001:db8::1]:80 hosty:99 hosty",
        ),
        ("%UPSTREAM_CLUSTER% %UPSTREAM_CLUSTER_RAW%", "alt_c c"),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT%", "2001:db8::1 5"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "delayed_connect_error:_x"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(16)%", "10.1.0.0/16"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(300)%", "10.1.2.3/32"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT(x)% %DOWNSTREAM_REMOTE_PORT%", "10.1.2.3 4567"),
        ("%DOWNSTREAM_LOCAL_ADDRESS% [%DOWNSTREAM_LOCAL_ADDRESS_ENDPOINT_ID%]", "127.0.0.1:21803 []"),
        ("%REQUESTED_SERVER_NAME% %REQUESTED_SERVER_NAME(SNI_FIRST:HOST)%", "- h.com:8080"),
        ("%REQUESTED_SERVER_NAME(HOST_FIRST:ORIG)%", "-"),
        ("%ROUTE_NAME% %VIRTUAL_CLUSTER_NAME% %LISTENER_NAME% %FILTER_CHAIN_NAME%", "dr - l fc"),
        ("%CONNECTION_ID% %STREAM_ID% %TRACE_ID% %ACCESS_LOG_TYPE%", "7 - - DownstreamEnd"),
        ("%QUERY_PARAM(a)%|%QUERY_PARAM(c)%|%QUERY_PARAM(zz)%|%QUERY_PARAMS%", "1 b||-|a=1%20b&c"),
        ("%PATH% %PATH(NQ)% %PATH(NQ:PATH)% %PATH(WQ:ORIG)%", "/d?a=1%20b&c /d /d -"),
        ("%REQ_WITHOUT_QUERY(:PATH)% %LOCAL_REPLY_BODY%", "/d body"),
        ("%METADATA(ROUTE:ns:k)% %METADATA(ROUTE:ns:n)% %METADATA(LISTENER:ns)%", "v 1e+05 -"),
        ("%METADATA(ROUTE:ns:o)% %METADATA(ROUTE:ns:o):4%", r#"{"a":[1,"x",null],"b":true} {"a""#),
        ("%GRPC_STATUS%", "-"),
        ("%ENVIRONMENT(NO_SUCH_THING)%", "-"),
        ("%COALESCE({\"operators\":[\"STREAM_ID\",{\"command\":\"REQ\",\"param\":\":method\"}]}):2%", "GE"),
        ("%UPSTREAM_TLS_CIPHER% %DOWNSTREAM_PEER_CERT_V_START(%Y)%", "- -"),
        ("", ""),
    ] {
        assert_eq!(String::from_utf8_lossy(&case.text(format)), expected, "{format}");
    }
}

#[test]
fn text_is_written_raw_and_json_escaped() {
    let case = case();
    assert_eq!(case.text("%REQ(USER-AGENT)%"), b"a\xff\"\\\tb");
    let format = fields(vec![
        ("ua", text_value("%REQ(USER-AGENT)%")),
        ("two", text_value("%REQ(x-utf)%-%REQ(no)%%%")),
        ("k\"", text_value("100%%")),
    ]);
    // The first value is Envoy's for bytes that are not UTF-8, the second for those that are.
    let expected = concat!(r#"{"k\"":"100%","two":"é\tq--%","ua":"a\u00ff\u0022\u005c\u0009b"}"#, "\n");
    assert_eq!(case.json(format, false), expected);
}

#[test]
fn json_keeps_types_and_sorts_keys() {
    let case = case();
    let list = ListValue {
        values: vec![value(Kind::NumberValue(1.0)), text_value("%RESPONSE_CODE%"), value(Kind::NullValue(0))],
    };
    let format = || {
        fields(vec![
            ("z", text_value("%RESP(x-upstream-service-time)%")),
            ("bytes", text_value("%BYTES_SENT%")),
            ("port", text_value("%DOWNSTREAM_REMOTE_PORT%")),
            ("meta", text_value("%METADATA(ROUTE:ns)%")),
            ("num", value(Kind::NumberValue(1_000_000.0))),
            ("list", value(Kind::ListValue(list.clone()))),
            ("only", value(Kind::StructValue(fields(vec![("a", text_value("%REQ(no)%"))])))),
            ("none", value(Kind::ListValue(ListValue { values: vec![text_value("%REQ(no)%")] }))),
            ("two", text_value("%REQ(no)%%REQ(no)%")),
            ("status", text_value("%RESP(:STATUS)%")),
        ])
    };
    let meta = r#"{"i":-7,"k":"v","n":1e+05,"o":{"a":[1,"x",null],"b":true}}"#;
    assert_eq!(
        case.json(format(), false),
        format!(
            r#"{{"bytes":100000,"list":[1,200,null],"meta":{meta},"none":[null],"num":1e+06,"only":{{"a":null}},"#
        ) + r#""port":4567,"status":"200","two":"--","z":null}"#
            + "\n"
    );
    // What is left out with omit_empty_values is what Envoy 1.40 leaves out.
    assert_eq!(
        case.json(format(), true),
        format!(r#"{{"bytes":100000,"list":[1,200],"meta":{meta},"none":[],"num":1e+06,"port":4567,"#)
            + r#""status":"200","two":""}"#
            + "\n"
    );
}

#[test]
fn flags_and_missing_parts_of_a_tcp_stream() {
    let mut case = case();
    case.info.flags.set(ResponseFlag::UpstreamRetryLimitExceeded);
    case.info.flags.set(ResponseFlag::UpstreamConnectionFailure);
    case.info.upstream = None;
    case.info.protocol = None;
    let context = FormatContext::new(&case.info);
    let mut out = Vec::new();
    let format = "%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG% %PROTOCOL% %REQ(:PATH)% %UPSTREAM_HOST% %UPSTREAM_CONNECTION_ID%";
    Formatter::parse(format, &Extensions::NONE).unwrap().write(&context, &mut out);
    let expected = "URX,UF UpstreamRetryLimitExceeded,UpstreamConnectionFailure - - - 0";
    assert_eq!(String::from_utf8(out).unwrap(), expected);
}

#[test]
fn certificates_and_server_names() {
    let cert = CertInfo {
        subject: "CN=a".into(),
        uri_sans: vec!["spiffe://a".into(), "spiffe://b".into()],
        sha256: "aa".into(),
        not_before: 86_400,
        ..CertInfo::default()
    };
    let mut connection = connection();
    connection.requested_server_name = Some("a\nb c.com".into());
    connection.tls = Some(Rc::new(TlsInfo {
        version: "TLSv1.3",
        peer: Some(Arc::new(cert.clone())),
        peer_issuers: vec![Arc::new(CertInfo { sha256: "bb".into(), ..cert })],
        ..TlsInfo::default()
    }));
    let case = case_on(connection);
    for (format, expected) in [
        ("%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_LOCAL_URI_SAN%", "spiffe://a,spiffe://b -"),
        ("%DOWNSTREAM_PEER_SUBJECT% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_SESSION_ID%", "CN=a TLSv1.3 -"),
        ("%DOWNSTREAM_PEER_CERT_V_START(%F)% %UPSTREAM_PEER_CERT_V_END%", "1970-01-02 -"),
        ("%DOWNSTREAM_PEER_CHAIN_FINGERPRINTS_256% %DOWNSTREAM_PEER_ISSUER_FINGERPRINT_256%", "aa,bb bb"),
        ("%REQUESTED_SERVER_NAME%", "invalid:a_b_c.com"),
    ] {
        assert_eq!(String::from_utf8_lossy(&case.text(format)), expected, "{format}");
    }
}

#[test]
fn grpc_status_is_shown_for_grpc_only() {
    let mut case = case();
    case.request.set(HeaderId::CONTENT_TYPE, "application/grpc+proto");
    assert_eq!(
        case.text("%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS_NUMBER%"),
        b"PermissionDenied PERMISSION_DENIED 7"
    );
    case.trailers.set(HeaderId::GRPC_STATUS, "99");
    assert_eq!(case.text("%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)%"), b"99 99");
    case.trailers.clear();
    case.info.response_code = 503;
    assert_eq!(case.text("%GRPC_STATUS%"), b"Unavailable");
    case.request.set(HeaderId::CONTENT_TYPE, "application/grpc-web");
    assert_eq!(case.text("%GRPC_STATUS%"), b"-");
}

#[test]
fn wrong_formats_are_refused_with_envoys_words() {
    for (format, expected) in [
        ("%NOPE%", "Not supported field in StreamInfo: NOPE"),
        ("a%", "Incorrect configuration: a%. Couldn't find valid command at position 1"),
        ("%REQ(a", "Couldn't find valid command"),
        ("%REQ%", "REQ requires parameters"),
        ("%PROTOCOL(x)%", "PROTOCOL does not take any parameters or length"),
        ("%PROTOCOL:3%", "PROTOCOL does not take any parameters or length"),
        ("%DOWNSTREAM_REMOTE_ADDRESS(16)%", "DOWNSTREAM_REMOTE_ADDRESS does not take any parameters"),
        ("%REQ(a?b?c)%", "More than 1 alternative header specified in token: a?b?c"),
        ("%REQ(a b)%", "Invalid header configuration. Format string contains invalid characters."),
        ("%START_TIME(%n)%", "Format string contains newline"),
        ("%START_TIME:3%", "START_TIME does not allow length to be specified."),
        ("%GRPC_STATUS(FOO)%", "Got: FOO"),
        ("%PATH(X)%", "Invalid PATH option: 'X', only 'WQ'/'NQ' are allowed"),
        ("%QUERY_PARAMS(x)%", "Invalid QUERY_PARAMS option: 'x'"),
        ("%METADATA(X:ns)%", "X is not supported type of metadata"),
        ("%FILTER_STATE(k:X)%", "only support PLAIN/TYPED/FIELD"),
        ("%FILTER_STATE(k:FIELD)%", "FIELD should be used with the field name"),
        ("%COMMON_DURATION(a)%", "Invalid common duration configuration: a."),
        ("%CEL(request.host)%", "CEL is not supported"),
        ("%REQ_WITHOUT_QUERY(:PATH)%", "Not supported field in StreamInfo: REQ_WITHOUT_QUERY"),
        ("%COALESCE({\"operators\":[1]})%", "operator entry must be either a string"),
    ] {
        let error = Formatter::parse(format, &Extensions::NONE).unwrap_err();
        assert!(error.reason().contains(expected), "{format}: {error}");
    }
}

#[test]
fn literals_are_known_as_such() {
    let parse = |text| Formatter::parse_header_value(text, &Extensions::NONE).unwrap();
    assert_eq!(parse("a%%b").as_literal(), Some(&b"a%b"[..]));
    assert_eq!(parse("").as_literal(), Some(&b""[..]));
    assert!(parse("%PROTOCOL%").as_literal().is_none());
    let case = case();
    let mut out = Vec::new();
    parse("%REQ(no)%").write(&case.context(), &mut out);
    assert!(out.is_empty());
}

/// Random formats made of the parts that mean something: none may panic, and each that parses must write.
#[test]
fn no_format_panics() {
    use rand::{Rng, SeedableRng};
    const PARTS: &[&str] = &[
        "%",
        "%%",
        "(",
        ")",
        ":",
        "?",
        "REQ",
        "RESP",
        "START_TIME",
        "COMMON_DURATION",
        "METADATA",
        "PATH",
        "FILTER_STATE",
        "COALESCE",
        "DS_RX_BEG",
        "ROUTE",
        "ns",
        "k",
        "%E",
        "*f",
        "3",
        "S",
        "99999999999999999999",
        "é",
        "\u{0}",
        "\n",
        "{\"operators\":[",
        "\"PROTOCOL\"",
        "]}",
        "PROTOCOL",
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
        "QUERY_PARAM",
        "a",
        "%Y",
        "-",
        "_",
        "0",
        "UPSTREAM_TLS_CIPHER",
        "EMIT_TIME",
        "TYPED",
    ];
    let mut random = rand::rngs::SmallRng::seed_from_u64(1);
    let case = case();
    let mut parsed = 0;
    for _ in 0..30_000 {
        let mut format = String::new();
        if random.random_bool(0.7) {
            format.push('%');
        }
        for _ in 0..random.random_range(0..9) {
            format.push_str(PARTS[random.random_range(0..PARTS.len())]);
        }
        if random.random_bool(0.7) {
            format.push('%');
        }
        if let Ok(formatter) = Formatter::parse(&format, &Extensions::NONE) {
            parsed += 1;
            let mut out = Vec::new();
            formatter.write(&case.context(), &mut out);
            let json =
                Formatter::parse_json(&fields(vec![("k", text_value(&format))]), true, &Extensions::NONE);
            out.clear();
            json.unwrap().write(&case.context(), &mut out);
            assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok(), "{format:?}: {out:?}");
        }
    }
    assert!(parsed > 1000, "only {parsed} formats were valid");
}
