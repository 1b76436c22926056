//! The intended differences: where the engine does not do what this kernel with this ruleset does.
//!
//! Each names its reason, and matches as little as can be said. One that never applies is an error of
//! the list, because nobody would notice when it hides something else.

use firewall::{DropReason, Verdict};

use crate::packet::{Body, Damage, ICMP, ICMPV6, Packet, TCP, UDP};
use crate::script::Step;
use crate::seen::Seen;
use crate::world::own;

/// A packet that the two treated differently.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    pub(crate) step: &'a Step,
    pub(crate) kernel: &'a [Seen],
    pub(crate) engine: &'a [Seen],
    pub(crate) verdict: Verdict,
    /// The flow of the packet was running when rules came into force that forbid it.
    pub(crate) forbidden: bool,
    /// Time passes in the script.
    pub(crate) timed: bool,
}

/// A difference that is meant.
#[derive(Debug)]
pub(crate) struct Difference {
    /// What it is called in reports.
    pub(crate) name: &'static str,
    /// What differs.
    pub(crate) what: &'static str,
    /// Why, and who says so.
    pub(crate) reason: &'static str,
    pub(crate) applies: fn(&Case<'_>) -> bool,
}

/// All of them; the first that applies explains a case.
pub(crate) const ALL: &[Difference] = &[
    Difference {
        name: "D1 transit",
        what: "the kernel sends a packet of the uplink back to the uplink, or says there that it cannot; the engine drops it",
        reason: "qubes-policy.md B7, B8 and D1: nothing new from the uplink goes anywhere or is answered",
        applies: |case| {
            (case.dropped(NOT_FROM_UPLINK)
                || case.dropped(&[DropReason::LocalIgnored])
                    && matches!(case.packet().body, Body::Error { .. }))
                && !case.is_from_client()
                && case.kernel_sent_only_to(0)
        },
    },
    Difference {
        name: "D2 extension headers",
        what: "rules with a protocol look behind IPv6 extension headers",
        reason: "qubes-policy.md D2: on Linux a header in front of the transport gets around the rules",
        applies: |case| {
            case.is_from_client()
                && !case.packet().extensions.is_empty()
                && case.kernel_prohibits() != case.engine_prohibits()
        },
    },
    Difference {
        name: "D5 new rules",
        what: "flows that newer rules forbid go on in the kernel alone, also in that it complains about packets of theirs that cannot be sent on; in the engine they are over: a client is rejected, what comes from outside is dropped",
        reason: "qubes-policy.md 3.3 and D5: flows that new rules forbid are cut; on Linux the agent deletes some of them, which is no matter of the kernel",
        applies: |case| {
            let answer = case.engine.is_empty() || case.engine_prohibits();
            let goes_on = case.kernel_passes() || case.kernel_sent_only_to(case.step.port);
            case.forbidden && answer && goes_on
        },
    },
    Difference {
        name: "D6 invalid, rejecting rules",
        what: "the kernel asks the rules about an invalid packet of a client, and may answer; the engine drops it",
        reason: "qubes-policy.md A20 and D6",
        applies: |case| case.dropped(INVALID) && case.kernel_prohibits(),
    },
    Difference {
        name: "D6 first fragment without transport",
        what: "the kernel takes an IPv6 first fragment that cuts the transport header for an invalid packet, asks the rules, and may answer, also that it is too old; the engine drops it",
        reason: "qubes-policy.md A20 and D6; RFC 8200 4.5 has such fragments discarded",
        applies: |case| {
            let cut = case
                .packet()
                .split
                .as_ref()
                .is_some_and(|split| split.size < 20);
            case.v6() && cut && case.engine.is_empty() && case.kernel_sent_only_to(case.step.port)
        },
    },
    Difference {
        name: "fragments within fragments",
        what: "the kernel passes over a fragment whose place is taken by one that came before; the engine gives the datagram up, unless it is the same fragment again",
        reason: "qubes-policy.md 3.8: overlapping fragments discard the datagram; RFC 5722 makes no difference between kinds of overlaps",
        applies: |case| {
            case.dropped(&[DropReason::FragmentOverlap])
                && !case.kernel.is_empty()
                && case
                    .packet()
                    .split
                    .as_ref()
                    .is_some_and(|split| split.overlap.is_none())
        },
    },
    Difference {
        name: "idle GRE",
        what: "the kernel forgets a GRE flow after 30 seconds, or 180 with replies; the engine after 600, like any other protocol",
        reason: "qubes-policy.md 3.3: other protocols have the generic timeout",
        applies: |case| {
            let protocol = match &case.packet().body {
                Body::Error { quote, .. } => quote.protocol,
                _ => case.packet().protocol,
            };
            case.timed && protocol == 47 && case.kernel.is_empty()
        },
    },
    Difference {
        name: "D14 queries to us",
        what: "the kernel answers timestamp requests; the engine answers echo requests only",
        reason: "qubes-policy.md D14",
        applies: |case| {
            case.dropped(&[DropReason::LocalIgnored])
                && matches!(case.packet().body, Body::Icmp { kind: 13, .. })
                && case.kernel_icmp() == Some((14, 0))
        },
    },
    Difference {
        name: "checksum of data",
        what: "the kernel verifies the checksum of every packet of a flow; the engine lets wrong ones of running flows pass, still wrong",
        reason: "qubes-policy.md 3.3 is about verdicts: the receiver drops it; summing all data would double the cost of forwarding",
        applies: |case| {
            case.packet().damage == Damage::TransportChecksum
                && case.kernel.is_empty()
                && !case.engine.is_empty()
        },
    },
    Difference {
        name: "neighbour discovery is local",
        what: "the kernel does not track neighbour discovery, forwards it with the client's own address, or asks the rules; the engine drops it",
        reason: "qubes-policy.md 3.7 and 3.9: such messages are valid on one link only, and no client address may leave",
        applies: |case| {
            case.engine.is_empty()
                && case.v6()
                && matches!(
                    case.packet().body,
                    Body::Icmp {
                        kind: 133..=137,
                        ..
                    }
                )
                && !case.kernel.is_empty()
        },
    },
    Difference {
        name: "IPv6 source route",
        what: "the kernel forwards packets with a routing header that has hops to go; the engine drops them",
        reason: "qubes-policy.md A12: a source route is dropped; the kernel knows it in IPv4 only",
        applies: |case| {
            case.dropped(&[DropReason::SourceRouted])
                && case
                    .packet()
                    .extensions
                    .iter()
                    .any(|(number, own)| *number == 43 && own[3] > 0)
        },
    },
    Difference {
        name: "IPv6 martian destination",
        what: "the kernel forwards packets to :: and ::ffff:0:0/96, or asks the rules; the engine drops them",
        reason: "qubes-policy.md A12; of IPv4-mapped addresses the kernel itself drops every packet that comes from one, so nobody can answer",
        applies: |case| {
            case.dropped(&[DropReason::MartianDestination])
                && matches!(case.packet().dst, std::net::IpAddr::V6(own) if own.is_unspecified() || own.to_ipv4_mapped().is_some())
        },
    },
    Difference {
        name: "A12 multicast echo",
        what: "the kernel answers echo requests to ff02::1; the engine drops everything to a group",
        reason: "qubes-policy.md A12: nothing listens to multicast",
        applies: |case| {
            case.dropped(&[DropReason::Multicast])
                && matches!(case.packet().body, Body::Icmp { kind: 128, .. })
                && case.kernel_icmp().is_some_and(|(kind, _)| kind == 129)
        },
    },
    Difference {
        name: "silent reject",
        what: "the kernel does not answer a rejected packet of a protocol that it knows no checksum of, because it takes the payload for one",
        reason: "qubes-policy.md 3.4: rejects are answered for every protocol",
        applies: |case| {
            case.kernel.is_empty()
                && case.engine_prohibits()
                && ![TCP, UDP, ICMP, ICMPV6].contains(&case.packet().protocol)
        },
    },
    Difference {
        name: "source of errors about DNS",
        what: "the kernel sends an error about redirected DNS from the virtual resolver; the engine from the firewall",
        reason: "qubes-policy.md 3.4 and vector P101: the firewall's address is as good",
        applies: |case| {
            let same = |(kernel, engine): (&Seen, &Seen)| {
                let mut other = kernel.clone();
                other.src = own(false);
                other.header.clone_from(&engine.header);
                kernel.src == case.packet().dst && engine.icmp().is_some() && other == *engine
            };
            case.kernel.len() == case.engine.len() && case.kernel.iter().zip(case.engine).all(same)
        },
    },
];

/// Why nothing comes in from the uplink.
const NOT_FROM_UPLINK: &[DropReason] = &[
    DropReason::Transit,
    DropReason::MartianDestination,
    DropReason::MartianSource,
    DropReason::GuardedSource,
    DropReason::NeighbourIgnored,
    DropReason::Unsolicited,
    DropReason::SourceRouted,
    DropReason::FragmentMalformed,
];

/// What connection tracking calls invalid.
pub(crate) const INVALID: &[DropReason] = &[
    DropReason::TcpFlags,
    DropReason::TcpState,
    DropReason::TcpWindow,
    DropReason::IcmpState,
    DropReason::IcmpUnrelated,
    DropReason::BadChecksum,
    DropReason::MalformedTransport,
];

impl Case<'_> {
    fn packet(&self) -> &Packet {
        &self.step.packet
    }

