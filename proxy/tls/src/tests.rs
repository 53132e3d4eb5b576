//! Real handshakes between our own two sides over sockets.

mod advisories;
mod config;
mod handshake;
mod support;
mod verification;
