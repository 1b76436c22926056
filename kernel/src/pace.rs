//! When to let frames gather before looking again: interrupt moderation, without interrupts.
//!
//! Waking for each frame costs three exits into the hypervisor: the sleep itself, a copy, a notification. While frames
//! come thick and fast it is cheaper to sleep a little without asking for notifications, and to take what has
//! gathered meanwhile. How long is little? The measure is the cost of an exit, taken on the spot: about 1 µs on
//! hardware, 30 to 100 µs under emulation.
//!
//! * Frames at least [`DENSE`] exits apart: no gathering. A ping or a slow flow is never delayed.
//! * Otherwise as long as [`GATHER_FRAMES`] frames take to come, at most [`LONGEST`] exits.
//!
//! On hardware that is at most 256 µs, and only above some 15,000 frames a second.

use core::time::Duration;

use xen::{Hypervisor, Time};

/// Frames closer together than this many exits are dense.
const DENSE: u32 = 64;
/// Frames to gather.
const GATHER_FRAMES: u32 = 16;
/// The longest gathering, in exits.
const LONGEST: u32 = 256;
/// The longest gathering whatever an exit costs.
const LONGEST_EVER: Duration = Duration::from_millis(20);
/// Probes of the cost of an exit; the least counts.
const PROBES: u32 = 4;

/// The rate at which frames come, and what follows from it.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// What an exit costs.
    exit: Duration,
    /// Time between frames, averaged over the last few takings.
    between: Duration,
    /// When frames were last taken.
    last: Time,
    /// Nothing has come since the last gathering.
    gathered: bool,
}

impl Pace {
    /// Measures the cost of an exit: a sleep until a time that is over.
    pub fn measure<H: Hypervisor>(hv: &mut H) -> Self {
        let mut exit = Duration::MAX;
        for _ in 0..PROBES {
            let before = hv.refresh_time();
            hv.wait(&[], Some(Time(0)));
            exit = exit.min(hv.refresh_time().since(before));
        }
        Self {
            exit,
            between: Duration::MAX,
            last: hv.now(),
            gathered: false,
        }
    }

    /// What an exit costs.
    #[must_use]
    pub const fn exit_cost(&self) -> Duration {
        self.exit
    }

    /// Notes that `frames` (at least 1) were taken at `now`.
    pub fn note(&mut self, frames: u64, now: Time) {
        let frames = u32::try_from(frames.max(1)).unwrap_or(u32::MAX);
        let each = now.since(self.last) / frames;
        self.last = now;
        self.gathered = false;
        // However long a pause was, a few dense frames after it are enough to be dense again.
        let each = each.min(self.exit * LONGEST);
        self.between = if self.between == Duration::MAX {
            each
        } else {
            (self.between * 3 + each) / 4
        };
    }

    /// How long to let frames gather now that there are none; `None` if it is time to ask for notifications instead.
    pub fn gather(&mut self) -> Option<Duration> {
        if self.gathered || self.between >= self.exit * DENSE {
            return None;
        }
        self.gathered = true;
        let enough = self.between * GATHER_FRAMES;
        Some(enough.min(self.exit * LONGEST).min(LONGEST_EVER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Duration = Duration::from_micros(1);

    fn pace() -> Pace {
        Pace {
            exit: EXIT,
            between: Duration::MAX,
            last: Time(0),
            gathered: false,
        }
    }

    /// A pace after frames came `each` apart for a while.
    fn steady(each: Duration) -> Pace {
        let mut pace = pace();
        let mut now = Time(1_000_000_000);
        for _ in 0..60 {
            now = now.plus(each);
            pace.note(1, now);
        }
        pace
    }

    #[test]
    fn slow_frames_are_never_delayed() {
        assert_eq!(steady(Duration::from_micros(64)).gather(), None);
        assert_eq!(steady(Duration::from_millis(10)).gather(), None);
        assert_eq!(pace().gather(), None);
    }

    #[test]
    fn dense_frames_gather_once_and_then_notifications_are_asked_for() {
        let mut pace = steady(Duration::from_micros(10));
        assert_eq!(pace.gather(), Some(Duration::from_micros(160)));
        assert_eq!(pace.gather(), None, "nothing came meanwhile");
        pace.note(16, pace.last.plus(Duration::from_micros(160)));
        assert!(pace.gather().is_some());
    }

    #[test]
    fn gathering_is_bounded_by_the_cost_of_an_exit() {
        let mut pace = steady(Duration::from_micros(60));
        assert_eq!(pace.gather(), Some(EXIT * LONGEST));
    }

    #[test]
    fn a_pause_ends_the_dense_phase_at_once() {
        let mut pace = steady(Duration::from_micros(2));
        pace.note(1, pace.last.plus(Duration::from_millis(5)));
        assert_eq!(pace.gather(), None);
        for _ in 0..8 {
            pace.note(1, pace.last.plus(Duration::from_micros(2)));
        }
        assert!(pace.gather().is_some(), "and begins again soon");
    }

    #[test]
    fn without_a_cost_nothing_is_gathered() {
        let mut free = Pace {
            exit: Duration::ZERO,
            ..steady(Duration::ZERO)
        };
        assert_eq!(free.gather(), None);
    }
}
