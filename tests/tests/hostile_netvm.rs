//! The adversarial frontend tests of `xen-netif.md` 9.4 that concern the data path; each is named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use std::time::Duration;

use netfront::{
    BackendFeatures, ConnectError, DeviceBroken, Quarantine, TxError, Uplink, UplinkParameters,
};
use tests::client::Piece;
use tests::frames::{cut, pattern};
use tests::netvm::Netvm;
use tests::raw::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use tests::router::{LINUX, NETVM, ROUTER, Router, World, assert_nothing_left, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::{Extra, GsoType, RxFlags, RxResponse, TxFlags, TxResponse, status};
use xen::page::RingMemory;
use xen::{Checksum, DomId, Errno, Frame, Hypervisor};

fn response(id: u16, offset: u16, flags: u16, status: i16) -> [u32; 2] {
    RxResponse {
        id,
        offset,
        flags: RxFlags(flags),
        status,
    }
    .encode()
}

/// A bare response to the next buffer, whatever it says.
fn put(netvm: &mut Netvm, offset: u16, flags: u16, status: i16) {
    let buffer = netvm.take_buffer();
    netvm.put_rx_words(response(buffer.id, offset, flags, status));
}

/// Runs the router and returns why the uplink was given up, after checking that a new one works.
fn broken(mut world: World) -> DeviceBroken {
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
fn dropped(world: &mut World, put: impl FnOnce(&mut Netvm)) {
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

#[test]
fn f1_impossible_tx_response_index_breaks_the_device() {
    for produced in [1u32, 256, 1000, 1 << 31, u32::MAX] {
        let world = World::new();
        world.netvm.tx_ring().shared().write_u32(RSP_PROD, produced);
        assert_eq!(broken(world), DeviceBroken::TxProducer);
    }
}

#[test]
fn f1_impossible_rx_response_index_breaks_the_device() {
    for produced in [129u32, 1000, 1 << 31, u32::MAX] {
        let world = World::new();
        world.netvm.rx_ring().shared().write_u32(RSP_PROD, produced);
        assert_eq!(broken(world), DeviceBroken::RxProducer);
    }
}

#[test]
fn f1_rx_response_index_going_backwards_breaks_the_device() {
    let mut world = World::new();
    for seed in 0..3 {
        world.netvm.deliver(&pattern(60, seed));
    }
    world.run();
    world.netvm.rx_ring().shared().write_u32(RSP_PROD, 1);
    assert_eq!(broken(world), DeviceBroken::RxProducer);
}

/// Sends one frame, so that ids have been issued, and lets the netvm answer with `ids`.
fn answered_with(frames: usize, ids: &[u16]) -> World {
    let mut world = World::new();
    for seed in 0..frames {
        world.client.transmit(&pattern(60, seed as u32));
    }
    world.run();
    world.netvm.take();
    for id in ids {
        world.netvm.put_tx_response(TxResponse {
            id: *id,
            status: status::OKAY,
        });
    }
    world.netvm.publish();
    world
}

#[test]
fn f2_tx_response_ids_that_are_not_in_flight_break_the_device() {
    for id in [256, 1000, 0xffff, 200] {
        assert_eq!(broken(answered_with(1, &[id])), DeviceBroken::TxId(id));
    }
}

#[test]
fn f2_a_tx_response_given_twice_breaks_the_device() {
    let mut world = answered_with(2, &[]);
    // Find the id of the first frame by asking for all that were issued.
    let id = 0;
    for _ in 0..2 {
        world.netvm.put_tx_response(TxResponse {
            id,
            status: status::OKAY,
        });
    }
    world.netvm.publish();
    assert_eq!(broken(world), DeviceBroken::TxId(id));
}

#[test]
fn f2_null_responses_without_extras_break_the_device() {
    let mut world = answered_with(1, &[]);
    world.netvm.put_tx_response(TxResponse {
        id: 0,
        status: status::NULL,
    });
    world.netvm.publish();
    assert_eq!(broken(world), DeviceBroken::TxExtra);
}

#[test]
fn f2_more_null_responses_than_extras_break_the_device() {
    let mut world = World::new();
    world.client.put_frame(
        &[Piece {
            offset: 0,
            bytes: pattern(3000, 1),
        }],
        TxFlags::CSUM_BLANK,
        Some((1448, GsoType::TcpV4)),
    );
    world.client.publish();
    world.run();
    world.netvm.take();
    for _ in 0..2 {
        world.netvm.put_tx_response(TxResponse {
            id: 0,
            status: status::NULL,
        });
    }
    world.netvm.publish();
    assert_eq!(broken(world), DeviceBroken::TxExtra);
}

#[test]
fn f2_error_statuses_free_the_slot_all_the_same() {
    let mut world = World::new();
    world.client.transmit(&pattern(60, 1));
    world.run();
    let taken = world.netvm.take();
    for status in [status::ERROR] {
        world.netvm.put_tx_response(TxResponse {
            id: taken[0].slots[0].id,
            status,
        });
    }
    world.netvm.publish();
    world.run();
    let uplink = world.router.uplink.as_ref().unwrap();
    assert_eq!(uplink.counters().send_errors, 1);
    assert_eq!(uplink.tx_free_slots(), 256);
    world.close();
}

/// More responses than posted buffers cannot be had without an impossible index; the slot table says the same.
#[test]
fn f3_a_response_without_a_buffer_breaks_the_device() {
    let world = World::new();
    let posted = world.netvm.buffers();
    world
        .netvm
        .rx_ring()
        .shared()
        .write_u32(RSP_PROD, posted + 1);
    assert_eq!(broken(world), DeviceBroken::RxProducer);
}

#[test]
fn f4_impossible_lengths_and_offsets_drop_the_slot() {
    let cases = [
        (0, 4097),
        (0, i16::MAX),
        (1, 4096),
        (4096, 1),
        (4083, 14),
        (65_535, 1),
        (65_535, i16::MAX),
        (0, -1),
        (0, -13),
        (0, i16::MIN),
        (0, 0),
        (65_535, 0),
    ];
    for (offset, status) in cases {
        let mut world = World::new();
        dropped(&mut world, |netvm| put(netvm, offset, 0, status));
        world.close();
    }
}

#[test]
fn f4_each_reason_is_counted() {
    let mut world = World::new();
    put(&mut world.netvm, 0, 0, -1);
    put(&mut world.netvm, 4000, 0, 97);
    put(&mut world.netvm, 0, 0, 13);
    world.netvm.publish();
    world.run();
    let drops = world
        .router
        .uplink
        .as_ref()
        .unwrap()
        .counters()
        .receive_drops;
    assert_eq!(
        (drops.status, drops.crosses_page, drops.too_short),
        (1, 1, 1)
    );
    world.close();
}

#[test]
fn f5_chains_that_are_too_long_are_consumed_whole_and_dropped() {
    for slots in [19, 40, 127] {
        let mut world = World::new();
        dropped(&mut world, |netvm| {
            for index in 0..slots {
                let more = if index + 1 < slots {
                    RxFlags::MORE_DATA
                } else {
                    0
                };
                put(netvm, 0, more, 100);
            }
        });
        let drops = world
            .router
            .uplink
            .as_ref()
            .unwrap()
            .counters()
            .receive_drops;
        assert_eq!(drops.too_long, 1);
        world.close();
    }
}

#[test]
fn f5_a_chain_of_more_than_64_kib_is_dropped() {
    let mut world = World::new();
    dropped(&mut world, |netvm| {
        for index in 0..17 {
            put(
                netvm,
                0,
                if index < 16 { RxFlags::MORE_DATA } else { 0 },
                4096,
            );
        }
    });
    world.close();
}

#[test]
fn f5_a_chain_cut_at_the_end_of_the_ring_is_dropped() {
    for slots in [1, 3, 128] {
        let mut world = World::new();
        for _ in 0..slots {
            put(&mut world.netvm, 0, RxFlags::MORE_DATA, 100);
        }
        world.netvm.publish();
        world.run();
        let drops = world
            .router
            .uplink
            .as_ref()
            .unwrap()
            .counters()
            .receive_drops;
        assert_eq!(drops.incomplete + drops.too_long, 1);
        dropped(&mut world, |_| {});
        world.close();
    }
}

fn extra(kind: u8, more: bool, size: u16, family: u8) -> [u32; 2] {
    let [low, high] = size.to_le_bytes();
    [
        u32::from_le_bytes([kind, u8::from(more), low, high]),
        family.into(),
    ]
}

/// A frame whose first slot is followed by these extras.
fn put_with_extras(netvm: &mut Netvm, extras: &[[u32; 2]]) {
    netvm.put_slot(&pattern(1000, 9), 0, RxFlags::EXTRA_INFO);
    for words in extras {
        netvm.take_buffer();
        netvm.put_rx_words(*words);
    }
}

#[test]
fn f6_malformed_extras_drop_the_frame() {
    let cases: [&[[u32; 2]]; 8] = [
        &[extra(0, false, 0, 0)],
        &[extra(6, false, 0, 0)],
        &[extra(255, false, 0, 0)],
        &[extra(1, false, 0, 1)],
        &[extra(1, false, 1448, 0)],
        &[extra(1, false, 1448, 3)],
        &[extra(1, true, 1448, 1), extra(1, false, 1448, 1)],
        &[
            extra(4, true, 0, 0),
            extra(99, true, 0, 0),
            extra(1, false, 1448, 1),
        ],
    ];
    for extras in cases {
        let mut world = World::new();
        dropped(&mut world, |netvm| put_with_extras(netvm, extras));
        let drops = world
            .router
            .uplink
            .as_ref()
            .unwrap()
            .counters()
            .receive_drops;
        assert_eq!(drops.extra, 1, "{extras:?}");
        world.close();
    }
}

#[test]
fn f6_extras_without_end_are_bounded() {
    let mut world = World::new();
    put_with_extras(&mut world.netvm, &[extra(1, true, 1448, 1); 127]);
    world.netvm.publish();
    world.run();
    let counters = world.router.uplink.as_ref().unwrap().counters();
    assert_eq!(counters.received_slots, 128);
    assert_eq!(counters.received_frames, 0);
    dropped(&mut world, |_| {});
    world.close();
}

#[test]
fn f6_the_obsolete_gso_prefix_is_dropped() {
    let mut world = World::new();
    dropped(&mut world, |netvm| {
        netvm.put_slot(&pattern(100, 1), 0, RxFlags::GSO_PREFIX);
    });
    world.close();
}

#[test]
fn f6_an_unused_buffer_behind_an_extra_is_posted_again() {
    let mut world = World::new();
    let buffers = world.netvm.buffers();
    world.client.post(250);
    for seed in 0..1000 {
        world.netvm.put_frame(
            &[(0, pattern(3000, seed))],
            RxFlags::CSUM_BLANK,
            Some((1448, GsoType::TcpV4)),
        );
        world.netvm.publish();
        world.run();
        world.client.receive();
        world.client.post(250 - world.client.posted());
    }
    assert_eq!(world.netvm.buffers(), buffers);
    world.close();
}

#[test]
fn f7_errors_in_the_middle_of_chains_leak_nothing() {
    let mut world = World::new();
    let rounds = if cfg!(miri) { 20 } else { 100_000 / 40 };
    for round in 0..rounds {
        let bad = round % 5;
        for index in 0..40 {
            let more = if index % 5 < 4 { RxFlags::MORE_DATA } else { 0 };
            let status = if index % 5 == bad { -1 } else { 50 };
            put(&mut world.netvm, 0, more, status);
        }
        world.netvm.publish();
        world.run();
    }
    assert_eq!(
        world
            .router
            .uplink
            .as_ref()
            .unwrap()
            .counters()
            .receive_drops
            .status,
        rounds as u64 * 8
    );
    dropped(&mut world, |_| {});
    world.close();
}

#[test]
fn f8_a_tx_page_held_after_its_answer_is_not_used_again() {
    let mut world = World::new();
    world.client.transmit(&pattern(100, 1));
    world.run();
    let taken = world.netvm.take();
    let gref = taken[0].slots[0].gref;
    assert!(world.machine.hold(ROUTER, gref, true));
    let before = world.machine.resources(ROUTER);
    world.netvm.answer_all();
    world.run();
    let counters = *world.router.uplink.as_ref().unwrap().counters();
    assert_eq!(counters.held_grants, 1);
    assert_eq!(
        world.machine.resources(ROUTER),
        before,
        "page and reference are put aside"
    );
    assert_eq!(
        world.router.uplink_error, None,
        "once is no reason to give the device up"
    );
    world.machine.hold(ROUTER, gref, false);
    world.close();
}

#[test]
fn f8_an_rx_buffer_held_after_its_response_drops_the_frame() {
    let mut world = World::new();
    let buffer = world.netvm.put_slot(&pattern(100, 1), 0, 0);
    world.netvm.publish();
    world.machine.hold(ROUTER, buffer.gref, true);
    world.client.post(1);
    world.run();
    assert_eq!(world.client.receive(), []);
    let counters = *world.router.uplink.as_ref().unwrap().counters();
    assert_eq!((counters.receive_drops.held, counters.held_grants), (1, 1));
    world.machine.hold(ROUTER, buffer.gref, false);
    world.close();
}

#[test]
fn f8_too_many_held_pages_reset_the_device_and_keep_the_pages() {
    let mut world = World::new();
    for seed in 0..20 {
        world.client.transmit(&pattern(100, seed));
    }
    world.run();
    world.netvm.take();
    world.machine.hold_all(ROUTER, true);
    world.netvm.answer_all();
    world.run();
    assert_eq!(world.router.uplink_error, Some(DeviceBroken::HeldGrants));
    // 20 tx pages, 128 buffers, 2 rings.
    assert_eq!(world.router.quarantine.len(), 150);
    let held = world.machine.resources(ROUTER);
    assert_eq!((held.pages, held.grants), (150, 150));
    assert_eq!(world.router.quarantine.sweep(&mut world.router.hv), 150);
    world.netvm.close();
    world.machine.hold_all(ROUTER, false);
    assert_eq!(world.router.quarantine.sweep(&mut world.router.hv), 0);
    world.router.close();
    assert_nothing_left(&world.machine, ROUTER);
}

/// The netvm dumps every page it can see while clients send secrets of different lengths.
#[test]
fn f9_the_netvm_sees_frame_bytes_and_zeros_only() {
    let mut world = World::new();
    world.client.post(100);
    let lens = [1514, 60, 700, 1400, 61, 1514, 14, 90];
    for round in 0..40 {
        let len = lens[round % lens.len()];
        let offset = (round * 37 % 2000) as u16;
        world.client.put_frame(
            &[Piece {
                offset,
                bytes: pattern(len, round as u32),
            }],
            0,
            None,
        );
        if round % 5 == 0 {
            let frame = pattern(10_000, round as u32);
            let pieces: Vec<Piece> = cut(&frame, &[3000, 4000])
                .into_iter()
                .map(|bytes| Piece { offset: 3, bytes })
                .collect();
            world
                .client
                .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV4)));
        }
        world.client.publish();
        world.netvm.deliver(&pattern(len, 1000 + round as u32));
        // The firewall rewrites headers of what it forwards, which the netvm must not see in its buffers.
        world.router.run(|from, frame| {
            frame.header_mut(40).fill(0xee);
            straight(from, frame)
        });
        for taken in world.netvm.take() {
            for slot in &taken.slots {
                let page = world.netvm.dump(slot.gref);
                let (start, end) = (
                    usize::from(slot.offset),
                    usize::from(slot.offset + slot.size),
                );
                assert!(page[..start].iter().all(|byte| *byte == 0));
                assert!(page[end..].iter().all(|byte| *byte == 0), "round {round}");
            }
        }
        world.netvm.answer_all();
        world.client.receive();
        world.client.post(100 - world.client.posted());
        world.client.reap();
    }
    world.close();
}

