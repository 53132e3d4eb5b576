//! Accept, listener filters, filter chain match, network filters.
//!
//! In the order of a connection: [`accept`] takes the socket, `filters` peek at its first bytes, `chain` picks the
//! filter chain, `connection` ends TLS there and runs the chain's network filters; the last one serves the
//! connection to its end. [`context`] is what factories and connections are given, [`network`] what a network
//! filter is, [`config`] a listener's model, [`socket`] its sockets.

pub mod accept;
pub mod config;
pub mod context;
pub mod discovered;
pub mod istio;
mod mongo;
pub mod network;
pub mod socket;

mod balance;
mod chain;
mod connection;
mod filters;
mod peek;
mod proto;
mod rbac;
mod simple;
mod sni_forward;
mod socket_options;
mod state;
mod stats;
pub mod tcp_proxy;

pub use accept::Listeners;
pub use config::ListenerConfig;
pub use context::{FactoryContext, KnownClusters, NodeInfo, Server, TrafficDirection, Want, Wants, Worker};
pub use discovered::{ExtensionSlot, ExtensionUser, Stage, WantedExtension};
pub use filters::{fuzz_http_inspector, fuzz_proxy_protocol, fuzz_tls_inspector};
pub use network::{
    ConnectionFilter, ConnectionMetadata, Downstream, Findings, Held, NetworkFilter, NetworkFilterFactory,
    NetworkFilterRegistry, Observer, TerminalFilter, Verdict,
};
pub use rbac::Refusal;
pub use socket::{BindError, Bound, ListenSockets};
pub use tcp_proxy::{TunnelFailure, TunnelTold, Tunnelled, Tunnels, UpstreamBytes};
