//! The packet vectors of the policy specification, through the whole engine.
//!
//! Source: `tests/vectors/qubes-policy.json`, section 9 of the policy specification. Names in rules
//! are resolved from each vector's own `dns` table.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use common::{CLIENT_MAC, GATEWAY, Ip, Mac, Outcome, client, run, see};
use firewall::rule::{Family, HostName};
use firewall::ruleset::{CompiledRules, HostLookup, HostPolicy, HostState, RuleEnvironment};
use firewall::{
    ClientConfig, ClientId, Downstream, Engine, Iface, Limits, MappedAddress, Time, UplinkConfig,
};
use serde_json::Value;

const VECTORS: &str = include_str!("../../tests/vectors/qubes-policy.json");

/// Vectors that cannot run here, with the reason.
const SKIPPED: &[(&str, &str)] = &[];

struct Names<'a>(Option<&'a Value>);

impl Names<'_> {
    fn answer(&self, name: &HostName, record: &str) -> Option<Vec<IpAddr>> {
        match &self.0?[name.as_str()][record] {
            Value::Array(all) => Some(all.iter().map(|own| parse(own.as_str().unwrap())).collect()),
            Value::String(text) if text == "NODATA" => Some(Vec::new()),
            _ => None,
        }
    }
}

impl HostLookup for Names<'_> {
    fn addresses4(&self, name: &HostName, each: &mut dyn FnMut(Ipv4Addr)) -> HostState {
        match self.answer(name, "A") {
            Some(all) => {
                for address in all {
                    if let IpAddr::V4(address) = address {
                        each(address);
                    }
                }
                HostState::Resolved
            }
            None => HostState::Unresolved,
        }
    }

    fn addresses6(&self, name: &HostName, each: &mut dyn FnMut(Ipv6Addr)) -> HostState {
        match self.answer(name, "AAAA") {
            Some(all) => {
                for address in all {
                    if let IpAddr::V6(address) = address {
                        each(address);
                    }
                }
                HostState::Resolved
            }
            None => HostState::Unresolved,
        }
    }
}

fn parse(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(text: &str) -> Mac {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// The keys of a tree with `generate` expanded.
fn tree(value: &Value) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    for (key, value) in value.as_object().unwrap() {
        if key == "generate" {
            let template = value["template"].as_str().unwrap();
            for number in 0..value["count"].as_u64().unwrap() {
                let text = template
                    .replace("{hi}", &(number / 250).to_string())
                    .replace("{lo}", &(number % 250).to_string());
                keys.insert(format!("{number:04}"), text);
            }
        } else {
            keys.insert(key.clone(), value.as_str().unwrap().to_owned());
        }
    }
    keys
}

struct World<'a> {
    engine: Engine,
    fixture: &'a Value,
    vector: &'a Value,
    now: Time,
}

fn client_number(name: &str) -> Option<u16> {
    ["C1", "C2", "C3", "C5"]
        .iter()
        .zip(0..)
        .find(|(own, _)| **own == name)
        .map(|(_, id)| id)
}

impl<'a> World<'a> {
    fn new(fixture: &'a Value, vector: &'a Value) -> Self {
        let limits = Limits {
            flows4: 1024,
            flows6: 512,
            clients: 16,
            icmp_rate: None,
            ..Limits::default()
        };
        let mut world = Self {
            engine: Engine::new(limits, [7; 32]),
            fixture,
            vector,
            now: Time::from_secs(1000),
        };
        world.connect();
        world.attach();
        world
    }

