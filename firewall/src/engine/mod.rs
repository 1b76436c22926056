//! The packet engine: one frame in, one verdict out.
//!
//! [`Engine::process`] rewrites the frame in place. The stages are the decision tables of
//! `qubes-policy.md` 3.2, and each file names the rows that it decides:
//!
//! | rows | what | where |
//! | --- | --- | --- |
//! | A1 to A10, B1, B2, B4 | frame, headers, fragments, source, flow | this file |
//! | A16 to A19, A23, A24, B5 | packets of a flow | `forward.rs`, `shortcut.rs` |
//! | A11 to A24 | packets of a client without a flow | `client.rs`, `opening.rs` |
//! | B3 to B8 | packets of the uplink without a flow | `uplink.rs` |
//! | C, D, A2, A8 | packets for us, ARP, neighbour discovery | `local.rs` |
//! | B5, RELATED | ICMP errors about a flow | `related.rs` |
//!
//! # Intended differences from Linux
//!
//! Besides the deviations D1 to D16 of the specification:
//!
//! * The checksum of a transport is verified only when a packet may start a flow or is a TCP control
//!   segment, an ICMP error or for us, and only if nobody vouches for it and all of it is at hand.
//!   Data of a running flow is never summed; a wrong checksum stays wrong and the receiver drops it.
//! * TCP retransmissions are not counted, so they do not shorten a flow's timeout.
//! * IPv6 packets with a routing header that has hops to go are dropped, like IPv4 source routes.
//! * ICMPv6 messages of neighbour discovery are never forwarded.
//! * Fragments larger than the frame's head are dropped.
//! * A flow ends at its timeout to within about a quarter of a second.
//! * SCTP, UDP-Lite and DCCP are tracked by address pair like any other protocol.

mod client;
mod complain;
mod control;
mod core;
mod fake;
mod forward;
mod fragmenting;
mod local;
mod opening;
mod related;
mod shortcut;
mod uplink;

use ::core::net::IpAddr;

use self::core::{Core, Local, NO_FLOW, Packet, PlainUplink};
use crate::address::{Address, V4, V6};
use crate::config::Limits;
use crate::conntrack::flow::{Flow, Ticks, is_trackable};
use crate::conntrack::index::Place;
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::Segment;
use crate::fragment::{Added, Complete, Reassembly};
use crate::frame::{Checksum, ClientId, Frame, GsoFamily, Iface, Time};
use crate::hash::HashKey;
use crate::outbox::Generated;
use crate::registry::{Fake, max_sources};
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};
use crate::wire::ethernet;
use crate::wire::ipv4::Network;
use crate::wire::transport::{self, Kind};
use crate::wire::{ipv4, ipv6, plain};
use forward::Passage;
use shortcut::Meta;

/// Segments of a frame with less payload than this could not be told from an attack
/// (`xen-netif.md` 6.3).
const MIN_MSS: u16 = 88;

/// Stands for the client of a frame that comes from none.
const NO_CLIENT: ClientId = ClientId(u16::MAX);

/// Our address towards clients, to compare with.
const CLIENT_SIDE: u64 = plain::mac_word(ethernet::OWN_CLIENT_SIDE);

/// Frames from which on a batch is worth two stages.
const MIN_STAGED: usize = 8;

/// Frames that are looked up before the first of them is decided.
const MAX_STAGED: usize = 32;

/// Flows whose entries and places in the index do not fit a cache of 2 MiB any more.
const MANY_FLOWS: u32 = (2 << 20) / 160;

/// One frame of a batch.
#[derive(Debug)]
pub struct Work<'a> {
    /// Where the frame came from.
    pub ingress: Iface,
    /// The frame.
    pub frame: Frame<'a>,
    /// What became of it; set by [`Engine::process_batch`].
    pub verdict: Verdict,
}

/// The packet engine.
#[derive(Debug)]
pub struct Engine {
    limits: Limits,
    core: Core,
    flows4: FlowTable<V4>,
    flows6: FlowTable<V6>,
    fragments: Reassembly,
}

/// What is known about a frame before its packet is read.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    ingress: Iface,
    group_frame: bool,
    largest_fragment: Option<u16>,
    now: Time,
}

/// How a frame starts.
enum Start {
    /// An IPv4 header without options.
    V4,
    V6,
    /// Anything else.
    Other,
}

#[inline(always)]
fn start_of(frame: &Frame<'_>) -> Start {
    match frame.head.first_chunk().map(plain::start_word) {
        Some(plain::START_V4) => Start::V4,
        Some(word) if word & 0x00f0_ffff == plain::START_V6 => Start::V6,
        _ => Start::Other,
    }
}

/// Notes where a frame goes, if that is known; says whether it is.
#[inline(always)]
fn send(verdict: &mut Verdict, egress: Option<Iface>) -> bool {
    match egress {
        Some(egress) => {
            *verdict = Verdict::Forward { egress };
            true
        }
        None => false,
    }
}

