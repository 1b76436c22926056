//! The copies of one main-loop iteration, of all clients and both directions.
//!
//! A batch owns every page that its operations name, so nobody looks at a page while Xen writes it, and a vif that
//! goes away in the middle leaves nothing behind. Its vectors are allocated once, by [`Batch::new`], and never grow.
//!
//! Pages of received frames and pages that are copied out of stand side by side in one slice, because
//! the hypervisor takes one. After the copy they wait in `settled` until somebody takes them.

use alloc::vec::Vec;

use xen::netif::RxFlags;
use xen::packet::MIN_FRAME_LEN;
use xen::{Checksum, CopyOp, Frame, Gso, Hypervisor, PAGE_SIZE, Page};

/// The fewest operations that a batch has room for: more than any one frame needs, segmented ones included.
const MIN_OPS: usize = 256;
/// The most operations that a batch has room for.
const MAX_OPS: usize = 16_384;

/// The kernel's name for a connected vif, opaque to this crate.
///
/// Use a new value for each connection (an index and a generation, say): what a batch still holds of an old
/// connection must not be taken for the new one's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VifTag(pub u32);

/// A frame being received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) tag: VifTag,
    /// The ring index of the first slot's response.
    pub(crate) response: u32,
    pub(crate) gso: Option<Gso>,
    /// Bytes of the frame, `14..=65535`.
    pub(crate) len: u16,
    /// Where its operations start, to find the frame of a failed one.
    pub(crate) first_op: u16,
    /// The number of its first page; it fills its pages from offset 0 on.
    pub(crate) first_page: u16,
    /// The id of the only slot, or where the ids of all data slots start in `ids`.
    pub(crate) id: u16,
    pub(crate) data_slots: u8,
    pub(crate) extras: u8,
    pub(crate) checksum: Checksum,
    pub(crate) failed: bool,
}

/// An rx slot being filled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sending {
    pub(crate) tag: VifTag,
    /// The ring index of the slot's response.
    pub(crate) response: u32,
    pub(crate) first_op: u16,
    pub(crate) id: u16,
    pub(crate) flags: RxFlags,
}

/// A copy that failed, for [`crate::Vif::amend`] of the vif that it belongs to.
#[derive(Debug)]
pub struct Failure<'a> {
    pub(crate) kind: FailureKind<'a>,
}

/// What failed: a whole received frame, or one slot of a sent one.
#[derive(Debug)]
pub(crate) enum FailureKind<'a> {
    Received {
        frame: Received,
        /// The ids of its data slots.
        ids: &'a [u16],
    },
    Sending(Sending),
}

impl Failure<'_> {
    /// The vif that it belongs to.
    #[must_use]
    pub const fn tag(&self) -> VifTag {
        match &self.kind {
            FailureKind::Received { frame, .. } => frame.tag,
            FailureKind::Sending(slot) => slot.tag,
        }
    }
}

/// Copy operations of all vifs, and the pages that they name. One per kernel, used again and again.
#[derive(Debug)]
pub struct Batch {
    /// Operations at most; also the capacity of the vectors here.
    limit: usize,
    /// Counts copies, so that a vif knows which of its responses are ready.
    generation: u64,
    /// Tx slots of the uplink that received frames may need.
    uplink_slots: usize,
    /// Of those, what the frames since the last copy need.
    uplink_slots_used: usize,
    ops: Vec<CopyOp>,
    /// What `ops` name.
    pages: Vec<Page>,
    receiving: Vec<Received>,
    sending: Vec<Sending>,
    /// Ids of the slots of received frames that have more than one.
    ids: Vec<u16>,
    /// The pages of the last copy in reverse, so that the next one to be taken is the last.
    settled: Vec<Page>,
    /// How many they were at first: the next one's number in the copy is this less how many are left.
    settled_pages: usize,
    /// Pages of the last copy that carry no received frame: they were copied out of.
    spent: Vec<Page>,
    /// The received frames of the last copy.
    arrived: Vec<Received>,
    /// How many of `arrived` were taken.
    taken: usize,
}

