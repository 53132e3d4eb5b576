//! Key sets: RFC 7517 (`keys`), or X.509 certificates with RSA keys by key id, as Google publishes them.
//!
//! A set is read once; its keys are then handles of the library that are ready to verify. A key that cannot be used is left
//! out, as in Envoy; a set in which no key is left is an error. Whether an RSA key of no `alg` is asked for PKCS #1 or PSS is
//! known when a token comes: such a handle is made at its first use.

use std::sync::OnceLock;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents};
use envoy_types::pb::google::protobuf::Struct;
use envoy_types::pb::google::protobuf::value::Kind;

use super::json::{self, Text};
use super::{Algorithm, Jwt, Status, base64};

/// The keys of an issuer.
#[derive(Debug)]
pub struct Jwks {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    /// `kid`; empty where there is none.
    id: String,
    /// `alg`; empty where there is none.
    alg: String,
    kind: KeyKind,
}

#[derive(Debug)]
enum KeyKind {
    Rsa(Box<Rsa>),
    /// With the one algorithm of its curve.
    Ec(Algorithm, ParsedPublicKey),
    Ed25519(ParsedPublicKey),
    /// For HS256, HS384 and HS512.
    Secret(Box<[hmac::Key; 3]>),
}

struct Rsa {
    n: Vec<u8>,
    e: Vec<u8>,
    /// By algorithm: RS256, RS384, RS512, PS256, PS384, PS512.
    handles: [OnceLock<Option<ParsedPublicKey>>; 6],
}

impl std::fmt::Debug for Rsa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rsa({} bits)", self.n.len() * 8)
    }
}

impl Jwks {
    /// Reads a set.
    ///
    /// # Errors
    /// Why there is no usable key.
    pub fn parse(text: &[u8]) -> Result<Self, Status> {
        let object = json::object(&json::escaped(text)).ok_or(Status::JwksParseError)?;
        let Some(keys) = object.fields.get("keys") else { return Self::certificates(&object) };
        let Some(Kind::ListValue(list)) = &keys.kind else { return Err(Status::JwksBadKeys) };
        let mut wrong = None;
        let mut keys = Vec::new();
        for value in &list.values {
            let Some(Kind::StructValue(object)) = &value.kind else { continue };
            match Key::from_object(object) {
                Ok(key) => keys.push(key),
                Err(status) => wrong = wrong.or(Some(status)),
            }
        }
        if keys.is_empty() { Err(wrong.unwrap_or(Status::JwksNoValidKeys)) } else { Ok(Self { keys }) }
    }

    /// Key ids to certificates. All members must look like certificates, or it is no such set.
    fn certificates(object: &Struct) -> Result<Self, Status> {
        let mut keys = Vec::new();
        for id in object.fields.keys() {
            let Text::Is(pem) = json::text(object, id) else { return Err(Status::JwksNoKeys) };
            let framed = pem.starts_with("-----BEGIN CERTIFICATE-----\n")
                && pem.ends_with("\n-----END CERTIFICATE-----\n");
            if id.is_empty() || !framed {
                return Err(Status::JwksNoKeys);
            }
            keys.push((id, pem));
        }
        if keys.is_empty() {
            return Err(Status::JwksNoKeys);
        }
        let key = |(id, pem): (&String, &str)| {
            Ok(Key {
                id: id.clone(),
                alg: String::new(),
                kind: KeyKind::Rsa(Box::new(Rsa::from_certificate(pem)?)),
            })
        };
        Ok(Self { keys: keys.into_iter().map(key).collect::<Result<_, Status>>()? })
    }

    /// Whether one of the keys made the token's signature. Nothing else of the token is looked at.
    ///
    /// # Errors
    /// No key fits the token, or none of those that fit made the signature.
    pub fn verify(&self, jwt: &Jwt) -> Result<(), Status> {
        let mut fits = false;
        for key in &self.keys {
            // One without an id may be any; so may the key of a token that names none.
            if !jwt.key_id.is_empty() && !key.id.is_empty() && key.id != jwt.key_id {
                continue;
            }
            if !key.alg.is_empty() && Algorithm::named(&key.alg) != Some(jwt.algorithm) {
                continue;
            }
            fits = true;
            if matches!(key.kind, KeyKind::Ed25519(_)) && jwt.signature.len() != 64 {
                return Err(Status::JwtEd25519SignatureWrongLength);
            }
            if key.kind.made(jwt) {
                return Ok(());
            }
        }
        Err(if fits { Status::JwtVerificationFail } else { Status::JwksKidAlgMismatch })
    }
}

