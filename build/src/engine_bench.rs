//! What the engine costs, against the goals of `performance.md` 1.1 and against a committed baseline.
//!
//! The workloads are the example `engine_bench` of `firewall`; callgrind counts the instructions of the
//! measured part alone, which is the same number on every machine. Every run checks what became of each
//! packet, so a workload that is dropped early cannot look cheap. Nanoseconds depend on the machine: they
//! are scaled by the calibration loop to the machine that the goals were set on, and never gate anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::host;
use crate::screen::{BAD, BOLD, GOOD, Screen, paint};
use crate::workspace::Workspace;

mod rows;
use rows::{Goal, ROWS, Row, TIMES};

/// How much a count may grow over the baseline, as a fraction.
const TOLERANCE: f64 = 0.03;

/// Nanoseconds of the hash loop on the machine that the goals in nanoseconds were set on.
const REFERENCE_HASH_NANOS: f64 = 5.9;

/// Calibration that says nothing about the engine any more: another machine, or a busy one.
const USEFUL_CALIBRATION: f64 = 3.0;

/// Where the baseline is, from the root of the workspace.
const BASELINE: &str = "build/engine-baseline.json";

/// Bytes per flow that are allowed (P13).
const MOST_FLOW_BYTES: f64 = 160.0;

/// What was counted in one row.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    id: &'static str,
    name: &'static str,
    /// Instructions per packet or flow.
    instructions: f64,
    /// What the goal comes to.
    #[serde(skip_serializing_if = "Option::is_none")]
    most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
    /// What the baseline says.
    #[serde(skip_serializing_if = "Option::is_none")]
    baseline: Option<f64>,
}

/// A row of nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Timed {
    id: &'static str,
    name: &'static str,
    /// Nanoseconds per packet, the median of eleven batches.
    median: f64,
    least: f64,
    /// The median as it would be on the machine of the goals.
    scaled: f64,
    most: f64,
    met: bool,
}

/// Everything that was measured of the engine.
#[derive(Debug, Default, Serialize)]
pub struct Engine {
    instructions: Vec<Counted>,
    /// Bytes per flow at capacity, by family and capacity.
    bytes_per_flow: BTreeMap<String, f64>,
    /// Nanoseconds of the two calibration loops: a hash, and a load from memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<(f64, f64)>,
    nanoseconds: Vec<Timed>,
    /// W19, P14 and P15, as the example says them.
    rules: Vec<String>,
}

/// The committed counts, by row.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Baseline {
    /// Instructions per packet.
    instructions: BTreeMap<String, f64>,
}

/// The built examples.
struct Programs {
    engine: PathBuf,
    rules: PathBuf,
}

/// Counts instructions only, and compares with the baseline: what is gated.
///
/// # Errors
///
/// If valgrind is missing and cannot be installed, or a workload did not do what it means.
pub fn count(workspace: &Workspace, screen: &Screen) -> Result<Engine> {
    let programs = build(workspace, screen)?;
    let baseline = read_baseline(workspace.root())?;
    let step = screen.step("Counting the engine's instructions");
    let counts = count_rows(&programs.engine)?;
    let bytes_per_flow = memory(&programs.engine)?;
    step.done("");
    Ok(Engine {
        instructions: judge(&counts, &baseline)?,
        bytes_per_flow,
        ..Engine::default()
    })
}

/// Counts and times everything.
///
/// # Errors
///
/// As [`count`].
pub fn measure(workspace: &Workspace, screen: &Screen) -> Result<Engine> {
    let mut engine = count(workspace, screen)?;
    let programs = build(workspace, screen)?;
    let step = screen.step("Timing the engine");
    let said = host::output_of(Command::new(&programs.engine).arg("calibrate"))?;
    let [hash, load] = numbers(&said)?;
    engine.calibration = Some((hash, load));
    for (id, name, run, most, _) in TIMES {
        let said = host::output_of(Command::new(&programs.engine).arg("time").args(run))?;
        let [median, least] = numbers(&said)?;
        let scaled = median * REFERENCE_HASH_NANOS / hash;
        engine.nanoseconds.push(Timed {
            id,
            name,
            median,
            least,
            scaled,
            most: *most,
            met: scaled <= *most,
        });
    }
    let said = host::output_of(&mut Command::new(&programs.rules))?;
    engine.rules = said.lines().map(str::to_owned).collect();
    step.done("");
    Ok(engine)
}

