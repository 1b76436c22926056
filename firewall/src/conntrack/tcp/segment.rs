//! Segments as tracking reads them: flags, numbers, and the options that count.
//!
//! Trust: everything here was written by a client or a server. Options end at the first one that makes
//! no sense.
//!
//! Source: RFC 9293 3.1; RFC 7323 2.2 (window scale); RFC 2018 (selective acknowledgement).

use super::state::Event;
use super::{SIDE_SACK, SIDE_SCALES};
use crate::verdict::DropReason;

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const ACK: u8 = 0x10;
pub(super) const URG: u8 = 0x20;

/// Flags that say nothing about the state: PSH and the two of congestion notification.
const NEUTRAL: u8 = 0x08 | 0x40 | 0x80;

/// A bit for every combination of the other flags that a segment may have.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const POSSIBLE_FLAGS: u64 = {
    let combinations = [
        SYN,
        SYN | URG,
        SYN | ACK,
        RST,
        RST | ACK,
        FIN | ACK,
        FIN | ACK | URG,
        ACK,
        ACK | URG,
    ];
    let mut bits = 0;
    let mut at = 0;
    while at < combinations.len() {
        bits |= 1 << combinations[at];
        at += 1;
    }
    bits
};

/// Largest window scale (RFC 7323 2.3).
const MAX_SCALE: u8 = 14;

/// A segment, as far as tracking reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(super) seq: u32,
    pub(super) ack: u32,
    /// Sequence number after the segment.
    pub(super) end: u32,
    pub(super) window: u16,
    pub(super) flags: u8,
}

#[inline(always)]
pub(super) const fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > 0x7fff_ffff
}

#[inline(always)]
pub(super) const fn after(a: u32, b: u32) -> bool {
    before(b, a)
}

impl Segment {
    /// Reads the header, whose length was checked; `len` is that of header and payload.
    #[inline(always)]
    pub(crate) fn new(header: &[u8; 20], len: u32) -> Self {
        let h = header;
        let seq = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
        let flags = h[13];
        let payload = len.wrapping_sub(u32::from(h[12] >> 4) * 4);
        let end = seq
            .wrapping_add(payload)
            .wrapping_add(u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0));
        Self {
            seq,
            ack: u32::from_be_bytes([h[8], h[9], h[10], h[11]]),
            end,
            window: u16::from_be_bytes([h[14], h[15]]),
            flags,
        }
    }

    /// Whether the flags can be on a segment at all.
    #[inline(always)]
    pub(crate) const fn flags_are_possible(&self) -> bool {
        POSSIBLE_FLAGS >> (self.flags & !NEUTRAL & 0x3f) & 1 != 0
    }

    /// Whether the segment may start a flow.
    pub(crate) const fn may_start(&self) -> Result<(), DropReason> {
        if !self.flags_are_possible() {
            return Err(DropReason::TcpFlags);
        }
        match self.event() {
            Event::Syn | Event::Ack => Ok(()),
            Event::SynAck | Event::Fin | Event::Rst | Event::Nothing => Err(DropReason::TcpState),
        }
    }

    /// Whether the segment only asks for a connection.
    pub(crate) const fn is_first(&self) -> bool {
        self.flags & (FIN | SYN | RST | ACK) == SYN
    }

    /// Whether the segment only asks for a connection, with nothing unusual about it.
    #[inline(always)]
    pub(crate) const fn is_plain_first(&self) -> bool {
        self.flags & (FIN | SYN | RST | ACK | URG) == SYN
    }

    /// Whether the segment starts or ends something.
    #[inline(always)]
    pub(crate) const fn is_control(&self) -> bool {
        self.flags & (SYN | FIN | RST) != 0
    }

    /// Whether the segment is one that segmentation offload makes no sense for.
    pub(crate) const fn is_unfit_for_gso(&self) -> bool {
        self.flags & (SYN | RST | URG) != 0
    }

    #[inline(always)]
    pub(super) const fn event(&self) -> Event {
        if self.flags & (SYN | FIN | RST) == 0 {
            return if self.flags & ACK != 0 {
                Event::Ack
            } else {
                Event::Nothing
            };
        }
        if self.flags & RST != 0 {
            Event::Rst
        } else if self.flags & SYN != 0 {
            if self.flags & ACK != 0 {
                Event::SynAck
            } else {
                Event::Syn
            }
        } else {
            Event::Fin
        }
    }
}

/// What a SYN announces: window scale and selective acknowledgement.
pub(super) fn announced(options: &[u8]) -> (u8, u8) {
    let (mut scale, mut flags) = (0, 0);
    for (kind, value) in Options(options) {
        match (kind, value) {
            (3, [shift]) => {
                scale = (*shift).min(MAX_SCALE);
                flags |= SIDE_SCALES;
            }
            (4, []) => flags |= SIDE_SACK,
            _ => {}
        }
    }
    (scale, flags)
}

/// The highest sequence number that a segment acknowledges selectively, or `ack`.
#[inline(always)]
pub(super) fn highest_sack(options: &[u8], ack: u32) -> u32 {
    // By far most segments carry nothing but timestamps.
    if options.len() == 12 && options.first_chunk() == Some(&[1, 1, 8, 10]) {
        return ack;
    }
    scan_sack(options, ack)
}

fn scan_sack(options: &[u8], ack: u32) -> u32 {
    let mut highest = ack;
    let blocks = Options(options).find_map(|(kind, value)| match value.as_chunks::<8>() {
        (blocks @ [_, ..], []) if kind == 5 => Some(blocks),
        _ => None,
    });
    for [_, _, _, _, right @ ..] in blocks.unwrap_or_default() {
        let right = u32::from_be_bytes(*right);
        if after(right, highest) {
            highest = right;
        }
    }
    highest
}

/// Walks TCP options; stops at anything that makes no sense.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0 {
                [] | [0, ..] => return None,
                [1, rest @ ..] => self.0 = rest,
                [kind, len, ..] => {
                    let value = self.0.get(2..usize::from(*len))?;
                    self.0 = self.0.get(usize::from(*len)..)?;
                    return Some((*kind, value));
                }
                [_] => return None,
            }
        }
    }
}
