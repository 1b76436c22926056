//! Rules as dom0 writes them, good and bad, and how they change (`qubes-policy.md` 1.4, 2, 4.1).

use std::fmt::Write as _;

use super::world::*;

/// Datagrams of a client to one address and port, each from a port of its own.
fn datagram(number: u16, to: ([u8; 4], u16)) -> Vec<u8> {
    udp((C1, FIREWALL), (C1_IP, 20_000 + number), to, b"data")
}

/// `qubes-policy.md` 2.5: each of these blocks its client, with a line that names rule and reason, and nobody else.
#[test]
fn every_malformed_rule_blocks_its_client_visibly_and_no_other() {
    const BAD: [&str; 45] = [
        "",
        "action",
        "action=",
        "action=ACCEPT",
        "action=reject",
        "proto=tcp",
        "action=accept foo=1",
        "action=accept expire=99999999999",
        "action=accept comment=x",
        "action=accept dpi=1",
        "action=accept action=accept",
        "action=accept  proto=tcp",
        " action=accept",
        "action=accept ",
        "action=accept\tproto=tcp",
        "action=accept\r",
        "action=accept\n",
        "action=accept proto=",
        "action=accept proto=6",
        "action=accept proto=gre",
        "action=accept dst4=1.2.3.4/33",
        "action=accept dst4=1.2.3/24",
        "action=accept dst4=",
        "action=accept dst4=1.2.3.4/255.255.255.0",
        "action=accept dst4=::1",
        "action=accept dst6=2001:db8::/32",
        "action=accept dst4=1.2.3.4 dsthost=a.b",
        "action=accept dstports=2-1",
        "action=accept dstports=65536",
        "action=accept dstports=",
        "action=accept dstports=1-2-3",
        "action=accept dstports=http",
        "action=accept proto=icmp dstports=1",
        "action=accept proto=tcp icmptype=8",
        "action=accept icmptype=8 dstports=80",
        "action=accept icmptype=256",
        "action=accept icmptype=-1",
        "action=accept specialtarget=",
        "action=accept specialtarget=foo",
        "action=accept dsthost=",
        "action=accept dsthost=a=b",
        "action=accept dsthost=b\u{fc}cher.example",
        "action=accept dst4=1.2.3.4 dst4=1.2.3.4",
        "action=accept;",
        "Action=accept",
    ];
    let mut world = World::new();
    let mut vifs = String::new();
    for (number, rule) in (1..).zip(BAD) {
        let address = format!("10.137.1.{number}");
        writeln!(vifs, "v{number} {number} 00:16:3e:5e:6c:0a {address}").unwrap();
        // The newline belongs to the file.
        world.rules("config", &address, &[&format!("{rule}\n"), "action=accept"]);
    }
    writeln!(vifs, "c1 900 00:16:3e:5e:6c:0a 10.137.0.10").unwrap();
    world.file("config/vifs", &vifs);
    world.rules("config", "10.137.0.10", &["action=accept"]);
    // All vifs may have the same frames here: a capture for each.
    world.frame(0, 0, "c1", datagram(0, (WEB, 443)));
    for number in 1..=BAD.len() {
        let source = [10, 137, 1, u8::try_from(number).unwrap()];
        let frame = udp((C1, FIREWALL), (source, 5000), (WEB, 443), b"data");
        let name = format!("in-v{number}.pcap");
        std::fs::write(world.folder.join(&name), pcap(&[(1001, 0, &frame)])).unwrap();
        let path = world.folder.join(&name).display().to_string();
        world
            .arguments
            .extend(["--in".to_owned(), format!("v{number}={path}")]);
    }
    let output = world.output();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let lines = String::from_utf8(output.stdout).unwrap();
    for (number, rule) in (1..).zip(BAD) {
        let iface =
            format!("\"iface\":\"v{number}\",\"verdict\":\"reject\",\"reason\":\"invalid-rules\"");
        assert!(lines.contains(&iface), "{rule:?}");
        let note = format!("note: rules of 10.137.1.{number}: everything refused: rule 0000: ");
        assert!(errors.contains(&note), "{rule:?}: {errors}");
    }
    assert!(lines.contains("\"iface\":\"c1\",\"verdict\":\"accept\""));
}

