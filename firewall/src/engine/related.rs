//! ICMP errors about packets of a flow (RELATED; `qubes-policy.md` 3.3, 3.9).
//!
//! An error quotes the start of a packet that went the other way. The quoted key finds the flow; then
//! the error is translated like a packet of the flow, and the quote like the packet it was. The quote
//! may end anywhere after the first eight bytes of its transport header. An error whose destination is
//! not the source of the packet it quotes is not related to anything.
//!
//! Source: RFC 5508 section 4, RFC 792, RFC 4443.

use super::core::{Core, Local, Packet};
use super::forward::{self, Change};
use crate::address::Address;
use crate::conntrack::flow::{self, Key, Ticks};
use crate::conntrack::table::FlowTable;
use crate::frame::{Checksum, ClientId, Frame, Iface, MAX_EDITED, Time};
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::icmp::{self, Message};
use crate::wire::transport;
use crate::wire::{checksum, ethernet, get_u16, high16, low16, protocol, put_u16};

/// Bytes of an ICMP header.
const ICMP_HEADER: usize = 8;

/// The packet that an error quotes.
#[derive(Clone, Copy, Debug)]
struct Quote<A> {
    key: Key<A>,
    /// Bytes from the start of its IP header to its transport header.
    header_len: usize,
}

/// An error from a client, about a packet that it got.
#[cold]
pub(crate) fn from_client<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    ingress: Iface,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Option<Verdict> {
    relate(core, table, ingress, false, frame, packet, now)
}

/// An error from the uplink, about a packet that went out.
#[cold]
pub(crate) fn from_uplink<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Option<Verdict> {
    relate(core, table, Iface::Uplink, true, frame, packet, now)
}

/// Sends an error on that belongs to a flow; `None` if it belongs to none.
fn relate<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    ingress: Iface,
    reply: bool,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Option<Verdict> {
    if !forward::checksum_holds(frame, packet) {
        return Some(Verdict::Drop(DropReason::BadChecksum));
    }
    let quote = read_quote(frame, packet)?;
    if quote.key.src != packet.network.dst || is_redirect(frame, packet) {
        return None;
    }
    // The quoted packet went the other way: its reverse is what the flow gets from this side.
    let number = table.find(&quote.key.reversed(), reply)?;
    let flow = table.get(number)?;
    let source = core.registry.source(flow.owner)?;
    if flow.is_overdue(Ticks::at(now)) {
        return None;
    }
    let vif = source.vif;
    if source.epoch != flow.epoch && !forward::still_allowed(core, table, number) {
        table.remove(number);
        core.counters.flows_cut = core.counters.flows_cut.wrapping_add(1);
        return None;
    }
    core.last_flow = number;
    let flow = table.get(number)?;
    let (half, other) = (flow.side(reply), flow.side(!reply));
    let change = Change::of(half, other);
    let redirected = flow.flags & flow::DESTINATION_CHANGED != 0;
    let egress = if reply {
        Iface::Client(ClientId(vif))
    } else {
        Iface::Uplink
    };
    if packet.group_frame {
        return Some(Verdict::Drop(DropReason::LinkBroadcast));
    }
    if packet.network.source_routed {
        return Some(Verdict::Drop(DropReason::SourceRouted));
    }
    let (_, mtu) = core.exit(egress)?;
    let old_outer = (packet.network.src, packet.network.dst);
    let new_outer = if reply {
        // Some router's address, except that a resolver must look like the one the client asked.
        let src = if redirected { change.src } else { old_outer.0 };
        (src, change.dst)
    } else {
        (change.src, change.dst_if(redirected, old_outer.1))
    };
    if let Some(verdict) = size_obstacle(core, frame, packet, ingress, mtu, now) {
        return Some(verdict);
    }
    let quote_delta = rewrite_quote(frame, packet, &quote, &change);
    let outer = outer_change(packet, old_outer, new_outer, quote_delta);
    let link = core.exit(egress)?.0;
    rewrite_outer(frame, packet, &outer, &link);
    finish(core, frame, packet, egress, mtu)
}

impl<A: Address> Change<A> {
    fn dst_if(&self, redirected: bool, otherwise: A) -> A {
        if redirected { self.dst } else { otherwise }
    }
}

fn size_obstacle<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    ingress: Iface,
    mtu: u16,
    now: Time,
) -> Option<Verdict> {
    let network = &packet.network;
    if network.ttl <= 1 || network.total_len > u32::from(mtu) {
        return forward::obstacle(core, frame, packet, ingress, mtu, now);
    }
    None
}

fn finish<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    egress: Iface,
    mtu: u16,
) -> Option<Verdict> {
    if packet.largest_fragment.is_some() || packet.network.total_len > u32::from(mtu) {
        return Some(super::fragmenting::send(core, frame, packet, egress, mtu));
    }
    if let Some(fake) = core.vif_of(egress).and_then(|vif| vif.fake) {
        super::fake::to_visible(frame.head, Checksum::Unverified, &fake);
    }
    Some(Verdict::Forward { egress })
}

/// Redirects would make hosts talk to each other around the translation.
fn is_redirect<A: Local>(frame: &Frame<'_>, packet: &Packet<A>) -> bool {
    let at = ethernet::HEADER + usize::from(packet.network.header_len);
    A::FAMILY == Family::Ipv4 && frame.head.get(at) == Some(&icmp::V4_REDIRECT)
}

