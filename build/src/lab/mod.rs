//! Xen in QEMU: a dom0, a firewall and clients, without hardware.
//!
//! [`Lab`] is the running machine with its control channel; it knows domains
//! but nothing of their roles. [`topology`] describes who is connected to whom,
//! [`world`] builds that out of domains.
//!
//! ```text
//! dom0 (Linux PV)   = sys-net: uplink backend, and the "internet" (see internet)
//!   | vif
//! fw (our image, or Linux)   10.137.0.5/32 towards both sides
//!   | vif
//! c1, c2, ... (Linux)        10.137.0.6/32 ..., default route by 10.137.0.5
//! ```
//!
//! What is trusted: the packages (apt checks them) and everything in the lab.
//! What bounds it: every wait has a timeout, stretched on slow machines by
//! [`Lab::patience`]; the machine dies with this process.
#![doc = include_str!("measurements.md")]

pub mod console;
pub mod domain;
pub mod double;
pub mod internet;
pub mod link;
mod linux_firewall;
pub mod machine;
mod qmp;
mod snapshot;
pub mod timing;
pub mod topology;
pub mod world;

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lab_agent::protocol::{Reply, Request};

use crate::assets::Assets;
use crate::host::Qemu;
use crate::screen::Screen;
use crate::workspace::Workspace;
use console::Console;
use link::{Link, Output};
use machine::{Machine, MachineOptions};

/// How long a cold boot may take before it is given up.
const BOOT: Duration = Duration::from_secs(300);

/// How long a restored dom0 may take to answer.
const RESTORE: Duration = Duration::from_secs(60);

/// What the smallest command takes on the machine that the timeouts were made for.
const REFERENCE_COMMAND: Duration = Duration::from_millis(40);

/// Most that timeouts are stretched.
const MOST_STRETCH: f64 = 20.0;

/// Name of the snapshot that has dom0 alone.
const DOM0_LAYER: &str = "dom0";

/// Everything that is needed to start a lab.
#[derive(Debug, Clone)]
pub struct Base {
    /// This clone.
    pub workspace: Workspace,
    /// The emulator.
    pub qemu: Qemu,
    /// What is booted.
    pub assets: Assets,
}

impl Base {
    /// Finds or fetches everything; see [`crate::host`] and [`crate::assets`].
    ///
    /// # Errors
    ///
    /// If this machine cannot run a lab, or a package cannot be had.
    pub fn prepare(workspace: &Workspace, screen: &Screen, refresh: bool) -> Result<Self> {
        let qemu = crate::host::prepare(screen)?;
        let assets = crate::assets::prepare(workspace, screen, refresh)?;
        Ok(Self {
            workspace: workspace.clone(),
            qemu,
            assets,
        })
    }
}

/// How a lab is started.
#[derive(Debug, Clone, Copy, Default)]
pub struct LabOptions {
    /// The machine.
    pub machine: MachineOptions,
    /// Boots although a snapshot exists, and makes none.
    pub cold: bool,
}

/// How a lab was started, and how long that took.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// From a snapshot, or by booting.
    pub restored: bool,
    /// Until dom0 answered, by the host's clock.
    pub time: Duration,
}

/// The consoles that are being relayed.
#[derive(Debug, Default)]
struct Consoles {
    open: HashMap<u32, (Console, Option<Link>)>,
}

/// A running lab; dropped, it is gone.
#[derive(Debug)]
pub struct Lab {
    base: Base,
    options: LabOptions,
    machine: Machine,
    dom0: Link,
    consoles: Arc<Mutex<Consoles>>,
    start: Start,
    stretch: f64,
}

impl Lab {
    /// Starts a lab with dom0 alone: from its snapshot, or by booting, after
    /// which the snapshot is made.
    ///
    /// # Errors
    ///
    /// If it does not come up; the error quotes QEMU and Xen.
    pub fn start(base: &Base, screen: &Screen, options: LabOptions) -> Result<Self> {
        if let Some(lab) = Self::restore(base, screen, options, DOM0_LAYER)? {
            return Ok(lab);
        }
        let step = screen.step("Booting Xen and dom0");
        let begun = Instant::now();
        let machine = Machine::start(
            &base.workspace,
            &base.qemu,
            &base.assets,
            &options.machine,
            None,
        )?;
        let mut lab = Self::connect(base, options, machine)?;
        lab.dom0.wait_ready(BOOT, || lab.alive())?;
        lab.start = Start {
            restored: false,
            time: begun.elapsed(),
        };
        step.done("");
        lab.calibrate()?;
        lab.save(screen, DOM0_LAYER)?;
        Ok(lab)
    }

