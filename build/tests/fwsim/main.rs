//! `cargo xtask fwsim` from outside: small captures in, lines and captures out.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests: what goes wrong here must stop the test"
)]

mod packets;
mod policy;
mod tracking;
mod world;

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use etherparse::{SlicedPacket, TransportSlice};
use serde_json::Value;

use world::*;

#[test]
fn tcp_connection_goes_through_the_translation_and_back() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=drop dst4=203.0.113.0/24", "action=accept"],
    );
    world.frame(0, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    let reply = tcp((FIREWALL, UPLINK), (WEB, 80), (OWN, 40000), SYN_ACK, 101);
    world.frame(0, 1000, "uplink", reply);
    world.frame(0, 2000, "c1", up(40000, (WEB, 80), ACK, 501));
    let run = world.run();
    assert_eq!(run.lines.len(), 3);
    assert_eq!(run.verdict(1), "accept 1 uplink");
    assert_eq!(run.verdict(2), "accept 1 c1");
    assert_eq!(run.verdict(3), "accept 1 uplink");
    let turned = serde_json::json!({"src": {"from": "10.137.0.10", "to": "10.137.0.5"}});
    assert_eq!(run.frame(1)["nat"], turned);
    let turned = serde_json::json!({"dst": {"from": "10.137.0.5", "to": "10.137.0.10"}});
    assert_eq!(run.frame(2)["nat"], turned);
    assert_eq!(run.frame(2)["time"], 1000.001);
    assert_eq!(run.frame(2)["iface"], "uplink");
    let (up, down) = (run.sent("uplink"), run.sent("c1"));
    assert_eq!((up.len(), down.len()), (2, 1));
    assert!(run.sent("c2").is_empty());
    for frame in up.iter().chain(&down) {
        checksums_are_right(frame);
    }
    assert_eq!(up[0][..12], [FIREWALL, UPLINK].concat());
    assert_eq!(up[0][26..34], [OWN, WEB].concat());
    assert_eq!(down[0][..12], [C1, FIREWALL].concat());
    assert_eq!(down[0][26..34], [WEB, C1_IP].concat());
}

#[test]
fn refusals_name_rule_or_policy_and_come_with_their_icmp() {
    let mut world = World::new();
    let rules = [
        "action=accept proto=tcp dstports=80-80",
        "action=drop dst4=203.0.113.0/24",
    ];
    world.rules("config", "10.137.0.10", &rules);
    world.frame(0, 0, "c1", up(40000, ([203, 0, 113, 9], 443), SYN, 0));
    world.frame(0, 1, "c1", up(40000, (WEB, 443), SYN, 0));
    let forged = udp((C1, FIREWALL), ([192, 0, 2, 7], 1), (WEB, 2), b"x");
    world.frame(0, 2, "c1", forged);
    world.frame(
        0,
        3,
        "uplink",
        udp((FIREWALL, UPLINK), (WEB, 1), (OWN, 2), b"x"),
    );
    world.frame(0, 4, "c2", up(40000, (WEB, 80), SYN, 0));
    // To another station, and to nobody's client.
    world.frame(0, 5, "c1", udp((C1, C1), (C1_IP, 1), (WEB, 2), b"x"));
    world.frame(0, 6, "c1", up(40001, ([10, 137, 0, 11], 80), SYN, 0));
    let run = world.run();
    assert_eq!(run.verdict(1), "reject rule 1");
    assert_eq!(run.verdict(2), "reject policy policy");
    assert_eq!(run.verdict(3), "drop spoofed-source");
    assert_eq!(run.verdict(4), "drop unsolicited");
    assert_eq!(run.verdict(5), "drop spoofed-source");
    assert_eq!(run.verdict(6), "drop foreign-mac");
    assert_eq!(run.verdict(7), "drop to-client");
    for number in [1, 2] {
        assert_eq!(run.made(number), [("icmp-error", "c1")]);
    }
    let errors: Vec<_> = run
        .lines
        .iter()
        .filter(|line| line["generated"] == "icmp-error")
        .collect();
    assert_eq!(errors[0]["icmp"], serde_json::json!([3, 13]));
    assert_eq!(errors[0]["src"], "10.137.0.5");
    assert_eq!(run.sent("c1").len(), 2);
    assert!(run.sent("uplink").is_empty());
}

