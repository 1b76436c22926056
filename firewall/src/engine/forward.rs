//! The way of a packet that belongs to a flow: tracked, translated, sent on.
//!
//! This is the path of nearly every packet; it reads the flow and the headers and nothing else. The
//! steps are those of tables A and B of `qubes-policy.md` 3.2 from the flow on: A16 to A19, A23, A24,
//! B5. Rules and guards were asked when the flow started; that nothing has changed since is one
//! comparison of epochs.

use super::complain::{self, Complaint};
use super::core::{Core, Local, Packet};
use super::{fake, fragmenting};
use crate::address::Address;
use crate::conntrack::flow::{self, Flow, Half, Key, Ticks};
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::{Segment, Track, Tracked};
use crate::frame::{Checksum, ClientId, Frame, Iface, Time};
use crate::registry::Rules;
use crate::rule::{Action, RuleNumber};
use crate::ruleset::{RuleRef, UpperLayer};
use crate::verdict::{DropReason, Verdict};
use crate::wire::transport::{self, Kind};
use crate::wire::{checksum, ethernet, high16, low16, protocol};

/// What came of a packet that was looked up as one of a flow.
pub(crate) enum Passage {
    /// It is decided.
    Decided(Verdict),
    /// The flow was over: take the packet as one without.
    NoFlow,
}

/// Takes a packet along flow `number`.
#[inline(always)]
pub(crate) fn follow<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    number: u32,
    ingress: Iface,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Passage {
    let reply = ingress == Iface::Uplink;
    let ticks = Ticks::at(now);
    let Some(flow) = table.get_mut(number) else {
        return Passage::NoFlow;
    };
    if flow.is_overdue(ticks) {
        return end(core, table, number);
    }
    let Some(source) = core.registry.source(flow.owner) else {
        return end(core, table, number);
    };
    let mut vif = source.vif;
    if source.epoch != flow.epoch && !still_allowed(core, table, number) {
        table.remove(number);
        core.counters.flows_cut = core.counters.flows_cut.wrapping_add(1);
        return Passage::NoFlow;
    }
    if let Iface::Client(ClientId(id)) = ingress
        && id != vif
    {
        vif = id;
        moved(core, table, number, id);
    }
    let Some(flow) = table.get_mut(number) else {
        return Passage::NoFlow;
    };
    let mut proves = true;
    let mut last = false;
    if packet.transport.kind == Kind::Tcp {
        match track(flow, frame, packet, reply) {
            Tracked::Accept => {}
            Tracked::Ignore => proves = false,
            Tracked::Last => last = true,
            Tracked::Invalid(reason) => {
                return Passage::Decided(invalid(core, frame, packet, ingress, reason, now));
            }
            Tracked::Restart => return end_quietly(table, number),
        }
        if reply {
            flow.flags |= flow::REPLIED;
        }
    } else {
        flow.follow_datagram(reply, ticks);
    }
    let listed = flow.flags & flow::IN_ASSURED_LIST != 0;
    let must_settle = flow.is_transient() == listed;
    let (half, other) = flow.sides_mut(reply);
    if proves {
        half.seen = ticks;
    }
    half.packets = half.packets.wrapping_add(1);
    let change = Change::of(half, other);
    if must_settle {
        table.settle(number);
    }
    core.last_flow = number;
    if last {
        end_with(core, table, number);
    }
    let egress = if reply {
        Iface::Client(ClientId(vif))
    } else {
        Iface::Uplink
    };
    Passage::Decided(send(core, frame, packet, ingress, egress, &change, now))
}

