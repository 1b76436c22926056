//! Behaviour that the specification's vectors do not reach: each step asserts the verdict, the bytes
//! that leave, and the counters that change.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr};

use common::{CLIENT_MAC, GATEWAY, Ip, Outcome, Seen, client, drain, icmp, run, see, tcp, udp};
use firewall::rule::{
    Action, Destination, Family, PortRange, Rule, RuleChain, RuleNumber, Traffic,
};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment, RuleRef};
use firewall::{
    Checksum, ClientConfig, ClientId, Downstream, DropReason, Engine, FlowCursor, FlowState, Frame,
    Gso, GsoFamily, IcmpRate, Iface, Limits, Time, UplinkConfig, Verdict,
};

const SYN: u8 = 2;
const ACK: u8 = 16;
const C1: &str = "10.137.0.10";
const C1_V6: &str = "fd09::a";
const FW: &str = "10.137.0.6";
const FW_V6: &str = "fd09::6";
const SERVER: &str = "93.184.216.34";
const SERVER_V6: &str = "2001:db8::1";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn chain(family: Family, rules: &[(Action, Traffic)]) -> CompiledRules {
    let rules = rules
        .iter()
        .zip(0..)
        .map(|((action, traffic), number)| Rule {
            number: RuleNumber::new(number).unwrap(),
            action: *action,
            destination: Destination::Any,
            traffic: *traffic,
        });
    let chain = RuleChain::new(family, Action::Drop, rules.collect()).unwrap();
    let environment = RuleEnvironment {
        resolvers4: &[],
        resolvers6: &[],
        hosts: &NoHosts,
        host_policy: HostPolicy::PerRule,
    };
    CompiledRules::compile(&chain, &environment).unwrap()
}

fn accept_all(family: Family) -> CompiledRules {
    chain(family, &[(Action::Accept, Traffic::Any)])
}

fn config(id: u16, domid: u16, addresses: &[&str]) -> ClientConfig {
    ClientConfig {
        id: ClientId(id),
        domid,
        mac: CLIENT_MAC,
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        mtu: 1500,
    }
}

fn uplink() -> UplinkConfig {
    UplinkConfig {
        ip6: "fd09::6".parse().ok(),
        gateway6: "fd09::5".parse().ok(),
        ..UplinkConfig::new(CLIENT_MAC, Ipv4Addr::new(10, 137, 0, 6))
    }
}

struct World {
    engine: Engine,
    now: Time,
}

impl World {
    fn with(limits: Limits) -> Self {
        let mut engine = Engine::new(limits, [3; 32]);
        engine.set_uplink(Some(uplink()));
        engine.set_downstream(Downstream {
            gateway4: FW.parse().ok(),
            gateway6: FW_V6.parse().ok(),
        });
        engine.attach_client(config(0, 3, &[C1, C1_V6])).unwrap();
        engine
            .attach_client(config(1, 4, &["10.137.0.11"]))
            .unwrap();
        for address in [C1, "10.137.0.11"] {
            engine.set_rules(ip(address), accept_all(Family::Ipv4));
        }
        engine.set_rules(ip(C1_V6), accept_all(Family::Ipv6));
        Self {
            engine,
            now: Time::from_secs(1000),
        }
    }

    fn new() -> Self {
        Self::with(Limits {
            flows4: 1024,
            flows6: 256,
            clients: 8,
            icmp_rate: None,
            ..Limits::default()
        })
    }

    fn give(&mut self, ingress: Iface, packet: &Ip) -> Outcome {
        let to = match ingress {
            Iface::Uplink => CLIENT_MAC,
            Iface::Client(_) => GATEWAY,
        };
        let from = match ingress {
            Iface::Uplink => GATEWAY,
            Iface::Client(_) => CLIENT_MAC,
        };
        run(&mut self.engine, ingress, &packet.frame(to, from), self.now)
    }

    fn up(&mut self, transport: Vec<u8>, number: u8) -> Outcome {
        self.give(client(0), &Ip::new(ip(C1), ip(SERVER), number, transport))
    }

    fn down(&mut self, transport: Vec<u8>, number: u8) -> Outcome {
        self.give(
            Iface::Uplink,
            &Ip::new(ip(SERVER), ip(FW), number, transport),
        )
    }

    fn handshake(&mut self) {
        for (down, seq, ack, flags) in [
            (false, 1000, 0, SYN),
            (true, 5000, 1001, SYN | ACK),
            (false, 1001, 5001, ACK),
        ] {
            let outcome = if down {
                self.down(tcp(443, 40_000, seq, ack, flags, b""), 6)
            } else {
                self.up(tcp(40_000, 443, seq, ack, flags, b""), 6)
            };
            assert!(
                matches!(outcome.verdict, Verdict::Forward { .. }),
                "{outcome:?}"
            );
        }
    }

