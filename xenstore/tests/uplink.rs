//! The uplink, over the fake store: the handshake row by row, replacement, and the cases of a hostile backend.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::time::Duration;

use kit::{Answer, Bench, NETVM, SELF};
use xen::DomId;
use xenstore::fake::{Access, FakeBackend, VifConfig};
use xenstore::{Event, UplinkEvent, UplinkFeatures, UplinkOffer, XenbusState};

fn second() -> Duration {
    Duration::from_secs(1)
}

/// A bench whose uplink device exists and is not offered yet.
fn attached() -> (Bench, VifConfig, FakeBackend) {
    let mut bench = Bench::uplink();
    let vif = VifConfig::new(NETVM, SELF, 0);
    bench.settle();
    bench.toolstack.attach(&vif);
    bench.settle();
    let backend = FakeBackend::new(bench.store.clone(), vif.clone());
    (bench, vif, backend)
}

/// A bench whose uplink is connected.
fn connected() -> (Bench, VifConfig, FakeBackend) {
    let (mut bench, vif, backend) = attached();
    backend.offer();
    bench.settle();
    backend.set_state(4);
    bench.settle();
    assert!(bench.carrier);
    bench.store.take_journal();
    bench.uplink_events.clear();
    (bench, vif, backend)
}

fn state_writes(bench: &Bench) -> String {
    bench
        .own_writes(&format!("/local/domain/{SELF}/device/vif/0/state"))
        .concat()
}

#[test]
fn without_a_device_nothing_happens() {
    let mut bench = Bench::uplink();
    bench.pass(Duration::from_secs(600));
    assert_eq!(bench.plane.uplink().backend, None);
    assert_eq!(bench.store.watches(SELF), 1);
    assert!(bench.uplink_events.is_empty());
}

#[test]
fn row_1_1_a_backend_that_has_not_begun_is_waited_for() {
    let (mut bench, _, _) = attached();
    bench.pass(Duration::from_secs(600));
    assert_eq!(bench.uplink_state().as_deref(), Some("1"));
    assert_eq!(bench.prepares, 0);
    assert_eq!(bench.plane.uplink().backend, Some(NETVM));
}

#[test]
fn row_2_1_an_offer_is_answered_with_all_keys_and_state_4() {
    let (mut bench, _, backend) = attached();
    backend.offer();
    bench.settle();
    for (key, value) in [
        ("tx-ring-ref", "100"),
        ("rx-ring-ref", "101"),
        ("event-channel", "30"),
        ("request-rx-copy", "1"),
        ("feature-rx-notify", "1"),
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-ipv6-csum-offload", "1"),
        ("multi-queue-num-queues", "1"),
        ("state", "4"),
    ] {
        assert_eq!(backend.frontend(key).as_deref(), Some(value), "{key}");
    }
    assert_eq!(backend.frontend("feature-no-csum-offload"), None);
    let features = UplinkFeatures {
        scatter_gather: true,
        gso_tcpv4: true,
        gso_tcpv6: true,
        checksum_ipv6: true,
    };
    let mac = [0x00, 0x16, 0x3e, 0x5e, 0x00, 0x05];
    let offer = UplinkOffer {
        backend: NETVM,
        handle: 0,
        mac,
        features,
    };
    assert_eq!(bench.uplink_events, [UplinkEvent::Prepare(offer)]);
    backend.set_state(4);
    bench.settle();
    assert_eq!(bench.uplink_events[1..], [UplinkEvent::Carrier(true)]);
    assert_eq!(bench.plane.uplink().own, XenbusState::Connected);
}

#[test]
fn row_2_4_a_slow_backend_is_waited_for() {
    let (mut bench, _, backend) = attached();
    backend.offer();
    bench.pass(Duration::from_secs(120));
    assert_eq!(state_writes(&bench), "4");
    assert_eq!(bench.uplink_events.len(), 1);
    backend.set_state(4);
    bench.settle();
    assert!(bench.carrier);
}

#[test]
fn an_offer_of_one_queue_is_answered_without_naming_queues() {
    let (mut bench, _, backend) = attached();
    backend.write("feature-rx-copy", "1");
    backend.set_state(2);
    bench.settle();
    assert_eq!(backend.frontend("state").as_deref(), Some("4"));
    assert_eq!(backend.frontend("multi-queue-num-queues"), None);
}

