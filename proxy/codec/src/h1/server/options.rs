//! What a listener's configuration says about HTTP/1.

use sampan_core::matcher::StringMatcher;

use super::super::encode::HeaderCase;
use crate::error::CodecError;

/// What to do with a header whose name has an underscore (`headers_with_underscores_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Underscores {
    /// Pass it on.
    #[default]
    Allow,
    /// Answer 400.
    Reject,
    /// Drop the header.
    Drop,
}

/// A header's name has an underscore, and such requests are refused.
pub const UNDERSCORE: CodecError =
    CodecError::bad("http1.unexpected_underscore", "header name contains underscores");

/// What a listener's configuration says about HTTP/1.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Bytes of a head.
    pub max_header_bytes: usize,
    /// Headers of a head.
    pub max_headers: usize,
    /// `accept_http_10`
    pub accept_http10: bool,
    /// `default_host_for_http_10`
    pub default_host: Option<String>,
    /// `allow_absolute_url`, on by default.
    pub allow_absolute_url: bool,
    /// `allow_chunked_length`
    pub allow_chunked_length: bool,
    /// `enable_trailers`
    pub enable_trailers: bool,
    /// `allow_custom_methods`
    pub allow_custom_methods: bool,
    /// `ignore_http_11_upgrade`
    pub ignore_upgrades: Vec<StringMatcher>,
    /// Spelling of response header names.
    pub case: HeaderCase,
    /// Underscores in header names.
    pub underscores: Underscores,
    /// Whether `https://` in the target of a request that came without TLS is refused (`use_remote_address`).
    pub refuse_https: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_header_bytes: 60 * 1024,
            max_headers: 100,
            accept_http10: false,
            default_host: None,
            allow_absolute_url: true,
            allow_chunked_length: false,
            enable_trailers: false,
            allow_custom_methods: false,
            ignore_upgrades: Vec::new(),
            case: HeaderCase::Lower,
            underscores: Underscores::Allow,
            refuse_https: false,
        }
    }
}
