use envoy_types::pb::envoy::config::core::v3::ProxyProtocolPassThroughTlVs as PassMessage;
use envoy_types::pb::envoy::config::core::v3::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::proxy_protocol::Rule;
use sampan_core::stats::Store;
use sampan_core::stream_info::{ConnectionInfo, Metadata};

use super::*;

fn accepted() -> Accepted {
    let peer = Address::Ip("127.0.0.1:5".parse().unwrap());
    let info = ConnectionInfo::accepted(0, "".into(), Address::Ip("127.0.0.1:80".parse().unwrap()), peer);
    Accepted { info, metadata: Metadata::new() }
}

fn filter(message: &Message) -> (ProxyProtocol, Store) {
    let store = Store::new();
    (ProxyProtocol::from_proto(message, &store.root()).unwrap(), store)
}

fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let mut out = V2_SIGNATURE.to_vec();
    out.extend([command, family]);
    out.extend((body.len() as u16).to_be_bytes());
    out.extend(body);
    out
}

const V4: [u8; 12] = [10, 0, 0, 1, 10, 0, 0, 2, 0x1f, 0x90, 0, 80];

#[test]
fn version_1() {
    let (f, store) = filter(&Message::default());
    let mut a = accepted();
    let line = b"PROXY TCP4 1.2.3.4 5.6.7.8 1000 443\r\n";
    for cut in 1..line.len() {
        assert_eq!(f.on_data(&line[..cut], &mut a), Step::More, "{cut}");
    }
    assert_eq!(f.on_data(&[line, &b"GET"[..]].concat(), &mut a), Step::Done { consume: line.len() });
    assert_eq!(a.info.remote.to_string(), "1.2.3.4:1000");
    assert_eq!(a.info.local.to_string(), "5.6.7.8:443");
    assert!(a.info.local_restored);
    assert_eq!(a.info.direct_remote.to_string(), "127.0.0.1:5");
    assert_eq!(store.value("proxy_proto.versions.v1.found"), Some(1));
}

#[test]
fn version_1_refused() {
    let (f, store) = filter(&Message::default());
    let bad: [&[u8]; 9] = [
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1000\r\n",
        b"PROXY TCP4 ::1 5.6.7.8 1000 443\r\n",
        b"PROXY TCP6 ::1 5.6.7.8 1000 443\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 443\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 443\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 443\r\n",
        b"PROXY TCP4 0.0.0.0 5.6.7.8 1 443\r\n",
        b"PROXY TCP4 1.2.3.4 224.0.0.1 1 443\r\n",
        b"GET / H\r\n",
    ];
    for line in bad {
        assert_eq!(f.on_data(line, &mut accepted()), Step::Close, "{line:?}");
    }
    assert_eq!(store.value("proxy_proto.versions.v1.error"), Some(bad.len() as u64));
    assert_eq!(store.value("downstream_cx_proxy_proto_error"), Some(bad.len() as u64));
    assert_eq!(f.on_data(b"GET / HTTP/1.1\r\n", &mut accepted()), Step::Close);
    let long = [b"PROXY ".as_slice(), &[b'x'; 200]].concat();
    assert_eq!(f.on_data(&long, &mut accepted()), Step::Close);
    assert_eq!(store.value("proxy_proto.not_found_disallowed"), Some(2));
    assert_eq!(f.on_data(&[&long[..], b"\r\n"].concat(), &mut accepted()), Step::Close);
    assert_eq!(store.value("proxy_proto.versions.v1.error"), Some(bad.len() as u64 + 1));
    let mut a = accepted();
    assert_eq!(f.on_data(b"PROXY UNKNOWN whatever\r\n", &mut a), Step::Done { consume: 24 });
    assert_eq!(a.info.remote, a.info.direct_remote);
}

#[test]
fn version_2_with_tlvs() {
    let rule = Rule {
        tlv_type: 0xea,
        on_tlv_present: Some(KeyValuePair { key: "vpc".into(), ..Default::default() }),
    };
    let pass = PassMessage { match_type: PassTlVsMatchType::Include as i32, tlv_type: vec![0x05] };
    let (f, _store) =
        filter(&Message { rules: vec![rule], pass_through_tlvs: Some(pass), ..Default::default() });
    let tlvs = [&V4[..], &[0xea, 0, 3, b'a', 0xff, b'b'], &[0x05, 0, 1, 9], &[0x06, 0, 0]].concat();
    let wire = v2(0x21, 0x11, &tlvs);
    let mut a = accepted();
    for cut in 1..wire.len() {
        assert_eq!(f.on_data(&wire[..cut], &mut a), Step::More, "{cut}");
    }
    assert_eq!(f.on_data(&wire, &mut a), Step::Done { consume: wire.len() });
    assert_eq!(a.info.remote.to_string(), "10.0.0.1:8080");
    assert_eq!(a.info.proxy_tlvs, [(0x05, Vec::from([9]).into())]);
    let value = a.metadata[DEFAULT_NAMESPACE].fields["vpc"].kind.clone();
    assert_eq!(value, Some(Kind::StringValue("a!b".into())));
}

#[test]
fn version_2_refused_and_local() {
    let (f, store) = filter(&Message::default());
    let overflow = [&V4[..], &[0xea, 0xff, 0xff, 1]].concat();
    let half_tlv = [&V4[..], &[0xea, 0]].concat();
    let bad = [
        v2(0x21, 0x11, &overflow),
        v2(0x21, 0x11, &half_tlv),
        v2(0x21, 0x11, &V4[..11]),
        v2(0x21, 0x21, &V4),
        v2(0x21, 0x31, &V4),
        v2(0x21, 0x10, &V4),
        v2(0x11, 0x11, &V4),
        v2(0x22, 0x11, &V4),
    ];
    for wire in &bad {
        let mut a = accepted();
        assert_eq!(f.on_data(wire, &mut a), Step::Close, "{wire:?}");
        assert_eq!(a.info.remote, a.info.direct_remote);
    }
    assert_eq!(store.value("proxy_proto.versions.v2.error"), Some(bad.len() as u64));
    let local = v2(0x20, 0, &[1, 2, 3]);
    let mut a = accepted();
    assert_eq!(f.on_data(&local, &mut a), Step::Done { consume: local.len() });
    assert_eq!(a.info.remote, a.info.direct_remote);
}

#[test]
fn optional_and_disallowed() {
    let (f, store) = filter(&Message {
        allow_requests_without_proxy_protocol: true,
        disallowed_versions: vec![Version::V1 as i32],
        ..Default::default()
    });
    assert_eq!(f.on_data(b"GET", &mut accepted()), Step::Done { consume: 0 });
    // A version that is not allowed is not looked for either: the bytes pass as they are.
    assert_eq!(f.on_data(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", &mut accepted()), Step::Done { consume: 0 });
    assert_eq!(f.on_data(b"\r\n\r\n", &mut accepted()), Step::More);
    assert_eq!(store.value("proxy_proto.not_found_allowed"), Some(2));
    let (f, store) = filter(&Message { disallowed_versions: vec![Version::V2 as i32], ..Default::default() });
    assert_eq!(f.on_data(&v2(0x21, 0x11, &V4), &mut accepted()), Step::Close);
    assert_eq!(store.value("proxy_proto.versions.v2.disallowed"), Some(1));
    let both = Message { disallowed_versions: vec![0, 1], ..Default::default() };
    assert!(ProxyProtocol::from_proto(&both, &Store::new().root()).is_err());
}
