//! Tokens are signed here by keys made here; key sets are what such keys look like.

use ::base64::Engine;
use ::base64::engine::general_purpose::URL_SAFE_NO_PAD;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, RsaEncoding};
use aws_lc_rs::{encoding, hmac};
use serde_json::{Value, json};

use super::{Algorithm, Jwks, Jwt, Status};

const SECRET: &[u8] = b"secretsecretsecretsecretsecret12";

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn token(header: &str, payload: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", encode(header), encode(payload));
    let signature = encode(sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

fn hs256(signed: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, SECRET), signed).as_ref().to_vec()
}

fn secret() -> Value {
    json!({"kty": "oct", "k": encode(SECRET)})
}

fn set(keys: &[Value]) -> Jwks {
    Jwks::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
}

fn refused(keys: Value) -> Status {
    Jwks::parse(json!({ "keys": [keys] }).to_string().as_bytes()).unwrap_err()
}

fn verdict(keys: &Jwks, token: &str) -> Result<(), Status> {
    keys.verify(&Jwt::parse(token)?)
}

fn ecdsa(algorithm: &'static EcdsaSigningAlgorithm) -> EcdsaKeyPair {
    EcdsaKeyPair::generate(algorithm).unwrap()
}

fn ec_key(crv: &str, key: &EcdsaKeyPair) -> Value {
    let point = &key.public_key().as_ref()[1..];
    let (x, y) = point.split_at(point.len() / 2);
    json!({"kty": "EC", "crv": crv, "x": encode(x), "y": encode(y)})
}

/// Modulus and exponent of 2048 bits out of the DER that the library gives.
fn rsa_key(key: &RsaKeyPair) -> Value {
    use x509_parser::prelude::FromDer;
    let der = encoding::AsDer::<encoding::PublicKeyX509Der<'_>>::as_der(key.public_key()).unwrap();
    let (_, info) = x509_parser::x509::SubjectPublicKeyInfo::from_der(der.as_ref()).unwrap();
    let x509_parser::public_key::PublicKey::RSA(key) = info.parsed().unwrap() else { panic!("no RSA key") };
    json!({"kty": "RSA", "n": encode(key.modulus), "e": encode(key.exponent)})
}

fn rsa_signed(key: &RsaKeyPair, padding: &'static dyn RsaEncoding, signed: &[u8]) -> Vec<u8> {
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(padding, &SystemRandom::new(), signed, &mut signature).unwrap();
    signature
}

fn header(alg: &str) -> String {
    json!({ "alg": alg }).to_string()
}

#[test]
fn every_algorithm_verifies_with_its_key_and_with_no_other() {
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let p256 = ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING);
    let p384 = ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING);
    let p521 = ecdsa(&signature::ECDSA_P521_SHA512_FIXED_SIGNING);
    let ed = Ed25519KeyPair::generate().unwrap();
    let ed_key = json!({"kty": "OKP", "crv": "Ed25519", "x": encode(ed.public_key())});
    let keys = [
        rsa_key(&rsa),
        ec_key("P-256", &p256),
        ec_key("P-384", &p384),
        ec_key("P-521", &p521),
        ed_key,
        secret(),
    ];
    let ec =
        |key: &EcdsaKeyPair, signed: &[u8]| key.sign(&SystemRandom::new(), signed).unwrap().as_ref().to_vec();
    let mac = |hash, signed: &[u8]| hmac::sign(&hmac::Key::new(hash, SECRET), signed).as_ref().to_vec();
    type Sign<'s> = Box<dyn Fn(&[u8]) -> Vec<u8> + 's>;
    let of_rsa = |padding: &'static dyn RsaEncoding| -> Sign<'_> {
        let rsa = &rsa;
        Box::new(move |signed| rsa_signed(rsa, padding, signed))
    };
    let tokens: [(&str, usize, Sign<'_>); 13] = [
        ("RS256", 0, of_rsa(&signature::RSA_PKCS1_SHA256)),
        ("RS384", 0, of_rsa(&signature::RSA_PKCS1_SHA384)),
        ("RS512", 0, of_rsa(&signature::RSA_PKCS1_SHA512)),
        ("PS256", 0, of_rsa(&signature::RSA_PSS_SHA256)),
        ("PS384", 0, of_rsa(&signature::RSA_PSS_SHA384)),
        ("PS512", 0, of_rsa(&signature::RSA_PSS_SHA512)),
        ("ES256", 1, Box::new(|signed| ec(&p256, signed))),
        ("ES384", 2, Box::new(|signed| ec(&p384, signed))),
        ("ES512", 3, Box::new(|signed| ec(&p521, signed))),
        ("EdDSA", 4, Box::new(|signed| ed.sign(signed).as_ref().to_vec())),
        ("HS256", 5, Box::new(|signed| mac(hmac::HMAC_SHA256, signed))),
        ("HS384", 5, Box::new(|signed| mac(hmac::HMAC_SHA384, signed))),
        ("HS512", 5, Box::new(|signed| mac(hmac::HMAC_SHA512, signed))),
    ];
    for (alg, of, sign) in &tokens {
        let good = token(&header(alg), "{}", sign);
        for (at, key) in keys.iter().enumerate() {
            let passes = verdict(&set(std::slice::from_ref(key)), &good) == Ok(());
            assert_eq!(passes, at == *of, "{alg} with key {at}");
        }
        // The same signature under each other name.
        for (other, ..) in &tokens {
            let renamed = token(&header(other), "{}", sign);
            let passes = verdict(&set(&keys[*of..=*of]), &renamed) == Ok(());
            assert_eq!(passes, other == alg, "{alg} called {other}");
        }
        // Every bit of it counts.
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
        for at in 0..bytes.len() {
            bytes[at] ^= 1;
            let bad = format!("{signed}.{}", encode(&bytes));
            assert_eq!(verdict(&set(&keys[*of..=*of]), &bad), Err(Status::JwtVerificationFail), "{alg}");
            bytes[at] ^= 1;
        }
    }
}

