//! `cargo xtask test`: every test, on the host and in the lab, with one summary.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::claims::{self, Claim, NotSo, must};
use crate::engine_bench;
use crate::host;
use crate::image::{self, Image, Variant};
use crate::lab::double::Double;
use crate::lab::machine::MachineOptions;
use crate::lab::topology::{FirewallKind, Source, Topology};
use crate::lab::world::{LabWorld, WorldOptions};
use crate::lab::{Base, LabOptions};
use crate::observe::snapshot;
use crate::package;
use crate::scenario::{Outcome, Report};
use crate::screen::Screen;
use crate::workspace::Workspace;

/// Client qubes in the lab.
const CLIENTS: u8 = 2;

/// Guest time that the firewall may take from entry to being ready for clients.
const READY_WITHIN: Duration = Duration::from_millis(50);

/// The instruction clock of measurements: 2 ns for each instruction.
const ICOUNT_SHIFT: u8 = 1;

/// What QEMU 10 says before it ends, when its instruction clock is read where it cannot be (seen on Debian 13, with Xen
/// under SVM; 7.2 does not).
const NO_INSTRUCTION_CLOCK: &str = "Bad icount read";

/// Memory of the small firewall in MiB.
const SMALL_MEMORY: u32 = 8;

/// Arguments of `cargo xtask test`.
#[derive(Debug, Args)]
pub struct TestArguments {
    /// Only the tests whose name contains one of these words
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Only the tests on the host
    #[arg(long, conflicts_with = "lab")]
    host: bool,
    /// Only the tests in the lab
    #[arg(long)]
    lab: bool,
    /// Print one JSON object with the results instead of text
    #[arg(long)]
    json: bool,
    /// Boot Xen although there is a snapshot of the booted lab
    #[arg(long)]
    cold: bool,
    /// Let guest time follow the instruction count, 2^SHIFT ns each, so that times repeat
    #[arg(long, value_name = "SHIFT", value_parser = clap::value_parser!(u8).range(0..=10))]
    icount: Option<u8>,
}

/// A run of the tests.
struct Run<'a> {
    workspace: &'a Workspace,
    screen: &'a Screen,
    arguments: &'a TestArguments,
    report: Report,
}

