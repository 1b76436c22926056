//! Packets that are odd: link layer, options, extension headers, fragments (`qubes-policy.md` 3.2, 3.6, 3.8, 10.1).

use super::world::*;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const BROADCAST: Mac = [0xff; 6];
const C1_UP: (Mac, Mac) = (C1, FIREWALL);

fn arp(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let start = [0, 1, 8, 0, 6, 4, 0, 1];
    let content = [&start[..], &C1, &sender, &[0; 6], &target].concat();
    framed((C1, BROADCAST), ARP, &content)
}

/// `qubes-policy.md` 3.6, table and text: probes, announcements, proxied addresses.
#[test]
fn arp_requests_are_answered_and_announcements_are_not() {
    let mut world = World::new();
    let cases = [
        (C1_IP, OWN, true),
        (C1_IP, C2_IP, true),
        (C1_IP, [8, 8, 8, 8], true),
        (C1_IP, C1_IP, false),
        (C1_IP, [224, 0, 0, 1], false),
        (C1_IP, [127, 0, 0, 1], false),
        ([0; 4], OWN, true),
        ([0; 4], [8, 8, 8, 8], false),
        ([0; 4], C1_IP, false),
        // A claim to our own address.
        (OWN, OWN, false),
        ([8, 8, 8, 8], [8, 8, 8, 8], false),
    ];
    for (micros, (sender, target, _)) in (0..).zip(cases) {
        world.frame(0, micros, "c1", arp(sender, target));
    }
    let run = world.run();
    for (number, (sender, target, is_answered)) in (1..).zip(cases) {
        let expected = if is_answered {
            "local arp"
        } else {
            "drop arp-ignored"
        };
        assert_eq!(run.verdict(number), expected, "{sender:?} {target:?}");
    }
}

/// Deviation D2: rules see the transport behind at most eight extension headers; a longer or odd chain matches no
/// accept rule with a protocol and every such drop rule.
#[test]
fn rules_see_behind_eight_extension_headers_in_order_and_not_further() {
    let options = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
    let chain = |headers: &[u8]| {
        let mut content = Vec::new();
        for next in headers[1..].iter().chain(&[17]) {
            content.extend(options(*next));
        }
        content.extend(udp6((C1_IP6, 5000), (WEB6, 7), b"data"));
        framed(C1_UP, IPV6, &ipv6(C1_IP6, WEB6, headers[0], &content))
    };
    let cases: [(&[u8], bool); 6] = [
        (&[60], true),
        (&[0, 60, 60], true),
        (&[60; 8], true),
        (&[60; 9], false),
        (&[60, 0], false),
        (&[0, 0], false),
    ];
    for (rule, seen, unseen) in [
        (
            "action=accept proto=udp",
            "accept 0 uplink",
            "reject policy policy",
        ),
        ("action=drop proto=udp", "reject rule 0", "reject rule 0"),
    ] {
        let mut world = World::new();
        world.rules("config", C1_IP6, &[rule]);
        for (micros, (headers, _)) in (0..).zip(&cases) {
            // Flows are found by what tracking sees, so each packet has a run of its own.
            world.frames = vec![(1000, micros, "c1", chain(headers))];
            let expected = if cases[usize::try_from(micros).unwrap()].1 {
                seen
            } else {
                unseen
            };
            assert_eq!(world.run().verdict(1), expected, "{rule}: {headers:?}");
        }
    }
}

/// RFC 8200 4.2, RFC 2675, RFC 5095, and row A12.
#[test]
fn extension_headers_that_no_router_may_pass_on_are_dropped() {
    let mut world = World::new();
    world.rules("config", C1_IP6, &["action=accept"]);
    let datagram = udp6((C1_IP6, 5000), (WEB6, 7), b"data");
    let cases: [(u8, [u8; 8], &str); 8] = [
        (0, [17, 0, 5, 2, 0, 0, 1, 0], "accept 0 uplink"),
        (0, [17, 0, 0x1e, 4, 0, 0, 0, 0], "accept 0 uplink"),
        (0, [17, 0, 0x5e, 4, 0, 0, 0, 0], "drop malformed-ipv6"),
        (0, [17, 0, 0xc2, 4, 0, 1, 0, 0], "drop malformed-ipv6"),
        (0, [17, 0, 1, 9, 0, 0, 0, 0], "drop malformed-ipv6"),
        (60, [17, 0, 0xde, 4, 0, 0, 0, 0], "accept 0 uplink"),
        (43, [17, 0, 0, 0, 0, 0, 0, 0], "accept 0 uplink"),
        (43, [17, 0, 0, 1, 0, 0, 0, 0], "drop source-routed"),
    ];
    for (micros, (next, header, _)) in (0..).zip(&cases) {
        let content = [&header[..], &datagram].concat();
        let packet = ipv6(C1_IP6, WEB6, *next, &content);
        world.frame(0, micros, "c1", framed(C1_UP, IPV6, &packet));
    }
    let run = world.run();
    for (number, (_, header, expected)) in (1..).zip(&cases) {
        assert_eq!(run.verdict(number), *expected, "{header:x?}");
    }
}

