//! `cargo xtask lab`: the lab for a person.
//!
//! A line is run in dom0, or in the guest whose name stands before it; the
//! firewall image's console takes its lines after `fw`. Output comes as it is
//! written, Ctrl-C kills the command and nothing else.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use rustyline::error::ReadlineError;

use crate::assets;
use crate::host::Unusable;
use crate::image::{self, Variant};
use crate::lab::double::Double;
use crate::lab::link::{Job, Link, Progress};
use crate::lab::machine::MachineOptions;
use crate::lab::topology::{FirewallKind, Topology};
use crate::lab::world::{LabWorld, WorldOptions};
use crate::lab::{Base, Lab, LabOptions};
use crate::lab_check;
use crate::screen::{BOLD, DIM, Screen, paint};
use crate::workspace::Workspace;

/// Names a firewall image to use instead of building one.
const IMAGE_VARIABLE: &str = "PORTCULLIS_IMAGE";

/// Longest life of a command that a person types.
const COMMAND: Duration = Duration::from_secs(24 * 3600);

/// How long the firewall's console must be silent to be taken for done.
const SILENCE: Duration = Duration::from_millis(400);

/// Set by Ctrl-C, cleared by whoever acts on it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Arguments of `cargo xtask lab`.
#[derive(Debug, Args)]
pub struct LabArguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// What stands between the uplink and the clients
    #[arg(long, value_enum, default_value_t = Firewall::Image, global = true)]
    firewall: Firewall,
    /// The firewall image to run; without it, one is built ($PORTCULLIS_IMAGE works too)
    #[arg(long, value_name = "FILE", global = true)]
    image: Option<PathBuf>,
    /// How many client qubes to create
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=100), global = true)]
    clients: u8,
    /// Memory of the lab's machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = crate::lab::machine::DEFAULT_MEMORY_MIB, global = true)]
    memory: u32,
    /// Let guest time follow the instruction count, 2^SHIFT ns each, for measurements
    #[arg(long, value_name = "SHIFT", value_parser = clap::value_parser!(u8).range(0..=10), global = true)]
    icount: Option<u8>,
    /// Boot although there is a snapshot, and make none
    #[arg(long, global = true)]
    cold: bool,
    /// Create the clients anew instead of using a snapshot with booted ones
    #[arg(long, global = true)]
    fresh_clients: bool,
    /// Ask apt again which packages are current
    #[arg(long, global = true)]
    refresh: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Tries whether the lab works, with checks that hold for any firewall
    #[command(hide = true)]
    Check {
        /// Only the checks whose names contain this
        #[arg(default_value = "")]
        filter: String,
    },
    /// Has dom0's double talk to itself over Xen's devices
    #[command(hide = true)]
    Loopback,
    /// Runs one command in dom0 (or a guest) of a lab and ends with its exit status
    #[command(hide = true)]
    Exec {
        /// The domain; dom0 alone is started if it is not given
        #[arg(long)]
        domain: Option<String>,
        /// The command, for the shell
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
}

/// What stands in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Firewall {
    /// Our image, a PVH unikernel
    Image,
    /// A Linux guest with nftables
    Linux,
    /// Nothing: clients are attached to dom0
    None,
}

