//! HTTP/2 (RFC 9113) through the crate `h2`, both sides.
//!
//! The crate owns frames, HPACK, flow control and the defences against floods; here its messages are turned into
//! [`HeaderMap`](sampan_core::HeaderMap)s and [`Frame`](crate::Frame)s at the border, so that everything behind
//! is the same for all codecs.

mod client;
mod convert;
mod server;

pub use client::{ClientConnection, ClientStream, connect};
pub use server::{Responder, ServerConnection};

/// Flow control and limits; Envoy's `Http2ProtocolOptions`.
#[derive(Debug, Clone)]
pub struct Options {
    /// `max_concurrent_streams`
    pub max_concurrent_streams: u32,
    /// `initial_stream_window_size`
    pub stream_window: u32,
    /// `initial_connection_window_size`
    pub connection_window: u32,
    /// `hpack_table_size`
    pub header_table_size: u32,
    /// `max_frame_size`; 0 for the protocol's default.
    pub max_frame_size: u32,
    /// Decoded bytes of a head.
    pub max_header_bytes: u32,
    /// Headers of a head.
    pub max_headers: usize,
    /// `allow_connect`: extended CONNECT (RFC 8441).
    pub allow_connect: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_concurrent_streams: 1024,
            stream_window: 16 * 1024 * 1024,
            connection_window: 24 * 1024 * 1024,
            header_table_size: 4096,
            max_frame_size: 0,
            max_header_bytes: 60 * 1024,
            max_headers: 100,
            allow_connect: false,
        }
    }
}