    fn flow_state(&self) -> Option<(FlowState, u32)> {
        let mut found = None;
        let each = &mut |view: firewall::FlowView| found = Some((view.state, view.expires_seconds));
        self.engine.flows(FlowCursor::default(), 10, self.now, each);
        found
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.engine.drops().get(reason)
    }
}

fn rejected(outcome: &Outcome, reason: DropReason, message: [u8; 2]) -> Seen {
    assert_eq!(outcome.verdict, Verdict::Reject(reason));
    let (_, seen) = outcome.only();
    assert_eq!(seen.transport[..2], message);
    seen
}

#[test]
fn reject_quotes_what_the_client_sent_with_time_to_live_counted_down() {
    let mut world = World::new();
    world.engine.set_rules(ip(C1), chain(Family::Ipv4, &[]));
    let packet = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, b"payload"));
    let outcome = world.give(client(0), &packet);
    let seen = rejected(&outcome, DropReason::Policy, [3, 13]);
    assert_eq!((seen.src, seen.dst, seen.ttl), (ip(FW), ip(C1), 64));
    let quoted = see(&[&[0; 12], &[8, 0][..], &seen.transport[8..]].concat());
    assert_eq!(
        (quoted.src, quoted.dst, quoted.ttl),
        (ip(C1), ip(SERVER), 63)
    );
    assert_eq!(quoted.transport, packet.transport);
    assert_eq!(world.engine.counters().icmp_errors_sent, 1);
}

#[test]
fn last_rule_and_last_flow_explain_the_last_frame() {
    let mut world = World::new();
    let accept_tcp = (Action::Accept, Traffic::Tcp { ports: None });
    world
        .engine
        .set_rules(ip(C1), chain(Family::Ipv4, &[accept_tcp]));
    world.up(udp(1, 2, b""), 17);
    assert_eq!(world.engine.last_rule(), Some(RuleRef::Policy));
    assert_eq!(world.engine.last_flow(Family::Ipv4, world.now), None);
    world.handshake();
    let flow = world.engine.last_flow(Family::Ipv4, world.now).unwrap();
    assert_eq!(
        (flow.source, flow.translated_source),
        ((ip(C1), 40_000), (ip(FW), 40_000))
    );
    assert_eq!((flow.destination, flow.rule), ((ip(SERVER), 443), Some(0)));
    assert_eq!(world.engine.last_rule(), None);
}

#[test]
fn error_quotes_at_most_576_bytes_over_ipv4_and_1280_over_ipv6() {
    let mut world = World::new();
    world.engine.set_rules(ip(C1), chain(Family::Ipv4, &[]));
    world.engine.set_rules(ip(C1_V6), chain(Family::Ipv6, &[]));
    let outcome = world.up(udp(1, 2, &[7; 1400]), 17);
    assert_eq!(outcome.only().1.total_len, 576);
    let packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(1, 2, &[7; 1400]));
    assert_eq!(world.give(client(0), &packet).only().1.total_len, 1280);
}

#[test]
fn quote_of_an_unfinished_checksum_is_finished() {
    let mut world = World::new();
    world.engine.set_rules(ip(C1), chain(Family::Ipv4, &[]));
    let packet = Ip::new(ip(C1), ip(SERVER), 6, tcp(1000, 2000, 5, 0, SYN, b""));
    let mut bytes = packet.frame(GATEWAY, CLIENT_MAC);
    // What Linux leaves in the field: the sum of the pseudo-header.
    bytes[50..52].copy_from_slice(&[0x12, 0x34]);
    let mut frame = Frame::whole(&mut bytes);
    frame.checksum = Checksum::Blank;
    let verdict = world.engine.process(client(0), &mut frame, world.now);
    assert_eq!(verdict, Verdict::Reject(DropReason::Policy));
    let sent = drain(&mut world.engine);
    let seen = see(&sent[0].1);
    let quoted = see(&[&[0; 12], &[8, 0][..], &seen.transport[8..]].concat());
    assert_eq!(quoted.transport, packet.transport);
}

