//! Netvms that hold, write or read pages that they should not: the adversarial frontend tests of `xen-netif.md`
//! 9.4 on pages, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use netfront::DeviceBroken;
use tests::attack::response;
use tests::client::Piece;
use tests::frames::{cut, pattern};
use tests::router::{LINUX, ROUTER, Router, World, assert_nothing_left, straight};
use xen::fake::FakeMachine;
use xen::netif::{GsoType, TxFlags};
use xen::{DomId, Frame};

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
