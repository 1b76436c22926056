//! Client vifs, over the fake store: the handshake row by row, removal, and the cases of a hostile frontend.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where its expectation does"
)]

mod kit;

use std::time::Duration;

use kit::{Answer, Bench, SELF, client_vif};
use xen::stream::ByteStream as _;
use xen::{DomId, GrantRef, PortNumber};
use xenstore::fake::{FakeFrontend, VifConfig};
use xenstore::{BackendEvent, Event, MAX_VIFS, XenbusState};

/// A bench with one client, attached and offered.
fn attached() -> (Bench, VifConfig, FakeFrontend) {
    let mut bench = Bench::backend();
    let vif = client_vif(7);
    bench.store.introduce(vif.frontend);
    bench.settle();
    bench.toolstack.attach(&vif);
    bench.settle();
    let frontend = FakeFrontend::new(bench.store.clone(), vif.clone());
    (bench, vif, frontend)
}

/// A bench with one client, connected.
fn connected() -> (Bench, VifConfig, FakeFrontend) {
    let (mut bench, vif, frontend) = attached();
    bench.pass_millis(150);
    frontend.connect();
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    assert_eq!(bench.mapped.len(), 1);
    bench.store.take_journal();
    (bench, vif, frontend)
}

fn state_writes(bench: &Bench, vif: &VifConfig) -> String {
    bench
        .own_writes(&format!("{}/state", vif.backend_folder()))
        .concat()
}

fn key(bench: &Bench, vif: &VifConfig, key: &str) -> Option<String> {
    bench.store.read(&format!("{}/{key}", vif.backend_folder()))
}

#[test]
fn row_any_none_a_found_device_is_offered_with_all_features_at_once() {
    let (bench, vif, _) = attached();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
    for (name, value) in [
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-ipv6-csum-offload", "1"),
        ("feature-rx-copy", "1"),
    ] {
        assert_eq!(key(&bench, &vif, name).as_deref(), Some(value), "{name}");
    }
    for absent in [
        "feature-rx-flip",
        "feature-split-event-channels",
        "multi-queue-max-queues",
        "feature-ctrl-ring",
    ] {
        assert_eq!(key(&bench, &vif, absent), None, "{absent}");
    }
    assert_eq!(bench.store.transactions(SELF), 0);
    // One for all devices and one for this one.
    assert_eq!(bench.store.watches(SELF), 2);
}

#[test]
fn a_device_that_exists_before_us_is_found() {
    let mut bench = Bench::backend();
    let vif = client_vif(7);
    bench.toolstack.attach(&vif);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
}

#[test]
fn row_4_2_a_frontend_is_connected_with_what_it_published() {
    let (bench, vif, _) = connected();
    let parameters = bench.mapped.values().next().unwrap();
    assert_eq!(parameters.mac, [0x00, 0x16, 0x3e, 0x5e, 0x00, 0x07]);
    assert_eq!(
        parameters.addresses,
        ["10.137.0.7".parse::<core::net::IpAddr>().unwrap()]
    );
    assert_eq!(
        (parameters.tx_ring, parameters.rx_ring),
        (GrantRef(8), GrantRef(9))
    );
    assert_eq!(parameters.port, PortNumber(17));
    assert!(parameters.features.gso_tcpv4 && parameters.features.checksum_ipv4);
    assert_eq!(
        key(&bench, &vif, "hotplug-status").as_deref(),
        Some("connected")
    );
    let status = &bench.plane.vifs()[0];
    assert_eq!(
        (status.own, status.peer),
        (XenbusState::Connected, XenbusState::Connected)
    );
    assert_eq!(status.device.to_string(), "vif7.0");
}

#[test]
fn the_frontend_cannot_say_who_it_is() {
    let (mut bench, vif, frontend) = attached();
    frontend.write("mac", "00:16:3e:00:00:00");
    frontend.write("ip", "10.137.0.99");
    frontend.connect();
    bench.pass_millis(200);
    let parameters = bench.mapped.values().next().unwrap();
    assert_eq!(parameters.mac[5], 7);
    assert_eq!(
        parameters.addresses,
        ["10.137.0.7".parse::<core::net::IpAddr>().unwrap()]
    );
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
}