/// The client that a frame comes from, if any, and whether it goes to one.
#[inline(always)]
const fn side_of(ingress: Iface) -> (ClientId, bool) {
    match ingress {
        Iface::Client(id) => (id, false),
        Iface::Uplink => (NO_CLIENT, true),
    }
}

impl Engine {
    /// Makes an engine without uplink, clients or rules. All tables of the data path are allocated
    /// here. `seed` must be unpredictable to clients: hash keys and port choice come from it.
    pub fn new(limits: Limits, seed: [u8; 32]) -> Self {
        let words = seed.as_chunks::<8>().0;
        let word = |at: usize| words.get(at).map_or(0, |own| u64::from_le_bytes(*own));
        let master = HashKey::new(word(0), word(1));
        let derive = |number: u64| {
            let half = |part: u64| master.hash([word(2), word(3), number, part], 32 << 56);
            HashKey::new(half(0), half(1))
        };
        let owners = max_sources(limits.clients);
        Self {
            limits,
            core: Core::new(&limits, derive(0)),
            flows4: FlowTable::new(limits.flows4, owners, derive(1), derive(2)),
            flows6: FlowTable::new(limits.flows6, owners, derive(3), derive(4)),
            fragments: Reassembly::new(limits.fragment_bytes, limits.clients),
        }
    }

    /// The sizes that the engine was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Decides one frame and rewrites it.
    pub fn process(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
        let mut verdict = Verdict::Held;
        if !self.take(ingress, frame, &mut verdict, now, Ticks::at(now)) {
            verdict = self.decide_fully(ingress, frame, now);
        }
        verdict
    }

    /// Sends a plain packet of an established flow on, or decides a plain packet that may start one; says
    /// whether the packet was one of those. The directions of IPv4 are compiled
    /// apart, because they are the bulk.
    #[inline(always)]
    fn take(
        &mut self,
        ingress: Iface,
        frame: &mut Frame<'_>,
        verdict: &mut Verdict,
        now: Time,
        ticks: Ticks,
    ) -> bool {
        match (start_of(frame), ingress) {
            (Start::V4, Iface::Client(id)) => {
                let Some(key) = shortcut::read(&self.core, frame.head, frame.len, false) else {
                    ::core::hint::cold_path();
                    *verdict = self.decide_unknown(ingress, frame, now, false);
                    return true;
                };
                let place = self.flows4.place(&key);
                let Some(flow) = self.flows4.find_mut_at(place, &key, false) else {
                    ::core::hint::cold_path();
                    *verdict = self.open4(id, frame, Some(place), now);
                    return true;
                };
                let (core, parts) = (&mut self.core, Meta::of(frame));
                send(verdict, shortcut::pass(core, flow, id, parts, ticks, false))
            }
            (Start::V4, Iface::Uplink) => {
                let Some(key) = shortcut::read(&self.core, frame.head, frame.len, true) else {
                    return false;
                };
                let place = self.flows4.place(&key);
                let Some(flow) = self.flows4.find_mut_at(place, &key, true) else {
                    return false;
                };
                let (core, parts) = (&mut self.core, Meta::of(frame));
                send(
                    verdict,
                    shortcut::pass(core, flow, NO_CLIENT, parts, ticks, true),
                )
            }
            (Start::V6, _) => send(verdict, self.take6(ingress, frame, ticks)),
            (Start::Other, _) => false,
        }
    }

    #[inline(never)]
    fn take6(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Ticks) -> Option<Iface> {
        let core = &mut self.core;
        let reply = side_of(ingress).1;
        let key = shortcut::read(core, frame.head, frame.len, reply)?;
        let place = self.flows6.place(&key);
        let flow = self.flows6.find_mut_at(place, &key, reply)?;
        pass6(core, flow, ingress, Meta::of(frame), now)
    }

    /// A packet that may be the first of a flow. `is_new` says that no flow was found for it.
    #[inline(never)]
    fn decide_unknown(
        &mut self,
        ingress: Iface,
        frame: &mut Frame<'_>,
        now: Time,
        is_new: bool,
    ) -> Verdict {
        match (start_of(frame), ingress) {
            (Start::V4, Iface::Client(id)) if opening::is_worth_it::<V4>(frame.head, is_new) => {
                self.open4(id, frame, None, now)
            }
            _ => self.decide_fully(ingress, frame, now),
        }
    }

