//! Tables C and D of `qubes-policy.md` 3.2: packets for the firewall itself, and its neighbours.
//!
//! Clients may ping us and find our link address; everything else is refused with an ICMP error. The
//! uplink may ping us over IPv6 only. Answers are made from the packet alone, nothing is remembered.

use super::complain::{self, Complaint};
use super::core::{Core, Local, Packet};
use super::fragmenting;
use crate::address::{Address, LINK_LOCAL_GATEWAY, V4, V6};
use crate::frame::{Checksum, ClientId, Frame, Iface, Mac, Time};
use crate::registry::Routed;
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::transport::Kind;
use crate::wire::{arp, checksum, ethernet, get_u16, icmp, ipv4, ipv6, low16, put_u16, transport};

/// Port of DHCP clients.
const DHCP_CLIENT: u16 = 68;

/// Hop limit of neighbour discovery: proves that nobody forwarded it (RFC 4861 7.1).
const NEIGHBOUR_HOPS: u8 = 255;

/// Bytes of a neighbour advertisement with the target's link address.
const ADVERTISEMENT: usize = 32;

/// Table C.
#[cold]
pub(crate) fn from_client<A: Local>(
    core: &mut Core,
    ingress: Iface,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    class: Result<(), DropReason>,
    now: Time,
) -> Verdict {
    // C1. Messages that are no queries are not tracked, so they cannot be invalid.
    let kind = packet.transport.kind;
    if kind == Kind::OtherIcmp {
        return Verdict::Drop(DropReason::LocalIgnored);
    }
    if let Err(reason) = class {
        return Verdict::Drop(reason);
    }
    // C2
    let to_dhcp_client = kind == Kind::Udp && low16(packet.transport.ports) == DHCP_CLIENT;
    if A::FAMILY == Family::Ipv4 && to_dhcp_client {
        return Verdict::Drop(DropReason::LocalRefused);
    }
    // C4
    if packet.network.protocol == A::ICMP {
        return echo(core, ingress, frame, packet);
    }
    // C5
    let (complaint, reason) = (Complaint::HostProhibited, DropReason::LocalRefused);
    complain::reject(core, frame, packet, ingress, complaint, reason, now)
}

/// Table D.
#[cold]
pub(crate) fn from_uplink<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
) -> Verdict {
    // D3: ICMPv6 only.
    if A::FAMILY == Family::Ipv6 && packet.network.protocol == A::ICMP {
        if !super::forward::checksum_holds(frame, packet) {
            return Verdict::Drop(DropReason::BadChecksum);
        }
        if packet.transport.kind == Kind::Request && !packet.network.dst.is_group() {
            return echo(core, Iface::Uplink, frame, packet);
        }
        return Verdict::Drop(DropReason::LocalIgnored);
    }
    Verdict::Drop(DropReason::Unsolicited)
}

/// Answers an echo request; other queries are ignored (D14).
fn echo<A: Local>(
    core: &mut Core,
    ingress: Iface,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
) -> Verdict {
    let (request, reply) = match A::FAMILY {
        Family::Ipv4 => (icmp::V4_ECHO, icmp::V4_ECHO_REPLY),
        Family::Ipv6 => (icmp::V6_ECHO, icmp::V6_ECHO_REPLY),
    };
    let [icmp_type, _] = low16(packet.transport.ports).to_be_bytes();
    let Some((link, mtu)) = core.exit(ingress) else {
        return Verdict::Drop(DropReason::LocalIgnored);
    };
    if packet.transport.kind != Kind::Request || icmp_type != request || packet.network.opaque {
        return Verdict::Drop(DropReason::LocalIgnored);
    }
    let Some(packet) = &without_options(frame, packet) else {
        return Verdict::Drop(DropReason::LocalIgnored);
    };
    // A fake client's request arrives with its real address; the answer is changed on its way out.
    let Some((header, ip, message)) = A::split(frame.head, packet.network.header_len) else {
        return Verdict::Drop(DropReason::MalformedFrame);
    };
    ethernet::set_addresses(header, &link);
    A::write_reply(ip, packet.network.dst, packet.network.src);
    if let Some(own_type) = message.first_mut() {
        *own_type = reply;
    }
    let change = checksum::delta(u64::from(request) << 8, u64::from(reply) << 8);
    if let Some(field) = get_u16(message, 2) {
        put_u16(message, 2, checksum::apply(field, change));
    }
    if A::FAMILY == Family::Ipv4
        && let Some(packet) = frame.head.get_mut(ethernet::HEADER..)
    {
        ipv4::set_checksum(packet);
    }
    frame.checksum = Checksum::Validated;
    match fragmenting::send(core, frame, packet, ingress, mtu) {
        Verdict::Replaced { .. } => {
            core.counters.echo_replies = core.counters.echo_replies.wrapping_add(1);
            Verdict::Local
        }
        other => other,
    }
}

