//! The product's protocols against the double, over pipes.

use std::time::Duration;

use crate::world::{Machine, VM, World};
use dom0_double::caller::{Input, Outcome, Spec};
use dom0_double::qrexec::Greeting;
use dom0_double::service::{Response, Served};
use qubes::qubesdb::OVERSIZE_VALUE;
use qubes::vchan::pipes::{Net, PipeChannel, PipeChannels};
use xen::{DomId, Time};

struct Pipes {
    net: Net,
    vm: PipeChannels,
    dom0: PipeChannels,
}

impl Machine for Pipes {
    type Channels = PipeChannels;
    fn vm(&mut self) -> &mut PipeChannels {
        &mut self.vm
    }
    fn dom0(&mut self) -> &mut PipeChannels {
        &mut self.dom0
    }
    fn pass(&mut self, duration: Duration) {
        self.net.pass(duration);
    }
    fn wakes<'a>(&mut self, _: impl Iterator<Item = &'a PipeChannel>, _: Option<Time>) -> bool {
        true
    }
    fn wakes_dom0<'a>(&mut self, _: impl Iterator<Item = &'a PipeChannel>) -> bool {
        true
    }
}

fn world_with(greeting: Greeting) -> World<Pipes> {
    let net = Net::default();
    let (vm, dom0) = (net.domain(VM), net.domain(DomId::DOM0));
    World::new(Pipes { net, vm, dom0 }, greeting)
}

fn world() -> World<Pipes> {
    world_with(Greeting::Echo)
}

const NETWORK: &str =
    "network fw 10.137.0.5 10.137.0.4 00:16:3e:5e:6c:00\nwait synced\nwait qrexec\n";

fn enforced(world: &mut World<Pipes>, address: &str) -> Option<Option<usize>> {
    let address = address.parse().ok()?;
    world.vm().enforced.get(&address).copied()
}

#[test]
fn life_of_a_firewall() {
    for greeting in [Greeting::Echo, Greeting::Version(3), Greeting::Version(4)] {
        let mut world = world_with(greeting);
        world.run(include_str!("../../scenarios/life.txt"));
        assert_eq!(enforced(&mut world, "10.137.0.10"), Some(Some(1)));
        assert_eq!(enforced(&mut world, "10.137.0.12"), Some(Some(1)));
        assert_eq!(
            enforced(&mut world, "10.137.0.9"),
            Some(None),
            "refused as a whole"
        );
    }
}

#[test]
fn s9_step_4_the_first_dump_takes_effect_as_a_whole() {
    let mut world = world();
    world.dom0.qubesdb.set_pace(50);
    world.run(
        "network fw 10.137.0.5 10.137.0.4 00:16:3e:5e:6c:00\nrules 10.137.0.9\n0000 action=accept",
    );
    while !world.dom0.qubesdb.is_synced() {
        assert!(
            world.vm().store.get("/qubes-ip").is_none(),
            "not before the end of the dump"
        );
        assert_eq!(enforced(&mut world, "10.137.0.9"), None);
        world.step();
    }
    world.steps(2);
    assert_eq!(world.vm().store.get("/qubes-ip"), Some(&b"10.137.0.5"[..]));
    assert_eq!(
        enforced(&mut world, "10.137.0.9"),
        Some(Some(1)),
        "a dump commits what is in it"
    );
}

#[test]
fn s9_step_6_qrexec_greets_without_waiting_for_anything_else() {
    let mut world = world();
    // QubesDB never comes: its daemon is not polled.
    for _ in 0..5 {
        world.step_vm();
        world.dom0.qrexec.poll(&mut world.machine.dom0).unwrap();
        world.machine.net.pass(Duration::from_millis(1));
    }
    assert!(world.dom0.qrexec.is_connected());
    assert!(!world.vm().link.is_ready());
}

#[test]
fn calls_of_every_kind() {
    for greeting in [Greeting::Echo, Greeting::Version(3), Greeting::Version(2)] {
        let mut world = world_with(greeting);
        world.run(include_str!("../../scenarios/calls.txt"));
        assert_eq!(
            world.machine.net.open_ends(),
            4,
            "both ends of QubesDB and of the control channel"
        );
    }
}

#[test]
fn r1_three_hundred_calls_in_sequence_and_twenty_at_once() {
    let mut world = world();
    world.run(include_str!("../../scenarios/load.txt"));
    assert_eq!(world.machine.net.open_ends(), 4);
    let counters = world.vm().agent.counters();
    assert_eq!(
        (counters.calls, counters.done, counters.terminated),
        (380, 380, 380)
    );
}