#[test]
fn l8_state_2_is_held_for_the_toolstack_when_the_frontend_is_fast() {
    let (mut bench, vif, frontend) = attached();
    frontend.connect();
    bench.pass_millis(90);
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
    bench.pass_millis(20);
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
}

#[test]
fn b33_a_frontend_that_is_connected_before_the_offer_connects() {
    let mut bench = Bench::backend();
    let vif = client_vif(7);
    bench.toolstack.attach(&vif);
    FakeFrontend::new(bench.store.clone(), vif.clone()).connect();
    bench.pass_millis(150);
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    assert_eq!(state_writes(&bench, &vif), "24");
}

#[test]
fn row_1_4_a_frontend_that_starts_anew_gets_5_6_2_and_connects_again() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(1);
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "562");
    assert!(bench.mapped.is_empty());
    frontend.connect();
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    assert_eq!((bench.connects, bench.disconnects), (2, 1));
}

#[test]
fn row_5_4_and_6_5_a_closing_frontend_is_mirrored_step_by_step() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(5);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("5"));
    assert!(bench.mapped.is_empty());
    frontend.set_state(6);
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "56");
}

#[test]
fn row_6_4_a_frontend_that_closes_at_once_gets_5_then_6() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(6);
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "56");
    // The toolstack has not asked: the folder stays.
    bench.pass(Duration::from_secs(60));
    assert!(bench.store.exists(&vif.backend_folder()));
    assert_eq!(bench.store.watches(SELF), 2);
}

#[test]
fn row_1_6_a_frontend_that_returns_is_offered_the_device_again() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(6);
    bench.settle();
    frontend.set_state(1);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
    frontend.connect();
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "5624");
}

#[test]
fn row_4_6_a_frontend_that_connects_without_waiting_is_connected_by_way_of_2() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(6);
    bench.settle();
    frontend.connect();
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "5624");
}

#[test]
fn row_23_78_foreign_states_change_nothing() {
    let (mut bench, vif, frontend) = connected();
    for state in [2, 3, 7, 8] {
        frontend.set_state(state);
        bench.pass(Duration::from_secs(1));
    }
    assert_eq!(state_writes(&bench, &vif), "");
    assert_eq!(bench.mapped.len(), 1);
}

#[test]
fn row_0_2_an_unused_device_stays_offered_for_ever() {
    let (mut bench, vif, _) = attached();
    bench.store.remove(&vif.frontend_folder());
    bench.pass(Duration::from_secs(3600));
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
}

#[test]
fn row_0_4_b27_a_vanished_frontend_disconnects_and_a_new_one_connects() {
    let (mut bench, vif, frontend) = connected();
    bench.store.remove(&vif.frontend_folder());
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "56");
    assert!(bench.mapped.is_empty());
    assert!(
        bench.store.exists(&vif.backend_folder()),
        "online is still 1"
    );
    let readers = [(SELF, xenstore::fake::Access::Read)];
    bench.store.create(
        &vif.frontend_folder(),
        "",
        vif.frontend,
        &readers,
        xenstore::fake::Access::None,
    );
    frontend.set_state(1);
    bench.settle();
    frontend.connect();
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
}

#[test]
fn b22_unusable_keys_are_refused_by_way_of_5_and_6() {
    for junk in ["", "x", "-1", "4294967296", &"9".repeat(1900)] {
        let (mut bench, vif, frontend) = attached();
        bench.pass_millis(150);
        frontend.publish();
        frontend.write("tx-ring-ref", junk);
        bench.store.take_journal();
        frontend.set_state(4);
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("5"));
        assert!(key(&bench, &vif, "error").unwrap().contains("tx-ring-ref"));
        bench.pass(Duration::from_secs(60));
        assert_eq!(
            state_writes(&bench, &vif),
            "56",
            "closed once, not tried again"
        );
        assert_eq!(bench.connects, 0);
        // It may start anew.
        frontend.set_state(1);
        bench.settle();
        assert_eq!(key(&bench, &vif, "error"), None);
        frontend.connect();
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    }
}

