//! Flows: what starts one, when it ends, what it is translated to, and errors about it (`qubes-policy.md` 3.3, 3.9).

use super::world::*;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ROUTER: [u8; 4] = [192, 0, 2, 99];

/// A world in which both clients may do everything.
fn open_world() -> World {
    let world = World::new();
    world.file(
        "config/vifs",
        "c1 7 00:16:3e:5e:6c:0a 10.137.0.10 fd09:24ef:4179::a89:a\n\
         c2 8 00:16:3e:5e:6c:0b 10.137.0.11 fd09:24ef:4179::a89:b\n",
    );
    for address in ["10.137.0.10", "10.137.0.11", C1_IP6, C2_IP6] {
        world.rules("config", address, &["action=accept"]);
    }
    world
}

const C2_IP6: &str = "fd09:24ef:4179::a89:b";

fn from_client(client: (Mac, [u8; 4]), protocol: u8, content: &[u8]) -> Vec<u8> {
    framed(
        (client.0, FIREWALL),
        IPV4,
        &ipv4(client.1, WEB, protocol, 0, content),
    )
}

/// The same UDP datagram of one of the clients.
fn datagram(client: (Mac, [u8; 4]), port: u16, to: [u8; 4]) -> Vec<u8> {
    udp((client.0, FIREWALL), (client.1, port), (to, 7), b"data")
}

const ONE: (Mac, [u8; 4]) = (C1, C1_IP);
const TWO: (Mac, [u8; 4]) = (C2, C2_IP);

/// 3.9: ports are kept, remapped within their class on conflict, and a remapped one serves every destination.
#[test]
fn ports_are_kept_or_remapped_within_their_class() {
    let ports = [
        (123, 1..=511),
        (511, 1..=511),
        (512, 600..=1023),
        (1023, 600..=1023),
        (1024, 1024..=65_535),
        (40_000, 1024..=65_535),
    ];
    let mut world = open_world();
    for (micros, (port, _)) in (0..).zip(&ports) {
        world.frame(0, micros, "c1", datagram(ONE, *port, WEB));
        world.frame(1, micros, "c2", datagram(TWO, *port, WEB));
        world.frame(2, micros, "c2", datagram(TWO, *port, [198, 51, 100, 2]));
    }
    let run = world.run();
    let count = u64::try_from(ports.len()).unwrap();
    for (number, (port, class)) in (1..).zip(&ports) {
        assert!(run.frame(number)["nat"]["sport"].is_null(), "{port}");
        let mapped = &run.frame(number + count)["nat"]["sport"];
        assert_eq!(mapped["from"], *port);
        let to = u16::try_from(mapped["to"].as_u64().unwrap()).unwrap();
        assert!(to != *port && class.contains(&to), "{port} to {to}");
        assert_eq!(&run.frame(number + 2 * count)["nat"]["sport"], mapped);
    }
    for frame in run.sent("uplink") {
        checksums_are_right(&frame);
    }
}

/// 3.9 and 3.3: two pings with one id, two tunnels to one peer, and only the peer may answer.
#[test]
fn replies_reach_the_client_that_asked_and_nobody_else() {
    let mut world = open_world();
    let echo = |kind: u8, id: [u8; 2]| icmp([kind, 0], [id[0], id[1], 0, 1], b"ping");
    let down = |from: [u8; 4], protocol: u8, content: &[u8]| {
        framed(
            (FIREWALL, UPLINK),
            IPV4,
            &ipv4(from, OWN, protocol, 0, content),
        )
    };
    world.frame(0, 0, "c1", from_client(ONE, 1, &echo(8, [0, 7])));
    world.frame(0, 1, "c2", from_client(TWO, 1, &echo(8, [0, 7])));
    world.frame(0, 2, "c1", from_client(ONE, 47, &[0; 8]));
    let run = world.run();
    let id = u16::try_from(run.frame(2)["nat"]["id"]["to"].as_u64().unwrap()).unwrap();
    assert_ne!(id, 7);
    let answers = [
        (down(WEB, 1, &echo(0, [0, 7])), "accept 0 c1"),
        (down(WEB, 1, &echo(0, id.to_be_bytes())), "accept 0 c2"),
        (down(WEB, 1, &echo(0, [0, 8])), "drop unsolicited"),
        (down(ROUTER, 1, &echo(0, [0, 7])), "drop unsolicited"),
        (down(WEB, 1, &echo(8, [0, 7])), "drop unsolicited"),
        (down(WEB, 47, &[0; 8]), "accept 0 c1"),
        (down(ROUTER, 47, &[0; 8]), "drop unsolicited"),
        (down(WEB, 50, &[0; 8]), "drop unsolicited"),
    ];
    for (micros, (answer, _)) in (10..).zip(&answers) {
        world.frame(0, micros, "uplink", answer.clone());
    }
    // The second tunnel to the same peer could not be told from the first.
    world.frame(1, 0, "c2", from_client(TWO, 47, &[0; 8]));
    let run = world.run();
    for (number, (_, expected)) in (4..).zip(&answers) {
        assert_eq!(run.verdict(number), *expected, "{number}");
    }
    assert_eq!(run.verdict(12), "drop nat-exhausted");
    let to_second = &run.sent("c2")[0];
    assert_eq!(to_second[38..40], [0, 7]);
    assert_eq!(!sum(&to_second[34..]), 0);
}

