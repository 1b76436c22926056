//! What the engine says about a frame, and how often it said what.
//!
//! Every reason has a name that never changes and a counter, in total and per client. Counters are
//! plain 64-bit numbers that only grow.

use serde::{Deserialize, Serialize};

use crate::frame::Iface;

/// What is to become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[must_use]
pub enum Verdict {
    /// Send the frame, rewritten in place, to this interface.
    Forward {
        /// Where it goes.
        egress: Iface,
    },
    /// Forget the frame.
    Drop(DropReason),
    /// Forget the frame; its sender is told by an ICMP error in the outbox, within the rate limit.
    Reject(DropReason),
    /// The frame was for us and is done with; an answer may be in the outbox.
    Local,
    /// The frame was for us and answers something that we sent: its bytes are the caller's.
    Deliver,
    /// The frame is a fragment and was copied; its datagram is not complete yet.
    Held,
    /// Forget the frame: what it carried goes on as other frames, which are in the outbox.
    Replaced {
        /// Where they go.
        egress: Iface,
    },
}

/// Declares the reasons with their names once.
macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame does not go on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The stable name, in words joined by hyphens.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// The frame names a client that is not attached.
    UnknownClient = "unknown-client",
    /// The uplink is absent, so nothing can come from it.
    UplinkAbsent = "uplink-absent",
    /// Too short for an Ethernet header, or lengths that contradict each other.
    MalformedFrame = "malformed-frame",
    /// The destination address is neither ours nor broadcast nor multicast.
    ForeignMac = "foreign-mac",
    /// Neither IPv4, IPv6 nor ARP.
    NotIp = "not-ip",
    /// An ARP packet that asks for nothing we answer.
    ArpIgnored = "arp-ignored",
    /// A neighbour-discovery message that asks for nothing we answer.
    NeighbourIgnored = "neighbour-ignored",
    /// IPv4 header lengths or version make no sense.
    MalformedIpv4 = "malformed-ipv4",
    /// IPv6 header lengths, version or extension headers make no sense.
    MalformedIpv6 = "malformed-ipv6",
    /// The IPv4 header checksum is wrong.
    BadHeaderChecksum = "bad-header-checksum",
    /// A header that the transport needs is cut short, or its lengths make no sense.
    MalformedTransport = "malformed-transport",
    /// The transport checksum is wrong.
    BadChecksum = "bad-checksum",
    /// The frame claims an unfinished checksum for something that cannot have one.
    BlankChecksumUnusable = "blank-checksum-unusable",
    /// The frame claims segmentation offload for something that cannot have it.
    GsoUnusable = "gso-unusable",
    /// The source is not an address of the vif it came from.
    SpoofedSource = "spoofed-source",
    /// The source is an address of one of our clients, and it came from the uplink.
    GuardedSource = "guarded-source",
    /// The source is an address that nothing can send from.
    MartianSource = "martian-source",
    /// The destination is an address that nothing can be sent to.
    MartianDestination = "martian-destination",
    /// The destination is a broadcast or multicast address.
    Multicast = "multicast",
    /// A unicast packet in a broadcast or multicast frame.
    LinkBroadcast = "link-broadcast",
    /// The packet says itself which way it wants to go.
    SourceRouted = "source-routed",
    /// IPv6 is off.
    Ipv6Off = "ipv6-off",
    /// A fragment whose offset or length makes no sense, or that is too large to keep.
    FragmentMalformed = "fragment-malformed",
    /// A fragment that contradicts another one of its datagram; the datagram is dropped.
    FragmentOverlap = "fragment-overlap",
    /// No room for the fragment, or its datagram was dropped to make room.
    FragmentLimit = "fragment-limit",
    /// The rest of the datagram did not come in time.
    FragmentTimeout = "fragment-timeout",
    /// TCP flags that no segment may have.
    TcpFlags = "tcp-flags",
    /// A TCP segment that belongs to no flow and starts none, or that its flow's state forbids.
    TcpState = "tcp-state",
    /// A TCP segment outside the window of its flow.
    TcpWindow = "tcp-window",
    /// An ICMP message that belongs to no flow and starts none.
    IcmpState = "icmp-state",
    /// An ICMP error about a packet that we know nothing of.
    IcmpUnrelated = "icmp-unrelated",
    /// DNS to a virtual resolver while no real one is known.
    NoResolver = "no-resolver",
    /// The client has no rules.
    NoRules = "no-rules",
    /// The client's rules cannot be understood; everything is refused.
    InvalidRules = "invalid-rules",
    /// A rule refuses it.
    Rule = "rule",
    /// No rule accepts it.
    Policy = "policy",
    /// It would reach a client.
    ToClient = "to-client",
    /// It would take an address of one of our clients to the uplink.
    GuardedDestination = "guarded-destination",
    /// There is no uplink to send it to.
    NoRoute = "no-route",
    /// Its time to live has run out.
    TtlExceeded = "ttl-exceeded",
    /// It is too large for the next link and must not be fragmented.
    TooBig = "too-big",
    /// It is for us, and we offer nothing there.
    LocalRefused = "local-refused",
    /// It is for us, and is not worth an answer.
    LocalIgnored = "local-ignored",
    /// Nobody asked the uplink for it.
    Unsolicited = "unsolicited",
    /// It came from the uplink and would go back there.
    Transit = "transit",
    /// No port or identifier is left for its translation.
    NatExhausted = "nat-exhausted",
    /// The flow table has no room that this client may use.
    TableFull = "table-full",
    /// The frame that should replace it does not fit the outbox.
    OutboxFull = "outbox-full",
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// How often frames did not go on, by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCounters([u64; DropReason::COUNT]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::COUNT])
    }
}