/// Runs the command.
///
/// # Errors
///
/// If this machine lacks something that the tests need.
pub fn run(workspace: &Workspace, screen: &Screen, arguments: &TestArguments) -> Result<ExitCode> {
    let begun = Instant::now();
    let screen = &if arguments.json {
        screen.silenced()
    } else {
        *screen
    };
    let mut run = Run {
        workspace,
        screen,
        arguments,
        report: Report::new(arguments.json),
    };
    if !arguments.lab {
        run.host();
    }
    if !arguments.host {
        run.in_lab();
    }
    if run.report.entries().is_empty() {
        bail!("no test has a name like {:?}", arguments.names);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&run.report)?);
    } else {
        run.report.print_summary(begun.elapsed());
    }
    Ok(if run.report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Run<'_> {
    /// Whether the person asked for the test of this name.
    fn wants(&self, name: &str) -> bool {
        let names = &self.arguments.names;
        names.is_empty() || names.iter().any(|word| name.contains(word.as_str()))
    }

    // ---- host

    fn host(&mut self) {
        let root = self.workspace.root().to_owned();
        if self.wants("format") {
            self.cargo_component("format", "fmt", &["--all", "--check"]);
        }
        if self.wants("lint") {
            let arguments = [
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ];
            self.cargo_component("lint", "clippy", &arguments);
        }
        if self.wants("cargo-test") {
            let step = self.screen.step("Running the tests of all crates");
            self.report.check("host", "cargo-test", || {
                let output = cargo(&root, &["test", "--workspace", "--no-fail-fast", "--quiet"])?;
                let seen = count_tests(&output.text);
                must(output.good, || last_lines(&output.text, 60))?;
                Ok(vec![seen])
            });
            step.forget();
        }
        if self.wants("engine-cost") {
            self.engine_cost();
        }
        if self.wants("differential") {
            self.differential();
        }
        if self.wants("image-reproducible") {
            self.reproducible();
        }
        if self.wants("package") {
            self.package();
        }
    }

    /// Makes the package twice in different folders and compares the archives.
    fn package(&mut self) {
        let (workspace, screen) = (self.workspace, self.screen);
        self.report.check("host", "package", || {
            let [first, second] = ["once", "again"].map(|folder| {
                let package = package::of_clone(workspace, &screen.silenced())?;
                package.write(&workspace.target().join("package").join(folder))
            });
            let (first, second) = (first?, second?);
            must(first.sha256 == second.sha256, || {
                format!("{} once, {} again", first.sha256, second.sha256)
            })?;
            let bytes = std::fs::metadata(&first.archive)?.len();
            Ok(vec![
                format!("{bytes} bytes, sha256 {} twice", first.sha256),
                shellcheck(&first.folder.join("install.sh"))?,
            ])
        });
    }

    /// Counts the engine's instructions and compares with the baseline.
    fn engine_cost(&mut self) {
        let (workspace, screen) = (self.workspace, self.screen);
        let step = screen.step("Counting the engine's instructions");
        self.report.check("host", "engine-cost", || {
            let engine = engine_bench::count(workspace, &screen.silenced())?;
            let dearer = engine.regressions();
            must(dearer.is_empty(), || dearer.join("\n"))?;
            let (met, goals) = engine.goals();
            let line = "no workload over 3 per cent dearer than the baseline";
            Ok(vec![format!("{line}; {met} of {goals} goals met")])
        });
        step.forget();
    }

    /// Runs a component of the toolchain that may be missing; then the check is skipped.
    fn cargo_component(&mut self, name: &'static str, component: &str, arguments: &[&str]) {
        let root = self.workspace.root().to_owned();
        let present = cargo(&root, &[component, "--version"]).is_ok_and(|output| output.good);
        if !present {
            let reason = format!("this toolchain has no cargo {component}");
            self.report.skip("host", name, &reason);
            return;
        }
        let step = self.screen.step(format!("Running cargo {component}"));
        self.report.check("host", name, || {
            let words: Vec<&str> = std::iter::once(component)
                .chain(arguments.iter().copied())
                .collect();
            let output = cargo(&root, &words)?;
            must(output.good, || last_lines(&output.text, 60))?;
            Ok(Vec::new())
        });
        step.forget();
    }

    /// Sends the same packets through the engine and through the kernel of this machine.
    fn differential(&mut self) {
        let root = self.workspace.root().to_owned();
        if let Err(error) = host::prepare_namespaces(self.screen) {
            let reason = format!("{error:#}");
            self.report.skip("host", "differential", &reason);
            return;
        }
        let step = self
            .screen
            .step("Comparing the engine with the kernel, packet by packet");
        let begun = Instant::now();
        let ran = differential_run(&root);
        step.forget();
        match ran {
            Ok(Compared::Skipped(reason)) => self.report.skip("host", "differential", &reason),
            other => {
                let (outcome, seen) = match other {
                    Ok(Compared::Agree(line)) => (Outcome::Success, vec![line]),
                    Ok(Compared::Differ(text)) => (Outcome::Failure(text), Vec::new()),
                    Ok(Compared::Skipped(reason)) => (Outcome::Skip(reason), Vec::new()),
                    Err(error) => (Outcome::Error(format!("{error:#}")), Vec::new()),
                };
                let time = begun.elapsed();
                self.report.add("host", "differential", outcome, time, seen);
            }
        }
    }

    /// Builds the image of a copy of this clone in another folder and compares.
    fn reproducible(&mut self) {
        let (workspace, screen) = (self.workspace, self.screen);
        let step = screen.step("Building the image in two folders");
        self.report.check("host", "image-reproducible", || {
            let here = image::prepare(workspace, &screen.silenced(), Variant::Normal)?;
            let there = image::prepare_elsewhere(workspace)?;
            must(here.sha256 == there, || {
                format!("{} here, {there} in another folder", here.sha256)
            })?;
            Ok(vec![format!("sha256 {there} in both")])
        });
        step.forget();
    }

    // ---- lab

    fn in_lab(&mut self) {
        let (workspace, screen) = (self.workspace, self.screen);
        let mut image = None;
        if self.wants("image") || self.wants_any_claim() {
            self.report.check("lab", "image", || {
                let built = image::prepare(workspace, screen, Variant::Normal)?;
                let line = format!("{} bytes, sha256 {}", built.bytes, built.sha256);
                let fits = built.bytes <= image::MOST_BYTES;
                // One that is too large can still show what else is wrong.
                image = Some(built);
                must(fits, || {
                    format!("{line}: more than {} bytes", image::MOST_BYTES)
                })?;
                Ok(vec![line])
            });
        }
        let Some(image) = image else { return };
        let base = match Base::prepare(workspace, screen, false) {
            Ok(base) => base,
            Err(error) => {
                // A machine that could run the lab and does not is an error, never a skip.
                self.report.add(
                    "lab",
                    "prepare",
                    Outcome::Error(format!("{error:#}")),
                    Duration::ZERO,
                    Vec::new(),
                );
                return;
            }
        };
        self.usual_world(&base, &image);
        if self.wants("small") {
            self.small_world(&base, &image);
        }
        if self.wants("boot-time") || claims::COST.iter().any(|claim| self.wants(claim.name)) {
            self.measured_world(&base, &image);
        }
        if claims::QUBES.iter().any(|claim| self.wants_of_qubes(claim)) {
            self.qubes_world(&base, &image);
        }
        if self.wants("panic") {
            self.crash(&base);
        }
    }

    fn wants_any_claim(&self) -> bool {
        claims::MAIN
            .iter()
            .chain(claims::MORE)
            .chain(claims::COST)
            .any(|claim| self.wants(claim.name))
            || claims::QUBES.iter().any(|claim| self.wants_of_qubes(claim))
            || ["boot", "boot-time", "small", "panic"]
                .iter()
                .any(|name| self.wants(name))
    }

    fn start(&self, base: &Base, image: &Path, memory: Option<u32>) -> Result<LabWorld> {
        let mut topology = Topology::new(FirewallKind::Image(image.to_owned()), CLIENTS);
        if let Some(memory) = memory {
            topology.firewall.memory_mib = memory;
        }
        let options = WorldOptions {
            lab: self.lab_options(self.arguments.icount),
            booted_clients: true,
        };
        LabWorld::start(base, self.screen, options, topology)
    }

    /// Checks all claims in one lab boot.
    fn usual_world(&mut self, base: &Base, image: &Image) {
        let wanted: Vec<&Claim> = claims::MAIN
            .iter()
            .chain(claims::MORE)
            .filter(|claim| self.wants(claim.name))
            .collect();
        if wanted.is_empty() {
            return;
        }
        let Some(mut world) = self.boot(base, &image.path, "boot", None) else {
            for claim in wanted {
                self.report
                    .skip("lab", claim.name, "the lab did not come up");
            }
            return;
        };
        for claim in wanted {
            self.report.claim(self.screen, "lab", &mut world, claim);
        }
    }

    /// Checks the main claims with little memory.
    fn small_world(&mut self, base: &Base, image: &Image) {
        let Some(mut world) = self.boot(base, &image.path, "small-boot", Some(SMALL_MEMORY)) else {
            return;
        };
        for claim in claims::MAIN {
            self.report.claim(self.screen, "small", &mut world, claim);
        }
    }

    /// Whether a claim is wanted in the lab of Qubes: those that are checked elsewhere, too, only with all the others.
    fn wants_of_qubes(&self, claim: &Claim) -> bool {
        self.wants("qubes") || (claim.name.starts_with("qubes-") && self.wants(claim.name))
    }

    /// Checks what Qubes OS wants, in one boot of the lab.
    fn qubes_world(&mut self, base: &Base, image: &Image) {
        let mut topology = Topology::new(FirewallKind::Image(image.path.clone()), CLIENTS);
        topology.firewall.source = Source::QubesDb;
        let options = WorldOptions {
            lab: self.lab_options(self.arguments.icount),
            booted_clients: true,
        };
        let mut world = None;
        let started = LabWorld::start(base, self.screen, options, topology);
        self.report.check("qubes", "boot", || {
            let running = world.insert(started?);
            let (_, line) = readiness(running)?;
            let mut seen = Double::loopback(&running.lab)?;
            seen.insert(0, line);
            Ok(seen)
        });
        let Some(mut world) = world else { return };
        for claim in claims::QUBES {
            if self.wants_of_qubes(claim) {
                self.report.claim(self.screen, "qubes", &mut world, claim);
            }
        }
    }

    /// Starts a world.
    fn boot(
        &mut self,
        base: &Base,
        image: &Path,
        name: &str,
        memory: Option<u32>,
    ) -> Option<LabWorld> {
        let started = self.start(base, image, memory);
        let mut world = None;
        self.report.check("lab", name, || {
            let running = world.insert(started?);
            let (_, line) = readiness(running)?;
            Ok(vec![line])
        });
        world
    }

    /// Checks what the firewall costs, by the instruction clock: the same on any host.
    fn measured_world(&mut self, base: &Base, image: &Image) {
        let started = self.start_with(base, &image.path, 1, Some(ICOUNT_SHIFT));
        if let Err(error) = &started
            && format!("{error:#}").contains(NO_INSTRUCTION_CLOCK)
        {
            let reason =
                "this QEMU's instruction clock cannot run Xen: it ends with \"Bad icount read\"";
            self.report.skip("cost", "boot-time", reason);
            for claim in claims::COST {
                self.report.skip("cost", claim.name, reason);
            }
            return;
        }
        let mut world = None;
        self.report.check("cost", "boot-time", || {
            let (ready, line) = readiness(world.insert(started?))?;
            must(ready < READY_WITHIN, || line.clone())?;
            Ok(vec![line])
        });
        let Some(mut world) = world else { return };
        for claim in claims::COST {
            self.report.claim(self.screen, "cost", &mut world, claim);
        }
    }

    /// Has an image crash in every way it can, and reads what it says.
    fn crash(&mut self, base: &Base) {
        let (workspace, screen) = (self.workspace, self.screen);
        let image = match image::prepare(workspace, screen, Variant::CrashCommands) {
            Ok(image) => image.path,
            Err(error) => {
                let outcome = Outcome::Error(format!("{error:#}"));
                self.report
                    .add("lab", "panic", outcome, Duration::ZERO, Vec::new());
                return;
            }
        };
        let started = self.start_with(base, &image, 0, self.arguments.icount);
        self.report.check("lab", "panic", || {
            let mut world = started?;
            crash_and_read(&mut world)
        });
    }

    fn lab_options(&self, icount: Option<u8>) -> LabOptions {
        LabOptions {
            machine: MachineOptions {
                icount_shift: icount,
                ..MachineOptions::default()
            },
            cold: self.arguments.cold,
        }
    }

    /// Starts a world of this many clients with a clock of its own.
    fn start_with(
        &self,
        base: &Base,
        image: &Path,
        clients: u8,
        icount: Option<u8>,
    ) -> Result<LabWorld> {
        let topology = Topology::new(FirewallKind::Image(image.to_owned()), clients);
        let options = WorldOptions {
            lab: self.lab_options(icount),
            booted_clients: clients > 0,
        };
        LabWorld::start(base, self.screen, options, topology)
    }
}

