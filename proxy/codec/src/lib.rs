//! HTTP/1 codec of both sides, HTTP/2 streams, bodies.
