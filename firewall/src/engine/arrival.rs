//! The long way of a frame: its headers are taken apart, fragments kept, the source checked, the flow
//! looked up. Rows A1 to A10, B1, B2, B4 of `qubes-policy.md` 3.2, in their order.

use super::core::{Core, Local, Packet, PlainUplink};
use super::forward::{self, Passage};
use super::{Engine, client, fake, local, uplink};
use crate::address::{Address, V4, V6};
use crate::conntrack::flow::is_trackable;
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::Segment;
use crate::fragment::{Added, Complete};
use crate::frame::{Checksum, ClientId, Frame, GsoFamily, Iface, Time};
use crate::registry::Fake;
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::ipv4::Network;
use crate::wire::transport::{self, Kind};
use crate::wire::{ethernet, ipv4, ipv6, plain};

/// Segments of a frame with less payload than this could not be told from an attack
/// (`xen-netif.md` 6.3).
const MIN_MSS: u16 = 88;

/// Our address towards clients, to compare with.
const CLIENT_SIDE: u64 = plain::mac_word(ethernet::OWN_CLIENT_SIDE);

/// What is known about a frame before its packet is read.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    ingress: Iface,
    group_frame: bool,
    largest_fragment: Option<u16>,
    now: Time,
}

impl Arrival {
    /// A packet of which nothing is known but how it arrived.
    #[inline(always)]
    fn packet<A: Local>(&self) -> Packet<A> {
        Packet {
            largest_fragment: self.largest_fragment,
            group_frame: self.group_frame,
            ..Packet::default()
        }
    }
}

impl Engine {
    /// A1 to A3, B1, B2.
    #[inline(always)]
    pub(super) fn frame(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
        let (own, fake) = match ingress {
            Iface::Client(ClientId(id)) => match self.core.registry.vif(id) {
                Some(vif) => (CLIENT_SIDE, vif.fake),
                None => return Verdict::Drop(DropReason::UnknownClient),
            },
            Iface::Uplink => match self.core.plain_uplink.mac {
                PlainUplink::NO_MAC => return Verdict::Drop(DropReason::UplinkAbsent),
                own => (own, None),
            },
        };
        let Some(header) = frame.head.first_chunk::<{ ethernet::HEADER }>() else {
            return Verdict::Drop(DropReason::MalformedFrame);
        };
        let group_frame = plain::destination(header) != own;
        if group_frame && header[0] & 1 == 0 {
            return Verdict::Drop(DropReason::ForeignMac);
        }
        let arrival = Arrival {
            ingress,
            group_frame,
            largest_fragment: None,
            now,
        };
        match (ethernet::ethertype(header), fake) {
            (ethernet::TYPE_IPV4, None) => self.packet4(frame, &arrival),
            (ethernet::TYPE_IPV4, Some(fake)) => self.fake_client_packet(frame, &arrival, &fake),
            (ethernet::TYPE_IPV6, None) => self.packet6(frame, &arrival),
            (ethernet::TYPE_IPV6, Some(_)) => Verdict::Drop(DropReason::SpoofedSource),
            (ethernet::TYPE_ARP, _) => local::arp(&mut self.core, ingress, frame),
            _ => Verdict::Drop(DropReason::NotIp),
        }
    }

