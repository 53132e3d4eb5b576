//! End-to-end and differential tests: what Envoy does, Sampan does.
