//! Time as Xen tells it: system time from the time stamp counter, and the wall clock beside it.
//!
//! Xen publishes, in the shared info page, a pair of counter value and nanoseconds and the rate between them; a
//! sequence number is odd while it writes. We have one processor and Xen writes only while it does not run us, so a
//! torn read cannot happen; the loop for it is bounded all the same. The result never runs backwards: the largest
//! value given out so far is kept.
//!
//! Source: Xen `public/xen.h` (`vcpu_time_info`), `xen/arch/x86/time.c`.

use core::time::Duration;

use crate::abi::shared_info::{
    TIME_SYSTEM_TIME, TIME_TSC_SHIFT, TIME_TSC_TIMESTAMP, TIME_TSC_TO_SYSTEM_MUL, TIME_VERSION,
    WC_NSEC, WC_SEC, WC_SEC_HI, WC_VERSION,
};
use crate::cpu::tsc;
use crate::shared::{SharedPage, read_fence};
use crate::types::Time;

/// Reads of a structure that Xen keeps writing before its content is taken as it is.
const ATTEMPTS: usize = 1000;

/// The relation between the time stamp counter and system time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TimeInfo {
    /// Counter value at `system_time`. Near 2^64 when the guest's counter has a negative offset.
    pub(crate) tsc_timestamp: u64,
    /// Nanoseconds since the host booted.
    pub(crate) system_time: u64,
    /// Nanoseconds per shifted tick, times 2^32.
    pub(crate) tsc_to_system_mul: u32,
    /// Ticks are shifted left by this, right when negative.
    pub(crate) tsc_shift: i8,
}

impl TimeInfo {
    /// Reads it out of the shared info page.
    pub(crate) fn read(page: &SharedPage) -> Self {
        read_consistent(page, TIME_VERSION, || {
            let [shift, ..] = page.read_u32(TIME_TSC_SHIFT).to_le_bytes();
            Self {
                tsc_timestamp: read_u64(page, TIME_TSC_TIMESTAMP),
                system_time: read_u64(page, TIME_SYSTEM_TIME),
                tsc_to_system_mul: page.read_u32(TIME_TSC_TO_SYSTEM_MUL),
                tsc_shift: shift.cast_signed(),
            }
        })
    }

    /// System time in nanoseconds when the counter read `tsc`. Wraps like the counter does.
    pub(crate) fn at(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.tsc_timestamp);
        let distance = u32::from(self.tsc_shift.unsigned_abs());
        let shifted = if self.tsc_shift < 0 {
            ticks.checked_shr(distance)
        } else {
            ticks.checked_shl(distance)
        }
        .unwrap_or(0);
        let product = u128::from(shifted).wrapping_mul(u128::from(self.tsc_to_system_mul));
        #[expect(
            clippy::cast_possible_truncation,
            reason = "wraps on purpose, as the counter and Xen's own arithmetic do"
        )]
        let nanos = (product >> 32) as u64;
        self.system_time.wrapping_add(nanos)
    }
}

/// The monotonic clock: the last time given out, and how to get the next.
#[derive(Debug)]
pub(crate) struct Clock {
    last: Time,
}

impl Clock {
    pub(crate) fn new(page: &SharedPage) -> Self {
        let mut clock = Self { last: Time(0) };
        clock.refresh(page);
        clock
    }

    /// The time of the last refresh.
    pub(crate) const fn last(&self) -> Time {
        self.last
    }

    /// Reads the counter and returns the time, never less than before.
    pub(crate) fn refresh(&mut self, page: &SharedPage) -> Time {
        let info = TimeInfo::read(page);
        self.advance(info.at(tsc()))
    }

    fn advance(&mut self, nanos: u64) -> Time {
        self.last = self.last.max(Time(nanos));
        self.last
    }
}

/// Universal time at system time zero, since 1970. `None` until Xen was made to fill it in.
///
/// Changes when the host's clock is set: add it to the time for timestamps, never use it for timeouts.
pub(crate) fn wall_clock_base(page: &SharedPage) -> Option<Duration> {
    let base = read_consistent(page, WC_VERSION, || {
        let seconds = u64::from(page.read_u32(WC_SEC_HI)) << 32 | u64::from(page.read_u32(WC_SEC));
        (seconds, page.read_u32(WC_NSEC))
    });
    match base {
        (0, 0) => None,
        (seconds, nanos) => Some(
            Duration::from_secs(seconds).saturating_add(Duration::from_nanos(u64::from(nanos))),
        ),
    }
}

