//! A token bucket without a lock: tokens are implied by the time since the bucket was last empty.
//!
//! The bucket holds the moment at which it was, or would have been, empty; taking a token moves it on by the time
//! that one token takes to come. Seconds are floating: the largest bucket and the longest interval fit. The caller
//! brings the time, which its request knows already.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::r#type::v3::TokenBucket as Message;

use crate::manager::duration;

/// Size and rate.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) max: u32,
    /// Tokens in a second.
    pub(super) rate: f64,
}

/// Why a bucket's message makes none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// `fill_interval` is below a millisecond.
    Zero,
    /// It is below 50 milliseconds.
    TooShort,
}

impl Size {
    pub(super) fn from_proto(message: &Message) -> Result<Self, Refused> {
        let interval = message.fill_interval.as_ref().map(duration).unwrap_or_default();
        if interval < Duration::from_millis(50) {
            return Err(if interval.as_millis() == 0 { Refused::Zero } else { Refused::TooShort });
        }
        let per_fill = message.tokens_per_fill.map_or(1, |n| n.value.max(1));
        Ok(Self { max: message.max_tokens, rate: f64::from(per_fill) / interval.as_secs_f64() })
    }
}

/// A bucket.
#[derive(Debug)]
pub(super) struct TokenBucket {
    pub(super) size: Size,
    origin: Instant,
    /// Seconds since `origin` at which the bucket counts as empty (the bits of an `f64`); negative at first.
    empty_at: AtomicU64,
}

/// What a bucket holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Holds {
    /// Whole tokens.
    pub(super) tokens: u64,
    /// Whole seconds until the next token comes; 0 where there is one.
    pub(super) reset: u64,
}

impl TokenBucket {
    /// A full one.
    pub(super) fn new(size: Size, now: Instant) -> Self {
        let empty_at = -f64::from(size.max) / size.rate;
        Self { size, origin: now, empty_at: AtomicU64::new(empty_at.to_bits()) }
    }

    fn tokens(&self, empty_at: u64, now: f64) -> f64 {
        ((now - f64::from_bits(empty_at)) * self.size.rate).min(self.size.max.into())
    }

    fn seconds(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.origin).as_secs_f64()
    }

    /// Changes the tokens; false where `change` wants them as they are.
    fn update(&self, now: Instant, change: impl Fn(f64) -> Option<f64>) -> bool {
        let now = self.seconds(now);
        let mut old = self.empty_at.load(Ordering::Relaxed);
        loop {
            let Some(tokens) = change(self.tokens(old, now)) else { return false };
            let new = (now - tokens / self.size.rate).to_bits();
            match self.empty_at.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(other) => old = other,
            }
        }
    }

    /// Takes so many tokens, or none. Nothing is never given: so is Envoy's.
    pub(super) fn take(&self, wanted: u64, now: Instant) -> bool {
        let wanted = wanted as f64;
        wanted > 0.0 && self.update(now, |tokens| (tokens >= wanted).then_some(tokens - wanted))
    }

    /// Gives tokens back, up to what the bucket holds.
    pub(super) fn give(&self, tokens: u64, now: Instant) {
        let max = f64::from(self.size.max);
        self.update(now, |left| Some((left + tokens as f64).min(max)));
    }

    /// What it holds now.
    pub(super) fn holds(&self, now: Instant) -> Holds {
        let tokens = self.tokens(self.empty_at.load(Ordering::Relaxed), self.seconds(now)).max(0.0);
        let reset = if tokens >= 1.0 { 0.0 } else { ((1.0 - tokens) / self.size.rate).ceil() };
        Holds { tokens: tokens as u64, reset: reset as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(tokens: u64, reset: u64) -> Holds {
        Holds { tokens, reset }
    }

    #[test]
    fn a_bucket_gives_what_it_holds_and_fills_again() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let bucket = TokenBucket::new(Size { max: 2, rate: 0.5 }, start);
        assert!(bucket.take(1, start));
        assert_eq!(bucket.holds(start), holds(1, 0));
        assert!(bucket.take(1, start));
        assert_eq!(bucket.holds(start), holds(0, 2));
        assert!(!bucket.take(1, after(1)));
        assert_eq!(bucket.holds(after(1)), holds(0, 1));
        assert!(bucket.take(1, after(2)));
        assert!(bucket.take(1, after(1000)));
        assert_eq!(bucket.holds(after(1000)), holds(1, 0), "never more than it holds");
    }

    #[test]
    fn several_at_once_none_and_back() {
        let now = Instant::now();
        let bucket = TokenBucket::new(Size { max: 10, rate: 0.001 }, now);
        assert!(bucket.take(7, now) && !bucket.take(4, now));
        assert!(!bucket.take(0, now));
        bucket.give(2, now);
        assert_eq!(bucket.holds(now), holds(5, 0));
        bucket.give(1_000_000_000, now);
        assert_eq!(bucket.holds(now), holds(10, 0));
    }

    #[test]
    fn time_may_stand_still_or_go_back() {
        let now = Instant::now() + Duration::from_secs(10);
        let bucket = TokenBucket::new(Size { max: 1, rate: 1.0 }, now);
        assert!(bucket.take(1, now));
        assert!(!bucket.take(1, now.checked_sub(Duration::from_secs(5)).unwrap()));
        assert!(bucket.take(1, now + Duration::from_secs(1)));
    }

    #[test]
    fn the_largest_bucket_and_the_longest_interval() {
        let message = |seconds, nanos| Message {
            max_tokens: u32::MAX,
            fill_interval: Some(envoy_types::pb::google::protobuf::Duration { seconds, nanos }),
            ..Default::default()
        };
        let now = Instant::now();
        let bucket = TokenBucket::new(Size::from_proto(&message(315_576_000_000, 0)).unwrap(), now);
        assert!(bucket.take(1, now));
        assert_eq!(bucket.holds(now), holds(u64::from(u32::MAX) - 1, 0));
        assert_eq!(Size::from_proto(&message(0, 49_999_999)).unwrap_err(), Refused::TooShort);
        assert_eq!(Size::from_proto(&message(0, 999_999)).unwrap_err(), Refused::Zero);
    }
}
