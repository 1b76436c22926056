//! The engine with the same rules, addresses and packets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};
use firewall::rule::{Family, HostName};
use firewall::ruleset::{CompiledRules, HostLookup, HostPolicy, HostState, RuleEnvironment};
use firewall::{
    ClientConfig, ClientId, Downstream, Engine as Packets, Frame, GATEWAY_MAC, Iface, Limits, Mac,
    Time, UplinkConfig, Verdict,
};

use crate::kernel::Port;
use crate::rules::Tree;
use crate::script::Change;
use crate::world::{
    ABSENT, CLIENTS, GATEWAY4, GATEWAY6, HOSTS, OWN4, OWN6, VIRTUAL_RESOLVERS, World,
};

/// Our address on the uplink.
const OWN_MAC: Mac = [0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x00];
const CLIENT_MAC: Mac = [0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x01];

/// Between two packets. No flow may idle out during a rule set: the kernel has its own clock.
const STEP_NANOS: u64 = 100_000;

/// When a script starts.
const START: Time = Time::from_secs(1000);

/// What the engine said about the last of some packets that did not only wait, and what left.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) verdict: Verdict,
    pub(crate) sent: Vec<(Port, Vec<u8>)>,
}

#[derive(Debug)]
pub(crate) struct Engine {
    packets: Packets,
    now: Time,
}

struct Names;

impl Names {
    fn each(name: &HostName, mut each: impl FnMut(IpAddr)) -> HostState {
        let found = HOSTS.iter().find(|(own, _)| *own == name.as_str());
        match found.and_then(|(_, addresses)| *addresses) {
            Some(addresses) => {
                addresses.iter().copied().for_each(&mut each);
                HostState::Resolved
            }
            None => HostState::Unresolved,
        }
    }
}

impl HostLookup for Names {
    fn addresses4(&self, name: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState {
        Self::each(name, |address| {
            if let IpAddr::V4(own) = address {
                each(own);
            }
        })
    }

    fn addresses6(&self, name: &HostName, each: &mut dyn FnMut(Ipv6Addr)) -> HostState {
        Self::each(name, |address| {
            if let IpAddr::V6(own) = address {
                each(own);
            }
        })
    }
}

const fn as4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(own) => Some(own),
        IpAddr::V6(_) => None,
    }
}

const fn as6(address: IpAddr) -> Option<Ipv6Addr> {
    match address {
        IpAddr::V6(own) => Some(own),
        IpAddr::V4(_) => None,
    }
}

const fn client_id(port: Port) -> ClientId {
    // Port 1 is the first client; there are four.
    ClientId(match port {
        1 => 0,
        2 => 1,
        3 => 2,
        _ => 3,
    })
}

fn port_of(iface: Iface) -> Port {
    match iface {
        Iface::Uplink => 0,
        Iface::Client(ClientId(id)) => usize::from(id) + 1,
    }
}