#[test]
fn f9_posted_buffers_hold_nothing_of_others() {
    let mut world = World::new();
    world.client.post(200);
    // Pages that carried clients' frames become buffers, and buffers carry rewritten headers.
    for round in 0..30 {
        for seed in 0..10 {
            world.client.put_frame(
                &[Piece {
                    offset: 0,
                    bytes: pattern(1514, seed),
                }],
                0,
                None,
            );
            world.netvm.put_frame(&[(0, vec![0x11; 1000])], 0, None);
        }
        world.client.publish();
        world.netvm.publish();
        world.router.run(|from, frame| {
            frame.header_mut(54).fill(0xee);
            straight(from, frame)
        });
        world.netvm.take();
        world.netvm.answer_all();
        world.client.receive();
        world.client.post(200 - world.client.posted());
        world.client.reap();
        if round % 10 == 9 {
            for _ in 0..world.netvm.buffers() {
                let buffer = world.netvm.take_buffer();
                let page = world.netvm.dump(buffer.gref);
                // Its own frames' bytes it may see again.
                assert!(page.iter().all(|byte| [0, 0x11].contains(byte)));
                world.netvm.put_rx_words(response(buffer.id, 0, 0, -1));
            }
            world.netvm.publish();
            world.run();
        }
    }
    world.close();
}

