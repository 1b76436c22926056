//! One tracked flow: what a packet of either direction needs, in two cache lines for IPv4.

use super::index::Location;
use super::tcp::{Last, Patience, Side, State};
use crate::address::Address;
use crate::frame::Time;
use crate::view::{FlowState, FlowView};
use crate::wire::transport::{Kind, swapped};
use crate::wire::{checksum, high16, low16, low32, protocol};

/// Coarse time: units of 2^28 nanoseconds, about 0.27 seconds. Wraps after 36 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ticks(pub(crate) u32);

/// Nanoseconds in a tick, as a power of two.
const TICK_SHIFT: u32 = 28;

impl Ticks {
    #[inline(always)]
    pub(crate) const fn at(now: Time) -> Self {
        Self(low32(now.as_nanos() >> TICK_SHIFT))
    }

    /// Ticks in a number of seconds, rounded up.
    pub(crate) const fn in_seconds(seconds: u32) -> u32 {
        low32((seconds as u64 * 1_000_000_000).div_ceil(1 << TICK_SHIFT))
    }

    /// Ticks from `earlier` to here.
    #[inline(always)]
    pub(crate) const fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }

    pub(crate) const fn plus(self, ticks: u32) -> Self {
        Self(self.0.wrapping_add(ticks))
    }

    /// Seconds in a number of ticks, rounded down.
    pub(crate) const fn to_seconds(ticks: u32) -> u32 {
        low32(((ticks as u64) << TICK_SHIFT) / 1_000_000_000)
    }

    /// The first moment with this tick, or `now` if that is past.
    pub(crate) const fn to_time(self, now: Time) -> Time {
        let ahead = self.since(Self::at(now));
        if ahead == 0 || ahead > u32::MAX / 2 {
            return now;
        }
        let start = (now.as_nanos() >> TICK_SHIFT).saturating_add(ahead as u64);
        Time::from_nanos(start << TICK_SHIFT)
    }
}

/// Timeouts in ticks, by patience.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const TIMEOUTS: [u32; 16] = {
    let all = [
        Patience::SynSent,
        Patience::SynReceived,
        Patience::Established,
        Patience::FinWait,
        Patience::CloseWait,
        Patience::LastAck,
        Patience::TimeWait,
        Patience::Closed,
        Patience::Unacknowledged,
        Patience::UdpUnreplied,
        Patience::UdpStream,
        Patience::Icmp,
        Patience::Generic,
    ];
    let mut ticks = [0; 16];
    let mut at = 0;
    while at < all.len() {
        // The array is in the order of the discriminants.
        assert!(all[at] as usize == at);
        ticks[at] = Ticks::in_seconds(all[at].seconds());
        at += 1;
    }
    ticks
};

/// How long a UDP flow must live to count as a stream (Linux: two seconds).
const STREAM_AGE: u32 = Ticks::in_seconds(2);

/// What identifies packets of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    pub(crate) ports: u32,
    pub(crate) protocol: u8,
}

impl<A: Address> Key<A> {
    /// The key of packets that answer packets with this one.
    pub(crate) const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            ports: swapped(self.ports),
            protocol: self.protocol,
        }
    }
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Half<A> {
    // In this order both IPv4 addresses compare as one number.
    pub(crate) dst: A,
    pub(crate) src: A,
    pub(crate) ports: u32,
    /// Change of the IP header's sum, the time to live included.
    pub(crate) network_delta: u16,
    /// Change of the transport's sum.
    pub(crate) transport_delta: u16,
    pub(crate) seen: Ticks,
    pub(crate) packets: u32,
    pub(crate) tcp: Side,
    /// The low half of where its reference lies in the index.
    location_low: u16,
}

// Flags of a flow.
pub(crate) const LIVE: u8 = 1;
/// Of an entry without [`LIVE`]: it has idled out, and is still in the index and in its owner's list.
pub(super) const RETIRED: u8 = 2;
pub(crate) const REPLIED: u8 = 2;
pub(crate) const ASSURED: u8 = 4;
/// It left with a port of our choice.
pub(crate) const REMAPPED: u8 = 8;
/// It is in a slot of the timer wheel.
pub(crate) const ON_WHEEL: u8 = 16;
/// It is in the list of its owner's assured flows.
pub(crate) const IN_ASSURED_LIST: u8 = 32;
/// Its packets go to another destination than the client names.
pub(crate) const DESTINATION_CHANGED: u8 = 64;

/// Rules cannot tell what it carries.
pub(crate) const OPAQUE: u8 = 128;

/// No rule: the policy decided.
pub(crate) const POLICY_RULE: u16 = u16::MAX;

