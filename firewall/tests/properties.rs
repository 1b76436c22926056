//! Properties of the engine under random traffic.
//!
//! Every frame that leaves is taken apart by the test's own code, which verifies every checksum in it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use common::{CLIENT_MAC, GATEWAY, Ip, Outcome, client, icmp, run, see, tcp, udp};
use firewall::rule::{
    Action, Destination, Family, PortRange, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment};
use firewall::{
    ClientConfig, ClientId, Downstream, Engine, FlowCursor, Frame, Gso, GsoFamily, Iface, Limits,
    Time, UplinkConfig, Verdict, Work,
};
use proptest::prelude::*;

const FLOWS: u32 = 256;
const CLIENTS: u16 = 3;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn own(v6: bool) -> IpAddr {
    ip(if v6 { "fd09::6" } else { "10.137.0.6" })
}

fn source(client: u16, v6: bool) -> IpAddr {
    if v6 {
        ip(&format!("fd09::{:x}", 0x10 + client))
    } else {
        IpAddr::from([10, 137, 0, 10 + u8::try_from(client).unwrap()])
    }
}

fn server(number: u8, v6: bool) -> IpAddr {
    if v6 {
        ip(&format!("2001:db8::{number:x}"))
    } else {
        IpAddr::from([93, 184, 216, number])
    }
}

fn rules(family: Family, ports: Option<PortRange>) -> CompiledRules {
    let traffic = match ports {
        None => Traffic::Any,
        Some(ports) => Traffic::TcpOrUdp { ports },
    };
    let rule = Rule {
        number: RuleNumber::new(0).unwrap(),
        action: Action::Accept,
        destination: Destination::Any,
        traffic,
    };
    let chain = RuleChain::new(family, Action::Drop, vec![rule]).unwrap();
    let environment = RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    };
    CompiledRules::compile(&chain, &environment).unwrap()
}

fn engine() -> Engine {
    engine_with(FLOWS)
}

fn engine_with(flows: u32) -> Engine {
    let limits = Limits {
        flows4: flows,
        flows6: flows,
        clients: CLIENTS,
        icmp_rate: None,
        ..Limits::default()
    };
    let mut engine = Engine::new(limits, [9; 32]);
    engine.set_uplink(Some(UplinkConfig {
        ip6: "fd09::6".parse().ok(),
        gateway6: "fd09::5".parse().ok(),
        ..UplinkConfig::new(CLIENT_MAC, Ipv4Addr::new(10, 137, 0, 6))
    }));
    engine.set_downstream(Downstream {
        gateway4: "10.137.0.6".parse().ok(),
        gateway6: "fd09::6".parse().ok(),
    });
    for id in 0..CLIENTS {
        let addresses = vec![source(id, false), source(id, true)];
        engine
            .attach_client(ClientConfig {
                id: ClientId(id),
                domid: id,
                mac: CLIENT_MAC,
                addresses: addresses.clone(),
                mtu: 1500,
            })
            .unwrap();
        engine.set_rules(addresses[0], rules(Family::Ipv4, None));
        engine.set_rules(addresses[1], rules(Family::Ipv6, None));
    }
    engine
}

fn give(engine: &mut Engine, ingress: Iface, packet: &Ip, now: Time) -> Outcome {
    let (to, from) = match ingress {
        Iface::Uplink => (CLIENT_MAC, GATEWAY),
        Iface::Client(_) => (GATEWAY, CLIENT_MAC),
    };
    run(engine, ingress, &packet.frame(to, from), now)
}

/// What a client sends.
#[derive(Clone, Debug)]
struct Sent {
    client: u16,
    server: u8,
    v6: bool,
    /// TCP, UDP, ICMP query, GRE.
    kind: u8,
    port: u16,
    payload: Vec<u8>,
}

fn sent() -> impl Strategy<Value = Sent> {
    (
        0..CLIENTS,
        1_u8..4,
        any::<bool>(),
        0_u8..4,
        prop_oneof![1_u16..20, 500_u16..520, 1020_u16..1040, any::<u16>()],
        prop::collection::vec(any::<u8>(), 0..40),
    )
        .prop_map(|(client, server, v6, kind, port, payload)| Sent {
            client,
            server,
            v6,
            kind,
            port,
            payload,
        })
}

impl Sent {
    fn protocol(&self) -> u8 {
        match (self.kind, self.v6) {
            (0, _) => 6,
            (1, _) => 17,
            (2, false) => 1,
            (2, true) => 58,
            _ => 47,
        }
    }