/// Tracks a TCP segment.
#[inline(always)]
fn track<A: Address>(
    flow: &mut Flow<A>,
    frame: &Frame<'_>,
    packet: &Packet<A>,
    reply: bool,
) -> Tracked {
    let start = ethernet::HEADER + usize::from(packet.network.header_len);
    let Some((header, rest)) = frame
        .head
        .get(start..)
        .and_then(<[u8]>::split_first_chunk::<20>)
    else {
        return Tracked::Invalid(DropReason::MalformedTransport);
    };
    let segment = Segment::new(header, packet.network.transport_len());
    if segment.is_control() && !checksum_holds(frame, packet) {
        return Tracked::Invalid(DropReason::BadChecksum);
    }
    let options_len = (usize::from(header[12] >> 4) * 4).saturating_sub(20);
    let options = rest.get(..options_len).unwrap_or_default();
    let replied = flow.flags & flow::REPLIED != 0;
    let mut assured = flow.flags & flow::ASSURED != 0;
    let [original, replying] = &mut flow.half;
    let (sender, receiver) = if reply {
        (replying, original)
    } else {
        (original, replying)
    };
    let tracked = Track {
        sender: &mut sender.tcp,
        receiver: &mut receiver.tcp,
        last: &mut flow.last,
        state: &mut flow.state,
        patience: &mut flow.patience,
        replied,
        assured: &mut assured,
    }
    .follow(&segment, options, reply);
    if assured {
        flow.flags |= flow::ASSURED;
    }
    tracked
}

/// Whether the transport checksum is right, as far as that can be told: nobody vouches for it and all
/// of the packet is at hand.
#[inline(never)]
pub(crate) fn checksum_holds<A: Address>(frame: &Frame<'_>, packet: &Packet<A>) -> bool {
    if frame.checksum != Checksum::Unverified {
        return true;
    }
    let start = ethernet::HEADER + usize::from(packet.network.header_len);
    let len = usize::try_from(packet.network.transport_len()).unwrap_or(usize::MAX);
    match start
        .checked_add(len)
        .and_then(|end| frame.head.get(start..end))
    {
        Some(bytes) => transport::checksum_is_right(
            (packet.network.src, packet.network.dst),
            packet.network.protocol,
            packet.network.transport_len(),
            bytes,
        ),
        None => true,
    }
}

/// The flow has idled out.
#[cold]
fn end<A: Local>(core: &mut Core, table: &mut FlowTable<A>, number: u32) -> Passage {
    // A retired one was counted already.
    let was_alive = table.remove(number);
    core.counters.flows_expired = core
        .counters
        .flows_expired
        .wrapping_add(u64::from(was_alive));
    Passage::NoFlow
}

#[cold]
fn end_quietly<A: Local>(table: &mut FlowTable<A>, number: u32) -> Passage {
    table.remove(number);
    Passage::NoFlow
}

/// The flow ends with this packet, so nobody can ask it any more which rule let it start.
#[cold]
fn end_with<A: Local>(core: &mut Core, table: &mut FlowTable<A>, number: u32) {
    let rule = table.get(number).map(|flow| flow.rule);
    core.last_rule =
        rule.map(|rule| RuleNumber::new(rule).map_or(RuleRef::Policy, RuleRef::Number));
    table.remove(number);
}

/// Asks the rules again about a flow, and remembers if they still allow it (D5).
#[cold]
#[inline(never)]
pub(crate) fn still_allowed<A: Local>(core: &Core, table: &mut FlowTable<A>, number: u32) -> bool {
    let Some(flow) = table.get_mut(number) else {
        return false;
    };
    let Some(source) = core.registry.source(flow.owner) else {
        return false;
    };
    let [original, reply] = &flow.half;
    // The destination after DNS translation, as when the flow started.
    let destination = reply.src;
    if flow.epoch < source.birth || A::node(&core.registry, destination).guarded {
        return false;
    }
    let Rules::Compiled(rules) = &source.rules else {
        return false;
    };
    let upper = if flow.flags & flow::OPAQUE != 0 {
        UpperLayer::Unknown
    } else {
        let port = low16(original.ports);
        let [icmp_type, _] = port.to_be_bytes();
        let selector = if flow.protocol == A::ICMP {
            u16::from(icmp_type)
        } else {
            port
        };
        UpperLayer::from_protocol(A::FAMILY, flow.protocol, selector)
    };
    let decision = A::decide(rules, destination, upper);
    if decision.action == Action::Drop {
        return false;
    }
    flow.rule = rule_number(decision.rule);
    flow.epoch = source.epoch;
    true
}

