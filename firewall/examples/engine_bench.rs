//! The engine's workloads of `performance.md` section 2, on the host.
//!
//! * `engine_bench count WORKLOAD FLOWS CLIENTS RULES PACKETS` is one run of the difference method: it
//!   prepares the same world and the same frames whatever `PACKETS` is, lets the engine decide that
//!   many of them, and prints nothing. Two runs under callgrind that differ only in `PACKETS` differ in
//!   the engine's work alone. `PACKETS` is at most 8192.
//! * `engine_bench time WORKLOAD FLOWS CLIENTS RULES` prints the median and the least nanoseconds per
//!   packet over eleven batches, and the two calibration loops to compare machines with.
//! * `engine_bench memory` prints bytes per flow at capacity.
//! * `engine_bench` alone runs the goal rows under callgrind and prints instructions per packet. Build it
//!   with `RUSTFLAGS="-C target-cpu=x86-64-v2" cargo build --profile bench -p firewall --example
//!   engine_bench`.
//!
//! Workloads: `est-up` (W1), `est-down` (W2), `udp-up`, `udp-down` (W3), `est6-up`, `est6-down` (W4),
//! `new` (W5), `refused` (W6, rate limit off), `spoof` (W7), `full` (W14), `large` (W1 with 1500 bytes).

#![allow(missing_docs, reason = "a program, not a library")]

use std::error::Error;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Instant;

use firewall::rule::{
    Action, Destination, Family, PortRange, Prefix4, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment};
use firewall::{
    ClientConfig, ClientId, Downstream, Engine, Frame, GATEWAY_MAC, Iface, Limits, Time,
    UplinkConfig, Verdict, Work,
};

const MAX_PACKETS: u32 = 8192;
const OWN_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];
const UPLINK4: Ipv4Addr = Ipv4Addr::new(10, 138, 0, 1);
/// Room for one frame, so that frames start on lines of their own.
const STRIDE: usize = 1536;

const SYN: u8 = 2;
const ACK: u8 = 16;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "count", workload, flows, clients, rules, packets] => {
            let plan = Plan::new(workload, flows.parse()?, clients.parse()?, rules.parse()?)?;
            count(&plan, packets.parse()?)
        }
        [_, "time", workload, flows, clients, rules] => {
            let plan = Plan::new(workload, flows.parse()?, clients.parse()?, rules.parse()?)?;
            time(&plan)
        }
        [_, "memory"] => memory(),
        [program] => goals(program),
        _ => Err("usage: engine_bench [count W FLOWS CLIENTS RULES PACKETS | time W FLOWS CLIENTS RULES | memory]".into()),
    }
}

/// What is run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Established,
    New,
    Refused,
    Spoof,
    Full,
}

struct Plan {
    kind: Kind,
    down: bool,
    udp: bool,
    v6: bool,
    /// Bytes of IP packet.
    length: usize,
    flows: u32,
    clients: u16,
    rules: u16,
}

impl Plan {
    fn new(workload: &str, flows: u32, clients: u16, rules: u16) -> Result<Self, Failure> {
        let kind = match workload {
            "est-up" | "est-down" | "udp-up" | "udp-down" | "est6-up" | "est6-down" | "large" => {
                Kind::Established
            }
            "new" => Kind::New,
            "refused" => Kind::Refused,
            "spoof" => Kind::Spoof,
            "full" => Kind::Full,
            other => return Err(format!("no workload {other}").into()),
        };
        Ok(Self {
            kind,
            down: workload.ends_with("down"),
            udp: workload.starts_with("udp"),
            v6: workload.starts_with("est6"),
            length: if workload == "large" {
                1500
            } else {
                50 + 20 * usize::from(workload.starts_with("est6"))
            },
            flows,
            clients,
            rules,
        })
    }

