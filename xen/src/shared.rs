//! Access to memory that a peer domain writes at the same time.
//!
//! Such memory never becomes `&T` or `&[u8]`: every read is a volatile copy into a local, which is
//! then checked and used (XSA-155: a compiler may otherwise read a shared slot twice). Offsets are
//! checked here, so no ring index, however wrong, leaves the page.

use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use crate::page::PAGE_SIZE;

/// One 4,096-byte page of memory shared with a peer domain, reached only by volatile copies.
///
/// Made only by this crate for pages that stay mapped for as long as the value lives.
#[derive(Debug)]
pub struct SharedPage {
    base: NonNull<u8>,
}

impl SharedPage {
    /// Wraps a mapped page.
    ///
    /// # Safety
    ///
    /// 1. `base` is aligned to 4,096 and the 4,096 bytes behind it stay mapped, readable and
    ///    writable while this value lives (a page of ours, or a grant mapped into a hole).
    /// 2. No Rust reference to any of these bytes exists while this value lives.
    pub(crate) const unsafe fn new(base: NonNull<u8>) -> Self {
        Self { base }
    }

    /// The page's address, for whoever mapped it.
    #[cfg(all(target_arch = "x86_64", any(test, feature = "guest")))]
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    /// The address of `len` bytes at `offset`, if they lie in the page and `offset` is a multiple of `align`.
    fn at(&self, offset: usize, len: usize, align: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len)?;
        if end > PAGE_SIZE || !offset.is_multiple_of(align) {
            return None;
        }
        // SAFETY: offset <= PAGE_SIZE was checked; the page is one allocation (obligation 1 of `new`).
        Some(unsafe { self.base.add(offset) })
    }

    /// Reads the native-endian `u32` at `offset` bytes once. Outside the page or unaligned: 0.
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        match self.at(offset, 4, 4) {
            // SAFETY: in bounds and aligned (`at`); mapped for our lifetime (obligation 1 of `new`). The peer
            // may write at the same time: a volatile 4-byte load on x86 is single-copy atomic.
            Some(address) => unsafe { address.cast::<u32>().read_volatile() },
            None => 0,
        }
    }

    /// Writes the native-endian `u32` at `offset` bytes once. Outside the page or unaligned: nothing.
    pub fn write_u32(&self, offset: usize, value: u32) {
        if let Some(address) = self.at(offset, 4, 4) {
            // SAFETY: as in `read_u32`; the peer may read at the same time and sees old or new.
            unsafe { address.cast::<u32>().write_volatile(value) }
        }
    }

    /// Copies `WORDS` 32-bit words at `offset` out of the page, each read exactly once. Outside the page: zeros.
    ///
    /// Ring slots are multiples of 4 bytes at multiples of 4, so whole words serve.
    #[must_use]
    pub fn read_words<const WORDS: usize>(&self, offset: usize) -> [u32; WORDS] {
        let mut words = [0u32; WORDS];
        if let Some(address) = self.at(offset, WORDS.wrapping_mul(4), 4) {
            for (index, word) in words.iter_mut().enumerate() {
                // SAFETY: `index` is below `WORDS`, so this stays inside the range that `at` checked.
                let source = unsafe { address.cast::<u32>().add(index) };
                // SAFETY: as in `read_u32`.
                *word = unsafe { source.read_volatile() };
            }
        }
        words
    }

    /// Copies `WORDS` 32-bit words into the page at `offset`. Outside the page: nothing.
    pub fn write_words<const WORDS: usize>(&self, offset: usize, words: [u32; WORDS]) {
        if let Some(address) = self.at(offset, WORDS.wrapping_mul(4), 4) {
            for (index, word) in words.into_iter().enumerate() {
                // SAFETY: `index` is below `WORDS`, so this stays inside the range that `at` checked.
                let target = unsafe { address.cast::<u32>().add(index) };
                // SAFETY: as in `write_u32`.
                unsafe { target.write_volatile(word) }
            }
        }
    }

    /// Copies bytes out of the page. Bytes beyond the page's end are left as they are.
    pub fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        let mut at = offset;
        for byte in to {
            if let Some(address) = self.at(at, 1, 1) {
                // SAFETY: in bounds (`at`); mapped for our lifetime (obligation 1 of `new`). A byte is always whole.
                *byte = unsafe { address.read_volatile() };
            }
            at = at.wrapping_add(1);
        }
    }

    /// Copies bytes into the page; those that would lie beyond its end are not written.
    pub fn write_bytes(&self, offset: usize, from: &[u8]) {
        let mut at = offset;
        for byte in from {
            if let Some(address) = self.at(at, 1, 1) {
                // SAFETY: as in `read_bytes`.
                unsafe { address.write_volatile(*byte) }
            }
            at = at.wrapping_add(1);
        }
    }
}

/// Orders our earlier stores before our later loads, as seen by the peer (store, then read of its index).
///
/// The only barrier that x86 needs as a real instruction; pairs with the same fence in the peer's
/// "publish, then look whether to notify" and "arm, then look for work".
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Orders slot contents before the index that publishes them. A compiler barrier on x86 (TSO).
pub fn write_fence() {
    fence(Ordering::Release);
}

/// Orders the read of a peer's index before the reads of the slots behind it. A compiler barrier on x86 (TSO).
pub fn read_fence() {
    fence(Ordering::Acquire);
}
