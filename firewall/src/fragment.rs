//! Reassembly of fragmented datagrams within fixed bounds.
//!
//! A datagram is judged whole: fragments are copied into blocks of [`BLOCK`] bytes until none is
//! missing, then put together in one buffer. Every interface may use a share of the blocks; when its
//! share or the memory is used up, a datagram makes room: the oldest of the same interface if it is
//! over its share, else the oldest of the interface that uses most. Fragments that overlap end their
//! datagram; exact repetitions are ignored. What is not complete in time is forgotten silently, because
//! a router sends no error for it.
//!
//! Trust: fragments hold anything. Offsets and lengths are checked before a byte is copied.
//!
//! Source: RFC 791, RFC 8200 4.5, RFC 5722 (overlaps), RFC 6946; `qubes-policy.md` 3.8.

use alloc::boxed::Box;
use alloc::vec;

use crate::address::Address;
use crate::frame::{ClientId, Iface, Time};
use crate::rule::Family;
use crate::verdict::DropReason;
use crate::wire::ipv4::{self, Fragment, Network};
use crate::wire::{copy, ethernet, put_u16};

/// Bytes of a block.
const BLOCK: usize = 512;

/// Most datagrams that wait at once.
const MAX_DATAGRAMS: usize = 256;

/// Longest header that is kept of a datagram's first fragment.
const MAX_HEADER: usize = 120;

/// Largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// No block.
const NONE: u16 = u16::MAX;

/// How long a datagram may take to become complete, in seconds.
const fn patience(family: Family) -> u64 {
    match family {
        Family::Ipv4 => 30,
        Family::Ipv6 => 60,
    }
}

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

/// What fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    /// Addresses, as octets; IPv4 ones in the first four.
    src: [u8; 16],
    dst: [u8; 16],
    id: u32,
    /// IPv4 only: IPv6 fragments may name different next headers.
    protocol: u8,
    family: Family,
    ingress: u16,
}

/// A datagram under way.
#[derive(Clone, Copy, Debug)]
struct Datagram {
    identity: Identity,
    expires: Time,
    /// First blocks of its pieces, in the order of their offsets.
    first_piece: u16,
    blocks: u16,
    /// Payload bytes present.
    present: u32,
    /// Payload bytes of the whole, once the last fragment has come.
    whole: Option<u32>,
    largest: u16,
    /// The largest fragment that must not be fragmented further.
    largest_unfragmentable: u16,
    header: [u8; MAX_HEADER],
    /// Zero until the first fragment has come.
    header_len: u16,
}

/// A block, and the piece that starts in it.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// The next block of the same piece, or of the free list.
    next: u16,
    /// The piece after this one.
    next_piece: u16,
    offset: u16,
    len: u16,
}

