//! The adversarial backend tests of `xen-netif.md` 9.3 that concern the data path; each is named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use std::time::Duration;

use netback::{ConnectError, FrontendFeatures, PeerError, Ring, SendDrop, Vif, VifTag};
use tests::client::{Client, LINUX, Piece};
use tests::frames::{cut, pattern};
use tests::raw::{self, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use tests::router::{FIRST_CLIENT, NETVM, ROUTER, Router, World, assert_nothing_left, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::{Extra, GsoType, RxFlags, TxFlags, TxRequest, status};
use xen::page::RingMemory;
use xen::{Access, Checksum, DomId, Errno, Frame, GrantRef, GrantStatus, Hypervisor, PortNumber};

const SECOND: DomId = DomId(11);

/// A request for a frame of one slot that the client has no page behind.
fn request(gref: u32, offset: u16, size: u16, flags: u16) -> TxRequest {
    TxRequest {
        gref: GrantRef(gref),
        offset,
        flags: TxFlags(flags),
        id: 0x1234,
        size,
    }
}

fn piece(bytes: Vec<u8>) -> Piece {
    Piece { offset: 0, bytes }
}

/// Runs the router and returns what the vif was given up for, after checking that the netvm link is untouched.
fn fatal(world: &mut World) -> PeerError {
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
fn refused(world: &mut World, put: impl FnOnce(&mut Client), answers: &[i16]) {
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

#[test]
fn b1_impossible_tx_producer_is_fatal() {
    for jump in [257u32, 1000, 1 << 31, u32::MAX, u32::MAX - 300] {
        let mut world = World::new();
        world.client.tx_ring().shared().write_u32(REQ_PROD, jump);
        assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Tx));
        assert_eq!(
            world.router.hv.counters().copy_elements,
            1,
            "only the other client's frame"
        );
        world.close();
    }
}

#[test]
fn b1_tx_producer_going_backwards_is_fatal() {
    let mut world = World::new();
    for seed in 0..5 {
        world.client.transmit(&pattern(60, seed));
    }
    world.run();
    world.client.tx_ring().shared().write_u32(REQ_PROD, 3);
    assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Tx));
    world.netvm.take();
    world.close();
}

/// All 256 slots of garbage: no loop longer than the ring, one answer each.
#[test]
fn b1_a_full_ring_of_garbage_is_answered_slot_by_slot() {
    let mut world = World::new();
    for _ in 0..256 {
        world.client.put_request(request(u32::MAX, 0, 5, 0));
    }
    world.client.publish();
    world.run();
    assert_eq!(world.client.take_statuses(), [status::ERROR; 256]);
    assert_eq!(world.router.vif().counters().receive_errors.too_short, 256);
    world.close();
}

#[test]
fn b2_impossible_rx_producer_is_fatal() {
    let mut world = World::new();
    world.client.rx_ring().shared().write_u32(REQ_PROD, 257);
    world.netvm.deliver(&pattern(60, 1));
    assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Rx));
    world.close();
}

#[test]
fn b3_frames_shorter_than_an_ethernet_header_are_refused() {
    for len in [0, 1, 13] {
        let mut world = World::new();
        let put = |client: &mut Client| {
            client.put_frame(&[piece(pattern(14, 1)[..len].to_vec())], 0, None);
        };
        refused(&mut world, put, &[status::ERROR]);
        assert_eq!(world.router.vif().counters().receive_errors.too_short, 1);
        world.close();
    }
}

#[test]
fn b4_offset_past_page_end_is_fatal() {
    for (offset, size) in [
        (4083, 14),
        (4095, 60),
        (4096, 60),
        (65_535, 60),
        (65_535, 1),
        (1, 4096),
    ] {
        let mut world = World::new();
        world.client.put_request(request(9, offset, size, 0));
        world.client.publish();
        assert_eq!(fatal(&mut world), PeerError::CrossesPage, "{offset}+{size}");
        world.close();
    }
}

#[test]
fn b4_a_later_fragment_past_page_end_is_fatal() {
    for (offset, size) in [(4096u16, 1u16), (65_535, 100), (4000, 97)] {
        let mut world = World::new();
        world
            .client
            .put_request(request(9, 0, 1000, TxFlags::MORE_DATA));
        world.client.put_request(request(9, offset, size, 0));
        world.client.publish();
        assert_eq!(fatal(&mut world), PeerError::CrossesPage);
        world.close();
    }
}

