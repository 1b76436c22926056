//! The engine's workloads of `performance.md` section 2, on the host. `cargo xtask bench --engine` builds
//! this, runs each workload under callgrind, and compares with the goals.
//!
//! * `engine_bench count WORKLOAD FLOWS CLIENTS RULES` prepares the world, lets the engine decide the
//!   workload's frames once, and checks that every frame had the fate that the workload means. Under
//!   `valgrind --tool=callgrind --toggle-collect='engine_bench::measured::*'` only the engine's work is
//!   counted. Prints how many packets (or flows) that was.
//! * `engine_bench time WORKLOAD FLOWS CLIENTS RULES` prints the median and the least nanoseconds per
//!   packet over eleven batches.
//! * `engine_bench calibrate` prints the two calibration loops, and `engine_bench memory` bytes per flow at
//!   capacity.
//!
//! Workloads: `est-up` (W1), `large` (W1 with 1500 bytes), `est-down` (W2), `udp-up`, `udp-down` (W3),
//! `est6-up`, `est6-down` (W4), `new` (W5), `refused` (W6, rate limit off), `spoof` (W7), `dns-up`,
//! `dns-down` (W8), `echo`, `unreachable` (W9), `life` (W10), `gso` (W11), `frag`, `frag-reversed`,
//! `frag-overlap` (W13), `full` (W14), `flood` (W15, half of the packets the attacker's), `expire` (W16),
//! `imix` (W18), and the peers `smoltcp`, `etherparse`, which read and write what W1 has. W19 is the
//! example `ruleset_w19`; W12 is the drivers' and W17 the control plane's.

#![allow(missing_docs, reason = "a program, not a library")]

mod calibration;
mod measured;
mod packet;
mod rules;
mod workload;

use std::error::Error;
use std::time::Instant;

use firewall::rule::Family;
use firewall::{Engine, Limits, Time, Work};
use workload::{Arrival, PACKETS, Plan};

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "count", "expire", flows, clients, rules] => expire(
            &Plan::new("est-up", flows.parse()?, clients.parse()?, rules.parse()?)?,
            flows,
        ),
        [
            _,
            "count",
            peer @ ("smoltcp" | "etherparse"),
            flows,
            clients,
            rules,
        ] => {
            let plan = Plan::new("est-up", flows.parse()?, clients.parse()?, rules.parse()?)?;
            count_peer(peer, &plan)
        }
        [_, "count", workload, flows, clients, rules] => count(&Plan::new(
            workload,
            flows.parse()?,
            clients.parse()?,
            rules.parse()?,
        )?),
        [_, "time", workload, flows, clients, rules] => time(&Plan::new(
            workload,
            flows.parse()?,
            clients.parse()?,
            rules.parse()?,
        )?),
        [_, "calibrate"] => {
            println!(
                "{:.2} {:.1}",
                calibration::hash_nanos(),
                calibration::load_nanos()
            );
            Ok(())
        }
        [_, "memory"] => memory(),
        _ => Err(
            "usage: engine_bench count|time WORKLOAD FLOWS CLIENTS RULES | calibrate | memory"
                .into(),
        ),
    }
}

/// Runs a workload once, and checks the fate of every frame.
fn count(plan: &Plan) -> Result<(), Failure> {
    let mut engine = plan.world()?;
    let mut arrivals = plan.arrivals();
    let fates: Vec<_> = arrivals.iter().map(|arrival| arrival.fate).collect();
    let mut work: Vec<Work<'_>> = arrivals.iter_mut().map(Arrival::work).collect();
    measured::decide(&mut engine, &mut work, Time::from_secs(1001));
    for (at, (work, fate)) in work.iter().zip(fates).enumerate() {
        fate.check(work.verdict)
            .map_err(|error| format!("frame {at}: {error}"))?;
    }
    println!("{}", work.len());
    Ok(())
}

/// Lets all flows idle out.
fn expire(plan: &Plan, flows: &str) -> Result<(), Failure> {
    let mut engine = plan.world()?;
    measured::expire(&mut engine, Time::from_secs(1_000_000));
    let left = engine.counters().flows_created - engine.counters().flows_expired;
    if left > 0 {
        return Err(format!("{left} flows have not expired").into());
    }
    println!("{flows}");
    Ok(())
}

fn count_peer(peer: &str, plan: &Plan) -> Result<(), Failure> {
    let arrivals = plan.arrivals();
    let frames: Vec<&[u8]> = arrivals.iter().map(|arrival| &arrival.bytes[..]).collect();
    let mut out = vec![0; 2048];
    let done = match peer {
        "smoltcp" => measured::smoltcp(&frames, &mut out),
        _ => measured::etherparse(&frames, &mut out),
    };
    if done != frames.len() {
        return Err(format!("{peer} understood {done} of {} packets", frames.len()).into());
    }
    println!("{done}");
    Ok(())
}

fn time(plan: &Plan) -> Result<(), Failure> {
    let mut engine = plan.world()?;
    let mut per_packet = Vec::new();
    for batch in 0..11 {
        let mut spent = 0.0;
        let rounds = 8_u32;
        for round in 0..rounds {
            let mut arrivals = plan.arrivals();
            let now = Time::from_millis(1_001_000 + batch * 100 + u64::from(round));
            let mut work: Vec<Work<'_>> = arrivals.iter_mut().map(Arrival::work).collect();
            let start = Instant::now();
            measured::decide(&mut engine, &mut work, now);
            spent += start.elapsed().as_secs_f64();
        }
        per_packet.push(spent * 1e9 / f64::from(rounds * PACKETS));
    }
    per_packet.sort_unstable_by(f64::total_cmp);
    let at = |at: usize| per_packet.get(at).copied().unwrap_or(0.0);
    println!("{:.1} {:.1}", at(5), at(0));
    Ok(())
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
