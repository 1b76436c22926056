//! Token buckets for the ICMP errors that the engine sends.

use crate::config::IcmpRate;
use crate::frame::Time;

/// Tokens are kept in billionths, so that nanoseconds times a rate are tokens.
const TOKEN: u64 = 1_000_000_000;

/// A bucket. It starts full.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bucket {
    /// What is missing to a full bucket.
    used: u64,
    at: Time,
}

impl Bucket {
    /// Takes a token if there is one.
    #[inline]
    pub(crate) fn take(&mut self, now: Time, per_second: u16, burst: u16) -> bool {
        let passed = now.as_nanos().saturating_sub(self.at.as_nanos());
        self.at = now;
        self.used = self
            .used
            .saturating_sub(passed.saturating_mul(u64::from(per_second)));
        let used = self.used.saturating_add(TOKEN);
        if used > u64::from(burst).saturating_mul(TOKEN) {
            return false;
        }
        self.used = used;
        true
    }
}

/// Both limits of an error: the receiver's own and everybody's.
#[inline]
pub(crate) fn allowed(
    own: &mut Bucket,
    global: &mut Bucket,
    rate: Option<IcmpRate>,
    now: Time,
) -> bool {
    rate.is_none_or(|rate| {
        own.take(now, rate.per_second, rate.burst)
            && global.take(now, rate.global_per_second, rate.global_per_second)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_rate() {
        let mut bucket = Bucket::default();
        let now = Time::from_secs(50);
        assert_eq!((0..500).filter(|_| bucket.take(now, 100, 200)).count(), 200);
        let later = Time::from_millis(50_100);
        assert_eq!(
            (0..500).filter(|_| bucket.take(later, 100, 200)).count(),
            10
        );
        let much_later = Time::from_secs(5_000);
        assert_eq!(
            (0..500)
                .filter(|_| bucket.take(much_later, 100, 200))
                .count(),
            200
        );
    }
}