/// Whatever stands in a chain, the frame has a line of its own and the run goes on.
#[test]
fn chains_that_end_anywhere_have_their_line() {
    let mut world = World::new();
    world.rules("config", C1_IP6, &["action=accept"]);
    let mut count = 0;
    for next in [0, 43, 44, 50, 51, 59, 60, 135, 139, 253] {
        for len in [0, 1, 7, 8, 9, 15, 16, 17, 40] {
            // Every header names the same again and says that it is longer than it is.
            for claimed in [0, 1, 255] {
                let content: Vec<u8> = [next, claimed, 0, 0, 0, 0, 0, 0].repeat(5)[..len].to_vec();
                let packet = ipv6(C1_IP6, WEB6, next, &content);
                world.frame(0, count, "c1", framed(C1_UP, IPV6, &packet));
                count += 1;
            }
        }
    }
    let run = world.run();
    for number in 1..=u64::from(count) {
        assert!(run.frame(number)["verdict"].is_string());
    }
}

/// Table C, row 4, and 3.8: a datagram for us is put together and answered in fragments.
#[test]
fn ping_in_fragments_is_a_ping() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &[]);
    let whole = icmp([8, 0], [0, 7, 0, 1], &[0x5a; 2000]);
    let (first, last) = whole.split_at(1480);
    let first = ipv4(C1_IP, OWN, 1, 0x2000, first);
    let last = ipv4(C1_IP, OWN, 1, 1480 / 8, last);
    world.frame(0, 0, "c1", framed(C1_UP, IPV4, &last));
    world.frame(0, 1, "c1", framed(C1_UP, IPV4, &first));
    let run = world.run();
    assert_eq!(run.verdict(1), "local ping");
    assert_eq!(run.frame(1)["completed_by"], 2);
    assert_eq!(run.verdict(2), "local ping");
    assert_eq!(run.made(2), [("echo-reply", "c1"); 2]);
    let mut reply = Vec::new();
    for piece in run.sent("c1") {
        reply.extend(&piece[34..]);
    }
    assert_eq!((reply.len(), reply[0], !sum(&reply)), (2008, 0, 0));
}

/// Rows A1, A5, A7, A12, A15 to A17, and 3.4: nothing of this leaves, and only what may is answered.
#[test]
fn what_cannot_be_forwarded_is_dropped_or_refused_as_the_table_says() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    let datagram = |to: [u8; 4]| {
        let frame = udp((C1, FIREWALL), (C1_IP, 5000), (to, 7), b"data");
        frame[14..].to_vec()
    };
    let plain = datagram(WEB);
    let checked = |at: usize, value: u8| {
        let mut packet = plain.clone();
        packet[at] = value;
        packet[10..12].fill(0);
        let check = !sum(&packet[..20]);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
        packet
    };
    let mut wrong_sum = plain.clone();
    wrong_sum[10] ^= 1;
    let big = ipv4(C1_IP, WEB, 253, 0x4000, &[0; 1481]);
    let options = |options: &[u8]| {
        let mut packet = plain[..20].to_vec();
        packet[0] = 0x46 + u8::try_from(options.len() / 4 - 1).unwrap();
        packet[3] += u8::try_from(options.len()).unwrap();
        packet.extend(options);
        packet[10..12].fill(0);
        let check = !sum(&packet);
        packet[10..12].copy_from_slice(&check.to_be_bytes());
        packet.extend(&plain[20..]);
        packet
    };
    let from_c2 = udp((C1, FIREWALL), (C2_IP, 5000), (WEB, 7), b"")[14..].to_vec();
    let ours: Mac = FIREWALL;
    let cases: Vec<(Mac, Vec<u8>, &str)> = vec![
        (ours, plain.clone(), "accept 0 uplink"),
        ([2, 0, 0, 0, 0, 1], plain.clone(), "drop foreign-mac"),
        (BROADCAST, plain.clone(), "drop link-broadcast"),
        (ours, wrong_sum, "drop bad-header-checksum"),
        (ours, checked(0, 0x44), "drop malformed-ipv4"),
        (ours, checked(0, 0x55), "drop malformed-ipv4"),
        (ours, checked(3, 19), "drop malformed-ipv4"),
        (ours, checked(3, 33), "drop malformed-ipv4"),
        (ours, checked(8, 1), "reject ttl-exceeded"),
        (ours, from_c2, "drop spoofed-source"),
        (ours, big, "reject too-big"),
        (ours, options(&[0x94, 4, 0, 0]), "accept 0 uplink"),
        (
            ours,
            options(&[0x83, 7, 4, 8, 8, 8, 8, 0]),
            "drop source-routed",
        ),
        (
            ours,
            options(&[0x89, 7, 4, 8, 8, 8, 8, 0]),
            "drop source-routed",
        ),
        (ours, options(&[7, 0, 0, 0]), "drop malformed-ipv4"),
        (ours, options(&[7, 8, 4, 0]), "drop malformed-ipv4"),
        (ours, datagram([224, 0, 0, 1]), "drop multicast"),
        (ours, datagram([255; 4]), "drop multicast"),
        (ours, datagram([127, 0, 0, 1]), "drop martian-destination"),
        (ours, datagram([0; 4]), "drop martian-destination"),
        (ours, datagram(C1_IP), "drop to-client"),
        (ours, datagram(C2_IP), "drop to-client"),
        (ours, datagram(OWN), "reject local-refused"),
        (ours, datagram([169, 254, 1, 1]), "accept 0 uplink"),
    ];
    for (micros, (to, packet, _)) in (0..).zip(&cases) {
        world.frame(0, micros, "c1", framed((C1, *to), IPV4, packet));
    }
    let run = world.run();
    for (number, (_, packet, expected)) in (1..).zip(&cases) {
        assert_eq!(run.verdict(number), *expected, "{packet:x?}");
        let is_told = expected.starts_with("reject");
        assert_eq!(run.made(number).len(), usize::from(is_told), "{packet:x?}");
    }
}
