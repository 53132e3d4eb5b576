//! Certificates made on the spot and two contexts that meet.

use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SubjectAltNameMatcher,
    TlsCertificate, TlsParameters, UpstreamTlsContext,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::google::protobuf::BoolValue;
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType as RcgenSan,
};
use sampan_core::stats::Store;
use sampan_core::stream_info::TlsInfo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::{ClientContext, ClientOptions, ServerContext, StaticSecrets, Transport};

/// `tls_minimum_protocol_version` and `tls_maximum_protocol_version`.
pub(super) const TLS12: i32 = 3;
pub(super) const TLS13: i32 = 4;

/// An authority.
pub(super) struct Ca {
    pub(super) pem: String,
    params: CertificateParams,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
#[derive(Clone)]
pub(super) struct Leaf {
    pub(super) pem: String,
    pub(super) key: String,
    pub(super) der: Vec<u8>,
}

pub(super) fn ca(name: &str) -> Ca {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Ca { pem: certificate.pem(), params: params.clone(), issuer: Issuer::new(params, key) }
}

pub(super) fn dns(name: &str) -> RcgenSan {
    RcgenSan::DnsName(name.try_into().unwrap())
}

pub(super) fn uri(name: &str) -> RcgenSan {
    RcgenSan::URI(name.try_into().unwrap())
}

pub(super) fn ip(name: &str) -> RcgenSan {
    RcgenSan::IpAddress(name.parse::<IpAddr>().unwrap())
}

impl Ca {
    pub(super) fn leaf(&self, sans: &[RcgenSan]) -> Leaf {
        self.leaf_with(sans, |_| {})
    }

    pub(super) fn leaf_with(&self, sans: &[RcgenSan], change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "leaf");
        params.subject_alt_names = sans.to_vec();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Leaf { pem: certificate.pem(), key: key.serialize_pem(), der: certificate.der().to_vec() }
    }

    pub(super) fn crl(&self, revoked: &[u64]) -> String {
        self.crl_of(revoked, None).0
    }

    /// The list of a distribution point, for users' certificates, as PEM and DER.
    pub(super) fn crl_of(&self, revoked: &[u64], point: Option<&str>) -> (String, Vec<u8>) {
        let point = point.map(|url| rcgen::CrlIssuingDistributionPoint {
            distribution_point: rcgen::CrlDistributionPoint { uris: vec![url.to_owned()] },
            scope: Some(rcgen::CrlScope::UserCertsOnly),
        });
        let list = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2020, 1, 1),
            next_update: rcgen::date_time_ymd(2099, 1, 1),
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: point,
            revoked_certs: revoked
                .iter()
                .map(|serial| rcgen::RevokedCertParams {
                    serial_number: rcgen::SerialNumber::from(*serial),
                    revocation_time: rcgen::date_time_ymd(2021, 1, 1),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap();
        (list.pem().unwrap(), list.der().to_vec())
    }

    /// A certificate of another authority's key by this one, as PEM.
    pub(super) fn cross(&self, other: &Ca) -> String {
        other.params.signed_by(other.issuer.key(), &self.issuer).unwrap().pem()
    }
}

pub(super) fn inline(text: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..Default::default() })
}

pub(super) fn certificate(leaf: &Leaf) -> TlsCertificate {
    TlsCertificate {
        certificate_chain: inline(&leaf.pem),
        private_key: inline(&leaf.key),
        ..Default::default()
    }
}

pub(super) fn trusting(ca: &Ca) -> CertificateValidationContext {
    CertificateValidationContext { trusted_ca: inline(&ca.pem), ..Default::default() }
}

pub(super) fn matching(ca: &Ca, kind: SanType, pattern: MatchPattern) -> CertificateValidationContext {
    CertificateValidationContext {
        match_typed_subject_alt_names: vec![SubjectAltNameMatcher {
            san_type: kind.into(),
            matcher: Some(StringMatcher { match_pattern: Some(pattern), ignore_case: false }),
            ..Default::default()
        }],
        ..trusting(ca)
    }
}

