//! What goes wrong on the wire, under Envoy's names.

use thiserror::Error;

/// A message that breaks the protocol or a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct CodecError {
    /// The status a server answers with where it still can.
    pub status: u16,
    /// Envoy's response code details.
    pub details: &'static str,
    /// For the log.
    pub message: &'static str,
}

impl CodecError {
    /// A malformed message, 400.
    pub const fn bad(details: &'static str, message: &'static str) -> Self {
        Self { status: 400, details, message }
    }

    /// Whatever the parser does not accept.
    pub const fn parse(message: &'static str) -> Self {
        Self::bad("http1.codec_error", message)
    }
}

/// Why a stream ended before its end; Envoy's `StreamResetReason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// We gave it up.
    LocalReset,
    /// The peer refused it before it did anything: safe to try again.
    RemoteRefused,
    /// The peer reset it.
    RemoteReset,
    /// The connection could not be made.
    ConnectionFailure,
    /// The connection ended.
    ConnectionTermination,
    /// A limit of connections, requests or pending requests.
    Overflow,
    /// The peer broke the protocol.
    ProtocolError,
}

impl ResetReason {
    /// As it stands in `upstream_reset_before_response_started{…}`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LocalReset => "local_reset",
            Self::RemoteRefused => "remote_refused_stream_reset",
            Self::RemoteReset => "remote_reset",
            Self::ConnectionFailure => "connection_failure",
            Self::ConnectionTermination => "connection_termination",
            Self::Overflow => "overflow",
            Self::ProtocolError => "protocol_error",
        }
    }
}
