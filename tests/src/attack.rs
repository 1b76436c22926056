//! What hostile peers write, and what must become of it.

use netback::PeerError;
use netfront::DeviceBroken;
use xen::netif::{RX_WORDS, RxFlags, RxResponse, TxFlags, TxRequest, status};
use xen::{DomId, GrantRef};

use crate::client::{Client, Piece};
use crate::frames::pattern;
use crate::netvm::Netvm;
use crate::router::{LINUX, ROUTER, World};

/// The domain of a second client.
pub const SECOND: DomId = DomId(11);

/// A request for a frame of one slot that the client has no page behind.
#[must_use]
pub fn request(gref: u32, offset: u16, size: u16, flags: u16) -> TxRequest {
    TxRequest {
        gref: GrantRef(gref),
        offset,
        flags: TxFlags(flags),
        id: 0x1234,
        size,
    }
}

/// A piece of a frame at the start of its page.
#[must_use]
pub fn piece(bytes: Vec<u8>) -> Piece {
    Piece { offset: 0, bytes }
}

/// Runs the router and returns what the vif was given up for, after checking that the netvm link is untouched.
///
/// # Panics
///
/// When the vif is still served, or others are not.
pub fn fatal(world: &mut World) -> PeerError {
    world.run();
    assert_eq!(
        world.router.client_errors.len(),
        1,
        "the vif must be given up"
    );
    assert!(world.router.vifs[0].is_none());
    let (_, error) = world.router.client_errors[0];
    // A second client is served as if nothing had happened.
    let mut second = Client::new(&world.machine, SECOND, ROUTER);
    world.router.connect_client(&second);
    second.transmit(&pattern(100, 77));
    world.run();
    let taken = world.netvm.take();
    assert_eq!(taken.last().unwrap().bytes, pattern(100, 77));
    assert_eq!(second.take_statuses(), [0]);
    world
        .router
        .vifs
        .pop()
        .unwrap()
        .unwrap()
        .disconnect(&mut world.router.hv);
    second.close();
    error
}

/// Sends a frame that must be answered with `answers` and must not arrive, then a good one that must.
///
/// # Panics
///
/// When it is otherwise.
pub fn refused(world: &mut World, put: impl FnOnce(&mut Client), answers: &[i16]) {
    put(&mut world.client);
    world.client.put_frame(&[piece(pattern(70, 9))], 0, None);
    world.client.publish();
    world.run();
    assert_eq!(world.router.client_errors, []);
    let mut expected = answers.to_vec();
    expected.push(status::OKAY);
    assert_eq!(world.client.take_statuses(), expected);
    let taken = world.netvm.take();
    assert_eq!(taken.len(), 1, "only the good frame arrives");
    assert_eq!(taken[0].bytes, pattern(70, 9));
}

/// An extra-info slot with nothing in it.
#[must_use]
pub fn extra(kind: u8, more: bool) -> [u32; 3] {
    [u32::from_le_bytes([kind, u8::from(more), 0, 0]), 0, 0]
}

/// A GSO extra of any size and family.
#[must_use]
pub fn gso(size: u16, family: u8, more: bool) -> [u32; 3] {
    let [low, high] = size.to_le_bytes();
    [
        u32::from_le_bytes([1, u8::from(more), low, high]),
        family.into(),
        0,
    ]
}

/// Writes and publishes a frame of one slot, followed by these extras.
pub fn put_extras(client: &mut Client, extras: &[[u32; 3]]) {
    client.put_request(request(9, 0, 100, TxFlags::EXTRA_INFO));
    for words in extras {
        client.put_extra(*words);
    }
    client.publish();
}

/// The words of an rx response.
#[must_use]
pub fn response(id: u16, offset: u16, flags: u16, status: i16) -> [u32; RX_WORDS] {
    RxResponse {
        id,
        offset,
        flags: RxFlags(flags),
        status,
    }
    .encode()
}

/// A bare response to the next buffer, whatever it says.
pub fn put_response(netvm: &mut Netvm, offset: u16, flags: u16, status: i16) {
    let buffer = netvm.take_buffer();
    netvm.put_rx_words(response(buffer.id, offset, flags, status));
}

/// Runs the router and returns why the uplink was given up, after checking that a new one works.
///
/// # Panics
///
/// When the uplink is still served, or the next one is not.
#[must_use]
pub fn broken(mut world: World) -> DeviceBroken {
    world.run();
    let error = world
        .router
        .uplink_error
        .take()
        .expect("the uplink must be given up");
    assert!(world.router.uplink.is_none());
    world.netvm.close();
    world.router.quarantine.sweep(&mut world.router.hv);
    world.netvm = world.router.connect_uplink(&world.machine, LINUX);
    world.client.post(10);
    world.client.transmit(&pattern(80, 1));
    world.netvm.deliver(&pattern(90, 2));
    world.run();
    assert_eq!(world.netvm.take().pop().unwrap().bytes, pattern(80, 1));
    assert_eq!(world.client.receive().pop().unwrap().bytes, pattern(90, 2));
    world.close();
    error
}

/// Puts something that must be dropped, then a good frame, which alone must arrive; every buffer comes back.
///
/// # Panics
///
/// When it is otherwise.
pub fn dropped(world: &mut World, put: impl FnOnce(&mut Netvm)) {
    let buffers = world.netvm.buffers();
    put(&mut world.netvm);
    world.netvm.put_frame(&[(0, pattern(77, 3))], 0, None);
    world.netvm.publish();
    world.client.post(1);
    world.run();
    assert_eq!(world.router.uplink_error, None);
    let received = world.client.receive();
    assert_eq!(received.len(), 1, "only the good frame arrives");
    assert_eq!(received[0].bytes, pattern(77, 3));
    assert_eq!(
        world.netvm.buffers(),
        buffers,
        "every buffer is posted again, once"
    );
}