pub(super) fn common(
    leaf: Option<&Leaf>,
    validation: Option<CertificateValidationContext>,
    alpn: &[&str],
) -> CommonTlsContext {
    CommonTlsContext {
        tls_certificates: leaf.map(certificate).into_iter().collect(),
        validation_context_type: validation.map(ValidationContextType::ValidationContext),
        alpn_protocols: alpn.iter().map(|&a| a.to_owned()).collect(),
        ..Default::default()
    }
}

pub(super) fn downstream(common: CommonTlsContext, require: bool) -> DownstreamTlsContext {
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: require }),
        ..Default::default()
    }
}

pub(super) fn upstream(common: CommonTlsContext, sni: &str) -> UpstreamTlsContext {
    UpstreamTlsContext { common_tls_context: Some(common), sni: sni.to_owned(), ..Default::default() }
}

pub(super) fn versions(min: i32, max: i32) -> Option<TlsParameters> {
    Some(TlsParameters {
        tls_minimum_protocol_version: min,
        tls_maximum_protocol_version: max,
        ..Default::default()
    })
}

/// Two contexts, with their stats under `server.` and `client.`.
pub(super) struct Pair {
    pub(super) server: ServerContext,
    pub(super) client: ClientContext,
    pub(super) store: Store,
}

/// What both sides know after a handshake; the client has read one byte of the server's.
pub(super) type Outcome = (Result<TlsInfo, String>, Result<TlsInfo, String>);

impl Pair {
    pub(super) fn new(down: &DownstreamTlsContext, up: &UpstreamTlsContext) -> Self {
        let store = Store::new();
        let secrets = StaticSecrets::default();
        Self {
            server: ServerContext::from_proto(down, &secrets, &store.root().scope("server")).unwrap(),
            client: ClientContext::from_proto(up, &secrets, &store.root().scope("client")).unwrap(),
            store,
        }
    }

    pub(super) async fn meet(&self, options: &ClientOptions) -> Outcome {
        meet(&self.server, &self.client, options).await
    }

    pub(super) async fn plain(&self) -> Outcome {
        self.meet(&ClientOptions::default()).await
    }

    pub(super) fn stat(&self, name: &str) -> u64 {
        self.store.value(name).unwrap_or(0)
    }
}

pub(super) async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (accepted, connected) = tokio::join!(listener.accept(), connect);
    (accepted.unwrap().0, connected.unwrap())
}

pub(super) async fn meet(server: &ServerContext, client: &ClientContext, options: &ClientOptions) -> Outcome {
    let (down, up) = sockets().await;
    let serve = async {
        let (mut stream, info) = server.accept(Transport::Tcp(down)).await.map_err(|e| e.to_string())?;
        let mut byte = [0; 1];
        if stream.read(&mut byte).await.is_ok_and(|n| n == 1) {
            let _ = stream.write_all(b"x").await;
            let _ = stream.flush().await;
        }
        let _ = stream.shutdown().await;
        Ok(info)
    };
    let call = async {
        let (mut stream, info) =
            client.connect(Transport::Tcp(up), options).await.map_err(|e| e.to_string())?;
        let mut byte = [0; 1];
        stream.write_all(b"x").await.map_err(|e| e.to_string())?;
        stream.flush().await.map_err(|e| e.to_string())?;
        match stream.read(&mut byte).await {
            Ok(1) => {}
            Ok(_) => return Err("closed".to_owned()),
            Err(e) => return Err(e.to_string()),
        }
        // The end comes with close_notify.
        assert_eq!(stream.read(&mut byte).await.unwrap(), 0);
        Ok(info)
    };
    tokio::join!(serve, call)
}

impl Ca {
    /// An intermediate's PEM and a leaf signed by it.
    pub(super) fn intermediate(&self, params: CertificateParams, sans: &[RcgenSan]) -> (String, Leaf) {
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        let middle = Ca { pem: pem.clone(), params: params.clone(), issuer: Issuer::new(params, key) };
        (pem, middle.leaf(sans))
    }
}

/// A revocation list as PEM.
pub(super) fn crl_pem(der: &[u8]) -> String {
    let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, der);
    format!("-----BEGIN X509 CRL-----\n{text}\n-----END X509 CRL-----\n")
}