    fn key(&self, name: &str) -> &'a str {
        self.fixture["qubesdb"][name].as_str().unwrap()
    }

    fn upstream(&self) -> Vec<Ipv4Addr> {
        let list = match &self.vector["upstream_dns"] {
            Value::Array(own) => own
                .iter()
                .map(|text| text.as_str().unwrap().to_owned())
                .collect(),
            _ => vec![
                self.key("/qubes-primary-dns").to_owned(),
                self.key("/qubes-secondary-dns").to_owned(),
            ],
        };
        list.iter()
            .map(|text: &String| text.parse().unwrap())
            .collect()
    }

    fn connect(&mut self) {
        let uplink = &self.fixture["uplink"];
        let text = |name: &str| uplink[name].as_str().unwrap();
        let mtu = self.vector["uplink_mtu"].as_u64().unwrap_or(1500);
        let config = UplinkConfig {
            mac: mac(text("own_mac")),
            next_hop_mac: mac(text("peer_mac")),
            ip4: text("ip").parse().unwrap(),
            gateway4: text("gateway").parse().ok(),
            ip6: text("ip6").parse().ok(),
            gateway6: text("gateway6").parse().ok(),
            mtu: u16::try_from(mtu).unwrap(),
        };
        if self.vector["uplink_down"] != Value::Bool(true) {
            self.engine.set_uplink(Some(config));
        }
        self.engine.set_downstream(Downstream {
            gateway4: self.key("/qubes-netvm-gateway").parse().ok(),
            gateway6: self.key("/qubes-netvm-gateway6").parse().ok(),
        });
        let virtual_resolvers = ["/qubes-netvm-primary-dns", "/qubes-netvm-secondary-dns"]
            .map(|name| self.key(name).parse().unwrap());
        self.engine.set_dns(&virtual_resolvers, &self.upstream());
        let list = |text: &str| text.split_whitespace().map(parse).collect::<Vec<_>>();
        let mut configured = list(self.key("/connected-ips"));
        configured.extend(list(self.key("/connected-ips6")));
        self.engine.set_configured(&configured);
        self.engine.set_mapped(&[MappedAddress {
            real: Ipv4Addr::new(10, 137, 0, 30),
            visible: self
                .key("/mapped-ip/10.137.0.30/visible-ip")
                .parse()
                .unwrap(),
            visible_gateway: self
                .key("/mapped-ip/10.137.0.30/visible-gateway")
                .parse()
                .unwrap(),
        }]);
    }

    fn attach(&mut self) {
        for (name, config) in self.fixture["clients"].as_object().unwrap() {
            let Some(id) = client_number(name) else {
                continue;
            };
            let vif = config["vif"].as_str().unwrap();
            let addresses: Vec<IpAddr> = config["ip"]
                .as_str()
                .unwrap()
                .split(' ')
                .map(parse)
                .collect();
            self.engine
                .attach_client(ClientConfig {
                    id: ClientId(id),
                    domid: vif.split('/').next().unwrap().parse().unwrap(),
                    mac: mac(config["mac"].as_str().unwrap()),
                    addresses: addresses.clone(),
                    mtu: 1500,
                })
                .unwrap();
            for address in addresses {
                let own = match (name.as_str(), address) {
                    ("C1", IpAddr::V4(_)) => self.vector.get("rules"),
                    ("C1", IpAddr::V6(_)) => self.vector.get("rules6"),
                    (other, IpAddr::V4(_)) => self.vector["other_rules"].get(other),
                    (_, IpAddr::V6(_)) => None,
                };
                let rules = own.unwrap_or(&self.fixture["default_rules"]);
                self.set_rules(address, rules);
            }
        }
    }

    fn set_rules(&mut self, address: IpAddr, rules: &Value) {
        if rules.is_null() {
            return;
        }
        let family = if address.is_ipv4() {
            Family::Ipv4
        } else {
            Family::Ipv6
        };
        let keys = tree(rules);
        let pairs = keys
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_bytes()));
        let resolvers4 = self.upstream();
        let names = Names(self.vector.get("dns"));
        let environment = RuleEnvironment {
            resolvers4: &resolvers4,
            resolvers6: &[],
            hosts: &names,
            host_policy: HostPolicy::PerRule,
        };
        match qubes::firewall_tree::read_tree(family, pairs) {
            Ok(chain) => {
                let compiled = CompiledRules::compile(&chain, &environment).unwrap();
                self.engine.set_rules(address, compiled);
            }
            Err(_) => self.engine.set_rules_invalid(address),
        }
    }

    /// Injects a packet of a vector; what left, over all its fragments.
    fn inject(&mut self, from: &str, pkt: &Value) -> Outcome {
        let ingress = client_number(from).map_or(Iface::Uplink, client);
        let (to, own) = match ingress {
            Iface::Client(_) => (GATEWAY, CLIENT_MAC),
            Iface::Uplink => (
                mac(self.fixture["uplink"]["own_mac"].as_str().unwrap()),
                GATEWAY,
            ),
        };
        let address = |name: &str, otherwise: Mac| pkt[name].as_str().map_or(otherwise, mac);
        let (to, own) = (address("l2dst", to), address("l2src", own));
        let mut outcome: Option<Outcome> = None;
        for frame in frames(pkt, to, own) {
            self.now = self.now.plus_nanos(1_000_000);
            let next = run(&mut self.engine, ingress, &frame, self.now);
            let mut sent = outcome.map_or(Vec::new(), |own| own.sent);
            sent.extend(next.sent);
            outcome = Some(Outcome {
                verdict: next.verdict,
                sent,
            });
        }
        outcome.unwrap()
    }
}

