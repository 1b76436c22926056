//! To the netvm: frames are granted, page by page, and come back when they are answered.
//!
//! A page is granted read-only just before its request is written, cleared of everything but the frame. Its id names
//! it until the answer: only an id that is in flight is accepted, and each answer ends it.

use xen::netif::{Extra, TxFlags, TxRequest, TxResponse, status};
use xen::packet::{MAX_FRAGMENTS, Segments};
use xen::{Access, Checksum, Fragment, Frame, GrantRef, Gso, Hypervisor, Page};

use crate::error::{DeviceBroken, TxError};
use crate::uplink::Uplink;
use crate::{MAX_SEGMENTS, SWEEP_INTERVAL};

/// A granted piece of a frame, ready to be written into a slot.
#[derive(Clone, Copy)]
struct Slot {
    gref: GrantRef,
    id: u8,
    offset: u16,
    len: u16,
}

impl Uplink {
    /// Hands a frame to the netvm by granting its pages, read-only, until it answers.
    ///
    /// # Errors
    ///
    /// [`TxError`], counted; it says whether the frame is still in the container.
    pub fn send<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Result<(), TxError> {
        let flags = tx_flags(frame.checksum);
        if self.failed.is_none()
            && self.tx.free() > 0
            && frame.gso.is_none()
            && let Some(fragment) = frame.take_single()
        {
            return self.send_single(hv, fragment, flags);
        }
        self.send_fragments(hv, frame, flags)
    }

