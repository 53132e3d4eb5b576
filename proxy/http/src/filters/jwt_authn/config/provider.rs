//! Providers: who issues tokens, where their keys come from, and what becomes of a good one.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use pb::jwt_provider::JwksSourceSpecifier as Source;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderName;
use sampan_core::matcher::StringMatcher;

use super::super::keys::{FIRST_PAUSE, KeySource, RemoteModel};
use crate::filters::refuse;
use crate::jwt::{Jwks, Jwt};
use crate::manager::duration;
use crate::route::BackOff;

/// Seconds by which clocks may differ.
const CLOCK_SKEW: u64 = 60;

/// Who issues tokens, and what becomes of a good one.
pub(in crate::filters::jwt_authn) struct Provider {
    pub(in crate::filters::jwt_authn) issuer: String,
    audiences: Audiences,
    subjects: Option<StringMatcher>,
    lifetime: Lifetime,
    pub(in crate::filters::jwt_authn) skew: u64,
    pub(in crate::filters::jwt_authn) forward: bool,
    pub(in crate::filters::jwt_authn) payload_header: Option<HeaderName>,
    pub(in crate::filters::jwt_authn) pad: bool,
    pub(in crate::filters::jwt_authn) payload_key: String,
    pub(in crate::filters::jwt_authn) header_key: String,
    pub(in crate::filters::jwt_authn) failed_key: String,
    pub(in crate::filters::jwt_authn) claims: Vec<ClaimToHeader>,
    /// `normalize_payload_in_metadata.space_delimited_claims`
    pub(in crate::filters::jwt_authn) delimited: Vec<String>,
    pub(in crate::filters::jwt_authn) clear_route: bool,
    pub(in crate::filters::jwt_authn) cache: Option<CacheSize>,
    pub(in crate::filters::jwt_authn) keys: KeySource,
}

/// `jwt_cache_config`
#[derive(Clone, Copy)]
pub(in crate::filters::jwt_authn) struct CacheSize {
    pub(in crate::filters::jwt_authn) tokens: usize,
    /// Longer tokens are not kept.
    pub(in crate::filters::jwt_authn) token_bytes: usize,
}

pub(in crate::filters::jwt_authn) struct ClaimToHeader {
    pub(in crate::filters::jwt_authn) header: HeaderName,
    pub(in crate::filters::jwt_authn) path: Vec<String>,
}

/// How long a token may still be in force.
enum Lifetime {
    Any,
    /// It must end.
    Ends,
    Below(Duration),
}

/// Audiences of which a token must have one; none where any will do.
pub(in crate::filters::jwt_authn) struct Audiences(Vec<String>);

impl Provider {
    pub(super) fn from_proto(name: &str, message: &pb::JwtProvider) -> ConfigResult<Self> {
        let lifetime = match &message.max_lifetime {
            Some(max) => Lifetime::Below(duration(max)),
            None if message.require_expiration => Lifetime::Ends,
            None => Lifetime::Any,
        };
        let header = |name: &String| (!name.is_empty()).then(|| HeaderName::new(name));
        let claims = message.claim_to_headers.iter().enumerate();
        let delimited = message.normalize_payload_in_metadata.as_ref();
        Ok(Self {
            keys: key_source(name, message)?,
            issuer: message.issuer.clone(),
            audiences: Audiences::new(&message.audiences),
            subjects: message.subjects.as_ref().map(StringMatcher::from_proto).transpose().at("subjects")?,
            lifetime,
            skew: Some(u64::from(message.clock_skew_seconds)).filter(|s| *s > 0).unwrap_or(CLOCK_SKEW),
            forward: message.forward,
            payload_header: header(&message.forward_payload_header),
            pad: message.pad_forward_payload_header,
            payload_key: message.payload_in_metadata.clone(),
            header_key: message.header_in_metadata.clone(),
            failed_key: message.failed_status_in_metadata.clone(),
            claims: claims
                .map(|(i, m)| ClaimToHeader::from_proto(m).at_index("claim_to_headers", i))
                .collect::<ConfigResult<_>>()?,
            delimited: delimited.map(|n| n.space_delimited_claims.clone()).unwrap_or_default(),
            clear_route: message.clear_route_cache,
            cache: message.jwt_cache_config.as_ref().map(CacheSize::from_proto),
        })
    }

    pub(in crate::filters::jwt_authn) fn own_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.payload_header.iter().chain(self.claims.iter().map(|c| &c.header))
    }

    pub(in crate::filters::jwt_authn) fn allows_audiences(&self, audiences: &[String]) -> bool {
        self.audiences.allow(audiences)
    }

    /// Whether the token's subject and what is left of its time are within what is allowed.
    pub(in crate::filters::jwt_authn) fn allows(&self, jwt: &Jwt, now: Duration) -> bool {
        let subject = self.subjects.as_ref().is_none_or(|matcher| matcher.matches(&jwt.subject));
        subject
            && match self.lifetime {
                Lifetime::Any => true,
                Lifetime::Ends => jwt.expires != 0,
                Lifetime::Below(max) => {
                    jwt.expires != 0 && Duration::from_secs(jwt.expires).saturating_sub(now) < max
                }
            }
    }
}

impl Audiences {
    pub(super) fn new(audiences: &[String]) -> Self {
        Self(audiences.iter().map(|a| bare(a).to_owned()).collect())
    }

    pub(in crate::filters::jwt_authn) fn allow(&self, audiences: &[String]) -> bool {
        self.0.is_empty() || audiences.iter().any(|a| self.0.iter().any(|b| b == bare(a)))
    }
}

