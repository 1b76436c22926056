//! A token bucket: how often something that a peer can provoke may happen.

use core::time::Duration;

use xen::Time;

/// Allows a burst, and one more after each interval.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    tokens: u32,
    burst: u32,
    interval: Duration,
    /// Up to when tokens have been added.
    filled: Time,
}

impl Bucket {
    /// A full bucket.
    pub(crate) const fn new(burst: u32, interval: Duration, now: Time) -> Self {
        Self {
            tokens: burst,
            burst,
            interval,
            filled: now,
        }
    }

    fn refill(&mut self, now: Time) {
        while self.tokens < self.burst && now.since(self.filled) >= self.interval {
            self.tokens = self.tokens.saturating_add(1);
            self.filled = self.filled.plus(self.interval);
        }
        if self.tokens >= self.burst {
            self.filled = now;
        }
    }

    /// Takes a token, if there is one.
    pub(crate) fn take(&mut self, now: Time) -> bool {
        self.refill(now);
        let taken = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        taken
    }

    /// When the next token can be taken: not later than `now` if there is one.
    pub(crate) fn next(&mut self, now: Time) -> Time {
        self.refill(now);
        if self.tokens > 0 {
            now
        } else {
            self.filled.plus(self.interval)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_per_interval() {
        let start = Time(1_000_000_000);
        let interval = Duration::from_millis(250);
        let mut bucket = Bucket::new(3, interval, start);
        let mut taken = 0;
        for millis in 0..2000 {
            taken += u32::from(bucket.take(start.plus(Duration::from_millis(millis))));
        }
        assert_eq!(taken, 3 + 7);
        let now = start.plus(Duration::from_millis(2000));
        assert!(bucket.take(now));
        assert_eq!(bucket.next(now), now.plus(interval));
    }

    #[test]
    fn a_long_pause_fills_it_no_further_than_the_burst() {
        let mut bucket = Bucket::new(2, Duration::from_millis(1), Time(0));
        let late = Time(u64::MAX);
        assert_eq!(
            [bucket.take(late), bucket.take(late), bucket.take(late)],
            [true, true, false]
        );
    }
}