fn number(pkt: &Value, name: &str, otherwise: u64) -> u64 {
    pkt[name].as_u64().unwrap_or(otherwise)
}

fn small<T: TryFrom<u64>>(pkt: &Value, name: &str, otherwise: u64) -> T {
    T::try_from(number(pkt, name, otherwise)).unwrap_or_else(|_| panic!("{name}"))
}

fn flags(text: &str) -> u8 {
    text.bytes().fold(0, |all, letter| {
        all | match letter {
            b'F' => 1,
            b'S' => 2,
            b'R' => 4,
            b'P' => 8,
            b'A' => 16,
            b'U' => 32,
            other => panic!("flag {other}"),
        }
    })
}

fn protocol(pkt: &Value) -> u8 {
    match &pkt["proto"] {
        Value::String(name) => match name.as_str() {
            "tcp" => 6,
            "udp" => 17,
            "icmp" => 1,
            "icmpv6" => 58,
            other => panic!("protocol {other}"),
        },
        Value::Number(number) => u8::try_from(number.as_u64().unwrap()).unwrap(),
        // Neighbour solicitation.
        _ => 58,
    }
}

fn frames(pkt: &Value, to: Mac, own: Mac) -> Vec<Vec<u8>> {
    if let Some(operation) = pkt["arp"].as_str() {
        let to = if pkt["l2dst"].is_null() {
            [0xff; 6]
        } else {
            to
        };
        return vec![arp(operation, pkt, to, own)];
    }
    let ip = packet(pkt);
    match pkt["fragsize"].as_u64() {
        Some(size) => {
            let pieces = ip.fragments(usize::try_from(size).unwrap());
            pieces.iter().map(|piece| piece.frame(to, own)).collect()
        }
        None => vec![ip.frame(to, own)],
    }
}

fn arp(operation: &str, pkt: &Value, to: Mac, own: Mac) -> Vec<u8> {
    let address = |name: &str| match parse(pkt[name].as_str().unwrap()) {
        IpAddr::V4(own) => own.octets(),
        IpAddr::V6(_) => panic!("ARP is IPv4"),
    };
    let code = if operation == "reply" { 2 } else { 1 };
    [
        &to[..],
        &own,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, code],
        &own,
        &address("psrc"),
        &[0; 6],
        &address("pdst"),
    ]
    .concat()
}

fn packet(pkt: &Value) -> Ip {
    let src = parse(pkt["src"].as_str().unwrap());
    let dst = parse(pkt["dst"].as_str().unwrap());
    let header = if src.is_ipv4() { 20 } else { 40 };
    let options = pkt["ipopts"].as_str().map_or(Vec::new(), hex);
    let protocol = protocol(pkt);
    let fixed = match protocol {
        6 => 20,
        1 | 17 | 58 => 8,
        _ => 0,
    };
    let room = number(pkt, "len", header + options.len() as u64 + fixed + 8);
    let payload =
        vec![0x61; usize::try_from(room - header - options.len() as u64 - fixed).unwrap()];
    let transport = match protocol {
        6 => common::tcp(
            small(pkt, "sport", 0),
            small(pkt, "dport", 0),
            small(pkt, "seq", 0),
            small(pkt, "ack", 0),
            flags(pkt["flags"].as_str().unwrap_or("")),
            if pkt["flags"].as_str().unwrap_or("").contains('P') {
                &payload
            } else {
                &[]
            },
        ),
        17 => common::udp(small(pkt, "sport", 0), small(pkt, "dport", 0), &payload),
        1 | 58 => message(pkt, &payload),
        _ => payload,
    };
    let lone_fragment = pkt.get("frag").is_some();
    let mut ip = Ip::new(src, dst, protocol, transport);
    ip.ttl = small(
        pkt,
        "ttl",
        number(pkt, "hlim", if pkt.get("ns").is_some() { 255 } else { 64 }),
    );
    ip.dont_fragment = pkt["df"] == Value::Bool(true);
    ip.options = options;
    if lone_fragment {
        let offset: u16 = small(pkt, "frag", 0);
        ip.fragment = Some((offset * 8, pkt["mf"] == Value::Bool(true)));
    }
    if pkt["bad_csum"] == Value::Bool(true) {
        ip.transport[6] ^= 0x5a;
    }
    for extension in pkt["ext"].as_array().into_iter().flatten() {
        match extension.as_str().unwrap() {
            "destopt" => ip.extensions.push((60, vec![0, 0, 1, 4, 0, 0, 0, 0])),
            "hbh" => ip.extensions.push((0, vec![0, 0, 1, 4, 0, 0, 0, 0])),
            "atomicfrag" => ip.fragment = Some((0, false)),
            other => panic!("extension {other}"),
        }
    }
    ip
}