    /// The numbers of the flows that packets belong to.
    fn sequence(&self) -> impl Iterator<Item = u32> + use<> {
        let flows = self.flows;
        let established = self.kind == Kind::Established;
        let mut x = 1_u32;
        (0..).map(move |at| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if established {
                (x >> 8) % flows
            } else {
                flows + at
            }
        })
    }

    fn world(&self) -> Result<Engine, Failure> {
        let room = match self.kind {
            Kind::Full => self.flows,
            _ => (self.flows + 2 * MAX_PACKETS).next_multiple_of(65_536),
        };
        let limits = Limits {
            flows4: if self.v6 { 1024 } else { room },
            flows6: if self.v6 { room } else { 1024 },
            clients: 256,
            outbox_bytes: 1 << 20,
            icmp_rate: None,
            ..Limits::default()
        };
        let mut engine = Engine::new(limits, [42; 32]);
        let own6 = "fd09:24ef:4179::a8a:1".parse()?;
        engine.set_uplink(Some(UplinkConfig {
            ip6: Some(own6),
            gateway6: Some("fd09:24ef:4179::a8a:2".parse()?),
            ..UplinkConfig::new(OWN_MAC, UPLINK4)
        }));
        engine.set_downstream(Downstream {
            gateway4: Some(UPLINK4),
            gateway6: Some(own6),
        });
        for id in 0..self.clients {
            let addresses = vec![source(u32::from(id), false), source(u32::from(id), true)];
            engine.attach_client(ClientConfig {
                id: ClientId(id),
                domid: id + 1,
                mac: OWN_MAC,
                addresses: addresses.clone(),
                mtu: 1500,
            })?;
            for address in addresses {
                let last = match self.kind {
                    Kind::Refused => Action::Drop,
                    _ => Action::Accept,
                };
                engine.set_rules(address, compiled(self.rules, last, address)?);
            }
        }
        let now = Time::from_secs(1000);
        let mut bytes = [0; STRIDE];
        for flow in 0..self.flows {
            if matches!(self.kind, Kind::Refused | Kind::Spoof) {
                break;
            }
            self.establish(&mut engine, &mut bytes, flow, now);
        }
        Ok(engine)
    }

    /// One packet in each direction, or the handshake.
    fn establish(&self, engine: &mut Engine, bytes: &mut [u8], flow: u32, now: Time) {
        let steps: &[(bool, u8)] = if self.udp {
            &[(false, 0), (true, 0)]
        } else {
            &[(false, SYN), (true, SYN | ACK), (false, ACK)]
        };
        for (down, flags) in steps {
            let len = self.write(bytes, flow, *down, *flags);
            let Some(bytes) = bytes.get_mut(..len) else {
                return;
            };
            let verdict = engine.process(self.ingress(flow, *down), &mut Frame::whole(bytes), now);
            assert!(matches!(verdict, Verdict::Forward { .. }), "{verdict:?}");
        }
    }

    fn ingress(&self, flow: u32, down: bool) -> Iface {
        if down {
            return Iface::Uplink;
        }
        let client = flow % u32::from(self.clients);
        Iface::Client(ClientId(u16::try_from(client).unwrap_or(0)))
    }

    /// Writes the frame of a flow; returns its length.
    fn write(&self, bytes: &mut [u8], flow: u32, down: bool, flags: u8) -> usize {
        let i = flow;
        let mut client = i % u32::from(self.clients);
        if self.kind == Kind::Spoof {
            client = (client + 1) % 255;
        }
        let port = 1024 + u16::try_from(i & 0x7fff).unwrap_or(0);
        let low = (0x5d00_0001) + ((7919_u32.wrapping_mul(i) & 0x7ffe) | ((i >> 15) << 15));
        let server = address(low, self.v6, true);
        let (src, dst, sport, dport, to) = if down {
            let own = if self.v6 {
                "fd09:24ef:4179::a8a:1"
                    .parse()
                    .unwrap_or(IpAddr::V4(UPLINK4))
            } else {
                IpAddr::V4(UPLINK4)
            };
            (server, own, 443, port, OWN_MAC)
        } else {
            (source(client, self.v6), server, port, 443, GATEWAY_MAC)
        };
        let (seq, ack) = match (flags, down) {
            (SYN, _) => (1000, 0),
            (0x12, _) => (5000, 1001),
            (_, false) => (1001, 5001),
            (_, true) => (5001, 1001),
        };
        let header = if self.v6 { 40 } else { 20 };
        let len = if self.length == 1500 && flags == ACK {
            1500
        } else {
            self.length.min(header + 30)
        };
        let mut transport: Vec<u8> = Vec::new();
        transport.extend(sport.to_be_bytes());
        transport.extend(dport.to_be_bytes());
        if self.udp {
            let len = u16::try_from(len - header).unwrap_or(0);
            transport.extend(len.to_be_bytes());
            transport.extend([0, 0]);
        } else {
            transport.extend(u32::to_be_bytes(seq));
            transport.extend(u32::to_be_bytes(ack));
            transport.extend([0x50, flags, 1, 0xf6, 0, 0, 0, 0]);
        }
        // A segment without payload stays where it is in the window however often it is sent.
        let payload = if self.udp || self.length == 1500 {
            len - header - transport.len()
        } else {
            0
        };
        transport.resize(transport.len() + payload, 0x61);
        let number = if self.udp { 17 } else { 6 };
        let packet = packet(src, dst, number, transport);
        let ethertype = if self.v6 { [0x86, 0xdd] } else { [8, 0] };
        let frame = [&to[..], &[2, 0, 0, 0, 0, 1], &ethertype, &packet].concat();
        for (to, from) in bytes.iter_mut().zip(&frame) {
            *to = *from;
        }
        frame.len()
    }

    /// The frames that are decided, each on its own place.
    fn frames(&self) -> (Vec<u8>, Vec<(Iface, usize)>) {
        let mut bytes = vec![0; STRIDE * usize::try_from(MAX_PACKETS).unwrap_or(0)];
        let flags = if self.udp {
            0
        } else if self.kind == Kind::Established {
            ACK
        } else {
            SYN
        };
        let mut meta = Vec::new();
        for (chunk, flow) in bytes.chunks_mut(STRIDE).zip(self.sequence()) {
            let len = self.write(chunk, flow, self.down, flags);
            meta.push((self.ingress(flow, self.down), len));
        }
        (bytes, meta)
    }
}

