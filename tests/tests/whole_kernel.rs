//! The whole kernel beside the double of dom0: what a Qubes OS user would see.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::time::Duration;

use kernel::snapshot::Scope;
use tests::whole::peers::{ClientSide, NetvmSide};
use tests::whole::scenes::{NETVM, WEB, forwarded, running, shut_down};
use tests::whole::{VM, World};
use xen::DomId;
use xenstore::Shutdown;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn boots_on_qubes_os_and_takes_qubesdb_as_its_source() {
    let mut world = World::configured();
    let synced = world.until("QubesDB", SECOND, |world| world.dom0().qubesdb.is_synced());
    assert_eq!(world.snapshot(Scope::OVERVIEW).source, "qubesdb");
    let greeted = world.until("qrexec", SECOND, |world| world.dom0().qrexec.is_connected());
    println!(
        "QubesDB after {synced:?}, qrexec {greeted:?} later, {} steps",
        world.steps
    );
    assert!(synced < Duration::from_millis(100) && greeted < Duration::from_millis(100));
}

#[test]
fn frames_pass_both_ways_as_the_rules_of_qubesdb_say() {
    let mut world = running();
    assert!(forwarded(&mut world, 0, WEB));
    assert!(forwarded(&mut world, 0, ([198, 51, 100, 7], 9)));
    assert!(forwarded(&mut world, 1, WEB));
    assert!(!forwarded(&mut world, 1, ([198, 51, 100, 7], 443)));
    assert!(!forwarded(&mut world, 1, ([192, 0, 2, 80], 444)));
    assert!(!forwarded(&mut world, 2, WEB));
}

#[test]
fn on_qubes_os_the_advertisement_decides_and_vm_data_is_ignored_from_then_on() {
    let mut world = World::configured();
    assert!(
        world
            .store
            .exists("/local/domain/0/data/vchan/7/111/event-channel")
    );
    world.run("wait synced\nwait qrexec");
    world
        .store
        .write("/local/domain/7/vm-data/qubes-ip", "10.0.0.1");
    world.ticks(100);
    let snapshot = world.snapshot(Scope::OVERVIEW);
    assert_eq!(snapshot.source, "qubesdb");
    assert_eq!(snapshot.missing, [""; 0]);
    // An advertisement disappears with the first connection.
    assert!(
        !world
            .store
            .exists("/local/domain/0/data/vchan/7/111/event-channel")
    );
}

#[test]
fn on_plain_xen_vm_data_is_the_source() {
    let mut world = World::plain();
    for (key, value) in [
        ("qubes-ip", "10.137.0.5"),
        ("qubes-gateway", "10.137.0.4"),
        ("qubes-primary-dns", "10.139.1.1"),
        ("qubes-firewall/10_137_0_9/policy", "drop"),
        ("qubes-firewall/10_137_0_9/0000", "action=accept"),
        ("qubes-firewall/10_137_0_9", ""),
    ] {
        world
            .store
            .write(&format!("/local/domain/7/vm-data/{key}"), value);
    }
    world.connect_netvm(NETVM);
    world.connect_client(DomId(9), "10.137.0.9");
    assert_eq!(world.snapshot(Scope::OVERVIEW).source, "xenstore");
    assert!(forwarded(&mut world, 0, WEB));
    world.ticks(30_000);
    // Nothing of Qubes OS is left: neither an advertisement of ours nor a watch for dom0's.
    assert!(
        !world
            .store
            .all_paths()
            .iter()
            .any(|path| path.contains("vchan"))
    );
    assert_eq!(
        world.asleep().unwrap().ports.len(),
        3,
        "store, uplink, client"
    );
}

#[test]
fn plain_xen_that_gets_its_settings_later_is_still_plain_xen() {
    let mut world = World::plain();
    world.ticks(20_000);
    assert_eq!(world.snapshot(Scope::OVERVIEW).source, "nobody so far");
    world
        .store
        .write("/local/domain/7/vm-data/qubes-ip", "10.137.0.5");
    world.ticks(100);
    assert_eq!(world.snapshot(Scope::OVERVIEW).source, "xenstore");
}