fn message(pkt: &Value, payload: &[u8]) -> Vec<u8> {
    if let Some(target) = pkt["ns"].as_str() {
        let IpAddr::V6(target) = parse(target) else {
            panic!("{target}")
        };
        let body = [&target.octets()[..], &[1, 1], &CLIENT_MAC].concat();
        return common::icmp(135, 0, [0; 4], &body);
    }
    let kind = small(pkt, "type", 0);
    let code = small(pkt, "code", 0);
    if let Some(inner) = pkt.get("inner") {
        let mtu: u16 = small(pkt, "mtu", 0);
        let [high, low] = mtu.to_be_bytes();
        return common::icmp(kind, code, [0, 0, high, low], &packet(inner).packet());
    }
    let id: u16 = small(pkt, "id", 0);
    let [high, low] = id.to_be_bytes();
    common::icmp(kind, code, [high, low, 0, 1], payload)
}

fn hex(text: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `5000`, `not 5000, >=1024`, `not 123, 1..511`.
fn satisfies(value: u64, wanted: &Value) -> bool {
    match wanted {
        Value::Number(number) => number.as_u64() == Some(value),
        Value::String(text) => text.split(", ").all(|part| {
            if let Some(not) = part.strip_prefix("not ") {
                value != not.parse::<u64>().unwrap()
            } else if let Some(least) = part.strip_prefix(">=") {
                value >= least.parse().unwrap()
            } else {
                let (low, high) = part.split_once("..").unwrap();
                (low.parse().unwrap()..=high.parse().unwrap()).contains(&value)
            }
        }),
        other => panic!("{other}"),
    }
}

fn check(condition: bool, what: &str) -> Result<(), String> {
    condition.then_some(()).ok_or_else(|| what.to_owned())
}

/// Whether an outcome is what a vector expects.
fn judge(expect: &Value, from: &str, pkt: &Value, outcome: &Outcome) -> Result<(), String> {
    let back = client_number(from).map_or(Iface::Uplink, client);
    let first = outcome.sent.first();
    match expect["verdict"].as_str().unwrap() {
        "drop" => check(first.is_none(), "something was sent"),
        "forward" => forwarded(expect, pkt, outcome),
        "reject" | "reply" => {
            let (egress, frame) = first.ok_or("nothing was sent")?;
            let seen = see(frame);
            let message = [u64::from(seen.transport[0]), u64::from(seen.transport[1])];
            let (wanted, number) = match expect.get("icmp") {
                Some(wanted) => (wanted, 1),
                None => (&expect["icmpv6"], 58),
            };
            check(
                outcome.sent.len() == 1 && *egress == back,
                "not one answer to the sender",
            )?;
            check(
                seen.protocol == number && *wanted == Value::from(message.to_vec()),
                "message",
            )?;
            check(
                seen.src == parse(expect["from"].as_str().unwrap()),
                "outer source",
            )?;
            let to = expect["to"]
                .as_str()
                .unwrap_or(pkt["src"].as_str().unwrap());
            check(seen.dst == parse(to), "outer destination")?;
            match expect["mtu"].as_u64() {
                Some(mtu) => check(u64::from(seen.port(6)) == mtu, "mtu"),
                None => Ok(()),
            }
        }
        "arp-reply" => {
            let (egress, frame) = first.ok_or("nothing was sent")?;
            check(
                *egress == back && frame[12..14] == [8, 6] && frame[21] == 2,
                "no ARP reply",
            )?;
            check(frame[22..28] == mac(expect["mac"].as_str().unwrap()), "mac")?;
            let ip = Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]);
            check(
                IpAddr::V4(ip) == parse(expect["ip"].as_str().unwrap()),
                "ip",
            )
        }
        "na" => {
            let (egress, frame) = first.ok_or("nothing was sent")?;
            let seen = see(frame);
            check(
                *egress == back && seen.transport[0] == 136 && seen.ttl == 255,
                "no NA",
            )?;
            let IpAddr::V6(target) = parse(expect["target"].as_str().unwrap()) else {
                return Err("target".to_owned());
            };
            check(seen.transport[8..24] == target.octets(), "target")
        }
        other => Err(format!("unknown verdict {other}")),
    }
}

