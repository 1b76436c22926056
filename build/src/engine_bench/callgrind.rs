//! Counting instructions: one program, one part of it, under callgrind.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};

use super::rows::{ROWS, Row, Run};
use crate::screen::Step;
use crate::workspace;

/// The functions of the control plane that packets wait for: each call is counted by itself. Wildcards, which
/// say what is counted at all, would not do here.
const CONTROL_CALLS: [&str; 3] = ["step", "replace", "tick"];

/// The built programs.
pub(super) struct Programs {
    /// `engine-bench`.
    pub(super) engine: PathBuf,
    /// `engine_blocks`.
    pub(super) blocks: PathBuf,
    /// Where callgrind may write.
    pub(super) scratch: PathBuf,
}

/// Instructions of every row, in the order of the rows, on all processors.
///
/// # Errors
///
/// If a workload did not do what it means, or valgrind did not find the measured part.
pub(super) fn count_rows(programs: &Programs, step: &Step) -> Result<Vec<f64>> {
    // The long ones first, so that no processor is idle at the end.
    let mut order: Vec<usize> = (0..ROWS.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(ROWS.get(*at).map_or(0, |row| row.run.flows())));
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worker = || {
        let mut counted = Vec::new();
        while let Some(at) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let Some(row) = ROWS.get(*at) else { break };
            let count = count_row(programs, *at, row);
            if count.is_err() {
                // What is left would be counted for nothing.
                next.store(order.len(), Ordering::Relaxed);
            }
            counted.push((*at, count));
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            step.busy(&format!("{done} of {} workloads", ROWS.len()));
        }
        counted
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut all = thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let done = running.into_iter().filter_map(|one| one.join().ok());
        done.flatten().collect::<Vec<_>>()
    });
    all.sort_by_key(|(at, _)| *at);
    let counts: Vec<f64> = all
        .into_iter()
        .map(|(_, count)| count)
        .collect::<Result<_>>()?;
    if counts.len() != ROWS.len() {
        bail!("a worker has crashed");
    }
    Ok(counts)
}

fn count_row(programs: &Programs, at: usize, row: &Row) -> Result<f64> {
    let counted = match row.run {
        Run::Frames(run) => {
            let measured = "engine_bench::measured::*";
            per_unit(&programs.engine, measured, &[&["count"], &run[..]].concat())
        }
        Run::Control(run) => {
            let measured = "engine_bench::control::*";
            per_unit(&programs.engine, measured, &[&["count"], &run[..]].concat())
        }
        Run::Block(block) => per_unit(&programs.blocks, "engine_blocks::measured::*", &[block]),
        Run::Longest(run) => longest(programs, at, &run),
    };
    counted.with_context(|| row.name.to_owned())
}

/// Instructions for each unit that the program says it has done.
fn per_unit(program: &Path, measured: &str, arguments: &[&str]) -> Result<f64> {
    let mut valgrind = valgrind(measured);
    valgrind.arg("--callgrind-out-file=/dev/null").arg(program);
    let (total, units) = run(valgrind.args(arguments))?;
    if total < units {
        bail!("valgrind did not find the measured part");
    }
    Ok((total / units * 10.0).round() / 10.0)
}

/// The most instructions of any one call of the control plane.
fn longest(programs: &Programs, at: usize, arguments: &[&str]) -> Result<f64> {
    let folder = programs.scratch.join(at.to_string());
    workspace::remove_folder(&folder)?;
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let mut valgrind = valgrind("engine_bench::control::*");
    for call in CONTROL_CALLS {
        // What is counted from one call's begin to the next one's is the call.
        valgrind.arg(format!("--dump-before=engine_bench::control::{call}"));
    }
    valgrind.arg(format!(
        "--callgrind-out-file={}",
        folder.join("out").display()
    ));
    let (total, _) = run(valgrind.arg(&programs.engine).arg("count").args(arguments))?;
    let mut sum = 0.0;
    let mut most = 0.0_f64;
    for entry in std::fs::read_dir(&folder)? {
        let text = std::fs::read_to_string(entry?.path())?;
        let count = text.lines().find_map(|line| line.strip_prefix("totals: "));
        let count: f64 = count.context("a part without a total")?.trim().parse()?;
        sum += count;
        most = most.max(count);
    }
    workspace::remove_folder(&folder)?;
    if sum != total || most == total {
        bail!("valgrind did not tell the calls apart: {sum} in parts, {total} in all");
    }
    Ok(most)
}

fn valgrind(measured: &str) -> Command {
    let mut command = Command::new("valgrind");
    command.arg("--tool=callgrind");
    command.arg(format!("--toggle-collect={measured}"));
    command
}

/// Runs it; returns the instructions that were collected, and the number that the program printed.
fn run(command: &mut Command) -> Result<(f64, f64)> {
    let output = command.output().context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}", said.trim());
    }
    let total = said
        .lines()
        .find_map(|line| line.split("Collected :").nth(1));
    let total: f64 = total.context("no count from valgrind")?.trim().parse()?;
    let units: f64 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
    Ok((total, units))
}