#[test]
fn b5_fragments_longer_than_the_frame_are_refused() {
    for (total, rest) in [
        (100u16, vec![101u16]),
        (100, vec![50, 51]),
        (65_535, vec![4096; 17]),
    ] {
        let mut world = World::new();
        let answers = vec![status::ERROR; rest.len() + 1];
        let put = |client: &mut Client| {
            client.put_request(request(9, 0, total, TxFlags::MORE_DATA));
            for (index, size) in rest.iter().enumerate() {
                let more = if index + 1 < rest.len() {
                    TxFlags::MORE_DATA
                } else {
                    0
                };
                client.put_request(request(9, 0, *size, more));
            }
        };
        refused(&mut world, put, &answers);
        assert_eq!(
            world
                .router
                .vif()
                .counters()
                .receive_errors
                .inconsistent_sizes,
            1
        );
        world.close();
    }
}

/// A first slot that would have to hold more than its page.
#[test]
fn b5_a_total_that_the_fragments_do_not_reach_is_fatal() {
    let mut world = World::new();
    world
        .client
        .put_request(request(9, 0, 65_535, TxFlags::MORE_DATA));
    world.client.put_request(request(9, 0, 4096, 0));
    world.client.publish();
    assert_eq!(fatal(&mut world), PeerError::CrossesPage);
    world.close();
}

#[test]
fn b6_a_chain_that_does_not_end_is_fatal() {
    for len in [1, 5, 31] {
        let mut world = World::new();
        for _ in 0..len {
            world
                .client
                .put_request(request(9, 0, 1000, TxFlags::MORE_DATA));
        }
        world.client.publish();
        assert_eq!(fatal(&mut world), PeerError::IncompleteFrame);
        world.close();
    }
}

#[test]
fn b6_a_chain_as_long_as_the_ring_is_fatal() {
    let mut world = World::new();
    for _ in 0..256 {
        world
            .client
            .put_request(request(9, 0, 0, TxFlags::MORE_DATA));
    }
    world.client.publish();
    assert_eq!(fatal(&mut world), PeerError::TooManySlots);
    world.close();
}

#[test]
fn b7_empty_fragments_make_no_copies() {
    let mut world = World::new();
    let frame = pattern(300, 2);
    let mut pieces = vec![piece(frame.clone())];
    pieces.resize(18, piece(Vec::new()));
    world.client.put_frame(&pieces, 0, None);
    // The first slot is the empty one: all bytes are in the second.
    world
        .client
        .put_frame(&[piece(Vec::new()), piece(frame.clone())], 0, None);
    world.client.publish();
    world.run();
    let taken = world.netvm.take();
    assert_eq!(
        taken.iter().map(|taken| &taken.bytes).collect::<Vec<_>>(),
        [&frame, &frame]
    );
    assert_eq!(world.router.hv.counters().copy_elements, 2);
    assert_eq!(world.client.take_statuses(), [0; 20]);
    world.close();
}

#[test]
fn b8_headers_split_over_slots_are_linear_afterwards() {
    let mut world = World::new();
    let frame = pattern(500, 3);
    let mut lens = vec![14];
    lens.extend([1; 16]);
    let pieces: Vec<Piece> = cut(&frame, &lens).into_iter().map(piece).collect();
    assert_eq!(pieces.len(), 18);
    world.client.put_frame(&pieces, 0, None);
    world.client.publish();
    let mut headers = Vec::new();
    world.router.run(|from, frame| {
        headers.push(frame.header().to_vec());
        straight(from, frame)
    });
    assert_eq!(headers, [frame.clone()]);
    let taken = world.netvm.take();
    assert_eq!(taken[0].slots.len(), 1, "one slot towards the uplink");
    assert_eq!(taken[0].bytes, frame);
    world.close();
}

#[test]
fn b9_many_slots_of_a_tiny_frame_are_put_together() {
    for slots in [18, 19] {
        let mut world = World::new();
        let frame = pattern(60, 4);
        let mut lens = vec![3; slots - 1];
        lens.push(60);
        let pieces: Vec<Piece> = cut(&frame, &lens).into_iter().map(piece).collect();
        assert_eq!(pieces.len(), slots);
        world.client.put_frame(&pieces, 0, None);
        world.client.publish();
        world.run();
        assert_eq!(world.netvm.take()[0].bytes, frame);
        assert_eq!(world.client.take_statuses(), vec![0; slots]);
        world.close();
    }
}

