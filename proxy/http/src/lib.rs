//! HTTP: the connection manager, filters, the route table, the router.
//!
//! A request's way, file by file: [`manager`] takes it off the codec and normalises it, [`route`] finds what to do,
//! [`filters`] act on it in order, [`router`] forwards it, and [`manager`] writes the answer.

mod boxed;
pub mod filter;
pub mod filters;
pub mod jwt;
pub mod manager;
pub mod route;
pub mod router;
pub mod stream;
pub mod timer;
pub mod tracing;
