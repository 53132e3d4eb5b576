//! HTTP/2 through the crate `h2`.