impl DropCounters {
    /// Frames that did not go on for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0.get(reason as usize).copied().unwrap_or(0)
    }

    /// Every reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().copied().zip(self.0.iter().copied())
    }

    /// Frames that did not go on, for whatever reason.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    #[inline]
    pub(crate) fn add(&mut self, reason: DropReason) {
        if let Some(count) = self.0.get_mut(reason as usize) {
            *count = count.wrapping_add(1);
        }
    }
}

/// Declares the counters with their names once.
macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident = $name:literal,)*) => {
        /// What the engine has done since it was made, without the reasons for drops.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[non_exhaustive]
        pub struct Counters {
            $($(#[$doc])* pub $field: u64,)*
        }

        impl Counters {
            /// Every counter with its stable name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$(($name, self.$field),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Frames that were sent on to the uplink, as they are or replaced.
    forwarded_up = "forwarded-up",
    /// Bytes of IP packet in them.
    forwarded_up_bytes = "forwarded-up-bytes",
    /// Frames that were sent on to clients, as they are or replaced.
    forwarded_down = "forwarded-down",
    /// Bytes of IP packet in them.
    forwarded_down_bytes = "forwarded-down-bytes",
    /// Frames that were dropped or rejected.
    dropped = "dropped",
    /// Those of them that were rejected: ICMP errors asked for, sent or not.
    rejected = "rejected",
    /// Frames for us that were used.
    local = "local",
    /// Flows that were started.
    flows_created = "flows-created",
    /// Flows that idled out.
    flows_expired = "flows-expired",
    /// Flows that made room for new ones.
    flows_evicted = "flows-evicted",
    /// Flows that changed rules, guards, clients or uplink cut.
    flows_cut = "flows-cut",
    /// Flows that could not be started for lack of room or ports.
    flows_refused = "flows-refused",
    /// Flows that left with another port or identifier than their own.
    ports_remapped = "ports-remapped",
    /// ICMP errors that were put in the outbox.
    icmp_errors_sent = "icmp-errors-sent",
    /// ICMP errors that the rate limit suppressed.
    icmp_errors_limited = "icmp-errors-limited",
    /// Echo replies that were put in the outbox.
    echo_replies = "echo-replies",
    /// ARP replies and neighbour advertisements that were put in the outbox.
    neighbour_replies = "neighbour-replies",
    /// Generated frames that did not fit the outbox.
    outbox_full = "outbox-full",
    /// Fragments that were kept for a while.
    fragments_held = "fragments-held",
    /// Datagrams that became complete.
    datagrams_reassembled = "datagrams-reassembled",
    /// Datagrams that were given up: timeout, overlap or lack of room.
    datagrams_abandoned = "datagrams-abandoned",
    /// Frames that were cut into fragments.
    datagrams_fragmented = "datagrams-fragmented",
    /// GSO frames without the blank-checksum flag, which were treated as if they had it.
    gso_without_blank = "gso-without-blank",
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_kebab_case() {
        let names: BTreeSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
        for name in names {
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            );
        }
    }

    #[test]
    fn every_reason_has_its_own_counter() {
        let mut counters = DropCounters::default();
        for reason in DropReason::ALL {
            counters.add(*reason);
        }
        assert!(counters.iter().all(|(_, count)| count == 1));
        assert_eq!(counters.total(), u64::try_from(DropReason::COUNT).unwrap());
    }
}
