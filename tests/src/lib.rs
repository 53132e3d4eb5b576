//! End-to-end and differential tests: what Envoy does, Sampan does.
//!
//! The library is the harness: cases ([`case`]) are assembled into configurations ([`config`]), run with a subject
//! ([`process`]) between scripted upstreams ([`upstream`]) and a scripted client ([`client`]); what was seen becomes a tree
//! ([`observe`]) that is checked against the case's expectation for Envoy and then compared between the subjects ([`run`]).

#![allow(clippy::disallowed_methods, reason = "for the threads of the proxy's workers")]

pub mod case;
pub mod certs;
pub mod client;
pub mod config;
pub mod conformance;
pub mod control_plane;
pub mod error;
pub mod grpc;
pub mod http1;
pub mod istiod;
pub mod names;
pub mod net;
pub mod observe;
pub mod process;
mod protobuf;
pub mod run;
mod traffic;
pub mod upstream;
pub mod xds;
