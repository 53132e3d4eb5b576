//! A worker's clock.
//!
//! Reading the clock costs more than most of what is timed by it. So whatever brings news from outside (a head, a piece of a
//! body, a deadline) reads it once with [`tick`], and all that follows from the news asks for [`recent`]. The wall clock is
//! derived from the monotonic one and compared with the system's once a second.

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime};

/// How long an anchor of the wall clock serves.
const ANCHORED: Duration = Duration::from_secs(1);

thread_local! {
    static NOW: Cell<Option<Instant>> = const { Cell::new(None) };
    static ANCHOR: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
}

/// Reads the clock.
pub fn tick() -> Instant {
    let now = Instant::now();
    NOW.set(Some(now));
    now
}

/// What [`tick`] read last in this thread.
pub fn recent() -> Instant {
    NOW.get().unwrap_or_else(tick)
}

/// The wall clock at a moment that has just been.
pub fn wall(at: Instant) -> SystemTime {
    if let Some((anchor, wall)) = ANCHOR.get()
        && let Some(since) = at.checked_duration_since(anchor)
        && since < ANCHORED
    {
        return wall + since;
    }
    let wall = SystemTime::now();
    ANCHOR.set(Some((at, wall)));
    wall
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_is_the_last_tick() {
        let at = tick();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(recent(), at);
        assert!(tick() > at && recent() > at);
    }

    #[test]
    fn the_wall_clock_follows() {
        let at = tick();
        let wall = super::wall(at);
        assert_eq!(super::wall(at + Duration::from_millis(5)), wall + Duration::from_millis(5));
        let later = super::wall(at + Duration::from_secs(2));
        assert!(later < wall + Duration::from_secs(2), "anchored anew");
    }
}
