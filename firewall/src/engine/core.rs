//! What every stage of the engine needs besides the flow tables.

use core::net::Ipv4Addr;

use crate::address::{Address, LINK_LOCAL_GATEWAY, V4, V6};
use crate::config::{Downstream, IcmpRate, Limits, UplinkConfig};
use crate::conntrack::flow::Key;
use crate::frame::{Checksum, ClientId, Iface, Mac};
use crate::hash::{HashKey, Random};
use crate::limiter::Bucket;
use crate::outbox::Outbox;
use crate::registry::{Registry, Routed, Vif};
use crate::ruleset::RuleRef;
use crate::verdict::{Counters, DropCounters};
use crate::wire::ethernet::{self, Addresses};
use crate::wire::ipv4::Network;
use crate::wire::plain::{PlainHeaders, mac_word};
use crate::wire::transport::Transport;

/// The number of no flow.
pub(crate) const NO_FLOW: u32 = u32::MAX;

/// Most virtual resolvers, and most real ones.
const MAX_RESOLVERS: usize = 4;

/// A packet whose headers were read. The bytes stay in the frame.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Packet<A> {
    pub(crate) network: Network<A>,
    pub(crate) transport: Transport,
    /// Set if the packet was put together from fragments: the size of the largest one.
    pub(crate) largest_fragment: Option<u16>,
    /// Whether it came in a frame for everybody or a group.
    pub(crate) group_frame: bool,
}

impl<A: Address> Packet<A> {
    /// What flows are found by.
    #[inline(always)]
    pub(crate) fn key(&self) -> Key<A> {
        Key {
            src: self.network.src,
            dst: self.network.dst,
            ports: self.transport.ports,
            protocol: self.network.protocol,
        }
    }
}

/// Our side of the uplink.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Uplink {
    pub(crate) config: UplinkConfig,
    /// Addresses of frames to the next hop.
    pub(crate) link: Addresses,
    own4: V4,
    own6: Option<V6>,
}

impl Uplink {
    pub(crate) fn new(config: UplinkConfig) -> Self {
        Self {
            config,
            link: ethernet::addresses(config.next_hop_mac, config.mac),
            own4: config.ip4.to_bits(),
            own6: config.ip6.and_then(|own| V6::from_ip(own.into())),
        }
    }
}

/// What plain packets need of the uplink, without a question whether there is one.
#[derive(Debug)]
pub(crate) struct PlainUplink {
    /// Our address, as [`PlainHeaders::destination`] gives it.
    pub(crate) mac: u64,
    /// Addresses of frames to the next hop.
    pub(crate) link: Addresses,
    pub(crate) mtu: u16,
}

impl PlainUplink {
    /// In place of an address, while there is no uplink. No frame has this destination.
    pub(crate) const NO_MAC: u64 = 1;

    /// No frame has this destination, and none is short enough.
    const ABSENT: Self = Self {
        mac: Self::NO_MAC,
        link: [0; 12],
        mtu: 0,
    };
}

/// The virtual resolvers and what stands behind each (`qubes-policy.md` 4.1).
#[derive(Debug, Default)]
pub(crate) struct Dns {
    virtual_resolvers: heapless::Vec<V4, MAX_RESOLVERS>,
    upstream: heapless::Vec<V4, MAX_RESOLVERS>,
}

/// Where DNS to an address really goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolver {
    /// The address is not a virtual resolver.
    NotVirtual,
    /// No real resolver is known.
    Unknown,
    /// Here.
    At(V4),
}

impl Dns {
    pub(crate) fn set(&mut self, virtual_resolvers: &[Ipv4Addr], upstream: &[Ipv4Addr]) {
        let bits = |all: &[Ipv4Addr]| {
            all.iter()
                .take(MAX_RESOLVERS)
                .map(|own| own.to_bits())
                .collect()
        };
        self.virtual_resolvers = bits(virtual_resolvers);
        self.upstream = bits(upstream);
    }

