//! Whole channels between two domains of the fake machine: set-up, data, close, and what is left behind.

use alloc::vec::Vec;

use xen::fake::{FakeHypervisor, FakeMachine, Limits, Operation, Resources};
use xen::page::RingMemory;
use xen::stream::{ByteStream, StreamError};
use xen::{Access, DomId, GrantRef, Hypervisor, PortNumber};

use super::OpenError;
use super::channels::{Channel, Channels, LOOK_AGAIN, Phase, REVOKE_AGAIN, Registry, XenChannels};
use super::client::Client;
use super::fake_directory::FakeDirectory;
use super::layout::{CLIENT_LIVE, GRANTS, ORDERS, Orders, SERVER_LIVE};
use super::server::Server;

const DOM0: DomId = DomId::DOM0;
const VM: DomId = DomId(7);

/// One domain: its hypervisor, its registry, the common xenstore.
struct Domain {
    hypervisor: FakeHypervisor,
    registry: Registry,
    directory: FakeDirectory,
}

impl Domain {
    fn channels(&mut self) -> XenChannels<'_, FakeHypervisor> {
        XenChannels {
            hypervisor: &mut self.hypervisor,
            registry: &mut self.registry,
        }
    }

    fn serve(&mut self) {
        self.hypervisor.wait(&[], None);
        self.registry.tend(&mut self.hypervisor);
        let own = self.hypervisor.own_domid();
        self.directory.serve(own, &mut self.registry);
    }

    fn progress(&mut self, channel: &mut Channel) -> Phase {
        self.serve();
        self.channels().progress(channel)
    }
}

fn two_with(limits: Limits) -> (FakeMachine, Domain, Domain) {
    let machine = FakeMachine::new();
    let directory = FakeDirectory::default();
    let domain = |hypervisor| Domain {
        hypervisor,
        registry: Registry::new(),
        directory: directory.clone(),
    };
    let dom0 = domain(machine.domain(DOM0));
    let vm = domain(machine.domain_with(VM, limits));
    (machine, dom0, vm)
}

fn two() -> (FakeMachine, Domain, Domain) {
    two_with(Limits::default())
}

/// Lets a client and a server find each other.
fn join(server: (&mut Domain, &mut Channel), client: (&mut Domain, &mut Channel)) {
    for _ in 0..10 {
        server.0.serve();
        let there = client.0.progress(client.1) == Phase::Open;
        if server.0.progress(server.1) == Phase::Open && there {
            server.0.serve();
            client.0.serve();
            return;
        }
    }
    panic!("they did not find each other");
}

fn nothing_left(machine: &FakeMachine) {
    assert_eq!(machine.resources(DOM0), Resources::default());
    assert_eq!(machine.resources(VM), Resources::default());
}

#[test]
fn both_roles_at_every_size_carry_bytes_and_give_everything_back() {
    for orders in [
        Orders::for_sizes(1024, 1024).unwrap(),
        Orders::PAGES,
        Orders::QREXEC_CONTROL,
        Orders::QREXEC_DATA,
    ] {
        for vm_serves in [true, false] {
            let (machine, mut dom0, mut vm) = two();
            let (server_side, client_side) = if vm_serves {
                (&mut vm, &mut dom0)
            } else {
                (&mut dom0, &mut vm)
            };
            let (server_id, client_id) = if vm_serves { (VM, DOM0) } else { (DOM0, VM) };
            let mut server = server_side
                .channels()
                .listen(client_id, 600, orders)
                .unwrap();
            let mut client = client_side.channels().connect(server_id, 600).unwrap();
            join((server_side, &mut server), (client_side, &mut client));
            let bytes: Vec<u8> = (0..300_000u32)
                .map(|index| index.to_le_bytes()[0] ^ index.to_le_bytes()[1])
                .collect();
            let (mut at, mut back, mut out) = (0, 0, (Vec::new(), Vec::new()));
            let mut buffer = [0; 5000];
            while out.1.len() < bytes.len() {
                at += client.write(&bytes[at..]).unwrap();
                let read = server.read(&mut buffer).unwrap();
                out.0.extend_from_slice(&buffer[..read]);
                back += server.write(&out.0[back..]).unwrap();
                let read = client.read(&mut buffer).unwrap();
                out.1.extend_from_slice(&buffer[..read]);
            }
            assert!(out.0 == bytes && out.1 == bytes);
            client_side.channels().close(client);
            assert_eq!(server.read(&mut buffer), Err(StreamError));
            assert_eq!(server_side.progress(&mut server), Phase::Closed);
            server_side.channels().close(server);
            server_side.serve();
            nothing_left(&machine);
            assert_eq!(
                (dom0.directory.nodes().len(), dom0.directory.watches()),
                (0, 0)
            );
            assert_eq!((dom0.registry.awaited(), vm.registry.awaited()), (0, 0));
        }
    }
}

