//! The PV console: a byte ring to the console daemon in dom0, and port 0xE9 for what comes before or after it.
//!
//! Writing never waits: the reader is a daemon in dom0, and a stalled one must not stall packets. What is written
//! ends in a log file of dom0; whoever writes must have removed control characters from peers' bytes and must limit
//! the rate (the kernel's logger does).
//!
//! Port 0xE9 reaches Xen's own log, one exit per character (45 microseconds under emulation): only for fatal ends.
//!
//! Source: Xen `public/io/console.h`, `xen/arch/x86/hvm/hvm.c` (port 0xE9).

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::byte_ring::{Incoming, Outgoing, RingPlace};
use crate::hypercall;
use crate::shared::SharedPage;
use crate::stream::{ByteStream, StreamError};
use crate::types::PortNumber;

/// From dom0 to us: `in[1024]`, `in_cons`, `in_prod`.
const INPUT: RingPlace = RingPlace {
    data: 0,
    size: 1024,
    consumer: 3072,
    producer: 3076,
};
/// From us to dom0: `out[2048]`, `out_cons`, `out_prod`.
const OUTPUT: RingPlace = RingPlace {
    data: 1024,
    size: 2048,
    consumer: 3080,
    producer: 3084,
};

#[derive(Debug)]
struct Attached {
    page: SharedPage,
    port: PortNumber,
    input: Incoming,
    output: Outgoing,
}

/// The stream to the console daemon, or, when the domain has no console, a stream that swallows everything.
#[derive(Debug)]
pub struct ConsoleRing {
    attached: Option<Attached>,
    dropped: u64,
}

impl ConsoleRing {
    pub(crate) fn attach(page: SharedPage, port: PortNumber) -> Self {
        Self {
            attached: Some(Attached {
                input: Incoming::attach(&page, INPUT),
                output: Outgoing::attach(&page, OUTPUT),
                page,
                port,
            }),
            dropped: 0,
        }
    }

    /// A console that nobody reads.
    pub(crate) const fn absent() -> Self {
        Self {
            attached: None,
            dropped: 0,
        }
    }

    /// The port that becomes pending when the daemon has read or written. `None` without a console. Never close it.
    #[must_use]
    pub fn port(&self) -> Option<PortNumber> {
        self.attached.as_ref().map(|attached| attached.port)
    }

    /// Writes all of `bytes`, or none of them when they do not fit now; then they are counted as dropped.
    pub fn write_or_drop(&mut self, bytes: &[u8]) {
        let fits = self.attached.as_ref().is_some_and(|attached| {
            bytes.len() <= attached.output.room(&attached.page)
        });
        if !fits || self.write(bytes) != Ok(bytes.len()) {
            self.dropped = self.dropped.saturating_add(bytes.len() as u64);
        }
    }

    /// Bytes that [`ConsoleRing::write_or_drop`] dropped, and all bytes written without a console.
    #[must_use]
    pub const fn dropped_bytes(&self) -> u64 {
        self.dropped
    }

    /// Whether the daemon has taken everything.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.attached
            .as_ref()
            .is_none_or(|attached| attached.output.is_drained(&attached.page))
    }
}

impl ByteStream for ConsoleRing {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let Some(attached) = &mut self.attached else {
            return Ok(0);
        };
        let received = attached.input.read(&attached.page, buffer)?;
        if received.was_full {
            // An error cannot be helped: Xen itself set this port up.
            let _ = hypercall::send_event(attached.port);
        }
        Ok(received.count)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        let Some(attached) = &mut self.attached else {
            self.dropped = self.dropped.saturating_add(bytes.len() as u64);
            return Ok(bytes.len());
        };
        let count = attached.output.write(&attached.page, bytes)?;
        if count > 0 {
            let _ = hypercall::send_event(attached.port);
        }
        Ok(count)
    }
}