/// Runs the command.
///
/// # Errors
///
/// If the lab cannot be had; what commands in it do is no error.
pub fn run(workspace: &Workspace, screen: &Screen, arguments: &LabArguments) -> Result<ExitCode> {
    let base = Base::prepare(workspace, screen, arguments.refresh)?;
    let machine = MachineOptions {
        memory_mib: arguments.memory,
        icount_shift: arguments.icount,
    };
    let lab = LabOptions {
        machine,
        cold: arguments.cold,
    };
    if let Some(Action::Exec {
        domain: None,
        command,
    }) = &arguments.action
    {
        let lab = Lab::start(&base, screen, lab)?;
        return stream(lab.dom0().start(&command.join(" "), COMMAND)?);
    }
    if let Some(Action::Loopback) = &arguments.action {
        let program = assets::build_double(workspace, screen)?;
        let lab = Lab::start(&base, screen, lab)?;
        Double::install(&lab, &program)?;
        for line in Double::loopback(&lab)? {
            println!("{line}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let kind = match arguments.firewall {
        Firewall::Image => FirewallKind::Image(image(workspace, screen, arguments)?),
        Firewall::Linux => FirewallKind::Linux,
        Firewall::None => FirewallKind::None,
    };
    let options = WorldOptions {
        lab,
        booted_clients: !arguments.fresh_clients,
    };
    let mut world = LabWorld::start(
        &base,
        screen,
        options,
        Topology::new(kind, arguments.clients),
    )?;
    match &arguments.action {
        Some(Action::Exec { domain, command }) => {
            let link = link(&world, domain.as_deref().unwrap_or("dom0"))?;
            stream(link.start(&command.join(" "), COMMAND)?)
        }
        Some(Action::Check { filter }) => Ok(match lab_check::run(&mut world, filter)? {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }),
        Some(Action::Loopback) | None => interact(&world).map(|()| ExitCode::SUCCESS),
    }
}

/// The image named by an argument or the environment, else the one built here.
fn image(workspace: &Workspace, screen: &Screen, arguments: &LabArguments) -> Result<PathBuf> {
    let variable = std::env::var_os(IMAGE_VARIABLE).map(PathBuf::from);
    let Some(path) = arguments.image.clone().or(variable) else {
        return Ok(image::prepare(workspace, screen, Variant::Normal)?.path);
    };
    if !path.is_file() {
        bail!(Unusable(format!("there is no image {}", path.display())));
    }
    Ok(path)
}

fn link<'a>(world: &'a LabWorld, domain: &str) -> Result<&'a Link> {
    match domain {
        "dom0" => Ok(world.lab.dom0()),
        "fw" => world.firewall()?.linux(),
        client => world.guest(client),
    }
}

/// Shows what a command writes until it ends, or Ctrl-C ends it.
fn stream(mut job: Job) -> Result<ExitCode> {
    loop {
        match job.next(Duration::from_millis(100))? {
            Progress::Wrote(bytes) => {
                let mut out = std::io::stdout().lock();
                out.write_all(&bytes)?;
                out.flush()?;
            }
            Progress::Ended(exit, _) => {
                return Ok(ExitCode::from(u8::try_from(exit.code()).unwrap_or(u8::MAX)));
            }
            Progress::Quiet => {}
        }
        if INTERRUPTED.swap(false, Ordering::Relaxed) {
            job.kill()?;
        }
    }
}

fn interact(world: &LabWorld) -> Result<()> {
    // Only the interactive shell takes Ctrl-C for itself; elsewhere it ends us,
    // and the machine with us.
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))
        .context("cannot take over Ctrl-C")?;
    help(world);
    let mut editor = rustyline::DefaultEditor::new().context("no terminal")?;
    loop {
        let line = match editor.readline("lab> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("the terminal is gone"),
        };
        // A history that cannot be kept is no reason to stop.
        let _ = editor.add_history_entry(line.as_str());
        INTERRUPTED.store(false, Ordering::Relaxed);
        let (first, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        let done = match (first, rest) {
            ("", _) => Ok(()),
            ("quit" | "exit", "") => return Ok(()),
            ("help" | "?", "") => {
                help(world);
                Ok(())
            }
            ("log", name) if !name.is_empty() => {
                world.lab.console_log(name).map(|log| print!("{log}"))
            }
            ("detach", name) if !name.is_empty() => world.detach(name).map(report),
            ("attach", name) if !name.is_empty() => world.attach(name).map(report),
            (name, command) if is_guest(world, name) => in_guest(world, name, command),
            _ => world
                .lab
                .dom0()
                .start(&line, COMMAND)
                .and_then(stream)
                .map(drop),
        };
        if let Err(error) = done {
            anstream::eprintln!("{error:#}");
        }
    }
}