#[test]
fn f10_short_frames_are_dropped() {
    for len in 1..14 {
        let mut world = World::new();
        dropped(&mut world, |netvm| {
            netvm.put_slot(&pattern(14, 1)[..len], 0, 0);
        });
        world.close();
    }
}

#[test]
fn f10_a_header_split_over_slots_is_linear_afterwards() {
    for lens in [
        vec![1, 1, 1],
        vec![13, 7, 300],
        vec![100, 1, 1, 1, 50],
        vec![3; 17],
    ] {
        let mut world = World::new();
        world.client.post(1);
        let frame = pattern(900, 5);
        let pieces: Vec<(u16, Vec<u8>)> = cut(&frame, &lens)
            .into_iter()
            .map(|bytes| (4096 - bytes.len() as u16, bytes))
            .collect();
        world.netvm.put_frame(&pieces, 0, None);
        world.netvm.publish();
        let mut linear = Vec::new();
        world.router.run(|from, frame| {
            linear.push(frame.header().to_vec());
            straight(from, frame)
        });
        assert!(linear[0].len() >= 256);
        assert_eq!(linear[0], frame[..linear[0].len()]);
        assert_eq!(world.client.receive()[0].bytes, frame);
        world.close();
    }
}

#[test]
fn f11_a_netvm_that_writes_after_its_response_changes_nothing() {
    let mut world = World::new();
    world.client.post(1);
    let buffer = world.netvm.put_slot(&pattern(100, 1), 0, 0);
    world.netvm.publish();
    let netvm = &mut world.netvm;
    let mut denied = None;
    world.router.run(|from, frame| {
        denied = Some(netvm.scribble(buffer.gref, 0xff));
        straight(from, frame)
    });
    assert!(
        !denied.unwrap().is_ok(),
        "the grant is gone before the frame is looked at"
    );
    assert_eq!(world.client.receive()[0].bytes, pattern(100, 1));
    world.close();
}

