//! RAM: which of it is ours, the heap carved from it, and the pool of pages.
//!
//! The memory map comes from the domain builder in dom0 and is trusted to be true, but its size is bounded and its
//! arithmetic checked. Everything is pure up to the moment where a region becomes pages.
//!
//! With `maxmem > memory` the map shows more RAM than the domain has, and Xen kills a domain that touches too much of it.
//! Therefore what Xen does not back is left out at boot (`unbacked_bytes`), and the pool touches no page before it is
//! first handed out, so that more can be given up later (`PagePool::set_aside`).
//!
//! RAM above 4 GiB is not used; page tables end there. Nobody gives a firewall that much.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use heapless::Vec;

use crate::page::{PAGE_SIZE, Page, PageMarks};

/// Entries of a memory map that are looked at.
pub(crate) const MAP_ENTRIES: usize = 64;
/// Regions that the usable RAM may fall into.
pub(crate) const REGIONS: usize = 16;
/// The end of the address space that page tables cover, in bytes.
pub(crate) const ADDRESS_LIMIT: u64 = 1 << 32;
/// Bytes that one entry of a page directory maps.
pub(crate) const LARGE_PAGE: u64 = 2 * 1024 * 1024;

const PAGE: u64 = PAGE_SIZE as u64;

/// More pages than Xen ever counts as a domain's without them being in the memory map (17 were seen).
const SPECIAL_PAGES: u64 = 32;

/// One entry of the machine's memory map, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MapEntry {
    pub(crate) address: u64,
    pub(crate) size: u64,
    /// Usable memory, as opposed to anything else that occupies addresses.
    pub(crate) is_ram: bool,
}

/// The machine's memory map.
pub(crate) type MemoryMap = Vec<MapEntry, MAP_ENTRIES>;

/// Addresses `start..end`, both multiples of the page size, not empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Region {
    /// The whole pages inside `start..end`, if any.
    pub(crate) fn inside(start: u64, end: u64) -> Option<Self> {
        let start = start.checked_next_multiple_of(PAGE)?;
        let end = end / PAGE * PAGE;
        (start < end).then_some(Self { start, end })
    }

    /// Bytes.
    pub(crate) const fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// The whole pages before and behind the bytes `start..end`.
    fn without(self, start: u64, end: u64) -> [Option<Self>; 2] {
        [
            Self::inside(self.start, self.end.min(start)),
            Self::inside(self.start.max(end), self.end),
        ]
    }
}

/// RAM that nothing occupies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Regions(Vec<Region, REGIONS>);

impl Regions {
    /// The RAM of `map` below 4 GiB, without page 0, without what other entries claim, and without `occupied`.
    ///
    /// More than [`REGIONS`] fragments are not kept: the rest is left unused.
    pub(crate) fn usable(map: &[MapEntry], occupied: Region) -> Self {
        let mut regions = Self::default();
        for entry in map.iter().filter(|entry| entry.is_ram) {
            let end = entry.address.saturating_add(entry.size).min(ADDRESS_LIMIT);
            if let Some(region) = Region::inside(entry.address.max(PAGE), end) {
                // An entry that repeats RAM must not give it out twice.
                regions.remove(region.start, region.end);
                regions.add(region);
            }
        }
        for entry in map.iter().filter(|entry| !entry.is_ram) {
            regions.remove(entry.address, entry.address.saturating_add(entry.size));
        }
        regions.remove(occupied.start, occupied.end);
        regions
    }

    fn add(&mut self, region: Region) {
        // Full: this region stays unused.
        let _ = self.0.push(region);
    }

