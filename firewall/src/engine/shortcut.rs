//! The shortest way for nearly every packet: data of an established TCP connection, and UDP of a flow.
//!
//! It takes a packet only if everything about it is plain: no options or extension headers, no
//! fragment, no segmentation offload, a flow that is not overdue and whose epoch is current, enough time
//! to live, no larger than the next link. Then it does exactly what [`super`] and `forward.rs` do for
//! such a packet. Otherwise nothing has changed, and the packet takes the long way.

use super::core::{Core, Local};
use crate::conntrack::flow::{self, Flow, Half, Key, Ticks};
use crate::conntrack::table::FlowTable;
use crate::conntrack::tcp::{self, Segment, State, Track, Tracked};
use crate::frame::{Checksum, ClientId, Frame, Iface, Time};
use crate::verdict::{DropReason, Verdict};
use crate::wire::ethernet;
use crate::wire::transport::{pseudo_sum, swapped};
use crate::wire::{checksum, protocol};

/// What a TCP flow must have to be taken: replies, data both ways, and its place among such flows.
const STEADY: u8 = flow::REPLIED | flow::ASSURED | flow::IN_ASSURED_LIST;

/// Takes a packet, or leaves it as it is.
#[inline(always)]
pub(crate) fn take<A: Local, const REPLY: bool>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    ingress: ClientId,
    frame: &mut Frame<'_>,
    now: Time,
) -> Option<Verdict> {
    let found = locate::<A, REPLY>(core, table, frame)?;
    pass::<A, REPLY>(core, table, &found, ingress, frame, now)
}

/// A packet of a flow, before anybody has looked at the flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    number: u32,
    transport_len: u32,
    protocol: u8,
    ttl: u8,
}

/// Reads a plain packet and finds its flow.
#[inline(always)]
pub(crate) fn locate<A: Local, const REPLY: bool>(
    core: &Core,
    table: &FlowTable<A>,
    frame: &mut Frame<'_>,
) -> Option<Located> {
    let (front, bytes) = A::split_front(frame.head)?;
    // Segments that start or end a connection go the long way; see that before anything is summed.
    let number = A::upper(front);
    if number == protocol::TCP && !tcp::is_plain(bytes.first_chunk()?) {
        return None;
    }
    let plain = A::peek(front, frame.len)?;
    let own_mac = if REPLY {
        &core.uplink.as_ref()?.config.mac
    } else {
        &ethernet::OWN_CLIENT_SIDE
    };
    if A::destination_mac(front) != own_mac {
        return None;
    }
    // Ports are the first four bytes of both transports; the rest is checked later.
    let ports = u32::from_be_bytes(*bytes.first_chunk()?);
    let key = Key {
        src: plain.src,
        dst: plain.dst,
        ports,
        protocol: plain.protocol,
    };
    Some(Located {
        number: table.find(&key, REPLY)?,
        transport_len: plain.transport_len,
        protocol: plain.protocol,
        ttl: plain.ttl,
    })
}

