//! How long to wait before the next stream: full jitter below a bound that doubles, as Envoy's.

use std::time::Duration;

/// The bound of the next wait.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    bound: Duration,
}

impl Backoff {
    /// Envoy's defaults are 500 ms and 30 s (`retry_back_off` of the gRPC service).
    pub fn new(base: Duration, max: Duration) -> Self {
        Self { base, max: max.max(base), bound: base }
    }

    /// The next wait; `random` is spread evenly over `u64`.
    pub fn next(&mut self, random: u64) -> Duration {
        let bound = u64::try_from(self.bound.as_millis()).unwrap_or(u64::MAX).max(1);
        self.bound = self.bound.saturating_mul(2).min(self.max);
        Duration::from_millis(random % bound)
    }

    /// A response came: the next failure starts from the beginning.
    pub fn reset(&mut self) {
        self.bound = self.base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_maximum_and_starts_again() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(3));
        let mut bounds = Vec::new();
        for _ in 0..4 {
            bounds.push(backoff.bound.as_millis());
            assert!(backoff.next(u64::MAX).as_millis() < *bounds.last().unwrap());
        }
        assert_eq!(bounds, [500, 1000, 2000, 3000]);
        backoff.reset();
        assert_eq!(backoff.bound.as_millis(), 500);
    }
}
