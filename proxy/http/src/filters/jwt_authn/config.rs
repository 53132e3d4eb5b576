//! The model: providers, requirements, rules. Parsed and checked, no I/O but reading local key sets.

use std::collections::HashMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use pb::jwt_provider::JwksSourceSpecifier as Source;
use pb::jwt_requirement::RequiresType;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderName;
use sampan_core::matcher::StringMatcher;

use super::keys::{FIRST_PAUSE, KeySource, RemoteModel};
use super::locations::Locations;
use crate::filters::refuse;
use crate::jwt::{Jwks, Jwt};
use crate::manager::duration;
use crate::route::{BackOff, RouteMatch};

/// Seconds by which clocks may differ.
const CLOCK_SKEW: u64 = 60;

/// Who issues tokens, and what becomes of a good one.
pub(super) struct Provider {
    pub(super) issuer: String,
    audiences: Audiences,
    subjects: Option<StringMatcher>,
    lifetime: Lifetime,
    pub(super) skew: u64,
    pub(super) forward: bool,
    pub(super) payload_header: Option<HeaderName>,
    pub(super) pad: bool,
    pub(super) payload_key: String,
    pub(super) header_key: String,
    pub(super) failed_key: String,
    pub(super) claims: Vec<ClaimToHeader>,
    /// `normalize_payload_in_metadata.space_delimited_claims`
    pub(super) delimited: Vec<String>,
    pub(super) clear_route: bool,
    pub(super) cache: Option<CacheSize>,
    pub(super) keys: KeySource,
}

/// `jwt_cache_config`
#[derive(Clone, Copy)]
pub(super) struct CacheSize {
    pub(super) tokens: usize,
    /// Longer tokens are not kept.
    pub(super) token_bytes: usize,
}

pub(super) struct ClaimToHeader {
    pub(super) header: HeaderName,
    pub(super) path: Vec<String>,
}

/// How long a token may still be in force.
enum Lifetime {
    Any,
    /// It must end.
    Ends,
    Below(Duration),
}

/// Audiences of which a token must have one; none where any will do.
pub(super) struct Audiences(Vec<String>);

/// What a request must have.
pub(super) enum Requirement {
    /// Nothing.
    Nothing,
    One(Demand),
    /// One of them, or less where the flags allow it.
    Any {
        of: Vec<Requirement>,
        missing: bool,
        failed: bool,
    },
    All(Vec<Requirement>),
}

/// A token of one provider, or whatever token there is.
pub(super) struct Demand {
    /// The number of the provider; none: any, which the token's issuer decides.
    pub(super) provider: Option<usize>,
    /// In place of the provider's.
    pub(super) audiences: Option<Audiences>,
    pub(super) locations: Locations,
    pub(super) missing: bool,
    pub(super) failed: bool,
}

pub(super) struct Rule {
    pub(super) matching: RouteMatch,
    pub(super) requirement: Requirement,
}

/// The filter's configuration.
pub(super) struct Model {
    /// By name.
    pub(super) providers: Vec<Provider>,
    pub(super) rules: Vec<Rule>,
    /// `requirement_map`
    pub(super) named: HashMap<String, Requirement>,
    /// Its names, as an error lists them.
    pub(super) names: String,
    /// `filter_state_rules`
    pub(super) by_state: Option<(String, HashMap<String, Requirement>)>,
    pub(super) bypass_preflight: bool,
    pub(super) strip: bool,
    pub(super) stat_prefix: String,
    /// Headers that only this filter may set.
    pub(super) own_headers: Vec<HeaderName>,
}

/// A route's configuration.
pub(super) enum PerRoute {
    Disabled,
    Named(String),
}