    fn packet(&self) -> Ip {
        let [high, low] = self.port.to_be_bytes();
        let transport = match (self.kind, self.v6) {
            (0, _) => tcp(self.port, 443, 1000, 0, 2, b""),
            (1, _) => udp(self.port, 443, &self.payload),
            (2, false) => icmp(8, 0, [high, low, 0, 1], &self.payload),
            (2, true) => icmp(128, 0, [high, low, 0, 1], &self.payload),
            _ => vec![7; 12],
        };
        let (src, dst) = (source(self.client, self.v6), server(self.server, self.v6));
        Ip::new(src, dst, self.protocol(), transport)
    }
}

/// The answer to a packet as it was seen outside.
fn answer(packet: &common::Seen) -> Ip {
    let t = &packet.transport;
    let transport = match packet.protocol {
        6 => tcp(packet.dport(), packet.sport(), 5000, 1001, 0x12, b""),
        17 => udp(packet.dport(), packet.sport(), &t[8..]),
        1 => [&[0][..], &t[1..]].concat(),
        58 => [&[129][..], &t[1..]].concat(),
        _ => t.clone(),
    };
    Ip::new(packet.dst, packet.src, packet.protocol, transport)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn translation_there_and_back_is_the_identity(all in prop::collection::vec(sent(), 1..60)) {
        let mut engine = engine();
        let now = Time::from_secs(1000);
        let mut outside: BTreeMap<(IpAddr, u8, Vec<u8>), (u16, u16)> = BTreeMap::new();
        for own_packet in &all {
            let packet = own_packet.packet();
            let outcome = give(&mut engine, client(own_packet.client), &packet, now);
            // Ports and identifiers run out only for protocols without any.
            if matches!(outcome.verdict, Verdict::Drop(_)) {
                prop_assert_eq!(own_packet.kind, 3);
                continue;
            }
            let (egress, seen) = outcome.only();
            prop_assert_eq!(egress, Iface::Uplink);
            prop_assert_eq!((seen.src, seen.dst), (own(own_packet.v6), packet.dst));
            prop_assert_eq!(seen.ttl, 63);
            // Two client ports never look the same outside.
            let selector = match own_packet.kind {
                0 | 1 => seen.transport[..4].to_vec(),
                2 => seen.transport[4..6].to_vec(),
                _ => Vec::new(),
            };
            let tuple = (seen.dst, seen.protocol, selector);
            let port = if own_packet.kind == 3 { 0 } else { own_packet.port };
            let user = (own_packet.client, port);
            prop_assert_eq!(*outside.entry(tuple).or_insert(user), user);
            let outcome = give(&mut engine, Iface::Uplink, &answer(&seen), now);
            let (egress, back) = outcome.only();
            prop_assert_eq!(egress, client(own_packet.client));
            prop_assert_eq!((back.src, back.dst), (packet.dst, packet.src));
            match own_packet.kind {
                0 | 1 => prop_assert_eq!((back.sport(), back.dport()), (443, own_packet.port)),
                2 => {
                    prop_assert_eq!(back.port(4), own_packet.port);
                    prop_assert_eq!(&back.transport[6..], &packet.transport[6..]);
                }
                _ => prop_assert_eq!(&back.transport, &packet.transport),
            }
        }
    }

    #[test]
    fn errors_about_translated_packets_reach_their_sender_as_it_knows_them(
        one in sent(), before in prop::collection::vec(sent(), 0..20), half in 4_usize..30
    ) {
        let mut engine = engine();
        let now = Time::from_secs(1000);
        for other in &before {
            give(&mut engine, client(other.client), &other.packet(), now);
        }
        let packet = one.packet();
        let outcome = give(&mut engine, client(one.client), &packet, now);
        prop_assume!(matches!(outcome.verdict, Verdict::Forward { .. }));
        let (_, seen) = outcome.only();
        let mut went_out = Ip::new(seen.src, seen.dst, seen.protocol, seen.transport.clone());
        went_out.ttl = 5;
        let header = if one.v6 { 40 } else { 20 };
        let quoted = went_out.packet();
        // Half a checksum cannot be translated, and means nothing.
        let quoted = &quoted[..quoted.len().min(header + 2 * half)];
        let (protocol, kind, router) = if one.v6 { (58, 3, "2001:db8:1::1") } else { (1, 11, "10.9.9.9") };
        let error = Ip::new(ip(router), own(one.v6), protocol, icmp(kind, 0, [0; 4], quoted));
        let (egress, back) = give(&mut engine, Iface::Uplink, &error, now).only();
        prop_assert_eq!((egress, back.src, back.dst), (client(one.client), ip(router), packet.src));
        // The quote is what the client sent, but for the time to live and with it the checksum.
        let mut expected = packet.clone();
        expected.ttl = 5;
        let expected = expected.packet();
        let inner = &back.transport[8..];
        prop_assert_eq!(inner.len(), quoted.len());
        let same = |a: &[u8], b: &[u8]| (a[..2] == b[..2], a[8..] == b[8..]);
        // The checksum of UDP may be zero or all ones, which are the same number.
        if one.kind != 1 {
            let (start, rest) = same(&inner[header..], &expected[header..quoted.len()]);
            prop_assert!(start && rest);
        }
        prop_assert_eq!(&inner[12..header], &expected[12..header]);
        if !one.v6 {
            prop_assert_eq!(common::ones_sum(&[&inner[..20]]), 0xffff);
        }
    }

    #[test]
    fn no_traffic_exceeds_the_tables_and_views_agree(
        all in prop::collection::vec((sent(), 0_u64..40), 1..900)
    ) {
        let mut engine = engine();
        let mut now = Time::from_secs(1000);
        for (own_packet, seconds) in &all {
            if *seconds == 39 {
                now = now.plus_secs(*seconds);
                while engine.tick(now, 50) {}
            }
            give(&mut engine, client(own_packet.client), &own_packet.packet(), now);
            prop_assert!(engine.flow_count() <= 2 * FLOWS);
        }
        let mut sources = BTreeSet::new();
        let mut shown = 0;
        engine.flows(FlowCursor::default(), usize::MAX, now, &mut |view| {
            shown += 1;
            sources.insert((view.protocol, view.source, view.destination));
        });
        prop_assert_eq!(shown, sources.len());
        let counters = engine.counters();
        let gone = counters.flows_expired + counters.flows_evicted + counters.flows_cut;
        prop_assert_eq!(counters.flows_created, u64::from(engine.flow_count()) + gone);
        let by_client: u32 = engine.clients().map(|view| view.flows).sum();
        prop_assert_eq!(by_client, engine.flow_count());
    }

    #[test]
    fn flow_once_cut_never_passes(
        all in prop::collection::vec(sent(), 1..40), low in 0_u16..500, after in prop::collection::vec(any::<bool>(), 1..4)
    ) {
        let mut engine = engine();
        let now = Time::from_secs(1000);
        let mut flows = Vec::new();
        for own_packet in &all {
            let outcome = give(&mut engine, client(own_packet.client), &own_packet.packet(), now);
            if matches!(outcome.verdict, Verdict::Forward { .. }) {
                flows.push((own_packet, answer(&outcome.only().1)));
            }
        }
        // Everything goes to port 443, or has no port.
        let ports = PortRange::new(low, low + 10).unwrap();
        let allowed = ports.contains(443);
        for id in 0..CLIENTS {
            engine.set_rules(source(id, false), rules(Family::Ipv4, Some(ports)));
            engine.set_rules(source(id, true), rules(Family::Ipv6, Some(ports)));
        }
        for up in after {
            for (own_packet, answer) in &flows {
                let outcome = match up {
                    true => give(&mut engine, client(own_packet.client), &own_packet.packet(), now),
                    false => give(&mut engine, Iface::Uplink, answer, now),
                };
                let passed = matches!(outcome.verdict, Verdict::Forward { .. });
                prop_assert_eq!(passed, allowed && own_packet.kind < 2);
            }
        }
    }

    #[test]
    fn verdicts_do_not_depend_on_the_order_of_other_clients_traffic(
        mine in prop::collection::vec(sent(), 1..40), others in prop::collection::vec(sent(), 0..40), seed in any::<u64>()
    ) {
        let now = Time::from_secs(1000);
        let mine: Vec<_> = mine.into_iter().map(|own| Sent { client: 0, ..own }).collect();
        // Other clients use other servers, so that ports do not collide.
        let others: Vec<_> = others
            .into_iter()
            .map(|own| Sent { client: 1 + own.client % 2, server: own.server + 100, ..own })
            .collect();
        let alone = {
            let mut engine = engine();
            let all: Vec<_> = mine.iter().map(|own| give(&mut engine, client(0), &own.packet(), now).sent).collect();
            all
        };
        let mut engine = engine();
        let (mut rest, mut x) = (others.iter(), seed);
        for (own, expected) in mine.iter().zip(&alone) {
            for _ in 0..x % 3 {
                if let Some(other) = rest.next() {
                    give(&mut engine, client(other.client), &other.packet(), now);
                }
            }
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 1;
            prop_assert_eq!(&give(&mut engine, client(0), &own.packet(), now).sent, expected);
        }
    }

    #[test]
    fn shortcut_and_long_way_agree(all in prop::collection::vec((sent(), any::<bool>(), 0_u8..64, any::<u8>()), 1..60)) {
        // The same packets in a group of twin engines: one gets every packet with an IPv4 option or an
        // IPv6 destination option in front, which keeps it off the shortcut.
        let (mut plain, mut long) = (engine(), engine());
        let mut now = Time::from_secs(1000);
        for (own_packet, down, flags, step) in all {
            now = now.plus_nanos(u64::from(step) * 50_000_000);
            let own_packet = Sent { kind: own_packet.kind % 2, port: 4000 + own_packet.port % 3, client: 0, server: 1, ..own_packet };
            let mut packet = own_packet.packet();
            if own_packet.kind == 0 {
                let transport = tcp(own_packet.port, 443, 1000 + u32::from(step), 5001, flags, &own_packet.payload);
                packet = Ip::new(packet.src, packet.dst, 6, transport);
            }
            if down {
                let mut transport = packet.transport.clone();
                transport.swap(0, 2);
                transport.swap(1, 3);
                packet = Ip::new(packet.dst, own(own_packet.v6), packet.protocol, transport);
            }
            let ingress = if down { Iface::Uplink } else { client(0) };
            let mut other = packet.clone();
            if own_packet.v6 {
                other.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
            } else {
                other.options = vec![1, 1, 1, 1];
            }
            let first = give(&mut plain, ingress, &packet, now);
            let second = give(&mut long, ingress, &other, now);
            prop_assert_eq!(first.verdict, second.verdict);
            if let (Verdict::Forward { .. }, Some((_, a)), Some((_, b))) = (first.verdict, first.sent.first(), second.sent.first()) {
                let (a, b) = (see(a), see(b));
                prop_assert_eq!((a.src, a.dst, a.transport, a.ttl), (b.src, b.dst, b.transport, b.ttl));
            }
        }
        let drops = |engine: &Engine| engine.drops().iter().collect::<Vec<_>>();
        prop_assert_eq!(drops(&plain), drops(&long));
    }
}