    /// Sends a frame of one slot: nearly all of them.
    fn send_single<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        fragment: Fragment,
        flags: u16,
    ) -> Result<(), TxError> {
        if self.next_sweep.is_none() {
            self.plan_sweep(hv.now(), true);
        }
        match self.grant(hv, fragment) {
            Ok(slot) => {
                self.request(slot, slot.len, flags);
                self.count_sent(1, slot.len.into());
                Ok(())
            }
            Err(page) => {
                hv.release(page);
                Err(self.note_no_resources())
            }
        }
    }

    /// Sends any other frame, or says why not. Not inlined, so that frames of one slot do not pay for its locals.
    #[inline(never)]
    fn send_fragments<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        flags: u16,
    ) -> Result<(), TxError> {
        let fragments = frame.fragments().len();
        if self.failed.is_some() || fragments == 0 {
            return Err(TxError::Broken);
        }
        if fragments > 1 && !self.features.sg {
            return Err(TxError::NoScatterGather);
        }
        if let Some(gso) = frame.gso
            && !self.features.takes(gso.family)
        {
            return Err(TxError::NoGso);
        }
        let needed = fragments.wrapping_add(usize::from(frame.gso.is_some()));
        if self.tx_free_slots() < needed {
            return Err(self.note_full());
        }
        if self.next_sweep.is_none() {
            self.plan_sweep(hv.now(), true);
        }
        let (len, gso) = (frame.len(), frame.gso);
        let total = u16::try_from(len).unwrap_or(u16::MAX);
        let mut slots: heapless::Vec<Slot, MAX_FRAGMENTS> = heapless::Vec::new();
        let mut fragments = frame.drain();
        let mut granted = true;
        // Everything is granted before anything is written: a request cannot be taken back.
        while granted && let Some(fragment) = fragments.next() {
            match self.grant(hv, fragment) {
                // A frame has no more fragments than there are places.
                Ok(slot) => granted = slots.push(slot).is_ok(),
                Err(page) => {
                    hv.release(page);
                    granted = false;
                }
            }
        }
        if !granted {
            for fragment in fragments {
                hv.release(fragment.into_page());
            }
            for slot in slots {
                self.take_back(hv, slot.id);
            }
            return Err(self.note_no_resources());
        }
        self.write_slots(&slots, total, flags, gso);
        self.count_sent(slots.len(), len);
        Ok(())
    }

    /// Writes the requests of a frame: the first has the frame's length, an extra follows it at once.
    fn write_slots(&mut self, slots: &[Slot], total: u16, flags: u16, gso: Option<Gso>) {
        let last = slots.len().wrapping_sub(1);
        for (index, slot) in slots.iter().enumerate() {
            let more = if index < last { TxFlags::MORE_DATA } else { 0 };
            if index > 0 {
                self.request(*slot, slot.len, more);
                continue;
            }
            let extra = if gso.is_some() {
                TxFlags::EXTRA_INFO
            } else {
                0
            };
            self.request(*slot, total, flags | more | extra);
            if let Some(gso) = gso {
                let [head, payload] = Extra::encode_gso(gso.size.get(), gso.family);
                self.tx.request([head, payload, 0]);
                self.extras_in_flight = self.extras_in_flight.wrapping_add(1);
                self.counters.sent_gso = self.counters.sent_gso.wrapping_add(1);
                self.counters.sent_slots = self.counters.sent_slots.wrapping_add(1);
            }
        }
    }

    /// Clears what is not frame, grants the page, and gives it an id.
    fn grant<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        fragment: Fragment,
    ) -> Result<Slot, Page> {
        let (offset, len) = (fragment.offset(), fragment.len());
        let mut page = fragment.into_page();
        let Some(id) = self.free_ids.pop() else {
            return Err(page);
        };
        let start = usize::from(offset);
        page.clear_for(self.backend, start..start.wrapping_add(usize::from(len)));
        match hv.grant(self.backend, page, Access::ReadOnly) {
            Ok(granted) => {
                let gref = granted.gref();
                if let Some(place) = self.in_flight.get_mut(usize::from(id)) {
                    *place = Some(granted);
                }
                Ok(Slot {
                    gref,
                    id,
                    offset,
                    len,
                })
            }
            Err(page) => {
                self.free_ids.push(id);
                Err(page)
            }
        }
    }

    fn request(&mut self, slot: Slot, size: u16, flags: u16) {
        let request = TxRequest {
            gref: slot.gref,
            offset: slot.offset,
            flags: TxFlags(flags),
            id: slot.id.into(),
            size,
        };
        self.tx.request(request.encode());
    }

    /// Takes back a page that was granted for a request that will not be written.
    fn take_back<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, id: u8) {
        let granted = self.in_flight.get_mut(usize::from(id));
        if let Some(granted) = granted.and_then(Option::take) {
            self.free_ids.push(id);
            self.quarantine.take_back(hv, granted);
        }
    }

    /// Sends a GSO frame as segments to a netvm that does not take GSO. `write_header(k, header)` writes the header of
    /// segment `k`, of exactly `segments.header_len` bytes.
    ///
    /// Payload is copied by the CPU: the netvm sees whole pages, so each segment needs one of its own. Only backends
    /// without GSO (not Linux's) cost this.
    ///
    /// # Errors
    ///
    /// [`TxError`], counted; it says whether the frame is still in the container. With [`TxError::NoResources`] some
    /// of the segments may have been sent.
    pub fn send_segments<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        segments: Segments,
        mut write_header: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), TxError> {
        if self.failed.is_some() || frame.is_empty() {
            return Err(TxError::Broken);
        }
        let count = segments.checked_count(frame.len(), MAX_SEGMENTS);
        let count = count.ok_or(TxError::BadSegments)?;
        if self.tx_free_slots() < count {
            return Err(self.note_full());
        }
        self.counters.segmented = self.counters.segmented.wrapping_add(1);
        let mut segment = Frame::new();
        for number in 0..count {
            let made = make_segment(hv, frame, segments, number, &mut segment, &mut write_header);
            if !made {
                frame.release(hv);
                return Err(self.note_no_resources());
            }
            if let Err(error) = self.send(hv, &mut segment) {
                segment.release(hv);
                frame.release(hv);
                return Err(error);
            }
        }
        frame.release(hv);
        Ok(())
    }

    /// Takes back the pages of frames that the netvm has answered. Returns how many slots came free.
    ///
    /// # Errors
    ///
    /// As [`Uplink::receive`].
    pub fn reclaim<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> Result<u32, DeviceBroken> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let available = self.tx.available();
        let available = available.map_err(|_| self.give_up(DeviceBroken::TxProducer))?;
        for ahead in 0..available {
            let response = TxResponse::decode(self.tx.response(ahead));
            self.complete(hv, response)?;
        }
        self.tx.consume(available);
        if self.tx.outstanding() == 0 {
            self.next_sweep = None;
            self.sweep_interval = SWEEP_INTERVAL;
        } else if available > 0 || self.next_sweep.is_some() {
            self.plan_sweep(hv.now(), available > 0);
        }
        Ok(available)
    }

    /// Ends what a response answers.
    fn complete<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        response: TxResponse,
    ) -> Result<(), DeviceBroken> {
        if response.status == status::NULL {
            // An extra has no id, so all that can be checked is how many there were.
            let left = self.extras_in_flight.checked_sub(1);
            let left = left.ok_or_else(|| self.give_up(DeviceBroken::TxExtra))?;
            self.extras_in_flight = left;
            return Ok(());
        }
        let granted = self.in_flight.get_mut(usize::from(response.id));
        let Some(granted) = granted.and_then(Option::take) else {
            return Err(self.give_up(DeviceBroken::TxId(response.id)));
        };
        // Only ids below 256 are in flight.
        self.free_ids.push(response.id.to_le_bytes()[0]);
        if response.status != status::OKAY {
            self.counters.send_errors = self.counters.send_errors.wrapping_add(1);
        }
        match hv.revoke(granted) {
            Ok(page) => {
                hv.release(page);
                Ok(())
            }
            Err(granted) => self.put_aside(granted),
        }
    }

    fn count_sent(&mut self, slots: usize, bytes: usize) {
        let counters = &mut self.counters;
        counters.sent_frames = counters.sent_frames.wrapping_add(1);
        counters.sent_slots = counters.sent_slots.wrapping_add(slots as u64);
        counters.sent_bytes = counters.sent_bytes.wrapping_add(bytes as u64);
    }

    #[cold]
    const fn note_full(&mut self) -> TxError {
        self.counters.send_full = self.counters.send_full.wrapping_add(1);
        TxError::Full
    }

    #[cold]
    const fn note_no_resources(&mut self) -> TxError {
        self.counters.send_no_grants = self.counters.send_no_grants.wrapping_add(1);
        TxError::NoResources
    }
}

