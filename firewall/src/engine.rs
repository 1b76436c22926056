//! The packet engine: one frame in, one verdict out.
//!
//! `process(ingress, frame, now) -> Verdict` rewrites the frame in place. Frames that the engine makes
//! itself wait in the outbox for [`Engine::next_generated`].

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};

use crate::config::{AttachError, ClientConfig, Downstream, Limits, MappedAddress, UplinkConfig};
use crate::frame::{ClientId, Frame, Iface, Time};
use crate::outbox::{Generated, Outbox};
use crate::ruleset::CompiledRules;
use crate::verdict::{Counters, DropCounters, DropReason, Verdict};
use crate::view::{ClientView, FlowCursor, FlowView};

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
    uplink: Option<UplinkConfig>,
    downstream: Downstream,
    clients: Vec<ClientConfig>,
    outbox: Outbox,
    counters: Counters,
    drops: DropCounters,
}

impl Engine {
    /// Makes an engine without uplink, clients or rules. All tables of the data path are allocated
    /// here. `seed` must be unpredictable to clients: hash keys and port choice come from it.
    pub fn new(limits: Limits, seed: [u8; 32]) -> Self {
        let _ = seed;
        Self {
            limits,
            uplink: None,
            downstream: Downstream::default(),
            clients: Vec::new(),
            outbox: Outbox::new(usize::try_from(limits.outbox_bytes).unwrap_or(0)),
            counters: Counters::default(),
            drops: DropCounters::default(),
        }
    }

    /// The sizes that the engine was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a new uplink, or none. Every flow is cut if the uplink or its address changes.
    pub fn set_uplink(&mut self, uplink: Option<UplinkConfig>) {
        self.uplink = uplink;
    }

    /// Sets the addresses that clients know us by.
    pub fn set_downstream(&mut self, downstream: Downstream) {
        self.downstream = downstream;
    }

    /// Sets the resolver addresses that clients use, and the ones that really answer: the i-th
    /// virtual one stands for upstream number i modulo their count. Existing flows keep theirs.
    pub fn set_dns(&mut self, virtual_resolvers: &[Ipv4Addr], upstream: &[Ipv4Addr]) {
        let _ = (virtual_resolvers, upstream);
    }

    /// Replaces `/connected-ips` and `/connected-ips6`: addresses that must neither come from the
    /// uplink nor go there. Addresses of attached clients are guarded without being named here.
    pub fn set_configured(&mut self, addresses: &[IpAddr]) {
        let _ = addresses;
    }

    /// Replaces the list of clients that believe in another address than their own.
    pub fn set_mapped(&mut self, mapped: &[MappedAddress]) {
        let _ = mapped;
    }

    /// Attaches a vif. Flows from and to its addresses are cut.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; nothing has changed then.
    pub fn attach_client(&mut self, client: ClientConfig) -> Result<(), AttachError> {
        if client.id.0 >= self.limits.clients {
            return Err(AttachError::NumberOutOfRange);
        }
        self.clients.push(client);
        Ok(())
    }

    /// Detaches a vif. Flows from and to its addresses are cut. An unknown number is ignored.
    pub fn detach_client(&mut self, id: ClientId) {
        self.clients.retain(|client| client.id != id);
    }

    /// Puts rules in force for packets from `address`. Flows that they forbid are cut at their next
    /// packet in either direction, the others live on. Costs the same for any number of flows.
    pub fn set_rules(&mut self, address: IpAddr, rules: CompiledRules) {
        let _ = (address, rules);
    }

    /// Rejects everything from `address`, because its rules cannot be understood.
    pub fn set_rules_invalid(&mut self, address: IpAddr) {
        let _ = address;
    }

    /// Forgets the rules of `address`: everything from it is dropped silently.
    pub fn remove_rules(&mut self, address: IpAddr) {
        let _ = address;
    }

    /// Decides one frame and rewrites it.
    pub fn process(&mut self, ingress: Iface, frame: &mut Frame<'_>, now: Time) -> Verdict {
        let _ = (frame, now);
        let reason = match ingress {
            Iface::Uplink => DropReason::UplinkAbsent,
            Iface::Client(_) => DropReason::UnknownClient,
        };
        self.drops.add(reason);
        Verdict::Drop(reason)
    }

    /// Decides a batch of frames, in order, as [`Self::process`] would.
    pub fn process_batch(&mut self, work: &mut [Work<'_>], now: Time) {
        for item in work {
            item.verdict = self.process(item.ingress, &mut item.frame, now);
        }
    }

    /// Takes the oldest frame that the engine made. Call until `None` after every batch and tick.
    pub fn next_generated(&mut self) -> Option<Generated<'_>> {
        self.outbox.pop()
    }

    /// Lets time pass: expires flows and fragments, at most `budget` of them. Returns whether there
    /// is more to do now.
    pub fn tick(&mut self, now: Time, budget: u32) -> bool {
        let _ = (now, budget);
        false
    }

    /// When [`Self::tick`] next has something to do; `None` while nothing can expire.
    pub fn next_deadline(&self, now: Time) -> Option<Time> {
        let _ = now;
        None
    }

    /// What the engine has done.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What it has dropped or rejected.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// The attached clients in the order of their numbers.
    pub fn clients(&self) -> impl Iterator<Item = ClientView> + '_ {
        core::iter::empty()
    }

    /// How many flows there are.
    pub fn flow_count(&self) -> u32 {
        0
    }

    /// Shows the flows from `cursor` on, at most `most` of them; returns where to go on, or `None`
    /// at the end. A flow that lives through all calls is shown exactly once.
    pub fn flows(
        &self,
        cursor: FlowCursor,
        most: usize,
        now: Time,
        each: &mut dyn FnMut(FlowView),
    ) -> Option<FlowCursor> {
        let _ = (cursor, most, now, each);
        None
    }
}
