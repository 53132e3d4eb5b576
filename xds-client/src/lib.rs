//! xDS without a proxy: what a client of a control plane says, and when.
//!
//! ```text
//!   wire      the protocol's messages, resources not copied
//!   handler   Handler, Update, Resource, Refusal: what the owner of a type sees
//!   state     sotw::Subscription, delta::Subscription: responses and time in, requests and updates out
//!   backoff   how long to wait before the next stream
//! ```
//!
//! No I/O, no clock, no task: whoever owns the stream does three things. It calls `stream_opened` for every
//! subscription in the order in which the types were asked for; it gives a response to the subscription of its type
//! (`receive`), which calls the [`Handler`] and so has the answer at once; and it sends `next_request` until there is
//! none. A response is read only after the last one was given away and its answer sent, so that a fast server fills
//! its own window and not this process. The node is put into requests by the stream's owner ([`state::NodePolicy`]),
//! and `expire` is called at the instant that `next_expiry` names.
//!
//! Streams (gRPC, REST, files), `initial_fetch_timeout` and rate limits are not here yet.
//!
//! # The contract with a handler
//!
//! One call of [`Handler::update`] for each response that is well-formed, and one ACK or NACK for each response. What
//! the handler took of a response that it refuses in part is in force: which part that is differs by type and is the
//! handler's. After a NACK the version stays what was last accepted.
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

pub mod backoff;
pub mod handler;
pub mod state;
pub mod wire;

pub use handler::{Failure, Handler, Refusal, Resource, Update};