/// Takes options and extension headers out of a packet that is answered, and forgets that it came in
/// fragments: an answer is our own, with a header of our own. `None` if not all of it is at hand.
#[cold]
fn without_options<A: Local>(frame: &mut Frame<'_>, packet: &Packet<A>) -> Option<Packet<A>> {
    let mut packet = Packet {
        largest_fragment: None,
        ..*packet
    };
    let network = &mut packet.network;
    let from = usize::from(network.header_len);
    let Some(surplus) = from.checked_sub(A::HEADER_LEN).filter(|more| *more > 0) else {
        return Some(packet);
    };
    let total = usize::try_from(network.total_len).ok()?;
    let bytes = frame.head.get_mut(ethernet::HEADER..)?.get_mut(..total)?;
    bytes.copy_within(from.., A::HEADER_LEN);
    let len = u16::try_from(total.checked_sub(surplus)?).ok()?;
    match A::FAMILY {
        Family::Ipv4 => {
            *bytes.first_mut()? = 0x45;
            put_u16(bytes, 2, len);
        }
        Family::Ipv6 => {
            put_u16(
                bytes,
                4,
                len.checked_sub(u16::try_from(A::HEADER_LEN).ok()?)?,
            );
            *bytes.get_mut(6)? = A::ICMP;
        }
    }
    network.header_len = u16::try_from(A::HEADER_LEN).ok()?;
    network.total_len = u32::from(len);
    frame.len = network.total_len.checked_add(14)?;
    Some(packet)
}

/// A2 and B1: ARP.
#[cold]
#[inline(never)]
pub(crate) fn arp(core: &mut Core, ingress: Iface, frame: &Frame<'_>) -> Verdict {
    const IGNORED: Verdict = Verdict::Drop(DropReason::ArpIgnored);
    let request = frame.head.get(ethernet::HEADER..).and_then(arp::parse);
    let (Some(request), Some(mac)) = (request, core.own_mac(ingress)) else {
        return IGNORED;
    };
    if !answers_arp(core, ingress, &request) {
        return IGNORED;
    }
    let reply = arp::reply(&request, mac);
    let link = ethernet::addresses(request.sender_mac, mac);
    let len = ethernet::HEADER + arp::LEN;
    // What a fake client sees is in the ARP packet already: nothing here is IPv4.
    let sent = core.emit(ingress, len, |bytes| {
        let ethertype = ethernet::TYPE_ARP.to_be_bytes();
        let content = link.iter().chain(&ethertype).chain(&reply);
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = *from;
        }
    });
    neighbour_outcome(core, sent)
}

/// The cases of `qubes-policy.md` 3.6.
fn answers_arp(core: &Core, ingress: Iface, request: &arp::Request) -> bool {
    let target = request.target;
    // An announcement is no question.
    if request.sender == target {
        return false;
    }
    let Iface::Client(ClientId(id)) = ingress else {
        return core.uplink.as_ref().and_then(V4::own) == Some(target);
    };
    let Some(vif) = core.registry.vif(id) else {
        return false;
    };
    if let Some(fake) = vif.fake {
        return target == fake.gateway
            && request.sender == fake.visible
            && request.sender_mac == vif.mac;
    }
    if target.is_group() || target.is_martian() || V4::list(vif).source(target).is_some() {
        return false;
    }
    // A probe asks whether an address is free; only ours is not.
    V4::gateway(core) == Some(target) || request.sender != 0
}

fn neighbour_outcome(core: &mut Core, sent: bool) -> Verdict {
    if sent {
        core.counters.neighbour_replies = core.counters.neighbour_replies.wrapping_add(1);
        Verdict::Local
    } else {
        Verdict::Drop(DropReason::OutboxFull)
    }
}

