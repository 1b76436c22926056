//! `cargo xtask demo`: the main job, shown to a person.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::claims;
use crate::image::{self, Variant};
use crate::lab::internet::{BLOCKED, DNS, ECHO, UPLINK, VIRTUAL_DNS, WEB};
use crate::lab::topology::{FIREWALL, FirewallKind, Topology};
use crate::lab::world::{LabWorld, WorldOptions};
use crate::lab::{Base, LabOptions};
use crate::observe::snapshot;
use crate::scenario::Report;
use crate::screen::{BOLD, DIM, Screen, paint, seconds, size};
use crate::workspace::Workspace;

/// Client qubes in the demo.
const CLIENTS: u8 = 2;

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Memory of the firewall in MiB
    #[arg(long, value_name = "MIB", default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..=1024))]
    memory: u32,
    /// Print one JSON object with the results instead of text
    #[arg(long)]
    json: bool,
    /// Boot Xen although there is a snapshot of the booted lab
    #[arg(long)]
    cold: bool,
}

/// Runs the command.
///
/// # Errors
///
/// If the image cannot be built or the lab does not come up.
pub fn run(workspace: &Workspace, screen: &Screen, arguments: &DemoArguments) -> Result<ExitCode> {
    let begun = Instant::now();
    let screen = &if arguments.json {
        screen.silenced()
    } else {
        *screen
    };
    if !arguments.json {
        draw(arguments.memory);
    }
    // A missing tool is said before minutes are spent on building.
    let base = Base::prepare(workspace, screen, false)?;
    let image = image::prepare(workspace, screen, Variant::Normal)?;
    let mut topology = Topology::new(FirewallKind::Image(image.path.clone()), CLIENTS);
    topology.firewall.memory_mib = arguments.memory;
    let options = WorldOptions {
        lab: LabOptions {
            cold: arguments.cold,
            ..LabOptions::default()
        },
        booted_clients: true,
    };
    let mut world = LabWorld::start(&base, screen, options, topology)?;
    if !arguments.json {
        introduce(&world)?;
    }
    let mut report = Report::new(arguments.json);
    for (index, claim) in claims::MAIN.iter().enumerate() {
        if !arguments.json {
            anstream::println!(
                "\n{} {}",
                paint(BOLD, &format!("{}.", index + 1)),
                paint(BOLD, claim.title)
            );
        }
        report.claim(screen, "demo", &mut world, claim);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        farewell(&world)?;
        report.print_summary(begun.elapsed());
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Draws who is connected to whom.
fn draw(memory: u32) {
    let [dns, _] = VIRTUAL_DNS;
    anstream::println!(
        "{}",
        paint(
            BOLD,
            "Portcullis between two clients and a network, on Xen in QEMU"
        )
    );
    anstream::println!(
        "
   c1 10.137.0.6 ──┐
                   ├── fw {FIREWALL} ──── dom0 {UPLINK} ──┬── {WEB}  HTTP
   c2 10.137.0.7 ──┘   PVH, {memory} MiB        (as sys-net)   ├── {DNS} DNS, as {dns} to clients
                                                          ├── {ECHO}  echo
                                                          └── {BLOCKED}   what rules forbid
"
    );
}

/// Shows what the firewall said while it booted.
fn introduce(world: &LabWorld) -> Result<()> {
    let firewall = world.firewall()?;
    anstream::println!("\n{}", paint(BOLD, "The firewall's console:"));
    for line in firewall.console.text_from(0).lines() {
        anstream::println!("  {}", paint(DIM, line));
    }
    Ok(())
}

/// Shows what the firewall counted.
fn farewell(world: &LabWorld) -> Result<()> {
    let seen = snapshot(world)?;
    anstream::println!("\n{}", paint(BOLD, "What the firewall counted"));
    let row = |name: &str, value: String| anstream::println!("  {name:<34} {value:>14}");
    row(
        "frames to the uplink",
        seen.counter("loop.to-uplink").to_string(),
    );
    row(
        "frames to clients",
        seen.counter("loop.to-clients").to_string(),
    );
    row("hypercalls", seen.counter("xen.hypercalls").to_string());
    row(
        "bytes moved by grant copy",
        size(seen.counter("xen.copy-bytes")),
    );
    row(
        "flows started",
        seen.counter("engine.flows-created").to_string(),
    );
    for reason in seen.drops.iter().filter(|reason| reason.value > 0) {
        row(
            &format!("dropped: {}", reason.name),
            reason.value.to_string(),
        );
    }
    row("heap in use", size(seen.memory.heap_used_bytes));
    let up = std::time::Duration::from_nanos(seen.uptime_nanos);
    row("up (guest time)", seconds(up));
    Ok(())
}
