//! Clients that lie about rings, ports and their own life: the adversarial backend tests of `xen-netif.md` 9.3
//! on connections and indices, each named after its case.
#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

use netback::{ConnectError, PeerError, Ring, Vif, VifTag};
use tests::attack::{SECOND, fatal, piece, request};
use tests::client::Client;
use tests::frames::pattern;
use tests::raw::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use tests::router::{FIRST_CLIENT, NETVM, ROUTER, Router, World, assert_nothing_left, straight};
use xen::fake::{FakeMachine, Operation};
use xen::netif::status;
use xen::page::RingMemory;
use xen::{Access, Errno, GrantRef, GrantStatus, Hypervisor, PortNumber};

#[test]
fn b1_impossible_tx_producer_is_fatal() {
    for jump in [257u32, 1000, 1 << 31, u32::MAX, u32::MAX - 300] {
        let mut world = World::new();
        world.client.tx_ring().shared().write_u32(REQ_PROD, jump);
        assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Tx));
        assert_eq!(
            world.router.hv.counters().copy_elements,
            1,
            "only the other client's frame"
        );
        world.close();
    }
}

#[test]
fn b1_tx_producer_going_backwards_is_fatal() {
    let mut world = World::new();
    for seed in 0..5 {
        world.client.transmit(&pattern(60, seed));
    }
    world.run();
    world.client.tx_ring().shared().write_u32(REQ_PROD, 3);
    assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Tx));
    world.netvm.take();
    world.close();
}

/// All 256 slots of garbage: no loop longer than the ring, one answer each.
#[test]
fn b1_a_full_ring_of_garbage_is_answered_slot_by_slot() {
    let mut world = World::new();
    for _ in 0..256 {
        world.client.put_request(request(u32::MAX, 0, 5, 0));
    }
    world.client.publish();
    world.run();
    assert_eq!(world.client.take_statuses(), [status::ERROR; 256]);
    assert_eq!(world.router.vif().counters().receive_errors.too_short, 256);
    world.close();
}

#[test]
fn b2_impossible_rx_producer_is_fatal() {
    let mut world = World::new();
    world.client.rx_ring().shared().write_u32(REQ_PROD, 257);
    world.netvm.deliver(&pattern(60, 1));
    assert_eq!(fatal(&mut world), PeerError::ImpossibleProducer(Ring::Rx));
    world.close();
}

/// Good frames before the bad one are in the batch when the vif is torn down and its domain dies.
#[test]
fn b11_malformed_frame_in_a_batch_then_teardown_leaves_nothing() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    router.connect_client(&client);
    for seed in 0..10 {
        client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    client.put_request(request(9, 4095, 100, 0));
    client.publish();
    let mut vif = router.vifs.pop().unwrap().unwrap();
    let budget = netback::Budget::default();
    let result = vif.receive(&mut router.hv, &mut router.batch, budget);
    assert_eq!(result, Err(PeerError::CrossesPage));
    assert!(!router.batch.is_empty(), "ten frames were taken before");
    vif.disconnect(&mut router.hv);
    machine.kill(FIRST_CLIENT);
    router.iterate(straight);
    router.close();
    assert_nothing_left(&machine, ROUTER);
    client.close();
    assert_nothing_left(&machine, FIRST_CLIENT);
}

/// Copies of a connection that is gone fail while the next one of that client has responses under way.
#[test]
fn b11_failures_of_a_former_connection_do_not_touch_the_next() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let budget = netback::Budget::default();
    let mut first = Client::new(&machine, FIRST_CLIENT, ROUTER);
    first.put_request(request(u32::MAX, 0, 100, 0));
    first.publish();
    let mut vif = Vif::connect(&mut router.hv, &first.parameters(VifTag(1))).unwrap();
    assert_eq!(
        vif.receive(&mut router.hv, &mut router.batch, budget),
        Ok(1)
    );
    vif.disconnect(&mut router.hv);
    let mut second = Client::new(&machine, FIRST_CLIENT, ROUTER);
    second.put_frame(&[piece(pattern(60, 1))], 0, None);
    second.publish();
    let mut vif = Vif::connect(&mut router.hv, &second.parameters(VifTag(2))).unwrap();
    assert_eq!(
        vif.receive(&mut router.hv, &mut router.batch, budget),
        Ok(1)
    );
    let mut failures = 0;
    router.batch.copy(&mut router.hv, |failure| {
        failures += 1;
        vif.amend(failure);
    });
    assert_eq!(failures, 1);
    let _ = vif.publish(&router.batch);
    assert_eq!(second.take_statuses(), [0]);
    assert_eq!(vif.counters().received_frames, 1);
    vif.disconnect(&mut router.hv);
    router.close();
    first.close();
    second.close();
    assert_nothing_left(&machine, ROUTER);
}