#[test]
fn f16_features_that_are_junk_are_not_there() {
    let (mut bench, _, backend) = attached();
    backend.write("feature-rx-copy", "1");
    for (key, junk) in [
        ("feature-sg", "yes"),
        ("feature-gso-tcpv4", "1099511627776"),
        ("feature-gso-tcpv6", ""),
        ("feature-ipv6-csum-offload", &"1".repeat(1900)),
        ("multi-queue-max-queues", "4294967295"),
    ] {
        backend.write(key, junk);
    }
    backend.set_state(2);
    bench.settle();
    let UplinkEvent::Prepare(offer) = bench.uplink_events[0] else {
        panic!()
    };
    assert_eq!(offer.features, UplinkFeatures::default());
    assert_eq!(
        backend.frontend("multi-queue-num-queues").as_deref(),
        Some("1")
    );
}

#[test]
fn a_backend_without_rx_copy_is_closed() {
    let (mut bench, _, backend) = attached();
    backend.set_state(2);
    bench.settle();
    assert_eq!(state_writes(&bench), "6");
    assert_eq!(bench.prepares, 0);
    // It is tried again, ever more rarely: at most 60 s apart.
    bench.pass(Duration::from_secs(3600));
    let writes = state_writes(&bench);
    assert!((100..200).contains(&writes.len()), "{}", writes.len());
    backend.write("feature-rx-copy", "1");
    bench.pass(Duration::from_secs(61));
    assert_eq!(backend.frontend("state").as_deref(), Some("4"));
}

#[test]
fn row_5_4_a_closing_backend_is_answered_with_6_after_the_rings_are_gone() {
    let (mut bench, _, backend) = connected();
    backend.write("online", "0");
    backend.set_state(5);
    bench.settle();
    assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
    assert_eq!(state_writes(&bench), "6");
    backend.set_state(6);
    bench.pass(Duration::from_secs(60));
    assert_eq!(
        state_writes(&bench),
        "",
        "the toolstack is about to take the device away"
    );
}

#[test]
fn row_6_6_a_backend_that_closed_is_joined_again_after_a_pause() {
    let (mut bench, _, backend) = connected();
    backend.set_state(5);
    bench.settle();
    backend.set_state(6);
    bench.pass_millis(900);
    assert_eq!(state_writes(&bench), "6");
    bench.pass_millis(200);
    assert_eq!(state_writes(&bench), "1");
    backend.offer();
    bench.settle();
    assert_eq!(state_writes(&bench), "4");
    backend.set_state(4);
    bench.settle();
    assert!(bench.carrier);
}

#[test]
fn row_6_6_attempts_at_a_backend_that_never_answers_are_spaced_out_to_60_s() {
    let (mut bench, _, backend) = connected();
    backend.set_state(6);
    bench.settle();
    let mut attempts = Vec::new();
    for second_number in 0..600_u32 {
        bench.pass(second());
        attempts.extend(state_writes(&bench).contains('1').then_some(second_number));
    }
    let pauses: Vec<u32> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(
        pauses[0] < 10 && pauses.iter().all(|&pause| pause <= 66),
        "{pauses:?}"
    );
    assert!((59..=66).contains(pauses.last().unwrap()), "{pauses:?}");
    assert_eq!(bench.prepares, 1);
}

#[test]
fn row_12_4_a_backend_that_drops_us_is_left_and_joined_again() {
    for state in [1, 2] {
        let (mut bench, _, backend) = connected();
        backend.set_state(state);
        bench.settle();
        assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
        bench.pass(second());
        backend.set_state(2);
        bench.pass(second());
        assert_eq!(state_writes(&bench), "5614");
    }
}

#[test]
fn row_378_foreign_states_change_nothing() {
    let (mut bench, _, backend) = connected();
    for state in [3, 7, 8] {
        backend.set_state(state);
        bench.pass(second());
    }
    assert!(bench.carrier);
    assert_eq!(state_writes(&bench), "");
}