fn address(low: u32, v6: bool, server: bool) -> IpAddr {
    if !v6 {
        return IpAddr::V4(Ipv4Addr::from_bits(low));
    }
    let [a, b] = [low >> 16, low & 0xffff].map(|part| u16::try_from(part).unwrap_or(0));
    IpAddr::V6(if server {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, a, b)
    } else {
        Ipv6Addr::new(0xfd09, 0x24ef, 0x4179, 0, 0, 0, a, b)
    })
}

fn source(client: u32, v6: bool) -> IpAddr {
    address(0x0a89_0002 + client, v6, false)
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for pair in parts.concat().chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(pair.first().copied().unwrap_or(0)) << 8 | u64::from(low);
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(sum).unwrap_or(0)
}

fn packet(src: IpAddr, dst: IpAddr, number: u8, mut transport: Vec<u8>) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(own) => own.octets().to_vec(),
        IpAddr::V6(own) => own.octets().to_vec(),
    };
    let len = u16::try_from(transport.len()).unwrap_or(0);
    let at = if number == 6 { 16 } else { 6 };
    let pseudo = [
        octets(src),
        octets(dst),
        vec![0, number],
        len.to_be_bytes().to_vec(),
    ]
    .concat();
    let field = (!sum(&[&pseudo, &transport])).to_be_bytes();
    for (to, from) in transport.iter_mut().skip(at).zip(field) {
        *to = from;
    }
    let mut header = if src.is_ipv4() {
        let mut header = vec![0x45, 0];
        header.extend((len + 20).to_be_bytes());
        header.extend([0, 1, 0x40, 0, 64, number, 0, 0]);
        header
    } else {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(len.to_be_bytes());
        header.extend([number, 64]);
        header
    };
    header.extend(octets(src));
    header.extend(octets(dst));
    if src.is_ipv4() {
        let field = (!sum(&[&header])).to_be_bytes();
        for (to, from) in header.iter_mut().skip(10).zip(field) {
            *to = from;
        }
    }
    [header, transport].concat()
}

