//! The product's vchan against the double's, which was written apart from it, in both roles and at several sizes.
#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helpers of tests: what goes wrong here must stop the test"
)]

use dom0_double::linux::ring::{Memory, Peer, Rings};
use qubes::vchan::client::Client;
use qubes::vchan::server::Server;
use qubes::vchan::{Orders, SharedBytes, duplex};
use xen::fake::{FakeHypervisor, FakeMachine, Resources};
use xen::stream::{ByteStream, StreamError};
use xen::{Access, DomId, GrantedPage, Hypervisor, MappedPage, Port};

const DOM0: DomId = DomId::DOM0;
const VM: DomId = DomId(7);

/// A page of the fake machine for the double. One thread, so reading and writing a byte is as good as an atomic.
struct Page<M>(M);

impl<M: SharedBytes> Memory for Page<M> {
    fn read_u32(&self, offset: usize) -> u32 {
        self.0.read_u32(offset)
    }
    fn write_u32(&self, offset: usize, value: u32) {
        self.0.write_u32(offset, value);
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        self.0.read_bytes(offset, to);
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        self.0.write_bytes(offset, from);
    }
    fn or_byte(&self, offset: usize, bits: u8) {
        let mut byte = [0];
        self.0.read_bytes(offset, &mut byte);
        self.0.write_bytes(offset, &[byte[0] | bits]);
    }
    fn take_bits(&self, offset: usize, bits: u8) -> u8 {
        let mut byte = [0];
        self.0.read_bytes(offset, &mut byte);
        self.0.write_bytes(offset, &[byte[0] & !bits]);
        byte[0] & bits
    }
}

/// An end that sleeps until it has an event.
trait End: ByteStream {
    fn flush(&mut self, hypervisor: &mut FakeHypervisor);
}

impl End for Server {
    fn flush(&mut self, hypervisor: &mut FakeHypervisor) {
        Server::flush(self, hypervisor);
    }
}

impl End for Client {
    fn flush(&mut self, hypervisor: &mut FakeHypervisor) {
        Client::flush(self, hypervisor);
    }
}

struct Reference<M> {
    rings: Rings<Page<M>>,
    port: Port,
}

impl<M: SharedBytes> ByteStream for Reference<M> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        self.rings.read(buffer)
    }
    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        self.rings.write(bytes)
    }
}

impl<M: SharedBytes> End for Reference<M> {
    fn flush(&mut self, hypervisor: &mut FakeHypervisor) {
        if self.rings.take_due() {
            hypervisor.notify(&[self.port.number()]);
        }
    }
}

/// Moves bytes both ways. Each end works only after it had an event.
fn exchange(
    machine: &FakeMachine,
    (one, one_hypervisor): (&mut impl End, &mut FakeHypervisor),
    (other, other_hypervisor): (&mut impl End, &mut FakeHypervisor),
    ports: [(DomId, xen::PortNumber); 2],
) {
    const TOTAL: usize = 300_000;
    let byte = |index: usize| u8::try_from(index * 7 % 251).unwrap_or_default();
    let bytes: Vec<u8> = (0..TOTAL).map(byte).collect();
    let (mut sent, mut read) = ([0; 2], [0; 2]);
    let mut seen = [u64::MAX; 2];
    let mut buffer = [0; 3000];
    for _ in 0..100_000 {
        let mut work = |which: usize, end: &mut dyn ByteStream| {
            let (domain, port) = ports[which];
            let events = machine.notifications(domain, port);
            if core::mem::replace(&mut seen[which], events) == events {
                return false;
            }
            // Until it can do no more: then it has asked for an event.
            loop {
                let written = end.write(&bytes[sent[which]..]).expect("fine");
                sent[which] += written;
                let got = end.read(&mut buffer).expect("fine");
                for value in &buffer[..got] {
                    assert_eq!(*value, byte(read[which]));
                    read[which] += 1;
                }
                if written == 0 && got == 0 {
                    return true;
                }
            }
        };
        let first = work(0, one);
        one.flush(one_hypervisor);
        let second = work(1, other);
        other.flush(other_hypervisor);
        if read == [TOTAL; 2] {
            return;
        }
        assert!(
            first || second,
            "an event was lost: sent {sent:?}, read {read:?}"
        );
    }
    panic!("it does not end");
}

fn sizes() -> [Orders; 4] {
    [
        Orders::for_sizes(1024, 1024).expect("small"),
        Orders::PAGES,
        Orders::QREXEC_CONTROL,
        Orders::QREXEC_DATA,
    ]
}

#[test]
fn our_server_and_the_references_client() {
    for orders in sizes() {
        let machine = FakeMachine::new();
        let (mut vm, mut dom0) = (machine.domain(VM), machine.domain(DOM0));
        let mut server = Server::open(&mut vm, DOM0, orders).expect("room");
        let port = dom0.bind_port(VM, server.port()).expect("for us");
        let map = |dom0: &mut FakeHypervisor, gref| Page(dom0.map(VM, gref).expect("granted"));
        let control: Page<MappedPage> = map(&mut dom0, server.ring_ref());
        let (announced, grants) = Rings::announced(&control).expect("sane");
        assert_eq!(announced, (orders.left().get(), orders.right().get()));
        let pages = grants
            .into_iter()
            .map(|gref| map(&mut dom0, xen::GrantRef(gref)))
            .collect();
        let mut client = Reference {
            rings: Rings::join(control, pages, announced),
            port,
        };
        client.flush(&mut dom0);
        assert_eq!(server.peer(), duplex::Peer::Alive);
        let ports = [(VM, server.port()), (DOM0, client.port.number())];
        exchange(
            &machine,
            (&mut server, &mut vm),
            (&mut client, &mut dom0),
            ports,
        );
        client.rings.leave();
        assert_eq!(server.peer(), duplex::Peer::Gone);
    }
}

#[test]
fn the_references_server_and_our_client() {
    for orders in sizes() {
        let machine = FakeMachine::new();
        let (mut vm, mut dom0) = (machine.domain(VM), machine.domain(DOM0));
        let mut grant = || {
            let mut page = dom0.allocate().expect("room");
            page.fill(0);
            dom0.grant(VM, page, Access::ReadWrite).expect("room")
        };
        let control: GrantedPage = grant();
        let ring_ref = control.gref();
        let pages: Vec<GrantedPage> = (0..orders.pages()).map(|_| grant()).collect();
        let grants: Vec<u32> = pages.iter().map(|page| page.gref().0).collect();
        let pages = pages.into_iter().map(Page).collect();
        let (left, right) = (orders.left().get(), orders.right().get());
        let rings = Rings::serve(Page(control), pages, &grants, (left, right));
        assert_eq!(rings.peer(), Peer::Awaited);
        let port = dom0.allocate_port(VM).expect("room");
        let mut server = Reference { rings, port };
        let mut client =
            Client::connect(&mut vm, DOM0, ring_ref, server.port.number()).expect("sane");
        assert_eq!(server.rings.peer(), Peer::There);
        let ports = [(DOM0, server.port.number()), (VM, client.port())];
        exchange(
            &machine,
            (&mut server, &mut dom0),
            (&mut client, &mut vm),
            ports,
        );
        client.close(&mut vm);
        assert_eq!(server.rings.peer(), Peer::Gone);
        assert_eq!(machine.resources(VM), Resources::default());
    }
}