#[test]
fn b26_a_failure_at_any_step_of_connecting_is_undone_exactly() {
    // The kernel refuses: it has undone its own part, and is not asked to undo it again.
    let (mut bench, vif, frontend) = attached();
    bench.pass_millis(150);
    bench.vif_answer = Answer::No;
    frontend.connect();
    bench.pass(Duration::from_secs(10));
    assert_eq!(bench.own_state(&vif).as_deref(), Some("6"));
    assert_eq!((bench.connects, bench.disconnects), (1, 0));
    assert_eq!(
        bench.plane.vifs()[0].trouble.as_deref(),
        Some("the test says no")
    );

    // The state cannot be written after the rings were mapped.
    let (mut bench, vif, frontend) = attached();
    bench.pass_millis(150);
    bench
        .store
        .fail_next(xenstore::wire::kind::WRITE, "/0/state", "ENOSPC");
    frontend.connect();
    bench.settle();
    assert_eq!((bench.connects, bench.disconnects), (1, 1));
    assert_eq!(bench.store.watches(SELF), 1);
    bench.toolstack.request_detach(&vif);
    bench.pass(Duration::from_secs(4));
    assert!(
        !bench.store.exists(&vif.backend_folder()),
        "still removed when asked"
    );
}

#[test]
fn a_fault_in_the_rings_closes_the_vif_until_the_frontend_starts_anew() {
    let (mut bench, vif, frontend) = connected();
    let device = *bench.mapped.keys().next().unwrap();
    bench.plane.broken(device, "impossible number of requests");
    bench.settle();
    assert!(bench.mapped.is_empty());
    assert_eq!(
        key(&bench, &vif, "error").as_deref(),
        Some("impossible number of requests")
    );
    bench.pass(Duration::from_secs(10));
    frontend.set_state(4);
    bench.pass(Duration::from_secs(10));
    assert_eq!(state_writes(&bench, &vif), "56");
    frontend.set_state(6);
    bench.settle();
    frontend.connect();
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    // A report about a vif that is gone concerns nobody.
    bench.plane.broken(
        xenstore::VifId {
            generation: 77,
            ..device
        },
        "late",
    );
    bench.plane.connected(xenstore::VifId {
        generation: 77,
        ..device
    });
    bench.settle();
    assert_eq!(bench.mapped.len(), 1);
}

#[test]
fn b24_flapping_state_is_rate_limited() {
    let (mut bench, _, frontend) = connected();
    let before = bench.store.requests(SELF);
    let states = ["1", "4", "5", "6", "", "4x", "-1", "99999999999"];
    for millisecond in 0..10_000_u64 {
        frontend.write(
            "state",
            states[usize::try_from(millisecond).unwrap() % states.len()],
        );
        bench.pass_millis(1);
    }
    // 16 reactions at once, then 4 per second: 56 in 10 s, each of them at most a closing and an offer.
    let requests = bench.store.requests(SELF) - before;
    assert!(requests < 56 * 25, "{requests}");
    assert!(bench.connects + bench.disconnects < 2 * 57);
    assert!(bench.store.undelivered(SELF) <= 2);
    // The toolstack is not kept waiting by that.
    let vif = client_vif(7);
    bench.toolstack.request_detach(&vif);
    for millisecond in 0..4_000_u64 {
        frontend.write(
            "state",
            states[usize::try_from(millisecond).unwrap() % states.len()],
        );
        bench.pass_millis(1);
    }
    assert!(!bench.store.exists(&vif.backend_folder()));
    assert!(bench.mapped.is_empty());
}

#[test]
fn b25_connecting_and_closing_many_times_leaks_nothing() {
    let (mut bench, vif, frontend) = connected();
    let (paths, watches) = (bench.store.all_paths(), bench.store.watches(SELF));
    for round in 0..10_000 {
        frontend.set_state(if round % 2 == 0 { 6 } else { 1 });
        bench.pass_millis(300);
        frontend.set_state(1);
        bench.pass_millis(300);
        frontend.set_state(4);
        bench.pass_millis(300);
        assert_eq!(bench.own_state(&vif).as_deref(), Some("4"), "round {round}");
    }
    assert_eq!(bench.connects, bench.disconnects + 1);
    assert_eq!(
        (bench.store.all_paths(), bench.store.watches(SELF)),
        (paths, watches)
    );
    assert_eq!(bench.store.transactions(SELF), 0);
}

