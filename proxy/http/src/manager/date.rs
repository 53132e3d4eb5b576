//! The `date` header, formatted once a second per worker.

use std::cell::RefCell;
use std::time::UNIX_EPOCH;

use sampan_core::clock;

thread_local! {
    static CACHE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

/// Shows the current date as `IMF-fixdate` (RFC 9110 section 5.6.7).
pub fn with<T>(show: impl FnOnce(&str) -> T) -> T {
    let now = clock::wall(clock::recent());
    let second = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    CACHE.with_borrow_mut(|(cached, text)| {
        if *cached != second || text.is_empty() {
            *cached = second;
            *text = httpdate::fmt_http_date(now);
        }
        show(text)
    })
}