/// Reads the quoted packet; `None` if it is cut too short or is not what a flow could have sent.
fn read_quote<A: Local>(frame: &Frame<'_>, packet: &Packet<A>) -> Option<Quote<A>> {
    let start = ethernet::HEADER + usize::from(packet.network.header_len) + ICMP_HEADER;
    let len = usize::try_from(packet.network.transport_len()).ok()?;
    let available = frame.head.get(start..)?;
    let quoted = available
        .get(..len.checked_sub(ICMP_HEADER)?)
        .unwrap_or(available);
    let (src, dst, number, header_len) = A::read_quoted(quoted)?;
    // What is rewritten ends with the quoted checksum.
    if start + header_len + 20 > MAX_EDITED {
        return None;
    }
    let transport = quoted.get(header_len..)?;
    let ports = match number {
        protocol::TCP | protocol::UDP => u32::from_be_bytes(*transport.first_chunk()?),
        number if number == A::ICMP => quoted_query(A::FAMILY, transport.first_chunk()?)?,
        _ => 0,
    };
    // Eight bytes of transport header are the least that an error must quote.
    transport.first_chunk::<8>()?;
    Some(Quote {
        key: Key {
            src,
            dst,
            ports,
            protocol: number,
        },
        header_len,
    })
}

/// The selectors of a quoted ICMP query or answer.
fn quoted_query(family: Family, message: &[u8; 8]) -> Option<u32> {
    let id = u32::from(u16::from_be_bytes([message[4], message[5]]));
    match icmp::classify(family, message[0]) {
        Message::Request => {
            let selector = u16::from_be_bytes([message[0], message[1]]);
            Some(id << 16 | u32::from(selector))
        }
        Message::Reply(request) => {
            let selector = u16::from_be_bytes([request, message[1]]);
            Some(u32::from(selector) << 16 | id)
        }
        Message::Error | Message::Other => None,
    }
}

/// Gives the quoted packet the addresses and ports that its sender knows. Returns the change of the
/// sum of all quoted bytes.
fn rewrite_quote<A: Local>(
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    quote: &Quote<A>,
    change: &Change<A>,
) -> u16 {
    let start = ethernet::HEADER + usize::from(packet.network.header_len) + ICMP_HEADER;
    let len = usize::try_from(packet.network.transport_len())
        .unwrap_or(0)
        .saturating_sub(ICMP_HEADER);
    let Some(available) = frame.head.get_mut(start..) else {
        return 0xffff;
    };
    let end = len.min(available.len());
    let Some(quoted) = available.get_mut(..end) else {
        return 0xffff;
    };
    // The quote goes the other way than the error.
    let new = change.key(quote.key.protocol).reversed();
    let touched = (quote.header_len + 20).min(quoted.len());
    let sum = |quoted: &[u8]| checksum::add_bytes(0, quoted.get(..touched).unwrap_or(quoted));
    let before = sum(quoted);
    let addresses = checksum::delta(
        quote.key.src.sum() + quote.key.dst.sum(),
        new.src.sum() + new.dst.sum(),
    );
    A::write_quoted(quoted, new.src, new.dst, addresses);
    if let Some(transport) = quoted.get_mut(quote.header_len..) {
        rewrite_quoted_transport::<A>(transport, &quote.key, &new, addresses);
    }
    // An odd number of touched bytes cannot be: headers are even, and the rest is the same.
    checksum::delta(before, sum(quoted))
}

fn rewrite_quoted_transport<A: Local>(
    transport: &mut [u8],
    old: &Key<A>,
    new: &Key<A>,
    addresses: u16,
) {
    let sum = |ports: u32| u64::from(high16(ports)) + u64::from(low16(ports));
    let ports = checksum::delta(sum(old.ports), sum(new.ports));
    let with_pseudo = checksum::join(addresses, ports);
    match old.protocol {
        protocol::TCP | protocol::UDP => {
            put_u16(transport, 0, high16(new.ports));
            put_u16(transport, 2, low16(new.ports));
            let at = if old.protocol == protocol::TCP { 16 } else { 6 };
            match get_u16(transport, at) {
                None => {}
                Some(0) if old.protocol == protocol::UDP => {}
                Some(field) => put_u16(transport, at, checksum::apply(field, with_pseudo)),
            }
        }
        number if number == A::ICMP => {
            let is_request = transport
                .first()
                .is_some_and(|own| icmp::classify(A::FAMILY, *own) == Message::Request);
            let id = if is_request {
                high16(new.ports)
            } else {
                low16(new.ports)
            };
            put_u16(transport, 4, id);
            if let Some(field) = get_u16(transport, 2) {
                let delta = match A::FAMILY {
                    Family::Ipv4 => ports,
                    Family::Ipv6 => with_pseudo,
                };
                put_u16(transport, 2, checksum::apply(field, delta));
            }
        }
        _ => {}
    }
}

/// How the error itself changes.
struct Outer<A> {
    src: A,
    dst: A,
    network_delta: u16,
    icmp_delta: u16,
}

fn outer_change<A: Local>(
    packet: &Packet<A>,
    old: (A, A),
    new: (A, A),
    quote_delta: u16,
) -> Outer<A> {
    let addresses = checksum::delta(old.0.sum() + old.1.sum(), new.0.sum() + new.1.sum());
    let covers_addresses = transport::checksum_offset(A::FAMILY, packet.network.protocol).is_some();
    Outer {
        src: new.0,
        dst: new.1,
        network_delta: checksum::join(addresses, crate::address::TTL_DELTA),
        icmp_delta: if covers_addresses {
            checksum::join(quote_delta, addresses)
        } else {
            quote_delta
        },
    }
}

fn rewrite_outer<A: Local>(
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    outer: &Outer<A>,
    link: &ethernet::Addresses,
) {
    let Some((header, ip, message)) = A::split(frame.head, packet.network.header_len) else {
        return;
    };
    ethernet::set_addresses(header, link);
    A::rewrite(ip, outer.src, outer.dst, outer.network_delta);
    if let Some(field) = get_u16(message, 2) {
        put_u16(message, 2, checksum::apply(field, outer.icmp_delta));
    }
}
