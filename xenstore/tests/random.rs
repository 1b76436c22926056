//! Random lives of a vif and of an uplink: whatever toolstack, peer, kernel and time do, the promises hold.
//!
//! The kit checks at every step that rings are given and taken back exactly once. Here: our states follow one another
//! legally, requests are bounded, and in the end nothing is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::time::Duration;

use kit::{Answer, Bench, NETVM, SELF, client_vif};
use proptest::prelude::*;
use xen::DomId;
use xenstore::MAX_OUTSTANDING;
use xenstore::fake::{Access, Chunking, FakeBackend, FakeFrontend, VifConfig};
use xenstore::wire::kind;

/// What a peer, the toolstack, the kernel, or time does next.
#[derive(Clone, Debug)]
enum Act {
    PeerState(u8),
    PeerJunk(String),
    PeerPublishes,
    PeerSpoils(String),
    PeerFolderGone,
    PeerFolderBack,
    Attach,
    AskToDetach,
    FinishDetach,
    OurFolderGone,
    KernelAnswers(bool),
    RingsBreak,
    Pass(u16),
    Fail(u8),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (0..9_u8).prop_map(Act::PeerState),
        4 => Just(Act::PeerState(4)),
        1 => "[ -~]{0,12}".prop_map(Act::PeerJunk),
        3 => Just(Act::PeerPublishes),
        1 => "[0-9a-z-]{0,12}".prop_map(Act::PeerSpoils),
        1 => Just(Act::PeerFolderGone),
        1 => Just(Act::PeerFolderBack),
        2 => Just(Act::Attach),
        2 => Just(Act::AskToDetach),
        1 => Just(Act::FinishDetach),
        1 => Just(Act::OurFolderGone),
        2 => any::<bool>().prop_map(Act::KernelAnswers),
        2 => Just(Act::RingsBreak),
        6 => (0..6000_u16).prop_map(Act::Pass),
    ]
}

fn act_or_fault() -> impl Strategy<Value = Act> {
    prop_oneof![8 => act(), 1 => (0..6_u8).prop_map(Act::Fail)]
}

fn fail(bench: &Bench, which: u8) {
    let (kind, end, error) = [
        (kind::WRITE, "/state", "EIO"),
        (kind::READ, "", "ENOMEM"),
        (kind::TRANSACTION_START, "", "ENOSPC"),
        (kind::TRANSACTION_END, "", "EAGAIN"),
        (kind::WATCH, "", "E2BIG"),
        (kind::DIRECTORY, "", "EIO"),
    ][usize::from(which)];
    bench.store.fail_next(kind, end, error);
}

/// Asserts that each of our states may follow the one before; the toolstack's writes of 1 begin a new device.
fn assert_legal(bench: &Bench, path: &str, legal: &[&str]) {
    let mut last = "1".to_owned();
    for (domain, written, value) in bench.store.take_journal() {
        if written != path {
            continue;
        }
        if domain == SELF {
            assert!(
                legal.contains(&format!("{last}{value}").as_str()),
                "{value} after {last}"
            );
            last = value;
        } else if domain == DomId::DOM0 && value == "1" {
            last = value;
        }
    }
}

fn backend_life(acts: &[Act], chunking: Chunking) -> (Bench, VifConfig) {
    let mut bench = Bench::backend();
    bench.link.set_chunking(chunking);
    let vif = client_vif(7);
    bench.store.introduce(vif.frontend);
    let frontend = FakeFrontend::new(bench.store.clone(), vif.clone());
    bench.settle();
    for act in acts {
        match act {
            Act::PeerState(state) => frontend.set_state(*state),
            Act::PeerJunk(junk) => drop(frontend.write("state", junk)),
            Act::PeerPublishes => frontend.publish(),
            Act::PeerSpoils(junk) => drop(frontend.write("event-channel", junk)),
            Act::PeerFolderGone => {
                let _ = bench.store.remove(&vif.frontend_folder());
            }
            Act::PeerFolderBack => {
                bench.store.create(
                    &vif.frontend_folder(),
                    "",
                    vif.frontend,
                    &[(SELF, Access::Read)],
                    Access::None,
                );
                frontend.set_state(1);
            }
            Act::Attach => {
                if !bench.store.exists(&vif.backend_folder()) {
                    bench.toolstack.attach(&vif);
                }
            }
            Act::AskToDetach => {
                if bench.store.exists(&vif.backend_folder()) {
                    bench.toolstack.request_detach(&vif);
                }
            }
            Act::FinishDetach => bench.toolstack.finish_detach(&vif),
            Act::OurFolderGone => {
                let _ = bench.store.remove(&vif.backend_folder());
            }
            Act::KernelAnswers(well) => {
                bench.vif_answer = if *well { Answer::Yes } else { Answer::No }
            }
            Act::RingsBreak => {
                if let Some(&device) = bench.mapped.keys().next() {
                    bench.plane.broken(device, "broken");
                }
            }
            Act::Pass(millis) => bench.pass_millis(u64::from(*millis)),
            Act::Fail(which) => fail(&bench, *which),
        }
        if !matches!(chunking, Chunking::Random(_)) {
            bench.settle();
        }
    }
    bench.settle();
    (bench, vif)
}