/// 3.9: an error about a remapped flow is translated outside and inside, down to the checksums, whole or cut to
/// eight bytes of transport.
#[test]
fn errors_about_remapped_flows_are_translated_with_their_quotes() {
    let echo = icmp([8, 0], [0x13, 0x88, 0, 1], b"ping");
    let queries: [(u8, [Vec<u8>; 2]); 3] = [
        (1, [ONE, TWO].map(|client| from_client(client, 1, &echo))),
        (
            6,
            [ONE, TWO].map(|client| tcp((client.0, FIREWALL), (client.1, 5000), (WEB, 80), SYN, 0)),
        ),
        (17, [ONE, TWO].map(|client| datagram(client, 5000, WEB))),
    ];
    for (protocol, [first, second]) in &queries {
        for (kind, second_word) in [
            ([3, 3], [0; 4]),
            ([3, 4], [0, 0, 5, 0x14]),
            ([11, 0], [0; 4]),
            ([12, 0], [20, 0, 0, 0]),
        ] {
            for cut in [false, true] {
                let mut world = open_world();
                world.frame(0, 0, "c1", first.clone());
                world.frame(0, 1, "c2", second.clone());
                let sent = world.run().sent("uplink").pop().unwrap();
                let quote = &sent[14..];
                let quote = if cut { &quote[..28] } else { quote };
                let error = icmp(kind, second_word, quote);
                let packet = ipv4(ROUTER, OWN, 1, 0, &error);
                world.frame(1, 0, "uplink", framed((FIREWALL, UPLINK), IPV4, &packet));
                let run = world.run();
                assert_eq!(run.verdict(3), "accept 0 c2", "{protocol} {kind:?} {cut}");
                let frame = run.sent("c2").pop().unwrap();
                assert_eq!((&frame[26..30], &frame[30..34]), (&ROUTER[..], &C2_IP[..]));
                assert_eq!(!sum(&frame[34..]), 0, "{protocol} {kind:?} {cut}");
                assert_eq!(frame[38..42], second_word);
                let inner = &frame[42..];
                assert_eq!(!sum(&inner[..20]), 0);
                assert_eq!((&inner[12..16], &inner[16..20]), (&C2_IP[..], &WEB[..]));
                let at = if *protocol == 1 { 24 } else { 20 };
                assert_eq!(inner[at..at + 2], 5000_u16.to_be_bytes());
                if !cut {
                    let transport = &inner[20..];
                    let check = match protocol {
                        1 => !sum(transport),
                        _ => transport_check(&inner[12..20], *protocol, transport),
                    };
                    assert_eq!(check, 0, "{protocol} {kind:?}");
                }
            }
        }
    }
}

/// The same over IPv6, and what an error must be to be about a flow (RFC 5508 4.2).
#[test]
fn errors_over_ipv6_are_translated_and_errors_about_nothing_are_not() {
    let mut world = open_world();
    let query = udp6((C1_IP6, 5000), (WEB6, 7), b"data");
    world.frame(
        0,
        0,
        "c1",
        framed((C1, FIREWALL), IPV6, &ipv6(C1_IP6, WEB6, 17, &query)),
    );
    let sent = world.run().sent("uplink").pop().unwrap();
    let error = |quote: &[u8], to: &str| {
        let mut message = [&[2, 0, 0, 0, 0, 0, 5, 0][..], quote].concat();
        let header = ipv6("2001:db8::99", to, 58, &[]);
        let check = transport_check(&header[8..], 58, &message);
        message[2..4].copy_from_slice(&check.to_be_bytes());
        let packet = ipv6("2001:db8::99", to, 58, &message);
        framed((FIREWALL, UPLINK), IPV6, &packet)
    };
    let mut other_port = sent[14..].to_vec();
    other_port[41] ^= 1;
    world.frame(1, 0, "uplink", error(&sent[14..], OWN6));
    world.frame(1, 1, "uplink", error(&other_port, OWN6));
    world.frame(1, 2, "uplink", error(&sent[14..], C1_IP6));
    let mut damaged = error(&sent[14..], OWN6);
    damaged[56] ^= 1;
    world.frame(1, 3, "uplink", damaged);
    let run = world.run();
    assert_eq!(run.verdict(2), "accept 0 c1");
    for number in 3..=5 {
        assert_eq!(run.frame(number)["verdict"], "drop", "{number}");
    }
    let frame = run.sent("c1").pop().unwrap();
    assert_eq!(frame[38..54], ipv6(C1_IP6, C1_IP6, 59, &[])[8..24]);
    assert_eq!(transport_check(&frame[22..54], 58, &frame[54..]), 0);
    // All of the quote is as the client sent it but for the hop limit.
    let mut quote = frame[62..].to_vec();
    quote[7] += 1;
    assert_eq!(quote, ipv6(C1_IP6, WEB6, 17, &query));
}