fn forwarded(expect: &Value, pkt: &Value, outcome: &Outcome) -> Result<(), String> {
    let (egress, frame) = outcome.sent.first().ok_or("nothing was sent")?;
    let out = expect["out"].as_str().unwrap();
    let wanted = client_number(out).map_or(Iface::Uplink, client);
    let count = usize::try_from(number(expect, "fragments", 1)).unwrap();
    check(outcome.sent.len() == count, "number of frames")?;
    check(*egress == wanted, "interface")?;
    let seen = see(frame);
    let link = match wanted {
        Iface::Uplink => (GATEWAY, CLIENT_MAC),
        Iface::Client(_) => (CLIENT_MAC, GATEWAY),
    };
    check((seen.mac_to, seen.mac_from) == link, "link addresses")?;
    for (name, value) in expect.as_object().unwrap() {
        let address = |at: IpAddr| at == parse(value.as_str().unwrap());
        let good = match name.as_str() {
            "verdict" | "out" | "fragments" => true,
            "src" => address(seen.src),
            "dst" => address(seen.dst),
            "sport" => satisfies(u64::from(seen.sport()), value),
            "dport" => satisfies(u64::from(seen.dport()), value),
            "id" => satisfies(u64::from(seen.port(4)), value),
            "ttl" => satisfies(u64::from(seen.ttl), value),
            "ttl_delta" => seen.ttl == 63 && pkt.get("ttl").is_none(),
            "mtu" => satisfies(u64::from(seen.port(6)), value),
            "inner_src" => {
                // Verify the quoted packet as a whole: the vectors quote complete ones.
                let quoted = [&[0; 12][..], &[8, 0], &seen.transport[8..]].concat();
                address(see(&quoted).src)
            }
            other => return Err(format!("unknown field {other}")),
        };
        check(good, name)?;
    }
    Ok(())
}

fn run_vector(fixture: &Value, vector: &Value) -> Result<(), String> {
    let mut world = World::new(fixture, vector);
    for step in vector["pre"].as_array().into_iter().flatten() {
        world.inject(step["in"].as_str().unwrap(), &step["pkt"]);
    }
    if let Some(rules) = vector.get("rules_after") {
        world.set_rules(parse("10.137.0.10"), rules);
    }
    let from = vector["in"].as_str().unwrap();
    let outcome = world.inject(from, &vector["pkt"]);
    let also = vector["also_ok"].as_array().into_iter().flatten();
    let mut failure = String::new();
    for expect in std::iter::once(&vector["expect"]).chain(also) {
        match judge(expect, from, &vector["pkt"], &outcome) {
            Ok(()) => return Ok(()),
            Err(why) => failure.push_str(&format!("{why} ({expect}); ")),
        }
    }
    Err(format!(
        "{failure}got {:?}, {} frames",
        outcome.verdict,
        outcome.sent.len()
    ))
}

#[test]
fn every_packet_vector_is_decided_as_the_specification_says() {
    let vectors: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
    let (mut run, mut skipped, mut failed) = (0, 0, Vec::new());
    for vector in vectors.iter().filter(|own| own["kind"] == "packet") {
        let id = vector["id"].as_str().unwrap();
        if let Some((_, reason)) = SKIPPED.iter().find(|(own, _)| *own == id) {
            println!("{id}: skipped: {reason}");
            skipped += 1;
            continue;
        }
        run += 1;
        if let Err(why) = run_vector(&vectors[0], vector) {
            failed.push(format!("{id} {}: {why}", vector["title"]));
        }
    }
    println!("{run} vectors, {skipped} skipped, {} failed", failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert_eq!(run + skipped, 205);
}
