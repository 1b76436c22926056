//! GSO frames towards peers that do not take them: cut by copy operations (client) or by the CPU (netvm).
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use std::time::Duration;

use netback::{FrontendFeatures, Segments, SendDrop, Sent};
use netfront::{BackendFeatures, TxError};
use proptest::prelude::*;
use tests::client::LINUX;
use tests::frames::pattern;
use tests::router::World;
use xen::fake::Operation;
use xen::netif::{RxFlags, TxFlags};
use xen::{Checksum, Frame, Hypervisor};

const NO_GSO: FrontendFeatures = FrontendFeatures {
    gso_tcpv4: false,
    gso_tcpv6: false,
    ..LINUX
};

const fn segments(header_len: u16, payload_len: u16) -> Segments {
    Segments {
        header_len,
        payload_len,
        checksum: Checksum::Blank,
    }
}

/// A frame of ours over pages in which its bytes stand at `offset`.
fn frame_of(world: &mut World, bytes: &[u8], offset: usize) -> Frame {
    let mut frame = Frame::new();
    for chunk in bytes.chunks(4096 - offset) {
        let mut page = world.router.hv.allocate().unwrap();
        page[offset..offset + chunk.len()].copy_from_slice(chunk);
        frame.push(page, offset as u16, chunk.len() as u16).unwrap();
    }
    frame
}

/// The header that a test writes for segment `number`.
fn write_header(number: usize, header: &mut [u8]) {
    header.fill(number as u8);
}

/// What the segments of `bytes` must be.
fn expected(bytes: &[u8], cut: Segments) -> Vec<Vec<u8>> {
    let header_len = usize::from(cut.header_len);
    bytes[header_len..]
        .chunks(cut.payload_len.into())
        .enumerate()
        .map(|(number, payload)| [&vec![number as u8; header_len], payload].concat())
        .collect()
}

fn send_to_client(world: &mut World, frame: &mut Frame, cut: Segments) -> Result<Sent, SendDrop> {
    let router = &mut world.router;
    let vif = router.vifs[0].as_mut().unwrap();
    vif.send_segments(&mut router.hv, &mut router.batch, frame, cut, write_header)
}

fn received(world: &mut World) -> Vec<Vec<u8>> {
    let frames = world.client.receive();
    assert!(
        frames
            .iter()
            .all(|frame| !frame.failed && frame.gso.is_none() && frame.slots == 1)
    );
    frames.into_iter().map(|frame| frame.bytes).collect()
}

#[test]
fn a_client_without_gso_gets_segments_whose_payload_was_copied_once() {
    let mut world = World::with(NO_GSO, tests::router::LINUX);
    world.client.post(60);
    let bytes = pattern(65_160, 1);
    let cut = segments(66, 1448);
    let mut frame = frame_of(&mut world, &bytes, 0);
    let before = world.router.hv.counters();
    assert_eq!(
        send_to_client(&mut world, &mut frame, cut),
        Ok(Sent::Copying)
    );
    world.run();
    let counters = world.router.hv.counters();
    assert_eq!(counters.copy_batches - before.copy_batches, 1);
    let payload = 65_160 - 66;
    assert_eq!(counters.copy_bytes - before.copy_bytes, payload + 45 * 66);
    assert_eq!(received(&mut world), expected(&bytes, cut));
    let counters = world.router.vif().counters();
    assert_eq!(
        (
            counters.segmented,
            counters.sent_frames,
            counters.sent_slots
        ),
        (1, 45, 45)
    );
    world.close();
}

#[test]
fn segments_say_what_they_are_told_of_their_checksums() {
    for (checksum, flags) in [
        (
            Checksum::Blank,
            RxFlags::CSUM_BLANK | RxFlags::DATA_VALIDATED,
        ),
        (Checksum::Validated, RxFlags::DATA_VALIDATED),
        (Checksum::Unverified, 0),
    ] {
        let mut world = World::with(NO_GSO, tests::router::LINUX);
        world.client.post(3);
        let mut frame = frame_of(&mut world, &pattern(3000, 1), 0);
        let cut = Segments {
            checksum,
            ..segments(54, 1448)
        };
        assert_eq!(
            send_to_client(&mut world, &mut frame, cut),
            Ok(Sent::Copying)
        );
        world.run();
        let frames = world.client.receive();
        assert_eq!(frames.len(), 3);
        assert!(frames.iter().all(|frame| frame.flags == RxFlags(flags)));
        world.close();
    }
}

