//! Pages and ports as owned values, so that misuse does not compile.
//!
//! None of these types gives its resource back on drop: giving back needs the hypervisor, and may
//! fail (a peer can hold a granted page). Dropping one leaks it, which is safe; the drivers' tests
//! count pages, grants, mappings and ports to show that nothing leaks.

use core::fmt;
use core::ops::{Deref, DerefMut, Range};
use core::ptr::NonNull;

use crate::shared::SharedPage;
use crate::types::{DomId, GrantRef, PortNumber};

/// The size of a page in bytes.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] in the type of an offset in a page.
const PAGE_END: u16 = 4096;
const _: () = assert!(PAGE_END as usize == PAGE_SIZE);

/// What a page remembers of its content, for a pool to keep while it has the page. See [`Page`].
///
/// One word, so that a page is passed in two registers: bits 0 to 15 are the high-water mark (bytes from there on are
/// zero or the last writer's own), bits 16 to 31 the domain that last had write access, or [`NOBODY`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageMarks(u32);

/// No domain's id.
const NOBODY: DomId = DomId(u16::MAX);

impl PageMarks {
    /// Nothing is known.
    const UNKNOWN: Self = Self::new(PAGE_END, NOBODY);

    const fn new(dirty: u16, writer: DomId) -> Self {
        Self(dirty as u32 | (writer.0 as u32) << 16)
    }

    const fn dirty(self) -> u16 {
        let [low, high, _, _] = self.0.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    const fn writer(self) -> DomId {
        let [_, _, low, high] = self.0.to_le_bytes();
        DomId(u16::from_le_bytes([low, high]))
    }

    /// Whether the page holds what another peer wrote, unseen by us.
    fn foreign_to(self, peer: DomId) -> bool {
        let writer = self.writer();
        writer != NOBODY && writer != peer
    }
}

/// A page of our own memory that nobody else can reach: 4,096 bytes, read and written as a slice.
///
/// # What a page remembers of its content
///
/// A peer that is granted a page sees all of it, so everything but the frame must be cleared first
/// (XSA-403). Clearing whole pages per packet is too dear; therefore a page carries a high-water mark of what
/// was written into it, and the last peer that could write anywhere in it. [`Page::clear_for`] clears
/// exactly what is needed. Bytes from the mark on are zero, or were written by that peer and are no secret to it.
/// The mark starts at the end of the page; writing through `DerefMut` puts it there again.
pub struct Page {
    base: NonNull<[u8; PAGE_SIZE]>,
    marks: PageMarks,
}

// SAFETY: a `Page` is the unique owner of plain bytes (obligation 1 of `from_raw`); moving it between threads
// moves that ownership. Only host tests have threads.
unsafe impl Send for Page {}

impl Page {
    /// Takes ownership of a page.
    ///
    /// # Safety
    ///
    /// 1. `base` is page aligned, valid for reads and writes of 4,096 initialised bytes for as long as the
    ///    program runs, and no other pointer to it is used while this value (or what it turns into) lives.
    #[must_use]
    pub(crate) const unsafe fn from_raw(base: NonNull<[u8; PAGE_SIZE]>) -> Self {
        let marks = PageMarks::UNKNOWN;
        Self { base, marks }
    }

    /// Takes the page apart for a pool: its address, and what it remembers.
    ///
    /// A pool that drops the marks is safe and slow: every page then counts as full of secrets, and is cleared whole
    /// each time it is granted.
    pub(crate) const fn into_parts(self) -> (NonNull<[u8; PAGE_SIZE]>, PageMarks) {
        (self.base, self.marks)
    }

    /// Puts together what [`Page::into_parts`] took apart. A pool that wrote a link into the page in the meantime
    /// tells so with [`Page::mark_dirty`].
    ///
    /// # Safety
    ///
    /// 1. As for [`Page::from_raw`].
    /// 2. `marks` came with this page, and nothing was written into it since but what `mark_dirty` is told next.
    pub(crate) const unsafe fn from_parts(
        base: NonNull<[u8; PAGE_SIZE]>,
        marks: PageMarks,
    ) -> Self {
        Self { base, marks }
    }

    /// The page's address, for hypercalls and for the pool that it goes back to.
    pub(crate) const fn base(&self) -> NonNull<[u8; PAGE_SIZE]> {
        self.base
    }

    /// The frame number as Xen wants it: our page tables map every address to itself.
    #[cfg(all(target_arch = "x86_64", any(test, feature = "guest")))]
    pub(crate) fn frame(&self) -> u64 {
        (self.base.as_ptr().expose_provenance() / PAGE_SIZE) as u64
    }