#[test]
fn dns_is_translated_both_ways() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=accept specialtarget=dns"],
    );
    world.frame(
        0,
        0,
        "c1",
        udp(
            (C1, FIREWALL),
            (C1_IP, 5000),
            ([10, 139, 1, 2], 53),
            b"query",
        ),
    );
    let answer = udp(
        (FIREWALL, UPLINK),
        ([192, 168, 1, 1], 53),
        (OWN, 5000),
        b"answer",
    );
    world.frame(0, 9, "uplink", answer);
    let run = world.run();
    assert_eq!(run.verdict(1), "accept 0 uplink");
    assert_eq!(run.verdict(2), "accept 0 c1");
    let turned = serde_json::json!({
        "src": {"from": "10.137.0.10", "to": "10.137.0.5"},
        "dst": {"from": "10.139.1.2", "to": "192.168.1.1"},
    });
    assert_eq!(run.frame(1)["nat"], turned);
    assert_eq!(run.sent("c1")[0][26..34], [[10, 139, 1, 2], C1_IP].concat());
    checksums_are_right(&run.sent("c1")[0]);
}

#[test]
fn change_of_rules_cuts_what_they_forbid_and_nothing_else() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    // The other keys are the same; the tree is new and shorter.
    copy(
        &world.folder.join("config/qubesdb"),
        &world.folder.join("later/qubesdb"),
    );
    let tree = world
        .folder
        .join("later/qubesdb/qubes-firewall/10.137.0.10");
    fs::remove_dir_all(tree).unwrap();
    world.rules(
        "later",
        "10.137.0.10",
        &["action=accept dst4=198.51.100.1/32"],
    );
    let other = [198, 51, 100, 2];
    for (port, to) in [(40000, WEB), (40001, other)] {
        world.frame(0, 0, "c1", up(port, (to, 80), SYN, 0));
        let reply = tcp((FIREWALL, UPLINK), (to, 80), (OWN, port), SYN_ACK, 101);
        world.frame(0, 10, "uplink", reply);
        world.frame(1, 0, "c1", up(port, (to, 80), ACK, 501));
        world.frame(2, 500_000, "c1", up(port, (to, 80), ACK, 501));
    }
    let later = world.folder.join("later").display().to_string();
    world.arguments = vec!["--at".into(), "2.5".into(), later];
    let run = world.run();
    let verdicts: Vec<_> = (1..=8).map(|number| run.verdict(number)).collect();
    let accepted = [
        "accept 0 uplink",
        "accept 0 uplink",
        "accept 0 c1",
        "accept 0 c1",
    ];
    assert_eq!(verdicts[..4], accepted);
    assert_eq!(verdicts[4..6], ["accept 0 uplink", "accept 0 uplink"]);
    assert_eq!(verdicts[6], "accept 0 uplink");
    assert_eq!(verdicts[7], "reject policy policy");
}

#[test]
fn ipv6_has_rules_and_translation_of_its_own() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &[]);
    world.rules(
        "config",
        "fd09:24ef:4179::a89:a",
        &["action=accept proto=tcp"],
    );
    let v6 = |text: &str| match text.parse().unwrap() {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(_) => unreachable!(),
    };
    let (client, own, far) = (
        v6("fd09:24ef:4179::a89:a"),
        v6("fd09:24ef:4179::a89:5"),
        v6("2001:db8::1"),
    );
    let mut syn = Vec::new();
    ethernet(C1, FIREWALL)
        .ipv6(client, far, 64)
        .tcp(40000, 80, 1, 1000)
        .syn()
        .write(&mut syn, &[])
        .unwrap();
    world.frame(0, 0, "c1", syn);
    let mut other = Vec::new();
    ethernet(C1, FIREWALL)
        .ipv6(client, far, 64)
        .udp(40000, 80)
        .write(&mut other, &[1])
        .unwrap();
    world.frame(0, 1, "c1", other);
    let run = world.run();
    assert_eq!(run.verdict(1), "accept 0 uplink");
    assert_eq!(run.verdict(2), "reject policy policy");
    let sent = run.sent("uplink");
    assert_eq!(sent[0][22..54], [own, far].concat());
    checksums_are_right(&sent[0]);
    assert_eq!(run.made(2), [("icmp-error", "c1")]);
    assert_eq!(run.lines.last().unwrap()["icmp"], serde_json::json!([1, 1]));
}

