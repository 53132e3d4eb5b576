//! HTTP/2 (RFC 9113) through the crate `h2`, both sides.
//!
//! ```text
//!   server, client   streams as they are opened; what drives a connection
//!   convert          the crate's messages to and from ours
//!   guard            the transport below the crate: sees every frame's head, gathers writes
//!   wire             the books: floods, resets, bytes of each stream
//!   scan             frame heads out of a byte stream
//!   keepalive        pings
//! ```
//!
//! The crate owns frames, HPACK and flow control; here its messages are turned into
//! [`HeaderMap`](sampan_core::HeaderMap)s and [`Frame`](crate::Frame)s at the border, so that everything behind
//! is the same for all codecs. Its own limits are set wide, Envoy's are kept here: the crate ends a connection (or
//! answers 431) where Envoy resets a stream, and does not tell why.

mod client;
mod convert;
mod guard;
mod keepalive;
mod scan;
mod server;
mod stats;
mod wire;

use std::sync::Arc;

pub use h2::Reason;

pub use client::{ClientConnection, ClientStream, Driver, DriverEnd, connect};
pub use convert::is_malformed;
pub use keepalive::KeepaliveOptions;
pub use scan::fuzz_frames;
pub use server::{Accepted, End, Responder, ServerConnection, fuzz_head};
pub use stats::CodecStats;
pub use wire::{Flood, FrameLimits, Meter};

use crate::h1::Underscores;
use wire::Wire;

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
    /// `max_header_field_size_kb`: bytes of one header's name and value.
    pub max_field_bytes: Option<usize>,
    /// `override_stream_error_on_invalid_http_message`: a malformed message ends its stream, not the connection.
    pub stream_errors: bool,
    /// `allow_connect`: extended CONNECT (RFC 8441).
    pub allow_connect: bool,
    /// What the peer may send.
    pub frames: FrameLimits,
    /// `connection_keepalive`
    pub keepalive: Option<KeepaliveOptions>,
    /// `headers_with_underscores_action`
    pub underscores: Underscores,
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
            max_field_bytes: None,
            stream_errors: false,
            allow_connect: false,
            frames: FrameLimits::default(),
            keepalive: None,
            underscores: Underscores::Allow,
        }
    }
}

impl Options {
    /// What the crate may decode of a head: enough that our own limits are always met first by a head that breaks
    /// them by less than its own size, and bounded.
    fn decoded_list(&self) -> u32 {
        let most = u64::from(self.max_header_bytes) + 32 * self.max_headers as u64;
        (2 * most + 64 * 1024).min(u64::from(u32::MAX / 8)) as u32
    }

    fn head_limits(&self) -> convert::HeadLimits {
        convert::HeadLimits {
            bytes: self.max_header_bytes as usize,
            count: self.max_headers,
            field: self.max_field_bytes.unwrap_or(usize::MAX),
            underscores: self.underscores,
        }
    }

    fn wire(&self, stats: &Arc<CodecStats>, server: bool) -> Wire {
        Wire::new(stats.clone(), self.frames, server, self.max_concurrent_streams)
    }
}