#[test]
fn a_public_key_is_no_secret() {
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let key = rsa_key(&rsa);
    let modulus = URL_SAFE_NO_PAD.decode(key["n"].as_str().unwrap()).unwrap();
    let forged = token(&header("HS256"), "{}", |signed| {
        hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &modulus), signed).as_ref().to_vec()
    });
    assert_eq!(verdict(&set(&[key]), &forged), Err(Status::JwtVerificationFail));
}

#[test]
fn which_keys_are_tried() {
    let with = |mut key: Value, name: &str, value: &str| {
        key[name] = value.into();
        key
    };
    let one = with(secret(), "kid", "1");
    let named = |kid: &str| token(&json!({"alg": "HS256", "kid": kid}).to_string(), "{}", hs256);
    let mismatch = Err(Status::JwksKidAlgMismatch);
    assert_eq!(verdict(&set(std::slice::from_ref(&one)), &named("1")), Ok(()));
    assert_eq!(verdict(&set(std::slice::from_ref(&one)), &named("2")), mismatch);
    assert_eq!(verdict(&set(std::slice::from_ref(&one)), &named("")), Ok(()), "no id asks for any key");
    assert_eq!(verdict(&set(&[secret()]), &named("2")), Ok(()), "a key without id may be any");
    assert_eq!(verdict(&set(&[with(secret(), "alg", "HS384")]), &named("")), mismatch);
    let wrong = with(json!({"kty": "oct", "k": "AAAA"}), "kid", "1");
    assert_eq!(verdict(&set(&[wrong.clone(), one.clone()]), &named("1")), Ok(()), "all of an id are tried");
    assert_eq!(verdict(&set(&[wrong]), &named("1")), Err(Status::JwtVerificationFail));
    let ed = json!({"kty": "OKP", "crv": "Ed25519", "x": encode(Ed25519KeyPair::generate().unwrap().public_key())});
    assert_eq!(verdict(&set(&[ed, one]), &named("")), Err(Status::JwtEd25519SignatureWrongLength));
}

