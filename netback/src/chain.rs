//! One frame's tx slots: collected out of the ring and checked, as a pure function of what the client wrote.
//!
//! The order of the checks is that of `xen-netif.md` 4.1. Slots come as copies, each read once.

use xen::Gso;
use xen::netif::{Extra, ExtraKind, TX_WORDS, TxFlags, TxRequest};

use crate::batch::PAGE_LEN;
use crate::error::PeerError;
use crate::{FATAL_DATA_SLOTS, MAX_DATA_SLOTS, MAX_EXTRAS};

/// Slots that are looked at: one fewer than would be an attack.
const KEPT_SLOTS: usize = FATAL_DATA_SLOTS - 1;

/// The slots of one frame, as the client wrote them.
#[derive(Debug)]
pub(crate) struct Chain {
    /// All data slots; from [`Chain::check`] on, the first has its own length instead of the frame's.
    slots: heapless::Vec<TxRequest, KEPT_SLOTS>,
    /// Extra-info slots behind the first data slot.
    pub(crate) extras: u8,
    pub(crate) gso: Option<Gso>,
    /// It asks for a multicast filter, which was not offered.
    multicast: bool,
    /// The frame's length as the first slot has it.
    pub(crate) len: u16,
}

/// Why a frame is answered with an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    TooManySlots,
    InconsistentSizes,
    Multicast,
    TooShort,
    TooLong,
}

impl Chain {
    /// Collects the slots of the frame that starts with `first`; `request(n)` copies slot `n` of `available`.
    ///
    /// # Errors
    ///
    /// [`PeerError`] for what no correct frontend writes. At most 36 slots are read.
    pub(crate) fn collect(
        first: TxRequest,
        available: u32,
        request: impl Fn(u32) -> [u32; TX_WORDS],
    ) -> Result<Self, PeerError> {
        let mut chain = Self {
            slots: heapless::Vec::new(),
            extras: 0,
            gso: None,
            multicast: false,
            len: first.size,
        };
        let mut ahead = 1u32;
        let mut next = || {
            if ahead >= available {
                return Err(PeerError::IncompleteFrame);
            }
            let words = request(ahead);
            ahead = ahead.wrapping_add(1);
            Ok(words)
        };
        if first.flags.has(TxFlags::EXTRA_INFO) {
            chain.collect_extras(&mut next)?;
        }
        let mut slot = first;
        loop {
            let more = slot.flags.has(TxFlags::MORE_DATA);
            chain
                .slots
                .push(slot)
                .map_err(|_| PeerError::TooManySlots)?;
            if !more {
                return Ok(chain);
            }
            slot = TxRequest::decode(next()?);
        }
    }

    /// Reads extra-info slots as long as each says that another follows.
    fn collect_extras(
        &mut self,
        next: &mut impl FnMut() -> Result<[u32; TX_WORDS], PeerError>,
    ) -> Result<(), PeerError> {
        let mut seen = 0u8;
        loop {
            if usize::from(self.extras) == MAX_EXTRAS {
                return Err(PeerError::TooManyExtras);
            }
            let [head, payload, _] = next()?;
            let extra = Extra::decode(head, payload);
            self.extras = self.extras.wrapping_add(1);
            let kind = match extra.kind {
                ExtraKind::Gso { size, family } => {
                    let size = core::num::NonZeroU16::new(size);
                    let (Some(size), Some(family)) = (size, family) else {
                        return Err(PeerError::BadGso);
                    };
                    self.gso = Some(Gso { size, family });
                    1
                }
                ExtraKind::Ignored(kind) => {
                    self.multicast |= matches!(kind, 2 | 3);
                    kind
                }
                ExtraKind::Unknown(kind) => return Err(PeerError::UnknownExtra(kind)),
            };
            let bit = 1u8.checked_shl(u32::from(kind)).unwrap_or(0);
            if seen & bit != 0 {
                return Err(PeerError::DuplicateExtra(kind));
            }
            seen |= bit;
            if !extra.more {
                return Ok(());
            }
        }
    }

    /// Checks the frame as a whole; `max_plain` is the longest frame without GSO.
    ///
    /// # Errors
    ///
    /// The outer [`PeerError`] ends the vif; the inner [`Refusal`] only answers the frame with an error.
    pub(crate) fn check(&mut self, max_plain: u16) -> Result<Result<(), Refusal>, PeerError> {
        if self.slots.len() > MAX_DATA_SLOTS {
            return Ok(Err(Refusal::TooManySlots));
        }
        let mut rest = self.len;
        for slot in self.slots.iter().skip(1) {
            match rest.checked_sub(slot.size) {
                Some(less) => rest = less,
                None => return Ok(Err(Refusal::InconsistentSizes)),
            }
        }
        if let Some(first) = self.slots.first_mut() {
            first.size = rest;
        }
        if self.slots.iter().any(crosses_page) {
            return Err(PeerError::CrossesPage);
        }
        Ok(if self.multicast {
            Err(Refusal::Multicast)
        } else {
            check_len(self.len, self.gso.is_some(), max_plain)
        })
    }