/// Puts segment `number` of `frame` into a page of its own. Returns whether there was one.
fn make_segment<H: Hypervisor + ?Sized>(
    hv: &mut H,
    frame: &Frame,
    segments: Segments,
    number: usize,
    segment: &mut Frame,
    write_header: &mut impl FnMut(usize, &mut [u8]),
) -> bool {
    let Some(mut page) = hv.allocate() else {
        return false;
    };
    let header_len = usize::from(segments.header_len);
    let payload_len = usize::from(segments.payload_len);
    let start = header_len.wrapping_add(number.wrapping_mul(payload_len));
    let rest = frame.len().saturating_sub(start).min(payload_len);
    let len = header_len.wrapping_add(rest);
    let (header, payload) = page.bytes_mut(0..len).split_at_mut(header_len.min(len));
    write_header(number, header);
    frame.copy_to(start, payload);
    segment.checksum = segments.checksum;
    match segment.push(page, 0, u16::try_from(len).unwrap_or(0)) {
        Ok(()) => true,
        Err(page) => {
            hv.release(page);
            false
        }
    }
}

/// The flags that say this of a checksum. The bits stand the other way round than in rx.
const fn tx_flags(checksum: Checksum) -> u16 {
    match checksum {
        Checksum::Blank => TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED,
        Checksum::Validated => TxFlags::DATA_VALIDATED,
        Checksum::Unverified => 0,
    }
}