#[test]
fn b31_a_removal_is_obeyed_from_every_state_within_4_seconds() {
    type Move = fn(&FakeFrontend);
    let silent: Move = |_| {};
    let connect: Move = FakeFrontend::connect;
    let close: Move = |frontend| frontend.set_state(6);
    let closing: Move = |frontend| frontend.set_state(5);
    // What the frontend does before, and after, the toolstack's wish.
    let stories = [
        (silent, silent),
        (connect, silent),
        (connect, close),
        (connect, closing),
        (close, silent),
        (silent, connect),
    ];
    for (story, (before, after)) in stories.into_iter().enumerate() {
        let (mut bench, vif, frontend) = attached();
        bench.pass_millis(150);
        before(&frontend);
        bench.settle();
        bench.store.take_journal();
        bench.toolstack.request_detach(&vif);
        bench.pass_millis(10);
        after(&frontend);
        bench.pass_millis(3_990);
        assert!(!bench.store.exists(&vif.backend_folder()), "story {story}");
        let writes = state_writes(&bench, &vif);
        assert!(writes.ends_with('6'), "story {story}: {writes}");
        assert!(bench.mapped.is_empty());
        assert_eq!(bench.store.watches(SELF), 1);
        assert!(bench.plane.vifs().is_empty());
    }
}

/// A device that is being removed shows state 6 for a while, then its folder goes.
fn removal_ends(bench: &mut Bench, vif: &VifConfig) {
    bench.settle();
    assert_eq!(bench.own_state(vif).as_deref(), Some("6"), "6 was not seen");
    bench.pass_millis(190);
    assert_eq!(bench.own_state(vif).as_deref(), Some("6"), "gone too soon");
    bench.pass_millis(20);
    assert!(!bench.store.exists(&vif.backend_folder()));
}

#[test]
fn l4_state_6_stays_for_the_toolstack_to_see_before_the_folder_goes() {
    let (mut bench, vif, frontend) = connected();
    bench.toolstack.request_detach(&vif);
    bench.settle();
    frontend.set_state(6);
    removal_ends(&mut bench, &vif);
}

#[test]
fn l4_what_the_toolstack_puts_there_while_6_is_shown_is_not_removed() {
    let (mut bench, vif, frontend) = connected();
    bench.toolstack.request_detach(&vif);
    bench.settle();
    frontend.set_state(6);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("6"));
    bench.store.remove(&vif.backend_folder());
    bench.store.remove(&vif.frontend_folder());
    bench.toolstack.attach(&vif);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
}

#[test]
fn b31_a_frontend_that_closes_lets_the_removal_go_through_at_once() {
    let (mut bench, vif, frontend) = connected();
    bench.toolstack.request_detach(&vif);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("5"));
    assert!(bench.mapped.is_empty());
    frontend.set_state(6);
    removal_ends(&mut bench, &vif);
    assert_eq!(state_writes(&bench, &vif), "566");
}

#[test]
fn b31_forced_and_repeated_removal_end_the_same() {
    // The folder vanishes under us.
    let (mut bench, vif, _) = connected();
    bench.store.remove(&vif.backend_folder());
    bench.settle();
    assert!(bench.mapped.is_empty());
    assert_eq!(
        state_writes(&bench, &vif),
        "",
        "a removed folder is not brought back to life"
    );
    assert!(!bench.store.exists(&vif.backend_folder()));
    // Asked twice, and finished by the toolstack while we are at it.
    let (mut bench, vif, _) = connected();
    bench.toolstack.request_detach(&vif);
    bench.pass_millis(1000);
    bench.toolstack.request_detach(&vif);
    bench.pass_millis(1000);
    bench.toolstack.finish_detach(&vif);
    bench.pass(Duration::from_secs(10));
    assert!(!bench.store.exists(&format!("/local/domain/{SELF}/backend")));
    assert_eq!(bench.store.watches(SELF), 1);
}

#[test]
fn a_client_that_shuts_down_from_inside_is_removed_after_it_closed() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(5);
    bench.settle();
    frontend.set_state(6);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("6"));
    bench.store.remove(&vif.frontend_folder());
    bench.pass(Duration::from_secs(2));
    bench.toolstack.request_detach(&vif);
    removal_ends(&mut bench, &vif);
}

