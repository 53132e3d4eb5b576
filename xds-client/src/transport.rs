//! How bytes get to a control plane and back: one call, open in both directions.
//!
//! The client frames messages itself ([`crate::grpc`]), so that a response's resources stay slices of what the
//! transport read. Whoever has an HTTP/2 connection can be a transport; [`crate::h2`] is the one that needs nothing else.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;

/// A future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Opens calls to one control plane.
pub trait Transport {
    /// Begins the gRPC call of this path (`/package.Service/Method`).
    ///
    /// # Errors
    /// Why there is no connection, or none that takes the call.
    fn open<'a>(&'a self, path: &'a str) -> LocalFuture<'a, Result<Box<dyn Call>, End>>;
}

/// An open call. Dropping it resets it.
pub trait Call {
    /// Queues bytes of the request. They are written by [`Call::poll_flush`].
    fn send(&mut self, bytes: Bytes);

    /// Writes what is queued as far as the peer takes it; ready when nothing is left. A peer that will take no more
    /// is no error here: the end is what [`Call::poll_data`] tells.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>>;

    /// The next bytes of the response. Nothing is read from the connection before somebody polls, and what was polled
    /// is the only thing that makes room for more. An error is the end, also one with status OK.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, End>>;
}

/// How a call ended: a gRPC status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Source: `google.rpc.Code`.
    pub code: u16,
    /// The peer's or the transport's words.
    pub message: String,
}

impl End {
    /// 14: no connection, or it broke.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { code: 14, message: message.into() }
    }

    /// 13: the peer does not speak gRPC.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { code: 13, message: message.into() }
    }

    /// The status of a response's last headers, given as look-up.
    pub fn of_headers<'a>(get: impl Fn(&str) -> Option<&'a [u8]>) -> Option<Self> {
        let code = std::str::from_utf8(get("grpc-status")?).ok()?.parse().unwrap_or(2);
        let message = get("grpc-message").map(percent_decoded).unwrap_or_default();
        Some(Self { code, message })
    }

    /// The status that stands for an HTTP one without `grpc-status`. Source: gRPC's `http-grpc-status-mapping.md`.
    pub fn of_http(status: u16) -> Self {
        let code = match status {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => 2,
        };
        Self { code, message: format!("HTTP status {status}") }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.code, self.message)
    }
}

impl std::error::Error for End {}

fn percent_decoded(text: &[u8]) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let hex = (byte == b'%').then(|| after.get(..2)).flatten();
        let hex = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match hex {
            Some(decoded) => {
                out.push(decoded);
                rest = &after[2..];
            }
            None => out.push(byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_from_trailers() {
        let trailers = |name: &str| match name {
            "grpc-status" => Some(&b"14"[..]),
            "grpc-message" => Some(&b"gone%3A%20 100%"[..]),
            _ => None,
        };
        assert_eq!(End::of_headers(trailers), Some(End::unavailable("gone:  100%")));
        assert_eq!(End::of_headers(|_| None), None);
        assert_eq!(End::of_http(503).code, 14);
    }
}