#[test]
fn errors_are_limited_per_client_and_altogether() {
    let mut world = World::with(Limits {
        clients: 8,
        icmp_rate: Some(IcmpRate::default()),
        ..Limits::default()
    });
    world.engine.set_rules(ip(C1), chain(Family::Ipv4, &[]));
    let mut sent = 0;
    for port in 0..500 {
        let outcome = world.up(udp(port, 99, b""), 17);
        assert_eq!(outcome.verdict, Verdict::Reject(DropReason::Policy));
        sent += outcome.sent.len();
    }
    assert_eq!(sent, 200);
    assert_eq!(world.engine.counters().icmp_errors_limited, 300);
    world
        .engine
        .set_rules(ip("10.137.0.11"), chain(Family::Ipv4, &[]));
    let other = Ip::new(ip("10.137.0.11"), ip(SERVER), 17, udp(1, 2, b""));
    assert_eq!(world.give(client(1), &other).sent.len(), 1);
}

#[test]
fn established_tcp_is_rewritten_both_ways_with_right_checksums() {
    let mut world = World::new();
    world.handshake();
    let (egress, seen) = world
        .up(tcp(40_000, 443, 1001, 5001, ACK | 8, b"hello"), 6)
        .only();
    assert_eq!(
        (egress, seen.src, seen.dst),
        (Iface::Uplink, ip(FW), ip(SERVER))
    );
    assert_eq!((seen.sport(), seen.dport(), seen.ttl), (40_000, 443, 63));
    assert_eq!(&seen.transport[20..], b"hello");
    assert_eq!((seen.mac_to, seen.mac_from), (GATEWAY, CLIENT_MAC));
    let (egress, seen) = world
        .down(tcp(443, 40_000, 5001, 1006, ACK, b"world!"), 6)
        .only();
    assert_eq!(
        (egress, seen.src, seen.dst),
        (client(0), ip(SERVER), ip(C1))
    );
    assert_eq!(
        (seen.mac_to, seen.mac_from, seen.ttl),
        (CLIENT_MAC, GATEWAY, 63)
    );
    assert_eq!(world.flow_state(), Some((FlowState::Established, 300)));
    let view = world.engine.clients().next().unwrap();
    assert_eq!((view.frames_up, view.frames_down, view.flows), (3, 2, 1));
    assert_eq!((view.bytes_up, view.bytes_down), (40 + 40 + 45, 40 + 46));
}

#[test]
fn blank_checksum_becomes_the_pseudo_header_sum_of_the_new_addresses() {
    let mut world = World::new();
    world.handshake();
    let packet = Ip::new(
        ip(C1),
        ip(SERVER),
        6,
        tcp(40_000, 443, 1001, 5001, ACK, b"xy"),
    );
    let mut bytes = packet.frame(GATEWAY, CLIENT_MAC);
    bytes[50..52].copy_from_slice(&[0xde, 0xad]);
    let mut frame = Frame::whole(&mut bytes);
    frame.checksum = Checksum::Blank;
    let verdict = world.engine.process(client(0), &mut frame, world.now);
    assert_eq!(
        verdict,
        Verdict::Forward {
            egress: Iface::Uplink
        }
    );
    assert_eq!(frame.checksum, Checksum::Blank);
    let pseudo = [10, 137, 0, 6, 93, 184, 216, 34, 0, 6, 0, 22];
    assert_eq!(bytes[50..52], common::ones_sum(&[&pseudo]).to_be_bytes());
}

#[test]
fn udp_without_checksum_stays_without_and_zero_becomes_ones() {
    let mut world = World::new();
    let mut packet = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, b"x"));
    packet.transport[6..8].fill(0);
    assert_eq!(world.give(client(0), &packet).only().1.port(6), 0);
    // A payload that makes the translated checksum zero: it must leave as all ones.
    for filler in 0..=u16::MAX {
        let [high, low] = filler.to_be_bytes();
        let payload = udp(5001, 99, &[high, low]);
        let sum = common::transport_sum(ip(FW), ip(SERVER), 17, &payload);
        if sum == 0xffff {
            let packet = Ip::new(ip(C1), ip(SERVER), 17, payload);
            assert_eq!(world.give(client(0), &packet).only().1.port(6), 0xffff);
            return;
        }
    }
    panic!("no such payload");
}

#[test]
fn flow_that_new_rules_forbid_is_cut_from_both_sides_and_others_live() {
    let mut world = World::new();
    world.handshake();
    world.up(udp(5000, 99, b""), 17);
    let tcp_only = [(
        Action::Accept,
        Traffic::Tcp {
            ports: PortRange::new(443, 443),
        },
    )];
    world
        .engine
        .set_rules(ip(C1), chain(Family::Ipv4, &tcp_only));
    let verdict = world.down(udp(99, 5000, b""), 17).verdict;
    assert_eq!(verdict, Verdict::Drop(DropReason::Unsolicited));
    let data = world.down(tcp(443, 40_000, 5001, 1001, ACK, b"x"), 6);
    assert_eq!(data.verdict, Verdict::Forward { egress: client(0) });
    world.engine.remove_rules(ip(C1));
    let data = world.down(tcp(443, 40_000, 5002, 1001, ACK, b"x"), 6);
    assert_eq!(data.verdict, Verdict::Drop(DropReason::Unsolicited));
    assert_eq!(world.engine.counters().flows_cut, 2);
    assert_eq!(world.engine.flow_count(), 0);
    // What was cut does not come back with the old rules.
    world.engine.set_rules(ip(C1), accept_all(Family::Ipv4));
    let data = world.down(tcp(443, 40_000, 5002, 1001, ACK, b"x"), 6);
    assert_eq!(data.verdict, Verdict::Drop(DropReason::Unsolicited));
}

