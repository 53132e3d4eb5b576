use envoy_types::pb::envoy::config::core::v3::{ConfigSource, TypedExtensionConfig};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, DownstreamTlsContext, GenericSecret, SdsSecretConfig, Secret,
    TlsParameters, UpstreamTlsContext,
};
use sampan_core::stats::Store;

use super::support::*;
use crate::{ClientContext, ServerContext, StaticSecrets};

fn server_error(message: &DownstreamTlsContext, secrets: &StaticSecrets) -> String {
    ServerContext::from_proto(message, secrets, &Store::new().root()).unwrap_err().to_string()
}

fn client_error(message: &UpstreamTlsContext) -> String {
    ClientContext::from_proto(message, &StaticSecrets::default(), &Store::new().root())
        .unwrap_err()
        .to_string()
}

#[test]
fn what_cannot_be_loaded_is_an_error() {
    let none = StaticSecrets::default();
    let authority = ca("ca");
    let (leaf, other) = (authority.leaf(&[dns("a")]), authority.leaf(&[dns("a")]));
    let missing = "common_tls_context: No TLS certificates found for server context";
    assert_eq!(server_error(&DownstreamTlsContext::default(), &none), missing);
    let mismatch = Leaf { key: other.key.clone(), ..leaf.clone() };
    assert_eq!(
        server_error(&downstream(common(Some(&mismatch), None, &[]), false), &none),
        "common_tls_context.tls_certificates[0].private_key: Failed to load private key from <inline>, Cause: \
         KEY_VALUES_MISMATCH"
    );
    let broken = Leaf { pem: "nothing".into(), ..leaf.clone() };
    assert_eq!(
        server_error(&downstream(common(Some(&broken), None, &[]), false), &none),
        "common_tls_context.tls_certificates[0].certificate_chain: Failed to load certificate chain from <inline>"
    );
    let empty = Leaf { key: String::new(), ..leaf.clone() };
    assert!(server_error(&downstream(common(Some(&empty), None, &[]), false), &none).contains("private_key"));
    let no_ca = CertificateValidationContext { trusted_ca: inline("x"), ..Default::default() };
    assert_eq!(
        server_error(&downstream(common(Some(&leaf), Some(no_ca), &[]), false), &none),
        "common_tls_context.validation_context.trusted_ca: Failed to load trusted CA certificates from <inline>"
    );
}

#[test]
fn insecure_validation_contexts_are_refused() {
    let leaf = ca("ca").leaf(&[dns("a")]);
    let refuse = |context: CertificateValidationContext| {
        server_error(&downstream(common(Some(&leaf), Some(context), &[]), false), &StaticSecrets::default())
    };
    let sans = CertificateValidationContext {
        trusted_ca: None,
        ..matching(
            &ca("x"),
            envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType::Dns,
            envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern::Exact("a".into()),
        )
    };
    assert!(refuse(sans).ends_with("without trusted CA is insecure and not allowed"));
    let hash = |text: &str| CertificateValidationContext {
        verify_certificate_hash: vec![text.to_owned()],
        ..Default::default()
    };
    assert!(refuse(hash("00")).contains("verify_certificate_hash[0]: Invalid hex-encoded SHA-256 00"));
    assert!(refuse(hash(&"+1".repeat(32))).contains("Invalid hex-encoded"));
    let custom = CertificateValidationContext {
        custom_validator_config: Some(TypedExtensionConfig {
            name: "envoy.tls.cert_validator.other".into(),
            typed_config: None,
        }),
        ..Default::default()
    };
    assert!(refuse(custom).contains("'envoy.tls.cert_validator.other' is not supported"));
    let mut auto = upstream(common(None, None, &[]), "a");
    auto.auto_sni_san_validation = true;
    assert!(client_error(&auto).contains("without a validation context"));
}

#[test]
fn parameters() {
    let with = |params: TlsParameters| {
        let mut common = common(None, None, &[]);
        common.tls_params = Some(params);
        upstream(common, "a")
    };
    let ciphers = |names: &[&str]| {
        with(TlsParameters {
            cipher_suites: names.iter().map(|&n| n.to_owned()).collect(),
            ..Default::default()
        })
    };
    let parse = |message: &UpstreamTlsContext| {
        ClientContext::from_proto(message, &StaticSecrets::default(), &Store::new().root())
    };
    assert!(parse(&ciphers(&["ECDHE-RSA-AES128-GCM-SHA256", "AES128-SHA"])).is_ok());
    assert!(parse(&ciphers(&["[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]"])).is_ok());
    assert_eq!(
        client_error(&ciphers(&["ECDHE-RSA-AES128-GCM-SHA256", "nonsense", "RC4"])),
        "common_tls_context.tls_params.cipher_suites: Failed to initialize cipher suites \
         ECDHE-RSA-AES128-GCM-SHA256:nonsense:RC4. The following ciphers were rejected when tried individually: \
         nonsense, RC4"
    );
    assert!(client_error(&ciphers(&["AES128-SHA"])).contains("is not supported"));
    let curve = with(TlsParameters { ecdh_curves: vec!["X448".into()], ..Default::default() });
    assert!(client_error(&curve).contains("Failed to initialize ECDH curves X448"));
    let old = with(TlsParameters { tls_minimum_protocol_version: 1, ..Default::default() });
    assert_eq!(
        client_error(&old),
        "common_tls_context.tls_params.tls_minimum_protocol_version: TLSv1_0 is not supported"
    );
}

