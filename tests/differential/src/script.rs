//! A rule set with the packets that go through it: everything that a seed determines.
//!
//! A script does not depend on what becomes of its packets, so that any part of it can be run alone.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use fastrand::Rng;

use crate::errors;
use crate::kernel::Port;
use crate::pace;
use crate::packet::{ICMP, ICMPV6, Packet, TCP, UDP};
use crate::rules::{self, Tree};
use crate::strays;
use crate::talk;
use crate::world::{ABSENT, CLIENTS, SERVERS4, SERVERS6, VIRTUAL_RESOLVERS, World};

/// Flows of a timed script.
const FLOWS_AT_ONCE: u16 = 200;

/// What a client and somebody out there say to each other.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub(crate) port: Port,
    pub(crate) client: IpAddr,
    /// Whom the client thinks it talks to.
    pub(crate) server: IpAddr,
    /// Who answers: another one for DNS.
    pub(crate) remote: IpAddr,
    pub(crate) protocol: u8,
    /// The client's port or identifier.
    pub(crate) sport: u16,
    /// The server's port; type and code of an ICMP query.
    pub(crate) dport: u16,
}

/// Packets of one sender at one time.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// Where they come from.
    pub(crate) port: Port,
    pub(crate) packet: Packet,
    /// The flow that they mean.
    pub(crate) flow: Option<usize>,
    /// What dom0 changes just before.
    pub(crate) change: Option<Change>,
    /// When, in milliseconds of the engine from the start, if the script is timed.
    pub(crate) at: u64,
}

/// What may change while flows run.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// Other rules for one of the client addresses, by its place in [`World::trees`].
    Rules(usize, Tree),
    /// Other resolvers, and with them all rules about DNS.
    Resolvers(Vec<Ipv4Addr>),
}

#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) seed: u64,
    pub(crate) world: World,
    pub(crate) flows: Vec<Flow>,
    pub(crate) steps: Vec<Step>,
    /// How much faster the engine's clock runs, if time passes.
    pub(crate) factor: Option<u64>,
}

impl Flow {
    pub(crate) fn is_v6(&self) -> bool {
        self.client.is_ipv6()
    }
}

fn world(rng: &mut Rng) -> World {
    let resolvers = resolvers(rng);
    let uplink_mtu = *rng.choice(&[1500, 1500, 1400, 1280]).unwrap_or(&1500);
    let addresses = CLIENTS.iter().flat_map(|client| client.addresses);
    let trees = addresses
        .map(|own| (*own, Tree::random(rng, own.is_ipv6())))
        .collect();
    World {
        uplink_mtu,
        resolvers,
        trees,
    }
}

fn resolvers(rng: &mut Rng) -> Vec<Ipv4Addr> {
    let [one, two] = VIRTUAL_RESOLVERS;
    let other = [[192, 168, 1, 1], [9, 9, 9, 9]].map(std::net::Ipv4Addr::from);
    match rng.u8(..10) {
        0 => Vec::new(),
        1..3 => vec![other[0]],
        3..5 => other.to_vec(),
        _ => vec![one, two],
    }
}

/// Lets dom0 change something now and then; most scripts stay as they are.
fn change(rng: &mut Rng, world: &World, steps: &mut [Step]) {
    if steps.is_empty() || rng.u8(..3) > 0 {
        return;
    }
    for _ in 0..rng.usize(1..7) {
        let at = rng.usize(..steps.len());
        let change = if rng.u8(..4) == 0 {
            Change::Resolvers(resolvers(rng))
        } else {
            let number = rng.usize(..world.trees.len());
            let v6 = world.trees[number].0.is_ipv6();
            match Tree::random(rng, v6) {
                // dom0 commits rules, and never none.
                Tree::Absent => continue,
                tree => Change::Rules(number, tree),
            }
        };
        steps[at].change = Some(change);
    }
}

/// Ports that are few, so that clients get in each other's way.
fn client_port(rng: &mut Rng) -> u16 {
    match rng.u8(..10) {
        0 => rng.u16(400..404),
        1 => rng.u16(700..704),
        2 => rng.u16(..),
        _ => rng.u16(40_000..40_012),
    }
}