/// A flow. 128 bytes for IPv4, 192 bytes for IPv6.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct Flow<A> {
    /// Original direction, then replies. Each holds the packets as they come in: the reply's key is
    /// what the original becomes, reversed.
    pub(crate) half: [Half<A>; 2],
    /// When its owner's rules last allowed it.
    pub(crate) epoch: u32,
    pub(super) timer_next: u32,
    pub(super) list_previous: u32,
    pub(super) list_next: u32,
    pub(crate) created: Ticks,
    /// The client address that it belongs to.
    pub(crate) owner: u16,
    /// The rule that let it start.
    pub(crate) rule: u16,
    pub(crate) protocol: u8,
    pub(crate) state: State,
    pub(crate) patience: Patience,
    pub(crate) flags: u8,
    pub(crate) last: Last,
    /// The rest of where the references of its two directions lie in the index.
    location_high: [u8; 2],
}

const _: () = assert!(size_of::<Flow<crate::address::V4>>() == 128);
const _: () = assert!(size_of::<Flow<crate::address::V6>>() == 192);

impl<A: Address> Flow<A> {
    /// A flow between two keys: how the client's packets come in, and how replies do.
    #[inline(always)]
    pub(crate) fn new(original: &Key<A>, reply: &Key<A>, now: Ticks) -> Self {
        let mut flow = Self {
            created: now,
            protocol: original.protocol,
            flags: LIVE,
            rule: POLICY_RULE,
            ..Self::default()
        };
        let outgoing = reply.reversed();
        let addresses = checksum::delta(
            original.src.sum() + original.dst.sum(),
            outgoing.src.sum() + outgoing.dst.sum(),
        );
        let sum = |ports: u32| u64::from(high16(ports)) + u64::from(low16(ports));
        let ports = checksum::delta(sum(original.ports), sum(outgoing.ports));
        let [first, second] = &mut flow.half;
        first.set(original, addresses, ports, now);
        // What one direction adds, the other one takes away.
        second.set(reply, !addresses, !ports, now);
        if original.dst != outgoing.dst {
            flow.flags |= DESTINATION_CHANGED;
        }
        flow
    }

    /// Where the reference of one direction lies in the index.
    #[inline(always)]
    pub(super) fn location(&self, reply: bool) -> Location {
        let [original, replying] = self.location_high;
        let high = if reply { replying } else { original };
        Location::from_bits(u32::from(high) << 16 | u32::from(self.side(reply).location_low))
    }

    /// Remembers where the references of both directions lie.
    #[inline(always)]
    pub(super) fn set_locations(&mut self, [original, reply]: [Location; 2]) {
        let [a, b] = [original.to_bits(), reply.to_bits()];
        let [first, second] = &mut self.half;
        first.location_low = low16(a);
        second.location_low = low16(b);
        self.location_high = [a, b].map(|bits| bits.to_le_bytes()[2]);
    }

    /// The key of one direction.
    #[inline(always)]
    pub(crate) fn key(&self, reply: bool) -> Key<A> {
        let half = self.side(reply);
        Key {
            src: half.src,
            dst: half.dst,
            ports: half.ports,
            protocol: self.protocol,
        }
    }

    /// One direction.
    #[inline(always)]
    pub(crate) fn side(&self, reply: bool) -> &Half<A> {
        let [original, replying] = &self.half;
        if reply { replying } else { original }
    }

    /// One direction, then the other one.
    #[inline(always)]
    pub(crate) fn sides_mut(&mut self, reply: bool) -> (&mut Half<A>, &mut Half<A>) {
        let [original, replying] = &mut self.half;
        if reply {
            (replying, original)
        } else {
            (original, replying)
        }
    }

    /// Whether it has idled longer than it may.
    #[inline(always)]
    pub(crate) fn is_overdue(&self, now: Ticks) -> bool {
        let [original, reply] = &self.half;
        let timeout = self.timeout();
        now.since(original.seen) > timeout && now.since(reply.seen) > timeout
    }

    #[inline(always)]
    pub(super) fn timeout(&self) -> u32 {
        TIMEOUTS.get(self.patience as usize).copied().unwrap_or(0)
    }

    /// When it idles out.
    pub(super) fn deadline(&self, now: Ticks) -> Ticks {
        let [original, reply] = &self.half;
        let idle = now.since(original.seen).min(now.since(reply.seen));
        now.plus(self.timeout().wrapping_add(1).saturating_sub(idle))
    }

    /// State of anything but TCP after a packet.
    #[inline(always)]
    pub(crate) fn follow_datagram(&mut self, reply: bool, now: Ticks) {
        if self.flags & ASSURED != 0 {
            return;
        }
        self.follow_young_datagram(reply, now);
    }

