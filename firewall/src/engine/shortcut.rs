//! The shortest way for nearly every packet: data of an established TCP connection, and UDP of a flow.
//!
//! It takes a packet only if everything about it is plain: no options or extension headers, no
//! fragment, no segmentation offload, a flow that is not overdue and whose epoch is current, a segment
//! in the middle of its window, enough time to live, no larger than the next link. Then it does exactly
//! what `arrival.rs` and `forward.rs` do for such a packet. Otherwise nothing has changed, and the packet
//! takes the long way.
//!
//! Both steps are compiled into their callers, with `reply` known where that pays.

use super::core::{Core, Local};
use crate::conntrack::flow::{self, Flow, Half, Key, Ticks};
use crate::conntrack::tcp::{State, steady};
use crate::frame::{Checksum, ClientId, Frame, Gso, Iface};
use crate::wire::plain::mac_word;
use crate::wire::transport::{pseudo_sum, swapped};
use crate::wire::{checksum, ethernet, protocol};

/// The options of a segment that carries a timestamp and nothing else (RFC 7323 appendix A).
const TIMESTAMP_ONLY: [u8; 4] = [1, 1, 8, 10];

/// What a frame is besides its bytes.
#[derive(Debug)]
pub(crate) struct Meta<'f> {
    len: &'f mut u32,
    checksum: &'f Checksum,
    gso: &'f Option<Gso>,
}

impl<'f> Meta<'f> {
    /// Takes a frame apart.
    #[inline(always)]
    pub(crate) fn of(frame: &'f mut Frame<'_>) -> (&'f mut [u8], Self) {
        let meta = Self {
            len: &mut frame.len,
            checksum: &frame.checksum,
            gso: &frame.gso,
        };
        (frame.head, meta)
    }
}

/// Reads a plain packet of a flow.
#[inline(always)]
pub(crate) fn read<A: Local>(
    core: &Core,
    head: &[u8],
    frame_len: u32,
    reply: bool,
) -> Option<Key<A>> {
    read_if(core, head, frame_len, reply, steady::is_plain)
}

/// Reads a plain packet of a client that may be the first of a flow: any, if it `has_no_flow`.
#[inline(always)]
pub(crate) fn read_first<A: Local>(
    core: &Core,
    head: &[u8],
    frame_len: u32,
    has_no_flow: bool,
) -> Option<Key<A>> {
    let is_wanted = |tail: &steady::Tail| has_no_flow || steady::is_first(tail);
    read_if(core, head, frame_len, false, is_wanted)
}

/// Reads a plain packet, if it is UDP or a TCP segment that `is_wanted`.
#[inline(always)]
fn read_if<A: Local>(
    core: &Core,
    head: &[u8],
    frame_len: u32,
    reply: bool,
    is_wanted: impl FnOnce(&steady::Tail) -> bool,
) -> Option<Key<A>> {
    let (front, rest) = A::front(head)?;
    let protocol = A::protocol(front);
    // Segments that start or end a connection go the long way; see that before anything is summed.
    match protocol {
        protocol::TCP if is_wanted(rest.first_chunk()?) => {}
        protocol::UDP => {}
        _ => return None,
    }
    let own = if reply {
        core.plain_uplink.mac
    } else {
        const { mac_word(ethernet::OWN_CLIENT_SIDE) }
    };
    if A::destination(front) != own {
        return None;
    }
    let (src, dst) = A::read(front, frame_len)?;
    Some(Key {
        src,
        dst,
        ports: A::ports(front),
        protocol,
    })
}

