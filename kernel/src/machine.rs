//! The whole firewall: control plane, dom0's channels, settings, devices, data path and console, moved on in one loop.
//!
//! [`Firewall::step`] is one iteration. Nothing in it waits but [`Hypervisor::wait`] at its end, and only when
//! all rings are armed and empty; work on the control plane is done in small pieces between bursts of frames.
//! The same code runs on Xen and on the host over the fake hypervisor.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use firewall::Limits;
use qubes::qrexec;
use xen::stream::ByteStream;
use xen::{Hypervisor, HypervisorCounters, PortNumber, Time};
use xenstore::{ConfigEvent, ControlEvent, ControlPlane, Event, Shutdown};

use crate::command::{self, Invocation};
use crate::data_path::DataPath;
use crate::devices::{Change, Devices};
use crate::filter::{Filter, Options};
use crate::logger::LOGGER;
use crate::observe;
use crate::operator::Operator;
use crate::pace::Pace;
use crate::qubes_link::QubesLink;
use crate::rates::{Rate, Rates};
use crate::snapshot::{Client, Counter, Memory, Scope, Snapshot, Uplink};
use crate::source::Source;
use crate::terminal::Terminal;

/// Flows and fragments that may be expired in one iteration.
const EXPIRIES_PER_ITERATION: u32 = 48;
/// How long we wait for a source of settings before calls are served without one.
const LONELY: Duration = Duration::from_secs(3);
/// The longest sleep, so that counters and clocks are looked at now and then.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// What the firewall needs to know of the machine before it starts.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Sizes of the engine's tables.
    pub limits: Limits,
    /// Receive buffers towards the uplink, one page each.
    pub rx_buffers: u32,
    /// Unpredictable bytes: hash keys and port choice come from them.
    pub seed: [u8; 32],
    /// When the image's first instruction ran.
    pub started: Time,
    /// Processor time that Xen had counted for us by then: what it did itself before the first instruction.
    pub running_at_start: Duration,
    /// Pages in the pool.
    pub pool_pages: usize,
    /// The event channels that are not a device's: xenstore's, and the console's if there is one.
    pub ports: Vec<PortNumber>,
    /// Switches on the kernel command line.
    pub options: Options,
    /// Where the settings come from, if the command line decides that.
    pub source: Source,
}

/// What a snapshot takes from the hypervisor.
#[derive(Clone, Copy, Debug)]
pub struct MachineView {
    now: Time,
    counters: HypervisorCounters,
    free_pages: usize,
}

impl MachineView {
    /// As it is now.
    #[must_use]
    pub fn of<H: Hypervisor>(hv: &H) -> Self {
        Self {
            now: hv.now(),
            counters: hv.counters(),
            free_pages: hv.free_pages(),
        }
    }
}

/// How long it took to become ready for clients.
#[derive(Clone, Copy, Debug)]
struct Readiness {
    after_entry: Duration,
    /// Of that, how long the domain had the processor: the rest it waited for dom0, or while dom0 ran.
    running: Duration,
}

/// How the loop goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Call [`Firewall::step`] again.
    Continue,
    /// End the domain: dom0 asked for it.
    End(Shutdown),
    /// End the domain as crashed: the connection to xenstore is lost for good.
    StoreLost,
}

/// How much of the heap is used, told by whoever owns the allocator.
pub type HeapUse = fn() -> (u64, u64);

/// The whole firewall.
pub struct Firewall {
    control: ControlPlane,
    data: DataPath,
    devices: Devices,
    terminal: Terminal,
    /// Until it is known that this is no Qubes OS.
    qubes: Option<Box<QubesLink>>,
    source: Source,
    /// All of `vm-data` was seen while the source was open.
    seen_all: bool,
    setup: Setup,
    heap: HeapUse,
    pace: Option<Pace>,
    rates: Rates,
    ready: Option<Readiness>,
    end: Option<Shutdown>,
}

impl Firewall {
    /// A firewall without devices or settings. Allocates all tables of the data path.
    #[must_use]
    pub fn new(setup: Setup, control: ControlPlane, heap: HeapUse) -> Self {
        let filter = Filter::new(setup.limits, setup.seed, setup.options);
        Self {
            control,
            data: DataPath::new(filter),
            devices: Devices::new(setup.rx_buffers),
            terminal: Terminal::new(),
            qubes: Some(Box::new(QubesLink::new())),
            source: setup.source,
            seen_all: false,
            setup,
            heap,
            pace: None,
            rates: Rates::default(),
            ready: None,
            end: None,
        }
    }

