//! The targets on random bytes, and on what the fuzzers found.

use fuzz_targets::targets;
use fuzz_targets::world::Reached;
use proptest::prelude::*;

/// A target.
type Target = fn(&[u8]) -> Reached;

/// All targets by name.
const TARGETS: [(&str, Target); 6] = [
    ("frame", targets::frame),
    ("rule_text", targets::rule_text),
    ("dns_answer", targets::dns_answer),
    ("icmp_error", targets::icmp_error),
    ("fragments", targets::fragments),
    ("sequence", targets::sequence),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_target_finds_anything_in_random_bytes(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        for (_, target) in TARGETS {
            target(&data);
        }
    }

    #[test]
    fn rules_of_random_words_are_understood_or_refused(words in prop::collection::vec(prop::sample::select(vec![
        "action=accept", "action=drop", "proto=tcp", "proto=udp", "proto=icmp", "dst4=1.2.3.4/32", "dst4=10.0.0.0/8",
        "dst6=2001:db8::/32", "dsthost=web.example", "dsthost=1.2.3.4", "dstports=1-2", "dstports=443", "dstports=9-1",
        "icmptype=8", "specialtarget=dns", "expire=5", "comment=x", "", "\n", "=", "action=",
    ]), 0..12)) {
        targets::rule_text(words.join(" ").as_bytes());
    }
}

#[test]
fn every_target_reaches_what_it_is_about() {
    // SplitMix64, so that the test is the same each time.
    let mut number = 0_u64;
    let mut random = |len: usize| -> Vec<u8> {
        let next = || {
            number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed.to_be_bytes()[0]
        };
        core::iter::repeat_with(next).take(len).collect()
    };
    let mut total = |target: Target, len: usize| {
        let mut reached = Reached::default();
        for _ in 0..300 {
            reached += target(&random(len));
        }
        reached
    };
    let sequence = total(targets::sequence, 2000);
    assert!(sequence.up > 500 && sequence.down > 50, "{sequence:?}");
    assert!(
        sequence.made > 1_000 && sequence.stopped > 1_000,
        "{sequence:?}"
    );
    let frame = total(targets::frame, 200);
    assert!(frame.up > 5 && frame.stopped > 100, "{frame:?}");
    let errors = total(targets::icmp_error, 200);
    // The flow itself goes up each time; some of the errors about it come down.
    assert!(errors.up > 100 && errors.down > 5, "{errors:?}");
    let fragments = total(targets::fragments, 2000);
    assert!(
        fragments.made > 0 && fragments.stopped > 1_000,
        "{fragments:?}"
    );
    // Questions of the resolver.
    let names = total(targets::dns_answer, 500);
    assert!(names.made > 600, "{names:?}");
}