#[test]
fn attach_detach_guard_and_uplink_changes_cut_flows() {
    let mut world = World::new();
    let data = |world: &mut World| {
        world
            .down(tcp(443, 40_000, 5001, 1001, ACK, b""), 6)
            .verdict
    };
    world.handshake();
    assert_eq!(data(&mut world), Verdict::Forward { egress: client(0) });
    world.engine.set_configured(&[ip("10.137.0.20")]);
    assert_eq!(data(&mut world), Verdict::Forward { egress: client(0) });
    world.engine.set_configured(&[ip(SERVER)]);
    assert_eq!(data(&mut world), Verdict::Drop(DropReason::GuardedSource));
    world.engine.set_configured(&[]);
    world.handshake();
    world.engine.set_uplink(Some(UplinkConfig {
        mtu: 1400,
        ..uplink()
    }));
    assert_eq!(data(&mut world), Verdict::Forward { egress: client(0) });
    world.engine.set_uplink(None);
    world.engine.set_uplink(Some(uplink()));
    assert_eq!(data(&mut world), Verdict::Drop(DropReason::Unsolicited));
    world.handshake();
    world.engine.detach_client(ClientId(0));
    world.engine.attach_client(config(5, 9, &[C1])).unwrap();
    assert_eq!(data(&mut world), Verdict::Drop(DropReason::Unsolicited));
    // The rules outlive the vif.
    let packet = Ip::new(ip(C1), ip(SERVER), 6, tcp(40_000, 443, 1, 0, SYN, b""));
    assert_eq!(
        world.give(client(5), &packet).verdict,
        Verdict::Forward {
            egress: Iface::Uplink
        }
    );
    assert_eq!(
        world.give(client(0), &packet).verdict,
        Verdict::Drop(DropReason::UnknownClient)
    );
}

#[test]
fn replies_go_to_the_vif_that_spoke_last() {
    let mut world = World::new();
    world.engine.attach_client(config(2, 9, &[C1])).unwrap();
    let packet = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, b""));
    let answer = |world: &mut World| world.down(udp(99, 5000, b""), 17).verdict;
    for vif in [0, 2, 0] {
        assert_eq!(
            world.give(client(vif), &packet).verdict,
            Verdict::Forward {
                egress: Iface::Uplink
            }
        );
        assert_eq!(
            answer(&mut world),
            Verdict::Forward {
                egress: client(vif)
            }
        );
    }
    assert_eq!(world.engine.flow_count(), 1);
}

#[test]
fn flows_expire_by_their_state() {
    let mut world = World::new();
    world.up(tcp(40_000, 443, 1000, 0, SYN, b""), 6);
    assert_eq!(world.flow_state(), Some((FlowState::SynSent, 120)));
    world.handshake();
    assert_eq!(world.flow_state().unwrap().0, FlowState::Established);
    world.now = world.now.plus_secs(400_000);
    while world.engine.tick(world.now, 100) {}
    let late = world
        .down(tcp(443, 40_000, 5001, 1001, ACK, b""), 6)
        .verdict;
    assert_eq!(late, Verdict::Forward { egress: client(0) });
    world.now = world.now.plus_secs(432_002);
    let late = world
        .down(tcp(443, 40_000, 5001, 1001, ACK, b""), 6)
        .verdict;
    assert_eq!(late, Verdict::Drop(DropReason::Unsolicited));
    while world.engine.tick(world.now, 100) {}
    world.up(icmp(8, 0, [0, 7, 0, 1], b""), 1);
    let deadline = world.engine.next_deadline(world.now).unwrap();
    assert!(deadline > world.now && deadline <= world.now.plus_secs(33));
    world.now = world.now.plus_secs(33);
    world.engine.tick(world.now, 100);
    assert_eq!(world.engine.flow_count(), 0);
    assert_eq!(world.engine.next_deadline(world.now), None);
}