/// Whatever happened before: the device goes when the toolstack wants it, and nothing stays.
fn assert_ends_well(mut bench: Bench, vif: &VifConfig) {
    bench.store.clear_faults();
    bench.pass(Duration::from_secs(6));
    if bench.store.exists(&vif.backend_folder()) {
        bench.toolstack.request_detach(vif);
        bench.pass(Duration::from_secs(4));
        assert!(!bench.store.exists(&vif.backend_folder()));
    }
    bench.toolstack.finish_detach(vif);
    bench.settle();
    assert!(bench.mapped.is_empty());
    assert_eq!(bench.store.watches(SELF), 1);
    assert_eq!(bench.plane.watch_count(), 1);
    assert_eq!(bench.store.transactions(SELF), 0);
    assert!(bench.plane.vifs().is_empty());
    assert!(bench.store.most_outstanding(SELF) <= MAX_OUTSTANDING);
    // A new device is served as if nothing had been.
    bench.vif_answer = Answer::Yes;
    bench.toolstack.attach(vif);
    bench.pass_millis(200);
    FakeFrontend::new(bench.store.clone(), vif.clone()).connect();
    bench.pass_millis(200);
    assert_eq!(bench.own_state(vif).as_deref(), Some("4"));
}

fn uplink_life(acts: &[Act], chunking: Chunking) -> (Bench, VifConfig) {
    let mut bench = Bench::uplink();
    bench.link.set_chunking(chunking);
    let vif = VifConfig::new(NETVM, SELF, 0);
    let backend = FakeBackend::new(bench.store.clone(), vif.clone());
    bench.settle();
    for act in acts {
        match act {
            Act::PeerState(2) | Act::PeerPublishes => backend.offer(),
            Act::PeerState(state) => backend.set_state(*state),
            Act::PeerJunk(junk) => backend.write("state", junk),
            Act::PeerSpoils(junk) => backend.write("feature-rx-copy", junk),
            Act::PeerFolderGone | Act::OurFolderGone => {
                let _ = bench.store.remove(&vif.backend_folder());
            }
            Act::Attach | Act::PeerFolderBack => {
                if !bench.store.exists(&vif.backend_folder()) {
                    bench.store.atomically(|_| {
                        bench.toolstack.finish_detach(&vif);
                        bench.toolstack.attach(&vif);
                    });
                }
            }
            Act::AskToDetach => {
                if bench.store.exists(&vif.backend_folder()) {
                    bench.toolstack.request_detach(&vif);
                }
            }
            Act::FinishDetach => bench.toolstack.finish_detach(&vif),
            Act::KernelAnswers(well) => {
                bench.uplink_answer = if *well { Answer::Yes } else { Answer::No }
            }
            Act::RingsBreak => {
                if bench.uplink_rings {
                    bench.plane.uplink_failed("broken");
                }
            }
            Act::Pass(millis) => bench.pass_millis(u64::from(*millis)),
            Act::Fail(which) => fail(&bench, *which),
        }
        if !matches!(chunking, Chunking::Random(_)) {
            bench.settle();
        }
    }
    bench.settle();
    (bench, vif)
}

fn assert_uplink_ends_well(mut bench: Bench, vif: &VifConfig) {
    bench.store.clear_faults();
    bench.pass(Duration::from_secs(10));
    bench.toolstack.finish_detach(vif);
    bench.settle();
    assert!(!bench.uplink_rings);
    assert_eq!(bench.store.watches(SELF), 1);
    assert_eq!(bench.store.transactions(SELF), 0);
    assert!(bench.store.most_outstanding(SELF) <= MAX_OUTSTANDING);
    bench.uplink_answer = Answer::Yes;
    bench.toolstack.attach(vif);
    let backend = FakeBackend::new(bench.store.clone(), vif.clone());
    backend.offer();
    bench.pass(Duration::from_secs(10));
    backend.set_state(4);
    bench.pass(Duration::from_secs(1));
    assert!(bench.carrier);
}

const BACKEND_LEGAL: [&str; 9] = ["12", "15", "24", "25", "45", "52", "56", "62", "66"];
const UPLINK_LEGAL: [&str; 6] = ["14", "16", "45", "46", "56", "61"];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_vifs_states_follow_one_another_legally_and_nothing_leaks(acts in prop::collection::vec(act(), 0..60)) {
        let (bench, vif) = backend_life(&acts, Chunking::Whole);
        assert_legal(&bench, &format!("{}/state", vif.backend_folder()), &BACKEND_LEGAL);
        assert_ends_well(bench, &vif);
    }

    #[test]
    fn a_vif_leaks_nothing_whatever_fails_and_however_bytes_come(
        acts in prop::collection::vec(act_or_fault(), 0..60), seed in 1..u64::MAX,
    ) {
        let (bench, vif) = backend_life(&acts, Chunking::Random(seed));
        assert_ends_well(bench, &vif);
    }

    #[test]
    fn an_uplinks_states_follow_one_another_legally_and_nothing_leaks(acts in prop::collection::vec(act(), 0..60)) {
        let (bench, vif) = uplink_life(&acts, Chunking::Whole);
        assert_legal(&bench, &format!("{}/state", vif.frontend_folder()), &UPLINK_LEGAL);
        assert_uplink_ends_well(bench, &vif);
    }

    #[test]
    fn an_uplink_leaks_nothing_whatever_fails_and_however_bytes_come(
        acts in prop::collection::vec(act_or_fault(), 0..60), seed in 1..u64::MAX,
    ) {
        let (bench, vif) = uplink_life(&acts, Chunking::Random(seed));
        assert_uplink_ends_well(bench, &vif);
    }
}