#[test]
fn r5_q4_channels_that_are_lost_come_back() {
    let mut world = world();
    world.run(include_str!("../../scenarios/loss.txt"));
    assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(1)));
    assert_eq!(world.machine.net.open_ends(), 4);
}

#[test]
fn q4_the_rules_in_force_stay_while_qubesdb_is_away() {
    let mut world = world();
    world.run(&format!("{NETWORK}rules 10.137.0.9\n0000 action=accept\n0001 action=drop\nwait key /qubes-firewall-handled/10.137.0.9 1"));
    let Pipes { dom0, .. } = &mut world.machine;
    world.dom0.qubesdb.disconnect(dom0);
    for _ in 0..2000 {
        world.step_vm();
        world.machine.net.pass(Duration::from_millis(10));
        assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(2)));
    }
    assert!(!world.vm().link.is_ready());
    world.run("wait synced");
    assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(2)));
}

#[test]
fn q6_a_vm_that_reboots_syncs_again() {
    let mut world = world();
    world.run(&format!("{NETWORK}rules 10.137.0.9\n0000 action=accept\nwait key /qubes-firewall-handled/10.137.0.9 1"));
    for _ in 0..5 {
        let Some(mut vm) = world.vm.take() else {
            panic!("on");
        };
        vm.link.close(&mut world.machine.vm);
        vm.agent.close(&mut world.machine.vm);
        world.steps(300);
        world.boot();
        world.run("wait synced\nwait qrexec\ncall 0 user:status");
        assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(1)));
    }
    assert_eq!(world.dom0.qubesdb.seen().dumps, 6);
    assert_eq!(world.dom0.qrexec.connections(), 6);
}

#[test]
fn q9_gaps_in_rule_numbers_lose_no_rule() {
    let mut world = world();
    world.run(&format!(
        "{NETWORK}rules 10.137.0.9\n0003 action=accept dst4=192.0.2.1/32\n0017 action=accept dst4=192.0.2.2/32\n9999 action=drop\nwait key /qubes-firewall-handled/10.137.0.9 1"
    ));
    assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(3)));
}

#[test]
fn q10_the_old_rules_stay_until_the_commit() {
    let mut world = world();
    world.run(&format!("{NETWORK}rules 10.137.0.9\n0000 action=accept\n0001 action=drop\nwait key /qubes-firewall-handled/10.137.0.9 1"));
    for text in [
        "remove /qubes-firewall/10.137.0.9/\nwait acknowledged",
        "key /qubes-firewall/10.137.0.9/policy drop\nkey /qubes-firewall/10.137.0.9/0000 action=drop\nwait acknowledged",
    ] {
        world.run(text);
        world.steps(50);
        assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(2)));
    }
    world.run("key /qubes-firewall/10.137.0.9\nwait key /qubes-firewall-handled/10.137.0.9 2");
    assert_eq!(enforced(&mut world, "10.137.0.9"), Some(Some(1)));
}

#[test]
fn q11_rewriting_identical_values_changes_nothing_that_is_enforced() {
    let mut world = world();
    world.run(include_str!("../../scenarios/life.txt"));
    let before = world.vm().enforced.clone();
    for _ in 0..5 {
        world.run("rewrite\nwait acknowledged");
        assert_eq!(world.vm().enforced, before);
    }
    assert_eq!(world.vm().store.refused(), 0);
}

#[test]
fn q12_without_a_netvm_everything_else_works() {
    let mut world = world();
    world.run(
        "key /name fw\nkey /qubes-vm-type NetVM\nwait synced\nwait qrexec\ncall 0 user:status",
    );
    world.run("network fw 10.137.0.5 10.137.0.4 00:16:3e:5e:6c:00\nwait acknowledged");
    assert_eq!(world.vm().store.get("/qubes-ip"), Some(&b"10.137.0.5"[..]));
}

