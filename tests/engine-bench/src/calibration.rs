//! The clock, and the two loops of `performance.md` section 3 to compare machines with.
//!
//! The clock counts this thread's processor time, so that other work on the machine takes cache and memory from
//! what is measured, but not whole turns of the scheduler.

use std::hash::Hasher;
use std::hint::black_box;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Times a loop is run; the fastest one counts.
const RUNS: u32 = 5;

/// Processor time that this thread has used.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Nanoseconds of one of `rounds` rounds, at best.
fn best(rounds: u32, mut work: impl FnMut()) -> f64 {
    let run = |_| {
        let begin = processor_time();
        work();
        processor_time() - begin
    };
    let best = (0..RUNS).map(run).min().unwrap_or_default();
    best.as_secs_f64() * 1e9 / f64::from(rounds)
}

/// Nanoseconds of one SipHash-1-3 of a word in a chain.
pub fn hash_nanos() -> f64 {
    const ROUNDS: u32 = 1_000_000;
    best(ROUNDS, || {
        let mut chain = 1_u64;
        for _ in 0..ROUNDS {
            let mut hasher = std::collections::hash_map::DefaultHasher::new();
            hasher.write_u64(chain);
            chain = hasher.finish();
        }
        black_box(chain);
    })
}

/// Nanoseconds of one load that depends on the one before, over 64 MiB.
pub fn load_nanos() -> f64 {
    const ROUNDS: u32 = 1_000_000;
    let len = (64_usize << 20) / 8;
    let mut links: Vec<usize> = (0..len).collect();
    let mut x = 1_u64;
    // Sattolo's shuffle: one cycle through everything.
    for at in (1..len).rev() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        links.swap(at, usize::try_from(x >> 33).unwrap_or(0) % at);
    }
    let mut at = 0;
    best(ROUNDS, || {
        for _ in 0..ROUNDS {
            at = links.get(at).copied().unwrap_or(0);
        }
        black_box(at);
    })
}