/// Bytes that are likely to be read far: a valid frame with some of them changed, or cut.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (
        sent(),
        any::<bool>(),
        any::<u8>(),
        changes,
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(own_packet, down, how, changes, cut, is_cut)| {
            let mut packet = own_packet.packet();
            match how % 6 {
                0 => packet.fragment = Some((u16::from(how) & !7, how & 64 != 0)),
                1 if own_packet.v6 => {
                    packet.extensions = vec![
                        (0, vec![0, 0, 1, 4, 0, 0, 0, 0]),
                        (43, vec![0, 0, 0, how, 0, 0, 0, 0]),
                    ]
                }
                1 => packet.options = vec![0x44, how, 5, 0],
                2 => {
                    let (protocol, kind) = if own_packet.v6 {
                        (58, how % 5)
                    } else {
                        (1, how % 20)
                    };
                    let quoted = Ip::new(
                        packet.dst,
                        packet.src,
                        packet.protocol,
                        packet.transport.clone(),
                    )
                    .packet();
                    packet = Ip::new(
                        packet.src,
                        packet.dst,
                        protocol,
                        icmp(kind, 0, [0; 4], &quoted),
                    );
                }
                _ => {}
            }
            if down {
                std::mem::swap(&mut packet.src, &mut packet.dst);
                packet.dst = own(own_packet.v6);
            }
            let (to, from) = if down {
                (CLIENT_MAC, GATEWAY)
            } else {
                (GATEWAY, CLIENT_MAC)
            };
            let mut bytes = packet.frame(to, from);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            // Most damage would only be caught by the header checksum.
            if bytes[12..14] == [8, 0] && bytes.len() >= 34 {
                let len = 14 + usize::from(bytes[14] & 0xf) * 4;
                if (34..=bytes.len()).contains(&len) {
                    bytes[24..26].fill(0);
                    let field = !common::ones_sum(&[&bytes[14..len]]);
                    bytes[24..26].copy_from_slice(&field.to_be_bytes());
                }
            }
            if is_cut {
                bytes.truncate(cut.index(bytes.len() + 1));
            }
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_the_engine_panic(
        frames in prop::collection::vec((damaged(), 0..=CLIENTS, 0_u32..2000, 0_u8..4, any::<u16>(), 0_u64..50), 1..40)
    ) {
        let mut engine = engine();
        let mut now = Time::from_secs(1000);
        for (mut bytes, from, more, offload, mss, seconds) in frames {
            now = now.plus_secs(seconds / 10);
            let ingress = if from == CLIENTS { Iface::Uplink } else { client(from) };
            let len = u32::try_from(bytes.len()).unwrap();
            let mut frame = Frame::whole(&mut bytes);
            if offload > 0 {
                frame.len = len + more;
                frame.checksum = if offload == 1 { firewall::Checksum::Validated } else { firewall::Checksum::Blank };
                frame.gso = (offload == 3).then_some(Gso { mss, family: if mss & 1 == 0 { GsoFamily::V4 } else { GsoFamily::V6 } });
            }
            let verdict = engine.process(ingress, &mut frame, now);
            if let Verdict::Forward { egress } = verdict {
                // Nothing of a client goes to a client, nothing of the uplink back there.
                prop_assert_ne!(matches!(egress, Iface::Client(_)), from < CLIENTS);
            }
            for (_, bytes) in common::drain(&mut engine) {
                prop_assert!(bytes.len() <= 1514);
            }
            engine.tick(now, 3);
        }
    }
}

