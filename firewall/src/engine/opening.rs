//! The shortest way for the first packet of a flow: a client's SYN, or the first datagram of a UDP flow.
//!
//! As [`super::shortcut`], it takes a packet only if everything about it is plain, here also its
//! destination: neither us, nor another client, nor a group or an address that is never on a wire. Then
//! it does exactly what [`super::client`] does for such a packet. Otherwise nothing has changed, and the
//! packet takes the long way.
//!
//! It also decides two kinds of packets that do not go on and that anybody can send in any number:
//! those with another's source address, and those that the client's rules refuse.

use super::client::{self, Start};
use super::complain::{self, Complaint};
use super::core::{Core, Local, Packet};
use super::{forward, shortcut};
use crate::conntrack::flow::Key;
use crate::conntrack::index::Place;
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::{Segment, steady};
use crate::frame::{Checksum, ClientId, Frame, Iface, Time};
use crate::registry::Rules;
use crate::rule::{Action, Family};
use crate::ruleset::{RuleRef, UpperLayer};
use crate::verdict::{DropReason, Verdict};
use crate::wire::ipv4::Network;
use crate::wire::transport::{self, Kind, Transport};
use crate::wire::{checksum, ethernet, low16, protocol};

/// Whether a packet may be the first of a flow: a SYN, or a datagram if the packet is `unknown`, that is
/// if no flow was found for it.
#[inline(always)]
pub(crate) fn is_worth_it<A: Local>(head: &[u8], unknown: bool) -> bool {
    let Some((front, rest)) = A::front(head) else {
        return false;
    };
    match A::protocol(front) {
        protocol::TCP => rest.first_chunk().is_some_and(steady::is_first),
        protocol::UDP => unknown,
        _ => false,
    }
}

/// Decides a packet of a client; `None` if that takes the long way. `known` is where its key belongs, if
/// it was looked up and has no flow.
#[inline(always)]
pub(crate) fn decide<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    id: ClientId,
    frame: &mut Frame<'_>,
    known: Option<Place>,
    now: Time,
) -> Option<Verdict> {
    let key = &shortcut::read_first::<A>(core, frame.head, frame.len, known.is_some())?;
    let vif = core.registry.vif(id.0)?;
    if vif.fake.is_some() {
        return None;
    }
    // A7
    let Some(source) = A::list(vif).source(key.src) else {
        return Some(Verdict::Drop(DropReason::SpoofedSource));
    };
    let head = &*frame.head;
    let (front, rest) = A::front(head)?;
    let (total_len, ttl) = (A::total_len(front), A::ttl(front));
    let transport_len = total_len.checked_sub(A::HEADER_BYTES)?;
    let bytes = head.get(ethernet::HEADER + A::HEADER_LEN..)?;
    let (kind, tcp) = match key.protocol {
        protocol::TCP => {
            let tail = rest.first_chunk()?;
            let (header, options) = bytes.split_first_chunk::<20>()?;
            let options_len = usize::try_from(steady::header_len(tail)).ok()?;
            let options = options.get(..options_len.checked_sub(20)?)?;
            let segment = Segment::new(header, transport_len);
            let fits = steady::header_len(tail) <= transport_len && segment.is_plain_first();
            (Kind::Tcp, Some((segment, options)).filter(|_| fits))
        }
        _ => {
            let [_, _, _, _, high, low, ..] = *bytes else {
                return None;
            };
            let len = u32::from(u16::from_be_bytes([high, low]));
            if len < 8 || len > transport_len {
                return None;
            }
            (Kind::Udp, None)
        }
    };
    if (kind == Kind::Tcp && tcp.is_none()) || frame.gso.is_some() {
        return None;
    }
    if frame.checksum == Checksum::Unverified
        && let Some(covered) = bytes.get(..usize::try_from(transport_len).ok()?)
        && !transport::checksum_is_right((key.src, key.dst), key.protocol, transport_len, covered)
    {
        return None;
    }
    // A11
    let mut destination = key.dst;
    if low16(key.ports) == client::DNS
        && let Some(real) = A::resolver(core, key.dst)
    {
        destination = real.ok()?;
    }
    // A12 to A14, A22, A23
    if destination.is_group()
        || destination.is_martian()
        || destination.is_link_scoped()
        || A::is_ours(core, destination)
        || A::node(&core.registry, destination).guarded
    {
        return None;
    }
    // A9, A14 to A17
    let uplink = core.uplink.as_ref().filter(|own| A::has_route(own))?;
    let own = A::own(uplink)?;
    let is_off = A::FAMILY == Family::Ipv6 && core.downstream.gateway6.is_none();
    if is_off || ttl <= 1 || total_len > u32::from(uplink.config.mtu) {
        return None;
    }
    // A21
    let entry = core.registry.source(source)?;
    let Rules::Compiled(rules) = &entry.rules else {
        return None;
    };
    let port = low16(key.ports);
    let upper = match kind {
        Kind::Tcp => UpperLayer::Tcp { port },
        _ => UpperLayer::Udp { port },
    };
    let decision = A::decide(rules, destination, upper);
    core.last_rule = Some(decision.rule);
    if decision.action == Action::Drop {
        // A flow to another resolver than now may still be allowed, also if the resolver of now is the
        // one that the client names.
        if known.is_none() && low16(key.ports) == client::DNS {
            return None;
        }
        let reason = match decision.rule {
            RuleRef::Number(_) => DropReason::Rule,
            RuleRef::Policy => DropReason::Policy,
        };
        if key.src.is_group() || key.src.is_martian() {
            return None;
        }
        let from = A::gateway(core)?;
        let ingress = Iface::Client(id);
        if complain::admit(core, ingress, now) {
            let packet = packet(front, key, kind);
            let complaint = Complaint::Prohibited;
            complain::send(core, frame, &packet, ingress, complaint, from);
        }
        frame.len = total_len + 14;
        return Some(Verdict::Reject(reason));
    }
    let rule = forward::rule_number(decision.rule);
    let epoch = entry.epoch;
    // A10. Rules refuse no packet of a flow whose epoch is current, so they can be asked first.
    let place = match known {
        Some(place) => place,
        None => {
            let place = table.place(key);
            if table.find_at(place, key, false).is_some() {
                return None;
            }
            place
        }
    };
    // A24. The source speaks through this vif now (D10).
    core.registry.use_vif(source, id.0);
    let start = Start {
        source,
        epoch,
        place,
        original: *key,
        kind,
        destination,
        rule,
        opaque: false,
        tcp,
    };
    let change = match client::begin(core, table, own, &start, now) {
        Ok(change) => change,
        Err(reason) => {
            core.counters.flows_refused = core.counters.flows_refused.wrapping_add(1);
            return Some(Verdict::Drop(reason));
        }
    };
    send(core, frame, key.protocol, total_len, &change);
    Some(Verdict::Forward {
        egress: Iface::Uplink,
    })
}