#[test]
fn q5_qubesdb_is_served_while_calls_are_stuck() {
    let mut world = world();
    world.run(NETWORK);
    for _ in 0..8 {
        let spec = Spec {
            never_reads: true,
            ..Spec::new("user:table")
        };
        assert!(world.dom0.qrexec.call(&mut world.machine.dom0, spec));
    }
    world.steps(20);
    assert_eq!(
        world.vm().agent.load(),
        (8, 0),
        "every place is taken by a reader that does not read"
    );
    world.run("limit 100\nrules 10.137.0.9\n0000 action=accept\nwait key /qubes-firewall-handled/10.137.0.9 1");
    // Their calls are given up, and then there is room again.
    world.run("limit 30000\nsleep 12000");
    assert_eq!(world.dom0.qrexec.take_reports().len(), 8);
    world.run("call 0 user:status");
    assert_eq!(world.vm().agent.counters().stalled, 8);
}

#[test]
fn a_burst_of_two_hundred_and_fifty_keys_wraps_the_ring_many_times() {
    for pace in [usize::MAX, 100, 7] {
        let mut world = world();
        world.dom0.qubesdb.set_pace(pace);
        for number in 0..250 {
            world.dom0.key(
                &format!("/vm-config/burst-{number}"),
                &"v".repeat(number * 12),
            );
        }
        world.run("limit 100000\nwait synced");
        for number in 0..250 {
            world.dom0.key(
                &format!("/vm-config/burst-{number}"),
                &"w".repeat(number * 12),
            );
        }
        // A slow daemon reads slowly too, so not every acknowledgement finds room.
        let last = "w".repeat(249 * 12);
        while world.vm().store.get("/vm-config/burst-249") != Some(last.as_bytes()) {
            world.step();
        }
        let store = &world.vm().store;
        for number in 0..250 {
            let value = store.get(&format!("/vm-config/burst-{number}")).unwrap();
            assert!(
                value == "w".repeat(number * 12).as_bytes(),
                "{number} at {pace}"
            );
        }
    }
}

#[test]
fn the_longest_value_arrives_and_a_longer_one_is_unusable() {
    let mut world = world();
    world.run(NETWORK);
    world.dom0.key("/vm-config/longest", &"v".repeat(3071));
    world.dom0.key("/vm-config/longer", &"v".repeat(3072));
    world.run("wait acknowledged");
    let store = &world.vm().store;
    assert_eq!(store.get("/vm-config/longest").map(<[u8]>::len), Some(3071));
    assert_eq!(store.get("/vm-config/longer"), Some(OVERSIZE_VALUE));
}

#[test]
fn q8_keys_of_clients_that_went_away_do_no_harm() {
    let mut world = world();
    world.run(NETWORK);
    for client in 0..200 {
        world.run(&format!(
            "client 10.138.{}.{} 10.137.0.5\nrules 10.138.{}.{}\n0000 action=accept",
            client / 250,
            client % 250,
            client / 250,
            client % 250
        ));
    }
    world.run("limit 60000\nwait key /qubes-firewall-handled/10.138.0.199 1\nwait acknowledged\nrewrite\nwait acknowledged");
    assert_eq!(world.vm().enforced.len(), 200);
}

#[test]
fn our_own_directories_can_be_rewritten_again_and_again() {
    let mut world = world();
    world.run(NETWORK);
    for round in 0..20 {
        let client = world.vm().link.client();
        client.remove_below("/dns/10.137.0.9").unwrap();
        if round % 3 != 0 {
            for host in 0..round {
                client
                    .write(&format!("/dns/10.137.0.9/host-{host}"), b"{'192.0.2.1/32'}")
                    .unwrap();
            }
        }
        if round % 4 == 0 {
            world.steps(1);
        } else {
            world.run("sleep 100");
        }
        if round == 10 {
            world.run("drop qubesdb\nsleep 300\nwait synced");
        }
    }
    world.run("sleep 100");
    assert_eq!(
        world.dom0.qubesdb.get("/dns/10.137.0.9/host-18"),
        Some(&b"{'192.0.2.1/32'}"[..])
    );
    assert_eq!(world.vm().link.client().outbox().pending(), 0);
    assert!(world.dom0.qubesdb.seen().removed > 5);
}

#[test]
fn r8_eight_mebibytes_of_input_pass_while_the_caller_does_not_read() {
    let mut world = world();
    world.run(NETWORK);
    let spec = Spec {
        writes_first: true,
        ..Spec::new("user:table").with_input(Input::Closed(vec![b'x'; 8 << 20]))
    };
    assert!(world.dom0.qrexec.call(&mut world.machine.dom0, spec));
    let mut reports = Vec::new();
    for _ in 0..5000 {
        world.step();
        reports.extend(world.dom0.qrexec.take_reports());
    }
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].outcome, Outcome::Exit(0));
    assert!(
        reports[0].input_taken > 8 << 20,
        "all of the input was taken"
    );
    let lines = String::from_utf8(reports[0].stdout.clone()).unwrap();
    assert!(
        lines
            .lines()
            .zip(0..)
            .all(|(line, number)| line == format!("line {number:6} of the table"))
    );
    assert_eq!(lines.lines().count(), 40_400);
}