    /// Does what there is to do, and sleeps if there is nothing.
    pub fn step<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        store: &mut impl ByteStream,
        console: &mut impl ByteStream,
    ) -> Step {
        let now = hv.now();
        LOGGER.set_uptime(now.since(self.setup.started));
        for port in &self.setup.ports {
            hv.take_pending(*port);
        }
        if !self.control_plane(hv, store, now) {
            return Step::StoreLost;
        }
        let dom0_busy = self.dom0(hv, now);
        self.serve_console(hv, console);
        if let Some(end) = self.end {
            return Step::End(end);
        }
        self.data.take_events(hv);
        let taken_before = self.data.counters().taken();
        let moved = self.data.iterate(hv);
        let taken = self.data.counters().taken().wrapping_sub(taken_before);
        let pace = self.pace.get_or_insert_with(|| Pace::measure(hv));
        if taken > 0 {
            pace.note(taken, now);
        }
        if self.rates.is_due(now) {
            self.rates.sample(self.data.vifs(), now);
        }
        self.devices
            .report_faults(&mut self.data, &mut self.control);
        let busy = self
            .data
            .filter
            .tick(filter_time(now), EXPIRIES_PER_ITERATION);
        // Rules that have just come into force are news for dom0; nothing else would wake us for them.
        let news = self.data.filter.has_report()
            && self.qubes.as_ref().is_some_and(|qubes| qubes.can_report());
        if moved || busy || dom0_busy || news {
            hv.refresh_time();
            return Step::Continue;
        }
        self.data.sweep_quarantine(hv);
        if let Some(time) = pace.gather() {
            let due = self.deadline(now).min(now.plus(time));
            hv.wait(&self.setup.ports, Some(due));
        } else if !self.data.arm() {
            self.sleep(hv, now);
        }
        Step::Continue
    }

    /// Sleeps until a port is pending or something is due.
    fn sleep<H: Hypervisor>(&self, hv: &mut H, now: Time) {
        let mut ports = self.setup.ports.clone();
        ports.extend(self.qubes.iter().flat_map(|qubes| qubes.ports()));
        ports.extend(self.data.ports());
        hv.wait(&ports, Some(self.deadline(now)));
    }

    /// When there is something to do even if nothing comes.
    fn deadline(&self, now: Time) -> Time {
        let filter = self.data.filter.next_deadline(filter_time(now));
        let filter = filter.map(|time| Time(time.as_nanos()));
        let qubes = self.qubes.as_ref().and_then(|qubes| qubes.deadline());
        [filter, qubes, self.data.deadline(), self.control.deadline()]
            .into_iter()
            .flatten()
            .fold(now.plus(LONGEST_SLEEP), Time::min)
    }

    /// Moves the control plane on. Returns whether the store is still there.
    fn control_plane<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        store: &mut impl ByteStream,
        now: Time,
    ) -> bool {
        // An event's answer may bring the next request at once: twice per iteration is prompt, and bounded.
        for _ in 0..2 {
            if let Err(error) = self.control.poll(store, now) {
                xen::error!("xenstore: {error}");
                return false;
            }
            let mut any = false;
            while let Some(event) = self.control.next_event() {
                any = true;
                self.obey(hv, event, now);
            }
            if !any {
                break;
            }
        }
        true
    }

    /// Moves on what dom0 of Qubes OS has to say, for as long as there may be one. Returns whether there is more to do.
    fn dom0<H: Hypervisor>(&mut self, hv: &mut H, now: Time) -> bool {
        let Some(mut qubes) = self.qubes.take() else {
            return false;
        };
        if self.source == Source::Xenstore {
            qubes.close(hv);
            qubes.exchange(&mut self.control, hv.own_domid());
            return false;
        }
        let found = qubes.follow_keys(hv, &mut self.data.filter, filter_time(now));
        if found && self.source == Source::Open {
            self.decide(Source::QubesDb);
        }
        // Calls only once vifs are served: dom0 takes our greeting as the end of our start. Without any source for a while
        // calls are served, too: dom0 may lack QubesDB and still kill a qube that does not greet it.
        let waited = now.since(self.setup.started) >= LONELY;
        let is_qubes = self.source == Source::QubesDb || waited;
        if is_qubes && self.ready.is_some() {
            let machine = MachineView::of(hv);
            let mut operator = Operator {
                firewall: self,
                machine,
            };
            qubes.serve_calls(hv, &mut operator);
        }
        qubes.exchange(&mut self.control, hv.own_domid());
        let busy = qubes.is_busy();
        self.qubes = Some(qubes);
        busy
    }

    fn decide(&mut self, source: Source) {
        xen::info!("settings come from {}", source.name());
        self.source = source;
    }

    /// A change below `vm-data`.
    fn config(&mut self, event: ConfigEvent, now: firewall::Time) {
        match (self.source, &event) {
            (Source::QubesDb, _) => return,
            (Source::Open, ConfigEvent::Ready) => {
                self.seen_all = true;
                xen::info!("waiting for settings: nothing below vm-data, no QubesDB");
                return;
            }
            (Source::Open, _) => {
                self.decide(Source::Xenstore);
                if self.seen_all {
                    self.data.filter.change(event, now);
                    return self.data.filter.settings_complete(now);
                }
            }
            (Source::Xenstore, _) => {}
        }
        self.data.filter.change(event, now);
    }

    fn obey<H: Hypervisor>(&mut self, hv: &mut H, event: Event, now: Time) {
        match event {
            Event::Backend(event) => {
                self.devices
                    .backend(hv, &mut self.data, &mut self.control, event);
            }
            Event::Uplink(event) => {
                let change =
                    self.devices
                        .uplink_event(hv, &mut self.data, &mut self.control, event);
                if change == Change::Uplink {
                    let mac = self.devices.uplink().map(|offer| offer.mac);
                    self.data.filter.set_uplink(mac, filter_time(now));
                }
            }
            Event::Config(event) => self.config(event, filter_time(now)),
            Event::Control(ControlEvent::Identity { name, .. }) => {
                let after_entry = hv.refresh_time().since(self.setup.started);
                let running = hv.running_time().map_or(after_entry, |running| {
                    running.saturating_sub(self.setup.running_at_start)
                });
                xen::info!(
                    "ready for clients as \"{name}\" after {} us of processor time, {} us after entry",
                    nanos(running) / 1000,
                    nanos(after_entry) / 1000
                );
                self.ready = Some(Readiness {
                    after_entry,
                    running,
                });
            }
            Event::Control(ControlEvent::Shutdown(end)) => {
                xen::info!("dom0 asks for {end:?}");
                self.end = Some(end);
            }
            Event::Control(ControlEvent::SysRq(key)) => {
                xen::info!("system request '{}' ignored", char::from(key));
            }
        }
    }

    /// Prints log lines, answers commands.
    fn serve_console<H: Hypervisor>(&mut self, hv: &H, console: &mut impl ByteStream) {
        while self.terminal.room() > crate::logger::LINE_BYTES
            && let Some(line) = LOGGER.take()
        {
            self.terminal.print_line(&line);
        }
        let mut lines: heapless::Vec<String, 4> = heapless::Vec::new();
        let _ = self.terminal.pump(console, |line| {
            // Commands start with a letter. A console that echoes (dom0's pty in cooked mode) sends us our own log lines
            // and error messages, none of which does; answering them would never end.
            if line.starts_with(|first: char| first.is_ascii_lowercase()) {
                let _ = lines.push(String::from(line));
            }
        });
        for line in lines {
            let text = self.answer(&MachineView::of(hv), &line);
            for line in text.lines() {
                self.terminal.print_line(line);
            }
        }
        // A console whose indices are impossible is dom0's fault and costs only the console.
        let _ = self.terminal.flush(console);
    }

    /// The output of a command line.
    #[must_use]
    pub fn answer(&self, machine: &MachineView, line: &str) -> String {
        match command::parse(line) {
            Ok(None) => String::new(),
            Ok(Some(invocation)) => self.run(machine, &invocation),
            Err(error) => alloc::format!("{error}"),
        }
    }

    /// The output of a command.
    #[must_use]
    pub fn run(&self, machine: &MachineView, invocation: &Invocation) -> String {
        let snapshot = self.snapshot(machine, invocation.scope());
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = invocation.render(&snapshot, &mut text);
        text
    }

    /// What can be seen now.
    #[must_use]
    pub fn snapshot(&self, machine: &MachineView, scope: Scope) -> Snapshot {
        let now = machine.now;
        let filter = &self.data.filter;
        let engine = filter.engine();
        let (heap_bytes, heap_used_bytes) = (self.heap)();
        let page_bytes = |pages: usize| {
            u64::try_from(pages)
                .unwrap_or(u64::MAX)
                .saturating_mul(4096)
        };
        Snapshot {
            release: Cow::Borrowed(env!("CARGO_PKG_VERSION")),
            uptime_nanos: nanos(now.since(self.setup.started)),
            ready_nanos: self.ready.map_or(0, |ready| nanos(ready.after_entry)),
            ready_running_nanos: self.ready.map_or(0, |ready| nanos(ready.running)),
            source: Cow::Borrowed(self.source.name()),
            missing: filter.settings().missing(),
            memory: Memory {
                heap_bytes,
                heap_used_bytes,
                pool_bytes: page_bytes(self.setup.pool_pages),
                pool_free_bytes: page_bytes(machine.free_pages),
            },
            counters: self.counters(machine),
            drops: observe::drops(engine.drops(), true),
            uplink: self.uplink_view(),
            clients: self.client_views(),
            flows_total: engine.flow_count(),
            flows: observe::flows(engine, scope.flows, scope.client, filter_time(now)),
            rules: if scope.rules {
                filter.rules(scope.client)
            } else {
                Vec::new()
            },
            log: if scope.log { log_lines() } else { Vec::new() },
        }
    }

    fn counters(&self, machine: &MachineView) -> Vec<Counter> {
        let mut counters = observe::engine(self.data.filter.engine().counters());
        counters.extend(observe::resolver(self.data.filter.resolver()));
        counters.extend(observe::main_loop(self.data.counters()));
        counters.extend(observe::hypervisor(&machine.counters));
        counters.extend(observe::store(&self.control.counters()));
        counters.extend(self.qubes.iter().flat_map(|qubes| qubes.counters()));
        let count = |value: usize| u64::try_from(value).unwrap_or(u64::MAX);
        for (name, value) in [
            ("store.watches", count(self.control.watch_count())),
            (
                "uplink.quarantined-pages",
                count(self.data.quarantined_pages()),
            ),
            ("console.dropped-bytes", self.terminal.dropped_bytes()),
            ("log.dropped-lines", LOGGER.dropped()),
            ("loop.exit-nanos", self.exit_nanos()),
        ] {
            counters.push(Counter {
                name: Cow::Borrowed(name),
                value,
            });
        }
        counters
    }

    /// What an exit into the hypervisor was measured to cost, in nanoseconds.
    fn exit_nanos(&self) -> u64 {
        nanos(self.pace.map_or(Duration::ZERO, |pace| pace.exit_cost()))
    }

    /// Where the uplink stands, for services that wait for the network.
    pub(crate) fn uplink_state(&self) -> qrexec::Uplink {
        match (self.data.uplink(), self.control.uplink().backend) {
            (Some(_), _) => qrexec::Uplink::Connected,
            (None, Some(_)) => qrexec::Uplink::Connecting,
            (None, None) => qrexec::Uplink::Absent,
        }
    }

    fn uplink_view(&self) -> Option<Uplink> {
        let status = self.control.uplink();
        let backend = status.backend?;
        let driver = self.data.uplink();
        let (ip4, ip6) = self.data.filter.own_addresses();
        Some(Uplink {
            domid: backend.0,
            connected: driver.is_some(),
            mac: self.devices.uplink().map_or([0; 6], |offer| offer.mac),
            ip4,
            ip6,
            counters: driver.map_or_else(Vec::new, |driver| observe::uplink(driver.counters())),
        })
    }

    fn client_views(&self) -> Vec<Client> {
        let engine: Vec<_> = self.data.filter.engine().clients().collect();
        let view = |status: xenstore::VifStatus| {
            let connected = self.devices.client(&status.device);
            let vif = connected.and_then(|client| self.data.vif(client.id));
            let seen = connected.and_then(|client| engine.iter().find(|view| view.id == client.id));
            let rate = connected.map_or_else(Rate::default, |client| self.rates.of(client.id));
            let driver = vif.map(netback::Vif::counters).copied().unwrap_or_default();
            Client {
                domid: status.device.client.0,
                handle: status.device.handle,
                mac: status.mac.unwrap_or_default(),
                addresses: status.addresses,
                connected: vif.is_some(),
                flows: seen.map_or(0, |seen| seen.flows),
                bytes_in: driver.received_bytes,
                bytes_out: driver.sent_bytes,
                frames_in: driver.received_frames,
                frames_out: driver.sent_frames,
                rate_in: rate.inward,
                rate_out: rate.outward,
                drops: seen.map_or_else(Vec::new, |seen| observe::drops(&seen.drops, false)),
                counters: observe::vif(&driver),
            }
        };
        self.control.vifs().into_iter().map(view).collect()
    }
}

/// A duration in nanoseconds, up to 584 years.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The last log lines.
fn log_lines() -> Vec<String> {
    let mut lines = Vec::new();
    LOGGER.recent(|line| lines.push(String::from(line)));
    lines
}

/// The time as the filter counts it.
const fn filter_time(now: Time) -> firewall::Time {
    firewall::Time::from_nanos(now.0)
}
