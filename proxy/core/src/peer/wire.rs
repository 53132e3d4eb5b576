//! A `google.protobuf.Struct` of strings, encoded with its keys in order. (The generated type keeps its fields in a
//! hash map and would write them in another order each time.)

use std::collections::BTreeMap;

/// Field 1 of everything here is a key or a list of entries; 2 is an entry's value.
const KEY: u8 = 0x0a;
const VALUE: u8 = 0x12;
const STRING_VALUE: u8 = 0x1a;
const STRUCT_VALUE: u8 = 0x2a;

/// A `Struct` with these strings, sorted by name, and one `Struct` of strings among them.
pub(super) fn put(fields: &[(&str, &str)], inner: Option<(&str, &BTreeMap<&str, &str>)>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut inner = inner;
    for (key, value) in fields {
        if let Some((name, map)) = inner.take_if(|(name, _)| *name < *key) {
            put_inner(&mut out, name, map);
        }
        put_string(&mut out, key, value);
    }
    if let Some((name, map)) = inner {
        put_inner(&mut out, name, map);
    }
    out
}

fn put_inner(out: &mut Vec<u8>, name: &str, map: &BTreeMap<&str, &str>) {
    let mut fields = Vec::new();
    map.iter().for_each(|(key, value)| put_string(&mut fields, key, value));
    put_entry(out, name, STRUCT_VALUE, &fields);
}

fn put_string(out: &mut Vec<u8>, key: &str, value: &str) {
    put_entry(out, key, STRING_VALUE, value.as_bytes());
}

/// An entry of a `Struct`: a key and a `Value` of one kind.
pub(super) fn put_entry(out: &mut Vec<u8>, key: &str, kind: u8, content: &[u8]) {
    let (mut value, mut entry) = (Vec::new(), Vec::new());
    put_bytes(&mut value, kind, content);
    put_bytes(&mut entry, KEY, key.as_bytes());
    put_bytes(&mut entry, VALUE, &value);
    put_bytes(out, KEY, &entry);
}

/// A length-delimited field by its tag.
pub(super) fn put_bytes(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    out.push(tag);
    let mut length = bytes.len();
    while length > 0x7f {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
}

/// What TCP metadata exchange sends behind its eight bytes: an `Any` of a `Struct` with the peer's and the node's id.
pub(super) fn put_exchange(peer: &[u8], id: &str) -> Vec<u8> {
    let mut fields = Vec::new();
    put_entry(&mut fields, "x-envoy-peer-metadata", STRUCT_VALUE, peer);
    if !id.is_empty() {
        put_entry(&mut fields, "x-envoy-peer-metadata-id", STRING_VALUE, id.as_bytes());
    }
    let mut any = Vec::new();
    put_bytes(&mut any, KEY, b"type.googleapis.com/google.protobuf.Struct");
    put_bytes(&mut any, VALUE, &fields);
    any
}
