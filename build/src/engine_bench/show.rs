//! The engine's figures as a person reads them.

use super::rows::{ROWS, TIMES};
use super::{
    Compiled, Engine, Linux, MOST_FLOW_BYTES, MOST_STEP_MICROS, PacketPath, REFERENCE_HASH_NANOS,
    Timed, USEFUL_CALIBRATION,
};
use crate::screen::{BAD, BOLD, GOOD, WARN, paint};

impl Engine {
    /// Shows everything.
    pub fn print(&self) {
        self.print_counts();
        print_memory(self);
        print_path(&self.packet_path);
        if let Some(calibration) = self.calibration {
            print_times(calibration, &self.nanoseconds);
            print_rules(&self.rules);
        }
        if let Some(linux) = &self.linux {
            print_linux(linux, &self.nanoseconds);
        }
    }

    fn print_counts(&self) {
        heading(
            "Engine, instructions per packet or per what is named (callgrind; 64-byte frames unless said otherwise)",
        );
        anstream::println!(
            "  {:<5} {:<42} {:>11} {:>9} {:<5} {:>11}  peers, as performance.md quotes them",
            "",
            "",
            "count",
            "goal",
            "",
            "baseline"
        );
        for (row, counted) in ROWS.iter().zip(&self.instructions) {
            anstream::println!(
                "  {:<5} {:<42} {:>11.1} {:>9} {} {:>11}  {}",
                row.id,
                row.name,
                counted.instructions,
                number(counted.most),
                verdict(counted.met),
                number(counted.baseline),
                row.peer
            );
        }
        anstream::println!(
            "  W12 is not the engine's, which decides about the headers (W11): kernel/src/offload.rs cuts, for receivers without GSO"
        );
        anstream::println!(
            "  P17 at most two buckets are read for a key, whatever the keys are: the index has no third place (conntrack/index.rs)"
        );
    }
}

fn heading(text: &str) {
    anstream::println!("\n{}", paint(BOLD, text));
}

fn print_memory(engine: &Engine) {
    heading("Engine, memory: bytes per flow at capacity, everything included");
    for (what, bytes) in &engine.bytes_per_flow {
        // The goal is about IPv4; an IPv6 flow has four times the address bytes.
        let goal = what.starts_with("Ipv4").then_some(MOST_FLOW_BYTES);
        anstream::println!(
            "  {:<5} {:<42} {bytes:>11.1} {:>9} {}",
            "P13",
            format!("{what} flows"),
            number(goal),
            verdict(goal.map(|most| *bytes <= most))
        );
    }
}

fn print_path(path: &PacketPath) {
    heading("Engine, what no packet may cause");
    let line = |what: &str, count: usize| {
        anstream::println!(
            "  {:<5} {what:<42} {count:>11} {:>9} {}",
            "P19",
            0,
            verdict(Some(count == 0))
        );
    };
    let allocating = path.allocations.values().filter(|times| **times > 0);
    let workloads = path.allocations.len();
    line(
        &format!("workloads of {workloads} that allocate or free memory"),
        allocating.count(),
    );
    match (&path.machine_code, &path.unread) {
        (Some(code), _) => {
            let (functions, locks, floats) = code.counts();
            line(&format!("locks in its {functions} functions"), locks);
            line("floating-point instructions in them", floats);
        }
        (None, Some(reason)) => {
            anstream::println!("  P19   locks and floating point not looked for: {reason}");
        }
        (None, None) => {}
    }
}

fn print_times((hash, load): (f64, f64), times: &[Timed]) {
    heading("Engine, nanoseconds per packet, here and scaled to the machine of the goals");
    anstream::println!(
        "  calibration: SipHash-1-3 {hash:.1} ns (there {REFERENCE_HASH_NANOS}), dependent load {load:.0} ns (there 153)"
    );
    if hash / REFERENCE_HASH_NANOS > USEFUL_CALIBRATION {
        let text = "this machine is busy or another kind: the times say little, and are not judged";
        anstream::println!("  {}", paint(WARN, text));
    }
    anstream::println!(
        "  {:<5} {:<42} {:>11} {:>9} {:>9} {:>9}",
        "",
        "",
        "median",
        "least",
        "scaled",
        "goal"
    );
    for (row, timed) in TIMES.iter().zip(times) {
        anstream::println!(
            "  {:<5} {:<42} {:>11.1} {:>9.1} {:>9.1} {:>9} {}  {}",
            timed.id,
            timed.name,
            timed.median,
            timed.least,
            timed.scaled,
            number(timed.most),
            verdict(timed.met),
            row.peer
        );
    }
}

fn print_rules(rules: &[Compiled]) {
    heading(
        "Rules of one client: compilation (P14) and its longest step (P15), microseconds, scaled",
    );
    anstream::println!(
        "  {:>6} {:>11} {:>9} {:<5} {:>11} {:>9} {:<5} {:>6} {:>13} {:>9}",
        "rules",
        "bytes/rule",
        "goal",
        "",
        "in one go",
        "goal",
        "",
        "steps",
        "longest step",
        "goal"
    );
    for row in rules {
        let met = |value: f64, most: Option<f64>| verdict(most.map(|most| value <= most));
        anstream::println!(
            "  {:>6} {:>11.0} {:>9} {} {:>11.1} {:>9} {} {:>6} {:>13.1} {:>9.1} {}",
            row.rules,
            row.bytes_per_rule,
            number(row.most_bytes),
            met(row.bytes_per_rule, row.most_bytes),
            row.micros,
            number(row.most_micros),
            met(row.micros, row.most_micros),
            row.steps,
            row.longest_step_micros,
            MOST_STEP_MICROS,
            met(row.longest_step_micros, Some(MOST_STEP_MICROS)),
        );
    }
}

fn print_linux(linux: &Linux, times: &[Timed]) {
    heading(
        "Linux beside it: the kernel of this machine, nftables with the same clients, rules and frames",
    );
    match linux {
        Linux::Skipped { reason } => anstream::println!("  skipped: {reason}"),
        Linux::Measured(figures) => {
            let ours = |name: &str| times.iter().find(|row| row.name == name);
            let established = ours("established, 1,024 flows").map(|row| row.median);
            let new = ours("new flow, 65,536 flows").map(|row| row.median);
            figures.print(established, new);
        }
    }
}

/// A number, or room for one.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| format!("{value:.1}"))
}

/// A word for whether a goal is met.
fn verdict(met: Option<bool>) -> String {
    match met {
        Some(true) => paint(GOOD, "met  ").to_string(),
        Some(false) => paint(BAD, "miss ").to_string(),
        None => "     ".to_owned(),
    }
}