/// Builds the examples as `performance.md` section 3 says.
fn build(workspace: &Workspace, screen: &Screen) -> Result<Programs> {
    host::prepare_valgrind(screen)?;
    let folder = workspace.target().join("bench");
    let step = screen.step("Building the engine's bench");
    host::output_of(
        Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--quiet", "--profile", "bench", "-p", "firewall"])
            .args(["--example", "engine_bench", "--example", "ruleset_w19"])
            .arg("--target-dir")
            .arg(&folder)
            .env("RUSTFLAGS", "-Ctarget-cpu=x86-64-v2")
            .current_dir(workspace.root()),
    )?;
    step.done("");
    let examples = folder.join("release/examples");
    Ok(Programs {
        engine: examples.join("engine_bench"),
        rules: examples.join("ruleset_w19"),
    })
}

/// Instructions per packet of every row, on all processors.
fn count_rows(program: &Path) -> Result<Vec<f64>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            match ROWS.get(at) {
                Some(row) => done.push((at, count_row(program, row))),
                None => return done,
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut all = thread::scope(|scope| {
        let running: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let done = running.into_iter().filter_map(|one| one.join().ok());
        done.flatten().collect::<Vec<_>>()
    });
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, count)| count).collect()
}

fn count_row(program: &Path, row: &Row) -> Result<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=engine_bench::measured::*")
        .arg(program)
        .arg("count")
        .args(row.run)
        .output()
        .context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}: {}", row.name, said.trim());
    }
    let total = said
        .lines()
        .find_map(|line| line.split("Collected :").nth(1));
    let total: f64 = total.context("no count from valgrind")?.trim().parse()?;
    let packets: f64 = String::from_utf8_lossy(&output.stdout).trim().parse()?;
    if total < packets {
        bail!("{}: valgrind did not find the measured part", row.name);
    }
    Ok((total / packets * 10.0).round() / 10.0)
}

/// Sets counts beside goals and baseline.
fn judge(counts: &[f64], baseline: &Baseline) -> Result<Vec<Counted>> {
    let of = |name: &str| {
        let at = ROWS.iter().position(|row| row.name == name);
        let count = at.and_then(|at| counts.get(at)).copied();
        count.with_context(|| format!("no row {name:?}"))
    };
    let rows = ROWS.iter().zip(counts).map(|(row, &instructions)| {
        let (most, met) = match row.goal {
            Goal::None => (None, None),
            Goal::Most(most) => (Some(most), Some(instructions <= most)),
            Goal::Ratio(ratio, other) => {
                let most = of(other)? * ratio;
                (Some(most), Some(instructions <= most))
            }
            Goal::Same(within, other) => {
                let other = of(other)?;
                (
                    Some(other + within),
                    Some((instructions - other).abs() <= within),
                )
            }
        };
        Ok(Counted {
            id: row.id,
            name: row.name,
            instructions,
            most,
            met,
            baseline: baseline.instructions.get(row.name).copied(),
        })
    });
    rows.collect()
}

fn memory(program: &Path) -> Result<BTreeMap<String, f64>> {
    let said = host::output_of(Command::new(program).arg("memory"))?;
    let lines = said.lines().map(|line| {
        let (what, bytes) = line.rsplit_once(' ').context("no bytes per flow")?;
        Ok((what.to_owned(), bytes.parse()?))
    });
    lines.collect()
}

/// The numbers of a line.
fn numbers<const N: usize>(line: &str) -> Result<[f64; N]> {
    let all: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
    let all = all.with_context(|| format!("no numbers in {line:?}"))?;
    all.try_into()
        .map_err(|_| anyhow::anyhow!("not {N} numbers in {line:?}"))
}

fn read_baseline(root: &Path) -> Result<Baseline> {
    let path = root.join(BASELINE);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} makes no sense", path.display()))
}

impl Engine {
    /// What has become dearer than the baseline allows, or is not in it: a line for each row.
    pub fn regressions(&self) -> Vec<String> {
        let rows = self.instructions.iter();
        rows.filter_map(|row| match row.baseline {
            None => Some(format!("{}: not in {BASELINE}", row.name)),
            Some(old) if row.instructions > old * (1.0 + TOLERANCE) => Some(format!(
                "{}: {:.1} instructions, {:+.1} % over the baseline of {old:.1}",
                row.name,
                row.instructions,
                (row.instructions / old - 1.0) * 100.0
            )),
            Some(_) => None,
        })
        .collect()
    }

