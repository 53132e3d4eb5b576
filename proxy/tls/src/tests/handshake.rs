use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::CertificateValidationContext;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::certificate_validation_context::TrustChainVerification;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::UInt32Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::support::*;
use crate::{ClientOptions, Transport};

const TLS12: i32 = 3;
const TLS13: i32 = 4;

/// The server verifies the client with `validation`, both versions of TLS.
async fn client_accepted(leaf: &Leaf, validation: &CertificateValidationContext) -> Vec<Outcome> {
    let own = ca("own").leaf(&[dns("server")]);
    let mut outcomes = Vec::new();
    for version in [TLS12, TLS13] {
        let mut down = common(Some(&own), Some(validation.clone()), &[]);
        down.tls_params = versions(version, version);
        let mut up = common(Some(leaf), None, &[]);
        up.tls_params = versions(version, version);
        let pair = Pair::new(&downstream(down, true), &upstream(up, "server"));
        outcomes.push(pair.plain().await);
    }
    outcomes
}

pub(super) async fn assert_accepted(leaf: &Leaf, validation: &CertificateValidationContext) {
    for (server, client) in client_accepted(leaf, validation).await {
        assert!(server.unwrap().peer_validated);
        client.unwrap();
    }
}

pub(super) async fn assert_refused(leaf: &Leaf, validation: &CertificateValidationContext, reason: &str) {
    for (server, client) in client_accepted(leaf, validation).await {
        let text = server.unwrap_err();
        assert!(text.contains(reason), "{text}");
        assert!(
            text.starts_with("TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:")
        );
        assert!(client.is_err());
    }
}

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
async fn an_unknown_authority_is_refused_by_either_side() {
    let (good, bad) = (ca("good"), ca("bad"));
    assert_refused(
        &bad.leaf(&[uri("spiffe://td/client")]),
        &trusting(&good),
        "certificate verification error at depth 0: unable to get local issuer certificate",
    )
    .await;
    let server = bad.leaf(&[dns("server")]);
    let pair = Pair::new(
        &downstream(common(Some(&server), None, &[]), false),
        &upstream(common(None, Some(trusting(&good)), &[]), "server"),
    );
    let (down, up) = pair.plain().await;
    assert!(up.unwrap_err().contains("unable to get local issuer certificate"));
    assert_eq!(
        down.unwrap_err(),
        "TLS_error:|268436504:SSL routines:OPENSSL_internal:TLSV1_ALERT_UNKNOWN_CA:TLS_error_end"
    );
    assert_eq!(pair.stat("client.ssl.fail_verify_error"), 1);
    assert_eq!(pair.stat("client.ssl.connection_error"), 0);
    assert_eq!(pair.stat("server.ssl.connection_error"), 1);
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
async fn names_are_matched_by_kind() {
    let authority = ca("authority");
    let leaf = authority.leaf(&[
        dns("a.example.com"),
        dns("*.wild.example.com"),
        uri("spiffe://td/ns/a"),
        ip("10.1.2.3"),
        ip("::1"),
    ]);
    let exact = |kind, text: &str| matching(&authority, kind, MatchPattern::Exact(text.to_owned()));
    for validation in [
        exact(SanType::Dns, "a.example.com"),
        exact(SanType::Dns, "A.EXAMPLE.com"),
        exact(SanType::Dns, "x.wild.example.com"),
        exact(SanType::Uri, "spiffe://td/ns/a"),
        exact(SanType::IpAddress, "10.1.2.3"),
        exact(SanType::IpAddress, "::1"),
        matching(&authority, SanType::Uri, MatchPattern::Prefix("spiffe://td/".into())),
    ] {
        assert_accepted(&leaf, &validation).await;
    }
    for validation in [
        exact(SanType::Dns, "b.example.com"),
        exact(SanType::Dns, "x.y.wild.example.com"),
        exact(SanType::Dns, "wild.example.com"),
        exact(SanType::Dns, "spiffe://td/ns/a"),
        exact(SanType::Uri, "a.example.com"),
        exact(SanType::Uri, "SPIFFE://td/ns/a"),
        exact(SanType::Email, "10.1.2.3"),
        // No wildcards but for exact matchers on DNS names.
        matching(&authority, SanType::Dns, MatchPattern::Prefix("x.wild".into())),
    ] {
        assert_refused(
            &leaf,
            &validation,
            "verify cert failed: SAN matcher, certificate SANs are [a.example.com, *.wild.example.com, \
             spiffe://td/ns/a, 10.1.2.3, ::1]",
        )
        .await;
    }
}

/// CVE-2026-47778
#[tokio::test]
async fn a_name_with_a_nul_matches_nothing() {
    let authority = ca("authority");
    let leaf = authority.leaf(&[dns("good.com\0.evil.com"), uri("spiffe://td/a\0b")]);
    for validation in [
        matching(&authority, SanType::Dns, MatchPattern::Exact("good.com".into())),
        matching(&authority, SanType::Dns, MatchPattern::Prefix("good.com".into())),
        matching(&authority, SanType::Dns, MatchPattern::Exact("good.com\0.evil.com".into())),
        matching(&authority, SanType::Uri, MatchPattern::Prefix("spiffe://td/a".into())),
    ] {
        assert_refused(&leaf, &validation, "certificate SANs are []").await;
    }
}

#[tokio::test]
async fn validity_and_the_leave_to_ignore_it() {
    let authority = ca("authority");
    let name = [uri("spiffe://td/a")];
    let expired = authority.leaf_with(&name, |p| {
        p.not_before = rcgen::date_time_ymd(2019, 1, 1);
        p.not_after = rcgen::date_time_ymd(2020, 1, 1);
    });
    let future = authority.leaf_with(&name, |p| p.not_before = rcgen::date_time_ymd(2090, 1, 1));
    let strict = trusting(&authority);
    let lenient = CertificateValidationContext { allow_expired_certificate: true, ..strict.clone() };
    assert_refused(&expired, &strict, "at depth 0: certificate has expired").await;
    assert_refused(&future, &strict, "at depth 0: certificate is not yet valid").await;
    assert_accepted(&expired, &lenient).await;
    assert_accepted(&future, &lenient).await;
    let stranger = ca("stranger").leaf_with(&name, |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1));
    assert_refused(&stranger, &lenient, "unable to get local issuer certificate").await;
}