#[test]
fn refused_connection_leaves_no_flow() {
    let mut world = World::new();
    world.up(tcp(40_000, 443, 1000, 0, SYN, b""), 6);
    let reset = world.down(tcp(443, 40_000, 0, 1001, 4 | ACK, b""), 6);
    assert_eq!(reset.verdict, Verdict::Forward { egress: client(0) });
    assert_eq!(world.engine.flow_count(), 0);
}

#[test]
fn connection_that_was_closed_can_be_opened_again_from_the_same_port() {
    let mut world = World::new();
    world.handshake();
    world.up(tcp(40_000, 443, 1001, 5001, 1 | ACK, b""), 6);
    world.down(tcp(443, 40_000, 5001, 1002, 1 | ACK, b""), 6);
    world.up(tcp(40_000, 443, 1002, 5002, ACK, b""), 6);
    assert_eq!(world.flow_state().unwrap().0, FlowState::TimeWait);
    world.handshake();
    assert_eq!(world.flow_state().unwrap().0, FlowState::Established);
    assert_eq!(world.engine.flow_count(), 1);
}

#[test]
fn forged_segments_do_not_pass_an_established_flow() {
    let mut world = World::new();
    world.handshake();
    let window = Verdict::Drop(DropReason::TcpWindow);
    assert_eq!(
        world
            .down(tcp(443, 40_000, 900_000, 1001, ACK, b"x"), 6)
            .verdict,
        window
    );
    assert_eq!(
        world.down(tcp(443, 40_000, 1, 0, 4, b""), 6).verdict,
        window
    );
    let bad = {
        let mut packet = Ip::new(
            ip(SERVER),
            ip(FW),
            6,
            tcp(443, 40_000, 5001, 1001, 1 | ACK, b""),
        );
        packet.transport[16] ^= 1;
        world.give(Iface::Uplink, &packet).verdict
    };
    assert_eq!(bad, Verdict::Drop(DropReason::BadChecksum));
    assert_eq!(world.flow_state().unwrap().0, FlowState::Established);
    assert_eq!(world.dropped(DropReason::TcpWindow), 2);
}

#[test]
fn client_port_that_was_remapped_keeps_its_new_number() {
    let mut world = World::new();
    let out = |world: &mut World, vif: u16, from: &str, to: &str| {
        let packet = Ip::new(ip(from), ip(to), 17, udp(5000, 53, b""));
        world.give(client(vif), &packet).only().1.sport()
    };
    assert_eq!(out(&mut world, 0, C1, "9.9.9.9"), 5000);
    let remapped = out(&mut world, 1, "10.137.0.11", "9.9.9.9");
    assert!(remapped != 5000 && remapped >= 1024);
    // A second destination, where 5000 would be free.
    assert_eq!(out(&mut world, 1, "10.137.0.11", "8.8.8.8"), remapped);
    assert_eq!(world.engine.counters().ports_remapped, 2);
    let answer = Ip::new(ip("8.8.8.8"), ip(FW), 17, udp(53, remapped, b""));
    let (egress, seen) = world.give(Iface::Uplink, &answer).only();
    assert_eq!(
        (egress, seen.dst, seen.dport()),
        (client(1), ip("10.137.0.11"), 5000)
    );
    // Once all of its flows are gone, the port is kept again.
    world.now = world.now.plus_secs(200);
    while world.engine.tick(world.now, 100) {}
    assert_eq!(out(&mut world, 1, "10.137.0.11", "9.9.9.9"), 5000);
}

#[test]
fn protocol_without_ports_can_be_used_by_one_client_per_destination() {
    let mut world = World::new();
    assert_eq!(
        world.up(vec![1; 12], 47).verdict,
        Verdict::Forward {
            egress: Iface::Uplink
        }
    );
    let second = Ip::new(ip("10.137.0.11"), ip(SERVER), 47, vec![1; 12]);
    let verdict = world.give(client(1), &second).verdict;
    assert_eq!(verdict, Verdict::Drop(DropReason::NatExhausted));
    let (egress, seen) = world.down(vec![2; 12], 47).only();
    assert_eq!((egress, seen.dst), (client(0), ip(C1)));
}