/// Frame and port of the console for [`last_words`], packed; 0 while there is none.
static LAST_WORDS: AtomicU64 = AtomicU64::new(0);

/// Remembers where the console is, for a panic that cannot reach the [`ConsoleRing`] value.
pub(crate) fn remember(frame: u32, port: PortNumber) {
    LAST_WORDS.store(u64::from(frame) << 32 | u64::from(port.0), Ordering::Relaxed);
}

/// Another [`ConsoleRing`] on the remembered console, going on where the page says the first one stopped.
///
/// # Safety
///
/// 1. The first one is never used again.
#[cfg(not(test))]
pub(crate) unsafe fn last_words() -> Option<ConsoleRing> {
    let packed = LAST_WORDS.load(Ordering::Relaxed);
    let frame = usize::try_from(packed >> 32).ok()?;
    let port = u32::try_from(packed & u64::from(u32::MAX)).ok()?;
    let base = core::ptr::NonNull::new(core::ptr::with_exposed_provenance_mut(frame << 12))?;
    // SAFETY: `remember` was given the console's frame, which stays mapped for good and is only reached through
    // volatile copies.
    let page = unsafe { SharedPage::new(base) };
    Some(ConsoleRing::attach(page, PortNumber(port)))
}

/// Text to port 0xE9, which Xen puts into its own log line by line.
#[derive(Debug)]
pub(crate) struct DebugPort;

impl fmt::Write for DebugPort {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if matches!(byte, b'\n' | b'\t' | b' '..=b'~') {
                emit(byte);
            }
        }
        Ok(())
    }
}

#[cfg(not(test))]
fn emit(byte: u8) {
    // SAFETY: we run at privilege level 0; behind the port is Xen's log, or nothing.
    unsafe { crate::cpu::out_byte(0xE9, byte) }
}

/// A host has no such port.
#[cfg(test)]
const fn emit(_: u8) {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    #[test]
    fn a_full_ring_drops_whole_lines_without_blocking() {
        let memory = SharedMemory::new();
        let daemon = memory.page();
        let mut console = ConsoleRing::attach(memory.page(), PortNumber(2));
        console.write_or_drop(&[b'a'; 2000]);
        console.write_or_drop(&[b'b'; 49]);
        assert_eq!(console.dropped_bytes(), 49);
        assert_eq!(daemon.read_u32(3084), 2000);
        console.write_or_drop(&[b'c'; 48]);
        assert_eq!(daemon.read_u32(3084), 2048);
        assert!(!console.is_drained());
        daemon.write_u32(3080, 2048);
        assert!(console.is_drained());
    }

    #[test]
    fn a_partial_write_says_how_much_was_taken() {
        let memory = SharedMemory::new();
        let mut console = ConsoleRing::attach(memory.page(), PortNumber(2));
        assert_eq!(console.write(&[b'x'; 3000]), Ok(2048));
        assert_eq!(console.write(b"y"), Ok(0));
        assert_eq!(console.dropped_bytes(), 0);
    }

    #[test]
    fn input_is_read_from_its_own_ring() {
        let memory = SharedMemory::new();
        let daemon = memory.page();
        let mut console = ConsoleRing::attach(memory.page(), PortNumber(2));
        daemon.write_bytes(0, b"help\r");
        daemon.write_u32(3076, 5);
        let mut buffer = [0; 3];
        assert_eq!(console.read(&mut buffer), Ok(3));
        assert_eq!(&buffer, b"hel");
        assert_eq!(console.read(&mut buffer), Ok(2));
    }

    #[test]
    fn without_a_console_everything_is_swallowed_and_counted() {
        let mut console = ConsoleRing::absent();
        assert_eq!(console.write(b"hello"), Ok(5));
        console.write_or_drop(b"you");
        assert_eq!(console.dropped_bytes(), 8);
        assert_eq!(console.read(&mut [0; 8]), Ok(0));
        assert!(console.is_drained());
        assert_eq!(console.port(), None);
    }
}