#[tokio::test]
async fn hashes_of_certificate_and_key() {
    let authority = ca("authority");
    let leaf = authority.leaf(&[uri("spiffe://td/a")]);
    let digest = |bytes: &[u8]| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let hash = sampan_core::format::hex(digest(&leaf.der).as_ref());
    let colons =
        hash.as_bytes().chunks(2).map(|c| std::str::from_utf8(c).unwrap()).collect::<Vec<_>>().join(":");
    let spki = {
        use base64::Engine as _;
        let parsed = crate::cert_info::parse(&leaf.der).unwrap();
        base64::engine::general_purpose::STANDARD.encode(digest(parsed.public_key().raw))
    };
    let with = |hash: &str, spki: Option<&str>| CertificateValidationContext {
        verify_certificate_hash: vec![hash.to_owned()],
        verify_certificate_spki: spki.map(str::to_owned).into_iter().collect(),
        ..Default::default()
    };
    let zero = "00".repeat(32);
    assert_accepted(&leaf, &with(&hash, None)).await;
    assert_accepted(&leaf, &with(&colons, None)).await;
    assert_accepted(&leaf, &with(&zero, Some(&spki))).await;
    assert_refused(&leaf, &with(&zero, None), "verify cert failed: cert hash and spki").await;
    let mut trusted = with(&zero, None);
    trusted.trusted_ca = inline(&authority.pem);
    assert_refused(&leaf, &trusted, "verify cert failed: cert hash and spki").await;
}

#[tokio::test]
async fn untrusted_certificates_may_be_taken_but_count_as_such() {
    let (good, bad) = (ca("good"), ca("bad"));
    let validation = CertificateValidationContext {
        trust_chain_verification: TrustChainVerification::AcceptUntrusted.into(),
        ..trusting(&good)
    };
    for (leaf, validated) in [(bad.leaf(&[dns("x")]), false), (good.leaf(&[dns("x")]), true)] {
        for (down, up) in client_accepted(&leaf, &validation).await {
            let down = down.unwrap();
            assert_eq!(down.peer_validated, validated);
            assert!(down.peer.is_some());
            up.unwrap();
        }
    }
}

#[tokio::test]
async fn revoked_certificates_and_missing_lists() {
    let authority = ca("authority");
    let serial = |n: u64| authority.leaf_with(&[uri("spiffe://td/a")], |p| p.serial_number = Some(n.into()));
    let with = |crl: String| CertificateValidationContext { crl: inline(&crl), ..trusting(&authority) };
    assert_accepted(&serial(7), &with(authority.crl(&[8]))).await;
    assert_refused(&serial(8), &with(authority.crl(&[8])), "certificate revoked").await;
    assert_refused(&serial(7), &with(ca("other").crl(&[8])), "unable to get certificate CRL").await;
}

#[tokio::test]
async fn a_certificate_that_is_trusted_as_it_stands() {
    let own = ca("self");
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["self.example.com".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    let leaf = Leaf { pem: certificate.pem(), key: key.serialize_pem(), der: certificate.der().to_vec() };
    let validation = CertificateValidationContext { trusted_ca: inline(&leaf.pem), ..Default::default() };
    assert_accepted(&leaf, &validation).await;
    assert_refused(&own.leaf(&[dns("self.example.com")]), &validation, "unable to get local issuer").await;
}

#[tokio::test]
async fn intermediates_are_counted() {
    let root = ca("root");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "middle");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let (middle, leaf) = root.intermediate(params, &[uri("spiffe://td/a")]);
    let depth = |n: u32| CertificateValidationContext {
        max_verify_depth: Some(UInt32Value { value: n }),
        ..trusting(&root)
    };
    let chain = Leaf { pem: format!("{}{middle}", leaf.pem), ..leaf.clone() };
    assert_accepted(&chain, &trusting(&root)).await;
    assert_accepted(&chain, &depth(2)).await;
    assert_refused(&chain, &depth(1), "certificate chain too long").await;
    assert_refused(&leaf, &trusting(&root), "unable to get local issuer certificate").await;
    // The intermediate alone may be trusted.
    let partial = CertificateValidationContext { trusted_ca: inline(&middle), ..Default::default() };
    assert_accepted(&leaf, &partial).await;
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

/// One with a NUL is none (CVE-2025-66220).
#[tokio::test]
async fn other_names_by_their_oid() {
    let authority = ca("authority");
    let upn = "1.3.6.1.4.1.311.20.2.3";
    let name = |value: &str| {
        let value = rcgen::OtherNameValue::Utf8String(value.to_owned());
        rcgen::SanType::OtherName((vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3], value))
    };
    let mut validation = matching(&authority, SanType::OtherName, MatchPattern::Prefix("me@".into()));
    validation.match_typed_subject_alt_names[0].oid = upn.into();
    assert_accepted(&authority.leaf(&[name("me@example.com")]), &validation).await;
    assert_refused(&authority.leaf(&[name("me@\0.com")]), &validation, "SANs are []").await;
    validation.match_typed_subject_alt_names[0].oid = "1.2.3".into();
    assert_refused(&authority.leaf(&[name("me@example.com")]), &validation, "SAN matcher").await;
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