    /// The high-water mark: bytes from here on are zero or were written by the last peer with write access.
    #[must_use]
    pub const fn dirty(&self) -> usize {
        self.marks.dirty() as usize
    }

    /// Notes that bytes up to `end` (exclusive, at most 4,096) were or will be written, for instance by a grant copy.
    pub fn mark_dirty(&mut self, end: usize) {
        let end = u16::try_from(end).unwrap_or(PAGE_END).min(PAGE_END);
        if end > self.marks.dirty() {
            self.marks = PageMarks::new(end, self.marks.writer());
        }
    }

    /// Notes that `peer` may have written anything anywhere: it had the page granted for writing.
    ///
    /// A note about another peer is not lost: the whole page then counts as written.
    pub fn note_writer(&mut self, peer: DomId) {
        let foreign = self.marks.foreign_to(peer);
        let dirty = if foreign {
            PAGE_END
        } else {
            self.marks.dirty()
        };
        self.marks = PageMarks::new(dirty, peer);
    }

    /// The bytes of `range` (cut at the page's end), for writing; only they count as written.
    pub fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        let end = range.end;
        self.bytes_mut_marking(range, end)
    }

    /// The bytes of `range` (cut at the page's end), of which those before `written` count as written.
    pub(crate) fn bytes_mut_marking(&mut self, range: Range<usize>, written: usize) -> &mut [u8] {
        self.mark_dirty(written);
        // SAFETY: valid and unaliased (obligation 1 of `from_raw`), and `&mut self` makes it exclusive.
        let bytes = unsafe { self.base.as_mut() };
        let end = range.end.min(PAGE_SIZE);
        bytes.get_mut(range.start.min(end)..end).unwrap_or_default()
    }

    /// Clears everything outside `keep` (byte offsets) that `peer` must not see, before it is granted the page.
    ///
    /// `peer` may see what it wrote itself. Costs nothing when the page held no more than `keep` before.
    pub fn clear_for(&mut self, peer: DomId, keep: Range<usize>) {
        if self.marks.foreign_to(peer) {
            self.marks = PageMarks::UNKNOWN;
        }
        if keep.start != 0 || self.dirty() > keep.end {
            self.clear_outside(keep);
        }
    }

    /// Zeroes the written bytes outside `keep` and lowers the mark to what is left.
    fn clear_outside(&mut self, keep: Range<usize>) {
        let marks = self.marks;
        let dirty = marks.dirty();
        let end = u16::try_from(keep.end).unwrap_or(PAGE_END).min(dirty);
        let start = u16::try_from(keep.start).unwrap_or(PAGE_END).min(end);
        self.bytes_mut(0..usize::from(start)).fill(0);
        self.bytes_mut(usize::from(end)..usize::from(dirty)).fill(0);
        self.marks = PageMarks::new(if start == end { 0 } else { end }, marks.writer());
    }
}

impl Deref for Page {
    type Target = [u8; PAGE_SIZE];
    fn deref(&self) -> &Self::Target {
        // SAFETY: valid and unaliased (obligation 1 of `from_raw`); the borrow of `self` bounds the reference.
        unsafe { self.base.as_ref() }
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.mark_dirty(PAGE_SIZE);
        // SAFETY: as in `deref`, and `&mut self` makes it exclusive.
        unsafe { self.base.as_mut() }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({:p})", self.base)
    }
}

/// A page of ours that a peer may read, or read and write, until it is revoked.
///
/// Given back by [`crate::Hypervisor::revoke`].
#[derive(Debug)]
pub struct GrantedPage {
    pub(crate) page: Page,
    pub(crate) shared: SharedPage,
    pub(crate) gref: GrantRef,
    pub(crate) peer: DomId,
}

impl GrantedPage {
    /// The reference to tell the peer.
    #[must_use]
    pub const fn gref(&self) -> GrantRef {
        self.gref
    }

    /// The peer that it was granted to.
    #[must_use]
    pub const fn peer(&self) -> DomId {
        self.peer
    }
}

/// A peer's page, mapped into a hole of our address space. Given back by [`crate::Hypervisor::unmap`].
#[derive(Debug)]
pub struct MappedPage {
    pub(crate) shared: SharedPage,
    /// Xen's handle, for unmap.
    pub(crate) handle: u32,
    pub(crate) peer: DomId,
}

