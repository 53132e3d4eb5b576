//! Whether a request has the tokens that a requirement asks for, and what good tokens leave behind.
//!
//! A run goes through the requirement once and does not wait. Where a token wants keys that are not there it goes on, as
//! far as the rest can decide; if the rest cannot, the run is given up, the keys are fetched, and another run begins with the
//! request as it was. So nothing of a run may reach the stream before it is done: it works on the request's headers, of which
//! there is a copy where keys may be missing, and keeps all else to itself.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use prost::Message;
use sampan_config::schema::Message as Schema;
use sampan_config::{PrintOptions, to_json};
use sampan_core::header::{HeaderId, HeaderMap, HeaderName};

use super::cache::{self, Owner};
use super::config::{Demand, Model, Provider, Requirement};
use super::keys::{Answer, Fetched, KeySource, Remote};
use super::locations::Token;
use crate::jwt::{Jwks, Jwt, Status};

/// Seconds by which a kept token may be late; the provider's own say in this comes after it, as in Envoy.
const KEPT_SKEW: u64 = 60;

/// One way through a requirement.
pub(super) struct Run<'r> {
    pub(super) model: &'r Model,
    pub(super) owner: &'r Owner,
    pub(super) request: &'r mut HeaderMap,
    pub(super) now: Instant,
    /// Since the epoch.
    pub(super) wall: Duration,
    /// What was fetched for this request, by provider.
    pub(super) fetched: &'r [(usize, Answer)],
    pub(super) done: Done,
}

/// What a run leaves behind.
#[derive(Default)]
pub(super) struct Done {
    /// Providers whose keys are wanted.
    pub(super) wanted: Vec<usize>,
    pub(super) metadata: Struct,
    pub(super) clear_route: bool,
    pub(super) cache_hits: u64,
    pub(super) cache_misses: u64,
    /// The path before a token was taken out of it.
    pub(super) path: Option<Vec<u8>>,
    /// A header that a claim cannot be the value of.
    pub(super) bad_header: Option<HeaderName>,
}

/// Keys for a token.
enum Keys<'r> {
    Local(&'r Jwks),
    Fetched(Arc<Fetched>),
}

impl Keys<'_> {
    fn get(&self) -> &Jwks {
        match self {
            Self::Local(keys) => keys,
            Self::Fetched(fetched) => &fetched.keys,
        }
    }
}

/// What has come of a token or a requirement; none: keys are awaited.
type Verdict = Option<Status>;

impl<'r> Run<'r> {
    /// Goes through a requirement.
    pub(super) fn meets(&mut self, requirement: &Requirement) -> Verdict {
        match requirement {
            Requirement::Nothing => Some(Status::Ok),
            Requirement::One(demand) => self.one(demand),
            Requirement::All(all) => {
                let mut awaits = false;
                for requirement in all {
                    match self.meets(requirement) {
                        None => awaits = true,
                        Some(Status::Ok) => {}
                        Some(failed) => return Some(failed),
                    }
                }
                (!awaits).then_some(Status::Ok)
            }
            Requirement::Any { of, missing, failed } => self.any(of, *missing, *failed),
        }
    }

    fn any(&mut self, of: &[Requirement], missing: bool, failed: bool) -> Verdict {
        let mut worst = Status::JwtMissed;
        let mut awaits = false;
        for requirement in of {
            match self.meets(requirement) {
                None => awaits = true,
                Some(Status::Ok) => return Some(Status::Ok),
                // Of several failures that of a token counts before that of a stranger's token, and that before no token.
                Some(status) => {
                    let tells = !matches!(status, Status::JwtMissed | Status::JwtUnknownIssuer);
                    if tells || worst == Status::JwtMissed {
                        worst = status;
                    }
                }
            }
        }
        if awaits {
            return None;
        }
        let allowed = failed || (missing && worst == Status::JwtMissed);
        Some(if allowed { Status::Ok } else { worst })
    }