    /// Starts a lab from the snapshot of a layer that [`Lab::save`] has made;
    /// `None` if there is none that fits.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started at all. A snapshot that cannot be used is
    /// removed.
    pub fn restore(
        base: &Base,
        screen: &Screen,
        options: LabOptions,
        layer: &str,
    ) -> Result<Option<Self>> {
        let place = snapshot::place(
            &base.workspace,
            &base.qemu,
            &base.assets,
            &options.machine,
            layer,
        )?;
        if options.cold || !place.is_file() {
            return Ok(None);
        }
        let step = screen.step(format!("Restoring the lab ({layer})"));
        match Self::start_from(base, options, &place) {
            Ok(lab) => {
                snapshot::touch(&place);
                step.done("");
                Ok(Some(lab))
            }
            Err(error) => {
                drop(step);
                screen.warn(&format!(
                    "the snapshot is of no use, booting instead: {error:#}"
                ));
                std::fs::remove_file(&place).context("cannot remove the snapshot")?;
                Ok(None)
            }
        }
    }

    fn start_from(base: &Base, options: LabOptions, place: &Path) -> Result<Self> {
        let begun = Instant::now();
        let machine = Machine::start(
            &base.workspace,
            &base.qemu,
            &base.assets,
            &options.machine,
            Some(place),
        )?;
        machine
            .connect_monitor()?
            .finish_restore()
            .with_context(|| machine.last_words())?;
        let mut lab = Self::connect(base, options, machine)?;
        lab.dom0.wait_ready(RESTORE, || lab.alive())?;
        lab.for_each_guest("unpause")?;
        lab.start = Start {
            restored: true,
            time: begun.elapsed(),
        };
        lab.calibrate()?;
        Ok(lab)
    }

    /// Keeps the lab as it is now as the snapshot of `layer`.
    ///
    /// A machine that cannot be saved (nested guests under KVM) is no error.
    ///
    /// # Errors
    ///
    /// If the machine does not run on afterwards.
    pub fn save(&self, screen: &Screen, layer: &str) -> Result<()> {
        if self.options.cold {
            return Ok(());
        }
        let base = &self.base;
        let place = snapshot::place(
            &base.workspace,
            &base.qemu,
            &base.assets,
            &self.options.machine,
            layer,
        )?;
        let step = screen.step(format!("Keeping a snapshot ({layer})"));
        // QEMU refuses to load a machine that was stopped while its CPU ran an
        // HVM guest ("set in guest-mode inconsistent with nested state").
        self.for_each_guest("pause")?;
        let mut monitor = self.machine.connect_monitor()?;
        match snapshot::save(&base.workspace, &self.machine, &mut monitor, &place) {
            Ok(()) => step.done(""),
            Err(error) => {
                drop(step);
                screen.warn(&format!(
                    "no snapshot, the next start will be a boot: {error:#}"
                ));
            }
        }
        self.dom0
            .wait_ready(self.patience(RESTORE), || self.alive())?;
        self.for_each_guest("unpause")
    }

    /// Has `xl` do something with every domain but dom0.
    fn for_each_guest(&self, action: &str) -> Result<()> {
        let each = format!(
            "xl list | awk 'NR > 2 {{ print $1 }}' | while read -r name; do xl {action} \"$name\" || exit 1; done"
        );
        self.dom0.ask(&each, self.patience(RESTORE)).map(drop)
    }

    fn connect(base: &Base, options: LabOptions, machine: Machine) -> Result<Self> {
        let control = machine.connect_control()?;
        let writer = Mutex::new(
            control
                .try_clone()
                .context("cannot share the control channel")?,
        );
        let dom0 = Link::new("dom0", move |line| {
            writer
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write_all(line.as_bytes())
        });
        let consoles = Arc::new(Mutex::new(Consoles::default()));
        let (link, there) = (dom0.clone(), Arc::clone(&consoles));
        thread::spawn(move || listen(control, &link, &there));
        let start = Start {
            restored: false,
            time: Duration::ZERO,
        };
        Ok(Self {
            base: base.clone(),
            options,
            machine,
            dom0,
            consoles,
            start,
            stretch: 1.0,
        })
    }