/// `Rules(n)`.
fn compiled(count: u16, last: Action, address: IpAddr) -> Result<CompiledRules, Failure> {
    let family = if address.is_ipv4() {
        Family::Ipv4
    } else {
        Family::Ipv6
    };
    let mut rules = Vec::new();
    for r in 0..count.saturating_sub(1) {
        let n = u32::from(r);
        let (base, offset, length) = match r % 10 {
            9 => (Ipv4Addr::new(198, 18, 0, 0), n.wrapping_mul(256), 24),
            8 => (Ipv4Addr::new(172, 0, 0, 0), n.wrapping_mul(65_536), 16),
            _ => (
                Ipv4Addr::new(198, 51, 0, 0),
                n.wrapping_mul(2_654_435_761),
                32,
            ),
        };
        let network = Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset));
        let first = r % 40_000;
        let traffic = match r % 3 {
            0 => Traffic::Tcp {
                ports: PortRange::new(first, first),
            },
            1 => Traffic::Udp {
                ports: PortRange::new(first, first),
            },
            _ => Traffic::TcpOrUdp {
                ports: PortRange::new(first, first + 1000).ok_or("range")?,
            },
        };
        let destination = match family {
            Family::Ipv4 => Destination::Prefix4(Prefix4::new(network, length).ok_or("prefix")?),
            Family::Ipv6 => Destination::Any,
        };
        rules.push(rule(r, Action::Accept, destination, traffic)?);
    }
    rules.push(rule(
        count.saturating_sub(1),
        last,
        Destination::Any,
        Traffic::Any,
    )?);
    let chain = RuleChain::new(family, Action::Drop, rules).map_err(|error| error.to_string())?;
    let environment = RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    };
    CompiledRules::compile(&chain, &environment).map_err(|error| error.to_string().into())
}

fn rule(
    number: u16,
    action: Action,
    destination: Destination,
    traffic: Traffic,
) -> Result<Rule, Failure> {
    Ok(Rule {
        number: RuleNumber::new(number).ok_or("number")?,
        action,
        destination,
        traffic,
    })
}

/// The frames as batches take them.
fn works<'a>(bytes: &'a mut [u8], meta: &[(Iface, usize)]) -> Vec<Work<'a>> {
    let chunks = bytes.chunks_exact_mut(STRIDE).zip(meta);
    let work = chunks.filter_map(|(chunk, (ingress, len))| {
        Some(Work {
            ingress: *ingress,
            frame: Frame::whole(chunk.get_mut(..*len)?),
            verdict: Verdict::Held,
        })
    });
    work.collect()
}

/// The measured part.
#[inline(never)]
fn decide(engine: &mut Engine, work: &mut [Work<'_>], now: Time) {
    for batch in work.chunks_mut(32) {
        engine.process_batch(batch, now);
        while let Some(frame) = engine.next_generated() {
            black_box(frame.bytes.len());
        }
    }
}

fn count(plan: &Plan, packets: usize) -> Result<(), Failure> {
    let mut engine = plan.world()?;
    let (mut bytes, meta) = plan.frames();
    let mut work = works(&mut bytes, &meta);
    let work = work.get_mut(..packets).ok_or("too many packets")?;
    let before = engine.counters().forwarded_up + engine.counters().forwarded_down;
    decide(&mut engine, work, Time::from_secs(1001));
    let forwarded = engine.counters().forwarded_up + engine.counters().forwarded_down - before;
    let expected = match plan.kind {
        Kind::Refused | Kind::Spoof => 0,
        _ => u64::try_from(packets)?,
    };
    if forwarded != expected {
        let drops: Vec<_> = engine.drops().iter().filter(|(_, n)| *n > 0).collect();
        return Err(format!("{forwarded} of {expected} packets went on: {drops:?}").into());
    }
    Ok(())
}

fn time(plan: &Plan) -> Result<(), Failure> {
    let mut engine = plan.world()?;
    let mut per_packet = Vec::new();
    for batch in 0..11 {
        let mut spent = 0;
        let mut packets = 0;
        for round in 0..4 {
            let (mut bytes, meta) = plan.frames();
            let now = Time::from_millis(1_001_000 + batch * 100 + round);
            let mut work = works(&mut bytes, &meta);
            let start = Instant::now();
            decide(&mut engine, &mut work, now);
            spent += start.elapsed().as_nanos();
            packets += meta.len();
        }
        per_packet.push(u64::try_from(spent * 10)? / u64::try_from(packets)?);
    }
    per_packet.sort_unstable();
    let tenths = |at: usize| per_packet.get(at).copied().unwrap_or(0);
    let (median, least) = (tenths(5), tenths(0));
    println!(
        "median {}.{} ns, least {}.{} ns",
        median / 10,
        median % 10,
        least / 10,
        least % 10
    );
    calibrate();
    Ok(())
}

/// The two loops of `performance.md` section 3.
fn calibrate() {
    use std::hash::Hasher;
    let start = Instant::now();
    let mut chain = 1_u64;
    for _ in 0..1_000_000 {
        let mut hasher = std::collections::hash_map::DefaultHasher::new();
        hasher.write_u64(chain);
        chain = hasher.finish();
    }
    black_box(chain);
    println!(
        "calibration: SipHash-1-3 {:.1} ns",
        start.elapsed().as_secs_f64() * 1e3
    );
    let len = (64_usize << 20) / 8;
    let mut links: Vec<usize> = (0..len).collect();
    let mut x = 1_u64;
    for at in (1..len).rev() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        links.swap(at, usize::try_from(x >> 33).unwrap_or(0) % at);
    }
    let start = Instant::now();
    let mut at = 0;
    for _ in 0..1_000_000 {
        at = links.get(at).copied().unwrap_or(0);
    }
    black_box(at);
    println!(
        "calibration: dependent load {:.0} ns",
        start.elapsed().as_secs_f64() * 1e3
    );
}

