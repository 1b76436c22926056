//! Log lines: formatted once into a bounded buffer, drained to the console by the main loop.
//!
//! A peer must not write our console at will, so three bounds stack up: drivers report events, not packets;
//! [`RateLimit`] lets each client cause one line a second; and the buffer here drops lines (and counts them)
//! when the main loop does not get around to drain it. Control characters never reach the console.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use heapless::{Deque, String};
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Mutex;
use xen::Time;

/// Bytes of one line; a longer one is cut.
pub const LINE_BYTES: usize = 160;
/// Lines waiting for the console.
pub const LINES: usize = 64;

/// Lines kept for whoever asks later.
pub const HISTORY: usize = 64;

/// One finished log line, without a line end.
pub type Line = String<LINE_BYTES>;

struct Buffer {
    lines: Deque<Line, LINES>,
    /// The last ones, printed or not.
    history: Deque<Line, HISTORY>,
    dropped: u64,
}

/// The logger behind the `log` macros.
pub struct Logger {
    buffer: Mutex<Buffer>,
    /// Nanoseconds since the image's first instruction, as of the last loop iteration.
    uptime: AtomicU64,
}

/// The only logger; [`install`] makes it the target of the `log` macros.
pub static LOGGER: Logger = Logger::new();

/// Sends the `log` macros to [`LOGGER`]. Calling it again does nothing.
pub fn install() {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Default for Logger {
    fn default() -> Self {
        Self::new()
    }
}

impl Logger {
    /// An empty logger.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            buffer: Mutex::new(Buffer {
                lines: Deque::new(),
                history: Deque::new(),
                dropped: 0,
            }),
            uptime: AtomicU64::new(0),
        }
    }

    /// Tells the logger the time that new lines are stamped with.
    pub fn set_uptime(&self, uptime: Duration) {
        let nanos = u64::try_from(uptime.as_nanos()).unwrap_or(u64::MAX);
        self.uptime.store(nanos, Ordering::Relaxed);
    }

    /// Takes the oldest waiting line.
    pub fn take(&self) -> Option<Line> {
        self.buffer.lock().lines.pop_front()
    }

    /// As [`Logger::take`], but gives up when the buffer is in use: for a panic, which may come out of its use.
    pub fn try_take(&self) -> Option<Line> {
        self.buffer.try_lock()?.lines.pop_front()
    }

    /// Calls `with` for each of the last lines, oldest first.
    pub fn recent(&self, mut with: impl FnMut(&str)) {
        for line in &self.buffer.lock().history {
            with(line);
        }
    }

    /// Lines dropped because the buffer was full.
    pub fn dropped(&self) -> u64 {
        self.buffer.lock().dropped
    }
}

/// Writes text with everything but printable ASCII replaced by `?`, and stops silently at the line's end.
struct Printable<'a>(&'a mut Line);

impl Write for Printable<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let shown = if character == ' ' || character.is_ascii_graphic() {
                character
            } else {
                '?'
            };
            if self.0.push(shown).is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Info
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let nanos = self.uptime.load(Ordering::Relaxed);
        let mut line = Line::new();
        let mark = match record.level() {
            Level::Error => "ERROR ",
            Level::Warn => "warning: ",
            _ => "",
        };
        // Cannot fail: `Printable` swallows what does not fit.
        let _ = write!(
            Printable(&mut line),
            "[{:>5}.{:06}] {mark}{}",
            nanos / 1_000_000_000,
            nanos / 1_000 % 1_000_000,
            record.args()
        );
        let mut buffer = self.buffer.lock();
        if buffer.history.is_full() {
            buffer.history.pop_front();
        }
        let _ = buffer.history.push_back(line.clone());
        if buffer.lines.push_back(line).is_err() {
            buffer.dropped = buffer.dropped.saturating_add(1);
        }
    }

    fn flush(&self) {}
}

/// Lets one event a second through, and counts the ones that it held back.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateLimit {
    last: Option<Time>,
    held_back: u64,
}

impl RateLimit {
    /// The shortest time between two lines.
    pub const INTERVAL: Duration = Duration::from_secs(1);

    /// Asks for permission at `now`. `Some(n)` means yes, and that `n` were held back since the last yes.
    pub fn permit(&mut self, now: Time) -> Option<u64> {
        if let Some(last) = self.last
            && now.since(last) < Self::INTERVAL
        {
            self.held_back = self.held_back.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(core::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(logger: &Logger, level: Level, text: &str) {
        logger.log(
            &Record::builder()
                .level(level)
                .args(format_args!("{text}"))
                .build(),
        );
    }

    #[test]
    fn lines_carry_uptime_and_never_control_characters() {
        let logger = Logger::new();
        logger.set_uptime(Duration::from_micros(1_234_567));
        logged(&logger, Level::Warn, "bad\n\x1b[2Jname \u{e9}");
        assert_eq!(
            logger.take().unwrap().as_str(),
            "[    1.234567] warning: bad??[2Jname ?"
        );
        assert!(logger.take().is_none());
    }

    #[test]
    fn a_long_line_is_cut_and_a_full_buffer_drops_new_lines() {
        let logger = Logger::new();
        let long = "x".repeat(500);
        for _ in 0..LINES + 3 {
            logged(&logger, Level::Info, &long);
        }
        assert_eq!(logger.dropped(), 3);
        assert_eq!(logger.take().unwrap().len(), LINE_BYTES);
    }

    #[test]
    fn m3_rate_limit_passes_one_a_second_and_counts_the_rest() {
        let mut limit = RateLimit::default();
        let start = Time(5_000_000_000);
        assert_eq!(limit.permit(start), Some(0));
        for _ in 0..7 {
            assert_eq!(limit.permit(start.plus(Duration::from_millis(999))), None);
        }
        assert_eq!(limit.permit(start.plus(Duration::from_secs(1))), Some(7));
    }
}
