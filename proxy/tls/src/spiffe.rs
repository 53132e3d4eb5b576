//! The SPIFFE certificate validator (`envoy.tls.cert_validator.spiffe`): each trust domain has authorities of its own, and a peer
//! is verified with those of the domain that its first URI name stands in.
//!
//! It takes the place of `trusted_ca`, hashes and `trust_chain_verification`; of the SAN matchers only those on URIs count, as
//! in Envoy. A peer without a SPIFFE id, or of a domain that is not configured, is refused. A certificate is always demanded.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::config::core::v3::{TypedExtensionConfig, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, SpiffeCertValidatorConfig,
};
use prost::Message as _;
use rustls::pki_types::CertificateDer;
use sampan_core::error::AtField;
use sampan_core::{ConfigError, ConfigResult};
use serde_json::Value;

use crate::cert_info::parse;
use crate::certificate::certificates;
use crate::data_source;
use crate::params::Side;
use crate::san::{self, Kind, SanMatcher};
use crate::validation::{ChainFailure, Refusal, Trust};
use crate::validation_config::revocation_lists;

/// The message's name.
const TYPE: &str = "envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// The trust bundles by trust domain.
#[derive(Debug)]
pub(crate) struct Spiffe {
    domains: BTreeMap<String, Trust>,
    matchers: Vec<SanMatcher>,
    /// What the admin shows as the authority's path.
    pub(crate) ca_path: String,
}

impl Spiffe {
    /// Checks `custom_validator_config`. `matchers` are the context's.
    pub(crate) fn from_proto(
        custom: &TypedExtensionConfig,
        message: &CertificateValidationContext,
        matchers: Vec<SanMatcher>,
    ) -> ConfigResult<Self> {
        let any = custom.typed_config.as_ref().filter(|any| any.type_url.rsplit('/').next() == Some(TYPE));
        let Some(any) = any else {
            return Err(ConfigError::unsupported(format!("certificate validator '{}'", custom.name)));
        };
        let config = SpiffeCertValidatorConfig::decode(any.value.as_slice())
            .map_err(|e| ConfigError::new(format!("malformed message: {e}")).at("typed_config"))?;
        let mut this = Self {
            domains: BTreeMap::new(),
            matchers: matchers.into_iter().filter(|m| m.kind() == Kind::Uri).collect(),
            ca_path: String::new(),
        };
        let trust = || Trust::new(false, message.allow_expired_certificate, None);
        match &config.trust_bundles {
            Some(source) if matches!(source.specifier, Some(Specifier::Filename(_))) => {
                // Envoy watches the file; one that is read only once would go stale unseen.
                Err(ConfigError::unsupported("a watched bundle map").at("filename"))
            }
            Some(source) => data_source::read(source).and_then(|map| this.add_map(&map.bytes, trust)),
            None => Ok(()),
        }
        .at("trust_bundles")
        .at("typed_config")?;
        let listed = config.trust_domains.iter().filter(|_| config.trust_bundles.is_none());
        for (i, domain) in listed.enumerate() {
            this.add_domain(domain, trust()).at_index("trust_domains", i).at("typed_config")?;
        }
        Ok(this)
    }

    fn add_domain(
        &mut self,
        domain: &envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::spiffe_cert_validator_config::TrustDomain,
        mut trust: Trust,
    ) -> ConfigResult<()> {
        let name = &domain.name;
        if !domain.workload_trust_domain.is_empty() {
            return Err(ConfigError::unsupported("workload_trust_domain").at("workload_trust_domain"));
        }
        if self.domains.contains_key(name) {
            let reason = format!("Multiple trust bundles are given for one trust domain for {name}");
            return Err(ConfigError::new(reason).at("name"));
        }
        let source = domain.trust_bundle.as_ref().ok_or_else(|| ConfigError::missing("trust_bundle"))?;
        let loaded = data_source::read(source).at("trust_bundle")?;
        let failed = || {
            ConfigError::new(format!("Failed to load trusted CA certificate for {name}")).at("trust_bundle")
        };
        let all = certificates(&loaded).map_err(|_| failed())?;
        if all.is_empty() || !all.into_iter().all(|der| trust.add(der)) {
            return Err(failed());
        }
        for list in revocation_lists(&loaded).at("trust_bundle")? {
            trust.add_crl(list);
        }
        if self.ca_path.is_empty() {
            self.ca_path = format!("{name}: {}", loaded.path);
        }
        self.domains.insert(name.clone(), trust);
        Ok(())
    }