/// An engine with so many flows that it looks batches up ahead.
fn crowded(now: Time) -> Engine {
    let mut engine = engine_with(16_384);
    for number in 0..14_000_u16 {
        let [high, low] = number.to_be_bytes();
        let server = IpAddr::from([94, 0, high, low]);
        let packet = Ip::new(source(2, false), server, 17, udp(5000, 53, b""));
        let mut bytes = packet.frame(GATEWAY, CLIENT_MAC);
        let verdict = engine.process(client(2), &mut Frame::whole(&mut bytes), now);
        assert!(matches!(verdict, Verdict::Forward { .. }));
    }
    engine
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn batch_is_decided_like_its_frames_one_by_one(
        steps in prop::collection::vec((sent(), any::<bool>(), 0_u8..4), 1..200), size in 1_usize..70
    ) {
        let now = Time::from_secs(1000);
        let (mut single, mut batched) = (crowded(now), crowded(now));
        let frames: Vec<_> = steps
            .iter()
            .map(|(own_packet, down, what)| {
                // Few flows, so that frames of a batch meet: opened, used, refused, opened again.
                let own_packet = Sent { client: 0, server: 1, port: own_packet.port % 2, kind: own_packet.kind % 2, ..own_packet.clone() };
                let mut packet = own_packet.packet();
                if own_packet.kind == 0 {
                    let flags = [2, 16, 16, 4][usize::from(*what)];
                    let (seq, ack) = if flags == 2 { (1000, 0) } else { (1001, 5001) };
                    packet = Ip::new(packet.src, packet.dst, 6, tcp(own_packet.port, 443, seq, ack, flags, b""));
                }
                if *down {
                    let (seq, ack, flags) = [(5000, 1001, 0x12), (5001, 1001, 16), (5001, 1001, 16), (0, 1001, 0x14)][usize::from(*what)];
                    let transport = match own_packet.kind {
                        0 => tcp(443, own_packet.port, seq, ack, flags, b""),
                        _ => udp(443, own_packet.port, b""),
                    };
                    packet = Ip::new(packet.dst, own(own_packet.v6), packet.protocol, transport);
                }
                let (to, from, ingress) = if *down { (CLIENT_MAC, GATEWAY, Iface::Uplink) } else { (GATEWAY, CLIENT_MAC, client(0)) };
                (ingress, packet.frame(to, from))
            })
            .collect();
        for group in frames.chunks(size) {
            let mut one = group.to_vec();
            let verdicts: Vec<_> = one
                .iter_mut()
                .map(|(ingress, bytes)| single.process(*ingress, &mut Frame::whole(bytes), now))
                .collect();
            let mut many = group.to_vec();
            let mut work: Vec<_> = many
                .iter_mut()
                .map(|(ingress, bytes)| Work { ingress: *ingress, frame: Frame::whole(bytes), verdict: Verdict::Held })
                .collect();
            batched.process_batch(&mut work, now);
            prop_assert_eq!(work.iter().map(|own| own.verdict).collect::<Vec<_>>(), verdicts);
            drop(work);
            prop_assert_eq!(many, one);
            prop_assert_eq!(common::drain(&mut batched), common::drain(&mut single));
        }
        prop_assert_eq!(single.counters(), batched.counters());
    }
}