fn memory() -> Result<(), Failure> {
    for flows in [4096_u32, 32_768, 1_048_576] {
        let limits = Limits {
            flows4: flows,
            flows6: flows,
            ..Limits::default()
        };
        let engine = Engine::new(limits, [1; 32]);
        for family in [Family::Ipv4, Family::Ipv6] {
            let bytes = engine.flow_table_bytes(family);
            let tenths = bytes * 10 / usize::try_from(flows)?;
            println!(
                "{family:?} {flows} flows: {}.{} bytes/flow",
                tenths / 10,
                tenths % 10
            );
        }
    }
    Ok(())
}

/// Rows of the goal table: name, workload, flows, clients, rules.
const ROWS: &[(&str, &str, &str, &str, &str)] = &[
    ("P1 established TCP up", "est-up", "1024", "250", "50"),
    ("P1 established TCP down", "est-down", "1024", "250", "50"),
    ("P2 established UDP up", "udp-up", "1024", "250", "50"),
    ("P2 established UDP down", "udp-down", "1024", "250", "50"),
    ("P3 established TCP 1500 B", "large", "1024", "250", "50"),
    ("W4 established IPv6 up", "est6-up", "1024", "250", "50"),
    ("W4 established IPv6 down", "est6-down", "1024", "250", "50"),
    ("P7 new TCP flow, 1 client", "new", "1024", "1", "50"),
    ("P7 new TCP flow, 250 clients", "new", "1024", "250", "50"),
    ("P10 new, 1 rule", "new", "1024", "250", "1"),
    (
        "P10 new, 10000 rules, 1 client",
        "new",
        "1024",
        "1",
        "10000",
    ),
    ("P9 spoofed", "spoof", "1024", "250", "50"),
    (
        "P9 refused by rule, ICMP built",
        "refused",
        "1024",
        "250",
        "50",
    ),
    ("P11 established, 1 client", "est-up", "1024", "1", "50"),
    ("P12 established, 1 flow", "est-up", "1", "1", "50"),
    (
        "P12 established, 65536 flows",
        "est-up",
        "65536",
        "250",
        "50",
    ),
    ("P18 full table", "full", "16384", "250", "50"),
];

fn goals(program: &str) -> Result<(), Failure> {
    for (name, workload, flows, clients, rules) in ROWS {
        let run = |packets: &str| {
            callgrind(
                program,
                &["count", workload, flows, clients, rules, packets],
            )
        };
        let (short, long) = (run("1024")?, run("5120")?);
        println!(
            "{name:32} {:.1} instructions/packet",
            (long - short) / 4096.0
        );
    }
    memory()
}

fn callgrind(program: &str, arguments: &[&str]) -> Result<f64, Failure> {
    let output = Command::new("valgrind")
        .args([
            "--tool=callgrind",
            "--callgrind-out-file=/dev/null",
            program,
        ])
        .args(arguments)
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let count = text
        .lines()
        .find_map(|line| line.split("Collected :").nth(1));
    let count = count.ok_or_else(|| text.to_string())?;
    Ok(count.trim().parse()?)
}
