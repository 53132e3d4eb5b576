//! Bytes to messages and back: HTTP/1 (our own codec), HTTP/2 (crate `h2`), bodies; the server's and the client's side.
//!
//! A codec hands out heads as [`HeaderMap`](sampan_core::HeaderMap)s and bodies as streams of [`Frame`]s, and takes
//! the same. It knows framing, limits and what makes a message malformed; what a header means to a proxy is the
//! connection manager's business.

pub mod body;
pub mod error;
pub mod h1;
pub mod h2;

pub use body::{Body, BodyError, BodyStream, Frame};
pub use error::{CodecError, ResetReason};