/// A rule as flows remember it.
pub(crate) fn rule_number(rule: RuleRef) -> u16 {
    match rule {
        RuleRef::Number(number) => number.get(),
        RuleRef::Policy => flow::POLICY_RULE,
    }
}

/// The client speaks through another of its vifs than before (D10).
#[cold]
fn moved<A: Local>(core: &mut Core, table: &FlowTable<A>, number: u32, vif: u16) {
    if let Some(flow) = table.get(number) {
        core.registry.use_vif(flow.owner, vif);
    }
}

/// A segment that tracking refuses. Routing is decided before (A14 to A17), so that a packet which
/// cannot be sent on gets its error even then.
#[cold]
#[inline(never)]
fn invalid<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    ingress: Iface,
    reason: DropReason,
    now: Time,
) -> Verdict {
    // What the uplink sends is not translated back, and so is for us.
    if matches!(ingress, Iface::Client(_))
        && let Some((_, mtu)) = core.exit(Iface::Uplink)
        && frame.gso.is_none()
        && let Some(verdict) = obstacle(core, frame, packet, ingress, mtu, now)
    {
        return verdict;
    }
    Verdict::Drop(reason)
}

/// What a packet of one direction becomes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    pub(crate) ports: u32,
    pub(crate) network_delta: u16,
    pub(crate) transport_delta: u16,
}

impl<A: Address> Change<A> {
    /// Packets of `half` leave as what answers `other`.
    #[inline(always)]
    pub(crate) fn of(half: &Half<A>, other: &Half<A>) -> Self {
        Self {
            src: other.dst,
            dst: other.src,
            ports: transport::swapped(other.ports),
            network_delta: half.network_delta,
            transport_delta: half.transport_delta,
        }
    }

    pub(crate) fn key(&self, number: u8) -> Key<A> {
        Key {
            src: self.src,
            dst: self.dst,
            ports: self.ports,
            protocol: number,
        }
    }
}

/// A16 to A18 and A24: the packet leaves, unless it is too old or too large.
#[inline(always)]
pub(crate) fn send<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    ingress: Iface,
    egress: Iface,
    change: &Change<A>,
    now: Time,
) -> Verdict {
    let (link, mtu, fake) = match egress {
        Iface::Uplink => match &core.uplink {
            Some(uplink) => (uplink.link, uplink.config.mtu, None),
            None => return Verdict::Drop(DropReason::NoRoute),
        },
        Iface::Client(ClientId(id)) => match core.registry.vif(id) {
            Some(vif) => (vif.link, vif.mtu, vif.fake),
            None => return Verdict::Drop(DropReason::UnknownClient),
        },
    };
    let too_large = packet.network.total_len > u32::from(mtu);
    if packet.network.ttl <= 1 || too_large || packet.largest_fragment.is_some() {
        match obstacle(core, frame, packet, ingress, mtu, now) {
            Some(verdict) => return verdict,
            None if frame.gso.is_none() => {
                complain::complete(frame, packet);
                rewrite(frame, packet, change, &link);
                return fragmenting::send(core, frame, packet, egress, mtu);
            }
            None => {}
        }
    }
    rewrite(frame, packet, change, &link);
    if let Some(fake) = fake {
        fake::to_visible(frame.head, frame.checksum, &fake);
    }
    Verdict::Forward { egress }
}

/// A16 and A17: what keeps a packet from leaving. Segmentation-offload frames are cut to the MTU
/// instead.
#[cold]
#[inline(never)]
pub(crate) fn obstacle<A: Local>(
    core: &mut Core,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    ingress: Iface,
    mtu: u16,
    now: Time,
) -> Option<Verdict> {
    let network = &packet.network;
    if network.ttl <= 1 {
        let (complaint, reason) = (Complaint::TtlExceeded, DropReason::TtlExceeded);
        return Some(complain::reject(
            core, frame, packet, ingress, complaint, reason, now,
        ));
    }
    if let Some(gso) = &mut frame.gso {
        let headers = u16::from(tcp_header_len(frame.head, network.header_len))
            .saturating_add(network.header_len);
        gso.mss = gso.mss.min(mtu.saturating_sub(headers));
        return (gso.mss == 0).then_some(Verdict::Drop(DropReason::GsoUnusable));
    }
    // A datagram that came in fragments is as large as its largest one.
    let size = match packet.largest_fragment {
        Some(largest) => u32::from(largest),
        None => network.total_len,
    };
    if size > u32::from(mtu) && network.dont_fragment {
        let (complaint, reason) = (Complaint::TooBig(mtu), DropReason::TooBig);
        return Some(complain::reject(
            core, frame, packet, ingress, complaint, reason, now,
        ));
    }
    None
}

