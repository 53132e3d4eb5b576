//! Server and client TLS contexts, certificate verification, transport streams.