/// A plain packet as the long way sees it.
fn packet<A: Local>(front: &A::Front, key: &Key<A>, kind: Kind) -> Packet<A> {
    Packet {
        network: Network {
            src: key.src,
            dst: key.dst,
            protocol: key.protocol,
            ttl: A::ttl(front),
            dont_fragment: A::dont_fragment(front),
            header_len: low16(A::HEADER_BYTES),
            total_len: A::total_len(front),
            ..Network::default()
        },
        transport: Transport {
            kind,
            ports: key.ports,
        },
        ..Packet::default()
    }
}

/// Rewrites the packet for the uplink.
#[inline(always)]
fn send<A: Local>(
    core: &Core,
    frame: &mut Frame<'_>,
    number: u8,
    total_len: u32,
    change: &forward::Change<A>,
) {
    let blank = frame.checksum == Checksum::Blank;
    let len = total_len.wrapping_sub(A::HEADER_BYTES);
    let sum = |field: u16| match blank {
        true => checksum::fold(transport::pseudo_sum(change.src, change.dst, number, len)),
        false => checksum::apply(field, change.transport_delta),
    };
    let Some((front, rest)) = A::front_mut(frame.head) else {
        return;
    };
    if let Some(start) = A::transport(front) {
        [start[0], start[1], start[2], start[3]] = change.ports.to_be_bytes();
        match (number, u16::from_be_bytes([start[6], start[7]])) {
            (protocol::TCP, _) => {
                if let Some(tail) = rest.first_chunk_mut::<12>() {
                    let field = u16::from_be_bytes([tail[8], tail[9]]);
                    [tail[8], tail[9]] = sum(field).to_be_bytes();
                }
            }
            // No checksum.
            (_, 0) if !blank => {}
            (_, field) => {
                let field = match sum(field) {
                    0 if !blank => 0xffff,
                    field => field,
                };
                [start[6], start[7]] = field.to_be_bytes();
            }
        }
    }
    let link = &core.plain_uplink.link;
    A::redirect(front, link, change.src, change.dst, change.network_delta);
    frame.len = total_len + 14;
}
