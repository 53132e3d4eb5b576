//! Sampan: an Envoy-compatible L7 data plane.

fn main() {}