#[test]
fn row_0_4_a_crashed_backend_ends_the_connection_and_its_successor_is_joined() {
    let (mut bench, vif, _) = connected();
    bench.store.destroy(NETVM);
    bench.settle();
    assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
    assert_eq!(state_writes(&bench), "6");
    assert_eq!(bench.store.watches(SELF), 2);
    bench.pass(Duration::from_secs(30));
    // The manager detaches the dead device and attaches a new one at the new domain.
    bench.toolstack.finish_detach(&vif);
    bench.settle();
    assert_eq!(bench.store.watches(SELF), 1);
    let new_netvm = DomId(9);
    bench.store.introduce(new_netvm);
    let vif = VifConfig::new(new_netvm, SELF, 0);
    bench.toolstack.attach(&vif);
    let backend = FakeBackend::new(bench.store.clone(), vif);
    backend.offer();
    bench.settle();
    backend.set_state(4);
    bench.settle();
    assert!(bench.carrier);
    assert_eq!(bench.plane.uplink().backend, Some(new_netvm));
}

#[test]
fn f17_a_device_that_is_replaced_at_once_gets_new_rings() {
    let (mut bench, vif, _) = connected();
    let new_netvm = DomId(9);
    bench.store.introduce(new_netvm);
    let new_vif = VifConfig::new(new_netvm, SELF, 0);
    bench.store.atomically(|store| {
        store.remove(&vif.frontend_folder());
        bench.toolstack.attach(&new_vif);
    });
    FakeBackend::new(bench.store.clone(), new_vif).offer();
    bench.settle();
    assert!(
        matches!(bench.uplink_events[..], [UplinkEvent::Disconnect, UplinkEvent::Prepare(offer)]
        if offer.backend == new_netvm)
    );
    assert_eq!(bench.store.watches(SELF), 2);
}

#[test]
fn a_device_that_is_reset_by_the_toolstack_is_a_new_one() {
    let (mut bench, vif, backend) = connected();
    bench
        .store
        .write(&format!("{}/state", vif.frontend_folder()), "1");
    bench.settle();
    assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
    backend.set_state(1);
    backend.offer();
    bench.settle();
    assert_eq!(backend.frontend("state").as_deref(), Some("4"));
    assert_eq!(bench.prepares, 2);
}

#[test]
fn a_device_that_a_predecessor_used_is_reset_first() {
    for state in [4, 5, 6] {
        let mut bench = Bench::uplink();
        let vif = VifConfig::new(NETVM, SELF, 0);
        bench.toolstack.attach(&vif);
        bench.store.write(
            &format!("{}/state", vif.frontend_folder()),
            &state.to_string(),
        );
        let backend = FakeBackend::new(bench.store.clone(), vif);
        backend.set_state(4);
        bench.store.take_journal();
        bench.pass(second());
        assert_eq!(state_writes(&bench), "5", "waits for the backend");
        backend.set_state(5);
        bench.settle();
        assert_eq!(state_writes(&bench), "6");
        backend.set_state(6);
        bench.pass(second());
        assert_eq!(state_writes(&bench), "1");
        backend.offer();
        bench.settle();
        assert_eq!(state_writes(&bench), "4");
        assert_eq!(bench.uplink_events.len(), 1);
    }
}

#[test]
fn a_reset_goes_on_without_a_backend_that_does_not_answer() {
    let mut bench = Bench::uplink();
    let vif = VifConfig::new(NETVM, SELF, 0);
    bench.toolstack.attach(&vif);
    bench
        .store
        .write(&format!("{}/state", vif.frontend_folder()), "4");
    FakeBackend::new(bench.store.clone(), vif).set_state(4);
    bench.store.take_journal();
    bench.pass(Duration::from_secs(12));
    assert_eq!(state_writes(&bench), "561");
}

#[test]
fn a_fault_in_the_rings_closes_waits_and_joins_again() {
    let (mut bench, _, backend) = connected();
    bench.plane.uplink_failed("response to nothing");
    bench.settle();
    assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
    assert_eq!(state_writes(&bench), "5");
    backend.set_state(5);
    bench.settle();
    assert_eq!(state_writes(&bench), "6");
    backend.set_state(6);
    bench.pass(second());
    assert_eq!(state_writes(&bench), "1");
    backend.offer();
    bench.settle();
    backend.set_state(4);
    bench.settle();
    assert!(bench.carrier);
}