#[test]
fn b14_unusable_ring_references_refuse_the_connection() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let read_only = client.grant_page(Access::ReadOnly);
    let good = client.parameters(VifTag(0));
    for (gref, expected) in [
        (read_only.gref(), GrantStatus::PERMISSION_DENIED),
        (GrantRef(u32::MAX), GrantStatus::BAD_GNTREF),
        (GrantRef(0), GrantStatus::BAD_GNTREF),
    ] {
        for ring in [Ring::Tx, Ring::Rx] {
            let mut parameters = good;
            match ring {
                Ring::Tx => parameters.tx_ref = gref,
                Ring::Rx => parameters.rx_ref = gref,
            }
            let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
            assert_eq!(
                error,
                ConnectError::Map {
                    ring,
                    status: expected
                }
            );
            assert_nothing_left(&machine, ROUTER);
        }
    }
    client.take_back(read_only);
    client.close();
}

/// An event without ring work costs a look at two indices: no hypercall, no answer, no event back.
#[test]
fn b21_events_without_work_cost_nothing_but_a_look() {
    let mut world = World::new();
    world.run();
    let port = world.client.parameters(VifTag(0)).event_channel;
    let before = world.router.hv.counters();
    for _ in 0..1000 {
        world.client.hv.notify(&[port]);
        world.router.iterate(straight);
    }
    let after = world.router.hv.counters();
    assert_eq!(after.hypercalls, before.hypercalls);
    assert!(after.events_received <= before.events_received + 1000);
    world.close();
}

#[test]
fn b22_one_page_for_both_rings_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let mut parameters = client.parameters(VifTag(0));
    parameters.rx_ref = parameters.tx_ref;
    let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
    assert_eq!(error, ConnectError::SameRing);
    assert_nothing_left(&machine, ROUTER);
    client.close();
}

#[test]
fn b22_an_event_channel_that_is_not_ours_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    router.connect_client(&client);
    let connected = machine.resources(ROUTER);
    let mut fresh = Client::new(&machine, SECOND, ROUTER);
    let not_for_us = fresh.hv.allocate_port(NETVM).unwrap();
    let in_use = client.parameters(VifTag(0)).event_channel;
    for port in [
        PortNumber(0),
        PortNumber(999),
        PortNumber(u32::MAX),
        not_for_us.number(),
    ] {
        let mut parameters = fresh.parameters(VifTag(1));
        parameters.event_channel = port;
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, ConnectError::Bind(Errno::EINVAL));
        assert_eq!(machine.resources(ROUTER), connected);
    }
    // The port of a vif that is connected already.
    let mut parameters = client.parameters(VifTag(1));
    parameters.event_channel = in_use;
    let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
    assert_eq!(error, ConnectError::Bind(Errno::EINVAL));
    assert_eq!(machine.resources(ROUTER), connected);
    fresh.hv.close_port(not_for_us);
    router.close();
    fresh.close();
    client.transmit(&pattern(60, 1));
    client.close();
}

#[test]
fn b26_every_failing_connect_step_is_undone_exactly() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let parameters = client.parameters(VifTag(0));
    let failed = GrantStatus::GENERAL_ERROR;
    for (operation, skip, expected) in [
        (
            Operation::Map,
            0,
            ConnectError::Map {
                ring: Ring::Tx,
                status: failed,
            },
        ),
        (
            Operation::Map,
            1,
            ConnectError::Map {
                ring: Ring::Rx,
                status: failed,
            },
        ),
        (Operation::BindPort, 0, ConnectError::Bind(Errno::EINVAL)),
    ] {
        machine.fail(ROUTER, operation, skip);
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, expected);
        assert_nothing_left(&machine, ROUTER);
    }
    for (page, ring) in [(client.tx_ring(), Ring::Tx), (client.rx_ring(), Ring::Rx)] {
        page.shared().write_u32(REQ_PROD, 300);
        let error = Vif::connect(&mut router.hv, &parameters).unwrap_err();
        assert_eq!(error, ConnectError::Indices { ring });
        assert_nothing_left(&machine, ROUTER);
        page.shared().write_u32(REQ_PROD, 0);
    }
    let vif = Vif::connect(&mut router.hv, &parameters).unwrap();
    vif.disconnect(&mut router.hv);
    assert_nothing_left(&machine, ROUTER);
    client.close();
    assert_nothing_left(&machine, FIRST_CLIENT);
}