/// Sends a packet along its flow, if both are plain enough.
#[inline(never)]
pub(crate) fn pass<A: Local, const REPLY: bool>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    plain: &Located,
    ingress: ClientId,
    frame: &mut Frame<'_>,
    now: Time,
) -> Option<Verdict> {
    let number = plain.number;
    let ticks = Ticks::at(now);
    let flow = table.get_mut(number)?;
    let source = core.registry.sources.get(usize::from(flow.owner))?;
    let id = source.vif;
    // With the owner's epoch, the flow's source is still an address of the vif that the owner has: a
    // client's packet that comes from this vif cannot be spoofed (A7).
    if source.epoch != flow.epoch || plain.ttl <= 1 || flow.is_overdue(ticks) {
        return None;
    }
    if !REPLY && ingress.0 != id {
        return None;
    }
    let uplink = core.uplink.as_ref()?;
    let vif = core
        .registry
        .vifs
        .get_mut(usize::from(id))?
        .as_deref_mut()?;
    let total_len = plain.transport_len + A::HEADER_BYTES;
    let (link, mtu) = if REPLY {
        (&vif.link, vif.mtu)
    } else {
        (&uplink.link, uplink.config.mtu)
    };
    if vif.fake.is_some() || frame.gso.is_some() || total_len > u32::from(mtu) {
        return None;
    }
    let (front, bytes) = A::split_front(frame.head)?;
    let blank = frame.checksum == Checksum::Blank;
    let mut settled = true;
    match plain.protocol {
        protocol::TCP => {
            let (header, rest) = bytes.split_first_chunk_mut::<20>()?;
            let segment = Segment::new(header, plain.transport_len);
            let header_len = u32::from(header[12] >> 4) * 4;
            let steady = flow.flags & STEADY == STEADY && flow.state == State::Established;
            if !steady || header_len > plain.transport_len {
                return None;
            }
            let options = match usize::try_from(header_len).ok()?.checked_sub(20)? {
                0 => &[],
                len => rest.get(..len)?,
            };
            match track::<A, REPLY>(flow, &segment, options) {
                Tracked::Accept => own_half::<A, REPLY>(flow).seen = ticks,
                Tracked::Invalid(reason) => return Some(core.refuse::<REPLY>(id, reason)),
                _ => {}
            }
            let (own, other) = halves::<A, REPLY>(flow);
            [header[0], header[1], header[2], header[3]] = swapped(other.ports).to_be_bytes();
            let field = u16::from_be_bytes([header[16], header[17]]);
            let field = match blank {
                true => pseudo(other, plain.protocol, plain.transport_len),
                false => checksum::apply(field, own.transport_delta),
            };
            [header[16], header[17]] = field.to_be_bytes();
        }
        protocol::UDP => {
            let udp = bytes.first_chunk_mut::<8>()?;
            let len = u32::from(u16::from_be_bytes([udp[4], udp[5]]));
            let field = u16::from_be_bytes([udp[6], udp[7]]);
            // Without a checksum: rare enough for the long way.
            if len < 8 || len > plain.transport_len || field == 0 {
                return None;
            }
            flow.follow_datagram(REPLY, ticks);
            own_half::<A, REPLY>(flow).seen = ticks;
            let (own, other) = halves::<A, REPLY>(flow);
            [udp[0], udp[1], udp[2], udp[3]] = swapped(other.ports).to_be_bytes();
            let field = match blank {
                true => pseudo(other, plain.protocol, plain.transport_len),
                false => match checksum::apply(field, own.transport_delta) {
                    0 => 0xffff,
                    field => field,
                },
            };
            [udp[6], udp[7]] = field.to_be_bytes();
            settled = flow.is_transient() == (flow.flags & flow::IN_ASSURED_LIST == 0);
        }
        _ => return None,
    }
    let half = own_half::<A, REPLY>(flow);
    half.packets = half.packets.wrapping_add(1);
    let (own, other) = halves::<A, REPLY>(flow);
    let (ethernet, network) = A::parts(front)?;
    ethernet::set_addresses(ethernet, link);
    A::rewrite(network, other.dst, other.src, own.network_delta);
    frame.len = total_len + 14;
    let bytes = u64::from(total_len);
    let counters = &mut core.counters;
    let egress = if REPLY {
        vif.frames_down = vif.frames_down.wrapping_add(1);
        vif.bytes_down = vif.bytes_down.wrapping_add(bytes);
        counters.forwarded_down = counters.forwarded_down.wrapping_add(1);
        counters.forwarded_down_bytes = counters.forwarded_down_bytes.wrapping_add(bytes);
        Iface::Client(ClientId(id))
    } else {
        vif.frames_up = vif.frames_up.wrapping_add(1);
        vif.bytes_up = vif.bytes_up.wrapping_add(bytes);
        counters.forwarded_up = counters.forwarded_up.wrapping_add(1);
        counters.forwarded_up_bytes = counters.forwarded_up_bytes.wrapping_add(bytes);
        Iface::Uplink
    };
    core.last_flow = Some(number);
    core.last_rule = None;
    if !settled {
        table.settle(number);
    }
    Some(Verdict::Forward { egress })
}

impl Core {
    /// Counts a segment that tracking refuses.
    #[cold]
    fn refuse<const REPLY: bool>(&mut self, vif: u16, reason: DropReason) -> Verdict {
        let ingress = if REPLY {
            Iface::Uplink
        } else {
            Iface::Client(ClientId(vif))
        };
        self.count_drop(ingress, reason);
        Verdict::Drop(reason)
    }
}

/// The half that packets of this direction belong to, then the other one.
#[inline(always)]
const fn halves<A, const REPLY: bool>(flow: &Flow<A>) -> (&Half<A>, &Half<A>) {
    let [original, replying] = &flow.half;
    if REPLY {
        (replying, original)
    } else {
        (original, replying)
    }
}

#[inline(always)]
const fn own_half<A, const REPLY: bool>(flow: &mut Flow<A>) -> &mut Half<A> {
    let [original, replying] = &mut flow.half;
    if REPLY { replying } else { original }
}

/// Tracks a plain segment of an established connection.
#[inline(always)]
fn track<A, const REPLY: bool>(flow: &mut Flow<A>, segment: &Segment, options: &[u8]) -> Tracked {
    let [original, replying] = &mut flow.half;
    let (sender, receiver) = if REPLY {
        (replying, original)
    } else {
        (original, replying)
    };
    Track {
        sender: &mut sender.tcp,
        receiver: &mut receiver.tcp,
        last: &mut flow.last,
        state: &mut flow.state,
        patience: &mut flow.patience,
        replied: true,
        assured: &mut true,
    }
    .follow_established(segment, options, REPLY)
}

/// What stands in the checksum field of a packet whose checksum is not computed yet.
fn pseudo<A: Local>(other: &Half<A>, number: u8, len: u32) -> u16 {
    checksum::fold(pseudo_sum(other.dst, other.src, number, len))
}