/// `qubes-policy.md` 2.2 and 2.5, the lenient rows: rule, then destinations with the rule that must decide.
#[test]
fn rules_match_what_they_say_and_nothing_else() {
    const POLICY: &str = "reject policy policy";
    type Probe = ([u8; 4], u16, &'static str);
    let cases: &[(&[&str], &[Probe])] = &[
        (
            &["action=drop dst4=10.0.0.5/8", "action=accept"],
            &[
                ([10, 9, 9, 9], 1, "reject rule 0"),
                ([11, 0, 0, 1], 1, "accept 1 uplink"),
            ],
        ),
        (
            &["action=accept dst4=203.0.113.0/024"],
            &[
                ([203, 0, 113, 255], 1, "accept 0 uplink"),
                ([203, 0, 114, 0], 1, POLICY),
            ],
        ),
        (
            &["action=accept dst4=0.0.0.0/0"],
            &[([203, 0, 113, 9], 1, "accept 0 uplink")],
        ),
        (
            &["dstports=100-200 action=accept"],
            &[
                (WEB, 99, POLICY),
                (WEB, 100, "accept 0 uplink"),
                (WEB, 200, "accept 0 uplink"),
                (WEB, 201, POLICY),
            ],
        ),
        (
            &[
                "action=accept proto=udp dstports=65535",
                "action=accept proto=tcp",
            ],
            &[(WEB, 65_535, "accept 0 uplink"), (WEB, 65_534, POLICY)],
        ),
        (
            &["action=accept proto=udp specialtarget=dns"],
            &[
                ([10, 139, 1, 1], 53, "accept 0 uplink"),
                ([10, 139, 1, 1], 54, POLICY),
                ([9, 9, 9, 9], 53, POLICY),
            ],
        ),
        (
            &["action=accept specialtarget=dns dstports=50-60"],
            &[([10, 139, 1, 1], 53, POLICY)],
        ),
        (
            &["action=drop proto=icmp specialtarget=dns", "action=accept"],
            &[([10, 139, 1, 1], 53, "accept 1 uplink")],
        ),
        (&["action=accept icmptype=8"], &[(WEB, 8, POLICY)]),
        (
            &[
                "action=drop dsthost=slow.example proto=udp dstports=7",
                "action=accept",
            ],
            &[(WEB, 7, "reject rule 0"), (WEB, 8, "accept 1 uplink")],
        ),
        (
            &["action=accept dsthost=127.1", "action=accept dstports=9"],
            &[(WEB, 8, POLICY), (WEB, 9, "accept 1 uplink")],
        ),
    ];
    for (rules, probes) in cases {
        let mut world = World::new();
        world.rules("config", "10.137.0.10", rules);
        for (number, (to, port, _)) in (0..).zip(*probes) {
            world.frame(0, u32::from(number), "c1", datagram(number, (*to, *port)));
        }
        let run = world.run();
        for (number, (to, port, expected)) in (1..).zip(*probes) {
            assert_eq!(run.verdict(number), *expected, "{rules:?} {to:?} {port}");
        }
    }
}

/// `qubes-policy.md` 1.4 and 2.1: gaps, order, odd keys, and what there must be.
#[test]
fn keys_of_a_tree_are_read_as_the_table_says() {
    let cases: [(&[(&str, &str)], &str); 8] = [
        (&[], "drop no-rules"),
        (&[("policy", "drop")], "reject policy policy"),
        (&[("policy", "accept")], "accept policy uplink"),
        (&[("0000", "action=accept")], "reject invalid-rules"),
        (
            &[("policy", "maybe"), ("0000", "action=accept")],
            "reject invalid-rules",
        ),
        (
            &[
                ("policy", "drop"),
                ("9999", "action=accept"),
                ("0003", "action=drop proto=tcp"),
            ],
            "accept 9999 uplink",
        ),
        (
            &[("policy", "drop"), ("00000", "action=accept")],
            "reject invalid-rules",
        ),
        (
            &[("policy", "drop"), ("0000/x", "action=accept")],
            "reject invalid-rules",
        ),
    ];
    for (keys, expected) in cases {
        let mut world = World::new();
        for (key, value) in keys {
            let path = format!("config/qubesdb/qubes-firewall/10.137.0.10/{key}");
            world.file(&path, value);
        }
        world.frame(0, 0, "c1", datagram(0, (WEB, 7)));
        assert_eq!(world.run().verdict(1), expected, "{keys:?}");
    }
}

/// `qubes-policy.md` 4.1: n real resolvers, also when that changes while it runs, given in any order.
#[test]
fn resolvers_that_change_are_followed_by_new_queries() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=accept specialtarget=dns"],
    );
    for (config, first, second) in [
        ("two", "192.168.1.1", "192.168.1.2"),
        ("none", "", "2001:db8::53"),
        ("one", "", "192.168.1.3"),
        ("loopback", "127.0.0.1", ""),
    ] {
        world.file(&format!("{config}/qubesdb/qubes-primary-dns"), first);
        world.file(&format!("{config}/qubesdb/qubes-secondary-dns"), second);
    }
    for (seconds, config) in [
        ("5.5", "loopback"),
        ("1", "two"),
        ("3", "one"),
        ("2", "none"),
    ] {
        let path = world.folder.join(config).display().to_string();
        world
            .arguments
            .extend(["--at".into(), seconds.into(), path]);
    }
    for (second, port) in [(0_u32, 0), (1, 2), (2, 4), (3, 6), (6, 8)] {
        for (micros, host) in [(0, 1), (1, 2)] {
            let to = ([10, 139, 1, host], 53);
            let port = port + u16::from(host);
            world.frame(second, micros, "c1", datagram(port, to));
        }
    }
    let run = world.run();
    let went: Vec<_> = (1..=10)
        .map(|number| match &run.frame(number)["nat"]["dst"]["to"] {
            serde_json::Value::String(to) => to.clone(),
            _ => run.verdict(number),
        })
        .collect();
    let expected = [
        "192.168.1.1",
        "192.168.1.1",
        "192.168.1.1",
        "192.168.1.2",
        "drop no-resolver",
        "drop no-resolver",
        "192.168.1.3",
        "192.168.1.3",
        "drop martian-destination",
        "drop martian-destination",
    ];
    assert_eq!(went, expected);
}

