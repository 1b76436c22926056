//! Table A of `qubes-policy.md` 3.2: packets from a client that belong to no flow.
//!
//! The rows are decided in the order of the table. Rows A1 to A10 are in [`super::arrival`], what a flow does
//! with its packets (A16 to A19, A23, A24) in [`super::forward`].

use super::complain::{self, Complaint};
use super::core::{Core, Local, Packet};
use super::{forward, local, related};
use crate::conntrack::flow::{self, Flow, Key, Ticks};
use crate::conntrack::index::Place;
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::{self, Patience, Segment, State, Track, Tracked};
use crate::frame::{ClientId, Frame, Iface, Time};
use crate::nat;
use crate::registry::Rules;
use crate::rule::Action;
use crate::ruleset::RuleRef;
use crate::verdict::{DropReason, Verdict};
use crate::wire::transport::Kind;
use crate::wire::{ethernet, high16, low16};

/// Port of DNS.
pub(crate) const DNS: u16 = 53;

/// Whether a packet that has no flow may start one, as far as tracking knows (A10). If not, it can be
/// nothing that anybody sends.
fn classify<A: Local>(frame: &Frame<'_>, packet: &Packet<A>) -> Result<(), DropReason> {
    if !forward::checksum_holds(frame, packet) {
        return Err(DropReason::BadChecksum);
    }
    match packet.transport.kind {
        Kind::Tcp => match read_segment(frame, packet) {
            Some((segment, _)) => segment.may_start(),
            None => Err(DropReason::MalformedTransport),
        },
        Kind::Udp | Kind::Request | Kind::Other => Ok(()),
        Kind::Reply | Kind::OtherIcmp => Err(DropReason::IcmpState),
        Kind::Error => Err(DropReason::IcmpUnrelated),
    }
}

/// The TCP header and options of a packet.
fn read_segment<'f, A: Local>(
    frame: &'f Frame<'_>,
    packet: &Packet<A>,
) -> Option<(Segment, &'f [u8])> {
    let start = ethernet::HEADER + usize::from(packet.network.header_len);
    let (header, rest) = frame.head.get(start..)?.split_first_chunk::<20>()?;
    let options_len = (usize::from(header[12] >> 4) * 4).checked_sub(20)?;
    let segment = Segment::new(header, packet.network.transport_len());
    Some((segment, rest.get(..options_len)?))
}

/// Where a client's packet comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) ingress: Iface,
    /// The number of its source address.
    pub(crate) source: u16,
    /// Where its key belongs in the flow table.
    pub(crate) place: Place,
}

