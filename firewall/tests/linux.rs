//! What the differential test against the Linux kernel has found (`tests/differential`): each test is
//! a case in which the engine once did not do what Linux does.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr};

use common::{CLIENT_MAC, GATEWAY, Ip, Outcome, client, icmp, run, tcp, udp};
use firewall::rule::{Action, Family, RuleChain};
use firewall::ruleset::{CompiledRules, HostPolicy, NoHosts, RuleEnvironment};
use firewall::{
    ClientConfig, ClientId, Downstream, DropReason, Engine, Iface, Limits, Time, UplinkConfig,
    Verdict,
};

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const C1: &str = "10.137.0.10";
const C1_V6: &str = "fd09::a";
const FW: &str = "10.137.0.6";
const FW_V6: &str = "fd09::6";
const SERVER: &str = "93.184.216.34";
const SERVER_V6: &str = "2001:db8::1";

const UP: Verdict = Verdict::Forward {
    egress: Iface::Uplink,
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// An engine with one client whose rules accept everything.
fn engine() -> Engine {
    let limits = Limits {
        flows4: 1024,
        flows6: 256,
        clients: 8,
        icmp_rate: None,
        ..Limits::default()
    };
    let mut engine = Engine::new(limits, [3; 32]);
    engine.set_uplink(Some(UplinkConfig {
        ip6: FW_V6.parse().ok(),
        gateway6: "fd09::5".parse().ok(),
        ..UplinkConfig::new(CLIENT_MAC, Ipv4Addr::new(10, 137, 0, 6))
    }));
    engine.set_downstream(Downstream {
        gateway4: FW.parse().ok(),
        gateway6: FW_V6.parse().ok(),
    });
    engine
        .attach_client(ClientConfig {
            id: ClientId(0),
            domid: 3,
            mac: CLIENT_MAC,
            addresses: vec![ip(C1), ip(C1_V6)],
            mtu: 1500,
        })
        .unwrap();
    for (address, family) in [(C1, Family::Ipv4), (C1_V6, Family::Ipv6)] {
        let chain = RuleChain::new(family, Action::Accept, Vec::new()).unwrap();
        let environment = RuleEnvironment {
            resolvers4: &[],
            resolvers6: &[],
            hosts: &NoHosts,
            host_policy: HostPolicy::PerRule,
        };
        let rules = CompiledRules::compile(&chain, &environment).unwrap();
        engine.set_rules(ip(address), rules);
    }
    engine
}

fn up(engine: &mut Engine, packet: &Ip) -> Outcome {
    let frame = packet.frame(GATEWAY, CLIENT_MAC);
    run(engine, client(0), &frame, Time::from_secs(1000))
}

fn down(engine: &mut Engine, packet: &Ip) -> Outcome {
    let frame = packet.frame(CLIENT_MAC, GATEWAY);
    run(engine, Iface::Uplink, &frame, Time::from_secs(1000))
}

#[test]
fn udp_over_ipv6_without_checksum_passes_and_stays_without() {
    let mut packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 17, udp(5000, 99, b"x"));
    packet.transport[6..8].fill(0);
    let outcome = up(&mut engine(), &packet);
    assert_eq!(outcome.verdict, UP);
    assert_eq!(outcome.only().1.port(6), 0);
}

#[test]
fn addresses_that_linux_routes_are_not_martian() {
    for server in ["240.0.0.1", "0.1.2.3"] {
        let packet = Ip::new(ip(C1), ip(server), 17, udp(5000, 99, b"x"));
        assert_eq!(up(&mut engine(), &packet).verdict, UP, "{server}");
    }
    for server in ["0.0.0.0", "127.9.9.9"] {
        let packet = Ip::new(ip(C1), ip(server), 17, udp(5000, 99, b"x"));
        let verdict = up(&mut engine(), &packet).verdict;
        assert_eq!(verdict, Verdict::Drop(DropReason::MartianDestination));
    }
}

#[test]
fn ipv6_first_fragment_that_cuts_the_transport_header_is_dropped() {
    let segment = tcp(40_000, 443, 1000, 0, SYN, &[0; 20]);
    let mut packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 6, segment);
    let mut engine = engine();
    let pieces = packet.fragments(16);
    let first = up(&mut engine, &pieces[0]).verdict;
    assert_eq!(first, Verdict::Drop(DropReason::FragmentMalformed));
    for piece in &pieces[1..] {
        assert_eq!(up(&mut engine, piece).verdict, Verdict::Held);
    }
    // With the whole header in the first piece it passes.
    packet.id = 0x4321;
    let verdicts: Vec<Verdict> = packet
        .fragments(24)
        .iter()
        .map(|piece| up(&mut engine, piece).verdict)
        .collect();
    let replaced = Verdict::Replaced {
        egress: Iface::Uplink,
    };
    assert_eq!(verdicts, [Verdict::Held, replaced]);
}

