//! Our own grant table, version 1: which peer may reach which frame of ours.
//!
//! Granting and revoking are plain memory operations; Xen reads the entries when a peer uses them, and sets the reading
//! and writing flags meanwhile. A reference goes to the end of the free list when it is given back, so that a stale
//! reference of a buggy peer fails for as long as possible instead of naming a new page.
//!
//! Source: Xen `public/grant_table.h`.

use alloc::collections::VecDeque;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use crate::abi::grant::{
    ENTRY_BYTES, ENTRY_DOMID, ENTRY_FRAME, GNTTAB_NR_RESERVED_ENTRIES, GTF_PERMIT_ACCESS,
    GTF_READING, GTF_READONLY, GTF_WRITING,
};
use crate::hypervisor::Access;
use crate::page::PAGE_SIZE;
use crate::types::{DomId, GrantRef};

/// Entries in one frame of the table.
const ENTRIES_PER_FRAME: u32 = 512;
const _: () = assert!(ENTRIES_PER_FRAME as usize * ENTRY_BYTES == PAGE_SIZE);

/// The peer, or a copy in flight, uses the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Busy;

/// The grant table and its free references.
#[derive(Debug)]
pub(crate) struct GrantTable {
    base: NonNull<u8>,
    entries: u32,
    free: VecDeque<GrantRef>,
}

impl GrantTable {
    /// Takes over a table of `frames` consecutive frames. Allocates four bytes per entry, once.
    ///
    /// # Safety
    ///
    /// 1. `base` is page aligned, and the frames behind it are our grant table, mapped for as long as this value lives.
    /// 2. Nothing else writes entries 8 and up but Xen.
    pub(crate) unsafe fn new(base: NonNull<u8>, frames: u32) -> Self {
        let entries = frames.saturating_mul(ENTRIES_PER_FRAME);
        Self {
            base,
            entries,
            free: (GNTTAB_NR_RESERVED_ENTRIES..entries).map(GrantRef).collect(),
        }
    }

    /// References left.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// The fields of an entry: flags, domain id, frame. `None` for a reference that is not ours to use.
    fn entry(&self, gref: GrantRef) -> Option<(&AtomicU16, &AtomicU16, &AtomicU32)> {
        if !(GNTTAB_NR_RESERVED_ENTRIES..self.entries).contains(&gref.0) {
            return None;
        }
        let offset = usize::try_from(gref.0).ok()?.checked_mul(ENTRY_BYTES)?;
        // SAFETY: the reference is below `entries`, so the entry lies in the table (obligation 1 of `new`).
        let flags = unsafe { self.base.add(offset) };
        // SAFETY: as above; the entry is 8 bytes long.
        let domid = unsafe { flags.add(ENTRY_DOMID) };
        // SAFETY: as above.
        let frame = unsafe { flags.add(ENTRY_FRAME) };
        // SAFETY: mapped, aligned, and only ever accessed through atomics; Xen uses atomics too.
        let flags = unsafe { AtomicU16::from_ptr(flags.cast().as_ptr()) };
        // SAFETY: as above.
        let domid = unsafe { AtomicU16::from_ptr(domid.cast().as_ptr()) };
        // SAFETY: as above.
        let frame = unsafe { AtomicU32::from_ptr(frame.cast().as_ptr()) };
        Some((flags, domid, frame))
    }

    /// Lets `peer` reach `frame`. `None` when no reference is free.
    pub(crate) fn grant(&mut self, peer: DomId, frame: u32, access: Access) -> Option<GrantRef> {
        let gref = self.free.pop_front()?;
        let (flags, entry_domid, entry_frame) = self.entry(gref)?;
        entry_frame.store(frame, Ordering::Relaxed);
        entry_domid.store(peer.0, Ordering::Relaxed);
        let readonly = match access {
            Access::ReadOnly => GTF_READONLY,
            Access::ReadWrite => 0,
        };
        // Publishes the two stores above: Xen looks at them only once it sees the flags.
        flags.store(GTF_PERMIT_ACCESS | readonly, Ordering::Release);
        Some(gref)
    }

