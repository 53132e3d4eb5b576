//! What both sides of a handshake agree on, how they fail to, and what they learn of each other.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::support::*;
use crate::{ClientOptions, Transport};

#[tokio::test]
async fn mutual_tls_tells_both_sides_about_each_other() {
    let authority = ca("authority");
    let server = authority.leaf(&[dns("server.example.com"), uri("spiffe://td/server")]);
    let client = authority.leaf(&[uri("spiffe://td/client"), dns("c.example.com"), ip("10.0.0.1")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), Some(trusting(&authority)), &["h2", "http/1.1"]), true),
        &upstream(
            common(Some(&client), Some(trusting(&authority)), &["http/1.1", "h2"]),
            "server.example.com",
        ),
    );
    let (down, up) = pair.plain().await;
    let (down, up) = (down.unwrap(), up.unwrap());
    assert_eq!(down.alpn.as_deref(), Some("h2"), "the server's order counts");
    assert_eq!(down.sni.as_deref(), Some("server.example.com"));
    assert_eq!(down.version, "TLSv1.2", "a client's default ends at 1.2");
    assert_eq!(down.cipher, "ECDHE-ECDSA-AES128-GCM-SHA256");
    assert_eq!(down.group, "X25519");
    let peer = down.peer.unwrap();
    assert_eq!(peer.uri_sans, ["spiffe://td/client"]);
    assert_eq!(peer.dns_sans, ["c.example.com"]);
    assert_eq!(peer.ip_sans, ["10.0.0.1"]);
    assert_eq!((peer.subject.as_str(), peer.issuer.as_str()), ("CN=leaf", "CN=authority"));
    assert!(peer.pem.starts_with("-----BEGIN%20CERTIFICATE-----%0AMII"));
    assert_eq!(&**down.peer_chain_pem.unwrap(), &*peer.pem);
    assert_eq!(down.local.unwrap().uri_sans, ["spiffe://td/server"]);
    assert!(up.peer_validated);
    assert_eq!(up.peer.unwrap().dns_sans, ["server.example.com"]);
    assert_eq!(pair.stat("server.ssl.handshake"), 1);
    assert_eq!(pair.stat("server.ssl.no_certificate"), 0);
    assert_eq!(pair.stat("server.ssl.versions.TLSv1.2"), 1);
    assert_eq!(pair.stat("server.ssl.ciphers.ECDHE-ECDSA-AES128-GCM-SHA256"), 1);
    assert_eq!(pair.stat("server.ssl.sigalgs.ecdsa_secp256r1_sha256"), 1);
    assert_eq!(pair.stat("client.ssl.curves.X25519"), 1);
}

#[tokio::test]
async fn without_a_validation_context_nobody_is_verified() {
    let server = ca("whoever").leaf(&[dns("elsewhere")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &[]), true),
        &upstream(common(None, None, &[]), "server"),
    );
    let (down, up) = pair.plain().await;
    assert!(!up.unwrap().peer_validated);
    assert!(down.unwrap().peer.is_none(), "requiring without anything to verify with asks for nothing");
}

#[tokio::test]
async fn a_required_certificate_that_is_missing() {
    let authority = ca("authority");
    let server = authority.leaf(&[dns("server")]);
    for version in [TLS12, TLS13] {
        let mut up = common(None, None, &[]);
        up.tls_params = versions(version, version);
        let pair = Pair::new(
            &downstream(common(Some(&server), Some(trusting(&authority)), &[]), true),
            &upstream(up.clone(), "server"),
        );
        let (down, up_result) = pair.plain().await;
        assert_eq!(
            down.unwrap_err(),
            "TLS_error:|268435648:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE:peer did not \
             provide required client certificate:TLS_error_end"
        );
        assert!(up_result.is_err());
        assert_eq!(pair.stat("server.ssl.fail_verify_no_cert"), 1);
        assert_eq!(pair.stat("server.ssl.connection_error"), 0);
        // Not required, but verified if there is one.
        let pair = Pair::new(
            &downstream(common(Some(&server), Some(trusting(&authority)), &[]), false),
            &upstream(up, "server"),
        );
        let (down, up_result) = pair.plain().await;
        assert!(!down.unwrap().peer_validated);
        up_result.unwrap();
        assert_eq!(pair.stat("server.ssl.no_certificate"), 1);
    }
}

