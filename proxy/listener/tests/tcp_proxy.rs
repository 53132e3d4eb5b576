//! `tcp_proxy` between real sockets.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use envoy_types::pb::envoy::config::accesslog::v3::{AccessLog, access_log::ConfigType};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, circuit_breakers::Thresholds};
use envoy_types::pb::envoy::config::core::v3 as core_pb;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{
    FileAccessLog, file_access_log::AccessLogFormat,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use envoy_types::pb::google::protobuf::{Duration as ProtoDuration, UInt32Value};
use socket2::SockRef;

mod support;

use support::{any, chain, connect, counter, listener, read, serve_clusters, server};

/// A static cluster `up` with these ports on the loopback address.
fn cluster(ports: &[u16]) -> Cluster {
    let host = |port: &u16| endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: Some(core_pb::Address {
                address: Some(core_pb::address::Address::SocketAddress(core_pb::SocketAddress {
                    address: "127.0.0.1".into(),
                    port_specifier: Some(core_pb::socket_address::PortSpecifier::PortValue((*port).into())),
                    ..Default::default()
                })),
            }),
            ..Default::default()
        })),
        ..Default::default()
    };
    Cluster {
        name: "up".into(),
        connect_timeout: Some(ProtoDuration { seconds: 1, nanos: 0 }),
        load_assignment: Some(endpoint::ClusterLoadAssignment {
            cluster_name: "up".into(),
            endpoints: vec![endpoint::LocalityLbEndpoints {
                lb_endpoints: ports.iter().map(host).collect(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn proxy(change: impl FnOnce(&mut TcpProxy)) -> pb::Listener {
    let mut message = TcpProxy {
        stat_prefix: "t".into(),
        cluster_specifier: Some(tcp_proxy::ClusterSpecifier::Cluster("up".into())),
        ..Default::default()
    };
    change(&mut message);
    let mut chain = chain("c", Default::default());
    chain.filters[0].config_type = Some(pb::filter::ConfigType::TypedConfig(any(
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &message,
    )));
    listener("127.0.0.1", vec![chain])
}

/// An upstream that handles one connection after the other.
fn upstream(handle: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || socket.incoming().for_each(|s| handle(s.unwrap())));
    port
}

fn echo(mut stream: TcpStream) {
    let mut copy = stream.try_clone().unwrap();
    std::io::copy(&mut stream, &mut copy).unwrap();
    copy.shutdown(Shutdown::Write).unwrap();
}

#[test]
fn echoes_with_half_close() {
    let server = server(&[]);
    let port = upstream(echo);
    let kept = serve_clusters(&proxy(|_| {}), &server, &[cluster(&[port])], |at| {
        let mut s = connect(&at[0]);
        let block: Vec<u8> = (0..5_000_000_u32).map(|i| (i % 251) as u8).collect();
        let mut writer = s.try_clone().unwrap();
        let sent = block.clone();
        let thread = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        s.read_to_end(&mut got).unwrap();
        thread.join().unwrap();
        assert!(got == block);
    });
    assert_eq!(counter(&server, "tcp.t.downstream_cx_rx_bytes_total"), 5_000_000);
    assert_eq!(counter(&server, "tcp.t.downstream_cx_tx_bytes_total"), 5_000_000);
    assert_eq!(counter(&server, "cluster.up.upstream_cx_total"), 1);
    assert_eq!(counter(&server, "cluster.up.upstream_cx_rx_bytes_total"), 5_000_000);
    assert_eq!(counter(&server, "cluster.up.upstream_cx_destroy_remote"), 1);
    assert_eq!(counter(&server, "cluster.up.upstream_cx_active"), 0);
    drop(kept);
}

#[test]
fn no_cluster_no_host_no_room() {
    let server_a = server(&[]);
    let _kept = serve_clusters(&proxy(|_| {}), &server_a, &[], |at| assert_eq!(read(connect(&at[0])), ""));
    assert_eq!(counter(&server_a, "tcp.t.downstream_cx_no_route"), 1);

    let server_b = server(&[]);
    let _kept = serve_clusters(&proxy(|_| {}), &server_b, &[cluster(&[])], |at| {
        assert_eq!(read(connect(&at[0])), "")
    });
    assert_eq!(counter(&server_b, "cluster.up.upstream_cx_none_healthy"), 1);

    let server_c = server(&[]);
    let mut full = cluster(&[upstream(echo)]);
    let limit = Thresholds { max_connections: Some(UInt32Value { value: 0 }), ..Default::default() };
    full.circuit_breakers = Some(CircuitBreakers { thresholds: vec![limit], ..Default::default() });
    let _kept =
        serve_clusters(&proxy(|_| {}), &server_c, &[full], |at| assert_eq!(read(connect(&at[0])), ""));
    assert_eq!(counter(&server_c, "cluster.up.upstream_cx_overflow"), 1);
    assert_eq!(counter(&server_c, "cluster.up.upstream_cx_total"), 0);
}

#[test]
fn connects_again_and_gives_up() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server_a = server(&[]);
    let message = proxy(|m| m.max_connect_attempts = Some(UInt32Value { value: 3 }));
    let _kept = serve_clusters(&message, &server_a, &[cluster(&[closed])], |at| {
        assert_eq!(read(connect(&at[0])), "")
    });
    assert_eq!(counter(&server_a, "cluster.up.upstream_cx_connect_fail"), 3);
    assert_eq!(counter(&server_a, "cluster.up.upstream_cx_connect_attempts_exceeded"), 1);

    // Round robin: at the second attempt at the latest it is the other host's turn.
    let server_b = server(&[]);
    let hosts = cluster(&[closed, upstream(|mut s| s.write_all(b"here").unwrap())]);
    let message = proxy(|m| m.max_connect_attempts = Some(UInt32Value { value: 2 }));
    let _kept = serve_clusters(&message, &server_b, &[hosts], |at| assert_eq!(read(connect(&at[0])), "here"));
}

#[test]
fn idle_and_longest_duration() {
    let short = Some(ProtoDuration { seconds: 0, nanos: 200_000_000 });
    let talk = |at: &[sampan_core::Address]| {
        let mut s = connect(&at[0]);
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(80));
            s.write_all(b"x").ok();
        }
        read(s)
    };
    let server_a = server(&[]);
    let hosts = [cluster(&[upstream(echo)])];
    let _kept = serve_clusters(&proxy(|m| m.idle_timeout = short), &server_a, &hosts, move |at| {
        assert_eq!(talk(at), "xxxx");
    });
    assert_eq!(counter(&server_a, "tcp.t.idle_timeout"), 1);

    let server_b = server(&[]);
    let message = proxy(|m| m.max_downstream_connection_duration = short);
    let _kept = serve_clusters(&message, &server_b, &hosts, move |at| {
        let begin = std::time::Instant::now();
        assert_eq!(read(connect(&at[0])), "");
        assert!(begin.elapsed() < Duration::from_secs(1));
    });
    assert_eq!(counter(&server_b, "tcp.t.max_downstream_connection_duration"), 1);
}

#[test]
fn resets_are_passed_on() {
    let reset = |s: &TcpStream| SockRef::from(s).set_linger(Some(Duration::ZERO)).unwrap();
    let server_a = server(&[]);
    let hosts = cluster(&[upstream(move |mut s| {
        s.read_exact(&mut [0; 3]).unwrap();
        reset(&s);
    })]);
    let _kept = serve_clusters(&proxy(|_| {}), &server_a, &[hosts], |at| {
        let mut s = connect(&at[0]);
        s.write_all(b"abc").unwrap();
        assert_eq!(s.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    });

    let server_b = server(&[]);
    let (tell, told) = std::sync::mpsc::channel();
    let hosts = cluster(&[upstream(move |mut s| {
        s.read_exact(&mut [0; 3]).unwrap();
        tell.send(s.read(&mut [0]).map_err(|e| e.kind())).unwrap();
    })]);
    let _kept = serve_clusters(&proxy(|_| {}), &server_b, &[hosts], move |at| {
        let mut s = connect(&at[0]);
        s.write_all(b"abc").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        reset(&s);
        drop(s);
        assert_eq!(
            told.recv_timeout(Duration::from_secs(3)).unwrap(),
            Err(std::io::ErrorKind::ConnectionReset)
        );
    });
}

fn file_log(path: &str, format: &str) -> AccessLog {
    let message = FileAccessLog {
        path: path.to_owned(),
        access_log_format: Some(AccessLogFormat::LogFormat(core_pb::SubstitutionFormatString {
            format: Some(core_pb::substitution_format_string::Format::TextFormatSource(
                core_pb::DataSource {
                    specifier: Some(core_pb::data_source::Specifier::InlineString(format.to_owned())),
                    ..Default::default()
                },
            )),
            ..Default::default()
        })),
    };
    AccessLog {
        name: "f".into(),
        config_type: Some(ConfigType::TypedConfig(any(
            "envoy.extensions.access_loggers.file.v3.FileAccessLog",
            &message,
        ))),
        ..Default::default()
    }
}

#[test]
fn access_logs_of_filter_and_listener() {
    let path = std::env::temp_dir().join(format!("sampan-tcp-{}.log", std::process::id()));
    let path = path.to_str().unwrap().to_owned();
    let facts = "%ACCESS_LOG_TYPE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %UPSTREAM_CLUSTER% %UPSTREAM_REQUEST_ATTEMPT_COUNT%";
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = server(&[]);
    let mut message = proxy(|m| {
        m.access_log = vec![file_log(&path, &format!("T {facts}\n"))];
        m.access_log_options = Some(tcp_proxy::TcpAccessLogOptions {
            flush_access_log_on_connected: true,
            ..Default::default()
        });
    });
    message.access_log = vec![file_log(&path, &format!("L {facts} %RESPONSE_CODE_DETAILS%\n"))];
    let good = cluster(&[upstream(|mut s| {
        s.read_exact(&mut [0; 5]).unwrap();
        s.write_all(b"abc").unwrap();
    })]);
    let client = |at: &[sampan_core::Address]| {
        let mut s = connect(&at[0]);
        s.write_all(b"hello").unwrap();
        read(s);
    };
    let _kept = serve_clusters(&message, &server, &[good], client);
    let _kept = serve_clusters(&message, &server, &[cluster(&[closed])], client);
    message.filter_chains[0].filter_chain_match.as_mut().unwrap().source_ports = vec![1];
    let _kept = serve_clusters(&message, &server, &[], client);
    server.access_logs.flush();
    let deadline = std::time::Instant::now() + Duration::from_secs(3);
    let lines = loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.lines().count() >= 6 || std::time::Instant::now() > deadline {
            break text;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        lines,
        "T TcpUpstreamConnected - 0 0 up 1\nT TcpConnectionEnd - 5 3 up 1\nL NotSet - 5 3 up 1 -\n\
         T TcpConnectionEnd UF,URX 0 0 up 1\nL NotSet UF,URX 0 0 up 1 -\n\
         L NotSet NR 0 0 - 0 filter_chain_not_found\n"
    );
}