#[test]
fn every_wait_ends_with_an_event() {
    let (machine, mut dom0, mut vm) = two();
    let mut server = vm.channels().listen(DOM0, 512, Orders::PAGES).unwrap();
    let mut client = dom0.channels().connect(VM, 512).unwrap();
    join((&mut vm, &mut server), (&mut dom0, &mut client));
    let (server_port, client_port) = (server.port().unwrap(), client.port().unwrap());
    let mut buffer = [0; 4096];
    assert_eq!(server.read(&mut buffer), Ok(0));
    let before = machine.notifications(VM, server_port);
    client.write(b"ping").unwrap();
    assert_eq!(
        machine.notifications(VM, server_port),
        before,
        "sent by flush, not before"
    );
    dom0.channels().flush(&mut client);
    assert_eq!(machine.notifications(VM, server_port), before + 1);
    client.write(b"more").unwrap();
    dom0.channels().flush(&mut client);
    assert_eq!(
        machine.notifications(VM, server_port),
        before + 1,
        "not asked for again"
    );
    assert_eq!(server.write(&[1; 5000]), Ok(4096));
    let before = machine.notifications(VM, server_port);
    assert_eq!(client.read(&mut buffer[..1]), Ok(1));
    dom0.channels().flush(&mut client);
    assert_eq!(
        machine.notifications(VM, server_port),
        before + 1,
        "space was asked for"
    );
    let before = machine.notifications(DOM0, client_port);
    vm.channels().close(server);
    assert_eq!(
        machine.notifications(DOM0, client_port),
        before + 1,
        "a close always tells"
    );
    assert_eq!(dom0.progress(&mut client), Phase::Closed);
}

#[test]
fn v6_an_advertisement_disappears_when_its_client_has_come() {
    let (_machine, mut dom0, mut vm) = two();
    let mut server = vm
        .channels()
        .listen(DOM0, 512, Orders::QREXEC_CONTROL)
        .unwrap();
    vm.serve();
    let nodes = dom0.directory.nodes();
    assert_eq!(nodes.len(), 2);
    assert_eq!(nodes[0].0, "/local/domain/7/data/vchan/0/512/event-channel");
    assert_eq!(nodes[1].0, "/local/domain/7/data/vchan/0/512/ring-ref");
    let mut client = dom0.channels().connect(VM, 512).unwrap();
    join((&mut vm, &mut server), (&mut dom0, &mut client));
    vm.serve();
    assert!(dom0.directory.nodes().is_empty());
    // A client that comes back waits for the next advertisement.
    dom0.channels().close(client);
    let mut client = dom0.channels().connect(VM, 512).unwrap();
    for _ in 0..5 {
        assert_eq!(dom0.progress(&mut client), Phase::Opening);
        vm.serve();
    }
    vm.channels().close(server);
    let mut server = vm
        .channels()
        .listen(DOM0, 512, Orders::QREXEC_CONTROL)
        .unwrap();
    join((&mut vm, &mut server), (&mut dom0, &mut client));
}

#[test]
fn v6_a_stale_advertisement_is_not_taken() {
    let (machine, mut dom0, mut vm) = two();
    let server = Server::open(&mut vm.hypervisor, DOM0, Orders::PAGES).unwrap();
    let (ring_ref, port) = (server.ring_ref(), server.port());
    let first = Client::connect(&mut dom0.hypervisor, VM, ring_ref, port).unwrap();
    // The port is bound already.
    assert_eq!(
        Client::connect(&mut dom0.hypervisor, VM, ring_ref, port).err(),
        Some(OpenError::Stale)
    );
    first.close(&mut dom0.hypervisor);
    assert_eq!(
        Client::connect(&mut dom0.hypervisor, VM, ring_ref, port).err(),
        Some(OpenError::Stale)
    );
    let mut parked = Vec::new();
    server.close(&mut vm.hypervisor, &mut parked);
    assert!(parked.is_empty());
    assert_eq!(
        Client::connect(&mut dom0.hypervisor, VM, ring_ref, port).err(),
        Some(OpenError::Stale)
    );
    nothing_left(&machine);
}

#[test]
fn v7_numbers_of_zero_are_no_advertisement() {
    let (machine, mut dom0, _vm) = two();
    for (ring_ref, port) in [(0, 5), (9, 0)] {
        let result = Client::connect(
            &mut dom0.hypervisor,
            VM,
            GrantRef(ring_ref),
            PortNumber(port),
        );
        assert_eq!(result.err(), Some(OpenError::Stale));
    }
    nothing_left(&machine);
}