#[test]
fn gso_frame_is_forwarded_whole_and_only_if_it_makes_sense() {
    let mut world = World::new();
    world.handshake();
    // 1001 is in the window up to 1001 + 502.
    let payload = vec![5; 400];
    let gso = |world: &mut World, mss: u16, flags: u8, family: GsoFamily| {
        let packet = Ip::new(
            ip(C1),
            ip(SERVER),
            6,
            tcp(40_000, 443, 1001, 5001, flags, &payload),
        );
        let mut bytes = packet.frame(GATEWAY, CLIENT_MAC);
        let mut frame = Frame::whole(&mut bytes);
        frame.gso = Some(Gso { mss, family });
        let verdict = world.engine.process(client(0), &mut frame, world.now);
        (verdict, frame.gso.map(|gso| gso.mss), frame.checksum)
    };
    let forward = Verdict::Forward {
        egress: Iface::Uplink,
    };
    let unusable = (
        Verdict::Drop(DropReason::GsoUnusable),
        Some(88),
        Checksum::Unverified,
    );
    assert_eq!(
        gso(&mut world, 100, ACK, GsoFamily::V4),
        (forward, Some(100), Checksum::Blank)
    );
    assert_eq!(
        gso(&mut world, 400, ACK, GsoFamily::V4),
        (forward, None, Checksum::Blank)
    );
    assert_eq!(gso(&mut world, 88, ACK | 4, GsoFamily::V4), unusable);
    assert_eq!(gso(&mut world, 88, ACK, GsoFamily::V6), unusable);
    assert_eq!(gso(&mut world, 87, ACK, GsoFamily::V4).0, unusable.0);
    assert_eq!(world.engine.counters().gso_without_blank, 2);
}

#[test]
fn large_gso_frame_is_not_too_big_but_its_segments_are_cut_to_the_mtu() {
    let mut world = World::new();
    world.engine.set_uplink(Some(UplinkConfig {
        mtu: 300,
        ..uplink()
    }));
    world.up(tcp(40_000, 443, 1000, 0, SYN, b""), 6);
    let mut answer = tcp(443, 40_000, 5000, 1001, SYN | ACK, b"");
    answer[14..16].copy_from_slice(&[0xff, 0xff]);
    world.down(answer, 6);
    world.up(tcp(40_000, 443, 1001, 5001, ACK, b""), 6);
    let packet = Ip::new(
        ip(C1),
        ip(SERVER),
        6,
        tcp(40_000, 443, 1001, 5001, ACK, &[5; 3000]),
    );
    let mut bytes = packet.frame(GATEWAY, CLIENT_MAC);
    let mut frame = Frame::whole(&mut bytes);
    frame.gso = Some(Gso {
        mss: 1448,
        family: GsoFamily::V4,
    });
    let verdict = world.engine.process(client(0), &mut frame, world.now);
    assert_eq!(
        verdict,
        Verdict::Forward {
            egress: Iface::Uplink
        }
    );
    assert_eq!(frame.gso.map(|gso| gso.mss), Some(260));
}

#[test]
fn datagram_in_fragments_is_answered_by_ping_and_leaves_in_fragments() {
    let mut world = World::new();
    let ping = Ip::new(ip(C1), ip(FW), 1, icmp(8, 0, [0, 7, 0, 1], &[9; 3000]));
    let pieces = ping.fragments(1400);
    assert_eq!(world.give(client(0), &pieces[0]).verdict, Verdict::Held);
    assert_eq!(world.give(client(0), &pieces[2]).verdict, Verdict::Held);
    let outcome = world.give(client(0), &pieces[1]);
    assert_eq!(outcome.verdict, Verdict::Local);
    let parts: Vec<Seen> = outcome.sent.iter().map(|(_, bytes)| see(bytes)).collect();
    assert_eq!(
        parts
            .iter()
            .map(|part| part.transport.len())
            .collect::<Vec<_>>(),
        // The answer is our own, in pieces of the MTU.
        [1480, 1480, 48]
    );
    let whole: Vec<u8> = parts
        .iter()
        .flat_map(|part| part.transport.clone())
        .collect();
    assert_eq!(common::ones_sum(&[&whole]), 0xffff);
    assert_eq!((whole[0], &whole[8..]), (0, &[9; 3000][..]));
    assert_eq!(world.engine.counters().fragments_held, 2);
}

#[test]
fn ipv6_datagram_in_fragments_is_translated_and_leaves_in_fragments() {
    let mut world = World::new();
    let datagram = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(5000, 99, &[9; 3000]));
    let mut last = None;
    for piece in datagram.fragments(1400) {
        last = Some(world.give(client(0), &piece));
    }
    let outcome = last.unwrap();
    assert_eq!(
        outcome.verdict,
        Verdict::Replaced {
            egress: Iface::Uplink
        }
    );
    let parts: Vec<Seen> = outcome.sent.iter().map(|(_, bytes)| see(bytes)).collect();
    assert_eq!(parts.len(), 3);
    let whole: Vec<u8> = parts
        .iter()
        .flat_map(|part| part.transport.clone())
        .collect();
    assert_eq!(
        common::transport_sum(ip(FW_V6), ip(SERVER_V6), 17, &whole),
        0xffff
    );
    assert!(
        parts
            .iter()
            .all(|part| part.src == ip(FW_V6) && part.total_len <= 1448)
    );
}

