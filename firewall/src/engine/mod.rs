//! The packet engine: one frame in, one verdict out.
//!
//! [`Engine::process`] rewrites the frame in place. The stages are the decision tables of
//! `qubes-policy.md` 3.2, and each file names the rows that it decides:
//!
//! | rows | what | where |
//! | --- | --- | --- |
//! | A1 to A10, B1, B2, B4 | frame, headers, fragments, source, flow | `arrival.rs` |
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

mod arrival;
mod batch;
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

use self::core::{Core, Local, NO_FLOW};
use crate::address::{V4, V6};
use crate::config::Limits;
use crate::conntrack::flow::Ticks;
use crate::conntrack::table::FlowTable;
use crate::fragment::Reassembly;
use crate::frame::{ClientId, Frame, Iface, Time};
use crate::hash::HashKey;
use crate::outbox::Generated;
use crate::registry::max_sources;
use crate::rule::Family;
use crate::verdict::{DropReason, Verdict};

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

    /// The long way.
    #[inline(never)]
    fn decide_fully(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
        self.core.last_rule = None;
        self.core.last_flow = NO_FLOW;
        let verdict = self.frame(ingress, frame, now);
        self.account(ingress, frame.len, verdict);
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