#[test]
fn fragments_have_the_fate_of_their_datagram() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=accept dst4=198.51.100.1/32"],
    );
    let fragments = |to: [u8; 4], id: u8| {
        let whole = udp((C1, FIREWALL), (C1_IP, 5000), (to, 7), &[7; 64]);
        [(0, 40), (40, 72)].map(|(from, end)| {
            let mut frame = whole[..34].to_vec();
            frame.extend(&whole[34 + from..34 + end]);
            let len = u16::try_from(20 + end - from).unwrap().to_be_bytes();
            frame[16..18].copy_from_slice(&len);
            frame[19] = id;
            let offset = u16::try_from(from / 8).unwrap() | if end < 72 { 0x2000 } else { 0 };
            frame[20..22].copy_from_slice(&offset.to_be_bytes());
            frame[24..26].fill(0);
            let sum: u32 = frame[14..34]
                .chunks(2)
                .map(|p| u32::from(u16::from_be_bytes([p[0], p[1]])))
                .sum();
            let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
            frame
        })
    };
    let [first, last] = fragments(WEB, 1);
    let [bad, worse] = fragments([192, 0, 2, 1], 2);
    let [alone, _] = fragments(WEB, 3);
    world.frame(0, 0, "c1", first);
    world.frame(0, 1, "c1", bad);
    world.frame(0, 2, "c1", alone);
    world.frame(0, 3, "c1", worse);
    world.frame(0, 4, "c1", last);
    world.frame(31, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    let run = world.run();
    assert_eq!(run.verdict(1), "accept 0 uplink");
    assert_eq!(run.frame(1)["completed_by"], 5);
    assert_eq!(run.verdict(2), "reject policy policy");
    assert_eq!(run.verdict(3), "drop fragment-timeout");
    assert_eq!(run.verdict(4), "reject policy policy");
    assert_eq!(run.verdict(5), "accept 0 uplink");
    assert_eq!(run.frame(5)["nat"]["src"]["to"], "10.137.0.5");
    // It leaves in fragments that are no larger than those that came.
    assert_eq!(run.made(5), [("forwarded", "uplink"); 2]);
    let sent = run.sent("uplink");
    assert_eq!(sent.len(), 3);
    assert_eq!((sent[0].len(), sent[1].len()), (34 + 40, 34 + 32));
    assert_eq!(run.made(4), [("icmp-error", "c1")]);
    // Lines come in the order of the frames.
    let numbers: Vec<_> = run
        .lines
        .iter()
        .filter_map(|line| line["n"].as_u64())
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn neighbours_and_pings_are_answered() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &[]);
    let mut arp = [[0xff; 6], C1].concat();
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(C1);
    arp.extend(C1_IP);
    arp.extend([0; 6]);
    arp.extend([10, 137, 0, 5]);
    world.frame(0, 0, "c1", arp);
    let mut ping = Vec::new();
    ethernet(C1, FIREWALL)
        .ipv4(C1_IP, OWN, 64)
        .icmpv4_echo_request(1, 2)
        .write(&mut ping, b"hi")
        .unwrap();
    world.frame(0, 1, "c1", ping);
    let run = world.run();
    assert_eq!(run.verdict(1), "local arp");
    assert_eq!(run.verdict(2), "local ping");
    assert_eq!(run.made(1), [("arp-reply", "c1")]);
    assert_eq!(run.made(2), [("echo-reply", "c1")]);
    let sent = run.sent("c1");
    assert_eq!(sent[0][22..28], FIREWALL);
    assert_eq!(sent[1][34], 0);
}

#[test]
fn offloaded_frames_are_completed() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    let mut frame = udp((C1, FIREWALL), (C1_IP, 5000), (WEB, 7), b"data");
    let mut sum: u32 = 17 + 12;
    for pair in frame[26..34].chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    frame[40..42].copy_from_slice(&sum.to_be_bytes());
    world.frame(0, 0, "c1", frame.clone());
    frame[40] ^= 0x55;
    frame[35] ^= 1;
    world.frame(0, 1, "c1", frame);
    let run = world.run();
    assert_eq!(run.verdict(1), "accept 0 uplink");
    checksums_are_right(&run.sent("uplink")[0]);
    assert_eq!(run.verdict(2), "drop bad-checksum");
}

