//! HTTP/1.0 and 1.1 (RFC 9112), both sides.
//!
//! ```text
//!            io          read into the worker's scratch, write heads and small bodies in one call
//!            parse       head -> HeaderMap, framing decided, smuggling refused
//!            decode      body: length, chunked, until close
//!            encode      HeaderMap -> head; body: length, chunked, raw
//!   server / client      a connection: one message at a time each way
//! ```
//!
//! What is accepted and what refused is Envoy 1.40's (its Balsa parser and codec): the valid methods, the URL's
//! characters, one `content-length`, no `content-length` beside `transfer-encoding`, nothing but `chunked`.
//! An idle connection holds no buffer.

mod client;
mod decode;
mod encode;
mod io;
mod parse;
mod server;
mod stats;

pub use client::{ClientConnection, ClientOptions, ResponseHead};
pub use decode::fuzz_chunks;
pub use encode::HeaderCase;
pub use parse::fuzz_parse;
pub use server::{
    HeadError, RequestBody, RequestHead, ServerConnection, ServerOptions, UNDERSCORE, Underscores,
};
pub use stats::CodecStats;