#[test]
fn a_client_that_comes_late_or_early_finds_the_server() {
    let (machine, mut dom0, mut vm) = two();
    let mut client = vm.channels().connect(DOM0, 111).unwrap();
    for _ in 0..5 {
        assert_eq!(vm.progress(&mut client), Phase::Opening);
    }
    assert!(
        vm.channels().deadline(&client).is_some(),
        "looks again without being told"
    );
    let mut server = dom0.channels().listen(VM, 111, Orders::PAGES).unwrap();
    dom0.serve();
    join((&mut dom0, &mut server), (&mut vm, &mut client));
    vm.channels().close(client);
    dom0.channels().close(server);
    nothing_left(&machine);
}

#[test]
fn a_client_without_working_watches_finds_the_server_by_looking() {
    let (machine, mut dom0, mut vm) = two();
    let mut client = vm.channels().connect(DOM0, 111).unwrap();
    // The watch is lost: xenstore refused it, for instance because too many exist.
    let watch = vm.registry.next_request();
    assert!(matches!(watch, Some(super::StoreRequest::Watch { .. })));
    for _ in 0..5 {
        assert_eq!(vm.progress(&mut client), Phase::Opening);
    }
    let mut server = dom0.channels().listen(VM, 111, Orders::PAGES).unwrap();
    dom0.serve();
    machine.advance(LOOK_AGAIN);
    join((&mut dom0, &mut server), (&mut vm, &mut client));
}

#[test]
fn a_search_that_is_given_up_leaves_no_watch() {
    let (_machine, _dom0, mut vm) = two();
    for _ in 0..300 {
        let mut client = vm.channels().connect(DOM0, 513).unwrap();
        vm.progress(&mut client);
        vm.channels().close(client);
        vm.serve();
    }
    assert_eq!((vm.directory.watches(), vm.registry.awaited()), (0, 0));
}

#[test]
fn l7_requests_to_xenstore_are_bounded_when_nobody_carries_them_out() {
    let (_machine, _dom0, mut vm) = two();
    let mut refused = 0;
    for _ in 0..1000 {
        match vm.channels().connect(DOM0, 513) {
            Ok(client) => vm.channels().close(client),
            Err(error) => {
                assert_eq!(error, OpenError::Exhausted);
                refused += 1;
            }
        }
    }
    assert!(refused > 900);
    let mut waiting = 0;
    while vm.registry.next_request().is_some() {
        waiting += 1;
    }
    assert!(waiting <= super::channels::REQUESTS_MAX, "{waiting}");
}

#[test]
fn whatever_fails_during_set_up_is_given_back() {
    for operation in [
        Operation::Allocate,
        Operation::Grant,
        Operation::AllocatePort,
    ] {
        for skip in 0..34 {
            let (machine, _dom0, mut vm) = two();
            machine.fail(VM, operation, skip);
            let failed = Server::open(&mut vm.hypervisor, DOM0, Orders::QREXEC_DATA).is_err();
            if failed {
                nothing_left(&machine);
            }
            assert_eq!(
                failed,
                skip < 33 && (operation != Operation::AllocatePort || skip == 0)
            );
        }
    }
    for operation in [Operation::Map, Operation::BindPort] {
        for skip in 0..34 {
            let (machine, mut dom0, mut vm) = two();
            let server = Server::open(&mut dom0.hypervisor, VM, Orders::QREXEC_DATA).unwrap();
            machine.fail(VM, operation, skip);
            let client =
                Client::connect(&mut vm.hypervisor, DOM0, server.ring_ref(), server.port());
            let failed = client.is_err();
            if failed {
                assert_eq!(machine.resources(VM), Resources::default());
            }
            assert_eq!(
                failed,
                skip < 33 && (operation != Operation::BindPort || skip == 0)
            );
        }
    }
}

#[test]
fn too_few_pages_or_holes_are_a_refusal_not_a_leak() {
    let limits = Limits {
        pages: 20,
        maps: 20,
        ..Limits::default()
    };
    let (machine, mut dom0, mut vm) = two_with(limits);
    assert!(
        vm.channels()
            .listen(DOM0, 513, Orders::QREXEC_DATA)
            .is_err()
    );
    assert_eq!(machine.resources(VM), Resources::default());
    let server = Server::open(&mut dom0.hypervisor, VM, Orders::QREXEC_DATA).unwrap();
    let client = Client::connect(&mut vm.hypervisor, DOM0, server.ring_ref(), server.port());
    assert_eq!(client.err(), Some(OpenError::Exhausted));
    assert_eq!(machine.resources(VM), Resources::default());
}