#[test]
fn spoofed_fragments_take_no_memory() {
    let mut world = World::new();
    let datagram = Ip::new(ip("10.137.0.11"), ip(SERVER), 17, udp(5000, 99, &[9; 3000]));
    for piece in datagram.fragments(1400) {
        let verdict = world.give(client(0), &piece).verdict;
        assert_eq!(verdict, Verdict::Drop(DropReason::SpoofedSource));
    }
    let view = world.engine.clients().next().unwrap();
    assert_eq!(view.drops.get(DropReason::SpoofedSource), 3);
}

#[test]
fn options_are_copied_to_later_fragments_only_if_they_say_so() {
    let mut world = World::new();
    world.engine.set_uplink(Some(UplinkConfig {
        mtu: 500,
        ..uplink()
    }));
    let mut packet = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, &[9; 900]));
    // Router alert (copied), then a time stamp (not copied).
    packet.options = vec![0x94, 4, 0, 0, 0x44, 4, 5, 0];
    let outcome = world.give(client(0), &packet);
    assert_eq!(
        outcome.verdict,
        Verdict::Replaced {
            egress: Iface::Uplink
        }
    );
    assert_eq!(outcome.sent.len(), 2);
    assert_eq!(outcome.sent[0].1[34..42], [0x94, 4, 0, 0, 0x44, 4, 5, 0]);
    assert_eq!(outcome.sent[1].1[34..42], [0x94, 4, 0, 0, 1, 1, 1, 1]);
}

#[test]
fn icmp_error_with_a_quote_of_eight_bytes_is_translated() {
    let mut world = World::new();
    world.handshake();
    let quoted = Ip::new(
        ip(FW),
        ip(SERVER),
        6,
        tcp(40_000, 443, 1001, 5001, ACK, b""),
    )
    .packet();
    let error = icmp(3, 4, [0, 0, 5, 0x78], &quoted[..28]);
    let packet = Ip::new(ip("10.0.0.1"), ip(FW), 1, error);
    let (egress, seen) = world.give(Iface::Uplink, &packet).only();
    assert_eq!(
        (egress, seen.src, seen.dst),
        (client(0), ip("10.0.0.1"), ip(C1))
    );
    let inner = &seen.transport[8..];
    assert_eq!(common::ones_sum(&[&inner[..20]]), 0xffff);
    assert_eq!(inner[12..16], [10, 137, 0, 10]);
    assert_eq!(inner[20..24], quoted[20..24]);
    // Seven bytes are too few.
    let error = icmp(3, 4, [0, 0, 5, 0x78], &quoted[..27]);
    let packet = Ip::new(ip("10.0.0.1"), ip(FW), 1, error);
    let verdict = world.give(Iface::Uplink, &packet).verdict;
    assert_eq!(verdict, Verdict::Drop(DropReason::Unsolicited));
}

#[test]
fn icmpv6_too_big_is_translated_with_its_quote() {
    let mut world = World::new();
    let packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(5000, 99, b"data"));
    let (_, sent) = world.give(client(0), &packet).only();
    let quoted = Ip::new(sent.src, sent.dst, 17, sent.transport.clone()).packet();
    let error = Ip::new(
        ip("2001:db8::fe"),
        ip(FW_V6),
        58,
        icmp(2, 0, [0, 0, 5, 0], &quoted),
    );
    let (egress, seen) = world.give(Iface::Uplink, &error).only();
    assert_eq!((egress, seen.dst), (client(0), ip(C1_V6)));
    let inner = see(&[&[0; 12], &[0x86, 0xdd][..], &seen.transport[8..]].concat());
    assert_eq!(
        (inner.src, inner.dst, inner.sport()),
        (ip(C1_V6), ip(SERVER_V6), 5000)
    );
}

#[test]
fn redirects_and_errors_for_somebody_else_are_not_related() {
    let mut world = World::new();
    world.up(udp(3333, 99, b""), 17);
    let quoted = Ip::new(ip(FW), ip(SERVER), 17, udp(3333, 99, b"")).packet();
    let redirect = Ip::new(
        ip("10.0.0.1"),
        ip(FW),
        1,
        icmp(5, 1, [10, 0, 0, 2], &quoted),
    );
    assert!(world.give(Iface::Uplink, &redirect).sent.is_empty());
    let astray = Ip::new(ip("10.0.0.1"), ip(C1), 1, icmp(11, 0, [0; 4], &quoted));
    assert!(world.give(Iface::Uplink, &astray).sent.is_empty());
}