#[test]
fn b34_l13_a_destroyed_client_is_unmapped_and_removed_at_once() {
    let (mut bench, vif, _) = connected();
    bench.toolstack.destroy_frontend(&vif);
    bench.store.destroy(vif.frontend);
    bench.settle();
    assert!(bench.mapped.is_empty());
    removal_ends(&mut bench, &vif);
}

#[test]
fn all_parents_may_vanish_and_return() {
    let mut bench = Bench::backend();
    bench.settle();
    for client in 10..20 {
        let vif = client_vif(client);
        bench.toolstack.attach(&vif);
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("2"), "{client}");
        bench.toolstack.request_detach(&vif);
        removal_ends(&mut bench, &vif);
        bench.toolstack.finish_detach(&vif);
        assert!(!bench.store.exists(&format!("/local/domain/{SELF}/backend")));
        bench.settle();
    }
    assert_eq!(bench.store.watches(SELF), 1);
}

#[test]
fn a_device_that_the_toolstack_put_in_place_of_another_is_a_new_one() {
    let (mut bench, vif, frontend) = connected();
    let first = *bench.mapped.keys().next().unwrap();
    bench.store.remove(&vif.backend_folder());
    bench.store.remove(&vif.frontend_folder());
    let other = VifConfig {
        ip: Some("10.137.0.8".to_owned()),
        ..vif.clone()
    };
    bench.toolstack.attach(&other);
    bench.settle();
    assert!(bench.mapped.is_empty());
    assert_eq!(bench.own_state(&vif).as_deref(), Some("2"));
    bench.pass_millis(150);
    frontend.connect();
    bench.settle();
    let (second, parameters) = bench.mapped.iter().next().unwrap();
    assert!(second.generation > first.generation);
    assert_eq!(
        parameters.addresses,
        ["10.137.0.8".parse::<core::net::IpAddr>().unwrap()]
    );
}

#[test]
fn b35_two_vifs_with_one_address_are_two_handshakes() {
    let mut bench = Bench::backend();
    let guest = client_vif(8);
    let stubdom = VifConfig {
        ip: guest.ip.clone(),
        mac: guest.mac.clone(),
        ..client_vif(9)
    };
    bench.toolstack.attach(&guest);
    bench.toolstack.attach(&stubdom);
    FakeFrontend::new(bench.store.clone(), stubdom.clone()).connect();
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.own_state(&guest).as_deref(), Some("2"));
    assert_eq!(bench.own_state(&stubdom).as_deref(), Some("4"));
    FakeFrontend::new(bench.store.clone(), guest.clone()).connect();
    // The stub domain's driver is unbound and its folder deleted.
    bench.store.remove(&stubdom.frontend_folder());
    bench.settle();
    assert_eq!(bench.own_state(&guest).as_deref(), Some("4"));
    assert_eq!(bench.own_state(&stubdom).as_deref(), Some("6"));
    assert_eq!(
        bench
            .mapped
            .keys()
            .map(|device| device.client)
            .collect::<Vec<_>>(),
        [DomId(8)]
    );
}

#[test]
fn b32_a_hundred_clients_at_once_are_all_offered() {
    let mut bench = Bench::backend();
    // The default quota of nodes is enough for 55 clients.
    bench.store.set_node_quota(5000);
    bench.settle();
    let vifs: Vec<_> = (100..200).map(client_vif).collect();
    for vif in &vifs {
        bench.toolstack.attach(vif);
    }
    bench.settle();
    for vif in &vifs {
        assert_eq!(bench.own_state(vif).as_deref(), Some("2"));
        FakeFrontend::new(bench.store.clone(), vif.clone()).connect();
    }
    bench.pass_millis(200);
    assert_eq!(bench.mapped.len(), 100);
    let requests = bench.store.requests(SELF);
    assert!(requests < 100 * 50, "{requests}");
    assert!(bench.store.most_outstanding(SELF) <= xenstore::MAX_OUTSTANDING);
}

#[test]
fn a_device_too_many_waits_until_another_leaves() {
    let mut bench = Bench::backend();
    bench.store.set_node_quota(5000);
    let count = u16::try_from(MAX_VIFS).unwrap();
    let vifs: Vec<_> = (100..100 + count).map(client_vif).collect();
    for vif in &vifs {
        bench.toolstack.attach(vif);
    }
    bench.settle();
    let late = client_vif(3000);
    bench.toolstack.attach(&late);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.own_state(&late).as_deref(), Some("1"));
    bench.toolstack.request_detach(&vifs[4]);
    removal_ends(&mut bench, &vifs[4]);
    assert_eq!(bench.own_state(&late).as_deref(), Some("2"));
}