#[test]
fn q10_rules_change_only_at_the_commit() {
    let mut world = running();
    let db = |world: &mut World, path: &str, value: &str| {
        world.dom0().qubesdb.write(path, value.as_bytes());
        world.ticks(50);
    };
    world.dom0().qubesdb.remove("/qubes-firewall/10.137.0.9/");
    world.ticks(50);
    assert!(
        forwarded(&mut world, 0, ([198, 51, 100, 1], 1)),
        "removed, not committed"
    );
    db(&mut world, "/qubes-firewall/10.137.0.9/policy", "drop");
    db(&mut world, "/qubes-firewall/10.137.0.9/0000", "action=drop");
    assert!(
        forwarded(&mut world, 0, ([198, 51, 100, 2], 2)),
        "written, not committed"
    );
    db(&mut world, "/qubes-firewall/10.137.0.9", "");
    assert!(
        !forwarded(&mut world, 0, ([198, 51, 100, 3], 3)),
        "committed"
    );
    world.run("wait key /qubes-firewall-handled/10.137.0.9 2");
}

#[test]
fn a_rule_set_that_makes_no_sense_drops_everything_of_its_client_alone() {
    let mut world = running();
    world.run(
        "rules 10.137.0.9\n  0000 action=allow\nwait key /qubes-firewall-handled/10.137.0.9 2",
    );
    assert!(!forwarded(&mut world, 0, WEB));
    assert!(forwarded(&mut world, 1, WEB));
    let told = |world: &mut World| {
        let value = world.dom0().qubesdb.get("/qubes-iptables-error").unwrap();
        String::from_utf8(value.to_vec()).unwrap()
    };
    let error = told(&mut world);
    println!("{error}");
    assert!(error.starts_with("rules of 10.137.0.9: "), "{error}");
    // A change of the netvm empties the key.
    world.dom0().qubesdb.write("/qubes-iptables-error", b"");
    world.run("rewrite\nwait key /qubes-firewall-handled/10.137.0.9 3\nwait acknowledged");
    assert_eq!(told(&mut world), error);
    world.run(
        "rules 10.137.0.9\n  0000 action=accept\nwait key /qubes-firewall-handled/10.137.0.9 4",
    );
    assert!(forwarded(&mut world, 0, WEB));
    assert_eq!(told(&mut world), "");
}

#[test]
fn q11_the_netvm_goes_and_another_one_comes_with_every_key_rewritten() {
    let mut world = running();
    assert!(forwarded(&mut world, 0, WEB));
    let before = world.held();
    for round in 0..5 {
        world.remove_netvm();
        world.until("end of the uplink", SECOND, |world| {
            world.snapshot(Scope::OVERVIEW).uplink.is_none()
        });
        world.run("call 0 root:QUBESRPC qubes.WaitForNetworkUplink dom0");
        world
            .run("network fw 10.137.0.5 10.137.0.20 00:16:3e:5e:6c:00\nrewrite\nwait acknowledged");
        world.connect_netvm(DomId(20 + round));
        world.run("call 0 root:QUBESRPC qubes.WaitForNetworkUplink dom0");
        assert!(forwarded(&mut world, 0, WEB));
        assert!(forwarded(&mut world, 1, WEB));
        assert!(!forwarded(&mut world, 2, WEB));
    }
    let after = world.held();
    assert_eq!(
        (before.vm, before.watches, before.owned),
        (after.vm, after.watches, after.owned)
    );
}

#[test]
fn q12_a_firewall_without_a_netvm_answers_calls_and_serves_vifs() {
    let mut world = World::qubes();
    for (path, value) in [
        ("/name", "fw"),
        ("/qubes-netvm-gateway", "10.137.0.5"),
        ("/connected-ips", "10.137.0.9"),
    ] {
        world.dom0().key(path, value);
    }
    world.run("wait synced\nwait qrexec\ncall 0 user:status");
    let took = world.connect_client(DomId(9), "10.137.0.9");
    assert_eq!(took, 0);
    assert_eq!(shut_down(&mut world), Some(Shutdown::Poweroff));
}

#[test]
fn l2_a_shutdown_at_any_point_of_boot_is_acknowledged_at_once() {
    let mut points = 0;
    for ticks in 0..120 {
        let mut world = World::configured();
        world.netvm = Some(NetvmSide::attach(&world.store, NETVM));
        world
            .clients
            .push(ClientSide::attach(&world.store, DomId(9), 0, "10.137.0.9"));
        // Half a millisecond in which nothing else happens shows nothing new.
        world.ticks(ticks);
        let steps = world.steps;
        assert_eq!(
            shut_down(&mut world),
            Some(Shutdown::Poweroff),
            "{ticks} ticks"
        );
        points = points.max(steps);
    }
    println!("asked after each of the first {points} steps of the kernel");
}

#[test]
fn l2_a_shutdown_at_any_point_without_qubesdb_or_netvm_is_acknowledged_at_once() {
    for ticks in (0..60).chain([1_000, 40_000]) {
        let mut world = World::plain();
        world.ticks(ticks);
        assert_eq!(
            shut_down(&mut world),
            Some(Shutdown::Poweroff),
            "{ticks} ticks"
        );
    }
}

