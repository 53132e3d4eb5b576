//! A token: three base64url parts, of which the first names the algorithm and the second holds the claims.

use envoy_types::pb::google::protobuf::Struct;
use envoy_types::pb::google::protobuf::value::Kind;

use super::json::{self, Text};
use super::{Status, base64};

/// What a signature may be made with (`alg`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are RFC 7518's")]
pub enum Algorithm {
    Es256,
    Es384,
    Es512,
    Hs256,
    Hs384,
    Hs512,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    EdDsa,
}

impl Algorithm {
    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "HS256" => Self::Hs256,
            "HS384" => Self::Hs384,
            "HS512" => Self::Hs512,
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// A token that was read; nothing of it is verified yet.
#[derive(Debug, Clone)]
pub struct Jwt {
    /// `header.payload`, which is what was signed.
    signed: Box<str>,
    /// Where in `signed` the dot stands.
    dot: usize,
    pub(super) signature: Vec<u8>,
    pub(super) algorithm: Algorithm,
    /// `kid`; empty where there is none.
    pub(super) key_id: String,
    /// The header's members.
    pub header: Struct,
    /// The claims.
    pub payload: Struct,
    /// `iss`; empty where there is none.
    pub issuer: String,
    /// `sub`; empty where there is none.
    pub subject: String,
    /// `aud`
    pub audiences: Vec<String>,
    not_before: u64,
    /// `exp` in seconds; 0 where there is none.
    pub expires: u64,
}

impl Jwt {
    /// Reads a token.
    ///
    /// # Errors
    /// What is wrong first, in the order in which Envoy looks.
    pub fn parse(token: &str) -> Result<Self, Status> {
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Status::JwtBadFormat);
        };
        if header.is_empty() || payload.is_empty() || signature.is_empty() {
            return Err(Status::JwtBadFormat);
        }
        let signed = &token[..token.len() - signature.len() - 1];
        let dot = header.len();
        let header = base64::decode(header).ok_or(Status::JwtHeaderParseErrorBadBase64)?;
        let header = json::object(&header).ok_or(Status::JwtHeaderParseErrorBadJson)?;
        let Text::Is(algorithm) = json::text(&header, "alg") else { return Err(Status::JwtHeaderBadAlg) };
        let algorithm = Algorithm::named(algorithm).ok_or(Status::JwtHeaderNotImplementedAlg)?;
        let key_id = text(&header, "kid", Status::JwtHeaderBadKid)?;
        let payload = base64::decode(payload).ok_or(Status::JwtPayloadParseErrorBadBase64)?;
        let payload = json::object(&payload).ok_or(Status::JwtPayloadParseErrorBadJson)?;
        let issuer = text(&payload, "iss", Status::JwtPayloadParseErrorIssNotString)?;
        let subject = text(&payload, "sub", Status::JwtPayloadParseErrorSubNotString)?;
        let times = [
            ("iat", Status::JwtPayloadParseErrorIatNotInteger, Status::JwtPayloadParseErrorIatOutOfRange),
            ("nbf", Status::JwtPayloadParseErrorNbfNotInteger, Status::JwtPayloadParseErrorNbfOutOfRange),
            ("exp", Status::JwtPayloadParseErrorExpNotInteger, Status::JwtPayloadParseErrorExpOutOfRange),
        ];
        let mut seconds = [0; 3];
        for (at, (name, no_number, out_of_range)) in times.into_iter().enumerate() {
            seconds[at] = time(&payload, name, no_number, out_of_range)?;
        }
        let [_, not_before, expires] = seconds;
        text(&payload, "jti", Status::JwtPayloadParseErrorJtiNotString)?;
        let audiences = audiences(&payload).ok_or(Status::JwtPayloadParseErrorAudNotString)?;
        let signature = base64::decode(signature).ok_or(Status::JwtSignatureParseErrorBadBase64)?;
        Ok(Self {
            signed: signed.into(),
            dot,
            signature,
            algorithm,
            key_id,
            header,
            payload,
            issuer,
            subject,
            audiences,
            not_before,
            expires,
        })
    }

    /// What the signature is of.
    pub(super) fn signed(&self) -> &[u8] {
        self.signed.as_bytes()
    }

    /// The payload as it was sent, base64url.
    pub fn encoded_payload(&self) -> &str {
        &self.signed[self.dot + 1..]
    }

    /// Whether the token is in force at a time (seconds since the epoch), give or take `skew`.
    ///
    /// # Errors
    /// Not yet, or no longer.
    pub fn check_time(&self, now: u64, skew: u64) -> Result<(), Status> {
        if now.saturating_add(skew) < self.not_before {
            return Err(Status::JwtNotYetValid);
        }
        if self.expires != 0 && now > self.expires.saturating_add(skew) {
            return Err(Status::JwtExpired);
        }
        Ok(())
    }

    /// A claim by the names that lead to it.
    pub fn claim<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Option<&Kind> {
        let mut path = path.into_iter();
        let mut kind = self.payload.fields.get(path.next()?)?.kind.as_ref()?;
        for name in path {
            let Kind::StructValue(object) = kind else { return None };
            kind = object.fields.get(name)?.kind.as_ref()?;
        }
        Some(kind)
    }
}

fn text(object: &Struct, name: &str, wrong: Status) -> Result<String, Status> {
    match json::text(object, name) {
        Text::Missing => Ok(String::new()),
        Text::Is(text) => Ok(text.to_owned()),
        Text::Other => Err(wrong),
    }
}

/// Whole seconds; 0 where the claim is missing.
fn time(payload: &Struct, name: &str, no_number: Status, out_of_range: Status) -> Result<u64, Status> {
    let Some(value) = payload.fields.get(name) else { return Ok(0) };
    match value.kind {
        // 2^64 and all above have no room; a NaN cannot be written in JSON.
        Some(Kind::NumberValue(n)) if n < 0.0 || n >= u64::MAX as f64 => Err(out_of_range),
        Some(Kind::NumberValue(n)) => Ok(n as u64),
        _ => Err(no_number),
    }
}

fn audiences(payload: &Struct) -> Option<Vec<String>> {
    match payload.fields.get("aud").map(|value| value.kind.as_ref()) {
        None => Some(Vec::new()),
        Some(Some(Kind::StringValue(one))) => Some(vec![one.clone()]),
        Some(Some(Kind::ListValue(list))) => list
            .values
            .iter()
            .map(|value| match &value.kind {
                Some(Kind::StringValue(one)) => Some(one.clone()),
                _ => None,
            })
            .collect(),
        Some(_) => None,
    }
}
