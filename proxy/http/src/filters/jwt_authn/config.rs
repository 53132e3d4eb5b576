//! The model: providers ([`provider`]), requirements, rules. Parsed and checked, no I/O but reading local key sets.

mod provider;

use std::collections::HashMap;

use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use pb::jwt_requirement::RequiresType;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderName;

use super::locations::Locations;
use crate::route::RouteMatch;

pub(super) use provider::{Audiences, CacheSize, Provider};

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