/// 3.3, the column of timeouts: just before and just after, with nothing in between.
#[test]
fn flows_end_when_their_time_is_over() {
    let answer = udp((FIREWALL, UPLINK), (WEB, 7), (OWN, 5000), b"data");
    let ask = || datagram(ONE, 5000, WEB);
    let syn = || tcp((C1, FIREWALL), (C1_IP, 5000), (WEB, 80), SYN, 0);
    let syn_ack = tcp((FIREWALL, UPLINK), (WEB, 80), (OWN, 5000), SYN_ACK, 101);
    // What the client sends at once, when it is answered, and how long the flow then lives. A stream of UDP is one that
    // lasts for more than two seconds, as in Linux.
    for (query, answer, answered_at, seconds) in [
        (ask(), &answer, &[][..], 30),
        (ask(), &answer, &[0, 3], 120),
        (syn(), &syn_ack, &[], 120),
        (syn(), &syn_ack, &[0], 60),
    ] {
        let since = answered_at.last().copied().unwrap_or(0);
        for (late, verdict) in [
            (since + seconds - 1, "accept 0 c1"),
            (since + seconds + 2, "drop unsolicited"),
        ] {
            let mut world = open_world();
            world.frame(0, 0, "c1", query.clone());
            for second in answered_at.iter().chain([&late]) {
                world.frame(*second, 1, "uplink", answer.clone());
            }
            let last = u64::try_from(world.frames.len()).unwrap();
            let run = world.run();
            assert_eq!(run.verdict(last), verdict, "{seconds} {answered_at:?}");
        }
    }
}

/// 3.3, the row of TCP, and deviation D6: what starts a flow, and what is nothing.
#[test]
fn segments_without_a_flow_start_one_or_are_dropped_silently() {
    const FIN: u8 = 1;
    const PSH: u8 = 8;
    const URG: u8 = 0x20;
    let segment = |port: u16, flags: u8| {
        let mut frame = tcp((C1, FIREWALL), (C1_IP, port), (WEB, 80), SYN, 0);
        frame[47] = flags;
        frame[50..52].fill(0);
        let check = transport_check(&frame[26..34], 6, &frame[34..]);
        frame[50..52].copy_from_slice(&check.to_be_bytes());
        frame
    };
    let cases = [
        (SYN, "accept 0 uplink", "reject policy policy"),
        (SYN | 0xc0, "accept 0 uplink", "reject policy policy"),
        (ACK, "accept 0 uplink", "reject policy policy"),
        (ACK | PSH, "accept 0 uplink", "reject policy policy"),
        (SYN_ACK, "drop tcp-state", "drop tcp-state"),
        (RST, "drop tcp-state", "drop tcp-state"),
        (RST | ACK, "drop tcp-state", "drop tcp-state"),
        (FIN | ACK, "drop tcp-state", "drop tcp-state"),
        (0, "drop tcp-flags", "drop tcp-flags"),
        (FIN, "drop tcp-flags", "drop tcp-flags"),
        (SYN | FIN, "drop tcp-flags", "drop tcp-flags"),
        (SYN | RST, "drop tcp-flags", "drop tcp-flags"),
        (FIN | PSH | URG, "drop tcp-flags", "drop tcp-flags"),
        (0x3f, "drop tcp-flags", "drop tcp-flags"),
    ];
    for (rules, refuses) in [(&["action=accept"][..], false), (&[], true)] {
        let mut world = World::new();
        world.rules("config", "10.137.0.10", rules);
        for (number, (flags, ..)) in (0_u16..).zip(cases) {
            world.frame(0, number.into(), "c1", segment(30_000 + number, flags));
        }
        let run = world.run();
        for (number, (flags, accepted, refused)) in (1..).zip(cases) {
            let expected = if refuses { refused } else { accepted };
            assert_eq!(run.verdict(number), expected, "{flags:#x}");
        }
    }
}
