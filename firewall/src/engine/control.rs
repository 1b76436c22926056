//! The engine's control plane and views.
//!
//! Everything here is called by the owner with what dom0 says, or to look at the engine. It may
//! allocate; the cost of a change never depends on the number of flows.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};

use super::{Engine, family_of, uplink};
use crate::address::{Address, V4, V6};
use crate::config::{AttachError, ClientConfig, Downstream, MappedAddress, UplinkConfig};
use crate::conntrack::flow::{LIVE, Ticks};
use crate::conntrack::table::FlowTable;
use crate::frame::{ClientId, Iface, Time};
use crate::registry::{Rules, Vif};
use crate::rule::Family;
use crate::ruleset::{CompiledRules, RuleRef};
use crate::verdict::{Counters, DropCounters};
use crate::view::{ClientView, FlowCursor, FlowView};

impl Engine {
    /// Takes a new uplink, or none. Every flow is cut if the uplink or its addresses change.
    pub fn set_uplink(&mut self, uplink: Option<UplinkConfig>) {
        self.mind_epochs();
        let addresses = |own: &UplinkConfig| (own.ip4, own.ip6);
        let old = self.core.uplink.as_ref().map(|own| addresses(&own.config));
        if old != uplink.as_ref().map(addresses) {
            self.core.registry.cut_all();
            self.fragments.forget_interface(Iface::Uplink);
        }
        self.core.set_uplink(uplink);
    }

    /// Sets the addresses that clients know us by. Every flow is cut if they change.
    pub fn set_downstream(&mut self, downstream: Downstream) {
        self.mind_epochs();
        if self.core.downstream != downstream {
            self.core.registry.cut_all();
        }
        self.core.downstream = downstream;
    }

    /// Sets the resolver addresses that clients use, and the ones that really answer: the i-th
    /// virtual one stands for upstream number i modulo their count. Existing flows keep theirs.
    pub fn set_dns(&mut self, virtual_resolvers: &[Ipv4Addr], upstream: &[Ipv4Addr]) {
        self.core.dns.set(virtual_resolvers, upstream);
    }

    /// Replaces `/connected-ips` and `/connected-ips6`: addresses that must neither come from the
    /// uplink nor go there. Addresses of attached clients are guarded without being named here.
    pub fn set_configured(&mut self, addresses: &[IpAddr]) {
        self.mind_epochs();
        self.core.registry.set_configured(addresses);
    }

    /// Whether a packet of the owner's own may leave for an address by the uplink: A12 and A23 hold for
    /// those, too.
    pub fn may_leave_for(&self, address: IpAddr) -> bool {
        let reason = match (V4::from_ip(address), V6::from_ip(address)) {
            (Some(address), _) => uplink::bad_source(&self.core, address),
            (_, Some(address)) => uplink::bad_source(&self.core, address),
            (None, None) => None,
        };
        reason.is_none()
    }

    /// Replaces the list of clients that believe in another address than their own.
    pub fn set_mapped(&mut self, mapped: &[MappedAddress]) {
        self.mind_epochs();
        self.core.registry.set_mapped(mapped);
    }

    /// Attaches a vif. Flows from and to its addresses are cut.
    ///
    /// # Errors
    ///
    /// [`AttachError`]; nothing has changed then.
    pub fn attach_client(&mut self, client: ClientConfig) -> Result<(), AttachError> {
        self.mind_epochs();
        self.fragments.forget_interface(Iface::Client(client.id));
        self.core.registry.attach(client)
    }

    /// Detaches a vif. Flows from and to its addresses are cut. An unknown number is ignored.
    pub fn detach_client(&mut self, id: ClientId) {
        self.mind_epochs();
        self.fragments.forget_interface(Iface::Client(id));
        self.core.registry.detach(id);
    }

    /// Puts rules in force for packets from `address`. Flows that they forbid are cut at their next
    /// packet in either direction, the others live on. Costs the same for any number of flows.
    ///
    /// Rules of the other family refuse everything.
    pub fn set_rules(&mut self, address: IpAddr, rules: CompiledRules) {
        if rules.family() == family_of(address) {
            self.replace_rules(address, Rules::Compiled(rules));
        } else {
            self.replace_rules(address, Rules::Invalid);
        }
    }

