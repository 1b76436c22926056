//! The whole kernel in a whole computer, without hardware: [`kernel::machine::Firewall`] over the fake machine and the fake
//! xenstore, beside the double of dom0, a netvm and clients.
//!
//! Everything runs in one thread, in ticks of simulated time. The VM sleeps for real: it is stepped again only when what
//! its last [`xen::Hypervisor::wait`] named has happened (a port is pending, xenstore has an answer, the time has come).
//! What the kernel forgets to wait for therefore stops a test, and so does a kernel that never sleeps.

use std::time::Duration;

use dom0_double::dom0::Dom0;
use dom0_double::qrexec::Greeting;
use dom0_double::scenario::{Progress, Runner, Scenario};
use firewall::Limits;
use kernel::filter::Options;
use kernel::machine::{Firewall, MachineView, Setup, Step};
use kernel::snapshot::{Scope, Snapshot};
use kernel::source::Source;
use qubes::vchan::channels::Channel;
use xen::fake::{FakeMachine, Resources};
use xen::stream::{ByteStream, StreamError};
use xen::{DomId, Hypervisor, PortNumber, Time};
use xenstore::fake::{FakeLink, FakeStore};
use xenstore::{ControlPlane, Shutdown};

pub mod dom0;
pub mod peers;
pub mod scenes;
pub mod sleeper;

use dom0::Dom0Channels;
use peers::{ClientSide, NetvmSide};
use sleeper::Sleeper;

/// The domain that runs the firewall.
pub const VM: DomId = DomId(7);
/// The event channel of the VM's xenstore connection.
const STORE_PORT: PortNumber = PortNumber(1);
/// Steps without sleep after which the kernel is said to spin.
const SPIN: u32 = 20_000;

/// A console whose reader keeps everything.
#[derive(Debug, Default)]
struct Console {
    text: Vec<u8>,
    /// Takes nothing more, as a console daemon that hangs.
    stuck: bool,
}

impl ByteStream for Console {
    fn read(&mut self, _: &mut [u8]) -> Result<usize, StreamError> {
        Ok(0)
    }
    fn write(&mut self, bytes: &[u8]) -> Result<usize, StreamError> {
        if self.stuck {
            return Ok(0);
        }
        self.text.extend(bytes);
        Ok(bytes.len())
    }
}

/// Everything that the firewall's domain holds, and what it has in xenstore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// Pages, grants, mappings and ports of the firewall.
    pub vm: Resources,
    /// Pages, grants, mappings and ports of dom0's daemons.
    pub dom0: Resources,
    /// Watches of the firewall in xenstore.
    pub watches: usize,
    /// Nodes that the firewall owns.
    pub owned: usize,
    /// All paths of the store.
    pub paths: Vec<String>,
}

/// The computer.
pub struct World {
    /// Pages, grants, ports, time.
    pub machine: FakeMachine,
    /// Nodes and watches.
    pub store: FakeStore,
    /// Both daemons of the VM; not there on plain Xen.
    pub dom0: Option<Dom0<Channel>>,
    /// dom0's end of the channels.
    pub channels: Dom0Channels,
    /// Who serves the uplink.
    pub netvm: Option<NetvmSide>,
    /// Who is connected, or about to.
    pub clients: Vec<ClientSide>,
    hv: Sleeper,
    link: FakeLink,
    console: Console,
    firewall: Firewall,
    /// Steps of the kernel so far.
    pub steps: u64,
    restless: u32,
    /// How long a tick is.
    pub tick: Duration,
    /// How the kernel ended, if it did.
    pub ended: Option<Shutdown>,
}

impl World {
    /// A VM about to take its first step, in a computer with Qubes OS' daemons.
    #[must_use]
    pub fn qubes() -> Self {
        Self::build(Some(Dom0::new(VM, Greeting::Echo)), Source::Open)
    }

    /// A VM about to take its first step, on plain Xen.
    #[must_use]
    pub fn plain() -> Self {
        Self::build(None, Source::Open)
    }

    /// As [`World::qubes`], with the keys that dom0 writes before it unpauses the VM, and three clients' rules.
    #[must_use]
    pub fn configured() -> Self {
        let mut world = Self::qubes();
        world.run(CONFIGURED);
        world
    }

    fn build(dom0: Option<Dom0<Channel>>, source: Source) -> Self {
        let machine = FakeMachine::new();
        let store = FakeStore::new();
        store.introduce(VM);
        let hv = machine.domain(VM);
        let setup = Setup {
            limits: Limits::for_memory(1024 * 1024),
            rx_buffers: 64,
            seed: [7; 32],
            started: hv.now(),
            running_at_start: Duration::ZERO,
            pool_pages: hv.free_pages(),
            ports: vec![STORE_PORT],
            options: Options::default(),
            source,
        };
        let control = ControlPlane::new(xenstore::Options::default());
        let mut world = Self {
            channels: Dom0Channels::new(machine.domain(DomId::DOM0), store.clone()),
            link: store.connect(VM),
            hv: Sleeper::new(hv),
            firewall: Firewall::new(setup, control, || (0, 0)),
            console: Console::default(),
            machine,
            store,
            dom0,
            netvm: None,
            clients: Vec::new(),
            steps: 0,
            restless: 0,
            tick: Duration::from_micros(100),
            ended: None,
        };
        // dom0's daemons are there, and have advertised themselves, before the VM's first instruction.
        world.step_dom0();
        world.step_dom0();
        world
    }

    /// What has ended the VM's sleep, if anything has.
    fn is_awake(&self) -> bool {
        let Some(sleep) = self.hv.asleep() else {
            return true;
        };
        self.store.undelivered(VM) > 0 && sleep.ports.contains(&STORE_PORT)
            || sleep
                .ports
                .iter()
                .any(|port| self.machine.is_pending(VM, *port))
            || sleep.deadline.is_some_and(|due| due <= self.machine.now())
    }