#[test]
fn ipv6_is_off_without_a_gateway() {
    let mut world = World::new();
    world.engine.set_downstream(Downstream {
        gateway4: FW.parse().ok(),
        gateway6: None,
    });
    let packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(5000, 99, b"x"));
    assert_eq!(
        world.give(client(0), &packet).verdict,
        Verdict::Drop(DropReason::Ipv6Off)
    );
    let target: std::net::Ipv6Addr = FW_V6.parse().unwrap();
    let body = [&target.octets()[..], &[1, 1], &CLIENT_MAC].concat();
    let mut ask = Ip::new(ip(C1_V6), ip(FW_V6), 58, icmp(135, 0, [0; 4], &body));
    ask.ttl = 255;
    assert!(world.give(client(0), &ask).sent.is_empty());
}

#[test]
fn ipv6_link_local_destination_never_leaves_by_the_uplink() {
    let mut world = World::new();
    let packet = Ip::new(ip(C1_V6), ip("fe80::1"), 17, udp(5000, 99, b"x"));
    assert_eq!(
        world.give(client(0), &packet).verdict,
        Verdict::Drop(DropReason::ToClient)
    );
    world.engine.set_rules(ip(C1_V6), chain(Family::Ipv6, &[]));
    rejected(&world.give(client(0), &packet), DropReason::Policy, [1, 1]);
}

#[test]
fn ipv6_without_a_way_out_is_refused_with_no_route() {
    let mut world = World::new();
    world.engine.set_uplink(Some(UplinkConfig {
        gateway6: None,
        ..uplink()
    }));
    let packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(5000, 99, b"x"));
    rejected(&world.give(client(0), &packet), DropReason::NoRoute, [1, 0]);
}

#[test]
fn malformed_frames_have_named_reasons() {
    let mut world = World::new();
    let whole = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, b"x")).frame(GATEWAY, CLIENT_MAC);
    let verdict = |world: &mut World, bytes: &[u8]| {
        run(&mut world.engine, client(0), bytes, world.now).verdict
    };
    let drop = Verdict::Drop;
    assert_eq!(
        verdict(&mut world, &whole[..13]),
        drop(DropReason::MalformedFrame)
    );
    assert_eq!(
        verdict(&mut world, &whole[..33]),
        drop(DropReason::MalformedIpv4)
    );
    assert_eq!(
        verdict(&mut world, &whole[..42]),
        drop(DropReason::MalformedIpv4)
    );
    let mut other = whole.clone();
    other[24] ^= 1;
    assert_eq!(
        verdict(&mut world, &other),
        drop(DropReason::BadHeaderChecksum)
    );
    let mut other = whole.clone();
    other[12] = 0x88;
    assert_eq!(verdict(&mut world, &other), drop(DropReason::NotIp));
    let short = Ip::new(ip(C1), ip(SERVER), 6, vec![0; 19]);
    assert_eq!(
        world.give(client(0), &short).verdict,
        drop(DropReason::MalformedTransport)
    );
    // Padding behind the packet is cut off.
    let padded = [&whole[..], &[0; 30]].concat();
    assert_eq!(
        run(&mut world.engine, client(0), &padded, world.now)
            .only()
            .1
            .total_len,
        29
    );
}

#[test]
fn flows_are_shown_in_pages_each_once() {
    let mut world = World::new();
    for port in 1..=100 {
        world.up(udp(port, 99, b""), 17);
    }
    let (mut cursor, mut ports) = (FlowCursor::default(), Vec::new());
    loop {
        let next = world
            .engine
            .flows(cursor, 7, world.now, &mut |view| ports.push(view.source.1));
        match next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    ports.sort_unstable();
    assert_eq!(ports, (1..=100).collect::<Vec<_>>());
}

#[test]
fn outbox_that_is_full_drops_and_counts() {
    let mut world = World::with(Limits {
        outbox_bytes: 0,
        icmp_rate: None,
        clients: 8,
        ..Limits::default()
    });
    world.engine.set_rules(ip(C1), chain(Family::Ipv4, &[]));
    let bytes = Ip::new(ip(C1), ip(SERVER), 17, udp(1, 2, &[0; 600])).frame(GATEWAY, CLIENT_MAC);
    for _ in 0..100 {
        let mut bytes = bytes.clone();
        let verdict = world
            .engine
            .process(client(0), &mut Frame::whole(&mut bytes), world.now);
        assert_eq!(verdict, Verdict::Reject(DropReason::Policy));
    }
    let sent = drain(&mut world.engine).len();
    let counters = world.engine.counters();
    assert!(sent < 20);
    assert_eq!(counters.icmp_errors_sent + counters.outbox_full, 100);
    assert_eq!(usize::try_from(counters.icmp_errors_sent).unwrap(), sent);
}