#[test]
fn f11_transmitted_pages_are_read_only() {
    let mut world = World::new();
    world.client.transmit(&pattern(100, 1));
    world.run();
    let taken = world.netvm.take();
    assert!(!world.netvm.scribble(taken[0].slots[0].gref, 0xff).is_ok());
    world.close();
}

#[test]
fn f12_gso_without_the_blank_flag_is_repaired() {
    let mut world = World::new();
    world.client.post(2);
    world
        .netvm
        .put_frame(&[(0, pattern(3000, 1))], 0, Some((1448, GsoType::TcpV4)));
    world.netvm.publish();
    let mut seen = None;
    world.router.run(|from, frame| {
        seen = Some((frame.checksum, frame.gso.unwrap().size.get()));
        straight(from, frame)
    });
    assert_eq!(seen, Some((Checksum::Blank, 1448)));
    assert_eq!(
        world.client.receive()[0].flags.0 & 3,
        RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED
    );
    world.close();
}

#[test]
fn f13_events_without_work_cost_no_hypercall() {
    let mut world = World::new();
    world.run();
    let before = world.router.hv.counters();
    for _ in 0..1000 {
        world.netvm.publish();
        world.router.iterate(straight);
    }
    assert_eq!(world.router.hv.counters().hypercalls, before.hypercalls);
    world.close();
}

