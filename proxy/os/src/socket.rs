//! Options of sockets.

use std::io;
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// `SO_RCVLOWAT`
    ReceiveLowWater,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    libc::c_int
);

/// `SO_RCVLOWAT`: who waits for the socket is woken when so many bytes are there, or its end. What is there can be read at any time.
/// Source: socket(7).
pub fn set_receive_low_water(socket: &impl AsFd, bytes: u16) -> io::Result<()> {
    Ok(setsockopt(socket, ReceiveLowWater, &bytes.into())?)
}