/// Reads until the sequence number at `version` was even and the same before and after.
fn read_consistent<T>(page: &SharedPage, version: usize, read: impl Fn() -> T) -> T {
    for _ in 0..ATTEMPTS {
        let before = page.read_u32(version);
        read_fence();
        let value = read();
        read_fence();
        if before & 1 == 0 && page.read_u32(version) == before {
            return value;
        }
    }
    read()
}

/// The two halves of a little-endian `u64`; consistent only under [`read_consistent`].
fn read_u64(page: &SharedPage, offset: usize) -> u64 {
    let [low, high] = page.read_words(offset);
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    const GIGAHERTZ_2: TimeInfo = TimeInfo {
        tsc_timestamp: 1_000,
        system_time: 5_000_000_000,
        // Half a nanosecond per tick: ticks are halved, then taken (almost) one to one.
        tsc_to_system_mul: u32::MAX,
        tsc_shift: -1,
    };

    #[test]
    fn negative_shift_halves_the_ticks() {
        let after = GIGAHERTZ_2.at(1_000 + 2_000_000_000) - 5_000_000_000;
        assert!((999_999_998..=1_000_000_000).contains(&after), "{after}");
    }

    #[test]
    fn positive_shift_doubles_them() {
        let info = TimeInfo {
            tsc_to_system_mul: 1 << 31,
            tsc_shift: 1,
            ..GIGAHERTZ_2
        };
        assert_eq!(info.at(1_000 + 700), 5_000_000_700);
    }

    #[test]
    fn a_timestamp_beyond_the_counter_wraps() {
        let info = TimeInfo {
            tsc_timestamp: 0u64.wrapping_sub(600),
            tsc_to_system_mul: 1 << 31,
            tsc_shift: 0,
            system_time: 77,
        };
        assert_eq!(info.at(400), 77 + 500);
    }

    #[test]
    fn absurd_shifts_do_not_overflow() {
        for tsc_shift in [i8::MIN, -64, 64, i8::MAX] {
            let info = TimeInfo {
                tsc_shift,
                ..GIGAHERTZ_2
            };
            assert_eq!(info.at(u64::MAX), 5_000_000_000);
        }
    }

    #[test]
    fn m4_a_backwards_step_is_not_given_out() {
        let mut clock = Clock { last: Time(0) };
        assert_eq!(clock.advance(900), Time(900));
        assert_eq!(clock.advance(850), Time(900));
        assert_eq!(clock.advance(901), Time(901));
    }

    #[test]
    fn fields_are_read_from_their_places() {
        let memory = SharedMemory::new();
        let page = memory.page();
        page.write_u32(TIME_VERSION, 4);
        page.write_words(TIME_TSC_TIMESTAMP, [0x1111_1111, 0xFFFF_FFFF]);
        page.write_words(TIME_SYSTEM_TIME, [2, 1]);
        page.write_u32(TIME_TSC_TO_SYSTEM_MUL, 0x8000_0000);
        page.write_u32(TIME_TSC_SHIFT, 0x0000_01FF);
        assert_eq!(
            TimeInfo::read(&page),
            TimeInfo {
                tsc_timestamp: 0xFFFF_FFFF_1111_1111,
                system_time: 0x1_0000_0002,
                tsc_to_system_mul: 0x8000_0000,
                tsc_shift: -1,
            }
        );
    }

    #[test]
    fn an_odd_version_does_not_hang_the_reader() {
        let memory = SharedMemory::new();
        let page = memory.page();
        page.write_u32(TIME_VERSION, 3);
        page.write_words(TIME_SYSTEM_TIME, [9, 0]);
        assert_eq!(TimeInfo::read(&page).system_time, 9);
    }

    #[test]
    fn wall_clock_is_none_until_latched() {
        let memory = SharedMemory::new();
        let page = memory.page();
        assert_eq!(wall_clock_base(&page), None);
        page.write_words(WC_SEC, [1_700_000_000, 500]);
        page.write_u32(WC_VERSION, 2);
        assert_eq!(
            wall_clock_base(&page),
            Some(Duration::new(1_700_000_000, 500))
        );
        page.write_u32(WC_SEC_HI, 1);
        assert_eq!(
            wall_clock_base(&page).map(|base| base.as_secs()),
            Some((1 << 32) + 1_700_000_000)
        );
    }
}