#[test]
fn segments_wait_until_there_are_buffers_for_all() {
    let mut world = World::with(NO_GSO, tests::router::LINUX);
    world.client.post(10);
    let bytes = pattern(30_000, 2);
    let cut = segments(54, 1400);
    let mut frame = frame_of(&mut world, &bytes, 100);
    assert_eq!(
        send_to_client(&mut world, &mut frame, cut),
        Ok(Sent::Queued)
    );
    // A small frame behind it does not overtake it.
    world.netvm.deliver(&pattern(60, 3));
    world.run();
    assert_eq!(received(&mut world), Vec::<Vec<u8>>::new());
    world.client.post(20);
    world.run();
    let mut all = expected(&bytes, cut);
    all.push(pattern(60, 3));
    assert_eq!(received(&mut world), all);
    world.close();
}

/// A frontend that never posts enough buffers still makes progress.
#[test]
fn after_a_while_as_many_segments_go_as_there_are_buffers() {
    let mut world = World::with(NO_GSO, tests::router::LINUX);
    world.client.post(10);
    let bytes = pattern(30_000, 2);
    let cut = segments(54, 1400);
    let mut frame = frame_of(&mut world, &bytes, 0);
    assert_eq!(
        send_to_client(&mut world, &mut frame, cut),
        Ok(Sent::Queued)
    );
    world.run();
    let deadline = world.router.vif().deadline().unwrap();
    assert_eq!(
        deadline.since(world.machine.now()),
        Duration::from_millis(20)
    );
    world.machine.advance(Duration::from_millis(20));
    world.router.hv.wait(&[], None);
    world.run();
    assert_eq!(received(&mut world), expected(&bytes, cut)[..10]);
    let counters = *world.router.vif().counters();
    assert_eq!(counters.send_drops.segments_lost, 22 - 10);
    assert_eq!(counters.sent_frames, 10);
    world.close();
}

#[test]
fn without_any_buffer_the_segments_expire_with_their_pages() {
    let mut world = World::with(NO_GSO, tests::router::LINUX);
    let before = world.machine.resources(tests::router::ROUTER).pages;
    let mut frame = frame_of(&mut world, &pattern(30_000, 2), 0);
    assert_eq!(
        send_to_client(&mut world, &mut frame, segments(54, 1400)),
        Ok(Sent::Queued)
    );
    world.run();
    for _ in 0..3 {
        let deadline = world.router.vif().deadline();
        let wait = deadline.map_or(Duration::ZERO, |deadline| {
            deadline.since(world.machine.now())
        });
        world.machine.advance(wait);
        world.router.hv.wait(&[], None);
        world.run();
    }
    assert_eq!(world.router.vif().counters().send_drops.expired, 1);
    assert_eq!(world.machine.resources(tests::router::ROUTER).pages, before);
    world.close();
}

#[test]
fn a_failing_header_page_loses_nothing() {
    for skip in 0..3 {
        let mut world = World::with(NO_GSO, tests::router::LINUX);
        world.client.post(64);
        let mut frame = frame_of(&mut world, &pattern(60_000, 2), 0);
        world
            .machine
            .fail(tests::router::ROUTER, Operation::Allocate, skip);
        // 134-byte headers of 60 segments are two pages; the third allocation is nobody's.
        let expected = if skip < 2 {
            Err(SendDrop::PoolLow)
        } else {
            Ok(Sent::Copying)
        };
        assert_eq!(
            send_to_client(&mut world, &mut frame, segments(134, 1000)),
            expected
        );
        assert!(frame.is_empty());
        world.machine.heal(tests::router::ROUTER);
        world.run();
        world.close();
    }
}