    /// Writes the counts as the new baseline.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn update_baseline(&self, root: &Path) -> Result<()> {
        let rows = self.instructions.iter();
        let baseline = Baseline {
            instructions: rows
                .map(|row| (row.name.to_owned(), row.instructions))
                .collect(),
        };
        let path = root.join(BASELINE);
        std::fs::write(&path, serde_json::to_string_pretty(&baseline)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// How many goals in instructions are met, and how many there are.
    pub fn goals(&self) -> (usize, usize) {
        let met: Vec<bool> = self.instructions.iter().filter_map(|row| row.met).collect();
        (met.iter().filter(|met| **met).count(), met.len())
    }

    /// Shows everything.
    pub fn print(&self) {
        let title =
            "Engine, instructions per packet (callgrind, 64-byte frames unless said otherwise)";
        anstream::println!("\n{}", paint(BOLD, title));
        anstream::println!(
            "  {:<5} {:<42} {:>8} {:>8} {:<5} {:>8}  peers, as performance.md quotes them",
            "",
            "",
            "count",
            "goal",
            "",
            "baseline"
        );
        for (row, counted) in ROWS.iter().zip(&self.instructions) {
            let number =
                |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.1}"));
            anstream::println!(
                "  {:<5} {:<42} {:>8.1} {:>8} {} {:>8}  {}",
                row.id,
                row.name,
                counted.instructions,
                number(counted.most),
                verdict(counted.met),
                number(counted.baseline),
                row.peer
            );
        }
        for (what, bytes) in &self.bytes_per_flow {
            // The goal is about IPv4; an IPv6 flow has four times the address bytes.
            let met = what
                .starts_with("Ipv4")
                .then_some(*bytes <= MOST_FLOW_BYTES);
            let most = met.map_or(String::new(), |_| format!("{MOST_FLOW_BYTES:.1}"));
            let name = format!("bytes per flow, {what} flows");
            anstream::println!(
                "  {:<5} {name:<42} {bytes:>8.1} {most:>8} {}",
                "P13",
                verdict(met)
            );
        }
        let Some((hash, load)) = self.calibration else {
            return;
        };
        anstream::println!(
            "\n{}\n  calibration: SipHash-1-3 {hash:.1} ns (there {REFERENCE_HASH_NANOS}), dependent load {load:.0} ns (there 153)",
            paint(
                BOLD,
                "Engine, nanoseconds per packet, here and scaled to the machine of the goals"
            )
        );
        if hash / REFERENCE_HASH_NANOS > USEFUL_CALIBRATION {
            anstream::println!("  this machine is busy or another kind: the times say little");
        }
        for ((.., peer), timed) in TIMES.iter().zip(&self.nanoseconds) {
            anstream::println!(
                "  {:<5} {:<30} {:>8.1} {:>8.1} {:>8.1} {}  {peer}",
                timed.id,
                timed.name,
                timed.median,
                timed.scaled,
                timed.most,
                verdict(Some(timed.met))
            );
        }
        anstream::println!("\n{}", paint(BOLD, "Rules (W19, P14, P15)"));
        for line in &self.rules {
            anstream::println!("  {line}");
        }
    }
}

/// A word for whether a goal is met.
fn verdict(met: Option<bool>) -> String {
    match met {
        Some(true) => paint(GOOD, "met  ").to_string(),
        Some(false) => paint(BAD, "miss ").to_string(),
        None => "     ".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(instructions: f64) -> Baseline {
        let all = ROWS.iter().map(|row| (row.name.to_owned(), instructions));
        Baseline {
            instructions: all.collect(),
        }
    }

    fn engine(count: f64, baseline: &Baseline) -> Engine {
        Engine {
            instructions: judge(&vec![count; ROWS.len()], baseline).unwrap(),
            ..Engine::default()
        }
    }

    #[test]
    fn growth_over_three_per_cent_is_a_regression_that_names_its_row() {
        assert!(engine(102.9, &baseline(100.0)).regressions().is_empty());
        let found = engine(103.1, &baseline(100.0)).regressions();
        assert_eq!(found.len(), ROWS.len());
        assert!(
            found[0].contains(ROWS[0].name) && found[0].contains("+3.1 %"),
            "{}",
            found[0]
        );
    }

    #[test]
    fn row_without_a_baseline_is_a_regression() {
        assert_eq!(
            engine(1.0, &Baseline::default()).regressions().len(),
            ROWS.len()
        );
    }

    #[test]
    fn names_of_rows_are_unique_and_goals_refer_to_rows() {
        let names: std::collections::BTreeSet<_> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
        assert!(judge(&vec![1.0; ROWS.len()], &Baseline::default()).is_ok());
    }

    #[test]
    fn committed_baseline_has_every_row_and_no_other() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let baseline = read_baseline(&root).unwrap();
        let names: Vec<_> = baseline.instructions.keys().map(String::as_str).collect();
        let mut rows: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        rows.sort_unstable();
        assert_eq!(names, rows);
    }

    #[test]
    fn goals_are_judged() {
        let rows = judge(&vec![400.0; ROWS.len()], &Baseline::default()).unwrap();
        let met = |name: &str| rows.iter().find(|row| row.name == name).unwrap().met;
        assert_eq!(met("established TCP, up"), Some(true));
        assert_eq!(met("established UDP, up"), Some(false));
        assert_eq!(met("established TCP, 1500 bytes"), Some(true));
        assert_eq!(met("smoltcp: read and write a TCP packet"), None);
    }
}