/// Bytes of the TCP header.
fn tcp_header_len(head: &[u8], header_len: u16) -> u8 {
    let at = ethernet::HEADER + usize::from(header_len) + 12;
    head.get(at).map_or(20, |offset| (offset >> 4) * 4)
}

/// Rewrites addresses, ports, time to live, checksums and the Ethernet addresses in place.
#[inline(always)]
pub(crate) fn rewrite<A: Address>(
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    change: &Change<A>,
    link: &ethernet::Addresses,
) {
    let Some((ethernet, header, bytes)) = A::split(frame.head, packet.network.header_len) else {
        return;
    };
    ethernet::set_addresses(ethernet, link);
    A::rewrite(header, change.src, change.dst, change.network_delta);
    let [a, b, c, d] = change.ports.to_be_bytes();
    let blank = frame.checksum == Checksum::Blank;
    let number = packet.network.protocol;
    let pseudo = |len: u32| {
        let sum = transport::pseudo_sum(change.src, change.dst, number, len);
        checksum::fold(sum).to_be_bytes()
    };
    match packet.transport.kind {
        Kind::Tcp => {
            if let Some(tcp) = bytes.first_chunk_mut::<20>() {
                [tcp[0], tcp[1], tcp[2], tcp[3]] = [a, b, c, d];
                let field = u16::from_be_bytes([tcp[16], tcp[17]]);
                [tcp[16], tcp[17]] = if blank {
                    pseudo(packet.network.transport_len())
                } else {
                    checksum::apply(field, change.transport_delta).to_be_bytes()
                };
            }
        }
        Kind::Udp => {
            if let Some(udp) = bytes.first_chunk_mut::<8>() {
                [udp[0], udp[1], udp[2], udp[3]] = [a, b, c, d];
                let field = u16::from_be_bytes([udp[6], udp[7]]);
                [udp[6], udp[7]] = if blank {
                    pseudo(packet.network.transport_len())
                } else if field == 0 {
                    [0, 0]
                } else {
                    match checksum::apply(field, change.transport_delta) {
                        0 => [0xff, 0xff],
                        updated => updated.to_be_bytes(),
                    }
                };
            }
        }
        Kind::Request | Kind::Reply => {
            let id = match packet.transport.kind {
                Kind::Request => high16(change.ports),
                _ => low16(change.ports),
            };
            if let Some(icmp) = bytes.first_chunk_mut::<8>() {
                [icmp[4], icmp[5]] = id.to_be_bytes();
                let field = u16::from_be_bytes([icmp[2], icmp[3]]);
                [icmp[2], icmp[3]] = checksum::apply(field, change.transport_delta).to_be_bytes();
            }
        }
        Kind::Error | Kind::OtherIcmp | Kind::Other => {
            rewrite_other(bytes, A::FAMILY, number, change.transport_delta);
        }
    }
}

/// Protocols without ports of their own here, whose checksums cover the addresses all the same.
#[cold]
fn rewrite_other(bytes: &mut [u8], family: crate::rule::Family, number: u8, delta: u16) {
    if !matches!(number, protocol::UDP_LITE | protocol::DCCP) {
        return;
    }
    if let Some(at) = transport::checksum_offset(family, number)
        && let Some(field) = crate::wire::get_u16(bytes, at)
    {
        crate::wire::put_u16(bytes, at, checksum::apply(field, delta));
    }
}
