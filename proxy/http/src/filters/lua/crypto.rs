//! `importPublicKey()` and `verifySignature()`: keys as DER (SubjectPublicKeyInfo), RSA by PKCS#1 v1.5 and ECDSA.
//!
//! As in Envoy, a key that cannot be read is no error but an object without one, and a stream's second import
//! in one turn gives the first's object and imports nothing.

use aws_lc_rs::signature::{self as sig, UnparsedPublicKey, VerificationAlgorithm};
use mlua::{Lua, MultiValue, Value};
use x509_parser::prelude::{FromDer, SubjectPublicKeyInfo};

use super::handle::session;
use super::object::{Args, Fail, Kind, Method, Return, internal};

/// A key: its text, as far as Lua's C takes it.
pub(super) struct PublicKey(Vec<u8>);

impl Kind for PublicKey {
    const NAME: &'static str = "publicKey";
    const METHODS: &'static [(&'static str, Method)] = &[("get", |lua, args| {
        let this = args.this::<Self>()?;
        match &this.own.0[..] {
            [] => Return::value(lua, Value::Nil),
            key => Return::text(lua, Some(key)),
        }
    })];
}

/// So many bytes of a text.
fn part(args: &Args, n: usize) -> Result<Vec<u8>, Fail> {
    let text = args.bytes(n)?;
    let length = usize::try_from(args.int(n + 1)?).unwrap_or(0);
    let text = text.as_bytes();
    // Envoy reads on behind a text that is shorter than was said.
    let part = text.get(..length).ok_or_else(|| args.bad(n + 1, "longer than the text"))?;
    Ok(part.to_vec())
}

pub(super) fn import_public_key(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let key = part(args, 1)?;
    let mut live = session.live()?;
    let name = match &live.key_of_turn {
        Some(name) => name.clone(),
        None if SubjectPublicKeyInfo::from_der(&key).is_err() => live.key_of_turn.insert(Vec::new()).clone(),
        None => {
            let name = super::object::up_to_nul(&key).to_vec();
            live.keys.insert(name.clone(), key);
            live.key_of_turn.insert(name).clone()
        }
    };
    drop(live);
    Return::object(lua, &session, PublicKey(name))
}

pub(super) fn verify_signature(lua: &Lua, args: &Args) -> Result<Return, Fail> {
    let session = session(args)?;
    let hash = args.name(1)?;
    let name = args.text(2)?;
    let key = session.live()?.keys.get(&name).cloned();
    let key = key.ok_or_else(|| Fail::from("invalid public key"))?;
    let (signature, text) = (part(args, 3)?, part(args, 5)?);
    let error = match Hash::parse(&hash) {
        None => Some(format!("{hash} is not supported.")),
        Some(hash) => verify(hash, &key, &signature, &text).err().map(str::to_owned),
    };
    let verdict = Value::Boolean(error.is_none());
    let error =
        error.map(|error| lua.create_string(error).map(Value::String)).transpose().map_err(internal)?;
    Ok(Return::Values(MultiValue::from_vec(vec![verdict, error.unwrap_or(Value::Nil)])))
}

#[derive(Clone, Copy)]
enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    fn parse(name: &str) -> Option<Self> {
        Some(match &*name.to_ascii_lowercase() {
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            _ => return None,
        })
    }

    /// The algorithms of this hash that the library knows: which of them a key is for, it says itself.
    fn algorithms(self) -> &'static [&'static dyn VerificationAlgorithm] {
        match self {
            Self::Sha1 => &[
                &sig::RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY,
                &sig::ECDSA_P256_SHA1_ASN1,
                &sig::ECDSA_P521_SHA1_ASN1,
            ],
            Self::Sha224 => &[&sig::ECDSA_P521_SHA224_ASN1],
            Self::Sha256 => &[
                &sig::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
                &sig::ECDSA_P256_SHA256_ASN1,
                &sig::ECDSA_P384_SHA256_ASN1,
                &sig::ECDSA_P521_SHA256_ASN1,
            ],
            Self::Sha384 => &[
                &sig::RSA_PKCS1_2048_8192_SHA384,
                &sig::ECDSA_P256_SHA384_ASN1,
                &sig::ECDSA_P384_SHA384_ASN1,
                &sig::ECDSA_P521_SHA384_ASN1,
            ],
            Self::Sha512 => &[
                &sig::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
                &sig::ECDSA_P256_SHA512_ASN1,
                &sig::ECDSA_P384_SHA512_ASN1,
                &sig::ECDSA_P521_SHA512_ASN1,
            ],
        }
    }
}

fn verify(hash: Hash, key: &[u8], signature: &[u8], text: &[u8]) -> Result<(), &'static str> {
    let fits = |algorithm: &&&'static dyn VerificationAlgorithm| {
        UnparsedPublicKey::new(**algorithm, key).verify(text, signature).is_ok()
    };
    hash.algorithms().iter().find(fits).map(|_| ()).ok_or("Failed to verify digest. Error code: 0")
}
