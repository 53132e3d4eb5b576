//! A timerfd that the thread's loop waits for like for a socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Wakes who waits for it, once for each time it was set.
pub struct Alarm(AsyncFd<Owned>);

/// Owns its descriptor, which never changes.
struct Owned(TimerFd);

impl AsRawFd for Owned {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Alarm {
    /// One that is not set, in the current runtime.
    pub fn new() -> io::Result<Self> {
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        // SAFETY: `Owned` gives the same descriptor for as long as it lives, and closes it only then.
        #[allow(unsafe_code)]
        let registered = unsafe { AsyncFd::register_with_interest(Owned(timer), Interest::READABLE) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Goes off after so long; what it was set to before is forgotten.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would stop it.
        let after = TimeSpec::from_duration(after.max(Duration::from_nanos(1)));
        Ok(self.0.get_ref().0.set(Expiration::OneShot(after), TimerSetTimeFlags::empty())?)
    }

    /// Waits until it goes off.
    pub async fn gone_off(&self) -> io::Result<()> {
        // Nothing is read: setting it anew also takes back that it has gone off.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}
