//! A whole run: many scripts on all processors, one report.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::kernel;
use crate::replay::{self, Disagreement, Findings};
use crate::report::{self, Total};
use crate::script::Script;
use crate::shrink;
use crate::speed;

/// The seed when nobody gives one: every run of CI is the same.
const SEED: u64 = 0x0051_7562_6573;

/// Runs of a timed script, of which one must be in time.
const TRIES: usize = 4;

/// The packet engine against the Linux kernel: the same packets through both.
///
/// Needs root, for network namespaces of its own, and the programs nft and ip. Nothing outside of those
/// namespaces is touched. Ends with 0 if all agree, with 1 if not, with 77 if it cannot run here.
#[derive(Debug, Parser)]
#[command(name = "differential")]
pub struct Options {
    /// First seed; each rule set has the next one
    #[arg(long, default_value_t = SEED)]
    seed: u64,
    /// Rule sets
    #[arg(long, default_value_t = 400)]
    rule_sets: u64,
    /// Packets in all, at least; more rule sets are run until there are as many
    #[arg(long, default_value_t = 100_000)]
    packets: u64,
    /// Packets in each rule set, about
    #[arg(long, default_value_t = 400)]
    packets_per_set: usize,
    /// Scripts in which time passes, all at once beside the others
    #[arg(long, default_value_t = 8)]
    timed: u64,
    /// Go on for so long instead
    #[arg(long)]
    hours: Option<f64>,
    /// Compare nothing, but measure what a packet costs the kernel with the rules of 250 clients
    #[arg(long, conflicts_with_all = ["hours", "rule_sets", "packets"])]
    speed: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

struct Shared<'a> {
    options: &'a Options,
    begun: Instant,
    next: AtomicU64,
    stop: AtomicBool,
    total: Mutex<Total>,
    bar: ProgressBar,
}

/// Runs all of it and says what came of it.
///
/// # Errors
///
/// If the kernel cannot be set up, although it could before.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(reason) = kernel::obstacle() {
        if options.json {
            println!("{}", json!({ "outcome": "skipped", "reason": reason }));
        } else {
            println!("SKIPPED: {reason}");
        }
        return Ok(ExitCode::from(77));
    }
    if options.speed {
        let figures = speed::measure()?;
        if options.json {
            println!("{:#}", figures.json());
        } else {
            println!("{}", figures.text());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let begun = Instant::now();
    let bar = if options.json {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(options.rule_sets)
    };
    if let Ok(style) =
        ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {pos}/{len} rule sets {msg}")
    {
        bar.set_style(style.progress_chars("=> "));
    }
    let shared = Shared {
        options,
        begun,
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        total: Mutex::new(Total::default()),
        bar,
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let all: Vec<_> = (0..workers)
            .map(|_| scope.spawn(|| shared.work()))
            .collect();
        let timed = if options.rule_sets == 1 {
            0
        } else {
            options.timed
        };
        let timed: Vec<_> = (0..timed)
            .map(|number| {
                scope.spawn({
                    let shared = &shared;
                    move || shared.wait(number)
                })
            })
            .collect();
        for worker in all.into_iter().chain(timed) {
            worker.join().map_err(|_| anyhow!("a worker crashed"))??;
        }
        Ok::<(), anyhow::Error>(())
    })?;
    shared.bar.finish_and_clear();
    let mut total = shared
        .total
        .into_inner()
        .map_err(|_| anyhow!("a worker crashed"))?;
    total.seconds = begun.elapsed().as_secs_f64();
    let gaps = total.gaps();
    // One rule set is run to see something again; it cannot show everything.
    if options.rule_sets > 1 && total.failure.is_none() && !gaps.is_empty() {
        total.failure = Some(gaps.join("\n"));
    }
    if options.json {
        println!("{:#}", total.json(options.seed));
    } else {
        print!("{}", total.text());
        match &total.failure {
            Some(text) => println!("\nFAILURE: {text}"),
            None => println!("\nSUCCESS"),
        }
    }
    Ok(if total.failure.is_some() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

impl Shared<'_> {
    fn is_over(&self, number: u64, packets: u64) -> bool {
        match self.options.hours {
            Some(hours) => self.begun.elapsed() > Duration::from_secs_f64(hours * 3600.0),
            None if self.options.rule_sets <= 1 => number >= self.options.rule_sets,
            None => number >= self.options.rule_sets && packets >= self.options.packets,
        }
    }

    fn work(&self) -> Result<()> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let packets = self.total.lock().map_or(0, |total| total.packets);
            if self.stop.load(Ordering::Relaxed) || self.is_over(number, packets) {
                return Ok(());
            }
            let seed = self.options.seed.wrapping_add(number);
            let script = Script::new(seed, self.options.packets_per_set);
            let mut findings = replay::run(&script)?;
            let failure = self.judge(&script, &mut findings, shrink::shrink)?;
            let packets = self.add(&findings, failure)?;
            self.bar.inc(1);
            self.bar.set_message(format!("{packets} packets"));
        }
    }

    /// Runs a timed script, again if the machine was too slow.
    fn wait(&self, number: u64) -> Result<()> {
        let script = Script::timed(self.options.seed.wrapping_add(number));
        for _ in 0..TRIES {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let mut findings = replay::run(&script)?;
            if !findings.late {
                let failure = self.judge(&script, &mut findings, shrink::to_one_flow)?;
                self.add(&findings, failure)?;
                return Ok(());
            }
        }
        // Without any that was in time, coverage says what is missing.
        Ok(())
    }

    /// What to say about a script, if it failed and is the first one.
    fn judge(
        &self,
        script: &Script,
        findings: &mut Findings,
        shrink: fn(&Script, Disagreement) -> Result<(Script, Disagreement)>,
    ) -> Result<Option<String>> {
        let found = findings.disagreement.take();
        let Some(found) = found.filter(|_| !self.stop.swap(true, Ordering::Relaxed)) else {
            return Ok(None);
        };
        self.bar.set_message("shrinking");
        let (shortest, found) = shrink(script, found)?;
        let packets = self.options.packets_per_set;
        Ok(Some(report::failure(&shortest, &found, packets)))
    }

    /// Adds what a script found; returns the packets of all.
    fn add(&self, findings: &Findings, failure: Option<String>) -> Result<u64> {
        let mut total = self.total.lock().map_err(|_| anyhow!("a worker crashed"))?;
        total.add(findings);
        if failure.is_some() {
            total.failure = failure;
        }
        Ok(total.packets)
    }
}