#[test]
fn tokens_that_are_none() {
    let of = |header: &str, payload: &str| Jwt::parse(&token(header, payload, hs256)).map(|_| ());
    let good = token(&header("HS256"), "{}", hs256);
    for text in ["", ".", "..", "a.b", "a..c", ".b.c", "a.b.", "a.b.c.d", "a.b.c."] {
        assert_eq!(Jwt::parse(text).unwrap_err(), Status::JwtBadFormat, "{text}");
    }
    for (text, status) in [
        (format!("!{good}"), Status::JwtHeaderParseErrorBadBase64),
        (good.replacen('.', ".!", 1), Status::JwtPayloadParseErrorBadBase64),
        (format!("{good}!"), Status::JwtSignatureParseErrorBadBase64),
        (format!("{good}=="), Status::JwtSignatureParseErrorBadBase64),
    ] {
        assert_eq!(Jwt::parse(&text).unwrap_err(), status, "{text}");
    }
    assert!(Jwt::parse(&format!("{good}=")).is_ok(), "padding");
    let deep = |n: usize| format!("{{\"alg\":\"HS256\",\"x\":{}{}}}", "[".repeat(n), "]".repeat(n));
    for (header, status) in [
        ("", Status::JwtHeaderParseErrorBadJson),
        ("[]", Status::JwtHeaderParseErrorBadJson),
        ("{\"alg\":\"HS256\"} x", Status::JwtHeaderParseErrorBadJson),
        ("{\"alg\":\"none\",\"alg\":\"HS256\"}", Status::JwtHeaderParseErrorBadJson),
        ("{'alg':'HS256'}", Status::JwtHeaderParseErrorBadJson),
        (&deep(100_000), Status::JwtHeaderParseErrorBadJson),
        ("{}", Status::JwtHeaderBadAlg),
        ("{\"alg\":null}", Status::JwtHeaderBadAlg),
        ("{\"alg\":\"none\"}", Status::JwtHeaderNotImplementedAlg),
        ("{\"alg\":\"\"}", Status::JwtHeaderNotImplementedAlg),
        ("{\"alg\":\"hs256\"}", Status::JwtHeaderNotImplementedAlg),
        ("{\"alg\":\"HS256\",\"kid\":1}", Status::JwtHeaderBadKid),
    ] {
        let expected = if header.is_empty() { Status::JwtBadFormat } else { status };
        assert_eq!(of(header, "{}"), Err(expected), "{}", &header[..header.len().min(40)]);
    }
    for (payload, status) in [
        ("[]", Status::JwtPayloadParseErrorBadJson),
        ("{\"iss\":\"a\",\"iss\":\"b\"}", Status::JwtPayloadParseErrorBadJson),
        ("{\"a\":{\"b\":1,\"b\":2}}", Status::JwtPayloadParseErrorBadJson),
        ("{\"a\":\"\\ud800\"}", Status::JwtPayloadParseErrorBadJson),
        ("{\"exp\":1e400}", Status::JwtPayloadParseErrorBadJson),
        ("{\"iss\":1}", Status::JwtPayloadParseErrorIssNotString),
        ("{\"sub\":null}", Status::JwtPayloadParseErrorSubNotString),
        ("{\"iat\":\"1\"}", Status::JwtPayloadParseErrorIatNotInteger),
        ("{\"nbf\":-1}", Status::JwtPayloadParseErrorNbfOutOfRange),
        ("{\"exp\":18446744073709551616}", Status::JwtPayloadParseErrorExpOutOfRange),
        ("{\"jti\":1}", Status::JwtPayloadParseErrorJtiNotString),
        ("{\"aud\":[\"a\",1]}", Status::JwtPayloadParseErrorAudNotString),
        ("{\"aud\":{}}", Status::JwtPayloadParseErrorAudNotString),
    ] {
        assert_eq!(of(&header("HS256"), payload), Err(status), "{payload}");
    }
}

#[test]
fn what_a_token_says() {
    let payload = json!({"iss": "i", "sub": "s", "aud": ["a", "b"], "exp": 100.5, "nbf": 10, "n": {"a.b": {"c": true}}});
    let token = token(&header("ES256"), &payload.to_string(), hs256);
    let jwt = Jwt::parse(&token).unwrap();
    assert_eq!((jwt.algorithm, jwt.issuer.as_str(), jwt.subject.as_str()), (Algorithm::Es256, "i", "s"));
    assert_eq!((jwt.audiences.as_slice(), jwt.expires), (&["a".to_owned(), "b".to_owned()][..], 100));
    assert_eq!(jwt.encoded_payload(), token.split('.').nth(1).unwrap());
    assert!(jwt.claim(["n", "a.b", "c"]).is_some() && jwt.claim(["n"]).is_some());
    assert!(
        jwt.claim(["n", "a", "b"]).is_none() && jwt.claim(["iss", "x"]).is_none() && jwt.claim([]).is_none()
    );
    for (now, skew, verdict) in [
        (4, 5, Err(Status::JwtNotYetValid)),
        (5, 5, Ok(())),
        (105, 5, Ok(())),
        (106, 5, Err(Status::JwtExpired)),
        (u64::MAX, u64::MAX, Ok(())),
    ] {
        assert_eq!(jwt.check_time(now, skew), verdict, "{now}");
    }
}

