//! Which certificates are accepted: authorities, names, validity, hashes, revocation.

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::CertificateValidationContext;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::certificate_validation_context::TrustChainVerification;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::UInt32Value;

use super::support::*;

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