    pub(crate) fn resolve(&self, address: V4) -> Resolver {
        let Some(at) = self
            .virtual_resolvers
            .iter()
            .position(|own| *own == address)
        else {
            return Resolver::NotVirtual;
        };
        at.checked_rem(self.upstream.len())
            .and_then(|at| self.upstream.get(at))
            .map_or(Resolver::Unknown, |real| Resolver::At(*real))
    }
}

/// Everything but the flow tables.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) registry: Registry,
    pub(crate) uplink: Option<Uplink>,
    /// The same for the shortcut.
    pub(crate) plain_uplink: PlainUplink,
    pub(crate) downstream: Downstream,
    pub(crate) dns: Dns,
    pub(crate) outbox: Outbox,
    pub(crate) counters: Counters,
    pub(crate) drops: DropCounters,
    pub(crate) random: Random,
    pub(crate) icmp_rate: Option<IcmpRate>,
    pub(crate) all_errors: Bucket,
    pub(crate) uplink_errors: Bucket,
    /// What the rules said about the last packet that they were asked about.
    pub(crate) last_rule: Option<RuleRef>,
    /// The flow that the last packet belonged to, or [`NO_FLOW`].
    pub(crate) last_flow: u32,
}

impl Core {
    pub(crate) fn new(limits: &Limits, random_key: HashKey) -> Self {
        Self {
            registry: Registry::new(limits.clients),
            uplink: None,
            plain_uplink: PlainUplink::ABSENT,
            downstream: Downstream::default(),
            dns: Dns::default(),
            outbox: Outbox::new(usize::try_from(limits.outbox_bytes).unwrap_or(0)),
            counters: Counters::default(),
            drops: DropCounters::default(),
            random: Random::new(random_key),
            icmp_rate: limits.icmp_rate,
            all_errors: Bucket::default(),
            uplink_errors: Bucket::default(),
            last_rule: None,
            last_flow: NO_FLOW,
        }
    }

    /// Takes a new uplink, or none.
    pub(crate) fn set_uplink(&mut self, uplink: Option<UplinkConfig>) {
        self.uplink = uplink.map(Uplink::new);
        self.plain_uplink = match &self.uplink {
            Some(uplink) => PlainUplink {
                mac: mac_word(uplink.config.mac),
                link: uplink.link,
                mtu: uplink.config.mtu,
            },
            None => PlainUplink::ABSENT,
        };
    }

    /// The addresses of frames that leave on an interface, and its MTU.
    pub(crate) fn exit(&self, egress: Iface) -> Option<(Addresses, u16)> {
        match egress {
            Iface::Uplink => self.uplink.as_ref().map(|own| (own.link, own.config.mtu)),
            Iface::Client(ClientId(id)) => self.registry.vif(id).map(|vif| (vif.link, vif.mtu)),
        }
    }

    /// Our own Ethernet address on an interface.
    pub(crate) fn own_mac(&self, iface: Iface) -> Option<Mac> {
        match iface {
            Iface::Uplink => self.uplink.as_ref().map(|own| own.config.mac),
            Iface::Client(_) => Some(ethernet::OWN_CLIENT_SIDE),
        }
    }

    /// The vif of an interface, unless it is the uplink.
    pub(crate) fn vif_of(&self, iface: Iface) -> Option<&Vif> {
        match iface {
            Iface::Uplink => None,
            Iface::Client(ClientId(id)) => self.registry.vif(id),
        }
    }

    /// Adds a complete frame of ours to the outbox; what a client must see differently is changed. Bytes
    /// that `fill` does not write are zero.
    pub(crate) fn emit(&mut self, egress: Iface, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        self.emit_whole(egress, len, |bytes| {
            bytes.fill(0);
            fill(bytes);
        })
    }