impl Key {
    fn from_object(object: &Struct) -> Result<Self, Status> {
        let kty = match json::text(object, "kty") {
            Text::Missing => return Err(Status::JwksMissingKty),
            Text::Other => return Err(Status::JwksBadKty),
            Text::Is(kty) => kty,
        };
        let text = |name| match json::text(object, name) {
            Text::Is(text) => text,
            Text::Missing | Text::Other => "",
        };
        let alg = text("alg");
        let kind = match kty {
            "EC" => ec(object, alg)?,
            "RSA" => KeyKind::Rsa(Box::new(Rsa::from_object(object, alg)?)),
            "oct" => secret(object, alg)?,
            "OKP" => ed25519(object, alg)?,
            _ => return Err(Status::JwksNotImplementedKty),
        };
        Ok(Self { id: text("kid").to_owned(), alg: alg.to_owned(), kind })
    }
}

/// A member that must be text.
fn member<'o>(object: &'o Struct, name: &str, missing: Status, wrong: Status) -> Result<&'o str, Status> {
    match json::text(object, name) {
        Text::Is(text) => Ok(text),
        Text::Missing => Err(missing),
        Text::Other => Err(wrong),
    }
}

fn ec(object: &Struct, alg: &str) -> Result<KeyKind, Status> {
    if !alg.is_empty() && !alg.starts_with("ES") {
        return Err(Status::JwksECKeyBadAlg);
    }
    let crv = match json::text(object, "crv") {
        Text::Missing => "",
        Text::Other => return Err(Status::JwksECKeyBadCrv),
        Text::Is(crv) => crv,
    };
    let (algorithm, handle, size): (_, &'static dyn signature::VerificationAlgorithm, usize) =
        match (alg, crv) {
            ("ES256", "P-256" | "") | ("", "P-256" | "") => {
                (Algorithm::Es256, &signature::ECDSA_P256_SHA256_FIXED, 32)
            }
            ("ES384", "P-384" | "") | ("", "P-384") => {
                (Algorithm::Es384, &signature::ECDSA_P384_SHA384_FIXED, 48)
            }
            ("ES512", "P-521" | "") | ("", "P-521") => {
                (Algorithm::Es512, &signature::ECDSA_P521_SHA512_FIXED, 66)
            }
            (alg, crv) if !alg.is_empty() && !crv.is_empty() => {
                return Err(Status::JwksECKeyAlgNotCompatibleWithCrv);
            }
            _ => return Err(Status::JwksECKeyAlgOrCrvUnsupported),
        };
    let x = member(object, "x", Status::JwksECKeyMissingX, Status::JwksECKeyBadX)?;
    let y = member(object, "y", Status::JwksECKeyMissingY, Status::JwksECKeyBadY)?;
    let mut point = vec![4];
    for coordinate in [x, y] {
        let bytes = base64::decode(coordinate).ok_or(Status::JwksEcXorYBadBase64)?;
        // Coordinates are of a fixed length, but some writers drop or add leading zeros.
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        let digits = &bytes[zeros..];
        let missing = size.checked_sub(digits.len()).ok_or(Status::JwksEcParseError)?;
        point.extend(std::iter::repeat_n(0, missing));
        point.extend_from_slice(digits);
    }
    let key = ParsedPublicKey::new(handle, point).map_err(|_| Status::JwksEcParseError)?;
    Ok(KeyKind::Ec(algorithm, key))
}

fn secret(object: &Struct, alg: &str) -> Result<KeyKind, Status> {
    if !matches!(alg, "" | "HS256" | "HS384" | "HS512") {
        return Err(Status::JwksHMACKeyBadAlg);
    }
    let text = member(object, "k", Status::JwksHMACKeyMissingK, Status::JwksHMACKeyBadK)?;
    let secret = base64::decode(text).filter(|secret| !secret.is_empty()).ok_or(Status::JwksOctBadBase64)?;
    let hashes = [hmac::HMAC_SHA256, hmac::HMAC_SHA384, hmac::HMAC_SHA512];
    Ok(KeyKind::Secret(Box::new(hashes.map(|hash| hmac::Key::new(hash, &secret)))))
}

fn ed25519(object: &Struct, alg: &str) -> Result<KeyKind, Status> {
    if !matches!(alg, "" | "EdDSA") {
        return Err(Status::JwksOKPKeyBadAlg);
    }
    let crv = member(object, "crv", Status::JwksOKPKeyMissingCrv, Status::JwksOKPKeyBadCrv)?;
    if crv != "Ed25519" {
        return Err(Status::JwksOKPKeyCrvUnsupported);
    }
    let x = member(object, "x", Status::JwksOKPKeyMissingX, Status::JwksOKPKeyBadX)?;
    let x = base64::decode(x).ok_or(Status::JwksOKPXBadBase64)?;
    if x.len() != 32 {
        return Err(Status::JwksOKPXWrongLength);
    }
    // A point that is none verifies nothing; Envoy finds that out with the first token.
    let key = ParsedPublicKey::new(&signature::ED25519, x).map_err(|_| Status::JwksNoValidKeys)?;
    Ok(KeyKind::Ed25519(key))
}

impl Rsa {
    fn from_object(object: &Struct, alg: &str) -> Result<Self, Status> {
        if !alg.is_empty() && !alg.starts_with("RS") && !alg.starts_with("PS") {
            return Err(Status::JwksRSAKeyBadAlg);
        }
        let n = member(object, "n", Status::JwksRSAKeyMissingN, Status::JwksRSAKeyBadN)?;
        let e = member(object, "e", Status::JwksRSAKeyMissingE, Status::JwksRSAKeyBadE)?;
        let (Some(n), Some(e)) = (base64::decode(n), base64::decode(e)) else {
            return Err(Status::JwksRsaParseError);
        };
        Self::new(&n, &e).ok_or(Status::JwksRsaParseError)
    }

    fn from_certificate(pem: &str) -> Result<Self, Status> {
        use x509_parser::public_key::PublicKey;
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| Status::JwksX509ParseError)?;
        let certificate = pem.parse_x509().map_err(|_| Status::JwksX509ParseError)?;
        match certificate.public_key().parsed() {
            Ok(PublicKey::RSA(key)) => {
                Self::new(key.modulus, key.exponent).ok_or(Status::JwksX509GetPubkeyError)
            }
            _ => Err(Status::JwksX509GetPubkeyError),
        }
    }

    fn new(n: &[u8], e: &[u8]) -> Option<Self> {
        let digits = |bytes: &[u8]| bytes[bytes.iter().take_while(|b| **b == 0).count()..].to_vec();
        let (n, e) = (digits(n), digits(e));
        if !matches!(e[..], [3] | [1, 0, 1]) || n.last().is_none_or(|b| b % 2 == 0) {
            return None;
        }
        // Below 1024 bits the library verifies nothing; above 16384 it would take long.
        if n.len() < 128 || n.len() > 2048 {
            return None;
        }
        Some(Self { n, e, handles: Default::default() })
    }

    fn handle(&self, algorithm: Algorithm) -> Option<&ParsedPublicKey> {
        // RS256 and RS512 of 1024 bits are old; the library has them for such.
        let (at, parameters): (_, &'static RsaParameters) = match algorithm {
            Algorithm::Rs256 => (0, &signature::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY),
            Algorithm::Rs384 => (1, &signature::RSA_PKCS1_2048_8192_SHA384),
            Algorithm::Rs512 => (2, &signature::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY),
            Algorithm::Ps256 => (3, &signature::RSA_PSS_2048_8192_SHA256),
            Algorithm::Ps384 => (4, &signature::RSA_PSS_2048_8192_SHA384),
            Algorithm::Ps512 => (5, &signature::RSA_PSS_2048_8192_SHA512),
            _ => return None,
        };
        let components = RsaPublicKeyComponents { n: &self.n, e: &self.e };
        self.handles[at].get_or_init(|| components.to_parsed_public_key(parameters).ok()).as_ref()
    }
}

impl KeyKind {
    /// Whether this key made the signature, in a way in which such a key may.
    fn made(&self, jwt: &Jwt) -> bool {
        let verifies = |key: &ParsedPublicKey| key.verify_sig(jwt.signed(), &jwt.signature).is_ok();
        match self {
            Self::Rsa(rsa) => rsa.handle(jwt.algorithm).is_some_and(verifies),
            Self::Ec(algorithm, key) => *algorithm == jwt.algorithm && verifies(key),
            Self::Ed25519(key) => jwt.algorithm == Algorithm::EdDsa && verifies(key),
            Self::Secret(keys) => {
                let [of_256, of_384, of_512] = &**keys;
                let key = match jwt.algorithm {
                    Algorithm::Hs256 => of_256,
                    Algorithm::Hs384 => of_384,
                    Algorithm::Hs512 => of_512,
                    _ => return false,
                };
                hmac::verify(key, jwt.signed(), &jwt.signature).is_ok()
            }
        }
    }
}
