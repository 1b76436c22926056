//! The same scenarios over whole vchans between two domains of the fake machine, and what is left behind.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::world::{Machine, VM, World};
use dom0_double::qrexec::Greeting;
use qubes::vchan::channels::{Channel, Channels, Phase, Registry, XenChannels};
use qubes::vchan::fake_directory::FakeDirectory;
use qubes::vchan::{OpenError, Orders};
use xen::fake::{FakeHypervisor, FakeMachine, Resources};
use xen::{DomId, Hypervisor, Time};

/// One domain's channels, with their registry and the common xenstore.
struct Domain {
    hypervisor: FakeHypervisor,
    registry: Registry,
    directory: FakeDirectory,
}

impl Domain {
    fn xen(&mut self) -> XenChannels<'_, FakeHypervisor> {
        XenChannels {
            hypervisor: &mut self.hypervisor,
            registry: &mut self.registry,
        }
    }

    /// What a main loop does beside polling the protocols. Returns whether xenstore had anything to say.
    fn serve(&mut self) -> bool {
        self.hypervisor.wait(&[], None);
        self.registry.tend(&mut self.hypervisor);
        let own = self.hypervisor.own_domid();
        self.directory.serve(own, &mut self.registry)
    }
}

impl Channels for Domain {
    type Channel = Channel;
    fn listen(&mut self, peer: DomId, port: u32, orders: Orders) -> Result<Channel, OpenError> {
        self.xen().listen(peer, port, orders)
    }
    fn connect(&mut self, server: DomId, port: u32) -> Result<Channel, OpenError> {
        self.xen().connect(server, port)
    }
    fn progress(&mut self, channel: &mut Channel) -> Phase {
        self.xen().progress(channel)
    }
    fn flush(&mut self, channel: &mut Channel) {
        self.xen().flush(channel);
    }
    fn close(&mut self, channel: Channel) {
        self.xen().close(channel);
    }
    fn now(&self) -> Time {
        self.hypervisor.now()
    }
    fn deadline(&self, channel: &Channel) -> Option<Time> {
        channel.deadline()
    }
}

struct Xen {
    machine: FakeMachine,
    vm: Domain,
    dom0: Domain,
    directory: FakeDirectory,
    vm_sleep: Sleep,
    dom0_sleep: Sleep,
}

/// What a domain that sleeps has been told.
struct Sleep {
    /// Xenstore has said something since its last turn.
    told: bool,
    /// Events that each of its ports had received at its last turn.
    received: BTreeMap<u32, u64>,
}

impl Sleep {
    fn new() -> Self {
        Self {
            told: true,
            received: BTreeMap::new(),
        }
    }

    /// Whether the domain was told anything since the last time.
    fn ends<'a>(
        &mut self,
        machine: &FakeMachine,
        own: DomId,
        channels: impl Iterator<Item = &'a Channel>,
    ) -> bool {
        let ports = channels.filter_map(Channel::port);
        let received: BTreeMap<u32, u64> = ports
            .map(|port| (port.0, machine.notifications(own, port)))
            .collect();
        let before = core::mem::replace(&mut self.received, received);
        core::mem::take(&mut self.told) || before != self.received
    }
}

impl Machine for Xen {
    type Channels = Domain;
    fn vm(&mut self) -> &mut Domain {
        &mut self.vm
    }
    fn dom0(&mut self) -> &mut Domain {
        &mut self.dom0
    }
    fn pass(&mut self, duration: Duration) {
        self.machine.advance(duration);
        self.vm_sleep.told |= self.vm.serve();
        self.dom0_sleep.told |= self.dom0.serve();
    }

    /// Only an event, an answer of xenstore or a deadline wakes the VM, as in the kernel. What the product forgets to
    /// ask for, or a deadline that is missing, stops these tests.
    fn wakes<'a>(
        &mut self,
        channels: impl Iterator<Item = &'a Channel>,
        deadline: Option<Time>,
    ) -> bool {
        let told = self.vm_sleep.ends(&self.machine, VM, channels);
        let due = [deadline, self.vm.registry.deadline()];
        let now = self.vm.hypervisor.now();
        told || due.iter().flatten().any(|due| *due <= now)
    }

    /// What the product forgets to tell stops these tests too. The double has no deadlines; those of its clients are
    /// not needed here.
    fn wakes_dom0<'a>(&mut self, channels: impl Iterator<Item = &'a Channel>) -> bool {
        self.dom0_sleep.ends(&self.machine, DomId::DOM0, channels)
    }
}

fn world() -> World<Xen> {
    let machine = FakeMachine::new();
    let directory = FakeDirectory::default();
    let domain = |id| Domain {
        hypervisor: machine.domain(id),
        registry: Registry::new(),
        directory: directory.clone(),
    };
    let (vm, dom0) = (domain(VM), domain(DomId::DOM0));
    let xen = Xen {
        machine,
        vm,
        dom0,
        directory,
        vm_sleep: Sleep::new(),
        dom0_sleep: Sleep::new(),
    };
    World::new(xen, Greeting::Echo)
}

/// Everything that two connected daemons and nothing else hold.
fn at_rest(world: &mut World<Xen>) -> (Resources, Resources, usize, usize) {
    world.run("limit 30000\nwait synced\nwait qrexec\nsleep 2000");
    let machine = &world.machine;
    (
        machine.machine.resources(VM),
        machine.machine.resources(DomId::DOM0),
        machine.directory.nodes().len(),
        machine.directory.watches(),
    )
}

#[test]
fn life_of_a_firewall_over_vchan() {
    let mut world = world();
    world.run(include_str!("../../scenarios/life.txt"));
    let (vm, dom0, nodes, watches) = at_rest(&mut world);
    assert_eq!(
        vm,
        Resources {
            pages: 18,
            grants: 18,
            maps: 3,
            ports: 2
        }
    );
    assert_eq!(
        dom0,
        Resources {
            pages: 3,
            grants: 3,
            maps: 18,
            ports: 2
        }
    );
    assert_eq!((nodes, watches), (0, 0));
}

#[test]
fn calls_of_every_kind_over_vchan() {
    let mut world = world();
    let before = at_rest(&mut world);
    world.run(include_str!("../../scenarios/calls.txt"));
    assert_eq!(at_rest(&mut world), before);
}

#[test]
fn v2_more_than_a_ring_holds_in_both_directions_over_vchan() {
    let mut world = world();
    let before = at_rest(&mut world);
    world.run(include_str!("../../scenarios/flow.txt"));
    assert_eq!(at_rest(&mut world), before);
}

#[test]
fn v8_three_hundred_calls_in_sequence_and_twenty_at_once_leave_nothing() {
    let mut world = world();
    let before = at_rest(&mut world);
    world.run(include_str!("../../scenarios/load.txt"));
    assert_eq!(at_rest(&mut world), before);
}

#[test]
fn r5_q4_channels_that_are_lost_come_back_and_leave_nothing() {
    let mut world = world();
    let before = at_rest(&mut world);
    world.run(include_str!("../../scenarios/loss.txt"));
    for _ in 0..20 {
        world.run("drop qubesdb\nwait synced\ndrop qrexec\nwait qrexec\ncall 0 user:status");
    }
    assert_eq!(at_rest(&mut world), before);
}