/// An audience without its scheme and without a slash behind it.
fn bare(audience: &str) -> &str {
    let rest =
        audience.strip_prefix("http://").or_else(|| audience.strip_prefix("https://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

impl CacheSize {
    fn from_proto(message: &pb::JwtCacheConfig) -> Self {
        let or = |value: u32, usual| if value == 0 { usual } else { value as usize };
        Self { tokens: or(message.jwt_cache_size, 100), token_bytes: or(message.jwt_max_token_size, 4096) }
    }
}

impl ClaimToHeader {
    fn from_proto(message: &pb::JwtClaimToHeader) -> ConfigResult<Self> {
        if message.header_name.is_empty() {
            return Err(ConfigError::new("value length must be at least 1 characters").at("header_name"));
        }
        let path: Vec<_> = match (message.claim_name.as_str(), &message.claim_path[..]) {
            ("", []) | (_, [_, ..]) if message.claim_name.is_empty() == message.claim_path.is_empty() => {
                return Err(ConfigError::new("exactly one of claim_name and claim_path must be set"));
            }
            (_, [_, ..]) => message.claim_path.iter().map(|segment| segment.key.clone()).collect(),
            (name, []) => name.split('.').map(str::to_owned).collect(),
        };
        Ok(Self { header: HeaderName::new(&message.header_name), path })
    }
}

fn key_source(name: &str, message: &pb::JwtProvider) -> ConfigResult<KeySource> {
    match message.jwks_source_specifier.as_ref() {
        None => Err(ConfigError::missing("jwks_source_specifier")),
        Some(Source::LocalJwks(source)) => {
            let text = sampan_core::format::read_source(source).at("local_jwks")?;
            if text.is_empty() {
                return Ok(KeySource::None);
            }
            let keys = Jwks::parse(text.as_bytes()).map_err(|status| {
                let reason = format!(
                    "Provider '{name}' in jwt_authn config has invalid local jwks: {}",
                    status.text()
                );
                ConfigError::new(reason).at("local_jwks")
            })?;
            Ok(KeySource::Local(keys))
        }
        Some(Source::RemoteJwks(remote)) => {
            let model = remote_model(name, remote).at("remote_jwks")?;
            Ok(KeySource::remote(model))
        }
    }
}

fn remote_model(name: &str, message: &pb::RemoteJwks) -> ConfigResult<RemoteModel> {
    use core::http_uri::HttpUpstreamType;
    let uri = message.http_uri.as_ref().ok_or_else(|| ConfigError::missing("http_uri"))?;
    let cluster = match &uri.http_upstream_type {
        Some(HttpUpstreamType::Cluster(cluster)) if !cluster.is_empty() => cluster.as_str(),
        _ => return Err(ConfigError::missing("cluster").at("http_uri")),
    };
    let invalid = || {
        ConfigError::new(format!("Provider '{name}' has an invalid URI: '{}'", uri.uri))
            .at("uri")
            .at("http_uri")
    };
    let parsed: http::Uri = uri.uri.parse().map_err(|_| invalid())?;
    let scheme = parsed.scheme_str().filter(|s| matches!(*s, "http" | "https")).ok_or_else(invalid)?;
    let timeout = uri.timeout.as_ref().ok_or_else(|| ConfigError::missing("timeout").at("http_uri"))?;
    let (attempts, back_off) = match &message.retry_policy {
        None => (1, BackOff::default()),
        Some(policy) => retries(policy).at("retry_policy")?,
    };
    let fetch = message.async_fetch.as_ref();
    let failed = fetch.and_then(|f| f.failed_refetch_duration.as_ref()).map(duration);
    Ok(RemoteModel {
        uri: uri.uri.clone(),
        cluster: cluster.into(),
        scheme: scheme.to_owned(),
        authority: parsed.authority().ok_or_else(invalid)?.as_str().to_owned(),
        path: parsed.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        timeout: Some(duration(timeout)).filter(|timeout| !timeout.is_zero()),
        // Whole seconds count.
        cache: message
            .cache_duration
            .as_ref()
            .map_or(Duration::from_secs(600), |d| Duration::from_secs(duration(d).as_secs())),
        attempts,
        try_timeout: back_off.max,
        back_off,
        ahead: fetch.is_some(),
        holds_listener: fetch.is_some_and(|f| !f.fast_listener),
        failed_pause: failed.unwrap_or(Duration::from_secs(1)),
    })
}

/// How often a fetch is tried at most, and with which pauses. Whatever `retry_on` says, all failures are tried again.
fn retries(policy: &core::RetryPolicy) -> ConfigResult<(u32, BackOff)> {
    refuse(policy.retry_priority.is_some(), "retry_priority")?;
    refuse(!policy.retry_host_predicate.is_empty(), "retry_host_predicate")?;
    refuse(policy.host_selection_retry_max_attempts != 0, "host_selection_retry_max_attempts")?;
    let base = policy.retry_back_off.as_ref().and_then(|b| b.base_interval.as_ref()).map(duration);
    let max = policy.retry_back_off.as_ref().and_then(|b| b.max_interval.as_ref()).map(duration);
    if let (Some(base), Some(max)) = (base, max)
        && max < base
    {
        let reason = "max_interval must be greater than or equal to the base_interval";
        return Err(ConfigError::new(reason).at("retry_back_off"));
    }
    let base = base.unwrap_or(FIRST_PAUSE);
    let attempts = policy.num_retries.map_or(1, |n| n.value).saturating_add(1);
    Ok((attempts, BackOff { base: Some(base), max: Some(max.unwrap_or(base * 10)) }))
}
