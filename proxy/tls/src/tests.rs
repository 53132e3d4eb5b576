//! Real handshakes between our own two sides over sockets.

mod config;
mod handshake;
mod support;