fn put_slots(client: &mut Client, slots: usize) {
    for index in 0..slots {
        let more = if index + 1 < slots {
            TxFlags::MORE_DATA
        } else {
            0
        };
        let size = if index == 0 { 1000 } else { 1 };
        client.put_request(request(9, 0, size, more));
    }
}

#[test]
fn b10_20_to_32_slots_are_refused() {
    for slots in [20, 32] {
        let mut world = World::new();
        refused(
            &mut world,
            |client| put_slots(client, slots),
            &vec![status::ERROR; slots],
        );
        assert_eq!(
            world.router.vif().counters().receive_errors.too_many_slots,
            1
        );
        world.close();
    }
}

#[test]
fn b10_33_slots_and_more_are_fatal() {
    for slots in [33, 255, 256] {
        let mut world = World::new();
        put_slots(&mut world.client, slots);
        world.client.publish();
        assert_eq!(fatal(&mut world), PeerError::TooManySlots);
        world.close();
    }
}

/// Good frames before the bad one are in the batch when the vif is torn down and its domain dies.
#[test]
fn b11_malformed_frame_in_a_batch_then_teardown_leaves_nothing() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    router.connect_client(&client);
    for seed in 0..10 {
        client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    client.put_request(request(9, 4095, 100, 0));
    client.publish();
    let mut vif = router.vifs.pop().unwrap().unwrap();
    let budget = netback::Budget::default();
    let result = vif.receive(&mut router.hv, &mut router.batch, budget);
    assert_eq!(result, Err(PeerError::CrossesPage));
    assert!(!router.batch.is_empty(), "ten frames were taken before");
    vif.disconnect(&mut router.hv);
    machine.kill(FIRST_CLIENT);
    router.iterate(straight);
    router.close();
    assert_nothing_left(&machine, ROUTER);
    client.close();
    assert_nothing_left(&machine, FIRST_CLIENT);
}

/// Copies of a connection that is gone fail while the next one of that client has responses under way.
#[test]
fn b11_failures_of_a_former_connection_do_not_touch_the_next() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let budget = netback::Budget::default();
    let mut first = Client::new(&machine, FIRST_CLIENT, ROUTER);
    first.put_request(request(u32::MAX, 0, 100, 0));
    first.publish();
    let mut vif = Vif::connect(&mut router.hv, &first.parameters(VifTag(1))).unwrap();
    assert_eq!(
        vif.receive(&mut router.hv, &mut router.batch, budget),
        Ok(1)
    );
    vif.disconnect(&mut router.hv);
    let mut second = Client::new(&machine, FIRST_CLIENT, ROUTER);
    second.put_frame(&[piece(pattern(60, 1))], 0, None);
    second.publish();
    let mut vif = Vif::connect(&mut router.hv, &second.parameters(VifTag(2))).unwrap();
    assert_eq!(
        vif.receive(&mut router.hv, &mut router.batch, budget),
        Ok(1)
    );
    let mut failures = 0;
    router.batch.copy(&mut router.hv, |failure| {
        failures += 1;
        vif.amend(failure);
    });
    assert_eq!(failures, 1);
    let _ = vif.publish(&router.batch);
    assert_eq!(second.take_statuses(), [0]);
    assert_eq!(vif.counters().received_frames, 1);
    vif.disconnect(&mut router.hv);
    router.close();
    first.close();
    second.close();
    assert_nothing_left(&machine, ROUTER);
}

fn extra(kind: u8, more: bool) -> [u32; 3] {
    [u32::from_le_bytes([kind, u8::from(more), 0, 0]), 0, 0]
}

fn gso(size: u16, family: u8, more: bool) -> [u32; 3] {
    let [low, high] = size.to_le_bytes();
    [
        u32::from_le_bytes([1, u8::from(more), low, high]),
        family.into(),
        0,
    ]
}

fn put_extras(client: &mut Client, extras: &[[u32; 3]]) {
    client.put_request(request(9, 0, 100, TxFlags::EXTRA_INFO));
    for words in extras {
        client.put_extra(*words);
    }
    client.publish();
}

