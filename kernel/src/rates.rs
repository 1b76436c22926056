//! How fast clients' traffic flows of late: bytes counted now and at least [`INTERVAL`] ago.

use core::time::Duration;

use firewall::ClientId;
use litemap::LiteMap;
use netback::Vif;
use xen::Time;

/// The least time over which a rate is taken. A sleeping firewall looks less often.
const INTERVAL: Duration = Duration::from_secs(2);

/// Rates of one client, in bits a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Rate {
    /// From the client.
    pub(crate) inward: u64,
    /// To the client.
    pub(crate) outward: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    received: u64,
    sent: u64,
    rate: Rate,
}

/// The last samples of all clients.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    samples: LiteMap<ClientId, Sample>,
    taken_at: Time,
}

impl Rates {
    /// Whether it is time for [`Rates::sample`].
    pub(crate) fn is_due(&self, now: Time) -> bool {
        now.since(self.taken_at) >= INTERVAL
    }

    /// Looks at the counters of all connected clients.
    pub(crate) fn sample<'a>(
        &mut self,
        vifs: impl Iterator<Item = (ClientId, &'a Vif)>,
        now: Time,
    ) {
        let elapsed = now.since(self.taken_at);
        self.taken_at = now;
        let mut samples = LiteMap::new();
        for (id, vif) in vifs {
            let counters = vif.counters();
            let before = self.samples.get(&id).copied().unwrap_or_default();
            let rate = Rate {
                inward: per_second(before.received, counters.received_bytes, elapsed),
                outward: per_second(before.sent, counters.sent_bytes, elapsed),
            };
            let sample = Sample {
                received: counters.received_bytes,
                sent: counters.sent_bytes,
                rate,
            };
            samples.insert(id, sample);
        }
        self.samples = samples;
    }

    /// What was seen last of a client.
    pub(crate) fn of(&self, id: ClientId) -> Rate {
        self.samples
            .get(&id)
            .map_or_else(Rate::default, |sample| sample.rate)
    }
}

/// Bits a second between two counts of bytes. A count that fell is another vif's: zero.
fn per_second(before: u64, after: u64, elapsed: Duration) -> u64 {
    let bits = u128::from(after.saturating_sub(before)).saturating_mul(8);
    let rate = bits
        .saturating_mul(1_000_000_000)
        .checked_div(elapsed.as_nanos())
        .unwrap_or(0);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bits_a_second_and_never_negative() {
        let second = Duration::from_secs(1);
        assert_eq!(per_second(1_000, 2_000, second), 8_000);
        assert_eq!(per_second(0, 1_000_000_000, second * 2), 4_000_000_000);
        assert_eq!(per_second(5_000, 10, second), 0);
        assert_eq!(per_second(0, 10, Duration::ZERO), 0);
        assert_eq!(per_second(0, u64::MAX, Duration::from_nanos(1)), u64::MAX);
    }
}