    /// One step of the kernel, if it does not sleep.
    fn step_vm(&mut self) {
        if self.ended.is_some() {
            return;
        }
        if !self.is_awake() {
            self.restless = 0;
            return;
        }
        self.restless += 1;
        assert!(self.restless < SPIN, "the kernel does not come to rest");
        self.steps += 1;
        self.hv.wake();
        match self
            .firewall
            .step(&mut self.hv, &mut self.link, &mut self.console)
        {
            Step::Continue => {}
            Step::End(end) => self.ended = Some(end),
            Step::StoreLost => panic!("the kernel gave xenstore up"),
        }
    }

    fn step_dom0(&mut self) {
        self.channels.serve();
        if let Some(dom0) = &mut self.dom0
            && let Err(fatal) = dom0.poll(&mut self.channels)
        {
            panic!("{fatal}");
        }
    }

    /// Lets everybody work once and a little time pass.
    pub fn step(&mut self) {
        self.step_vm();
        self.step_dom0();
        if let Some(netvm) = &mut self.netvm {
            netvm.poll(&self.machine);
        }
        for client in &mut self.clients {
            client.poll(&self.machine);
        }
        self.machine.advance(self.tick);
    }

    /// Lets so many ticks pass.
    pub fn ticks(&mut self, count: u64) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Steps until `what` is true, for at most `limit` of simulated time.
    ///
    /// Returns how long it took.
    pub fn until(
        &mut self,
        name: &str,
        limit: Duration,
        mut what: impl FnMut(&mut Self) -> bool,
    ) -> Duration {
        let began = self.machine.now();
        while !what(self) {
            let elapsed = self.machine.now().since(began);
            assert!(
                elapsed < limit,
                "no {name} within {limit:?}; console:\n{}",
                String::from_utf8_lossy(&self.console.text)
            );
            self.step();
        }
        self.machine.now().since(began)
    }

    /// Carries a scenario of the double out.
    pub fn run(&mut self, text: &str) -> Runner {
        let scenario = Scenario::parse(text).unwrap();
        let mut runner = Runner::new(scenario);
        loop {
            let dom0 = self.dom0.as_mut().expect("no Qubes OS");
            match runner.poll(dom0, &mut self.channels).unwrap() {
                Progress::Finished => return runner,
                Progress::Did(_) => {}
                Progress::Going => self.step(),
            }
        }
    }

    /// From now on the console takes nothing.
    pub const fn stop_console(&mut self) {
        self.console.stuck = true;
    }

    /// The double.
    pub fn dom0(&mut self) -> &mut Dom0<Channel> {
        self.dom0.as_mut().expect("no Qubes OS")
    }

    /// Attaches the VM to a netvm, and waits for the uplink.
    pub fn connect_netvm(&mut self, id: DomId) {
        self.netvm = Some(NetvmSide::attach(&self.store, id));
        self.until("uplink", Duration::from_secs(10), |world| {
            world.netvm.as_ref().is_some_and(NetvmSide::is_connected)
                && world
                    .snapshot(Scope::OVERVIEW)
                    .uplink
                    .is_some_and(|uplink| uplink.connected)
        });
    }

    /// Detaches the VM from its netvm.
    pub fn remove_netvm(&mut self) {
        self.netvm.as_mut().expect("no netvm").leave();
        self.until("end of the uplink", Duration::from_secs(10), |world| {
            world.netvm.as_ref().is_some_and(NetvmSide::is_gone)
        });
        self.netvm = None;
    }

    /// Attaches a client and waits until it is connected. Returns its index.
    pub fn connect_client(&mut self, id: DomId, address: &str) -> usize {
        let index = self.clients.len();
        self.clients
            .push(ClientSide::attach(&self.store, id, 0, address));
        self.until("client", Duration::from_secs(10), |world| {
            world.clients[index].is_connected()
        });
        index
    }

    /// Detaches the last client and destroys its domain.
    pub fn remove_client(&mut self) {
        self.clients.last_mut().expect("no client").leave();
        self.until("end of the client", Duration::from_secs(10), |world| {
            world.clients.last().is_some_and(ClientSide::is_gone)
        });
        if let Some(client) = self.clients.pop() {
            self.store.destroy(client.vif.frontend);
        }
    }

    /// What the firewall shows.
    #[must_use]
    pub fn snapshot(&self, scope: Scope) -> Snapshot {
        self.firewall.snapshot(&MachineView::of(&self.hv), scope)
    }

    /// How the VM sleeps now, if it does.
    #[must_use]
    pub const fn asleep(&self) -> Option<&sleeper::Sleep> {
        self.hv.asleep()
    }

    /// What is held now.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            vm: self.machine.resources(VM),
            dom0: self.machine.resources(DomId::DOM0),
            watches: self.store.watches(VM),
            owned: self.store.owned(VM),
            paths: self.store.all_paths(),
        }
    }

    /// The present time.
    #[must_use]
    pub fn now(&self) -> Time {
        self.machine.now()
    }
}

/// The keys of a firewall with a netvm, and the rules of three clients.
pub const CONFIGURED: &str = "
network fw 10.137.0.5 10.137.0.4 00:16:3e:5e:6c:00
client 10.137.0.9 10.137.0.5
client 10.137.0.10 10.137.0.5
client 10.137.0.11 10.137.0.5
rules 10.137.0.9
  0000 action=accept
rules 10.137.0.10
  0000 action=accept specialtarget=dns
  0003 action=accept dst4=192.0.2.0/24 proto=udp dstports=443-443
  0007 action=drop
rules 10.137.0.11
  0000 action=drop
";
