//! `netback` and `netfront` joined, with a client and a netvm at the ends: what goes in comes out, and nothing leaks.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::time::Duration;

use proptest::prelude::*;
use tests::client::{Client, Piece};
use tests::frames::{cut, pattern};
use tests::router::{NETVM, ROUTER, Side, World, assert_nothing_left, straight};
use xen::netif::{GsoType, RxFlags, TxFlags};
use xen::{Checksum, Hypervisor};

#[test]
fn a_frame_crosses_both_ways() {
    let mut world = World::new();
    let up = pattern(60, 1);
    world.client.transmit(&up);
    world.run();
    let taken = world.netvm.take();
    assert_eq!(taken.len(), 1);
    assert_eq!(taken[0].bytes, up);
    assert_eq!(world.client.take_statuses(), [0]);
    world.client.post(4);
    let down = pattern(1514, 2);
    world.netvm.answer_all();
    world.netvm.deliver(&down);
    world.run();
    let received = world.client.receive();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].bytes, down);
    world.close();
}

#[test]
fn the_page_a_clients_frame_is_copied_into_is_the_page_that_is_granted() {
    let mut world = World::new();
    world.client.transmit(&pattern(1000, 3));
    let before = world.router.hv.counters();
    world.run();
    let counters = world.router.hv.counters();
    assert_eq!(
        counters.copy_bytes - before.copy_bytes,
        1000,
        "payload is copied once"
    );
    assert_eq!(counters.copy_elements - before.copy_elements, 1);
    assert_eq!(world.netvm.take()[0].bytes, pattern(1000, 3));
    world.close();
}

#[test]
fn one_burst_is_one_copy_and_one_notify_hypercall() {
    let mut world = World::new();
    world.client.post(64);
    world.run();
    let before = world.router.hv.counters();
    let notified = world.netvm.was_notified();
    assert!(notified, "the posted buffers were announced");
    for seed in 0..32 {
        world.client.put_frame(
            &[Piece {
                offset: 100,
                bytes: pattern(64, seed),
            }],
            0,
            None,
        );
        world
            .netvm
            .put_frame(&[(0, pattern(64, 100 + seed))], 0, None);
    }
    world.client.publish();
    world.netvm.publish();
    assert!(world.router.iterate(straight));
    let counters = world.router.hv.counters();
    assert_eq!(counters.copy_batches - before.copy_batches, 1);
    assert_eq!(
        counters.hypercalls - before.hypercalls,
        2,
        "copy and notify"
    );
    assert_eq!(world.netvm.take().len(), 32);
    assert_eq!(world.client.receive().len(), 32);
    assert_eq!(world.client.take_statuses().len(), 32);
    assert!(world.client.was_notified());
    world.close();
}

#[test]
fn idle_rings_cost_no_notifications() {
    let mut world = World::new();
    world.client.post(8);
    world.run();
    let before = world.router.hv.counters();
    for _ in 0..10 {
        world.run();
    }
    let counters = world.router.hv.counters();
    assert_eq!(counters.events_sent, before.events_sent);
    assert_eq!(counters.copy_batches, before.copy_batches);
    world.close();
}

#[test]
fn a_client_talks_to_another_with_the_next_copy() {
    let mut world = World::new();
    let other = xen::DomId(11);
    let mut second = Client::new(&world.machine, other, ROUTER);
    world.router.connect_client(&second);
    second.post(2);
    let frame = pattern(9000, 4);
    let pieces: Vec<Piece> = cut(&frame, &[4096, 4096])
        .into_iter()
        .map(|bytes| Piece { offset: 0, bytes })
        .collect();
    world
        .client
        .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV4)));
    world.client.publish();
    let across = |from, _: &mut xen::Frame| match from {
        Side::Client(0) => Some(Side::Client(1)),
        _ => None,
    };
    world.router.run(across);
    assert_eq!(
        second.receive(),
        [],
        "four slots are needed and two are there"
    );
    second.post(2);
    world.router.run(across);
    let received = second.receive();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].bytes, frame);
    assert_eq!(received[0].slots, 4);
    assert_eq!(received[0].gso, Some((1448, GsoType::TcpV4)));
    world.router.vifs[1]
        .take()
        .unwrap()
        .disconnect(&mut world.router.hv);
    second.close();
    assert_nothing_left(&world.machine, other);
    world.close();
}

/// What goes from client to client waits in the batch for the next copy, and its response waits with it.
#[test]
fn a_response_is_not_shown_before_its_copy_is_done() {
    let mut world = World::new();
    let mut second = Client::new(&world.machine, xen::DomId(11), ROUTER);
    world.router.connect_client(&second);
    second.post(2);
    second.transmit(&pattern(61, 1));
    world.client.transmit(&pattern(60, 2));
    let across = |from, _: &mut xen::Frame| (from == Side::Client(0)).then_some(Side::Client(1));
    assert!(world.router.iterate(across));
    assert!(!world.router.batch.is_empty());
    assert_eq!(second.receive(), []);
    assert_eq!(
        second.take_statuses(),
        [0],
        "its own frame was copied before"
    );
    assert!(world.router.iterate(across));
    assert_eq!(second.receive()[0].bytes, pattern(60, 2));
    world.router.vifs[1]
        .take()
        .unwrap()
        .disconnect(&mut world.router.hv);
    second.close();
    world.close();
}

