//! The engine's workloads on the host; `cargo xtask bench --engine` runs this.
//!
//! * `engine-bench count WORKLOAD FLOWS CLIENTS RULES` prepares the world, runs the workload once, checks
//!   that every frame had the fate that the workload means, and prints how many packets (or flows) that
//!   was. Under `valgrind --tool=callgrind --toggle-collect='engine_bench::measured::*'` only the engine's
//!   work is counted, or the control plane's with `engine_bench::control::*`.
//! * `engine-bench time WORKLOAD FLOWS CLIENTS RULES` prints the median and the least nanoseconds per
//!   packet over eleven batches.
//! * `engine-bench compile RULES` prints bytes per rule, microseconds to compile, steps when sliced, and
//!   microseconds of the longest.
//! * `engine-bench calibrate` prints the two calibration loops, `engine-bench memory` bytes per flow at
//!   capacity, `engine-bench allocations` how often each workload allocated.
//!
//! Workloads: `est-up` (W1), `large` (W1 with 1500 bytes), `under-flood` (W1 beside W15, the attacker's
//! packets not counted), `est-down` (W2), `udp-up`, `udp-down`, `udp-unsummed-up`, `udp-unsummed-down`
//! (W3), `est6-up`, `est6-down` (W4), `new` (W5), `refused`, `refused-limited` (W6), `spoof` (W7),
//! `dns-up`, `dns-down`, `dns-tcp-up`, `dns-tcp-down` (W8), `echo`, `echo-down`, `unreachable` (W9),
//! `life` (W10), `gso` (W11), `frag`, `frag-reversed`, `frag-overlap` (W13), `full` (W14), `flood` (W15,
//! half of the packets the attacker's), `idle` (W16), `replace` (W17), `imix` (W18), `lookup` (W19),
//! `expire` (all flows at once), and the peers `smoltcp`, `etherparse`, which read and write what W1 has.
//! W12 is the drivers'; W20 is the program `engine_blocks`.

#![forbid(unsafe_code)]

use engine_bench::workload::Plan;
use engine_bench::{Failure, calibration, lookup, runs};
use firewall::rule::Family;
use firewall::{Engine, Limits};

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "count", workload, flows, clients, rules] => {
            let plan = |name: &str, rules| Plan::new(name, flows.parse()?, clients.parse()?, rules);
            println!("{}", count(workload, rules.parse()?, plan)?);
            Ok(())
        }
        [_, "time", workload, flows, clients, rules] => {
            let plan = Plan::new(workload, flows.parse()?, clients.parse()?, rules.parse()?)?;
            let (median, least) = runs::time(&plan)?;
            println!("{median:.1} {least:.1}");
            Ok(())
        }
        [_, "compile", rules] => {
            let all = lookup::time(rules.parse()?)?;
            let micros = [all.whole, all.longest_step].map(|time| time.as_secs_f64() * 1e6);
            let [whole, longest] = micros;
            println!(
                "{} {whole:.1} {} {longest:.1}",
                all.bytes_per_rule, all.steps
            );
            Ok(())
        }
        [_, "calibrate"] => {
            let (hash, load) = (calibration::hash_nanos(), calibration::load_nanos());
            println!("{hash:.2} {load:.1}");
            Ok(())
        }
        [_, "memory"] => memory(),
        [_, "allocations"] => {
            for name in Plan::names() {
                let info = runs::allocations(&Plan::new(name, 1024, 250, 50)?)?;
                println!("{name} {} {}", info.count_total, info.count_current);
            }
            Ok(())
        }
        _ => Err(
            "usage: engine-bench count|time WORKLOAD FLOWS CLIENTS RULES | compile RULES | \
                  calibrate | memory | allocations"
                .into(),
        ),
    }
}

/// Runs a workload; `plan` makes one by name and number of rules.
fn count(
    workload: &str,
    rules: u16,
    plan: impl Fn(&str, u16) -> Result<Plan, Failure>,
) -> Result<usize, Failure> {
    match workload {
        "expire" => runs::expire(&plan("est-up", rules)?),
        "idle" => runs::idle(&plan(workload, rules)?),
        // Nobody else's rules are that many.
        "replace" => runs::replace(&plan("est-up", 50)?, rules),
        "under-flood" => runs::under_flood(&plan("est-up", rules)?),
        "lookup" => lookup::count(rules),
        "smoltcp" | "etherparse" => runs::peer(workload, &plan("est-up", rules)?),
        _ => runs::plain(&plan(workload, rules)?),
    }
}

fn memory() -> Result<(), Failure> {
    for flows in [4096_u32, 32_768, 1_048_576] {
        let limits = Limits {
            flows4: flows,
            flows6: flows,
            ..Limits::default()
        };
        let engine = Engine::new(limits, [1; 32]);
        for family in [Family::Ipv4, Family::Ipv6] {
            let bytes = u32::try_from(engine.flow_table_bytes(family))?;
            println!(
                "{family:?} {flows} {:.1}",
                f64::from(bytes) / f64::from(flows)
            );
        }
    }
    Ok(())
}