fn report(output: crate::lab::link::Output) {
    println!("done in {} ms", output.guest_ms);
}

fn is_guest(world: &LabWorld, name: &str) -> bool {
    (name == "fw" && world.firewall().is_ok()) || world.client(name).is_ok()
}

/// Runs a command in a Linux guest, or types it on the image's console.
fn in_guest(world: &LabWorld, name: &str, command: &str) -> Result<()> {
    if let Ok(link) = link(world, name) {
        return stream(link.start(command, COMMAND)?).map(drop);
    }
    let console = &world.firewall()?.console;
    if command.is_empty() {
        print!("{}", console.text_from(0));
        return Ok(());
    }
    let mut position = console.send_line(command)?;
    // The console has no end of answer that a person would like to see, so
    // silence is taken for it.
    let mut wait = world.lab.patience(Duration::from_secs(2));
    while let Ok(text) = console.wait(position, wait, "more", |text| {
        (!text.is_empty()).then(|| text.to_owned())
    }) {
        print!("{text}");
        std::io::stdout().flush()?;
        position = console.position();
        wait = SILENCE;
    }
    Ok(())
}

fn help(world: &LabWorld) {
    let topology = world.topology();
    let heading = |text: &str| anstream::println!("{}", paint(BOLD, text));
    heading(&format!(
        "\nXen in QEMU: dom0 as sys-net, {}, {} clients",
        world.describe(),
        topology.clients.len()
    ));
    println!(
        "\n  internet 198.51.100.1 (web, iperf3)  .53 .54 (DNS)  .7 (echo, whoami)  203.0.113.9 (to be blocked)
     |
  dom0   10.137.0.4"
    );
    let gateway = match topology.firewall.kind {
        FirewallKind::None => "  ",
        _ => {
            println!("     |\n  fw     10.137.0.5");
            "  "
        }
    };
    println!("     |");
    for client in &topology.clients {
        println!("{gateway}{:<6} {}", client.name, client.ip);
    }
    heading("\nA line is run in dom0, or in the domain whose name comes first:");
    let examples: &[(&str, &str)] = &[
        ("xl list", "what runs"),
        (
            "c1 ping -c 3 198.51.100.1",
            "through the firewall and its address translation",
        ),
        (
            "c1 lab resolve www.lab --server 10.139.1.1",
            "DNS by the virtual resolver (also --tcp)",
        ),
        (
            "c1 wget -q -O - http://198.51.100.1/8m.bin | sha256sum",
            "a download",
        ),
        (
            "c1 lab udp 198.51.100.7 8 hello",
            "who the server thinks we are",
        ),
        (
            "c2 lab connect 10.137.0.6 22",
            "clients cannot reach each other",
        ),
        (
            "xenstore-ls -f /local/domain/1/backend",
            "how the firewall's interfaces are doing",
        ),
        (
            "detach c1",
            "takes the client's interface away (attach c1 brings it back)",
        ),
        ("log fw", "the console of a domain from its start"),
    ];
    let firewall: &[(&str, &str)] = match topology.firewall.kind {
        FirewallKind::Image(_) => &[
            ("fw help", "commands of the firewall's console"),
            ("fw drops", "what it has dropped and why"),
        ],
        FirewallKind::Linux => &[
            ("fw nft list ruleset", "the rules of the Linux firewall"),
            ("fw conntrack -L", "the connections it knows"),
        ],
        FirewallKind::None => &[],
    };
    for (command, what) in examples.iter().chain(firewall) {
        anstream::println!("  {command:<58} {}", paint(DIM, what));
    }
    anstream::println!(
        "\nCtrl-C ends a command, {} or Ctrl-D the lab. Logs: {}\n",
        paint(BOLD, "quit"),
        world.lab.log_folder().display()
    );
}