/// How long the firewall took from its first instruction to being ready for clients.
fn readiness(world: &LabWorld) -> Result<(Duration, String)> {
    let seen = snapshot(world)?;
    let after_entry = Duration::from_nanos(seen.ready_nanos);
    let ready = Duration::from_nanos(seen.ready_running_nanos);
    must(!ready.is_zero(), || "the firewall is not ready".to_owned())?;
    let line = format!(
        "ready for clients after {:.1} ms of guest time, {:.1} ms after entry with waiting; {} MiB",
        ready.as_secs_f64() * 1e3,
        after_entry.as_secs_f64() * 1e3,
        world.topology().firewall.memory_mib
    );
    Ok((ready, line))
}

/// Ways to crash, with what the console must say then.
const CRASHES: [(&str, &str); 4] = [
    ("crash panic", "kernel/src/crash.rs:"),
    ("crash null", "page fault"),
    ("crash text", "page fault"),
    ("crash stack", "page fault"),
];

fn crash_and_read(world: &mut LabWorld) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    for (command, expected) in CRASHES {
        let firewall = world.firewall()?.clone();
        let position = firewall.console.send_line(command)?;
        let patience = world.lab.patience(Duration::from_secs(20));
        let text = firewall
            .console
            .wait_for(position, patience, expected)
            .map_err(|error| NotSo(format!("{command}: {error:#}")))?;
        let line = text
            .lines()
            .find(|line| line.contains(expected))
            .context("the line is gone")?;
        seen.push(format!("{command}: {}", line.trim()));
        let mut state = None;
        for _ in 0..50 {
            state = world.lab.state("fw")?;
            if state.as_ref().is_some_and(|state| state.contains('c')) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        must(
            state.as_ref().is_some_and(|state| state.contains('c')),
            || format!("{command}: the domain is not crashed but {state:?}"),
        )?;
        world.stop_firewall()?;
        world.start_firewall()?;
    }
    Ok(seen)
}

