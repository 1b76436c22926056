//! A frame in pages of ours: what both drivers take in and pass on, without copying its payload.
//!
//! A [`Frame`] is a container that is used again and again: a driver fills it, the firewall edits the
//! headers where they are, another driver empties it. The pages themselves change hands; nothing is allocated
//! and no payload byte is touched. A container is some hundred bytes, so lend it (`&mut Frame`), do not move it.
//!
//! # What is guaranteed of a frame that a driver filled
//!
//! * 14 to 65,535 bytes in 1 to [`MAX_FRAGMENTS`] fragments, none empty, each inside its own page.
//! * At least `min(frame length, HEADER_LEN)` bytes are in the first fragment, so that headers are linear.
//! * Every page is ours alone: no peer can change what was parsed.
//!
//! The content is whatever the peer sent.

use core::num::NonZeroU16;

use crate::hypervisor::Hypervisor;
use crate::netif::{GsoType, NR_SLOTS_MIN};
use crate::page::{PAGE_SIZE, Page};

/// The most fragments that a frame may have: as many as every implementation must accept in slots.
pub const MAX_FRAGMENTS: usize = NR_SLOTS_MIN;
/// The longest frame in bytes, Ethernet header included (the protocol's 16-bit length).
pub const MAX_FRAME_LEN: usize = 65_535;
/// The shortest frame in bytes: an Ethernet header.
pub const MIN_FRAME_LEN: usize = 14;
/// Bytes at the start of a frame that are always linear in its first page, if the frame has that many.
///
/// Holds Ethernet with a tag (18), IPv4 and TCP with all options (120), and an ICMP error with as much inside it.
pub const HEADER_LEN: usize = 256;

/// What the sender of a frame said about its TCP or UDP checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// The field is complete and nobody vouches for it.
    #[default]
    Unverified,
    /// The field is complete and the sender says that the data is right.
    Validated,
    /// The field holds only the pseudo-header sum; it must be completed before the frame meets a wire.
    Blank,
}

/// A frame that is one TCP packet to be cut into segments (TSO).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Payload bytes of each segment (MSS).
    pub size: NonZeroU16,
    /// The address family that the sender claims. Not checked against the frame.
    pub family: GsoType,
}

/// How a GSO frame is cut into segments for a receiver that does not take GSO.
///
/// The caller of the driver checks the frame's headers and says where the payload starts; the driver moves payload
/// and asks the caller for one header per segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segments {
    /// Bytes of each segment's header, Ethernet to TCP, `1..=256`; the frame's payload starts there.
    pub header_len: u16,
    /// Payload bytes of each segment but the last, which has the rest.
    pub payload_len: u16,
    /// What to say of the segments' checksums.
    pub checksum: Checksum,
}

impl Segments {
    /// The number of segments that a frame of `frame_len` bytes becomes; 0 if the description makes no sense.
    #[must_use]
    pub fn count(&self, frame_len: usize) -> usize {
        let payload = frame_len.saturating_sub(usize::from(self.header_len));
        match usize::from(self.payload_len) {
            0 => 0,
            each => payload.div_ceil(each),
        }
    }

    /// How many segments a frame of `frame_len` bytes becomes, if they can be made: 1 to `most` of them, headers of
    /// at most [`HEADER_LEN`] bytes, none longer than a page.
    #[must_use]
    pub fn checked_count(&self, frame_len: usize, most: usize) -> Option<usize> {
        let header_len = usize::from(self.header_len);
        let segment_len = header_len.wrapping_add(usize::from(self.payload_len));
        let count = self.count(frame_len);
        let fits = (1..=HEADER_LEN).contains(&header_len) && segment_len <= PAGE_SIZE;
        (fits && (1..=most).contains(&count)).then_some(count)
    }

    /// How many headers fit into a page, none crossing its end. At least 1.
    #[must_use]
    pub fn headers_per_page(&self) -> usize {
        let fitting = PAGE_SIZE.checked_div(usize::from(self.header_len));
        fitting.unwrap_or(1).max(1)
    }
}