/// Whether an address is one of the groups that ask for our link address on the uplink.
pub(crate) fn is_neighbour_group<A: Local>(core: &Core, address: A) -> bool {
    let own = core.uplink.as_ref().and_then(V6::own);
    own.is_some_and(|own| own.solicited_node().to_ip() == address.to_ip())
}

/// A8 and B1: neighbour discovery. Returns `None` for anything else.
#[cold]
#[inline(never)]
pub(crate) fn neighbour(
    core: &mut Core,
    ingress: Iface,
    frame: &Frame<'_>,
    packet: &Packet<V6>,
) -> Option<Verdict> {
    const IGNORED: Option<Verdict> = Some(Verdict::Drop(DropReason::NeighbourIgnored));
    let start = ethernet::HEADER + usize::from(packet.network.header_len);
    let message = frame.head.get(start..).unwrap_or_default();
    match message.first().copied() {
        Some(icmp::V6_SOLICITATION) => {}
        // Router and neighbour advertisements, router solicitations, redirects.
        Some(133..=137) => return IGNORED,
        _ => return None,
    }
    let target = message
        .get(8..)
        .and_then(<[u8]>::first_chunk)
        .map(V6::from_octets)?;
    let network = &packet.network;
    let valid = network.ttl == NEIGHBOUR_HOPS
        && message.get(1) == Some(&0)
        && (network.dst == target || network.dst == target.solicited_node())
        && super::forward::checksum_holds(frame, packet);
    let ours = match ingress {
        Iface::Uplink => core.uplink.as_ref().and_then(V6::own) == Some(target),
        Iface::Client(_) => target == LINK_LOCAL_GATEWAY || V6::gateway(core) == Some(target),
    };
    if !valid || !ours {
        return IGNORED;
    }
    Some(advertise(core, ingress, network.src, target))
}

/// Says that we have `target` (router, solicited, override).
fn advertise(core: &mut Core, egress: Iface, to: V6, target: V6) -> Verdict {
    let (Some((link, _)), Some(mac)) = (core.exit(egress), core.own_mac(egress)) else {
        return Verdict::Drop(DropReason::NeighbourIgnored);
    };
    let len = ethernet::HEADER + ipv6::HEADER + ADVERTISEMENT;
    let sent = core.emit(egress, len, |bytes| {
        let ethertype = ethernet::TYPE_IPV6.to_be_bytes();
        for (to, from) in bytes.iter_mut().zip(link.iter().chain(&ethertype)) {
            *to = *from;
        }
        let Some(packet) = bytes.get_mut(ethernet::HEADER..) else {
            return;
        };
        ipv6::write(packet, target, to, V6::ICMP, 32, NEIGHBOUR_HOPS);
        let Some(message) = packet.get_mut(ipv6::HEADER..) else {
            return;
        };
        write_advertisement(message, target, mac);
        let pseudo = transport::pseudo_sum(target, to, V6::ICMP, 32);
        put_u16(
            message,
            2,
            checksum::field(checksum::add_bytes(pseudo, message)),
        );
    });
    neighbour_outcome(core, sent)
}

fn write_advertisement(message: &mut [u8], target: V6, mac: Mac) {
    let start = [icmp::V6_ADVERTISEMENT, 0, 0, 0, 0xe0, 0, 0, 0];
    // Option: target link-layer address, one unit of eight bytes.
    let content = start
        .into_iter()
        .chain(target.octets())
        .chain([2, 1])
        .chain(mac);
    for (to, from) in message.iter_mut().zip(content) {
        *to = from;
    }
}

/// A client's packet whose source is not assigned to its vif. Its own link-local address may ask for
/// our link address (D9).
#[cold]
pub(crate) fn unassigned_source(
    core: &mut Core,
    ingress: Iface,
    frame: &Frame<'_>,
    packet: &Packet<V6>,
) -> Verdict {
    const SPOOFED: Verdict = Verdict::Drop(DropReason::SpoofedSource);
    if !packet.network.src.is_link_local()
        || V6::gateway(core).is_none()
        || core
            .vif_of(ingress)
            .is_none_or(|vif| !V6::list(vif).is_used())
    {
        return SPOOFED;
    }
    match neighbour(core, ingress, frame, packet) {
        Some(Verdict::Local) => Verdict::Local,
        _ => SPOOFED,
    }
}
