use super::*;
use crate::address::{V4, V6};
use crate::wire::ipv6;
use alloc::vec::Vec;
use proptest::prelude::*;

const CLIENT: Iface = Iface::Client(ClientId(0));
const NOW: Time = Time::from_secs(100);

fn new() -> Reassembly {
    Reassembly::new(0, 4)
}

/// A fragment of datagram `id`: `range` of the payload 0, 1, 2 …
fn frame(id: u16, range: core::ops::Range<usize>, more: bool) -> Vec<u8> {
    let mut bytes = vec![0; 34];
    let total = u16::try_from(range.len() + 20).unwrap();
    ipv4::write(&mut bytes[14..], 0x0a89_000a, 0x0102_0304, 17, total, 64);
    bytes[18..20].copy_from_slice(&id.to_be_bytes());
    let flags = u16::try_from(range.start / 8).unwrap() | u16::from(more) << 13;
    bytes[20..22].copy_from_slice(&flags.to_be_bytes());
    ipv4::set_checksum(&mut bytes[14..]);
    bytes.extend(range.map(|at| u8::try_from(at % 251).unwrap()));
    bytes
}

fn give(to: &mut Reassembly, from: Iface, bytes: &[u8], now: Time) -> Added {
    let len = u32::try_from(bytes.len()).unwrap();
    let mut network = Network::default();
    ipv4::parse(bytes, len, &mut network).unwrap();
    to.add::<V4>(from, bytes, &network, network.fragment, now)
}

fn blocks_in_use(own: &Reassembly) -> usize {
    usize::from(own.blocks.capacity() - own.blocks.free_count())
}

#[test]
fn datagram_is_complete_in_any_order() {
    let pieces = [
        frame(1, 0..1480, true),
        frame(1, 1480..2960, true),
        frame(1, 2960..3008, false),
    ];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]] {
        let mut own = new();
        assert_eq!(give(&mut own, CLIENT, &pieces[order[0]], NOW), Added::Held);
        assert_eq!(give(&mut own, CLIENT, &pieces[order[1]], NOW), Added::Held);
        let complete = Complete {
            len: 34 + 3008,
            largest: 1500,
        };
        assert_eq!(
            give(&mut own, CLIENT, &pieces[order[2]], NOW),
            Added::Complete(complete)
        );
        let whole = &own.buffer[..complete.len];
        let mut network = Network::default();
        let transport = ipv4::parse(whole, 3042, &mut network).unwrap();
        assert!(!network.is_fragment);
        assert!(
            transport
                .iter()
                .enumerate()
                .all(|(at, byte)| usize::from(*byte) == at % 251)
        );
        assert_eq!(blocks_in_use(&own), 0);
    }
}

#[test]
fn overlap_ends_the_datagram_and_repetition_does_not() {
    let mut own = new();
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 0..800, true), NOW),
        Added::Held
    );
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 0..800, true), NOW),
        Added::Held
    );
    let overlap = Added::Refused(DropReason::FragmentOverlap);
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 792..1000, false), NOW),
        overlap
    );
    assert_eq!(blocks_in_use(&own), 0);
    // Nothing is left of it.
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 800..1000, false), NOW),
        Added::Held
    );
}

#[test]
fn lengths_that_contradict_each_other_are_an_overlap() {
    let overlap = Added::Refused(DropReason::FragmentOverlap);
    let mut own = new();
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 800..900, false), NOW),
        Added::Held
    );
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 904..912, true), NOW),
        overlap
    );
    let mut own = new();
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 800..904, true), NOW),
        Added::Held
    );
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 8..104, false), NOW),
        overlap
    );
}

#[test]
fn uneven_and_oversized_fragments_are_refused() {
    let malformed = Added::Refused(DropReason::FragmentMalformed);
    let mut own = new();
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 0..801, true), NOW),
        malformed
    );
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 65_504..65_600, false), NOW),
        malformed
    );
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 8..8, false), NOW),
        malformed
    );
}

