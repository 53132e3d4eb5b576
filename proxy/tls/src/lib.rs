//! Server and client TLS contexts, certificate verification, and the byte stream under every codec.
//!
//! A context is made once from its message ([`ServerContext`], [`ClientContext`]) and is shared by all workers.
//! rustls does the protocol with one provider, aws-lc-rs; what Envoy decides differently from rustls (ALPN without
//! overlap, the choice of certificates, what is verified) is decided here.

mod cert_info;
mod certificate;
mod client;
mod common;
mod context;
mod data_source;
mod failure;
mod gate;
mod paced;
mod params;
mod peers;
mod san;
mod secrets;
mod server;
mod slot;
mod sniff;
mod spiffe;
mod stats;
mod tap;
#[cfg(test)]
mod tests;
mod tickets;
mod transport;
mod validation;
mod validation_config;
mod verifier;

pub use client::ClientContext;
pub use context::{ClientOptions, HandshakeError, LoadedCertificate};
pub use paced::Paced;
pub use secrets::{SecretKind, StaticSecrets};
pub use server::ServerContext;
pub use slot::{Commit, SecretUser, TlsContext, TlsSlot, WantedSecret};
pub use tap::{Tap, Tapped};
pub use tickets::check as check_ticket_keys;
pub use transport::{Transport, Tunnel};
