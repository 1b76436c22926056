//! `cargo xtask bench`: what the engine costs, and what the firewall leaves of a transfer.
//!
//! The engine's cost is counted in instructions by callgrind, which gives the same number on any machine; see
//! `firewall/examples/engine_bench.rs` for the workloads, whose names are those of `performance.md`. Transfers run in
//! the lab by the instruction clock (2 ns each), so that they repeat, too: everything (client, firewall, hypervisor,
//! dom0) shares one emulated processor, and rates compare with each other only.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::host::{Unusable, find_program, output_of};
use crate::image::{self, Variant};
use crate::lab::internet::WEB;
use crate::lab::machine::MachineOptions;
use crate::lab::topology::{FirewallKind, Topology};
use crate::lab::world::{LabWorld, WorldOptions};
use crate::lab::{Base, LabOptions};
use crate::screen::{BOLD, Screen, paint};
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
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
struct Measured {
    engine: Vec<EngineRow>,
    transfers: Vec<Transfer>,
}

/// A row of the engine's table.
#[derive(Debug, Serialize)]
struct EngineRow {
    workload: String,
    value: f64,
    unit: String,
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
    if !arguments.lab {
        measured.engine = engine(workspace, screen)?;
        if !arguments.json {
            print_engine(&measured.engine);
        }
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
    Ok(ExitCode::SUCCESS)
}

/// Counts the engine's instructions.
fn engine(workspace: &Workspace, screen: &Screen) -> Result<Vec<EngineRow>> {
    if find_program("valgrind").is_none() {
        bail!(Unusable(
            "valgrind is missing: apt-get install valgrind".to_owned()
        ));
    }
    let folder = workspace.target().join("bench");
    let step = screen.step("Building the engine's bench");
    output_of(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--quiet", "--profile", "bench", "-p", "firewall"])
            .args(["--example", "engine_bench", "--target-dir"])
            .arg(&folder)
            .env("RUSTFLAGS", "-Ctarget-cpu=x86-64-v2")
            .current_dir(workspace.root()),
    )?;
    step.done("");
    let step = screen.step("Counting instructions");
    let text = output_of(&mut Command::new(
        folder.join("release/examples/engine_bench"),
    ))?;
    step.done("");
    let rows: Vec<EngineRow> = text.lines().filter_map(engine_row).collect();
    if rows.is_empty() {
        bail!("the engine's bench printed nothing that can be read:\n{text}");
    }
    Ok(rows)
}

/// Reads `words of the workload   123.4 unit`.
fn engine_row(line: &str) -> Option<EngineRow> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let unit = words.pop()?.to_owned();
    let value = words.pop()?.parse().ok()?;
    Some(EngineRow {
        workload: words.join(" "),
        value,
        unit,
    })
}

fn print_engine(rows: &[EngineRow]) {
    anstream::println!(
        "\n{}",
        paint(
            BOLD,
            "Engine (callgrind, 64-byte frames unless said otherwise)"
        )
    );
    for row in rows {
        anstream::println!("  {:<40} {:>9.1} {}", row.workload, row.value, row.unit);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_engine_bench_are_read() {
        let row = engine_row("P1 established TCP up            560.7 instructions/packet").unwrap();
        assert_eq!(row.workload, "P1 established TCP up");
        assert!((row.value - 560.7).abs() < 1e-9);
        assert_eq!(row.unit, "instructions/packet");
        assert!(engine_row("nothing to see").is_none());
    }
}
