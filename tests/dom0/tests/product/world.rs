//! A VM with the product's QubesDB client, store and qrexec agent, beside the double of dom0.
#![expect(
    clippy::panic,
    reason = "a helper of tests: what goes wrong here must stop the test"
)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use dom0_double::dom0::Dom0;
use dom0_double::qrexec::Greeting;
use dom0_double::scenario::{Progress, Runner, Scenario};
use qubes::qrexec::{Agent, Command, Host, Output, Step, Uplink, exit};
use qubes::qubesdb::Link;
use qubes::reload::ReloadProgress;
use qubes::store::{Event, Store};
use qubes::vchan::channels::Channels;
use xen::{DomId, Time};

pub(crate) const VM: DomId = DomId(7);

/// Both domains' channels, and what makes time pass.
pub(crate) trait Machine {
    type Channels: Channels;
    fn vm(&mut self) -> &mut Self::Channels;
    fn dom0(&mut self) -> &mut Self::Channels;
    fn pass(&mut self, duration: Duration);
    /// Whether the VM, which sleeps until `deadline`, wakes now.
    fn wakes<'a>(
        &mut self,
        channels: impl Iterator<Item = &'a <Self::Channels as Channels>::Channel>,
        deadline: Option<Time>,
    ) -> bool
    where
        <Self::Channels as Channels>::Channel: 'a;
    /// Whether dom0's daemons wake now.
    fn wakes_dom0<'a>(
        &mut self,
        channels: impl Iterator<Item = &'a <Self::Channels as Channels>::Channel>,
    ) -> bool
    where
        <Self::Channels as Channels>::Channel: 'a;
}

/// What the commands act on.
#[derive(Default)]
pub(crate) struct Firewall {
    pub(crate) commands: u64,
    pub(crate) resumed: u64,
}

impl Host for Firewall {
    fn run(&mut self, command: &Command<'_>, out: &mut Output) -> Step {
        self.commands += 1;
        match command.words {
            ["status"] => {
                let _ = writeln!(out.stdout(), "uplink   connected, 10.137.0.5");
                Step::Exit(exit::OK)
            }
            ["table"] => {
                for line in 0..400 {
                    let _ = writeln!(
                        out.stdout(),
                        "line {:6} of the table",
                        command.cursor + line
                    );
                }
                if command.cursor >= 40_000 {
                    Step::Exit(exit::OK)
                } else {
                    Step::Again(command.cursor + 400)
                }
            }
            _ => {
                let _ = writeln!(out.stderr(), "unknown command; try `help`");
                Step::Exit(exit::UNKNOWN)
            }
        }
    }

    fn uplink(&self) -> Uplink {
        Uplink::Connected
    }

    fn suspending(&mut self) {}

    fn resumed(&mut self) {
        self.resumed += 1;
    }

    fn told_time(&mut self, _: i64) {}
}

/// The product's side: what the kernel will do, without packets.
pub(crate) struct Vm<C> {
    pub(crate) link: Link<C>,
    pub(crate) agent: Agent<C>,
    pub(crate) store: Store,
    pub(crate) firewall: Firewall,
    /// What is enforced: the number of rules, or `None` for "refuse everything".
    pub(crate) enforced: BTreeMap<IpAddr, Option<usize>>,
    /// Until when it sleeps if nothing happens.
    pub(crate) deadline: Option<Time>,
}

pub(crate) struct World<M: Machine> {
    pub(crate) machine: M,
    pub(crate) vm: Option<Vm<<M::Channels as Channels>::Channel>>,
    pub(crate) dom0: Dom0<<M::Channels as Channels>::Channel>,
    /// Lines of the scenario that were carried out.
    pub(crate) log: Vec<String>,
    /// The scenario has just done something in dom0.
    acted: bool,
}

impl<M: Machine> World<M> {
    pub(crate) fn new(machine: M, greeting: Greeting) -> Self {
        let mut world = Self {
            machine,
            vm: None,
            dom0: Dom0::new(VM, greeting),
            log: Vec::new(),
            acted: true,
        };
        world.boot();
        world
    }

    /// The VM starts.
    pub(crate) fn boot(&mut self) {
        self.vm = Some(Vm {
            link: Link::new(),
            agent: Agent::new(),
            store: Store::default(),
            firewall: Firewall::default(),
            enforced: BTreeMap::new(),
            deadline: Some(Time(0)),
        });
    }

    pub(crate) fn vm(&mut self) -> &mut Vm<<M::Channels as Channels>::Channel> {
        self.vm.as_mut().unwrap_or_else(|| panic!("the VM is off"))
    }

    /// One iteration of the kernel's loop.
    pub(crate) fn step_vm(&mut self) {
        let Some(vm) = &mut self.vm else {
            return;
        };
        let open = vm.link.channel().into_iter().chain(vm.agent.channels());
        if !self.machine.wakes(open, vm.deadline) {
            return;
        }
        let channels = self.machine.vm();
        let mut turns = 0;
        loop {
            let link = vm.link.poll(channels, &mut vm.store);
            while let Some(event) = vm.store.next_event() {
                if let Event::Commit(address) = event {
                    let reload = vm
                        .store
                        .reload(address)
                        .unwrap_or_else(|| panic!("committed"));
                    let rules = match reload.step(usize::MAX) {
                        ReloadProgress::Done(chain) => Some(chain.rules().len()),
                        _ => None,
                    };
                    vm.enforced.insert(address, rules);
                    if let Some((path, count)) = vm.store.handled(address) {
                        let (path, count) = (path.to_string(), count.to_string());
                        let written = vm.link.client().write(&path, count.as_bytes());
                        assert_eq!(written, Ok(()));
                    }
                }
            }
            let agent = vm.agent.poll(channels, &mut vm.firewall);
            let activity = link.and(agent);
            if !activity.more && !vm.link.wants_poll() && !vm.agent.wants_poll() {
                vm.deadline = activity.deadline;
                break;
            }
            turns += 1;
            assert!(turns < 100_000, "the VM does not come to rest");
        }
    }

    /// Lets everybody work once and a millisecond pass.
    pub(crate) fn step(&mut self) {
        self.step_vm();
        let channels = self.dom0.channels();
        if self.machine.wakes_dom0(channels) || core::mem::take(&mut self.acted) {
            let dom0 = self.dom0.poll(self.machine.dom0());
            if let Err(fatal) = dom0 {
                panic!("{fatal}");
            }
        }
        self.machine.pass(Duration::from_millis(1));
    }

    pub(crate) fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Carries a scenario out to its end.
    pub(crate) fn run(&mut self, text: &str) -> Runner {
        let scenario = Scenario::parse(text).unwrap_or_else(|error| panic!("{error}"));
        let mut runner = Runner::new(scenario);
        loop {
            let ports = self.dom0.qrexec.taken_ports();
            let polled = runner.poll(&mut self.dom0, self.machine.dom0());
            // Calls are begun within a statement.
            self.acted |= ports != self.dom0.qrexec.taken_ports();
            match polled {
                Ok(Progress::Finished) => {
                    self.acted = true;
                    return runner;
                }
                Ok(Progress::Did(line)) => {
                    self.acted = true;
                    self.log.push(line);
                }
                Ok(Progress::Going) => self.step(),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