    fn v6(&self) -> bool {
        self.packet().is_v6()
    }

    fn is_from_client(&self) -> bool {
        self.step.port > 0
    }

    /// The engine dropped it silently, for one of these reasons.
    fn dropped(&self, reasons: &[DropReason]) -> bool {
        self.engine.is_empty()
            && matches!(self.verdict, Verdict::Drop(reason) if reasons.contains(&reason))
    }

    /// The kernel sent it on.
    fn kernel_passes(&self) -> bool {
        !self.kernel.is_empty() && self.kernel.iter().all(|own| own.port != self.step.port)
    }

    fn kernel_sent_only_to(&self, port: usize) -> bool {
        !self.kernel.is_empty() && self.kernel.iter().all(|seen| seen.port == port)
    }

    /// The ICMP message that the kernel answered with, more than once if it got the packet in pieces
    /// of which some came twice.
    fn kernel_icmp(&self) -> Option<(u8, u8)> {
        let (first, others) = self.kernel.split_first()?;
        let same = first.port == self.step.port && others.iter().all(|own| own == first);
        if same { first.icmp() } else { None }
    }

    /// What a rejecting rule answers.
    fn prohibition(&self) -> (u8, u8) {
        if self.v6() { (1, 1) } else { (3, 13) }
    }

    /// The kernel answered as a rejecting rule does, every packet if there were several.
    fn kernel_prohibits(&self) -> bool {
        self.kernel_sent_only_to(self.step.port)
            && self
                .kernel
                .iter()
                .all(|own| own.icmp() == Some(self.prohibition()))
    }

    fn engine_prohibits(&self) -> bool {
        matches!(
            self.verdict,
            Verdict::Reject(DropReason::Rule | DropReason::Policy | DropReason::InvalidRules)
        ) && self
            .engine
            .iter()
            .all(|own| own.icmp() == Some(self.prohibition()))
    }
}
