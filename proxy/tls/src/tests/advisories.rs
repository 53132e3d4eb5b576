//! What implementations of TLS were found to get wrong, each with its number.

use std::time::Instant;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::CertificateValidationContext;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, GeneralSubtree, KeyUsagePurpose};
use sampan_core::stats::Store;

use super::support::*;
use super::verification::{assert_accepted, assert_refused};
use crate::{ServerContext, StaticSecrets};

/// CVE-2022-21657: a certificate that may only be a client's serves no server, and the other way round.
#[tokio::test]
async fn a_certificate_for_the_other_purpose() {
    let authority = ca("authority");
    let with = |purpose| authority.leaf_with(&[dns("server")], |p| p.extended_key_usages = vec![purpose]);
    let (client, server) =
        (with(ExtendedKeyUsagePurpose::ClientAuth), with(ExtendedKeyUsagePurpose::ServerAuth));
    assert_accepted(&client, &trusting(&authority)).await;
    assert_refused(&server, &trusting(&authority), "unsupported certificate purpose").await;
    for (leaf, good) in [(&server, true), (&client, false)] {
        let pair = Pair::new(
            &downstream(common(Some(leaf), None, &[]), false),
            &upstream(common(None, Some(trusting(&authority)), &[]), "server"),
        );
        let (_, up) = pair.plain().await;
        assert_eq!(up.is_ok(), good);
    }
}

/// CVE-2022-21656: a name of one kind is no name of another, whatever it says.
#[tokio::test]
async fn a_name_of_another_kind() {
    let authority = ca("authority");
    let exact = |kind, text: &str| matching(&authority, kind, MatchPattern::Exact(text.to_owned()));
    let email = |text: &str| rcgen::SanType::Rfc822Name(text.try_into().unwrap());
    for name in [uri("good.example.com"), email("good.example.com"), ip("10.0.0.1")] {
        let leaf = authority.leaf(&[name]);
        for text in ["good.example.com", "10.0.0.1"] {
            assert_refused(&leaf, &exact(SanType::Dns, text), "SAN matcher").await;
        }
    }
    let leaf = authority.leaf(&[dns("10.0.0.1"), email("spiffe://td/ns/a")]);
    assert_refused(&leaf, &exact(SanType::IpAddress, "10.0.0.1"), "SAN matcher").await;
    assert_refused(&leaf, &exact(SanType::Uri, "spiffe://td/ns/a"), "SAN matcher").await;
}

/// RUSTSEC-2026-0099: an authority that may vouch for one name may not vouch for a wildcard that covers others, too.
#[tokio::test]
async fn a_wildcard_wider_than_its_authoritys_names() {
    let authority = ca("authority");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "constrained");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.name_constraints = Some(rcgen::NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName("accept.example.com".into())],
        excluded_subtrees: Vec::new(),
    });
    for (name, good) in [
        ("accept.example.com", true),
        ("a.accept.example.com", true),
        ("*.example.com", false),
        ("reject.example.com", false),
    ] {
        let (middle, mut leaf) = authority.intermediate(params.clone(), &[dns(name)]);
        leaf.pem.push_str(&middle);
        if good {
            assert_accepted(&leaf, &trusting(&authority)).await;
        } else {
            assert_refused(&leaf, &trusting(&authority), "permitted subtree violation").await;
        }
    }
}

/// RUSTSEC-2026-0049: each of a certificate's distribution points counts, not the first alone.
#[tokio::test]
async fn a_list_of_the_second_distribution_point() {
    let authority = ca("authority");
    let points = |urls: &[&str]| {
        urls.iter().map(|url| rcgen::CrlDistributionPoint { uris: vec![(*url).to_owned()] }).collect()
    };
    let leaf = |serial: u64| {
        authority.leaf_with(&[uri("spiffe://td/a")], |p| {
            p.serial_number = Some(serial.into());
            p.crl_distribution_points = points(&["http://one/crl", "http://two/crl"]);
        })
    };
    let list = authority.crl_of(&[8], Some("http://two/crl")).0;
    let validation = CertificateValidationContext { crl: inline(&list), ..trusting(&authority) };
    assert_accepted(&leaf(7), &validation).await;
    assert_refused(&leaf(8), &validation, "certificate revoked").await;
}

/// RUSTSEC-2026-0104: a revocation list whose reasons are an empty BIT STRING is an error and no panic.
#[test]
fn a_list_with_empty_reasons() {
    let authority = ca("authority");
    let (_, mut der) = authority.crl_of(&[8], Some("http://two/crl"));
    // onlyContainsUserCerts TRUE becomes onlySomeReasons without a bit.
    let at = der.windows(3).position(|w| w == [0x81, 1, 0xff]).expect("the scope");
    der[at..at + 3].copy_from_slice(&[0x83, 1, 0]);
    let leaf = authority.leaf(&[dns("server")]);
    let validation = CertificateValidationContext { crl: inline(&crl_pem(&der)), ..trusting(&authority) };
    let message = downstream(common(Some(&leaf), Some(validation), &[]), true);
    assert!(ServerContext::from_proto(&message, &StaticSecrets::default(), &Store::new().root()).is_err());
}

/// RUSTSEC-2023-0052: a client whose authorities all sign one another costs no more than any other that is refused.
#[tokio::test]
async fn a_chain_of_authorities_with_one_name() {
    let (authority, wrong) = (ca("authority"), ca("authority"));
    let mut leaf = wrong.leaf(&[dns("client")]);
    for _ in 0..40 {
        leaf.pem.push_str(&wrong.cross(&ca("authority")));
    }
    let start = Instant::now();
    assert_refused(&leaf, &trusting(&authority), "").await;
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}
