//! Guest-physical addresses with nothing behind them: where shared info, grant table and peers' pages are put.
//!
//! Over RAM, Xen would free that RAM; over an existing mapping it would kill the domain. A [`HoleFrame`] is therefore
//! a value that cannot be copied: who has it, may fill it, and gives it back empty.
//!
//! All mappings share few 2 MiB regions, since each new one costs a page of the domain's fixed paging pool.

use alloc::vec::Vec;

use crate::memory::{LARGE_PAGE, MapEntry};
use crate::page::PAGE_SIZE;

/// Frames in the hole: 4 MiB of address space. 120 clients with two rings each need 240.
pub(crate) const HOLE_FRAMES: u64 = 1024;
/// Below the ACPI tables and the special pages, in bytes.
const SEARCH_END: u64 = 0xFC00_0000;

const PAGE: u64 = PAGE_SIZE as u64;

/// One empty frame of the hole, owned.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HoleFrame(u64);

impl HoleFrame {
    /// The frame number: guest-physical address / 4096.
    pub(crate) const fn number(&self) -> u64 {
        self.0
    }

    /// The guest-physical address, also where our page tables show it.
    pub(crate) const fn address(&self) -> u64 {
        self.0 * PAGE
    }
}

/// Finds the highest free place for the hole: above all RAM below it, touching no entry of the map.
///
/// Returns its first frame number, a multiple of 512.
pub(crate) fn find(map: &[MapEntry]) -> Option<u64> {
    let len = HOLE_FRAMES * PAGE;
    let mut start = SEARCH_END - len;
    while start >= LARGE_PAGE {
        let end = start + len;
        let in_the_way = |entry: &&MapEntry| {
            entry.size > 0 && entry.address < end && entry.address.saturating_add(entry.size) > start
        };
        let Some(blocker) = map.iter().find(in_the_way) else {
            return Some(start / PAGE);
        };
        if blocker.is_ram {
            // Holes below the end of RAM may belong to things that the map does not show.
            return None;
        }
        start = (blocker.address.checked_sub(len)?) / LARGE_PAGE * LARGE_PAGE;
    }
    None
}

/// Hands out the frames of the hole, lowest first.
#[derive(Debug)]
pub(crate) struct HoleAllocator {
    first: u64,
    /// Frames below this have been handed out at least once.
    next: u64,
    /// Of those, the ones given back.
    free: Vec<HoleFrame>,
}

impl HoleAllocator {
    /// All frames of the hole that starts at frame `first`.
    pub(crate) const fn new(first: u64) -> Self {
        Self {
            first,
            next: first,
            free: Vec::new(),
        }
    }

    /// Takes a frame: the one given back last, or the lowest new one.
    pub(crate) fn allocate(&mut self) -> Option<HoleFrame> {
        if let Some(frame) = self.free.pop() {
            return Some(frame);
        }
        if self.next >= self.first.saturating_add(HOLE_FRAMES) {
            return None;
        }
        let frame = HoleFrame(self.next);
        self.next = self.next.saturating_add(1);
        Some(frame)
    }

    /// Gives an empty frame back.
    pub(crate) fn release(&mut self, frame: HoleFrame) {
        debug_assert!(
            !self.free.contains(&frame) && (self.first..self.next).contains(&frame.0),
            "hole frame given back twice"
        );
        self.free.push(frame);
    }

    /// The frame behind an address that a mapping was at. The mapping must be gone.
    pub(crate) fn reclaim(&mut self, address: u64) {
        self.release(HoleFrame(address / PAGE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn entry(address: u64, size: u64, is_ram: bool) -> MapEntry {
        MapEntry {
            address,
            size,
            is_ram,
        }
    }

    #[test]
    fn the_hole_lies_between_ram_and_the_tables() {
        let map = [
            entry(0, 16 * MIB, true),
            entry(0xFC00_0000, 0x9000, false),
            entry(0xFEFF_8000, 0x8000, false),
        ];
        assert_eq!(find(&map), Some(0xFBC0_0000 / PAGE));
    }

    #[test]
    fn entries_in_the_way_push_it_down_aligned() {
        let map = [
            entry(0, 16 * MIB, true),
            entry(0xFBFF_F000, 0x1000, false),
            entry(0xFBA0_1000, 0x1000, false),
        ];
        let first = find(&map).unwrap() * PAGE;
        assert_eq!(first, 0xFB60_0000);
        assert_eq!(first % LARGE_PAGE, 0);
    }

    #[test]
    fn ram_up_to_the_tables_leaves_no_hole() {
        assert_eq!(find(&[entry(0, 0xFC00_0000, true)]), None);
        assert_eq!(find(&[entry(0, u64::MAX, true)]), None);
        assert_eq!(find(&[entry(0, u64::MAX, false)]), None);
    }

    #[test]
    fn ram_up_to_0xf0000000_leaves_one() {
        let map = [
            entry(0, 0xF000_0000, true),
            entry(1 << 32, 1 << 32, true),
            entry(0xFC00_0000, 0x9000, false),
        ];
        assert_eq!(find(&map), Some(0xFBC0_0000 / PAGE));
    }

    #[test]
    fn frames_are_handed_out_once_until_they_come_back() {
        let mut hole = HoleAllocator::new(512);
        let mut frames: Vec<HoleFrame> = core::iter::from_fn(|| hole.allocate()).collect();
        assert_eq!(frames.len() as u64, HOLE_FRAMES);
        let mut numbers: Vec<u64> = frames.iter().map(HoleFrame::number).collect();
        numbers.dedup();
        assert_eq!(numbers.len() as u64, HOLE_FRAMES);
        let last = frames.pop().unwrap();
        let number = last.number();
        hole.release(last);
        assert_eq!(hole.allocate().map(|frame| frame.number()), Some(number));
        assert_eq!(hole.allocate(), None);
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn giving_a_frame_back_twice_is_noticed_in_debug_builds() {
        let mut hole = HoleAllocator::new(512);
        let address = hole.allocate().unwrap().address();
        hole.reclaim(address);
        hole.reclaim(address);
    }
}