#[test]
fn qrexec_answers_commands_shells_and_mistakes() {
    let mut world = running();
    world.run(
        "call 0 user:status
         expect qubesdb
         expect connected
         shell 0 status
         expect qubesdb
         call 2 user:status twice
         expect-error status
         call 2 user:rules 10.137.0.300
         expect-error address
         call 127 user:frobnicate
         expect-error help
         shell 127 frobnicate
         call 0 user:clients
         expect 10.137.0.11
         call 0 user:rules 10.137.0.10
         expect 192.0.2.0/24
         call 0 user:help
         call 0 user:QUBESRPC qubes.VMExec+status dom0
         expect qubesdb",
    );
}

#[test]
fn every_other_scenario_of_calls_holds_for_the_whole_kernel() {
    let mut world = World::qubes();
    world.run(include_str!("../dom0/scenarios/calls.txt"));
}

#[test]
fn the_life_of_a_firewall_holds_for_the_whole_kernel() {
    let mut world = World::qubes();
    world.run(include_str!("../dom0/scenarios/life.txt"));
}

#[test]
fn r1_three_hundred_calls_in_sequence_and_twenty_at_once_leave_nothing() {
    let mut world = running();
    world.run("call 0 user:status\nsleep 3000");
    let before = world.held();
    world.run("limit 300000\nsequence 300 0 user:status\nparallel 20 0 user:status\nsleep 3000");
    assert_eq!(world.held(), before);
    println!(
        "300 + 20 calls: {:?}, {} watches, {} nodes",
        before.vm, before.watches, before.owned
    );
}

#[test]
fn r8_eight_mebibytes_of_input_pass_and_stop_nothing_else() {
    let mut world = running();
    world.run("limit 120000\ncall 0 open:8388608 user:status\ncall 127 closed:8388608 user:QUBESRPC qubes.VMShell dom0");
    assert!(forwarded(&mut world, 0, WEB));
}

#[test]
fn q4_qubesdb_goes_and_comes_back_and_the_rules_stay() {
    let mut world = running();
    let before = world.held();
    for _ in 0..10 {
        let dom0 = world.dom0.as_mut().unwrap();
        dom0.qubesdb.disconnect(&mut world.channels);
        assert!(forwarded(&mut world, 0, WEB));
        assert!(!forwarded(&mut world, 2, WEB));
        world
            .run("limit 15000\nwait synced\nwait acknowledged\ncall 0 user:status\nexpect qubesdb");
        assert!(forwarded(&mut world, 0, WEB));
        assert!(!forwarded(&mut world, 2, WEB));
    }
    world.run("sleep 3000");
    assert_eq!(world.held(), before);
}

#[test]
fn r5_qrexec_goes_and_comes_back() {
    let mut world = running();
    let before = world.held();
    for _ in 0..10 {
        world.run("limit 15000\ndrop qrexec\nwait qrexec\ncall 0 user:status");
        assert!(forwarded(&mut world, 0, WEB));
    }
    world.run("sleep 3000");
    assert_eq!(world.held(), before);
}

#[test]
fn l7_a_thousand_clients_that_come_and_go_leave_nothing() {
    let mut world = running();
    world.run(
        "client 10.137.0.12 10.137.0.5\nrules 10.137.0.12\n  0000 action=accept\nwait acknowledged",
    );
    world.connect_client(DomId(12), "10.137.0.12");
    world.remove_client();
    let before = world.held();
    // A cycle is mostly waiting.
    world.tick = Duration::from_millis(2);
    for round in 0..1000 {
        // dom0 never gives a domain id twice.
        let index = world.connect_client(DomId(100 + round), "10.137.0.12");
        if round % 100 == 0 {
            assert!(forwarded(&mut world, index, WEB));
        }
        world.remove_client();
    }
    world.ticks(1000);
    let after = world.held();
    println!(
        "before and after 1000 clients: {:?}, {} watches, {} nodes of ours, {} in all",
        before.vm,
        before.watches,
        before.owned,
        before.paths.len()
    );
    assert_eq!(before, after);
}

#[test]
fn an_idle_firewall_sleeps() {
    let mut world = running();
    world.ticks(30_000);
    world.tick = Duration::from_millis(1);
    let (steps, requests) = (world.steps, world.store.requests(VM));
    world.ticks(60_000);
    let (steps, requests) = (world.steps - steps, world.store.requests(VM) - requests);
    println!("a minute of nothing: {steps} steps, {requests} requests to xenstore");
    assert!(
        steps < 100 && requests == 0,
        "{steps} steps, {requests} requests"
    );
}