/// The datagrams under way.
#[derive(Debug)]
pub(crate) struct Reassembly {
    data: Box<[u8]>,
    blocks: Box<[Block]>,
    free: u16,
    free_count: u16,
    /// Blocks in use by interface; the uplink is the last one.
    used: Box<[u16]>,
    datagrams: Box<[Option<Datagram>]>,
    waiting: usize,
    /// The frame that was put together last.
    pub(crate) buffer: Box<[u8]>,
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
        let wanted = usize::try_from(bytes).unwrap_or(0) / (BLOCK + size_of::<Block>());
        let count = wanted.clamp(256, usize::from(NONE) - 1);
        let block = Block {
            next: NONE,
            next_piece: NONE,
            offset: 0,
            len: 0,
        };
        let mut reassembly = Self {
            data: vec![0; count * BLOCK].into_boxed_slice(),
            blocks: vec![block; count].into_boxed_slice(),
            free: NONE,
            free_count: 0,
            used: vec![0; usize::from(vifs) + 1].into_boxed_slice(),
            datagrams: vec![None; MAX_DATAGRAMS].into_boxed_slice(),
            waiting: 0,
            buffer: vec![0; MAX_DATAGRAM + 2 * MAX_HEADER].into_boxed_slice(),
            abandoned: 0,
        };
        for number in (0..u16::try_from(count).unwrap_or(NONE)).rev() {
            reassembly.put_free(number);
        }
        reassembly
    }

    fn block(&self, number: u16) -> Option<&Block> {
        self.blocks.get(usize::from(number))
    }

    fn block_mut(&mut self, number: u16) -> Option<&mut Block> {
        self.blocks.get_mut(usize::from(number))
    }

    fn put_free(&mut self, number: u16) {
        let next = self.free;
        if let Some(block) = self.block_mut(number) {
            block.next = next;
            self.free = number;
            self.free_count += 1;
        }
    }

    fn data_of(&mut self, number: u16) -> Option<&mut [u8]> {
        let start = usize::from(number) * BLOCK;
        self.data.get_mut(start..start + BLOCK)
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
        let all = u16::try_from(self.blocks.len()).unwrap_or(NONE);
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
        let identity = identity(self.account(ingress), network, fragment);
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
        self.note(at, head, network, fragment, &piece);
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
                let victim = self.oldest_of(identity.ingress).or_else(|| self.oldest())?;
                self.forget(victim);
                self.abandoned += 1;
                victim
            }
        };
        *self.datagrams.get_mut(at)? = Some(Datagram {
            identity,
            expires: now.plus_secs(patience(identity.family)),
            first_piece: NONE,
            blocks: 0,
            present: 0,
            whole: None,
            largest: 0,
            largest_unfragmentable: 0,
            header: [0; MAX_HEADER],
            header_len: 0,
        });
        self.waiting += 1;
        Some(at)
    }

    fn oldest_of(&self, account: u16) -> Option<usize> {
        self.oldest_where(|own| own.identity.ingress == account)
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
        while let Some(own) = self.block(next) {
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
        let account = self.datagram(at).map_or(0, |own| own.identity.ingress);
        let needed = u16::try_from(piece.payload.len().div_ceil(BLOCK)).unwrap_or(NONE);
        self.make_room(at, account, needed, now)?;
        let mut previous = NONE;
        let mut first = NONE;
        for chunk in piece.payload.chunks(BLOCK) {
            let number = self.free;
            let Some(block) = self.block(number) else {
                return Err(DropReason::FragmentLimit);
            };
            self.free = block.next;
            self.free_count -= 1;
            if let Some(room) = self.data_of(number) {
                copy(room, chunk);
            }
            if let Some(block) = self.block_mut(number) {
                block.next = NONE;
            }
            match self.block_mut(previous) {
                Some(block) => block.next = number,
                None => first = number,
            }
            previous = number;
        }
        let next_piece = match self.block_mut(after) {
            Some(block) => core::mem::replace(&mut block.next_piece, first),
            None => self
                .datagram_mut(at)
                .map_or(NONE, |own| core::mem::replace(&mut own.first_piece, first)),
        };
        if let Some(block) = self.block_mut(first) {
            block.next_piece = next_piece;
            block.offset = piece.offset;
            block.len = u16::try_from(piece.payload.len()).unwrap_or(0);
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
        if self.free_count < needed {
            self.expire(now, u32::MAX);
        }
        loop {
            let used = self.used.get(usize::from(account)).copied().unwrap_or(0);
            let over = used.saturating_add(needed) > self.share(account);
            if !over && self.free_count >= needed {
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
            .filter(|(own, at)| *at != keep && own.identity.ingress == account)
            .min_by_key(|(own, _)| own.expires)
            .map(|(_, at)| at)
    }

    fn greediest(&self) -> u16 {
        let most = self.used.iter().zip(0_u16..).max_by_key(|(used, _)| **used);
        most.map_or(0, |(_, account)| account)
    }

    /// Notes what a stored fragment says about its datagram.
    fn note<A: Address>(
        &mut self,
        at: usize,
        head: &[u8],
        network: &Network<A>,
        fragment: Fragment,
        piece: &Piece<'_>,
    ) {
        let Some(own) = self.datagram_mut(at) else {
            return;
        };
        let len = u32::try_from(piece.payload.len()).unwrap_or(0);
        own.present = own.present.saturating_add(len);
        if !piece.more {
            own.whole = Some(u32::from(piece.offset) + len);
        }
        let size = u16::try_from(network.total_len).unwrap_or(u16::MAX);
        own.largest = own.largest.max(size);
        if network.dont_fragment {
            own.largest_unfragmentable = own.largest_unfragmentable.max(size);
        }
        if piece.offset == 0 {
            own.header_len = keep_header(&mut own.header, head, network, fragment);
        }
    }

    /// Puts a datagram together if nothing is missing.
    fn finish_if_complete<A: Address>(&mut self, at: usize) -> Added {
        let Some(own) = self.datagram(at).copied() else {
            return Added::Held;
        };
        if own.whole != Some(own.present) || own.header_len == 0 {
            return Added::Held;
        }
        let header_len = usize::from(own.header_len);
        let mut buffer = core::mem::take(&mut self.buffer);
        copy(
            &mut buffer,
            own.header.get(..header_len).unwrap_or_default(),
        );
        let mut write = header_len;
        let mut piece = own.first_piece;
        while let Some(first) = self.block(piece).copied() {
            let mut left = usize::from(first.len);
            let mut number = piece;
            while let Some(next) = self.block(number).map(|block| block.next) {
                let len = left.min(BLOCK);
                let from = self.data_of(number).unwrap_or_default();
                let to = buffer.get_mut(write..write + len).unwrap_or_default();
                copy(to, from);
                write += len;
                left -= len;
                number = next;
            }
            piece = first.next_piece;
        }
        let packet_len = write - ethernet::HEADER;
        if let Some(packet) = buffer.get_mut(ethernet::HEADER..) {
            let total = u16::try_from(packet_len).unwrap_or(u16::MAX);
            match A::FAMILY {
                Family::Ipv4 => {
                    put_u16(packet, 2, total);
                    // As on Linux: set if the largest fragment must not be cut further.
                    let keep = own.largest_unfragmentable == own.largest;
                    put_u16(packet, 6, if keep { 0x4000 } else { 0 });
                    ipv4::set_checksum(packet);
                }
                Family::Ipv6 => put_u16(packet, 4, total.saturating_sub(40)),
            }
        }
        self.buffer = buffer;
        self.forget(at);
        Added::Complete(Complete {
            len: write,
            largest: own.largest,
        })
    }

    /// Gives a datagram's blocks back.
    fn forget(&mut self, at: usize) {
        let Some(own) = self.datagrams.get_mut(at).and_then(Option::take) else {
            return;
        };
        self.waiting = self.waiting.saturating_sub(1);
        if let Some(used) = self.used.get_mut(usize::from(own.identity.ingress)) {
            *used = used.saturating_sub(own.blocks);
        }
        let mut piece = own.first_piece;
        while let Some(first) = self.block(piece).copied() {
            let mut number = piece;
            while let Some(next) = self.block(number).map(|block| block.next) {
                self.put_free(number);
                number = next;
            }
            piece = first.next_piece;
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
                .is_some_and(|own| own.identity.ingress == account)
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

fn identity<A: Address>(account: u16, network: &Network<A>, fragment: Fragment) -> Identity {
    let octets = |address: A| match address.to_ip() {
        core::net::IpAddr::V4(own) => {
            let [a, b, c, d] = own.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        core::net::IpAddr::V6(own) => own.octets(),
    };
    Identity {
        src: octets(network.src),
        dst: octets(network.dst),
        id: fragment.id,
        protocol: match A::FAMILY {
            Family::Ipv4 => network.protocol,
            Family::Ipv6 => 0,
        },
        family: A::FAMILY,
        ingress: account,
    }
}

/// Keeps Ethernet header and what precedes the payload, without the IPv6 fragment header. Returns the
/// number of bytes, zero if they do not fit.
fn keep_header<A: Address>(
    header: &mut [u8; MAX_HEADER],
    head: &[u8],
    network: &Network<A>,
    fragment: Fragment,
) -> u16 {
    let without = match A::FAMILY {
        Family::Ipv4 => usize::from(network.header_len),
        Family::Ipv6 => usize::from(network.header_len).saturating_sub(8),
    };
    let len = ethernet::HEADER + without;
    let (Some(from), Some(to)) = (head.get(..len), header.get_mut(..len)) else {
        return 0;
    };
    to.copy_from_slice(from);
    if A::FAMILY == Family::Ipv6 {
        let named_at = ethernet::HEADER + usize::from(fragment.previous_next_header);
        if let Some(next) = header.get_mut(named_at) {
            *next = network.protocol;
        }
    }
    u16::try_from(len).unwrap_or(0)
}

#[cfg(test)]
mod tests;