#[test]
fn key_sets_that_are_none() {
    let all = |text: &str| Jwks::parse(text.as_bytes()).unwrap_err();
    assert_eq!(all(""), Status::JwksParseError);
    assert_eq!(all("{\"keys\":[],\"keys\":[]}"), Status::JwksParseError);
    assert_eq!(all("{}"), Status::JwksNoKeys);
    assert_eq!(all("{\"a\":\"b\"}"), Status::JwksNoKeys);
    assert_eq!(all("{\"keys\":{}}"), Status::JwksBadKeys);
    assert_eq!(all("{\"keys\":[1]}"), Status::JwksNoValidKeys);
    let certificate = json!({"1": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"});
    assert_eq!(all(&certificate.to_string()), Status::JwksX509ParseError);
    let n = encode([0xff; 256]);
    for (key, status) in [
        (json!({}), Status::JwksMissingKty),
        (json!({"kty": 1}), Status::JwksBadKty),
        (json!({"kty": "dsa"}), Status::JwksNotImplementedKty),
        (json!({"kty": "RSA", "alg": "HS256"}), Status::JwksRSAKeyBadAlg),
        (json!({"kty": "RSA"}), Status::JwksRSAKeyMissingN),
        (json!({"kty": "RSA", "n": 1}), Status::JwksRSAKeyBadN),
        (json!({"kty": "RSA", "n": n}), Status::JwksRSAKeyMissingE),
        (json!({"kty": "RSA", "n": n, "e": 1}), Status::JwksRSAKeyBadE),
        (json!({"kty": "RSA", "n": "!", "e": "AQAB"}), Status::JwksRsaParseError),
        (json!({"kty": "RSA", "n": n, "e": "AQ"}), Status::JwksRsaParseError),
        (json!({"kty": "RSA", "n": encode([0xff; 64]), "e": "AQAB"}), Status::JwksRsaParseError),
        (json!({"kty": "RSA", "n": encode([0xff; 4096]), "e": "AQAB"}), Status::JwksRsaParseError),
        (json!({"kty": "EC", "alg": "RS256"}), Status::JwksECKeyBadAlg),
        (json!({"kty": "EC", "alg": "ES256", "crv": "P-384"}), Status::JwksECKeyAlgNotCompatibleWithCrv),
        (json!({"kty": "EC", "crv": "secp256k1"}), Status::JwksECKeyAlgOrCrvUnsupported),
        (json!({"kty": "EC", "alg": "ES1"}), Status::JwksECKeyAlgOrCrvUnsupported),
        (json!({"kty": "EC"}), Status::JwksECKeyMissingX),
        (json!({"kty": "EC", "x": "AA", "y": 1}), Status::JwksECKeyBadY),
        (json!({"kty": "EC", "x": "!", "y": "AA"}), Status::JwksEcXorYBadBase64),
        (json!({"kty": "EC", "x": "AA", "y": "AA"}), Status::JwksEcParseError),
        (json!({"kty": "EC", "x": encode([1; 33]), "y": "AA"}), Status::JwksEcParseError),
        (json!({"kty": "oct", "alg": "RS256", "k": "AA"}), Status::JwksHMACKeyBadAlg),
        (json!({"kty": "oct"}), Status::JwksHMACKeyMissingK),
        (json!({"kty": "oct", "k": ""}), Status::JwksOctBadBase64),
        (json!({"kty": "OKP", "alg": "RS256"}), Status::JwksOKPKeyBadAlg),
        (json!({"kty": "OKP", "crv": "X25519"}), Status::JwksOKPKeyCrvUnsupported),
        (json!({"kty": "OKP", "crv": "Ed25519", "x": "AA"}), Status::JwksOKPXWrongLength),
    ] {
        assert_eq!(refused(key.clone()), status, "{key}");
    }
    // A bad key does not spoil the good one beside it.
    assert!(Jwks::parse(json!({"keys": [{"kty": "dsa"}, secret()]}).to_string().as_bytes()).is_ok());
}

#[test]
fn a_key_may_be_folded_over_lines() {
    use super::json::escaped;
    let text = b"{\n\t\"a\": \"b\nc\\\"\td\\\\\"\n}";
    assert_eq!(escaped(text), b"{\n\t\"a\": \"b\\u000ac\\\"\\u0009d\\\\\"\n}");
    let folded = "{\"keys\": [{\"kty\": \"oct\", \"k\": \"c2Vj\n   cmV0\"}]}";
    assert!(Jwks::parse(folded.as_bytes()).is_ok());
}
