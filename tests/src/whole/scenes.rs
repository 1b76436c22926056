//! Scenes that several tests begin with, and what they look at.

use std::time::Duration;

use xen::DomId;
use xenstore::Shutdown;

use super::World;
use super::peers::{BACKEND_MAC, datagram, parts};

const UPLINK_MAC: [u8; 6] = [0, 0x16, 0x3e, 0x5e, 0x6c, 0];
const SECOND: Duration = Duration::from_secs(1);

/// A firewall that runs, with an uplink and three connected clients.
pub fn running() -> World {
    let mut world = World::configured();
    world.run("wait synced\nwait qrexec");
    world.connect_netvm(NETVM);
    for (id, address) in CLIENTS {
        world.connect_client(id, address);
    }
    world.run("wait key /qubes-firewall-handled/10.137.0.11 1");
    world
}

/// The first netvm.
pub const NETVM: DomId = DomId(4);
/// The clients of [`running`] and their addresses.
pub const CLIENTS: [(DomId, &str); 3] = [
    (DomId(9), "10.137.0.9"),
    (DomId(10), "10.137.0.10"),
    (DomId(11), "10.137.0.11"),
];
/// A server that the rules of the first two clients allow.
pub const WEB: ([u8; 4], u16) = ([192, 0, 2, 80], 443);

/// Datagrams of a client to `destination` that reach the netvm; each is answered, and the answer must come back.
pub fn forwarded(world: &mut World, client: usize, destination: ([u8; 4], u16)) -> bool {
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

/// Asks for the end and waits for it; the acknowledgement must be there.
pub fn shut_down(world: &mut World) -> Option<Shutdown> {
    world
        .store
        .write("/local/domain/7/control/shutdown", "poweroff");
    let took = world.until("end", SECOND, |world| world.ended.is_some());
    assert!(took < Duration::from_millis(10), "{took:?}");
    let node = world.store.read("/local/domain/7/control/shutdown");
    assert_eq!(node.as_deref(), Some(""), "not acknowledged");
    world.ended
}