/// Some bytes of a frame: `len` bytes from byte `offset` of a page that holds nothing else of any frame.
#[derive(Debug)]
pub struct Fragment {
    pub(crate) page: Page,
    offset: u16,
    len: u16,
}

impl Fragment {
    /// `len` bytes from byte `offset` of `page`.
    ///
    /// # Errors
    ///
    /// Gives the page back when the data is empty or leaves the page.
    pub fn new(page: Page, offset: u16, len: u16) -> Result<Self, Page> {
        if len == 0 || u32::from(offset).wrapping_add(u32::from(len)) > 4096 {
            return Err(page);
        }
        Ok(Self { page, offset, len })
    }

    /// Byte offset of the data in the page, `0..4096`.
    #[must_use]
    pub const fn offset(&self) -> u16 {
        self.offset
    }

    /// Bytes of data, `1..=4096`.
    #[must_use]
    pub const fn len(&self) -> u16 {
        self.len
    }

    /// Whether there is no data; never so inside a frame.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The data.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let start = usize::from(self.offset);
        self.page
            .get(start..start.wrapping_add(usize::from(self.len)))
            .unwrap_or_default()
    }

    /// The page, whole, for a driver that grants it or copies out of it.
    #[must_use]
    pub fn into_page(self) -> Page {
        self.page
    }
}

/// A frame in pages of ours, or an empty container for one. See the [module](self) for what is guaranteed.
#[derive(Debug, Default)]
pub struct Frame {
    fragments: heapless::Vec<Fragment, MAX_FRAGMENTS>,
    /// The sum of the fragments' lengths.
    len: u32,
    /// What is known of the L4 checksum.
    pub checksum: Checksum,
    /// Set on a GSO frame; `checksum` is then [`Checksum::Blank`].
    pub gso: Option<Gso>,
}

