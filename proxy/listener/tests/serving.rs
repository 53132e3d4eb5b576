//! Listeners on real sockets: accept, listener filters, chain match, limits, stats.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol;
use envoy_types::pb::google::protobuf::{Duration as ProtoDuration, UInt32Value};
use sampan_core::Address;
use sampan_listener::Bound;

mod support;

use support::{address, any, chain, connect, counter, listener, listener_filter, parse, read, serve, server};

#[test]
fn serves_and_counts() {
    let server = server(&[]);
    let message = listener("127.0.0.1", vec![chain("hello", Default::default())]);
    let seen = server.clone();
    let _kept = serve(&message, &server, move |at| {
        for _ in 0..3 {
            assert_eq!(read(connect(&at[0])), "hello");
        }
        assert_eq!(counter(&seen, "listener.l.worker_0.downstream_cx_total"), 3);
    });
    assert_eq!(counter(&server, "listener.l.downstream_cx_total"), 3);
    assert_eq!(counter(&server, "listener.l.downstream_cx_destroy"), 3);
    assert_eq!(counter(&server, "listener.l.downstream_cx_active"), 0);
}

#[test]
fn unix_and_additional_addresses() {
    let server = server(&[]);
    let path = std::env::temp_dir().join(format!("sampan-listener-{}.sock", std::process::id()));
    let mut message = listener("127.0.0.1", vec![chain("hello", Default::default())]);
    let pipe = |path: String| core_pb::Address {
        address: Some(core_pb::address::Address::Pipe(core_pb::Pipe { path, mode: 0o600 })),
    };
    let name = format!("@sampan-test-{}", std::process::id());
    for address in [pipe(path.to_str().unwrap().to_owned()), pipe(name), address("::1")] {
        message
            .additional_addresses
            .push(pb::AdditionalAddress { address: Some(address), ..Default::default() });
    }
    let socket = path.clone();
    let _kept = serve(&message, &server, move |at| {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(read(connect(&at[0])), "hello");
        assert_eq!(read(UnixStream::connect(&socket).unwrap()), "hello");
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let name = format!("sampan-test-{}", std::process::id());
        let name = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        assert_eq!(read(UnixStream::connect_addr(&name).unwrap()), "hello");
        assert_eq!(read(connect(&at[3])), "hello");
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn inspectors_choose_the_chain_and_leave_the_bytes() {
    let server = server(&[]);
    let http = pb::FilterChainMatch { application_protocols: vec!["http/1.1".into()], ..Default::default() };
    let h2 = pb::FilterChainMatch { application_protocols: vec!["h2c".into()], ..Default::default() };
    let tls = pb::FilterChainMatch {
        transport_protocol: "tls".into(),
        server_names: vec!["*.test".into()],
        ..Default::default()
    };
    let mut echo = chain("http", http);
    echo.filters[0].config_type =
        Some(pb::filter::ConfigType::TypedConfig(any("envoy.extensions.filters.network.echo.v3.Echo", &())));
    let mut message = listener("127.0.0.1", vec![echo, chain("h2", h2), chain("tls", tls)]);
    message.default_filter_chain = Some(chain("default", Default::default()));
    message.listener_filters = vec![
        listener_filter("tls_inspector.v3.TlsInspector", &()),
        listener_filter("http_inspector.v3.HttpInspector", &()),
    ];
    let _kept = serve(&message, &server, |at| {
        let send = |parts: &[&[u8]]| {
            let mut s = connect(&at[0]);
            for part in parts {
                s.write_all(part).unwrap();
                std::thread::sleep(Duration::from_millis(30));
            }
            // The proxy may have answered and closed already.
            let _ = s.shutdown(Shutdown::Write);
            read(s)
        };
        assert_eq!(send(&[b"GET / HT", b"TP/1.1\r\n", b"\r\n"]), "GET / HTTP/1.1\r\n\r\n");
        assert_eq!(send(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]), "h2");
        assert_eq!(send(&[b"\x00\x01\x02\x03\x04"]), "default");
        let hello = client_hello("a.test");
        assert_eq!(send(&[&hello[..7], &hello[7..40], &hello[40..]]), "tls");
        assert_eq!(send(&[b"GE"]), "");
    });
    assert_eq!(counter(&server, "http_inspector.http11_found"), 1);
    assert_eq!(counter(&server, "http_inspector.http2_found"), 1);
    assert_eq!(counter(&server, "tls_inspector.tls_found"), 1);
    assert_eq!(counter(&server, "tls_inspector.sni_found"), 1);
    assert_eq!(counter(&server, "listener.l.downstream_listener_filter_remote_close"), 1);
    assert_eq!(counter(&server, "listener.l.downstream_pre_cx_active"), 0);
}

fn client_hello(name: &str) -> Vec<u8> {
    let n = u16::try_from(name.len()).unwrap();
    let mut ext = vec![0, 0];
    ext.extend((n + 5).to_be_bytes());
    ext.extend((n + 3).to_be_bytes());
    ext.push(0);
    ext.extend(n.to_be_bytes());
    ext.extend(name.as_bytes());
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(u16::try_from(ext.len()).unwrap().to_be_bytes());
    body.extend(ext);
    let len = u16::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1];
    record.extend((len + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend(len.to_be_bytes());
    record.extend(body);
    record
}

#[test]
fn proxy_protocol_moves_the_addresses() {
    let server = server(&[]);
    let cidr =
        core_pb::CidrRange { address_prefix: "9.9.9.9".into(), prefix_len: Some(UInt32Value { value: 32 }) };
    let source = pb::FilterChainMatch {
        source_prefix_ranges: vec![cidr],
        source_ports: vec![77],
        ..Default::default()
    };
    let mut echo = chain("from 9", source);
    echo.filters[0].config_type =
        Some(pb::filter::ConfigType::TypedConfig(any("envoy.extensions.filters.network.echo.v3.Echo", &())));
    let mut message = listener("127.0.0.1", vec![echo]);
    message.listener_filters =
        vec![listener_filter("proxy_protocol.v3.ProxyProtocol", &ProxyProtocol::default())];
    let _kept = serve(&message, &server, |at| {
        let mut s = connect(&at[0]);
        s.write_all(b"PROXY TCP4 9.9.9.9 1.2.3.4 77 80\r\nrest").unwrap();
        s.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read(s), "rest");
        let mut s = connect(&at[0]);
        s.write_all(b"PROXY TCP4 9.9.9.8 1.2.3.4 77 80\r\nrest").unwrap();
        assert_eq!(read(s), "");
        let mut s = connect(&at[0]);
        s.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(read(s), "");
    });
    assert_eq!(counter(&server, "listener.l.no_filter_chain_match"), 1);
    assert_eq!(counter(&server, "downstream_cx_proxy_proto_error"), 1);
    assert_eq!(counter(&server, "listener.l.downstream_cx_total"), 1);
}

#[test]
fn filter_timeout_closes_or_continues() {
    for (go_on, expected) in [(false, ""), (true, "ab")] {
        let server = server(&[]);
        let mut echo = chain("echo", Default::default());
        echo.filters[0].config_type = Some(pb::filter::ConfigType::TypedConfig(any(
            "envoy.extensions.filters.network.echo.v3.Echo",
            &(),
        )));
        let mut message = listener("127.0.0.1", vec![echo]);
        message.listener_filters = vec![listener_filter("tls_inspector.v3.TlsInspector", &())];
        message.listener_filters_timeout = Some(ProtoDuration { seconds: 0, nanos: 100_000_000 });
        message.continue_on_listener_filters_timeout = go_on;
        let _kept = serve(&message, &server, move |at| {
            let mut s = connect(&at[0]);
            s.write_all(b"ab").unwrap();
            let mut two = [0; 2];
            let got =
                s.read(&mut two).map(|n| String::from_utf8_lossy(&two[..n]).into_owned()).unwrap_or_default();
            assert_eq!(got, expected);
        });
        assert_eq!(counter(&server, "listener.l.downstream_pre_cx_timeout"), 1);
    }
}

#[test]
fn connection_limits() {
    let held = || {
        let mut echo = chain("echo", Default::default());
        echo.filters[0].config_type = Some(pb::filter::ConfigType::TypedConfig(any(
            "envoy.extensions.filters.network.echo.v3.Echo",
            &(),
        )));
        listener("127.0.0.1", vec![echo])
    };
    let two = |at: &[Address]| {
        let mut first = connect(&at[0]);
        first.write_all(b"x").unwrap();
        first.read_exact(&mut [0]).unwrap();
        assert_eq!(read(connect(&at[0])), "");
        drop(first);
        std::thread::sleep(Duration::from_millis(50));
        let mut third = connect(&at[0]);
        third.write_all(b"y").unwrap();
        third.read_exact(&mut [0]).unwrap();
    };
    let server_l = server(&[("envoy.resource_limits.listener.l.connection_limit", "1")]);
    let _kept = serve(&held(), &server_l, two);
    assert_eq!(counter(&server_l, "listener.l.downstream_cx_overflow"), 1);
    let server_g = server(&[("overload.global_downstream_max_connections", "1")]);
    let _kept = serve(&held(), &server_g, two);
    assert_eq!(counter(&server_g, "listener.l.downstream_global_cx_overflow"), 1);
}

#[test]
fn a_taken_port_and_wrong_configurations_are_named() {
    let server = server(&[]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut message = listener("127.0.0.1", vec![chain("c", Default::default())]);
    let Some(core_pb::address::Address::SocketAddress(s)) = &mut message.address.as_mut().unwrap().address
    else {
        panic!("not a socket address")
    };
    s.port_specifier = Some(core_pb::socket_address::PortSpecifier::PortValue(port.into()));
    let failed = Bound::bind(parse(&message, &server).unwrap(), 2).err().unwrap();
    assert_eq!(failed.to_string(), format!("cannot bind '127.0.0.1:{port}': Address already in use"));

    let refused = |change: &dyn Fn(&mut pb::Listener)| {
        let mut message = listener("127.0.0.1", vec![chain("c", Default::default())]);
        change(&mut message);
        parse(&message, &server).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(refused(&|l| l.filter_chains.clear()), "filter_chains: no filter chains specified");
    assert_eq!(
        refused(&|l| l.tcp_fast_open_queue_length = Some(UInt32Value { value: 5 })),
        "tcp_fast_open_queue_length: tcp_fast_open_queue_length is not supported"
    );
    let unknown = |l: &mut pb::Listener| {
        l.filter_chains[0].filters[0].config_type =
            Some(pb::filter::ConfigType::TypedConfig(any("x.Y", &())));
    };
    assert_eq!(
        refused(&unknown),
        "filter_chains[0].filters[0].typed_config: network filter type \"type.googleapis.com/x.Y\" is not supported"
    );
    let twice = |l: &mut pb::Listener| {
        let filter = l.filter_chains[0].filters[0].clone();
        l.filter_chains[0].filters.push(filter);
    };
    assert_eq!(
        refused(&twice),
        "filter_chains[0].filters[0]: terminal filter named f must be the last filter in a network filter chain"
    );
}

#[test]
fn ports_are_shared_by_workers() {
    let server = server(&[]);
    let config = parse(&listener("127.0.0.1", vec![chain("c", Default::default())]), &server).unwrap();
    let bound = Bound::bind(config, 3).unwrap();
    let at: SocketAddr = bound.addresses[0].socket_addr().unwrap();
    assert_ne!(at.port(), 0);
    assert_eq!(bound.listen().unwrap().len(), 3);
    assert!(TcpStream::connect(at).is_err(), "the sockets are gone with their owner");
}
