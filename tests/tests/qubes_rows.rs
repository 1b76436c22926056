//! The rows of the protocol document that only the whole kernel can show, and where the tests of all others are.
//!
//! Every row of sections 8 and 9 of the document of Qubes OS' protocols has at least one test whose name begins with the row
//! (`q9_...`; the rows of section 9, which are numbers only, are `boot_1_...` to `boot_7_...`).
//!
//! | rows | tests |
//! | --- | --- |
//! | V1 to V4, V6, V7 | `qubes/src/vchan/` (`duplex/tests.rs`, `layout.rs`, `over_fake.rs`) |
//! | V5 | `qubes/src/qrexec/traces.rs` |
//! | V8 | `qubes/src/vchan/over_fake.rs`, `tests/dom0/tests/product/over_xen.rs` |
//! | Q1 to Q3, Q6, Q7 | `qubes/src/qubesdb/` (`message.rs`, `path.rs`, `client.rs`, `outbox.rs`) |
//! | Q4, Q5, Q8 to Q12 | `tests/dom0/tests/product/over_pipes.rs`; Q4, Q10, Q11, Q12 also `whole_kernel.rs` |
//! | R1 to R10 | `qubes/src/qrexec/` (`traces.rs`, `message.rs`, `cmdline.rs`, `output.rs`, `service.rs`); R1, R5, R8 also `whole_kernel.rs` |
//! | L1, L3 to L6, L9, L10, L13 | here |
//! | L2, L7 | `whole_kernel.rs` |
//! | L4, L8, L13 | also `xenstore/tests/backend.rs` |
//! | L11 | `kernel/src/source.rs` |
//! | L12 | `xenstore/tests/uplink.rs`, and here |
//! | M1, M3, M4, M5 | here; M3 also `kernel/src/terminal.rs` and `logger.rs`, M4 `xen/src/clock.rs`, M5 `kernel/src/plan.rs` |
//! | M2 | `build/src/package.rs` |
//! | 1 to 7 of section 9 | here |
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use kernel::snapshot::Scope;
use tests::whole::peers::{BACKEND_MAC, ClientSide, NetvmSide};
use tests::whole::scenes::{NETVM, WEB, forwarded, running, shut_down};
use tests::whole::{VM, World};
use xen::DomId;
use xenstore::Shutdown;
use xenstore::fake::{Toolstack, VifConfig};

const SECOND: Duration = Duration::from_secs(1);
const WRITE: u32 = 11;
const WATCH: u32 = 4;

/// Type and path of every request that the firewall makes to xenstore from now on.
fn requests(world: &World) -> Rc<RefCell<Vec<(u32, String)>>> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let log = Rc::clone(&seen);
    world.store.on_request(move |_, kind, path| {
        log.borrow_mut().push((kind, path.to_owned()));
    });
    seen
}

/// Where the first request of this type and path is.
fn first(requests: &[(u32, String)], kind: u32, path: &str) -> usize {
    requests
        .iter()
        .position(|(of, to)| *of == kind && to.starts_with(path))
        .unwrap_or_else(|| panic!("no request of type {kind} for {path} in {requests:#?}"))
}

/// The states that the firewall wrote into the backend's folder of a client.
fn states(world: &World, client: DomId) -> String {
    let folder = format!("/local/domain/7/backend/vif/{client}/0/state");
    let journal = world.store.take_journal();
    let ours = journal
        .into_iter()
        .filter(|(writer, path, _)| *writer == VM && *path == folder);
    ours.map(|(_, _, value)| value).collect()
}

#[test]
fn l1_the_first_thing_written_is_that_we_can_power_off() {
    let mut world = World::configured();
    world.run("wait qrexec");
    let ours: Vec<(String, String)> = world
        .store
        .take_journal()
        .into_iter()
        .filter(|(writer, _, _)| *writer == VM)
        .map(|(_, path, value)| (path, value))
        .collect();
    let control = |name: &str| (format!("/local/domain/7/control/{name}"), "1".to_owned());
    assert_eq!(ours[0], control("feature-poweroff"));
    assert_eq!(ours[1], control("feature-reboot"));
    assert!(
        !ours
            .iter()
            .any(|(path, _)| path.contains("feature-suspend"))
    );
}