    fn follow_young_datagram(&mut self, reply: bool, now: Ticks) {
        match self.protocol {
            protocol::UDP => {
                let (flags, patience) = (&mut self.flags, &mut self.patience);
                follow_udp(flags, patience, self.created, reply, now);
            }
            number if number == A::ICMP => self.patience = Patience::Icmp,
            _ => self.patience = Patience::Generic,
        }
        if reply {
            self.flags |= REPLIED;
        }
    }

    /// Whether it should make room before its owner's other flows.
    pub(crate) const fn is_transient(&self) -> bool {
        if self.protocol == protocol::TCP {
            self.flags & ASSURED == 0 || self.state.is_closing()
        } else {
            self.flags & REPLIED == 0
        }
    }

    /// Shows it.
    pub(crate) fn view(&self, now: Ticks) -> FlowView {
        let [original, reply] = &self.half;
        let is_icmp = self.protocol == A::ICMP;
        let state = match self.protocol {
            protocol::TCP => self.state.view(),
            _ if self.flags & REPLIED == 0 => FlowState::Unreplied,
            _ if self.flags & ASSURED == 0 => FlowState::Replied,
            _ => FlowState::Stream,
        };
        let destination_port = |ports| if is_icmp { 0 } else { low16(ports) };
        FlowView {
            protocol: self.protocol,
            source: (original.src.to_ip(), high16(original.ports)),
            destination: (original.dst.to_ip(), destination_port(original.ports)),
            translated_source: (reply.dst.to_ip(), low16(reply.ports)),
            translated_destination: (reply.src.to_ip(), destination_port(swapped(reply.ports))),
            state,
            expires_seconds: Ticks::to_seconds(self.deadline(now).since(now)),
            packets_up: original.packets,
            packets_down: reply.packets,
            rule: (self.rule != POLICY_RULE).then_some(self.rule),
        }
    }
}

impl<A: Address> Half<A> {
    /// Takes a key, and what turns the sums of packets with it into those of what they become.
    fn set(&mut self, key: &Key<A>, addresses: u16, ports: u16, now: Ticks) {
        self.src = key.src;
        self.dst = key.dst;
        self.ports = key.ports;
        self.seen = now;
        self.network_delta = checksum::join(addresses, crate::address::TTL_DELTA);
        // ICMP over IPv4 has no pseudo-header.
        self.transport_delta = if key.protocol == protocol::ICMP {
            ports
        } else {
            checksum::join(addresses, ports)
        };
    }
}

/// State of a UDP flow after a packet.
#[inline(always)]
pub(crate) fn follow_udp(
    flags: &mut u8,
    patience: &mut Patience,
    created: Ticks,
    reply: bool,
    now: Ticks,
) {
    if *flags & ASSURED != 0 {
        return;
    }
    // Linux looks at whether a reply was seen before this packet.
    if *flags & REPLIED != 0 && now.since(created) > STREAM_AGE {
        *patience = Patience::UdpStream;
        *flags |= ASSURED;
    } else {
        *patience = Patience::UdpUnreplied;
    }
    if reply {
        *flags |= REPLIED;
    }
}

/// Whether packets of a kind are looked up in the table in this direction.
#[inline(always)]
pub(crate) const fn is_trackable(kind: Kind, reply: bool) -> bool {
    match kind {
        Kind::Tcp | Kind::Udp | Kind::Other => true,
        Kind::Request => !reply,
        Kind::Reply => reply,
        Kind::Error | Kind::OtherIcmp => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udp_flow_is_a_stream_only_after_two_seconds_with_replies() {
        let key = Key {
            src: 1_u32,
            dst: 2,
            ports: 3,
            protocol: protocol::UDP,
        };
        let start = Ticks(1000);
        let mut flow = Flow::new(&key, &key.reversed(), start);
        flow.follow_datagram(false, start);
        flow.follow_datagram(true, start.plus(1));
        flow.follow_datagram(false, start.plus(STREAM_AGE));
        assert_eq!(flow.patience, Patience::UdpUnreplied);
        flow.follow_datagram(false, start.plus(STREAM_AGE + 1));
        assert_eq!(flow.patience, Patience::UdpStream);
    }

    #[test]
    fn flow_is_overdue_after_its_timeout_and_not_before() {
        let key = Key {
            src: 1_u32,
            dst: 2,
            ports: 3,
            protocol: 47,
        };
        let mut flow = Flow::new(&key, &key.reversed(), Ticks(u32::MAX - 5));
        flow.follow_datagram(false, Ticks(u32::MAX - 5));
        let timeout = Ticks::in_seconds(600);
        assert!(!flow.is_overdue(Ticks(u32::MAX - 5).plus(timeout)));
        assert!(flow.is_overdue(Ticks(u32::MAX - 5).plus(timeout + 1)));
    }
}