    /// The data slots.
    pub(crate) fn slots(&self) -> &[TxRequest] {
        &self.slots
    }

    /// How many of them: 1 to 32.
    pub(crate) fn data_slots(&self) -> u8 {
        u8::try_from(self.slots.len()).unwrap_or(u8::MAX)
    }

    /// All slots of the frame, extras included.
    pub(crate) fn all_slots(&self) -> u32 {
        u32::from(self.data_slots()).wrapping_add(u32::from(self.extras))
    }
}

/// Whether a slot's data leaves its page.
pub(crate) fn crosses_page(slot: &TxRequest) -> bool {
    u32::from(slot.offset).wrapping_add(u32::from(slot.size)) > u32::from(PAGE_LEN)
}

/// Whether a frame's length is one that is taken in.
pub(crate) fn check_len(len: u16, gso: bool, max_plain: u16) -> Result<(), Refusal> {
    if usize::from(len) < xen::packet::MIN_FRAME_LEN {
        Err(Refusal::TooShort)
    } else if !gso && len > max_plain {
        Err(Refusal::TooLong)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use xen::GrantRef;
    use xen::netif::GsoType;

    use super::*;

    const MORE: u16 = TxFlags::MORE_DATA;
    const EXTRA: u16 = TxFlags::EXTRA_INFO;

    fn slot(size: u16, flags: u16) -> TxRequest {
        TxRequest {
            gref: GrantRef(1),
            offset: 0,
            flags: TxFlags(flags),
            id: 7,
            size,
        }
    }

    /// Collects from a ring that holds `slots`, counting how many are read.
    fn collect(slots: &[[u32; TX_WORDS]], available: u32) -> (Result<Chain, PeerError>, u32) {
        let reads = Cell::new(1);
        let first = TxRequest::decode(slots[0]);
        let chain = Chain::collect(first, available, |ahead| {
            reads.set(reads.get() + 1);
            slots[ahead as usize]
        });
        (chain, reads.get())
    }

    #[test]
    fn a_chain_is_read_to_its_end_and_no_further() {
        let slots = [
            slot(300, MORE | EXTRA).encode(),
            [u32::from_le_bytes([1, 0, 0xa8, 0x05]), 2, 0],
            slot(100, MORE).encode(),
            slot(50, 0).encode(),
            slot(9, 0).encode(),
        ];
        let (chain, reads) = collect(&slots, 5);
        let mut chain = chain.unwrap();
        assert_eq!(reads, 4);
        assert_eq!(
            (chain.data_slots(), chain.extras, chain.all_slots()),
            (3, 1, 4)
        );
        let gso = chain.gso.unwrap();
        assert_eq!((gso.size.get(), gso.family), (1448, GsoType::TcpV6));
        assert_eq!(chain.check(1518), Ok(Ok(())));
        let sizes: heapless::Vec<u16, 4> = chain.slots().iter().map(|slot| slot.size).collect();
        assert_eq!(
            sizes,
            [150, 100, 50],
            "the first slot keeps what the others leave"
        );
    }

    #[test]
    fn a_chain_that_goes_on_behind_the_published_slots_is_incomplete() {
        let slots = [slot(300, MORE).encode(), slot(100, 0).encode()];
        let (chain, reads) = collect(&slots, 1);
        assert_eq!(chain.unwrap_err(), PeerError::IncompleteFrame);
        assert_eq!(reads, 1, "what is not published is not read");
    }

    #[test]
    fn a_chain_without_end_is_read_for_33_slots() {
        let slots = [slot(1, MORE).encode(); 256];
        let (chain, reads) = collect(&slots, 256);
        assert_eq!(chain.unwrap_err(), PeerError::TooManySlots);
        assert_eq!(reads, 33);
    }

    #[test]
    fn refusals_come_in_the_order_of_the_specification() {
        let refusal = |slots: &[[u32; TX_WORDS]]| {
            let (chain, _) = collect(slots, 256);
            chain.unwrap().check(1518)
        };
        // Too many slots before inconsistent sizes, and both before a fragment that leaves its page.
        let crossing = |flags| TxRequest {
            offset: 4095,
            ..slot(60, flags)
        };
        let mut slots = [crossing(MORE).encode(); 20];
        slots[19] = crossing(0).encode();
        assert_eq!(refusal(&slots), Ok(Err(Refusal::TooManySlots)));
        let slots = [slot(120, MORE).encode(), crossing(0).encode()];
        assert_eq!(refusal(&slots), Err(PeerError::CrossesPage));
        let slots = [slot(50, MORE).encode(), crossing(0).encode()];
        assert_eq!(refusal(&slots), Ok(Err(Refusal::InconsistentSizes)));
        assert_eq!(refusal(&[slot(13, 0).encode()]), Ok(Err(Refusal::TooShort)));
        assert_eq!(
            refusal(&[slot(1519, 0).encode()]),
            Ok(Err(Refusal::TooLong))
        );
    }
}
