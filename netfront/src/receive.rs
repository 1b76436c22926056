//! From the netvm: rx responses to frames, and buffers back to it.
//!
//! A response belongs to the buffer that was posted in its slot, whatever id it has. Every buffer of a frame is revoked
//! before a byte of it is looked at; those of a bad frame, of extras and of empty slots are posted again, each once.

use core::num::NonZeroU16;

use xen::netif::{Extra, ExtraKind, RxFlags, RxRequest, RxResponse};
use xen::packet::{HEADER_LEN, MIN_FRAME_LEN};
use xen::{Access, Checksum, Frame, Gso, Hypervisor, Page};

use crate::RESERVED_PAGES;
use crate::error::DeviceBroken;
use crate::uplink::Uplink;

/// Why a frame is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flaw {
    Status,
    CrossesPage,
    TooLong,
    TooShort,
    Incomplete,
    Extra,
    Held,
}

/// A frame of several slots, while it is collected.
struct Collected {
    /// Slots looked at.
    slots: u32,
    gso: Option<Gso>,
    /// The first mistake in it. The rest of the chain is consumed all the same.
    flaw: Option<Flaw>,
}

impl Collected {
    fn note(&mut self, flaw: Flaw) {
        self.flaw.get_or_insert(flaw);
    }
}

impl Uplink {
    /// Puts the next received frame into `frame`. Returns whether there was one.
    ///
    /// What `frame` held before goes back to the pool. Bad frames are skipped and counted.
    ///
    /// # Errors
    ///
    /// [`DeviceBroken`] at the first thing that no correct backend does, now or in an earlier call: disconnect.
    /// `frame` is empty then.
    pub fn receive<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
    ) -> Result<bool, DeviceBroken> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if !frame.is_empty() {
            frame.release(hv);
        }
        // Ends: each turn consumes a response, and there are no more of them than posted buffers.
        loop {
            if self.rx_seen == 0 {
                let available = self.rx.available();
                self.rx_seen = available.map_err(|_| self.give_up(DeviceBroken::RxProducer))?;
                if self.rx_seen == 0 {
                    return Ok(false);
                }
            }
            let first = RxResponse::decode(self.rx.response(0));
            let linked = RxFlags::MORE_DATA | RxFlags::EXTRA_INFO | RxFlags::GSO_PREFIX;
            let flaw = if first.flags.has(linked) {
                self.receive_chain(hv, frame, first)?
            } else {
                self.receive_single(hv, frame, first)?
            };
            match flaw {
                None => {
                    self.count_received(frame);
                    return Ok(true);
                }
                Some(flaw) => self.drop_frame(hv, frame, flaw),
            }
        }
    }

    /// Takes a frame of one slot: nearly all of them.
    fn receive_single<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        response: RxResponse,
    ) -> Result<Option<Flaw>, DeviceBroken> {
        let page = self.take_buffer(hv, 0, response.id);
        self.consume(1);
        let Some(page) = page? else {
            return Ok(Some(Flaw::Held));
        };
        if let Err((page, flaw)) = add_data(frame, page, response) {
            self.recycle(hv, page);
            return Ok(Some(flaw));
        }
        if frame.len() < MIN_FRAME_LEN {
            return Ok(Some(Flaw::TooShort));
        }
        frame.checksum = checksum_of(response.flags);
        Ok(None)
    }

    /// Takes a frame of several slots, all of it, also when it is bad.
    ///
    /// Not inlined, so that frames of one slot do not pay for its locals.
    #[inline(never)]
    fn receive_chain<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        first: RxResponse,
    ) -> Result<Option<Flaw>, DeviceBroken> {
        let mut chain = Collected {
            slots: 0,
            gso: None,
            flaw: None,
        };
        if first.flags.has(RxFlags::GSO_PREFIX) {
            chain.note(Flaw::Extra);
        }
        let collected = self.collect(hv, frame, first, &mut chain);
        self.consume(chain.slots);
        if let Err(error) = collected {
            frame.release(hv);
            return Err(error);
        }
        if frame.len() < MIN_FRAME_LEN {
            chain.note(Flaw::TooShort);
        }
        if chain.flaw.is_some() {
            return Ok(chain.flaw);
        }
        frame.linearize(hv, HEADER_LEN);
        frame.gso = chain.gso;
        frame.checksum = checksum_of(first.flags);
        if frame.gso.is_some() && frame.checksum != Checksum::Blank {
            frame.checksum = Checksum::Blank;
            self.counters.gso_without_blank = self.counters.gso_without_blank.wrapping_add(1);
        }
        Ok(None)
    }

    fn collect<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        frame: &mut Frame,
        first: RxResponse,
        chain: &mut Collected,
    ) -> Result<(), DeviceBroken> {
        let mut response = first;
        loop {
            let page = self.take_buffer(hv, chain.slots, response.id);
            chain.slots = chain.slots.wrapping_add(1);
            match page? {
                None => chain.note(Flaw::Held),
                // A slot without data in the middle of a frame is legal.
                Some(page) if response.status == 0 => self.recycle(hv, page),
                Some(page) => {
                    if let Err((page, flaw)) = add_data(frame, page, response) {
                        chain.note(flaw);
                        self.recycle(hv, page);
                    }
                }
            }
            if chain.slots == 1 && first.flags.has(RxFlags::EXTRA_INFO) {
                self.collect_extras(hv, chain)?;
            }
            if !response.flags.has(RxFlags::MORE_DATA) {
                return Ok(());
            }
            if chain.slots >= self.rx_seen {
                chain.note(Flaw::Incomplete);
                return Ok(());
            }
            response = RxResponse::decode(self.rx.response(chain.slots));
        }
    }

    /// Reads extra-info slots as long as each says that another follows; their buffers are unused.
    fn collect_extras<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        chain: &mut Collected,
    ) -> Result<(), DeviceBroken> {
        loop {
            if chain.slots >= self.rx_seen {
                chain.note(Flaw::Incomplete);
                return Ok(());
            }
            let [head, payload] = self.rx.response(chain.slots);
            let extra = Extra::decode(head, payload);
            let posted = self.take_posted(hv, chain.slots);
            chain.slots = chain.slots.wrapping_add(1);
            match posted? {
                None => chain.note(Flaw::Held),
                Some(page) => self.recycle(hv, page),
            }
            match extra.kind {
                ExtraKind::Gso { size, family } => {
                    match (NonZeroU16::new(size), family, chain.gso) {
                        (Some(size), Some(family), None) => chain.gso = Some(Gso { size, family }),
                        _ => chain.note(Flaw::Extra),
                    }
                }
                ExtraKind::Ignored(_) => {}
                ExtraKind::Unknown(_) => chain.note(Flaw::Extra),
            }
            if !extra.more {
                return Ok(());
            }
        }
    }

    /// Takes the buffer of the response `ahead` places after the next; `None` if the netvm still holds it.
    fn take_buffer<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        ahead: u32,
        id: u16,
    ) -> Result<Option<Page>, DeviceBroken> {
        if u32::from(id) != self.rx.response_slot(ahead) {
            let mismatches = &mut self.counters.receive_id_mismatches;
            *mismatches = mismatches.wrapping_add(1);
        }
        self.take_posted(hv, ahead)
    }

    fn take_posted<H: Hypervisor + ?Sized>(
        &mut self,
        hv: &mut H,
        ahead: u32,
    ) -> Result<Option<Page>, DeviceBroken> {
        let slot = usize::try_from(self.rx.response_slot(ahead)).unwrap_or(usize::MAX);
        let Some(granted) = self.posted.get_mut(slot).and_then(Option::take) else {
            return Err(self.give_up(DeviceBroken::RxSlot));
        };
        match hv.revoke(granted) {
            Ok(page) => Ok(Some(page)),
            Err(granted) => self.put_aside(granted).map(|()| None),
        }
    }

    fn consume(&mut self, slots: u32) {
        self.rx.consume(slots);
        self.rx_seen = self.rx_seen.saturating_sub(slots);
        self.counters.received_slots = self.counters.received_slots.wrapping_add(slots.into());
    }

    /// Keeps a page that was received here and copied onwards, to be posted again; others go to the pool.
    pub fn recycle<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, page: Page) {
        let spare = u32::try_from(self.spare.len()).unwrap_or(u32::MAX);
        if self.rx.outstanding().saturating_add(spare) < self.rx_wanted {
            self.spare.push(page);
        } else {
            hv.release(page);
        }
    }

    /// Posts receive buffers until as many are posted as wanted. Returns how many were posted.
    pub fn refill<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> u32 {
        if self.failed.is_some() {
            return 0;
        }
        let wanted = self.rx_wanted.saturating_sub(self.rx.outstanding());
        for posted in 0..wanted {
            if !self.post(hv) {
                self.counters.refill_short = self.counters.refill_short.wrapping_add(1);
                return posted;
            }
        }
        wanted
    }

    /// Clears a page, grants it for writing and posts it. Returns whether there were a page and a reference.
    fn post<H: Hypervisor + ?Sized>(&mut self, hv: &mut H) -> bool {
        let page = self.spare.pop().or_else(|| {
            let enough = hv.free_pages() > RESERVED_PAGES;
            enough.then(|| hv.allocate()).flatten()
        });
        let Some(mut page) = page else {
            return false;
        };
        page.clear_for(self.backend, 0..0);
        match hv.grant(self.backend, page, Access::ReadWrite) {
            Ok(granted) => {
                let slot = self.rx.next_slot();
                let request = RxRequest {
                    id: u16::try_from(slot).unwrap_or(u16::MAX),
                    gref: granted.gref(),
                };
                self.rx.request(request.encode());
                let slot = usize::try_from(slot).unwrap_or(usize::MAX);
                if let Some(place) = self.posted.get_mut(slot) {
                    *place = Some(granted);
                }
                true
            }
            Err(page) => {
                self.recycle(hv, page);
                false
            }
        }
    }

    fn count_received(&mut self, frame: &Frame) {
        let counters = &mut self.counters;
        counters.received_frames = counters.received_frames.wrapping_add(1);
        counters.received_bytes = counters.received_bytes.wrapping_add(frame.len() as u64);
        counters.received_gso = counters
            .received_gso
            .wrapping_add(frame.gso.is_some().into());
    }

    /// Posts the pages of a bad frame again, and counts it.
    #[cold]
    fn drop_frame<H: Hypervisor + ?Sized>(&mut self, hv: &mut H, frame: &mut Frame, flaw: Flaw) {
        for fragment in frame.drain() {
            self.recycle(hv, fragment.into_page());
        }
        let drops = &mut self.counters.receive_drops;
        let counter = match flaw {
            Flaw::Status => &mut drops.status,
            Flaw::CrossesPage => &mut drops.crosses_page,
            Flaw::TooLong => &mut drops.too_long,
            Flaw::TooShort => &mut drops.too_short,
            Flaw::Incomplete => &mut drops.incomplete,
            Flaw::Extra => &mut drops.extra,
            Flaw::Held => &mut drops.held,
        };
        *counter = counter.wrapping_add(1);
    }
}

/// Adds a slot's data to a frame.
fn add_data(frame: &mut Frame, page: Page, response: RxResponse) -> Result<(), (Page, Flaw)> {
    let Ok(len) = u16::try_from(response.status) else {
        return Err((page, Flaw::Status));
    };
    if len == 0 {
        return Err((page, Flaw::TooShort));
    }
    if u32::from(response.offset).wrapping_add(len.into()) > 4096 {
        return Err((page, Flaw::CrossesPage));
    }
    // What is left is a frame of too many fragments or bytes.
    frame
        .push(page, response.offset, len)
        .map_err(|page| (page, Flaw::TooLong))
}

/// What the flags of a frame's first slot say of its checksum.
const fn checksum_of(flags: RxFlags) -> Checksum {
    if flags.has(RxFlags::CSUM_BLANK) {
        Checksum::Blank
    } else if flags.has(RxFlags::DATA_VALIDATED) {
        Checksum::Validated
    } else {
        Checksum::Unverified
    }
}