#[test]
fn b12_malformed_extras_are_fatal() {
    let cases: [(&[[u32; 3]], PeerError); 9] = [
        (&[], PeerError::IncompleteFrame),
        (&[extra(0, false)], PeerError::UnknownExtra(0)),
        (&[extra(6, false)], PeerError::UnknownExtra(6)),
        (&[extra(255, false)], PeerError::UnknownExtra(255)),
        (&[gso(1448, 1, true)], PeerError::IncompleteFrame),
        (
            &[gso(1448, 1, true), gso(1448, 1, false)],
            PeerError::DuplicateExtra(1),
        ),
        (
            &[extra(4, true), extra(4, false)],
            PeerError::DuplicateExtra(4),
        ),
        (
            &[extra(4, true), extra(5, true)],
            PeerError::IncompleteFrame,
        ),
        (
            &[
                gso(1448, 1, true),
                extra(2, true),
                extra(3, true),
                extra(4, true),
                extra(5, false),
            ],
            PeerError::TooManyExtras,
        ),
    ];
    for (extras, error) in cases {
        let mut world = World::new();
        put_extras(&mut world.client, extras);
        assert_eq!(fatal(&mut world), error, "{extras:?}");
        world.close();
    }
}

#[test]
fn b12_extras_without_end_are_fatal_and_bounded() {
    let mut world = World::new();
    put_extras(&mut world.client, &[extra(4, true); 255]);
    assert_eq!(fatal(&mut world), PeerError::DuplicateExtra(4));
    world.close();
}

#[test]
fn b13_gso_without_size_or_family_is_fatal() {
    for words in [gso(0, 1, false), gso(1448, 0, false), gso(1448, 3, false)] {
        let mut world = World::new();
        put_extras(&mut world.client, &[words]);
        assert_eq!(fatal(&mut world), PeerError::BadGso);
        world.close();
    }
}

/// MSS 1 on 64 KiB towards a receiver without GSO would be 65 thousand packets.
#[test]
fn b13_segmentation_is_bounded() {
    let no_gso = FrontendFeatures {
        gso_tcpv4: false,
        ..LINUX
    };
    let mut world = World::with(no_gso, tests::router::LINUX);
    world.client.post(250);
    for (header_len, payload_len) in [
        (54, 1),
        (54, 900),
        (0, 1448),
        (54, 0),
        (257, 1448),
        (200, 4000),
    ] {
        let mut frame = big_frame(&mut world, 65_000);
        let segments = netback::Segments {
            header_len,
            payload_len,
            checksum: Checksum::Blank,
        };
        let router = &mut world.router;
        let vif = router.vifs[0].as_mut().unwrap();
        let sent = vif.send_segments(
            &mut router.hv,
            &mut router.batch,
            &mut frame,
            segments,
            |_, _| {},
        );
        assert_eq!(
            sent,
            Err(SendDrop::BadSegments),
            "{header_len} {payload_len}"
        );
    }
    assert_eq!(world.router.vif().counters().send_drops.bad_segments, 6);
    world.run();
    assert_eq!(world.client.receive(), []);
    world.close();
}