#[test]
fn a_caller_that_leaves_early_costs_its_own_call_only() {
    let mut world = world();
    world.run(NETWORK);
    for after in [0, 1, 11, 12, 20, 5000] {
        let spec = Spec {
            leaves_after: Some(after),
            ..Spec::new("user:QUBESRPC qubes.VMShell dom0")
                .with_input(Input::Open(vec![b'x'; 3000]))
        };
        assert!(world.dom0.qrexec.call(&mut world.machine.dom0, spec));
        world.steps(100);
        let reports = world.dom0.qrexec.take_reports();
        assert_eq!(reports.len(), 1, "{after}");
        assert_eq!(world.dom0.qrexec.taken_ports(), 0, "{after}");
    }
    world.run("call 0 user:status");
}

#[test]
fn callers_of_every_version_are_served() {
    for version in [2, 3, 4, 99] {
        let mut world = world();
        world.run(NETWORK);
        let spec = Spec {
            version,
            ..Spec::new("user:table")
        };
        assert!(world.dom0.qrexec.call(&mut world.machine.dom0, spec));
        world.steps(1000);
        let reports = world.dom0.qrexec.take_reports();
        assert_eq!(reports[0].outcome, Outcome::Exit(0), "{version}");
    }
    let mut world = world();
    world.run(NETWORK);
    let spec = Spec {
        version: 1,
        ..Spec::new("user:status")
    };
    assert!(world.dom0.qrexec.call(&mut world.machine.dom0, spec));
    world.steps(100);
    assert_eq!(
        world.dom0.qrexec.take_reports()[0].outcome,
        Outcome::NoExitCode
    );
}

#[test]
fn command_lines_of_4_and_60_kib_are_answered() {
    let mut world = world();
    world.run(NETWORK);
    for (len, code) in [
        (4000, 127),
        (4090, 127),
        (4200, 125),
        (61_000, 125),
        (65_000, 125),
    ] {
        let line = format!("user:{}", "x".repeat(len));
        world.run(&format!("call {code} {line}"));
    }
}

#[test]
fn unknown_messages_on_the_control_channel_are_survived() {
    let mut world = world();
    world.run(NETWORK);
    for kind in [0u32, 0x190, 0x204, 0x211, 0x300, 0x301, u32::MAX] {
        for len in [0usize, 1, 4, 100, 65_536] {
            let mut bytes = kind.to_le_bytes().to_vec();
            bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
            bytes.extend(vec![0xa5; len]);
            world.dom0.qrexec.send_raw(&bytes);
        }
    }
    world.run("call 0 user:status");
    assert_eq!(world.vm().agent.counters().unexpected, 35);
    assert_eq!(world.dom0.qrexec.connections(), 1);
}

#[test]
fn r3_our_own_calls_are_accepted_and_refused() {
    let mut world = world();
    world.run(NETWORK);
    let response = Response {
        stdout: b"2026-11-23T04:39:00+00:00".to_vec(),
        exit: 0,
    };
    world.dom0.qrexec.allow("qubes.GetDate", response);
    world.steps(2);
    for round in 0..300u32 {
        let now = qubes::vchan::Channels::now(&world.machine.vm);
        let service = if round % 2 == 0 {
            "qubes.GetDate"
        } else {
            "qubes.Filecopy"
        };
        world
            .vm()
            .agent
            .call("@default", service, b"input", now)
            .unwrap();
        world.steps(10);
        let answer = world.vm().agent.take_answer().unwrap();
        if round % 2 == 0 {
            assert_eq!(
                (answer.exit, &answer.output[..]),
                (Some(0), &b"2026-11-23T04:39:00+00:00"[..])
            );
            let served = world.dom0.qrexec.take_served();
            assert_eq!(served[0].1, Served::Answered(b"input".to_vec()));
        } else {
            assert_eq!(answer.exit, Some(126));
        }
    }
    assert_eq!(world.dom0.qrexec.taken_ports(), 0);
    assert_eq!(world.machine.net.open_ends(), 4);
}