    /// A4: the client believes in another address.
    #[cold]
    fn fake_client_packet(
        &mut self,
        frame: &mut Frame<'_>,
        arrival: &Arrival,
        fake: &Fake,
    ) -> Verdict {
        match ipv4::take_apart(frame.head, frame.len) {
            Ok(parts) if parts.network.src == fake.visible => {
                fake::to_real(frame.head, frame.checksum, fake);
                self.packet4(frame, arrival)
            }
            Ok(_) => Verdict::Drop(DropReason::SpoofedSource),
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// A5 to A7 and A9 for IPv4, then everything else.
    #[inline(never)]
    fn packet4(&mut self, frame: &mut Frame<'_>, arrival: &Arrival) -> Verdict {
        let mut packet = arrival.packet::<V4>();
        let bytes = match ipv4::parse(frame.head, frame.len, &mut packet.network) {
            Ok(bytes) => bytes,
            Err(reason) => return Verdict::Drop(reason),
        };
        if packet.network.is_fragment {
            return self.fragment(frame, &packet.network, arrival);
        }
        let source = match source(&self.core, arrival.ingress, packet.network.src) {
            Ok(source) => source,
            Err(reason) => return Verdict::Drop(reason),
        };
        let transport = transport::parse(&packet.network, bytes);
        frame.len = packet.network.total_len + 14;
        packet.transport = match transport {
            Ok(transport) => transport,
            Err(reason) => return Verdict::Drop(reason),
        };
        let (core, flows) = (&mut self.core, &mut self.flows4);
        packet_of(core, flows, frame, &packet, source, arrival)
    }

    /// A5 to A9 for IPv6, then everything else.
    #[inline(never)]
    fn packet6(&mut self, frame: &mut Frame<'_>, arrival: &Arrival) -> Verdict {
        let mut packet = arrival.packet::<V6>();
        let bytes = match ipv6::parse(frame.head, frame.len, &mut packet.network) {
            Ok(bytes) => bytes,
            Err(reason) => return Verdict::Drop(reason),
        };
        if packet.network.is_fragment {
            let is_first = packet.network.fragment.offset == 0;
            if is_first && ipv6::cuts_transport(packet.network.protocol, bytes) {
                return Verdict::Drop(DropReason::FragmentMalformed);
            }
            return self.fragment(frame, &packet.network, arrival);
        }
        let transport = transport::parse(&packet.network, bytes);
        frame.len = packet.network.total_len + 14;
        if let Ok(transport) = transport
            && transport.kind == Kind::OtherIcmp
        {
            packet.transport = transport;
            if let Some(verdict) = self.neighbour(frame, &packet, arrival) {
                return verdict;
            }
        }
        let source = match source(&self.core, arrival.ingress, packet.network.src) {
            Ok(source) => source,
            Err(reason) => return Verdict::Drop(reason),
        };
        packet.transport = match transport {
            Ok(transport) => transport,
            Err(reason) => return Verdict::Drop(reason),
        };
        let (core, flows) = (&mut self.core, &mut self.flows6);
        packet_of(core, flows, frame, &packet, source, arrival)
    }

    /// A8 and B1: neighbour discovery, if it comes from an address that may.
    #[cold]
    fn neighbour(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet<V6>,
        arrival: &Arrival,
    ) -> Option<Verdict> {
        let src = packet.network.src;
        match self.core.vif_of(arrival.ingress) {
            Some(vif) if vif.addresses6.source(src).is_none() => {
                let (core, ingress) = (&mut self.core, arrival.ingress);
                Some(local::unassigned_source(core, ingress, frame, packet))
            }
            Some(_) if V6::gateway(&self.core).is_none() => {
                Some(Verdict::Drop(DropReason::Ipv6Off))
            }
            None if uplink::bad_source(&self.core, src).is_some() => {
                Some(Verdict::Drop(DropReason::GuardedSource))
            }
            _ => local::neighbour(&mut self.core, arrival.ingress, frame, packet),
        }
    }

    /// A6, B4: keeps a fragment; the last one that was missing lets the datagram go on.
    #[cold]
    #[inline(never)]
    fn fragment<A: Local>(
        &mut self,
        frame: &Frame<'_>,
        network: &Network<A>,
        arrival: &Arrival,
    ) -> Verdict {
        if let Some(reason) = refused_source(&self.core, arrival.ingress, network.src) {
            return Verdict::Drop(reason);
        }
        if frame.gso.is_some() || frame.checksum == Checksum::Blank {
            return Verdict::Drop(DropReason::BlankChecksumUnusable);
        }
        if network.source_routed {
            return Verdict::Drop(DropReason::SourceRouted);
        }
        if arrival.largest_fragment.is_some() {
            return Verdict::Drop(DropReason::FragmentMalformed);
        }
        let fragment = network.fragment;
        let (head, now) = (&*frame.head, arrival.now);
        let added = self
            .fragments
            .add(arrival.ingress, head, network, fragment, now);
        let abandoned = core::mem::take(&mut self.fragments.abandoned);
        let counters = &mut self.core.counters;
        counters.datagrams_abandoned = counters.datagrams_abandoned.wrapping_add(abandoned);
        match added {
            Added::Held => {
                counters.fragments_held = counters.fragments_held.wrapping_add(1);
                Verdict::Held
            }
            Added::Refused(reason) => Verdict::Drop(reason),
            Added::Complete(complete) => {
                counters.datagrams_reassembled = counters.datagrams_reassembled.wrapping_add(1);
                self.whole_datagram::<A>(complete, arrival)
            }
        }
    }

    /// Decides a datagram that was put together.
    fn whole_datagram<A: Local>(&mut self, complete: Complete, arrival: &Arrival) -> Verdict {
        let mut buffer = core::mem::take(&mut self.fragments.buffer);
        let arrival = Arrival {
            largest_fragment: Some(complete.largest),
            ..*arrival
        };
        let verdict = match buffer.get_mut(..complete.len) {
            Some(head) => {
                let mut frame = Frame::whole(head);
                match A::FAMILY {
                    Family::Ipv4 => self.packet4(&mut frame, &arrival),
                    Family::Ipv6 => self.packet6(&mut frame, &arrival),
                }
            }
            None => Verdict::Drop(DropReason::FragmentMalformed),
        };
        self.fragments.buffer = buffer;
        verdict
    }
}

/// A7 and B3, for packets that are not looked up yet.
#[cold]
fn refused_source<A: Local>(core: &Core, ingress: Iface, src: A) -> Option<DropReason> {
    match core.vif_of(ingress) {
        Some(vif) if A::list(vif).source(src).is_none() => Some(DropReason::SpoofedSource),
        Some(_) if A::FAMILY == Family::Ipv6 && A::gateway(core).is_none() => {
            Some(DropReason::Ipv6Off)
        }
        Some(_) => None,
        None => uplink::bad_source(core, src),
    }
}

/// A7 and A9: the number of a client's source address; zero for the uplink.
#[inline(always)]
fn source<A: Local>(core: &Core, ingress: Iface, src: A) -> Result<u16, DropReason> {
    let Iface::Client(ClientId(id)) = ingress else {
        return Ok(0);
    };
    let vif = core.registry.vif(id).ok_or(DropReason::SpoofedSource)?;
    let source = A::list(vif).source(src).ok_or(DropReason::SpoofedSource)?;
    if A::FAMILY == Family::Ipv6 && core.downstream.gateway6.is_none() {
        return Err(DropReason::Ipv6Off);
    }
    Ok(source)
}

/// A10 and B4: whether the packet has a flow.
#[inline(always)]
fn packet_of<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    source: u16,
    arrival: &Arrival,
) -> Verdict {
    let Arrival { ingress, now, .. } = *arrival;
    let reply = ingress == Iface::Uplink;
    let kind = packet.transport.kind;
    if (frame.gso.is_some() || frame.checksum == Checksum::Blank)
        && let Err(reason) = check_offload(core, frame, packet)
    {
        return Verdict::Drop(reason);
    }
    // A10
    let key = packet.key();
    let place = table.place(&key);
    if is_trackable(kind, reply)
        && !packet.group_frame
        && !packet.network.source_routed
        && let Some(number) = table.find_at(place, &key, reply)
    {
        match forward::follow(core, table, number, ingress, frame, packet, now) {
            Passage::Decided(verdict) => return verdict,
            Passage::NoFlow => {}
        }
    }
    if reply {
        return uplink::without_flow(core, table, frame, packet, now);
    }
    let origin = client::Origin {
        ingress,
        source,
        place,
    };
    client::without_flow(core, table, &origin, frame, packet, now)
}

/// What offload a frame may ask for (`xen-netif.md` 6.1, 6.3).
#[inline(never)]
fn check_offload<A: Address>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
) -> Result<(), DropReason> {
    let kind = packet.transport.kind;
    if frame.checksum == Checksum::Blank && !matches!(kind, Kind::Tcp | Kind::Udp) {
        return Err(DropReason::BlankChecksumUnusable);
    }
    let Some(gso) = frame.gso else { return Ok(()) };
    let family = match gso.family {
        GsoFamily::V4 => Family::Ipv4,
        GsoFamily::V6 => Family::Ipv6,
    };
    let start = ethernet::HEADER + usize::from(packet.network.header_len);
    let header = frame.head.get(start..).and_then(<[u8]>::first_chunk::<20>);
    let Some(header) = header.filter(|_| kind == Kind::Tcp && family == A::FAMILY) else {
        return Err(DropReason::GsoUnusable);
    };
    let len = packet.network.transport_len();
    let payload = len.saturating_sub(u32::from(header[12] >> 4) * 4);
    if gso.mss < MIN_MSS || Segment::new(header, len).is_unfit_for_gso() {
        return Err(DropReason::GsoUnusable);
    }
    if frame.checksum != Checksum::Blank {
        frame.checksum = Checksum::Blank;
        core.counters.gso_without_blank = core.counters.gso_without_blank.wrapping_add(1);
    }
    if payload <= u32::from(gso.mss) {
        frame.gso = None;
    }
    Ok(())
}
