//! The codec's stats: `http1.*` below the root for clients, `cluster.NAME.http1.*` for hosts.

use sampan_core::stats::{Counter, Scope};

/// The stats of Envoy's HTTP/1 codec.
pub struct CodecStats {
    /// Headers that were dropped for an underscore.
    pub dropped_headers_with_underscores: Counter,
    /// Requests that were refused for one.
    pub requests_rejected_with_underscores_in_headers: Counter,
    /// Metadata is HTTP/2's, and responses do not queue up here: both stay 0.
    _never: [Counter; 2],
}

impl CodecStats {
    /// The stats below `http1.` in a scope.
    pub fn new(scope: &Scope) -> Self {
        let scope = scope.scope("http1");
        let counter = |name| scope.counter(name);
        Self {
            dropped_headers_with_underscores: counter("dropped_headers_with_underscores"),
            requests_rejected_with_underscores_in_headers: counter(
                "requests_rejected_with_underscores_in_headers",
            ),
            _never: [counter("metadata_not_supported_error"), counter("response_flood")],
        }
    }
}
