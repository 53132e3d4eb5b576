//! JSON Web Tokens and the key sets that verify them, without HTTP: text in, verdict out.
//!
//! ```text
//!   token     header.payload.signature -> claims                      (token.rs, json.rs, base64.rs)
//!   keys      RFC 7517 key sets, or X.509 certificates by key id      (keys.rs)
//!   verdict   the outcomes with Envoy's numbers and words             (status.rs)
//! ```
//!
//! What is read comes from strangers. A key verifies only what its type and its `alg` allow, so that a token cannot choose
//! how it is verified: a public key is never the secret of an HMAC, `none` is no algorithm, ES256 is P-256 and nothing
//! else. A member that stands twice in an object is an error, so that no two readers see different claims.
//! Keys and where to find them (`jwk`, `jku`, `x5u`, `x5c`) are never taken from a token.

mod base64;
mod json;
mod keys;
mod status;
mod token;

pub use keys::Jwks;
pub use status::Status;
pub use token::{Algorithm, Jwt};

#[cfg(test)]
mod tests;
