//! The ends of a domain: orderly, or with last words after a panic or a processor exception.

use core::fmt;

use crate::abi::sched::{SHUTDOWN_crash, SHUTDOWN_poweroff, SHUTDOWN_reboot};

/// Why a domain ends, as dom0's toolstack sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShutdownReason {
    /// On request.
    PowerOff,
    /// On request, to come back.
    Reboot,
    /// Because we cannot go on.
    Crash,
}

impl ShutdownReason {
    const fn code(self) -> u32 {
        match self {
            Self::PowerOff => SHUTDOWN_poweroff,
            Self::Reboot => SHUTDOWN_reboot,
            Self::Crash => SHUTDOWN_crash,
        }
    }
}

#[cfg(not(test))]
pub use guest_only::{die, shut_down};

#[cfg(not(test))]
mod guest_only {
    use core::fmt::{self, Write};
    use core::sync::atomic::{AtomicBool, Ordering};

    use super::{Lines, ShutdownReason};
    use crate::console::{self, DebugPort};
    use crate::cpu;
    use crate::hypercall;

    /// Time that the console daemon gets to take the last words, in counter ticks: 50 to 300 ms.
    const DRAIN_TICKS: u64 = 250_000_000;

    /// Ends the domain. Without Xen, stops the processor.
    pub fn shut_down(reason: ShutdownReason) -> ! {
        if hypercall::is_selected() {
            hypercall::shut_down(reason.code());
        }
        cpu::halt()
    }

    /// Says why on the console and on port 0xE9, and ends the domain as crashed.
    ///
    /// For panics and processor exceptions. Uses no heap and takes no lock; a second call, from a fault on the way,
    /// ends the domain at once.
    pub fn die(words: fmt::Arguments<'_>) -> ! {
        static DYING: AtomicBool = AtomicBool::new(false);
        if DYING.swap(true, Ordering::Relaxed) {
            shut_down(ShutdownReason::Crash);
        }
        // SAFETY: nothing but this function runs any more, so the first console value is not used again.
        if let Some(mut ring) = unsafe { console::last_words() } {
            // Neither can fail in a way that matters now.
            let _ = Lines(&mut ring).write_fmt(words);
            let _ = Lines(&mut ring).write_str("\n");
            let start = cpu::tsc();
            while !ring.is_drained() && cpu::tsc().wrapping_sub(start) < DRAIN_TICKS {
                hypercall::yield_now();
            }
        }
        let _ = DebugPort.write_fmt(words);
        let _ = DebugPort.write_str("\n");
        shut_down(ShutdownReason::Crash)
    }
}

/// Text to a console: line feeds get their carriage returns, what does not fit is lost.
struct Lines<'a>(&'a mut crate::console::ConsoleRing);

impl fmt::Write for Lines<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    self.0.write_or_drop(line.as_bytes());
                    self.0.write_or_drop(b"\r\n");
                }
                None => self.0.write_or_drop(line.as_bytes()),
            }
        }
        Ok(())
    }
}