/// Sends a packet that [`read`] has read along its flow, if both are plain enough; returns where to.
/// `ingress` is the client, if any.
#[inline(always)]
pub(crate) fn pass<A: Local>(
    core: &mut Core,
    (number, flow): (u32, &mut Flow<A>),
    ingress: ClientId,
    (head, meta): (&mut [u8], Meta<'_>),
    ticks: Ticks,
    reply: bool,
) -> Option<Iface> {
    let source = core.registry.sources.get(usize::from(flow.owner))?;
    let id = source.vif;
    // With the owner's epoch, the flow's source is still an address of the vif that the owner has: a
    // client's packet that comes from this vif cannot be spoofed (A7).
    if source.epoch != flow.epoch || (!reply && ingress.0 != id) {
        return None;
    }
    let (front, rest) = A::front_mut(head)?;
    if A::ttl(front) <= 1 || meta.gso.is_some() || flow.is_overdue(ticks) {
        return None;
    }
    let vifs = &mut core.registry.vifs;
    let vif = vifs.get_mut(usize::from(id))?.as_deref_mut()?;
    let (link, mtu) = if reply {
        (&vif.link, vif.mtu)
    } else {
        (&core.plain_uplink.link, core.plain_uplink.mtu)
    };
    let total_len = A::total_len(front);
    if vif.fake.is_some() || total_len > u32::from(mtu) {
        return None;
    }
    let protocol = A::protocol(front);
    let start = A::transport(front)?;
    let [original, replying] = &mut flow.half;
    let (own, other) = if reply {
        (replying, original)
    } else {
        (original, replying)
    };
    let listed = flow.flags & flow::IN_ASSURED_LIST != 0;
    if protocol == protocol::TCP {
        let (tail, options) = rest.split_first_chunk_mut::<12>()?;
        let header_len = steady::header_len(tail);
        if header_len != 20 && !only_timestamp(header_len, options) {
            return None;
        }
        let segment = steady::Plain {
            seq: u32::from_be_bytes([start[4], start[5], start[6], start[7]]),
            ack: u32::from_be_bytes([tail[0], tail[1], tail[2], tail[3]]),
            window: u16::from_be_bytes([tail[6], tail[7]]),
            payload: total_len.checked_sub(A::HEADER_BYTES + header_len)?,
        };
        // A flow in that list is assured.
        if !listed || flow.state != State::Established {
            return None;
        }
        let (last, patience) = (&mut flow.last, &mut flow.patience);
        let (sender, receiver) = (&mut own.tcp, &mut other.tcp);
        if !steady::advance(sender, receiver, last, patience, &segment, reply) {
            return None;
        }
        let field = u16::from_be_bytes([tail[8], tail[9]]);
        let field = match *meta.checksum == Checksum::Blank {
            true => pseudo(other, protocol::TCP, total_len),
            false => checksum::apply(field, own.transport_delta),
        };
        [tail[8], tail[9]] = field.to_be_bytes();
    } else {
        let len = u32::from(u16::from_be_bytes([start[4], start[5]]));
        let field = u16::from_be_bytes([start[6], start[7]]);
        if len < 8 || len + A::HEADER_BYTES > total_len {
            return None;
        }
        // The flow must be in the right list already.
        if listed != (reply || flow.flags & flow::REPLIED != 0) {
            return None;
        }
        let (flags, patience) = (&mut flow.flags, &mut flow.patience);
        flow::follow_udp(flags, patience, flow.created, reply, ticks);
        let field = match *meta.checksum == Checksum::Blank {
            true => pseudo(other, protocol::UDP, total_len),
            // There is none.
            false if field == 0 => 0,
            false => match checksum::apply(field, own.transport_delta) {
                0 => 0xffff,
                field => field,
            },
        };
        [start[6], start[7]] = field.to_be_bytes();
    }
    own.seen = ticks;
    own.packets = own.packets.wrapping_add(1);
    [start[0], start[1], start[2], start[3]] = swapped(other.ports).to_be_bytes();
    A::redirect(front, link, other.dst, other.src, own.network_delta);
    *meta.len = total_len + 14;
    let bytes = u64::from(total_len);
    let counters = &mut core.counters;
    core.last_flow = number;
    core.last_rule = None;
    if reply {
        vif.frames_down = vif.frames_down.wrapping_add(1);
        vif.bytes_down = vif.bytes_down.wrapping_add(bytes);
        counters.forwarded_down = counters.forwarded_down.wrapping_add(1);
        counters.forwarded_down_bytes = counters.forwarded_down_bytes.wrapping_add(bytes);
        Some(Iface::Client(ClientId(id)))
    } else {
        vif.frames_up = vif.frames_up.wrapping_add(1);
        vif.bytes_up = vif.bytes_up.wrapping_add(bytes);
        counters.forwarded_up = counters.forwarded_up.wrapping_add(1);
        counters.forwarded_up_bytes = counters.forwarded_up_bytes.wrapping_add(bytes);
        Some(Iface::Uplink)
    }
}

/// Whether a TCP header has nothing behind it but a timestamp: by far the most usual options.
fn only_timestamp(header_len: u32, options: &[u8]) -> bool {
    header_len == 32 && options.len() >= 12 && options.starts_with(&TIMESTAMP_ONLY)
}

/// What stands in the checksum field of a packet whose checksum is not computed yet.
#[inline(never)]
fn pseudo<A: Local>(other: &Half<A>, number: u8, total_len: u32) -> u16 {
    let len = total_len.wrapping_sub(A::HEADER_BYTES);
    checksum::fold(pseudo_sum(other.dst, other.src, number, len))
}