    /// Takes the bytes `start..end`, as far as they are here, out.
    fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let before = core::mem::take(&mut self.0);
        for region in before {
            for part in region.without(start, end).into_iter().flatten() {
                self.add(part);
            }
        }
    }

    /// Bytes in all regions.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(Region::len).sum()
    }

    /// Takes up to `bytes`, whole pages, off the end of the last region.
    pub(crate) fn take_last(&mut self, bytes: u64) -> Option<Region> {
        let last = self.0.last_mut()?;
        let start = last.end.saturating_sub(bytes.min(last.len()));
        let taken = Region::inside(start, last.end)?;
        last.end = taken.start;
        if last.len() == 0 {
            self.0.pop();
        }
        Some(taken)
    }

    /// Leaves out at least `bytes` of RAM, as far as there is so much.
    pub(crate) fn give_up(&mut self, bytes: u64) {
        let mut left = bytes
            .checked_next_multiple_of(PAGE)
            .unwrap_or(u64::MAX / PAGE * PAGE);
        while left > 0
            && let Some(taken) = self.take_last(left)
        {
            left = left.saturating_sub(taken.len());
        }
    }

    /// Takes `len` bytes, rounded up to pages, out of the region that has most room. `None`: no region has enough.
    ///
    /// Starts on a large page when the region has room for that, so that few translations cover it.
    pub(crate) fn carve(&mut self, len: u64) -> Option<Region> {
        let len = len.checked_next_multiple_of(PAGE)?;
        let largest = *self.0.iter().max_by_key(|region| region.len())?;
        let fitting = |start: u64| {
            let end = start.checked_add(len)?;
            (end <= largest.end).then_some(())?;
            Region::inside(start, end)
        };
        let taken = fitting(largest.start.checked_next_multiple_of(LARGE_PAGE)?)
            .or_else(|| fitting(largest.start))?;
        self.remove(taken.start, taken.end);
        Some(taken)
    }
}

/// How much of the RAM in a memory map Xen does not back, in bytes, when it counts `reserved_pages` as the domain's.
///
/// That count includes some special pages that are not RAM, so it is larger than the map's for a domain that has all its
/// RAM, and then nothing is missing.
pub(crate) const fn unbacked_bytes(ram_bytes: u64, reserved_pages: u64) -> u64 {
    let ram_pages = ram_bytes / PAGE;
    if ram_pages <= reserved_pages {
        return 0;
    }
    let backed = reserved_pages.saturating_sub(SPECIAL_PAGES);
    ram_pages.saturating_sub(backed).saturating_mul(PAGE)
}

/// Memory that nobody has used yet, for the global allocator.
pub type HeapMemory = &'static mut [MaybeUninit<u8>];

/// Turns a region into memory for the heap.
///
/// # Safety
///
/// 1. The region is mapped writable RAM, and nothing else ever uses it.
pub(crate) unsafe fn heap_memory(region: Region) -> Option<HeapMemory> {
    let start = usize::try_from(region.start).ok()?;
    let len = usize::try_from(region.len()).ok()?;
    let base = core::ptr::with_exposed_provenance_mut(start);
    // SAFETY: mapped and exclusive for good (obligation 1); uninitialised bytes are allowed in the type.
    Some(unsafe { core::slice::from_raw_parts_mut(base, len) })
}

/// What a released page holds: the next one, and what this one remembers of its content.
struct Released {
    next: Option<NonNull<Self>>,
    marks: PageMarks,
}

/// Pages not in use: never touched ones, and released ones linked through themselves.
#[derive(Debug)]
pub(crate) struct PagePool {
    untouched: Regions,
    released: Option<NonNull<Released>>,
    free: usize,
}

impl PagePool {
    /// A pool of all pages in `regions`.
    ///
    /// # Safety
    ///
    /// 1. The regions are mapped writable RAM at these addresses, and nothing else ever uses it.
    pub(crate) unsafe fn new(regions: Regions) -> Self {
        let free = usize::try_from(regions.total() / PAGE).unwrap_or(usize::MAX);
        Self {
            untouched: regions,
            released: None,
            free,
        }
    }

    /// Pages left.
    pub(crate) const fn free(&self) -> usize {
        self.free
    }

    /// Takes a page: the one released last, or one never used before.
    pub(crate) fn allocate(&mut self) -> Option<Page> {
        let page = match self.released {
            Some(first) => {
                // SAFETY: every link was written by `release` into a page that the pool has owned since.
                let Released { next, marks } = unsafe { first.read() };
                self.released = next;
                // SAFETY: put together as `release` took it apart; it leaves the pool here. What was written meanwhile
                // is the link, marked below.
                let mut page = unsafe { Page::from_parts(first.cast(), marks) };
                page.mark_dirty(size_of::<Released>());
                page
            }
            None => {
                let start = usize::try_from(self.untouched.take_last(PAGE)?.start).ok()?;
                let base = NonNull::new(core::ptr::with_exposed_provenance_mut(start))?;
                // SAFETY: page aligned, mapped RAM (obligation 1 of `new`), and out of the pool from here on.
                unsafe { Page::from_raw(base) }
            }
        };
        self.free = self.free.saturating_sub(1);
        Some(page)
    }