#[tokio::test]
async fn no_protocol_in_common_means_none() {
    let server = ca("ca").leaf(&[dns("server")]);
    for version in [TLS12, TLS13] {
        for (theirs, ours, chosen) in [
            (&["h2", "http/1.1"][..], &["http/1.1"][..], Some("http/1.1")),
            (&["h2"], &["http/1.1"], None),
            (&[], &["h2"], None),
            (&["h2"], &[], None),
        ] {
            let mut up = common(None, None, ours);
            up.tls_params = versions(version, version);
            let pair =
                Pair::new(&downstream(common(Some(&server), None, theirs), false), &upstream(up, "server"));
            let (down, up) = pair.plain().await;
            assert_eq!(down.unwrap().alpn.as_deref(), chosen);
            assert_eq!(up.unwrap().alpn.as_deref(), chosen);
        }
    }
}

#[tokio::test]
async fn versions_that_do_not_meet() {
    let server = ca("ca").leaf(&[dns("server")]);
    let mut down = common(Some(&server), None, &[]);
    down.tls_params = versions(TLS13, TLS13);
    let pair = Pair::new(&downstream(down, false), &upstream(common(None, None, &[]), "server"));
    let (down, up) = pair.plain().await;
    assert_eq!(
        down.unwrap_err(),
        "TLS_error:|268435696:SSL routines:OPENSSL_internal:UNSUPPORTED_PROTOCOL:TLS_error_end"
    );
    assert_eq!(
        up.unwrap_err(),
        "TLS_error:|268436526:SSL routines:OPENSSL_internal:TLSV1_ALERT_PROTOCOL_VERSION:TLS_error_end"
    );
    assert_eq!(pair.stat("server.ssl.connection_error"), 1);
}

#[tokio::test]
async fn a_lowest_version_above_the_highest() {
    let server = ca("ca").leaf(&[dns("server")]);
    let mut up = common(None, None, &[]);
    up.tls_params = versions(TLS13, 0);
    let pair = Pair::new(&downstream(common(Some(&server), None, &[]), false), &upstream(up, "server"));
    assert_eq!(
        pair.plain().await.1.unwrap_err(),
        "TLS_error:|268435736:SSL routines:OPENSSL_internal:NO_SUPPORTED_VERSIONS_ENABLED:TLS_error_end"
    );
}

#[tokio::test]
async fn options_of_a_connection() {
    let authority = ca("authority");
    let server = authority.leaf(&[dns("*.example.com"), ip("127.0.0.1")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &["h2"]), false),
        &upstream(common(None, Some(trusting(&authority)), &["http/1.1"]), "configured"),
    );
    let options = |sans: &[&str]| ClientOptions {
        sni: Some("a.example.com".into()),
        verify_sans: sans.iter().map(|&s| s.to_owned()).collect(),
        alpn: vec![b"h2".to_vec()],
    };
    let (down, up) = pair.meet(&options(&["a.example.com"])).await;
    assert_eq!(down.unwrap().sni.as_deref(), Some("a.example.com"));
    assert_eq!(up.unwrap().alpn.as_deref(), Some("h2"));
    assert!(pair.meet(&options(&["127.0.0.1"])).await.1.is_ok());
    let refused = pair.meet(&options(&["a.other.com"])).await.1.unwrap_err();
    assert!(refused.contains("verify cert failed: verify SAN list"), "{refused}");
    assert_eq!(pair.stat("client.ssl.fail_verify_san"), 1);
    // Names to verify without anything to trust.
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &[]), false),
        &upstream(common(None, None, &[]), ""),
    );
    let (down, _) = pair.plain().await;
    assert_eq!(down.unwrap().sni, None);
    assert!(pair.meet(&options(&["a.example.com"])).await.1.is_err());
}

#[tokio::test]
async fn the_server_name_is_verified_if_wanted() {
    let authority = ca("authority");
    let server = authority.leaf(&[dns("a.example.com")]);
    let mut up = upstream(common(None, Some(trusting(&authority)), &[]), "a.example.com");
    up.auto_sni_san_validation = true;
    let pair = Pair::new(&downstream(common(Some(&server), None, &[]), false), &up);
    assert!(pair.plain().await.1.is_ok());
    let other = ClientOptions { sni: Some("b.example.com".into()), ..Default::default() };
    assert!(pair.meet(&other).await.1.unwrap_err().contains("SAN matcher"));
}

#[tokio::test]
async fn sessions_are_resumed_and_verified_again() {
    let authority = ca("authority");
    let (server, client) = (authority.leaf(&[dns("server")]), authority.leaf(&[dns("client")]));
    for version in [TLS12, TLS13] {
        let mut up = common(Some(&client), Some(trusting(&authority)), &[]);
        up.tls_params = versions(version, version);
        let down = downstream(common(Some(&server), Some(trusting(&authority)), &[]), true);
        let pair = Pair::new(&down, &upstream(up.clone(), "server"));
        for _ in 0..2 {
            let (down, up) = pair.plain().await;
            assert!(down.unwrap().peer_validated);
            assert_eq!(up.unwrap().peer.unwrap().dns_sans, ["server"]);
        }
        assert_eq!(pair.stat("server.ssl.session_reused"), 1, "version {version}");
        assert_eq!(pair.stat("client.ssl.session_reused"), 1);
        // A context with another validation context does not take the session (CVE-2022-21654).
        let stricter = matching(&authority, SanType::Dns, MatchPattern::Exact("nobody".into()));
        let other =
            Pair::new(&downstream(common(Some(&server), Some(stricter), &[]), true), &upstream(up, "server"));
        let (down, _) = meet(&other.server, &pair.client, &ClientOptions::default()).await;
        assert!(down.unwrap_err().contains("SAN matcher"));
        assert_eq!(other.stat("server.ssl.session_reused"), 0);
    }
}

