//! A client of xDS control planes, without a proxy.
//!
//! ```text
//!   client     Client, Watch: one stream kept up, and all that is watched on it
//!   transport  Transport, Call: what a client needs of HTTP/2
//!   handler    Watcher, Update, Resource: what the owner of resources sees
//!   types      type URLs and the calls that serve them
//!   state      sotw::Subscription, delta::Subscription: responses and time in, requests out; pure
//!   wire       the protocol's messages, resources not copied
//!   h2         a transport over any byte stream (feature `h2`)
//!   grpc       gRPC's framing
//!   backoff    how long to wait before the next stream
//! ```
//!
//! `examples/watch.rs` is a client on a page. All of it lives on one thread of tokio ([`tokio::task::LocalSet`]); protobuf
//! types are the caller's own affair, the client reads nothing but the protocol's messages.
//!
//! # The contract with a watcher
//!
//! First every resource of a response is decoded; one that cannot be refuses the response. Then each watcher that has
//! to do with the response is told, the newest first, until one refuses. One ACK or NACK goes out for each response.
//! What watchers took of a response that is refused is in force; the version stays what was last accepted.
//!
//! # As Envoy 1.40 does it (its requests were recorded)
//!
//! - The types are asked for one after the other as their owners subscribe, clusters first, listeners only when the
//!   clusters' endpoints are there; on a new stream in the same order, with the version and without a nonce.
//! - What a response makes its handler subscribe to (EDS for CDS) is sent before that response's ACK.
//! - A NACK names the nonce refused, the version last accepted, code 13 and at most 4 KiB of text; the error detail is
//!   sent once.
//! - While clusters warm, CDS is paused: its ACK waits, and so does its request on a new stream.
//! - Delta: a first request for everything names nothing; a new stream names the versions known, and subscribes again
//!   to what was asked for by name; unsubscribing carries no nonce unless there is an answer to go with it.

#![allow(clippy::disallowed_methods, reason = "for the threads of the proxy's workers")]

pub mod backoff;
pub mod client;
pub mod grpc;
#[cfg(feature = "h2")]
pub mod h2;
pub mod handler;
pub mod state;
pub mod transport;
pub mod types;
pub mod wire;

pub use client::{Client, Config, Observer, Pause, RateLimit, Variant, Watch};
pub use handler::{Decoded, Failure, Refusal, Resource, Update, Watcher};
pub use transport::{Call, End, LocalFuture, Transport};
