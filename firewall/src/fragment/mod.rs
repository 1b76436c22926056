//! Reassembly of fragmented datagrams within fixed bounds.
//!
//! A datagram is judged whole: fragments are copied into blocks ([`blocks`]) until none is
//! missing, then put together in one buffer. Every interface may use a share of the blocks; when its
//! share or the memory is used up, a datagram makes room: the oldest of the same interface if it is
//! over its share, else the oldest of the interface that uses most. Fragments that overlap end their
//! datagram; exact repetitions are ignored. What is not complete in time is forgotten silently, because
//! a router sends no error for it.
//!
//! Trust: fragments hold anything. Offsets and lengths are checked before a byte is copied.
//!
//! Source: RFC 791, RFC 8200 4.5, RFC 5722 (overlaps), RFC 6946; `qubes-policy.md` 3.8.

mod blocks;
mod datagram;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::address::Address;
use crate::frame::{ClientId, Iface, Time};
use crate::rule::Family;
use crate::verdict::DropReason;
use crate::wire::ipv4::{self, Fragment, Network};
use crate::wire::{ethernet, put_u16};

use blocks::{BLOCK, Blocks, NONE};
use datagram::{Datagram, Identity, MAX_HEADER};

/// Most datagrams that wait at once.
const MAX_DATAGRAMS: usize = 256;

/// Largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// What became of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It waits for the others.
    Held,
    /// It was the last one that was missing.
    Complete(Complete),
    /// It cannot be kept.
    Refused(DropReason),
}

/// A datagram that is put together in [`Reassembly::buffer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Complete {
    /// Bytes of the Ethernet frame.
    pub(crate) len: usize,
    /// The largest fragment, in bytes of IP packet.
    pub(crate) largest: u16,
}

/// The datagrams under way.
#[derive(Debug)]
pub(crate) struct Reassembly {
    blocks: Blocks,
    /// Blocks in use by interface; the uplink is the last one.
    used: Box<[u16]>,
    datagrams: Box<[Option<Datagram>]>,
    waiting: usize,
    /// The frame that was put together last, in memory that was reserved for the largest one.
    pub(crate) buffer: Vec<u8>,
    /// Datagrams that were given up for lack of room since this was last read.
    pub(crate) abandoned: u64,
}

/// A fragment that was checked to fit together.
struct Piece<'a> {
    offset: u16,
    more: bool,
    payload: &'a [u8],
}

impl Reassembly {
    /// Reassembly for `vifs` clients and the uplink in about `bytes` bytes.
    pub(crate) fn new(bytes: u32, vifs: u16) -> Self {
        Self {
            blocks: Blocks::new(bytes),
            used: vec![0; usize::from(vifs) + 1].into_boxed_slice(),
            datagrams: vec![None; MAX_DATAGRAMS].into_boxed_slice(),
            waiting: 0,
            buffer: Vec::with_capacity(MAX_HEADER + MAX_DATAGRAM),
            abandoned: 0,
        }
    }

    /// The number of an interface in the accounts.
    fn account(&self, ingress: Iface) -> u16 {
        let uplink = u16::try_from(self.used.len().saturating_sub(1)).unwrap_or(0);
        match ingress {
            Iface::Uplink => uplink,
            Iface::Client(ClientId(id)) => id.min(uplink),
        }
    }

    /// Blocks that one interface may use: at least a datagram of the largest size.
    fn share(&self, account: u16) -> u16 {
        let all = self.blocks.capacity();
        let uplink = usize::from(account) + 1 == self.used.len();
        let part = if uplink { all / 2 } else { all / 4 };
        part.max(
            u16::try_from(MAX_DATAGRAM / BLOCK + 64)
                .unwrap_or(NONE)
                .min(all),
        )
    }

    /// Adds a fragment whose packet starts at `head[14]`.
    pub(crate) fn add<A: Address>(
        &mut self,
        ingress: Iface,
        head: &[u8],
        network: &Network<A>,
        fragment: Fragment,
        now: Time,
    ) -> Added {
        const REFUSED: Added = Added::Refused(DropReason::FragmentMalformed);
        let start = ethernet::HEADER + usize::from(network.header_len);
        let end = ethernet::HEADER + usize::try_from(network.total_len).unwrap_or(usize::MAX);
        let Some(payload) = head.get(start..end) else {
            return REFUSED;
        };
        let last = usize::from(fragment.offset) + payload.len();
        let uneven = fragment.more && payload.len() % 8 != 0;
        let limit = MAX_DATAGRAM - usize::from(network.header_len);
        let long_header = usize::from(network.header_len) + ethernet::HEADER > MAX_HEADER;
        if payload.is_empty() || uneven || last > limit || long_header {
            return REFUSED;
        }
        let identity = Identity::of(self.account(ingress), network, fragment);
        let piece = Piece {
            offset: fragment.offset,
            more: fragment.more,
            payload,
        };
        let Some(at) = self.find_or_make(identity, now) else {
            return Added::Refused(DropReason::FragmentLimit);
        };
        match self.fit(at, &piece) {
            Fit::New(after) => {
                if let Err(reason) = self.store(at, &piece, after, now) {
                    return Added::Refused(reason);
                }
            }
            Fit::Repeated => return Added::Held,
            Fit::Contradiction => {
                self.forget(at);
                self.abandoned += 1;
                return Added::Refused(DropReason::FragmentOverlap);
            }
        }
        if let Some(own) = self.datagram_mut(at) {
            own.note(head, network, fragment, payload.len());
        }
        self.finish_if_complete::<A>(at)
    }