    /// Gives a page back.
    pub(crate) fn release(&mut self, page: Page) {
        let (base, marks) = page.into_parts();
        let link = base.cast::<Released>();
        let next = self.released;
        // SAFETY: the page was consumed, so its memory is the pool's alone; a link is smaller and less aligned than it.
        unsafe { link.write(Released { next, marks }) };
        self.released = Some(link);
        self.free = self.free.saturating_add(1);
    }

    /// Takes up to `pages` never touched pages out of the pool for good. Returns how many.
    pub(crate) fn set_aside(&mut self, pages: usize) -> usize {
        let mut left = pages;
        while left > 0 {
            let bytes = (left as u64).saturating_mul(PAGE);
            let Some(taken) = self.untouched.take_last(bytes) else {
                break;
            };
            let count = usize::try_from(taken.len() / PAGE).unwrap_or(usize::MAX);
            left = left.saturating_sub(count);
            self.free = self.free.saturating_sub(count);
        }
        pages.saturating_sub(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const IMAGE: Region = Region {
        start: MIB,
        end: MIB + 600 * 1024,
    };

    fn ram(address: u64, size: u64) -> MapEntry {
        MapEntry {
            address,
            size,
            is_ram: true,
        }
    }

    fn taken(address: u64, size: u64) -> MapEntry {
        MapEntry {
            is_ram: false,
            ..ram(address, size)
        }
    }

    #[test]
    fn usable_ram_excludes_page_zero_and_the_image() {
        // What the builder writes for `memory=16`.
        let map = [
            ram(0, 16 * MIB),
            taken(0xFC00_0000, 0x9000),
            taken(0xFEFF_8000, 0x8000),
        ];
        let regions = Regions::usable(&map, IMAGE);
        let expected = [
            Region {
                start: 4096,
                end: MIB,
            },
            Region {
                start: MIB + 600 * 1024,
                end: 16 * MIB,
            },
        ];
        assert_eq!(regions.0, expected);
    }

    #[test]
    fn ram_above_the_address_limit_and_ragged_ends_are_left_out() {
        let map = [
            ram(3 * MIB + 1, 4 * MIB),
            ram(ADDRESS_LIMIT - 4096, 8192),
            ram(ADDRESS_LIMIT, MIB),
            ram(u64::MAX - 10, u64::MAX),
            ram(8 * MIB, 4095),
        ];
        let regions = Regions::usable(&map, IMAGE);
        let expected = [
            Region {
                start: 3 * MIB + 4096,
                end: 7 * MIB,
            },
            Region {
                start: ADDRESS_LIMIT - 4096,
                end: ADDRESS_LIMIT,
            },
        ];
        assert_eq!(regions.0, expected);
    }

    #[test]
    fn overlapping_entries_give_no_page_twice() {
        let map = [
            ram(2 * MIB, 4 * MIB),
            ram(4 * MIB, 4 * MIB),
            taken(5 * MIB, MIB),
        ];
        let regions = Regions::usable(&map, IMAGE);
        assert_eq!(regions.total(), 5 * MIB);
        for (index, one) in regions.0.iter().enumerate() {
            for other in &regions.0[index + 1..] {
                assert!(one.end <= other.start || other.end <= one.start);
            }
        }
    }

    #[test]
    fn a_map_of_many_fragments_is_bounded() {
        let mut map = MemoryMap::new();
        for index in 0..MAP_ENTRIES as u64 {
            map.push(ram((index + 10) * MIB, 4096)).unwrap();
        }
        assert_eq!(Regions::usable(&map, IMAGE).total(), REGIONS as u64 * 4096);
    }

    #[test]
    fn ram_that_xen_does_not_back_is_found_and_given_up() {
        // As seen: memory=16 is 4,096 pages of RAM and 17 special ones; with maxmem=64 the map shows 16,384.
        assert_eq!(unbacked_bytes(16 * MIB, 4113), 0);
        assert_eq!(unbacked_bytes(16 * MIB, 4096), 0);
        let unbacked = unbacked_bytes(64 * MIB, 4113);
        assert!(((16384 - 4096) * 4096..=(16384 - 4080) * 4096).contains(&unbacked));
        assert_eq!(unbacked_bytes(64 * MIB, 0), 64 * MIB);

        let mut regions = Regions::usable(&[ram(0, 64 * MIB), ram(70 * MIB, MIB)], IMAGE);
        let before = regions.total();
        regions.give_up(48 * MIB + 1);
        assert_eq!(regions.total(), before - 48 * MIB - 4096);
        regions.give_up(u64::MAX);
        assert_eq!(regions.total(), 0);
    }

    #[test]
    fn the_heap_starts_on_a_large_page_when_there_is_room() {
        let mut regions = Regions::usable(&[ram(0, 16 * MIB)], IMAGE);
        let before = regions.total();
        let heap = regions.carve(4 * MIB).unwrap();
        assert_eq!(heap.start, 2 * MIB);
        assert_eq!(regions.total(), before - 4 * MIB);

        let mut small = Regions::usable(&[ram(0, 4 * MIB)], IMAGE);
        let heap = small.carve(2 * MIB + 100).unwrap();
        assert_eq!(heap.start, IMAGE.end);
        assert_eq!(heap.len(), 2 * MIB + 4096);
        assert_eq!(small.carve(2 * MIB), None);
    }

    /// A pool over real host memory of `pages` pages.
    fn pool(pages: usize) -> PagePool {
        let layout = std::alloc::Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap();
        // SAFETY: the layout is not empty.
        let base = unsafe { std::alloc::alloc_zeroed(layout) }.expose_provenance() as u64;
        let mut regions = Regions::default();
        regions.add(Region::inside(base, base + layout.size() as u64).unwrap());
        // SAFETY: leaked memory of its own.
        unsafe { PagePool::new(regions) }
    }

    #[test]
    fn pages_are_distinct_and_come_back() {
        let mut pool = pool(5);
        let mut pages: std::vec::Vec<Page> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!((pages.len(), pool.free()), (5, 0));
        let mut bases: std::vec::Vec<usize> =
            pages.iter().map(|page| page.as_ptr() as usize).collect();
        bases.sort_unstable();
        bases.dedup();
        assert_eq!(bases.len(), 5);
        for page in &mut pages {
            page.fill(0xEE);
        }
        for page in pages {
            pool.release(page);
        }
        assert_eq!(pool.free(), 5);
        assert_eq!(std::iter::from_fn(|| pool.allocate()).count(), 5);
    }

    #[test]
    fn a_page_remembers_in_the_pool_how_much_of_it_was_written() {
        let mut pool = pool(1);
        let mut page = pool.allocate().unwrap();
        assert_eq!(page.dirty(), PAGE_SIZE, "fresh RAM may hold anything");
        let peer = crate::types::DomId(4);
        page.clear_for(peer, 0..0);
        page.bytes_mut(0..1500).fill(0xEE);
        pool.release(page);
        let page = pool.allocate().unwrap();
        assert_eq!(page.dirty(), 1500);
        let mut page = page;
        page.clear_for(peer, 0..0);
        pool.release(page);
        let mut page = pool.allocate().unwrap();
        assert_eq!(page.dirty(), size_of::<Released>(), "the pool's own link");
        page.clear_for(peer, 0..0);
        assert!(page.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn pages_set_aside_are_never_handed_out() {
        let mut pool = pool(8);
        let page = pool.allocate().unwrap();
        assert_eq!(pool.set_aside(5), 5);
        assert_eq!(pool.free(), 2);
        pool.release(page);
        // Released pages are backed already: only the two untouched ones can still go.
        assert_eq!(pool.set_aside(100), 2);
        assert_eq!(pool.free(), 1);
        assert!(pool.allocate().is_some());
        assert!(pool.allocate().is_none());
    }
}