    /// Measures how fast the lab is here and now.
    fn calibrate(&mut self) -> Result<()> {
        let mut times = Vec::new();
        for _ in 0..3 {
            let begun = Instant::now();
            self.dom0.ask("true", RESTORE)?;
            times.push(begun.elapsed());
        }
        times.sort();
        let middle = times.get(1).copied().unwrap_or(REFERENCE_COMMAND);
        self.stretch =
            (middle.as_secs_f64() / REFERENCE_COMMAND.as_secs_f64()).clamp(1.0, MOST_STRETCH);
        Ok(())
    }

    /// A timeout made for the reference machine, stretched for this one.
    #[must_use]
    pub fn patience(&self, timeout: Duration) -> Duration {
        timeout.mul_f64(self.stretch)
    }

    /// How the lab was started.
    #[must_use]
    pub fn start_time(&self) -> Start {
        self.start
    }

    /// What the lab was made from.
    #[must_use]
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The folder with the logs of Xen, dom0 and QEMU.
    #[must_use]
    pub fn log_folder(&self) -> &Path {
        self.machine.folder()
    }

    /// The way to dom0.
    #[must_use]
    pub fn dom0(&self) -> &Link {
        &self.dom0
    }

    /// Runs a command in dom0 that must succeed, within `timeout` (stretched).
    ///
    /// # Errors
    ///
    /// If it does not succeed or the lab is gone.
    pub fn ask(&self, command: &str, timeout: Duration) -> Result<String> {
        self.dom0
            .ask(command, self.patience(timeout))
            .map_err(|error| self.explain(error))
    }

    /// Runs a command in dom0, within `timeout` (stretched).
    ///
    /// # Errors
    ///
    /// If the lab is gone.
    pub fn run(&self, command: &str, timeout: Duration) -> Result<Output> {
        self.dom0
            .run(command, self.patience(timeout))
            .map_err(|error| self.explain(error))
    }

    /// Writes a file in dom0.
    ///
    /// # Errors
    ///
    /// If it cannot be written or the lab is gone.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let timeout = self.patience(Duration::from_secs(60));
        self.dom0
            .put(path, mode, content, timeout)
            .map_err(|error| self.explain(error))
    }

    /// An error if the machine is gone.
    fn alive(&self) -> Result<()> {
        if self.machine.is_running() {
            return Ok(());
        }
        bail!("QEMU has ended\n{}", self.machine.last_words())
    }

    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        match self.alive() {
            Ok(()) => error,
            Err(end) => error.context(end),
        }
    }

    /// Starts relaying the console of a domain; with an agent behind it, if
    /// `name` is given.
    fn open_console(
        &self,
        domid: u32,
        tty: &str,
        name: Option<&str>,
    ) -> Result<(Console, Option<Link>)> {
        let console = Console::new(domid, self.dom0.clone());
        let agent = name.map(|name| {
            let console = console.clone();
            Link::new(name, move |line| {
                console.send(line.as_bytes()).map_err(std::io::Error::other)
            })
        });
        let opened = (console, agent);
        lock(&self.consoles).open.insert(domid, opened.clone());
        self.dom0.send(&Request::Open {
            domid,
            tty: tty.to_owned(),
        })?;
        Ok(opened)
    }
}

/// Reads the control channel until it ends.
fn listen(mut control: UnixStream, dom0: &Link, consoles: &Mutex<Consoles>) {
    let mut buffer = vec![0; 256 * 1024];
    while let Ok(len @ 1..) = control.read(&mut buffer) {
        dom0.feed(buffer.get(..len).unwrap_or_default(), |reply| {
            if let Reply::Console { domid, bytes } = reply {
                pass_on(consoles, domid, &bytes);
            }
        });
    }
    dom0.lose();
    for (_, (console, agent)) in lock(consoles).open.drain() {
        console.feed(b"");
        if let Some(agent) = agent {
            agent.lose();
        }
    }
}

/// Gives the bytes of a domain's console to its transcript and its agent's link.
fn pass_on(consoles: &Mutex<Consoles>, domid: u32, bytes: &[u8]) {
    let mut consoles = lock(consoles);
    let Some((console, agent)) = consoles.open.get(&domid).cloned() else {
        return;
    };
    if bytes.is_empty() {
        consoles.open.remove(&domid);
    }
    drop(consoles);
    console.feed(bytes);
    if let Some(agent) = agent {
        if bytes.is_empty() {
            agent.lose();
        } else {
            // A guest relays nothing.
            agent.feed(bytes, |_| {});
        }
    }
}

fn lock(consoles: &Mutex<Consoles>) -> MutexGuard<'_, Consoles> {
    consoles.lock().unwrap_or_else(PoisonError::into_inner)
}
