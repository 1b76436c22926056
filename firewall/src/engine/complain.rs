//! ICMP errors that the engine sends (`qubes-policy.md` 3.4).
//!
//! An error goes back to the interface the packet came from, quotes the packet as it came in, and is
//! subject to the rate limits of [`crate::limiter`]. Never answered: ICMP errors, packets from or to
//! groups, packets from addresses that nothing sends from.

use super::core::{Core, Local, Packet};
use crate::address::{Address, V4};
use crate::frame::{Checksum, ClientId, Frame, Iface, Time};
use crate::limiter;
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::transport::{self, Kind};
use crate::wire::{checksum, copy, ethernet, get_u16, icmp, low16, protocol, put_u16};

/// Longest error over IPv4 in bytes of IP packet (RFC 1812 4.3.2.3).
const MAX_ERROR4: usize = 576;

/// Longest error over IPv6 in bytes of IP packet (RFC 4443 2.4).
const MAX_ERROR6: usize = 1280;

/// Bytes of an ICMP header.
const ICMP_HEADER: usize = 8;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Complaint {
    /// The client's rules forbid it.
    Prohibited,
    /// We offer nothing there.
    HostProhibited,
    /// The time to live has run out.
    TtlExceeded,
    /// It is larger than this.
    TooBig(u16),
    /// There is no uplink.
    NoRoute,
}

impl Complaint {
    /// Type, code and the second word of the message.
    const fn message(self, family: Family) -> (u8, u8, u32) {
        match (self, family) {
            (Self::Prohibited, Family::Ipv4) => (icmp::V4_UNREACHABLE, 13, 0),
            (Self::HostProhibited, Family::Ipv4) => (icmp::V4_UNREACHABLE, 10, 0),
            (Self::TtlExceeded, Family::Ipv4) => (icmp::V4_TIME_EXCEEDED, 0, 0),
            (Self::TooBig(mtu), Family::Ipv4) => (icmp::V4_UNREACHABLE, 4, mtu as u32),
            (Self::NoRoute, Family::Ipv4) => (icmp::V4_UNREACHABLE, 0, 0),
            (Self::Prohibited | Self::HostProhibited, Family::Ipv6) => (icmp::V6_UNREACHABLE, 1, 0),
            (Self::TtlExceeded, Family::Ipv6) => (icmp::V6_TIME_EXCEEDED, 0, 0),
            (Self::TooBig(mtu), Family::Ipv6) => (icmp::V6_TOO_BIG, 0, mtu as u32),
            (Self::NoRoute, Family::Ipv6) => (icmp::V6_UNREACHABLE, 0, 0),
        }
    }
}

/// Refuses a packet and tells its sender, if it may be told.
#[cold]
#[inline(never)]
pub(crate) fn reject<A: Local>(
    core: &mut Core,
    frame: &Frame<'_>,
    packet: &Packet<A>,
    ingress: Iface,
    complaint: Complaint,
    reason: DropReason,
    now: Time,
) -> Verdict {
    let from = match ingress {
        Iface::Uplink => core.uplink.as_ref().and_then(A::own),
        Iface::Client(_) => A::gateway(core),
    };
    let network = &packet.network;
    let is_mute = match packet.transport.kind {
        Kind::Error => true,
        // Of ICMPv6, whatever is no error may be answered (RFC 4443 2.4); of ICMP, only queries.
        Kind::OtherIcmp => A::FAMILY == Family::Ipv4,
        _ => false,
    };
    let is_unanswerable = |address: A| address.is_group() || address.is_martian();
    let unanswerable = is_mute
        || packet.group_frame
        || is_unanswerable(network.src)
        || is_unanswerable(network.dst);
    let Some(from) = from.filter(|_| !unanswerable) else {
        return Verdict::Drop(reason);
    };
    if admit(core, ingress, now) {
        send(core, frame, packet, ingress, complaint, from);
    }
    Verdict::Reject(reason)
}

/// Whether the rate limits let another error go to an interface; counts it if not.
#[inline(always)]
pub(crate) fn admit(core: &mut Core, egress: Iface, now: Time) -> bool {
    let own = match egress {
        Iface::Uplink => Some(&mut core.uplink_errors),
        Iface::Client(ClientId(id)) => core.registry.vif_mut(id).map(|vif| &mut vif.errors),
    };
    let admitted =
        own.is_some_and(|own| limiter::allowed(own, &mut core.all_errors, core.icmp_rate, now));
    if !admitted {
        core.counters.icmp_errors_limited = core.counters.icmp_errors_limited.wrapping_add(1);
    }
    admitted
}