impl Model {
    pub(super) fn from_proto(mut message: pb::JwtAuthentication) -> ConfigResult<Self> {
        let mut sorted: Vec<_> = message.providers.drain().collect();
        sorted.sort_by(|a, b| a.0.cmp(&b.0));
        let (names, messages): (Vec<_>, Vec<_>) = sorted.into_iter().unzip();
        let all = Providers { names: &names, messages: &messages };
        let providers = names
            .iter()
            .zip(&messages)
            .map(|(name, message)| {
                Provider::from_proto(name, message).map_err(|e| e.key(name).at("providers"))
            })
            .collect::<ConfigResult<Vec<_>>>()?;
        let requirements = |map: &HashMap<String, pb::JwtRequirement>| {
            let one = |(name, message): (&String, _)| match Requirement::from_proto(message, &all) {
                Ok(requirement) => Ok((name.clone(), requirement)),
                Err(error) => Err(error.key(name)),
            };
            map.iter().map(one).collect::<ConfigResult<HashMap<_, _>>>()
        };
        let named = requirements(&message.requirement_map).at("requirement_map")?;
        let mut listed: Vec<_> = named.keys().map(String::as_str).collect();
        listed.sort_unstable();
        let listed = listed.join(",");
        let mut rules = Vec::new();
        for (i, rule) in message.rules.iter().enumerate() {
            rules.push(Rule::from_proto(rule, &message.requirement_map, &listed, &all).at_index("rules", i)?);
        }
        let by_state = match &message.filter_state_rules {
            None => None,
            Some(rules) if rules.name.is_empty() => {
                return Err(ConfigError::new("value length must be at least 1 characters")
                    .at("name")
                    .at("filter_state_rules"));
            }
            Some(rules) => {
                let map = requirements(&rules.requires).at("requires").at("filter_state_rules")?;
                Some((rules.name.clone(), map))
            }
        };
        let own_headers = providers.iter().flat_map(Provider::own_headers).cloned().collect();
        Ok(Self {
            providers,
            rules,
            named,
            names: listed,
            by_state,
            bypass_preflight: message.bypass_cors_preflight,
            strip: message.strip_failure_response,
            stat_prefix: message.stat_prefix,
            own_headers,
        })
    }

    /// The first provider of an issuer; else the first of any.
    pub(super) fn of_issuer(&self, issuer: &str) -> Option<usize> {
        let find = |issuer: &str| self.providers.iter().position(|p| p.issuer == issuer);
        find(issuer).or_else(|| find(""))
    }
}

/// The providers' messages by name.
struct Providers<'m> {
    names: &'m [String],
    messages: &'m [pb::JwtProvider],
}

impl Rule {
    fn from_proto(
        message: &pb::RequirementRule,
        named: &HashMap<String, pb::JwtRequirement>,
        names: &str,
        all: &Providers<'_>,
    ) -> ConfigResult<Self> {
        use pb::requirement_rule::RequirementType as T;
        let mut matching = message.r#match.clone().ok_or_else(|| ConfigError::missing("match"))?;
        // Envoy's rules look at path, headers and query only. To heed more would let requests pass that Envoy stops.
        matching.runtime_fraction = None;
        matching.grpc = None;
        matching.tls_context = None;
        matching.dynamic_metadata.clear();
        matching.filter_state.clear();
        matching.cookies.clear();
        let requirement = match &message.requirement_type {
            None => Requirement::Nothing,
            Some(T::Requires(message)) => Requirement::from_proto(message, all).at("requires")?,
            Some(T::RequirementName(name)) => match named.get(name) {
                Some(message) => Requirement::from_proto(message, all).at("requires")?,
                None => return Err(ConfigError::new(wrong_name(name, names)).at("requirement_name")),
            },
        };
        Ok(Self { matching: RouteMatch::from_proto(&matching).at("match")?, requirement })
    }
}

/// What is said of a requirement that is not in the map.
pub(super) fn wrong_name(name: &str, names: &str) -> String {
    format!("Wrong requirement_name: {name}. It should be one of [{names}]")
}

