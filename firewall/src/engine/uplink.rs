//! Table B of `qubes-policy.md` 3.2: packets from the uplink that belong to no flow.
//!
//! Nothing that comes from the uplink starts a flow. What answers one, or is an ICMP error about one,
//! goes to its client (B5, in [`super::forward`] and [`super::related`]); the rest is for us or nobody.

use super::core::{Core, Local, Packet};
use super::{local, related};
use crate::conntrack::table::FlowTable;
use crate::frame::{Frame, Time};
use crate::verdict::{DropReason, Verdict};
use crate::wire::transport::Kind;

/// Decides a packet of the uplink that has no flow.
#[cold]
#[inline(never)]
pub(crate) fn without_flow<A: Local>(
    core: &mut Core,
    table: &mut FlowTable<A>,
    frame: &mut Frame<'_>,
    packet: &Packet<A>,
    now: Time,
) -> Verdict {
    let network = &packet.network;
    // B3
    if let Some(reason) = bad_source(core, network.src) {
        return Verdict::Drop(reason);
    }
    // B5, for errors
    if packet.transport.kind == Kind::Error
        && let Some(verdict) = related::from_uplink(core, table, frame, packet, now)
    {
        return verdict;
    }
    if network.source_routed {
        return Verdict::Drop(DropReason::SourceRouted);
    }
    // B6
    if core.uplink.as_ref().and_then(A::own) == Some(network.dst)
        || local::is_neighbour_group(core, network.dst)
    {
        return local::from_uplink(core, frame, packet);
    }
    if network.dst.is_group() {
        return Verdict::Drop(DropReason::Multicast);
    }
    if network.dst.is_martian() {
        return Verdict::Drop(DropReason::MartianDestination);
    }
    // B7
    if A::node(&core.registry, network.dst).attached || A::is_ours(core, network.dst) {
        return Verdict::Drop(DropReason::Unsolicited);
    }
    // B8, as recommended (D1)
    Verdict::Drop(DropReason::Transit)
}

/// B3, and sources that nothing sends from: our own addresses and martians. Nothing of ours goes to
/// them, either.
pub(crate) fn bad_source<A: Local>(core: &Core, src: A) -> Option<DropReason> {
    if A::node(&core.registry, src).guarded {
        return Some(DropReason::GuardedSource);
    }
    (src.is_martian() || src.is_group() || A::is_ours(core, src))
        .then_some(DropReason::MartianSource)
}