#[test]
fn l3_clients_are_served_before_anything_optional_is_there() {
    let mut world = World::plain();
    world
        .clients
        .push(ClientSide::attach(&world.store, DomId(9), 0, "10.137.0.9"));
    let offered = world.until("offer", SECOND, |world| {
        world.clients[0].backend_state().as_deref() == Some("2")
    });
    let connected = world.until("vif", SECOND, |world| world.clients[0].is_connected());
    println!(
        "offered after {offered:?}, connected {connected:?} later, with no netvm, QubesDB or qrexec"
    );
    assert!(offered < Duration::from_millis(20));
}

#[test]
fn l4_a_folder_is_removed_only_after_state_6_and_only_when_it_is_offline() {
    let mut world = running();
    let folder = world.clients[2].vif.backend_folder();
    world.store.take_journal();
    world.clients[2].leave();
    let mut seen_6 = false;
    let store = world.store.clone();
    world.until("removal", SECOND, |_| {
        let state = store.read(&format!("{folder}/state"));
        seen_6 |= state.as_deref() == Some("6");
        !store.exists(&folder)
    });
    assert!(seen_6, "nobody could have seen state 6");
    assert!(states(&world, DomId(11)).ends_with('6'));
    // The frontend that closes by itself keeps its folder.
    let folder = world.clients[1].vif.backend_folder();
    world.clients[1].close();
    for _ in 0..20_000 {
        world.step();
        assert!(store.exists(&folder));
    }
}

#[test]
fn l5_a_frontend_that_closes_is_answered_and_may_come_back() {
    let mut world = running();
    for _ in 0..3 {
        world.store.take_journal();
        world.clients[0].close();
        world.until("close", SECOND, |world| !world.clients[0].is_connected());
        world.until("return", SECOND * 20, |world| {
            world.clients[0].is_connected()
        });
        assert_eq!(states(&world, DomId(9)), "5624");
        assert!(forwarded(&mut world, 0, WEB));
    }
}

#[test]
fn l6_the_second_vif_of_an_hvm_client_that_never_connects_holds_up_nothing() {
    let mut world = running();
    let mut stub = ClientSide::attach(&world.store, DomId(30), 0, "10.137.0.9");
    stub.idle = true;
    world.clients.push(stub);
    world.ticks(2_000);
    assert_eq!(world.clients[3].backend_state().as_deref(), Some("2"));
    assert!(forwarded(&mut world, 0, WEB));
    // Another client comes, and the first one of the two goes.
    world.run(
        "client 10.137.0.12 10.137.0.5\nrules 10.137.0.12\n  0000 action=accept\nwait acknowledged",
    );
    let index = world.connect_client(DomId(12), "10.137.0.12");
    assert!(forwarded(&mut world, index, WEB));
    assert_eq!(world.clients[3].backend_state().as_deref(), Some("2"));
}

#[test]
fn l9_clients_see_the_backends_address_and_never_their_own() {
    let mut world = running();
    world.clients[0].send(5000, WEB, b"x");
    world.ticks(100);
    let sent = world.netvm.as_mut().unwrap().take();
    assert_eq!(sent[0].bytes[6..12], [0, 0x16, 0x3e, 0x5e, 0x6c, 0]);
    // Who has our address? The frame that answers must come from the address of every backend.
    let mac = [0x00, 0x16, 0x3e, 0x5e, 0x00, 0x09];
    let mut question = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac].concat();
    question.extend([10, 137, 0, 9, 0, 0, 0, 0, 0, 0, 10, 137, 0, 5]);
    world.clients[0].rings().transmit(&question);
    world.ticks(100);
    let answers = world.clients[0].take();
    let answer = &answers.first().expect("no answer").bytes;
    assert_eq!(answer[..6], mac);
    assert_eq!(answer[6..12], BACKEND_MAC);
    assert_eq!(answer[22..28], BACKEND_MAC);
}

#[test]
fn l10_a_netvm_that_hangs_holds_up_neither_clients_nor_calls() {
    let mut world = World::configured();
    let mut netvm = NetvmSide::attach(&world.store, NETVM);
    netvm.stalled = true;
    world.netvm = Some(netvm);
    world.run("wait synced\nwait qrexec\ncall 0 user:status");
    world.connect_client(DomId(9), "10.137.0.9");
    world.clients[0].send(5000, WEB, b"x");
    world.ticks(10_000);
    world.remove_client();
    world.netvm.as_mut().unwrap().stalled = false;
    world.until("uplink", SECOND * 10, |world| {
        world.netvm.as_ref().is_some_and(NetvmSide::is_connected)
    });
    world.connect_client(DomId(19), "10.137.0.9");
    world.ticks(5_000);
    // What was sent meanwhile waited in the ring.
    world.netvm.as_mut().unwrap().take();
    assert!(forwarded(&mut world, 0, WEB));
}