#[test]
fn a_failed_segment_is_marked_and_the_others_arrive() {
    let mut world = World::with(NO_GSO, tests::router::LINUX);
    world.client.post(5);
    let mut frame = frame_of(&mut world, &pattern(54 + 5000, 2), 0);
    let cut = segments(54, 1000);
    assert_eq!(
        send_to_client(&mut world, &mut frame, cut),
        Ok(Sent::Copying)
    );
    let failed = xen::GrantStatus::GENERAL_ERROR;
    // Operation 5 is the payload of the third segment.
    world
        .machine
        .fail(tests::router::ROUTER, Operation::Copy(failed), 5);
    world.run();
    let frames = world.client.receive();
    let marks: Vec<bool> = frames.iter().map(|frame| frame.failed).collect();
    assert_eq!(marks, [false, false, true, false, false]);
    world.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 300 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_cut_puts_every_payload_byte_into_its_segment(
        len in 60usize..=65_535,
        offset in 0usize..=3000,
        header_len in 14u16..=256,
        payload_len in 256u16..=3840,
        buffers in 0usize..80,
    ) {
        let mut world = World::with(NO_GSO, tests::router::LINUX);
        world.client.post(buffers);
        // Frames of more than 18 fragments cannot be made.
        let bytes = pattern(len.min(18 * (4096 - offset)), 4);
        let cut = segments(header_len, payload_len);
        let mut frame = frame_of(&mut world, &bytes, offset);
        let result = send_to_client(&mut world, &mut frame, cut);
        prop_assert!(frame.is_empty());
        let count = cut.count(bytes.len());
        if (1..=64).contains(&count) {
            prop_assert_eq!(result, Ok(if buffers >= count { Sent::Copying } else { Sent::Queued }));
            world.run();
            world.client.post(80);
            world.run();
            prop_assert_eq!(received(&mut world), expected(&bytes, cut));
        } else {
            prop_assert_eq!(result, Err(SendDrop::BadSegments));
        }
        world.close();
    }
}

#[test]
fn a_netvm_without_gso_gets_segments_in_pages_of_their_own() {
    let features = BackendFeatures {
        gso_tcpv4: false,
        ..tests::router::LINUX
    };
    let mut world = World::with(LINUX, features);
    let bytes = pattern(20_000, 5);
    let cut = segments(66, 1448);
    let mut frame = frame_of(&mut world, &bytes, 7);
    let router = &mut world.router;
    let uplink = router.uplink.as_mut().unwrap();
    uplink
        .send_segments(&mut router.hv, &mut frame, cut, write_header)
        .unwrap();
    assert!(frame.is_empty());
    world.run();
    let taken = world.netvm.take();
    for frame in &taken {
        let page = world.netvm.dump(frame.slots[0].gref);
        assert!(page[frame.bytes.len()..].iter().all(|byte| *byte == 0));
        assert_eq!(
            frame.flags,
            TxFlags(TxFlags::CSUM_BLANK | TxFlags::DATA_VALIDATED)
        );
    }
    let frames: Vec<Vec<u8>> = taken.into_iter().map(|frame| frame.bytes).collect();
    assert_eq!(frames, expected(&bytes, cut));
    world.close();
}

#[test]
fn segments_that_the_netvms_ring_cannot_take_stay_with_the_caller() {
    let mut world = World::new();
    let mut small = Frame::new();
    let router = &mut world.router;
    let uplink = router.uplink.as_mut().unwrap();
    while uplink.tx_free_slots() > 5 {
        small.fill(&mut router.hv, &pattern(60, 1));
        uplink.send(&mut router.hv, &mut small).unwrap();
    }
    let mut frame = frame_of(&mut world, &pattern(10_000, 5), 0);
    let router = &mut world.router;
    let uplink = router.uplink.as_mut().unwrap();
    let cut = segments(66, 1448);
    let result = uplink.send_segments(&mut router.hv, &mut frame, cut, write_header);
    assert_eq!(result, Err(TxError::Full));
    assert_eq!(frame.len(), 10_000);
    let result = uplink.send_segments(&mut router.hv, &mut frame, segments(66, 10), write_header);
    assert_eq!(result, Err(TxError::BadSegments));
    // Out of pages after two segments: those went, the rest is dropped.
    world
        .machine
        .fail(tests::router::ROUTER, Operation::Allocate, 2);
    let uplink = world.router.uplink.as_mut().unwrap();
    let cut = segments(66, 3000);
    let result = uplink.send_segments(&mut world.router.hv, &mut frame, cut, write_header);
    assert_eq!(result, Err(TxError::NoResources));
    assert!(frame.is_empty());
    world.run();
    assert_eq!(world.netvm.take().len(), 251 + 2);
    world.close();
}