    /// Rejects everything from `address`, because its rules cannot be understood.
    pub fn set_rules_invalid(&mut self, address: IpAddr) {
        self.replace_rules(address, Rules::Invalid);
    }

    /// Forgets the rules of `address`: everything from it is dropped silently.
    pub fn remove_rules(&mut self, address: IpAddr) {
        self.replace_rules(address, Rules::Absent);
    }

    fn replace_rules(&mut self, address: IpAddr, rules: Rules) {
        self.mind_epochs();
        self.core.registry.set_rules(address, rules);
    }

    /// Forgets every flow before epochs could repeat: once in some billions of changes.
    fn mind_epochs(&mut self) {
        if self.core.registry.epochs_are_exhausted() {
            self.flows4.clear();
            self.flows6.clear();
            self.core.registry.restart_epochs();
        }
    }

    /// What the engine has done.
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// What it has dropped or rejected.
    pub fn drops(&self) -> &DropCounters {
        &self.core.drops
    }

    /// The attached clients in the order of their numbers.
    pub fn clients(&self) -> impl Iterator<Item = ClientView> + '_ {
        self.core
            .registry
            .vifs()
            .map(|(id, vif)| self.client_view(id, vif))
    }

    /// The real addresses of an attached client; none for an unknown number.
    pub fn client_addresses(&self, id: ClientId) -> &[IpAddr] {
        self.core.registry.vif(id.0).map_or(&[], Vif::addresses)
    }

    fn client_view(&self, id: ClientId, vif: &Vif) -> ClientView {
        let flows = |source| self.flows4.flows_of(source) + self.flows6.flows_of(source);
        ClientView {
            id,
            domid: vif.domid,
            mac: vif.mac,
            addresses: Vec::from(vif.addresses()),
            flows: vif.sources().map(flows).sum(),
            frames_up: vif.frames_up,
            bytes_up: vif.bytes_up,
            frames_down: vif.frames_down,
            bytes_down: vif.bytes_down,
            drops: vif.drops,
        }
    }

    /// How many flows there are, overdue ones included that no packet and no tick has met yet.
    pub fn flow_count(&self) -> u32 {
        self.flows4.len() + self.flows6.len()
    }

    /// How many IPv4 and IPv6 flows fit.
    pub fn flow_capacity(&self) -> (u32, u32) {
        (self.flows4.capacity(), self.flows6.capacity())
    }

    /// Bytes that the flow tables take, everything included: entries, index, timer wheel, lists,
    /// mappings.
    pub fn flow_table_bytes(&self, family: Family) -> usize {
        match family {
            Family::Ipv4 => self.flows4.bytes(),
            Family::Ipv6 => self.flows6.bytes(),
        }
    }

    /// The rule, or the policy, that decided the last frame, if the rules were asked about it. They are
    /// asked when a flow starts. For a frame that ends its flow at once, the one that let the flow start.
    pub fn last_rule(&self) -> Option<RuleRef> {
        self.core.last_rule
    }

    /// The flow of `family` that the last frame belonged to or started, if any.
    pub fn last_flow(&self, family: Family, now: Time) -> Option<FlowView> {
        let (number, ticks) = (self.core.last_flow, Ticks::at(now));
        match family {
            Family::Ipv4 => view(&self.flows4, number, ticks),
            Family::Ipv6 => view(&self.flows6, number, ticks),
        }
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
        let ticks = Ticks::at(now);
        let capacity4 = self.flows4.capacity();
        let mut shown = 0;
        for number in cursor.0..capacity4 + self.flows6.capacity() {
            if shown == most {
                return Some(FlowCursor(number));
            }
            let view = match number.checked_sub(capacity4) {
                None => view(&self.flows4, number, ticks),
                Some(number) => view(&self.flows6, number, ticks),
            };
            if let Some(view) = view {
                each(view);
                shown += 1;
            }
        }
        None
    }
}

fn view<A: crate::address::Address>(
    table: &FlowTable<A>,
    number: u32,
    now: Ticks,
) -> Option<FlowView> {
    let flow = table.get(number)?;
    (flow.flags & LIVE != 0 && !flow.is_overdue(now)).then(|| flow.view(now))
}