#[test]
fn wildcards_of_dns_names() {
    use crate::san::dns_name_match;
    for (name, pattern, matches) in [
        ("a.com", "A.com", true),
        ("x.a.com", "*.a.com", true),
        ("x.y.a.com", "*.a.com", false),
        ("a.com", "*.a.com", false),
        (".a.com", "*.a.com", true),
        ("x.a.com", "*.*.com", false),
        ("x.a.com", "x.*.com", false),
        ("foobar.a.com", "foo*.a.com", true),
        ("foobar.a.com", "*bar.a.com", true),
        ("foobar.a.com", "f*r.a.com", true),
        ("fr.a.com", "f*r.a.com", true),
        ("r.a.com", "r*r.a.com", false),
        ("foobar.a.com", "f*o*r.a.com", false),
        ("xn--abc.a.com", "xn--*.a.com", false),
        ("com", "*", false),
        ("a.com", "*.com.", false),
    ] {
        assert_eq!(dns_name_match(name, pattern), matches, "{name} {pattern}");
    }
}

#[test]
fn facts_as_openssl_prints_them() {
    let authority = ca("Authority, \u{e9}");
    let leaf = authority.leaf_with(&[dns("a")], |p| {
        p.serial_number = Some(rcgen::SerialNumber::from_slice(&[0, 0x0a, 0xff]));
        let name = &mut p.distinguished_name;
        name.push(rcgen::DnType::OrganizationName, " #x+y ");
        name.push(rcgen::DnType::CustomDnType(vec![1, 2, 3, 4]), rcgen::DnValue::Utf8String("v".into()));
        p.not_before = rcgen::date_time_ymd(2020, 1, 1);
    });
    let info = crate::cert_info::cert_info(&leaf.der.clone().into());
    assert_eq!(info.subject, "1.2.3.4=#0C0176,O=\\ #x\\+y\\ ,CN=leaf");
    assert_eq!(info.issuer, "CN=Authority\\, \\C3\\A9");
    assert_eq!(info.serial, "0aff");
    assert_eq!(info.not_before, 1_577_836_800);
    assert_eq!((info.sha256.len(), info.sha1.len()), (64, 40));
}

#[test]
fn static_secrets_by_name() {
    let authority = ca("ca");
    let leaf = authority.leaf(&[dns("a")]);
    let secret = |name: &str, kind: Type| Secret { name: name.to_owned(), r#type: Some(kind) };
    let mut secrets = StaticSecrets::default();
    secrets.add(secret("cert", Type::TlsCertificate(certificate(&leaf)))).unwrap();
    secrets.add(secret("roots", Type::ValidationContext(trusting(&authority)))).unwrap();
    // One of another kind may have the name too.
    secrets.add(secret("cert", Type::GenericSecret(GenericSecret::default()))).unwrap();
    let named = |name: &str| SdsSecretConfig { name: name.to_owned(), sds_config: None };
    let mut common = common(None, None, &[]);
    common.tls_certificate_sds_secret_configs = vec![named("cert")];
    common.validation_context_type =
        Some(ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
            default_validation_context: Some(CertificateValidationContext::default()),
            validation_context_sds_secret_config: Some(named("roots")),
            ..Default::default()
        }));
    let good = downstream(common.clone(), true);
    let store = Store::new();
    let context = ServerContext::from_proto(&good, &secrets, &store.root().scope("listener")).unwrap();
    let (authority, chains) = context.certs();
    assert_eq!(authority.unwrap().info.subject, "CN=ca");
    assert_eq!(chains[0].info.dns_sans, ["a"]);
    let shown = context.admin_certificate();
    assert_eq!(shown.ca_cert[0].path, "<inline>");
    assert_eq!(shown.cert_chain[0].subject_alt_names.len(), 1);
    assert_eq!(shown.cert_chain[0].serial_number, chains[0].info.serial);
    assert!(store.value("listener.ssl.certificate.cert.expiration_unix_time_seconds").unwrap() > 0);
    assert!(store.value("listener.ssl.certificate.roots.expiration_unix_time_seconds").unwrap() > 0);

    common.tls_certificate_sds_secret_configs = vec![named("nobody")];
    assert_eq!(
        server_error(&downstream(common.clone(), true), &secrets),
        "common_tls_context.tls_certificate_sds_secret_configs[0].name: Unknown static secret: nobody"
    );
    common.tls_certificate_sds_secret_configs =
        vec![SdsSecretConfig { name: "cert".into(), sds_config: Some(ConfigSource::default()) }];
    // A static secret does not stand in for one of SDS.
    assert_eq!(
        server_error(&downstream(common, true), &secrets),
        "common_tls_context.tls_certificate_sds_secret_configs[0].name: Unknown static secret: cert"
    );
}
