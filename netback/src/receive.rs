//! From the client: tx requests to frames in the batch.
//!
//! A request is read once, checked, and then either refused with an error response or turned into copy
//! operations and an OKAY response. Responses are written at once and in slot order, because some frontends insist on
//! the order; [`Vif::publish`] shows them when the copies are done, [`Vif::amend`] corrects those that failed.

use xen::netif::{TxFlags, TxRequest, TxResponse, status};
use xen::{Checksum, CopyDirection, CopyOp, GrantStatus, Hypervisor};

use crate::batch::{Batch, PAGE_LEN, Received};
use crate::chain::{Chain, Refusal, check_len, crosses_page};
use crate::error::{PeerError, Ring};
use crate::vif::{Budget, Vif};
use crate::{MAX_DEFICIT, RESERVED_PAGES};

/// What became of the next frame of the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is in the batch.
    Taken,
    /// It was answered with an error.
    Refused,
    /// It stays in the ring for a later turn.
    Later,
}

impl Vif {
    /// Takes frames out of the tx ring: appends their copies to `batch`, and writes their responses.
    ///
    /// Returns how many frames wait in the batch for [`Batch::next_frame`] by this call. Takes nothing
    /// that does not fit into the batch, the uplink's slots or the page pool.
    ///
    /// # Errors
    ///
    /// [`PeerError`] at the first thing that no correct client does, now or in an earlier call. Frames taken before
    /// it stay in the batch. The rings are not served any more: disconnect.
    pub fn receive<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        budget: Budget,
    ) -> Result<u32, PeerError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.enter(batch);
        self.take_frames(hv, batch, budget)
            .inspect_err(|error| self.failed = Some(*error))
    }

    fn take_frames<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        budget: Budget,
    ) -> Result<u32, PeerError> {
        self.check_copy_failures()?;
        self.held_back = false;
        let mut available = self.tx_available()?;
        if available == 0 {
            self.deficit = 0;
            return Ok(0);
        }
        self.deficit = self.deficit.saturating_add(budget.bytes).min(MAX_DEFICIT);
        let mut pages = hv.free_pages();
        let mut taken = 0u32;
        // Refused frames count as well: a client that makes them as fast as we refuse them must not keep us here.
        for _ in 0..budget.frames {
            if available == 0 {
                available = self.tx_available()?;
                if available == 0 {
                    self.deficit = 0;
                    break;
                }
            }
            let before = self.tx.consumed();
            let first = TxRequest::decode(self.tx.request(0));
            let step = if first.flags.has(TxFlags::MORE_DATA | TxFlags::EXTRA_INFO) {
                self.take_chain(hv, batch, first, available, &mut pages)?
            } else {
                self.take_single(hv, batch, first, &mut pages)?
            };
            available = available.wrapping_sub(self.tx.consumed().wrapping_sub(before));
            match step {
                Step::Taken => taken = taken.wrapping_add(1),
                Step::Refused => {}
                Step::Later => break,
            }
        }
        Ok(taken)
    }

    fn tx_available(&self) -> Result<u32, PeerError> {
        let available = self.tx.available();
        available.map_err(|_| PeerError::ImpossibleProducer(Ring::Tx))
    }

    /// Takes a frame that is one slot: nearly all of them.
    fn take_single<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        slot: TxRequest,
        pages: &mut usize,
    ) -> Result<Step, PeerError> {
        if crosses_page(&slot) {
            return Err(PeerError::CrossesPage);
        }
        if let Err(refusal) = check_len(slot.size, false, self.max_plain) {
            let status = self.count_refusal(refusal);
            self.consume(1);
            self.respond(slot.id, status);
            return Ok(Step::Refused);
        }
        if u32::from(slot.size) > self.deficit || !batch.fits(1, 0) {
            return Ok(Step::Later);
        }
        if !batch.fits_uplink(1) {
            return Ok(self.hold_back());
        }
        let page = if *pages > RESERVED_PAGES {
            hv.allocate()
        } else {
            None
        };
        let Some(mut page) = page else {
            return Ok(self.hold_back_for_pages());
        };
        *pages = pages.wrapping_sub(1);
        page.mark_dirty(usize::from(slot.size));
        let first_op = batch.next_op();
        let page = batch.add_page(page);
        batch.add_op(self.copy_from(&slot, 0, slot.size, page, 0));
        let response = self.tx.produced();
        self.consume(1);
        self.respond(slot.id, status::OKAY);
        let frame = Received {
            tag: self.tag,
            response,
            gso: None,
            len: slot.size,
            first_op,
            first_page: page,
            id: slot.id,
            data_slots: 1,
            extras: 0,
            checksum: checksum_of(slot.flags),
            failed: false,
        };
        self.count_taken(&frame);
        batch.add_received(frame, 1);
        Ok(Step::Taken)
    }

    /// Takes a frame of several slots. Not inlined, so that frames of one slot do not pay for its locals.
    #[inline(never)]
    fn take_chain<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        first: TxRequest,
        available: u32,
        pages: &mut usize,
    ) -> Result<Step, PeerError> {
        let mut chain = Chain::collect(first, available, |ahead| self.tx.request(ahead))?;
        if let Err(refusal) = chain.check(self.max_plain)? {
            let status = self.count_refusal(refusal);
            self.respond_to(&chain, status);
            return Ok(Step::Refused);
        }
        let page_count = chain.len.div_ceil(PAGE_LEN);
        let needed = usize::from(page_count);
        let uplink_slots = needed.wrapping_add(usize::from(chain.gso.is_some()));
        let most_ops = chain.slots().len().wrapping_add(needed);
        if u32::from(chain.len) > self.deficit || !batch.fits(most_ops, chain.slots().len()) {
            return Ok(Step::Later);
        }
        if !batch.fits_uplink(uplink_slots) {
            return Ok(self.hold_back());
        }
        // What is in reserve is for frames of many pages, so that they are not starved by those of one.
        let reserve = if needed == 1 { RESERVED_PAGES } else { 0 };
        if pages.saturating_sub(reserve) < needed {
            return Ok(self.hold_back_for_pages());
        }
        let Some(first_page) = add_pages(hv, batch, chain.len) else {
            return Ok(self.hold_back_for_pages());
        };
        *pages = pages.wrapping_sub(needed);
        let first_op = batch.next_op();
        self.copy_chain(batch, &chain, first_page);
        let id = match chain.slots() {
            [only] => only.id,
            slots => batch.add_ids(slots.iter().map(|slot| slot.id)),
        };
        let response = self.tx.produced();
        self.respond_to(&chain, status::OKAY);
        let mut checksum = checksum_of(first.flags);
        if chain.gso.is_some() && checksum != Checksum::Blank {
            // Linux repairs this on both ends as well: a segment's checksum cannot have been complete.
            checksum = Checksum::Blank;
            self.counters.gso_without_blank = self.counters.gso_without_blank.wrapping_add(1);
        }
        let frame = Received {
            tag: self.tag,
            response,
            gso: chain.gso,
            len: chain.len,
            first_op,
            first_page,
            id,
            data_slots: chain.data_slots(),
            extras: chain.extras,
            checksum,
            failed: false,
        };
        self.count_taken(&frame);
        batch.add_received(frame, uplink_slots);
        Ok(Step::Taken)
    }

    /// Leaves a frame in the ring because the uplink cannot take it now.
    #[cold]
    const fn hold_back(&mut self) -> Step {
        self.held_back = true;
        Step::Later
    }

    /// Leaves a frame in the ring because the pool is low.
    #[cold]
    const fn hold_back_for_pages(&mut self) -> Step {
        self.counters.receive_pool_low = self.counters.receive_pool_low.wrapping_add(1);
        self.hold_back()
    }

    /// Adds the copies of a checked chain: its bytes one after the other from the start of the first page.
    fn copy_chain(&self, batch: &mut Batch, chain: &Chain, first_page: u16) {
        let (mut page, mut at) = (first_page, 0u16);
        for slot in chain.slots() {
            let mut done = 0u16;
            // Empty slots are legal and get no operation (XSA-448).
            while done < slot.size {
                if at == PAGE_LEN {
                    (page, at) = (page.wrapping_add(1), 0);
                }
                let len = slot.size.wrapping_sub(done).min(PAGE_LEN.wrapping_sub(at));
                batch.add_op(self.copy_from(slot, done, len, page, at));
                done = done.wrapping_add(len);
                at = at.wrapping_add(len);
            }
        }
    }

    /// The copy of `len` bytes from byte `skip` of a slot's data.
    const fn copy_from(
        &self,
        slot: &TxRequest,
        skip: u16,
        len: u16,
        page: u16,
        offset: u16,
    ) -> CopyOp {
        CopyOp {
            direction: CopyDirection::FromPeer,
            peer: self.peer,
            gref: slot.gref,
            peer_offset: slot.offset.wrapping_add(skip),
            page,
            offset,
            len,
            status: GrantStatus::NOT_DONE,
        }
    }

    /// Consumes a chain and answers each of its slots; extras get the status that says so.
    fn respond_to(&mut self, chain: &Chain, status: i16) {
        self.consume(chain.all_slots());
        let mut slots = chain.slots().iter();
        if let Some(first) = slots.next() {
            self.respond(first.id, status);
        }
        for _ in 0..chain.extras {
            self.respond(0, status::NULL);
        }
        for slot in slots {
            self.respond(slot.id, status);
        }
    }

    fn consume(&mut self, slots: u32) {
        self.tx.consume(slots);
        self.counters.received_slots = self.counters.received_slots.wrapping_add(slots.into());
    }

    fn respond(&mut self, id: u16, status: i16) {
        self.tx.respond(TxResponse { id, status }.encode());
    }

    fn count_taken(&mut self, frame: &Received) {
        let counters = &mut self.counters;
        counters.received_frames = counters.received_frames.wrapping_add(1);
        counters.received_bytes = counters.received_bytes.wrapping_add(frame.len.into());
        counters.received_gso = counters
            .received_gso
            .wrapping_add(frame.gso.is_some().into());
        self.deficit = self.deficit.saturating_sub(frame.len.into());
        self.copies_tried = self.copies_tried.wrapping_add(1);
    }

    /// Counts a refused frame. Returns the status to answer with.
    #[cold]
    fn count_refusal(&mut self, refusal: Refusal) -> i16 {
        let errors = &mut self.counters.receive_errors;
        let (counter, status) = match refusal {
            Refusal::TooManySlots => (&mut errors.too_many_slots, status::ERROR),
            Refusal::InconsistentSizes => (&mut errors.inconsistent_sizes, status::ERROR),
            Refusal::Multicast => (&mut errors.multicast, status::ERROR),
            Refusal::TooShort => (&mut errors.too_short, status::ERROR),
            Refusal::TooLong => (&mut errors.too_long, status::DROPPED),
        };
        *counter = counter.wrapping_add(1);
        status
    }

    /// Answers all data slots of a frame whose copy failed with an error.
    pub(crate) fn amend_received(&mut self, frame: &Received, ids: &[u16]) {
        let counters = &mut self.counters;
        counters.receive_errors.copy_failed = counters.receive_errors.copy_failed.wrapping_add(1);
        counters.received_frames = counters.received_frames.wrapping_sub(1);
        counters.received_bytes = counters.received_bytes.wrapping_sub(frame.len.into());
        counters.received_gso = counters
            .received_gso
            .wrapping_sub(frame.gso.is_some().into());
        self.copies_failed = self.copies_failed.wrapping_add(1);
        let mut index = frame.response;
        for (number, id) in ids.iter().enumerate() {
            let response = TxResponse {
                id: *id,
                status: status::ERROR,
            };
            self.tx.amend(index, response.encode());
            // Extras stand behind the first slot; their answer stays.
            let extras = if number == 0 { frame.extras } else { 0 };
            index = index.wrapping_add(u32::from(extras).wrapping_add(1));
        }
    }
}

/// Takes the pages of a frame of `len` bytes out of the pool and into the batch; all or none.
fn add_pages<H: Hypervisor + ?Sized>(hv: &mut H, batch: &mut Batch, len: u16) -> Option<u16> {
    let mut pages: heapless::Vec<xen::Page, 16> = heapless::Vec::new();
    let mut rest = len;
    while rest > 0 {
        let used = rest.min(PAGE_LEN);
        rest = rest.wrapping_sub(used);
        let Some(mut page) = hv.allocate() else {
            for page in pages {
                hv.release(page);
            }
            return None;
        };
        page.mark_dirty(usize::from(used));
        // 65,535 bytes are 16 pages.
        if let Err(page) = pages.push(page) {
            hv.release(page);
        }
    }
    let mut first = None;
    for page in pages {
        let index = batch.add_page(page);
        first.get_or_insert(index);
    }
    first
}

/// What the flags of a frame's first slot say of its checksum.
const fn checksum_of(flags: TxFlags) -> Checksum {
    if flags.has(TxFlags::CSUM_BLANK) {
        Checksum::Blank
    } else if flags.has(TxFlags::DATA_VALIDATED) {
        Checksum::Validated
    } else {
        Checksum::Unverified
    }
}
