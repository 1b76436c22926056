//! Clients that believe in another address than their own (`qubes-policy.md` 5.4).
//!
//! The client's address is exchanged at the vif, before and after everything else, in the IPv4 header
//! and, for ICMP errors, in the packet that they quote (D11). Nothing is remembered.

use crate::address::V4;
use crate::frame::Checksum;
use crate::registry::Fake;
use crate::rule::Family;
use crate::wire::icmp::{self, Message};
use crate::wire::{checksum, ethernet, get_u16, protocol, put_u16, transport};

/// Where an address is in an IPv4 header.
#[derive(Clone, Copy)]
enum Field {
    Source,
    Destination,
}

impl Field {
    const fn offset(self) -> usize {
        match self {
            Self::Source => 12,
            Self::Destination => 16,
        }
    }
}

/// Gives a frame for the client the address that the client believes in.
pub(crate) fn to_visible(frame: &mut [u8], state: Checksum, fake: &Fake) {
    exchange(frame, state, fake.real, fake.visible, Field::Destination);
}

/// Gives a frame of the client its real source. The source was checked to be the visible one.
pub(crate) fn to_real(frame: &mut [u8], state: Checksum, fake: &Fake) {
    exchange(frame, state, fake.visible, fake.real, Field::Source);
}

fn exchange(frame: &mut [u8], state: Checksum, old: V4, new: V4, field: Field) {
    if get_u16(frame, 12) != Some(ethernet::TYPE_IPV4) {
        return;
    }
    let Some(packet) = frame.get_mut(ethernet::HEADER..) else {
        return;
    };
    if !exchange_address(packet, old, new, field, state) {
        return;
    }
    let header_len = header_len(packet);
    let number = packet.get(9).copied();
    let Some(message) = packet.get_mut(header_len..) else {
        return;
    };
    let icmp_type = message.first().copied().unwrap_or(255);
    if number == Some(protocol::ICMP) && icmp::classify(Family::Ipv4, icmp_type) == Message::Error {
        exchange_quoted(message, old, new, field);
    }
}

/// The packet in an ICMP error goes the other way, so the address is on its other side.
fn exchange_quoted(message: &mut [u8], old: V4, new: V4, field: Field) {
    let other = match field {
        Field::Source => Field::Destination,
        Field::Destination => Field::Source,
    };
    let Some((icmp, quoted)) = message.split_at_mut_checked(8) else {
        return;
    };
    let before = checksum::add_bytes(0, quoted);
    exchange_address(quoted, old, new, other, Checksum::Unverified);
    let after = checksum::add_bytes(0, quoted);
    if let Some(own) = get_u16(icmp, 2) {
        put_u16(
            icmp,
            2,
            checksum::apply(own, checksum::delta(before, after)),
        );
    }
}

fn header_len(packet: &[u8]) -> usize {
    usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4
}

/// Exchanges one address with the checksums that cover it; false if it is not there.
fn exchange_address(packet: &mut [u8], old: V4, new: V4, field: Field, state: Checksum) -> bool {
    let Some(place) = packet
        .get_mut(field.offset()..)
        .and_then(<[u8]>::first_chunk_mut::<4>)
    else {
        return false;
    };
    if u32::from_be_bytes(*place) != old {
        return false;
    }
    *place = new.to_be_bytes();
    let delta = checksum::delta(u64::from(old), u64::from(new));
    if let Some(own) = get_u16(packet, 10) {
        put_u16(packet, 10, checksum::apply(own, delta));
    }
    let fragment_offset = get_u16(packet, 6).unwrap_or(0) & 0x1fff;
    let number = packet.get(9).copied().unwrap_or(0);
    let Some(within) = transport::checksum_offset(Family::Ipv4, number) else {
        return true;
    };
    let at = header_len(packet) + within;
    let (Some(own), 0) = (get_u16(packet, at), fragment_offset) else {
        return true;
    };
    let updated = match state {
        // Holds the sum itself, not its complement.
        Checksum::Blank => checksum::join(own, delta),
        _ if number == protocol::UDP && own == 0 => 0,
        _ => match checksum::apply(own, delta) {
            0 if number == protocol::UDP => 0xffff,
            updated => updated,
        },
    };
    put_u16(packet, at, updated);
    true
}
