//! One run of each workload: the world before, the measured part, and the check of what became of it.
//!
//! Every function returns how many packets (flows, replacements) the counted instructions are for.

use std::sync::Arc;

use allocation_counter::AllocationInfo;
use firewall::rule::{Action, Family};
use firewall::ruleset::Compiler;
use firewall::{Engine, Time, Work};

use crate::calibration::processor_time;
use crate::control::{self, Stage};
use crate::packet::source;
use crate::rules::chain;
use crate::workload::{Arrival, PACKETS, Plan};
use crate::world::IDLE_SPREAD_MILLIS;
use crate::{Failure, measured, side};

/// When the measured part begins.
const NOW: Time = Time::from_secs(1001);

/// What the kernel lets expire in one iteration of its main loop (`EXPIRIES_PER_ITERATION`).
const EXPIRIES: u32 = 48;

/// Flows that the flooding client makes up (W15).
const FLOODS: u32 = 65_536;

/// Frames of a batch.
const BATCH: usize = measured::BATCH;

/// Lets the engine decide, and checks the fate of every frame.
fn decide<R>(
    engine: &mut Engine,
    arrivals: &mut [Arrival],
    now: Time,
    by: impl FnOnce(&mut Engine, &mut [Work<'_>], Time) -> R,
) -> Result<(), Failure> {
    let fates: Vec<_> = arrivals.iter().map(|arrival| arrival.fate).collect();
    let mut work: Vec<Work<'_>> = arrivals.iter_mut().map(Arrival::work).collect();
    by(engine, &mut work, now);
    for (at, (work, fate)) in work.iter().zip(fates).enumerate() {
        fate.check(work.verdict)
            .map_err(|error| format!("frame {at}: {error}"))?;
    }
    Ok(())
}

/// A workload that is nothing but its frames.
///
/// # Errors
///
/// If a frame has another fate than the workload means, as for all that follow.
pub fn plain(plan: &Plan) -> Result<usize, Failure> {
    let mut engine = plan.world()?;
    let mut arrivals = plan.arrivals();
    decide(&mut engine, &mut arrivals, NOW, measured::decide)?;
    Ok(arrivals.len())
}

/// All flows idle out at once.
///
/// # Errors
///
/// If flows are left.
pub fn expire(plan: &Plan) -> Result<usize, Failure> {
    let mut engine = plan.world()?;
    measured::expire(&mut engine, Time::from_secs(1_000_000));
    let left = engine.counters().flows_created - engine.counters().flows_expired;
    if left > 0 {
        return Err(format!("{left} flows have not expired").into());
    }
    Ok(usize::try_from(plan.flows())?)
}

/// W16: the flows idle out, as the main loop lets them, while others are in use. Counts what
/// [`control`] does.
///
/// # Errors
///
/// If flows are left, or a packet in between has another fate.
pub fn idle(plan: &Plan) -> Result<usize, Failure> {
    let mut engine = plan.world()?;
    let flows = u64::from(plan.flows());
    // Often enough that what is due never outgrows what one iteration may do by much.
    let pause = (IDLE_SPREAD_MILLIS * u64::from(EXPIRIES) / flows.max(1)).clamp(10, 100);
    let mut millis = 1_000_000 + IDLE_SPREAD_MILLIS;
    let end = millis + 60_000;
    let mut batches = Vec::new();
    while engine.counters().flows_expired < flows {
        if millis > end {
            let gone = engine.counters().flows_expired;
            return Err(format!("{gone} of {flows} flows have expired after a minute").into());
        }
        let now = Time::from_millis(millis);
        let mut arrivals = match batches.pop() {
            Some(batch) => batch,
            None => {
                let mut all = plan.arrivals();
                while !all.is_empty() {
                    batches.push(all.split_off(all.len().saturating_sub(BATCH)));
                }
                continue;
            }
        };
        decide(&mut engine, &mut arrivals, now, side::decide)?;
        while control::tick(&mut engine, now, EXPIRIES) {}
        millis += pause;
    }
    Ok(usize::try_from(flows)?)
}

/// W17: one client's rules are replaced by `rules` others while its flows and everyone's go on. Counts
/// what [`control`] does.
///
/// # Errors
///
/// If the rules cannot be compiled, or a packet in between has another fate.
pub fn replace(plan: &Plan, rules: u16) -> Result<usize, Failure> {
    let mut engine = plan.world()?;
    let traffic = |engine: &mut Engine| {
        let mut arrivals = plan.arrivals();
        arrivals.truncate(BATCH);
        decide(engine, &mut arrivals, NOW, side::decide)
    };
    let chain = Arc::new(chain(rules, Action::Accept, Family::Ipv4)?);
    let mut compiler = Compiler::new(chain);
    let compiled = loop {
        match control::step(compiler).map_err(|error| error.to_string())? {
            Stage::Working(more) => compiler = more,
            Stage::Done(rules) => break rules,
        }
        traffic(&mut engine)?;
    };
    control::replace(&mut engine, source(0, false), compiled);
    traffic(&mut engine)?;
    Ok(1)
}

/// W15: the workload, beside one client that makes up flow after flow. Counts the others' packets only.
///
/// # Errors
///
/// If a packet of either has another fate.
pub fn under_flood(plan: &Plan) -> Result<usize, Failure> {
    let mut engine = plan.world()?;
    let mut wanted = plan.arrivals();
    wanted.retain(|arrival| !Plan::is_flooder(arrival));
    let batches = wanted.chunks_mut(BATCH);
    let each = usize::try_from(FLOODS)? / batches.len();
    let mut floods = plan.floods(FLOODS);
    let mut counted = 0;
    for batch in batches {
        let mut flood: Vec<Arrival> = floods.by_ref().take(each).collect();
        decide(&mut engine, &mut flood, NOW, side::decide)?;
        decide(&mut engine, batch, NOW, measured::decide)?;
        counted += batch.len();
    }
    Ok(counted)
}

/// What a library of parts takes to read and write the workload's packets.
///
/// # Errors
///
/// If it does not understand all of them.
pub fn peer(peer: &str, plan: &Plan) -> Result<usize, Failure> {
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
    Ok(done)
}

/// Nanoseconds per packet: the median and the least of eleven batches of eight rounds.
///
/// # Errors
///
/// If a frame has another fate than the workload means.
pub fn time(plan: &Plan) -> Result<(f64, f64), Failure> {
    const ROUNDS: u32 = 8;
    let mut engine = plan.world()?;
    let mut per_packet = Vec::new();
    for batch in 0..11_u64 {
        let mut spent = 0.0;
        for round in 0..ROUNDS {
            let mut arrivals = plan.arrivals_of_round(round);
            let fates: Vec<_> = arrivals.iter().map(|arrival| arrival.fate).collect();
            let now = Time::from_millis(1_001_000 + batch * 100 + u64::from(round));
            let mut work: Vec<Work<'_>> = arrivals.iter_mut().map(Arrival::work).collect();
            let start = processor_time();
            measured::decide(&mut engine, &mut work, now);
            spent += (processor_time() - start).as_secs_f64();
            for (work, fate) in work.iter().zip(fates) {
                fate.check(work.verdict)?;
            }
        }
        per_packet.push(spent * 1e9 / f64::from(ROUNDS * PACKETS));
        if plan.makes_flows() {
            // Flows must be new in the next batch, too.
            engine = plan.world()?;
        }
    }
    per_packet.sort_unstable_by(f64::total_cmp);
    let at = |at: usize| per_packet.get(at).copied().unwrap_or(0.0);
    Ok((at(5), at(0)))
}

/// P19: what the measured part of a workload allocates, and the expiry of all of its flows.
///
/// # Errors
///
/// If a frame has another fate than the workload means.
pub fn allocations(plan: &Plan) -> Result<AllocationInfo, Failure> {
    let mut engine = plan.world()?;
    let mut arrivals = plan.arrivals();
    let fates: Vec<_> = arrivals.iter().map(|arrival| arrival.fate).collect();
    let mut work: Vec<Work<'_>> = arrivals.iter_mut().map(Arrival::work).collect();
    let info = allocation_counter::measure(|| {
        measured::decide(&mut engine, &mut work, NOW);
        measured::expire(&mut engine, Time::from_secs(1_000_000));
    });
    for (work, fate) in work.iter().zip(fates) {
        fate.check(work.verdict)?;
    }
    Ok(info)
}
