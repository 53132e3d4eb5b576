//! `TlsParameters` and ALPN: protocol versions, cipher suites and key exchange groups.
//!
//! Envoy speaks BoringSSL's cipher language; rustls has the nine suites that are still sound. A name that
//! BoringSSL knows and rustls lacks (CBC, plain RSA key exchange) is left out, which only narrows what is
//! offered; a list of nothing else, or a name that nobody knows, is an error. See `docs/divergences.md`.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::TlsParameters;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::{SupportedCipherSuite, SupportedProtocolVersion, version};
use sampan_core::{ConfigError, ConfigResult};

/// OpenSSL and IANA names of the TLS 1.2 suites.
const SUITES: &[(&str, &str, SupportedCipherSuite)] = &[
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "ECDHE-RSA-AES128-GCM-SHA256",
        "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
        suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-RSA-CHACHA20-POLY1305",
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "ECDHE-RSA-AES256-GCM-SHA384",
        "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
        suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    ),
];

/// What BoringSSL would take and rustls does not have.
const LACKING: &[&str] = &[
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-ECDSA-AES128-SHA256",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-RSA-AES128-SHA256",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
    "ECDHE-PSK-CHACHA20-POLY1305",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "PSK-AES128-CBC-SHA",
    "PSK-AES256-CBC-SHA",
    "DES-CBC3-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
];

/// The default list of servers and clients; the first four in groups of equal preference.
const DEFAULT_SUITES: &[&str] = &[
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
];

const TLS13_SUITES: &[SupportedCipherSuite] = &[
    suite::TLS13_AES_128_GCM_SHA256,
    suite::TLS13_AES_256_GCM_SHA384,
    suite::TLS13_CHACHA20_POLY1305_SHA256,
];

const DEFAULT_CURVES: &[&str] = &["X25519", "P-256"];

/// Which side a context is for: the defaults differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Server,
    Client,
}

/// What both sides negotiate with.
pub(crate) struct Params {
    pub(crate) provider: Arc<CryptoProvider>,
    /// The same with the groups of equal preference the other way round; `None` where there is no such group.
    pub(crate) alternate: Option<Arc<CryptoProvider>>,
    pub(crate) versions: Vec<&'static SupportedProtocolVersion>,
    /// The lowest version is above the highest: Envoy takes such a configuration and fails every handshake.
    pub(crate) unusable: bool,
}

impl Params {
    pub(crate) fn from_proto(message: Option<&TlsParameters>, side: Side) -> ConfigResult<Self> {
        let default = TlsParameters::default();
        let message = message.unwrap_or(&default);
        if !message.signature_algorithms.is_empty() {
            return Err(ConfigError::unsupported("choosing signature algorithms").at("signature_algorithms"));
        }
        if !message.compliance_policies.is_empty() {
            return Err(ConfigError::unsupported("a compliance policy").at("compliance_policies"));
        }
        let (versions, unusable) = versions(message, side)?;
        let groups = suites(&message.cipher_suites)?;
        let kx_groups = curves(&message.ecdh_curves)?;
        let provider = |reverse: bool| {
            let mut cipher_suites = TLS13_SUITES.to_vec();
            for group in &groups {
                let mut group = group.clone();
                if reverse {
                    group.reverse();
                }
                cipher_suites.extend(group);
            }
            Arc::new(CryptoProvider {
                cipher_suites,
                kx_groups: kx_groups.clone(),
                ..aws_lc_rs::default_provider()
            })
        };
        let alternate = groups.iter().any(|g| g.len() > 1).then(|| provider(true));
        Ok(Self { provider: provider(false), alternate, versions, unusable })
    }
}

