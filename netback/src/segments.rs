//! GSO frames for a client that does not take them: cut into segments by copy operations.
//!
//! The headers of all segments are written into pages of their own; the payload stays where it is and is copied into
//! the client's buffers piece by piece, one slot per segment. The CPU touches headers only.

use xen::packet::{HEADER_LEN, MAX_FRAGMENTS, Segments};
use xen::{Fragment, Frame, Hypervisor, PAGE_SIZE};

use crate::MAX_SEGMENTS;
use crate::batch::Batch;
use crate::error::{SendDrop, Sent};
use crate::queue::Item;
use crate::send::{Out, Place, describe, rx_flags};
use crate::vif::Vif;

/// Pages for the headers of [`MAX_SEGMENTS`] segments.
const MAX_HEADER_PAGES: usize = MAX_SEGMENTS * HEADER_LEN / PAGE_SIZE;

/// Prepared headers of segments.
type HeaderPages = heapless::Vec<Fragment, MAX_HEADER_PAGES>;

impl Vif {
    /// Sends a GSO frame as segments. `write_header(k, header)` writes the header of segment `k`, of exactly
    /// `segments.header_len` bytes; it is called for all segments before anything is sent.
    ///
    /// A client that does not post enough buffers for all segments within [`crate::SEGMENTS_PATIENCE`] gets those for which
    /// there are some.
    ///
    /// Always takes the frame out of the container.
    ///
    /// # Errors
    ///
    /// As [`Vif::send`].
    pub fn send_segments<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
        segments: Segments,
        write_header: impl FnMut(usize, &mut [u8]),
    ) -> Result<Sent, SendDrop> {
        self.enter(batch);
        match self.prepare_segments(hv, frame, segments, write_header) {
            Ok((item, headers)) => {
                self.counters.segmented = self.counters.segmented.wrapping_add(1);
                self.send_cut(hv, batch, frame, item, headers)
            }
            Err(reason) => Err(self.refuse(hv, frame, reason)),
        }
    }

    /// Checks the cut and writes all headers into pages of their own.
    fn prepare_segments<H: Hypervisor + ?Sized>(
        &self,
        hv: &mut H,
        frame: &Frame,
        segments: Segments,
        mut write_header: impl FnMut(usize, &mut [u8]),
    ) -> Result<(Item, HeaderPages), SendDrop> {
        if self.failed.is_some() || frame.is_empty() {
            return Err(SendDrop::Broken);
        }
        let count = segments
            .checked_count(frame.len(), MAX_SEGMENTS)
            .ok_or(SendDrop::BadSegments)?;
        let header_len = usize::from(segments.header_len);
        let mut pages = HeaderPages::new();
        let per_page = segments.headers_per_page();
        for first in (0..count).step_by(per_page) {
            let Some(mut page) = hv.allocate() else {
                release_all(hv, pages.into_iter());
                return Err(SendDrop::PoolLow);
            };
            let here = per_page.min(count.wrapping_sub(first));
            let bytes = page.bytes_mut(0..here.saturating_mul(header_len));
            for (number, header) in bytes.chunks_exact_mut(header_len).enumerate() {
                write_header(first.wrapping_add(number), header);
            }
            let len = u16::try_from(here.saturating_mul(header_len)).unwrap_or(0);
            // 64 headers of 256 bytes fill as many pages as there is room for; the length is right by construction.
            match Fragment::new(page, 0, len).map(|fragment| pages.push(fragment)) {
                Ok(Ok(())) => {}
                Ok(Err(fragment)) => hv.release(fragment.into_page()),
                Err(page) => hv.release(page),
            }
        }
        let item = Item {
            header_pages: u8::try_from(pages.len()).unwrap_or(u8::MAX),
            segments: Some(segments),
            checksum: segments.checksum,
            gso: None,
            ..describe(frame)
        };
        Ok((item, pages))
    }

    /// Queues a frame to be cut, and sends it from there at once if it can be.
    fn send_cut<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
        item: Item,
        headers: HeaderPages,
    ) -> Result<Sent, SendDrop> {
        let pages = frame.fragments().len().saturating_add(headers.len());
        let direct = self.queue.is_empty()
            && self.has_buffers(item.needed_slots()).unwrap_or(false)
            && batch.fits_sending(item.most_ops().saturating_add(pages), pages);
        if !direct && let Err(reason) = self.may_queue(hv, pages) {
            release_all(hv, headers.into_iter());
            return Err(self.refuse(hv, frame, reason));
        }
        let item = Item {
            since: hv.now(),
            ..item
        };
        self.queue
            .push(item, headers.into_iter().chain(frame.drain()));
        // An error is remembered in `failed`, and the queue goes with the vif.
        let _ = self.send_queued(hv, batch);
        if self.queue.is_empty() {
            return Ok(Sent::Copying);
        }
        self.plan_poll(hv.now());
        self.counters.queued = self.counters.queued.wrapping_add(1);
        Ok(Sent::Queued)
    }
}