#[test]
fn b25_many_connections_leave_nothing() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let rounds = if cfg!(miri) { 20 } else { 10_000 };
    for round in 0..rounds {
        let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
        router.connect_client(&client);
        client.put_frame(&[piece(pattern(60, round))], 0, None);
        if round % 3 == 0 {
            client.publish();
            router.iterate(|_, _| None);
        }
        router
            .vifs
            .pop()
            .unwrap()
            .unwrap()
            .disconnect(&mut router.hv);
        client.close();
        router.vifs.clear();
    }
    router.close();
    assert_nothing_left(&machine, ROUTER);
    assert_nothing_left(&machine, FIRST_CLIENT);
}

/// A frontend that worked with another backend before us leaves indices that are not zero.
#[test]
fn attach_continues_after_the_last_response() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    let start = u32::MAX - 2;
    for at in [REQ_PROD, RSP_PROD] {
        client.tx_ring().shared().write_u32(at, start);
    }
    (client.tx_prod, client.tx_cons) = (start, start);
    for seed in 0..5 {
        client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    client.publish();
    router.connect_client(&client);
    let mut seen = 0;
    router.run(|_, _| {
        seen += 1;
        None
    });
    assert_eq!(seen, 5, "across the wrap of the indices");
    assert_eq!(client.take_statuses(), [0; 5]);
    router.close();
    client.close();
}

#[test]
fn b28_indices_of_ours_that_the_client_overwrites_are_not_read_back() {
    let mut world = World::new();
    world.client.post(20);
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state
    };
    for seed in 0..100 {
        for ring in [world.client.tx_ring(), world.client.rx_ring()] {
            ring.shared().write_u32(RSP_PROD, random());
            ring.shared().write_u32(REQ_EVENT, random());
            ring.shared().write_u32(RSP_EVENT, random());
        }
        world.client.put_frame(&[piece(pattern(60, seed))], 0, None);
        world.client.publish();
        world.netvm.deliver(&pattern(64, seed));
        world.run();
        assert_eq!(world.netvm.take().len(), 1);
        world.netvm.answer_all();
        // Our private index decides where responses go and what is published.
        assert_eq!(world.client.take_statuses(), [0]);
        assert_eq!(world.client.receive()[0].bytes, pattern(64, seed));
        world.client.post(1);
    }
    assert_eq!(world.router.client_errors, []);
    world.close();
}

#[test]
fn b30_a_client_without_rx_copy_is_refused() {
    let machine = FakeMachine::new();
    let mut router = Router::new(&machine);
    let mut client = Client::new(&machine, FIRST_CLIENT, ROUTER);
    client.features.rx_copy = false;
    let error = Vif::connect(&mut router.hv, &client.parameters(VifTag(0))).unwrap_err();
    assert_eq!(error, ConnectError::NoRxCopy);
    assert_nothing_left(&machine, ROUTER);
    client.close();
}

#[test]
fn b34_a_client_that_dies_with_full_rings_is_cleaned_up() {
    let mut world = World::new();
    world.client.post(100);
    for seed in 0..200 {
        world.client.put_frame(&[piece(pattern(60, seed))], 0, None);
    }
    world.client.publish();
    for seed in 0..50 {
        world.netvm.put_frame(&[(0, pattern(60, seed))], 0, None);
    }
    world.netvm.publish();
    world.machine.kill(FIRST_CLIENT);
    world.run();
    assert_eq!(
        world.netvm.take(),
        [],
        "nothing can be copied from the dead"
    );
    assert!(world.router.vif().counters().receive_errors.copy_failed > 0);
    world.close();
}
