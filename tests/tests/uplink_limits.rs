//! An uplink short of answers, slots, pages or grants, among them cases of `xen-netif.md` 9.4, named after them.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use std::time::Duration;

use netfront::{BackendFeatures, ConnectError, Quarantine, TxError, Uplink, UplinkParameters};
use tests::client::Piece;
use tests::frames::{cut, pattern};
use tests::raw::{REQ_EVENT, REQ_PROD, RSP_EVENT};
use tests::router::{LINUX, NETVM, ROUTER, World, assert_nothing_left, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::{GsoType, TxFlags};
use xen::page::RingMemory;
use xen::{Errno, Frame, Gso, Hypervisor};

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
    frame.gso = Some(Gso {
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