#[test]
fn f14_a_netvm_that_never_answers_fills_the_ring_and_no_more() {
    let mut world = World::new();
    let mut frame = Frame::new();
    let mut refused = 0;
    for seed in 0..1000 {
        assert!(frame.fill(&mut world.router.hv, &pattern(100, seed)));
        let uplink = world.router.uplink.as_mut().unwrap();
        if let Err(error) = uplink.send(&mut world.router.hv, &mut frame) {
            assert_eq!(error, TxError::Full);
            assert!(!frame.is_empty(), "the caller decides what becomes of it");
            refused += 1;
        }
    }
    assert_eq!(refused, 1000 - 256);
    frame.release(&mut world.router.hv);
    let uplink = world.router.uplink.as_ref().unwrap();
    assert_eq!(uplink.counters().send_full, 744);
    assert_eq!(uplink.tx_free_slots(), 0);
    // Looking for answers gets rarer.
    let mut looks = 0;
    let end = world.machine.now().plus(Duration::from_secs(10));
    while world.router.hv.now() < end {
        let uplink = world.router.uplink.as_mut().unwrap();
        let deadline = uplink.deadline().unwrap();
        world.machine.advance(deadline.since(world.router.hv.now()));
        world.router.hv.wait(&[], None);
        assert_eq!(uplink.reclaim(&mut world.router.hv), Ok(0));
        looks += 1;
    }
    assert!((8..30).contains(&looks), "{looks}");
    // The other direction works.
    world.client.post(1);
    world.netvm.deliver(&pattern(70, 1));
    world.run();
    assert_eq!(world.client.receive().len(), 1);
    world.close();
}

