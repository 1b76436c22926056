//! `cargo xtask bench`: what the engine costs, and what the firewall leaves of a transfer.
//!
//! The engine's cost is [`engine_bench`]'s. Transfers run in
//! the lab by the instruction clock (2 ns each), so that they repeat, too: everything (client, firewall, hypervisor,
//! dom0) shares one emulated processor, and rates compare with each other only.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::engine_bench::{self, Engine, Update};
use crate::image::{self, Variant};
use crate::lab::internet::WEB;
use crate::lab::machine::MachineOptions;
use crate::lab::topology::{FirewallKind, Topology};
use crate::lab::world::{LabWorld, WorldOptions};
use crate::lab::{Base, LabOptions};
use crate::screen::{BAD, BOLD, Screen, paint};
use crate::workspace::Workspace;

/// The instruction clock: 2 ns for each instruction.
const ICOUNT_SHIFT: u8 = 1;

/// Guest time of one transfer, in seconds.
const TRANSFER_SECONDS: u32 = 4;

/// How long one transfer may take by the host's clock.
const PATIENCE: Duration = Duration::from_secs(300);

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// Only the engine, on the host
    #[arg(long, conflicts_with = "lab")]
    engine: bool,
    /// Only the transfers in the lab
    #[arg(long)]
    lab: bool,
    /// Also the transfers through a Linux firewall
    #[arg(long, conflicts_with = "engine")]
    linux: bool,
    /// Make the counts the baseline that later ones are compared with: all of them, or only new rows'
    #[arg(long, conflicts_with = "lab", value_name = "WHICH", num_args = 0..=1, default_missing_value = "all")]
    update_baseline: Option<Update>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
struct Measured {
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<Engine>,
    transfers: Vec<Transfer>,
}

/// A transfer in the lab.
#[derive(Debug, Serialize)]
struct Transfer {
    through: &'static str,
    /// Client to uplink, in Mbit/s.
    up_mbit: f64,
    /// Uplink to client, in Mbit/s.
    down_mbit: f64,
    /// Processor time of the firewall's domain during both, in seconds.
    firewall_seconds: f64,
}

/// Runs the command.
///
/// # Errors
///
/// If something is missing, or a measurement fails.
pub fn run(workspace: &Workspace, screen: &Screen, arguments: &BenchArguments) -> Result<ExitCode> {
    let screen = &if arguments.json {
        screen.silenced()
    } else {
        *screen
    };
    let mut measured = Measured::default();
    let mut regressions = Vec::new();
    if !arguments.lab {
        let engine = engine_bench::measure(workspace, screen)?;
        if let Some(update) = arguments.update_baseline {
            engine.update_baseline(workspace.root(), update)?;
        } else {
            regressions = engine.regressions();
        }
        if !arguments.json {
            engine.print();
        }
        measured.engine = Some(engine);
    }
    if !arguments.engine {
        measured.transfers = transfers(workspace, screen, arguments.linux)?;
        if !arguments.json {
            print_transfers(&measured.transfers);
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&measured)?);
    }
    for line in &regressions {
        anstream::eprintln!("{} {line}", paint(BAD, "worse:"));
    }
    Ok(if regressions.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Measures transfers with and without a firewall in the middle.
fn transfers(workspace: &Workspace, screen: &Screen, linux: bool) -> Result<Vec<Transfer>> {
    // A missing tool is said before minutes are spent on building.
    let base = Base::prepare(workspace, screen, false)?;
    let image = image::prepare(workspace, screen, Variant::Normal)?;
    let mut kinds = vec![
        ("no firewall", FirewallKind::None),
        ("Portcullis", FirewallKind::Image(image.path)),
    ];
    if linux {
        kinds.push(("Linux firewall", FirewallKind::Linux));
    }
    kinds
        .into_iter()
        .map(|(through, kind)| transfer(&base, screen, through, kind))
        .collect()
}

fn transfer(
    base: &Base,
    screen: &Screen,
    through: &'static str,
    kind: FirewallKind,
) -> Result<Transfer> {
    let guarded = kind != FirewallKind::None;
    let options = WorldOptions {
        lab: LabOptions {
            machine: MachineOptions {
                icount_shift: Some(ICOUNT_SHIFT),
                ..MachineOptions::default()
            },
            cold: false,
        },
        booted_clients: guarded,
    };
    let world = LabWorld::start(base, screen, options, Topology::new(kind, 1))?;
    let used = |world: &LabWorld| {
        if guarded {
            world.lab.cpu_seconds("fw")
        } else {
            Ok(0.0)
        }
    };
    let before = used(&world)?;
    let up_mbit = iperf(&world, "")?;
    let down_mbit = iperf(&world, " -R")?;
    Ok(Transfer {
        through,
        up_mbit,
        down_mbit,
        firewall_seconds: used(&world)? - before,
    })
}

/// The rate of one TCP connection, as the receiver saw it.
fn iperf(world: &LabWorld, direction: &str) -> Result<f64> {
    let command = format!("iperf3 -c {WEB} -t {TRANSFER_SECONDS} -J{direction}");
    let text = world.ask("c1", &command, PATIENCE)?;
    let begin = text.find('{').context("iperf3 printed no JSON")?;
    let report: Value = serde_json::from_str(text.get(begin..).unwrap_or_default())
        .with_context(|| format!("iperf3 said {text}"))?;
    let bits = report
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64)
        .context("iperf3 reports no rate")?;
    Ok(bits / 1e6)
}

fn print_transfers(transfers: &[Transfer]) {
    anstream::println!(
        "\n{}",
        paint(
            BOLD,
            "One TCP connection in the lab (instruction clock, one emulated processor for all domains)"
        )
    );
    anstream::println!(
        "  {:<16} {:>16} {:>16} {:>20}",
        "through",
        "client → uplink",
        "uplink → client",
        "firewall's own CPU"
    );
    for transfer in transfers {
        anstream::println!(
            "  {:<16} {:>9.1} Mbit/s {:>9.1} Mbit/s {:>18.2} s",
            transfer.through,
            transfer.up_mbit,
            transfer.down_mbit,
            transfer.firewall_seconds
        );
    }
}