    fn datagram(&self, at: usize) -> Option<&Datagram> {
        self.datagrams.get(at)?.as_ref()
    }

    fn datagram_mut(&mut self, at: usize) -> Option<&mut Datagram> {
        self.datagrams.get_mut(at)?.as_mut()
    }

    fn find_or_make(&mut self, identity: Identity, now: Time) -> Option<usize> {
        let found = self
            .datagrams
            .iter()
            .position(|own| own.as_ref().is_some_and(|own| own.identity == identity));
        if let Some(at) = found {
            if self.datagram(at)?.expires > now {
                return Some(at);
            }
            self.forget(at);
            self.abandoned += 1;
        }
        let free = self.datagrams.iter().position(Option::is_none);
        let at = match free {
            Some(at) => at,
            None => {
                let victim = self.oldest_of(identity.account).or_else(|| self.oldest())?;
                self.forget(victim);
                self.abandoned += 1;
                victim
            }
        };
        *self.datagrams.get_mut(at)? = Some(Datagram::new(identity, now));
        self.waiting += 1;
        Some(at)
    }

    fn oldest_of(&self, account: u16) -> Option<usize> {
        self.oldest_where(|own| own.identity.account == account)
    }

    fn oldest(&self) -> Option<usize> {
        self.oldest_where(|_| true)
    }

    fn oldest_where(&self, wanted: impl Fn(&Datagram) -> bool) -> Option<usize> {
        self.datagrams
            .iter()
            .enumerate()
            .filter_map(|(at, own)| Some((own.as_ref()?, at)))
            .filter(|(own, _)| wanted(own))
            .min_by_key(|(own, _)| own.expires)
            .map(|(_, at)| at)
    }

    /// Where a piece belongs among the others.
    fn fit(&self, at: usize, piece: &Piece<'_>) -> Fit {
        let Some(datagram) = self.datagram(at) else {
            return Fit::Contradiction;
        };
        let start = u32::from(piece.offset);
        let end = start + u32::try_from(piece.payload.len()).unwrap_or(u32::MAX);
        match datagram.whole {
            Some(whole) if end > whole || (!piece.more && end != whole) => {
                return Fit::Contradiction;
            }
            _ => {}
        }
        let mut after = NONE;
        let mut next = datagram.first_piece;
        while let Some(own) = self.blocks.head(next) {
            let own_start = u32::from(own.offset);
            let own_end = own_start + u32::from(own.len);
            if (own_start, own_end) == (start, end) {
                return Fit::Repeated;
            }
            if own_start < end && start < own_end {
                return Fit::Contradiction;
            }
            if own_start >= end {
                // The last fragment must come after all others.
                return if piece.more {
                    Fit::New(after)
                } else {
                    Fit::Contradiction
                };
            }
            after = next;
            next = own.next_piece;
        }
        Fit::New(after)
    }

    /// Copies a piece into blocks and links it behind the piece `after`.
    fn store(
        &mut self,
        at: usize,
        piece: &Piece<'_>,
        after: u16,
        now: Time,
    ) -> Result<(), DropReason> {
        let account = self.datagram(at).map_or(0, |own| own.identity.account);
        let needed = u16::try_from(piece.payload.len().div_ceil(BLOCK)).unwrap_or(NONE);
        self.make_room(at, account, needed, now)?;
        let first = self.blocks.store(piece.offset, piece.payload);
        let first = first.ok_or(DropReason::FragmentLimit)?;
        let next_piece = match self.blocks.head_mut(after) {
            Some(block) => core::mem::replace(&mut block.next_piece, first),
            None => self
                .datagram_mut(at)
                .map_or(NONE, |own| core::mem::replace(&mut own.first_piece, first)),
        };
        if let Some(block) = self.blocks.head_mut(first) {
            block.next_piece = next_piece;
        }
        if let Some(used) = self.used.get_mut(usize::from(account)) {
            *used = used.saturating_add(needed);
        }
        if let Some(own) = self.datagram_mut(at) {
            own.blocks = own.blocks.saturating_add(needed);
        }
        Ok(())
    }