/// A frame of ours over several pages.
fn big_frame(world: &mut World, len: usize) -> Frame {
    let mut frame = Frame::new();
    for chunk in pattern(len, 8).chunks(4096) {
        let mut page = world.router.hv.allocate().unwrap();
        page[..chunk.len()].copy_from_slice(chunk);
        frame.push(page, 0, chunk.len() as u16).unwrap();
    }
    frame
}

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
    let mut lent = Some(lent);
    world.machine.before_copy(ROUTER, move || {
        if let Some(lent) = lent.take() {
            let page = client.revoke(lent).unwrap();
            client.release(page);
        }
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
fn b14_unusable_ring_references_refuse_the_connection() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let read_only = client.grant_page(Access::ReadOnly);
    let good = client.parameters(VifTag(0));
    for (gref, expected) in [
        (read_only.gref(), GrantStatus::PERMISSION_DENIED),
        (GrantRef(u32::MAX), GrantStatus::BAD_GNTREF),
        (GrantRef(0), GrantStatus::BAD_GNTREF),
    ] {
        for ring in [Ring::Tx, Ring::Rx] {
            let mut parameters = good;
            match ring {
                Ring::Tx => parameters.tx_ref = gref,
                Ring::Rx => parameters.rx_ref = gref,
            }
            let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
            assert_eq!(
                error,
                ConnectError::Map {
                    ring,
                    status: expected
                }
            );
            assert_nothing_left(&machine, ROUTER);
        }
    }
    client.take_back(read_only);
    client.close();
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

#[test]
fn b18_unusable_rx_buffers_cost_only_their_frame() {
    let mut world = World::new();
    let read_only = world.client.grant_page(Access::ReadOnly);
    let gref = read_only.gref();
    world.client.post_buffer(1, gref, read_only);
    let page = world.client.grant_page(Access::ReadWrite);
    world.client.post_buffer(2, GrantRef(u32::MAX), page);
    world.client.post(1);
    for seed in 0..3 {
        world.netvm.put_frame(&[(0, pattern(100, seed))], 0, None);
    }
    world.netvm.publish();
    world.run();
    let received = world.client.receive();
    assert_eq!(
        received
            .iter()
            .map(|frame| frame.failed)
            .collect::<Vec<_>>(),
        [true, true, false]
    );
    assert_eq!(received[2].bytes, pattern(100, 2));
    assert_eq!(world.router.vif().counters().send_copy_failed, 2);
    assert_eq!(world.router.client_errors, []);
    world.close();
}

#[test]
fn b18_a_bad_buffer_in_the_middle_spoils_the_frame_and_not_the_chain() {
    let mut world = World::new();
    world.client.post(1);
    let page = world.client.grant_page(Access::ReadWrite);
    world.client.post_buffer(9, GrantRef(u32::MAX), page);
    world.client.post(2);
    world.netvm.deliver(&pattern(12_000, 1));
    world.netvm.deliver(&pattern(100, 2));
    world.run();
    let received = world.client.receive();
    assert!(received[0].failed);
    assert_eq!(received[0].slots, 3);
    assert_eq!(received[1].bytes, pattern(100, 2));
    world.close();
}

#[test]
fn b18_a_page_unmapped_midway_is_a_failed_slot() {
    let mut world = World::new();
    world.client.post(3);
    world.netvm.deliver(&pattern(100, 1));
    world
        .machine
        .fail(ROUTER, Operation::Copy(GrantStatus::GENERAL_ERROR), 0);
    world.run();
    assert!(world.client.receive()[0].failed);
    world.close();
}

#[test]
fn b19_a_client_without_buffers_holds_a_bounded_queue() {
    let mut world = World::new();
    let before = world.machine.resources(ROUTER).pages;
    for seed in 0..500 {
        world.netvm.deliver(&pattern(1000, seed));
        world.run();
    }
    let vif = world.router.vif();
    assert_eq!(vif.queued_frames(), netback::QUEUE_FRAMES);
    assert_eq!(vif.counters().send_drops.queue_full, 500 - 64);
    let held = world.machine.resources(ROUTER).pages - before;
    assert!(held <= netback::QUEUE_PAGES, "{held} pages");
    // They expire after a second.
    world.machine.advance(Duration::from_secs(1));
    world.router.hv.wait(&[], None);
    world.run();
    assert_eq!(world.router.vif().queued_frames(), 0);
    assert_eq!(world.router.vif().counters().send_drops.expired, 64);
    assert_eq!(world.machine.resources(ROUTER).pages, before);
    world.close();
}

#[test]
fn b19_large_frames_are_bounded_by_their_pages() {
    let mut world = World::new();
    for seed in 0..10 {
        world.netvm.deliver(&pattern(65_000, seed));
        world.run();
    }
    assert_eq!(
        world.router.vif().queued_frames(),
        4,
        "four of 16 pages each"
    );
    world.client.post(250);
    world.run();
    let received = world.client.receive();
    assert_eq!(received.len(), 4);
    assert_eq!(received[3].bytes, pattern(65_000, 3));
    world.close();
}

#[test]
fn b19_a_stalled_client_holds_no_memory_and_recovers() {
    let mut world = World::new();
    for second in 0..11 {
        world.netvm.deliver(&pattern(1000, second));
        world.run();
        world.machine.advance(Duration::from_secs(1));
        world.router.hv.wait(&[], None);
    }
    assert!(world.router.vif().is_stalled());
    assert_eq!(world.router.vif().counters().stalls, 1);
    assert_eq!(world.router.vif().queued_frames(), 0);
    world.netvm.deliver(&pattern(1000, 98));
    world.run();
    // One that waited, the one that showed the stall, and this one.
    assert_eq!(world.router.vif().counters().send_drops.stalled, 3);
    world.client.post(4);
    world.netvm.deliver(&pattern(1000, 99));
    world.run();
    assert_eq!(world.client.receive()[0].bytes, pattern(1000, 99));
    assert!(!world.router.vif().is_stalled());
    world.close();
}

/// One slot at a time never fits a frame of two; the frame expires, and frames of one slot go on.
#[test]
fn b20_one_rx_slot_at_a_time_stalls_only_itself() {
    let mut world = World::new();
    world.client.post(1);
    world.netvm.deliver(&pattern(5000, 1));
    world.netvm.deliver(&pattern(100, 2));
    world.run();
    assert_eq!(world.client.receive(), []);
    assert_eq!(world.router.vif().queued_frames(), 2);
    let deadline = world.router.vif().deadline().unwrap();
    assert_eq!(deadline.since(world.machine.now()), netback::QUEUE_EXPIRY);
    world.machine.advance(Duration::from_secs(1));
    world.router.hv.wait(&[], None);
    world.netvm.deliver(&pattern(100, 3));
    world.run();
    let received = world.client.receive();
    assert_eq!(received.len(), 1);
    assert_eq!(
        received[0].bytes,
        pattern(100, 3),
        "what waited behind it expired with it"
    );
    assert_eq!(world.router.vif().counters().send_drops.expired, 2);
    world.close();
}

/// An event without ring work costs a look at two indices: no hypercall, no answer, no event back.
#[test]
fn b21_events_without_work_cost_nothing_but_a_look() {
    let mut world = World::new();
    world.run();
    let port = world.client.parameters(VifTag(0)).event_channel;
    let before = world.router.hv.counters();
    for _ in 0..1000 {
        world.client.hv.notify(&[port]);
        world.router.iterate(straight);
    }
    let after = world.router.hv.counters();
    assert_eq!(after.hypercalls, before.hypercalls);
    assert!(after.events_received <= before.events_received + 1000);
    world.close();
}

#[test]
fn b22_one_page_for_both_rings_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let mut parameters = client.parameters(VifTag(0));
    parameters.rx_ref = parameters.tx_ref;
    let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
    assert_eq!(error, ConnectError::SameRing);
    assert_nothing_left(&machine, ROUTER);
    client.close();
}

#[test]
fn b22_an_event_channel_that_is_not_ours_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    router.connect_client(&client);
    let connected = machine.resources(ROUTER);
    let mut fresh = Client::new(&machine, SECOND, ROUTER);
    let not_for_us = fresh.hv.allocate_port(NETVM).unwrap();
    let in_use = client.parameters(VifTag(0)).event_channel;
    for port in [
        PortNumber(0),
        PortNumber(999),
        PortNumber(u32::MAX),
        not_for_us.number(),
    ] {
        let mut parameters = fresh.parameters(VifTag(1));
        parameters.event_channel = port;
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, ConnectError::Bind(Errno::EINVAL));
        assert_eq!(machine.resources(ROUTER), connected);
    }
    // The port of a vif that is connected already.
    let mut parameters = client.parameters(VifTag(1));
    parameters.event_channel = in_use;
    let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
    assert_eq!(error, ConnectError::Bind(Errno::EINVAL));
    assert_eq!(machine.resources(ROUTER), connected);
    fresh.hv.close_port(not_for_us);
    router.close();
    fresh.close();
    client.transmit(&pattern(60, 1));
    client.close();
}