impl MappedPage {
    /// The domain whose page this is.
    #[must_use]
    pub const fn peer(&self) -> DomId {
        self.peer
    }
}

/// Memory behind a ring: ours and granted (frontend), or a peer's and mapped (backend).
pub trait RingMemory {
    /// The only way to reach the bytes.
    fn shared(&self) -> &SharedPage;
}

impl RingMemory for GrantedPage {
    fn shared(&self) -> &SharedPage {
        &self.shared
    }
}

impl RingMemory for MappedPage {
    fn shared(&self) -> &SharedPage {
        &self.shared
    }
}

/// An event channel port that we own. Closed by [`crate::Hypervisor::close_port`].
#[derive(Debug, PartialEq, Eq)]
pub struct Port {
    pub(crate) number: PortNumber,
}

impl Port {
    /// The port's number, to tell a peer or to list for a wait.
    #[must_use]
    pub const fn number(&self) -> PortNumber {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::host_page;

    const NETVM: DomId = DomId(2);
    const OTHER: DomId = DomId(3);

    /// A page whose 4,096 bytes are `byte` and known to be clean for everybody.
    fn clean() -> Page {
        let mut page = host_page();
        page.clear_for(NETVM, 0..0);
        assert_eq!(page.dirty(), 0);
        page
    }

    #[test]
    fn a_page_is_two_words_and_an_absent_one_as_well() {
        assert_eq!(size_of::<Page>(), 16);
        assert_eq!(size_of::<Option<Page>>(), 16);
    }

    #[test]
    fn a_page_of_unknown_content_is_cleared_whole() {
        let mut page = host_page();
        page.fill(7);
        page.clear_for(NETVM, 100..200);
        assert!(
            page[..100]
                .iter()
                .chain(&page[200..])
                .all(|byte| *byte == 0)
        );
        assert!(page[100..200].iter().all(|byte| *byte == 7));
        assert_eq!(page.dirty(), 200);
    }

    #[test]
    fn only_what_was_written_is_cleared() {
        let mut page = clean();
        page.bytes_mut(0..1500).fill(7);
        page.bytes_mut(0..60).fill(8);
        assert_eq!(page.dirty(), 1500);
        page.clear_for(NETVM, 0..60);
        assert_eq!(page.dirty(), 60);
        assert_eq!(page[..60], [8; 60]);
        assert!(page[60..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn writing_through_the_slice_counts_as_writing_all_of_it() {
        let mut page = clean();
        page[0] = 1;
        assert_eq!(page.dirty(), PAGE_SIZE);
    }

    #[test]
    fn a_peer_may_see_again_what_it_wrote() {
        let mut page = clean();
        page.note_writer(NETVM);
        // What the peer wrote, which we did not see: straight into the memory.
        // SAFETY: the test's own page; nobody else refers to it.
        unsafe { page.base.as_mut() }.fill(9);
        page.bytes_mut(0..54).fill(1);
        page.clear_for(NETVM, 0..0);
        assert_eq!(page[..54], [0; 54]);
        assert_eq!(page[54..], [9; PAGE_SIZE - 54]);
        page.clear_for(OTHER, 0..0);
        assert!(page.iter().all(|byte| *byte == 0), "another peer must not");
    }

    #[test]
    fn a_second_writer_does_not_make_the_first_forgotten() {
        let mut page = clean();
        page.note_writer(NETVM);
        // SAFETY: as above.
        unsafe { page.base.as_mut() }.fill(9);
        page.note_writer(OTHER);
        page.clear_for(OTHER, 0..0);
        assert!(page.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_pool_keeps_the_marks() {
        let mut page = clean();
        page.mark_dirty(77);
        page.note_writer(NETVM);
        let (base, marks) = page.into_parts();
        // SAFETY: taken apart just now and not touched since.
        let mut page = unsafe { Page::from_parts(base, marks) };
        assert_eq!(page.dirty(), 77);
        page.clear_for(NETVM, 0..77);
        assert_eq!(page.dirty(), 77);
        page.clear_for(OTHER, 0..77);
        assert_eq!(page.dirty(), 77, "the rest was cleared");
    }

    #[test]
    fn ranges_beyond_the_page_are_cut() {
        let mut page = clean();
        assert_eq!(page.bytes_mut(4000..5000).len(), 96);
        assert_eq!(page.bytes_mut(5000..6000).len(), 0);
        assert_eq!(page.dirty(), PAGE_SIZE);
        page.clear_for(NETVM, 5000..9000);
        assert_eq!(page.dirty(), 0);
    }
}