#[test]
fn a_kernel_without_room_for_rings_is_asked_again_later() {
    let (mut bench, _, backend) = attached();
    bench.uplink_answer = Answer::No;
    backend.offer();
    bench.settle();
    assert_eq!((bench.prepares, state_writes(&bench).as_str()), (1, ""));
    bench.uplink_answer = Answer::Yes;
    bench.pass(second());
    assert_eq!(bench.prepares, 2);
    assert_eq!(state_writes(&bench), "4");
}

#[test]
fn keys_that_cannot_be_written_give_the_rings_back() {
    let (mut bench, _, backend) = attached();
    bench
        .store
        .fail_next(xenstore::wire::kind::WRITE, "rx-ring-ref", "ENOSPC");
    backend.offer();
    bench.settle();
    assert!(matches!(
        bench.uplink_events[..],
        [UplinkEvent::Prepare(_), UplinkEvent::Disconnect]
    ));
    assert_eq!(bench.store.transactions(SELF), 0);
    assert_eq!(backend.frontend("tx-ring-ref"), None);
    bench.pass(second());
    assert_eq!(backend.frontend("state").as_deref(), Some("4"));
}

#[test]
fn the_keys_survive_a_transaction_conflict() {
    let (mut bench, vif, backend) = attached();
    let folder = vif.frontend_folder();
    let mut conflicts = 3;
    bench.store.on_request(move |store, kind, _| {
        if kind == xenstore::wire::kind::TRANSACTION_END && conflicts > 0 {
            conflicts -= 1;
            store.write(&format!("{folder}/mtu"), "1500");
            store.write(&format!("{folder}/state"), "1");
        }
    });
    backend.offer();
    bench.settle();
    assert_eq!(backend.frontend("state").as_deref(), Some("4"));
    assert_eq!(backend.frontend("rx-ring-ref").as_deref(), Some("101"));
    assert_eq!(bench.prepares, 1);
}

#[test]
fn f15_a_flapping_backend_costs_a_bounded_number_of_requests() {
    let (mut bench, vif, backend) = connected();
    let before = bench.store.requests(SELF);
    for millisecond in 0..20_000_u32 {
        match millisecond % 7 {
            0 => backend.set_state(2),
            1 => backend.set_state(4),
            2 => backend.set_state(5),
            3 => backend.set_state(6),
            4 => drop(
                bench
                    .store
                    .remove(&format!("{}/state", vif.backend_folder())),
            ),
            5 => backend.write("state", "junk"),
            _ => bench.store.create(
                &format!("{}/state", vif.backend_folder()),
                "4",
                NETVM,
                &[],
                Access::None,
            ),
        }
        bench.pass_millis(1);
    }
    let requests = bench.store.requests(SELF) - before;
    assert!(requests < 96 * 20, "{requests}");
    assert!(bench.prepares < 8, "{}", bench.prepares);
    // Features that change while we are connected change nothing.
    backend.write("feature-sg", "0");
    bench.settle();
}

#[test]
fn f15_a_backend_folder_that_may_not_be_read_is_like_none() {
    let (mut bench, vif, _) = connected();
    let state = format!("{}/state", vif.backend_folder());
    bench.store.create(&state, "4", NETVM, &[], Access::None);
    bench.store.write(&state, "4");
    bench.settle();
    assert_eq!(bench.uplink_events, [UplinkEvent::Disconnect]);
    assert_eq!(bench.plane.uplink().peer, XenbusState::Unknown);
}

#[test]
fn f18_a_netvm_that_is_replaced_a_hundred_times_leaks_nothing() {
    let mut bench = Bench::uplink();
    bench.settle();
    let paths = bench.store.all_paths();
    for round in 0..100_u16 {
        let netvm = DomId(100 + round);
        bench.store.introduce(netvm);
        let vif = VifConfig::new(netvm, SELF, 0);
        bench.toolstack.attach(&vif);
        let backend = FakeBackend::new(bench.store.clone(), vif.clone());
        backend.offer();
        bench.pass(second());
        backend.set_state(4);
        bench.settle();
        assert!(bench.carrier, "round {round}");
        if round % 2 == 0 {
            backend.write("online", "0");
            backend.set_state(5);
            bench.settle();
            backend.set_state(6);
        }
        bench.store.destroy(netvm);
        bench.pass_millis(100);
        bench.toolstack.finish_detach(&vif);
        bench.settle();
        assert!(!bench.uplink_rings);
    }
    assert_eq!(bench.store.all_paths(), paths);
    assert_eq!(bench.store.watches(SELF), 1);
}