#[test]
fn b26_every_failing_connect_step_is_undone_exactly() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let parameters = client.parameters(VifTag(0));
    let failed = GrantStatus::GENERAL_ERROR;
    for (operation, skip, expected) in [
        (
            Operation::Map,
            0,
            ConnectError::Map {
                ring: Ring::Tx,
                status: failed,
            },
        ),
        (
            Operation::Map,
            1,
            ConnectError::Map {
                ring: Ring::Rx,
                status: failed,
            },
        ),
        (Operation::BindPort, 0, ConnectError::Bind(Errno::EINVAL)),
    ] {
        machine.fail(ROUTER, operation, skip);
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, expected);
        assert_nothing_left(&machine, ROUTER);
    }
    for (page, ring) in [(client.tx_ring(), Ring::Tx), (client.rx_ring(), Ring::Rx)] {
        page.shared().write_u32(REQ_PROD, 300);
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, ConnectError::Indices { ring });
        assert_nothing_left(&machine, ROUTER);
        page.shared().write_u32(REQ_PROD, 0);
    }
    let vif = Vif::connect(&mut router.hv, &parameters).unwrap();
    vif.disconnect(&mut router.hv);
    assert_nothing_left(&machine, ROUTER);
    client.close();
    assert_nothing_left(&machine, FIRST_CLIENT);
}