fn versions(
    message: &TlsParameters,
    side: Side,
) -> ConfigResult<(Vec<&'static SupportedProtocolVersion>, bool)> {
    let number = |value: i32, default: u8, field: &str| {
        Ok(match TlsProtocol::try_from(value) {
            Ok(TlsProtocol::TlsAuto) => default,
            Ok(TlsProtocol::TlSv12) => 2,
            Ok(TlsProtocol::TlSv13) => 3,
            Ok(v) => return Err(ConfigError::unsupported(v.as_str_name()).at(field)),
            Err(_) => {
                return Err(ConfigError::new("value must be one of the defined enum values").at(field));
            }
        })
    };
    let default_max = if side == Side::Server { 3 } else { 2 };
    let min = number(message.tls_minimum_protocol_version, 2, "tls_minimum_protocol_version")?;
    let max = number(message.tls_maximum_protocol_version, default_max, "tls_maximum_protocol_version")?;
    let mut all = Vec::with_capacity(2);
    if max == 3 {
        all.push(&version::TLS13);
    }
    if min == 2 || all.is_empty() {
        all.push(&version::TLS12);
    }
    Ok((all, min > max))
}

/// The suites in order of preference, those of equal preference together.
fn suites(names: &[String]) -> ConfigResult<Vec<Vec<SupportedCipherSuite>>> {
    let defaults: Vec<String>;
    let names = if names.is_empty() {
        defaults = DEFAULT_SUITES.iter().map(|&s| s.to_owned()).collect();
        &defaults
    } else {
        names
    };
    let rejected = |bad: &str| {
        ConfigError::new(format!(
            "Failed to initialize cipher suites {}. The following ciphers were rejected when tried individually: {bad}",
            names.join(":")
        ))
        .at("cipher_suites")
    };
    let mut groups = Vec::new();
    let mut bad = Vec::new();
    for element in names.iter().flat_map(|n| n.split(':')).filter(|n| !n.is_empty()) {
        let members = element.strip_prefix('[').and_then(|e| e.strip_suffix(']')).unwrap_or(element);
        let mut group = Vec::new();
        for name in members.split('|') {
            if let Some((.., suite)) = SUITES.iter().find(|(o, i, _)| *o == name || *i == name) {
                if !group.contains(suite) {
                    group.push(*suite);
                }
            } else if !LACKING.contains(&name) {
                bad.push(name);
            }
        }
        if !group.is_empty() {
            groups.push(group);
        }
    }
    if !bad.is_empty() {
        return Err(rejected(&bad.join(", ")));
    }
    if groups.is_empty() {
        return Err(ConfigError::unsupported(format!("none of the cipher suites {}", names.join(":")))
            .at("cipher_suites"));
    }
    Ok(groups)
}

fn curves(names: &[String]) -> ConfigResult<Vec<&'static dyn SupportedKxGroup>> {
    let defaults: Vec<String>;
    let names = if names.is_empty() {
        defaults = DEFAULT_CURVES.iter().map(|&s| s.to_owned()).collect();
        &defaults
    } else {
        names
    };
    let list = || names.join(":");
    let mut all: Vec<&'static dyn SupportedKxGroup> = Vec::new();
    for name in names.iter().flat_map(|n| n.split(':')) {
        all.push(match name {
            "X25519" | "x25519" => kx_group::X25519,
            "P-256" | "prime256v1" => kx_group::SECP256R1,
            "P-384" | "secp384r1" => kx_group::SECP384R1,
            "X25519MLKEM768" => kx_group::X25519MLKEM768,
            "MLKEM1024" => kx_group::MLKEM1024,
            // rustls lacks it; without it less is offered, nothing weaker.
            "P-521" | "secp521r1" => continue,
            _ => {
                let reason = format!("Failed to initialize ECDH curves {}", list());
                return Err(ConfigError::new(reason).at("ecdh_curves"));
            }
        });
    }
    if all.is_empty() {
        return Err(ConfigError::unsupported(format!("none of the curves {}", list())).at("ecdh_curves"));
    }
    Ok(all)
}

/// `alpn_protocols`, each of 1 to 255 bytes; a comma separates too, as in Envoy.
pub(crate) fn alpn(protocols: &[String]) -> ConfigResult<Vec<Vec<u8>>> {
    let mut all = Vec::new();
    if protocols.iter().all(String::is_empty) && protocols.len() < 2 {
        return Ok(all);
    }
    for (i, protocol) in protocols.iter().flat_map(|p| p.split(',')).enumerate() {
        if protocol.is_empty() || protocol.len() > 255 {
            return Err(ConfigError::new("Invalid ALPN protocol string").index(i).at("alpn_protocols"));
        }
        all.push(protocol.as_bytes().to_vec());
    }
    Ok(all)
}