#[test]
fn p10_a_device_without_a_watch_is_refused_and_the_others_live() {
    let mut bench = Bench::backend();
    bench.store.set_watch_quota(3);
    let vifs: Vec<_> = (10..13).map(client_vif).collect();
    for vif in &vifs {
        bench.toolstack.attach(vif);
    }
    bench.settle();
    let states: Vec<_> = vifs
        .iter()
        .map(|vif| bench.own_state(vif).unwrap())
        .collect();
    assert_eq!(states.concat(), "221");
    assert_eq!(
        bench.plane.vifs()[2].trouble.as_deref(),
        Some("no watch left")
    );
    FakeFrontend::new(bench.store.clone(), vifs[0].clone()).connect();
    bench.pass_millis(150);
    assert_eq!(bench.mapped.len(), 1);
    bench.toolstack.request_detach(&vifs[2]);
    removal_ends(&mut bench, &vifs[2]);
}

#[test]
fn a_device_over_the_quota_of_nodes_is_refused_and_the_others_live() {
    let mut bench = Bench::backend();
    let vifs: Vec<_> = (100..170).map(client_vif).collect();
    for vif in &vifs {
        bench.toolstack.attach(vif);
        bench.settle();
    }
    let offered = |bench: &Bench| {
        vifs.iter()
            .filter(|vif| bench.own_state(vif).as_deref() == Some("2"))
            .count()
    };
    assert_eq!(offered(&bench), 55);
    let requests = bench.store.requests(SELF);
    bench.pass(Duration::from_secs(60));
    let requests = bench.store.requests(SELF) - requests;
    assert!(requests < 12 * 15 * 20, "tried again every 5 s: {requests}");
    // Twenty leave, and all others are served.
    for vif in &vifs[..20] {
        bench.toolstack.request_detach(vif);
        removal_ends(&mut bench, vif);
        bench.toolstack.finish_detach(vif);
    }
    bench.pass(Duration::from_secs(6));
    assert_eq!(offered(&bench), 50);
    bench.toolstack.request_detach(&vifs[69]);
    removal_ends(&mut bench, &vifs[69]);
    assert_eq!(bench.store.transactions(SELF), 0);
}

#[test]
fn b39_a_store_full_of_a_clients_nodes_changes_nothing() {
    let (mut bench, vif, frontend) = attached();
    frontend.publish();
    let mut accepted = 0;
    for number in 0..2000 {
        accepted += u32::from(frontend.write(&format!("junk-{number}"), "x"));
    }
    assert!(accepted < 1000, "the quota of the client");
    bench.pass_millis(150);
    frontend.set_state(4);
    bench.settle();
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    let other = client_vif(9);
    bench.toolstack.attach(&other);
    bench.settle();
    assert_eq!(bench.own_state(&other).as_deref(), Some("2"));
}

#[test]
fn b40_an_unusable_folder_of_ours_refuses_the_vif_until_it_is_corrected() {
    let mut bench = Bench::backend();
    let many = "10.0.0.1 ".repeat(100);
    for (broken, corrected) in [
        ("mac", "00:16:3e:5e:00:07"),
        ("ip", "10.137.0.7"),
        ("frontend-id", "7"),
    ] {
        let vif = client_vif(7);
        bench.toolstack.attach(&vif);
        bench.store.write(
            &format!("{}/{broken}", vif.backend_folder()),
            if broken == "ip" { &many } else { "8" },
        );
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("1"), "{broken}");
        assert!(
            bench.plane.vifs()[0]
                .trouble
                .as_deref()
                .unwrap()
                .contains(broken)
        );
        bench
            .store
            .write(&format!("{}/{broken}", vif.backend_folder()), corrected);
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("2"), "{broken}");
        bench.toolstack.request_detach(&vif);
        removal_ends(&mut bench, &vif);
        bench.toolstack.finish_detach(&vif);
        bench.settle();
    }
}