    /// All tokens are looked at, the last first. Where one fails, the others count no more, unless failing is allowed.
    fn one(&mut self, demand: &Demand) -> Verdict {
        // What another demand of the same request has left there goes too, as in Envoy.
        match demand.provider {
            Some(at) => self.model.providers[at].own_headers().for_each(|name| {
                self.request.remove_name(name);
            }),
            None => self.model.own_headers.iter().for_each(|name| {
                self.request.remove_name(name);
            }),
        }
        let mut tokens = demand.locations.tokens(self.request);
        let mut provider = None;
        let status = loop {
            let status = match tokens.pop() {
                None => Status::JwtMissed,
                Some(token) => match self.token(demand, &token, &mut provider) {
                    Ok(()) => Status::Ok,
                    Err(Stop::Failed(status)) => status,
                    Err(Stop::Awaits) => return None,
                },
            };
            if status != Status::Ok {
                self.note_failure(provider, status);
            }
            if tokens.is_empty() || (status != Status::Ok && !demand.failed && !demand.missing) {
                break status;
            }
        };
        let allowed = demand.failed || (demand.missing && status == Status::JwtMissed);
        Some(if allowed { Status::Ok } else { status })
    }

    /// `failed_status_in_metadata`, of the provider at hand or of the only one that there is.
    fn note_failure(&mut self, provider: Option<usize>, status: Status) {
        let only = || (self.model.providers.len() == 1).then_some(0);
        let Some(provider) = provider.or_else(only) else { return };
        let key = &self.model.providers[provider].failed_key;
        if key.is_empty() {
            return;
        }
        let value = |kind| Value { kind: Some(kind) };
        let mut failure = Struct::default();
        failure.fields.insert("code".to_owned(), value(Kind::NumberValue(status.code().into())));
        failure.fields.insert("message".to_owned(), value(Kind::StringValue(status.text().to_owned())));
        self.note(key, failure);
    }

    fn note(&mut self, key: &str, object: Struct) {
        let value = Value { kind: Some(Kind::StructValue(object)) };
        self.done.metadata.fields.insert(key.to_owned(), value);
    }

    /// `provider` is left at whose the token is, as far as that is known.
    fn token(
        &mut self,
        demand: &Demand,
        token: &Token<'_>,
        provider: &mut Option<usize>,
    ) -> Result<(), Stop> {
        let model = self.model;
        if demand.provider.is_some() {
            *provider = demand.provider;
        }
        let kept = self.kept(demand, token);
        let known = kept.is_some();
        let jwt = match kept {
            Some(jwt) => jwt,
            None => Rc::new(Jwt::parse(&token.text)?),
        };
        if !token.location.allows(&jwt.issuer) {
            return Err(Status::JwtUnknownIssuer.into());
        }
        if demand.provider.is_none() {
            *provider = model.of_issuer(&jwt.issuer);
        }
        let Some(at) = *provider else { return Err(Status::JwtUnknownIssuer.into()) };
        let owner = &model.providers[at];
        jwt.check_time(self.wall.as_secs(), owner.skew)?;
        let audience = match &demand.audiences {
            Some(audiences) => audiences.allow(&jwt.audiences),
            None => owner.allows_audiences(&jwt.audiences),
        };
        if !audience {
            return Err(Status::JwtAudienceNotAllowed.into());
        }
        if !owner.allows(&jwt, self.wall) {
            return Err(Status::JwtVerificationFail.into());
        }
        if !known {
            self.keys(at)?.get().verify(&jwt)?;
        }
        self.good(owner, token, &jwt);
        if let (false, Some(size), Some(_)) = (known, owner.cache, demand.provider) {
            cache::keep(self.owner, at, size, &token.text, jwt);
        }
        Ok(())
    }

    /// A token that was verified before.
    fn kept(&mut self, demand: &Demand, token: &Token<'_>) -> Option<Rc<Jwt>> {
        let at = demand.provider?;
        let kept = self.model.providers[at].cache.and_then(|_| cache::find(self.owner, at, &token.text));
        let over = |jwt: &Rc<Jwt>| jwt.check_time(self.wall.as_secs(), KEPT_SKEW) == Err(Status::JwtExpired);
        let kept = match kept {
            Some(jwt) if over(&jwt) => {
                cache::forget(self.owner, at, &token.text);
                None
            }
            kept => kept,
        };
        match kept {
            Some(_) => self.done.cache_hits += 1,
            None => self.done.cache_misses += 1,
        }
        kept
    }