/// Decides a packet of a client that has no flow.
#[inline(never)]
pub(crate) fn without_flow<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    origin: &Origin,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Verdict {
    let Origin {
        ingress,
        source,
        place,
    } = *origin;
    let network = &packet.network;
    let kind = packet.transport.kind;
    if kind == Kind::Error
        && let Some(verdict) = related::from_client(core, table, ingress, frame, packet, now)
    {
        return verdict;
    }
    let class = classify(frame, packet);
    // A11: DNS to a virtual resolver goes to a real one.
    let mut destination = network.dst;
    let to_dns = matches!(kind, Kind::Tcp | Kind::Udp) && low16(packet.transport.ports) == DNS;
    if to_dns && class.is_ok() {
        match A::resolver(core, network.dst) {
            Some(Ok(real)) => destination = real,
            Some(Err(())) => return Verdict::Drop(DropReason::NoResolver),
            None => {}
        }
    }
    // A12, also for what a resolver's key made of it
    if destination.is_group() {
        return Verdict::Drop(DropReason::Multicast);
    }
    if destination.is_martian() {
        return Verdict::Drop(DropReason::MartianDestination);
    }
    if network.source_routed {
        return Verdict::Drop(DropReason::SourceRouted);
    }
    // A13
    if A::is_ours(core, destination) {
        return local::from_client(core, ingress, frame, packet, class, now);
    }
    // A14. A link-scoped address can only be on the client's own link.
    let node = A::node(&core.registry, destination);
    let to_client = node.attached || destination.is_link_scoped();
    let uplink = core.uplink.as_ref().filter(|own| A::has_route(own));
    let mtu = match (to_client, uplink) {
        (true, _) => attached_mtu(core, destination),
        (false, Some(uplink)) => uplink.config.mtu,
        (false, None) => {
            let (complaint, reason) = (Complaint::NoRoute, DropReason::NoRoute);
            return complain::reject(core, frame, packet, ingress, complaint, reason, now);
        }
    };
    // A15
    if packet.group_frame {
        return Verdict::Drop(DropReason::LinkBroadcast);
    }
    // A16, A17
    if (network.ttl <= 1 || network.total_len > u32::from(mtu))
        && let Some(verdict) = forward::obstacle(core, frame, packet, ingress, mtu, now)
    {
        return verdict;
    }
    // A20
    if let Err(reason) = class {
        return Verdict::Drop(reason);
    }
    // A21
    let rule = match rules(core, source, packet, destination) {
        Ok(rule) => rule,
        Err(DropReason::NoRules) => return Verdict::Drop(DropReason::NoRules),
        Err(reason) => {
            let complaint = Complaint::Prohibited;
            return complain::reject(core, frame, packet, ingress, complaint, reason, now);
        }
    };
    // A22
    if to_client {
        return Verdict::Drop(DropReason::ToClient);
    }
    // A23
    if node.guarded {
        return Verdict::Drop(DropReason::GuardedDestination);
    }
    // A24
    let Some(own) = core.uplink.as_ref().and_then(A::own) else {
        return Verdict::Drop(DropReason::NoRoute);
    };
    // The source speaks through this vif now (D10).
    if let Iface::Client(ClientId(id)) = ingress {
        core.registry.use_vif(source, id);
    }
    let epoch = core.registry.source(source).map_or(0, |own| own.epoch);
    let tcp = match kind {
        Kind::Tcp => match read_segment(frame, packet) {
            Some(segment) => Some(segment),
            None => return Verdict::Drop(DropReason::MalformedTransport),
        },
        _ => None,
    };
    let start = Start {
        source,
        epoch,
        place,
        original: packet.key(),
        kind,
        destination,
        rule: forward::rule_number(rule),
        opaque: network.opaque,
        tcp,
    };
    match begin(core, table, own, &start, now) {
        Ok(change) => {
            let egress = Iface::Uplink;
            forward::send(core, frame, packet, ingress, egress, &change, now)
        }
        Err(reason) => {
            core.counters.flows_refused = core.counters.flows_refused.wrapping_add(1);
            Verdict::Drop(reason)
        }
    }
}

/// The MTU towards an attached address.
#[cold]
fn attached_mtu<A: Local>(core: &Core, destination: A) -> u16 {
    let vif = core
        .registry
        .vifs()
        .find(|(_, vif)| A::list(vif).source(destination).is_some());
    vif.map_or(crate::config::DEFAULT_MTU, |(_, vif)| vif.mtu)
}

/// A21: what the client's rules say.
fn rules<A: Local>(
    core: &mut Core,
    source: u16,
    packet: &Packet<A>,
    destination: A,
) -> Result<RuleRef, DropReason> {
    let source = core.registry.source(source).ok_or(DropReason::NoRules)?;
    let rules = match &source.rules {
        Rules::Absent => return Err(DropReason::NoRules),
        Rules::Invalid => return Err(DropReason::InvalidRules),
        Rules::Compiled(rules) => rules,
    };
    let upper = packet.transport.upper(&packet.network);
    let decision = A::decide(rules, destination, upper);
    core.last_rule = Some(decision.rule);
    match (decision.action, decision.rule) {
        (Action::Accept, rule) => Ok(rule),
        (Action::Drop, RuleRef::Number(_)) => Err(DropReason::Rule),
        (Action::Drop, RuleRef::Policy) => Err(DropReason::Policy),
    }
}