#[test]
fn l12_a_device_that_appears_without_its_keys_is_looked_at_again() {
    let mut world = World::configured();
    world.run("wait qrexec");
    let vif = VifConfig::new(NETVM, VM, 0);
    Toolstack::new(world.store.clone()).attach(&vif);
    let path = format!("{}/backend-id", vif.frontend_folder());
    world.store.remove(&path);
    world.ticks(1_000);
    Toolstack::new(world.store.clone()).finish_detach(&vif);
    world.connect_netvm(NETVM);
    world.connect_client(DomId(9), "10.137.0.9");
    assert!(forwarded(&mut world, 0, WEB));
}

#[test]
fn l13_a_destroyed_client_is_let_go_without_its_help() {
    let mut world = running();
    let before = world.machine.resources(VM);
    world.connect_client(DomId(40), "10.137.0.11");
    let client = world.clients.pop().unwrap();
    world.machine.kill(DomId(40));
    Toolstack::new(world.store.clone()).destroy_frontend(&client.vif);
    let store = world.store.clone();
    let folder = client.vif.backend_folder();
    let took = world.until("removal", SECOND * 5, |_| !store.exists(&folder));
    println!("removed after {took:?}");
    assert_eq!(world.machine.resources(VM), before);
    assert!(forwarded(&mut world, 0, WEB));
}

#[test]
fn m1_nothing_is_written_that_is_not_ours_to_write_and_never_meminfo() {
    let mut world = running();
    world.run("call 0 user:status\nrewrite\nwait acknowledged");
    world.remove_netvm();
    world.remove_client();
    let home = "/local/domain/7/";
    for (_, path, _) in world
        .store
        .take_journal()
        .into_iter()
        .filter(|(writer, _, _)| *writer == VM)
    {
        let inside = path.strip_prefix(home).unwrap_or_else(|| panic!("{path}"));
        let first = inside.split('/').next().unwrap();
        assert!(
            ["backend", "control", "data", "device"].contains(&first),
            "{path}"
        );
    }
    assert!(
        !world
            .store
            .all_paths()
            .iter()
            .any(|path| path.contains("meminfo"))
    );
}

#[test]
fn m3_a_console_that_nobody_reads_stops_nothing() {
    let mut world = running();
    world.stop_console();
    for index in 0..30 {
        world.connect_client(DomId(200 + index), "10.137.0.99");
        world.remove_client();
    }
    assert!(forwarded(&mut world, 0, WEB));
    world.run("call 0 user:status");
    assert_eq!(shut_down(&mut world), Some(Shutdown::Poweroff));
}

#[test]
fn m4_a_night_of_host_sleep_is_no_catastrophe() {
    let mut world = running();
    world.ticks(30_000);
    for _ in 0..3 {
        world.run("call 0 root:QUBESRPC qubes.SuspendPreAll dom0\ncall 0 root:QUBESRPC qubes.SuspendPre dom0");
        world.machine.advance(Duration::from_secs(8 * 3600));
        let steps = world.steps;
        world.ticks(100);
        assert!(world.steps - steps < 100, "{} steps", world.steps - steps);
        world.run("call 0 root:QUBESRPC qubes.SuspendPostAll dom0\ncall 0 user:status");
        assert!(forwarded(&mut world, 0, WEB));
        assert!(!forwarded(&mut world, 2, WEB));
    }
}

#[test]
fn m5_what_a_client_sends_into_a_netvm_that_hangs_takes_bounded_memory() {
    let mut world = running();
    world.netvm.as_mut().unwrap().stalled = true;
    let before = world.machine.resources(VM).pages;
    let mut most = 0;
    for round in 0u16..300 {
        for port in 0..16 {
            if world.clients[0].rings().tx_free() == 0 {
                break;
            }
            world.clients[0].send(1024 + round * 16 + port, WEB, &[0; 1000]);
        }
        world.step();
        most = most.max(world.machine.resources(VM).pages - before);
    }
    println!("at most {most} pages more");
    assert!(most <= 512, "{most} pages");
    world.run("call 0 user:status");
    world.netvm.as_mut().unwrap().stalled = false;
    world.netvm.as_mut().unwrap().wake();
    world.ticks(3_000);
    world.netvm.as_mut().unwrap().take();
    world.clients[0].take();
    assert!(forwarded(&mut world, 1, WEB));
}