    /// A SPIFFE bundle map: `{"trust_domains": {NAME: {"keys": [{"use": "x509-svid", "x5c": [BASE64]}]}}}`
    fn add_map(&mut self, json: &[u8], trust: impl Fn() -> Trust) -> ConfigResult<()> {
        let map: Value = serde_json::from_slice(json)
            .map_err(|_| ConfigError::new("Invalid JSON found in SPIFFE bundle"))?;
        let domains = map.get("trust_domains").and_then(Value::as_object).filter(|d| !d.is_empty());
        let domains = domains.ok_or_else(|| ConfigError::new("No trust domains found in SPIFFE bundle"))?;
        for (name, domain) in domains {
            let error = |what: &str| ConfigError::new(format!("{what} for domain '{name}'"));
            let keys = domain.get("keys").and_then(Value::as_array).filter(|keys| !keys.is_empty());
            let mut trust = trust();
            for key in keys.ok_or_else(|| error("No keys found in SPIFFE bundle"))? {
                if key.get("use").and_then(Value::as_str) != Some("x509-svid") {
                    return Err(error("missing or invalid 'use' field found in cert"));
                }
                let chain = key.get("x5c").and_then(Value::as_array).filter(|chain| !chain.is_empty());
                for text in chain.ok_or_else(|| error("missing or empty 'x5c' field found in keys"))? {
                    let der = text.as_str().and_then(|text| STANDARD.decode(text).ok());
                    let added = der.is_some_and(|der| trust.add(CertificateDer::from(der)));
                    if !added {
                        return Err(error("Invalid x509 object in certs"));
                    }
                }
            }
            self.domains.insert(name.clone(), trust);
        }
        Ok(())
    }

    /// The subjects of all authorities, for the certificate request.
    pub(crate) fn subjects(&self) -> Vec<rustls::DistinguishedName> {
        self.domains.values().flat_map(Trust::subjects).collect()
    }

    /// The first authority, which the admin shows.
    pub(crate) fn first(&self) -> Option<&CertificateDer<'static>> {
        self.domains.values().next()?.first()
    }

    /// Verifies a chain, leaf first.
    pub(crate) fn verify(&self, chain: &[CertificateDer<'_>], side: Side) -> Result<(), Refusal> {
        let leaf = chain.first().and_then(|der| parse(der)).ok_or(Refusal::Spiffe("empty cert chain"))?;
        let signs = match leaf.key_usage() {
            // A key whose usage is not told may do everything.
            Ok(usage) => usage.is_none_or(|u| u.value.key_cert_sign() || u.value.crl_sign()),
            Err(_) => true,
        };
        let authority = match leaf.basic_constraints() {
            Ok(constraints) => constraints.is_some_and(|c| c.value.ca),
            Err(_) => true,
        };
        if signs || authority {
            return Err(Refusal::Spiffe("cert precheck"));
        }
        let sans = san::sans(&leaf);
        let domain = sans.iter().find(|s| s.kind == Kind::Uri).and_then(|s| trust_domain(&s.value));
        let trust = domain.and_then(|domain| self.domains.get(domain));
        let trust = trust.ok_or(Refusal::Spiffe("no trust bundle store"))?;
        trust.verify(chain, side).map_err(|refusal| match refusal {
            // Envoy's validator names no alert of its own.
            Refusal::Chain { depth, reason, .. } => {
                Refusal::Chain { depth, reason, kind: ChainFailure::Other }
            }
            other => other,
        })?;
        let matched = |m: &SanMatcher| sans.iter().any(|s| m.matches(s));
        if !self.matchers.is_empty() && !self.matchers.iter().any(matched) {
            return Err(Refusal::SpiffeSan);
        }
        Ok(())
    }
}

/// `DOMAIN` of `spiffe://DOMAIN/…`
fn trust_domain(id: &str) -> Option<&str> {
    let (domain, _path) = id.strip_prefix("spiffe://")?.split_once('/')?;
    (!domain.is_empty()).then_some(domain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trust_domain_ends_at_the_first_slash() {
        assert_eq!(trust_domain("spiffe://td/ns/a/sa/b"), Some("td"));
        for id in ["spiffe://td", "spiffe:///x", "http://td/x", "SPIFFE://td/x"] {
            assert_eq!(trust_domain(id), None, "{id}");
        }
    }

    #[test]
    fn bundle_maps_are_refused_with_envoys_words() {
        let of = |json: &str| {
            let mut spiffe =
                Spiffe { domains: BTreeMap::new(), matchers: Vec::new(), ca_path: String::new() };
            spiffe.add_map(json.as_bytes(), || Trust::new(false, false, None)).unwrap_err().to_string()
        };
        assert_eq!(of("{"), "Invalid JSON found in SPIFFE bundle");
        assert_eq!(of("{}"), "No trust domains found in SPIFFE bundle");
        assert_eq!(of(r#"{"trust_domains":{"a":{}}}"#), "No keys found in SPIFFE bundle for domain 'a'");
        assert!(of(r#"{"trust_domains":{"a":{"keys":[{"use":"jwt-svid"}]}}}"#).contains("'use'"));
        assert!(of(r#"{"trust_domains":{"a":{"keys":[{"use":"x509-svid"}]}}}"#).contains("'x5c'"));
        assert!(
            of(r#"{"trust_domains":{"a":{"keys":[{"use":"x509-svid","x5c":["AAAA"]}]}}}"#).contains("x509")
        );
    }
}