impl Engine {
    pub(crate) fn new(world: &World, seed: u64) -> Result<Self> {
        let limits = Limits {
            flows4: 8192,
            flows6: 8192,
            clients: 8,
            icmp_rate: None,
            ..Limits::default()
        };
        let mut key = [0x5a; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut packets = Packets::new(limits, key);
        packets.set_uplink(Some(UplinkConfig {
            mac: OWN_MAC,
            next_hop_mac: GATEWAY_MAC,
            ip4: as4(OWN4).unwrap_or(Ipv4Addr::UNSPECIFIED),
            gateway4: as4(GATEWAY4),
            ip6: as6(OWN6),
            gateway6: as6(GATEWAY6),
            mtu: world.uplink_mtu,
        }));
        packets.set_downstream(Downstream {
            gateway4: as4(OWN4),
            gateway6: as6(OWN6),
        });
        packets.set_dns(&VIRTUAL_RESOLVERS, &world.resolvers);
        let attached = CLIENTS.iter().flat_map(|client| client.addresses);
        let configured: Vec<IpAddr> = attached.chain(&ABSENT).copied().collect();
        packets.set_configured(&configured);
        for (port, client) in (1..).zip(CLIENTS) {
            let config = ClientConfig {
                id: client_id(port),
                domid: client.domid,
                mac: CLIENT_MAC,
                addresses: client.addresses.to_vec(),
                mtu: client.mtu,
            };
            if let Err(error) = packets.attach_client(config) {
                bail!("{}: {error}", client.name);
            }
        }
        for (address, tree) in &world.trees {
            set_rules(&mut packets, world, *address, tree)?;
        }
        Ok(Self {
            packets,
            now: START,
        })
    }

    /// Brings rules and resolvers up to date, as the kernel of the image does: rules about DNS are
    /// compiled anew when resolvers change.
    ///
    /// # Errors
    ///
    /// If rules cannot be compiled.
    pub(crate) fn update(&mut self, world: &World, change: &Change) -> Result<()> {
        match change {
            Change::Rules(number, _) => {
                let (address, tree) = &world.trees[*number];
                set_rules(&mut self.packets, world, *address, tree)
            }
            Change::Resolvers(_) => {
                self.packets.set_dns(&VIRTUAL_RESOLVERS, &world.resolvers);
                world
                    .trees
                    .iter()
                    .try_for_each(|(own, tree)| set_rules(&mut self.packets, world, *own, tree))
            }
        }
    }

    /// Puts the clock to so many milliseconds after the start.
    pub(crate) fn advance_to(&mut self, millis: u64) {
        let then = START.plus_nanos(millis * 1_000_000);
        self.now = self.now.max(then);
        // As the main loop does.
        while self.packets.tick(self.now, 64) {}
    }

    /// Gives packets to the engine and returns all that leaves because of them.
    pub(crate) fn exchange(&mut self, port: Port, packets: &[Vec<u8>]) -> Decided {
        let mut decided = Decided {
            verdict: Verdict::Held,
            sent: Vec::new(),
        };
        let (ingress, to, from) = match port {
            0 => (Iface::Uplink, OWN_MAC, GATEWAY_MAC),
            port => (Iface::Client(client_id(port)), GATEWAY_MAC, CLIENT_MAC),
        };
        for packet in packets {
            self.now = self.now.plus_nanos(STEP_NANOS);
            let ethertype: [u8; 2] = if packet[0] >> 4 == 6 {
                [0x86, 0xdd]
            } else {
                [8, 0]
            };
            let mut bytes = [&to[..], &from, &ethertype, packet].concat();
            let mut frame = Frame::whole(&mut bytes);
            let verdict = self.packets.process(ingress, &mut frame, self.now);
            // A fragment that only waits says less than one that completed something.
            if verdict != Verdict::Held {
                decided.verdict = verdict;
            }
            let len = usize::try_from(frame.len).unwrap_or(0);
            if let Verdict::Forward { egress } = verdict {
                decided
                    .sent
                    .push((port_of(egress), bytes[14..len].to_vec()));
            }
            while let Some(made) = self.packets.next_generated() {
                decided
                    .sent
                    .push((port_of(made.egress), made.bytes[14..].to_vec()));
            }
        }
        decided
    }
}

fn set_rules(packets: &mut Packets, world: &World, address: IpAddr, tree: &Tree) -> Result<()> {
    if matches!(tree, Tree::Absent) {
        return Ok(());
    }
    let family = if address.is_ipv6() {
        Family::Ipv6
    } else {
        Family::Ipv4
    };
    let keys = tree.keys();
    let pairs = keys
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_bytes()));
    let environment = RuleEnvironment {
        resolvers4: &world.resolvers,
        resolvers6: &[],
        hosts: &Names,
        host_policy: HostPolicy::PerRule,
    };
    match (qubes::firewall_tree::read_tree(family, pairs), tree) {
        (Ok(chain), _) => match CompiledRules::compile(&chain, &environment) {
            Ok(rules) => packets.set_rules(address, rules),
            Err(error) => bail!("{address}: {error}"),
        },
        (Err(_), Tree::Broken) => packets.set_rules_invalid(address),
        (Err(error), _) => bail!("{address}: {error}"),
    }
    Ok(())
}
