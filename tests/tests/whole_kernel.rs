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
use tests::whole::World;
use tests::whole::peers::{BACKEND_MAC, datagram, parts};
use xen::DomId;

const SECOND: Duration = Duration::from_secs(1);
const UPLINK_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];

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

/// A firewall that runs, with an uplink and three connected clients.
fn running() -> World {
    let mut world = World::configured();
    world.run("wait synced\nwait qrexec");
    world.connect_netvm(NETVM);
    for (id, address) in CLIENTS {
        world.connect_client(id, address);
    }
    world.run("wait key /qubes-firewall-handled/10.137.0.11 1");
    world
}

const NETVM: DomId = DomId(4);
const CLIENTS: [(DomId, &str); 3] = [
    (DomId(9), "10.137.0.9"),
    (DomId(10), "10.137.0.10"),
    (DomId(11), "10.137.0.11"),
];
const WEB: ([u8; 4], u16) = ([192, 0, 2, 80], 443);

/// Datagrams of a client to `destination` that reach the netvm; each is answered, and the answer must come back.
fn forwarded(world: &mut World, client: usize, destination: ([u8; 4], u16)) -> bool {
    let port = 40_000 + u16::try_from(client).unwrap();
    world.clients[client].send(port, destination, b"there");
    world.ticks(100);
    let taken = world.netvm.as_mut().unwrap().take();
    let Some((source, to, payload)) = taken.iter().find_map(|frame| parts(&frame.bytes)) else {
        return false;
    };
    assert_eq!((to, payload.as_slice()), (destination, &b"there"[..]));
    assert_eq!(source.0, [10, 137, 0, 5], "not translated");
    let back = datagram((BACKEND_MAC, UPLINK_MAC), destination, source, b"and back");
    world.netvm.as_mut().unwrap().deliver(&back);
    world.ticks(100);
    let received = world.clients[client].take();
    let (from, to, payload) = received
        .iter()
        .find_map(|frame| parts(&frame.bytes))
        .expect("no answer");
    assert_eq!((from, payload.as_slice()), (destination, &b"and back"[..]));
    assert_eq!(to.1, port);
    true
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