#[test]
fn boot_1_console_and_xenstore_are_all_that_it_needs() {
    let mut world = World::plain();
    world.machine.advance(Duration::from_millis(1));
    let took = world.until("readiness", SECOND, |world| {
        world.snapshot(Scope::OVERVIEW).ready_nanos > 0
    });
    println!("ready after {took:?} and {} steps", world.steps);
}

#[test]
fn boot_2_shutdown_is_watched_before_devices_and_channels() {
    let mut world = World::configured();
    let requests = requests(&world);
    world.run("wait qrexec");
    let requests = requests.borrow();
    let poweroff = first(&requests, WRITE, "/local/domain/7/control/feature-poweroff");
    let shutdown = first(&requests, WATCH, "/local/domain/7/control/shutdown");
    let uplink = first(&requests, WATCH, "/local/domain/7/device/vif");
    let qrexec = first(&requests, WRITE, "/local/domain/7/data/vchan/0/512");
    assert!(poweroff < shutdown && poweroff < uplink);
    assert!(shutdown < qrexec);
}

#[test]
fn boot_3_new_vifs_are_answered_before_qrexec_is_offered() {
    let mut world = World::configured();
    for id in 0..20 {
        let address = format!("10.137.0.{}", 100 + id);
        world.clients.push(ClientSide::attach(
            &world.store,
            DomId(100 + id),
            0,
            &address,
        ));
    }
    let requests = requests(&world);
    world.run("wait qrexec");
    let requests = requests.borrow();
    let qrexec = first(&requests, WRITE, "/local/domain/7/data/vchan/0/512");
    let backend = first(&requests, WATCH, "/local/domain/7/backend/vif");
    assert!(backend < qrexec);
    drop(requests);
    world.until("offers", SECOND, |world| {
        let state = |client: &ClientSide| client.backend_state();
        world
            .clients
            .iter()
            .all(|client| matches!(state(client).as_deref(), Some("2" | "4")))
    });
}

#[test]
fn boot_4_the_first_dump_is_in_force_before_qrexec_is_offered() {
    let mut world = World::configured();
    let store = world.store.clone();
    let offered = || store.exists("/local/domain/7/data/vchan/0/512/event-channel");
    world.until("offer of qrexec", SECOND, |_| offered());
    assert_eq!(world.snapshot(Scope::OVERVIEW).source, "qubesdb");
    assert!(world.dom0().qubesdb.is_synced());
    assert_eq!(world.snapshot(Scope::WHOLE).missing, [""; 0]);
}

#[test]
fn boot_5_the_uplink_connects_without_clients_and_clients_without_the_uplink() {
    let mut world = World::configured();
    world.connect_netvm(NETVM);
    let mut other = World::configured();
    other.connect_client(DomId(9), "10.137.0.9");
}

#[test]
fn boot_6_qrexec_is_offered_without_a_netvm_and_without_keys() {
    let mut world = World::qubes();
    let took = world.until("qrexec", SECOND, |world| world.dom0().qrexec.is_connected());
    println!("greeted after {took:?}");
}

#[test]
fn boot_7_what_fails_later_costs_one_client_one_call_or_one_channel() {
    let mut world = running();
    // A client claims more requests than its ring has.
    world.clients[2].rings().tx_prod += 10_000;
    world.clients[2].rings().publish();
    world.clients[2].idle = true;
    world.ticks(100);
    assert!(forwarded(&mut world, 0, WEB));
    // A caller leaves at once, a message of qrexec is of no known type.
    world
        .dom0()
        .qrexec
        .send_raw(&[0x77, 0x77, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4]);
    world.run("call 0 user:status\ncall 125 malformed");
    // Both channels are lost at once.
    world.run(
        "drop qubesdb\ndrop qrexec\nlimit 20000\nwait synced\nwait qrexec\ncall 0 user:status",
    );
    assert!(forwarded(&mut world, 0, WEB));
    assert!(forwarded(&mut world, 1, WEB));
}