/// Deviation D5 and `qubes-policy.md` 3.3: flows of every protocol, from the side of the server first.
#[test]
fn new_rules_cut_flows_of_every_protocol_and_keep_what_they_allow() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    world.rules(
        "after",
        "10.137.0.10",
        &["action=drop proto=icmp", "action=accept dstports=80-443"],
    );
    let echo = |kind: u8| icmp([kind, 0], [0, 7, 0, 1], b"ping");
    let from_client = |protocol: u8, content: &[u8]| {
        framed(
            (C1, FIREWALL),
            0x0800,
            &ipv4(C1_IP, WEB, protocol, 0, content),
        )
    };
    let from_server = |protocol: u8, content: &[u8]| {
        framed(
            (FIREWALL, UPLINK),
            0x0800,
            &ipv4(WEB, OWN, protocol, 0, content),
        )
    };
    let requests = [
        from_client(1, &echo(8)),
        from_client(47, &[0; 8]),
        datagram(1, (WEB, 100)),
    ];
    let answers = [
        from_server(1, &echo(0)),
        from_server(47, &[0; 8]),
        udp((FIREWALL, UPLINK), (WEB, 100), (OWN, 20_001), b"data"),
    ];
    for (micros, (request, answer)) in (0..).zip(requests.iter().zip(&answers)) {
        world.frame(0, micros, "c1", request.clone());
        world.frame(1, micros, "uplink", answer.clone());
        world.frame(3, micros, "uplink", answer.clone());
        world.frame(4, micros, "c1", request.clone());
    }
    let after = world.folder.join("after").display().to_string();
    world.arguments = vec!["--at".into(), "2".into(), after];
    let run = world.run();
    let verdicts: Vec<_> = (7..=12).map(|number| run.verdict(number)).collect();
    let expected = [
        "drop unsolicited",
        "drop unsolicited",
        "accept 1 c1",
        "reject rule 0",
        "reject policy policy",
        "accept 1 uplink",
    ];
    assert_eq!(verdicts, expected);
}

/// Row A23 and 3.5: our own questions do not go to addresses of clients, nor to those of A12 or to ourselves.
#[test]
fn resolver_asks_no_address_that_must_not_leave() {
    for (server, asks) in [
        ("192.168.1.1", true),
        ("10.137.0.10", false),
        ("10.137.0.20", false),
        ("127.0.0.1", false),
        ("224.0.0.1", false),
        ("10.137.0.5", false),
    ] {
        let mut world = World::new();
        world.file("config/qubesdb/qubes-primary-dns", server);
        world.file("config/qubesdb/connected-ips", "10.137.0.10 10.137.0.20");
        world.rules(
            "config",
            "10.137.0.10",
            &["action=accept dsthost=a.example"],
        );
        world.frame(0, 0, "c1", datagram(0, (WEB, 7)));
        world.frame(3, 0, "c1", datagram(0, (WEB, 7)));
        let run = world.run();
        assert_eq!(!run.sent("uplink").is_empty(), asks, "{server}");
        assert_eq!(run.verdict(2), "reject policy policy");
    }
}