#[test]
fn f14_a_full_ring_wakes_us_when_a_frame_fits_again() {
    let mut world = World::new();
    let mut frame = Frame::new();
    for seed in 0..257 {
        frame.fill(&mut world.router.hv, &pattern(100, seed));
        let uplink = world.router.uplink.as_mut().unwrap();
        let _ = uplink.send(&mut world.router.hv, &mut frame);
    }
    frame.release(&mut world.router.hv);
    world.run();
    let port = world.router.uplink.as_ref().unwrap().port();
    world.router.hv.take_pending(port);
    world.netvm.take();
    world.netvm.answer(netfront::TX_RESUME_SLOTS - 1);
    assert!(!world.router.hv.take_pending(port));
    world.netvm.answer(1);
    assert!(world.router.hv.take_pending(port));
    world.close();
}

#[test]
fn f17_another_netvm_gets_other_pages_and_sees_nothing_of_the_first() {
    let mut world = World::new();
    world.client.post(100);
    for seed in 0..10 {
        world.client.transmit(&pattern(1000, seed));
        world.netvm.deliver(&vec![0x22; 1200]);
    }
    world.run();
    world.netvm.take();
    // The first netvm still holds everything when it is replaced.
    world.machine.hold_all(ROUTER, true);
    world.router.disconnect_uplink();
    let held = world.router.quarantine.len();
    assert_eq!(held, 10 + 128 + 2);
    let second = DomId(3);
    let mut next = world
        .router
        .connect_uplink_to(&world.machine, second, LINUX);
    assert_eq!(world.router.quarantine.sweep(&mut world.router.hv), held);
    for _ in 0..next.buffers() {
        let buffer = next.take_buffer();
        let page = next.dump(buffer.gref);
        assert!(
            page.iter().all(|byte| *byte == 0),
            "a buffer shows the first netvm's data"
        );
    }
    world.netvm.close();
    world.machine.hold_all(ROUTER, false);
    world.router.quarantine.sweep(&mut world.router.hv);
    assert!(world.router.quarantine.is_empty());
    // Pages that the first netvm wrote come out of the pool now.
    for seed in 0..100 {
        world.client.transmit(&pattern(60, seed));
    }
    world.router.run(straight);
    for taken in next.take() {
        let page = next.dump(taken.slots[0].gref);
        assert!(
            page[60..].iter().all(|byte| *byte == 0),
            "a page shows the first netvm's data"
        );
    }
    next.close();
    world.router.close();
    world.client.close();
    assert_nothing_left(&world.machine, ROUTER);
    assert_nothing_left(&world.machine, second);
}