#[test]
fn l12_an_unusable_device_is_waited_for_until_it_is_usable() {
    let mut bench = Bench::uplink();
    let vif = VifConfig::new(NETVM, SELF, 0);
    bench.toolstack.attach(&vif);
    let path = format!("{}/backend", vif.frontend_folder());
    bench.store.write(&path, "/local/domain/77/backend/vif/5/0");
    bench.pass(Duration::from_secs(60));
    assert_eq!(bench.plane.uplink().backend, None);
    bench.store.write(&path, &vif.backend_folder());
    FakeBackend::new(bench.store.clone(), vif).offer();
    bench.settle();
    assert_eq!(bench.prepares, 1);
}

#[test]
fn no_state_is_written_before_the_kernel_was_told_to_revoke() {
    let (mut bench, _, backend) = connected();
    backend.set_state(5);
    for _ in 0..20 {
        bench.now = bench.now.plus(second());
        bench.plane.poll(&mut bench.link, bench.now).unwrap();
        assert_eq!(bench.uplink_state().as_deref(), Some("4"));
    }
    assert_eq!(
        bench.plane.next_event(),
        Some(Event::Uplink(UplinkEvent::Disconnect))
    );
    bench.uplink_rings = false;
    bench.carrier = false;
    bench.settle();
    assert_eq!(state_writes(&bench), "6");
}

#[test]
fn a_store_that_cannot_tell_for_a_moment_is_no_reason_to_let_go() {
    let (mut bench, vif, backend) = connected();
    bench
        .store
        .fail_next(xenstore::wire::kind::DIRECTORY, "device/vif", "ENOMEM");
    bench
        .store
        .write(&format!("{}/mtu", vif.frontend_folder()), "1500");
    bench.settle();
    bench
        .store
        .fail_next(xenstore::wire::kind::READ, "/0/state", "EIO");
    backend.set_state(4);
    bench.pass(second());
    assert!(bench.carrier);
    // What could not be read is read again.
    bench
        .store
        .fail_next(xenstore::wire::kind::DIRECTORY, "device/vif", "ENOMEM");
    bench.toolstack.finish_detach(&vif);
    bench.pass(second() * 2);
    assert!(!bench.uplink_rings);
    assert_eq!(bench.plane.uplink().backend, None);
}

#[test]
fn a_device_that_we_may_not_write_is_tried_rarely() {
    let (mut bench, vif, backend) = attached();
    let state = format!("{}/state", vif.frontend_folder());
    bench
        .store
        .create(&state, "1", NETVM, &[(SELF, Access::Read)], Access::None);
    backend.offer();
    let before = bench.store.requests(SELF);
    bench.pass(Duration::from_secs(600));
    let requests = bench.store.requests(SELF) - before;
    assert!(requests < 600 * 10, "{requests}");
    assert!(bench.prepares < 200, "{}", bench.prepares);
    assert!(!bench.uplink_rings);
}

#[test]
fn the_device_with_the_lowest_handle_is_the_uplink() {
    let mut bench = Bench::uplink();
    let late = VifConfig::new(NETVM, SELF, 3);
    bench.toolstack.attach(&late);
    FakeBackend::new(bench.store.clone(), late.clone()).offer();
    bench.settle();
    assert!(matches!(bench.uplink_events[0], UplinkEvent::Prepare(offer) if offer.handle == 3));
    let first = VifConfig::new(NETVM, SELF, 1);
    bench.toolstack.attach(&first);
    FakeBackend::new(bench.store.clone(), first).offer();
    bench.settle();
    assert!(
        matches!(bench.uplink_events[1..], [UplinkEvent::Disconnect, UplinkEvent::Prepare(offer)]
        if offer.handle == 1)
    );
}