    fn keys(&mut self, at: usize) -> Result<Keys<'r>, Stop> {
        let remote = match &self.model.providers[at].keys {
            KeySource::None => return Err(Status::JwksNoValidKeys.into()),
            KeySource::Local(keys) => return Ok(Keys::Local(keys)),
            KeySource::Remote(remote) => remote,
        };
        if let Some((_, answer)) = self.fetched.iter().find(|(of, _)| *of == at) {
            return answer.clone().map(Keys::Fetched).ok_or(Status::JwksFetchFail.into());
        }
        match remote.current(self.now) {
            Some(fetched) => Ok(Keys::Fetched(fetched)),
            None => {
                self.done.wanted.push(at);
                Err(Stop::Awaits)
            }
        }
    }

    /// Leaves behind what a good token shall.
    fn good(&mut self, provider: &Provider, token: &Token<'_>, jwt: &Jwt) {
        if let Some(header) = &provider.payload_header {
            let mut payload = jwt.encoded_payload().to_owned();
            if provider.pad {
                payload.extend(std::iter::repeat_n('=', payload.len().wrapping_neg() % 4));
            }
            self.set(header, payload.as_bytes());
        }
        let mut added = false;
        for claim in &provider.claims {
            let value = jwt.claim(claim.path.iter().map(String::as_str)).map(claim_text).unwrap_or_default();
            if !value.is_empty() {
                self.set(&claim.header, value.as_bytes());
                added = true;
            }
        }
        self.done.clear_route |= provider.clear_route && (added || !provider.payload_key.is_empty());
        if !provider.forward {
            if token.location.in_path() && self.done.path.is_none() {
                self.done.path = self.request.get(HeaderId::PATH).map(<[u8]>::to_vec);
            }
            token.location.remove(self.request);
        }
        if !provider.header_key.is_empty() {
            self.note(&provider.header_key, jwt.header.clone());
        }
        if !provider.payload_key.is_empty() {
            let mut payload = jwt.payload.clone();
            split(&mut payload, &provider.delimited);
            self.note(&provider.payload_key, payload);
        }
    }

    /// Adds a header. A value that would end the header's line reaches nobody.
    fn set(&mut self, name: &HeaderName, value: &[u8]) {
        if value.iter().any(|c| matches!(c, b'\0' | b'\r' | b'\n')) {
            self.done.bad_header.get_or_insert_with(|| name.clone());
        } else {
            self.request.append_name(name, value);
        }
    }
}

/// Why a token does not pass, for now.
enum Stop {
    Failed(Status),
    Awaits,
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Failed(status)
    }
}

/// Claims of words become lists of words.
fn split(payload: &mut Struct, claims: &[String]) {
    for claim in claims {
        let Some(Value { kind: Some(kind) }) = payload.fields.get_mut(claim) else { continue };
        let Kind::StringValue(text) = &*kind else { continue };
        let word = |word: &str| Value { kind: Some(Kind::StringValue(word.to_owned())) };
        let values: Vec<_> = text.split(' ').filter(|w| !w.is_empty()).map(word).collect();
        if !values.is_empty() {
            *kind = Kind::ListValue(ListValue { values });
        }
    }
}

/// A claim as a header's value; empty where it has none.
fn claim_text(claim: &Kind) -> String {
    match claim {
        Kind::StringValue(text) => text.clone(),
        Kind::BoolValue(b) => b.to_string(),
        Kind::NumberValue(n) if *n >= 0.0 && *n < u64::MAX as f64 && n.fract() == 0.0 => {
            format!("{}", *n as u64)
        }
        Kind::NumberValue(n) => format!("{n:.6}"),
        Kind::StructValue(_) | Kind::ListValue(_) => {
            json(claim).map_or_else(String::new, |text| STANDARD.encode(text))
        }
        Kind::NullValue(_) => String::new(),
    }
}

/// As protobuf prints it; members are in the order of their names.
fn json(claim: &Kind) -> Option<String> {
    let schema = Schema::find("google.protobuf.Value")?;
    let value = Value { kind: Some(claim.clone()) };
    to_json(schema, &value.encode_to_vec(), PrintOptions::default()).ok()
}

/// The provider's remote keys where those in force are not enough for a run that must not wait.
pub(super) fn may_want(provider: &Provider, now: Instant) -> bool {
    matches!(&provider.keys, KeySource::Remote(remote) if remote.current(now).is_none())
}

/// The remote keys of a provider that a run wanted.
pub(super) fn remote(provider: &Provider) -> Option<&Arc<Remote>> {
    match &provider.keys {
        KeySource::Remote(remote) => Some(remote),
        KeySource::None | KeySource::Local(_) => None,
    }
}