/// Nothing was held, so the first netvm's pages are in the pool at once when the second comes.
#[test]
fn f17_pages_that_a_netvm_wrote_are_cleared_for_the_next() {
    let mut world = World::new();
    for _ in 0..100 {
        world.netvm.deliver(&vec![0x22; 1200]);
    }
    let mut frame = Frame::new();
    let uplink = world.router.uplink.as_mut().unwrap();
    while uplink.receive(&mut world.router.hv, &mut frame).unwrap() {
        frame.release(&mut world.router.hv);
    }
    world.router.disconnect_uplink();
    world.netvm.close();
    world.router.quarantine.sweep(&mut world.router.hv);
    let second = DomId(3);
    let mut next = world
        .router
        .connect_uplink_to(&world.machine, second, LINUX);
    for _ in 0..next.buffers() {
        let buffer = next.take_buffer();
        let page = next.dump(buffer.gref);
        assert!(page.iter().all(|byte| *byte == 0));
    }
    next.close();
    world.router.close();
    assert_nothing_left(&world.machine, ROUTER);
}

#[test]
fn f18_a_netvm_that_restarts_often_takes_nothing_along() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    for round in 0..100u16 {
        let id = DomId(100 + round);
        let mut netvm = router.connect_uplink_to(&machine, id, LINUX);
        let mut frame = Frame::new();
        for seed in 0..50 {
            frame.fill(&mut router.hv, &pattern(500, seed));
            router
                .uplink
                .as_mut()
                .unwrap()
                .send(&mut router.hv, &mut frame)
                .unwrap();
            netvm.put_frame(&[(0, pattern(100, seed))], 0, None);
        }
        netvm.publish();
        router.iterate(straight);
        machine.kill(id);
        router.disconnect_uplink();
        // The rings stay busy until the netvm's remains are gone.
        assert_eq!(router.quarantine.len(), 2);
        netvm.close();
        assert_eq!(router.quarantine.sweep(&mut router.hv), 0);
    }
    router.close();
    assert_nothing_left(&machine, ROUTER);
}

#[test]
fn f19_event_indices_of_the_netvm_cost_one_notification_an_iteration() {
    let mut world = World::new();
    world.client.post(64);
    world.run();
    let before = world.router.hv.counters();
    let mut state = 7u32;
    for round in 0..50 {
        for seed in 0..4 {
            world.client.put_frame(
                &[Piece {
                    offset: 0,
                    bytes: pattern(60, seed),
                }],
                0,
                None,
            );
        }
        world.client.publish();
        for ring in [world.netvm.tx_ring(), world.netvm.rx_ring()] {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let asked = if round % 2 == 0 {
                state
            } else {
                ring.shared().read_u32(REQ_PROD) + 1
            };
            ring.shared().write_u32(REQ_EVENT, asked);
            ring.shared().write_u32(RSP_EVENT, state);
        }
        world.router.iterate(straight);
        world.client.reap();
        world.netvm.take();
        world.netvm.answer_all();
    }
    let sent = world.router.hv.counters().events_sent - before.events_sent;
    // At most one to the netvm and one to the client each time.
    assert!(sent <= 100, "{sent}");
    world.close();
}