#[tokio::test]
async fn certificates_by_server_name() {
    let authority = ca("authority");
    let (one, two) = (authority.leaf(&[dns("one.com")]), authority.leaf(&[dns("*.two.com"), dns("two.com")]));
    let mut both = common(Some(&one), None, &[]);
    both.tls_certificates.push(certificate(&two));
    let pair = Pair::new(&downstream(both, false), &upstream(common(None, None, &[]), ""));
    for (sni, first) in [
        ("one.com", true),
        ("two.com", false),
        ("a.two.com", false),
        ("a.b.two.com", true),
        ("three.com", true),
    ] {
        let options = ClientOptions { sni: Some(sni.into()), ..Default::default() };
        let (down, up) = pair.meet(&options).await;
        let name = if first { "one.com" } else { "*.two.com" };
        assert_eq!(up.unwrap().peer.unwrap().dns_sans[0], name, "{sni}");
        assert_eq!(down.unwrap().local.unwrap().dns_sans[0], name, "{sni}");
    }
}

#[tokio::test]
async fn what_is_no_tls() {
    let server = ca("ca").leaf(&[dns("server")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &[]), false),
        &upstream(common(None, None, &[]), "server"),
    );
    for (bytes, reason) in [
        (
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            "TLS_error:|268435612:SSL routines:OPENSSL_internal:HTTP_REQUEST:TLS_error_end",
        ),
        (
            b"SSH-2.0-x\r\n",
            "TLS_error:|268435703:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER:TLS_error_end",
        ),
        (
            &[
                &b"\x16\x03\x01\x00\x2d\x01\x00\x00\x29\x03\x02"[..],
                &[7; 32],
                b"\x00\x00\x02\x00\x2f\x01\x00",
            ]
            .concat(),
            "TLS_error:|268435696:SSL routines:OPENSSL_internal:UNSUPPORTED_PROTOCOL:TLS_error_end",
        ),
        (b"", ""),
        (b"\x16\x03", ""),
    ] {
        let (down, mut up) = sockets().await;
        up.write_all(bytes).await.unwrap();
        up.shutdown().await.unwrap();
        let error = pair.server.accept(Transport::Tcp(down)).await.err().unwrap();
        assert_eq!(error.to_string(), reason);
    }
    assert_eq!(pair.stat("server.ssl.connection_error"), 3);
}

#[tokio::test]
async fn a_peer_that_closes_without_notice_has_closed() {
    let server = ca("ca").leaf(&[dns("server")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &[]), false),
        &upstream(common(None, None, &[]), "server"),
    );
    let (down, up) = sockets().await;
    let options = ClientOptions::default();
    let (accepted, connected) = tokio::join!(
        pair.server.accept(Transport::Tcp(down)),
        pair.client.connect(Transport::Tcp(up), &options)
    );
    let mut stream = accepted.unwrap().0;
    let Transport::TlsClient(client) = connected.unwrap().0 else { panic!("not TLS") };
    drop(client.into_inner());
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_key_that_may_not_sign() {
    use rcgen::{KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256, RsaKeySize};
    for (usage, accepted) in
        [(KeyUsagePurpose::KeyEncipherment, false), (KeyUsagePurpose::DigitalSignature, true)]
    {
        let mut params = rcgen::CertificateParams::new(vec!["server".to_owned()]).unwrap();
        params.key_usages = vec![usage];
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let server =
            Leaf { pem: certificate.pem(), key: key.serialize_pem(), der: certificate.der().to_vec() };
        let up = upstream(common(None, None, &[]), "server");
        let pair = Pair::new(&downstream(common(Some(&server), None, &[]), false), &up);
        match pair.plain().await.1 {
            Ok(_) => assert!(accepted),
            Err(text) => {
                assert!(!accepted);
                let name = "KEY_USAGE_BIT_INCORRECT:TLS_error_end";
                assert_eq!(text, format!("TLS_error:|268435758:SSL routines:OPENSSL_internal:{name}"));
                assert_eq!(pair.stat("client.ssl.connection_error"), 1);
            }
        }
    }
}
