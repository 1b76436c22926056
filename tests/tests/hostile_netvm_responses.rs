//! Netvms that write malformed responses: the adversarial frontend tests of `xen-netif.md` 9.4 on indices, ids,
//! lengths and chains, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use netfront::DeviceBroken;
use tests::attack::{broken, dropped, put_response};
use tests::client::Piece;
use tests::frames::{cut, pattern};
use tests::netvm::Netvm;
use tests::raw::RSP_PROD;
use tests::router::{World, straight};
use xen::Checksum;
use xen::netif::{Extra, GsoType, RxFlags, TxFlags, TxResponse, status};
use xen::page::RingMemory;

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
    world.netvm.put_tx_response(TxResponse {
        id: taken[0].slots[0].id,
        status: status::ERROR,
    });
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
        dropped(&mut world, |netvm| put_response(netvm, offset, 0, status));
        world.close();
    }
}

#[test]
fn f4_each_reason_is_counted() {
    let mut world = World::new();
    put_response(&mut world.netvm, 0, 0, -1);
    put_response(&mut world.netvm, 4000, 0, 97);
    put_response(&mut world.netvm, 0, 0, 13);
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
                put_response(netvm, 0, more, 100);
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
            put_response(
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
            put_response(&mut world.netvm, 0, RxFlags::MORE_DATA, 100);
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
    let rounds: u64 = if cfg!(miri) { 20 } else { 100_000 / 40 };
    for round in 0..rounds {
        let bad = round % 5;
        for index in 0..40 {
            let more = if index % 5 < 4 { RxFlags::MORE_DATA } else { 0 };
            let status = if index % 5 == bad { -1 } else { 50 };
            put_response(&mut world.netvm, 0, more, status);
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
        rounds * 8
    );
    dropped(&mut world, |_| {});
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

/// What stands behind the data in an extra is not shown to anybody.
#[test]
fn extras_are_written_whole() {
    assert_eq!(Extra::encode_gso(1448, GsoType::TcpV6)[1], 2);
}