fn flow(rng: &mut Rng, world: &World) -> Flow {
    let port = rng.usize(1..=CLIENTS.len());
    let client = *rng
        .choice(CLIENTS[port - 1].addresses)
        .unwrap_or(&CLIENTS[0].addresses[0]);
    let v6 = client.is_ipv6();
    let servers: &[IpAddr] = if v6 { &SERVERS6 } else { &SERVERS4 };
    let server = servers[rng.usize(..servers.len())];
    let protocol = match rng.u8(..100) {
        0..45 => TCP,
        45..75 => UDP,
        75..92 => {
            if v6 {
                ICMPV6
            } else {
                ICMP
            }
        }
        92..95 => 47,
        95..98 => 50,
        _ => 253,
    };
    let (sport, dport) = match protocol {
        TCP | UDP => {
            let dns = !v6
                && VIRTUAL_RESOLVERS
                    .iter()
                    .any(|own| IpAddr::V4(*own) == server);
            let dport = if dns && rng.u8(..4) < 3 {
                53
            } else {
                rules::port(rng).max(1)
            };
            (client_port(rng), dport)
        }
        ICMPV6 => (rng.u16(..8), 128 << 8),
        ICMP => {
            let kind = if rng.u8(..10) == 0 { 13 } else { 8 };
            (rng.u16(..8), kind << 8)
        }
        _ => (0, 0),
    };
    let is_dns = dport == 53 && matches!(protocol, TCP | UDP);
    let remote = world.after_dns(server).filter(|_| is_dns).unwrap_or(server);
    Flow {
        port,
        client,
        server,
        remote,
        protocol,
        sport,
        dport,
    }
}

/// Mixes sequences; each keeps its order.
fn mix(rng: &mut Rng, parts: Vec<Vec<Step>>) -> Vec<Step> {
    let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    let mut steps = Vec::new();
    // Two or three sequences at a time, so that flows are alive together and do end.
    while !parts.is_empty() {
        let at = rng.usize(..parts.len().min(6));
        match parts[at].next() {
            Some(step) => steps.push(step),
            None => {
                parts.remove(at);
            }
        }
    }
    steps
}

impl Script {
    /// The script of a seed, with about `packets` steps.
    pub(crate) fn new(seed: u64, packets: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let world = world(rng);
        let mut flows: Vec<Flow> = Vec::new();
        let mut known = HashSet::new();
        let mut parts = Vec::new();
        let mut count = 0;
        while count < packets {
            let own = flow(rng, &world);
            let key = (own.client, own.server, own.protocol, own.sport, own.dport);
            if !known.insert(key) {
                count += 1;
                continue;
            }
            let number = flows.len();
            flows.push(own);
            let mut part = talk::steps(rng, &flows, number);
            errors::insert(rng, &flows, number, &mut part);
            strays::damage(rng, &mut part);
            for _ in 0..rng.usize(..4) {
                let at = rng.usize(..=part.len());
                part.insert(at, strays::step(rng, &flows));
            }
            count += part.len();
            parts.push(part);
        }
        let mut steps = mix(rng, parts);
        change(rng, &world, &mut steps);
        Self {
            seed,
            world,
            flows,
            steps,
            factor: None,
        }
    }

    /// A script of many flows at once that idle out or do not, with rules that allow everything.
    pub(crate) fn timed(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let mut world = world(rng);
        for (_, tree) in &mut world.trees {
            *tree = Tree::Rules {
                accept_policy: true,
                rules: Vec::new(),
            };
        }
        let factor = pace::FACTORS[usize::from(seed % 2 == 1)];
        let mut flows: Vec<Flow> = Vec::new();
        let mut steps = Vec::new();
        let mut others = HashSet::new();
        for number in 0..FLOWS_AT_ONCE {
            let mut own = flow(rng, &world);
            // A port of its own, so that a flow that starts again keeps it.
            own.sport = 41_000 + number;
            if !matches!(own.protocol, TCP | UDP | ICMP | ICMPV6)
                && !others.insert((own.remote, own.protocol))
            {
                continue;
            }
            flows.push(own);
            let number = flows.len() - 1;
            let mut part = talk::steps(rng, &flows, number);
            errors::insert(rng, &flows, number, &mut part);
            steps.extend(pace::spread(rng, &flows[number], factor, part));
        }
        steps.sort_by_key(|step| step.at);
        Self {
            seed,
            world,
            flows,
            steps,
            factor: Some(factor),
        }
    }
}

/// Somebody whom nobody may speak for or to.
pub(crate) fn absent(v6: bool) -> IpAddr {
    ABSENT[usize::from(v6)]
}
