//! To the client: frames into the buffers that it posted.
//!
//! A frame is laid out from the start of each buffer, filled to the page's end, and only ever sent whole: no
//! request is consumed before all that the frame needs are there. Until then it waits in a bounded queue.
//! Responses are written at once, in the slots of their requests, and shown by [`Vif::publish`] when the copies
//! are done.

use xen::netif::{Extra, RX_WORDS, RxFlags, RxRequest, RxResponse, status};
use xen::ring::BackRing;
use xen::{
    Checksum, CopyDirection, CopyOp, DomId, Fragment, Frame, GrantRef, GrantStatus, Gso,
    Hypervisor, MappedPage, PAGE_SIZE, Time,
};

use crate::batch::{Batch, PAGE_LEN, Sending, VifTag};
use crate::error::{PeerError, Ring, SendDrop, Sent};
use crate::queue::Item;
use crate::vif::Vif;
use crate::{QUEUE_EXPIRY, QUEUE_RESERVED_PAGES, RX_POLL_INTERVAL, SEGMENTS_PATIENCE, STALL_AFTER};

impl Vif {
    /// Sends a frame to the client, or queues it when the client has too few buffers posted.
    ///
    /// Always takes the frame out of the container.
    ///
    /// # Errors
    ///
    /// [`SendDrop`], counted; the frame's pages are back in the pool. With [`SendDrop::Broken`] look at
    /// [`Vif::failed`]: the client may just have been found to cheat.
    pub fn send<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
    ) -> Result<Sent, SendDrop> {
        self.enter(batch);
        let single = frame.fragments().len() == 1 && frame.gso.is_none();
        if single && self.queue.is_empty() && self.failed.is_none() && batch.fits_sending(1, 1) {
            match self.has_buffers(1) {
                Ok(true) => return Ok(self.send_single(batch, frame)),
                Ok(false) => {}
                Err(_) => return Err(self.refuse(hv, frame, SendDrop::Broken)),
            }
        }
        match self.admit(frame) {
            Ok(item) => self.send_or_queue(hv, batch, frame, item),
            Err(reason) => Err(self.refuse(hv, frame, reason)),
        }
    }

    /// Sends a frame of one fragment, for which there is room: nearly all of them.
    fn send_single(&mut self, batch: &mut Batch, frame: &mut Frame) -> Sent {
        let checksum = frame.checksum;
        if let Some(fragment) = frame.take_single() {
            let (offset, len) = (fragment.offset(), fragment.len());
            let page = batch.add_page(fragment.into_page());
            let mut out = self.out(batch);
            let gref = out.open_slot(len, rx_flags(checksum));
            out.copy(gref, 0, (page, offset), len);
            self.count_sent(1, 1, len.into());
        }
        Sent::Copying
    }

    /// Whether the client can be sent such a frame at all.
    fn admit(&self, frame: &Frame) -> Result<Item, SendDrop> {
        if self.failed.is_some() || frame.is_empty() {
            return Err(SendDrop::Broken);
        }
        if let Some(gso) = frame.gso
            && !self.features.takes(gso.family)
        {
            return Err(SendDrop::NoGso);
        }
        if frame.len() > PAGE_SIZE && !self.features.sg {
            return Err(SendDrop::NoScatterGather);
        }
        Ok(describe(frame))
    }

    /// Sends what is not a frame of one slot with room for it. Not inlined, so that those do not pay for its locals.
    #[inline(never)]
    fn send_or_queue<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
        frame: &mut Frame,
        item: Item,
    ) -> Result<Sent, SendDrop> {
        if self.queue.is_empty() {
            match self.has_buffers(item.needed_slots()) {
                Ok(true) if batch.fits_sending(item.most_ops(), item.fragments.into()) => {
                    let slots = self.out(batch).send_frame(&item, frame.drain());
                    self.count_sent(1, slots, item.len.into());
                    self.counters.sent_gso = self
                        .counters
                        .sent_gso
                        .wrapping_add(item.gso.is_some().into());
                    return Ok(Sent::Copying);
                }
                Ok(true) => {}
                Ok(false) => self.note_blocked(hv.now()),
                Err(_) => return Err(self.refuse(hv, frame, SendDrop::Broken)),
            }
        }
        if let Err(reason) = self.may_queue(hv, item.fragments.into()) {
            return Err(self.refuse(hv, frame, reason));
        }
        let item = Item {
            since: hv.now(),
            ..item
        };
        self.queue.push(item, frame.drain());
        self.counters.queued = self.counters.queued.wrapping_add(1);
        self.plan_poll(hv.now());
        Ok(Sent::Queued)
    }

    /// Whether a frame of so many pages may wait for the client.
    pub(crate) fn may_queue<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        pages: usize,
    ) -> Result<(), SendDrop> {
        self.check_stall(hv);
        if self.stalled {
            return Err(SendDrop::Stalled);
        }
        if !self.queue.fits(pages) {
            return Err(SendDrop::QueueFull);
        }
        if hv.free_pages() < QUEUE_RESERVED_PAGES {
            return Err(SendDrop::PoolLow);
        }
        Ok(())
    }

    /// Declares the client stalled if nothing could be sent for long, and lets go of what waits.
    fn check_stall<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) {
        let long = |since: Time| hv.now().since(since) >= STALL_AFTER;
        if self.stalled || !self.blocked_since.is_some_and(long) {
            return;
        }
        self.stalled = true;
        self.counters.stalls = self.counters.stalls.wrapping_add(1);
        let lost = u64::try_from(self.queue.len()).unwrap_or(u64::MAX);
        self.counters.send_drops.stalled = self.counters.send_drops.stalled.wrapping_add(lost);
        self.queue.clear(hv);
    }

    fn note_blocked(&mut self, now: Time) {
        self.blocked_since.get_or_insert(now);
    }

    /// Sends queued frames as far as the client has buffers, and drops those that waited too long.
    ///
    /// # Errors
    ///
    /// As [`Vif::receive`].
    pub fn flush<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
    ) -> Result<(), PeerError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.enter(batch);
        if self.queue.is_empty() {
            return Ok(());
        }
        let now = hv.now();
        while let Some(item) = self.queue.head()
            && now.since(item.since) >= QUEUE_EXPIRY
        {
            self.queue.drop_head(hv);
            self.counters.send_drops.expired = self.counters.send_drops.expired.wrapping_add(1);
        }
        self.send_queued(hv, batch)?;
        self.plan_poll(now);
        Ok(())
    }

    /// When to look for buffers again without being told.
    pub(crate) fn plan_poll(&mut self, now: Time) {
        let poll = !self.features.rx_notify && !self.queue.is_empty();
        self.next_poll = poll.then(|| now.plus(RX_POLL_INTERVAL));
    }

    /// Sends from the head of the queue as long as there are buffers and room in the batch.
    pub(crate) fn send_queued<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        batch: &mut Batch,
    ) -> Result<(), PeerError> {
        let now = hv.now();
        while let Some(item) = self.queue.head_mut() {
            item.impatient = item.segments.is_some() && now.since(item.since) >= SEGMENTS_PATIENCE;
            let item = *item;
            let needed = item.needed_slots();
            let all = self.has_buffers(needed)?;
            let some = item.impatient && self.rx_seen > 0;
            if !all && !some {
                self.note_blocked(now);
                break;
            }
            if !batch.fits_sending(item.most_ops(), item.fragments.into()) {
                break;
            }
            self.send_head(batch, needed.min(self.rx_seen));
        }
        Ok(())
    }

    /// Sends the frame at the head of the queue into `slots` slots.
    fn send_head(&mut self, batch: &mut Batch, slots: u32) {
        let (tag, peer) = (self.tag, self.peer);
        let mut out = Out {
            rx: &mut self.rx,
            batch,
            tag,
            peer,
        };
        let Some((item, fragments)) = self.queue.pop() else {
            return;
        };
        match item.segments {
            None => {
                let slots = out.send_frame(&item, fragments);
                self.count_sent(1, slots, item.len.into());
                self.counters.sent_gso = self
                    .counters
                    .sent_gso
                    .wrapping_add(item.gso.is_some().into());
            }
            Some(cut) => {
                let bytes = out.send_segments(&item, cut, fragments, slots);
                self.count_sent(slots.into(), slots, bytes);
                let lost = item.needed_slots().wrapping_sub(slots);
                let drops = &mut self.counters.send_drops;
                drops.segments_lost = drops.segments_lost.wrapping_add(lost.into());
            }
        }
    }

    /// Whether at least `needed` rx requests wait.
    pub(crate) fn has_buffers(&mut self, needed: u32) -> Result<bool, PeerError> {
        if self.rx_seen < needed {
            self.rx_seen = match self.rx.available() {
                Ok(available) => available,
                Err(_) => return Err(self.give_up(PeerError::ImpossibleProducer(Ring::Rx))),
            };
        }
        Ok(self.rx_seen >= needed)
    }

    fn out<'a>(&'a mut self, batch: &'a mut Batch) -> Out<'a> {
        Out {
            rx: &mut self.rx,
            batch,
            tag: self.tag,
            peer: self.peer,
        }
    }

    fn count_sent(&mut self, frames: u64, slots: u32, bytes: u64) {
        self.rx_seen = self.rx_seen.saturating_sub(slots);
        self.copies_tried = self.copies_tried.wrapping_add(slots);
        self.blocked_since = None;
        self.stalled = false;
        let counters = &mut self.counters;
        counters.sent_frames = counters.sent_frames.wrapping_add(frames);
        counters.sent_bytes = counters.sent_bytes.wrapping_add(bytes);
        counters.sent_slots = counters.sent_slots.wrapping_add(slots.into());
    }

    /// Drops a frame, and counts why.
    #[cold]
    pub(crate) fn refuse<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        reason: SendDrop,
    ) -> SendDrop {
        frame.release(hv);
        let drops = &mut self.counters.send_drops;
        let counter = match reason {
            SendDrop::NoScatterGather => &mut drops.no_scatter_gather,
            SendDrop::NoGso => &mut drops.no_gso,
            SendDrop::BadSegments => &mut drops.bad_segments,
            SendDrop::QueueFull => &mut drops.queue_full,
            SendDrop::Stalled => &mut drops.stalled,
            SendDrop::PoolLow => &mut drops.pool_low,
            SendDrop::Broken => &mut drops.broken,
        };
        *counter = counter.wrapping_add(1);
        reason
    }

    /// Answers a slot whose copy failed with an error; frontends drop the frame then.
    pub(crate) fn amend_sent(&mut self, slot: &Sending) {
        self.counters.send_copy_failed = self.counters.send_copy_failed.wrapping_add(1);
        self.copies_failed = self.copies_failed.wrapping_add(1);
        let response = RxResponse {
            id: slot.id,
            offset: 0,
            flags: slot.flags,
            status: status::ERROR,
        };
        self.rx.amend(slot.response, response.encode());
    }
}