impl Batch {
    /// A batch of at most `ops` copy operations (taken as 256 to 16,384; 512 serve well).
    #[must_use]
    pub fn new(ops: usize) -> Self {
        let limit = ops.clamp(MIN_OPS, MAX_OPS);
        Self {
            limit,
            generation: 0,
            uplink_slots: usize::MAX,
            uplink_slots_used: 0,
            ops: Vec::with_capacity(limit),
            pages: Vec::with_capacity(limit),
            receiving: Vec::with_capacity(limit),
            sending: Vec::with_capacity(limit),
            ids: Vec::with_capacity(limit),
            settled: Vec::with_capacity(limit),
            settled_pages: 0,
            spent: Vec::with_capacity(limit),
            arrived: Vec::with_capacity(limit),
            taken: 0,
        }
    }

    /// Takes frames from clients only as long as all of them would fit into this many tx slots of the uplink.
    ///
    /// Holds until the next call; frames taken since the last [`Batch::copy`] count.
    pub const fn limit_uplink_slots(&mut self, slots: usize) {
        self.uplink_slots = slots;
    }

    /// Copy operations that still fit. Stop receiving from the uplink below about 64.
    #[must_use]
    pub fn room(&self) -> usize {
        // There may be more pages than operations: not every page of a frame cut short is copied from.
        let used = self.ops.len().max(self.pages.len());
        self.limit.saturating_sub(used)
    }

    /// Whether there is nothing to copy. Do not sleep otherwise.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Received frames that [`Batch::next_frame`] has not given yet, failed ones included.
    #[must_use]
    pub fn waiting_frames(&self) -> usize {
        self.arrived.len().saturating_sub(self.taken)
    }

