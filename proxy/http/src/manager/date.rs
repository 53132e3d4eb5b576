//! The `date` header, formatted once a second per worker.

use std::cell::RefCell;
use std::time::{Duration, Instant, UNIX_EPOCH};

use sampan_core::clock;

thread_local! {
    /// The text, and until when it is true.
    static CACHE: RefCell<Option<(Instant, String)>> = const { RefCell::new(None) };
}

/// Shows the current date as `IMF-fixdate` (RFC 9110 section 5.6.7).
pub fn with<T>(show: impl FnOnce(&str) -> T) -> T {
    let now = clock::recent();
    CACHE.with_borrow_mut(|cache| {
        let (_, text) = match cache {
            Some(cached) if now < cached.0 => cached,
            _ => {
                let wall = clock::wall(now);
                let past = wall.duration_since(UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
                let left = Duration::from_secs(1) - Duration::from_nanos(past.into());
                cache.insert((now + left, httpdate::fmt_http_date(wall)))
            }
        };
        show(text)
    })
}
