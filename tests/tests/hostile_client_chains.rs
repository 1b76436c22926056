//! Clients that write malformed chains of slots: the adversarial backend tests of `xen-netif.md` 9.3 on lengths,
//! counts and extras, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use netback::{FrontendFeatures, PeerError, SendDrop};
use tests::attack::{extra, fatal, gso, piece, put_extras, refused, request};
use tests::client::{Client, LINUX, Piece};
use tests::frames::{cut, pattern};
use tests::router::{ROUTER, World, straight};
use xen::netif::{Extra, GsoType, TxFlags, status};
use xen::{Access, Checksum, Frame, Hypervisor};

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
    assert_eq!(headers.len(), 1);
    assert_eq!(headers[0], frame);
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