#[test]
fn b25_many_connections_leave_nothing() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let rounds = if cfg!(miri) { 20 } else { 10_000 };
    for round in 0..rounds {
        let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
        router.connect_client(&client);
        client.put_frame(&[piece(pattern(60, round))], 0, None);
        if round % 3 == 0 {
            client.publish();
            router.iterate(|_, _| None);
        }
        router
            .vifs
            .pop()
            .unwrap()
            .unwrap()
            .disconnect(&mut router.hv);
        client.close();
        router.vifs.clear();
    }
    router.close();
    assert_nothing_left(&machine, ROUTER);
    assert_nothing_left(&machine, FIRST_CLIENT);
}

/// A frontend that worked with another backend before us leaves indices that are not zero.
#[test]
fn attach_continues_after_the_last_response() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let start = u32::MAX - 2;
    for at in [REQ_PROD, RSP_PROD] {
        client.tx_ring().shared().write_u32(at, start);
    }
    (client.tx_prod, client.tx_cons) = (start, start);
    for seed in 0..5 {
        client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    client.publish();
    router.connect_client(&client);
    let mut seen = 0;
    router.run(|_, _| {
        seen += 1;
        None
    });
    assert_eq!(seen, 5, "across the wrap of the indices");
    assert_eq!(client.take_statuses(), [0; 5]);
    router.close();
    client.close();
}

#[test]
fn b28_indices_of_ours_that_the_client_overwrites_are_not_read_back() {
    let mut world = World::new();
    world.client.post(20);
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    for seed in 0..100 {
        for ring in [world.client.tx_ring(), world.client.rx_ring()] {
            ring.shared().write_u32(RSP_PROD, random());
            ring.shared().write_u32(REQ_EVENT, random());
            ring.shared().write_u32(RSP_EVENT, random());
        }
        world.client.put_frame(&[piece(pattern(60, seed))], 0, None);
        world.client.publish();
        world.netvm.deliver(&pattern(64, seed));
        world.run();
        assert_eq!(world.netvm.take().len(), 1);
        world.netvm.answer_all();
        // Our private index decides where responses go and what is published.
        assert_eq!(world.client.take_statuses(), [0]);
        assert_eq!(world.client.receive()[0].bytes, pattern(64, seed));
        world.client.post(1);
    }
    assert_eq!(world.router.client_errors, []);
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
fn b30_a_client_without_rx_copy_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    client.features.rx_copy = false;
    let error = Vif::connect(&mut router.hv, &client.parameters(VifTag(0))).unwrap_err();
    assert_eq!(error, ConnectError::NoRxCopy);
    assert_nothing_left(&machine, ROUTER);
    client.close();
}

#[test]
fn b30_a_client_that_does_not_notify_is_polled() {
    let quiet = FrontendFeatures {
        rx_notify: false,
        ..LINUX
    };
    let mut world = World::with(quiet, tests::router::LINUX);
    world.netvm.deliver(&pattern(100, 1));
    world.run();
    let deadline = world.router.vif().deadline().unwrap();
    assert_eq!(
        deadline.since(world.machine.now()),
        netback::RX_POLL_INTERVAL
    );
    world.client.post(1);
    world.machine.advance(netback::RX_POLL_INTERVAL);
    world.router.hv.wait(&[], None);
    world.run();
    assert_eq!(world.client.receive()[0].bytes, pattern(100, 1));
    assert_eq!(world.router.vif().deadline(), None);
    world.close();
}

#[test]
fn b30_a_frame_of_many_slots_for_a_client_without_sg_is_dropped() {
    let plain = FrontendFeatures { sg: false, ..LINUX };
    let mut world = World::with(plain, tests::router::LINUX);
    world.client.post(10);
    world.netvm.deliver(&pattern(9000, 1));
    world.netvm.deliver(&pattern(4096, 2));
    world.run();
    let received = world.client.receive();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].bytes, pattern(4096, 2));
    assert_eq!(
        world.router.vif().counters().send_drops.no_scatter_gather,
        1
    );
    world.close();
}

