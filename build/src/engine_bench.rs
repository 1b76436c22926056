//! What the engine costs, against the goals of `performance.md` 1.1 and against a committed baseline.
//!
//! The workloads are the package `engine-bench`; callgrind counts the instructions of the measured part
//! alone, which is the same number on every machine. Every run checks what became of each packet, so a
//! workload that is dropped early cannot look cheap. Nanoseconds depend on the machine: they are scaled by the
//! calibration loop to the machine that the goals were set on, and never gate anything.
//!
//! What gates: every row of instructions, against the baseline, and P19.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::host;
use crate::screen::Screen;
use crate::workspace::Workspace;

mod callgrind;
mod machine_code;
mod peer;
mod rows;
mod show;

use callgrind::Programs;
use machine_code::MachineCode;
use peer::Linux;
use rows::{COMPILATIONS, Goal, ROWS, TIMES};

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

/// Microseconds that packets may wait for a step of the control plane (P15).
const MOST_STEP_MICROS: f64 = 100.0;

/// What was counted in one row.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    id: &'static str,
    name: &'static str,
    /// Instructions per packet, or per what the name says.
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
    #[serde(skip_serializing_if = "Option::is_none")]
    most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// What it takes to compile the rules of one client (P14, P15).
#[derive(Clone, Debug, Serialize)]
pub struct Compiled {
    rules: &'static str,
    bytes_per_rule: f64,
    most_bytes: Option<f64>,
    /// In one go, as on the machine of the goals.
    micros: f64,
    most_micros: Option<f64>,
    /// Slices that the main loop makes of it.
    steps: f64,
    /// The longest of them.
    longest_step_micros: f64,
}

/// P19: what must not happen on a packet path.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PacketPath {
    /// How often memory was allocated or freed, by workload.
    allocations: BTreeMap<String, u64>,
    /// What the machine code holds; absent where it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine_code: Option<MachineCode>,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    unread: Option<String>,
}

/// Everything that was measured of the engine.
#[derive(Debug, Default, Serialize)]
pub struct Engine {
    instructions: Vec<Counted>,
    /// Rows of the baseline that are not measured any more.
    stale: Vec<String>,
    /// Bytes per flow at capacity, by family and capacity.
    bytes_per_flow: BTreeMap<String, f64>,
    packet_path: PacketPath,
    /// Nanoseconds of the two calibration loops: a hash, and a load from memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<(f64, f64)>,
    nanoseconds: Vec<Timed>,
    rules: Vec<Compiled>,
    /// The Linux kernel of this machine, with the same rules and frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    linux: Option<Linux>,
}

/// How this machine compares with the one of the goals.
#[derive(Clone, Copy)]
struct Scale {
    factor: f64,
    /// Whether a goal can be judged here.
    useful: bool,
}

/// The committed counts, by row.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Baseline {
    /// Instructions per packet.
    instructions: BTreeMap<String, f64>,
}

/// Which rows of the baseline are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Update {
    /// All of them.
    All,
    /// Those that it has no count for; those that are not measured any more go.
    New,
}

/// Counts instructions only, and compares with the baseline: what is gated.
///
/// # Errors
///
/// If valgrind is missing and cannot be installed, or a workload did not do what it means.
pub fn count(workspace: &Workspace, screen: &Screen) -> Result<Engine> {
    let programs = build(workspace, screen)?;
    count_with(&programs, workspace, screen)
}

/// Counts and times everything.
///
/// # Errors
///
/// As [`count`].
pub fn measure(workspace: &Workspace, screen: &Screen) -> Result<Engine> {
    let programs = build(workspace, screen)?;
    let mut engine = count_with(&programs, workspace, screen)?;
    let step = screen.step("Timing the engine");
    let said = host::output_of(Command::new(&programs.engine).arg("calibrate"))?;
    let [hash, load] = numbers(&said)?;
    engine.calibration = Some((hash, load));
    let scale = Scale {
        factor: REFERENCE_HASH_NANOS / hash,
        useful: hash / REFERENCE_HASH_NANOS <= USEFUL_CALIBRATION,
    };
    for row in TIMES {
        step.busy(row.name);
        let timed = time(&programs, row, scale, &engine.nanoseconds)?;
        engine.nanoseconds.push(timed);
    }
    for (rules, goals) in COMPILATIONS {
        step.busy("rules");
        let mut program = Command::new(&programs.engine);
        let said = host::output_of(program.args(["compile", rules]))?;
        let [bytes_per_rule, micros, steps, longest] = numbers(&said)?;
        engine.rules.push(Compiled {
            rules,
            bytes_per_rule,
            most_bytes: goals.map(|(bytes, _)| bytes),
            micros: micros * scale.factor,
            most_micros: goals.map(|(_, micros)| micros),
            steps,
            longest_step_micros: longest * scale.factor,
        });
    }
    step.done("");
    engine.linux = Some(peer::measure(workspace, screen));
    Ok(engine)
}

fn count_with(programs: &Programs, workspace: &Workspace, screen: &Screen) -> Result<Engine> {
    let baseline = read_baseline(workspace.root())?;
    let step = screen.step("Counting the engine's instructions");
    let counts = callgrind::count_rows(programs, &step)?;
    let engine = Engine {
        instructions: judge(&counts, &baseline)?,
        stale: stale(&baseline),
        bytes_per_flow: memory(programs)?,
        packet_path: packet_path(programs)?,
        ..Engine::default()
    };
    step.done("");
    Ok(engine)
}