    /// A plain IPv4 packet of a client that seems to have no flow. `known` is where its key belongs, if
    /// it was looked up.
    #[inline(never)]
    fn open4(
        &mut self,
        id: ClientId,
        frame: &mut Frame<'_>,
        known: Option<Place>,
        now: Time,
    ) -> Verdict {
        let (core, flows) = (&mut self.core, &mut self.flows4);
        core.last_rule = None;
        core.last_flow = NO_FLOW;
        let ingress = Iface::Client(id);
        match opening::decide(core, flows, id, frame, known, now) {
            Some(verdict) => {
                self.account(ingress, frame.len, verdict);
                verdict
            }
            None => self.decide_fully(ingress, frame, now),
        }
    }

    /// The long way.
    #[inline(never)]
    fn decide_fully(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
        self.core.last_rule = None;
        self.core.last_flow = NO_FLOW;
        let verdict = self.frame(ingress, frame, now);
        self.account(ingress, frame.len, verdict);
        verdict
    }

    /// Decides a batch of frames, in order, as [`Self::process`] would.
    ///
    /// With many frames, and more flows than fit a cache, the flows of all frames are looked up before
    /// any frame is decided, so that the processor waits for memory once and not for every frame.
    pub fn process_batch(&mut self, work: &mut [Work<'_>], now: Time) {
        if work.len() < MIN_STAGED || self.flow_count() < MANY_FLOWS {
            return self.process_singly(work, now);
        }
        for batch in work.chunks_mut(MAX_STAGED) {
            self.process_staged(batch, now);
        }
    }

    /// One frame after the other.
    #[inline(never)]
    fn process_singly(&mut self, work: &mut [Work<'_>], now: Time) {
        let ticks = Ticks::at(now);
        for item in work {
            let (ingress, frame) = (item.ingress, &mut item.frame);
            if !self.take(ingress, frame, &mut item.verdict, now, ticks) {
                ::core::hint::cold_path();
                item.verdict = self.decide_fully(item.ingress, &mut item.frame, now);
            }
        }
    }

    /// The two stages of [`Self::process_batch`].
    #[inline(never)]
    fn process_staged(&mut self, batch: &mut [Work<'_>], now: Time) {
        let mut located = [NO_FLOW; MAX_STAGED];
        for (slot, item) in located.iter_mut().zip(batch.iter()) {
            if let Some(number) = self.locate(item.ingress, &item.frame) {
                *slot = number;
            }
        }
        let ticks = Ticks::at(now);
        let removals = self.removals();
        let mut left = batch.iter_mut();
        for number in located {
            let Some(item) = left.next() else { return };
            let egress = self.pass(number, item.ingress, &mut item.frame, ticks);
            if send(&mut item.verdict, egress) {
                continue;
            }
            ::core::hint::cold_path();
            item.verdict = match number {
                NO_FLOW => self.decide_unknown(item.ingress, &mut item.frame, now, true),
                _ => self.decide_fully(item.ingress, &mut item.frame, now),
            };
            // Only the long way removes flows; then numbers may mean something else.
            if removals != self.removals() {
                break;
            }
        }
        self.process_singly(left.into_slice(), now);
    }

    fn removals(&self) -> (u64, u64) {
        (self.flows4.removals(), self.flows6.removals())
    }

    /// Finds the flow of a plain packet.
    #[inline(always)]
    fn locate(&self, ingress: Iface, frame: &Frame<'_>) -> Option<u32> {
        let (core, head, reply) = (&self.core, &*frame.head, side_of(ingress).1);
        match start_of(frame) {
            Start::V4 => {
                let key = shortcut::read(core, head, frame.len, reply)?;
                self.flows4.find(&key, reply)
            }
            Start::V6 => {
                let key = shortcut::read(core, head, frame.len, reply)?;
                self.flows6.find(&key, reply)
            }
            Start::Other => None,
        }
    }

    /// Sends a plain packet along its flow.
    #[inline(always)]
    fn pass(
        &mut self,
        number: u32,
        ingress: Iface,
        frame: &mut Frame<'_>,
        now: Ticks,
    ) -> Option<Iface> {
        let (core, start, parts) = (&mut self.core, start_of(frame), Meta::of(frame));
        match (start, ingress) {
            (Start::V4, Iface::Client(id)) => {
                let flow = (number, self.flows4.get_mut(number)?);
                shortcut::pass(core, flow, id, parts, now, false)
            }
            (Start::V4, Iface::Uplink) => {
                let flow = (number, self.flows4.get_mut(number)?);
                shortcut::pass(core, flow, NO_CLIENT, parts, now, true)
            }
            (Start::V6, _) => {
                let flow = (number, self.flows6.get_mut(number)?);
                pass6(core, flow, ingress, parts, now)
            }
            (Start::Other, _) => None,
        }
    }

    /// A1 to A3, B1, B2.
    #[inline(always)]
    fn frame(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
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
        let abandoned = ::core::mem::take(&mut self.fragments.abandoned);
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
        let mut buffer = ::core::mem::take(&mut self.fragments.buffer);
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

    /// Counts a verdict.
    #[inline(always)]
    fn account(&mut self, ingress: Iface, frame_len: u32, verdict: Verdict) {
        let bytes = u64::from(frame_len).saturating_sub(14);
        let core = &mut self.core;
        match verdict {
            Verdict::Forward { egress } | Verdict::Replaced { egress } => match (ingress, egress) {
                (Iface::Client(ClientId(id)), _) => {
                    core.counters.forwarded_up = core.counters.forwarded_up.wrapping_add(1);
                    core.counters.forwarded_up_bytes =
                        core.counters.forwarded_up_bytes.wrapping_add(bytes);
                    if let Some(vif) = core.registry.vif_mut(id) {
                        vif.frames_up = vif.frames_up.wrapping_add(1);
                        vif.bytes_up = vif.bytes_up.wrapping_add(bytes);
                    }
                }
                (Iface::Uplink, Iface::Client(ClientId(id))) => {
                    core.counters.forwarded_down = core.counters.forwarded_down.wrapping_add(1);
                    core.counters.forwarded_down_bytes =
                        core.counters.forwarded_down_bytes.wrapping_add(bytes);
                    if let Some(vif) = core.registry.vif_mut(id) {
                        vif.frames_down = vif.frames_down.wrapping_add(1);
                        vif.bytes_down = vif.bytes_down.wrapping_add(bytes);
                    }
                }
                (Iface::Uplink, Iface::Uplink) => {}
            },
            Verdict::Drop(reason) => core.count_drop(ingress, reason),
            Verdict::Reject(reason) => {
                core.counters.rejected = core.counters.rejected.wrapping_add(1);
                core.count_drop(ingress, reason);
            }
            Verdict::Local | Verdict::Deliver => {
                core.counters.local = core.counters.local.wrapping_add(1);
            }
            Verdict::Held => {}
        }
    }

    /// Whether [`Self::next_generated`] has a frame.
    pub fn has_generated(&self) -> bool {
        !self.core.outbox.is_empty()
    }

    /// Takes the oldest frame that the engine made. Call until `None` after every batch and tick.
    pub fn next_generated(&mut self) -> Option<Generated<'_>> {
        self.core.outbox.pop()
    }

    /// Lets time pass: expires flows and fragments, at most `budget` of them. Returns whether there
    /// is more to do now.
    pub fn tick(&mut self, now: Time, budget: u32) -> bool {
        let used = self.fragments.expire(now, budget);
        let abandoned = ::core::mem::take(&mut self.fragments.abandoned);
        let counters = &mut self.core.counters;
        counters.datagrams_abandoned = counters.datagrams_abandoned.wrapping_add(abandoned);
        let left = expire(
            &mut self.core,
            &mut self.flows4,
            now,
            budget.saturating_sub(used),
        );
        let left = expire(&mut self.core, &mut self.flows6, now, left);
        left == 0
    }

    /// When [`Self::tick`] next has something to do; `None` while nothing can expire.
    pub fn next_deadline(&self, now: Time) -> Option<Time> {
        let flows = [self.flows4.next_deadline(), self.flows6.next_deadline()];
        let flows = flows.into_iter().flatten().map(|ticks| ticks.to_time(now));
        flows.chain(self.fragments.next_deadline()).min()
    }
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

impl Core {
    #[cold]
    fn count_drop(&mut self, ingress: Iface, reason: DropReason) {
        self.counters.dropped = self.counters.dropped.wrapping_add(1);
        self.drops.add(reason);
        if let Iface::Client(ClientId(id)) = ingress
            && let Some(vif) = self.registry.vif_mut(id)
        {
            vif.drops.add(reason);
        }
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

/// [`shortcut::pass`] for IPv6.
#[inline(never)]
fn pass6(
    core: &mut Core,
    flow: (u32, &mut Flow<V6>),
    ingress: Iface,
    parts: (&mut [u8], Meta<'_>),
    now: Ticks,
) -> Option<Iface> {
    let (id, reply) = side_of(ingress);
    shortcut::pass(core, flow, id, parts, now, reply)
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

/// Expires flows of one table; returns what is left of the budget.
fn expire<A: Local>(core: &mut Core, table: &mut FlowTable<A>, now: Time, mut budget: u32) -> u32 {
    let ticks = Ticks::at(now);
    let mut expired = core.counters.flows_expired;
    while let Some(number) = table.next_due(ticks, &mut budget, &mut expired) {
        let Some(flow) = table.get(number) else {
            continue;
        };
        let epoch = core.registry.source(flow.owner).map(|source| source.epoch);
        if epoch != Some(flow.epoch) && !forward::still_allowed(core, table, number) {
            core.counters.flows_cut = core.counters.flows_cut.wrapping_add(1);
            table.remove(number);
            continue;
        }
        table.keep(number, ticks);
    }
    core.counters.flows_expired = expired;
    budget
}

/// The family of an address.
const fn family_of(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    }
}