#[test]
fn pages_that_the_peer_still_has_are_parked_until_it_lets_go() {
    let (machine, mut dom0, mut vm) = two();
    let mut server = vm
        .channels()
        .listen(DOM0, 512, Orders::QREXEC_CONTROL)
        .unwrap();
    let mut client = dom0.channels().connect(VM, 512).unwrap();
    join((&mut vm, &mut server), (&mut dom0, &mut client));
    vm.channels().close(server);
    assert_eq!(vm.registry.parked_pages(), 18);
    assert!(vm.registry.deadline().is_some());
    machine.advance(REVOKE_AGAIN);
    vm.serve();
    assert_eq!(vm.registry.parked_pages(), 18, "still mapped");
    dom0.channels().close(client);
    machine.advance(REVOKE_AGAIN);
    vm.serve();
    assert_eq!(vm.registry.parked_pages(), 0);
    assert_eq!(vm.registry.deadline(), None);
    nothing_left(&machine);
}

#[test]
fn a_peer_that_never_lets_go_is_not_served_for_ever() {
    let (machine, mut dom0, mut vm) = two();
    let mut clients = Vec::new();
    let mut refused = false;
    for _ in 0..50 {
        let Ok(mut server) = vm.channels().listen(DOM0, 512, Orders::QREXEC_CONTROL) else {
            refused = true;
            break;
        };
        let mut client = dom0.channels().connect(VM, 512).unwrap();
        join((&mut vm, &mut server), (&mut dom0, &mut client));
        vm.channels().close(server);
        clients.push(client);
    }
    assert!(refused);
    assert!(machine.resources(VM).pages < 200);
    for client in clients {
        dom0.channels().close(client);
    }
    machine.advance(REVOKE_AGAIN);
    vm.serve();
    nothing_left(&machine);
}

#[test]
fn v8_three_hundred_channels_in_sequence_leave_nothing() {
    let (machine, mut dom0, mut vm) = two();
    for _ in 0..300 {
        let mut server = dom0
            .channels()
            .listen(VM, 513, Orders::QREXEC_DATA)
            .unwrap();
        let mut client = vm.channels().connect(DOM0, 513).unwrap();
        join((&mut dom0, &mut server), (&mut vm, &mut client));
        vm.channels().close(client);
        dom0.channels().close(server);
        dom0.serve();
    }
    nothing_left(&machine);
    assert!(dom0.directory.nodes().is_empty());
}

#[test]
fn a_peer_that_dies_is_noticed_by_its_live_byte_or_at_the_next_write() {
    let (machine, mut dom0, mut vm) = two();
    let mut server = vm.channels().listen(DOM0, 512, Orders::PAGES).unwrap();
    let mut client = dom0.channels().connect(VM, 512).unwrap();
    join((&mut vm, &mut server), (&mut dom0, &mut client));
    machine.kill(DOM0);
    // Nothing changes in the page; what is written goes nowhere, and closing is always possible.
    assert_eq!(server.write(b"hello"), Ok(5));
    vm.channels().flush(&mut server);
    vm.channels().close(server);
    assert_eq!(machine.resources(VM).ports, 0);
}

/// A hostile server: a granted page with anything in it.
#[test]
fn v3_any_control_page_is_survived() {
    let (machine, mut dom0, mut vm) = two();
    let mut state = 5u32;
    let mut connected = 0;
    for round in 0..400 {
        let mut page = dom0.hypervisor.allocate().unwrap();
        for byte in page.iter_mut() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = state.to_be_bytes()[0];
        }
        let granted = dom0.hypervisor.grant(VM, page, Access::ReadWrite).unwrap();
        granted.shared().write_bytes(CLIENT_LIVE, &[2]);
        granted.shared().write_bytes(SERVER_LIVE, &[1]);
        if round % 2 == 0 {
            // Sane orders, so that the rest is reached; the rings' pages are the control page itself.
            granted
                .shared()
                .write_u32(ORDERS, 0x000c_000a + (round % 3));
            granted.shared().write_u32(GRANTS, granted.gref().0);
            granted.shared().write_u32(GRANTS + 4, granted.gref().0);
        }
        let port = dom0.hypervisor.allocate_port(VM).unwrap();
        if let Ok(mut client) =
            Client::connect(&mut vm.hypervisor, DOM0, granted.gref(), port.number())
        {
            connected += 1;
            let mut buffer = [0; 3000];
            for _ in 0..20 {
                let _ = client.read(&mut buffer);
                let _ = client.write(&buffer);
                client.flush(&mut vm.hypervisor);
            }
            client.close(&mut vm.hypervisor);
        }
        dom0.hypervisor.close_port(port);
        let page = dom0.hypervisor.revoke(granted).unwrap();
        dom0.hypervisor.release(page);
    }
    assert!(connected > 50, "{connected}");
    nothing_left(&machine);
}