/// Makes an error with the source address `from`. The packet is one that may be answered.
#[inline(never)]
pub(crate) fn send<A: Local>(
    core: &mut Core,
    frame: &Frame<'_>,
    packet: &Packet<A>,
    egress: Iface,
    complaint: Complaint,
    from: A,
) {
    let Some((link, _)) = core.exit(egress) else {
        return;
    };
    let longest = match A::FAMILY {
        Family::Ipv4 => MAX_ERROR4,
        Family::Ipv6 => MAX_ERROR6,
    };
    let total_len = usize::try_from(packet.network.total_len).unwrap_or(0);
    let quoted = frame.head.get(ethernet::HEADER..).unwrap_or_default();
    let quote_len = (longest - A::HEADER_LEN - ICMP_HEADER)
        .min(total_len)
        .min(quoted.len());
    let quoted = quoted.get(..quote_len).unwrap_or_default();
    let payload = low16(u32::try_from(quote_len + ICMP_HEADER).unwrap_or(0));
    let (icmp_type, code, rest) = complaint.message(A::FAMILY);
    let to = packet.network.src;
    let blank = match frame.checksum {
        Checksum::Blank => complete_field(frame, packet),
        _ => None,
    };
    let len = ethernet::HEADER + A::HEADER_LEN + ICMP_HEADER + quote_len;
    // Headers, and a quote as long as what is quoted: every byte is written.
    let sent = core.emit_whole(egress, len, |bytes| {
        let Some((header, bytes)) = bytes.split_first_chunk_mut::<{ ethernet::HEADER }>() else {
            return;
        };
        ethernet::set_addresses(header, &link);
        [header[12], header[13]] = A::ETHERTYPE.to_be_bytes();
        A::write_header(bytes, from, to, A::ICMP, payload, 64);
        let Some((_, message)) = bytes.split_at_mut_checked(A::HEADER_LEN) else {
            return;
        };
        let Some((icmp, quote)) = message.split_first_chunk_mut::<ICMP_HEADER>() else {
            return;
        };
        copy(quote, quoted);
        if complaint == Complaint::Prohibited {
            count_down::<A>(quote);
        }
        if let Some((at, field)) = blank {
            put_u16(quote, at, field);
        }
        let pseudo = match A::FAMILY {
            Family::Ipv4 => 0,
            Family::Ipv6 => transport::pseudo_sum(from, to, A::ICMP, u32::from(payload)),
        };
        let start = u64::from(u16::from_be_bytes([icmp_type, code])) + u64::from(rest);
        let sum = checksum::add_bytes(pseudo + start, quote);
        let [high, low] = checksum::field(sum).to_be_bytes();
        let [a, b, c, d] = rest.to_be_bytes();
        *icmp = [icmp_type, code, high, low, a, b, c, d];
    });
    core.counters.icmp_errors_sent = core.counters.icmp_errors_sent.wrapping_add(u64::from(sent));
}

/// Counts the quoted time to live down, as a packet that was about to be forwarded has it.
fn count_down<A: Local>(quote: &mut [u8]) {
    match A::FAMILY {
        Family::Ipv4 => {
            if let Some(header) = quote.first_chunk_mut() {
                V4::count_down(header);
            }
        }
        Family::Ipv6 => {
            if let Some(hops) = quote.get_mut(7) {
                *hops = hops.wrapping_sub(1);
            }
        }
    }
}

/// Where the transport checksum of a packet without one is, counted from the IP header, and what it
/// should be; zero if not all of the packet is at hand.
fn complete_field<A: Local>(frame: &Frame<'_>, packet: &Packet<A>) -> Option<(usize, u16)> {
    let network = &packet.network;
    let within = transport::checksum_offset(A::FAMILY, network.protocol)?;
    let at = usize::from(network.header_len) + within;
    let start = ethernet::HEADER + usize::from(network.header_len);
    let end = start.checked_add(usize::try_from(network.transport_len()).ok()?)?;
    let Some(bytes) = frame.head.get(start..end) else {
        return Some((at, 0));
    };
    let old = get_u16(bytes, within)?;
    let pseudo = transport::pseudo_sum(
        network.src,
        network.dst,
        network.protocol,
        network.transport_len(),
    );
    // Take what stands in the field out of the sum.
    let sum = checksum::add_bytes(pseudo + u64::from(!old), bytes);
    Some((
        at,
        match checksum::field(sum) {
            // Zero would say that there is no checksum.
            0 if network.protocol == protocol::UDP => 0xffff,
            field => field,
        },
    ))
}

/// Completes the transport checksum of a frame that is wholly in its head.
pub(crate) fn complete<A: Local>(frame: &mut Frame<'_>, packet: &Packet<A>) {
    if frame.checksum != Checksum::Blank {
        return;
    }
    if let Some((at, field)) = complete_field(frame, packet) {
        put_u16(frame.head, at + ethernet::HEADER, field);
        frame.checksum = Checksum::Validated;
    }
}