    /// Makes room for `needed` blocks by giving up other datagrams.
    fn make_room(
        &mut self,
        keep: usize,
        account: u16,
        needed: u16,
        now: Time,
    ) -> Result<(), DropReason> {
        if self.blocks.free_count() < needed {
            self.expire(now, u32::MAX);
        }
        loop {
            let used = self.used.get(usize::from(account)).copied().unwrap_or(0);
            let over = used.saturating_add(needed) > self.share(account);
            if !over && self.blocks.free_count() >= needed {
                return Ok(());
            }
            let from = if over { account } else { self.greediest() };
            let victim = self.oldest_where_not(keep, from);
            let Some(victim) = victim else {
                // Only the datagram itself is left.
                self.forget(keep);
                self.abandoned += 1;
                return Err(DropReason::FragmentLimit);
            };
            self.forget(victim);
            self.abandoned += 1;
        }
    }

    fn oldest_where_not(&self, keep: usize, account: u16) -> Option<usize> {
        self.datagrams
            .iter()
            .enumerate()
            .filter_map(|(at, own)| Some((own.as_ref()?, at)))
            .filter(|(own, at)| *at != keep && own.identity.account == account)
            .min_by_key(|(own, _)| own.expires)
            .map(|(_, at)| at)
    }

    fn greediest(&self) -> u16 {
        let most = self.used.iter().zip(0_u16..).max_by_key(|(used, _)| **used);
        most.map_or(0, |(_, account)| account)
    }

    /// Puts a datagram together if nothing is missing.
    fn finish_if_complete<A: Address>(&mut self, at: usize) -> Added {
        let Some(own) = self.datagram(at).copied() else {
            return Added::Held;
        };
        if !own.is_complete() {
            return Added::Held;
        }
        let buffer = &mut self.buffer;
        buffer.clear();
        // No more than was reserved: what was stored ends at the largest length of a datagram.
        buffer.extend_from_slice(own.header());
        let mut piece = own.first_piece;
        while piece != NONE {
            piece = self.blocks.read(piece, buffer);
        }
        let len = buffer.len();
        let packet_len = len.saturating_sub(ethernet::HEADER);
        if let Some(packet) = buffer.get_mut(ethernet::HEADER..) {
            let total = u16::try_from(packet_len).unwrap_or(u16::MAX);
            match A::FAMILY {
                Family::Ipv4 => {
                    put_u16(packet, 2, total);
                    let keep = own.is_unfragmentable();
                    put_u16(packet, 6, if keep { 0x4000 } else { 0 });
                    ipv4::set_checksum(packet);
                }
                Family::Ipv6 => put_u16(packet, 4, total.saturating_sub(40)),
            }
        }
        self.forget(at);
        Added::Complete(Complete {
            len,
            largest: own.largest,
        })
    }

    /// Gives a datagram's blocks back.
    fn forget(&mut self, at: usize) {
        let Some(own) = self.datagrams.get_mut(at).and_then(Option::take) else {
            return;
        };
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(used) = self.used.get_mut(usize::from(own.identity.account)) {
            *used = used.saturating_sub(own.blocks);
        }
        let mut piece = own.first_piece;
        while piece != NONE {
            piece = self.blocks.give_back(piece);
        }
    }

    /// Gives up what was not completed in time, at most `budget` datagrams; returns how many.
    pub(crate) fn expire(&mut self, now: Time, budget: u32) -> u32 {
        if self.waiting == 0 {
            return 0;
        }
        let mut done = 0;
        for at in 0..self.datagrams.len() {
            if done < budget && self.datagram(at).is_some_and(|own| own.expires <= now) {
                self.forget(at);
                done += 1;
            }
        }
        self.abandoned += u64::from(done);
        done
    }

    /// When [`Self::expire`] next has something to do.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        self.oldest()
            .and_then(|at| Some(self.datagram(at)?.expires))
    }

    /// Forgets every fragment of an interface.
    pub(crate) fn forget_interface(&mut self, ingress: Iface) {
        let account = self.account(ingress);
        for at in 0..self.datagrams.len() {
            if self
                .datagram(at)
                .is_some_and(|own| own.identity.account == account)
            {
                self.forget(at);
            }
        }
    }
}

/// How a piece fits among the others.
enum Fit {
    /// Behind the piece that starts in this block.
    New(u16),
    /// It is there already.
    Repeated,
    /// It overlaps another one, or contradicts the length.
    Contradiction,
}

#[cfg(test)]
mod tests;