/// Has shellcheck read a script; a machine without it is no failure.
fn shellcheck(script: &Path) -> Result<String> {
    let Ok(output) = Command::new("shellcheck").arg(script).output() else {
        return Ok("the installer was not checked: there is no shellcheck here".into());
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    must(output.status.success(), || said)?;
    Ok("shellcheck has no objection to the installer".into())
}

/// What the differential test has found.
enum Compared {
    /// Nothing, but for this much.
    Agree(String),
    /// This.
    Differ(String),
    /// It cannot run here.
    Skipped(String),
}

/// Runs the differential test and reads its JSON.
fn differential_run(root: &Path) -> Result<Compared> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(["run", "--release", "--quiet", "--package", "differential"])
        .args(["--", "--json"])
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .context("cannot run the differential test")?;
    let said = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let found: serde_json::Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("no result: {}", said()))?;
    let number = |name: &str| found.get(name).and_then(serde_json::Value::as_u64);
    let text = |name: &str| {
        let value = found.get(name).and_then(serde_json::Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    Ok(match text("outcome").as_str() {
        "success" => Compared::Agree(format!(
            "{} rule sets, {} packets",
            number("rule_sets").unwrap_or(0),
            number("packets").unwrap_or(0)
        )),
        "skipped" => Compared::Skipped(text("reason")),
        "failure" => Compared::Differ(text("failure")),
        other => bail!("the differential test says {other:?}: {}", said()),
    })
}

/// What a run of cargo said.
struct CargoOutput {
    good: bool,
    text: String,
}

/// Runs cargo in the clone.
fn cargo(root: &Path, arguments: &[&str]) -> Result<CargoOutput> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .args(arguments)
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run cargo {}", arguments.join(" ")))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(CargoOutput {
        good: output.status.success(),
        text,
    })
}

/// Adds up the result lines of all test programs.
fn count_tests(text: &str) -> String {
    let (mut passed, mut failed, mut ignored, mut programs) = (0u64, 0u64, 0u64, 0u64);
    for line in text.lines() {
        let Some(counts) = line.trim().strip_prefix("test result: ") else {
            continue;
        };
        programs += 1;
        let number = |word: &str| -> u64 {
            counts
                .split([';', '.'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
                .unwrap_or(0)
        };
        passed += number("passed");
        failed += number("failed");
        ignored += number("ignored");
    }
    format!("{passed} tests passed, {failed} failed, {ignored} ignored, in {programs} programs")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(count);
    lines.get(from..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_test_programs_are_added_up() {
        let text = "running 2 tests\n..\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\ntest result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n";
        assert_eq!(
            count_tests(text),
            "5 tests passed, 1 failed, 1 ignored, in 2 programs"
        );
    }
}
