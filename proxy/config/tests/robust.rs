//! No bytes make the reader panic, hang or grow without bounds.

#![allow(missing_docs, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use sampan_config::{
    CheckOptions, ErrorKind, Format, LoadError, PrintOptions, UnknownFields, any, check, encode,
    schema::Message, split_bootstrap, to_json,
};

const CONFIG: &str = r#"
node: {id: a, cluster: b, metadata: {k: [1, 2.5, "ü", null, {x: true}]}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
static_resources:
  listeners:
  - name: l
    address: {socket_address: {address: 0.0.0.0, port_value: 80}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: a
          route_config:
            virtual_hosts:
            - name: v
              domains: ["*"]
              routes:
              - match: {safe_regex: {regex: "/a.*"}}
                route: {weighted_clusters: {clusters: [{name: c, weight: 1}]}, timeout: 0.25s}
                typed_per_filter_config:
                  f: {"@type": type.googleapis.com/google.protobuf.StringValue, value: s}
          http_filters:
          - name: r
            typed_config:
              "@type": type.googleapis.com/xds.type.v3.TypedStruct
              type_url: type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              value: {suppress_envoy_headers: true}
  clusters:
  - &c {name: c, connect_timeout: 1.5s, lb_policy: MAGLEV, max_requests_per_connection: 7}
"#;

fn bootstrap() -> Message {
    Message::find("envoy.config.bootstrap.v3.Bootstrap").unwrap()
}

fn encoded(format: Format, source: &str) -> Result<Vec<u8>, LoadError> {
    encode(bootstrap(), format, source.as_bytes(), UnknownFields::Reject).map(|(bytes, _)| bytes)
}

/// Everything that reads encoded bytes.
fn read_all(bytes: &[u8]) {
    let _ = check(bootstrap(), bytes, &CheckOptions::default());
    for (pretty, redact, defaults) in [(true, true, false), (false, false, true)] {
        let _ = to_json(bootstrap(), bytes, PrintOptions { pretty, redact, defaults });
    }
    let _ = any::for_each_any(bootstrap(), bytes, &mut |path, _, _| -> Result<(), LoadError> {
        let _ = path.to_string();
        Ok(())
    });
    let _ = split_bootstrap(&bytes.to_vec().into());
}

/// A small generator of random numbers: the test is the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }
}

#[test]
fn printing_and_reading_are_inverse() {
    let bytes = encoded(Format::Yaml, CONFIG).unwrap();
    check(bootstrap(), &bytes, &CheckOptions::default()).unwrap();
    for pretty in [false, true] {
        let options = PrintOptions { pretty, ..PrintOptions::default() };
        let json = to_json(bootstrap(), &bytes, options).unwrap();
        let again = encoded(Format::Json, &json).unwrap();
        assert_eq!(to_json(bootstrap(), &again, options).unwrap(), json);
        let yaml = encoded(Format::Yaml, &json).unwrap();
        assert_eq!(to_json(bootstrap(), &yaml, options).unwrap(), json);
    }
}

#[test]
fn mutated_texts() {
    let json =
        to_json(bootstrap(), &encoded(Format::Yaml, CONFIG).unwrap(), PrintOptions::default()).unwrap();
    let pieces = [
        "{", "}", "[", "]", ":", ",", "\"", "'", "\\u", "&a ", "*a", "- ", "\n", "!x ", "#", "|\n", "ü",
        "\t", "@type", "1e9", "~",
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (format, source) in [(Format::Yaml, CONFIG), (Format::Json, json.as_str()), (Format::Text, CONFIG)] {
        for _ in 0..1500 {
            let mut text = source.to_owned();
            for _ in 0..1 + random.next(4) {
                let at = |random: &mut Random, text: &str| {
                    let mut at = random.next(text.len());
                    while !text.is_char_boundary(at) {
                        at -= 1;
                    }
                    at
                };
                let (a, b) = (at(&mut random, &text), at(&mut random, &text));
                match random.next(3) {
                    0 => text.insert_str(a, pieces[random.next(pieces.len())]),
                    1 => text.truncate(a.max(text.len() / 4).min(text.len())),
                    _ => {
                        let part = text[a.min(b)..a.max(b)].chars().take(40).collect::<String>();
                        text.insert_str(a, &part);
                    }
                }
                while !text.is_char_boundary(text.len()) {
                    text.pop();
                }
            }
            if let Ok(bytes) = encoded(format, &text) {
                read_all(&bytes);
            }
        }
    }
}

#[test]
fn truncated_and_flipped_messages() {
    let bytes = encoded(Format::Yaml, CONFIG).unwrap();
    for length in 0..bytes.len() {
        read_all(&bytes[..length]);
    }
    let mut random = Random(0x1234_5678_9abc_def1);
    for _ in 0..1500 {
        let mut broken = bytes.clone();
        for _ in 0..1 + random.next(6) {
            let at = random.next(broken.len());
            broken[at] = random.next(256) as u8;
        }
        read_all(&broken);
    }
    let noise: Vec<u8> = (0..4096).map(|_| random.next(256) as u8).collect();
    for start in 0..noise.len() {
        read_all(&noise[start..]);
    }
}

fn quickly<T>(work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = work();
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
    out
}

#[test]
fn bombs_are_refused() {
    let mut laughs = "node:\n  metadata:\n    a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let previous = format!("*a{}, ", level - 1).repeat(10);
        laughs.push_str(&format!("    a{level}: &a{level} [{}]\n", previous.trim_end_matches(", ")));
    }
    let error = quickly(|| encoded(Format::Yaml, &laughs)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge, "{error}");

    let long = format!(
        "node:\n  metadata:\n    a: &a \"{}\"\n    b: [{}]\n",
        "x".repeat(1 << 20),
        "*a, ".repeat(2000)
    );
    assert_eq!(quickly(|| encoded(Format::Yaml, &long)).unwrap_err().kind, ErrorKind::TooLarge);

    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let deep = format!("node: {{metadata: {{k: {}1{}}}}}", open.repeat(50_000), close.repeat(50_000));
        assert!(quickly(|| encoded(Format::Yaml, &deep)).is_err());
        assert!(quickly(|| encoded(Format::Json, &deep)).is_err());
    }
}

