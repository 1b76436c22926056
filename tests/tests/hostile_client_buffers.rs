//! Clients that do not take what is sent to them: the adversarial backend tests of `xen-netif.md` 9.3 on rx
//! buffers, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use std::time::Duration;

use netback::FrontendFeatures;
use tests::client::LINUX;
use tests::frames::pattern;
use tests::router::{ROUTER, World};
use xen::fake::Operation;
use xen::netif::{GsoType, RxFlags};
use xen::{Access, GrantRef, GrantStatus, Hypervisor};

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