    /// Carries out all copies with one call of the hypervisor.
    ///
    /// `on_failure` is called for each frame or slot whose copy failed: pass it to [`crate::Vif::amend`] of its vif, or
    /// ignore it if that vif is gone. Frames of the previous copy that nobody took are dropped.
    pub fn copy<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        mut on_failure: impl FnMut(&Failure<'_>),
    ) {
        self.uplink_slots_used = 0;
        if self.ops.is_empty() {
            return;
        }
        self.recycle(|page| hv.release(page));
        hv.grant_copy(&mut self.ops, &mut self.pages);
        if self.ops.iter().any(|op| !op.status.is_ok()) {
            self.report_failures(&mut on_failure);
        }
        core::mem::swap(&mut self.pages, &mut self.settled);
        self.settled.reverse();
        self.settled_pages = self.settled.len();
        core::mem::swap(&mut self.receiving, &mut self.arrived);
        self.ops.clear();
        self.sending.clear();
        self.ids.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Reports each frame or slot that a failed operation belongs to, once.
    #[cold]
    fn report_failures(&mut self, on_failure: &mut impl FnMut(&Failure<'_>)) {
        let mut last_slot = None;
        for (index, op) in self.ops.iter().enumerate() {
            if op.status.is_ok() {
                continue;
            }
            let before = |first_op: u16| usize::from(first_op) <= index;
            match op.direction {
                xen::CopyDirection::FromPeer => {
                    let after = self
                        .receiving
                        .partition_point(|frame| before(frame.first_op));
                    let Some(frame) = self.receiving.get_mut(after.wrapping_sub(1)) else {
                        continue;
                    };
                    if core::mem::replace(&mut frame.failed, true) {
                        continue;
                    }
                    let id = [frame.id];
                    let many = usize::from(frame.id);
                    let ids = match frame.data_slots {
                        1 => &id,
                        slots => self
                            .ids
                            .get(many..many.wrapping_add(usize::from(slots)))
                            .unwrap_or_default(),
                    };
                    let frame = *frame;
                    on_failure(&Failure {
                        kind: FailureKind::Received { frame, ids },
                    });
                }
                xen::CopyDirection::ToPeer => {
                    let after = self.sending.partition_point(|slot| before(slot.first_op));
                    let slot = self.sending.get(after.wrapping_sub(1));
                    if last_slot == Some(after) {
                        continue;
                    }
                    last_slot = Some(after);
                    if let Some(slot) = slot {
                        on_failure(&Failure {
                            kind: FailureKind::Sending(*slot),
                        });
                    }
                }
            }
        }
    }

    /// Puts the next received frame into `frame` and tells whose it is; `None` when there are no more.
    ///
    /// What `frame` held before goes back to the pool. Frames come in the order in which they were taken.
    pub fn next_frame<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Option<VifTag> {
        if !frame.is_empty() {
            frame.release(hv);
        }
        loop {
            let record = *self.arrived.get(self.taken)?;
            self.taken = self.taken.wrapping_add(1);
            if record.failed {
                // Its pages go with the next `recycle`.
                continue;
            }
            if self.settled_pages.wrapping_sub(self.settled.len()) != usize::from(record.first_page)
            {
                self.skip_to(record.first_page.into());
            }
            let mut rest = record.len;
            while rest > 0 {
                let len = rest.min(PAGE_LEN);
                rest = rest.wrapping_sub(len);
                if let Some(page) = self.settled.pop()
                    && let Err(page) = frame.push(page, 0, len)
                {
                    self.spent.push(page);
                }
            }
            frame.checksum = record.checksum;
            frame.gso = record.gso;
            return Some(record.tag);
        }
    }

    /// Puts the pages before number `page` aside.
    #[inline(never)]
    fn skip_to(&mut self, page: usize) {
        while self.settled_pages.wrapping_sub(self.settled.len()) < page {
            let Some(page) = self.settled.pop() else {
                return;
            };
            self.spent.push(page);
        }
    }

    /// Gives away every page that was copied out of, and those of received frames that nobody took.
    ///
    /// Call it when [`Batch::next_frame`] is done. Pages not given away go to the pool with the next copy.
    pub fn recycle(&mut self, mut to: impl FnMut(Page)) {
        self.spent.drain(..).for_each(&mut to);
        self.settled.drain(..).for_each(to);
        self.arrived.clear();
        self.taken = 0;
    }

    /// Gives all pages back to the pool and forgets all operations, without copying.
    ///
    /// For the end of all vifs. A vif that lives on would show its client responses of copies that never were.
    pub fn discard<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        self.recycle(|page| hv.release(page));
        for page in self.pages.drain(..) {
            hv.release(page);
        }
        self.ops.clear();
        self.receiving.clear();
        self.sending.clear();
        self.ids.clear();
        self.uplink_slots_used = 0;
    }

    /// See `generation`.
    pub(crate) const fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a frame of this many operations (no fewer than pages) and slot ids can be received.
    pub(crate) fn fits(&self, ops: usize, ids: usize) -> bool {
        ops <= self.room() && ids <= self.limit.saturating_sub(self.ids.len())
    }

    /// Whether the uplink can take a received frame of this many slots.
    pub(crate) const fn fits_uplink(&self, slots: usize) -> bool {
        self.uplink_slots_used.saturating_add(slots) <= self.uplink_slots
    }

    /// Whether this many operations and pages can be added to send something.
    pub(crate) fn fits_sending(&self, ops: usize, pages: usize) -> bool {
        ops <= self.room() && pages <= self.limit.saturating_sub(self.pages.len())
    }

    /// Takes a page in. Returns the name that operations give it.
    pub(crate) fn add_page(&mut self, page: Page) -> u16 {
        let index = short(self.pages.len());
        self.pages.push(page);
        index
    }

    /// The number of the next operation.
    pub(crate) fn next_op(&self) -> u16 {
        short(self.ops.len())
    }

    /// Adds an operation.
    pub(crate) fn add_op(&mut self, op: CopyOp) {
        self.ops.push(op);
    }

    /// Adds the ids of a received frame's data slots. Returns where they start.
    pub(crate) fn add_ids(&mut self, ids: impl Iterator<Item = u16>) -> u16 {
        let start = short(self.ids.len());
        self.ids.extend(ids);
        start
    }

    /// Adds a received frame, whose pages and operations are there already.
    pub(crate) fn add_received(&mut self, frame: Received, uplink_slots: usize) {
        debug_assert!(
            usize::from(frame.len) >= MIN_FRAME_LEN,
            "checked by the vif"
        );
        self.receiving.push(frame);
        self.uplink_slots_used = self.uplink_slots_used.saturating_add(uplink_slots);
    }

    /// Adds an rx slot, before its operations.
    pub(crate) fn add_sending(&mut self, slot: Sending) {
        self.sending.push(slot);
    }
}

/// [`PAGE_SIZE`] in the type of a length in a slot.
pub(crate) const PAGE_LEN: u16 = 4096;
const _: () = assert!(PAGE_LEN as usize == PAGE_SIZE);

/// A position in one of the vectors, none of which is longer than [`MAX_OPS`] (or twice that).
fn short(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}