#[test]
fn packet_that_ends_its_flow_names_the_rule_that_let_it_start() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=drop proto=udp", "action=accept"],
    );
    world.frame(0, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    // The client gives up before anybody answers.
    world.frame(0, 1, "c1", up(40000, (WEB, 80), RST, 0));
    let late = tcp((FIREWALL, UPLINK), (WEB, 80), (OWN, 40000), SYN_ACK, 101);
    world.frame(0, 2, "uplink", late);
    let run = world.run();
    assert_eq!(run.verdict(2), "accept 1 uplink");
    assert_eq!(run.frame(2)["nat"]["src"]["to"], "10.137.0.5");
    assert_eq!(run.verdict(3), "drop unsolicited");
}

#[test]
fn own_mac_on_the_uplink_is_found_in_this_order() {
    let other = [2, 0, 0, 0, 0, 9];
    let sent_with = |world: &World| world.run().sent("uplink")[0][6..12].to_vec();
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    world.frame(
        0,
        0,
        "uplink",
        udp((UPLINK, FIREWALL), (OWN, 1), (WEB, 1), b"ours"),
    );
    world.frame(
        0,
        1,
        "uplink",
        udp((FIREWALL, other), (WEB, 1), (OWN, 1), b"theirs"),
    );
    world.frame(1, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    assert_eq!(sent_with(&world), UPLINK);
    fs::remove_file(world.folder.join("config/qubesdb/qubes-mac")).unwrap();
    assert_eq!(sent_with(&world), other);
    world.arguments = vec!["--uplink-mac".into(), "02:00:00:00:00:07".into()];
    assert_eq!(sent_with(&world), [2, 0, 0, 0, 0, 7]);
    world.arguments.clear();
    world.frames.remove(1);
    assert_eq!(sent_with(&world), FIREWALL);
    world.frames.remove(0);
    assert_eq!(sent_with(&world), [0, 0x16, 0x3e, 0x5e, 0x6c, 0]);
}

#[test]
fn names_are_learned_from_answers_and_the_resolver_can_be_answered() {
    let mut world = World::new();
    let rules = [
        "action=accept dsthost=www.example.org",
        "action=accept specialtarget=dns",
    ];
    world.rules("config", "10.137.0.10", &rules);
    let (one, two, three) = ([198, 51, 100, 1], [198, 51, 100, 2], [198, 51, 100, 3]);
    let virtual_dns = ([10, 139, 1, 1], 53);
    world.frame(
        1,
        0,
        "c1",
        udp((C1, FIREWALL), (C1_IP, 5000), virtual_dns, &dns(7, None)),
    );
    let answer = dns(7, Some(two));
    let answer = udp(
        (FIREWALL, UPLINK),
        ([192, 168, 1, 1], 53),
        (OWN, 5000),
        &answer,
    );
    world.frame(1, 1, "uplink", answer);
    for (port, to) in [(1, one), (2, two), (3, three)] {
        world.frame(1, 2, "c1", up(port, (to, 80), SYN, 0));
    }
    let run = world.run();
    assert_eq!(run.verdict(3), "reject policy policy");
    assert_eq!(run.verdict(4), "accept 0 uplink");
    assert_eq!(run.verdict(5), "reject policy policy");

    // The resolver's question is the same in every run, so a capture can hold the answer.
    let question = run.sent("uplink").into_iter().next().unwrap();
    let sliced = SlicedPacket::from_ethernet(&question).unwrap();
    let Some(TransportSlice::Udp(sent)) = sliced.transport else {
        panic!("no UDP");
    };
    let id = u16::from_be_bytes(*sent.payload().first_chunk().unwrap());
    let answer = dns(id, Some(one));
    let to = (OWN, sent.source_port());
    let answer = udp((FIREWALL, UPLINK), ([192, 168, 1, 1], 53), to, &answer);
    world.frames.insert(0, (1001, 0, "uplink", answer));
    let run = world.run();
    assert_eq!(run.lines[0]["generated"], "dns-query");
    let local = run
        .lines
        .iter()
        .find(|line| line["verdict"] == "local")
        .unwrap();
    assert_eq!(local["reason"], "answer-to-us");
    assert_eq!(run.verdict(4), "accept 0 uplink");
    assert_eq!(run.verdict(5), "accept 0 uplink");
    assert_eq!(run.verdict(6), "reject policy policy");
}

#[test]
fn client_that_believes_in_another_address_is_translated_twice() {
    let mut world = World::new();
    world.rules("config", "10.137.0.10", &["action=accept"]);
    for (name, value) in [
        ("visible-ip", "192.168.1.128"),
        ("visible-gateway", "192.168.1.1"),
    ] {
        world.file(
            &format!("config/qubesdb/mapped-ip/10.137.0.10/{name}"),
            value,
        );
    }
    let visible = ([192, 168, 1, 128], 5000);
    world.frame(0, 0, "c1", udp((C1, FIREWALL), visible, (WEB, 7), b"x"));
    world.frame(
        0,
        1,
        "uplink",
        udp((FIREWALL, UPLINK), (WEB, 7), (OWN, 5000), b"y"),
    );
    world.frame(
        0,
        2,
        "c1",
        udp((C1, FIREWALL), (C1_IP, 5000), (WEB, 7), b"x"),
    );
    let run = world.run();
    let turned = serde_json::json!({"src": {"from": "192.168.1.128", "to": "10.137.0.5"}});
    assert_eq!(run.frame(1)["nat"], turned);
    let turned = serde_json::json!({"dst": {"from": "10.137.0.5", "to": "192.168.1.128"}});
    assert_eq!(run.frame(2)["nat"], turned);
    assert_eq!(run.verdict(3), "drop spoofed-source");
}

#[test]
fn same_input_gives_the_same_output() {
    let mut world = World::new();
    world.rules(
        "config",
        "10.137.0.10",
        &["action=accept dsthost=www.example.org"],
    );
    world.frame(0, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    let (first, second) = (world.run(), world.run());
    assert_eq!(first.lines, second.lines);
    let queries = |run: &Run| -> Vec<Vec<u8>> { run.sent("uplink") };
    // The name is asked for before the first frame, with ids and ports from the seed.
    assert_eq!(first.lines[0]["generated"], "dns-query");
    assert_eq!(first.lines[0]["cause"], Value::Null);
    let before = queries(&second);
    world.arguments = vec!["--seed".into(), "1".into()];
    let third = world.run();
    assert_eq!(third.lines, first.lines);
    assert_ne!(queries(&third), before);
}

#[test]
fn whatever_is_wrong_is_said_in_one_line_with_status_2() {
    let mut world = World::new();
    world.frame(0, 0, "c1", up(40000, (WEB, 80), SYN, 0));
    world.arguments = vec!["--in".into(), "c9=/nowhere".into()];
    let error =
        "error: --in c9=/nowhere: there is no interface \"c9\" (there are c1, c2, uplink)\n";
    assert_eq!(world.error(), error);
    world.arguments = vec!["--in".into(), "c1=/nowhere".into()];
    assert_eq!(
        world.error(),
        "error: /nowhere: No such file or directory (os error 2)\n"
    );
    world.arguments = vec!["--at".into(), "soon".into(), "/".into()];
    assert_eq!(world.error(), "error: --at soon: not a number of seconds\n");
    world.arguments = vec!["--at".into(), "1".into(), "/nowhere".into()];
    assert_eq!(world.error(), "error: /nowhere: not a folder\n");
    let config = world.folder.join("config").display().to_string();
    world.arguments = vec!["--at".into(), "4294967295.5".into(), config];
    let error = "error: --at 4294967295: beyond the times that captures can hold\n";
    assert_eq!(world.error(), error);
    world.arguments = vec!["--uplink-mac".into(), "x".into()];
    assert_eq!(world.error(), "error: --uplink-mac x: not a MAC address\n");
    world.arguments = Vec::new();
    world.file("config/qubesdb/what?", "");
    assert_eq!(
        world.error(),
        "error: ~/config/qubesdb/what?: not a key of QubesDB: a character that keys do not have\n"
    );
    fs::remove_file(world.folder.join("config/qubesdb/what?")).unwrap();
    world.file(
        "config/vifs",
        "c1 7 00:16:3e:5e:6c:0a\nc1 8 00:16:3e:5e:6c:0b\n",
    );
    assert_eq!(
        world.error(),
        "error: ~/config/vifs: line 2: there is a vif c1 already\n"
    );
    fs::remove_file(world.folder.join("config/vifs")).unwrap();
    assert_eq!(
        world.error(),
        "error: ~/config/vifs: No such file or directory (os error 2)\n"
    );
    let program = env!("CARGO_BIN_EXE_xtask");
    let output = Command::new(program).arg("fwsim").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
