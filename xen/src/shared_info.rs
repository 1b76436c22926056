//! The shared info page: pending bits of event channels, and the clock's data.
//!
//! Xen and remote events write it at any time, so bits are changed by atomics and the rest is copied by volatile
//! reads. Every port stays masked for good and pending bits are polled: see the notes at [`SharedInfo::take_pending`].
//!
//! Source: Xen `public/xen.h`, `xen/common/event_2l.c`.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::event::PORTS;
use crate::abi::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, EVTCHN_WORDS};
use crate::shared::SharedPage;
use crate::types::PortNumber;

/// The mapped shared info page.
#[derive(Debug)]
pub(crate) struct SharedInfo {
    base: NonNull<u8>,
    page: SharedPage,
}

impl SharedInfo {
    /// Takes over the page.
    ///
    /// # Safety
    ///
    /// 1. `base` is aligned to 4,096, and the 4,096 bytes behind it stay mapped while this value lives.
    /// 2. They are reached only through atomics and volatile accesses.
    pub(crate) const unsafe fn new(base: NonNull<u8>) -> Self {
        Self {
            base,
            // SAFETY: the same obligations.
            page: unsafe { SharedPage::new(base) },
        }
    }

    /// The page, for volatile reads.
    pub(crate) const fn page(&self) -> &SharedPage {
        &self.page
    }

    fn word(&self, array: usize, index: usize) -> Option<&AtomicU64> {
        if index >= EVTCHN_WORDS {
            return None;
        }
        // SAFETY: both arrays of 64 words lie in the page, and the index is below 64.
        let address = unsafe { self.base.add(array + index * 8) }.cast::<u64>();
        // SAFETY: mapped and aligned (obligation 1 of `new`); atomics are among the allowed accesses (2).
        Some(unsafe { AtomicU64::from_ptr(address.as_ptr()) })
    }

    /// Masks all ports, so that no event ever asks for an interrupt. Pending bits and polls work regardless.
    pub(crate) fn mask_all(&self) {
        for index in 0..EVTCHN_WORDS {
            if let Some(word) = self.word(EVTCHN_MASK, index) {
                word.store(u64::MAX, Ordering::Relaxed);
            }
        }
    }

    /// The word of a port's pending bit and the bit in it.
    fn pending_bit(&self, port: PortNumber) -> Option<(&AtomicU64, u64)> {
        if port.0 >= PORTS {
            return None;
        }
        let word = self.word(EVTCHN_PENDING, usize::try_from(port.0 / 64).ok()?)?;
        Some((word, 1 << (port.0 % 64)))
    }

    /// Whether the port is pending, without clearing it.
    pub(crate) fn is_pending(&self, port: PortNumber) -> bool {
        self.pending_bit(port)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Clears the port's pending bit; tells whether it was set.
    ///
    /// The locked AND is a full barrier between the clear and the reads of rings that follow. It pairs with the peer's
    /// "publish the index, barrier, send the event": either we see the index, or the event sets the bit again. An
    /// unset bit needs no barrier, since then nothing was promised.
    pub(crate) fn take_pending(&self, port: PortNumber) -> bool {
        let Some((word, bit)) = self.pending_bit(port) else {
            return false;
        };
        word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    fn shared_info(memory: &SharedMemory) -> SharedInfo {
        // SAFETY: leaked memory, reached only through atomics and volatile accesses.
        unsafe { SharedInfo::new(memory.base()) }
    }

    #[test]
    fn all_ports_get_masked_and_nothing_beside_them() {
        let memory = SharedMemory::new();
        shared_info(&memory).mask_all();
        let mut bytes = [0; 4096];
        memory.page().read_bytes(0, &mut bytes);
        assert!(bytes[2560..3072].iter().all(|byte| *byte == 0xFF));
        assert!(bytes[..2560].iter().all(|byte| *byte == 0));
        assert!(bytes[3072..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_pending_bit_is_taken_once() {
        let memory = SharedMemory::new();
        let info = shared_info(&memory);
        memory.page().write_u32(2048 + 8, 1 << 3);
        assert!(info.is_pending(PortNumber(67)));
        assert!(!info.take_pending(PortNumber(66)));
        assert!(info.take_pending(PortNumber(67)));
        assert!(!info.take_pending(PortNumber(67)));
        assert!(!info.is_pending(PortNumber(67)));
    }

    #[test]
    fn a_port_beyond_the_abi_is_never_pending() {
        let memory = SharedMemory::new();
        memory.page().write_bytes(0, &[0xFF; 4096]);
        let info = shared_info(&memory);
        assert!(info.take_pending(PortNumber(4095)));
        assert!(!info.take_pending(PortNumber(4096)));
        assert!(!info.is_pending(PortNumber(u32::MAX)));
    }

    /// P4: clear, then service, then sleep only if nothing is pending: no event of a million is slept over.
    #[test]
    fn no_wakeup_is_lost_between_clear_and_poll() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicU32;
        const EVENTS: u32 = 1_000_000;
        let port = PortNumber(9);
        let memory = SharedMemory::new();
        let info = shared_info(&memory);
        let published = Arc::new(AtomicU32::new(0));
        let peer = {
            let published = Arc::clone(&published);
            let base = memory.base().as_ptr() as usize;
            std::thread::spawn(move || {
                let base = NonNull::new(base as *mut u8).unwrap();
                // SAFETY: as in `shared_info`; the page is leaked.
                let info = unsafe { SharedInfo::new(base) };
                let (word, bit) = info.pending_bit(port).unwrap();
                for event in 1..=EVENTS {
                    published.store(event, Ordering::Release);
                    word.fetch_or(bit, Ordering::SeqCst);
                }
            })
        };
        let mut seen = 0;
        while seen < EVENTS {
            if info.take_pending(port) {
                seen = published.load(Ordering::Acquire);
            } else if seen != published.load(Ordering::Acquire) {
                // Work that we have not seen: it must be announced, or a poll now would sleep for ever. The peer
                // is between its two steps for a moment only.
                while !info.is_pending(port) && !peer.is_finished() {
                    std::hint::spin_loop();
                }
                assert!(info.is_pending(port), "event {seen} slept over");
            }
        }
        peer.join().unwrap();
    }
}