#[test]
fn a_failing_connect_is_undone_exactly() {
    let machine = FakeMachine::new();
    let mut hv = machine.domain(ROUTER);
    let parameters = UplinkParameters {
        backend: NETVM,
        features: LINUX,
        rx_buffers: 64,
    };
    for (operation, skip, expected) in [
        (
            Operation::AllocatePort,
            0,
            ConnectError::Port(Errno::ENOSPC),
        ),
        (Operation::Allocate, 0, ConnectError::NoPages),
        (Operation::Allocate, 1, ConnectError::NoPages),
        (Operation::Grant, 0, ConnectError::NoGrants),
        (Operation::Grant, 1, ConnectError::NoGrants),
    ] {
        machine.fail(ROUTER, operation, skip);
        assert_eq!(Uplink::connect(&mut hv, &parameters).unwrap_err(), expected);
        assert_nothing_left(&machine, ROUTER);
    }
    let features = BackendFeatures {
        rx_copy: false,
        ..LINUX
    };
    let parameters = UplinkParameters {
        features,
        ..parameters
    };
    assert_eq!(
        Uplink::connect(&mut hv, &parameters).unwrap_err(),
        ConnectError::NoRxCopy
    );
    assert_nothing_left(&machine, ROUTER);
}

#[test]
fn buffers_are_posted_later_when_there_are_no_pages_or_grants() {
    for operation in [Operation::Allocate, Operation::Grant] {
        let machine = FakeMachine::new();
        let mut hv = machine.domain(ROUTER);
        let parameters = UplinkParameters {
            backend: NETVM,
            features: LINUX,
            rx_buffers: 256,
        };
        machine.fail(ROUTER, operation, 12);
        let mut uplink = Uplink::connect(&mut hv, &parameters).unwrap();
        assert_eq!(uplink.counters().refill_short, 1);
        assert_eq!(uplink.refill(&mut hv), 246);
        let mut quarantine = Quarantine::new();
        uplink.disconnect(&mut hv, &mut quarantine);
        assert!(quarantine.is_empty());
        assert_nothing_left(&machine, ROUTER);
    }
}

/// A grant fails in the middle of a frame: nothing of it was written, and nothing is lost.
#[test]
fn a_frame_without_enough_grants_is_dropped_whole() {
    for skip in 0..15 {
        let mut world = World::new();
        let frame = pattern(60_000, 1);
        let pieces: Vec<Piece> = cut(&frame, &[4096; 15])
            .into_iter()
            .map(|bytes| Piece { offset: 0, bytes })
            .collect();
        world
            .client
            .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV4)));
        world.client.transmit(&pattern(60, 2));
        world.machine.fail(ROUTER, Operation::Grant, skip);
        world.run();
        let taken = world.netvm.take();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].bytes, pattern(60, 2));
        let uplink = world.router.uplink.as_ref().unwrap();
        assert_eq!(uplink.counters().send_no_grants, 1);
        assert_eq!(uplink.tx_free_slots(), 255);
        world.close();
    }
}

#[test]
fn a_netvm_without_sg_or_gso_is_not_sent_such_frames() {
    let features = BackendFeatures {
        sg: false,
        gso_tcpv4: false,
        ..LINUX
    };
    let mut world = World::with(tests::client::LINUX, features);
    let mut frame = Frame::new();
    for chunk in pattern(5000, 1).chunks(4096) {
        let mut page = world.router.hv.allocate().unwrap();
        page[..chunk.len()].copy_from_slice(chunk);
        frame.push(page, 0, chunk.len() as u16).unwrap();
    }
    let uplink = world.router.uplink.as_mut().unwrap();
    assert_eq!(
        uplink.send(&mut world.router.hv, &mut frame),
        Err(TxError::NoScatterGather)
    );
    assert_eq!(frame.len(), 5000);
    frame.release(&mut world.router.hv);
    frame.fill(&mut world.router.hv, &pattern(3000, 1));
    frame.gso = Some(xen::Gso {
        size: 1400.try_into().unwrap(),
        family: GsoType::TcpV4,
    });
    assert_eq!(
        uplink.send(&mut world.router.hv, &mut frame),
        Err(TxError::NoGso)
    );
    frame.release(&mut world.router.hv);
    world.close();
}

/// What stands behind the data in an extra is not shown to anybody.
#[test]
fn extras_are_written_whole() {
    assert_eq!(Extra::encode_gso(1448, GsoType::TcpV6)[1], 2);
}