#[test]
fn one_interface_cannot_take_the_memory_of_another() {
    let mut own = new();
    let other = Iface::Client(ClientId(1));
    assert_eq!(
        give(&mut own, other, &frame(9, 0..800, true), NOW),
        Added::Held
    );
    for id in 0..1000 {
        let later = NOW.plus_nanos(u64::from(id));
        assert_eq!(
            give(&mut own, CLIENT, &frame(id, 0..1480, true), later),
            Added::Held
        );
    }
    assert!(own.used[0] <= own.share(0));
    assert!(own.abandoned > 0);
    let last = give(&mut own, other, &frame(9, 800..900, false), NOW);
    assert!(matches!(last, Added::Complete(_)));
}

#[test]
fn largest_datagram_fits_and_one_byte_more_does_not() {
    let mut own = Reassembly::new(1 << 20, 1);
    let mut at = 0;
    while at + 1480 < 65_515 {
        assert_eq!(
            give(&mut own, CLIENT, &frame(1, at..at + 1480, true), NOW),
            Added::Held
        );
        at += 1480;
    }
    let last = give(&mut own, CLIENT, &frame(1, at..65_515, false), NOW);
    assert_eq!(
        last,
        Added::Complete(Complete {
            len: 14 + 65_535,
            largest: 1500
        })
    );
}

#[test]
fn incomplete_datagram_is_forgotten_after_its_time() {
    let mut own = new();
    assert_eq!(
        give(&mut own, CLIENT, &frame(1, 0..800, true), NOW),
        Added::Held
    );
    assert_eq!(own.next_deadline(), Some(NOW.plus_secs(30)));
    assert_eq!(own.expire(NOW.plus_secs(29), 10), 0);
    assert_eq!(own.expire(NOW.plus_secs(30), 10), 1);
    assert_eq!(blocks_in_use(&own), 0);
    // Also without a tick.
    assert_eq!(
        give(&mut own, CLIENT, &frame(2, 0..800, true), NOW),
        Added::Held
    );
    let late = NOW.plus_secs(31);
    assert_eq!(
        give(&mut own, CLIENT, &frame(2, 800..900, false), late),
        Added::Held
    );
}

#[test]
fn ipv6_fragment_header_is_taken_out() {
    let mut own = new();
    let mut bytes = vec![0; 54];
    ipv6::write(&mut bytes[14..], V6(1, 2), V6(3, 4), 60, 16 + 24, 64);
    bytes.extend([44, 0, 1, 4, 0, 0, 0, 0]);
    bytes.extend([17, 0, 0, 0, 0, 0, 0, 9]);
    bytes.extend([0xab; 24]);
    let mut network = Network::default();
    ipv6::parse(&bytes, 94, &mut network).unwrap();
    let fragment = network.fragment;
    // Atomic: no other fragments.
    let added = own.add::<V6>(CLIENT, &bytes, &network, fragment, NOW);
    assert_eq!(
        added,
        Added::Complete(Complete {
            len: 86,
            largest: 80
        })
    );
    let mut network = Network::default();
    let transport = ipv6::parse(&own.buffer[..86], 86, &mut network).unwrap();
    assert_eq!(transport, [0xab; 24]);
    assert_eq!((network.protocol, network.header_len), (17, 48));
    assert!(!network.is_fragment);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_fragments_leaks_blocks(
        steps in prop::collection::vec((0_u16..4, 0_u16..6, 0_usize..40, 1_usize..30, any::<bool>(), 0_u64..3), 1..400)
    ) {
        let mut own = new();
        let mut now = NOW;
        for (client, id, start, len, more, seconds) in steps {
            now = now.plus_secs(seconds);
            let bytes = frame(id, start * 64..start * 64 + len * 64, more);
            if start == 0 && !more {
                continue;
            }
            let _ = give(&mut own, Iface::Client(ClientId(client)), &bytes, now);
            let used: usize = own.used.iter().map(|used| usize::from(*used)).sum();
            prop_assert_eq!(used, blocks_in_use(&own));
            prop_assert!((0..4).all(|account| own.used[usize::from(account)] <= own.share(account)));
        }
        own.expire(now.plus_secs(100), u32::MAX);
        prop_assert_eq!(blocks_in_use(&own), 0);
    }
}
