//! Cutting packets into fragments on their way out (`qubes-policy.md` 3.8).
//!
//! A datagram that came in fragments leaves in fragments of at most the largest size that came in, a
//! packet that is too large for the next link in fragments of its MTU. All fragments go to the outbox,
//! or none.
//!
//! Source: RFC 791 3.2, RFC 8200 4.5.

use super::core::{Core, Local, Packet};
use crate::frame::{Frame, Iface};
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::{copy, ethernet, get_u16, ipv4, protocol, put_u16};

/// Bytes of an IPv6 fragment header.
const FRAGMENT_HEADER: usize = 8;

/// Sends a packet, rewritten already, in pieces of at most `mtu` bytes.
#[cold]
#[inline(never)]
pub(crate) fn send<A: Local>(
    core: &mut Core,
    frame: &Frame<'_>,
    packet: &Packet<A>,
    egress: Iface,
    mtu: u16,
) -> Verdict {
    let total_len = usize::try_from(packet.network.total_len).unwrap_or(usize::MAX);
    let Some(bytes) = total_len
        .checked_add(ethernet::HEADER)
        .and_then(|len| frame.head.get(..len))
    else {
        // The rest of it is where we cannot see it.
        return Verdict::Drop(DropReason::TooBig);
    };
    let limit = packet
        .largest_fragment
        .map_or(mtu, |largest| largest.min(mtu));
    if total_len <= usize::from(limit) {
        let sent = core.emit(egress, bytes.len(), |room| copy(room, bytes));
        return outcome(sent, egress);
    }
    let Some(plan) = Plan::new::<A>(bytes, packet, usize::from(limit)) else {
        return Verdict::Drop(DropReason::TooBig);
    };
    let frames = plan.payload.len().div_ceil(plan.piece);
    if !core
        .outbox
        .has_room(frames, usize::from(limit) + ethernet::HEADER)
    {
        core.counters.outbox_full = core.counters.outbox_full.wrapping_add(1);
        return Verdict::Drop(DropReason::OutboxFull);
    }
    core.counters.datagrams_fragmented = core.counters.datagrams_fragmented.wrapping_add(1);
    let id = crate::wire::low32(core.random.next());
    for (number, payload) in plan.payload.chunks(plan.piece).enumerate() {
        let offset = number * plan.piece;
        let more = offset + payload.len() < plan.payload.len();
        let len = plan.head.len() + plan.extra + payload.len();
        let sent = core.emit(egress, len, |room| {
            plan.write::<A>(room, payload, offset, more, id);
        });
        if !sent {
            return Verdict::Drop(DropReason::OutboxFull);
        }
    }
    Verdict::Replaced { egress }
}

const fn outcome(sent: bool, egress: Iface) -> Verdict {
    if sent {
        Verdict::Replaced { egress }
    } else {
        Verdict::Drop(DropReason::OutboxFull)
    }
}

/// How a packet is cut.
struct Plan<'a> {
    /// Ethernet header and what every fragment repeats.
    head: &'a [u8],
    /// What is cut.
    payload: &'a [u8],
    /// Bytes of payload in a fragment, a multiple of eight.
    piece: usize,
    /// Bytes that a fragment has besides `head` and payload.
    extra: usize,
    /// Where the next-header field is that must name the fragment header, in the frame.
    named_at: usize,
}

impl<'a> Plan<'a> {
    fn new<A: Local>(bytes: &'a [u8], packet: &Packet<A>, limit: usize) -> Option<Self> {
        let (repeated, extra, named_at) = match A::FAMILY {
            Family::Ipv4 => (usize::from(packet.network.header_len), 0, 0),
            Family::Ipv6 => {
                let (len, named_at) = unfragmentable(bytes)?;
                (len, FRAGMENT_HEADER, named_at)
            }
        };
        let (head, payload) = bytes.split_at_checked(ethernet::HEADER + repeated)?;
        let piece = limit.checked_sub(repeated + extra)? & !7;
        (piece > 0).then_some(Self {
            head,
            payload,
            piece,
            extra,
            named_at,
        })
    }

    fn write<A: Local>(&self, room: &mut [u8], payload: &[u8], offset: usize, more: bool, id: u32) {
        copy(room, self.head);
        if let Some(room) = room.get_mut(self.head.len() + self.extra..) {
            copy(room, payload);
        }
        let packet_len = u16::try_from(room.len().saturating_sub(ethernet::HEADER)).unwrap_or(0);
        let offset = u16::try_from(offset).unwrap_or(0);
        let Some(packet) = room.get_mut(ethernet::HEADER..) else {
            return;
        };
        match A::FAMILY {
            Family::Ipv4 => {
                if offset > 0 {
                    blank_options(packet);
                }
                let dont = get_u16(packet, 6).unwrap_or(0) & 0x4000;
                put_u16(packet, 2, packet_len);
                put_u16(packet, 6, dont | u16::from(more) << 13 | offset >> 3);
                ipv4::set_checksum(packet);
            }
            Family::Ipv6 => {
                put_u16(packet, 4, packet_len.saturating_sub(40));
                let at = self.head.len();
                let next = room.get(self.named_at).copied().unwrap_or(0);
                if let Some(own) = room.get_mut(self.named_at) {
                    *own = protocol::FRAGMENT;
                }
                let [high, low] = (offset | u16::from(more)).to_be_bytes();
                let [a, b, c, d] = id.to_be_bytes();
                if let Some(header) = room.get_mut(at..) {
                    copy(header, &[next, 0, high, low, a, b, c, d]);
                }
            }
        }
    }
}

/// Options that only the first fragment carries become padding in the others (RFC 791 3.1).
fn blank_options(packet: &mut [u8]) {
    let end = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    let Some(options) = packet.get_mut(20..end) else {
        return;
    };
    let mut at = 0;
    while let Some(kind) = options.get(at).copied() {
        let len = match kind {
            0 => break,
            1 => 1,
            _ => usize::from(options.get(at + 1).copied().unwrap_or(0)).max(2),
        };
        if kind & 0x80 == 0
            && let Some(option) = options.get_mut(at..(at + len).min(end - 20))
        {
            option.fill(1);
        }
        at += len;
    }
}

/// Bytes of the headers that every fragment repeats, and where the last of them names the next one.
fn unfragmentable(frame: &[u8]) -> Option<(usize, usize)> {
    let mut len = 40;
    let mut named_at = ethernet::HEADER + 6;
    loop {
        let next = *frame.get(named_at)?;
        if !matches!(next, protocol::HOP_BY_HOP | protocol::ROUTING) {
            return Some((len, named_at));
        }
        named_at = ethernet::HEADER + len;
        len += 8 + usize::from(*frame.get(named_at + 1)?) * 8;
    }
}