/// Builds the programs as `performance.md` section 3 says.
fn build(workspace: &Workspace, screen: &Screen) -> Result<Programs> {
    host::prepare_valgrind(screen)?;
    let folder = workspace.target().join("bench");
    let step = screen.step("Building the engine's bench");
    // One after the other: what opens the engine's blocks must not change how the engine is compiled.
    for binary in [
        &["--bin", "engine-bench"][..],
        &["--bin", "engine_blocks", "--features", "blocks"],
    ] {
        host::output_of(
            Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
                .args([
                    "build",
                    "--quiet",
                    "--profile",
                    "bench",
                    "-p",
                    "engine-bench",
                ])
                .args(binary)
                .arg("--target-dir")
                .arg(&folder)
                .env("RUSTFLAGS", "-Ctarget-cpu=x86-64-v2")
                .current_dir(workspace.root()),
        )?;
    }
    step.done("");
    let release = folder.join("release");
    Ok(Programs {
        engine: release.join("engine-bench"),
        blocks: release.join("engine_blocks"),
        scratch: folder.join("callgrind"),
    })
}

/// Times one row; `before` are the rows that its goal may refer to.
fn time(programs: &Programs, row: &rows::Time, scale: Scale, before: &[Timed]) -> Result<Timed> {
    let mut program = Command::new(&programs.engine);
    // Large tables lie on large pages, as the unikernel's do.
    program.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
    let said = host::output_of(program.arg("time").args(row.run))?;
    let [median, least] = numbers(&said)?;
    let scaled = median * scale.factor;
    let most = match row.goal {
        Goal::Most(most) => Some(most),
        Goal::Ratio(ratio, other) => {
            let other = before.iter().find(|timed| timed.name == other);
            Some(other.context("a goal that refers to nothing")?.scaled * ratio)
        }
        Goal::Same(..) | Goal::None => None,
    };
    Ok(Timed {
        id: row.id,
        name: row.name,
        median,
        least,
        scaled,
        most,
        met: most.filter(|_| scale.useful).map(|most| scaled <= most),
    })
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

/// What the baseline has and nobody measures.
fn stale(baseline: &Baseline) -> Vec<String> {
    let names = baseline.instructions.keys();
    names
        .filter(|name| !ROWS.iter().any(|row| row.name == **name))
        .cloned()
        .collect()
}

fn memory(programs: &Programs) -> Result<BTreeMap<String, f64>> {
    let said = host::output_of(Command::new(&programs.engine).arg("memory"))?;
    let lines = said.lines().map(|line| {
        let (what, bytes) = line.rsplit_once(' ').context("no bytes per flow")?;
        Ok((what.to_owned(), bytes.parse()?))
    });
    lines.collect()
}

fn packet_path(programs: &Programs) -> Result<PacketPath> {
    let said = host::output_of(Command::new(&programs.engine).arg("allocations"))?;
    let mut path = PacketPath::default();
    for line in said.lines() {
        let (workload, counts) = line.split_once(' ').context("no allocations")?;
        let [allocated, left] = numbers(counts)?;
        // What was freed and not allocated before leaves less than there was.
        let times = format!("{:.0}", allocated + left.abs()).parse()?;
        path.allocations.insert(workload.to_owned(), times);
    }
    match MachineCode::of(&programs.engine) {
        Ok(code) => path.machine_code = Some(code),
        Err(error) => path.unread = Some(format!("{error:#}")),
    }
    Ok(path)
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

impl PacketPath {
    /// What must not be there, a line for each.
    fn faults(&self) -> Vec<String> {
        let allocated = self.allocations.iter().filter(|(_, times)| **times > 0);
        let allocated = allocated
            .map(|(workload, times)| format!("P19: {workload} allocated memory {times} times"));
        let code = self.machine_code.iter().flat_map(MachineCode::faults);
        allocated.chain(code).collect()
    }
}

impl Engine {
    /// What has become dearer than the baseline allows or is not the same rows as in it, and what P19
    /// forbids: a line for each.
    pub fn regressions(&self) -> Vec<String> {
        let rows = self.instructions.iter();
        let dearer = rows.filter_map(|row| match row.baseline {
            None => Some(format!("{}: not in {BASELINE}", row.name)),
            Some(old) if row.instructions > old * (1.0 + TOLERANCE) => Some(format!(
                "{}: {:.1} instructions, {:+.1} % over the baseline of {old:.1}",
                row.name,
                row.instructions,
                (row.instructions / old - 1.0) * 100.0
            )),
            Some(_) => None,
        });
        let stale = self.stale.iter();
        let stale = stale.map(|name| format!("{name}: in {BASELINE}, but no row"));
        let faults = self.packet_path.faults();
        dearer.chain(stale).chain(faults).collect()
    }

    /// Writes the counts as the new baseline.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn update_baseline(&self, root: &Path, update: Update) -> Result<()> {
        let rows = self.instructions.iter().map(|row| {
            let old = row.baseline.filter(|_| update == Update::New);
            (row.name.to_owned(), old.unwrap_or(row.instructions))
        });
        let baseline = Baseline {
            instructions: rows.collect(),
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
    fn row_of_the_baseline_that_nobody_measures_is_a_regression() {
        let mut old = baseline(100.0);
        old.instructions.insert("gone".to_owned(), 1.0);
        let engine = Engine {
            stale: stale(&old),
            ..engine(100.0, &old)
        };
        let found = engine.regressions();
        assert!(
            matches!(&found[..], [line] if line.starts_with("gone: ")),
            "{found:?}"
        );
    }

    #[test]
    fn allocation_on_a_packet_path_is_a_regression() {
        let mut engine = engine(100.0, &baseline(100.0));
        let counts = [("est-up".to_owned(), 0), ("frag".to_owned(), 2)];
        engine.packet_path.allocations = counts.into();
        let found = engine.regressions();
        assert!(
            matches!(&found[..], [line] if line.contains("frag")),
            "{found:?}"
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