#[test]
fn b30_gso_for_a_client_without_it_is_refused_by_family() {
    let only_v4 = FrontendFeatures {
        gso_tcpv6: false,
        ..LINUX
    };
    let mut world = World::with(only_v4, tests::router::LINUX);
    world.client.post(10);
    world.netvm.put_frame(
        &[(0, pattern(3000, 1))],
        RxFlags::CSUM_BLANK,
        Some((1400, GsoType::TcpV6)),
    );
    world.netvm.put_frame(
        &[(0, pattern(3000, 2))],
        RxFlags::CSUM_BLANK,
        Some((1400, GsoType::TcpV4)),
    );
    world.netvm.publish();
    world.run();
    let received = world.client.receive();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].bytes, pattern(3000, 2));
    assert_eq!(world.router.vif().counters().send_drops.no_gso, 1);
    world.close();
}

#[test]
fn b34_a_client_that_dies_with_full_rings_is_cleaned_up() {
    let mut world = World::new();
    world.client.post(100);
    for seed in 0..200 {
        world.client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    world.client.publish();
    for seed in 0..50 {
        world.netvm.put_frame(&[(0, pattern(60, seed))], 0, None);
    }
    world.netvm.publish();
    world.machine.kill(FIRST_CLIENT);
    world.run();
    assert_eq!(
        world.netvm.take(),
        [],
        "nothing can be copied from the dead"
    );
    assert!(world.router.vif().counters().receive_errors.copy_failed > 0);
    world.close();
}

#[test]
fn b36_multicast_requests_are_answered_and_never_forwarded() {
    for kind in [2, 3] {
        let mut world = World::new();
        refused(
            &mut world,
            |client| put_extras(client, &[extra(kind, false)]),
            &[status::ERROR],
        );
        assert_eq!(world.router.vif().counters().receive_errors.multicast, 1);
        world.close();
    }
}

#[test]
fn b36_a_hash_extra_is_ignored_and_its_frame_goes_on_without_it() {
    let mut world = World::new();
    let mut page = world.client.hv.allocate().unwrap();
    page[..100].copy_from_slice(&pattern(100, 1));
    let lent = world
        .client
        .hv
        .grant(ROUTER, page, Access::ReadOnly)
        .unwrap();
    world
        .client
        .put_request(request(lent.gref().0, 0, 100, TxFlags::EXTRA_INFO));
    world.client.put_extra(extra(4, false));
    world.client.publish();
    world.run();
    let taken = world.netvm.take();
    assert_eq!(taken[0].bytes, pattern(100, 1));
    assert!(!taken[0].flags.has(TxFlags::EXTRA_INFO));
    assert_eq!(world.client.take_statuses(), [0]);
    world.client.take_back(lent);
    world.close();
}

#[test]
fn b37_a_frame_longer_than_the_mtu_without_gso_is_dropped() {
    for (len, status) in [
        (1518, status::OKAY),
        (1519, status::DROPPED),
        (4096, status::DROPPED),
    ] {
        let mut world = World::new();
        world.client.transmit(&pattern(len, 1));
        world.run();
        assert_eq!(world.client.take_statuses(), [status]);
        assert_eq!(world.netvm.take().len(), usize::from(status == 0));
        world.close();
    }
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

#[test]
fn b42_rx_ids_are_echoed_whatever_they_are() {
    let mut world = World::new();
    for id in [0xffff, 0xffff, 0, 7, 0x8000] {
        let page = world.client.grant_page(Access::ReadWrite);
        let gref = page.gref();
        world.client.post_buffer(id, gref, page);
    }
    world.client.publish();
    for seed in 0..5 {
        world.netvm.put_frame(&[(0, pattern(60, seed))], 0, None);
    }
    world.netvm.publish();
    world.run();
    // The client checks each id against its slot.
    assert_eq!(world.client.receive().len(), 5);
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
    assert_eq!(world.client.take_statuses(), []);
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

#[test]
fn gso_without_the_blank_flag_is_repaired() {
    let mut world = World::new();
    world
        .client
        .put_frame(&[piece(pattern(3000, 1))], 0, Some((1448, GsoType::TcpV4)));
    world.client.publish();
    world.run();
    let taken = world.netvm.take();
    assert_eq!(
        taken[0].flags.0 & 3,
        TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED
    );
    assert_eq!(world.router.vif().counters().gso_without_blank, 1);
    world.close();
}

#[test]
fn extras_are_encoded_as_the_client_helper_says() {
    assert_eq!(
        gso(1448, 1, false)[..2],
        Extra::encode_gso(1448, GsoType::TcpV4)
    );
}