#[test]
fn invalid_segment_that_is_too_large_is_told_the_mtu() {
    let mut engine = engine();
    let segments = [
        (false, 1000, 0, SYN),
        (true, 5000, 1001, SYN | ACK),
        (false, 1001, 5001, ACK),
    ];
    for (reply, seq, ack, flags) in segments {
        let outcome = if reply {
            let segment = tcp(443, 40_000, seq, ack, flags, b"");
            down(&mut engine, &Ip::new(ip(SERVER), ip(FW), 6, segment))
        } else {
            let segment = tcp(40_000, 443, seq, ack, flags, b"");
            up(&mut engine, &Ip::new(ip(C1), ip(SERVER), 6, segment))
        };
        assert!(matches!(outcome.verdict, Verdict::Forward { .. }));
    }
    // Far outside of the window, and a byte too long.
    let segment = tcp(40_000, 443, 1 << 30, 5001, ACK, &[0; 1461]);
    let mut packet = Ip::new(ip(C1), ip(SERVER), 6, segment);
    packet.dont_fragment = true;
    let outcome = up(&mut engine, &packet);
    assert_eq!(outcome.verdict, Verdict::Reject(DropReason::TooBig));
    assert_eq!(outcome.only().1.transport[..2], [3, 4]);
}

#[test]
fn echo_that_came_in_fragments_is_answered_in_one_packet() {
    let echo = icmp(8, 0, [0, 7, 0, 1], &[0x61; 100]);
    let pieces = Ip::new(ip(C1), ip(FW), 1, echo).fragments(64);
    let mut engine = engine();
    assert_eq!(up(&mut engine, &pieces[0]).verdict, Verdict::Held);
    let outcome = up(&mut engine, &pieces[1]);
    assert_eq!(outcome.verdict, Verdict::Local);
    let (_, seen) = outcome.only();
    assert_eq!((seen.fragment, seen.transport.len()), (None, 108));
}

#[test]
fn echo_is_answered_without_its_options_and_extension_headers() {
    let mut packet = Ip::new(ip(C1), ip(FW), 1, icmp(8, 0, [0, 7, 0, 1], b"payload"));
    packet.options = vec![0x94, 4, 0, 0];
    let (_, seen) = up(&mut engine(), &packet).only();
    assert_eq!((seen.transport[0], seen.total_len), (0, 20 + 15));
    let echo = icmp(128, 0, [0, 7, 0, 1], b"payload");
    let mut packet = Ip::new(ip(C1_V6), ip(FW_V6), 58, echo);
    packet.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
    let (_, seen) = up(&mut engine(), &packet).only();
    assert_eq!((seen.transport[0], seen.total_len), (129, 40 + 15));
}

#[test]
fn unknown_icmpv6_message_is_told_that_its_hops_have_run_out() {
    let mut packet = Ip::new(ip(C1_V6), ip(SERVER_V6), 58, icmp(200, 0, [0; 4], b"x"));
    packet.ttl = 1;
    let outcome = up(&mut engine(), &packet);
    assert_eq!(outcome.verdict, Verdict::Reject(DropReason::TtlExceeded));
    assert_eq!(outcome.only().1.transport[..2], [3, 0]);
}

/// A client opens a connection anew that the server still has (RFC 5961 section 4).
#[test]
fn reset_that_answers_a_challenge_passes() {
    let challenged = || {
        let mut engine = engine();
        let syn = tcp(40_000, 443, 1000, 0, SYN, b"");
        up(&mut engine, &Ip::new(ip(C1), ip(SERVER), 6, syn));
        let challenge = tcp(443, 40_000, 700, 99_000, ACK, b"");
        let outcome = down(&mut engine, &Ip::new(ip(SERVER), ip(FW), 6, challenge));
        assert!(matches!(outcome.verdict, Verdict::Forward { .. }));
        engine
    };
    let reset = |seq| Ip::new(ip(C1), ip(SERVER), 6, tcp(40_000, 443, seq, 0, RST, b""));
    assert_eq!(up(&mut challenged(), &reset(99_000)).verdict, UP);
    let verdict = up(&mut challenged(), &reset(99_001)).verdict;
    assert_eq!(verdict, Verdict::Drop(DropReason::TcpWindow));
}

#[test]
fn error_with_a_source_route_is_dropped_for_that() {
    let mut engine = engine();
    let sent = Ip::new(ip(C1), ip(SERVER), 17, udp(5000, 99, b"x"));
    let (_, left) = up(&mut engine, &sent).only();
    let quote = Ip::new(left.src, left.dst, 17, left.transport).packet();
    let mut error = Ip::new(ip(SERVER), ip(FW), 1, icmp(3, 3, [0; 4], &quote));
    error.options = vec![0x83, 7, 4, 8, 8, 8, 8, 0];
    let verdict = down(&mut engine, &error).verdict;
    assert_eq!(verdict, Verdict::Drop(DropReason::SourceRouted));
}