    /// Takes a reference back, so that the peer cannot start another access. Returns what access it had.
    ///
    /// After success the page's content is stable: the locked exchange is a full barrier.
    ///
    /// # Errors
    ///
    /// [`Busy`] while the page is in use. The grant stays as it is.
    pub(crate) fn revoke(&mut self, gref: GrantRef) -> Result<Access, Busy> {
        let (flags, ..) = self.entry(gref).ok_or(Busy)?;
        let mut seen = flags.load(Ordering::Relaxed);
        // Xen changes the flags only to mark a use, in which case we stop; so this cannot go on for long.
        while seen & (GTF_READING | GTF_WRITING) == 0 {
            match flags.compare_exchange(seen, 0, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => {
                    self.free.push_back(gref);
                    return Ok(if seen & GTF_READONLY != 0 {
                        Access::ReadOnly
                    } else {
                        Access::ReadWrite
                    });
                }
                Err(now) => seen = now,
            }
        }
        Err(Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::SharedMemory;

    const PEER: DomId = DomId(5);

    fn table(memory: &SharedMemory) -> GrantTable {
        // SAFETY: a leaked zeroed page, and no Xen.
        unsafe { GrantTable::new(memory.base(), 1) }
    }

    fn entry(memory: &SharedMemory, gref: GrantRef) -> [u32; 2] {
        memory.page().read_words(gref.0 as usize * 8)
    }

    #[test]
    fn an_entry_holds_flags_peer_and_frame() {
        let memory = SharedMemory::new();
        let mut table = table(&memory);
        let read_only = table.grant(PEER, 0x1234, Access::ReadOnly).unwrap();
        assert_eq!(entry(&memory, read_only), [5 << 16 | 5, 0x1234]);
        let writable = table.grant(PEER, 0xABCD, Access::ReadWrite).unwrap();
        assert_eq!(entry(&memory, writable), [5 << 16 | 1, 0xABCD]);
        assert_eq!((read_only, writable), (GrantRef(8), GrantRef(9)));
        assert_eq!(table.revoke(read_only), Ok(Access::ReadOnly));
        assert_eq!(entry(&memory, read_only)[0] & 0xFFFF, 0);
    }

    #[test]
    fn the_toolstacks_references_are_never_touched() {
        let memory = SharedMemory::new();
        memory.page().write_bytes(0, &[0x19; 64]);
        let mut table = table(&memory);
        while table.grant(PEER, 1, Access::ReadWrite).is_some() {}
        for gref in 0..8 {
            assert_eq!(table.revoke(GrantRef(gref)), Err(Busy));
        }
        let mut bytes = [0; 64];
        memory.page().read_bytes(0, &mut bytes);
        assert_eq!(bytes, [0x19; 64]);
    }

    #[test]
    fn a_page_in_use_is_not_revoked() {
        for in_use in [1 << 3, 1 << 4, 3 << 3] {
            let memory = SharedMemory::new();
            let mut table = table(&memory);
            let gref = table.grant(PEER, 7, Access::ReadWrite).unwrap();
            let free = table.free();
            let [first, _] = entry(&memory, gref);
            memory.page().write_u32(gref.0 as usize * 8, first | in_use);
            assert_eq!(table.revoke(gref), Err(Busy));
            assert_eq!(entry(&memory, gref), [first | in_use, 7]);
            assert_eq!(table.free(), free, "a busy reference must not be reused");
            memory.page().write_u32(gref.0 as usize * 8, first);
            assert_eq!(table.revoke(gref), Ok(Access::ReadWrite));
            assert_eq!(table.free(), free + 1);
        }
    }

    #[test]
    fn references_are_reused_as_late_as_possible() {
        let memory = SharedMemory::new();
        let mut table = table(&memory);
        let first = table.grant(PEER, 1, Access::ReadWrite).unwrap();
        table.revoke(first).unwrap();
        let others: Vec<GrantRef> =
            std::iter::from_fn(|| table.grant(PEER, 1, Access::ReadWrite)).collect();
        assert_eq!(others.len(), 504);
        assert_eq!(others.last(), Some(&first));
        assert_eq!(table.grant(PEER, 1, Access::ReadWrite), None);
    }

    #[test]
    fn references_beyond_the_table_are_refused() {
        let memory = SharedMemory::new();
        let mut table = table(&memory);
        assert_eq!(table.revoke(GrantRef(512)), Err(Busy));
        assert_eq!(table.revoke(GrantRef(u32::MAX)), Err(Busy));
    }
}
