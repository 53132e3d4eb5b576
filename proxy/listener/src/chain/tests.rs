use envoy_types::pb::google::protobuf::UInt32Value;

use super::*;

fn cidr(text: &str) -> CidrRange {
    let (address, len) = text.split_once('/').unwrap();
    CidrRange {
        address_prefix: address.to_owned(),
        prefix_len: Some(UInt32Value { value: len.parse().unwrap() }),
    }
}

fn connection(local: &str, remote: &str) -> ConnectionInfo {
    ConnectionInfo::accepted(
        0,
        "".into(),
        Address::Ip(local.parse().unwrap()),
        Address::Ip(remote.parse().unwrap()),
    )
}

fn compile(chains: &[FilterChainMatch]) -> ConfigResult<Criteria> {
    Criteria::new(chains.iter().map(|m| ("c", Some(m))))
}

fn names(list: &[&str]) -> FilterChainMatch {
    FilterChainMatch { server_names: list.iter().map(|s| (*s).to_owned()).collect(), ..Default::default() }
}

fn port_of(value: u32) -> FilterChainMatch {
    FilterChainMatch { destination_port: Some(UInt32Value { value }), ..Default::default() }
}

#[test]
fn no_criteria_match_all() {
    let m = compile(&[FilterChainMatch::default()]).unwrap();
    assert_eq!(m.find(&connection("10.0.0.1:80", "10.0.0.2:1000")), Some(0));
    assert_eq!(m.find(&connection("[::1]:80", "[::1]:1000")), Some(0));
    let mut unix = connection("10.0.0.1:80", "10.0.0.2:1000");
    unix.local = Address::Pipe("/x".into());
    unix.remote = Address::Pipe("".into());
    unix.direct_remote = unix.remote.clone();
    assert_eq!(m.find(&unix), Some(0));
}

#[test]
fn a_port_of_its_own_is_not_given_back() {
    let with_name = FilterChainMatch { server_names: vec!["a.test".into()], ..port_of(80) };
    let m = compile(&[with_name, FilterChainMatch::default()]).unwrap();
    assert_eq!(m.find(&connection("10.0.0.1:80", "10.0.0.2:1000")), None);
    assert_eq!(m.find(&connection("10.0.0.1:81", "10.0.0.2:1000")), Some(1));
}

#[test]
fn longest_destination_prefix_wins_and_stays() {
    let range = |r: &str| FilterChainMatch { prefix_ranges: vec![cidr(r)], ..Default::default() };
    let mut narrow = range("10.1.1.0/24");
    narrow.source_ports = vec![7];
    let m = compile(&[range("10.0.0.0/8"), range("10.1.0.0/16"), narrow, range("::/0")]).unwrap();
    assert_eq!(m.find(&connection("10.9.0.1:1", "10.0.0.2:1000")), Some(0));
    assert_eq!(m.find(&connection("10.1.9.1:1", "10.0.0.2:1000")), Some(1));
    assert_eq!(m.find(&connection("10.1.1.1:1", "10.0.0.2:7")), Some(2));
    assert_eq!(m.find(&connection("10.1.1.1:1", "10.0.0.2:8")), None);
    assert_eq!(m.find(&connection("[fd00::1]:1", "[fd00::2]:8")), Some(3));
    assert_eq!(m.find(&connection("11.1.1.1:1", "10.0.0.2:8")), None);
}

#[test]
fn server_names_exact_then_suffixes_then_any() {
    let m = compile(&[names(&["www.Example.com"]), names(&["*.example.com"]), names(&["*.com"]), names(&[])])
        .unwrap();
    let find = |name: &str| {
        let mut c = connection("10.0.0.1:443", "10.0.0.2:1");
        c.requested_server_name = Some(name.into());
        m.find(&c)
    };
    assert_eq!(find("www.example.com"), Some(0));
    assert_eq!(find("api.example.com"), Some(1));
    assert_eq!(find("a.b.example.com"), Some(1));
    assert_eq!(find("example.com"), Some(2));
    assert_eq!(find("example.org"), Some(3));
    assert_eq!(find(""), Some(3));
    assert_eq!(find("com."), Some(3));
}

#[test]
fn transport_and_application_protocols() {
    let tls = FilterChainMatch { transport_protocol: "tls".into(), ..Default::default() };
    let h2 = FilterChainMatch { application_protocols: vec!["h2".into(), "istio".into()], ..tls.clone() };
    let m = compile(&[tls, h2, FilterChainMatch::default()]).unwrap();
    let mut c = connection("10.0.0.1:443", "10.0.0.2:1");
    assert_eq!(m.find(&c), Some(2));
    c.transport_protocol = "tls";
    assert_eq!(m.find(&c), Some(0));
    c.application_protocols = vec!["x".into(), "istio".into()];
    assert_eq!(m.find(&c), Some(1));
}

#[test]
fn sources() {
    let local = FilterChainMatch { source_type: 1, ..Default::default() };
    let external = FilterChainMatch {
        source_type: 2,
        source_prefix_ranges: vec![cidr("10.0.0.0/8")],
        ..Default::default()
    };
    let direct =
        FilterChainMatch { direct_source_prefix_ranges: vec![cidr("192.168.0.0/16")], ..Default::default() };
    let m = compile(&[local, external, direct]).unwrap();
    assert_eq!(m.find(&connection("10.0.0.1:1", "127.0.0.1:5")), Some(0));
    assert_eq!(m.find(&connection("10.0.0.1:1", "10.0.0.1:5")), Some(0));
    assert_eq!(m.find(&connection("10.0.0.1:1", "10.0.0.2:5")), Some(1));
    assert_eq!(m.find(&connection("10.0.0.1:1", "11.0.0.2:5")), None);
    let mut proxied = connection("10.0.0.1:1", "11.0.0.2:5");
    proxied.direct_remote = Address::Ip("192.168.1.1:9".parse().unwrap());
    assert_eq!(m.find(&proxied), Some(2));
}

#[test]
fn ambiguous_chains_are_refused() {
    let e = compile(&[names(&["a"]), names(&["a"])]).unwrap_err();
    assert!(e.to_string().contains("has the same matching rules defined as 'c'"), "{e}");
    let e = compile(&[names(&["a", "b"]), names(&["b"])]).unwrap_err();
    assert!(e.to_string().contains("multiple filter chains with overlapping matching rules"), "{e}");
    let e = compile(&[names(&["a*.b"])]).unwrap_err();
    assert_eq!(e.path(), "filter_chains[0].filter_chain_match.server_names[0]");
    assert!(compile(&[names(&["*"])]).is_err());
    let bad = FilterChainMatch { prefix_ranges: vec![cidr("10.0.0.x/8")], ..Default::default() };
    assert!(compile(&[bad]).unwrap_err().to_string().contains("malformed IP address: 10.0.0.x"));
}
