//! Accept, listener filters, filter chain match, network filters.
//!
//! In the order of a connection: `accept` takes the socket, `filters` peek at its first bytes, `chain` picks the
//! filter chain, TLS ends there, then the chain's network filters run; the last one serves the connection to its
//! end. [`context`] is what factories and connections are given, [`network`] what a network filter is.

pub mod context;
pub mod network;

pub use context::{FactoryContext, KnownClusters, NodeInfo, Server, TrafficDirection, Worker};
pub use network::{
    ConnectionFilter, Downstream, NetworkFilter, NetworkFilterFactory, NetworkFilterRegistry, TerminalFilter,
    Verdict,
};