/// A frame's description for the queue.
pub(crate) fn describe(frame: &Frame) -> Item {
    Item {
        len: u32::try_from(frame.len()).unwrap_or(u32::MAX),
        checksum: frame.checksum,
        gso: frame.gso,
        segments: None,
        header_pages: 0,
        fragments: u8::try_from(frame.fragments().len()).unwrap_or(u8::MAX),
        since: Time::default(),
        impatient: false,
    }
}

/// The flags that say this of a checksum. The bits stand the other way round than in tx.
pub(crate) const fn rx_flags(checksum: Checksum) -> u16 {
    match checksum {
        Checksum::Blank => RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
        Checksum::Validated => RxFlags::DATA_VALIDATED,
        Checksum::Unverified => 0,
    }
}

/// What it takes to fill rx slots. That there are enough of them was checked before.
pub(crate) struct Out<'a> {
    rx: &'a mut BackRing<MappedPage, RX_WORDS>,
    pub(crate) batch: &'a mut Batch,
    tag: VifTag,
    peer: DomId,
}

/// Where bytes are: a page of the batch and a byte offset in it.
pub(crate) type Place = (u16, u16);

impl Out<'_> {
    /// Consumes the next request and answers it with `len` bytes. Returns the buffer.
    pub(crate) fn open_slot(&mut self, len: u16, flags: u16) -> GrantRef {
        let request = RxRequest::decode(self.rx.request(0));
        let flags = RxFlags(flags);
        self.batch.add_sending(Sending {
            tag: self.tag,
            response: self.rx.produced(),
            first_op: self.batch.next_op(),
            id: request.id,
            flags,
        });
        self.rx.consume(1);
        let response = RxResponse {
            id: request.id,
            offset: 0,
            flags,
            status: len.cast_signed(),
        };
        self.rx.respond(response.encode());
        request.gref
    }

    /// Consumes the next request for an extra-info slot; its buffer stays unused.
    fn put_extra(&mut self, gso: Gso) {
        self.rx.consume(1);
        self.rx
            .respond(Extra::encode_gso(gso.size.get(), gso.family));
    }

    pub(crate) fn copy(&mut self, gref: GrantRef, peer_offset: u16, from: Place, len: u16) {
        self.batch.add_op(CopyOp {
            direction: CopyDirection::ToPeer,
            peer: self.peer,
            gref,
            peer_offset,
            page: from.0,
            offset: from.1,
            len,
            status: GrantStatus::NOT_DONE,
        });
    }

    /// Lays a frame out over as many slots as it needs. Returns how many, extras included.
    fn send_frame(&mut self, item: &Item, fragments: impl Iterator<Item = Fragment>) -> u32 {
        let mut flags = rx_flags(item.checksum);
        let mut rest = item.len;
        let (mut slots, mut gref, mut at) = (0u32, GrantRef(0), PAGE_LEN);
        for fragment in fragments {
            let (mut offset, mut left) = (fragment.offset(), fragment.len());
            let page = self.batch.add_page(fragment.into_page());
            while left > 0 {
                if at == PAGE_LEN {
                    let len = u16::try_from(rest).unwrap_or(PAGE_LEN).min(PAGE_LEN);
                    rest = rest.wrapping_sub(len.into());
                    if rest > 0 {
                        flags |= RxFlags::MORE_DATA;
                    }
                    let extra = item.gso.filter(|_| slots == 0);
                    if extra.is_some() {
                        flags |= RxFlags::EXTRA_INFO;
                    }
                    gref = self.open_slot(len, flags);
                    slots = slots.wrapping_add(1);
                    if let Some(gso) = extra {
                        self.put_extra(gso);
                        slots = slots.wrapping_add(1);
                    }
                    (flags, at) = (0, 0);
                }
                let len = left.min(PAGE_LEN.wrapping_sub(at));
                self.copy(gref, at, (page, offset), len);
                at = at.wrapping_add(len);
                offset = offset.wrapping_add(len);
                left = left.wrapping_sub(len);
            }
        }
        slots
    }
}