impl Requirement {
    fn from_proto(message: &pb::JwtRequirement, all: &Providers<'_>) -> ConfigResult<Self> {
        Ok(match &message.requires_type {
            None => Self::Nothing,
            Some(RequiresType::ProviderName(name)) => {
                Self::One(Demand::of_provider(name, &[], all).at("provider_name")?)
            }
            Some(RequiresType::ProviderAndAudiences(both)) => Self::One(
                Demand::of_provider(&both.provider_name, &both.audiences, all)
                    .at("provider_and_audiences")?,
            ),
            Some(RequiresType::RequiresAny(list)) => Self::any(&list.requirements, all).at("requires_any")?,
            Some(RequiresType::RequiresAll(list)) => {
                two(&list.requirements).at("requires_all")?;
                Self::All(Self::list(&list.requirements, all).at("requires_all")?)
            }
            Some(RequiresType::AllowMissing(_)) => Self::One(Demand::of_any(all, false)),
            Some(RequiresType::AllowMissingOrFailed(_)) => Self::One(Demand::of_any(all, true)),
            // It forwards claims that anybody may have written.
            Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
                return Err(ConfigError::unsupported("this field").at("extract_only_without_validation"));
            }
        })
    }

    fn list(messages: &[pb::JwtRequirement], all: &Providers<'_>) -> ConfigResult<Vec<Self>> {
        messages
            .iter()
            .enumerate()
            .map(|(i, m)| Self::from_proto(m, all).at_index("requirements", i))
            .collect()
    }

    /// `allow_missing` and `allow_missing_or_failed` in the list say what is done when no other member is met.
    fn any(messages: &[pb::JwtRequirement], all: &Providers<'_>) -> ConfigResult<Self> {
        two(messages)?;
        let mut of = Self::list(messages, all)?;
        let [mut missing, mut failed] = [false; 2];
        of.retain(|requirement| match requirement {
            Self::One(Demand { provider: None, failed: true, .. }) => {
                failed = true;
                false
            }
            Self::One(Demand { provider: None, .. }) => {
                missing = true;
                false
            }
            _ => true,
        });
        if of.is_empty() {
            return Ok(Self::One(Demand::of_any(all, failed)));
        }
        Ok(Self::Any { of, missing, failed })
    }

    /// Whether `test` holds for one of the providers that may be asked.
    pub(super) fn asks(&self, providers: &[Provider], test: &impl Fn(&Provider) -> bool) -> bool {
        match self {
            Self::Nothing => false,
            Self::One(Demand { provider: Some(at), .. }) => test(&providers[*at]),
            Self::One(_) => providers.iter().any(test),
            Self::Any { of, .. } | Self::All(of) => of.iter().any(|r| r.asks(providers, test)),
        }
    }
}

fn two(requirements: &[pb::JwtRequirement]) -> ConfigResult<()> {
    if requirements.len() < 2 {
        return Err(ConfigError::new("value must contain at least 2 item(s)").at("requirements"));
    }
    Ok(())
}

impl Demand {
    fn of_provider(name: &str, audiences: &[String], all: &Providers<'_>) -> ConfigResult<Self> {
        let Some(at) = all.names.iter().position(|n| n == name) else {
            return Err(ConfigError::new(format!("Required provider ['{name}'] is not configured.")));
        };
        Ok(Self {
            provider: Some(at),
            audiences: (!audiences.is_empty()).then(|| Audiences::new(audiences)),
            locations: Locations::new(&all.messages[at..=at]),
            missing: false,
            failed: false,
        })
    }

    fn of_any(all: &Providers<'_>, failed: bool) -> Self {
        let locations = Locations::new(all.messages);
        Self { provider: None, audiences: None, locations, missing: true, failed }
    }
}

impl Audiences {
    fn new(audiences: &[String]) -> Self {
        Self(audiences.iter().map(|a| bare(a).to_owned()).collect())
    }

    pub(super) fn allow(&self, audiences: &[String]) -> bool {
        self.0.is_empty() || audiences.iter().any(|a| self.0.iter().any(|b| b == bare(a)))
    }
}

/// An audience without its scheme and without a slash behind it.
fn bare(audience: &str) -> &str {
    let rest =
        audience.strip_prefix("http://").or_else(|| audience.strip_prefix("https://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

impl Provider {
    fn from_proto(name: &str, message: &pb::JwtProvider) -> ConfigResult<Self> {
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

    pub(super) fn own_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.payload_header.iter().chain(self.claims.iter().map(|c| &c.header))
    }

    pub(super) fn allows_audiences(&self, audiences: &[String]) -> bool {
        self.audiences.allow(audiences)
    }

    /// Whether the token's subject and what is left of its time are within what is allowed.
    pub(super) fn allows(&self, jwt: &Jwt, now: Duration) -> bool {
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

impl PerRoute {
    pub(super) fn from_proto(message: pb::PerRouteConfig) -> ConfigResult<Self> {
        use pb::per_route_config::RequirementSpecifier as S;
        match message.requirement_specifier {
            None => Err(ConfigError::missing("requirement_specifier")),
            Some(S::Disabled(true)) => Ok(Self::Disabled),
            Some(S::Disabled(false)) => Err(ConfigError::new("value must equal true").at("disabled")),
            Some(S::RequirementName(name)) => Ok(Self::Named(name)),
        }
    }
}