/// The two directions number the checksum flags differently (xen-netif.md 3.2).
#[test]
fn checksum_flags_keep_their_meaning_across() {
    for (tx, rx, checksum) in [
        (0, 0, Checksum::Unverified),
        (
            TxFlags::DATA_VALIDATED,
            RxFlags::DATA_VALIDATED,
            Checksum::Validated,
        ),
        (
            TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED,
            RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
            Checksum::Blank,
        ),
    ] {
        let mut world = World::new();
        world.client.post(1);
        world.client.put_frame(
            &[Piece {
                offset: 0,
                bytes: pattern(80, 5),
            }],
            tx,
            None,
        );
        world.client.publish();
        world.netvm.put_frame(&[(0, pattern(80, 6))], rx, None);
        world.netvm.publish();
        let mut seen = Vec::new();
        world.router.run(|from, frame| {
            seen.push(frame.checksum);
            straight(from, frame)
        });
        assert_eq!(seen, [checksum, checksum]);
        assert_eq!(world.netvm.take()[0].flags, TxFlags(tx));
        assert_eq!(world.client.receive()[0].flags, RxFlags(rx));
        world.close();
    }
}

#[test]
fn a_gso_frame_crosses_whole_with_its_extra() {
    let mut world = World::new();
    let frame = pattern(65_226, 7);
    world.client.post(20);
    let pieces: Vec<Piece> = cut(&frame, &[4096; 15])
        .into_iter()
        .map(|bytes| Piece { offset: 0, bytes })
        .collect();
    world
        .client
        .put_frame(&pieces, TxFlags::CSUM_BLANK, Some((1448, GsoType::TcpV6)));
    world.client.publish();
    let pieces: Vec<_> = cut(&frame, &[4096; 15])
        .into_iter()
        .map(|bytes| (0, bytes))
        .collect();
    world
        .netvm
        .put_frame(&pieces, RxFlags::CSUM_BLANK, Some((1400, GsoType::TcpV4)));
    world.netvm.publish();
    world.run();
    let taken = world.netvm.take();
    assert_eq!(taken[0].bytes, frame);
    assert_eq!(taken[0].gso, Some((1448, GsoType::TcpV6)));
    assert_eq!(taken[0].slots.len(), 16);
    let received = world.client.receive();
    assert_eq!(received[0].bytes, frame);
    assert_eq!(received[0].gso, Some((1400, GsoType::TcpV4)));
    assert_eq!(received[0].slots, 17);
    assert_eq!(world.router.vif().counters().received_gso, 1);
    world.close();
}

/// When the uplink's ring is full, frames stay in the client's ring instead of being lost.
#[test]
fn back_pressure_leaves_frames_in_the_clients_ring() {
    let mut world = World::new();
    let mut sent = 0u32;
    while world.client.tx_free() > 0 {
        world.client.put_frame(
            &[Piece {
                offset: 0,
                bytes: pattern(60, sent),
            }],
            0,
            None,
        );
        sent += 1;
    }
    world.client.publish();
    world.run();
    world.client.reap();
    while world.client.tx_free() > 0 {
        world.client.put_frame(
            &[Piece {
                offset: 0,
                bytes: pattern(60, sent),
            }],
            0,
            None,
        );
        sent += 1;
    }
    world.client.publish();
    world.router.iterate(straight);
    assert_eq!(world.router.uplink.as_ref().unwrap().tx_free_slots(), 0);
    assert_eq!(
        world.client.reap(),
        0,
        "nothing is answered that cannot be sent"
    );
    let mut seen = Vec::new();
    for _ in 0..20 {
        seen.extend(world.netvm.take().into_iter().map(|taken| taken.bytes));
        world.netvm.answer_all();
        world.router.iterate(straight);
    }
    let expected: Vec<_> = (0..sent).map(|seed| pattern(60, seed)).collect();
    assert_eq!(seen, expected, "every frame arrives, in order");
    assert_eq!(world.router.refused, 0);
    world.netvm.answer_all();
    world.close();
}