/// What a new flow starts with.
#[derive(Debug)]
pub(crate) struct Start<'f, A> {
    /// The number of the client's address.
    pub(crate) source: u16,
    /// That of the rules that allow it.
    pub(crate) epoch: u32,
    /// Where the key belongs in the flow table.
    pub(crate) place: Place,
    pub(crate) original: Key<A>,
    pub(crate) kind: Kind,
    /// The destination after DNS translation.
    pub(crate) destination: A,
    /// As flows remember it.
    pub(crate) rule: u16,
    /// Whether rules cannot tell what it carries.
    pub(crate) opaque: bool,
    /// The segment and its options, for TCP.
    pub(crate) tcp: Option<(Segment, &'f [u8])>,
}

/// A24: chooses a translation and puts the flow into the table.
#[inline(always)]
pub(crate) fn begin<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    own: A,
    start: &Start<'_, A>,
    now: Time,
) -> Result<forward::Change<A>, DropReason> {
    let ticks = Ticks::at(now);
    let original = &start.original;
    let translation = nat::translate(
        table,
        &mut core.random,
        start.kind,
        original,
        start.destination,
        own,
        ticks,
    )
    .ok_or(DropReason::NatExhausted)?;
    let mut flow = Flow::new(original, &translation.reply, ticks);
    flow.owner = start.source;
    flow.rule = start.rule;
    flow.epoch = start.epoch;
    if start.opaque {
        flow.flags |= flow::OPAQUE;
    }
    let (half, _) = flow.sides_mut(false);
    half.packets = 1;
    match &start.tcp {
        Some((segment, options)) => begin_tcp(&mut flow, segment, options)?,
        None => flow.follow_datagram(false, ticks),
    }
    let [half, other] = &flow.half;
    let change = forward::Change::of(half, other);
    if translation.remapped {
        hold_mapping(core, table, &mut flow);
    }
    let places = [start.place, translation.place];
    match table.insert(&flow, places, ticks) {
        Ok((number, evicted)) => {
            core.last_flow = number;
            core.counters.flows_created = core.counters.flows_created.wrapping_add(1);
            core.counters.flows_evicted =
                core.counters.flows_evicted.wrapping_add(u64::from(evicted));
            Ok(change)
        }
        Err(_) => {
            if flow.flags & flow::REMAPPED != 0 {
                let port = high16(original.ports);
                table
                    .mappings
                    .release(original.src, port, original.protocol);
            }
            Err(DropReason::TableFull)
        }
    }
}

/// Notes that a flow leaves with another port than it came with.
#[cold]
#[inline(never)]
fn hold_mapping<A: Local>(core: &mut Core, table: &mut FlowTable<A>, flow: &mut Flow<A>) {
    core.counters.ports_remapped = core.counters.ports_remapped.wrapping_add(1);
    let [original, reply] = &flow.half;
    let (port, external) = (high16(original.ports), low16(reply.ports));
    if table
        .mappings
        .hold(original.src, port, flow.protocol, external)
    {
        flow.flags |= flow::REMAPPED;
    }
}

/// Starts tracking a TCP connection with its first segment.
#[inline(always)]
fn begin_tcp<A: Local>(
    flow: &mut Flow<A>,
    segment: &Segment,
    options: &[u8],
) -> Result<(), DropReason> {
    let [original, reply] = &mut flow.half;
    segment.start(options, &mut original.tcp, &mut reply.tcp);
    if segment.is_first() {
        flow.state = tcp::begin_with_syn(segment, &mut reply.tcp, &mut flow.last);
        flow.patience = Patience::SynSent;
        return Ok(());
    }
    pick_up(flow, segment, options)
}

/// Starts tracking a TCP connection in its middle.
#[cold]
#[inline(never)]
fn pick_up<A: Local>(
    flow: &mut Flow<A>,
    segment: &Segment,
    options: &[u8],
) -> Result<(), DropReason> {
    let [original, reply] = &mut flow.half;
    flow.state = State::None;
    let tracked = Track {
        sender: &mut original.tcp,
        receiver: &mut reply.tcp,
        last: &mut flow.last,
        state: &mut flow.state,
        patience: &mut flow.patience,
        replied: false,
        assured: &mut false,
    }
    .follow(segment, options, false);
    match tracked {
        Tracked::Accept => Ok(()),
        Tracked::Invalid(reason) => Err(reason),
        Tracked::Ignore | Tracked::Last | Tracked::Restart => Err(DropReason::TcpState),
    }
}
