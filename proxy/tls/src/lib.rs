//! Server and client TLS contexts, certificate verification, and the byte stream under every codec.

mod context;
mod transport;

pub use context::{ClientContext, ClientOptions, HandshakeError, ServerContext, StaticSecrets};
pub use transport::Transport;