impl Frame {
    /// An empty container.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            fragments: heapless::Vec::new(),
            len: 0,
            checksum: Checksum::Unverified,
            gso: None,
        }
    }

    /// The frame's length in bytes, Ethernet header included.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there is no frame in the container.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The fragments in order.
    #[must_use]
    pub fn fragments(&self) -> &[Fragment] {
        &self.fragments
    }

    /// The linear start of the frame: all bytes of its first page.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        self.fragments.first().map_or(&[], Fragment::bytes)
    }

    /// The first `len` bytes of the frame for editing, cut at the end of the first fragment.
    ///
    /// Ask for as few as may be edited: they are what must be cleared before the page is lent to a peer again.
    pub fn header_mut(&mut self, len: usize) -> &mut [u8] {
        let Some(first) = self.fragments.first_mut() else {
            return &mut [];
        };
        let start = usize::from(first.offset);
        let len = len.min(usize::from(first.len));
        first.page.bytes_mut(start..start.wrapping_add(len))
    }

    /// All bytes of the first fragment, of which only the first `edited` may be changed.
    ///
    /// For a reader that looks at more than it edits: a change beyond `edited` would not be cleared before the page
    /// is lent to a peer again, so the peer that wrote the page could see it.
    pub fn header_for_edit(&mut self, edited: usize) -> &mut [u8] {
        let Some(first) = self.fragments.first_mut() else {
            return &mut [];
        };
        let start = usize::from(first.offset);
        let end = start.wrapping_add(usize::from(first.len));
        first
            .page
            .bytes_mut_marking(start..end, start.wrapping_add(edited).min(end))
    }

    /// All bytes of the frame, one slice per fragment.
    pub fn bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.fragments.iter().map(Fragment::bytes)
    }

    /// Copies bytes of the frame from byte `at` on. Returns how many were there.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) -> usize {
        let (mut skip, mut done) = (at, 0usize);
        for bytes in self.bytes() {
            let Some(bytes) = bytes.get(skip..) else {
                skip = skip.wrapping_sub(bytes.len());
                continue;
            };
            skip = 0;
            let room = to.get_mut(done..).unwrap_or_default();
            let count = bytes.len().min(room.len());
            if let (Some(room), Some(bytes)) = (room.get_mut(..count), bytes.get(..count)) {
                room.copy_from_slice(bytes);
            }
            done = done.wrapping_add(count);
        }
        done
    }

    /// Fills the container with a frame of our own making.
    ///
    /// What it held before goes back to the pool. `bytes` may be up to one page; it is copied.
    /// Returns whether a page was there and `bytes` fitted; if not, the container is empty.
    pub fn fill<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, bytes: &[u8]) -> bool {
        self.release(hv);
        if bytes.is_empty() || bytes.len() > PAGE_SIZE {
            return false;
        }
        let Some(mut page) = hv.allocate() else {
            return false;
        };
        page.bytes_mut(0..bytes.len()).copy_from_slice(bytes);
        let pushed = self.push(page, 0, u16::try_from(bytes.len()).unwrap_or(0));
        if let Err(page) = pushed {
            hv.release(page);
            return false;
        }
        true
    }

    /// Appends a fragment.
    ///
    /// # Errors
    ///
    /// Gives the page back, and leaves the frame as it was, when the fragment is empty or leaves its page,
    /// when there are [`MAX_FRAGMENTS`] already, or when the frame would be longer than [`MAX_FRAME_LEN`].
    pub fn push(&mut self, page: Page, offset: u16, len: u16) -> Result<(), Page> {
        let fragment = Fragment::new(page, offset, len)?;
        let total = self.len.wrapping_add(u32::from(len));
        if total > 65_535 {
            return Err(fragment.page);
        }
        self.fragments
            .push(fragment)
            .map_err(|fragment| fragment.page)?;
        self.len = total;
        Ok(())
    }

    /// Takes the first fragment of a frame that has just one. The container is empty afterwards.
    pub fn take_single(&mut self) -> Option<Fragment> {
        if self.fragments.len() != 1 {
            return None;
        }
        let fragment = self.fragments.pop();
        self.reset();
        fragment
    }

    /// Empties the container, giving the fragments in order. Fragments that are not taken are leaked.
    pub fn drain(&mut self) -> impl Iterator<Item = Fragment> {
        self.reset();
        self.fragments.drain(..)
    }

    /// Gives all pages back to the pool and empties the container.
    pub fn release<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        for fragment in self.drain() {
            hv.release(fragment.page);
        }
    }

    /// Makes the first `wanted` bytes (at most [`HEADER_LEN`]) linear in the first page, if the frame has that many.
    ///
    /// A sender that fills its slots never needs this; one that splits headers over slots costs us a copy of
    /// at most `wanted` bytes. Pages that become empty go back to the pool.
    pub fn linearize<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, wanted: usize) {
        let wanted = wanted.min(HEADER_LEN).min(self.len());
        if self.header().len() >= wanted {
            return;
        }
        let mut bytes = [0u8; HEADER_LEN];
        let Some(bytes) = bytes.get_mut(..wanted) else {
            return;
        };
        let pulled = self.copy_to(0, bytes).wrapping_sub(self.header().len());
        if let Some(first) = self.fragments.first_mut() {
            // Offset 0 leaves room for any header; what the page held there is copied already.
            first.page.bytes_mut(0..wanted).copy_from_slice(bytes);
            first.offset = 0;
            first.len = u16::try_from(wanted).unwrap_or(0);
        }
        self.consume_behind_first(hv, pulled);
    }

    /// Removes `count` bytes behind the first fragment.
    fn consume_behind_first<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, mut count: usize) {
        while count > 0 {
            let Some(next) = self.fragments.get_mut(1) else {
                return;
            };
            let cut = count.min(usize::from(next.len));
            let cut_len = u16::try_from(cut).unwrap_or(u16::MAX);
            count = count.wrapping_sub(cut);
            next.len = next.len.saturating_sub(cut_len);
            next.offset = next.offset.saturating_add(cut_len);
            if next.len == 0 {
                hv.release(self.fragments.remove(1).page);
            }
        }
    }

    /// Clears the description of a frame whose fragments are gone or about to be drained.
    fn reset(&mut self) {
        self.len = 0;
        self.checksum = Checksum::Unverified;
        self.gso = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeHypervisor, FakeMachine, Limits, Resources};
    use crate::types::DomId;

    const US: DomId = DomId(1);

    fn machine() -> (FakeMachine, FakeHypervisor) {
        let machine = FakeMachine::new();
        let hv = machine.domain_with(
            US,
            Limits {
                pages: 20,
                ..Limits::default()
            },
        );
        (machine, hv)
    }

    /// A frame whose byte `n` is `n` modulo 251, in pieces of these lengths that end at their page's end.
    fn pieces(hv: &mut FakeHypervisor, lens: &[usize]) -> Frame {
        let mut frame = Frame::new();
        let mut byte = (0..251u8).cycle();
        for len in lens {
            let mut page = hv.allocate().unwrap();
            page[4096 - len..].fill_with(|| byte.next().unwrap());
            let (offset, len) = (
                u16::try_from(4096 - len).unwrap(),
                u16::try_from(*len).unwrap(),
            );
            frame.push(page, offset, len).unwrap();
        }
        frame
    }

    fn expected(len: usize) -> Vec<u8> {
        (0..251u8).cycle().take(len).collect()
    }

    fn all(frame: &Frame) -> Vec<u8> {
        frame.bytes().flatten().copied().collect()
    }

    #[test]
    fn a_frame_of_our_own_is_one_fragment() {
        let (machine, mut hv) = machine();
        let mut frame = Frame::new();
        assert!(frame.fill(&mut hv, &expected(60)));
        assert_eq!((frame.len(), frame.header()), (60, &expected(60)[..]));
        assert!(!frame.fill(&mut hv, &[]));
        assert!(frame.is_empty());
        assert!(!frame.fill(&mut hv, &expected(4097)));
        assert!(frame.fill(&mut hv, &expected(4096)));
        let fragment = frame.take_single().unwrap();
        assert_eq!((fragment.offset(), fragment.len()), (0, 4096));
        assert!(frame.is_empty());
        hv.release(fragment.into_page());
        assert_eq!(machine.resources(US), Resources::default());
    }

    #[test]
    fn fragments_that_do_not_fit_are_given_back() {
        let (machine, mut hv) = machine();
        let mut frame = Frame::new();
        for (offset, len) in [
            (0, 0),
            (0, 4097),
            (4096, 1),
            (u16::MAX, u16::MAX),
            (4000, 97),
        ] {
            let page = hv.allocate().unwrap();
            let page = frame.push(page, offset, len).unwrap_err();
            hv.release(page);
        }
        assert!(frame.is_empty());
        for number in 0..MAX_FRAGMENTS + 1 {
            let page = hv.allocate().unwrap();
            // 16 whole pages are one byte too many, so the 16th is refused and the smaller ones after it are not.
            let len = if number < 16 { 4096 } else { 1 };
            if let Err(page) = frame.push(page, 0, len) {
                hv.release(page);
            }
        }
        assert_eq!((frame.fragments().len(), frame.len()), (18, 15 * 4096 + 3));
        let page = hv.allocate().unwrap();
        let page = frame.push(page, 0, 1).unwrap_err();
        hv.release(page);
        frame.release(&mut hv);
        assert_eq!(machine.resources(US), Resources::default());
    }

    #[test]
    fn bytes_are_copied_from_anywhere() {
        let (_machine, mut hv) = machine();
        let mut frame = pieces(&mut hv, &[10, 1, 300, 4096, 7]);
        assert_eq!(all(&frame), expected(4414));
        for (at, len) in [
            (0, 4414),
            (0, 5),
            (9, 3),
            (10, 1),
            (11, 300),
            (4400, 14),
            (311, 4103),
        ] {
            let mut to = vec![0; len];
            assert_eq!(frame.copy_to(at, &mut to), len);
            assert_eq!(to, expected(4414)[at..at + len]);
        }
        let mut to = [0; 10];
        assert_eq!(frame.copy_to(4410, &mut to), 4);
        assert_eq!(frame.copy_to(4414, &mut to), 0);
        assert_eq!(frame.copy_to(usize::MAX, &mut to), 0);
        frame.release(&mut hv);
    }

    #[test]
    fn editing_headers_marks_what_may_be_edited_and_no_more() {
        let (_machine, mut hv) = machine();
        let mut frame = Frame::new();
        let mut page = hv.allocate().unwrap();
        page.clear_for(US, 0..0);
        frame.push(page, 100, 1000).unwrap();
        assert_eq!(frame.header_mut(54).len(), 54);
        assert_eq!(frame.fragments()[0].page.dirty(), 154);
        assert_eq!(frame.header_for_edit(60).len(), 1000);
        assert_eq!(frame.fragments()[0].page.dirty(), 160);
        assert_eq!(frame.header_mut(5000).len(), 1000);
        frame.release(&mut hv);
        assert_eq!(frame.header_mut(5).len(), 0);
    }

    #[test]
    fn headers_become_linear_and_emptied_pages_come_back() {
        for (lens, fragments, linear) in [
            (&[300, 10][..], 2, 300),
            (&[255, 1, 10], 2, 256),
            (&[1, 1, 1, 300], 2, 256),
            (&[10, 20], 1, 30),
            (&[14, 242], 1, 256),
            (&[100, 4096, 4096], 3, 256),
            (&[3; 18], 1, 54),
        ] {
            let (machine, mut hv) = machine();
            let total = lens.iter().sum();
            let mut frame = pieces(&mut hv, lens);
            frame.linearize(&mut hv, HEADER_LEN);
            assert_eq!(all(&frame), expected(total));
            assert_eq!(frame.len(), total);
            assert_eq!(frame.fragments().len(), fragments, "{lens:?}");
            assert_eq!(frame.header().len(), linear);
            assert_eq!(machine.resources(US).pages, fragments);
            frame.release(&mut hv);
            assert_eq!(machine.resources(US), Resources::default());
        }
    }

    #[test]
    fn a_drained_frame_is_empty_and_plain() {
        let (_machine, mut hv) = machine();
        let mut frame = pieces(&mut hv, &[100, 100]);
        frame.checksum = Checksum::Blank;
        frame.gso = NonZeroU16::new(1448).map(|size| Gso {
            size,
            family: GsoType::TcpV4,
        });
        assert!(frame.take_single().is_none());
        for fragment in frame.drain() {
            hv.release(fragment.into_page());
        }
        assert!(frame.is_empty());
        assert_eq!((frame.checksum, frame.gso), (Checksum::Unverified, None));
    }

    #[test]
    fn segment_counts_are_bounded() {
        let cut = |header_len, payload_len| Segments {
            header_len,
            payload_len,
            checksum: Checksum::Blank,
        };
        assert_eq!(cut(54, 1448).count(54 + 1448), 1);
        assert_eq!(cut(54, 1448).count(54 + 1449), 2);
        assert_eq!(cut(54, 1448).checked_count(54, 64), None, "no payload");
        assert_eq!(cut(54, 0).checked_count(1000, 64), None);
        assert_eq!(cut(0, 1000).checked_count(1000, 64), None);
        assert_eq!(cut(257, 1000).checked_count(1000, 64), None);
        assert_eq!(cut(256, 3840).checked_count(65_535, 64), Some(17));
        assert_eq!(
            cut(256, 3841).checked_count(65_535, 64),
            None,
            "longer than a page"
        );
        assert_eq!(cut(54, 1000).checked_count(54 + 64_000, 64), Some(64));
        assert_eq!(cut(54, 1000).checked_count(54 + 64_001, 64), None);
        assert_eq!(cut(u16::MAX, u16::MAX).checked_count(usize::MAX, 64), None);
        assert_eq!(cut(256, 1).headers_per_page(), 16);
        assert_eq!(cut(0, 1).headers_per_page(), 1);
    }
}
