//! Matchers: strings, headers, paths, addresses, metadata.