/// Frames that the uplink cannot take keep nobody awake; its completions do wake us.
#[test]
fn a_client_that_is_held_back_lets_us_sleep() {
    let mut world = World::new();
    for round in 0..2 {
        while world.client.tx_free() > 0 {
            world.client.put_frame(
                &[Piece {
                    offset: 0,
                    bytes: pattern(60, round),
                }],
                0,
                None,
            );
        }
        world.client.publish();
        // Returns only when there is nothing to do.
        world.run();
        world.client.reap();
    }
    assert!(world.router.vif().is_held_back());
    assert_eq!(world.netvm.take().len(), 256);
    let port = world.router.uplink.as_ref().unwrap().port();
    world.router.hv.take_pending(port);
    world.netvm.answer(netfront::TX_RESUME_SLOTS);
    assert!(world.router.hv.take_pending(port), "we are woken");
    world.run();
    assert_eq!(world.netvm.take().len(), netfront::TX_RESUME_SLOTS);
    world.netvm.answer_all();
    world.run();
    assert!(!world.router.vif().is_held_back());
    assert_eq!(world.netvm.take().len(), 256 - netfront::TX_RESUME_SLOTS);
    world.close();
}

#[test]
fn completions_are_swept_without_waking_anybody() {
    let mut world = World::new();
    world.client.transmit(&pattern(60, 1));
    world.run();
    world
        .router
        .hv
        .take_pending(world.router.uplink.as_ref().unwrap().port());
    world.netvm.take();
    world.netvm.answer_all();
    let uplink = world.router.uplink.as_mut().unwrap();
    assert!(
        !world.router.hv.take_pending(uplink.port()),
        "one completion is no reason to wake up"
    );
    let deadline = uplink.deadline().unwrap();
    assert_eq!(
        deadline.since(world.machine.now()),
        Duration::from_millis(10)
    );
    world.machine.advance(Duration::from_millis(10));
    world.router.hv.wait(&[], None);
    assert_eq!(uplink.reclaim(&mut world.router.hv), Ok(1));
    assert_eq!(uplink.deadline(), None);
    world.close();
}

/// Frames without GSO are cut into arbitrary slots; lengths up to the MTU.
fn plain_layout() -> impl Strategy<Value = (usize, Vec<usize>, Vec<u16>)> {
    (
        14usize..=1518,
        prop::collection::vec(0usize..=1518, 0..17),
        prop::collection::vec(any::<u16>(), 18),
    )
}

/// GSO frames of any length.
fn gso_layout() -> impl Strategy<Value = (usize, Vec<usize>, Vec<u16>)> {
    (
        14usize..=65_535,
        prop::collection::vec(3700usize..=4096, 17),
        prop::collection::vec(any::<u16>(), 18),
    )
}

fn pieces(frame: &[u8], lens: &[usize], offsets: &[u16]) -> Vec<Piece> {
    cut(frame, lens)
        .into_iter()
        .zip(offsets)
        .map(|(bytes, offset)| Piece {
            offset: offset % (4097 - u16::try_from(bytes.len()).unwrap()),
            bytes,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 400 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_slot_layout_arrives_unchanged_both_ways(
        layouts in prop::collection::vec((any::<bool>(), plain_layout(), gso_layout(), 0u16..4), 1..8)
    ) {
        let mut world = World::new();
        world.client.post(200);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        for (seed, (big, plain, gso, flags)) in (0u32..).zip(layouts) {
            let (len, lens, offsets) = if big { gso } else { plain };
            let extra = big.then_some((1448, GsoType::TcpV4));
            let flags = if big { TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED } else { flags };
            let frame = pattern(len, seed);
            let pieces = pieces(&frame, &lens, &offsets);
            if world.client.tx_free() > pieces.len() {
                world.client.put_frame(&pieces, flags, extra);
                up.push((frame.clone(), extra));
            }
            let pieces: Vec<_> = pieces.into_iter().map(|piece| (piece.offset, piece.bytes)).collect();
            if world.netvm.buffers() as usize > pieces.len() + 1 && pieces.len() <= 18 {
                world.netvm.put_frame(&pieces, flags, extra);
                down.push((frame, extra));
            }
        }
        world.client.publish();
        world.netvm.publish();
        let (mut to_netvm, mut to_client) = (Vec::new(), Vec::new());
        for _ in 0..40 {
            world.run();
            to_netvm.extend(world.netvm.take().into_iter().map(|frame| (frame.bytes, frame.gso)));
            world.netvm.answer_all();
            to_client.extend(world.client.receive().into_iter().map(|frame| {
                assert!(!frame.failed);
                (frame.bytes, frame.gso)
            }));
            world.client.post(200 - world.client.posted());
        }
        prop_assert_eq!(&to_netvm, &up);
        prop_assert_eq!(&to_client, &down);
        let statuses = world.client.take_statuses();
        prop_assert!(statuses.iter().all(|status| *status == 0));
        prop_assert_eq!(world.client.tx_free(), 256, "one response per slot");
        world.close();
    }
}

#[test]
fn a_netvm_that_leaves_takes_nothing_along() {
    let mut world = World::new();
    for seed in 0..20 {
        world.client.transmit(&pattern(200, seed));
    }
    world.run();
    world.netvm.take();
    // Half of it answered, nothing else in good order.
    world.netvm.answer(10);
    world.netvm.close();
    world.router.close();
    world.client.close();
    assert_nothing_left(&world.machine, ROUTER);
    assert_nothing_left(&world.machine, NETVM);
}