#[test]
fn the_kernel_may_answer_late_and_the_vif_waits_for_it() {
    let (mut bench, vif, frontend) = attached();
    bench.pass_millis(150);
    bench.vif_answer = Answer::Later;
    frontend.connect();
    bench.settle();
    bench.toolstack.request_detach(&vif);
    bench.pass(Duration::from_secs(20));
    assert_eq!(
        bench.own_state(&vif).as_deref(),
        Some("5"),
        "only the toolstack wrote"
    );
    assert_eq!(bench.disconnects, 0);
    bench.answer_late();
    bench.pass(Duration::from_secs(4));
    assert_eq!(bench.disconnects, 1);
    assert!(!bench.store.exists(&vif.backend_folder()));
}

#[test]
fn a_thousand_attach_and_detach_cycles_leave_nothing_behind() {
    let mut bench = Bench::backend();
    bench.settle();
    let (paths, watches) = (bench.store.all_paths(), bench.store.watches(SELF));
    for round in 0..1000_u16 {
        let vif = client_vif(10 + round);
        let frontend = FakeFrontend::new(bench.store.clone(), vif.clone());
        bench.toolstack.attach(&vif);
        bench.pass_millis(110);
        frontend.connect();
        bench.settle();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
        if round % 3 == 0 {
            bench.toolstack.destroy_frontend(&vif);
        } else {
            bench.toolstack.request_detach(&vif);
            bench.settle();
            frontend.set_state(6);
        }
        removal_ends(&mut bench, &vif);
        bench.toolstack.finish_detach(&vif);
        bench.store.destroy(vif.frontend);
        bench.settle();
    }
    assert_eq!(bench.store.all_paths(), paths);
    assert_eq!(bench.store.watches(SELF), watches);
    assert_eq!(bench.store.transactions(SELF), 0);
    assert_eq!((bench.connects, bench.disconnects), (1000, 1000));
}

#[test]
fn no_state_is_written_before_the_kernel_was_told_to_unmap() {
    let (mut bench, vif, frontend) = connected();
    frontend.set_state(6);
    for _ in 0..20 {
        bench.now = bench.now.plus(Duration::from_secs(1));
        bench.plane.poll(&mut bench.link, bench.now).unwrap();
        assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    }
    let Some(Event::Backend(BackendEvent::Disconnect { .. })) = bench.plane.next_event() else {
        panic!("no event");
    };
    assert_eq!(bench.own_state(&vif).as_deref(), Some("4"));
    bench.mapped.clear();
    bench.settle();
    assert_eq!(state_writes(&bench, &vif), "56");
}

/// Runs until `done`, with a store that answers everything asked so far, once per round. Returns the rounds.
fn round_trips(bench: &mut Bench, done: impl Fn(&Bench) -> bool) -> u32 {
    for round in 0..100 {
        if done(bench) {
            return round;
        }
        bench.store.freeze(true);
        for _ in 0..10 {
            bench.plane.poll(&mut bench.link, bench.now).unwrap();
            while let Some(event) = bench.plane.next_event() {
                bench.obey(event);
            }
        }
        bench.store.freeze(false);
        // The requests reach the store, the answers wait for the next round.
        bench.link.write(&[]).unwrap();
    }
    panic!("not done after 100 round trips");
}

#[test]
fn a_handshake_takes_few_requests_and_round_trips() {
    let mut bench = Bench::backend();
    let vif = client_vif(7);
    bench.settle();
    let idle = bench.store.requests(SELF);
    bench.toolstack.attach(&vif);
    let rounds = round_trips(&mut bench, |bench| {
        bench.own_state(&vif).as_deref() == Some("2")
    });
    bench.settle();
    let offered = bench.store.requests(SELF) - idle;
    assert!(
        rounds <= 8 && offered <= 24,
        "{rounds} round trips, {offered} requests"
    );
    bench.pass_millis(150);
    let idle = bench.store.requests(SELF);
    FakeFrontend::new(bench.store.clone(), vif.clone()).connect();
    let rounds = round_trips(&mut bench, |bench| {
        bench.own_state(&vif).as_deref() == Some("4")
    });
    bench.settle();
    let connected = bench.store.requests(SELF) - idle;
    assert!(
        rounds <= 5 && connected <= 16,
        "{rounds} round trips, {connected} requests"
    );
}