#[test]
fn deep_messages_are_refused() {
    // Value { list_value { values { … } } }, thousands deep.
    let mut value = vec![0x20, 0x01];
    for _ in 0..5000 {
        for number in [1u8, 6] {
            let mut outer = vec![number << 3 | 2];
            sampan_config::wire::put_varint(&mut outer, value.len() as u64);
            outer.extend_from_slice(&value);
            value = outer;
        }
    }
    let message = Message::find("google.protobuf.Value").unwrap();
    let error = check(message, &value, &CheckOptions::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::TooLarge);
    assert!(to_json(message, &value, PrintOptions::default()).is_err());

    // An Any in an Any in an Any …
    let mut any: Vec<u8> = Vec::new();
    for _ in 0..3000 {
        let mut outer = Vec::new();
        sampan_config::wire::put_bytes(&mut outer, 1, b"type.googleapis.com/google.protobuf.Any");
        sampan_config::wire::put_bytes(&mut outer, 2, &any);
        any = outer;
    }
    let message = Message::find("google.protobuf.Any").unwrap();
    assert!(check(message, &any, &CheckOptions::default()).is_err());
    assert!(to_json(message, &any, PrintOptions::default()).is_err());
    let visit = &mut |_: &sampan_config::Path<'_>, _: &str, _: &[u8]| -> Result<(), LoadError> { Ok(()) };
    assert!(any::for_each_any(message, &any, visit).is_err());
}

#[test]
fn the_schema_is_whole() {
    let mut patterns = 0;
    for message in Message::all() {
        assert_eq!(Message::find(message.name()), Some(message));
        assert!(message.oneofs().len() <= 64, "{message:?} has more oneofs than the encoder has bits for");
        for field in message.fields() {
            assert!(!field.name().is_empty() && !field.json_name().is_empty(), "{message:?}");
            assert_eq!(message.field(field.number()), Some(field));
            assert_eq!(message.field_by_name(field.json_name()), Some(field));
            assert!(field.oneof().is_none_or(|oneof| oneof < message.oneofs().len()));
            if let Some(inner) = field.message() {
                assert!(!inner.name().is_empty());
            }
            if let Some(values) = field.enumeration() {
                assert!(values.values().len() > 0, "{} has no values", values.name());
            }
            patterns += usize::from(!field.rules().is_empty());
        }
    }
    assert!(Message::all().count() > 1500);
    assert!(patterns > 900, "{patterns} fields with rules");
    assert!(Message::find("envoy.config.cluster.v3.Nothing").is_none());
}
