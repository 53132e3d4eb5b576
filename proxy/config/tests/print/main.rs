//! `envoy.json` is what `/config_dump` of Envoy 1.40 shows of `bootstrap.json`, without the node, which Envoy fills in.
//! Every map in it has one member: their order in Envoy is that of a hash table.

#![allow(missing_docs, clippy::unwrap_used)]

use sampan_config::{
    CheckOptions, Format, PrintOptions, UnknownFields, check, encode, schema::Message, to_json,
};

#[test]
fn prints_what_envoy_prints() {
    let message = Message::find("envoy.config.bootstrap.v3.Bootstrap").unwrap();
    let source = include_bytes!("bootstrap.json");
    let (bytes, _) = encode(message, Format::Json, source, UnknownFields::Reject).unwrap();
    check(message, &bytes, &CheckOptions::default()).unwrap();
    let options = PrintOptions { pretty: true, redact: true, ..PrintOptions::default() };
    let printed = to_json(message, &bytes, options).unwrap();
    let expected = include_str!("envoy.json");
    for (number, (ours, envoys)) in printed.lines().zip(expected.lines()).enumerate() {
        assert_eq!(ours, envoys, "line {}", number + 1);
    }
    assert_eq!(printed.lines().count(), expected.lines().count());
    assert!(!printed.contains("hush"));
}
