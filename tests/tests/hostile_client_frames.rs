//! Clients that play with references, ids and contents: the adversarial backend tests of `xen-netif.md` 9.3 on
//! what is behind the slots, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use netback::PeerError;
use tests::attack::{SECOND, extra, piece, refused, request};
use tests::client::{Client, Piece};
use tests::frames::{cut, pattern};
use tests::raw::{self, REQ_PROD};
use tests::router::{FIRST_CLIENT, ROUTER, World, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::{GsoType, TxFlags, TxRequest, status};
use xen::page::RingMemory;
use xen::{Access, Checksum, Hypervisor};

#[test]
fn b14_unusable_references_cost_only_their_frame() {
    let mut world = World::new();
    let mut second = Client::new(&world.machine, SECOND, ROUTER);
    let others = second.grant_page(Access::ReadOnly);
    let mut revoked = world.client.grant_page(Access::ReadOnly);
    let stale = revoked.gref();
    world.client.take_back(revoked);
    for gref in [u32::MAX, others.gref().0 + 7000, stale.0, 0, 1] {
        refused(
            &mut world,
            |client| client.put_request(request(gref, 0, 100, 0)),
            &[status::ERROR],
        );
        world.netvm.answer_all();
    }
    // A reference of another domain is looked up in the client's own table.
    revoked = world.client.grant_page(Access::ReadOnly);
    let not_for_us = {
        let page = world.client.hv.allocate().unwrap();
        world
            .client
            .hv
            .grant(SECOND, page, Access::ReadOnly)
            .unwrap()
    };
    refused(
        &mut world,
        |client| client.put_request(request(not_for_us.gref().0, 0, 100, 0)),
        &[status::ERROR],
    );
    assert_eq!(world.router.vif().counters().receive_errors.copy_failed, 6);
    assert_eq!(
        world.router.vif().counters().received_frames,
        6,
        "the good ones"
    );
    world.client.take_back(revoked);
    world.client.take_back(not_for_us);
    second.take_back(others);
    second.close();
    world.close();
}

/// One bad fragment fails the whole frame; its good fragments and its neighbours do not matter (XSA-365).
#[test]
fn b14_mixed_statuses_in_one_batch_are_kept_apart() {
    let mut world = World::new();
    let good = pattern(90, 1);
    world.client.put_frame(&[piece(good.clone())], 0, None);
    let lent = world.client.grant_page(Access::ReadOnly);
    world.client.put_request(request(
        lent.gref().0,
        0,
        200,
        TxFlags::MORE_DATA | TxFlags::EXTRA_INFO,
    ));
    world.client.put_extra(extra(4, false));
    world
        .client
        .put_request(request(u32::MAX, 0, 50, TxFlags::MORE_DATA));
    world.client.put_request(request(lent.gref().0, 0, 50, 0));
    world.client.put_frame(&[piece(good.clone())], 0, None);
    world.client.publish();
    world.run();
    assert_eq!(world.client.take_statuses(), [0, -1, -1, -1, 0]);
    let taken = world.netvm.take();
    assert_eq!(
        taken.iter().map(|taken| &taken.bytes).collect::<Vec<_>>(),
        [&good, &good]
    );
    world.client.take_back(lent);
    world.close();
}

#[test]
fn b14_a_grant_revoked_between_check_and_copy_is_an_error() {
    let mut world = World::new();
    let lent = world.client.grant_page(Access::ReadOnly);
    world.client.put_request(request(lent.gref().0, 0, 100, 0));
    world.client.publish();
    let mut client = world.machine.domain(FIRST_CLIENT);
    world.machine.before_next_copy(ROUTER, move || {
        let page = client.revoke(lent).unwrap();
        client.release(page);
    });
    world.run();
    assert_eq!(world.client.take_statuses(), [status::ERROR]);
    assert_eq!(world.netvm.take(), []);
    world.close();
}

#[test]
fn b14_nothing_but_failing_copies_is_fatal_in_the_end() {
    let mut world = World::new();
    for _ in 0..10 {
        for _ in 0..32 {
            world.client.put_request(request(u32::MAX, 0, 100, 0));
        }
        world.client.publish();
        world.run();
        world.client.reap();
    }
    assert_eq!(world.router.client_errors, [(0, PeerError::CopyFailures)]);
    world.close();
}

#[test]
fn b15_one_reference_and_one_id_for_everything_are_allowed() {
    let mut world = World::new();
    let mut page = world.client.hv.allocate().unwrap();
    page.fill(0x5a);
    let lent = world
        .client
        .hv
        .grant(ROUTER, page, Access::ReadOnly)
        .unwrap();
    for index in 0..18 {
        let more = if index < 17 { TxFlags::MORE_DATA } else { 0 };
        let size = if index == 0 { 18 * 80 } else { 80 };
        world.client.put_request(TxRequest {
            id: 0xffff,
            ..request(lent.gref().0, 7, size, more)
        });
    }
    world.client.publish();
    world.run();
    assert_eq!(world.netvm.take()[0].bytes, [0x5a; 18 * 80]);
    // The client checks that each response has the id of its request.
    assert_eq!(world.client.take_statuses(), [0; 18]);
    world.client.take_back(lent);
    world.close();
}

/// What a checksum flag is set on is for the firewall to judge; the driver passes on what was said.
#[test]
fn b16_checksum_flags_are_passed_on_as_said() {
    let mut world = World::new();
    let mut arp = pattern(42, 1);
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    world
        .client
        .put_frame(&[piece(arp)], TxFlags::CSUM_BLANK, None);
    world
        .client
        .put_frame(&[piece(pattern(60, 2))], TxFlags::DATA_VALIDATED, None);
    world
        .client
        .put_frame(&[piece(pattern(60, 3))], 0xfff0, None);
    world.client.publish();
    let mut seen = Vec::new();
    world.router.run(|from, frame| {
        seen.push(frame.checksum);
        straight(from, frame)
    });
    assert_eq!(
        seen,
        [Checksum::Blank, Checksum::Validated, Checksum::Unverified]
    );
    world.close();
}

/// The size in a slot flips between a good and a bad one all the time; what is used is what was checked.
#[test]
#[cfg_attr(miri, ignore = "a race on purpose")]
fn b29_a_slot_changed_while_it_is_read_is_used_as_it_was_checked() {
    let mut world = World::new();
    let mut page = world.client.hv.allocate().unwrap();
    page.copy_from_slice(&pattern(4096, 5));
    let lent = world
        .client
        .hv
        .grant(ROUTER, page, Access::ReadOnly)
        .unwrap();
    let good = request(lent.gref().0, 0, 100, 0);
    // Word 2 of slot 0: id and size. Sizes that would leave the page appear only with offset 0, so none is fatal.
    let sizes: [u32; 3] = [0x0064_1234, 0x05dc_1234, 0x0004_1234];
    let mut lens = Vec::new();
    for round in 0..250 {
        world.client.put_request(good);
        let at = raw::slot(round, 3) + 8;
        let published = world.client.tx_prod;
        let (client, router) = (&world.client, &mut world.router);
        FakeMachine::race(client.tx_ring(), at, &sizes, || {
            client.tx_ring().shared().write_u32(REQ_PROD, published);
            for _ in 0..3 {
                router.iterate(|_, frame| {
                    lens.push(frame.len());
                    assert_eq!(frame.header(), &pattern(4096, 5)[..frame.len()]);
                    None
                });
            }
        });
        // The other thread may have written over the response's padding.
        client.tx_ring().shared().write_u32(at, 0);
        world.client.reap();
    }
    assert!(lens.len() > 10, "most rounds deliver a frame");
    assert!(lens.iter().all(|len| [100, 1500].contains(len)), "{lens:?}");
    world.client.take_back(lent);
    world.close();
}

#[test]
fn b41_ids_used_again_while_outstanding_are_harmless() {
    let mut world = World::new();
    let lent = world.client.grant_page(Access::ReadOnly);
    for _ in 0..50 {
        world.client.put_request(request(lent.gref().0, 0, 60, 0));
    }
    world.client.publish();
    world.run();
    assert_eq!(world.client.take_statuses(), [0; 50]);
    assert_eq!(world.netvm.take().len(), 50);
    world.client.take_back(lent);
    world.close();
}

/// Page pools run dry; frames stay in the ring until there are pages again.
#[test]
fn an_empty_pool_leaves_requests_in_the_ring() {
    let mut world = World::new();
    let mut hoard = Vec::new();
    while let Some(page) = world.router.hv.allocate() {
        hoard.push(page);
    }
    let frame = pattern(60_000, 1);
    let pieces: Vec<Piece> = cut(&frame, &[4096; 15]).into_iter().map(piece).collect();
    world
        .client
        .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV4)));
    world.client.transmit(&pattern(60, 2));
    world.router.iterate(straight);
    assert_eq!(world.client.take_statuses(), [0_i16; 0]);
    assert!(world.router.vif().counters().receive_pool_low > 0);
    for page in hoard.drain(..) {
        world.router.hv.release(page);
    }
    world.run();
    assert_eq!(world.client.take_statuses().len(), 16);
    assert_eq!(world.netvm.take().len(), 2);
    world.close();
}

/// Allocation fails in the middle of a frame of many pages: none is lost.
#[test]
fn a_pool_that_fails_midway_loses_no_page() {
    for skip in 0..15 {
        let mut world = World::new();
        let frame = pattern(60_000, 1);
        let pieces: Vec<Piece> = cut(&frame, &[4096; 15]).into_iter().map(piece).collect();
        world
            .client
            .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV4)));
        world.client.publish();
        world.machine.fail(ROUTER, Operation::Allocate, skip);
        world.router.iterate(straight);
        assert_eq!(world.netvm.take(), []);
        world.run();
        assert_eq!(world.netvm.take()[0].bytes, frame);
        world.close();
    }
}
