//! `internal_redirect_policy`: which redirects of an upstream this proxy follows by itself.

use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::envoy::extensions::internal_redirect::allow_listed_routes::v3::AllowListedRoutesConfig;
use envoy_types::pb::envoy::extensions::internal_redirect::filter_state::v3::FilterStateConfig;
use pb::route_action::InternalRedirectAction;
use sampan_core::error::{AtField, ConfigError, ConfigResult};
use sampan_core::header::HeaderName;
use sampan_core::stream_info::StreamInfo;

use crate::filter::{decode, message_name};

/// The statuses that can be followed.
const REDIRECTS: [u32; 5] = [301, 302, 303, 307, 308];

/// A compiled policy.
pub struct InternalRedirects {
    /// `max_internal_redirects`
    pub max: u32,
    codes: Vec<u16>,
    predicates: Vec<Predicate>,
    /// `allow_cross_scheme_redirect`
    pub cross_scheme: bool,
    /// `response_headers_to_copy`
    pub headers_to_copy: Vec<HeaderName>,
}

enum Predicate {
    /// Only to these routes.
    AllowListed(Vec<Box<str>>),
    /// Never twice from this route to the same other one.
    Previous,
    /// From https to anywhere, from http only to http.
    SafeCrossScheme,
    /// As the filter state's object says.
    FilterState { key: Box<str>, absent: bool },
}

/// How far a request has been redirected; it lives as long as the request does.
#[derive(Default)]
pub struct Redirected {
    /// How often.
    pub count: u32,
    /// From which routes to which others, where a predicate asks.
    steps: Vec<(Box<str>, Box<str>)>,
}

/// A step that predicates judge.
pub struct RedirectStep<'a> {
    /// The route whose upstream redirects.
    pub from: &'a str,
    /// The route that it leads to.
    pub to: &'a str,
    /// The request came for https.
    pub from_https: bool,
    /// The target's scheme is not http.
    pub to_https: bool,
    /// What filters have left on the stream.
    pub info: &'a StreamInfo,
}

impl InternalRedirects {
    /// The policy, or what the older fields mean; none where redirects are the client's.
    #[allow(deprecated)] // The fields before the policy are still taken.
    pub(super) fn from_proto(message: &pb::RouteAction) -> ConfigResult<Option<Self>> {
        if let Some(policy) = &message.internal_redirect_policy {
            return Self::of_policy(policy).at("internal_redirect_policy").map(Some);
        }
        if message.internal_redirect_action() != InternalRedirectAction::HandleInternalRedirect {
            return Ok(None);
        }
        let policy = pb::InternalRedirectPolicy {
            max_internal_redirects: message.max_internal_redirects,
            ..Default::default()
        };
        Self::of_policy(&policy).map(Some)
    }

    fn of_policy(message: &pb::InternalRedirectPolicy) -> ConfigResult<Self> {
        let codes = match &message.redirect_response_codes[..] {
            [] => vec![302],
            // What is no redirect is passed over, as in Envoy.
            codes => codes.iter().filter(|c| REDIRECTS.contains(c)).map(|c| *c as u16).collect(),
        };
        let mut predicates = Vec::new();
        for (i, extension) in message.predicates.iter().enumerate() {
            let any = extension.typed_config.as_ref().ok_or_else(|| ConfigError::missing("typed_config"));
            predicates.push(any.and_then(Predicate::from_proto).at_index("predicates", i)?);
        }
        let mut headers_to_copy = Vec::new();
        for (i, name) in message.response_headers_to_copy.iter().enumerate() {
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                let error = ConfigError::new(":-prefixed headers or Hosts may not be specified here.");
                return Err(error.index(i).at("response_headers_to_copy"));
            }
            headers_to_copy.push(HeaderName::new(name));
        }
        Ok(Self {
            max: message.max_internal_redirects.map_or(1, |max| max.value),
            codes,
            predicates,
            cross_scheme: message.allow_cross_scheme_redirect,
            headers_to_copy,
        })
    }

    /// Whether a response of this status is followed.
    pub fn follows(&self, status: u16) -> bool {
        self.codes.contains(&status)
    }

    /// Whether all predicates allow a step.
    pub fn allows(&self, step: &RedirectStep<'_>, redirected: &mut Redirected) -> bool {
        self.predicates.iter().all(|predicate| match predicate {
            Predicate::AllowListed(names) => names.iter().any(|name| **name == *step.to),
            Predicate::SafeCrossScheme => step.from_https || !step.to_https,
            Predicate::Previous => redirected.is_new(step),
            Predicate::FilterState { key, absent } => {
                let object = step.info.state(key);
                object.map_or(*absent, |object| object.plain().is_some_and(|text| text == "true"))
            }
        })
    }
}

impl Redirected {
    fn is_new(&mut self, step: &RedirectStep<'_>) -> bool {
        let known = self.steps.iter().any(|(from, to)| **from == *step.from && **to == *step.to);
        if !known {
            self.steps.push((step.from.into(), step.to.into()));
        }
        !known
    }
}

impl Predicate {
    fn from_proto(any: &envoy_types::pb::google::protobuf::Any) -> ConfigResult<Self> {
        const PREFIX: &str = "envoy.extensions.internal_redirect.";
        match message_name(any).strip_prefix(PREFIX) {
            Some("allow_listed_routes.v3.AllowListedRoutesConfig") => {
                let config: AllowListedRoutesConfig = decode(any)?;
                Ok(Self::AllowListed(config.allowed_route_names.into_iter().map(Into::into).collect()))
            }
            Some("filter_state.v3.FilterStateConfig") => {
                let config: FilterStateConfig = decode(any)?;
                let key = config.redirect_enabled_key.into();
                Ok(Self::FilterState { key, absent: config.redirect_if_absent })
            }
            Some("previous_routes.v3.PreviousRoutesConfig") => Ok(Self::Previous),
            Some("safe_cross_scheme.v3.SafeCrossSchemeConfig") => Ok(Self::SafeCrossScheme),
            _ => Err(ConfigError::unsupported(format!("internal redirect predicate {:?}", any.type_url))),
        }
    }
}