    /// [`Self::emit`] for a `fill` that writes every byte: what it leaves is from other frames.
    #[inline(always)]
    pub(crate) fn emit_whole(
        &mut self,
        egress: Iface,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> bool {
        match self.outbox.add(egress, len) {
            Some(bytes) => {
                fill(bytes);
                let vif = match egress {
                    Iface::Uplink => None,
                    Iface::Client(ClientId(id)) => self.registry.vif(id),
                };
                if let Some(fake) = vif.and_then(|vif| vif.fake) {
                    super::fake::to_visible(bytes, Checksum::Unverified, &fake);
                }
                true
            }
            None => {
                self.counters.outbox_full = self.counters.outbox_full.wrapping_add(1);
                false
            }
        }
    }
}

/// What a family must know about our own addresses.
pub(crate) trait Local: Routed + PlainHeaders {
    /// What clients' traffic leaves with.
    fn own(uplink: &Uplink) -> Option<Self>;
    /// Whether there is a way out for the family.
    fn has_route(uplink: &Uplink) -> bool;
    /// What clients know us by; the source of our errors to them.
    fn gateway(core: &Core) -> Option<Self>;
    /// Whether the address is one that clients reach us at.
    fn is_ours(core: &Core, address: Self) -> bool;
    /// Where DNS to an address really goes.
    fn resolver(core: &Core, address: Self) -> Option<Result<Self, ()>>;
}

impl Local for V4 {
    fn own(uplink: &Uplink) -> Option<Self> {
        Some(uplink.own4)
    }

    fn has_route(_: &Uplink) -> bool {
        true
    }

    fn gateway(core: &Core) -> Option<Self> {
        let configured = core.downstream.gateway4.map(Ipv4Addr::to_bits);
        configured.or(core.uplink.as_ref().map(|uplink| uplink.own4))
    }

    fn is_ours(core: &Core, address: Self) -> bool {
        core.uplink
            .as_ref()
            .is_some_and(|uplink| uplink.own4 == address)
            || core.downstream.gateway4.map(Ipv4Addr::to_bits) == Some(address)
    }

    fn resolver(core: &Core, address: Self) -> Option<Result<Self, ()>> {
        match core.dns.resolve(address) {
            Resolver::NotVirtual => None,
            Resolver::Unknown => Some(Err(())),
            Resolver::At(real) => Some(Ok(real)),
        }
    }
}

impl Local for V6 {
    fn own(uplink: &Uplink) -> Option<Self> {
        uplink.own6
    }

    fn has_route(uplink: &Uplink) -> bool {
        uplink.own6.is_some() && uplink.config.gateway6.is_some()
    }

    fn gateway(core: &Core) -> Option<Self> {
        core.downstream
            .gateway6
            .and_then(|own| Self::from_ip(own.into()))
    }

    fn is_ours(core: &Core, address: Self) -> bool {
        address == LINK_LOCAL_GATEWAY
            || Self::gateway(core) == Some(address)
            || core
                .uplink
                .as_ref()
                .is_some_and(|uplink| uplink.own6 == Some(address))
    }

    fn resolver(_: &Core, _: Self) -> Option<Result<Self, ()>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases of `qubes-policy.md` 4.1.
    #[test]
    fn virtual_resolvers_map_round_robin_to_real_ones() {
        let v = [Ipv4Addr::new(10, 139, 1, 1), Ipv4Addr::new(10, 139, 1, 2)];
        let u = [
            Ipv4Addr::new(9, 9, 9, 9),
            Ipv4Addr::new(8, 8, 8, 8),
            Ipv4Addr::new(7, 7, 7, 7),
        ];
        let mut dns = Dns::default();
        let at = |dns: &Dns, which: usize| dns.resolve(v[which].to_bits());
        assert_eq!(at(&dns, 0), Resolver::NotVirtual);
        dns.set(&v, &[]);
        assert_eq!(
            (at(&dns, 0), at(&dns, 1)),
            (Resolver::Unknown, Resolver::Unknown)
        );
        dns.set(&v, &u[..1]);
        assert_eq!(at(&dns, 1), Resolver::At(u[0].to_bits()));
        dns.set(&v, &u);
        assert_eq!(at(&dns, 0), Resolver::At(u[0].to_bits()));
        assert_eq!(at(&dns, 1), Resolver::At(u[1].to_bits()));
        assert_eq!(dns.resolve(u[0].to_bits()), Resolver::NotVirtual);
    }
}