impl Out<'_> {
    /// Sends the first `count` segments, one slot each. Returns their bytes.
    pub(crate) fn send_segments(
        &mut self,
        item: &Item,
        cut: Segments,
        mut fragments: impl Iterator<Item = Fragment>,
        count: u32,
    ) -> u64 {
        let mut headers: heapless::Vec<u16, MAX_HEADER_PAGES> = heapless::Vec::new();
        for fragment in fragments.by_ref().take(item.header_pages.into()) {
            let _ = headers.push(self.batch.add_page(fragment.into_page()));
        }
        let mut payload = Payload::new(self.batch, fragments);
        payload.skip(cut.header_len);
        let header_len = usize::from(cut.header_len);
        let per_page = cut.headers_per_page();
        let mut rest = item.len.saturating_sub(cut.header_len.into());
        let mut bytes = 0u64;
        for number in 0..usize::try_from(count).unwrap_or(0) {
            let len = u16::try_from(rest).unwrap_or(u16::MAX).min(cut.payload_len);
            rest = rest.wrapping_sub(len.into());
            let total = cut.header_len.wrapping_add(len);
            bytes = bytes.wrapping_add(total.into());
            let gref = self.open_slot(total, rx_flags(cut.checksum));
            let in_page = number
                .checked_rem(per_page)
                .unwrap_or(0)
                .wrapping_mul(header_len);
            let page = headers.get(number.checked_div(per_page).unwrap_or(0));
            let at = u16::try_from(in_page).unwrap_or(0);
            self.copy(
                gref,
                0,
                (page.copied().unwrap_or(u16::MAX), at),
                cut.header_len,
            );
            let mut done = 0u16;
            while done < len
                && let Some((from, piece)) = payload.take(len.wrapping_sub(done))
            {
                self.copy(gref, cut.header_len.wrapping_add(done), from, piece);
                done = done.wrapping_add(piece);
            }
        }
        bytes
    }
}

/// A frame's bytes in pages of the batch, taken piece by piece.
struct Payload {
    pieces: heapless::Vec<(Place, u16), MAX_FRAGMENTS>,
    next: usize,
}

impl Payload {
    fn new(batch: &mut Batch, fragments: impl Iterator<Item = Fragment>) -> Self {
        let mut pieces = heapless::Vec::new();
        for fragment in fragments {
            let (offset, len) = (fragment.offset(), fragment.len());
            let page = batch.add_page(fragment.into_page());
            // A frame has no more fragments than there are places.
            let _ = pieces.push(((page, offset), len));
        }
        Self { pieces, next: 0 }
    }

    /// Takes up to `most` bytes that are in one page.
    fn take(&mut self, most: u16) -> Option<(Place, u16)> {
        let ((page, offset), left) = self.pieces.get_mut(self.next)?;
        let from = (*page, *offset);
        let len = most.min(*left);
        *offset = offset.wrapping_add(len);
        *left = left.wrapping_sub(len);
        if *left == 0 {
            self.next = self.next.wrapping_add(1);
        }
        Some((from, len))
    }

    fn skip(&mut self, mut count: u16) {
        while count > 0
            && let Some((_, len)) = self.take(count)
        {
            count = count.wrapping_sub(len);
        }
    }
}

fn release_all<H: Hypervisor + ?Sized>(hv: &mut H, fragments: impl Iterator<Item = Fragment>) {
    for fragment in fragments {
        hv.release(fragment.into_page());
    }
}
